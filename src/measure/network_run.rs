//! Whole networks as they are run: inference at every level of fusion, and training steps.

use std::collections::BTreeMap;
use std::time::Duration;

use super::launches::{Launches, sample_in_turns};
use super::noise::normal;
use super::roofline::{KernelCost, kernel_costs, plan_costs};
use crate::device::dry_run::DryRun;
use crate::device::gpu::Gpu;
use crate::device::{Backend, Buffer, Device};
use crate::dtype::Dtype;
use crate::engine::{Engine, EngineOptions, Fusion, Plan, Target};
use crate::model::Model;
use crate::ops::loss::{Gradient, LossRecord, cross_entropy};
use crate::ops::optimizer::{Optimizer, OptimizerState, Update};
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
    /// What an image must move and compute at the highest level of fusion that a backend has, however the case is run:
    /// fusion that is missing shows as utilization that is lost.
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
}

/// A network on a device, ready to be timed: an engine and one batch of noise, which lies on the device already.
pub struct NetworkRun {
    engine: Engine,
    images: Buffer,
    training: Option<Training>,
}

/// What a training step takes beside the engine.
struct Training {
    optimizer: OptimizerState,
    loss: LossRecord,
    d_logits: Buffer,
}

impl NetworkRun {
    /// Plans, allocates and uploads.
    ///
    /// # Errors
    /// What the engine says.
    pub fn new(device: &Device, case: &NetworkCase, batch: usize) -> Result<Self> {
        let mut run = Self::with_engine(device, &case.model, (case.fusion, case.training), batch)?;
        if case.training {
            run.training = Some(Training::new(&mut run.engine, batch)?);
        }
        Ok(run)
    }

    /// Inference, fused.
    pub(super) fn inference(device: &Device, model: &Model, batch: usize) -> Result<Self> {
        Self::with_engine(device, model, (Fusion::OnLoad, false), batch)
    }

    fn with_engine(device: &Device, model: &Model, (fusion, training): (Fusion, bool), batch: usize) -> Result<Self> {
        if batch == 0 {
            return Err(Error::Config("latency needs a batch of at least 1 image, got 0".into()));
        }
        let engine = Engine::new(device, model, &EngineOptions { batch, fusion, training, taps: Vec::new() })?;
        let mut images = device.activations(batch * model.graph.input_shape().len())?;
        images.write(&normal(0, images.len()))?;
        Ok(Self { engine, images, training: None })
    }

    /// One pass: inference, or a training step (forward, label-smoothed cross-entropy, backward, SGD) as the training
    /// loop does it. A GPU may still be at it when this returns.
    fn pass(&mut self) -> Result<()> {
        self.engine.set_images(self.images.view(0..self.images.len()))?;
        self.compute()
    }

    /// A pass over the images that the engine has.
    fn compute(&mut self) -> Result<()> {
        let Self { engine, training, .. } = self;
        let logits = engine.run()?;
        let Some(Training { optimizer, loss, d_logits }) = training else { return Ok(()) };
        let len = d_logits.len();
        let gradient = Gradient { to: d_logits.view_mut(0..len), scale: optimizer.loss_scale_at() };
        cross_entropy(loss, logits.view(0..len), 0.1, Some(gradient))?;
        engine.backward(d_logits)?;
        let (weights, gradients, copy) = engine.for_update();
        optimizer.update(weights, gradients, copy)
    }

    /// Its passes, to be timed: on a GPU by the device's own clock and without what the host does between them.
    ///
    /// # Errors
    /// What the engine says.
    pub fn launches(&mut self) -> Result<Launches<'_>> {
        let device = self.engine.device().clone();
        Launches::whole(&device, || self.pass())
    }

    /// Bytes of all buffers of the engine and the optimizer.
    fn allocated_bytes(&self) -> u64 {
        self.engine.allocated_bytes() + self.training.as_ref().map_or(0, |t| t.optimizer.allocated_bytes())
    }
}

impl Training {
    /// Begins a step that is done again and again: what a step takes from the host stays the same. So small a learning
    /// rate keeps the numbers' scale.
    fn new(engine: &mut Engine, batch: usize) -> Result<Self> {
        let device = engine.device().clone();
        let (spans, len) = (engine.optimizer_spans(), engine.trainable().0.len());
        let classes = engine.graph().classes();
        let mut optimizer = OptimizerState::new(&device, Optimizer::default(), spans, len)?;
        let mut loss = LossRecord::new(&device, batch, classes)?;
        let labels: Vec<u32> = (0..batch).map(|i| (i * 7 % classes) as u32).collect();
        engine.set_loss_scale(optimizer.loss_scale());
        loss.begin(&labels)?;
        optimizer.begin(Update { lr: 1e-4, weight_decay: 1e-4, clip_norm: 0.0 })?;
        Ok(Self { optimizer, loss, d_logits: device.activations(batch * classes)? })
    }
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

fn sample_warmed<'l, 'a: 'l>(
    ready: impl Iterator<Item = &'l mut Launches<'a>>,
    budget: Duration,
) -> Vec<Result<Vec<f64>>> {
    let mut ready: Vec<_> = ready.collect();
    if let Some(first) = ready.first_mut()
        && let Err(error) = first.warm()
    {
        // Its samples will tell.
        tracing::debug!("{error}");
    }
    sample_in_turns(ready, budget)
}

/// How often each kernel is launched in one pass of a case on a GPU, a training step's loss and optimizer included.
///
/// # Errors
/// What the engine says.
pub fn launch_counts(case: &NetworkCase, batch: usize, precision: Dtype) -> Result<BTreeMap<String, u64>> {
    // What is launched follows from the problem alone, so that any architecture with every type serves.
    let gpu = Gpu::new(Box::new(DryRun::new(80)));
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
