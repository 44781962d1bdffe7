//! Whole networks as they are run: inference at every level of fusion, and training steps.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::launches::{Launches, sample_in_turns};
use super::noise::normal;
use super::roofline::{KernelCost, kernel_costs, plan_costs};
use super::timer::fewest_rounds;
use crate::device::dry_run::DryRun;
use crate::device::gpu::Gpu;
use crate::device::{Backend, Buffer, Device};
use crate::dtype::Dtype;
use crate::engine::{Engine, EngineOptions, Fusion, Plan, Target};
use crate::graph::Graph;
use crate::model::Model;
use crate::ops::config::KernelTarget;
use crate::ops::optimizer::{Optimizer, Update};
use crate::train::{StepBatch, StepImages, StepOptions, StepSettings, TrainStep};
use crate::{Error, Result};

/// A network, and how it is run.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkCase {
    /// Such as `fused`.
    pub name: &'static str,
    /// The network.
    pub model: Model,
    /// Level of fusion.
    pub fusion: Fusion,
    /// A training step instead of inference.
    pub training: bool,
}

impl NetworkCase {
    /// Least bytes and FLOPs of an image at the highest level of fusion that a backend has in training, and of one kernel a
    /// convolution in inference ([`kernel_costs`]), whatever fusion the case uses: missing fusion then shows as lost utilization.
    ///
    /// # Errors
    /// As [`crate::graph::Graph::shapes`].
    pub fn costs(&self, backend: Backend) -> Result<Vec<KernelCost>> {
        let graph = &self.model.graph;
        match self.training {
            true => Ok(plan_costs(graph, &Plan::new(graph, &Target::training(backend))?)),
            false => kernel_costs(graph),
        }
    }

    /// The plan that a GPU runs, and the graph that it is of: fused inference runs with batch-norm folded.
    ///
    /// # Errors
    /// As [`crate::graph::Graph::shapes`].
    pub fn planned(&self, on: KernelTarget) -> Result<(Graph, Plan)> {
        gpu_plan(&self.model.graph, self.fusion, self.training, on)
    }
}

/// The architecture of a GPU whose launches are counted without one. What is launched follows from the problem alone nearly
/// everywhere, so that any serves that has every type.
pub const DRY_RUN_ARCH: u32 = 80;

/// The plan of [`NetworkCase::planned`], for a graph.
pub(super) fn gpu_plan(graph: &Graph, fusion: Fusion, training: bool, on: KernelTarget) -> Result<(Graph, Plan)> {
    let folds = !training && fusion > Fusion::PerNode;
    let graph = if folds { graph.without_batch_norm()?.0 } else { graph.clone() };
    let plan = Plan::new(&graph, &Target::gpu(on, fusion, training))?;
    Ok((graph, plan))
}

/// Passes that were timed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Series {
    /// Seconds of a pass.
    pub seconds: f64,
    /// Interquartile range of single passes in seconds; `None` where they were timed as one.
    pub iqr: Option<f64>,
    /// Passes behind them.
    pub passes: usize,
    /// Passes before them that do not count.
    pub warm_up: usize,
}

/// A network on a device, ready to be timed: an engine and one batch of noise, which lies on the device already.
pub struct NetworkRun {
    network: Network,
    images: Buffer,
}

/// The engine or training step that runs a pass.
enum Network {
    Inference(Box<Engine>),
    Training(Box<TrainStep<'static>>),
}

impl NetworkRun {
    /// Plans, allocates and uploads.
    ///
    /// # Errors
    /// Errors of the engine.
    pub fn new(device: &Device, case: &NetworkCase, batch: usize) -> Result<Self> {
        if batch == 0 {
            return Err(Error::Config("latency needs a batch of at least 1 image, got 0".into()));
        }
        let NetworkCase { ref model, fusion, .. } = *case;
        let noise = normal(0, batch * model.graph.input_shape().len());
        let network = if case.training {
            Network::Training(Box::new(begun_step(device, case, &noise, batch)?))
        } else {
            let options = EngineOptions { batch, fusion, training: false, taps: Vec::new() };
            Network::Inference(Box::new(Engine::new(device, model, &options)?))
        };
        let mut images = device.activations(noise.len())?;
        images.write(&noise)?;
        Ok(Self { network, images })
    }

    /// Inference, fused.
    pub(super) fn inference(device: &Device, model: &Model, batch: usize) -> Result<Self> {
        let case = NetworkCase { name: "fused", model: model.clone(), fusion: Fusion::OnLoad, training: false };
        Self::new(device, &case, batch)
    }

    /// One pass: inference, or a training step (forward, label-smoothed cross-entropy, backward, SGD) as the training
    /// loop does it. A GPU may still be at it when this returns.
    pub(super) fn pass(&mut self) -> Result<()> {
        let images = self.images.view(0..self.images.len());
        match &mut self.network {
            Network::Inference(engine) => engine.set_images(images)?,
            Network::Training(step) => step.set_images(images)?,
        }
        self.compute()
    }

    /// A pass over the images that the network has.
    fn compute(&mut self) -> Result<()> {
        match &mut self.network {
            Network::Inference(engine) => engine.run().map(|_| ()),
            Network::Training(step) => step.compute(),
        }
    }

    /// Its passes, to be timed: on a GPU by the device's own clock and without what the host does between them.
    ///
    /// # Errors
    /// Errors of the engine.
    pub fn launches(&mut self) -> Result<Launches<'_>> {
        let device = match &self.network {
            Network::Inference(engine) => engine.device().clone(),
            Network::Training(step) => step.device().clone(),
        };
        Launches::whole(&device, || self.pass())
    }

    /// The engine; of a training step that of its first device.
    pub(super) fn engine_mut(&mut self) -> &mut Engine {
        match &mut self.network {
            Network::Inference(engine) => engine,
            Network::Training(step) => step.engine_mut(),
        }
    }

    /// Images that go through the network together.
    pub(super) fn images_at_once(&self) -> usize {
        match &self.network {
            Network::Inference(engine) => engine.images_at_once(),
            Network::Training(step) => step.images(),
        }
    }

    /// Bytes of all buffers of the engine and the optimizer.
    fn allocated_bytes(&self) -> u64 {
        match &self.network {
            Network::Inference(engine) => engine.allocated_bytes(),
            Network::Training(step) => step.allocated_bytes(),
        }
    }
}

/// A step that is begun once and done again and again: what it takes from the host stays the same. So small a learning
/// rate keeps the numbers' scale. [`Launches`] records it.
fn begun_step(device: &Device, case: &NetworkCase, images: &[f32], batch: usize) -> Result<TrainStep<'static>> {
    let optimizer = Optimizer::default();
    let fusion = case.fusion;
    let options = StepOptions { batch, fusion, optimizer, label_smoothing: 0.1, distillation: None, recorded: false };
    let mut step = TrainStep::new(std::slice::from_ref(device), &case.model, &options)?;
    let classes = case.model.graph.classes();
    let labels: Vec<u32> = (0..batch).map(|i| (i * 7 % classes) as u32).collect();
    let update = Update { lr: 1e-4, weight_decay: 1e-4, clip_norm: 0.0 };
    let batch = StepBatch { images: StepImages::Normalised(images), labels: &labels };
    step.begin(&batch, StepSettings { seed: 0, step: 0, update })?;
    Ok(step)
}

/// Seconds of every pass of each case, in strict alternation within one `budget`. A case that fails, such as for want of
/// memory, leaves the others alone.
pub fn sample_networks(
    device: &Device,
    cases: &[NetworkCase],
    batch: usize,
    budget: Duration,
) -> Vec<Result<Vec<f64>>> {
    let mut runs: Vec<Result<NetworkRun>> = cases.iter().map(|case| NetworkRun::new(device, case, batch)).collect();
    let timed: Vec<Option<Result<Vec<f64>>>> = {
        let mut launches: Vec<Option<Result<Launches<'_>>>> =
            runs.iter_mut().map(|run| run.as_mut().ok().map(NetworkRun::launches)).collect();
        let ready = launches.iter_mut().flatten().flatten();
        let mut samples = sample_warmed(ready, budget).into_iter();
        let mut outcome =
            |launches: Result<_>| launches.and_then(|_| samples.next().expect("one for all that were ready"));
        launches.into_iter().map(|launches| launches.map(&mut outcome)).collect()
    };
    let outcome = |(run, timed): (Result<_>, Option<_>)| run.and_then(|_| timed.expect("every run was timed"));
    runs.into_iter().zip(timed).map(outcome).collect()
}

/// Times passes in a row as one, by the host's clock between two waits for the device: the protocol of DepthShrinker's
/// repository, 50 passes that do not count and 30 that do (`docs/methods.md` 1.5). Where they would take longer than
/// `budget`, fewer of both, in the same proportion.
///
/// # Errors
/// Errors of the engine.
pub fn row_of_passes(device: &Device, case: &NetworkCase, batch: usize, budget: Duration) -> Result<Series> {
    const WARM: usize = 50;
    const TIMED: usize = 30;
    const FEWEST: usize = 3;
    let mut run = NetworkRun::new(device, case, batch)?;
    let mut passes = |count: usize| -> Result<f64> {
        let start = Instant::now();
        for _ in 0..count {
            run.pass()?;
        }
        if let Device::Gpu(gpu, _) = device {
            gpu.synchronize()?;
        }
        Ok(start.elapsed().as_secs_f64())
    };
    passes(1)?;
    let all = (budget.as_secs_f64() / passes(1)?.max(f64::MIN_POSITIVE)) as usize;
    let timed = (all * TIMED / (WARM + TIMED)).clamp(fewest_rounds(budget, FEWEST), TIMED);
    let warm_up = (timed * WARM / TIMED).max(2);
    passes(warm_up - 2)?;
    Ok(Series { seconds: passes(timed)? / timed as f64, iqr: None, passes: timed, warm_up })
}

fn sample_warmed<'l, 'a: 'l>(
    ready: impl Iterator<Item = &'l mut Launches<'a>>,
    budget: Duration,
) -> Vec<Result<Vec<f64>>> {
    let mut ready: Vec<_> = ready.collect();
    if let Some(first) = ready.first_mut()
        && let Err(error) = first.warm()
    {
        // Its samples carry the error.
        tracing::debug!("{error}");
    }
    sample_in_turns(ready, budget)
}

/// How often each kernel is launched in one pass of a case on a GPU, a training step's loss and optimizer included.
///
/// # Errors
/// What the engine says.
pub fn launch_counts(case: &NetworkCase, batch: usize, precision: Dtype) -> Result<BTreeMap<String, u64>> {
    let gpu = Gpu::new(Box::new(DryRun::new(DRY_RUN_ARCH)));
    let mut run = NetworkRun::new(&Device::on(gpu.clone(), precision)?, case, batch)?;
    // Puts images and weights where the next pass finds them.
    run.pass()?;
    let before = gpu.launched();
    run.compute()?;
    let of_pass = |(name, count): (String, u64)| {
        let count = count - before.get(&name).copied().unwrap_or(0);
        (count > 0).then_some((name, count))
    };
    Ok(gpu.launched().into_iter().filter_map(of_pass).collect())
}

/// Bytes that a case holds once it has run, which is its peak, since engines allocate what they need once: of a GPU's
/// memory the buffers and the largest workspace that an operation asked for, on the host all buffers of the engine and
/// the optimizer.
///
/// # Errors
/// What the engine says.
pub fn peak_memory(device: &Device, case: &NetworkCase, batch: usize) -> Result<u64> {
    let Device::Gpu(gpu, _) = device else {
        let mut run = NetworkRun::new(device, case, batch)?;
        run.pass()?;
        return Ok(run.allocated_bytes());
    };
    let before = gpu.buffer_bytes();
    // What an earlier case has asked for does not count.
    gpu.take_workspace_peak();
    let mut run = NetworkRun::new(device, case, batch)?;
    run.pass()?;
    gpu.synchronize()?;
    Ok(gpu.buffer_bytes() - before + gpu.take_workspace_peak())
}
