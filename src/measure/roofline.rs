//! The roofline: the least time a network can take on a machine of given bandwidth and peak rates.
//!
//! A network is counted as the steps of its plan, each of which reads and writes every value that it names once. In a
//! fused inference plan a convolution with everything per-element behind it (residual, activation) moves
//! e·(N·(x + y [+ residual]) + w) + 4·bias bytes and computes 2·MACs·N FLOP; its least time is
//! max(bytes / bandwidth, FLOP / peak), e the bytes of an element and N the batch. Everything here is a pure function of
//! the graph.

use serde::{Deserialize, Serialize};

use super::peaks::Peaks;
use crate::Result;
use crate::dtype::Dtype;
use crate::engine::{Fusion, Pass, Plan, PlannedStep, StepCost, Target};
use crate::graph::{BlockId, Graph, NodeId};
use crate::ops::step::{Backend, ComputeUnit};

/// Least bytes and FLOPs of one step of a plan in one pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelCost {
    /// The step's name.
    pub name: String,
    /// What it computes, in words.
    pub kind: String,
    /// Its direction.
    pub pass: Pass,
    /// The nodes it covers, in order; ids of the planned graph.
    pub nodes: Vec<NodeId>,
    /// The block it lies in, if any.
    pub block: Option<BlockId>,
    /// The unit it computes on.
    pub unit: ComputeUnit,
    /// Floating-point operations per image, a multiply-accumulate counted as two.
    pub flops: u64,
    /// Elements per image in the type of activations, read and written.
    pub activations: u64,
    /// Elements in the type of activations, read or written once a batch: weights.
    pub weights: u64,
    /// Elements in `f32`, read or written once a batch: biases, statistics, gradients of parameters.
    pub floats: u64,
}

impl KernelCost {
    /// The cost of a step, or of several, that stand for some nodes.
    pub fn new(
        name: String,
        kind: String,
        pass: Pass,
        nodes: Vec<NodeId>,
        block: Option<BlockId>,
        cost: StepCost,
    ) -> Self {
        let StepCost { unit, flops, activations, weights, floats } = cost;
        Self { name, kind, pass, nodes, block, unit, flops, activations, weights, floats }
    }

    /// Least bytes a batch moves.
    pub fn bytes(&self, batch: usize, element_bytes: u64) -> u64 {
        element_bytes * (self.activations * batch as u64 + self.weights) + size_of::<f32>() as u64 * self.floats
    }
}

/// The limits of a machine at one precision.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Roofline {
    /// Memory bandwidth, bytes per second.
    pub bandwidth: f64,
    /// Peak of the matrix units, FLOP per second.
    pub matrix_flops: f64,
    /// Peak of the vector units, FLOP per second.
    pub vector_flops: f64,
    /// Bytes of one element of activations and weights.
    pub element_bytes: u64,
}

/// The data sheet of a GPU: dense rates at the boost clock, without structured sparsity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DataSheet {
    /// The GPU and its form.
    pub name: &'static str,
    /// Its architecture: compute capability times ten.
    pub arch: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Words that the driver's name for it holds.
    words: &'static [&'static str],
    /// Memory bandwidth, bytes per second.
    bandwidth: f64,
    /// Peak of the matrix units in f16, on every one with bf16 also in that, FLOP per second.
    matrix_flops: f64,
    /// Peak of f32 on the vector units, FLOP per second.
    vector_flops: f64,
}

/// GPUs with their data sheets. No kernel reaches these figures: a large copy or matrix product gets to 80 to 95 % of
/// them, and rooflines that were made with such measured rates are lower accordingly.
pub const DATA_SHEETS: [DataSheet; 8] = [
    sheet("V100 SXM2", [70, 80], &["v100", "sxm2"], [900e9, 125e12, 15.7e12]),
    sheet("V100 PCIe", [70, 80], &["v100", "pcie"], [900e9, 112e12, 14e12]),
    // One memory for SXM and PCIe.
    sheet("A100 40GB", [80, 108], &["a100", "40gb"], [1555e9, 312e12, 19.5e12]),
    sheet("A100 SXM 80GB", [80, 108], &["a100", "sxm4", "80gb"], [2039e9, 312e12, 19.5e12]),
    sheet("A100 PCIe 80GB", [80, 108], &["a100", "pcie", "80gb"], [1935e9, 312e12, 19.5e12]),
    // The SXM form calls itself `NVIDIA H100 80GB HBM3`.
    sheet("H100 SXM", [90, 132], &["h100", "hbm3"], [3350e9, 989.4e12, 66.9e12]),
    sheet("H100 PCIe", [90, 114], &["h100", "pcie"], [2000e9, 756e12, 51.2e12]),
    sheet("H200 SXM", [90, 132], &["h200"], [4800e9, 989.4e12, 66.9e12]),
];

/// Words of forms that have limits of their own and no entry: two boards joined at lower clocks, and parts of a GPU.
const OTHER_FORMS: [&str; 2] = ["nvl", "mig"];

/// A row of the table: architecture and multiprocessors; bytes per second of the memory, FLOP per second of the matrix and of
/// the vector units.
const fn sheet(name: &'static str, chip: [u32; 2], words: &'static [&'static str], limits: [f64; 3]) -> DataSheet {
    let ([arch, multiprocessors], [bandwidth, matrix_flops, vector_flops]) = (chip, limits);
    DataSheet { name, arch, multiprocessors, words, bandwidth, matrix_flops, vector_flops }
}

impl DataSheet {
    /// The entry for a GPU that calls itself `name`, such as `Tesla V100-SXM2-16GB`: all its words are in the name.
    pub fn of(name: &str) -> Option<&'static Self> {
        let name = name.to_ascii_lowercase();
        let words: Vec<&str> = name.split(|c: char| !c.is_ascii_alphanumeric()).collect();
        if OTHER_FORMS.iter().any(|form| words.contains(form)) {
            return None;
        }
        DATA_SHEETS.iter().find(|sheet| sheet.words.iter().all(|word| words.contains(word)))
    }

    /// The first entry of an architecture.
    pub fn of_arch(arch: u32) -> Option<&'static Self> {
        DATA_SHEETS.iter().find(|sheet| sheet.arch == arch)
    }

    /// The first entry whose name begins so, in any case, such as `v100`.
    pub fn starting(name: &str) -> Option<&'static Self> {
        let name = name.to_ascii_lowercase();
        DATA_SHEETS.iter().find(|sheet| !name.is_empty() && sheet.name.to_ascii_lowercase().starts_with(&name))
    }

    /// Clock cycles of all multiprocessors in a second, at the clock of the other rates: a multiprocessor does an f32
    /// multiply-add in each of its lanes, 64 up to compute capability 8.0 and 128 from 8.6 on.
    pub fn cycles_per_s(&self) -> f64 {
        let lanes = if self.arch <= 80 { 64.0 } else { 128.0 };
        self.vector_flops / (2.0 * lanes)
    }

    /// The roofline in a precision. The kernels' f32 is that of the vector units, on the matrix units' work too.
    pub const fn roofline(&self, precision: Dtype) -> Roofline {
        let matrix_flops = match precision {
            Dtype::F32 => self.vector_flops,
            Dtype::F16 | Dtype::Bf16 => self.matrix_flops,
        };
        nominal(self.bandwidth, matrix_flops, self.vector_flops, precision.bytes() as u64)
    }
}

const fn nominal(bandwidth: f64, matrix_flops: f64, vector_flops: f64, element_bytes: u64) -> Roofline {
    Roofline { bandwidth, matrix_flops, vector_flops, element_bytes }
}

impl Roofline {
    /// The roofline of measured peaks, which were measured in the same precision.
    pub fn measured(peaks: &Peaks, precision: Dtype) -> Self {
        nominal(peaks.copy_bytes_per_s, peaks.gemm_flops_per_s, peaks.vector_flops_per_s, precision.bytes() as u64)
    }

    /// Least seconds of one kernel for a batch.
    pub fn time(&self, kernel: &KernelCost, batch: usize) -> f64 {
        let flops = kernel.flops as f64 * batch as f64;
        (kernel.bytes(batch, self.element_bytes) as f64 / self.bandwidth).max(flops / self.flops(kernel.unit))
    }

    /// Peak of a unit, FLOP per second.
    pub fn flops(&self, unit: ComputeUnit) -> f64 {
        match unit {
            ComputeUnit::Matrix => self.matrix_flops,
            ComputeUnit::Vector => self.vector_flops,
        }
    }

    /// Shares of the limits that kernels used which took `seconds` together for a batch.
    pub fn utilization(&self, kernels: &[KernelCost], batch: usize, seconds: f64) -> Utilization {
        let seconds = seconds.max(f64::MIN_POSITIVE);
        let sum = |of: &dyn Fn(&KernelCost) -> f64| kernels.iter().map(of).sum::<f64>();
        let bytes = sum(&|k| k.bytes(batch, self.element_bytes) as f64);
        let unit = match kernels.iter().all(|k| k.unit == ComputeUnit::Vector) {
            true => ComputeUnit::Vector,
            false => ComputeUnit::Matrix,
        };
        Utilization {
            flop: sum(&|k| k.flops as f64 * batch as f64) / seconds / self.flops(unit),
            byte: bytes / seconds / self.bandwidth,
            roofline: sum(&|k| self.time(k, batch)) / seconds,
        }
    }
}

/// The kernels of a network's inference plan in order, batch-norm folded: one a convolution. Inverted residuals that run as one
/// step move less, but then arithmetic bounds them, of which bytes say nothing.
///
/// # Errors
/// As [`Graph::shapes`].
pub fn kernel_costs(graph: &Graph) -> Result<Vec<KernelCost>> {
    let (folded, _) = graph.without_batch_norm()?;
    let target = Target { fusion: Fusion::Epilogue, ..Target::inference(Backend::Cuda) };
    Ok(plan_costs(&folded, &Plan::new(&folded, &target)?))
}

/// The cost of every step of a plan of `graph`, those of a training plan's backward pass behind. The optimizer is not
/// counted.
pub fn plan_costs(graph: &Graph, plan: &Plan) -> Vec<KernelCost> {
    let of = |step: &PlannedStep| {
        let block = graph.block_of(step.nodes[0]);
        let kind = step.step.describe();
        KernelCost::new(step.name.clone(), kind, step.pass, step.nodes.clone(), block, plan.cost(step))
    };
    plan.steps.iter().map(of).collect()
}

/// Least seconds of a network for a batch: the sum over its fused kernels.
///
/// # Errors
/// As [`Graph::shapes`].
pub fn network_time(graph: &Graph, batch: usize, roofline: &Roofline) -> Result<f64> {
    Ok(kernel_costs(graph)?.iter().map(|k| roofline.time(k, batch)).sum())
}

/// How much of the machine a measured time used; each is 1 at the limit.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Utilization {
    /// Analytic FLOP / time / peak of the matrix units, or of the vector units where nothing else computes. The peak is
    /// that of the data sheet where it is known.
    pub flop: f64,
    /// Least bytes / time / measured copy bandwidth. Above 1 where activations stayed in caches, which are faster than
    /// the memory the copy was measured on.
    pub byte: f64,
    /// Roofline time / time. Above 1 for the same reason.
    pub roofline: f64,
}

/// Utilization of a network that took `seconds` for `batch` images.
///
/// # Errors
/// As [`Graph::shapes`].
pub fn utilization(graph: &Graph, batch: usize, seconds: f64, roofline: &Roofline) -> Result<Utilization> {
    Ok(roofline.utilization(&kernel_costs(graph)?, batch, seconds))
}
