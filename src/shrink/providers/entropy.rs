//! The entropy of activations' states, after EASIER (Quétu, Liao and Tartaglione, "The Simpler The Better: An Entropy-Based
//! Importance Metric To Reduce Neural Networks' Depth", ECML-PKDD 2024). A channel is *on* for an input of 0 or more. Where its
//! share p of on-states is near 0 or 1, the activation is nearly linear:
//!
//! H = −p·log₂ p − (1 − p)·log₂(1 − p), in bits; of an activation the mean over its channels.
//!
//! Read from the authors' code: the states, p over images and pixels, the mean over channels. They train, remove the activation
//! of least entropy, and train again, one activation at a time. Decided here: entropies are taken once, of the network as it is,
//! on images of the training set that are set apart; a block has the mean of its activations; costs add up.

use super::{ActivationInputs, Asked, BlockCosts, Done, InputCounts, Provider};
use crate::Result;

/// The entropy of the on-states of a block's activations.
#[derive(Debug, Clone, Copy)]
pub struct Entropy;

impl Provider for Entropy {
    fn costs(&self, asked: &Asked<'_>, done: Done<'_>) -> Result<Option<BlockCosts>> {
        let inputs = asked.judge.activation_inputs(asked.model, done)?;
        Ok(Some(entropies(&inputs, asked.candidates)))
    }
}

/// The entropies of candidates in bits.
pub fn entropies(inputs: &ActivationInputs, candidates: &[bool]) -> BlockCosts {
    BlockCosts::of_candidates(candidates, inputs.by_site(of_activation))
}

fn of_activation(counts: &InputCounts) -> f64 {
    let of_channel = |&below: &u64| {
        let off = below as f64 / counts.values.max(1) as f64;
        term(off) + term(1.0 - off)
    };
    counts.below.iter().map(of_channel).sum::<f64>() / counts.below.len().max(1) as f64
}

/// −p·log₂ p, 0 at p = 0.
fn term(p: f64) -> f64 {
    if p > 0.0 { -p * p.log2() } else { 0.0 }
}
