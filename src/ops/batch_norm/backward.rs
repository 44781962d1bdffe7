//! The gradient of a batch-norm and of what follows it: sums over the batch first, then dy for any range of elements.

use std::ops::Range;

use rayon::prelude::*;

use super::{Affine, BatchNormProblem, Normalised, affine_rows};
use crate::device::float_mode::flush_subnormals;
use crate::device::{View, ViewMut};
use crate::ops::activation::{Clamp, excess_dot};
use crate::ops::cuda;
use crate::ops::operation::require;
use crate::ops::parallel::{fold_tile, tiled, with_scratch};
use crate::ops::simd::vectorised;

/// Where the sums over a batch go, and what they give at once.
#[derive(Debug)]
pub struct SumsOut<'a> {
    /// What [`gradient`] takes of them: on the host Σg and Σg·(y − μ) `[2·c]` in f64, where g is the gradient in front of
    /// residual and activation; on a GPU the coefficients of dy `[4·c]`.
    pub sums: ViewMut<'a>,
    /// Gradient of γ `[c]`.
    pub d_gamma: ViewMut<'a>,
    /// Gradient of β `[c]`.
    pub d_beta: ViewMut<'a>,
    /// The activation's score gradient `[1]`, to which ⟨dz, v − φ(v)⟩ is added.
    pub score: Option<ViewMut<'a>>,
}

impl<'a> SumsOut<'a> {
    /// A GPU's.
    pub(in crate::ops) fn gpu(self) -> cuda::batch_norm::GpuSumsOut<'a> {
        cuda::batch_norm::GpuSumsOut {
            coefficients: self.sums.gpu(),
            d_gamma: self.d_gamma.gpu(),
            d_beta: self.d_beta.gpu(),
            score: self.score.map(ViewMut::gpu),
        }
    }

    /// Writes the host's.
    pub(in crate::ops) fn finish(self, sums: &GradientSums, statistics: View<'_>) {
        let c = sums.g.len();
        let rstd = &statistics.host()[c..];
        let (out_g, out_gy) = self.sums.sums().split_at_mut(c);
        out_g.copy_from_slice(&sums.g);
        out_gy.copy_from_slice(&sums.gy);
        let (d_gamma, d_beta) = (self.d_gamma.host(), self.d_beta.host());
        for c in 0..c {
            d_beta[c] = d_beta_of(sums.g[c]);
            d_gamma[c] = d_gamma_of(sums.gy[c], rstd[c]);
        }
        if let Some(score) = self.score {
            score.host()[0] += sums.score as f32;
        }
    }
}

/// dβ = Σg.
fn d_beta_of(sum: f64) -> f32 {
    sum as f32
}

/// dγ = Σg·ŷ.
fn d_gamma_of(sum: f64, rstd: f32) -> f32 {
    (sum * f64::from(rstd)) as f32
}

/// Sums over some pixels: Σg and Σg·(y − μ) per channel, and the score gradient.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::ops) struct GradientSums {
    g: Vec<f64>,
    gy: Vec<f64>,
    /// 0 where it was not asked for.
    score: f64,
}

impl GradientSums {
    /// Adds partial sums in their order.
    pub fn total(c: usize, parts: impl IntoIterator<Item = Self>) -> Self {
        let mut total = Self { g: vec![0.0; c], gy: vec![0.0; c], score: 0.0 };
        for part in parts {
            total.g.iter_mut().zip(&part.g).for_each(|(t, p)| *t += p);
            total.gy.iter_mut().zip(&part.gy).for_each(|(t, p)| *t += p);
            total.score += part.score;
        }
        total
    }
}

/// Forms g, the gradient in front of residual and activation, from dz, and sums it.
pub(in crate::ops) struct MaskedGradient<'a> {
    c: usize,
    line_len: usize,
    affine: Affine,
    mean: Vec<f32>,
    y: &'a [f32],
    residual: Option<&'a [f32]>,
    clamp: Option<Clamp>,
    score: bool,
}

impl<'a> MaskedGradient<'a> {
    /// `w` is the pixels per line; `score` asks for the activation's score gradient too.
    pub fn new(w: usize, of: &Normalised<'a>, score: bool) -> Self {
        let c = of.gamma.len();
        let mean = tiled(&of.statistics.host()[..c]);
        // An activation whose slope is 1 is the identity: g is dz.
        let clamp = of.act.map(|act| act.clamp).filter(|clamp| score || clamp.slope != 1.0);
        let residual = of.residual.map(View::host);
        Self { c, line_len: w * c, affine: of.affine(), mean, y: of.y.host(), residual, clamp, score }
    }

    /// Sums over a range of whole lines; `d_residual` is that range of the residual's gradient, and whether to add.
    ///
    /// Lines are summed in f32 and their sums in f64, so that the result does not depend on how work is cut.
    pub fn sum(&self, range: Range<usize>, dz: &[f32], mut d_residual: Option<(&mut [f32], bool)>) -> GradientSums {
        let (c, tile) = (self.c, self.mean.len().min(self.line_len));
        let mut total = GradientSums { g: vec![0.0; c], gy: vec![0.0; c], score: 0.0 };
        let mut work = vec![0.0f32; 4 * tile];
        let (sums, buffers) = work.split_at_mut(2 * tile);
        let (sum_g, sum_gy) = sums.split_at_mut(tile);
        let (g, value) = buffers.split_at_mut(tile);
        vectorised(
            #[inline(always)]
            || {
                for line in range.clone().step_by(self.line_len) {
                    sum_g.fill(0.0);
                    sum_gy.fill(0.0);
                    for start in (line..line + self.line_len).step_by(tile) {
                        let n = tile.min(line + self.line_len - start);
                        let (g, value) = (&mut g[..n], &mut value[..n]);
                        let dz = &dz[start - range.start..][..n];
                        total.score += self.gradient(start..start + n, dz, g, value);
                        let (y, mean) = (&self.y[start..start + n], &self.mean[..n]);
                        let (sum_g, sum_gy) = (&mut sum_g[..n], &mut sum_gy[..n]);
                        for i in 0..n {
                            sum_g[i] += g[i];
                            sum_gy[i] += g[i] * (y[i] - mean[i]);
                        }
                        if let Some((d, accumulate)) = &mut d_residual {
                            let d = &mut d[start - range.start..][..n];
                            if *accumulate {
                                d.iter_mut().zip(g.iter()).for_each(|(d, g)| *d += g);
                            } else {
                                d.copy_from_slice(g);
                            }
                        }
                    }
                    fold_tile(sum_g, c);
                    fold_tile(sum_gy, c);
                    for i in 0..c {
                        total.g[i] += f64::from(sum_g[i]);
                        total.gy[i] += f64::from(sum_gy[i]);
                    }
                }
            },
        );
        total
    }

    /// g = dz·φ'(v) with v = a·y + b + residual, for a range of at most a tile. Returns its share of the score gradient.
    #[inline(always)]
    fn gradient(&self, range: Range<usize>, dz: &[f32], g: &mut [f32], value: &mut [f32]) -> f64 {
        let Some(clamp) = self.clamp else {
            g.copy_from_slice(dz);
            return 0.0;
        };
        affine_rows(&self.affine, &self.y[range.clone()], value, |v| v);
        if let Some(residual) = self.residual {
            value.iter_mut().zip(&residual[range]).for_each(|(v, r)| *v += r);
        }
        let n = g.len();
        let (values, gradients) = (&value[..n], &dz[..n]);
        for i in 0..n {
            g[i] = gradients[i] * clamp.derivative(values[i]);
        }
        if self.score { excess_dot(clamp, value, dz) } else { 0.0 }
    }
}

/// The sums over a batch that the gradient of y needs, with dγ, dβ and the score gradient; writes or adds the residual's
/// gradient where there is one.
pub fn gradient_sums(
    p: &BatchNormProblem,
    of: &Normalised<'_>,
    dz: View<'_>,
    d_residual: Option<(ViewMut<'_>, bool)>,
    out: SumsOut<'_>,
) {
    of.check(p);
    let (c, len) = (p.shape.c, p.shape.len());
    let d_len = d_residual.as_ref().map_or(len, |(d, _)| d.len());
    require("a batch-norm's gradient", [("dz", dz.len(), len), ("the residual's gradient", d_len, len)]);
    require("a batch-norm's gradient", [("dgamma", out.d_gamma.len(), c), ("dbeta", out.d_beta.len(), c)]);
    if let View::Gpu(dz) = dz {
        let d_residual = d_residual.map(|(d, accumulate)| (d.gpu(), accumulate));
        let d_residual = d_residual.as_ref().map(|(d, accumulate)| (d, *accumulate));
        return cuda::batch_norm::backward_sums(p, &of.gpu(), dz, d_residual, &out.gpu());
    }
    let gradient = MaskedGradient::new(p.shape.w, of, out.score.is_some());
    let (chunks, dz) = (p.chunks(), dz.host());
    let accumulate = d_residual.as_ref().is_some_and(|d| d.1);
    let parts: Vec<Option<&mut [f32]>> = match d_residual {
        Some((d, _)) => d.host().chunks_mut(chunks.chunk_len()).map(Some).collect(),
        None => (0..chunks.count()).map(|_| None).collect(),
    };
    let partials: Vec<GradientSums> = parts
        .into_par_iter()
        .enumerate()
        .map(|(index, d)| {
            let range = chunks.range(index);
            gradient.sum(range.clone(), &dz[range], d.map(|d| (d, accumulate)))
        })
        .collect();
    out.finish(&GradientSums::total(p.shape.c, partials), of.statistics);
}

/// Forms dy for any range of elements, once the sums over the batch are known.
pub(in crate::ops) struct DyLoader<'a> {
    affine: Affine,
    /// dy = a·g + slope·y + offset per channel, tiled.
    slope: Vec<f32>,
    offset: Vec<f32>,
    y: &'a [f32],
    dz: &'a [f32],
    residual: Option<&'a [f32]>,
    clamp: Option<Clamp>,
}

impl<'a> DyLoader<'a> {
    /// Takes Σg and Σg·(y − μ) `[2·c]`.
    pub fn new(p: &BatchNormProblem, of: &Normalised<'a>, dz: View<'a>, sums: &[f64]) -> Self {
        of.check(p);
        let channels = p.shape.c;
        let affine = of.affine();
        let (mean, rstd) = of.statistics.host().split_at(channels);
        let (g, gy) = sums.split_at(channels);
        let pixels = p.shape.pixels() as f32;
        let (mut slope, mut offset) = (vec![0.0; channels], vec![0.0; channels]);
        for c in 0..channels {
            let a = affine.a[c];
            slope[c] = -a * rstd[c] * d_gamma_of(gy[c], rstd[c]) / pixels;
            offset[c] = -a * d_beta_of(g[c]) / pixels - slope[c] * mean[c];
        }
        let (slope, offset) = (tiled(&slope), tiled(&offset));
        let (residual, clamp) = (of.residual.map(View::host), of.act.map(|act| act.clamp));
        Self { affine, slope, offset, y: of.y.host(), dz: dz.host(), residual, clamp }
    }

    /// Writes dy for a range of whole pixels.
    pub fn load(&self, range: Range<usize>, dy: &mut [f32]) {
        vectorised(
            #[inline(always)]
            || {
                let dz = &self.dz[range.clone()];
                let y = &self.y[range.clone()];
                match (self.clamp.filter(|clamp| clamp.slope != 1.0), self.residual.map(|r| &r[range])) {
                    (None, _) => self.rows(dz, y, dy, |dz, _, _| dz),
                    (Some(clamp), None) => self.rows(dz, y, dy, |dz, v, _| dz * clamp.derivative(v)),
                    (Some(clamp), Some(residual)) => {
                        dy.copy_from_slice(residual);
                        self.rows(dz, y, dy, |dz, v, r| dz * clamp.derivative(v + r));
                    }
                }
            },
        );
    }

    /// dy = a·g(dz, a·y + b, old dy) + slope·y + offset.
    #[inline(always)]
    fn rows(&self, dz: &[f32], y: &[f32], dy: &mut [f32], g: impl Fn(f32, f32, f32) -> f32) {
        let tile = self.affine.a.len();
        for ((dy, dz), y) in dy.chunks_mut(tile).zip(dz.chunks(tile)).zip(y.chunks(tile)) {
            let n = dy.len();
            let (dz, y, a, b) = (&dz[..n], &y[..n], &self.affine.a[..n], &self.affine.b[..n]);
            let (slope, offset) = (&self.slope[..n], &self.offset[..n]);
            for i in 0..n {
                dy[i] = a[i] * g(dz[i], a[i] * y[i] + b[i], dy[i]) + slope[i] * y[i] + offset[i];
            }
        }
    }
}

/// dy (+)= the gradient of y, from the sums that [`gradient_sums`] wrote.
pub fn gradient(
    p: &BatchNormProblem,
    of: &Normalised<'_>,
    dz: View<'_>,
    sums: View<'_>,
    dy: ViewMut<'_>,
    accumulate: bool,
) {
    of.check(p);
    require("a batch-norm's gradient", [("dz", dz.len(), p.shape.len()), ("dy", dy.len(), p.shape.len())]);
    if let View::Gpu(dz) = dz {
        return cuda::batch_norm::backward_apply(p, &of.gpu(), dz, sums.gpu(), &dy.gpu(), accumulate);
    }
    let loader = DyLoader::new(p, of, dz, sums.sums());
    let chunks = p.chunks();
    dy.host().par_chunks_mut(chunks.chunk_len()).enumerate().for_each(|(index, dy)| {
        if !accumulate {
            loader.load(chunks.range(index), dy);
            return;
        }
        with_scratch(dy.len(), |scratch| {
            loader.load(chunks.range(index), scratch);
            flush_subnormals(|| dy.iter_mut().zip(scratch.iter()).for_each(|(dy, s)| *dy += s));
        });
    });
}
