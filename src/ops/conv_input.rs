//! What a convolution reads: a stored value, or the raw result of the fused step before it, normalised on load.
//!
//! In the second form the normalised, activated value is never stored: the convolution forms the few lines it works on
//! in cache, and its backward pass also takes the channel sums which the batch-norm before it needs, while the gradient
//! is still in cache.

use std::ops::Range;

use super::activation::Clamp;
use super::batch_norm::{Affine, GradientSums, Tail, TailGradient, affine_rows};
use super::simd::vectorised;
use crate::device::View;

/// What a fused training step reads.
#[derive(Debug, Clone, Copy)]
pub enum ConvInput<'a> {
    /// x `[n, h, w, c]`.
    Stored(View<'a>),
    /// x = φ(γ·ŷ + β), formed on load.
    Normalised(Normalised<'a>),
}

/// A value that the step before did not store.
#[derive(Debug, Clone, Copy)]
pub struct Normalised<'a> {
    /// That step's convolution result `[n, h, w, c]`.
    pub y: View<'a>,
    /// Its γ `[c]`.
    pub gamma: View<'a>,
    /// Its β `[c]`.
    pub beta: View<'a>,
    /// Its batch's μ and 1/√(σ² + ε) `[2·c]`.
    pub saved: View<'a>,
    /// Its activation.
    pub clamp: Option<Clamp>,
    /// Whether the backward pass also collects that activation's score gradient.
    pub score: bool,
}

/// The host's side of an input.
pub(super) enum Source<'a> {
    Stored(&'a [f32]),
    Normalised(Box<NormalisedSource<'a>>),
}

/// What forms a value on load, and sums its gradient.
pub(super) struct NormalisedSource<'a> {
    y: &'a [f32],
    affine: Affine,
    clamp: Option<Clamp>,
    gradient: TailGradient<'a>,
    c: usize,
}

impl<'a> Source<'a> {
    /// `w` is the pixels per line of the input.
    pub fn new(input: ConvInput<'a>, w: usize) -> Self {
        match input {
            ConvInput::Stored(x) => Self::Stored(x.host()),
            ConvInput::Normalised(Normalised { y, gamma, beta, saved, clamp, score }) => {
                Self::Normalised(Box::new(NormalisedSource {
                    y: y.host(),
                    affine: Affine::new(gamma.host(), beta.host(), saved.host()),
                    clamp: clamp.filter(|clamp| clamp.slope != 1.0),
                    gradient: TailGradient::new(w, y, [gamma, beta, saved], Tail { residual: None, clamp }, score),
                    c: gamma.host().len(),
                }))
            }
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Stored(data) => data.len(),
            Self::Normalised(of) => of.y.len(),
        }
    }

    /// Scratch elements that [`load`](Self::load) needs for a range of `len`.
    pub fn scratch_len(&self, len: usize) -> usize {
        match self {
            Self::Stored(_) => 0,
            Self::Normalised(_) => len,
        }
    }

    /// The elements of a range of whole pixels: stored ones as they are, others formed in `scratch`.
    pub fn load<'s>(&'s self, range: Range<usize>, scratch: &'s mut [f32]) -> &'s [f32] {
        match self {
            Self::Stored(data) => &data[range],
            Self::Normalised(of) => {
                let NormalisedSource { y, affine, clamp, .. } = &**of;
                let (y, x) = (&y[range.clone()], &mut scratch[..range.len()]);
                vectorised(
                    #[inline(always)]
                    || match *clamp {
                        None => affine_rows(affine, y, x, |v| v),
                        Some(clamp) => affine_rows(affine, y, x, |v| clamp.apply(v)),
                    },
                );
                x
            }
        }
    }

    /// The channel sums over a range whose gradient `dx` has just been written; `None` for a stored value, whose own
    /// step takes them.
    pub fn gradient_sums(&self, range: Range<usize>, dx: &[f32]) -> Option<GradientSums> {
        match self {
            Self::Stored(_) => None,
            Self::Normalised(of) => Some(of.gradient.sum(range, dx, None)),
        }
    }

    /// The sums over the batch from partial sums in their order.
    pub fn total(&self, parts: impl IntoIterator<Item = GradientSums>) -> Option<GradientSums> {
        match self {
            Self::Stored(_) => None,
            Self::Normalised(of) => Some(GradientSums::total(of.c, parts)),
        }
    }
}
