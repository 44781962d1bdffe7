//! A network's first layer: `dense_direct.cu`.

use super::Call;
use super::batch_norm::{GpuStatisticsOut, Moments};
use super::conv::{GpuEpilogue, Slabs, geometry};
use crate::device::gpu::{GpuView, GpuViewMut};
use crate::ops::batch_norm::BatchNormProblem;
use crate::ops::config::{DirectConfig, KernelPass};
use crate::ops::conv::ConvProblem;

/// Adds the geometry, the slab and the lanes to a call, and launches it.
fn launch(call: Call<'_>, p: &ConvProblem, config: DirectConfig, pass: KernelPass) {
    let lanes = DirectConfig::lanes(p, pass).lanes;
    call.value(geometry(p)).sizes([config.slab, lanes]).launch(config.grid(p, pass));
}

/// y = φ(conv(x, w) + bias + residual).
pub(super) fn forward(
    p: &ConvProblem,
    config: DirectConfig,
    x: GpuView<'_>,
    w: GpuView<'_>,
    epilogue: GpuEpilogue<'_>,
    y: &GpuViewMut<'_>,
) {
    let call = Call::new(x.gpu(), DirectConfig::instance("dense_direct_forward", p, x.dtype()));
    let call = call.reads("x", x, p.n * p.input.len()).reads("w", w, p.weight_len());
    let call = epilogue.onto(call, p.n * p.output.pixels(), p.output.c).writes("y", y, p.n * p.output.len());
    launch(call, p, config, KernelPass::Forward);
}

/// y = conv(x, w) with the statistics of y.
pub(super) fn forward_with_statistics(
    p: &ConvProblem,
    config: DirectConfig,
    x: GpuView<'_>,
    w: GpuView<'_>,
    y: &GpuViewMut<'_>,
    bn: &BatchNormProblem,
    out: &GpuStatisticsOut<'_>,
) {
    let (gpu, [tiles, slabs, _]) = (x.gpu(), config.grid(p, KernelPass::Forward));
    let call = Call::new(gpu, DirectConfig::instance("dense_direct_bn_forward", p, x.dtype()))
        .reads("x", x, p.n * p.input.len())
        .reads("w", w, p.weight_len())
        .writes("y", y, p.n * p.output.len());
    let call = Moments::new(gpu, [tiles, slabs], p.output.c).onto(call, bn, out, true);
    launch(call, p, config, KernelPass::Forward);
}

/// dw = the weight gradient, in `f32`.
pub(super) fn weight_gradient(
    p: &ConvProblem,
    config: DirectConfig,
    x: GpuView<'_>,
    dy: GpuView<'_>,
    dw: &GpuViewMut<'_>,
) {
    let (len, slabs) = (p.weight_len(), config.slabs(p, KernelPass::WeightGradient));
    Slabs { slabs, len, workspace: config.workspace(p) }.sum(x.gpu(), dw, |partials| {
        let call = Call::new(x.gpu(), DirectConfig::instance("dense_direct_wgrad", p, x.dtype()))
            .reads("x", x, p.n * p.input.len())
            .reads("dy", dy, p.n * p.output.len())
            .floats("the partial sums", partials, slabs * len);
        launch(call, p, config, KernelPass::WeightGradient);
    });
}
