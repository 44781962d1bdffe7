//! One training step as an object: the training loop, the benchmark and the check against the host all take their steps
//! through it, so that what must happen in which order stands here alone.
//!
//! A step is made of replicas, which turn their parts of a batch into gradients; of the mean of these, taken in a fixed
//! order; and of one update, whose weights all replicas get. One device is one replica, and then nothing is exchanged.

use std::sync::Arc;

use super::exchange::{Exchange, mean};
use super::feed::{FedBatches, Feed, Source, StepBatch};
use super::replica::Replica;
use super::teacher::Distillation;
use crate::data::Loader;
use crate::device::gpu::{Gpu, Posted};
use crate::device::{Device, Recording, View};
use crate::engine::{Engine, Fusion};
use crate::graph::Graph;
use crate::model::{Model, Weights};
use crate::ops::loss::LossSum;
use crate::ops::optimizer::{Optimizer, OptimizerState, StepOutcome, Update};
use crate::{Error, Result};

/// Settings that are the same in all steps.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOptions<'a> {
    /// Images of a step, over all devices.
    pub batch: usize,
    /// Level of fusion.
    pub fusion: Fusion,
    /// The rule that turns gradients into new weights.
    pub optimizer: Optimizer,
    /// Share of the label's probability spread over all classes. Not used with distillation.
    pub label_smoothing: f32,
    /// The teacher to follow, if any.
    pub distillation: Option<&'a Distillation>,
    /// Whether GPUs record their work and replay it from the third step on ([`Recording`]). Not for a caller that records
    /// [`compute`](TrainStep::compute) itself.
    pub recorded: bool,
}

/// Settings that change from step to step. Of the update only the learning rate may change: recorded work keeps the other
/// numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepSettings {
    /// Seed of dropout.
    pub seed: u64,
    /// Number of the step, from which dropout follows together with the seed.
    pub step: u64,
    /// Learning rate, weight decay and clipping.
    pub update: Update,
}

/// The outcome of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TakenStep {
    /// Sums over the images.
    pub loss: LossSum,
    /// Number of images.
    pub images: usize,
    /// The outcome of the update.
    pub update: StepOutcome,
}

/// Runs training steps of one network on one or several devices.
pub struct TrainStep<'a> {
    // Recordings come first, so that they are dropped before the buffers whose addresses they hold.
    /// The gradients of each replica; of a single one the update too.
    passes: Vec<Recording>,
    /// The update after gradients of several replicas.
    update: Recording,
    recorded: bool,
    replicas: Vec<Replica<'a>>,
    /// With the first replica.
    optimizer: OptimizerState,
    exchange: Exchange,
    source: Source,
    /// The last step that was [taken ahead](Self::run_ahead), and its update.
    untold: Option<(Posted, Update)>,
}

impl<'a> TrainStep<'a> {
    /// Plans, allocates and uploads. Each device is a replica and takes the next part of every batch; parts differ by one
    /// image at most, the first ones being larger.
    ///
    /// # Errors
    /// No device, fewer images than devices, or what an engine says.
    pub fn new(devices: &[Device], model: &Model, options: &StepOptions<'a>) -> Result<Self> {
        let (batch, count) = (options.batch, devices.len());
        if count == 0 || batch < count {
            return Err(Error::Config(format!(
                "{count} devices share batches of {batch} images; each needs one image or more, and one device is the least"
            )));
        }
        let start = |at: usize| at * (batch / count) + at.min(batch % count);
        let replica = |(at, device)| Replica::new(device, model, options, start(at)..start(at + 1));
        let mut replicas = devices.iter().enumerate().map(replica).collect::<Result<Vec<_>>>()?;
        let first = &mut replicas[0].engine;
        let len = first.trainable().0.len();
        let optimizer = OptimizerState::new(&devices[0], options.optimizer, first.optimizer_spans(), len)?;
        Ok(Self {
            passes: devices.iter().map(|_| Recording::default()).collect(),
            update: Recording::default(),
            recorded: options.recorded,
            replicas,
            optimizer,
            exchange: Exchange::default(),
            source: Source::default(),
            untold: None,
        })
    }

    /// Selects a loader whose [batches](Self::epoch) the following steps take, in the form that suits the devices. Before
    /// this call the host normalises images.
    ///
    /// # Errors
    /// When a device is out of memory.
    pub(super) fn feed_from(&mut self, loader: &Loader) -> Result<()> {
        self.source = Source::of(self.replicas.iter().map(|replica| replica.engine.device()), loader, true);
        for replica in &mut self.replicas {
            replica.feed = Feed::new(replica.engine.device(), loader, self.source, replica.images())?;
        }
        // What was recorded wrote the images of the feed before.
        self.passes.iter_mut().for_each(|recording| *recording = Recording::default());
        Ok(())
    }

    /// The batches of an epoch of the selected loader, from `first_step` on.
    pub(super) fn epoch(&self, loader: &Loader, epoch: u64, first_step: usize) -> FedBatches {
        self.source.epoch(loader, epoch, first_step)
    }

    /// Takes one step.
    ///
    /// # Errors
    /// A batch that does not fit, or a device that fails.
    pub fn run(&mut self, batch: &StepBatch<'_>, settings: StepSettings) -> Result<TakenStep> {
        self.begin(batch, settings)?;
        self.compute()?;
        self.finish()
    }

    /// Takes one step and does not wait for it, where a single GPU replays it. Returns what came of the step taken before it
    /// and not told yet, if there is one, or where steps are waited for what came of this one. Nothing that follows from
    /// a step's outcome is right before it was told: the optimizer's state, the loss scale, score gradients.
    ///
    /// # Errors
    /// As [`run`](Self::run), for this step or the one before.
    pub fn run_ahead(&mut self, batch: &StepBatch<'_>, settings: StepSettings) -> Result<Option<TakenStep>> {
        let Some(gpu) = self.posting() else { return self.run(batch, settings).map(Some) };
        self.begin(batch, settings)?;
        self.compute()?;
        let before = self.untold.replace((gpu.post_outcomes()?, settings.update));
        before.map(|before| self.told(&before)).transpose()
    }

    /// What came of the last step that was [taken ahead](Self::run_ahead), if it was not told yet.
    ///
    /// # Errors
    /// When a device failed.
    pub fn settle(&mut self) -> Result<Option<TakenStep>> {
        self.untold.take().map(|untold| self.told(&untold)).transpose()
    }

    /// The GPU, where steps can be told of later.
    fn posting(&self) -> Option<Arc<Gpu>> {
        match (&self.replicas[..], self.device()) {
            ([only], Device::Gpu(gpu, _)) if self.recorded && only.loss.is_posted() && self.optimizer.is_posted() => {
                Some(gpu.clone())
            }
            _ => None,
        }
    }

    fn told(&mut self, (posted, update): &(Posted, Update)) -> Result<TakenStep> {
        let at = posted.snapshot()?;
        let loss = self.replicas[0].loss.posted_sum(&at);
        Ok(TakenStep { loss, images: self.images(), update: self.optimizer.finish_posted(*update, &at) })
    }

    /// Begins a step: everything that comes from the host goes to the devices.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn begin(&mut self, batch: &StepBatch<'_>, settings: StepSettings) -> Result<()> {
        if batch.labels.len() != self.images() {
            let got = format!("{} labels", batch.labels.len());
            return Err(Error::shape("training step", format!("{} images", self.images()), got));
        }
        let count = self.replicas.len() as u64;
        for (at, replica) in (0..).zip(&mut self.replicas) {
            // No two replicas drop alike, in this step or another.
            replica.engine.set_step(settings.seed, settings.step.wrapping_mul(count).wrapping_add(at))?;
            replica.begin(batch, self.optimizer.loss_scale())?;
        }
        self.optimizer.begin(settings.update)
    }

    /// The step begun, but for its outcome: the same work every time, of which nothing passes by the host where there is
    /// one replica. It can be done again and again.
    ///
    /// # Errors
    /// When a device fails.
    pub fn compute(&mut self) -> Result<()> {
        let Self { passes, update, recorded, replicas, optimizer, exchange, .. } = self;
        let repeat = |recording: &mut Recording, device: &Device, work: &mut dyn FnMut() -> Result<()>| {
            if !*recorded {
                return work();
            }
            // SAFETY: all work below uses the buffers of the replicas and the optimizer alone. They are never replaced (a
            // new feed comes with new recordings), nobody outside can reach them, and they are dropped after the recordings.
            unsafe { recording.run(device, work) }
        };
        let alone = replicas.len() == 1;
        for (at, (replica, recording)) in replicas.iter_mut().zip(passes).enumerate() {
            let device = replica.engine.device().clone();
            repeat(recording, &device, &mut || {
                replica.gradients(if at == 0 { optimizer.loss_scale_at() } else { None })?;
                // Where nothing comes between gradients and update, a GPU replays both at once.
                if alone { replica.update(optimizer) } else { Ok(()) }
            })?;
        }
        if alone {
            return Ok(());
        }
        exchange.reduce(replicas)?;
        let first = &mut replicas[0];
        let device = first.engine.device().clone();
        repeat(update, &device, &mut || first.update(optimizer))?;
        exchange.spread(replicas)
    }

    /// Ends the step: what came of it.
    ///
    /// # Errors
    /// When a device failed.
    pub fn finish(&mut self) -> Result<TakenStep> {
        let mut loss = LossSum::default();
        for replica in &self.replicas {
            let part = replica.loss.sum()?;
            loss.loss += part.loss;
            loss.correct += part.correct;
        }
        Ok(TakenStep { loss, images: self.images(), update: self.optimizer.finish()? })
    }

    /// Replaces the images of the step begun by others `[n, h, w, c]` that lie on the only replica's device, in the type of
    /// activations. May be part of recorded work.
    ///
    /// # Errors
    /// Other images than were planned for, or several replicas.
    pub(crate) fn set_images(&mut self, images: View<'_>) -> Result<()> {
        match &mut self.replicas[..] {
            [only] => only.engine.set_images(images),
            more => Err(Error::Config(format!("{} replicas cannot share one device's images", more.len()))),
        }
    }

    /// Images of a step.
    pub fn images(&self) -> usize {
        self.replicas.iter().map(Replica::images).sum()
    }

    /// The network.
    pub fn graph(&self) -> &Graph {
        self.replicas[0].engine.graph()
    }

    /// The device of the first replica, with which the optimizer is.
    pub fn device(&self) -> &Device {
        self.replicas[0].engine.device()
    }

    /// Sets the slopes of the masked activations, one per block: 0 keeps the activation, 1 replaces it by the identity.
    ///
    /// # Errors
    /// When there are not as many slopes as blocks.
    pub fn set_slopes(&mut self, slopes: &[f32]) -> Result<()> {
        self.replicas.iter_mut().try_for_each(|replica| replica.engine.set_slopes(slopes))
    }

    /// Whether steps also take the gradients of removal scores. Work that was recorded keeps to what it did.
    pub fn collect_score_gradients(&mut self, on: bool) {
        self.replicas.iter_mut().for_each(|replica| replica.engine.collect_score_gradients(on));
    }

    /// Σ ⟨dy, x − φ(x)⟩ over the activations of each block and all images of the last step, y's gradient being that of the
    /// mean loss: the straight-through gradient of a removal score (`docs/methods.md` 1.2).
    ///
    /// # Errors
    /// When a device fails.
    pub fn score_gradients(&self) -> Result<Vec<f32>> {
        mean(&self.replicas, |replica| replica.engine.score_gradients())
    }

    /// Copies all weights to the host. Running statistics are those of the first replica's images.
    ///
    /// # Errors
    /// When the device fails.
    pub fn weights(&self) -> Result<Weights> {
        self.replicas[0].engine.weights()
    }

    /// What the optimizer remembers.
    pub fn optimizer(&self) -> &OptimizerState {
        &self.optimizer
    }

    /// Restores the optimizer from the buffers that it [saved](OptimizerState::save) after `steps` steps.
    ///
    /// # Errors
    /// Buffers that are not this optimizer's.
    pub fn restore_optimizer(&mut self, buffers: &[Vec<f32>], steps: u64) -> Result<()> {
        self.optimizer.restore(buffers, steps)
    }

    /// The engine of the first device.
    pub fn engine_mut(&mut self) -> &mut Engine {
        &mut self.replicas[0].engine
    }

    /// Bytes of all buffers of the engines and the optimizer.
    pub fn allocated_bytes(&self) -> u64 {
        let engines: u64 = self.replicas.iter().map(|replica| replica.engine.allocated_bytes()).sum();
        engines + self.optimizer.allocated_bytes()
    }
}
