//! The fused training step: convolution, batch-norm, residual and activation.
//!
//! Forward: y = conv(x, w) with each chunk's statistics taken while it is in cache, then z = φ(γ·ŷ + β + residual) in one
//! pass. Backward: one pass for the channel sums, then both convolution gradients, dy formed on load and never stored.

use super::batch_norm::{
    BackwardInputs, BatchNormProblem, BatchNormState, Tail, backward_sums, moments, normalise_with,
};
use super::conv::{ConvProblem, backward_with, forward_with};
use crate::device::{View, ViewMut};

/// Forward: writes the convolution's result `y` (kept for the backward pass) and `z`.
pub fn forward(
    (conv, bn): (&ConvProblem, &BatchNormProblem),
    (x, w): (View<'_>, View<'_>),
    mut state: BatchNormState<'_>,
    tail: Tail<'_>,
    y: ViewMut<'_>,
    z: ViewMut<'_>,
) {
    let y = y.host();
    let statistics = forward_with(conv, x.host(), w.host(), y, |_, y| moments(y, bn.c));
    normalise_with(bn, &statistics, y, &mut state, tail, z.host());
}

/// Gradients that the fused backward writes.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// Gradient of x, and whether to add to what is there.
    pub dx: Option<(ViewMut<'a>, bool)>,
    /// Gradient of the residual, likewise.
    pub d_residual: Option<(ViewMut<'a>, bool)>,
    /// Gradient of the weights.
    pub dw: ViewMut<'a>,
    /// Gradients of γ and β.
    pub d_bn: [ViewMut<'a>; 2],
}

/// Backward; returns the score gradient ⟨dz, v − φ(v)⟩ where `score` asks for it.
pub fn backward(
    (conv, bn): (&ConvProblem, &BatchNormProblem),
    (x, w): (View<'_>, View<'_>),
    inputs: BackwardInputs<'_>,
    out: Gradients<'_>,
    score: bool,
) -> f64 {
    let (loader, score) = backward_sums(bn, inputs, out.d_residual, out.d_bn, score);
    let dx = out.dx.map(|(dx, accumulate)| (dx.host(), accumulate));
    backward_with(conv, x.host(), w.host(), |range, dy| loader.load(range, dy), dx, out.dw.host());
    score
}
