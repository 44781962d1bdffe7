//! Whole networks as they are run: inference at every level of fusion, and training steps.

use std::collections::BTreeMap;
use std::time::Duration;

use super::latency::Subject;
use super::noise::normal;
use super::roofline::{KernelCost, kernel_costs, plan_costs};
use super::timer::{Workload, alternate};
use crate::Result;
use crate::device::dry_run::DryRun;
use crate::device::gpu::Gpu;
use crate::device::{Buffer, Device, Recording};
use crate::dtype::Dtype;
use crate::engine::{Engine, EngineOptions, Fusion, Plan};
use crate::model::Model;
use crate::ops::loss::{Gradient, LossRecord, cross_entropy};
use crate::ops::optimizer::{Optimizer, OptimizerState, Update};

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
    /// What an image must move and compute at the highest level of fusion the planner knows, however the case is run:
    /// fusion that is missing shows as utilization that is lost.
    ///
    /// # Errors
    /// As [`crate::graph::Graph::shapes`].
    pub fn costs(&self) -> Result<Vec<KernelCost>> {
        let graph = &self.model.graph;
        match self.training {
            true => plan_costs(graph, &Plan::new(graph, Fusion::Fused, true, false, &[])?),
            false => kernel_costs(graph),
        }
    }
}

/// A case on a device, ready to be timed.
pub struct NetworkRun(Kind);

enum Kind {
    Inference(Box<Subject>),
    Training(Box<Training>),
}

/// An engine with what a training step takes beside it. The images lie on the device already.
struct Training {
    engine: Engine,
    optimizer: OptimizerState,
    images: Buffer,
    labels: Vec<u32>,
    loss: LossRecord,
    d_logits: Buffer,
    recording: Recording,
}

impl NetworkRun {
    /// Plans, allocates and uploads.
    ///
    /// # Errors
    /// What the engine says.
    pub fn new(device: &Device, case: &NetworkCase, batch: usize) -> Result<Self> {
        if !case.training {
            let subject = Subject::new(device, &case.model, case.fusion, batch)?;
            return Ok(Self(Kind::Inference(Box::new(subject))));
        }
        let options = EngineOptions { batch, fusion: case.fusion, training: true, taps: Vec::new() };
        let mut engine = Engine::new(device, &case.model, &options)?;
        let (spans, len) = (engine.optimizer_spans(), engine.trainable().0.len());
        let classes = case.model.graph.classes();
        let mut images = device.activations(batch * case.model.graph.input_shape().len())?;
        images.write(&normal(0, images.len()))?;
        Ok(Self(Kind::Training(Box::new(Training {
            optimizer: OptimizerState::new(device, Optimizer::default(), spans, len)?,
            images,
            loss: LossRecord::new(device, batch, classes)?,
            recording: Recording::default(),
            labels: (0..batch).map(|i| (i * 7 % classes) as u32).collect(),
            d_logits: device.activations(batch * classes)?,
            engine,
        }))))
    }

    /// One pass to its end, for which it waits.
    ///
    /// # Errors
    /// What the engine says.
    pub fn pass(&mut self) -> Result<()> {
        match &mut self.0 {
            Kind::Inference(subject) => subject.pass(),
            Kind::Training(training) => training.step(),
        }
    }
}

impl Training {
    /// Forward, label-smoothed cross-entropy, backward, SGD, as the training loop does them. So small a learning rate
    /// keeps the numbers' scale.
    fn step(&mut self) -> Result<()> {
        let Self { engine, optimizer, images, labels, loss, d_logits, recording } = self;
        let device = engine.device().clone();
        engine.set_loss_scale(optimizer.loss_scale());
        loss.begin(labels)?;
        optimizer.begin(Update { lr: 1e-4, weight_decay: 1e-4, clip_norm: 0.0 })?;
        let work = || {
            engine.set_images(images.view(0..images.len()))?;
            let len = d_logits.len();
            let logits = engine.run()?.view(0..len);
            let gradient = Gradient { to: d_logits.view_mut(0..len), scale: optimizer.loss_scale_at() };
            cross_entropy(loss, logits, 0.1, Some(gradient))?;
            engine.backward(d_logits)?;
            let (weights, gradients, copy) = engine.for_update();
            optimizer.update(weights, gradients, copy)
        };
        // SAFETY: the recording is dropped with everything that a step uses.
        unsafe { recording.run(&device, work)? };
        // Waits for a device that runs behind the host.
        optimizer.finish().map(|_| ())
    }
}

/// Seconds of every pass of each case, in strict alternation within one `budget`.
///
/// # Errors
/// What the engine says.
pub fn sample_networks(
    device: &Device,
    cases: &[NetworkCase],
    batch: usize,
    budget: Duration,
) -> Result<Vec<Vec<f64>>> {
    let mut runs = cases.iter().map(|case| NetworkRun::new(device, case, batch)).collect::<Result<Vec<_>>>()?;
    let mut workloads: Vec<Workload<'_>> = Vec::with_capacity(runs.len());
    for run in &mut runs {
        workloads.push(Box::new(|| run.pass()));
    }
    alternate(&mut workloads, budget)
}

/// How often each kernel is launched in one pass of a case on a GPU, a training step's loss and optimizer included.
///
/// # Errors
/// What the engine says.
pub fn launch_counts(case: &NetworkCase, batch: usize, precision: Dtype) -> Result<BTreeMap<String, u64>> {
    // What is launched follows from the problem alone, so that any architecture with every type serves.
    let gpu = Gpu::new(Box::new(DryRun::new(80)));
    let mut run = NetworkRun::new(&Device::on(gpu.clone(), precision)?, case, batch)?;
    run.pass()?;
    Ok(gpu.launched())
}

/// Bytes that a case holds once it has run, which is its peak, since engines allocate what they need once: of a GPU's
/// memory what was taken for it, on the host all buffers of the engine and the optimizer.
///
/// # Errors
/// What the engine says.
pub fn peak_memory(device: &Device, case: &NetworkCase, batch: usize) -> Result<u64> {
    let before = taken(device);
    let mut run = NetworkRun::new(device, case, batch)?;
    run.pass()?;
    Ok(match (&run.0, device) {
        (_, Device::Gpu(..)) => taken(device) - before,
        (Kind::Inference(subject), Device::Cpu) => subject.engine().allocated_bytes(),
        (Kind::Training(training), Device::Cpu) => {
            training.engine.allocated_bytes() + training.optimizer.allocated_bytes()
        }
    })
}

fn taken(device: &Device) -> u64 {
    match device {
        Device::Cpu => 0,
        Device::Gpu(gpu, _) => gpu.memory().0,
    }
}
