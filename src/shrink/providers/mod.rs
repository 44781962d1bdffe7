//! Score providers: what freeing each block alone is reckoned to cost, found without training, and which blocks go by it
//! (`docs/methods.md` 1.8).
//!
//! | file | holds |
//! |--|--|
//! | `judge` | [`Judge`]: images of the training set that are set apart, and what networks do on them |
//! | `sensitivity` | [`Sensitivities`]: the rise of the loss (ours) |
//! | `gradient` | [`slope_gradients`]: the derivative of the loss by the slope (after Making Models Shallow Again) |
//! | `inputs` | [`ActivationInputs`]: how often an activation's input lies where, channel by channel |
//! | `entropy` | [`entropies`]: how undecided an activation is (EASIER) |
//! | `ira` | [`clamped_shares`]: how often an activation changes its input (IRA-like) |
//! | `few_steps` | [`FewSteps`]: the accuracy after a few steps of training (two-stage DP, LayerMerge) |
//! | `consensus` | [`Consensus`]: ranks by how much the classifier's features change (Layer Pruning with Consensus) |
//! | `nn_mass` | [`NnMass`]: a measure of the graph alone (Restructurable Activation Networks) |
//! | `block_drop` | [`RemoveBlock`], [`BlockDrop`]: blocks that are bypassed (REMOVE_BLOCK, Progressive Block Drop) |
//! | `no_residual` | a rule that looks at the graph and at times alone (ours) |
//! | `segments` | [`LayerSearch`]: importances of segments over and within blocks (two-stage DP, LayerMerge) |
//! | `random` | random masks, which others have to beat (ours) |
//!
//! A provider is one file with a type that is a [`Provider`], a name of [`SearchMethod`](super::SearchMethod), and a row of the
//! table in `tests/select/providers.rs`.

mod block_drop;
mod consensus;
mod entropy;
mod few_steps;
mod gradient;
mod inputs;
mod ira;
mod judge;
mod nn_mass;
mod no_residual;
mod random;
mod segments;
mod sensitivity;

use std::path::Path;

pub use block_drop::{BlockDrop, RemoveBlock};
pub use consensus::{Consensus, Features, Measures, rank_sums};
pub use entropy::{Entropy, entropies};
pub use few_steps::FewSteps;
pub use gradient::{Gradient, slope_gradients};
pub use inputs::{ActivationInputs, InputCounts};
pub use ira::{InputStatistics, clamped_shares};
pub use judge::{Judge, SensitivityConfig};
pub use nn_mass::NnMass;
pub use no_residual::NoResidual;
pub use random::RandomMasks;
pub(crate) use random::TOLERANCE;
pub use segments::{LayerMethod, LayerSearch, SegmentConfig, SegmentTrial};
pub use sensitivity::{Sensitivities, Sensitivity};

use super::finetune::DistillConfig;
use super::importance::{Importance, ImportanceRow};
use super::mask::Mask;
use super::select::{BlockOptions, Solution};
use super::surgery::Linearise;
use crate::graph::{BlockId, BlockState, Graph, Positions, SiteId};
use crate::model::Model;
use crate::train::TrainConfig;
use crate::{Error, Result};

/// What a provider may ask.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Judges networks on images that are set apart.
    pub judge: &'a Judge<'a>,
    /// The network, of which every block has its activations.
    pub model: &'a Model,
    /// One flag per block: whether it may be freed.
    pub candidates: &'a [bool],
    /// How freed blocks are prepared.
    pub linearise: &'a Linearise,
    /// The blocks with the times of both states, without importances.
    pub options: &'a BlockOptions<'a>,
    /// How networks are trained for a few steps, where they are.
    pub train: &'a TrainConfig,
    /// What the network as it was teaches those, where it does.
    pub distill: &'a DistillConfig,
}

/// Called with how many passes of how many are done.
pub type Done<'a> = &'a mut dyn FnMut(usize, usize);

/// A way to choose blocks by a cost of each, found without training a network that is kept.
pub trait Provider: Sync {
    /// What freeing each block is reckoned to cost; `None` from a way that ranks no blocks.
    ///
    /// # Errors
    /// Images that do not fit the network, a failing device, or [`Error::Interrupted`].
    fn costs(&self, asked: &Asked<'_>, done: Done<'_>) -> Result<Option<BlockCosts>>;

    /// Whether the costs are measured, so that they are of use to other solvers; else they only give an order.
    fn is_measured(&self) -> bool {
        true
    }

    /// Whether what it frees is bypassed ([`Selection::bypass`](super::Selection::bypass)) rather than made linear and merged.
    fn bypasses(&self) -> bool {
        false
    }

    /// The mask within a budget of milliseconds. The options have the costs, with the other sign, as importances.
    ///
    /// # Errors
    /// A budget that cannot be kept.
    fn within(&self, options: &BlockOptions<'_>, budget_ms: f64, seed: u64) -> Result<Solution> {
        let _ = seed;
        options.knapsack(budget_ms)
    }

    /// The mask that keeps so many blocks. `scores` are those of [`BlockCosts::scores`].
    fn of_size(&self, scores: &[f32], candidates: &[bool], keep: usize, seed: u64) -> Mask {
        let _ = seed;
        Mask::top_k(scores, candidates, keep)
    }
}

/// What freeing each block alone is reckoned to cost, in any unit in which costs add up; `None` for blocks that stay.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockCosts(Vec<Option<f64>>);

impl BlockCosts {
    /// From one cost per block.
    pub fn new(costs: Vec<Option<f64>>) -> Self {
        Self(costs)
    }

    /// The costs of `candidates`, from those of all sites.
    fn of_candidates(candidates: &[bool], of: impl Fn(SiteId) -> f64) -> Self {
        let cost = |(block, &candidate): (BlockId, &bool)| candidate.then(|| of(block.site()));
        Self(BlockId::enumerate(candidates).map(cost).collect())
    }

    /// One cost per block.
    pub fn costs(&self) -> &[Option<f64>] {
        &self.0
    }

    /// Keep scores in \[0, 1\]: the costs over the largest, 1 for blocks that stay.
    pub fn scores(&self) -> Vec<f32> {
        let largest = self.0.iter().flatten().copied().fold(f64::MIN_POSITIVE, f64::max);
        let score = |cost: &Option<f64>| cost.map_or(1.0, |cost| (cost / largest).clamp(0.0, 1.0) as f32);
        self.0.iter().map(score).collect()
    }

    /// The costs, with the other sign, as a table that solvers take: a row for each candidate. `path` is what messages
    /// name.
    ///
    /// # Errors
    /// A cost that is not finite.
    pub fn importance(&self, path: &Path, positions: &Positions) -> Result<Importance> {
        let row = |(block, cost): (usize, &Option<f64>)| {
            cost.map(|cost| ImportanceRow::new(positions.blocks()[block].at, -cost))
        };
        Importance::new(path, self.0.iter().enumerate().filter_map(row).collect())
    }
}

/// What is found of the network as it is, by `whole`, and then beside that of each candidate alone.
pub(super) fn each_candidate<W, T>(
    candidates: &[bool],
    done: Done<'_>,
    whole: impl FnOnce() -> Result<W>,
    mut alone: impl FnMut(&W, usize) -> Result<T>,
) -> Result<(W, Vec<Option<T>>)> {
    let (total, mut passes) = (1 + candidates.iter().filter(|candidate| **candidate).count(), 1);
    done(0, total);
    let whole = whole()?;
    done(passes, total);
    let mut found = Vec::with_capacity(candidates.len());
    for (block, &candidate) in candidates.iter().enumerate() {
        if !candidate {
            found.push(None);
            continue;
        }
        found.push(Some(alone(&whole, block)?));
        passes += 1;
        done(passes, total);
    }
    Ok((whole, found))
}

/// All of so many blocks but one.
pub(super) fn all_but(blocks: usize, block: usize) -> Vec<bool> {
    (0..blocks).map(|other| other != block).collect()
}

/// Refuses a network with a block whose activations are gone already.
///
/// # Errors
/// Names the block.
pub(super) fn check_active(model: &Model) -> Result<()> {
    check_active_blocks(&model.graph)
}

/// Refuses a network with a block whose activations are gone already.
///
/// # Errors
/// Names the block.
pub fn check_active_blocks(graph: &Graph) -> Result<()> {
    match BlockId::all(graph.blocks.len()).find(|&block| graph.state(block) != BlockState::Active) {
        None => Ok(()),
        Some(block) => {
            let name = &graph.blocks[block].name;
            Err(Error::Config(format!("block {name} has lost its activations; search in the original model")))
        }
    }
}
