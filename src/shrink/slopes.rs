//! Slopes that are learned: each block's activations are y = α·x + (1 − α)·φ(x) with an α of its own, which a penalty pulls
//! towards 1, the identity, while the weights are trained along. Blocks whose α gets far are the ones that can go.
//!
//! | | penalty of a block | α begins at | read from |
//! |--|--|--|--|
//! | [`SlopeRule::Collapse`] | λ·(1 − α)² | 0.1 | LayerCollapse (Shabgahi et al., arXiv 2311.17943) and its code, for fully connected layers |
//! | [`SlopeRule::Folding`] | λ·abs(1 − α²) | 0, and not below | Layer Folding (Ben Dror et al., BMVC 2022) and its code; λ = 0.25 and the threshold 0.9 are theirs |
//!
//! Decided here: λ is that of a block times what merging it saves, since the plain penalty pulls all blocks alike; a block has one
//! α; α is trained as weights are, without decay; blocks are ranked by 1 − α, and freed until the budget is kept. With a
//! threshold, blocks whose α reaches it go even where the budget would let them stay: the rule of both papers.

use serde::{Deserialize, Serialize};

use super::published_scores::WeightStep;
use crate::{Error, Result};

/// Added to the norm by which gradients are clipped.
const CLIP_EPS: f32 = 1e-6;

/// Which penalty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlopeRule {
    /// LayerCollapse's.
    Collapse,
    /// Layer Folding's.
    Folding,
}

/// How slopes are learned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SlopeConfig {
    /// Weight λ of the penalty.
    pub weight: f32,
    /// Nesterov's momentum of the slopes.
    pub momentum: f32,
    /// The slope from which on a block goes in any case; only the budget decides if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f32>,
}

impl Default for SlopeConfig {
    fn default() -> Self {
        Self { weight: 0.25, momentum: 0.9, threshold: None }
    }
}

impl SlopeConfig {
    /// Refuses values out of range.
    ///
    /// # Errors
    /// Names the key and its range.
    pub fn check(&self) -> Result<()> {
        let threshold = self.threshold.unwrap_or(1.0);
        let rules = [
            ("weight", self.weight, (0.0..=1e3).contains(&self.weight), "in [0, 1000]"),
            ("momentum", self.momentum, (0.0..1.0).contains(&self.momentum), "in [0, 1)"),
            ("threshold", threshold, threshold > 0.0 && threshold <= 1.0, "in (0, 1]"),
        ];
        match rules.iter().find(|(_, _, good, _)| !good) {
            Some((key, got, _, range)) => {
                Err(Error::Config(format!("search.slopes.{key} = {got}; expected a number {range}")))
            }
            None => Ok(()),
        }
    }
}

impl SlopeRule {
    fn start(self) -> f32 {
        match self {
            Self::Collapse => 0.1,
            Self::Folding => 0.0,
        }
    }

    /// The derivative of the penalty of weight 1.
    pub fn gradient(self, slope: f32) -> f32 {
        match self {
            Self::Collapse => -2.0 * (1.0 - slope),
            Self::Folding => 2.0 * slope * if slope < 1.0 { -1.0 } else { 1.0 },
        }
    }
}

/// The slopes of all blocks and their momentum.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slopes {
    slopes: Vec<f32>,
    velocity: Vec<f32>,
}

impl Slopes {
    /// All slopes where the rule begins; those of blocks that are no candidates are 0 and stay so.
    pub fn new(rule: SlopeRule, candidates: &[bool]) -> Self {
        let slopes = candidates.iter().map(|candidate| if *candidate { rule.start() } else { 0.0 }).collect();
        Self { slopes, velocity: vec![0.0; candidates.len()] }
    }

    /// The slopes, one per block.
    pub fn values(&self) -> &[f32] {
        &self.slopes
    }

    /// What ranks blocks by keep score: 1 − α.
    pub fn keep_scores(&self) -> Vec<f32> {
        self.slopes.iter().map(|slope| 1.0 - slope).collect()
    }

    /// One step of SGD. `inner_products` are Σ⟨∂L/∂y, x − φ(x)⟩, the derivative of the task's loss by α, and `savings` what
    /// merging saves in units of the mean block's cost, one per block each.
    ///
    /// # Errors
    /// A gradient that is not finite.
    pub fn update(
        &mut self,
        (rule, config): (SlopeRule, &SlopeConfig),
        candidates: &[bool],
        (inner_products, savings): (&[f32], &[f32]),
        step: WeightStep,
    ) -> Result<()> {
        let gradient = |block: usize| {
            let penalty = config.weight * savings[block].max(0.0) * rule.gradient(self.slopes[block]);
            if candidates[block] { inner_products[block] + penalty } else { 0.0 }
        };
        let gradients: Vec<f32> = (0..self.slopes.len()).map(gradient).collect();
        if let Some(block) = gradients.iter().position(|g| !g.is_finite()) {
            let got = gradients[block];
            return Err(Error::NotFinite(format!(
                "slope search: the gradient of block {block}'s slope is {got}; lower search.train.lr"
            )));
        }
        let norm = gradients.iter().map(|g| g * g).sum::<f32>().sqrt();
        let scale = if step.clip_norm > 0.0 { (step.clip_norm / (norm + CLIP_EPS)).min(1.0) } else { 1.0 };
        for (block, gradient) in gradients.into_iter().enumerate().filter(|(block, _)| candidates[*block]) {
            let gradient = gradient * scale;
            self.velocity[block] = config.momentum * self.velocity[block] + gradient;
            self.slopes[block] -= step.lr * (gradient + config.momentum * self.velocity[block]);
            if rule == SlopeRule::Folding {
                self.slopes[block] = self.slopes[block].max(0.0);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: WeightStep = WeightStep { lr: 0.1, weight_decay: 0.5, clip_norm: 0.0 };

    #[test]
    fn penalties_have_their_derivatives() {
        let penalty = |rule, slope: f32| match rule {
            SlopeRule::Collapse => (1.0 - slope).powi(2),
            SlopeRule::Folding => (1.0 - slope * slope).abs(),
        };
        for rule in [SlopeRule::Collapse, SlopeRule::Folding] {
            for slope in [0.0f32, 0.1, 0.5, 0.9, 1.2] {
                let step = 1e-3;
                let difference = (penalty(rule, slope + step) - penalty(rule, slope - step)) / (2.0 * step);
                assert!((difference - rule.gradient(slope)).abs() < 2e-3, "{rule:?} at {slope}");
            }
        }
    }

    #[test]
    fn slopes_go_to_1_unless_the_task_holds_them() {
        let config = SlopeConfig { momentum: 0.0, ..SlopeConfig::default() };
        let candidates = [true, true, true, false];
        let mut slopes = Slopes::new(SlopeRule::Collapse, &candidates);
        assert_eq!(slopes.values(), [0.1, 0.1, 0.1, 0.0]);
        for _ in 0..400 {
            // The second block is missed, the third saves nothing.
            let task = [0.0, 0.3 * slopes.values()[1], 0.0, -9.0];
            slopes.update((SlopeRule::Collapse, &config), &candidates, (&task, &[1.0, 1.0, -0.5, 1.0]), STEP).unwrap();
        }
        let found = slopes.values();
        // 0.3·α = 2·0.25·(1 − α) at 0.625.
        assert!((found[0] - 1.0).abs() < 1e-3 && (found[1] - 0.625).abs() < 1e-3, "{found:?}");
        assert_eq!((found[2], found[3]), (0.1, 0.0));
        let scores = slopes.keep_scores();
        assert!(scores[0] < scores[1] && scores[1] < scores[2]);
        let mut folding = Slopes::new(SlopeRule::Folding, &[true]);
        folding.update((SlopeRule::Folding, &config), &[true], (&[3.0], &[1.0]), STEP).unwrap();
        assert_eq!(folding.values(), [0.0]);
        assert!(folding.update((SlopeRule::Folding, &config), &[true], (&[f32::NAN], &[1.0]), STEP).is_err());
        let clipped = WeightStep { clip_norm: 1.0, ..STEP };
        folding.update((SlopeRule::Folding, &config), &[true], (&[-100.0], &[1.0]), clipped).unwrap();
        assert!((folding.values()[0] - 0.1).abs() < 1e-4);
    }
}
