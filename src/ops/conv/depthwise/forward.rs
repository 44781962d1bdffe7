//! The forward pass.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::super::ConvProblem;
use super::super::parts::in_parts;
use super::super::source::Source;
use super::block::{BlockLayout, Fill, filter_of};
use super::rows::{RowKernel, WeightedRows};
use super::{BLOCK_VECTORS, input_rows, input_width, kernel_rows, pieces, specialised};
use crate::ops::parallel::{Chunks, with_scratch};
use crate::ops::product::{BlockLines, Ends, MAX_LANES, Shared};
use crate::ops::simd::{clamp_vector, dispatch, lanes, load, store};
use crate::ops::vector_source::{Stored, VectorSource};

/// Elements of a chunk: bands are so high that little is formed twice, and stay in the second-level cache.
const CHUNK_ELEMENTS: usize = 1 << 16;
/// Output rows of a block at least: of fewer, most of the input's rows would be put there twice or more.
const MIN_ROWS: usize = 8;

/// y = φ(x ∗ w + bias + residual).
pub(in super::super) fn forward<R: Send>(
    p: &ConvProblem,
    x: &Source<'_>,
    w: &[f32],
    ends: &Ends<'_>,
    y: &mut [f32],
    finish: impl Fn(Range<usize>, &mut [f32]) -> R + Sync,
) -> Vec<R> {
    let (h, line_len) = (p.output.h, p.output.w * p.output.c);
    let sum = |lines: Range<usize>, _, y: Shared<'_>| {
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
                Source::Normalised(x) => band.form(&**x),
            }
            line += count;
        }
    };
    in_parts(p, Chunks::of(p.output_lines(), CHUNK_ELEMENTS), 1, y, sum, finish)
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
    /// Forms them, in smaller bands where a block would be too large.
    fn form<X: VectorSource>(self, x: &X) {
        let Self { p, w, ends, images, rows, y } = self;
        let (width, line_len) = (input_width(p), p.output.w * p.output.c);
        assert!(w.len() == p.window.taps() * p.output.c, "a filter of another size");
        assert!(y.len() >= images.len() * rows.len() * line_len, "an output band too short");
        let rows_at_once = (BLOCK_VECTORS / width).saturating_sub(p.window.k_h) / p.window.stride_h + 1;
        let rows_at_once = rows_at_once.max(MIN_ROWS);
        // Several images go together as a whole: rows of each would not follow each other.
        let whole = rows_at_once >= rows.len();
        let images_at_once = if whole { (BLOCK_VECTORS / (width * p.input.h.max(1))).max(1) } else { 1 };
        let mut at = 0;
        for images in pieces(images, images_at_once) {
            for rows in pieces(rows.clone(), rows_at_once) {
                let part = at..at + images.len() * rows.len() * line_len;
                let ends = Ends { residual: ends.residual.map(|residual| &residual[part.clone()]), ..ends };
                let layout = BlockLayout::of_input(p, images.clone(), &rows);
                with_scratch((layout.vectors() + p.window.taps()) * MAX_LANES, |scratch| {
                    let y = &mut y[part.clone()];
                    let kernel = Kernel { p, x, w, ends, layout: &layout, rows, y, scratch };
                    dispatch(kernel);
                });
                at = part.end;
            }
        }
    }
}

/// A band that fits into the first-level cache.
struct Kernel<'a, X> {
    p: &'a ConvProblem,
    x: &'a X,
    w: &'a [f32],
    ends: Ends<'a>,
    layout: &'a BlockLayout,
    rows: Range<usize>,
    y: &'a mut [f32],
    scratch: &'a mut [f32],
}

impl<X: VectorSource> WithSimd for Kernel<'_, X> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let window = self.p.window;
        specialised!(self, simd, window);
    }
}

impl<X: VectorSource> Kernel<'_, X> {
    fn run<S: Simd, const K: usize, const STRIDE: usize>(self, simd: S) {
        simd.vectorize(FixedKernel::<X, K, STRIDE>(self));
    }
}

/// With the size of its filter and its stride, or 0 for any.
struct FixedKernel<'a, X, const K: usize, const STRIDE: usize>(Kernel<'a, X>);

impl<X: VectorSource, const K: usize, const STRIDE: usize> WithSimd for FixedKernel<'_, X, K, STRIDE> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Kernel { p, x, w, ends, layout, rows, y, scratch } = self.0;
        let c = p.output.c;
        let (scratch, _) = S::as_mut_simd_f32s(scratch);
        let (block, filter) = scratch.split_at_mut(layout.vectors());
        layout.clear_margins(1, simd.splat_f32s(0.0), block);
        for first in (0..c).step_by(S::F32_LANES) {
            let channels = first..(first + S::F32_LANES).min(c);
            Fill { layout, x, channels: channels.clone(), to: &mut *block }.run(simd);
            filter_of(simd, w, c, channels.clone(), filter);
            let (block, filter) = (&*block, &*filter);
            BlockRows { p, layout, block, filter, ends: &ends, rows: &rows, channels }.filter::<S, K, STRIDE>(simd, y);
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
    ends: &'a Ends<'a>,
    rows: &'a Range<usize>,
    /// Those of the vector among all of the output.
    channels: Range<usize>,
}

impl<V: Copy> BlockRows<'_, V> {
    #[inline(always)]
    fn filter<S: Simd<f32s = V>, const K: usize, const STRIDE: usize>(self, simd: S, y: &mut [f32]) {
        let Self { p, layout, block, filter, ends, rows, channels } = self;
        let (window, c, w_out) = (p.window, p.output.c, p.output.w);
        assert!(block.len() >= layout.vectors() && filter.len() >= window.taps());
        let kernel = RowKernel::<K, STRIDE> { k: window.k_w, stride: window.stride_w };
        let bias = match ends.bias.filter(|bias| bias.len() == c) {
            Some(bias) => load(simd, &bias[channels.clone()]),
            None => simd.splat_f32s(0.0),
        };
        let mut line = channels.start;
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
                let out = Out { ends, y: &mut *y, line, pixel: row * w_out, c, channels: &channels };
                // SAFETY: the block holds the rows under the band, with the columns of all output columns; the filter has its
                // rows.
                unsafe { kernel.filter(simd, weighted, bias, w_out, out.put(simd)) };
                line += w_out * c;
            }
        }
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
        let (rows, channels) = (&(0..p.output.h), 0..p.output.c);
        BlockRows { p, layout, block, filter, ends, rows, channels }.filter::<S, K, STRIDE>(simd, y);
    }
}

/// Where a row of sums goes, and what is done to them.
struct Out<'a, 'b> {
    ends: &'a Ends<'b>,
    y: &'a mut [f32],
    /// The element of the first sum.
    line: usize,
    /// The first pixel in its image.
    pixel: usize,
    c: usize,
    channels: &'a Range<usize>,
}

impl<'a, 'b> Out<'a, 'b> {
    #[inline(always)]
    fn put<S: Simd>(self, simd: S) -> impl FnMut(usize, S::f32s) + use<'a, 'b, S> {
        let Self { ends, y, line, pixel, c, channels } = self;
        let map = ends.bias.filter(|bias| bias.len() != c);
        #[inline(always)]
        move |column, mut sum| {
            let at = line + column * c..line + column * c + channels.len();
            let y = &mut y[at.clone()];
            if let Some(map) = map {
                let at = (pixel + column) * c + channels.start;
                sum = simd.add_f32s(sum, load(simd, &map[at..at + channels.len()]));
            }
            if ends.accumulate {
                sum = simd.add_f32s(load(simd, y), sum);
            }
            if let Some(residual) = ends.residual {
                sum = simd.add_f32s(sum, load(simd, &residual[at]));
            }
            if ends.clamp.slope != 1.0 {
                sum = clamp_vector(simd, ends.clamp, sum);
            }
            store(simd, y, sum);
        }
    }
}
