//! Stage 2, finetuning without the freed activations: how they go, and what the original network teaches
//! (`docs/methods.md` 1.3).

use serde::{Deserialize, Serialize};

use super::mask::Mask;
use crate::engine::Engine;
use crate::train::{Hook, HookRecord, Progress, TrainStep};
use crate::{Error, Result};

/// How the freed activations turn into the identity: by the slope q outside their bounds, 0 = activation, 1 = identity.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Removal {
    /// q = 1 from the first step.
    AtOnce,
    /// q rises evenly from 0 to 1, all blocks together, between two shares of the stage.
    Linear {
        /// Share of the steps at which q leaves 0.
        start: f64,
        /// Share of the steps at which q reaches 1.
        end: f64,
    },
    /// One block after the other, the first at once and the last when `until` of the stage is done.
    Progressive {
        /// Which end of the network begins.
        order: Order,
        /// Share of the steps after which all are gone.
        until: f64,
    },
}

/// Order of progressive removal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Shallow blocks first.
    Forward,
    /// Deep blocks first.
    Backward,
}

impl Removal {
    /// Refuses shares out of range.
    ///
    /// # Errors
    /// Names the key and its range.
    pub fn check(&self) -> Result<()> {
        match *self {
            Self::AtOnce => Ok(()),
            Self::Linear { start, end } if 0.0 <= start && start < end && end <= 1.0 => Ok(()),
            Self::Linear { start, end } => Err(Error::Config(format!(
                "finetune.removal.linear: start = {start}, end = {end}; expected 0 <= start < end <= 1"
            ))),
            Self::Progressive { until, .. } if 0.0 < until && until <= 1.0 => Ok(()),
            Self::Progressive { until, .. } => {
                Err(Error::Config(format!("finetune.removal.progressive: until = {until}; expected 0 < until <= 1")))
            }
        }
    }

    /// Slopes of all blocks in step `step` (from 0) of `total`; in the last step every freed block's is 1.
    pub fn slopes(&self, mask: &Mask, step: u64, total: u64) -> Vec<f32> {
        let last = step + 1 >= total;
        match *self {
            _ if last => mask.slopes(1.0),
            Self::AtOnce => mask.slopes(1.0),
            Self::Linear { start, end } => {
                let done = (step + 1) as f64 / total as f64;
                mask.slopes(((done - start) / (end - start)).clamp(0.0, 1.0) as f32)
            }
            Self::Progressive { order, until } => {
                let mut removed = mask.removed();
                if order == Order::Backward {
                    removed.reverse();
                }
                // One block has no interval between its first and its last: it goes at once.
                let intervals = removed.len().saturating_sub(1).max(1) as f64;
                let passed = step as f64 / total as f64 / until * intervals;
                let gone = (passed.floor() as usize + 1).min(removed.len());
                let mut slopes = mask.slopes(0.0);
                removed[..gone].iter().for_each(|&block| slopes[block] = 1.0);
                slopes
            }
        }
    }
}

/// What the original network teaches the shrunk one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillConfig {
    /// Weight α of the teacher's soft labels, the true labels' being 1 − α; 0 turns them off.
    pub alpha: f32,
    /// Temperature T of both networks' logits.
    pub temperature: f32,
    /// Weight of the mean squared difference between the outputs of each freed block; 0 turns it off.
    pub feature_weight: f32,
}

impl Default for DistillConfig {
    fn default() -> Self {
        Self { alpha: 0.7, temperature: 1.0, feature_weight: 0.0 }
    }
}

impl DistillConfig {
    /// Refuses values out of range.
    ///
    /// # Errors
    /// Names the key and its range.
    pub fn check(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.alpha) {
            return Err(Error::Config(format!("alpha = {}; expected 0 to 1", self.alpha)));
        }
        if !(self.temperature > 0.0 && self.temperature <= 1e3) {
            return Err(Error::Config(format!("temperature = {}; expected above 0, up to 1000", self.temperature)));
        }
        if !(0.0..=1e6).contains(&self.feature_weight) {
            return Err(Error::Config(format!("feature_weight = {}; expected 0 to 1000000", self.feature_weight)));
        }
        Ok(())
    }

    /// Whether a teacher is needed at all.
    pub fn is_on(&self) -> bool {
        self.alpha > 0.0 || self.feature_weight > 0.0
    }
}

/// Finetuning as a part of the training loop: sets the slopes of the freed blocks, nothing else.
#[derive(Debug, Clone)]
pub struct Finetune {
    mask: Mask,
    removal: Removal,
}

impl Finetune {
    /// Finetuning of a network prepared by [`prepare_finetune`](super::surgery::prepare_finetune) for the same mask.
    /// `mask` has one entry for each of its sites ([`Mask::over`]).
    pub fn new(mask: Mask, removal: Removal) -> Self {
        Self { mask, removal }
    }

    /// Slopes that the last of `taken` steps was run with.
    fn last_slopes(&self, taken: u64, total: u64) -> Vec<f32> {
        self.removal.slopes(&self.mask, taken.saturating_sub(1), total)
    }
}

impl Hook for Finetune {
    fn before_forward(&mut self, step: &mut TrainStep<'_>, at: Progress<'_>) -> Result<()> {
        step.set_slopes(&self.removal.slopes(&self.mask, at.step, at.total_steps))
    }

    fn follows_steps(&self) -> bool {
        false
    }

    fn before_evaluation(&mut self, engine: &mut Engine, at: Progress<'_>) -> Result<()> {
        engine.set_slopes(&self.last_slopes(at.step, at.total_steps))
    }

    fn epoch_record(&mut self, at: Progress<'_>) -> Option<HookRecord> {
        let slopes = self.last_slopes(at.step, at.total_steps);
        let removed = self.mask.removed();
        let removed_slope = removed.iter().map(|&b| slopes[b]).sum::<f32>() / removed.len().max(1) as f32;
        Some(HookRecord::Finetune { removed_slope, partial: removed.iter().any(|&b| slopes[b] < 1.0) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask() -> Mask {
        "1,0,1,0,0".parse().unwrap()
    }

    #[test]
    fn a_linear_slope_rises_from_0_to_1_and_kept_blocks_stay() {
        let removal = Removal::Linear { start: 0.25, end: 0.75 };
        let q = |step| removal.slopes(&mask(), step, 100)[1];
        assert_eq!((q(0), q(24), q(74), q(99)), (0.0, 0.0, 1.0, 1.0));
        assert!((q(49) - 0.5).abs() < 1e-6);
        for step in 0..100 {
            let slopes = removal.slopes(&mask(), step, 100);
            assert_eq!((slopes[0], slopes[2]), (0.0, 0.0));
            assert!(step == 0 || q(step) >= q(step - 1));
        }
    }

    #[test]
    fn progressive_removal_takes_blocks_in_order_and_all_by_its_end() {
        let at = |order, step| Removal::Progressive { order, until: 0.5 }.slopes(&mask(), step, 100);
        assert_eq!(at(Order::Forward, 0), [0.0, 1.0, 0.0, 0.0, 0.0]);
        assert_eq!(at(Order::Forward, 25), [0.0, 1.0, 0.0, 1.0, 0.0]);
        assert_eq!(at(Order::Forward, 50), mask().slopes(1.0));
        assert_eq!(at(Order::Backward, 0), [0.0, 0.0, 0.0, 0.0, 1.0]);
        assert_eq!(at(Order::Backward, 25), [0.0, 0.0, 0.0, 1.0, 1.0]);
    }

    #[test]
    fn one_block_or_none_is_no_division_by_zero() {
        let removal = Removal::Progressive { order: Order::Forward, until: 0.5 };
        assert_eq!(removal.slopes(&"1,0".parse().unwrap(), 0, 10), [0.0, 1.0]);
        assert_eq!(removal.slopes(&Mask::all(2), 3, 10), [0.0, 0.0]);
    }

    #[test]
    fn in_the_last_step_everything_is_gone_however_short_the_stage() {
        for removal in [
            Removal::AtOnce,
            Removal::Linear { start: 0.9, end: 1.0 },
            Removal::Progressive { order: Order::Backward, until: 1.0 },
        ] {
            removal.check().unwrap();
            for total in 1..5 {
                assert_eq!(removal.slopes(&mask(), total - 1, total), mask().slopes(1.0), "{removal:?}");
            }
        }
    }

    #[test]
    fn shares_out_of_range_are_refused() {
        for removal in [
            Removal::Linear { start: 0.5, end: 0.5 },
            Removal::Linear { start: -0.1, end: 0.5 },
            Removal::Linear { start: 0.0, end: f64::NAN },
            Removal::Progressive { order: Order::Forward, until: 0.0 },
        ] {
            assert!(removal.check().is_err(), "{removal:?}");
        }
        assert!(DistillConfig { temperature: 0.0, ..DistillConfig::default() }.check().is_err());
    }

    #[test]
    fn records_before_the_slope_is_1_are_marked() {
        let mut finetune = Finetune::new(mask(), Removal::Linear { start: 0.0, end: 0.5 });
        let at = |step| Progress { stage: "finetune", epoch: 0, epochs: 4, step, total_steps: 100 };
        let mut record = |step| finetune.epoch_record(at(step));
        assert_eq!(record(25), Some(HookRecord::Finetune { removed_slope: 0.5, partial: true }));
        assert_eq!(record(50), Some(HookRecord::Finetune { removed_slope: 1.0, partial: false }));
    }
}
