//! Statistics of a batch, and the normalised value.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::{BatchNormProblem, Normalised, SUMMED_PIXELS};
use crate::device::{View, ViewMut};
use crate::ops::cuda;
use crate::ops::operation::require;
use crate::ops::parallel::{PartialSums, tiled};
use crate::ops::reused::Reused;
use crate::ops::simd::{dispatch, load, store, unrolled, vectorised};
use crate::ops::team::each_chunk;

/// Where the statistics of a batch go.
#[derive(Debug)]
pub struct StatisticsOut<'a> {
    /// μ and 1/√(σ² + ε) of this batch `[2·c]`.
    pub statistics: ViewMut<'a>,
    /// Running mean and variance `[c]`, which are updated.
    pub running: [ViewMut<'a>; 2],
}

impl<'a> StatisticsOut<'a> {
    /// A GPU's.
    pub(in crate::ops) fn gpu(self, p: &BatchNormProblem) -> cuda::batch_norm::GpuStatisticsOut<'a> {
        self.check(p.shape.c);
        let (statistics, running) = (self.statistics.gpu(), self.running.map(ViewMut::gpu));
        cuda::batch_norm::GpuStatisticsOut { statistics, running }
    }

    fn check(&self, c: usize) {
        let [mean, var] = [0, 1].map(|i| self.running[i].len());
        let lens =
            [("the statistics", self.statistics.len(), 2 * c), ("running mean", mean, c), ("running variance", var, c)];
        require("a batch-norm", lens);
    }
}

/// Numbers of the moments of a chunk: mean and centred second moment of each channel, and how many pixels they are of.
pub(in crate::ops) const fn moments_len(c: usize) -> usize {
    2 * c + 1
}

/// The moments of a chunk of `c` channels, in one pass. Sums are taken about its first pixel, so that a large mean costs no digits.
pub(in crate::ops) fn moments(y: &[f32], c: usize, moments: &mut [f32]) {
    let pixels = (y.len() / c) as f32;
    let (mean, squares) = moments.split_at_mut(c);
    let (squares, count) = squares.split_at_mut(c);
    dispatch(ShiftedSums { y, mean, squares });
    for channel in 0..c {
        let sum = mean[channel];
        squares[channel] = (squares[channel] - sum * (sum / pixels)).max(0.0);
        mean[channel] = y[channel] + sum / pixels;
    }
    // No chunk has so many pixels that this would round their number.
    count[0] = pixels;
}

/// Σ (y − y₀) and Σ (y − y₀)² per channel, where y₀ is the first pixel.
struct ShiftedSums<'a> {
    y: &'a [f32],
    mean: &'a mut [f32],
    squares: &'a mut [f32],
}

impl WithSimd for ShiftedSums<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        /// Sums that are in registers at once, of vectors or of pixels: so many additions run side by side.
        const SUMS: usize = 4;
        let (c, lanes) = (self.mean.len(), S::F32_LANES);
        let mut channel = 0;
        while channel + SUMS * lanes <= c {
            self.add::<S, SUMS, 1>(simd, channel..channel + SUMS * lanes);
            channel += SUMS * lanes;
        }
        while channel < c {
            let end = (channel + lanes).min(c);
            self.add::<S, 1, SUMS>(simd, channel..end);
            channel = end;
        }
    }
}

impl ShiftedSums<'_> {
    /// `V` vectors of channels, the last of which may be part of one; `P` pixels side by side.
    #[inline(always)]
    fn add<S: Simd, const V: usize, const P: usize>(&mut self, simd: S, channels: Range<usize>) {
        let (c, zero) = (self.mean.len(), simd.splat_f32s(0.0));
        let (mut shift, mut sums, mut squares) = ([zero; V], [zero; V], [zero; V]);
        let lane = |v: usize| {
            let start = channels.start + v * S::F32_LANES;
            start..(start + S::F32_LANES).min(channels.end)
        };
        unrolled!(I < V, shift[I] = load(simd, &self.y[lane(I)]), 0 1 2 3);
        // Sums of sums: a long chain of additions would lose digits.
        for y in self.y.chunks(SUMMED_PIXELS * c) {
            let (mut part, mut part_squares) = ([[zero; V]; P], [[zero; V]; P]);
            for y in y.chunks(P * c) {
                unrolled!(Q < P, {
                    if let Some(y) = y.get(Q * c..(Q + 1) * c) {
                        unrolled!(I < V, {
                            let d = simd.sub_f32s(load(simd, &y[lane(I)]), shift[I]);
                            part[Q][I] = simd.add_f32s(part[Q][I], d);
                            part_squares[Q][I] = simd.mul_add_e_f32s(d, d, part_squares[Q][I]);
                        }, 0 1 2 3);
                    }
                }, 0 1 2 3);
            }
            unrolled!(Q < P, {
                unrolled!(I < V, {
                    sums[I] = simd.add_f32s(sums[I], part[Q][I]);
                    squares[I] = simd.add_f32s(squares[I], part_squares[Q][I]);
                }, 0 1 2 3);
            }, 0 1 2 3);
        }
        unrolled!(I < V, {
            store(simd, &mut self.mean[lane(I)], sums[I]);
            store(simd, &mut self.squares[lane(I)], squares[I]);
        }, 0 1 2 3);
    }
}

/// Merges the chunks' moments in order; writes μ and 1/√(σ² + ε) and updates the running statistics.
pub(in crate::ops) fn finish_statistics(p: &BatchNormProblem, chunks: &PartialSums<f32>, out: StatisticsOut<'_>) {
    let c = p.shape.c;
    out.check(c);
    let (saved_mean, saved_rstd) = out.statistics.host().split_at_mut(c);
    let [running_mean, running_var] = out.running.map(ViewMut::host);
    let pixels = p.shape.pixels() as f64;
    let (mut count, mut means, mut squares) = (0.0f64, Reused::<f64>::zeros(c), Reused::<f64>::zeros(c));
    vectorised(
        #[inline(always)]
        || {
            for chunk in chunks.rows() {
                let n = f64::from(chunk[2 * c]);
                let total = count + n;
                let (share, weight) = (n / total, count * n / total);
                let (mean, m2) = chunk[..2 * c].split_at(c);
                let (means, squares) = (&mut means[..c], &mut squares[..c]);
                for i in 0..c {
                    let delta = f64::from(mean[i]) - means[i];
                    means[i] += delta * share;
                    squares[i] += f64::from(m2[i]) + delta * delta * weight;
                }
                count = total;
            }
        },
    );
    let momentum = f64::from(p.momentum);
    for channel in 0..c {
        let (mean, m2) = (means[channel], squares[channel]);
        let unbiased = m2 / (pixels - 1.0).max(1.0);
        running_mean[channel] = ((1.0 - momentum) * f64::from(running_mean[channel]) + momentum * mean) as f32;
        running_var[channel] = ((1.0 - momentum) * f64::from(running_var[channel]) + momentum * unbiased) as f32;
        saved_mean[channel] = mean as f32;
        saved_rstd[channel] = (1.0 / (m2 / pixels + f64::from(p.eps)).sqrt()) as f32;
    }
}

/// Statistics of a batch `y` `[lines, w, c]`.
pub fn statistics(p: &BatchNormProblem, y: View<'_>, out: StatisticsOut<'_>) {
    require("a batch-norm", [("y", y.len(), p.shape.len())]);
    if let View::Gpu(y) = y {
        return cuda::batch_norm::statistics(p, y, &out.gpu(p));
    }
    let (y, chunks) = (y.host(), p.chunks());
    let of_chunk = |chunk, row: &mut [f32]| moments(&y[chunks.range(chunk)], p.shape.c, row);
    finish_statistics(p, &PartialSums::taken(chunks.count(), moments_len(p.shape.c), 1, of_chunk), out);
}

/// μ and 1/√(σ² + ε) `[2·c]` from the running mean and variance `[c]`, for inference.
pub fn running_statistics(p: &BatchNormProblem, mean: View<'_>, var: View<'_>, out: ViewMut<'_>) {
    let c = p.shape.c;
    let lens = [("running mean", mean.len(), c), ("running variance", var.len(), c), ("statistics", out.len(), 2 * c)];
    require("a batch-norm", lens);
    if let View::Gpu(mean) = mean {
        return cuda::batch_norm::running_statistics(p, mean, var.gpu(), &out.gpu());
    }
    let (out_mean, out_rstd) = out.host().split_at_mut(c);
    out_mean.copy_from_slice(mean.host());
    out_rstd.iter_mut().zip(var.host()).for_each(|(out, var)| *out = 1.0 / (var + p.eps).sqrt());
}

/// z = φ(γ·ŷ + β + residual).
pub fn normalise(p: &BatchNormProblem, of: &Normalised<'_>, z: ViewMut<'_>) {
    of.check(p);
    require("a batch-norm", [("z", z.len(), p.shape.len())]);
    if let View::Gpu(_) = of.y {
        return cuda::batch_norm::normalise(p, &of.gpu(), &z.gpu());
    }
    let chunks = p.chunks();
    let affine = of.affine();
    let (y, residual, clamp) = (of.y.host(), of.residual.map(View::host), of.act.map(|act| act.clamp));
    each_chunk(z.host(), chunks.chunk_len(), |index, z| {
        let range = chunks.range(index);
        vectorised(
            #[inline(always)]
            || {
                let y = &y[range.clone()];
                match (residual.map(|r| &r[range]), clamp) {
                    (None, None) => affine_rows(&affine, y, z, |v| v),
                    (None, Some(clamp)) => affine_rows(&affine, y, z, |v| clamp.apply(v)),
                    (Some(residual), clamp) => {
                        affine_rows(&affine, y, z, |v| v);
                        match clamp {
                            None => z.iter_mut().zip(residual).for_each(|(z, r)| *z += r),
                            Some(clamp) => z.iter_mut().zip(residual).for_each(|(z, r)| *z = clamp.apply(*z + r)),
                        }
                    }
                }
            },
        );
    });
}

impl<'a> Normalised<'a> {
    /// Every operand has the problem's size.
    pub(in crate::ops) fn check(&self, p: &BatchNormProblem) {
        let (c, len) = (p.shape.c, p.shape.len());
        require(
            "a batch-norm",
            [("y", self.y.len(), len), ("gamma", self.gamma.len(), c), ("beta", self.beta.len(), c)],
        );
        let residual = self.residual.map_or(len, |residual| residual.len());
        require("a batch-norm", [("statistics", self.statistics.len(), 2 * c), ("the residual", residual, len)]);
    }

    /// The host's coefficients.
    pub(in crate::ops) fn affine(&self) -> Affine {
        Affine::new(self.gamma.host(), self.beta.host(), self.statistics.host())
    }

    /// The same on a GPU.
    pub(in crate::ops) fn gpu(&self) -> cuda::batch_norm::GpuNormalised<'a> {
        cuda::batch_norm::GpuNormalised {
            y: self.y.gpu(),
            gamma: self.gamma.gpu(),
            beta: self.beta.gpu(),
            statistics: self.statistics.gpu(),
            residual: self.residual.map(View::gpu),
            act: self.act,
        }
    }
}

/// z = a·y + b per channel; the coefficients are tiled.
pub(in crate::ops) struct Affine {
    pub(super) a: Reused<f32>,
    pub(super) b: Reused<f32>,
}

impl Affine {
    fn new(gamma: &[f32], beta: &[f32], saved: &[f32]) -> Self {
        let (mean, rstd) = saved.split_at(gamma.len());
        let a = tiled(gamma.len(), |c| gamma[c] * rstd[c]);
        let b = tiled(gamma.len(), |c| beta[c] - a[c] * mean[c]);
        Self { a, b }
    }
}

/// The coefficients of some channels.
pub(in crate::ops) struct AffineVectors<S: Simd> {
    pub(super) a: S::f32s,
    pub(super) b: S::f32s,
}

impl<S: Simd> Clone for AffineVectors<S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S: Simd> Copy for AffineVectors<S> {}

impl<S: Simd> AffineVectors<S> {
    /// a·y + b, to the bit as [`affine_rows`]: whoever forms a value anew sees it on the same side of an activation's bounds.
    #[inline(always)]
    pub fn apply(&self, simd: S, y: S::f32s) -> S::f32s {
        simd.add_f32s(simd.mul_f32s(self.a, y), self.b)
    }
}

impl Affine {
    /// Those of at most as many channels as a vector has.
    #[inline(always)]
    pub fn vectors<S: Simd>(&self, simd: S, channels: Range<usize>) -> AffineVectors<S> {
        AffineVectors { a: load(simd, &self.a[channels.clone()]), b: load(simd, &self.b[channels]) }
    }
}

/// z = f(a·y + b).
#[inline(always)]
pub(in crate::ops) fn affine_rows(affine: &Affine, y: &[f32], z: &mut [f32], f: impl Fn(f32) -> f32) {
    let tile = affine.a.len();
    for (z, y) in z.chunks_mut(tile).zip(y.chunks(tile)) {
        let n = z.len();
        let (y, a, b) = (&y[..n], &affine.a[..n], &affine.b[..n]);
        for i in 0..n {
            z[i] = f(a[i] * y[i] + b[i]);
        }
    }
}
