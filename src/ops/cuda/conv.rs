//! Convolutions and fully connected layers: `pointwise.cu`, `dense.cu`, `conv_reduce.cu`.

use super::batch_norm::{
    GpuBefore, GpuGradient, GpuInput, GpuStatisticsOut, Moments, PartialGradientSums, PartialWeights,
};
use super::{Call, Floats, configured, dense_direct, depthwise, int, long};
use crate::device::driver::ConvGeometry;
use crate::device::gpu::{Gpu, GpuView, GpuViewMut, Workspace};
use crate::dtype::Dtype;
use crate::ops::activation::Act;
use crate::ops::batch_norm::BatchNormProblem;
use crate::ops::config::{
    BetweenNorms, BiasProblem, ConvConfig, GemmProblem, KernelPass, has_few_weights, specialised,
};
use crate::ops::conv::{ConvFamily, ConvProblem};
use crate::ops::epilogue::{BiasOperand, Epilogue};
use crate::ops::linear::LinearProblem;

/// What a forward pass adds and applies to its sums before it writes them.
pub type GpuEpilogue<'a> = Epilogue<GpuView<'a>, Act<'a>>;

impl GpuEpilogue<'_> {
    /// Adds the arguments of a result `[pixels, c]` to a call. The activation's slope is a number: masked activations follow
    /// a batch-norm wherever theirs changes between passes.
    pub(super) fn onto<'a>(&self, call: Call<'a>, pixels: usize, c: usize) -> Call<'a> {
        let (bias, bias_pixels) = match self.bias {
            BiasOperand::None => (None, 1),
            BiasOperand::Channel(bias) => (Some(bias), 1),
            BiasOperand::Map(bias) => (Some(bias), bias.len() / c),
        };
        call.reads_if("the bias", bias, bias_pixels * c)
            .sizes([bias_pixels])
            .reads_if("the residual", self.residual, pixels * c)
            .act(self.act)
    }
}

/// y = φ(conv(x, w) + bias + residual).
pub fn forward(p: &ConvProblem, x: GpuView<'_>, w: GpuView<'_>, epilogue: GpuEpilogue<'_>, y: &GpuViewMut<'_>) {
    if p.family() == ConvFamily::Depthwise {
        return depthwise::forward(p, x, w, epilogue, y);
    }
    let (of, pixels) = (GemmProblem::of(p), p.n * p.output.pixels());
    if p.family() == ConvFamily::Pointwise {
        return product_forward(per_pixel(p), x, w, epilogue, y);
    }
    let config = match configured(p, KernelPass::Forward, x) {
        Some(ConvConfig::Direct(config)) => return dense_direct::forward(p, config, x, w, epilogue, y),
        Some(ConvConfig::Gemm(config)) => config,
        _ => return,
    };
    let call = Call::new(x.gpu(), config.instance("dense_forward", x.dtype()))
        .reads("x", x, p.n * p.input.len())
        .reads("w", w, of.weights());
    let call = epilogue.onto(call, pixels, p.output.c).writes("y", y, p.n * p.output.len());
    call.value(geometry(p)).launch_of(config.threads(), config.grid(&of, KernelPass::Forward));
}

/// Whether there are kernels that form this convolution's operands on load: pointwise ones, and the depthwise ones of the
/// usual sizes.
pub fn forms_on_load(p: &ConvProblem) -> bool {
    match p.family() {
        ConvFamily::Pointwise => true,
        ConvFamily::Depthwise => specialised(p).is_some_and(|(k, _)| k <= depthwise::LARGEST_ON_LOAD),
        ConvFamily::Dense => false,
    }
}

/// y = conv(x, w) with the statistics of y.
pub fn forward_with_statistics(
    p: &ConvProblem,
    x: GpuInput<'_>,
    w: GpuView<'_>,
    y: &GpuViewMut<'_>,
    bn: &BatchNormProblem,
    out: &GpuStatisticsOut<'_>,
) {
    if p.family() == ConvFamily::Depthwise {
        return depthwise::forward_with_statistics(p, x, w, y, bn, out);
    }
    let (of, stored, pixels) = (GemmProblem::of(p), x.stored(), p.n * p.output.pixels());
    let config = match configured(&BetweenNorms(*p), KernelPass::Forward, stored) {
        Some(ConvConfig::Direct(config)) => {
            return dense_direct::forward_with_statistics(p, config, stored, w, y, bn, out);
        }
        Some(ConvConfig::Gemm(config)) => config,
        _ => return,
    };
    let (gpu, slabs, len) = (stored.gpu(), config.row_tiles(&of, KernelPass::Forward), p.n * p.input.len());
    let grid @ [blocks, ..] = config.grid(&of, KernelPass::Forward);
    let moments = Moments::new(gpu, [blocks / slabs.max(1) * p.groups, slabs], p.output.c);
    let is_pointwise = p.family() == ConvFamily::Pointwise;
    let call = match x {
        _ if is_pointwise => {
            x.onto(Call::new(gpu, config.instance("pointwise_bn_forward", stored.dtype())), len, p.input.c)
        }
        GpuInput::Stored(x) => Call::new(gpu, config.instance("dense_bn_forward", stored.dtype())).reads("x", x, len),
        GpuInput::Normalised(_) => panic!("dense kernels form nothing on load; no rule plans it"),
    };
    let call = call.reads("w", w, of.weights()).writes("y", y, pixels * p.output.c);
    let call = moments.onto(call, bn, out, false);
    let call = if is_pointwise { call.sizes([pixels, p.input.c, p.output.c]) } else { call.value(geometry(p)) };
    call.launch_of(config.threads(), grid);
}

/// dx (+)= the input gradient, where dy may be formed on load and the batch-norm in front may want its sums.
pub fn input_gradient_on_load(
    p: &ConvProblem,
    dy: GpuGradient<'_>,
    w: GpuView<'_>,
    dx: &GpuViewMut<'_>,
    accumulate: bool,
    before: Option<GpuBefore<'_>>,
) {
    if let (GpuGradient::Stored(dy), None) = (dy, &before) {
        return input_gradient(p, dy, w, dx, accumulate);
    }
    assert!(p.family() == ConvFamily::Pointwise, "no other kernels have one gradient on load; no rule plans it");
    let (of, stored, pixels) =
        (GemmProblem { on_load: true, ..GemmProblem::of(p) }, dy.stored(), p.n * p.input.pixels());
    let Some(config) = configured(&of, KernelPass::InputGradient, stored) else { return };
    let grid @ [blocks, ..] = config.grid(&of, KernelPass::InputGradient);
    let slabs = config.row_tiles(&of, KernelPass::InputGradient);
    let sums = before
        .as_ref()
        .map(|before| before.sums(stored.gpu().workspace(before.workspace(slabs, blocks)), slabs, blocks));
    let call = Call::new(stored.gpu(), config.instance("pointwise_bn_dgrad", stored.dtype()));
    let call = dy
        .onto(call, pixels * p.output.c, p.output.c)
        .reads("w", w, of.weights())
        .writes("dx", dx, pixels * p.input.c)
        .value(i32::from(accumulate));
    let call = GpuBefore::onto(before.as_ref(), call, sums);
    call.sizes([pixels, p.input.c, p.output.c]).launch_of(config.threads(), grid);
    if let Some((before, sums)) = before.zip(sums) {
        before.finish(stored.gpu(), sums, None);
    }
}

/// Whether there are kernels that have both gradients at once and form x and dy on load: depthwise ones that form on load at
/// all, and pointwise ones of few weights.
pub fn has_gradients_at_once(p: &ConvProblem) -> bool {
    match p.family() {
        ConvFamily::Depthwise => forms_on_load(p),
        ConvFamily::Pointwise => has_few_weights(p),
        ConvFamily::Dense => false,
    }
}

/// Both gradients at once, by kernels that form x and dy on load.
pub fn backward_on_load(
    p: &ConvProblem,
    x: GpuInput<'_>,
    w: GpuView<'_>,
    dy: GpuGradient<'_>,
    dx: Option<(&GpuViewMut<'_>, bool)>,
    dw: &GpuViewMut<'_>,
    before: Option<GpuBefore<'_>>,
) {
    if p.family() == ConvFamily::Depthwise {
        return depthwise::backward_on_load(p, x, w, dy, dx, dw, before);
    }
    let (gpu, pixels) = (w.gpu(), p.n * p.output.pixels());
    let Some((dx, accumulate)) = dx else {
        panic!("a pointwise kernel has the input's gradient too; no rule plans less")
    };
    let Some(config) = configured(p, KernelPass::Backward, x.stored()) else { return };
    let ConvConfig::PointwiseBackward(config) = config else {
        panic!("a problem has configurations of its own family and pass")
    };
    let grid @ [tiles, slabs, _] = config.grid(p);
    let parts = GradientParts::new(gpu, p.weight_len(), [tiles, slabs], config.workspace(p), before.as_ref());
    parts.sum(gpu, dw, before, |partials, before, sums| {
        let call = x.onto(Call::new(gpu, config.instance(p, w.dtype())), pixels * p.input.c, p.input.c);
        let call = dy
            .onto(call, pixels * p.output.c, p.output.c)
            .reads("w", w, p.weight_len())
            .writes("dx", dx, pixels * p.input.c)
            .value(i32::from(accumulate));
        GpuBefore::sums_onto(before, call, sums)
            .floats("the partial sums", partials, slabs * p.weight_len())
            .sizes([config.slab, pixels, p.input.c, p.output.c])
            .launch_of(config.threads(), grid);
    });
}

/// Memory for the partial sums of a kernel that has both gradients at once.
pub(super) struct GradientParts {
    weights: Slabs,
    weight_partials: Workspace,
    before: Option<PartialGradientSums>,
}

impl GradientParts {
    /// For `len` weights and a grid of tiles and slabs; `workspace` floats hold the weights' partial sums.
    pub(super) fn new(
        gpu: &Gpu,
        len: usize,
        [tiles, slabs]: [usize; 2],
        workspace: usize,
        before: Option<&GpuBefore<'_>>,
    ) -> Self {
        let blocks = tiles * slabs;
        let all = gpu.workspace(workspace + before.map_or(0, |before| before.workspace(slabs, blocks)));
        let sums = before.map(|before| before.sums(all.part(workspace..all.len()), slabs, blocks));
        Self { weights: Slabs { slabs, len, workspace }, weight_partials: all.part(0..workspace), before: sums }
    }

    /// Runs the kernel, which is given where the weights' partial sums go and the batch-norm's, and adds both.
    pub(super) fn sum(
        self,
        gpu: &Gpu,
        dw: &GpuViewMut<'_>,
        before: Option<GpuBefore<'_>>,
        kernel: impl FnOnce(Floats, Option<&GpuBefore<'_>>, Option<PartialGradientSums>),
    ) {
        let Some((before, sums)) = before.zip(self.before) else {
            return self.weights.sum_in(gpu, self.weight_partials, dw, |partials| kernel(partials, None, None));
        };
        let partials = (self.weights.workspace > 0).then_some(self.weight_partials);
        kernel(partials.map_or_else(|| dw.into(), Floats::from), Some(&before), Some(sums));
        let weights = partials.map(|partials| PartialWeights { partials, slabs: self.weights.slabs, out: dw });
        before.finish(gpu, sums, weights);
    }
}

/// dw = the weight gradient, in `f32`, where x and dy may be formed on load.
pub fn weight_gradient_on_load(p: &ConvProblem, x: GpuInput<'_>, dy: GpuGradient<'_>, dw: &GpuViewMut<'_>) {
    if let (GpuInput::Stored(x), GpuGradient::Stored(dy)) = (x, dy) {
        return weight_gradient(p, x, dy, dw);
    }
    assert!(p.family() == ConvFamily::Pointwise, "no other kernels have one gradient on load; no rule plans it");
    let (of, stored, pixels) =
        (GemmProblem { on_load: true, ..GemmProblem::of(p) }, x.stored(), p.n * p.input.pixels());
    let Some(config) = configured(&of, KernelPass::WeightGradient, stored) else { return };
    let slabs = Slabs { slabs: config.slabs(&of), len: of.weights(), workspace: config.workspace(&of) };
    slabs.sum(stored.gpu(), dw, |partials| {
        let call = Call::new(stored.gpu(), config.instance("pointwise_bn_wgrad", stored.dtype()));
        let call = dy.onto(x.onto(call, pixels * p.input.c, p.input.c), pixels * p.output.c, p.output.c);
        call.floats("the partial sums", partials, slabs.slabs * slabs.len)
            .sizes([config.slab.expect("a weight gradient has slabs"), pixels, p.input.c, p.output.c])
            .launch_of(config.threads(), config.grid(&of, KernelPass::WeightGradient));
    });
}

/// A 1×1 convolution is a linear layer on every pixel.
fn per_pixel(p: &ConvProblem) -> LinearProblem {
    LinearProblem { n: p.n * p.output.pixels(), c_in: p.input.c, c_out: p.output.c }
}

/// y `[n, c_out]` = φ(x·Wᵀ + bias + residual).
pub fn product_forward(
    p: LinearProblem,
    x: GpuView<'_>,
    w: GpuView<'_>,
    epilogue: GpuEpilogue<'_>,
    y: &GpuViewMut<'_>,
) {
    let LinearProblem { n: m, c_in, c_out } = p;
    let of = GemmProblem::product(m, c_in, c_out);
    let Some(config) = configured(&of, KernelPass::Forward, x) else { return };
    let call = Call::new(x.gpu(), config.instance("pointwise_forward", x.dtype())).reads("x", x, m * c_in).reads(
        "w",
        w,
        of.weights(),
    );
    let call = epilogue.onto(call, m, c_out).writes("y", y, m * c_out);
    call.sizes([m, c_in, c_out]).launch_of(config.threads(), config.grid(&of, KernelPass::Forward));
}

/// dx (+)= the input gradient.
pub fn input_gradient(p: &ConvProblem, dy: GpuView<'_>, w: GpuView<'_>, dx: &GpuViewMut<'_>, accumulate: bool) {
    match p.family() {
        ConvFamily::Depthwise => return depthwise::input_gradient(p, dy, w, dx, accumulate),
        ConvFamily::Pointwise => return product_input_gradient(per_pixel(p), dy, w, dx, accumulate),
        ConvFamily::Dense => {}
    }
    let of = GemmProblem::of(p);
    let Some(config) = configured(&of, KernelPass::InputGradient, dy) else { return };
    Call::new(dy.gpu(), config.instance("dense_dgrad", dy.dtype()))
        .reads("dy", dy, p.n * p.output.len())
        .reads("w", w, of.weights())
        .writes("dx", dx, p.n * p.input.len())
        .value(i32::from(accumulate))
        .value(geometry(p))
        .launch_of(config.threads(), config.grid(&of, KernelPass::InputGradient));
}

/// dx `[n, c_in]` (+)= dy·W.
pub fn product_input_gradient(
    p: LinearProblem,
    dy: GpuView<'_>,
    w: GpuView<'_>,
    dx: &GpuViewMut<'_>,
    accumulate: bool,
) {
    let LinearProblem { n: m, c_in, c_out } = p;
    let of = GemmProblem::product(m, c_in, c_out);
    let Some(config) = configured(&of, KernelPass::InputGradient, dy) else { return };
    Call::new(dy.gpu(), config.instance("pointwise_dgrad", dy.dtype()))
        .reads("dy", dy, m * c_out)
        .reads("w", w, of.weights())
        .writes("dx", dx, m * c_in)
        .value(i32::from(accumulate))
        .sizes([m, c_in, c_out])
        .launch_of(config.threads(), config.grid(&of, KernelPass::InputGradient));
}

/// dw = the weight gradient, in `f32`.
pub fn weight_gradient(p: &ConvProblem, x: GpuView<'_>, dy: GpuView<'_>, dw: &GpuViewMut<'_>) {
    match p.family() {
        ConvFamily::Depthwise => return depthwise::weight_gradient(p, x, dy, dw),
        ConvFamily::Pointwise => return product_weight_gradient(per_pixel(p), x, dy, dw),
        ConvFamily::Dense => {}
    }
    let of = GemmProblem::of(p);
    let config = match configured(p, KernelPass::WeightGradient, x) {
        Some(ConvConfig::Direct(config)) => return dense_direct::weight_gradient(p, config, x, dy, dw),
        Some(ConvConfig::Gemm(config)) => config,
        _ => return,
    };
    let slabs = Slabs { slabs: config.slabs(&of), len: of.weights(), workspace: config.workspace(&of) };
    slabs.sum(x.gpu(), dw, |partials| {
        Call::new(x.gpu(), config.instance("dense_wgrad", x.dtype()))
            .reads("x", x, p.n * p.input.len())
            .reads("dy", dy, p.n * p.output.len())
            .floats("the partial sums", partials, slabs.slabs * slabs.len)
            .sizes([config.slab.expect("a weight gradient has slabs")])
            .value(geometry(p))
            .launch_of(config.threads(), config.grid(&of, KernelPass::WeightGradient));
    });
}

/// dw `[c_out, c_in]` = dyᵀ·x over `n` rows.
pub fn product_weight_gradient(p: LinearProblem, x: GpuView<'_>, dy: GpuView<'_>, dw: &GpuViewMut<'_>) {
    let LinearProblem { n: m, c_in, c_out } = p;
    let of = GemmProblem::product(m, c_in, c_out);
    let Some(config) = configured(&of, KernelPass::WeightGradient, x) else { return };
    let slabs = Slabs { slabs: config.slabs(&of), len: of.weights(), workspace: config.workspace(&of) };
    slabs.sum(x.gpu(), dw, |partials| {
        Call::new(x.gpu(), config.instance("pointwise_wgrad", x.dtype()))
            .reads("x", x, m * c_in)
            .reads("dy", dy, m * c_out)
            .floats("the partial sums", partials, slabs.slabs * slabs.len)
            .sizes([config.slab.expect("a weight gradient has slabs"), m, c_in, c_out])
            .launch_of(config.threads(), config.grid(&of, KernelPass::WeightGradient));
    });
}

/// db `[c]` = Σ dy over pixels.
pub fn bias_gradient(of: BiasProblem, dy: GpuView<'_>, db: &GpuViewMut<'_>) {
    let BiasProblem { pixels, c } = of;
    let Some(config) = configured(&of, KernelPass::WeightGradient, dy) else { return };
    let slabs = Slabs { slabs: config.slabs(&of), len: c, workspace: config.workspace(&of) };
    slabs.sum(dy.gpu(), db, |partials| {
        Call::new(dy.gpu(), config.lane.instance("bias_gradient", dy.dtype()))
            .reads("dy", dy, pixels * c)
            .floats("the partial sums", partials, slabs.slabs * c)
            .sizes([config.slab, pixels, c, config.lane.lanes(c, dy.dtype()).lanes])
            .launch(config.grid(&of, dy.dtype()));
    });
}

/// db `[h, w, c]` = Σ dy `[n, h, w, c]` over images; `len` is h·w·c.
pub fn bias_map_gradient(n: usize, len: usize, dy: GpuView<'_>, db: &GpuViewMut<'_>) {
    let call = Call::new(dy.gpu(), format!("sum_slabs<{}>", dy.dtype().kernel_name())).reads("dy", dy, n * len);
    sum_slabs(call, n, len, db);
}

/// A sum in two stages: the first writes partial sums `[slabs, len]`, the second adds them. One slab writes the result.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slabs {
    /// Number of partial sums.
    pub(super) slabs: usize,
    /// Elements of the result.
    pub(super) len: usize,
    /// Floats of the partial sums; 0 where there is one slab.
    pub(super) workspace: usize,
}

impl Slabs {
    /// Runs both stages.
    ///
    /// # Panics
    /// When the result is shorter than `len`.
    pub(super) fn sum(self, gpu: &Gpu, out: &GpuViewMut<'_>, first: impl FnOnce(Floats)) {
        self.sum_in(gpu, gpu.workspace(self.workspace), out, first);
    }

    /// The same with memory for the partial sums.
    pub(super) fn sum_in(self, gpu: &Gpu, partials: Workspace, out: &GpuViewMut<'_>, first: impl FnOnce(Floats)) {
        if self.workspace == 0 {
            return first(out.into());
        }
        first(partials.into());
        let call = Call::new(gpu, format!("sum_slabs<{}>", Dtype::F32.kernel_name()));
        sum_slabs(call.floats("the partial sums", partials, self.slabs * self.len), self.slabs, self.len, out);
    }
}

/// Sums that a block forms which adds slabs (`SLAB_COLUMNS` of `slab.cuh`).
pub(super) const SLAB_COLUMNS: usize = 32;

/// Adds the slabs that a call of `sum_slabs` was given.
fn sum_slabs(call: Call<'_>, slabs: usize, len: usize, out: &GpuViewMut<'_>) {
    call.writes("the sum", out, len).value(int(slabs)).value(long(len)).launch([len.div_ceil(SLAB_COLUMNS), 1, 1]);
}

pub(in crate::ops) fn geometry(p: &ConvProblem) -> ConvGeometry {
    ConvGeometry {
        n: int(p.n),
        h_in: int(p.input.h),
        w_in: int(p.input.w),
        c_in: int(p.input.c),
        h_out: int(p.output.h),
        w_out: int(p.output.w),
        c_out: int(p.output.c),
        k_h: int(p.window.k_h),
        k_w: int(p.window.k_w),
        stride_h: int(p.window.stride_h),
        stride_w: int(p.window.stride_w),
        pad_top: int(p.window.pad.top),
        pad_left: int(p.window.pad.left),
        groups: int(p.groups),
    }
}
