//! `batch_norm.cu`.

use super::activation::add_scores;
use super::{Tiles, grid, int, long};
use crate::device::driver::Argument;
use crate::device::gpu::{GpuView, GpuViewMut};
use crate::ops::activation::{Act, Clamp};
use crate::ops::batch_norm::BatchNormProblem;

/// A value that is normalised, and what follows; as [`crate::ops::batch_norm::Normalised`].
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Normalised<'a> {
    pub y: GpuView<'a>,
    pub gamma: GpuView<'a>,
    pub beta: GpuView<'a>,
    pub statistics: GpuView<'a>,
    pub residual: Option<GpuView<'a>>,
    pub act: Option<Act<'a>>,
}

impl Normalised<'_> {
    /// Residual, limit, slope and where it lies.
    fn tail(&self) -> [Argument; 4] {
        let [limit, slope, slope_at] = self.act.unwrap_or(Clamp::NONE.into()).arguments();
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
        let pixels = p.shape.pixels();
        let (vector, tiles) = Tiles::of(y.dtype(), p.shape.c);
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
        [long(p.shape.pixels()).into(), int(slab).into(), int(p.shape.c).into(), int(self.tiles.lanes).into()]
    }
}

/// Statistics of the batch into `saved`, and the running ones.
pub fn statistics(p: &BatchNormProblem, y: GpuView<'_>, [mean, var]: [&GpuViewMut<'_>; 2], saved: &GpuViewMut<'_>) {
    let cut = Slabs::new(p, y);
    let (slab, slabs) = cut.sum;
    let partials = Argument::from(y.gpu().workspace(slabs * 2 * p.shape.c));
    let [pixels, slab, c, lanes] = cut.sizes(p, slab);
    // SAFETY: arguments as the kernel's header says; the workspace holds all partial sums.
    unsafe {
        let name = cut.name("batch_norm_statistics", y);
        y.gpu().launch(&name, grid(cut.tiles.tiles, slabs, 1), &[y.into(), partials, pixels, slab, c, lanes]);
        let out = [mean.into(), var.into(), saved.into(), p.eps.into(), p.momentum.into()];
        let arguments = [partials, out[0], out[1], out[2], out[3], out[4], pixels, slab, int(slabs).into(), c];
        y.gpu().launch("batch_norm_statistics_finish", grid(p.shape.c.div_ceil(8), 1, 1), &arguments);
    }
}

/// `out` from the running statistics, for inference.
pub fn running_statistics(p: &BatchNormProblem, [mean, var]: [GpuView<'_>; 2], out: &GpuViewMut<'_>) {
    let arguments = [mean.into(), var.into(), out.into(), p.eps.into(), int(p.shape.c).into()];
    // SAFETY: the caller has checked that `out` has room for 2·c floats.
    unsafe { mean.gpu().launch("batch_norm_running_statistics", grid(p.shape.c.div_ceil(256), 1, 1), &arguments) }
}

/// z = φ(γ·ŷ + β + residual).
pub fn normalise(p: &BatchNormProblem, of: &Normalised<'_>, z: &GpuViewMut<'_>) {
    let cut = Slabs::new(p, of.y);
    let (slab, slabs) = cut.map;
    let head = [of.y, of.gamma, of.beta, of.statistics].map(Argument::from);
    let arguments: Vec<Argument> =
        head.into_iter().chain(of.tail()).chain([z.into()]).chain(cut.sizes(p, slab)).collect();
    // SAFETY: arguments as the kernel's header says.
    unsafe { of.y.gpu().launch(&cut.name("batch_norm_normalise", of.y), grid(cut.tiles.tiles, slabs, 1), &arguments) }
}

/// Where the first half of the backward pass writes.
#[derive(Debug)]
pub struct SumsOut<'a> {
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
    of: &Normalised<'_>,
    dz: GpuView<'_>,
    d_residual: Option<(&GpuViewMut<'_>, bool)>,
    out: &SumsOut<'_>,
) {
    let (y, c) = (of.y, p.shape.c);
    let cut = Slabs::new(p, y);
    let (slab, slabs) = cut.sum;
    let tiles = cut.tiles.tiles;
    // Partial sums [slabs, 2, c], scores [tiles·slabs].
    let address = y.gpu().workspace(slabs * 2 * c + tiles * slabs);
    let partials = Argument::from(address);
    let scores = out.score.as_ref().map_or(0, |_| address + (slabs * 2 * c * size_of::<f32>()) as u64);
    let [gamma, beta, saved] = [of.gamma, of.beta, of.statistics].map(Argument::from);
    let residual_gradient = d_residual.map_or(0u64.into(), |(d, _)| d.into());
    let flag = i32::from(d_residual.is_some_and(|d| d.1)).into();
    let sizes = cut.sizes(p, slab);
    // SAFETY: arguments as the kernels' header says; the workspace holds what was asked for.
    unsafe {
        let arguments: Vec<Argument> = [y.into(), dz.into(), gamma, beta, saved]
            .into_iter()
            .chain(of.tail())
            .chain([residual_gradient, flag, partials, scores.into()])
            .chain(sizes)
            .collect();
        y.gpu().launch(&cut.name("batch_norm_backward_sums", y), grid(tiles, slabs, 1), &arguments);
        if let Some(score) = &out.score {
            add_scores(y.gpu(), scores, tiles * slabs, score);
        }
        let written = [(&out.d_gamma).into(), (&out.d_beta).into(), (&out.coefficients).into()];
        let arguments: Vec<Argument> = [partials, gamma, beta, saved]
            .into_iter()
            .chain(written)
            .chain([sizes[0], int(slabs).into(), sizes[2]])
            .collect();
        y.gpu().launch("batch_norm_backward_finish", grid(c.div_ceil(8), 1, 1), &arguments);
    }
}

/// The second half: dy (+)= from the coefficients.
pub fn backward_apply(
    p: &BatchNormProblem,
    of: &Normalised<'_>,
    dz: GpuView<'_>,
    coefficients: GpuView<'_>,
    (dy, accumulate): (&GpuViewMut<'_>, bool),
) {
    let cut = Slabs::new(p, of.y);
    let (slab, slabs) = cut.map;
    let arguments: Vec<Argument> = [of.y.into(), dz.into(), coefficients.into()]
        .into_iter()
        .chain(of.tail())
        .chain([dy.into(), i32::from(accumulate).into()])
        .chain(cut.sizes(p, slab))
        .collect();
    let name = cut.name("batch_norm_backward_apply", of.y);
    // SAFETY: arguments as the kernel's header says.
    unsafe { of.y.gpu().launch(&name, grid(cut.tiles.tiles, slabs, 1), &arguments) }
}
