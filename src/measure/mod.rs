//! Measuring: timers that alternate what is compared, the machine's own peaks, rooflines, and latency of networks and blocks.

mod block_cost;
mod channel_times;
mod comparison;
mod counter_record;
mod latency;
mod latency_source;
mod latency_table;
mod launches;
mod layer_run;
mod layers;
mod limits;
mod machine;
mod network_run;
mod noise;
mod peaks;
mod peer;
mod plan_record;
mod projection;
mod record;
mod roofline;
mod statistics;
mod step_launches;
mod step_times;
mod table_bench;
mod table_work;
mod timer;
mod tuner;

pub use block_cost::{BlockCost, block_costs, merged_cost};
pub use channel_times::ChannelTimes;
pub use comparison::{ComparisonRecord, ComparisonTiming, ComparisonWork, Form, Published};
pub use counter_record::{CounterReport, CounterSetting, LaunchRecord, StepCounters, count_network};
pub use latency::{BlockLatency, Change, Comparison, Latency, block_latencies, compare, network_latency};
pub use latency_source::LatencySource;
pub use latency_table::{LatencyRow, LatencyTable};
pub use launches::Launches;
pub use layer_run::LayerBench;
pub use layers::{LayerEpilogue, LayerPass, TimedLayer};
pub use limits::Limits;
pub use machine::{CacheLevel, Machine};
pub use network_run::{
    DRY_RUN_ARCH, NetworkCase, NetworkRun, Series, launch_counts, peak_memory, row_of_passes, sample_networks,
};
pub use peaks::{Peaks, measure_peaks};
pub use peer::{Answer, LayerAnswer, LayerQuestion, NetworkAnswer, NetworkQuestion, Peer, PeerScript, RuntimeQuestion};
pub use plan_record::{DeviceTime, PlanRecord, PlanSize, StepRecord};
pub use projection::{Bound, ProjectedNetwork, ProjectedStep, ProjectedTime, Projection};
pub use record::{
    BenchRecord, Findings, Headline, LayerPeer, LayerRecord, LayerTiming, LayerWork, LimitsRecord, Measured,
    MissingRuntime, NetworkPeer, NetworkRecord, NetworkTiming, NetworkWork, PeakSource, PeerAbout, PeerPeaks,
    PeerRates, PeerTiming, ProjectedRate, PublishedRecord, RuntimeAbout, RuntimeRecord, RuntimesAbout, Timing, Used,
};
pub use roofline::{
    DATA_SHEETS, DataSheet, KernelCost, Roofline, Utilization, kernel_costs, network_time, plan_costs, utilization,
};
pub use statistics::{Difference, deviation, mean, student_quantile, variance_share};
pub use step_launches::{CountingDevice, DistinctStep, distinct_steps, resources};
pub use step_times::{HostRates, StepTime, step_times};
pub use table_bench::{MeasuredTable, MergedNetwork, Milliseconds, TableBench, TableProgress};
pub use table_work::{Piece, RowWork, TableOptions, TableWork};
pub use timer::{Summary, WARM_UP, Workload, alternate, median, paired, sample};
pub use tuner::{TunedRecord, Tuner};
