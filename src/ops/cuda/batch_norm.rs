//! `batch_norm.cu`.

use super::activation::add_scores;
use super::{Tiles, grid, int, long};
use crate::device::driver::Argument;
use crate::device::gpu::{GpuView, GpuViewMut};
use crate::ops::activation::Clamp;
use crate::ops::batch_norm::BatchNormProblem;

/// γ, β `[c]` and μ, 1/√(σ² + ε) `[2·c]`.
#[derive(Debug, Clone, Copy)]
pub struct Coefficients<'a> {
    /// γ.
    pub gamma: GpuView<'a>,
    /// β.
    pub beta: GpuView<'a>,
    /// Statistics.
    pub saved: GpuView<'a>,
}

/// Residual and activation after the normalisation.
#[derive(Debug, Clone, Copy)]
pub struct Tail<'a> {
    /// Added.
    pub residual: Option<GpuView<'a>>,
    /// Applied last.
    pub clamp: Option<Clamp>,
}

impl Tail<'_> {
    /// Residual, limit, slope and where it lies.
    fn arguments(&self) -> [Argument; 4] {
        let [limit, slope, slope_at] = self.clamp.unwrap_or(Clamp::NONE).arguments();
        [self.residual.into(), limit, slope, slope_at]
    }
}

/// How pixels are cut.
struct Slabs {
    vector: bool,
    tiles: Tiles,
    /// Pixels per slab and slabs of a two-stage sum.
    sum: (usize, usize),
    /// The same where nothing is summed.
    map: (usize, usize),
}

impl Slabs {
    fn new(p: &BatchNormProblem, y: GpuView<'_>) -> Self {
        let pixels = p.lines * p.w;
        let (vector, tiles) = Tiles::of(y.dtype(), p.c);
        let wanted = pixels.div_ceil(16 * tiles.rows).min(512usize.div_ceil(tiles.tiles));
        let slab = pixels.div_ceil(wanted);
        let map = (8 * tiles.rows).max(pixels.div_ceil(65535));
        Self { vector, tiles, sum: (slab, pixels.div_ceil(slab)), map: (map, pixels.div_ceil(map)) }
    }

    fn name(&self, kernel: &str, y: GpuView<'_>) -> String {
        format!("{kernel}<{}, {}>", y.dtype().kernel_name(), self.vector)
    }

    /// pixels, slab, c, lanes: the last arguments of most kernels.
    fn sizes(&self, p: &BatchNormProblem, slab: usize) -> [Argument; 4] {
        [long(p.lines * p.w).into(), int(slab).into(), int(p.c).into(), int(self.tiles.lanes).into()]
    }
}

/// Statistics of the batch into `saved`, and the running ones.
pub fn statistics(p: &BatchNormProblem, y: GpuView<'_>, [mean, var]: [&GpuViewMut<'_>; 2], saved: &GpuViewMut<'_>) {
    let cut = Slabs::new(p, y);
    let (slab, slabs) = cut.sum;
    let partials = Argument::from(y.gpu().workspace(slabs * 2 * p.c));
    let [pixels, slab, c, lanes] = cut.sizes(p, slab);
    // SAFETY: arguments as the kernel's header says; the workspace holds all partial sums.
    unsafe {
        let name = cut.name("batch_norm_statistics", y);
        y.gpu().launch(&name, grid(cut.tiles.tiles, slabs, 1), &[y.into(), partials, pixels, slab, c, lanes]);
        let out = [mean.into(), var.into(), saved.into(), p.eps.into(), p.momentum.into()];
        let arguments = [partials, out[0], out[1], out[2], out[3], out[4], pixels, slab, int(slabs).into(), c];
        y.gpu().launch("batch_norm_statistics_finish", grid(p.c.div_ceil(8), 1, 1), &arguments);
    }
}

/// `saved` from the running statistics, for inference.
pub fn running_statistics(p: &BatchNormProblem, [mean, var]: [GpuView<'_>; 2], saved: u64) {
    let arguments = [mean.into(), var.into(), saved.into(), p.eps.into(), int(p.c).into()];
    // SAFETY: `saved` has room for 2·c floats.
    unsafe { mean.gpu().launch("batch_norm_running_statistics", grid(p.c.div_ceil(256), 1, 1), &arguments) }
}

/// z = φ(γ·ŷ + β + residual). `saved` is an argument of its own since inference has it in the workspace.
pub fn normalise(
    p: &BatchNormProblem,
    y: GpuView<'_>,
    [gamma, beta]: [GpuView<'_>; 2],
    saved: Argument,
    tail: Tail<'_>,
    z: &GpuViewMut<'_>,
) {
    let cut = Slabs::new(p, y);
    let (slab, slabs) = cut.map;
    let head = [y.into(), gamma.into(), beta.into(), saved];
    let arguments: Vec<Argument> =
        head.into_iter().chain(tail.arguments()).chain([z.into()]).chain(cut.sizes(p, slab)).collect();
    // SAFETY: arguments as the kernel's header says.
    unsafe { y.gpu().launch(&cut.name("batch_norm_normalise", y), grid(cut.tiles.tiles, slabs, 1), &arguments) }
}

/// What the backward pass reads.
#[derive(Debug, Clone, Copy)]
pub struct BackwardInputs<'a> {
    /// What was normalised.
    pub y: GpuView<'a>,
    /// Gradient of z.
    pub dz: GpuView<'a>,
    /// γ, β, statistics.
    pub of: Coefficients<'a>,
    /// What followed.
    pub tail: Tail<'a>,
}

/// dγ, dβ, the residual's gradient, dy (+)=, and the score gradient added to `score`.
pub fn backward(
    p: &BatchNormProblem,
    inputs: BackwardInputs<'_>,
    d_residual: Option<(&GpuViewMut<'_>, bool)>,
    [d_gamma, d_beta]: [&GpuViewMut<'_>; 2],
    score: Option<&GpuViewMut<'_>>,
    (dy, accumulate): (&GpuViewMut<'_>, bool),
) {
    let BackwardInputs { y, dz, of, tail } = inputs;
    let cut = Slabs::new(p, y);
    let (slab, slabs) = cut.sum;
    let tiles = cut.tiles.tiles;
    // Partial sums [slabs, 2, c], coefficients [4, c], scores [tiles·slabs].
    let address = y.gpu().workspace((slabs * 2 + 4) * p.c + tiles * slabs);
    let at = |floats: usize| address + (floats * size_of::<f32>()) as u64;
    let (partials, coefficients) = (Argument::from(address), Argument::from(at(slabs * 2 * p.c)));
    let scores = score.map_or(0, |_| at((slabs * 2 + 4) * p.c));
    let [gamma, beta, saved] = [of.gamma, of.beta, of.saved].map(Argument::from);
    let residual_gradient = d_residual.map_or(0u64.into(), |(d, _)| d.into());
    let flag = i32::from(d_residual.is_some_and(|d| d.1)).into();
    let sizes = cut.sizes(p, slab);
    // SAFETY: arguments as the kernels' header says; the workspace holds what was asked for.
    unsafe {
        let arguments: Vec<Argument> = [y.into(), dz.into(), gamma, beta, saved]
            .into_iter()
            .chain(tail.arguments())
            .chain([residual_gradient, flag, partials, scores.into()])
            .chain(sizes)
            .collect();
        y.gpu().launch(&cut.name("batch_norm_backward_sums", y), grid(tiles, slabs, 1), &arguments);
        if let Some(score) = score {
            add_scores(y.gpu(), scores, tiles * slabs, score);
        }
        let out = [d_gamma.into(), d_beta.into(), coefficients, sizes[0], int(slabs).into(), sizes[2]];
        let arguments: Vec<Argument> = [partials, gamma, beta, saved].into_iter().chain(out).collect();
        y.gpu().launch("batch_norm_backward_finish", grid(p.c.div_ceil(8), 1, 1), &arguments);
        let (slab, slabs) = cut.map;
        let arguments: Vec<Argument> = [y.into(), dz.into(), coefficients]
            .into_iter()
            .chain(tail.arguments())
            .chain([dy.into(), i32::from(accumulate).into()])
            .chain(cut.sizes(p, slab))
            .collect();
        y.gpu().launch(&cut.name("batch_norm_backward_apply", y), grid(tiles, slabs, 1), &arguments);
    }
}
