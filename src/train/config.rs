//! The settings of one training stage.

use serde::{Deserialize, Serialize};

use super::schedule::{Course, Schedule};
use crate::data::Augment;
use crate::ops::optimizer::Optimizer;
use crate::{Error, Result};

/// The settings of one training stage; unknown keys are refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Passes over the training images.
    pub epochs: u64,
    /// Images per step.
    pub batch: usize,
    /// Highest learning rate, for this batch size as it is (never rescaled).
    pub lr: f32,
    /// Learning rate at the end.
    pub min_lr: f32,
    /// Course of the learning rate.
    pub schedule: Schedule,
    /// Epochs over which the learning rate first rises.
    pub warmup_epochs: f32,
    /// Weight decay of convolution and linear weights; biases and batch-norm never decay.
    pub weight_decay: f32,
    /// Largest norm of all gradients together; 0 turns clipping off.
    pub clip_norm: f32,
    /// Share of the label's probability spread over all classes. Not used with distillation.
    pub label_smoothing: f32,
    /// Epochs from one evaluation on the test images to the next; the last epoch always has one.
    pub evaluate_every: u64,
    /// Steps after which the test images are evaluated too; 0 is before the first, and what the stage does not reach is left
    /// out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub evaluate_after: Vec<u64>,
    /// Seed of the data's order and augmentation and of dropout.
    pub seed: u64,
    /// The rule that turns gradients into new weights.
    pub optimizer: Optimizer,
    /// Augmentation of the training images.
    pub augment: Augment,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: 10,
            batch: 128,
            lr: 0.1,
            min_lr: 0.0,
            schedule: Schedule::Cosine,
            warmup_epochs: 0.5,
            weight_decay: 1e-4,
            clip_norm: 5.0,
            label_smoothing: 0.1,
            evaluate_every: 1,
            evaluate_after: Vec::new(),
            seed: 0,
            optimizer: Optimizer::default(),
            augment: Augment::default(),
        }
    }
}

impl TrainConfig {
    /// Whether every number is in its range.
    ///
    /// # Errors
    /// Names the first setting that is not, with its range.
    pub fn check(&self) -> Result<()> {
        let finite = |x: f32, low: f32| x.is_finite() && x >= low;
        let rules = [
            (self.epochs > 0, "epochs", "at least 1"),
            (self.batch > 0, "batch", "at least 1"),
            (self.evaluate_every > 0, "evaluate_every", "at least 1"),
            (finite(self.lr, f32::MIN_POSITIVE), "lr", "above 0"),
            (finite(self.min_lr, 0.0) && self.min_lr <= self.lr, "min_lr", "0 to lr"),
            (finite(self.warmup_epochs, 0.0), "warmup_epochs", "0 or more"),
            (finite(self.weight_decay, 0.0), "weight_decay", "0 or more"),
            (finite(self.clip_norm, 0.0), "clip_norm", "0 (off) or more"),
            ((0.0..1.0).contains(&self.label_smoothing), "label_smoothing", "0 to below 1"),
        ];
        match rules.iter().find(|rule| !rule.0) {
            Some((_, name, range)) => Err(Error::Config(format!("{name} is out of range; it must be {range}"))),
            None => self.optimizer.check(),
        }
    }

    /// Learning rate of a step, counted from 0 over the whole stage.
    pub fn learning_rate(&self, step: u64, steps_per_epoch: u64) -> f32 {
        let warmup = f64::from(self.warmup_epochs) * steps_per_epoch as f64;
        let course = Course { peak: self.lr, floor: self.min_lr, warmup, total: self.epochs * steps_per_epoch };
        self.schedule.rate(course, step)
    }
}
