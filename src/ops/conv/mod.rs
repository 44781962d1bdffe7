//! Convolution: its description, the problem that all three families share, and the choice among them.
//!
//! x `[n, h_in, w_in, c_in]`, y `[n, h_out, w_out, c_out]`; weights in the layout of the family
//! ([`ConvFamily`]). Cross-correlation: y[o, u] = Σ w[o, c, v]·x[c, s·u + v − p].

mod dense;
pub(super) mod depthwise;
mod parts;
mod pointwise;
mod source;
mod step;
pub mod winograd;

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::activation::{Act, Clamp};
use super::batch_norm::finish_statistics;
use super::batch_norm::{BatchNormProblem, Normalised, StatisticsOut, SumsOut};
use super::config::BiasProblem;
use super::cuda;
use super::cuda::batch_norm::{GpuBefore, GpuGradient, GpuInput};
use super::epilogue::{BiasOperand, Epilogue, PlannedEpilogue};
use super::operation::{
    LoweredNode, MAX_PARAM_ELEMENTS, Operation, OperationParam, ParamRole, bad, is_sane, mismatch, require,
    window_output,
};
use super::panels::{Packed, PanelLayout};
use super::parallel::PartialSums;
use super::product::Ends;
use super::step::{Backend, Operand, Place, Step, ValueId};
use crate::device::float_mode::flush_subnormals;
use crate::device::{View, ViewMut};
use crate::shape::{Lines, Shape, Window};
use crate::{Error, Result};
use source::{GradientSource, Source};

pub use step::{ConvStep, LoneGradients};

/// What a convolution adds to its sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// Nothing.
    None,
    /// One number per output channel, shape `[c_out]`.
    Channel,
    /// One number per output position and channel, shape `[h_out, w_out, c_out]`: what an exactly merged block needs
    /// whose inner convolution zero-pads (border bias).
    Map,
}

/// A convolution without dilation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conv {
    /// Channels in.
    pub c_in: usize,
    /// Channels out.
    pub c_out: usize,
    /// Kernel, stride, padding.
    pub window: Window,
    /// Channel groups; `c_in` for a depthwise convolution.
    pub groups: usize,
    /// Bias.
    pub bias: Bias,
}

/// Which kernel family computes a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConvFamily {
    /// One filter per channel; weights `[k_h, k_w, c]`.
    Depthwise,
    /// 1×1, stride 1, no padding, one group; weights `[c_out, c_in]`.
    Pointwise,
    /// All others; weights `[c_out, k_h, k_w, c_in / groups]`.
    Dense,
}

impl Conv {
    /// The kernel family this convolution belongs to.
    pub fn family(&self) -> ConvFamily {
        if self.groups > 1 && self.groups == self.c_in && self.c_in == self.c_out {
            ConvFamily::Depthwise
        } else if self.groups == 1 && self.window == Window::square(1, 1, 0) {
            ConvFamily::Pointwise
        } else {
            ConvFamily::Dense
        }
    }

    /// Dimensions of the weights, in the layout of the family.
    pub fn weight_shape(&self) -> Vec<usize> {
        let Self { c_in, c_out, window: Window { k_h, k_w, .. }, groups, .. } = *self;
        match self.family() {
            ConvFamily::Depthwise => vec![k_h, k_w, c_in],
            ConvFamily::Pointwise => vec![c_out, c_in],
            ConvFamily::Dense => vec![c_out, k_h, k_w, c_in / groups],
        }
    }

    /// The last part of the bias's parameter name and its dimensions, where there is a bias; `output` is the shape of the
    /// convolution's result.
    pub fn bias_param(&self, output: Shape) -> Option<(&'static str, Vec<usize>)> {
        match self.bias {
            Bias::None => None,
            Bias::Channel => Some(("bias", vec![self.c_out])),
            Bias::Map => Some(("bias_map", vec![output.h, output.w, self.c_out])),
        }
    }

    /// Multiply-accumulates per output pixel.
    pub fn macs_per_pixel(&self) -> u64 {
        (self.window.taps() * (self.c_in / self.groups) * self.c_out) as u64
    }
}

/// One convolution over one batch: everything a kernel, a cost model or a bench needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConvProblem {
    /// Images.
    pub n: usize,
    /// One image of the input.
    pub input: Shape,
    /// One image of the output.
    pub output: Shape,
    /// Kernel, stride, padding.
    pub window: Window,
    /// Channel groups.
    pub groups: usize,
}

impl ConvProblem {
    /// The problem of a convolution; `None` where the kernel does not fit the input.
    pub fn new(conv: &Conv, input: Shape, n: usize) -> Option<Self> {
        let (h, w) = conv.window.output(input.h, input.w)?;
        Some(Self { n, input, output: Shape::new(h, w, conv.c_out), window: conv.window, groups: conv.groups })
    }

    /// The description back.
    fn conv(&self) -> Conv {
        Conv { c_in: self.input.c, c_out: self.output.c, window: self.window, groups: self.groups, bias: Bias::None }
    }

    /// The kernel family.
    pub fn family(&self) -> ConvFamily {
        self.conv().family()
    }

    /// Multiply-accumulates of the forward pass over the batch; each gradient takes as many.
    pub fn macs(&self) -> u64 {
        self.conv().macs_per_pixel() * (self.n * self.output.pixels()) as u64
    }

    /// How the host's products read the weights; `None` for a depthwise convolution, which is no product.
    pub(super) fn panels(&self) -> Option<PanelLayout> {
        let Self { groups, input, output, window, .. } = *self;
        let layout = PanelLayout { groups, c_out: output.c / groups, k: window.taps() * (input.c / groups) };
        (self.family() != ConvFamily::Depthwise).then_some(layout)
    }

    /// Number of weights.
    pub fn weight_len(&self) -> usize {
        self.window.taps() * (self.input.c / self.groups) * self.output.c
    }

    /// Elements the forward pass moves at least: input, output and weights once.
    pub fn min_elements(&self) -> u64 {
        (self.n * (self.input.len() + self.output.len()) + self.weight_len()) as u64
    }

    /// The problem of one image for `n` of them.
    pub fn batch(&self, n: usize) -> Self {
        Self { n, ..*self }
    }

    /// Whether a backend forms its input and its result's gradient on load.
    pub fn forms_on_load(&self, backend: Backend) -> bool {
        match backend {
            Backend::Host => self.family() != ConvFamily::Dense,
            Backend::Cuda => cuda::conv::forms_on_load(self),
        }
    }

    /// Whether a backend has both gradients of one walk over dy where it forms operands on load.
    pub fn has_gradients_at_once(&self, backend: Backend) -> bool {
        match backend {
            Backend::Host => true,
            Backend::Cuda => cuda::conv::has_gradients_at_once(self),
        }
    }

    /// Whether a backend takes the statistics of its result while it computes it.
    pub fn takes_statistics(&self, backend: Backend) -> bool {
        match backend {
            Backend::Host => true,
            Backend::Cuda => self.family() == ConvFamily::Dense || cuda::conv::forms_on_load(self),
        }
    }

    /// The output as lines.
    pub(super) fn output_lines(&self) -> Lines {
        Lines::of(self.output, self.n)
    }

    /// Operands, or their gradients, have the problem's sizes.
    fn check(&self, x: usize, w: usize, y: usize) {
        let (len_in, len) = (self.n * self.input.len(), self.n * self.output.len());
        require("a convolution", [("x", x, len_in), ("w", w, self.weight_len()), ("y", y, len)]);
    }
}

/// What a convolution reads.
#[derive(Debug, Clone, Copy)]
pub enum ConvInput<'a> {
    /// x `[n, h, w, c]`.
    Stored(View<'a>),
    /// x = φ(γ·ŷ + β), formed on load by depthwise and pointwise convolutions ([`ConvProblem::forms_on_load`]).
    Normalised(Normalised<'a>),
}

impl<'a> ConvInput<'a> {
    fn len(&self) -> usize {
        match self {
            Self::Stored(x) => x.len(),
            Self::Normalised(of) => of.y.len(),
        }
    }

    fn is_formed(&self) -> bool {
        matches!(self, Self::Normalised(_))
    }

    /// What is read by a step that nothing is fused with.
    fn stored(self) -> View<'a> {
        match self {
            Self::Stored(x) => x,
            Self::Normalised(_) => panic!("an epilogue goes with a stored input; no rule plans anything else"),
        }
    }

    fn gpu(&self) -> GpuInput<'a> {
        match self {
            Self::Stored(x) => GpuInput::Stored(x.gpu()),
            Self::Normalised(of) => GpuInput::Normalised(of.gpu()),
        }
    }
}

impl<'a> Packed<'a> {
    /// The weights of a pointwise or dense convolution.
    ///
    /// # Panics
    /// For a depthwise one, which is no product.
    pub(super) fn of_product(p: &ConvProblem, w: View<'a>) -> Self {
        Self::new(p.panels().expect("a product's weights"), w)
    }
}

impl<'a> Ends<'a> {
    /// Those of some lines of the output.
    fn of_lines(&self, p: &ConvProblem, lines: &Range<usize>) -> Self {
        let line_len = p.output.w * p.output.c;
        let residual = self.residual.map(|residual| &residual[lines.start * line_len..lines.end * line_len]);
        Self { residual, ..*self }
    }
}

/// The gradient of a convolution's result, as its gradients read it.
#[derive(Debug, Clone, Copy)]
#[allow(clippy::large_enum_variant, reason = "one lives on the stack for the time of a step")]
pub enum ConvGradient<'a> {
    /// dy `[n, h_out, w_out, c_out]`.
    Stored(View<'a>),
    /// dy behind a batch-norm, formed on load: by any convolution on the host, by those that
    /// [form on load](ConvProblem::forms_on_load) on a GPU.
    Formed {
        /// The batch-norm.
        problem: BatchNormProblem,
        /// What it normalised: y, and what followed.
        of: Normalised<'a>,
        /// Gradient of its result.
        dz: View<'a>,
        /// Sums over the batch, as [`batch_norm::gradient_sums`](super::batch_norm::gradient_sums) writes them.
        sums: View<'a>,
    },
}

/// y = φ(conv(x, w) + bias + residual), the epilogue on each piece while it is in cache.
pub fn forward(p: &ConvProblem, x: View<'_>, w: View<'_>, epilogue: &Epilogue<View<'_>, Act<'_>>, y: ViewMut<'_>) {
    p.check(x.len(), w.len(), y.len());
    epilogue.check(p);
    if let View::Gpu(x) = x {
        return cuda::conv::forward(p, x, w.gpu(), epilogue.gpu(), &y.gpu());
    }
    let x = Source::new(ConvInput::Stored(x));
    forward_with(p, &x, w, &epilogue.host(), y.host(), false);
}

/// y = conv(x, w), and the statistics of y for the batch-norm behind it, taken while each piece is in cache or in registers.
pub fn forward_with_statistics(
    p: &ConvProblem,
    x: ConvInput<'_>,
    w: View<'_>,
    y: ViewMut<'_>,
    bn: &BatchNormProblem,
    out: StatisticsOut<'_>,
) {
    p.check(x.len(), w.len(), y.len());
    if let View::Gpu(w) = w {
        return cuda::conv::forward_with_statistics(p, x.gpu(), w, &y.gpu(), bn, &out.gpu(bn));
    }
    let x = Source::new(x);
    finish_statistics(bn, &forward_with(p, &x, w, &Ends::NONE, y.host(), true), out);
}

/// What the gradients of a convolution are written to.
#[derive(Debug)]
pub struct GradientsOut<'a> {
    /// Gradient of x, and whether to add to what is there.
    pub dx: Option<(ViewMut<'a>, bool)>,
    /// Gradient of the weights.
    pub dw: ViewMut<'a>,
    /// Gradient of the bias `[c_out]` or `[h, w, c]`.
    pub db: Option<ViewMut<'a>>,
    /// The sums that the batch-norm in front needs of dx, where x was normalised on load.
    pub sums: Option<SumsOut<'a>>,
}

/// All gradients of a convolution. The host's in one walk over dy, which is never stored where it is formed on load; on a
/// GPU one kernel after the other.
pub fn backward(p: &ConvProblem, x: ConvInput<'_>, w: View<'_>, dy: ConvGradient<'_>, out: GradientsOut<'_>) {
    p.check(x.len(), w.len(), dy.len());
    let GradientsOut { dx, dw, db, sums } = out;
    require("a convolution", [("dw", dw.len(), p.weight_len())]);
    if let Some((dx, _)) = &dx {
        require("a convolution", [("dx", dx.len(), x.len())]);
    }
    if let View::Gpu(w) = w {
        if let Some(db) = db {
            bias_gradient(p, dy.stored(), db);
        }
        let dx = dx.map(|(dx, accumulate)| (dx.gpu(), accumulate));
        let dx = dx.as_ref().map(|(dx, accumulate)| (dx, *accumulate));
        if p.has_gradients_at_once(Backend::Cuda) && (x.is_formed() || dy.is_formed()) {
            let before = match (x, sums) {
                (ConvInput::Normalised(of), Some(sums)) => Some(BatchNormBefore { of, sums }.gpu(p)),
                _ => None,
            };
            return cuda::conv::backward_on_load(p, x.gpu(), w, dy.gpu(), dx, &dw.gpu(), before);
        }
        assert!(sums.is_none(), "a batch-norm's sums belong to the input gradient's step");
        if let Some((dx, accumulate)) = dx {
            cuda::conv::input_gradient(p, dy.stored().gpu(), w, dx, accumulate);
        }
        return weight_gradient(p, x, dy, dw);
    }
    if let Some(db) = db {
        bias_gradient(p, dy.stored(), db);
    }
    let source = Source::new_with(x, sums.as_ref().is_some_and(|sums| sums.score.is_some()));
    let (w, dx, dw) = (w.host(), dx.map(|(dx, accumulate)| (dx.host(), accumulate)), dw.host());
    let dy = GradientSource::new(dy);
    let parts = match p.family() {
        ConvFamily::Pointwise => pointwise::backward(p, &source, w, &dy, dx, dw),
        ConvFamily::Depthwise => depthwise::backward(p, &source, w, &dy, dx, dw),
        ConvFamily::Dense => dense::backward(p, &source, w, &dy, dx, dw),
    };
    if let (Some(out), ConvInput::Normalised(of)) = (sums, x) {
        out.finish(&parts, of.statistics);
    }
}

/// db = Σ dy, per channel or per position.
pub fn bias_gradient(p: &ConvProblem, dy: View<'_>, db: ViewMut<'_>) {
    let (channels, positions) = (p.output.c, p.output.len());
    assert!(db.len() == channels || db.len() == positions, "a bias gradient per channel or per position");
    if let View::Gpu(dy) = dy {
        let db = db.gpu();
        return if db.view().len() == channels {
            cuda::conv::bias_gradient(BiasProblem { pixels: p.n * p.output.pixels(), c: channels }, dy, &db);
        } else {
            cuda::conv::bias_map_gradient(p.n, positions, dy, &db);
        };
    }
    let db = db.host();
    db.fill(0.0);
    flush_subnormals(|| {
        for dy in dy.host().chunks_exact(db.len()) {
            db.iter_mut().zip(dy).for_each(|(db, dy)| *db += dy);
        }
    });
}

/// The batch-norm in front of a convolution, whose gradient sums the convolution's input gradient takes.
#[derive(Debug)]
pub struct BatchNormBefore<'a> {
    /// What it normalised.
    pub of: Normalised<'a>,
    /// Where its sums go.
    pub sums: SumsOut<'a>,
}

impl<'a> BatchNormBefore<'a> {
    fn gpu(self, p: &ConvProblem) -> GpuBefore<'a> {
        GpuBefore { shape: Lines::of(p.input, p.n), of: self.of.gpu(), out: self.sums.gpu() }
    }
}

/// dx (+)= the input gradient alone, on a GPU: the host forms both gradients in one walk.
pub fn input_gradient(
    p: &ConvProblem,
    dy: ConvGradient<'_>,
    w: View<'_>,
    (dx, accumulate): (ViewMut<'_>, bool),
    before: Option<BatchNormBefore<'_>>,
) {
    p.check(dx.len(), w.len(), dy.len());
    let before = before.map(|before| before.gpu(p));
    cuda::conv::input_gradient_on_load(p, dy.gpu(), w.gpu(), &dx.gpu(), accumulate, before);
}

/// dw = the weight gradient alone, on a GPU.
pub fn weight_gradient(p: &ConvProblem, x: ConvInput<'_>, dy: ConvGradient<'_>, dw: ViewMut<'_>) {
    p.check(x.len(), dw.len(), dy.len());
    cuda::conv::weight_gradient_on_load(p, x.gpu(), dy.gpu(), &dw.gpu());
}

impl<'a> ConvGradient<'a> {
    fn len(&self) -> usize {
        match self {
            Self::Stored(dy) => dy.len(),
            Self::Formed { dz, .. } => dz.len(),
        }
    }

    fn is_formed(&self) -> bool {
        matches!(self, Self::Formed { .. })
    }

    fn stored(self) -> View<'a> {
        match self {
            Self::Stored(dy) => dy,
            Self::Formed { .. } => panic!("bias gradients are those of stored gradients; no rule plans others"),
        }
    }

    fn gpu(&self) -> GpuGradient<'a> {
        match self {
            Self::Stored(dy) => GpuGradient::Stored(dy.gpu()),
            Self::Formed { of, dz, sums, .. } => {
                GpuGradient::Formed { of: of.gpu(), dz: dz.gpu(), coefficients: sums.gpu() }
            }
        }
    }
}

impl<'a> Epilogue<View<'a>, Act<'a>> {
    /// Every operand has the size that a convolution's epilogue needs.
    fn check(&self, p: &ConvProblem) {
        match self.bias {
            BiasOperand::None => {}
            BiasOperand::Channel(bias) => require("a convolution", [("the bias", bias.len(), p.output.c)]),
            BiasOperand::Map(bias) => require("a convolution", [("the bias map", bias.len(), p.output.len())]),
        }
        if let Some(residual) = self.residual {
            require("a convolution", [("the residual", residual.len(), p.n * p.output.len())]);
        }
    }

    fn host(&self) -> Ends<'a> {
        Ends {
            accumulate: false,
            bias: self.bias.operand().map(View::host),
            residual: self.residual.map(View::host),
            clamp: self.act.map_or(Clamp::NONE, |act| act.clamp),
        }
    }

    fn gpu(&self) -> cuda::conv::GpuEpilogue<'a> {
        Epilogue { bias: self.bias.map(View::gpu), residual: self.residual.map(View::gpu), act: self.act }
    }
}

/// The forward pass in chunks, whose moments are taken while they are in cache, where they are asked for.
fn forward_with(
    p: &ConvProblem,
    x: &Source<'_>,
    w: View<'_>,
    ends: &Ends<'_>,
    y: &mut [f32],
    takes_moments: bool,
) -> PartialSums<f32> {
    match p.family() {
        ConvFamily::Pointwise => pointwise::forward(p, x, w, ends, y, takes_moments),
        ConvFamily::Depthwise => depthwise::forward(p, x, w.host(), ends, y, takes_moments),
        ConvFamily::Dense => dense::forward(p, x, w, ends, y, takes_moments),
    }
}

impl Operation for Conv {
    fn output_shape(&self, name: &str, inputs: &[Shape]) -> Result<Shape> {
        let Self { c_in, c_out, window, groups, .. } = *self;
        if groups == 0 || c_in == 0 || c_out == 0 || c_in % groups != 0 || c_out % groups != 0 {
            return bad(name, "channels must be multiples of the groups, all above 0");
        }
        if !is_sane(window) {
            return bad(name, "kernel, stride and padding must lie in 1..=1024 (padding from 0)");
        }
        let weights = (c_in / groups).checked_mul(c_out).and_then(|n| n.checked_mul(window.taps()));
        if weights.is_none_or(|n| n > MAX_PARAM_ELEMENTS) {
            return bad(name, "the weights are unreasonably large");
        }
        if inputs[0].c != c_in {
            return mismatch(name, format!("{c_in} channels"), inputs[0]);
        }
        let (h, w) = window_output(name, window, inputs[0])?;
        Ok(Shape::new(h, w, c_out))
    }

    fn params(&self, output: Shape) -> Vec<OperationParam> {
        let weight = OperationParam::new("weight", ParamRole::ConvWeight(self.family()), self.weight_shape());
        let role = if self.bias == Bias::Map { ParamRole::ConvBiasMap } else { ParamRole::ConvBias };
        let bias = self.bias_param(output).map(|(suffix, shape)| OperationParam::new(suffix, role, shape));
        [weight].into_iter().chain(bias).collect()
    }

    fn macs(&self, output: Shape) -> u64 {
        self.macs_per_pixel() * output.pixels() as u64
    }

    fn describe(&self) -> String {
        let Window { k_h, k_w, stride_h, stride_w, .. } = self.window;
        let stride =
            if stride_h != 1 || stride_w != 1 { format!(" s{}", stride_h.max(stride_w)) } else { String::new() };
        let groups = match self.family() {
            ConvFamily::Depthwise => String::new(),
            _ if self.groups > 1 => format!(" g{}", self.groups),
            _ => String::new(),
        };
        let bias = match self.bias {
            Bias::None => "",
            Bias::Channel => " +bias",
            Bias::Map => " +bias map",
        };
        format!("{} {k_h}x{k_w}{stride}{groups}{bias}", self.family().describe())
    }

    fn lower(&self, node: &mut dyn LoweredNode) -> Result<Vec<Box<dyn Step>>> {
        let (x, y) = (Operand::Stored(node.input(0)), node.output());
        Ok(vec![Box::new(self.planned(node, x, y)?)])
    }
}

impl Conv {
    /// The convolution with its own bias and nothing behind it.
    ///
    /// # Errors
    /// A node that is no convolution, or a kernel that does not fit.
    pub fn planned(&self, node: &mut dyn LoweredNode, x: Operand, y: ValueId) -> Result<ConvStep> {
        let problem = ConvProblem::new(self, node.input_shape(0), 1)
            .ok_or_else(|| Error::Graph("a convolution's kernel does not fit its input".into()))?;
        let bias = match self.bias {
            Bias::None => BiasOperand::None,
            Bias::Channel => BiasOperand::Channel(node.param(Place::Param, ParamRole::ConvBias)?),
            Bias::Map => BiasOperand::Map(node.param(Place::Param, ParamRole::ConvBiasMap)?),
        };
        let w = node.param(Place::Weight, ParamRole::ConvWeight(self.family()))?;
        let epilogue = PlannedEpilogue { bias, ..PlannedEpilogue::default() };
        Ok(ConvStep { problem, x, w, epilogue, y, statistics: None })
    }
}

impl ConvFamily {
    /// A word for printouts.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Depthwise => "depthwise",
            Self::Pointwise => "pointwise",
            Self::Dense => "conv",
        }
    }
}
