//! The gradient of a batch-norm and of what follows it: sums over the batch first, then dy for any range of elements.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::{Affine, AffineVectors, BatchNormProblem, Normalised};
use crate::device::float_mode::flush_subnormals;
use crate::device::{View, ViewMut};
use crate::ops::activation::Clamp;
use crate::ops::cuda;
use crate::ops::operation::require;
use crate::ops::parallel::{PartialSums, tiled, with_scratch};
use crate::ops::reused::Reused;
use crate::ops::shared::Shared;
use crate::ops::simd::MAX_LANES;
use crate::ops::simd::{derivative_vector, dispatch, excess_vector, load, store, vectorised};
use crate::ops::team::each_chunk;
use crate::ops::vector_source::{StoredReader, VectorReader, VectorSource};

/// Pixels that are summed in f32, about; their sums are added in f64.
pub(in crate::ops) const SUMMED_PIXELS: usize = 128;

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

    /// Writes the host's, from partial sums in their order.
    pub(in crate::ops) fn finish(self, parts: &PartialSums<f64>, statistics: View<'_>) {
        let (d_gamma, d_beta) = (self.d_gamma.host(), self.d_beta.host());
        let c = d_gamma.len();
        let (rstd, sums) = (&statistics.host()[c..], &mut self.sums.sums()[..2 * c]);
        sums.fill(0.0);
        let mut score_sum = 0.0;
        for part in parts.rows() {
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            score_sum += part[2 * c];
        }
        let (g, gy) = sums.split_at(c);
        for c in 0..c {
            d_beta[c] = d_beta_of(g[c]);
            d_gamma[c] = d_gamma_of(gy[c], rstd[c]);
        }
        if let Some(score) = self.score {
            score.host()[0] += score_sum as f32;
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

/// Numbers of the sums over some pixels: Σg and Σg·(y − μ) of each channel, and the score gradient, 0 where it was not asked for.
pub(in crate::ops) const fn gradient_sums_len(c: usize) -> usize {
    2 * c + 1
}

/// Forms g, the gradient in front of residual and activation, from dz, and sums it.
pub(in crate::ops) struct MaskedGradient<'a> {
    c: usize,
    affine: Affine,
    mean: &'a [f32],
    y: &'a [f32],
    residual: Option<&'a [f32]>,
    clamp: Option<Clamp>,
    score: bool,
}

impl<'a> MaskedGradient<'a> {
    /// `score` asks for the activation's score gradient too.
    pub fn new(of: &Normalised<'a>, score: bool) -> Self {
        let c = of.gamma.len();
        let mean = &of.statistics.host()[..c];
        // An activation whose slope is 1 is the identity: g is dz.
        let clamp = of.act.map(|act| act.clamp).filter(|clamp| score || clamp.slope != 1.0);
        let residual = of.residual.map(View::host);
        Self { c, affine: of.affine(), mean, y: of.y.host(), residual, clamp, score }
    }

    /// Adds the sums over a range of whole pixels to a row of [`gradient_sums_len`] numbers; `d_residual` is that range of the
    /// residual's gradient, and whether to add.
    ///
    /// Some pixels ([`SUMMED_PIXELS`]) are summed in f32 and their sums in f64.
    pub fn add_sums(&self, range: Range<usize>, dz: &[f32], d_residual: Option<(&mut [f32], bool)>, total: &mut [f64]) {
        dispatch(PixelSums { of: self, range, dz, d_residual, total });
    }

    /// Reads some channels, at most as many as a vector has.
    #[inline(always)]
    pub fn reader<S: Simd>(&self, simd: S, channels: Range<usize>) -> MaskedReader<'_, S> {
        MaskedReader {
            before: PreActivation::new(simd, (self.y, self.residual), &self.affine, channels.clone()),
            mean: load(simd, &self.mean[channels]),
            clamp: self.clamp,
            score: self.score,
        }
    }
}

/// Some channels of v = a·y + b + residual, which an activation takes.
struct PreActivation<'a, S: Simd> {
    y: StoredReader<'a>,
    residual: Option<&'a [f32]>,
    affine: AffineVectors<S>,
}

impl<'a, S: Simd> PreActivation<'a, S> {
    #[inline(always)]
    fn new(simd: S, (y, residual): (&'a [f32], Option<&'a [f32]>), affine: &Affine, channels: Range<usize>) -> Self {
        Self { y: StoredReader::new(y, channels.len()), residual, affine: affine.vectors(simd, channels) }
    }

    /// v, from the vector of y at the same element.
    #[inline(always)]
    fn value(&self, simd: S, at: usize, y: S::f32s) -> S::f32s {
        let value = self.affine.apply(simd, y);
        match self.residual {
            Some(residual) => simd.add_f32s(value, load(simd, &residual[at..at + self.y.channels()])),
            None => value,
        }
    }
}

/// Some channels of a masked gradient.
pub(in crate::ops) struct MaskedReader<'a, S: Simd> {
    before: PreActivation<'a, S>,
    mean: S::f32s,
    clamp: Option<Clamp>,
    score: bool,
}

impl<S: Simd> MaskedReader<'_, S> {
    /// Adds the share of a vector of dz, that of the element `at` on, to the sums of its pixels. Returns g.
    #[inline(always)]
    pub fn add(&self, simd: S, at: usize, dz: S::f32s, sums: &mut SumVectors<S>) -> S::f32s {
        let y = self.before.y.vector(simd, at);
        let mut g = dz;
        if let Some(clamp) = self.clamp {
            let value = self.before.value(simd, at, y);
            g = derivative_vector(simd, clamp, value, dz);
            if self.score {
                sums.score = simd.mul_add_e_f32s(dz, excess_vector(simd, clamp, value), sums.score);
            }
        }
        sums.g = simd.add_f32s(sums.g, g);
        sums.gy = simd.mul_add_e_f32s(g, simd.sub_f32s(y, self.mean), sums.gy);
        g
    }
}

/// Sums over a range of pixels, a vector of channels at a time.
struct PixelSums<'a, 'b> {
    of: &'a MaskedGradient<'b>,
    range: Range<usize>,
    dz: &'a [f32],
    d_residual: Option<(&'a mut [f32], bool)>,
    total: &'a mut [f64],
}

impl WithSimd for PixelSums<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { of, range, dz, mut d_residual, total } = self;
        let c = of.c;
        for first in (0..c).step_by(S::F32_LANES) {
            let channels = first..(first + S::F32_LANES).min(c);
            let reader = of.reader(simd, channels.clone());
            for start in (0..range.len()).step_by(SUMMED_PIXELS * c) {
                let mut sums = SumVectors::new(simd);
                let mut at = start + first;
                while at < (start + SUMMED_PIXELS * c).min(range.len()) {
                    let dz = load(simd, &dz[at..at + channels.len()]);
                    let g = reader.add(simd, range.start + at, dz, &mut sums);
                    if let Some((d, accumulate)) = &mut d_residual {
                        let d = &mut d[at..at + channels.len()];
                        let sum = if *accumulate { simd.add_f32s(load(simd, d), g) } else { g };
                        store(simd, d, sum);
                    }
                    at += c;
                }
                sums.add_to(simd, channels.clone(), total);
            }
        }
    }
}

/// Sums over some pixels, for some channels.
pub(in crate::ops) struct SumVectors<S: Simd> {
    g: S::f32s,
    gy: S::f32s,
    score: S::f32s,
}

impl<S: Simd> SumVectors<S> {
    /// Of nothing yet.
    #[inline(always)]
    pub fn new(simd: S) -> Self {
        let zero = simd.splat_f32s(0.0);
        Self { g: zero, gy: zero, score: zero }
    }

    /// Adds them to a row of [`gradient_sums_len`] numbers, in f64.
    #[inline(always)]
    pub fn add_to(self, simd: S, channels: Range<usize>, total: &mut [f64]) {
        let c = total.len() / 2;
        add_lanes(simd, self.g, &mut total[channels.clone()]);
        add_lanes(simd, self.gy, &mut total[c + channels.start..c + channels.end]);
        let mut score = [0.0; MAX_LANES];
        add_lanes(simd, self.score, &mut score[..channels.len()]);
        total[2 * c] += score.iter().sum::<f64>();
    }
}

/// Adds a vector to as many sums as there are.
#[inline(always)]
fn add_lanes<S: Simd>(simd: S, vector: S::f32s, to: &mut [f64]) {
    let mut lanes = [0.0; MAX_LANES];
    store(simd, &mut lanes[..S::F32_LANES], vector);
    for i in 0..to.len() {
        to[i] += f64::from(lanes[i]);
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
    let gradient = MaskedGradient::new(of, out.score.is_some());
    let (chunks, dz) = (p.chunks(), dz.host());
    let accumulate = d_residual.as_ref().is_some_and(|d| d.1);
    let d = d_residual.map(|(d, _)| Shared::new(d.host()));
    let partials = PartialSums::taken(chunks.count(), gradient_sums_len(c), 1, |index, row| {
        let range = chunks.range(index);
        // SAFETY: chunks share no element.
        let d = d.map(|d| (unsafe { d.range(range.clone()).slice() }, accumulate));
        gradient.add_sums(range.clone(), &dz[range], d, row);
    });
    out.finish(&partials, of.statistics);
}

/// Forms dy for any range of elements, once the sums over the batch are known.
pub(in crate::ops) struct DyLoader<'a> {
    affine: Affine,
    /// dy = a·g + slope·y + offset per channel, tiled.
    slope: Reused<f32>,
    offset: Reused<f32>,
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
        let slope = tiled(channels, |c| -affine.a[c] * rstd[c] * d_gamma_of(gy[c], rstd[c]) / pixels);
        let offset = tiled(channels, |c| -affine.a[c] * d_beta_of(g[c]) / pixels - slope[c] * mean[c]);
        let (residual, clamp) = (of.residual.map(View::host), of.act.map(|act| act.clamp));
        Self { affine, slope, offset, y: of.y.host(), dz: dz.host(), residual, clamp }
    }

    /// What of memory [`load`](Self::load) reads for a range; a residual is not among it.
    pub fn reads(&self, range: Range<usize>) -> [&[f32]; 2] {
        [&self.y[range.clone()], &self.dz[range]]
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

/// Some channels of dy.
pub(in crate::ops) struct DyReader<'a, S: Simd> {
    before: PreActivation<'a, S>,
    dz: StoredReader<'a>,
    slope: S::f32s,
    offset: S::f32s,
    clamp: Option<Clamp>,
}

impl VectorSource for DyLoader<'_> {
    type Reader<'a, S: Simd>
        = DyReader<'a, S>
    where
        Self: 'a;

    #[inline(always)]
    fn reader<S: Simd>(&self, simd: S, channels: Range<usize>) -> DyReader<'_, S> {
        let clamp = match self.clamp {
            Some(clamp) if clamp.slope != 1.0 => Some(clamp),
            _ => None,
        };
        DyReader {
            before: PreActivation::new(simd, (self.y, self.residual), &self.affine, channels.clone()),
            dz: StoredReader::new(self.dz, channels.len()),
            slope: load(simd, &self.slope[channels.clone()]),
            offset: load(simd, &self.offset[channels]),
            clamp,
        }
    }
}

impl<S: Simd> VectorReader<S> for DyReader<'_, S> {
    #[inline(always)]
    fn vector(&self, simd: S, at: usize) -> S::f32s {
        let (y, mut g) = (self.before.y.vector(simd, at), self.dz.vector(simd, at));
        if let Some(clamp) = self.clamp {
            g = derivative_vector(simd, clamp, self.before.value(simd, at, y), g);
        }
        simd.mul_add_e_f32s(self.before.affine.a, g, simd.mul_add_e_f32s(self.slope, y, self.offset))
    }

    #[inline(always)]
    fn prefetch(&self, at: usize) {
        VectorReader::<S>::prefetch(&self.before.y, at);
        VectorReader::<S>::prefetch(&self.dz, at);
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
    each_chunk(dy.host(), chunks.chunk_len(), |index, dy| {
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
