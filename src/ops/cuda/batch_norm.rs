//! `batch_norm.cu`.

use super::activation::add_scores;
use super::conv::SLAB_COLUMNS;
use super::{Call, configured, long};
use crate::device::gpu::{Gpu, GpuView, GpuViewMut, Tickets, Workspace};
use crate::dtype::Dtype;
use crate::ops::activation::Act;
use crate::ops::batch_norm::BatchNormProblem;
use crate::ops::config::{KernelPass, NormConfig, THREADS};
use crate::shape::Lines;

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
    /// Adds γ, β, the statistics and the activation to a call, as kernels take them that normalise on load.
    ///
    /// # Panics
    /// When a residual follows: none is added on load.
    fn on_load<'a>(&self, call: Call<'a>, c: usize) -> Call<'a> {
        assert!(self.residual.is_none(), "no residual is added on load");
        self.coefficients(call, c).act_at(self.act)
    }

    /// Adds γ, β and the statistics to a call.
    fn coefficients<'a>(&self, call: Call<'a>, c: usize) -> Call<'a> {
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

/// What a convolution reads; as [`crate::ops::conv::ConvInput`].
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "the type that it mirrors documents each")]
pub enum GpuInput<'a> {
    Stored(GpuView<'a>),
    Normalised(GpuNormalised<'a>),
}

impl<'a> GpuInput<'a> {
    /// What lies in memory.
    pub(super) fn stored(&self) -> GpuView<'a> {
        match self {
            Self::Stored(x) => *x,
            Self::Normalised(of) => of.y,
        }
    }

    /// Adds what lies in memory, `len` elements of `c` channels, and how it is normalised.
    pub(super) fn onto<'c>(&self, call: Call<'c>, len: usize, c: usize) -> Call<'c> {
        let call = call.reads("x", self.stored(), len);
        match self {
            Self::Stored(_) => call.nulls(3).act_at(None),
            Self::Normalised(of) => of.on_load(call, c),
        }
    }
}

/// The gradient of a convolution's result; as [`crate::ops::conv::ConvGradient`].
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "the type that it mirrors documents each")]
#[allow(clippy::large_enum_variant, reason = "one lives on the stack for the time of a step")]
pub enum GpuGradient<'a> {
    Stored(GpuView<'a>),
    Formed { of: GpuNormalised<'a>, dz: GpuView<'a>, coefficients: GpuView<'a> },
}

impl<'a> GpuGradient<'a> {
    /// What lies in memory: dy or dz.
    pub(super) fn stored(&self) -> GpuView<'a> {
        match self {
            Self::Stored(dy) => *dy,
            Self::Formed { dz, .. } => *dz,
        }
    }

    /// Adds what lies in memory, `len` elements of `c` channels, and how dy is formed.
    ///
    /// # Panics
    /// When a residual stands under the activation: kernels that form on load do not read it.
    pub(super) fn onto<'c>(&self, call: Call<'c>, len: usize, c: usize) -> Call<'c> {
        let call = call.reads("dy", self.stored(), len);
        match self {
            Self::Stored(_) => call.nulls(2).act_at(None),
            Self::Formed { of, coefficients, .. } => {
                assert!(of.residual.is_none(), "no residual is looked at on load");
                call.reads("y", of.y, len).reads("the coefficients", *coefficients, 4 * c).act_at(of.act)
            }
        }
    }
}

/// The batch-norm in front of a convolution, as the input's gradient serves it: what was normalised, and where the sums go.
#[derive(Debug)]
pub struct GpuBefore<'a> {
    /// The convolution's input.
    pub shape: Lines,
    /// What was normalised.
    pub of: GpuNormalised<'a>,
    /// Where its sums go.
    pub out: GpuSumsOut<'a>,
}

impl GpuBefore<'_> {
    /// Adds what was normalised, how, and where `slabs` of partial sums and `blocks` of scores go.
    pub(super) fn onto<'c>(before: Option<&Self>, call: Call<'c>, sums: Option<PartialGradientSums>) -> Call<'c> {
        let Some((before, sums)) = before.zip(sums) else { return call.nulls(4).act_at(None).nulls(2) };
        let shape = before.shape;
        let call = before.of.on_load(call.reads("x", before.of.y, shape.len()), shape.c);
        Self::sums_onto(Some(before), call, Some(sums))
    }

    /// Adds where the partial sums and scores go.
    pub(super) fn sums_onto<'c>(before: Option<&Self>, call: Call<'c>, sums: Option<PartialGradientSums>) -> Call<'c> {
        let Some((before, sums)) = before.zip(sums) else { return call.nulls(2) };
        call.floats("the partial sums", sums.partials, sums.slabs * 2 * before.shape.c).floats_if(
            "the scores",
            sums.scores,
            sums.scores.map_or(0, |scores| scores.len()),
        )
    }

    /// Floats of the partial sums of so many slabs, and of the scores of so many blocks where they are asked for.
    pub(super) fn workspace(&self, slabs: usize, blocks: usize) -> usize {
        slabs * 2 * self.shape.c + if self.out.score.is_some() { blocks } else { 0 }
    }

    /// The same, in that memory.
    pub(super) fn sums(&self, memory: Workspace, slabs: usize, blocks: usize) -> PartialGradientSums {
        let len = slabs * 2 * self.shape.c;
        let scores = self.out.score.as_ref().map(|_| memory.part(len..len + blocks));
        PartialGradientSums { partials: memory.part(0..len), scores, slabs }
    }

    /// The second stage, together with that of the weights' gradient where the same kernel had both.
    pub(super) fn finish(&self, gpu: &Gpu, sums: PartialGradientSums, weights: Option<PartialWeights<'_>>) {
        sums.finish(gpu, self.shape, &self.of, &self.out, weights);
    }
}

/// Where the statistics of a batch go: as [`crate::ops::batch_norm::StatisticsOut`].
#[derive(Debug)]
#[allow(missing_docs, reason = "the type that it mirrors documents each")]
pub struct GpuStatisticsOut<'a> {
    pub statistics: GpuViewMut<'a>,
    pub running: [GpuViewMut<'a>; 2],
}

/// Slabs up to which one block merges all of them.
const ONE_GROUP: usize = 32;

/// What a kernel needs that takes statistics of a batch (`StatisticsOut` of `statistics.cuh`): memory for the moments of its
/// slabs, for those of groups of slabs, and tickets by which its blocks find the last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moments {
    partials: Workspace,
    groups: Workspace,
    counts: Workspace,
    tickets: Tickets,
    /// Slabs of a group: about as many as there are groups.
    group: usize,
}

impl Moments {
    /// For so many slabs of so many tiles of `c` channels together.
    pub(super) fn new(gpu: &Gpu, [tiles, slabs]: [usize; 2], c: usize) -> Self {
        let group = if slabs <= ONE_GROUP { slabs } else { slabs.isqrt() };
        let groups = slabs.div_ceil(group.max(1));
        let (partials, merged) = (slabs * 2 * c, groups * 3 * c);
        let all = gpu.workspace(partials + merged + tiles * slabs);
        Self {
            partials: all.part(0..partials),
            groups: all.part(partials..partials + merged),
            counts: all.part(partials + merged..all.len()),
            tickets: gpu.tickets(tiles * (groups + 1)),
            group,
        }
    }

    /// Adds memory and results to a call; `counted` where the kernel counts the pixels of each slab.
    pub(super) fn onto<'a>(
        &self,
        call: Call<'a>,
        p: &BatchNormProblem,
        out: &GpuStatisticsOut<'_>,
        counted: bool,
    ) -> Call<'a> {
        let (c, [mean, var]) = (p.shape.c, &out.running);
        let call = call.floats("the partial sums", self.partials, self.partials.len());
        let call = if counted { call.floats("the counts", self.counts, self.counts.len()) } else { call };
        call.floats("the merged sums", self.groups, self.groups.len())
            .value(self.tickets)
            .sizes([self.group])
            .writes("the running mean", mean, c)
            .writes("the running variance", var, c)
            .writes("the statistics", &out.statistics, 2 * c)
            .value(p.eps)
            .value(p.momentum)
    }
}

/// Statistics of a stored batch.
pub fn statistics(p: &BatchNormProblem, y: GpuView<'_>, out: &GpuStatisticsOut<'_>) {
    let Some(config) = configured(p, KernelPass::Forward, y) else { return };
    let (t, c) = (y.dtype(), p.shape.c);
    let grid @ [tiles, slabs, _] = config.sum_grid(p, t);
    let call = Call::new(y.gpu(), config.lane.instance("batch_norm_statistics", t)).reads("y", y, p.shape.len());
    let call = Moments::new(y.gpu(), [tiles, slabs], c).onto(call, p, out, false);
    sizes(call, p, config, config.sum, t).launch(grid);
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
    let call = of.tail(of.coefficients(call, p.shape.c), p).writes("z", z, n);
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
    let workspace = gpu.workspace(config.workspace(p, t));
    let sums = config.partials(p);
    let partials = workspace.part(0..sums);
    let scores = out.score.as_ref().map(|_| workspace.part(sums..workspace.len()));
    let call =
        Call::new(gpu, config.lane.instance("batch_norm_backward_sums", t)).reads("y", of.y, n).reads("dz", dz, n);
    let call = of
        .tail(of.coefficients(call, p.shape.c), p)
        .writes_if("the residual's gradient", d_residual.map(|d| d.0), n)
        .value(i32::from(d_residual.is_some_and(|d| d.1)))
        .floats("the partial sums", partials, sums)
        .floats_if("the scores", scores, config.scores(p, t));
    sizes(call, p, config, config.sum, t).launch(config.sum_grid(p, t));
    PartialGradientSums { partials, scores, slabs: config.sum_slabs(p) }.finish(gpu, p.shape, of, out, None);
}

/// Partial sums `[slabs, 2, c]` of a gradient and of its score, which the second stage adds.
#[derive(Debug, Clone, Copy)]
pub(super) struct PartialGradientSums {
    /// The sums.
    pub partials: Workspace,
    /// The scores, where they are asked for.
    pub scores: Option<Workspace>,
    /// Slabs.
    pub slabs: usize,
}

/// Partial sums `[slabs, len]` of a gradient of weights, and where their sum goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct PartialWeights<'a> {
    /// The sums.
    pub partials: Workspace,
    /// Slabs.
    pub slabs: usize,
    /// The gradient.
    pub out: &'a GpuViewMut<'a>,
}

impl PartialWeights<'_> {
    fn len(&self) -> usize {
        self.out.view().len()
    }
}

impl PartialGradientSums {
    /// Writes coefficients of dy, dγ and dβ; adds to the score, and the slabs of the weights' gradient.
    pub(super) fn finish(
        self,
        gpu: &Gpu,
        shape: Lines,
        of: &GpuNormalised<'_>,
        out: &GpuSumsOut<'_>,
        weights: Option<PartialWeights<'_>>,
    ) {
        let c = shape.c;
        if let Some((score, scores)) = out.score.as_ref().zip(self.scores) {
            add_scores(gpu, scores, score);
        }
        let call = Call::new(gpu, "batch_norm_backward_finish");
        let call = of
            .coefficients(call.floats("the partial sums", self.partials, self.slabs * 2 * c), c)
            .writes("the gradient of gamma", &out.d_gamma, c)
            .writes("the gradient of beta", &out.d_beta, c)
            .writes("the coefficients", &out.coefficients, NormConfig::coefficients(c))
            .value(long(shape.pixels()))
            .sizes([self.slabs, c]);
        let ([blocks, ..], (slabs, len)) = (NormConfig::finish_grid(c), weights.map_or((0, 0), |w| (w.slabs, w.len())));
        call.floats_if("the weights' partial sums", weights.map(|w| w.partials), slabs * len)
            .writes_if("the gradient of the weights", weights.map(|w| w.out), len)
            .sizes([slabs])
            .value(long(len))
            .launch([blocks + len.div_ceil(SLAB_COLUMNS), 1, 1]);
    }
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
        .reads("the coefficients", coefficients, NormConfig::coefficients(p.shape.c));
    let call = of.tail(call, p).writes("dy", dy, n).value(i32::from(accumulate));
    sizes(call, p, config, config.map, t).launch(config.map_grid(p, t));
}
