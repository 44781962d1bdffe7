//! DepthShrinker's search as it was published (`docs/methods.md` 1.9). Every block has a removal score s, 0 at first; the
//! blocks of the k smallest stay; scores get the raw straight-through gradient and are trained by the optimizer of the weights,
//! at their learning rate. No exploring, no centring, no smoothing over states, no projection: those are ours ([`Scores`]).
//!
//! [`Scores`]: super::Scores

use serde::{Deserialize, Serialize};

use super::mask::Mask;
use super::scores::{latency_gradient, ste_gradient};
use crate::{Error, Result};

/// The mean latency of an unmerged block in the table that DepthShrinker's settings for MobileNetV2-1.4 have, in the table's
/// unit: λ there is a factor on differences of such numbers, savings here are in units of the mean block.
const TABLE_MEAN: f32 = 36.25;
/// What `clip_grad_norm_` adds to the norm.
const CLIP_EPS: f32 = 1e-6;

/// Which of the two things that DepthShrinker's authors published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Published {
    /// What they state: blocks that are dear unmerged are pushed towards being freed. The latency term is
    /// λ Σ Δ·(1 − clip(s, 0, 1)), and scores do not decay.
    Stated,
    /// What their code does: it adds λ Σ Δ·s, which keeps the dear blocks and goes on outside of [0, 1], and scores decay as
    /// weights do.
    Released,
}

/// How the published search learns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PublishedConfig {
    /// The text or the code.
    pub variant: Published,
    /// Weight λ of the latency term, in the unit of the published tables.
    pub latency_weight: f32,
    /// Nesterov's momentum of the scores.
    pub momentum: f32,
}

impl Default for PublishedConfig {
    fn default() -> Self {
        Self { variant: Published::Stated, latency_weight: 1e-4, momentum: 0.9 }
    }
}

impl PublishedConfig {
    /// Refuses values out of range.
    ///
    /// # Errors
    /// Names the key and its range.
    pub fn check(&self) -> Result<()> {
        let rules = [
            ("latency_weight", self.latency_weight, (0.0..=1e3).contains(&self.latency_weight), "in [0, 1000]"),
            ("momentum", self.momentum, (0.0..1.0).contains(&self.momentum), "in [0, 1)"),
        ];
        match rules.iter().find(|(_, _, good, _)| !good) {
            Some((key, got, _, range)) => {
                Err(Error::Config(format!("search.published.{key} = {got}; expected a number {range}")))
            }
            None => Ok(()),
        }
    }
}

/// What a step takes over from that of the weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WeightStep {
    /// Learning rate.
    pub lr: f32,
    /// Weight decay, for [`Published::Released`].
    pub weight_decay: f32,
    /// Largest norm of the scores' gradients together; 0 for no clipping.
    pub clip_norm: f32,
}

/// Removal scores and their momentum, one per block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PublishedScores {
    removal: Vec<f32>,
    velocity: Vec<f32>,
}

impl PublishedScores {
    /// All scores 0.
    pub fn new(blocks: usize) -> Self {
        Self { removal: vec![0.0; blocks], velocity: vec![0.0; blocks] }
    }

    /// The removal scores, one per block: any number; the smallest stay.
    pub fn removal(&self) -> &[f32] {
        &self.removal
    }

    /// What ranks blocks by keep score: the removal scores with the other sign. Ties go to the shallower block.
    pub fn ranked(&self) -> Vec<f32> {
        self.removal.iter().map(|s| -s).collect()
    }

    /// Keep scores 1 − s, which lie in [0, 1] where removal scores do.
    pub fn keep_scores(&self) -> Vec<f32> {
        self.removal.iter().map(|s| 1.0 - s).collect()
    }

    /// The mask of a step: the k smallest scores stay.
    pub fn mask(&self, candidates: &[bool], keep: usize) -> Mask {
        Mask::top_k(&self.ranked(), candidates, keep)
    }

    /// One step of SGD. `inner_products` are Σ⟨∂L/∂y, x − φ(x)⟩ and `savings` what merging saves in units of the mean block's
    /// cost, one per block each.
    ///
    /// # Errors
    /// A gradient that is not finite.
    pub fn update(
        &mut self,
        config: &PublishedConfig,
        candidates: &[bool],
        (inner_products, savings): (&[f32], &[f32]),
        step: WeightStep,
    ) -> Result<()> {
        let gradient = |(block, &s): (usize, &f32)| {
            let task = -ste_gradient(s, inner_products[block]);
            let weight = config.latency_weight * TABLE_MEAN;
            let latency = match config.variant {
                Published::Stated => -latency_gradient(s, weight, savings[block]),
                Published::Released => weight * savings[block],
            };
            if candidates[block] { task + latency } else { 0.0 }
        };
        let gradients: Vec<f32> = self.removal.iter().enumerate().map(gradient).collect();
        if let Some(block) = gradients.iter().position(|g| !g.is_finite()) {
            let got = gradients[block];
            return Err(Error::NotFinite(format!(
                "mask search: the gradient of block {block}'s score is {got}; lower search.train.lr"
            )));
        }
        let norm = gradients.iter().map(|g| g * g).sum::<f32>().sqrt();
        let scale = if step.clip_norm > 0.0 { (step.clip_norm / (norm + CLIP_EPS)).min(1.0) } else { 1.0 };
        let decay = if config.variant == Published::Released { step.weight_decay } else { 0.0 };
        for (block, gradient) in gradients.into_iter().enumerate().filter(|(block, _)| candidates[*block]) {
            let gradient = gradient * scale + decay * self.removal[block];
            self.velocity[block] = config.momentum * self.velocity[block] + gradient;
            self.removal[block] -= step.lr * (gradient + config.momentum * self.velocity[block]);
        }
        Ok(())
    }
}
