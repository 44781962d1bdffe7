//! The rule that looks at no image: blocks with a residual go first, of these the ones that save most; then the others.

use super::{Asked, BlockCosts, Done, Provider};
use crate::Result;
use crate::shrink::select::{BlockOptions, Solution};

/// Blocks with a residual are freed first, those that save most before others (ours).
#[derive(Debug, Clone, Copy)]
pub struct NoResidual;

impl Provider for NoResidual {
    fn costs(&self, asked: &Asked<'_>, done: Done<'_>) -> Result<Option<BlockCosts>> {
        done(1, 1);
        let ranks = asked.options.residual_ranks().into_iter();
        let cost = |(rank, &candidate): (f64, &bool)| candidate.then_some(rank);
        Ok(Some(BlockCosts::new(ranks.zip(asked.candidates).map(cost).collect())))
    }

    fn is_measured(&self) -> bool {
        false
    }

    fn within(&self, options: &BlockOptions<'_>, budget_ms: f64, _: u64) -> Result<Solution> {
        options.no_residual(budget_ms)
    }
}
