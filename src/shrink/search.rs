//! Stage 1, the mask search: weights and keep scores are trained together. Before every pass the mask is drawn at random
//! while the search explores, then it is the hard top-k of the scores (`docs/methods.md` 1.2).
//!
//! What the scores learn from a step is ours ([`Scores`]) or as published ([`PublishedScores`]). Or there are no masks while it
//! searches, but slopes that are learned ([`Slopes`]).
//!
//! The search runs on a copy of the model. DepthShrinker finetunes from the original weights and throws the searched
//! ones away; keeping them instead is an option of the job.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::mask::{Budget, Mask};
use super::providers::check_active_blocks;
use super::published_scores::{PublishedConfig, PublishedScores, WeightStep};
use super::scores::{ScoreConfig, Scores, SearchStep};
use super::slopes::{SlopeConfig, SlopeRule, Slopes};
use crate::engine::Engine;
use crate::graph::Graph;
use crate::train::{Hook, HookRecord, Progress, ScoreRecord, TrainConfig, TrainStep};
use crate::{Error, Result};

/// Scores recorded over the whole search: enough for a curve, little enough for a checkpoint.
const RECORDS: u64 = 50;

/// How scores are learned.
#[derive(Debug, Clone, PartialEq)]
pub enum Rule {
    /// As here.
    Ours(ScoreConfig),
    /// As DepthShrinker published it: with the learning rate, the weight decay and the clipping of the weights.
    Published(PublishedConfig, TrainConfig),
    /// Slopes with a penalty, with the learning rate and the clipping of the weights.
    Slopes(SlopeRule, SlopeConfig, TrainConfig),
}

impl Rule {
    fn check(&self) -> Result<()> {
        match self {
            Self::Ours(config) => config.check(),
            Self::Published(config, _) => config.check(),
            Self::Slopes(_, config, _) => config.check(),
        }
    }
}

/// Scores by any rule. Their fields tell them apart in a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum LearnedScores {
    Ours(Scores),
    Published(PublishedScores),
    Slopes(Slopes),
}

impl LearnedScores {
    fn new(rule: &Rule, candidates: &[bool]) -> Self {
        let blocks = candidates.len();
        match rule {
            Rule::Ours(_) => Self::Ours(Scores::new(blocks)),
            Rule::Published(..) => Self::Published(PublishedScores::new(blocks)),
            Rule::Slopes(rule, ..) => Self::Slopes(Slopes::new(*rule, candidates)),
        }
    }

    fn keep_scores(&self) -> Vec<f32> {
        match self {
            Self::Ours(scores) => scores.values().to_vec(),
            Self::Published(scores) => scores.keep_scores(),
            Self::Slopes(slopes) => slopes.keep_scores(),
        }
    }

    fn ranked(&self) -> Vec<f32> {
        match self {
            Self::Ours(scores) => scores.values().to_vec(),
            Self::Published(scores) => scores.ranked(),
            Self::Slopes(slopes) => slopes.values().iter().map(|slope| -slope).collect(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Ours(scores) => scores.values().len(),
            Self::Published(scores) => scores.removal().len(),
            Self::Slopes(slopes) => slopes.values().len(),
        }
    }

    fn is_of(&self, rule: &Rule) -> bool {
        matches!(
            (self, rule),
            (Self::Ours(_), Rule::Ours(_))
                | (Self::Published(_), Rule::Published(..))
                | (Self::Slopes(_), Rule::Slopes(..))
        )
    }
}

/// The search as a part of the training loop.
#[derive(Debug, Clone)]
pub struct Search {
    rule: Rule,
    candidates: Vec<bool>,
    keep: usize,
    savings: Vec<f32>,
    seed: u64,
    /// Sites of the network; those that belong to no block always stay.
    sites: usize,
    state: State,
}

/// All that changes from step to step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct State {
    scores: LearnedScores,
    /// Mask of the last pass.
    kept: Vec<u8>,
    /// How often a block went from kept to freed or back since the epoch began.
    changes: u64,
    /// Step and scores behind it.
    history: Vec<(u64, Vec<f32>)>,
}

impl Search {
    /// A search in `graph` for `budget` among the candidates, one flag per block. `savings` has one entry per block: what merging it saves, in units of the mean
    /// block's cost ([`relative_savings`]).
    ///
    /// # Errors
    /// A network with a block whose activations are gone already, an impossible budget, or settings out of range.
    pub fn new(
        graph: &Graph,
        rule: Rule,
        candidates: Vec<bool>,
        budget: Budget,
        savings: Vec<f32>,
        seed: u64,
    ) -> Result<Self> {
        rule.check()?;
        let blocks = graph.blocks.len();
        check_active_blocks(graph)?;
        if savings.len() != blocks || savings.iter().any(|s| !s.is_finite()) {
            let got = savings.len();
            return Err(Error::shape(
                "mask search",
                format!("{blocks} finite savings, one per block"),
                got.to_string(),
            ));
        }
        let keep = budget.kept(&candidates)?;
        let scores = LearnedScores::new(&rule, &candidates);
        let kept = Mask::top_k(&scores.ranked(), &candidates, keep).bits();
        let state = State { scores, kept, changes: 0, history: Vec::new() };
        Ok(Self { rule, candidates, keep, savings, seed, sites: graph.sites(), state })
    }

    /// The mask that the scores give now, without noise.
    pub fn mask(&self) -> Mask {
        Mask::top_k(&self.ranked(), &self.candidates, self.keep)
    }

    /// A mask without the blocks whose slope has reached the threshold, where one was given.
    pub fn beyond_threshold(&self, mask: Mask) -> Mask {
        let (LearnedScores::Slopes(slopes), Rule::Slopes(_, SlopeConfig { threshold: Some(threshold), .. }, _)) =
            (&self.state.scores, &self.rule)
        else {
            return mask;
        };
        let goes = |block: usize| self.candidates[block] && slopes.values()[block] >= *threshold;
        Mask::new(mask.kept().iter().enumerate().map(|(block, kept)| *kept && !goes(block)).collect())
    }

    /// Keep scores, one per block; the highest keep their activations. By our rule they are in [0, 1], as published they may
    /// leave it.
    pub fn scores(&self) -> Vec<f32> {
        self.state.scores.keep_scores()
    }

    /// What ranks blocks: as [`scores`](Self::scores), in an order that no rounding blurs.
    pub fn ranked(&self) -> Vec<f32> {
        self.state.scores.ranked()
    }

    /// One flag per block: whether it may be freed.
    pub fn candidates(&self) -> &[bool] {
        &self.candidates
    }

    /// Number of blocks that keep their activations.
    pub fn keep(&self) -> usize {
        self.keep
    }

    fn place(&self, at: Progress<'_>) -> SearchStep {
        SearchStep { seed: self.seed, epoch: at.epoch, step: at.step, total: at.total_steps }
    }

    /// Records of the scores over the search, as `metrics.jsonl` has them.
    pub fn records(&self, stage: &str) -> Vec<ScoreRecord> {
        let record = |(step, scores): &(u64, Vec<f32>)| ScoreRecord {
            stage: stage.to_owned(),
            step: *step,
            scores: scores.clone(),
        };
        self.state.history.iter().map(record).collect()
    }
}

impl Hook for Search {
    fn before_forward(&mut self, step: &mut TrainStep<'_>, at: Progress<'_>) -> Result<()> {
        let mask = match (&self.state.scores, &self.rule) {
            (LearnedScores::Ours(scores), Rule::Ours(config)) => {
                scores.mask(config, &self.candidates, self.keep, self.place(at))
            }
            _ => self.mask(),
        };
        let bits = mask.bits();
        self.state.changes += self.state.kept.iter().zip(&bits).filter(|(old, new)| old != new).count() as u64;
        self.state.kept = bits;
        step.collect_score_gradients(true);
        match &self.state.scores {
            LearnedScores::Slopes(slopes) => {
                let mut slopes = slopes.values().to_vec();
                slopes.resize(self.sites, 0.0);
                step.set_slopes(&slopes)
            }
            _ => step.set_slopes(&mask.over(self.sites).slopes(1.0)),
        }
    }

    fn after_step(&mut self, step: &TrainStep<'_>, at: Progress<'_>) -> Result<()> {
        if self.state.history.is_empty() {
            self.state.history.push((0, self.scores()));
        }
        let (place, mask) = (self.place(at), Mask::from_bits(&self.state.kept)?);
        let gradients = (&step.score_gradients()?[..self.candidates.len()], self.savings.as_slice());
        match (&mut self.state.scores, &self.rule) {
            (LearnedScores::Ours(scores), Rule::Ours(config)) => {
                scores.update(config, &self.candidates, &mask, gradients, place)?;
            }
            (LearnedScores::Published(scores), Rule::Published(config, train)) => {
                let lr = train.learning_rate(at.step, at.total_steps / at.epochs.max(1));
                let step = WeightStep { lr, weight_decay: train.weight_decay, clip_norm: train.clip_norm };
                scores.update(config, &self.candidates, gradients, step)?;
            }
            (LearnedScores::Slopes(slopes), Rule::Slopes(rule, config, train)) => {
                let lr = train.learning_rate(at.step, at.total_steps / at.epochs.max(1));
                let step = WeightStep { lr, weight_decay: 0.0, clip_norm: train.clip_norm };
                slopes.update((*rule, config), &self.candidates, gradients, step)?;
            }
            _ => unreachable!("scores are made, and read from checkpoints, for the rule"),
        }
        let done = at.step + 1;
        if done.is_multiple_of(at.total_steps.div_ceil(RECORDS).max(1)) || done == at.total_steps {
            self.state.history.push((done, self.scores()));
        }
        Ok(())
    }

    fn before_evaluation(&mut self, engine: &mut Engine, _: Progress<'_>) -> Result<()> {
        engine.set_slopes(&self.mask().over(self.sites).slopes(1.0))
    }

    fn epoch_record(&mut self, at: Progress<'_>) -> Option<HookRecord> {
        let last = SearchStep { step: at.step.saturating_sub(1), ..self.place(at) };
        Some(HookRecord::Search {
            exploring: matches!(&self.rule, Rule::Ours(config) if last.explores(config)),
            kept: self.mask().bits(),
            mask_changes: std::mem::take(&mut self.state.changes),
        })
    }

    fn state(&self) -> Value {
        json!(self.state)
    }

    fn restore(&mut self, state: &Value) -> Result<()> {
        let foreign =
            || Error::Config("the checkpoint holds no mask search of this network; start again with --force".into());
        let state = State::deserialize(state).map_err(|_| foreign())?;
        let blocks = self.candidates.len();
        if !state.scores.is_of(&self.rule) || state.scores.len() != blocks || state.kept.len() != blocks {
            return Err(foreign());
        }
        self.state = state;
        Ok(())
    }
}

/// What merging each block saves, from (cost before, cost after) in any unit: the difference over the mean cost before.
/// Negative where the merged convolution is the dearer one.
pub fn relative_savings(costs: &[(f64, f64)]) -> Vec<f32> {
    let mean = costs.iter().map(|(before, _)| before).sum::<f64>() / costs.len().max(1) as f64;
    costs.iter().map(|(before, after)| if mean > 0.0 { ((before - after) / mean) as f32 } else { 0.0 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::networks::{NetworkOptions, build};
    use crate::shape::Shape;

    #[test]
    fn a_state_is_read_by_its_own_rule_alone() {
        let graph = build("mobilenetv2-0.1", &NetworkOptions::new(Shape::new(32, 32, 3), 4)).unwrap();
        let train = TrainConfig::default;
        let rules = [
            Rule::Ours(ScoreConfig::default()),
            Rule::Published(PublishedConfig::default(), train()),
            Rule::Slopes(SlopeRule::Collapse, SlopeConfig::default(), train()),
        ];
        let search =
            |rule: &Rule| Search::new(&graph, rule.clone(), vec![true; 17], Budget::Keep(8), vec![0.0; 17], 3).unwrap();
        let states = rules.each_ref().map(|rule| {
            let text = search(rule).state().to_string();
            serde_json::from_str::<Value>(&text).unwrap()
        });
        for (index, rule) in rules.iter().enumerate() {
            let mut own = search(rule);
            own.restore(&states[index]).unwrap();
            assert_eq!(own.state, search(rule).state);
            for other in (0..rules.len()).filter(|other| *other != index) {
                assert!(search(rule).restore(&states[other]).is_err());
            }
        }
    }
}
