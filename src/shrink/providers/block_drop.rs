//! Bypassed blocks: a freed block is replaced by its shortcut, so that nothing of it is left to compute, and nothing to merge. Only
//! blocks with a shortcut from input to output can be.
//!
//! [`RemoveBlock`] is the baseline of layer pruning that DepthShrinker's code has as an option, `REMOVE_BLOCK`: there the blocks of
//! its mask are replaced by the identity, or by a random 1×1 convolution where the shape changes. Decided here: which blocks go is
//! said by the rise of the held-out loss when each alone is bypassed, batch-norm statistics renewed, and an exact knapsack;
//! blocks that change the shape stay.
//!
//! [`BlockDrop`] is Progressive Block Drop (Chen et al., arXiv 2503.16916): again and again the block of least impact on a part of
//! the training images is dropped, and the network is aligned with the one that it was, by logits and features. Read from the
//! paper: that, in this order. Decided here: impact is the held-out loss with renewed statistics; between two drops a copy is trained for
//! `search.sensitivity.steps` steps by `search.train`, with the teacher of `finetune.distill`, where the paper tunes weights of low
//! rank; its features, if they are asked for, are the outputs of the blocks that are left; finetuning starts from the original all the
//! same, as for every method here; the order is taken to its end once, so that a budget is a part of it.

use super::{Asked, BlockCosts, Done, Judge, Provider, check_active, each_candidate};
use crate::Result;
use crate::model::Model;
use crate::shrink::select::{BlockOptions, Solution};
use crate::shrink::surgery::bypass;
use crate::train::Evaluation;

/// The rise of the held-out loss when a block alone is bypassed.
#[derive(Debug, Clone, Copy)]
pub struct RemoveBlock;

impl Provider for RemoveBlock {
    fn costs(&self, asked: &Asked<'_>, done: Done<'_>) -> Result<Option<BlockCosts>> {
        let Asked { judge, model, candidates, .. } = *asked;
        check_active(model)?;
        let rise = |original: &f64, block| Ok(without(judge, model, block)?.loss - original);
        let (_, costs) = each_candidate(candidates, done, || Ok(judge.evaluate(model)?.loss), rise)?;
        Ok(Some(BlockCosts::new(costs)))
    }

    fn is_measured(&self) -> bool {
        // Tables of importances are of blocks that merge.
        false
    }

    fn bypasses(&self) -> bool {
        true
    }
}

/// The place in the order in which blocks are dropped, each the least missed of those that are left.
#[derive(Debug, Clone, Copy)]
pub struct BlockDrop;

impl Provider for BlockDrop {
    fn costs(&self, asked: &Asked<'_>, done: Done<'_>) -> Result<Option<BlockCosts>> {
        let Asked { judge, model, candidates, .. } = *asked;
        check_active(model)?;
        let mut left: Vec<usize> = (0..candidates.len()).filter(|&block| candidates[block]).collect();
        let total = left.len() * (left.len() + 1) / 2;
        let (mut costs, mut judged, mut network) = (vec![None; candidates.len()], 0, model.clone());
        done(0, total);
        while !left.is_empty() {
            let mut least: Option<(usize, f64)> = None;
            for (place, &block) in left.iter().enumerate() {
                let loss = without(judge, &network, block)?.loss;
                // Of equal ones the shallower block goes.
                if least.is_none_or(|(_, least)| loss < least) {
                    least = Some((place, loss));
                }
                judged += 1;
                done(judged, total);
            }
            let block = left.remove(least.expect("a block is left").0);
            costs[block] = Some((candidates.iter().filter(|candidate| **candidate).count() - left.len()) as f64);
            network = bypass(&network, &kept_without(&network, block))?;
            if left.len() > 1 {
                network = judge.aligned(&network, model, asked.train, asked.distill)?;
            }
        }
        Ok(Some(BlockCosts::new(costs)))
    }

    fn is_measured(&self) -> bool {
        false
    }

    fn bypasses(&self) -> bool {
        true
    }

    fn within(&self, options: &BlockOptions<'_>, budget_ms: f64, _: u64) -> Result<Solution> {
        options.top_k(0.0, budget_ms)
    }
}

/// The blocks that are left of a network when another goes.
fn kept_without(model: &Model, gone: usize) -> Vec<bool> {
    model.graph.blocks.iter().enumerate().map(|(block, of)| !of.nodes.is_empty() && block != gone).collect()
}

/// What a network does without another of its blocks.
fn without(judge: &Judge<'_>, model: &Model, gone: usize) -> Result<Evaluation> {
    judge.evaluate(&bypass(model, &kept_without(model, gone))?)
}
