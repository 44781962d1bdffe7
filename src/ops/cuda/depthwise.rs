//! Depthwise convolutions: `depthwise.cu`.

use super::conv::{GpuEpilogue, Slabs, geometry};
use super::{Call, configured};
use crate::device::driver::ConvGeometry;
use crate::device::gpu::{GpuView, GpuViewMut};
use crate::ops::config::{ConvConfig, DepthwiseConfig, Pass, specialised};
use crate::ops::conv::ConvProblem;

fn depthwise(p: &ConvProblem, pass: Pass, of: GpuView<'_>) -> Option<DepthwiseConfig> {
    match configured(p, pass, of)? {
        ConvConfig::Depthwise(config) => Some(config),
        ConvConfig::Gemm(_) => unreachable!("a problem has configurations of its own family"),
    }
}

/// The kernel size and stride that the marching kernels of a configuration are instantiated for.
fn window(p: &ConvProblem) -> (usize, usize) {
    specialised(p).expect("marching configurations are checked against the problem")
}

/// y = φ(conv(x, w) + bias + residual).
pub(super) fn forward(p: &ConvProblem, x: GpuView<'_>, w: GpuView<'_>, epilogue: GpuEpilogue<'_>, y: &GpuViewMut<'_>) {
    let Some(config) = depthwise(p, Pass::Forward, x) else { return };
    let sizes = Sizes { x: p.n * p.input.len(), y: p.n * p.output.pixels(), flipped: false };
    launch_forward(p, config, (geometry(p), sizes), (x, w), epilogue, y, Pass::Forward);
}

/// What the forward kernel reads and writes, which in an input gradient is not the problem's own input and output.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Elements read.
    x: usize,
    /// Pixels written.
    y: usize,
    /// Whether the filter is turned.
    flipped: bool,
}

fn launch_forward(
    p: &ConvProblem,
    config: DepthwiseConfig,
    (geometry, sizes): (ConvGeometry, Sizes),
    (x, w): (GpuView<'_>, GpuView<'_>),
    epilogue: GpuEpilogue<'_>,
    y: &GpuViewMut<'_>,
    pass: Pass,
) {
    let (t, c) = (x.dtype().kernel_name(), p.output.c);
    let instance = match config.march {
        Some(_) => {
            let (k, stride) = window(p);
            format!("depthwise_forward<{t}, {k}, {stride}>")
        }
        None => format!("depthwise_forward_any<{t}>"),
    };
    let call = Call::new(x.gpu(), instance).reads("x", x, sizes.x).reads("w", w, p.weight_len());
    let call = epilogue.onto(call, sizes.y, c).writes("y", y, sizes.y * c).value(geometry);
    let lanes = config.lanes(p).lanes;
    match config.march {
        Some(rows) => call.sizes([rows, lanes]).value(i32::from(sizes.flipped)),
        None => call.sizes([lanes]),
    }
    .launch(config.grid(p, pass));
}

/// dx (+)= the input gradient.
pub(super) fn input_gradient(p: &ConvProblem, dy: GpuView<'_>, w: GpuView<'_>, dx: &GpuViewMut<'_>, accumulate: bool) {
    let Some(config) = depthwise(p, Pass::InputGradient, dy) else { return };
    let t = dy.dtype().kernel_name();
    let instance = match config.march.map(|_| window(p)) {
        Some((k, 1)) => {
            // The same convolution with the flipped filter.
            let g = geometry(p);
            let g = ConvGeometry {
                h_in: g.h_out,
                w_in: g.w_out,
                h_out: g.h_in,
                w_out: g.w_in,
                pad_top: k as i32 - 1 - g.pad_top,
                pad_left: k as i32 - 1 - g.pad_left,
                ..g
            };
            let sizes = Sizes { x: p.n * p.output.len(), y: p.n * p.input.pixels(), flipped: true };
            let epilogue = GpuEpilogue { residual: accumulate.then(|| dx.view()), ..GpuEpilogue::default() };
            return launch_forward(p, config, (g, sizes), (dy, w), epilogue, dx, Pass::InputGradient);
        }
        Some((k, _)) => format!("depthwise_dgrad<{t}, {k}>"),
        None => format!("depthwise_dgrad_any<{t}>"),
    };
    let call = Call::new(dy.gpu(), instance)
        .reads("dy", dy, p.n * p.output.len())
        .reads("w", w, p.weight_len())
        .writes("dx", dx, p.n * p.input.len())
        .value(i32::from(accumulate))
        .value(geometry(p));
    marching(call, p, config).launch(config.grid(p, Pass::InputGradient));
}

/// dw = the weight gradient, in `f32`.
pub(super) fn weight_gradient(p: &ConvProblem, x: GpuView<'_>, dy: GpuView<'_>, dw: &GpuViewMut<'_>) {
    let Some(config) = depthwise(p, Pass::WeightGradient, x) else { return };
    let t = x.dtype().kernel_name();
    let slabs = Slabs { slabs: config.slabs(p), len: p.weight_len(), workspace: config.workspace(p) };
    slabs.sum(x.gpu(), dw, |partials| {
        let instance = match config.march.map(|_| window(p)) {
            Some((k, stride)) => format!("depthwise_wgrad<{t}, {k}, {stride}>"),
            None => format!("depthwise_wgrad_any<{t}>"),
        };
        let call = Call::new(x.gpu(), instance)
            .reads("x", x, p.n * p.input.len())
            .reads("dy", dy, p.n * p.output.len())
            .floats("the partial sums", partials, slabs.slabs * slabs.len)
            .sizes([config.slab.expect("a weight gradient has slabs")])
            .value(geometry(p));
        marching(call, p, config).launch(config.grid(p, Pass::WeightGradient));
    });
}

/// How far a thread marches, where it does, and the lanes.
fn marching<'a>(call: Call<'a>, p: &ConvProblem, config: DepthwiseConfig) -> Call<'a> {
    let call = match config.march {
        Some(rows) => call.sizes([rows]),
        None => call,
    };
    call.sizes([config.lanes(p).lanes])
}
