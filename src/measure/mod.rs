//! Measuring: timers that alternate what is compared, the machine's own peaks, rooflines, and latency of networks and blocks.

mod latency;
mod machine;
mod peaks;
mod roofline;
mod timer;

pub use latency::{BlockLatency, Comparison, Latency, block_latencies, compare, network_latency};
pub use machine::{Cache, Machine};
pub use peaks::{Peaks, measure_peaks};
pub use roofline::{
    BlockCost, ComputeUnit, KernelCost, NAMED_DEVICES, Pass, Roofline, Utilization, block_costs, kernel_costs,
    network_time, plan_costs, utilization, without_batch_norm,
};
pub use timer::{Summary, Workload, alternate, median, paired, sample};
