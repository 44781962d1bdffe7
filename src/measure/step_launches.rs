//! The launches of a plan's steps, each step run alone: on a device that does nothing, or on one that counts.

use std::collections::BTreeMap;
use std::sync::Arc;

use rayon::prelude::*;

use super::roofline::{KernelCost, plan_costs};
use crate::Result;
use crate::device::Device;
use crate::device::cache::Cache;
use crate::device::compiler::{CompiledKernel, compile};
use crate::device::configurations::Decision;
use crate::device::counters::{CountedBlocks, CounterLog, LaunchCounters};
use crate::device::dry_run::DryRun;
use crate::device::emulator::{Emulator, EmulatorOptions};
use crate::device::gpu::{Gpu, Launch};
use crate::device::source::Unit;
use crate::dtype::Dtype;
use crate::engine::{Plan, Sequence, SequenceRun};
use crate::graph::Graph;
use crate::ops::step::{Extent, Store};

/// Steps of a plan that launch the same over operands of the same sizes.
#[derive(Debug, Clone)]
pub struct DistinctStep {
    /// What the first of them must move and compute, and its name.
    pub cost: KernelCost,
    /// How many there are.
    pub count: usize,
    /// The first of them.
    pub step: Sequence,
    /// What it launches, in order.
    pub launches: Vec<Launch>,
    /// What was chosen for them.
    pub decisions: Vec<Decision>,
}

/// What tells steps apart: what they compute, the sizes of their operands, and their launches.
type Key = (String, Vec<(Extent, Store)>, Vec<Launch>);

/// The steps of a plan in order of their first occurrence, with their launches on a GPU.
///
/// # Errors
/// A precision that the architecture lacks.
pub fn distinct_steps(
    graph: &Graph,
    plan: Plan,
    batch: usize,
    precision: Dtype,
    arch: u32,
) -> Result<Vec<DistinctStep>> {
    let gpu = Gpu::new(Box::new(DryRun::new(arch)));
    let device = Device::on(gpu.clone(), precision)?;
    let costs = plan_costs(graph, &plan);
    let values = Arc::new(plan.values);
    let mut steps: Vec<DistinctStep> = Vec::new();
    let mut known: Vec<Key> = Vec::new();
    for (planned, cost) in plan.steps.into_iter().zip(costs) {
        let operands = planned.uses.reads.iter().chain(&planned.uses.writes).map(|&id| values.get(id));
        let operands = operands.map(|value| (value.extent, value.store)).collect();
        let step = Sequence { values: values.clone(), steps: Arc::new(vec![planned.step]) };
        let mut run = SequenceRun::new(&device, &step, batch)?;
        let mut decisions = Vec::new();
        let launches = gpu.watch_launches(|| {
            decisions = gpu.configurations().watch(|| {
                run.run();
                Ok(())
            })?;
            Ok(())
        })?;
        let key = (cost.kind.clone(), operands, launches.clone());
        match known.iter().position(|other| *other == key) {
            Some(at) => steps[at].count += 1,
            None => {
                known.push(key);
                steps.push(DistinctStep { cost, count: 1, step, launches, decisions });
            }
        }
    }
    Ok(steps)
}

/// A device that counts what its launches do.
#[derive(Debug)]
pub struct CountingDevice {
    device: Device,
    log: CounterLog,
}

impl CountingDevice {
    /// An emulator of an architecture that runs these blocks of a launch.
    ///
    /// # Errors
    /// When there is no compiler for it.
    pub fn new(arch: u32, precision: Dtype, blocks: CountedBlocks, cache: Cache) -> Result<Self> {
        let log = CounterLog::new(blocks);
        let options = EmulatorOptions { arch, counters: Some(log.clone()), ..EmulatorOptions::default() };
        let gpu = Gpu::new(Box::new(Emulator::new(options, cache)?));
        // Kernels are compiled as they are launched: few of them are.
        Ok(Self { device: Device::Gpu(gpu, precision), log })
    }

    /// What each launch of a step does, in order.
    ///
    /// # Errors
    /// When a kernel cannot be compiled or fails.
    pub fn count(&self, step: &Sequence, batch: usize) -> Result<Vec<LaunchCounters>> {
        let mut run = SequenceRun::new(&self.device, step, batch)?;
        self.log.begin();
        run.run();
        self.device.check()?;
        Ok(self.log.take())
    }
}

/// Registers and shared memory of the kernels of some launches, by name expression.
///
/// # Errors
/// When they are in no cache and there is no compiler.
pub fn resources(launches: &[&Launch], arch: u32, cache: &Cache) -> Result<BTreeMap<String, CompiledKernel>> {
    let mut units = BTreeMap::new();
    for launch in launches {
        let unit = Unit::of(&launch.instance)?;
        units.insert((&unit.file().name, unit.dtype()), unit);
    }
    let units: Vec<Unit> = units.into_values().collect();
    let compiled = units.into_par_iter().map(|unit| compile(unit, arch, cache)).collect::<Result<Vec<_>>>()?;
    Ok(compiled.into_iter().flat_map(|c| c.kernels).map(|kernel| (kernel.instance.clone(), kernel)).collect())
}
