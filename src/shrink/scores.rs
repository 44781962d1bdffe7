//! Keep scores and how they are learned: the arithmetic of the mask search, without network or data.
//!
//! Every block has a *keep* score a in [0, 1]; the k blocks with the highest scores keep their activations
//! (`docs/methods.md` 1.2 in the keep form, y = â·φ(x) + (1 − â)·x). The loss is L_task + λ Σ Δ_b·clip(a_b, 0, 1), with Δ_b
//! what merging block b saves: a block that is dear unmerged is pushed towards being freed, one that merging makes
//! dearer (Δ_b < 0) towards being kept.
//!
//! Runs are short, so four things keep the scores from ending as they began, or as chance has it:
//! * *Both states count.* The straight-through gradient reaches a block whether its activations are on or off, but says
//!   different things: where they are off it is large and tells how much the block is missed, where they are on it is
//!   small and often of the other sign, since the loss is curved between the two. Following only the present one, every
//!   block hovers at the cut. What is wanted is the loss with the activations off minus that with them on, the integral of
//!   the gradient from one state to the other; by the trapezoid rule that is the mean of the gradients in the two states.
//!   So the latest of each state are remembered, smoothed, and their mean is followed.
//! * *Both states are seen*: the search begins with random masks of the asked size, then goes over to the top-k.
//! * Removing an activation nearly always raises the loss, so raw gradients push every score up until all sit at 1 and
//!   the tie-break decides: "the first k". Only differences matter to a ranking, so gradients are *centred* on their
//!   median over the blocks.
//! * Gradients differ by orders of magnitude over blocks and moments. They are divided by a robust measure of their
//!   *spread* (the median distance from the centre) and clipped, so that a step moves a score by at most the learning
//!   rate, whatever the scale of the loss.
//!
//! Scores are projected onto [0, 1] after every step, so that no force, the latency term's included, can push a block to
//! where the task gradient is cut off. They get no weight decay.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Gumbel};
use serde::{Deserialize, Serialize};

use super::mask::Mask;
use super::random_masks::random_mask;
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
    /// Share of the search, from its start, that draws a random mask of the asked size for every step.
    pub explore: f32,
    /// How far a score moves over the whole search under full force all the time; the range is 1 wide and scores start
    /// in its middle.
    pub travel: f32,
    /// Share of the past in the smoothed gradient of each state, 0 ≤ β < 1.
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
        Self { explore: 0.5, travel: 1.0, momentum: 0.95, latency_weight: 0.5, gumbel: 0.0, exclude: Vec::new() }
    }
}

impl ScoreConfig {
    /// Refuses values out of range.
    ///
    /// # Errors
    /// Names the key and its range.
    pub fn check(&self) -> Result<()> {
        let rules = [
            ("explore", self.explore, (0.0..=1.0).contains(&self.explore), "in [0, 1]"),
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

/// A smoothed gradient and how often it was seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Smoothed {
    sum: f32,
    seen: u64,
}

impl Smoothed {
    fn add(&mut self, value: f32, beta: f32) {
        self.sum = beta * self.sum + (1.0 - beta) * value;
        self.seen += 1;
    }

    /// The mean with the weights of the few values seen so far adding up to 1; 0 of none.
    fn mean(self, beta: f32) -> f32 {
        if self.seen == 0 { 0.0 } else { self.sum / (1.0 - beta.powf(self.seen as f32)) }
    }
}

/// Scores of all blocks and what their updates remember.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Keep scores, one per block.
    scores: Vec<f32>,
    /// Smoothed task gradients, one per block, where its activations were off and where they were on.
    off: Vec<Smoothed>,
    on: Vec<Smoothed>,
}

/// A step of the search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SearchStep {
    /// Seed of the search.
    pub seed: u64,
    /// Epoch, from 0.
    pub epoch: u64,
    /// Step over the whole search, from 0.
    pub step: u64,
    /// Steps of the whole search.
    pub total: u64,
}

impl SearchStep {
    /// Whether this step still draws its mask at random.
    pub fn explores(&self, config: &ScoreConfig) -> bool {
        (self.step as f32) < config.explore * self.total as f32
    }
}

impl Scores {
    /// All scores in the middle.
    pub fn new(blocks: usize) -> Self {
        let unseen = vec![Smoothed::default(); blocks];
        Self { scores: vec![START; blocks], off: unseen.clone(), on: unseen }
    }

    /// Keep scores in [0, 1], one per block.
    pub fn values(&self) -> &[f32] {
        &self.scores
    }

    /// Scores to rank at a step, with Gumbel noise if configured; a function of (seed, step) beside the scores.
    pub fn ranked(&self, config: &ScoreConfig, at: SearchStep) -> Vec<f32> {
        if config.gumbel == 0.0 {
            return self.scores.clone();
        }
        let tau = GUMBEL_TAU * GUMBEL_DECAY.powf(at.epoch as f64);
        let size = config.gumbel * tau as f32;
        let mut rng = ChaCha8Rng::seed_from_u64(at.seed);
        rng.set_stream(at.step);
        let gumbel = Gumbel::new(0.0f32, 1.0).expect("a scale above 0");
        self.scores.iter().zip(gumbel.sample_iter(&mut rng)).map(|(a, noise)| a + size * noise).collect()
    }

    /// The mask of a step: random while exploring, then the top-k.
    pub fn mask(&self, config: &ScoreConfig, candidates: &[bool], keep: usize, at: SearchStep) -> Mask {
        if at.explores(config) {
            return random_mask(candidates, keep, at.seed, at.step);
        }
        Mask::top_k(&self.ranked(config, at), candidates, keep)
    }

    /// One step of projected gradient descent. `mask` is that of the step, `inner_products` are Σ⟨∂L/∂y, x − φ(x)⟩, one
    /// per block; `savings` what merging each block saves, in units of the mean block's cost.
    ///
    /// # Errors
    /// A gradient that is not finite.
    pub fn update(
        &mut self,
        config: &ScoreConfig,
        candidates: &[bool],
        mask: &Mask,
        (inner_products, savings): (&[f32], &[f32]),
        at: SearchStep,
    ) -> Result<()> {
        let free = || (0..candidates.len()).filter(|&b| candidates[b]);
        if let Some(block) = free().find(|&b| !inner_products[b].is_finite()) {
            return Err(Error::NotFinite(format!(
                "mask search, step {}: the gradient of block {block}'s score is {}; lower search.train.lr",
                at.step, inner_products[block]
            )));
        }
        for block in free() {
            let gradient = ste_gradient(self.scores[block], inner_products[block]);
            let state = if mask.kept()[block] { &mut self.on[block] } else { &mut self.off[block] };
            state.add(gradient, config.momentum);
        }
        let force = self.task_force(config, candidates);
        let total = at.total.max(1) as f32;
        let settle = ((1.0 - at.step as f32 / total) / SETTLE).clamp(0.0, 1.0);
        let lr = config.travel / total * settle;
        for block in free() {
            let latency = latency_gradient(self.scores[block], config.latency_weight, savings[block]);
            self.scores[block] = (self.scores[block] - lr * (force[block] + latency)).clamp(0.0, 1.0);
        }
        Ok(())
    }

    /// The task gradients, the mean of both states, centred over the candidates, in units of their spread and clipped to
    /// [−1, 1].
    fn task_force(&self, config: &ScoreConfig, candidates: &[bool]) -> Vec<f32> {
        let free: Vec<usize> = (0..candidates.len()).filter(|&b| candidates[b]).collect();
        let both = |b: usize| 0.5 * (self.off[b].mean(config.momentum) + self.on[b].mean(config.momentum));
        let gradients: Vec<f32> = free.iter().map(|&b| both(b)).collect();
        let centre = median(gradients.clone());
        let unit = CLIP_SPREADS * median(gradients.iter().map(|g| (g - centre).abs()).collect());
        let mut force = vec![0.0; candidates.len()];
        for (&block, gradient) in free.iter().zip(gradients) {
            let scaled = if unit > 0.0 { ((gradient - centre) / unit).clamp(-1.0, 1.0) } else { 0.0 };
            // Outside [0, 1] the estimator passes nothing (a projected score is never there).
            force[block] = -ste_gradient(self.scores[block], scaled);
        }
        force
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
