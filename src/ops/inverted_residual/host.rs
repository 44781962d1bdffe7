//! The host's inverted residual: bands of rows, so that hidden values stay in a core's cache.

use std::ops::Range;

use rayon::prelude::*;

use super::{FoldedConv, InvertedResidualOperands, InvertedResidualProblem};
use crate::device::View;
use crate::ops::activation::Clamp;
use crate::ops::conv::depthwise;
use crate::ops::gemm::{Matrix, gemm};
use crate::ops::parallel::with_scratch;
use crate::ops::simd::vectorised;
use crate::shape::GemmSize;

/// Hidden channels that are formed at a time, at most, and what their number is a multiple of but for the last.
const SLICE: usize = 64;
const LANES: usize = 16;
/// Expanded elements of a band, about: 256 KiB, so that they stay in a core's second-level cache.
const BAND_ELEMENTS: usize = 1 << 16;

impl InvertedResidualProblem {
    /// Output rows of a band. They depend on one image alone, so that a batch may be split without changing a bit.
    fn band_rows(&self) -> usize {
        let under = BAND_ELEMENTS / (self.input.w * self.slice_len()).max(1);
        (under.saturating_sub(self.window.k_h) / self.window.stride_h + 1).min(self.output.h.max(1))
    }

    /// Hidden channels of a slice; the last may have fewer.
    fn slice_len(&self) -> usize {
        self.hidden.div_ceil(self.hidden.div_ceil(SLICE)).next_multiple_of(LANES).min(self.hidden)
    }
}

/// y = the block's result.
pub(super) fn forward(p: &InvertedResidualProblem, of: &InvertedResidualOperands<'_>, y: &mut [f32]) {
    let block = Block {
        p,
        x: of.x.host(),
        expand: of.expand.map(HostConv::new),
        depthwise: HostConv::new(of.depthwise),
        project: HostConv::new(of.project),
        residual: of.residual.map(View::host),
    };
    let y = &mut y[..p.n * p.output.len()];
    let (image_len, line_len, rows) = (p.output.len(), p.output.w * p.output.c, p.band_rows());
    let bands = y.par_chunks_mut(image_len).enumerate().flat_map(|(image, y)| {
        y.par_chunks_mut(rows * line_len).enumerate().map(move |(band, y)| (image, band * rows, y))
    });
    bands.for_each(|(image, first, y)| block.band(image, first..first + y.len() / line_len, y));
}

/// A convolution's parameters on the host.
struct HostConv<'a> {
    w: &'a [f32],
    b: &'a [f32],
    clamp: Clamp,
}

impl<'a> HostConv<'a> {
    fn new(conv: FoldedConv<'a>) -> Self {
        Self { w: conv.w.host(), b: conv.b.host(), clamp: conv.clamp }
    }

    /// Adds the bias of the channels from `first` on to sums of `channels` channels, then activates.
    fn finish(&self, first: usize, channels: usize, sums: &mut [f32]) {
        let (bias, clamp) = (&self.b[first..first + channels], self.clamp);
        vectorised(
            #[inline(always)]
            || {
                for pixel in sums.chunks_exact_mut(channels) {
                    pixel.iter_mut().zip(bias).for_each(|(v, b)| *v += b);
                }
                if clamp.slope != 1.0 {
                    sums.iter_mut().for_each(|v| *v = clamp.apply(*v));
                }
            },
        );
    }
}

/// The operands on the host.
struct Block<'a> {
    p: &'a InvertedResidualProblem,
    x: &'a [f32],
    expand: Option<HostConv<'a>>,
    depthwise: HostConv<'a>,
    project: HostConv<'a>,
    residual: Option<&'a [f32]>,
}

impl Block<'_> {
    /// Some output rows of one image.
    fn band(&self, image: usize, rows: Range<usize>, y: &mut [f32]) {
        let p = self.p;
        let (c_in, c_out, hidden) = (p.input.c, p.output.c, p.hidden);
        let (under, mut part) = depthwise::rows_under(&p.depthwise(), rows.clone());
        let x = &self.x[image * p.input.len()..][under.start * p.input.w * c_in..under.end * p.input.w * c_in];
        let (pixels_in, pixels) = (part.input.pixels(), part.output.pixels());
        let (slice, taps) = (p.slice_len(), p.window.taps());
        with_scratch((pixels_in + pixels + taps) * slice, |scratch| {
            for first in (0..hidden).step_by(slice) {
                let channels = first..(first + slice).min(hidden);
                let len = channels.len();
                (part.input.c, part.output.c, part.groups) = (len, len, len);
                let (expanded, rest) = scratch.split_at_mut(pixels_in * len);
                let (filtered, rest) = rest.split_at_mut(pixels * len);
                let filter = &mut rest[..taps * len];
                self.expand(x, channels.clone(), expanded);
                copy_channels(self.depthwise.w, hidden, channels, filter);
                depthwise::forward_rows(&part, expanded, filter, filtered);
                self.depthwise.finish(first, len, filtered);
                let w = Matrix { data: &self.project.w[first..], row: 1, col: hidden };
                gemm(GemmSize { m: pixels, n: c_out, k: len }, Matrix::rows(filtered, len), w, y, c_out, first > 0);
            }
        });
        self.finish(image * p.output.len() + rows.start * p.output.w * c_out, y);
    }

    /// Some channels of the hidden values `[pixels, channels]` before the depthwise convolution.
    fn expand(&self, x: &[f32], channels: Range<usize>, out: &mut [f32]) {
        let (c_in, len) = (self.p.input.c, channels.len());
        match &self.expand {
            None => copy_channels(x, c_in, channels, out),
            Some(conv) => {
                let w = Matrix::transposed(&conv.w[channels.start * c_in..channels.end * c_in], c_in);
                gemm(GemmSize { m: out.len() / len, n: len, k: c_in }, Matrix::rows(x, c_in), w, out, len, false);
                conv.finish(channels.start, len, out);
            }
        }
    }

    /// Bias, residual and activation on a band of y that begins at element `start`.
    fn finish(&self, start: usize, y: &mut [f32]) {
        let Some(residual) = self.residual else {
            return self.project.finish(0, self.p.output.c, y);
        };
        let residual = &residual[start..start + y.len()];
        let (c, bias, clamp) = (self.p.output.c, self.project.b, self.project.clamp);
        vectorised(
            #[inline(always)]
            || {
                for (pixel, residual) in y.chunks_exact_mut(c).zip(residual.chunks_exact(c)) {
                    for i in 0..c {
                        pixel[i] = pixel[i] + bias[i] + residual[i];
                    }
                }
                if clamp.slope != 1.0 {
                    y.iter_mut().for_each(|v| *v = clamp.apply(*v));
                }
            },
        );
    }
}

/// Some of the `c` channels of every pixel.
fn copy_channels(from: &[f32], c: usize, channels: Range<usize>, to: &mut [f32]) {
    for (to, from) in to.chunks_exact_mut(channels.len()).zip(from.chunks_exact(c)) {
        to.copy_from_slice(&from[channels.clone()]);
    }
}
