//! The forward pass.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::super::ConvProblem;
use super::super::parts::{Part, in_parts};
use super::super::source::Source;
use super::block::{BlockLayout, Fill, filter_of};
use super::rows::{RowKernel, WeightedRows};
use super::{PIECE_ELEMENTS, channels_of, input_rows, kernel_rows, pieces, specialised};
use crate::ops::parallel::{Chunks, PartialSums, slab_range, with_scratch};
use crate::ops::product::{BlockLines, Ends};
use crate::ops::simd::MAX_LANES;
use crate::ops::simd::{clamp_vector, dispatch, lanes, load, store};
use crate::ops::vector_source::{Stored, VectorReader, VectorSource};

/// Elements of a chunk: bands are so high that little is formed twice, and stay in the second-level cache.
const CHUNK_ELEMENTS: usize = 1 << 16;
/// Pixels that are written one behind the other, a vector of channels of each, before those of the next channels: what is known of
/// channels stays in registers, and memory is passed through nearly in order.
const TILE: usize = 8;

/// y = φ(x ∗ w + bias + residual).
pub(in super::super) fn forward(
    p: &ConvProblem,
    x: &Source<'_>,
    w: &[f32],
    ends: &Ends<'_>,
    y: &mut [f32],
    takes_moments: bool,
) -> PartialSums<f32> {
    let (h, line_len) = (p.output.h, p.output.w * p.output.c);
    let sum = |Part { lines, y, .. }: Part<'_>| {
        let mut line = lines.start;
        while line < lines.end {
            let (image, row) = (line / h, line % h);
            // As many whole images as there are, else part of one.
            let images = if row == 0 { ((lines.end - line) / h).max(1) } else { 1 };
            let rows = row..h.min(row + lines.end - line);
            let count = images * rows.len();
            let part = (line - lines.start) * line_len..(line - lines.start + count) * line_len;
            // SAFETY: tasks are given different lines.
            let y = unsafe { y.range(part).slice() };
            let ends = ends.of_lines(p, &(line..line + count));
            let band = Band { p, w, ends, images: image..image + images, rows, y };
            match x {
                Source::Stored(x) => band.form(&Stored(x)),
                Source::Normalised(x) => band.form(x),
            }
            line += count;
        }
    };
    in_parts(p, (Chunks::of(p.output_lines(), CHUNK_ELEMENTS), 1), y, takes_moments, sum)
}

/// The input rows under some output rows of an image, and the problem of just these.
pub(in crate::ops) fn rows_under(p: &ConvProblem, rows: Range<usize>) -> (Range<usize>, ConvProblem) {
    let (under, window) = (input_rows(p, &rows), p.window);
    let mut part = ConvProblem { n: 1, ..*p };
    part.input.h = under.len();
    part.output.h = rows.len();
    part.window.pad.top = (window.pad.top + under.start).saturating_sub(rows.start * window.stride_h);
    (under, part)
}

/// y = φ(x ∗ w + bias + residual) for the images of a problem, on one thread.
pub(in crate::ops) fn forward_rows(p: &ConvProblem, x: &[f32], w: &[f32], ends: Ends<'_>, y: &mut [f32]) {
    Band { p, w, ends, images: 0..p.n, rows: 0..p.output.h, y }.form(&Stored(x));
}

/// Some output rows of some images: all rows where there are several.
struct Band<'a> {
    p: &'a ConvProblem,
    w: &'a [f32],
    /// The residual is that of these rows.
    ends: Ends<'a>,
    images: Range<usize>,
    rows: Range<usize>,
    y: &'a mut [f32],
}

impl Band<'_> {
    /// Forms them, in smaller bands where blocks would be too large.
    fn form<X: VectorSource>(self, x: &X) {
        let Self { p, w, ends, images, rows, y } = self;
        let line_len = p.output.w * p.output.c;
        assert!(w.len() == p.window.taps() * p.output.c, "a filter of another size");
        assert!(y.len() >= images.len() * rows.len() * line_len, "an output band too short");
        let rows_at_once = (PIECE_ELEMENTS / (p.input.w * p.input.c * p.window.stride_h).max(1)).max(1);
        // Several images go together as a whole: rows of each would not follow each other.
        let whole = rows_at_once >= rows.len();
        let images_at_once = if whole { (PIECE_ELEMENTS / p.input.len().max(1)).max(1) } else { 1 };
        let layout = |images: &Range<usize>, rows: &Range<usize>| BlockLayout::of_input(p, images.clone(), rows);
        // As even as they can be.
        let bands = rows.len().div_ceil(rows_at_once);
        let rows = |band| {
            let part = slab_range(rows.len(), bands, band);
            rows.start + part.start..rows.start + part.end
        };
        let of_images = |images: Range<usize>| (0..bands).map(move |band| (images.clone(), rows(band)));
        let parts = || pieces(images.clone(), images_at_once).flat_map(of_images);
        let sizes = parts().fold([0, 0], |[input, output], (images, rows)| {
            let pixels = images.len() * rows.len() * p.output.w;
            [input.max(layout(&images, &rows).vectors()), output.max(pixels)]
        });
        let len = (p.output.c.div_ceil(lanes()) * (sizes[0] + sizes[1]) + p.window.taps()) * MAX_LANES;
        with_scratch(len, |scratch| dispatch(Kernel { p, x, w, ends, parts: parts(), sizes, y, scratch }));
    }
}

/// Pieces of which blocks fit into the second-level cache.
struct Kernel<'a, X, P> {
    p: &'a ConvProblem,
    x: &'a X,
    w: &'a [f32],
    ends: Ends<'a>,
    /// Images and rows of the output.
    parts: P,
    /// Vectors of a block of the input, and of the output.
    sizes: [usize; 2],
    y: &'a mut [f32],
    scratch: &'a mut [f32],
}

impl<X: VectorSource, P: Iterator<Item = (Range<usize>, Range<usize>)>> WithSimd for Kernel<'_, X, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let window = self.p.window;
        specialised!(self, simd, window);
    }
}

impl<X: VectorSource, P: Iterator<Item = (Range<usize>, Range<usize>)>> Kernel<'_, X, P> {
    fn run<S: Simd, const K: usize, const STRIDE: usize>(self, simd: S) {
        simd.vectorize(FixedKernel::<X, P, K, STRIDE>(self));
    }
}

/// With the size of its filter and its stride, or 0 for any.
struct FixedKernel<'a, X, P, const K: usize, const STRIDE: usize>(Kernel<'a, X, P>);

impl<X: VectorSource, P: Iterator<Item = (Range<usize>, Range<usize>)>, const K: usize, const STRIDE: usize> WithSimd
    for FixedKernel<'_, X, P, K, STRIDE>
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Kernel { p, x, w, ends, parts, sizes: [of_input, of_output], y, scratch } = self.0;
        let c = p.output.c;
        let vectors = c.div_ceil(S::F32_LANES);
        let (scratch, _) = S::as_mut_simd_f32s(scratch);
        let (filter, scratch) = scratch.split_at_mut(p.window.taps());
        let (inputs, outputs) = scratch.split_at_mut(vectors * of_input);
        let (mut before, mut done): (Option<BlockLayout>, _) = (None, 0);
        for (images, rows) in parts {
            let layout = BlockLayout::of_input(p, images.clone(), &rows);
            if before.is_none() {
                layout.clear_margins(1, simd.splat_f32s(0.0), inputs);
            }
            Fill { layout: &layout, before: before.as_ref(), x, to: &mut *inputs, block: of_input }.run(simd);
            for vector in 0..vectors {
                let channels = channels_of::<S>(vector, c);
                filter_of(simd, w, c, channels.clone(), filter);
                let bias = bias_vector(simd, &ends, c, channels.clone());
                let block = &inputs[vector * of_input..][..of_input];
                let output = &mut outputs[vector * of_output..][..of_output];
                let next = layout.end() + channels.start;
                let reader = x.reader(simd, channels);
                BlockRows { p, layout: &layout, block, filter: &*filter, bias, rows: &rows }.filter::<S, K, STRIDE>(
                    simd,
                    #[inline(always)]
                    |pixel, sum| {
                        output[pixel] = sum;
                        if STRIDE == 1 {
                            // What the next piece reads comes while this one is summed.
                            VectorReader::<S>::prefetch(&reader, next + pixel * c);
                        }
                    },
                );
            }
            let pixels = rows.len() * p.output.w;
            for image in 0..images.len() {
                let outputs = &outputs[image * pixels..];
                for tile in pieces(0..pixels, TILE) {
                    for vector in 0..vectors {
                        let channels = channels_of::<S>(vector, c);
                        let out =
                            Out { ends: &ends, y: &mut *y, c, channels, first: done, pixel: rows.start * p.output.w };
                        let mut put = out.put(simd);
                        for pixel in tile.clone() {
                            put(pixel, outputs[vector * of_output + pixel]);
                        }
                    }
                }
                done += pixels;
            }
            before = Some(layout);
        }
    }
}

/// Output rows of a block of a vector of channels.
struct BlockRows<'a, V> {
    p: &'a ConvProblem,
    layout: &'a BlockLayout,
    block: &'a [V],
    /// A vector for each tap.
    filter: &'a [V],
    bias: V,
    rows: &'a Range<usize>,
}

impl<V: Copy> BlockRows<'_, V> {
    /// Gives `put` each pixel's place among those of the rows, and its sums.
    #[inline(always)]
    fn filter<S: Simd<f32s = V>, const K: usize, const STRIDE: usize>(self, simd: S, mut put: impl FnMut(usize, V)) {
        let Self { p, layout, block, filter, bias, rows } = self;
        let (window, w_out) = (p.window, p.output.w);
        assert!(block.len() >= layout.vectors() && filter.len() >= window.taps());
        let kernel = RowKernel::<K, STRIDE> { k: window.k_w, stride: window.stride_w };
        let mut line = 0;
        for image in layout.images.clone() {
            for row in rows.clone() {
                let (kernel_rows, under) = kernel_rows(p, row);
                let first = if kernel_rows.is_empty() { 0 } else { layout.row(image, under) };
                let weighted = WeightedRows {
                    x: block.as_ptr().wrapping_add(first),
                    x_step: layout.width,
                    w: filter.as_ptr().wrapping_add(kernel_rows.start * window.k_w),
                    w_step: window.k_w,
                    count: kernel_rows.len(),
                };
                // SAFETY: the block holds the rows under the band, with the columns of all output columns; the filter has its
                // rows.
                unsafe {
                    kernel.filter(
                        simd,
                        weighted,
                        bias,
                        w_out,
                        #[inline(always)]
                        |column: usize, sum: V| put(line + column, sum),
                    );
                }
                line += w_out;
            }
        }
    }
}

/// The bias of some channels; zero where there is none, or one for each pixel.
#[inline(always)]
fn bias_vector<S: Simd>(simd: S, ends: &Ends<'_>, c: usize, channels: Range<usize>) -> S::f32s {
    match ends.bias {
        Some(bias) if bias.len() == c => load(simd, &bias[channels]),
        _ => simd.splat_f32s(0.0),
    }
}

/// The depthwise convolution of some rows of an image, a vector of channels at a time, each in a block that others fill.
pub(in crate::ops) struct BlockFilter {
    /// Of a vector of channels.
    p: ConvProblem,
    layout: BlockLayout,
}

impl BlockFilter {
    /// Of the rows that [`rows_under`] gives.
    pub fn new(part: &ConvProblem) -> Self {
        let mut p = *part;
        (p.input.c, p.output.c, p.groups) = (lanes(), lanes(), lanes());
        let mut layout = BlockLayout::of_input(&p, 0..1, &(0..p.output.h));
        // A row even where all of the output lies in the padding, so that there is a block.
        layout.rows = 0..p.input.h.max(1);
        Self { p, layout }
    }

    /// How the input's pixels lie in a block.
    pub fn lines(&self) -> BlockLines {
        BlockLines { pixels: self.p.input.w, first: self.layout.first, width: self.layout.width }
    }

    /// Elements of a block.
    pub fn block_len(&self) -> usize {
        self.layout.vectors() * lanes()
    }

    /// Makes what lies around the map zero in any number of blocks.
    pub fn clear_margins(&self, blocks: &mut [f32]) {
        self.layout.clear_margins(lanes(), 0.0, blocks);
    }

    /// y `[pixels, lanes]` = φ(x ∗ w + bias), w `[taps, lanes]`.
    pub fn filter(&self, block: &[f32], w: &[f32], ends: Ends<'_>, y: &mut [f32]) {
        dispatch(BlockKernel { of: self, block, w, ends: &ends, y });
    }
}

struct BlockKernel<'a> {
    of: &'a BlockFilter,
    block: &'a [f32],
    w: &'a [f32],
    ends: &'a Ends<'a>,
    y: &'a mut [f32],
}

impl WithSimd for BlockKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let window = self.of.p.window;
        specialised!(self, simd, window);
    }
}

impl BlockKernel<'_> {
    fn run<S: Simd, const K: usize, const STRIDE: usize>(self, simd: S) {
        simd.vectorize(FixedBlockKernel::<K, STRIDE>(self));
    }
}

/// With the size of its filter and its stride, or 0 for any.
struct FixedBlockKernel<'a, const K: usize, const STRIDE: usize>(BlockKernel<'a>);

impl<const K: usize, const STRIDE: usize> WithSimd for FixedBlockKernel<'_, K, STRIDE> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let BlockKernel { of, block, w, ends, y } = self.0;
        let BlockFilter { p, layout } = of;
        let ((block, _), (filter, _)) = (S::as_simd_f32s(block), S::as_simd_f32s(w));
        let (c, rows) = (p.output.c, 0..p.output.h);
        let bias = bias_vector(simd, ends, c, 0..c);
        let put = Out { ends, y, c, channels: 0..c, first: 0, pixel: 0 }.put(simd);
        BlockRows { p, layout, block, filter, bias, rows: &rows }.filter::<S, K, STRIDE>(simd, put);
    }
}

/// Where sums go, and what is done to them.
struct Out<'a, 'b> {
    ends: &'a Ends<'b>,
    y: &'a mut [f32],
    c: usize,
    channels: Range<usize>,
    /// The pixel of y that the first sum is for.
    first: usize,
    /// Which one of its image that is.
    pixel: usize,
}

impl<'a, 'b> Out<'a, 'b> {
    #[inline(always)]
    fn put<S: Simd>(self, simd: S) -> impl FnMut(usize, S::f32s) + use<'a, 'b, S> {
        let Self { ends, y, c, channels, first, pixel } = self;
        let map = ends.bias.filter(|bias| bias.len() != c);
        let start = first * c + channels.start;
        #[inline(always)]
        move |at, mut sum| {
            let range = start + at * c..start + at * c + channels.len();
            let y = &mut y[range.clone()];
            if let Some(map) = map {
                let at = (pixel + at) * c + channels.start;
                sum = simd.add_f32s(sum, load(simd, &map[at..at + channels.len()]));
            }
            if ends.accumulate {
                sum = simd.add_f32s(load(simd, y), sum);
            }
            if let Some(residual) = ends.residual {
                sum = simd.add_f32s(sum, load(simd, &residual[range]));
            }
            if ends.clamp.slope != 1.0 {
                sum = clamp_vector(simd, ends.clamp, sum);
            }
            store(simd, y, sum);
        }
    }
}
