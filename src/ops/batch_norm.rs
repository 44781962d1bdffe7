//! Batch normalisation over images and pixels, and the fused normalise + residual + activation around it.
//!
//! Training: ŷ = (y − μ)/√(σ² + ε) with the batch's μ and biased σ², z = φ(γ·ŷ + β + residual); the running variance is
//! the unbiased one (as PyTorch). Statistics are means and centred second moments per chunk, merged in chunk order
//! with Chan's formula in f64, so they do not lose the variance of a large mean and do not depend on threads.

use std::ops::Range;

use rayon::prelude::*;

use super::activation::{Clamp, excess_dot};
use super::cuda;
use super::parallel::{Chunks, fold_tile, tile_len, tiled, with_scratch};
use super::simd::vectorised;
use crate::device::gpu::GpuView;
use crate::device::{View, ViewMut};

/// Constants of one batch-norm over one batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BatchNormProblem {
    /// Lines (images · rows), pixels per line, channels.
    pub lines: usize,
    /// Pixels per line.
    pub w: usize,
    /// Channels.
    pub c: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Share of the new batch in the running statistics.
    pub momentum: f32,
}

impl BatchNormProblem {
    pub(super) fn chunks(&self) -> Chunks {
        Chunks::new(self.lines, self.w, self.c)
    }

    fn pixels(&self) -> usize {
        self.lines * self.w
    }
}

/// What a batch-norm reads and keeps: γ and β `[c]`, running mean and variance `[c]`, and the batch's μ and 1/√(σ² + ε)
/// as one `[2·c]`.
#[derive(Debug)]
pub struct BatchNormState<'a> {
    /// γ.
    pub gamma: View<'a>,
    /// β.
    pub beta: View<'a>,
    /// Running mean and variance.
    pub running: [ViewMut<'a>; 2],
    /// μ and 1/√(σ² + ε) of this batch, kept for the backward pass.
    pub saved: ViewMut<'a>,
}

/// What follows the normalisation: a residual `[lines, w, c]` to add, then an activation.
#[derive(Debug, Clone, Copy)]
pub struct Tail<'a> {
    /// Added after γ·ŷ + β.
    pub residual: Option<View<'a>>,
    /// Applied last.
    pub clamp: Option<Clamp>,
}

impl Tail<'_> {
    /// Nothing follows.
    pub const NONE: Self = Self { residual: None, clamp: None };
}

impl<'a> Tail<'a> {
    fn gpu(self) -> cuda::batch_norm::Tail<'a> {
        cuda::batch_norm::Tail { residual: self.residual.map(View::gpu), clamp: self.clamp }
    }
}

/// Statistics of the pixels of one chunk.
pub(super) struct Moments {
    pixels: usize,
    /// Mean and centred second moment `[2·c]`.
    values: Vec<f32>,
}

/// One pass over a chunk of `c` channels. Sums are taken about its first pixel, so that a large mean costs no digits.
pub(super) fn moments(y: &[f32], c: usize) -> Moments {
    let tile = tile_len(c);
    let shift = tiled(&y[..c]);
    let (mut sum, mut squares) = (vec![0.0f32; tile], vec![0.0f32; tile]);
    vectorised(
        #[inline(always)]
        || {
            for y in y.chunks(tile) {
                let n = y.len();
                let (shift, sum, squares) = (&shift[..n], &mut sum[..n], &mut squares[..n]);
                for i in 0..n {
                    let d = y[i] - shift[i];
                    sum[i] += d;
                    squares[i] += d * d;
                }
            }
            fold_tile(&mut sum, c);
            fold_tile(&mut squares, c);
        },
    );
    let pixels = y.len() / c;
    let mut values = Vec::with_capacity(2 * c);
    values.extend(sum[..c].iter().zip(&shift).map(|(s, shift)| shift + s / pixels as f32));
    values.extend(squares[..c].iter().zip(&sum).map(|(q, s)| (q - s * (s / pixels as f32)).max(0.0)));
    Moments { pixels, values }
}

/// Merges the chunks' moments in order; writes μ and 1/√(σ² + ε) and updates the running statistics.
pub(super) fn finish_statistics(p: &BatchNormProblem, chunks: &[Moments], state: &mut BatchNormState<'_>) {
    let c = p.c;
    let (saved_mean, saved_rstd) = state.saved.host_mut().split_at_mut(c);
    let [running_mean, running_var] = state.running.each_mut().map(ViewMut::host_mut);
    let pixels = p.pixels() as f64;
    for channel in 0..c {
        let (mut count, mut mean, mut m2) = (0.0f64, 0.0f64, 0.0f64);
        for chunk in chunks {
            let n = chunk.pixels as f64;
            let delta = f64::from(chunk.values[channel]) - mean;
            let total = count + n;
            mean += delta * n / total;
            m2 += f64::from(chunk.values[c + channel]) + delta * delta * count * n / total;
            count = total;
        }
        let momentum = f64::from(p.momentum);
        let unbiased = m2 / (pixels - 1.0).max(1.0);
        running_mean[channel] = ((1.0 - momentum) * f64::from(running_mean[channel]) + momentum * mean) as f32;
        running_var[channel] = ((1.0 - momentum) * f64::from(running_var[channel]) + momentum * unbiased) as f32;
        saved_mean[channel] = mean as f32;
        saved_rstd[channel] = (1.0 / (m2 / pixels + f64::from(p.eps)).sqrt()) as f32;
    }
}

/// Training forward: statistics of `y`, then z.
pub fn forward(p: &BatchNormProblem, y: View<'_>, mut state: BatchNormState<'_>, tail: Tail<'_>, z: ViewMut<'_>) {
    if let View::Gpu(y) = y {
        return forward_on_gpu(p, y, state, Some((tail, z)));
    }
    let y = y.host();
    let chunks = p.chunks();
    let statistics: Vec<_> =
        y[..p.pixels() * p.c].par_chunks(chunks.chunk_len()).map(|chunk| moments(chunk, p.c)).collect();
    normalise_with(p, &statistics, y, &mut state, tail, z.host());
}

/// Statistics, and the normalised value where it is to be stored.
pub(super) fn forward_on_gpu(
    p: &BatchNormProblem,
    y: GpuView<'_>,
    state: BatchNormState<'_>,
    z: Option<(Tail<'_>, ViewMut<'_>)>,
) {
    let [mean, var] = state.running.map(ViewMut::gpu);
    let saved = state.saved.gpu();
    cuda::batch_norm::statistics(p, y, [&mean, &var], &saved);
    if let Some((tail, z)) = z {
        let affine = [state.gamma.gpu(), state.beta.gpu()];
        cuda::batch_norm::normalise(p, y, affine, (&saved).into(), tail.gpu(), &z.gpu());
    }
}

/// Finishes the statistics and normalises: the second half of the forward pass, alone in the fused step.
pub(super) fn normalise_with(
    p: &BatchNormProblem,
    statistics: &[Moments],
    y: &[f32],
    state: &mut BatchNormState<'_>,
    tail: Tail<'_>,
    z: &mut [f32],
) {
    finish_statistics(p, statistics, state);
    let affine = Affine::new(state.gamma.host(), state.beta.host(), state.saved.host_mut());
    apply(p, &affine, y, tail, z);
}

/// Inference forward of an unfolded batch-norm, with the running statistics.
pub fn forward_inference(
    p: &BatchNormProblem,
    y: View<'_>,
    [gamma, beta, mean, var]: [View<'_>; 4],
    tail: Tail<'_>,
    z: ViewMut<'_>,
) {
    if let View::Gpu(y) = y {
        let saved = y.gpu().workspace(2 * p.c);
        cuda::batch_norm::running_statistics(p, [mean.gpu(), var.gpu()], saved);
        let affine = [gamma.gpu(), beta.gpu()];
        return cuda::batch_norm::normalise(p, y, affine, saved.into(), tail.gpu(), &z.gpu());
    }
    let mut saved = mean.host().to_vec();
    saved.extend(var.host().iter().map(|v| 1.0 / (v + p.eps).sqrt()));
    let affine = Affine::new(gamma.host(), beta.host(), &saved);
    apply(p, &affine, y.host(), tail, z.host());
}

/// z = a·y + b per channel; the coefficients are tiled.
pub(super) struct Affine {
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Affine {
    pub(super) fn new(gamma: &[f32], beta: &[f32], saved: &[f32]) -> Self {
        let (mean, rstd) = saved.split_at(gamma.len());
        let a: Vec<f32> = gamma.iter().zip(rstd).map(|(g, r)| g * r).collect();
        let b: Vec<f32> = beta.iter().zip(&a).zip(mean).map(|((b, a), m)| b - a * m).collect();
        Self { a: tiled(&a), b: tiled(&b) }
    }
}

fn apply(p: &BatchNormProblem, affine: &Affine, y: &[f32], tail: Tail<'_>, z: &mut [f32]) {
    let (chunks, c) = (p.chunks(), p.c);
    let residual = tail.residual.map(View::host);
    z[..p.pixels() * c].par_chunks_mut(chunks.chunk_len()).enumerate().for_each(|(index, z)| {
        let range = chunks.range(index);
        vectorised(
            #[inline(always)]
            || {
                let y = &y[range.clone()];
                match (residual.map(|r| &r[range]), tail.clamp) {
                    (None, None) => affine_rows(affine, y, z, |v| v),
                    (None, Some(clamp)) => affine_rows(affine, y, z, |v| clamp.apply(v)),
                    (Some(residual), clamp) => {
                        affine_rows(affine, y, z, |v| v);
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

/// z = f(a·y + b).
#[inline(always)]
pub(super) fn affine_rows(affine: &Affine, y: &[f32], z: &mut [f32], f: impl Fn(f32) -> f32) {
    let tile = affine.a.len();
    for (z, y) in z.chunks_mut(tile).zip(y.chunks(tile)) {
        let n = z.len();
        let (y, a, b) = (&y[..n], &affine.a[..n], &affine.b[..n]);
        for i in 0..n {
            z[i] = f(a[i] * y[i] + b[i]);
        }
    }
}

/// What the backward pass reads.
#[derive(Debug, Clone, Copy)]
pub struct BackwardInputs<'a> {
    /// The normalised value's source `[lines, w, c]`.
    pub y: View<'a>,
    /// Gradient of z.
    pub dz: View<'a>,
    /// γ, β `[c]` and the saved μ, 1/√(σ² + ε) `[2·c]`.
    pub gamma: View<'a>,
    /// β.
    pub beta: View<'a>,
    /// Saved statistics.
    pub saved: View<'a>,
    /// What followed in the forward pass.
    pub tail: Tail<'a>,
}

/// What the backward pass needs of the whole batch: Σg and Σg·(y − μ) per channel, where g is the gradient before the
/// tail, and the score gradient ⟨dz, v − φ(v)⟩ of the tail's activation.
#[derive(Debug, Clone, PartialEq)]
pub struct GradientSums {
    g: Vec<f64>,
    gy: Vec<f64>,
    /// 0 where it was not asked for.
    pub score: f64,
}

impl GradientSums {
    /// Adds partial sums in their order.
    pub(super) fn total(c: usize, parts: impl IntoIterator<Item = Self>) -> Self {
        let mut total = Self { g: vec![0.0; c], gy: vec![0.0; c], score: 0.0 };
        for part in parts {
            total.g.iter_mut().zip(&part.g).for_each(|(t, p)| *t += p);
            total.gy.iter_mut().zip(&part.gy).for_each(|(t, p)| *t += p);
            total.score += part.score;
        }
        total
    }
}

/// Forms g, the gradient before the tail, from dz, and sums it.
pub(super) struct TailGradient<'a> {
    c: usize,
    line_len: usize,
    affine: Affine,
    mean: Vec<f32>,
    y: &'a [f32],
    residual: Option<&'a [f32]>,
    clamp: Option<Clamp>,
    score: bool,
}

impl<'a> TailGradient<'a> {
    pub(super) fn new(w: usize, y: View<'a>, [gamma, beta, saved]: [View<'_>; 3], tail: Tail<'a>, score: bool) -> Self {
        let (gamma, saved) = (gamma.host(), saved.host());
        let (c, line_len) = (gamma.len(), w * gamma.len());
        let affine = Affine::new(gamma, beta.host(), saved);
        let mean = tiled(&saved[..gamma.len()]);
        // An activation whose slope is 1 is the identity: g is dz.
        let clamp = tail.clamp.filter(|clamp| score || clamp.slope != 1.0);
        Self { c, line_len, affine, mean, y: y.host(), residual: tail.residual.map(View::host), clamp, score }
    }

    /// Sums over a range of whole lines; `d_residual` is that range of the residual's gradient, and whether to add.
    ///
    /// Lines are summed in f32 and their sums in f64, so that the result does not depend on how work is cut.
    pub(super) fn sum(
        &self,
        range: Range<usize>,
        dz: &[f32],
        mut d_residual: Option<(&mut [f32], bool)>,
    ) -> GradientSums {
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

/// Sums over the batch in one walk; writes the residual's gradient where there is one.
pub(super) fn backward_sums(
    p: &BatchNormProblem,
    inputs: BackwardInputs<'_>,
    d_residual: Option<(ViewMut<'_>, bool)>,
    score: bool,
) -> GradientSums {
    let gradient = TailGradient::new(p.w, inputs.y, [inputs.gamma, inputs.beta, inputs.saved], inputs.tail, score);
    let (chunks, dz) = (p.chunks(), inputs.dz.host());
    let accumulate = d_residual.as_ref().is_some_and(|d| d.1);
    let d_residual = d_residual.map(|(d, _)| &mut d.host()[..p.pixels() * p.c]);
    let parts: Vec<Option<&mut [f32]>> = match d_residual {
        Some(d) => d.chunks_mut(chunks.chunk_len()).map(Some).collect(),
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
    GradientSums::total(p.c, partials)
}

/// Forms dy for any range of elements, once the sums over the batch are known.
pub(super) struct DyLoader<'a> {
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
    /// Writes dγ and dβ, which are the sums up to a factor.
    pub(super) fn new(
        p: &BatchNormProblem,
        inputs: BackwardInputs<'a>,
        sums: &GradientSums,
        [d_gamma, d_beta]: [ViewMut<'_>; 2],
    ) -> Self {
        let BackwardInputs { y, dz, gamma, beta, saved, tail } = inputs;
        let saved = saved.host();
        let affine = Affine::new(gamma.host(), beta.host(), saved);
        let (mean, rstd) = saved.split_at(p.c);
        let (d_gamma, d_beta) = (d_gamma.host(), d_beta.host());
        let pixels = p.pixels() as f32;
        let (mut slope, mut offset) = (vec![0.0; p.c], vec![0.0; p.c]);
        for c in 0..p.c {
            d_beta[c] = sums.g[c] as f32;
            d_gamma[c] = (sums.gy[c] * f64::from(rstd[c])) as f32;
            let a = affine.a[c];
            slope[c] = -a * rstd[c] * d_gamma[c] / pixels;
            offset[c] = -a * d_beta[c] / pixels - slope[c] * mean[c];
        }
        let (slope, offset) = (tiled(&slope), tiled(&offset));
        let residual = tail.residual.map(View::host);
        Self { affine, slope, offset, y: y.host(), dz: dz.host(), residual, clamp: tail.clamp }
    }

    /// Writes dy for a range of whole pixels.
    pub(super) fn load(&self, range: Range<usize>, dy: &mut [f32]) {
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

/// All gradients of a batch-norm and its tail on a GPU; adds the score gradient to `score` where given.
pub(super) fn backward_on_gpu(
    p: &BatchNormProblem,
    inputs: BackwardInputs<'_>,
    d_residual: Option<(ViewMut<'_>, bool)>,
    d_params: [ViewMut<'_>; 2],
    score: Option<ViewMut<'_>>,
    (dy, accumulate): (ViewMut<'_>, bool),
) {
    let BackwardInputs { y, dz, gamma, beta, saved, tail } = inputs;
    let of = cuda::batch_norm::Coefficients { gamma: gamma.gpu(), beta: beta.gpu(), saved: saved.gpu() };
    let inputs = cuda::batch_norm::BackwardInputs { y: y.gpu(), dz: dz.gpu(), of, tail: tail.gpu() };
    let d_residual = d_residual.map(|(d, accumulate)| (d.gpu(), accumulate));
    let [d_gamma, d_beta] = d_params.map(ViewMut::gpu);
    let score = score.map(ViewMut::gpu);
    let d_residual = d_residual.as_ref().map(|(d, accumulate)| (d, *accumulate));
    cuda::batch_norm::backward(p, inputs, d_residual, [&d_gamma, &d_beta], score.as_ref(), (&dy.gpu(), accumulate));
}

/// Backward of an unfused batch-norm: dy (+)=, dγ, dβ.
pub fn backward(
    p: &BatchNormProblem,
    inputs: BackwardInputs<'_>,
    (dy, accumulate): (ViewMut<'_>, bool),
    d_params: [ViewMut<'_>; 2],
) {
    if let View::Gpu(_) = inputs.y {
        return backward_on_gpu(p, inputs, None, d_params, None, (dy, accumulate));
    }
    let sums = backward_sums(p, inputs, None, false);
    let loader = DyLoader::new(p, inputs, &sums, d_params);
    let chunks = p.chunks();
    dy.host()[..p.pixels() * p.c].par_chunks_mut(chunks.chunk_len()).enumerate().for_each(|(index, dy)| {
        if !accumulate {
            loader.load(chunks.range(index), dy);
            return;
        }
        with_scratch(dy.len(), |scratch| {
            loader.load(chunks.range(index), scratch);
            dy.iter_mut().zip(scratch.iter()).for_each(|(dy, s)| *dy += s);
        });
    });
}
