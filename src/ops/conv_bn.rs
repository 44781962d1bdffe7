//! The fused training step: convolution, batch-norm, residual and activation.
//!
//! Forward: y = conv(x, w) with each chunk's statistics taken while it is in cache, then z = φ(γ·ŷ + β + residual) in one
//! pass, or not at all where the next convolution forms z on load. Backward: one pass for the channel sums (or none,
//! where the next convolution took them), then both convolution gradients, dy formed on load and never stored.

use super::batch_norm::{
    BackwardInputs, BatchNormProblem, BatchNormState, DyLoader, GradientSums, Tail, backward_on_gpu, backward_sums,
    finish_statistics, forward_on_gpu, moments, normalise_with,
};
use super::conv::{ConvProblem, backward_with, forward_with, gpu_gradients};
use super::conv_input::{ConvInput, Source};
use super::cuda;
use crate::device::gpu::GpuView;
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
    if let View::Gpu(w) = w {
        let (x, y) = (stored(x), y.gpu());
        cuda::conv::forward(conv, x, w, cuda::conv::Epilogue::default(), &y);
        return forward_on_gpu(bn, y.view(), state, z);
    }
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

/// Backward. `sums` are this step's, where the convolution after it took them. Adds the score gradient ⟨dz, v − φ(v)⟩ to
/// `score` `[1]` where given. `dy` is memory for the gradient of y, which only a GPU takes: the host never stores it.
/// Returns the sums of the step before, where its value was formed on load.
pub fn backward(
    (conv, bn): (&ConvProblem, &BatchNormProblem),
    (x, w): (ConvInput<'_>, View<'_>),
    inputs: BackwardInputs<'_>,
    sums: Option<GradientSums>,
    out: Gradients<'_>,
    score: Option<ViewMut<'_>>,
    dy: Option<ViewMut<'_>>,
) -> Option<GradientSums> {
    if let View::Gpu(_) = w {
        let mut dy = dy.expect("the planner gives a GPU memory for dy");
        backward_on_gpu(bn, inputs, out.d_residual, out.d_bn, score, (dy.reborrow(), false));
        gpu_gradients(conv, stored(x), w, dy.gpu().into_view(), out.dx, out.dw);
        return None;
    }
    let sums = sums.unwrap_or_else(|| backward_sums(bn, inputs, out.d_residual, score.is_some()));
    if let Some(score) = score {
        score.host()[0] += sums.score as f32;
    }
    let loader = DyLoader::new(bn, inputs, &sums, out.d_bn);
    let dx = out.dx.map(|(dx, accumulate)| (dx.host(), accumulate));
    let load = |range, dy: &mut [f32]| loader.load(range, dy);
    backward_with(conv, &Source::new(x, conv.input.w), w.host(), load, dx, out.dw.host())
}

/// A GPU's kernels read stored values.
fn stored(x: ConvInput<'_>) -> GpuView<'_> {
    match x {
        ConvInput::Stored(x) => x.gpu(),
        ConvInput::Normalised(_) => unreachable!("the planner stores what a GPU's convolutions read"),
    }
}
