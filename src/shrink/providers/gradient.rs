//! Gradient sensitivity: by how much the loss changes, to first order, when the slope q of a block's activations leaves 0,
//! |∂L/∂q| = |Σ ⟨∂L/∂y, x − φ(x)⟩|, which a training pass sums anyway (`docs/methods.md` 1.2).
//!
//! "Making Models Shallow Again" (Kundu et al., CVPR workshops 2023) removes the ReLUs of blocks that are least sensitive and
//! merges the convolutions around them. Its abstract alone could be read, so the formula is ours: the magnitude, as of other
//! sensitivities to a connection, since near q = 0 the sign says little about q = 1.

use super::{Asked, BlockCosts, Done, Judge, Provider, check_active};
use crate::Result;
use crate::model::Model;

/// The magnitude of the derivative of the loss by the slope of a block's activations.
#[derive(Debug, Clone, Copy)]
pub struct Gradient;

impl Provider for Gradient {
    fn costs(&self, asked: &Asked<'_>, done: Done<'_>) -> Result<Option<BlockCosts>> {
        let gradients = slope_gradients(asked.judge, asked.model, done)?;
        Ok(Some(BlockCosts::of_candidates(asked.candidates, |site| gradients[site].abs())))
    }
}

/// ∂L/∂q of every site at q = 0: the mean over whole batches of the images that are set apart, with the batches' statistics.
///
/// # Errors
/// A network with a block whose activations are gone, a gradient that is not finite, or as [`Judge::score_gradients`].
pub fn slope_gradients(judge: &Judge<'_>, model: &Model, done: Done<'_>) -> Result<Vec<f64>> {
    check_active(model)?;
    judge.score_gradients(model, done)
}
