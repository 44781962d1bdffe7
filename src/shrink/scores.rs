//! Keep scores and how they are learned: the arithmetic of the mask search, without network or data.
//!
//! Every block has a *keep* score a in [0, 1]; the k blocks with the highest scores keep their activations
//! (`methods.md` 1.2 in the keep form, y = â·φ(x) + (1 − â)·x). The loss is L_task + λ Σ Δ_b·clip(a_b, 0, 1), with Δ_b
//! what merging block b saves: a block that is dear unmerged is pushed towards being freed, one that merging makes
//! dearer (Δ_b < 0) towards being kept.
//!
//! Runs are short, so three things keep the scores from ending as they began:
//! * The straight-through gradient reaches a block in either state, so a block below the cut can come back.
//! * Removing an activation nearly always raises the loss, so raw gradients push every score up until all sit at 1 and
//!   the tie-break decides: "the first k". Only differences matter to a ranking, so gradients are *centred* on their
//!   median over the blocks.
//! * Gradients of different blocks and of different moments differ by orders of magnitude. They are divided by a
//!   robust measure of their spread (their median distance from the centre, smoothed over steps) and clipped, so that a
//!   step moves a score by at most the learning rate, whatever the scale of the loss.
//!
//! Scores are projected onto [0, 1] after every step, so that no force, the latency term's included, can push a block to
//! where the task gradient is cut off. They get no weight decay.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Gumbel};
use serde::{Deserialize, Serialize};

use super::mask::Mask;
use crate::{Error, Result};

/// Where every score starts: the middle, so that it can move either way.
const START: f32 = 0.5;
/// Spreads from the centre at which the force on a score is cut off: one outlier must not set the scale for all.
const CLIP_SPREADS: f32 = 3.0;
/// Share of the search over which the learning rate falls to 0, so that the weights see the final mask.
const SETTLE: f32 = 0.2;
/// First temperature of Gumbel ranking and its factor per epoch (DepthShrinker).
const GUMBEL_TAU: f64 = 3.0;
const GUMBEL_DECAY: f64 = 0.95;

/// How scores are learned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScoreConfig {
    /// How far a score moves over the whole search under full force all the time; the range is 1 wide and scores start
    /// in its middle.
    pub travel: f32,
    /// Share of the past in the smoothed gradient, 0 ≤ β < 1.
    pub momentum: f32,
    /// Weight λ of the latency term. Forces are relative: the task's is at most 1, the latency term's is λ times what
    /// merging the block saves, in units of the mean block's cost.
    pub latency_weight: f32,
    /// Adds Gumbel noise of this size times 3·0.95^epoch to the scores that are ranked while searching; 0 = none.
    /// (DepthShrinker ranks softmax((log softmax(s) + G)/τ); dividing all by τ changes no order, so here τ scales the
    /// noise.) The final mask is always that of the scores alone.
    pub gumbel: f32,
    /// Blocks that always keep their activations and are not part of the choice, by index.
    pub exclude: Vec<usize>,
}

impl Default for ScoreConfig {
    fn default() -> Self {
        Self { travel: 1.0, momentum: 0.9, latency_weight: 0.1, gumbel: 0.0, exclude: Vec::new() }
    }
}

impl ScoreConfig {
    /// Refuses values out of range.
    ///
    /// # Errors
    /// Names the key and its range.
    pub fn check(&self) -> Result<()> {
        let rules = [
            ("travel", self.travel, self.travel > 0.0 && self.travel <= 1e3, "in (0, 1000]"),
            ("momentum", self.momentum, (0.0..1.0).contains(&self.momentum), "in [0, 1)"),
            ("latency_weight", self.latency_weight, (0.0..=1e3).contains(&self.latency_weight), "in [0, 1000]"),
            ("gumbel", self.gumbel, (0.0..=1e3).contains(&self.gumbel), "in [0, 1000]"),
        ];
        match rules.iter().find(|(_, _, good, _)| !good) {
            Some((key, got, _, range)) => {
                Err(Error::Config(format!("search.scores.{key} = {got}; expected a number {range}")))
            }
            None => Ok(()),
        }
    }

    /// One flag per block: whether the search may free it.
    ///
    /// # Errors
    /// An excluded index that is no block.
    pub fn candidates(&self, blocks: usize) -> Result<Vec<bool>> {
        let mut candidates = vec![true; blocks];
        for &block in &self.exclude {
            *candidates.get_mut(block).ok_or_else(|| {
                Error::Config(format!(
                    "search.scores.exclude names block {block}; the network has blocks 0 to {}",
                    blocks - 1
                ))
            })? = false;
        }
        Ok(candidates)
    }
}

/// The task's gradient of a *keep* score by the straight-through estimator, from Σ⟨∂L/∂y, x − φ(x)⟩ over every use of
/// the mask: −Σ⟨…⟩ · 1[0 ≤ a ≤ 1]; the boundary values pass.
pub fn ste_gradient(score: f32, inner_product: f32) -> f32 {
    if (0.0..=1.0).contains(&score) { -inner_product } else { 0.0 }
}

/// The latency term's gradient of a keep score, λ·Δ inside [0, 1] and 0 outside.
pub fn latency_gradient(score: f32, weight: f32, saving: f32) -> f32 {
    if (0.0..=1.0).contains(&score) { weight * saving } else { 0.0 }
}

/// Scores of all blocks and what their updates remember.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Keep scores, one per block.
    scores: Vec<f32>,
    /// Smoothed task gradient.
    smoothed: Vec<f32>,
    /// Smoothed spread of the gradients over the blocks.
    spread: f32,
    /// Updates so far.
    updates: u64,
}

impl Scores {
    /// All scores in the middle.
    pub fn new(blocks: usize) -> Self {
        Self { scores: vec![START; blocks], smoothed: vec![0.0; blocks], spread: 0.0, updates: 0 }
    }

    /// Keep scores in [0, 1], one per block.
    pub fn values(&self) -> &[f32] {
        &self.scores
    }

    /// Scores to rank at a step, with Gumbel noise if configured; a function of (seed, step) beside the scores.
    pub fn ranked(&self, config: &ScoreConfig, seed: u64, epoch: u64, step: u64) -> Vec<f32> {
        if config.gumbel == 0.0 {
            return self.scores.clone();
        }
        let tau = GUMBEL_TAU * GUMBEL_DECAY.powf(epoch as f64);
        let size = config.gumbel * tau as f32;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(step);
        let gumbel = Gumbel::new(0.0f32, 1.0).expect("a scale above 0");
        self.scores.iter().zip(gumbel.sample_iter(&mut rng)).map(|(a, noise)| a + size * noise).collect()
    }

    /// The mask at a step.
    pub fn mask(
        &self,
        config: &ScoreConfig,
        candidates: &[bool],
        keep: usize,
        (seed, epoch, step): (u64, u64, u64),
    ) -> Mask {
        Mask::top_k(&self.ranked(config, seed, epoch, step), candidates, keep)
    }

    /// One step of projected gradient descent. `inner_products` are Σ⟨∂L/∂y, x − φ(x)⟩, one per block; `savings` what
    /// merging each block saves, in units of the mean block's cost.
    ///
    /// # Errors
    /// A gradient that is not finite.
    pub fn update(
        &mut self,
        config: &ScoreConfig,
        candidates: &[bool],
        inner_products: &[f32],
        savings: &[f32],
        (step, total_steps): (u64, u64),
    ) -> Result<()> {
        if let Some(block) = (0..self.scores.len()).find(|&b| candidates[b] && !inner_products[b].is_finite()) {
            return Err(Error::NotFinite(format!(
                "mask search, step {step}: the gradient of block {block}'s score is {}; lower search.train.lr",
                inner_products[block]
            )));
        }
        let force = self.task_force(config, candidates, inner_products);
        let total = total_steps.max(1) as f32;
        let settle = ((1.0 - step as f32 / total) / SETTLE).clamp(0.0, 1.0);
        let lr = config.travel / total * settle;
        for block in (0..self.scores.len()).filter(|&b| candidates[b]) {
            let latency = latency_gradient(self.scores[block], config.latency_weight, savings[block]);
            self.scores[block] = (self.scores[block] - lr * (force[block] + latency)).clamp(0.0, 1.0);
        }
        Ok(())
    }

    /// The task gradients, smoothed, centred over the candidates, in units of their spread and clipped to [−1, 1].
    fn task_force(&mut self, config: &ScoreConfig, candidates: &[bool], inner_products: &[f32]) -> Vec<f32> {
        let beta = config.momentum;
        self.updates += 1;
        let correction = 1.0 - beta.powf(self.updates as f32);
        let mut centred = vec![0.0f32; self.scores.len()];
        for block in (0..self.scores.len()).filter(|&b| candidates[b]) {
            let gradient = ste_gradient(self.scores[block], inner_products[block]);
            self.smoothed[block] = beta * self.smoothed[block] + (1.0 - beta) * gradient;
            centred[block] = self.smoothed[block] / correction;
        }
        let over_candidates = |values: &[f32]| -> Vec<f32> {
            values.iter().zip(candidates).filter(|(_, c)| **c).map(|(v, _)| *v).collect()
        };
        let centre = median(over_candidates(&centred));
        for (value, _) in centred.iter_mut().zip(candidates).filter(|(_, c)| **c) {
            *value -= centre;
        }
        let spread = median(over_candidates(&centred).iter().map(|v| v.abs()).collect());
        self.spread = beta * self.spread + (1.0 - beta) * spread;
        let unit = CLIP_SPREADS * self.spread / correction;
        if unit <= 0.0 {
            return vec![0.0; self.scores.len()];
        }
        let inside = |score: f32| (0.0..=1.0).contains(&score);
        let force = |(value, &score): (&f32, &f32)| if inside(score) { (value / unit).clamp(-1.0, 1.0) } else { 0.0 };
        centred.iter().zip(&self.scores).map(force).collect()
    }
}

/// The middle value, of an even number the mean of the two middle ones; 0 of none.
fn median(mut values: Vec<f32>) -> f32 {
    values.sort_by(f32::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => 0.5 * (values[n / 2 - 1] + values[n / 2]),
    }
}
