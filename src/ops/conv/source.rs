//! What a convolution reads: a stored value, or the raw result of the fused step before it, normalised on load.
//!
//! In the second form the normalised, activated value is never stored: the convolution forms the few lines it works on
//! in cache, and its backward pass also takes the channel sums which the batch-norm before it needs, while the gradient
//! is still in cache.

use std::ops::Range;

use pulp::Simd;

use super::{ConvGradient, ConvInput};
use crate::ops::activation::Clamp;
use crate::ops::batch_norm::{Affine, AffineVectors, DyLoader, MaskedGradient, affine_rows, gradient_sums_len};
use crate::ops::parallel::PartialSums;
use crate::ops::simd::{clamp_vector, vectorised};
use crate::ops::vector_source::{StoredReader, VectorReader, VectorSource};

/// The host's side of an input.
pub(super) enum Source<'a> {
    Stored(&'a [f32]),
    Normalised(NormalisedSource<'a>),
}

/// What forms a value on load, and sums its gradient.
pub(super) struct NormalisedSource<'a> {
    y: &'a [f32],
    affine: Affine,
    clamp: Option<Clamp>,
    gradient: MaskedGradient<'a>,
    c: usize,
}

impl<'a> NormalisedSource<'a> {
    /// What sums its gradient.
    pub fn gradient(&self) -> &MaskedGradient<'a> {
        &self.gradient
    }
}

/// Some channels of it.
pub(super) struct NormalisedReader<'a, S: Simd> {
    y: StoredReader<'a>,
    affine: AffineVectors<S>,
    clamp: Option<Clamp>,
}

impl VectorSource for NormalisedSource<'_> {
    type Reader<'a, S: Simd>
        = NormalisedReader<'a, S>
    where
        Self: 'a;

    #[inline(always)]
    fn reader<S: Simd>(&self, simd: S, channels: Range<usize>) -> NormalisedReader<'_, S> {
        let y = StoredReader::new(self.y, channels.len());
        NormalisedReader { y, affine: self.affine.vectors(simd, channels), clamp: self.clamp }
    }
}

impl<S: Simd> VectorReader<S> for NormalisedReader<'_, S> {
    #[inline(always)]
    fn vector(&self, simd: S, at: usize) -> S::f32s {
        let value = self.affine.apply(simd, self.y.vector(simd, at));
        // No closure: one that is not inlined is compiled without the vector instructions.
        match self.clamp {
            Some(clamp) => clamp_vector(simd, clamp, value),
            None => value,
        }
    }

    #[inline(always)]
    fn prefetch(&self, at: usize) {
        VectorReader::<S>::prefetch(&self.y, at);
    }
}

/// The host's side of the gradient of a result.
pub(super) enum GradientSource<'a> {
    Stored(&'a [f32]),
    Formed(DyLoader<'a>),
}

impl<'a> GradientSource<'a> {
    pub fn new(dy: ConvGradient<'a>) -> Self {
        match dy {
            ConvGradient::Stored(dy) => Self::Stored(dy.host()),
            ConvGradient::Formed { problem, of, dz, sums } => {
                Self::Formed(DyLoader::new(&problem, &of, dz, sums.sums()))
            }
        }
    }

    /// What of memory [`load`](Self::load) reads for a range.
    pub fn reads(&self, range: Range<usize>) -> [&[f32]; 2] {
        match self {
            Self::Stored(dy) => [&dy[range], &[]],
            Self::Formed(loader) => loader.reads(range),
        }
    }

    /// Scratch elements that [`load`](Self::load) needs for a range of `len`.
    pub fn scratch_len(&self, len: usize) -> usize {
        match self {
            Self::Stored(_) => 0,
            Self::Formed(_) => len,
        }
    }

    /// The elements of a range of whole pixels: stored ones as they are, others formed in `scratch`.
    pub fn load<'s>(&'s self, range: Range<usize>, scratch: &'s mut [f32]) -> &'s [f32] {
        match self {
            Self::Stored(dy) => &dy[range],
            Self::Formed(loader) => {
                let dy = &mut scratch[..range.len()];
                loader.load(range, dy);
                dy
            }
        }
    }
}

impl<'a> Source<'a> {
    /// What the forward pass reads.
    pub fn new(input: ConvInput<'a>) -> Self {
        Self::new_with(input, false)
    }

    /// What the backward pass reads; `score` asks for the score gradient of an activation on load.
    pub fn new_with(input: ConvInput<'a>, score: bool) -> Self {
        match input {
            ConvInput::Stored(x) => Self::Stored(x.host()),
            ConvInput::Normalised(of) => {
                assert!(of.residual.is_none(), "no residual is added on load");
                Self::Normalised(NormalisedSource {
                    y: of.y.host(),
                    affine: of.affine(),
                    clamp: of.act.map(|act| act.clamp).filter(|clamp| clamp.slope != 1.0),
                    gradient: MaskedGradient::new(&of, score),
                    c: of.gamma.len(),
                })
            }
        }
    }

    /// What of memory [`load`](Self::load) reads for a range.
    pub fn reads(&self, range: Range<usize>) -> &[f32] {
        match self {
            Self::Stored(data) => &data[range],
            Self::Normalised(of) => &of.y[range],
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
                let NormalisedSource { y, affine, clamp, .. } = of;
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

    /// Rows for the channel sums of so many tasks, which the batch-norm before a value that is normalised on load needs; empty
    /// ones for a stored value, whose own step takes them.
    pub fn partial_sums(&self, tasks: usize) -> PartialSums<f64> {
        match self {
            Self::Stored(_) => PartialSums::new(tasks, 0),
            Self::Normalised(of) => PartialSums::new(tasks, gradient_sums_len(of.c)),
        }
    }

    /// Adds the channel sums over a range whose gradient `dx` has just been written to a row of [`partial_sums`](Self::partial_sums).
    pub fn add_sums(&self, range: Range<usize>, dx: &[f32], row: &mut [f64]) {
        if let Self::Normalised(of) = self {
            of.gradient.add_sums(range, dx, None, row);
        }
    }
}
