//! Importance after a few steps of training, as the two-stage dynamic programme (Kim et al., ICML 2023) and LayerMerge (ICML
//! 2024) have it: a copy of the network in which one segment is linear is trained, and its accuracy on a held-out part of the
//! training set, less that of the network as it is, is the segment's importance in percentage points.
//!
//! Read from their code: the copies, the part that is held out, no teacher, the plain difference. They train for an epoch.
//! Decided here: the segments are blocks; `search.sensitivity.steps` steps by the settings of `search.train`, on the same images
//! for every copy; batch-norm statistics are renewed before the accuracy is taken; costs add up.

use super::{Asked, BlockCosts, Done, Provider, all_but, check_active, each_candidate};
use crate::Result;
use crate::shrink::surgery::linearise;

/// The fall of the held-out accuracy that is left after a few steps of training without a block's activations.
#[derive(Debug, Clone, Copy)]
pub struct FewSteps;

impl Provider for FewSteps {
    fn costs(&self, asked: &Asked<'_>, done: Done<'_>) -> Result<Option<BlockCosts>> {
        let Asked { judge, model, candidates, linearise: surgery, train, .. } = *asked;
        check_active(model)?;
        let fall = |original: &f64, block| {
            let freed = linearise(model, &all_but(candidates.len(), block), surgery)?;
            Ok(original - judge.evaluate(&judge.trained(&freed, train)?)?.top1)
        };
        let (_, costs) = each_candidate(candidates, done, || Ok(judge.evaluate(model)?.top1), fall)?;
        Ok(Some(BlockCosts::new(costs)))
    }
}
