//! `activation.cu`.

use super::{Call, configured, int, long};
use crate::device::gpu::{Gpu, GpuView, GpuViewMut, Workspace};
use crate::ops::activation::Act;
use crate::ops::config::{KernelFamily, KernelPass, WalkProblem};

/// The problem of a walk over a tensor that also sums. Its number of blocks depends on the length alone, so that sums
/// repeat bit by bit. The kernels read vectors; planned tensors are aligned to them.
pub(super) fn summing_walk(x: GpuView<'_>) -> WalkProblem {
    WalkProblem { family: KernelFamily::Activation, len: x.len(), aligned: true }
}

/// y = φ(x).
pub fn forward(act: Act<'_>, x: GpuView<'_>, y: &GpuViewMut<'_>) {
    let Some(config) = configured(&summing_walk(x), KernelPass::Forward, x) else { return };
    Call::new(x.gpu(), format!("activation_forward<{}>", x.dtype().kernel_name()))
        .reads("x", x, x.len())
        .act_at(Some(act))
        .writes("y", y, x.len())
        .value(long(x.len()))
        .launch(config.grid());
}

/// dx (+)= dy·φ'(x); adds ⟨dy, x − φ(x)⟩ to `score` where given.
pub fn backward(
    act: Act<'_>,
    x: GpuView<'_>,
    dy: GpuView<'_>,
    dx: &GpuViewMut<'_>,
    accumulate: bool,
    score: Option<&GpuViewMut<'_>>,
) {
    let Some(config) = configured(&summing_walk(x), KernelPass::Backward, x) else { return };
    let scores = score.map(|_| x.gpu().workspace(config.workspace()));
    Call::new(x.gpu(), format!("activation_backward<{}>", x.dtype().kernel_name()))
        .reads("x", x, x.len())
        .reads("dy", dy, x.len())
        .act_at(Some(act))
        .writes("dx", dx, x.len())
        .value(i32::from(accumulate))
        .floats_if("the scores", scores, config.blocks)
        .value(long(x.len()))
        .launch(config.grid());
    if let Some((score, scores)) = score.zip(scores) {
        add_scores(x.gpu(), scores, score);
    }
}

/// Adds partial sums to a score `[1]`.
pub(super) fn add_scores(gpu: &Gpu, scores: Workspace, score: &GpuViewMut<'_>) {
    Call::new(gpu, "score_finish")
        .floats("the scores", scores, scores.len())
        .writes("the score", score, 1)
        .value(int(scores.len()))
        .launch([1, 1, 1]);
}
