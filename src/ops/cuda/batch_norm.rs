//! `batch_norm.cu`.

use super::activation::add_scores;
use super::{Call, configured, long};
use crate::device::gpu::{GpuView, GpuViewMut};
use crate::dtype::Dtype;
use crate::ops::activation::Act;
use crate::ops::batch_norm::BatchNormProblem;
use crate::ops::config::{KernelPass, NormConfig, THREADS};

/// A value that is normalised, and what follows; as [`crate::ops::batch_norm::Normalised`].
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "the type that it mirrors documents each")]
pub struct GpuNormalised<'a> {
    pub y: GpuView<'a>,
    pub gamma: GpuView<'a>,
    pub beta: GpuView<'a>,
    pub statistics: GpuView<'a>,
    pub residual: Option<GpuView<'a>>,
    pub act: Option<Act<'a>>,
}

impl GpuNormalised<'_> {
    /// Adds γ, β and the statistics to a call.
    fn coefficients<'a>(&self, call: Call<'a>, p: &BatchNormProblem) -> Call<'a> {
        let c = p.shape.c;
        call.reads("gamma", self.gamma, c).reads("beta", self.beta, c).reads("the statistics", self.statistics, 2 * c)
    }

    /// Adds residual, limit, slope and where it lies to a call.
    fn tail<'a>(&self, call: Call<'a>, p: &BatchNormProblem) -> Call<'a> {
        call.reads_if("the residual", self.residual, p.shape.len()).act_at(self.act)
    }
}

/// Adds pixels, slab, c, lanes to a call: the last arguments of most kernels.
fn sizes<'a>(call: Call<'a>, p: &BatchNormProblem, config: NormConfig, slab: usize, dtype: Dtype) -> Call<'a> {
    call.value(long(p.shape.pixels())).sizes([slab, p.shape.c, config.lanes(p, dtype).lanes])
}

/// Statistics of the batch into `saved`, and the running ones.
pub fn statistics(
    p: &BatchNormProblem,
    y: GpuView<'_>,
    mean: &GpuViewMut<'_>,
    var: &GpuViewMut<'_>,
    saved: &GpuViewMut<'_>,
) {
    let Some(config) = configured(p, KernelPass::Forward, y) else { return };
    let (t, c, partials) = (y.dtype(), p.shape.c, config.partials(p));
    let workspace = y.gpu().workspace(config.workspace(p, KernelPass::Forward, t));
    let call = Call::new(y.gpu(), config.lane.instance("batch_norm_statistics", t));
    let call = call.reads("y", y, p.shape.len()).floats("the partial sums", workspace, partials);
    sizes(call, p, config, config.sum, t).launch(config.sum_grid(p, t));
    Call::new(y.gpu(), "batch_norm_statistics_finish")
        .floats("the partial sums", workspace, partials)
        .writes("the running mean", mean, c)
        .writes("the running variance", var, c)
        .writes("the statistics", saved, 2 * c)
        .value(p.eps)
        .value(p.momentum)
        .value(long(p.shape.pixels()))
        .sizes([config.sum, config.sum_slabs(p), c])
        .launch(NormConfig::finish_grid(p));
}

/// `out` from the running statistics, for inference.
pub fn running_statistics(p: &BatchNormProblem, mean: GpuView<'_>, var: GpuView<'_>, out: &GpuViewMut<'_>) {
    let c = p.shape.c;
    Call::new(mean.gpu(), "batch_norm_running_statistics")
        .reads("the running mean", mean, c)
        .reads("the running variance", var, c)
        .writes("the statistics", out, 2 * c)
        .value(p.eps)
        .sizes([c])
        .launch([c.div_ceil(THREADS), 1, 1]);
}

/// z = φ(γ·ŷ + β + residual).
pub fn normalise(p: &BatchNormProblem, of: &GpuNormalised<'_>, z: &GpuViewMut<'_>) {
    let Some(config) = configured(p, KernelPass::Forward, of.y) else { return };
    let (t, n) = (of.y.dtype(), p.shape.len());
    let call = Call::new(of.y.gpu(), config.lane.instance("batch_norm_normalise", t)).reads("y", of.y, n);
    let call = of.tail(of.coefficients(call, p), p).writes("z", z, n);
    sizes(call, p, config, config.map, t).launch(config.map_grid(p, t));
}

/// Where the first half of the backward pass writes.
#[derive(Debug)]
pub struct GpuSumsOut<'a> {
    /// What the second half takes `[4·c]`.
    pub coefficients: GpuViewMut<'a>,
    /// Gradient of γ.
    pub d_gamma: GpuViewMut<'a>,
    /// Gradient of β.
    pub d_beta: GpuViewMut<'a>,
    /// Gradient of the activation's score, which is added to.
    pub score: Option<GpuViewMut<'a>>,
}

/// The first half of the backward pass: coefficients of dy, dγ, dβ, the residual's gradient and the score's.
pub fn backward_sums(
    p: &BatchNormProblem,
    of: &GpuNormalised<'_>,
    dz: GpuView<'_>,
    d_residual: Option<(&GpuViewMut<'_>, bool)>,
    out: &GpuSumsOut<'_>,
) {
    let Some(config) = configured(p, KernelPass::Backward, of.y) else { return };
    let (t, n, gpu) = (of.y.dtype(), p.shape.len(), of.y.gpu());
    // Partial sums [slabs, 2, c], scores [slabs, tiles].
    let workspace = gpu.workspace(config.workspace(p, KernelPass::Backward, t));
    let sums = config.partials(p);
    let partials = workspace.part(0..sums);
    let scores = out.score.as_ref().map(|_| workspace.part(sums..workspace.len()));
    let call =
        Call::new(gpu, config.lane.instance("batch_norm_backward_sums", t)).reads("y", of.y, n).reads("dz", dz, n);
    let call = of
        .tail(of.coefficients(call, p), p)
        .writes_if("the residual's gradient", d_residual.map(|d| d.0), n)
        .value(i32::from(d_residual.is_some_and(|d| d.1)))
        .floats("the partial sums", partials, sums)
        .floats_if("the scores", scores, config.scores(p, t));
    sizes(call, p, config, config.sum, t).launch(config.sum_grid(p, t));
    if let Some((score, scores)) = out.score.as_ref().zip(scores) {
        add_scores(gpu, scores, score);
    }
    let call = Call::new(gpu, "batch_norm_backward_finish").floats("the partial sums", partials, sums);
    of.coefficients(call, p)
        .writes("the gradient of gamma", &out.d_gamma, p.shape.c)
        .writes("the gradient of beta", &out.d_beta, p.shape.c)
        .writes("the coefficients", &out.coefficients, NormConfig::coefficients(p))
        .value(long(p.shape.pixels()))
        .sizes([config.sum_slabs(p), p.shape.c])
        .launch(NormConfig::finish_grid(p));
}

/// The second half: dy (+)= from the coefficients.
pub fn backward_apply(
    p: &BatchNormProblem,
    of: &GpuNormalised<'_>,
    dz: GpuView<'_>,
    coefficients: GpuView<'_>,
    dy: &GpuViewMut<'_>,
    accumulate: bool,
) {
    let Some(config) = configured(p, KernelPass::Backward, of.y) else { return };
    let (t, n, gpu) = (of.y.dtype(), p.shape.len(), of.y.gpu());
    let call = Call::new(gpu, config.lane.instance("batch_norm_backward_apply", t))
        .reads("y", of.y, n)
        .reads("dz", dz, n)
        .reads("the coefficients", coefficients, NormConfig::coefficients(p));
    let call = of.tail(call, p).writes("dy", dy, n).value(i32::from(accumulate));
    sizes(call, p, config, config.map, t).launch(config.map_grid(p, t));
}
