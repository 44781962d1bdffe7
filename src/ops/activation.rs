//! Clamped activations with a slope outside the bounds.
//!
//! y = x inside (0, limit), q·x below 0, limit + q·(x − limit) above; q = 0 is ReLU/ReLU6, q = 1 the identity
//! (`methods.md` 1.3). The derivative is 1 strictly inside the bounds and q elsewhere, as in PyTorch's hardtanh.

use rayon::prelude::*;

use super::cuda;
use super::parallel::Chunks;
use super::simd::vectorised;
use crate::device::driver::{Address, Argument};
use crate::device::gpu::GpuView;
use crate::device::{View, ViewMut};

/// An activation with its present slope.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clamp {
    /// Upper bound; infinite for ReLU.
    pub limit: f32,
    /// Slope outside the bounds.
    pub slope: f32,
    /// Where a GPU finds the slope of the moment; 0 where it is `slope`.
    slope_at: Address,
}

impl Clamp {
    /// No activation.
    pub const NONE: Self = Self { limit: f32::INFINITY, slope: 1.0, slope_at: 0 };

    /// An activation of a limit, `None` for ReLU, and a slope.
    pub fn new(limit: Option<f32>, slope: f32) -> Self {
        Self { limit: limit.unwrap_or(f32::INFINITY), slope, slope_at: 0 }
    }

    /// The same with its slope in a GPU's memory, `[1]`, where work that was recorded reads it anew. The memory outlives
    /// all work that is given this activation.
    pub(crate) fn with_slope_at(self, at: GpuView<'_>) -> Self {
        Self { slope_at: at.address(), ..self }
    }

    /// Limit, slope and where the slope lies, as kernels take them.
    pub(super) fn arguments(self) -> [Argument; 3] {
        [self.limit.into(), self.slope.into(), self.slope_at.into()]
    }

    /// The value. Not-a-number stays so; a distance from the bounds is taken as finite, since slope 0 would make
    /// not-a-number of an infinite one.
    #[inline(always)]
    pub fn apply(self, x: f32) -> f32 {
        let low = if x < 0.0 { x.max(-f32::MAX) * self.slope } else { x };
        if x > self.limit { self.limit + self.slope * (x - self.limit).min(f32::MAX) } else { low }
    }

    /// The derivative.
    #[inline(always)]
    pub fn derivative(self, x: f32) -> f32 {
        if x > 0.0 && x < self.limit { 1.0 } else { self.slope }
    }

    /// x − φ(x) for the activation without slope: what the straight-through score gradient weighs
    /// (`methods.md` 1.2).
    #[inline(always)]
    pub fn excess(self, x: f32) -> f32 {
        let low = if x < 0.0 { x } else { 0.0 };
        if x > self.limit { x - self.limit } else { low }
    }
}

/// y = φ(x); `x` and `y` are `[lines, w, c]`.
pub fn forward(clamp: Clamp, (lines, w, c): (usize, usize, usize), x: View<'_>, y: ViewMut<'_>) {
    if let View::Gpu(x) = x {
        return cuda::activation::forward(clamp, x, &y.gpu());
    }
    let (x, y) = (x.host(), y.host());
    let chunks = Chunks::new(lines, w, c);
    y.par_chunks_mut(chunks.chunk_len()).zip(x.par_chunks(chunks.chunk_len())).for_each(|(y, x)| {
        vectorised(
            #[inline(always)]
            || y.iter_mut().zip(x).for_each(|(y, &x)| *y = clamp.apply(x)),
        );
    });
}

/// dx (+)= dy·φ'(x); adds ⟨dy, x − φ(x)⟩ to `score` `[1]` where given.
pub fn backward(
    clamp: Clamp,
    (lines, w, c): (usize, usize, usize),
    (x, dy): (View<'_>, View<'_>),
    (dx, accumulate): (ViewMut<'_>, bool),
    score: Option<ViewMut<'_>>,
) {
    if let View::Gpu(x) = x {
        let score = score.map(ViewMut::gpu);
        return cuda::activation::backward(clamp, (x, dy.gpu()), (&dx.gpu(), accumulate), score.as_ref());
    }
    let (x, dy, dx) = (x.host(), dy.host(), dx.host());
    let wanted = score.is_some();
    let chunks = Chunks::new(lines, w, c);
    let scores: Vec<f64> = dx
        .par_chunks_mut(chunks.chunk_len())
        .zip(x.par_chunks(chunks.chunk_len()).zip(dy.par_chunks(chunks.chunk_len())))
        .map(|(dx, (x, dy))| {
            vectorised(
                #[inline(always)]
                || {
                    let n = dx.len();
                    let (inputs, gradients) = (&x[..n], &dy[..n]);
                    for i in 0..n {
                        let d = gradients[i] * clamp.derivative(inputs[i]);
                        dx[i] = if accumulate { dx[i] + d } else { d };
                    }
                    if wanted { excess_dot(clamp, x, dy) } else { 0.0 }
                },
            )
        })
        .collect();
    if let Some(score) = score {
        score.host()[0] += scores.iter().sum::<f64>() as f32;
    }
}

/// ⟨dy, x − φ(x)⟩ over a chunk.
#[inline(always)]
pub(super) fn excess_dot(clamp: Clamp, x: &[f32], dy: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let (xs, dys) = (x.chunks_exact(LANES), dy.chunks_exact(LANES));
    let tail: f32 = xs.remainder().iter().zip(dys.remainder()).map(|(&x, &dy)| dy * clamp.excess(x)).sum();
    for (x, dy) in xs.zip(dys) {
        for lane in 0..LANES {
            sums[lane] += dy[lane] * clamp.excess(x[lane]);
        }
    }
    sums.iter().map(|&s| f64::from(s)).sum::<f64>() + f64::from(tail)
}
