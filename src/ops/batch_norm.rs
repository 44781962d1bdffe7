//! Batch normalisation over images and pixels, and the fused normalise + residual + activation around it.
//!
//! Training: ŷ = (y − μ)/√(σ² + ε) with the batch's μ and biased σ², z = φ(γ·ŷ + β + residual); the running variance is
//! the unbiased one (as PyTorch). Statistics are means and centred second moments per chunk, merged in chunk order
//! with Chan's formula in f64, so they do not lose the variance of a large mean and do not depend on threads.

use std::ops::Range;

use rayon::prelude::*;

use super::activation::{Clamp, excess_dot};
use super::parallel::{Chunks, fold_tile, tile_len, tiled, with_scratch};
use super::simd::vectorised;
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

/// Mean and centred second moment `[2·c]` of the pixels of a chunk.
pub(super) fn moments(y: &[f32], c: usize) -> Vec<f32> {
    let tile = tile_len(c);
    let (mut sum, mut m2) = (vec![0.0f32; tile], vec![0.0f32; tile]);
    let scale = 1.0 / (y.len() / c) as f32;
    vectorised(
        #[inline(always)]
        || {
            for y in y.chunks(tile) {
                sum.iter_mut().zip(y).for_each(|(s, y)| *s += y);
            }
            fold_tile(&mut sum, c);
        },
    );
    sum.truncate(c);
    sum.iter_mut().for_each(|s| *s *= scale);
    let mean = tiled(&sum);
    vectorised(
        #[inline(always)]
        || {
            for y in y.chunks(tile) {
                let (m2, mean) = (&mut m2[..y.len()], &mean[..y.len()]);
                for i in 0..y.len() {
                    m2[i] += (y[i] - mean[i]) * (y[i] - mean[i]);
                }
            }
            fold_tile(&mut m2, c);
        },
    );
    sum.extend_from_slice(&m2[..c]);
    sum
}

/// Merges the chunks' moments in order; writes μ and 1/√(σ² + ε) and updates the running statistics.
pub(super) fn finish_statistics(p: &BatchNormProblem, chunks: &[Vec<f32>], state: BatchNormState<'_>) {
    let c = p.c;
    let cut = p.chunks();
    let (saved_mean, saved_rstd) = state.saved.host().split_at_mut(c);
    let [running_mean, running_var] = state.running.map(ViewMut::host);
    let pixels = p.pixels() as f64;
    for channel in 0..c {
        let (mut count, mut mean, mut m2) = (0.0f64, 0.0f64, 0.0f64);
        for (index, chunk) in chunks.iter().enumerate() {
            let n = (cut.line_range(index).len() * p.w) as f64;
            let delta = f64::from(chunk[channel]) - mean;
            let total = count + n;
            mean += delta * n / total;
            m2 += f64::from(chunk[c + channel]) + delta * delta * count * n / total;
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
    let y = y.host();
    let chunks = p.chunks();
    let statistics: Vec<_> =
        y[..p.pixels() * p.c].par_chunks(chunks.chunk_len()).map(|chunk| moments(chunk, p.c)).collect();
    normalise_with(p, &statistics, y, &mut state, tail, z.host());
}

/// Finishes the statistics and normalises: the second half of the forward pass, alone in the fused step.
pub(super) fn normalise_with(
    p: &BatchNormProblem,
    statistics: &[Vec<f32>],
    y: &[f32],
    state: &mut BatchNormState<'_>,
    tail: Tail<'_>,
    z: &mut [f32],
) {
    let [running_mean, running_var] = &mut state.running;
    let running = [reborrow(running_mean), reborrow(running_var)];
    let again = BatchNormState { gamma: state.gamma, beta: state.beta, running, saved: reborrow(&mut state.saved) };
    finish_statistics(p, statistics, again);
    let ViewMut::Host(saved) = &state.saved;
    let affine = Affine::training(state.gamma.host(), state.beta.host(), saved);
    apply(p, &affine, y, tail, z);
}

fn reborrow<'b>(view: &'b mut ViewMut<'_>) -> ViewMut<'b> {
    match view {
        ViewMut::Host(data) => ViewMut::Host(data),
    }
}

/// Inference forward of an unfolded batch-norm, with the running statistics.
pub fn forward_inference(
    p: &BatchNormProblem,
    y: View<'_>,
    [gamma, beta, mean, var]: [View<'_>; 4],
    tail: Tail<'_>,
    z: ViewMut<'_>,
) {
    let mut saved = mean.host().to_vec();
    saved.extend(var.host().iter().map(|v| 1.0 / (v + p.eps).sqrt()));
    let affine = Affine::training(gamma.host(), beta.host(), &saved);
    apply(p, &affine, y.host(), tail, z.host());
}

/// z = a·y + b per channel; the coefficients are tiled.
struct Affine {
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Affine {
    fn training(gamma: &[f32], beta: &[f32], saved: &[f32]) -> Self {
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

#[inline(always)]
fn affine_rows(affine: &Affine, y: &[f32], z: &mut [f32], f: impl Fn(f32) -> f32) {
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

/// The backward pass once its channel sums are known: forms dy for any range of elements.
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

/// Sums dγ and dβ, writes the residual's gradient, and returns what forms dy, and the score gradient
/// ⟨dz, v − φ(v)⟩ of the tail's activation where `score` asks for it.
pub(super) fn backward_sums<'a>(
    p: &BatchNormProblem,
    inputs: BackwardInputs<'a>,
    d_residual: Option<(ViewMut<'_>, bool)>,
    [d_gamma, d_beta]: [ViewMut<'_>; 2],
    score: bool,
) -> (DyLoader<'a>, f64) {
    let BackwardInputs { y, dz, gamma, beta, saved, tail } = inputs;
    let (y, dz, gamma, saved) = (y.host(), dz.host(), gamma.host(), saved.host());
    let affine = Affine::training(gamma, beta.host(), saved);
    let (mean, rstd) = saved.split_at(p.c);
    let mut loader = DyLoader {
        affine,
        slope: Vec::new(),
        offset: Vec::new(),
        y,
        dz,
        residual: tail.residual.map(View::host),
        clamp: tail.clamp,
    };
    let (sums, score) = chunk_sums(p, &loader, mean, d_residual, score);
    let (d_gamma, d_beta) = (d_gamma.host(), d_beta.host());
    let pixels = p.pixels() as f32;
    let (mut slope, mut offset) = (vec![0.0; p.c], vec![0.0; p.c]);
    for c in 0..p.c {
        // Σg and Σg·(y − μ) of the channel.
        let (g, gy) = (sums[c], sums[p.c + c]);
        d_beta[c] = g as f32;
        d_gamma[c] = (gy * f64::from(rstd[c])) as f32;
        let a = loader.affine.a[c];
        slope[c] = -a * rstd[c] * d_gamma[c] / pixels;
        offset[c] = -a * d_beta[c] / pixels - slope[c] * mean[c];
    }
    (loader.slope, loader.offset) = (tiled(&slope), tiled(&offset));
    (loader, score)
}

/// Σg and Σg·(y − μ) per channel in f64 over chunks, in order; g is the gradient before the tail.
fn chunk_sums(
    p: &BatchNormProblem,
    loader: &DyLoader<'_>,
    mean: &[f32],
    d_residual: Option<(ViewMut<'_>, bool)>,
    score: bool,
) -> (Vec<f64>, f64) {
    let (chunks, c, tile) = (p.chunks(), p.c, tile_len(p.c));
    let mean = &tiled(mean)[..];
    let accumulate = d_residual.as_ref().is_some_and(|d| d.1);
    let mut rest = d_residual.map(|(d, _)| &mut d.host()[..p.pixels() * c]);
    let parts: Vec<Option<&mut [f32]>> = (0..chunks.count())
        .map(|index| {
            rest.take().map(|all| {
                let (part, tail) = all.split_at_mut(chunks.range(index).len());
                rest = Some(tail);
                part
            })
        })
        .collect();
    let partials: Vec<(Vec<f32>, f64)> = parts
        .into_par_iter()
        .enumerate()
        .map(|(index, d_residual)| {
            let range = chunks.range(index);
            let mut sums = vec![0.0f32; 2 * tile];
            let mut folded = Vec::with_capacity(2 * c);
            let score = with_scratch(2 * range.len(), |scratch| {
                let (g, value) = scratch.split_at_mut(range.len());
                vectorised(
                    #[inline(always)]
                    || {
                        let score = loader.before_tail(range.clone(), g, value, score);
                        sum_rows(g, &loader.y[range], mean, &mut sums);
                        let (sum_g, sum_gy) = sums.split_at_mut(tile);
                        fold_tile(sum_g, c);
                        fold_tile(sum_gy, c);
                        sum_g[..c].iter().chain(&sum_gy[..c]).copied().for_each(|s| folded.push(s));
                        if let Some(d) = d_residual {
                            if accumulate {
                                d.iter_mut().zip(g.iter()).for_each(|(d, g)| *d += g);
                            } else {
                                d.copy_from_slice(g);
                            }
                        }
                        score
                    },
                )
            });
            (folded, score)
        })
        .collect();
    let mut sums = vec![0.0f64; 2 * c];
    for (partial, _) in &partials {
        sums.iter_mut().zip(partial).for_each(|(s, p)| *s += f64::from(*p));
    }
    (sums, partials.iter().map(|p| p.1).sum())
}

/// Σg and Σg·(y − μ) into the two halves of `sums`, tiled.
#[inline(always)]
fn sum_rows(g: &[f32], y: &[f32], mean: &[f32], sums: &mut [f32]) {
    let tile = mean.len();
    let (sum_g, sum_gy) = sums.split_at_mut(tile);
    for (g, y) in g.chunks(tile).zip(y.chunks(tile)) {
        let n = g.len();
        let (y, mean, sum_g, sum_gy) = (&y[..n], &mean[..n], &mut sum_g[..n], &mut sum_gy[..n]);
        for i in 0..n {
            sum_g[i] += g[i];
            sum_gy[i] += g[i] * (y[i] - mean[i]);
        }
    }
}

impl DyLoader<'_> {
    /// g = dz·φ'(v) with v = a·y + b + residual, into `g`; `value` is scratch for v. Returns the score gradient.
    #[inline(always)]
    fn before_tail(&self, range: Range<usize>, g: &mut [f32], value: &mut [f32], score: bool) -> f64 {
        let dz = &self.dz[range.clone()];
        let Some(clamp) = self.clamp else {
            g.copy_from_slice(dz);
            return 0.0;
        };
        if clamp.slope == 1.0 && !score {
            g.copy_from_slice(dz);
            return 0.0;
        }
        affine_rows(&self.affine, &self.y[range.clone()], value, |v| v);
        if let Some(residual) = self.residual {
            value.iter_mut().zip(&residual[range]).for_each(|(v, r)| *v += r);
        }
        let n = g.len();
        let (values, gradients) = (&value[..n], &dz[..n]);
        for i in 0..n {
            g[i] = gradients[i] * clamp.derivative(values[i]);
        }
        if score { excess_dot(clamp, value, dz) } else { 0.0 }
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

/// Backward of an unfused batch-norm: dy (+)=, dγ, dβ.
pub fn backward(
    p: &BatchNormProblem,
    inputs: BackwardInputs<'_>,
    (dy, accumulate): (ViewMut<'_>, bool),
    d_params: [ViewMut<'_>; 2],
) {
    let (loader, _) = backward_sums(p, inputs, None, d_params, false);
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
