//! The fused training step: convolution, batch-norm, residual and activation.
//!
//! Forward: y = conv(x, w) with each chunk's statistics taken while it is in cache, then z = φ(γ·ŷ + β + residual) in one
//! pass, or not at all where the next convolution forms z on load. Backward: one pass for the channel sums (or none,
//! where the next convolution took them), then both convolution gradients, dy formed on load and never stored.

use super::batch_norm::{
    BackwardInputs, BatchNormProblem, BatchNormState, DyLoader, GradientSums, Tail, backward_sums, finish_statistics,
    moments, normalise_with,
};
use super::conv::{ConvProblem, backward_with, forward_with};
use super::conv_input::{ConvInput, Source};
use crate::device::{View, ViewMut};

/// Forward: writes the convolution's result `y` (kept for the backward pass), the batch's statistics, and `z`, with what
/// follows the normalisation, where it is to be stored.
pub fn forward(
    (conv, bn): (&ConvProblem, &BatchNormProblem),
    (x, w): (ConvInput<'_>, View<'_>),
    mut state: BatchNormState<'_>,
    y: ViewMut<'_>,
    z: Option<(Tail<'_>, ViewMut<'_>)>,
) {
    let y = y.host();
    let statistics = forward_with(conv, &Source::new(x, conv.input.w), w.host(), y, |_, y| moments(y, bn.c));
    match z {
        Some((tail, z)) => normalise_with(bn, &statistics, y, &mut state, tail, z.host()),
        None => finish_statistics(bn, &statistics, &mut state),
    }
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

/// What the backward pass sums over the batch.
#[derive(Debug)]
pub struct Sums {
    /// The step's own score gradient ⟨dz, v − φ(v)⟩, where it was asked for.
    pub score: f64,
    /// The sums of the step before, where its value was formed on load.
    pub input: Option<GradientSums>,
}

/// Backward. `sums` are this step's, where the convolution after it took them; `score` asks for the score gradient.
pub fn backward(
    (conv, bn): (&ConvProblem, &BatchNormProblem),
    (x, w): (ConvInput<'_>, View<'_>),
    inputs: BackwardInputs<'_>,
    sums: Option<GradientSums>,
    out: Gradients<'_>,
    score: bool,
) -> Sums {
    let sums = sums.unwrap_or_else(|| backward_sums(bn, inputs, out.d_residual, score));
    let loader = DyLoader::new(bn, inputs, &sums, out.d_bn);
    let dx = out.dx.map(|(dx, accumulate)| (dx.host(), accumulate));
    let load = |range, dy: &mut [f32]| loader.load(range, dy);
    let input = backward_with(conv, &Source::new(x, conv.input.w), w.host(), load, dx, out.dw.host());
    Sums { score: sums.score, input }
}
