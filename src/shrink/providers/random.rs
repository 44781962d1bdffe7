//! Random masks: of nearly the whole time that a budget allows, or of its number of blocks. What others have to beat.

use super::{Asked, BlockCosts, Done, Provider};
use crate::Result;
use crate::shrink::mask::Mask;
use crate::shrink::random_masks::random_mask;
use crate::shrink::select::{BlockOptions, Solution};

/// How much less than the budget a random mask may take, as a share of it.
pub(crate) const TOLERANCE: f64 = 0.05;

/// A random mask; which one follows from the seed.
#[derive(Debug, Clone, Copy)]
pub struct RandomMasks;

impl Provider for RandomMasks {
    fn costs(&self, _: &Asked<'_>, done: Done<'_>) -> Result<Option<BlockCosts>> {
        done(1, 1);
        Ok(None)
    }

    fn within(&self, options: &BlockOptions<'_>, budget_ms: f64, seed: u64) -> Result<Solution> {
        Ok(options.random(budget_ms, TOLERANCE, seed, 1)?.remove(0))
    }

    fn of_size(&self, _: &[f32], candidates: &[bool], keep: usize, seed: u64) -> Mask {
        random_mask(candidates, keep, seed, 0)
    }
}
