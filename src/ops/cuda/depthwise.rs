//! Depthwise convolutions: `depthwise.cu`, and between batch-norms `depthwise_bn.cu`.

use super::batch_norm::{GpuBefore, GpuGradient, GpuInput, GpuStatisticsOut, Moments};
use super::conv::{GpuEpilogue, GradientParts, Slabs, geometry};
use super::{Call, configured};
use crate::device::driver::ConvGeometry;
use crate::device::gpu::{GpuView, GpuViewMut};
use crate::ops::batch_norm::BatchNormProblem;
use crate::ops::config::{BetweenNorms, ConvConfig, DepthwiseConfig, KernelPass, Problem, specialised};
use crate::ops::conv::ConvProblem;

/// Side of the largest kernel whose operands are formed on load.
pub(super) const LARGEST_ON_LOAD: usize = 5;

fn depthwise<P: Problem<Config = ConvConfig>>(p: &P, pass: KernelPass, of: GpuView<'_>) -> Option<DepthwiseConfig> {
    match configured(p, pass, of)? {
        ConvConfig::Depthwise(config) => Some(config),
        _ => unreachable!("a problem has configurations of its own family"),
    }
}

/// The kernel size and stride that the marching kernels of a configuration are instantiated for.
fn window(p: &ConvProblem) -> (usize, usize) {
    specialised(p).expect("marching configurations are checked against the problem")
}

/// y = φ(conv(x, w) + bias + residual).
pub(super) fn forward(p: &ConvProblem, x: GpuView<'_>, w: GpuView<'_>, epilogue: GpuEpilogue<'_>, y: &GpuViewMut<'_>) {
    let Some(config) = depthwise(p, KernelPass::Forward, x) else { return };
    let launch = ForwardLaunch {
        pass: KernelPass::Forward,
        geometry: geometry(p),
        x_len: p.n * p.input.len(),
        y_pixels: p.n * p.output.pixels(),
        flipped: false,
    };
    launch_forward(p, config, launch, x, w, epilogue, y);
}

/// One use of the forward kernel. An input gradient of stride 1 uses it too, with input and output exchanged.
#[derive(Debug, Clone, Copy)]
struct ForwardLaunch {
    /// The pass that the launch belongs to.
    pass: KernelPass,
    /// The convolution as the kernel sees it.
    geometry: ConvGeometry,
    /// Elements read.
    x_len: usize,
    /// Pixels written.
    y_pixels: usize,
    /// Whether the filter is rotated by 180°.
    flipped: bool,
}

fn launch_forward(
    p: &ConvProblem,
    config: DepthwiseConfig,
    launch: ForwardLaunch,
    x: GpuView<'_>,
    w: GpuView<'_>,
    epilogue: GpuEpilogue<'_>,
    y: &GpuViewMut<'_>,
) {
    let (t, c) = (x.dtype().kernel_name(), p.output.c);
    let instance = match config.march {
        Some(_) => {
            let (k, stride) = window(p);
            format!("depthwise_forward<{t}, {k}, {stride}>")
        }
        None => format!("depthwise_forward_any<{t}>"),
    };
    let call = Call::new(x.gpu(), instance).reads("x", x, launch.x_len).reads("w", w, p.weight_len());
    let call = epilogue.onto(call, launch.y_pixels, c).writes("y", y, launch.y_pixels * c).value(launch.geometry);
    let lanes = config.lanes(p).lanes;
    match config.march {
        Some(rows) => call.sizes([rows, lanes]).value(i32::from(launch.flipped)),
        None => call.sizes([lanes]),
    }
    .launch(config.grid(p, launch.pass));
}

/// dx (+)= the input gradient.
pub(super) fn input_gradient(p: &ConvProblem, dy: GpuView<'_>, w: GpuView<'_>, dx: &GpuViewMut<'_>, accumulate: bool) {
    let Some(config) = depthwise(p, KernelPass::InputGradient, dy) else { return };
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
            let launch = ForwardLaunch {
                pass: KernelPass::InputGradient,
                geometry: g,
                x_len: p.n * p.output.len(),
                y_pixels: p.n * p.input.pixels(),
                flipped: true,
            };
            let epilogue = GpuEpilogue { residual: accumulate.then(|| dx.view()), ..GpuEpilogue::default() };
            return launch_forward(p, config, launch, dy, w, epilogue, dx);
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
    marching(call, p, config).launch(config.grid(p, KernelPass::InputGradient));
}

/// dw = the weight gradient, in `f32`.
pub(super) fn weight_gradient(p: &ConvProblem, x: GpuView<'_>, dy: GpuView<'_>, dw: &GpuViewMut<'_>) {
    let Some(config) = depthwise(p, KernelPass::WeightGradient, x) else { return };
    let t = x.dtype().kernel_name();
    let slabs = Slabs {
        slabs: config.slabs(p, KernelPass::WeightGradient),
        len: p.weight_len(),
        workspace: config.workspace(p, KernelPass::WeightGradient),
    };
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
        marching(call, p, config).launch(config.grid(p, KernelPass::WeightGradient));
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

/// The configuration of a kernel that forms operands on load, with its name's end.
fn on_load(p: &ConvProblem, pass: KernelPass, of: GpuView<'_>) -> Option<(DepthwiseConfig, String)> {
    let config = depthwise(&BetweenNorms(*p), pass, of)?;
    let (k, stride) = window(p);
    Some((config, format!("<{}, {k}, {stride}>", of.dtype().kernel_name())))
}

/// y = conv(x, w) with the statistics of y.
pub(super) fn forward_with_statistics(
    p: &ConvProblem,
    x: GpuInput<'_>,
    w: GpuView<'_>,
    y: &GpuViewMut<'_>,
    bn: &BatchNormProblem,
    out: &GpuStatisticsOut<'_>,
) {
    let (gpu, c) = (w.gpu(), p.output.c);
    let Some((config, instance)) = on_load(p, KernelPass::Forward, x.stored()) else { return };
    let grid = config.grid(p, KernelPass::Forward);
    let tiles = config.lanes(p).tiles;
    let call = x.onto(Call::new(gpu, format!("depthwise_bn_forward{instance}")), p.n * p.input.len(), c);
    let call = call.reads("w", w, p.weight_len()).writes("y", y, p.n * p.output.len());
    let call = Moments::new(gpu, [tiles, grid[0] / tiles], c).onto(call, bn, out, true).value(geometry(p));
    marching(call, p, config).launch(grid);
}

/// Both gradients of one walk over dy, where x and dy may be formed on load and the batch-norm in front may want its sums.
pub(super) fn backward_on_load(
    p: &ConvProblem,
    x: GpuInput<'_>,
    w: GpuView<'_>,
    dy: GpuGradient<'_>,
    dx: Option<(&GpuViewMut<'_>, bool)>,
    dw: &GpuViewMut<'_>,
    before: Option<GpuBefore<'_>>,
) {
    let (gpu, c) = (w.gpu(), p.input.c);
    let Some((config, instance)) = on_load(p, KernelPass::Backward, x.stored()) else { return };
    let grid @ [tiles, slabs, _] = config.grid(p, KernelPass::Backward);
    let workspace = config.workspace(p, KernelPass::Backward);
    let parts = GradientParts::new(gpu, p.weight_len(), [tiles, slabs], workspace, before.as_ref());
    parts.sum(gpu, dw, before, |partials, before, sums| {
        let call = x.onto(Call::new(gpu, format!("depthwise_bn_backward{instance}")), p.n * p.input.len(), c);
        let call = dy
            .onto(call, p.n * p.output.len(), c)
            .reads("w", w, p.weight_len())
            .writes_if("dx", dx.map(|(dx, _)| dx), p.n * p.input.len())
            .value(i32::from(dx.is_some_and(|(_, accumulate)| accumulate)));
        let call = GpuBefore::sums_onto(before, call, sums)
            .floats("the partial sums", partials, slabs * p.weight_len())
            .sizes([config.slab.expect("a weight gradient has slabs")])
            .value(geometry(p));
        marching(call, p, config).launch(grid);
    });
}
