//! What a convolution reads: a stored value, or the raw result of the fused step before it, normalised on load.
//!
//! In the second form the normalised, activated value is never stored: the convolution forms the few lines it works on
//! in cache, and its backward pass also takes the channel sums which the batch-norm before it needs, while the gradient
//! is still in cache.

use std::ops::Range;

use super::ConvInput;
use crate::ops::activation::Clamp;
use crate::ops::batch_norm::{Affine, GradientSums, MaskedGradient, affine_rows};
use crate::ops::simd::vectorised;

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
    gradient: MaskedGradient<'a>,
    c: usize,
}

impl<'a> Source<'a> {
    /// What the forward pass reads; `w` is the pixels per line of the input.
    pub fn new(input: ConvInput<'a>, w: usize) -> Self {
        Self::new_with(input, w, false)
    }

    /// What the backward pass reads; `score` asks for the score gradient of an activation on load.
    pub fn new_with(input: ConvInput<'a>, w: usize, score: bool) -> Self {
        match input {
            ConvInput::Stored(x) => Self::Stored(x.host()),
            ConvInput::Normalised(of) => {
                assert!(of.residual.is_none(), "no residual is added on load");
                Self::Normalised(Box::new(NormalisedSource {
                    y: of.y.host(),
                    affine: of.affine(),
                    clamp: of.act.map(|act| act.clamp).filter(|clamp| clamp.slope != 1.0),
                    gradient: MaskedGradient::new(w, &of, score),
                    c: of.gamma.len(),
                }))
            }
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
