//! One network's share of a training step: it turns its part of a batch into the gradients of that part's mean loss.

use std::ops::Range;

use super::feed::{Feed, StepBatch};
use super::step::StepOptions;
use super::teacher::Teacher;
use crate::Result;
use crate::device::{Buffer, Device, View};
use crate::engine::{Engine, EngineOptions};
use crate::model::Model;
use crate::ops::loss::{Gradient, LossRecord, cross_entropy};
use crate::ops::optimizer::OptimizerState;

/// One of the networks that share a batch, with all its device keeps for them but the optimizer. Batch statistics are
/// those of its own images.
pub(super) struct Replica<'a> {
    pub engine: Engine,
    pub feed: Feed,
    teacher: Option<Teacher<'a>>,
    pub loss: LossRecord,
    d_logits: Buffer,
    label_smoothing: f32,
    /// Factor on the loss `[1]` on a device that cannot read the optimizer's.
    scale: Option<Buffer>,
    /// Its images of the batch.
    images: Range<usize>,
}

impl<'a> Replica<'a> {
    /// A network for a range of the batch's images.
    ///
    /// # Errors
    /// Errors of the engine or the teacher.
    pub fn new(device: &Device, model: &Model, options: &StepOptions<'a>, images: Range<usize>) -> Result<Self> {
        let (batch, classes) = (images.len(), model.graph.classes());
        let teacher = options.distillation.map(|d| Teacher::new(device, d, &model.graph, batch)).transpose()?;
        let taps = teacher.as_ref().map_or_else(Vec::new, Teacher::student_taps);
        let planned = EngineOptions { batch, fusion: options.fusion, training: true, taps };
        // The optimizer is with the replica of the first images.
        let scale = if images.start == 0 { None } else { Some(device.inputs(1)?) };
        Ok(Self {
            engine: Engine::new(device, model, &planned)?,
            feed: Feed::default(),
            teacher,
            loss: LossRecord::new(device, batch, classes)?,
            d_logits: device.activations(batch * classes)?,
            label_smoothing: options.label_smoothing,
            scale,
            images,
        })
    }

    /// Number of its images.
    pub fn images(&self) -> usize {
        self.images.len()
    }

    /// Copies the inputs of a step to the device: its part of the batch, and the factor on the loss.
    ///
    /// # Errors
    /// Images or labels that do not fit, or a device that fails.
    pub fn begin(&mut self, batch: &StepBatch<'_>, loss_scale: f32) -> Result<()> {
        let part = batch.part(self.images.clone())?;
        self.engine.set_loss_scale(loss_scale);
        self.scale.as_mut().map_or(Ok(()), |scale| scale.write(&[loss_scale]))?;
        self.feed.set(&part.images, &mut self.engine)?;
        self.loss.next(part.labels)
    }

    /// Augmentation, forward pass, loss and backward pass. `scale` is the factor on the loss `[1]`, where the device can
    /// read the optimizer's.
    ///
    /// # Errors
    /// When the device fails.
    pub fn gradients(&mut self, scale: Option<View<'_>>) -> Result<()> {
        let Self { engine, feed, teacher, loss, d_logits, .. } = self;
        loss.clear()?;
        feed.write(engine);
        let scale = self.scale.as_ref().map(|own| own.view(0..1)).or(scale);
        match teacher {
            Some(teacher) => teacher.loss(engine, loss, scale, d_logits)?,
            None => {
                let len = d_logits.len();
                let logits = engine.run()?.view(0..len);
                let gradient = Gradient { to: d_logits.view_mut(0..len), scale };
                cross_entropy(loss, logits, self.label_smoothing, Some(gradient))?;
            }
        }
        engine.backward(d_logits)
    }

    /// Changes its weights by its gradients.
    ///
    /// # Errors
    /// When the device fails.
    pub fn update(&mut self, optimizer: &mut OptimizerState) -> Result<()> {
        let (weights, gradients, copy) = self.engine.for_update();
        optimizer.update(weights, gradients, copy)
    }
}
