//! `pool.cu`.

use super::conv::geometry;
use super::{Call, configured};
use crate::device::driver::ConvGeometry;
use crate::device::gpu::{GpuView, GpuViewMut};
use crate::ops::config::{GlobalPoolProblem, KernelPass};
use crate::ops::conv::ConvProblem;
use crate::ops::pool::PoolProblem;

/// y `[n, c]` = mean over pixels of x `[n, pixels, c]`.
pub fn forward(p: GlobalPoolProblem, x: GpuView<'_>, y: &GpuViewMut<'_>) {
    let GlobalPoolProblem { n, pixels, c } = p;
    let Some(config) = configured(&p, KernelPass::Forward, x) else { return };
    Call::new(x.gpu(), config.instance("global_pool_forward", x.dtype()))
        .reads("x", x, n * pixels * c)
        .writes("y", y, n * c)
        .sizes([pixels, c, config.lanes(c, x.dtype()).lanes])
        .launch(config.global_pool_grid(&p, x.dtype()));
}

/// dx (+)= dy / pixels.
pub fn backward(p: GlobalPoolProblem, dy: GpuView<'_>, dx: &GpuViewMut<'_>, accumulate: bool) {
    let GlobalPoolProblem { n, pixels, c } = p;
    let Some(config) = configured(&p, KernelPass::Backward, dy) else { return };
    Call::new(dy.gpu(), config.instance("global_pool_backward", dy.dtype()))
        .reads("dy", dy, n * c)
        .writes("dx", dx, n * pixels * c)
        .value(i32::from(accumulate))
        .sizes([pixels, c, config.lanes(c, dy.dtype()).lanes])
        .launch(config.global_pool_grid(&p, dy.dtype()));
}

/// y `[n, h_out, w_out, c]` = the largest of each window of x `[n, h_in, w_in, c]`.
pub fn max_forward(p: &PoolProblem, x: GpuView<'_>, y: &GpuViewMut<'_>) {
    let Some(config) = configured(p, KernelPass::Forward, x) else { return };
    Call::new(x.gpu(), config.instance("max_pool_forward", x.dtype()))
        .reads("x", x, p.n * p.input.len())
        .writes("y", y, p.n * p.output.len())
        .value(window(p))
        .sizes([config.lanes(p.input.c, x.dtype()).lanes])
        .launch(config.window_pool_grid(p, p.output.pixels(), x.dtype()));
}

/// dx (+)= the gradients of the windows that a pixel won.
pub fn max_backward(p: &PoolProblem, x: GpuView<'_>, dy: GpuView<'_>, dx: &GpuViewMut<'_>, accumulate: bool) {
    let Some(config) = configured(p, KernelPass::Backward, x) else { return };
    Call::new(x.gpu(), config.instance("max_pool_backward", x.dtype()))
        .reads("x", x, p.n * p.input.len())
        .reads("dy", dy, p.n * p.output.len())
        .writes("dx", dx, p.n * p.input.len())
        .value(i32::from(accumulate))
        .value(window(p))
        .sizes([config.lanes(p.input.c, x.dtype()).lanes])
        .launch(config.window_pool_grid(p, p.input.pixels(), x.dtype()));
}

/// A pool slides as a depthwise convolution does.
pub(in crate::ops) fn window(p: &PoolProblem) -> ConvGeometry {
    geometry(&ConvProblem { n: p.n, input: p.input, output: p.output, window: p.window, groups: p.input.c })
}
