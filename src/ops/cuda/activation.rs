//! `activation.cu`.

use super::{grid, int, long, vector_len};
use crate::device::gpu::{Gpu, GpuView, GpuViewMut};
use crate::dtype::Dtype;
use crate::ops::activation::Act;

/// Blocks that walk `n` elements and sum on the way: a number that depends on `n` alone.
pub(super) fn walking_blocks(dtype: Dtype, n: usize) -> usize {
    n.div_ceil(4 * 256 * vector_len(dtype)).clamp(1, 1024)
}

/// y = φ(x).
pub fn forward(act: Act<'_>, x: GpuView<'_>, y: &GpuViewMut<'_>) {
    let (t, n) = (x.dtype(), x.len());
    let [limit, slope, slope_at] = act.arguments();
    let arguments = [x.into(), limit, slope, slope_at, y.into(), long(n).into()];
    let name = format!("activation_forward<{}>", t.kernel_name());
    // SAFETY: arguments as the kernel's header says; x and y have one length.
    unsafe { x.gpu().launch(&name, grid(walking_blocks(t, n), 1, 1), &arguments) }
}

/// dx (+)= dy·φ'(x); adds ⟨dy, x − φ(x)⟩ to `score` where given.
pub fn backward(
    act: Act<'_>,
    (x, dy): (GpuView<'_>, GpuView<'_>),
    (dx, accumulate): (&GpuViewMut<'_>, bool),
    score: Option<&GpuViewMut<'_>>,
) {
    let (t, n) = (x.dtype(), x.len());
    let count = walking_blocks(t, n);
    let scores = score.map_or(0, |_| x.gpu().workspace(count));
    let name = format!("activation_backward<{}>", t.kernel_name());
    let flag = i32::from(accumulate).into();
    let [limit, slope, slope_at] = act.arguments();
    let arguments = [x.into(), dy.into(), limit, slope, slope_at, dx.into(), flag, scores.into(), long(n).into()];
    // SAFETY: arguments as the kernel's header says; all tensors have one length, the workspace a float per block.
    unsafe { x.gpu().launch(&name, grid(count, 1, 1), &arguments) }
    if let Some(score) = score {
        add_scores(x.gpu(), scores, count, score);
    }
}

/// Adds partial sums to a score.
pub(super) fn add_scores(gpu: &Gpu, scores: u64, count: usize, score: &GpuViewMut<'_>) {
    // SAFETY: `scores` holds `count` floats, `score` one.
    unsafe { gpu.launch("score_finish", grid(1, 1, 1), &[scores.into(), score.into(), int(count).into()]) }
}
