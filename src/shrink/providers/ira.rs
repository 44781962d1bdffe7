//! Input statistics: the share of inputs that an activation changes, those below 0 and above its bound. It follows the idea of
//! "Importance Resides in Activations", whose text and code could not be read: the definition is ours, and `ira` names the idea.
//! Decided here: the share over all images, pixels and channels of an activation, on images of the training set that are set
//! apart; a block has the mean of its activations; costs add up.

use super::{ActivationInputs, Asked, BlockCosts, Done, InputCounts, Provider};
use crate::Result;

/// The share of inputs that a block's activations change.
#[derive(Debug, Clone, Copy)]
pub struct InputStatistics;

impl Provider for InputStatistics {
    fn costs(&self, asked: &Asked<'_>, done: Done<'_>) -> Result<Option<BlockCosts>> {
        let inputs = asked.judge.activation_inputs(asked.model, done)?;
        Ok(Some(clamped_shares(&inputs, asked.candidates)))
    }
}

/// The shares of candidates, in \[0, 1\].
pub fn clamped_shares(inputs: &ActivationInputs, candidates: &[bool]) -> BlockCosts {
    BlockCosts::of_candidates(candidates, inputs.by_site(of_activation))
}

fn of_activation(counts: &InputCounts) -> f64 {
    let changed: u64 = counts.below.iter().chain(&counts.above).sum();
    changed as f64 / (counts.values * counts.below.len() as u64).max(1) as f64
}
