//! What launches of a network's plan do, as typed records: the keys of `kernels report --counters NET --json`.

use serde::Serialize;

use super::network_run::gpu_plan;
use super::projection::{ProjectedTime, Projection};
use super::roofline::DataSheet;
use super::step_launches::{CountingDevice, DistinctStep, distinct_steps, resources};
use crate::Result;
use crate::device::cache::Cache;
use crate::device::compiler::CompiledKernel;
use crate::device::counters::{CountedBlocks, Counters, LaunchCounters, TouchedBytes};
use crate::device::gpu::Launch;
use crate::device::occupancy::Occupancy;
use crate::dtype::Dtype;
use crate::engine::{Fusion, Pass};
use crate::model::Model;
use crate::ops::config::KernelTarget;

/// Counts of a network's plan over a batch.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CounterReport {
    /// Name of the network.
    pub network: String,
    /// Images of the batch.
    pub batch: usize,
    /// Whether it is a training step instead of inference.
    pub training: bool,
    /// Precision of activations and weights.
    pub precision: Dtype,
    /// The architecture whose paths ran, compute capability times ten.
    pub arch: u32,
    /// Blocks of a launch that ran at most; null where all did.
    pub sample: Option<u64>,
    /// The GPU whose data sheet gives the roofline and the waves; null where none of the architecture is known.
    pub device: Option<&'static str>,
    /// Why registers and shared memory are not known, where they are not.
    pub resources_error: Option<String>,
    /// The steps, those that launch the same as one.
    pub steps: Vec<StepCounters>,
}

/// A step over the batch, against what its launches did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepCounters {
    /// Name of the first step of its kind.
    pub name: String,
    /// What it computes, in words.
    pub kind: String,
    /// Its direction.
    pub pass: Pass,
    /// How many steps launch the same.
    pub count: usize,
    /// Least bytes by the plan: each operand once.
    pub bytes: u64,
    /// Floating-point operations by the plan, a multiply-accumulate counted as two.
    pub flops: u64,
    /// Bytes of its operands that its launches touched, each launch for itself; null where not all blocks ran.
    pub distinct_bytes: Option<u64>,
    /// The same of partial sums, which pass from launch to launch and are none of the plan's operands.
    pub workspace_bytes: Option<u64>,
    /// Least time by the data sheet, in microseconds.
    pub roofline_us: Option<f64>,
    /// What it would take on that GPU by the counts, which is no measurement; null where no data sheet is known.
    pub projected: Option<ProjectedTime>,
    /// Its launches.
    pub launches: Vec<LaunchRecord>,
}

/// A launch and what it did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LaunchRecord {
    /// Name expression of the kernel.
    pub kernel: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Blocks that ran; the counts stand for all.
    pub counted_blocks: u64,
    /// What was counted.
    #[serde(flatten)]
    pub counters: Counters,
    /// Bytes that it touched; null where not all blocks ran.
    pub touched: Option<TouchedBytes>,
    /// Bytes that it moved, in sectors.
    pub moved_bytes: u64,
    /// Fewest sectors over those moved; null where nothing was.
    pub sector_efficiency: Option<f64>,
    /// Wavefronts over those without conflicts; null without shared memory.
    pub wavefront_ratio: Option<f64>,
    /// Mean lanes of a request.
    pub active_lanes: Option<f64>,
    /// Registers of a thread.
    pub registers: Option<u32>,
    /// Bytes of shared memory of a block.
    pub shared_bytes: Option<u32>,
    /// Blocks that a multiprocessor holds.
    pub blocks_per_multiprocessor: Option<u32>,
    /// Share of the warps that a multiprocessor has room for.
    pub occupancy: Option<f64>,
    /// Blocks over those that the whole GPU holds at once.
    pub waves: Option<f64>,
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CounterSetting {
    /// Images of the batch.
    pub batch: usize,
    /// A training step instead of inference.
    pub training: bool,
    /// Precision of activations and weights.
    pub precision: Dtype,
    /// The architecture to be, compute capability times ten.
    pub arch: u32,
    /// Blocks of a launch that run at most; all without.
    pub sample: Option<u64>,
}

/// Runs each distinct step of a network's plan on the emulator, and counts.
///
/// # Errors
/// A precision that the architecture lacks, or a kernel that cannot be compiled or fails. Registers that cannot be told are
/// none: the report says why.
pub fn count_network(model: &Model, setting: CounterSetting) -> Result<CounterReport> {
    let CounterSetting { batch, training, precision, arch, sample } = setting;
    let (graph, plan) = gpu_plan(&model.graph, Fusion::OnLoad, training, KernelTarget { dtype: precision, arch })?;
    let steps = distinct_steps(&graph, plan, batch, precision, arch)?;
    let launched: Vec<&Launch> = steps.iter().flat_map(|step| &step.launches).collect();
    let kernels = resources(&launched, arch, &Cache::of_user());
    let resources_error = kernels.as_ref().err().map(ToString::to_string);
    let kernels = kernels.unwrap_or_default();
    let sheet = DataSheet::of_arch(arch);
    let blocks = sample.map_or(CountedBlocks::All, CountedBlocks::Sample);
    let device = CountingDevice::new(arch, precision, blocks, Cache::of_user())?;
    let count = |step: &DistinctStep| {
        let counted = device.count(&step.step, batch)?;
        let record = |(launch, counted): (&Launch, &LaunchCounters)| {
            LaunchRecord::new(launch, counted, kernels.get(&launch.instance), arch, sheet)
        };
        let launches = step.launches.iter().zip(&counted).map(record).collect();
        Ok(StepCounters::new(step, &setting, &counted, launches))
    };
    let steps = steps.iter().map(count).collect::<Result<_>>()?;
    let (network, device) = (model.graph.name.clone(), sheet.map(|sheet| sheet.name));
    Ok(CounterReport { network, batch, training, precision, arch, sample, device, resources_error, steps })
}

impl LaunchRecord {
    /// A launch that did `counted`, of a kernel that takes these resources, on a GPU.
    pub fn new(
        launch: &Launch,
        counted: &LaunchCounters,
        kernel: Option<&CompiledKernel>,
        arch: u32,
        sheet: Option<&DataSheet>,
    ) -> Self {
        let (counters, shape) = (counted.counters, launch.shape);
        let threads = shape.block.iter().product();
        let occupancy = kernel.and_then(|kernel| Occupancy::of(kernel, threads, arch));
        Self {
            kernel: launch.instance.clone(),
            grid: shape.grid,
            threads,
            counted_blocks: counted.counted,
            counters,
            touched: counted.touched,
            moved_bytes: counters.moved_bytes(),
            sector_efficiency: counters.sector_efficiency(),
            wavefront_ratio: counters.wavefront_ratio(),
            active_lanes: counters.active_lanes(),
            registers: kernel.map(|kernel| kernel.registers),
            shared_bytes: kernel.map(|kernel| kernel.shared),
            blocks_per_multiprocessor: occupancy.map(|o| o.blocks_per_multiprocessor),
            occupancy: occupancy.map(|o| o.occupancy),
            waves: occupancy.zip(sheet).and_then(|(o, sheet)| o.waves(counted.blocks, sheet.multiprocessors)),
        }
    }
}

impl StepCounters {
    /// A step of a batch whose launches did `counted`.
    pub fn new(
        step: &DistinctStep,
        setting: &CounterSetting,
        counted: &[LaunchCounters],
        launches: Vec<LaunchRecord>,
    ) -> Self {
        let (cost, CounterSetting { batch, precision, arch, .. }) = (&step.cost, *setting);
        let sheet = DataSheet::of_arch(arch);
        let touched = |of: fn(&TouchedBytes) -> u64| -> Option<u64> {
            counted.iter().map(|launch| launch.touched.as_ref().map(of)).sum()
        };
        let wavefronts = counted.iter().map(|launch| launch.counters.wavefronts()).sum();
        let project = |sheet| Projection { sheet }.time((cost, &step.launches), batch, precision, Some(wavefronts));
        Self {
            name: cost.name.clone(),
            kind: cost.kind.clone(),
            pass: cost.pass,
            count: step.count,
            bytes: cost.bytes(batch, precision.bytes() as u64),
            flops: cost.flops * batch as u64,
            distinct_bytes: touched(|touched| touched.operands.all()),
            workspace_bytes: touched(|touched| touched.workspace.all()),
            roofline_us: sheet.map(|sheet| sheet.roofline(precision).time(cost, batch) * 1e6),
            projected: sheet.map(project),
            launches,
        }
    }
}
