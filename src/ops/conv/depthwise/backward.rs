//! Both gradients, from one pass over dy.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::super::ConvProblem;
use super::super::source::{GradientSource, Source};
use super::block::{BlockLayout, Fill, filter_of};
use super::rows::{RowKernel, WeightedRows};
use super::{PIECE_ELEMENTS, channels_of, kernel_rows, specialised};
use crate::ops::batch_norm::{MaskedGradient, SUMMED_PIXELS, SumVectors};
use crate::ops::parallel::{PartialSums, slab_range, slabs, sum_slabs, with_scratch};
use crate::ops::reused::Reused;
use crate::ops::simd::MAX_LANES;
use crate::ops::simd::{dispatch, lanes, load, store};
use crate::ops::streaming;
use crate::ops::vector_source::{Stored, VectorReader, VectorSource};

/// How the work is cut: groups of whole images, or bands of rows of one.
struct Pieces<'a> {
    p: &'a ConvProblem,
    images: usize,
    bands: usize,
}

/// Output rows of some images, and the input rows whose gradient the piece writes.
struct Piece {
    images: Range<usize>,
    rows: Range<usize>,
    rows_in: Range<usize>,
}

impl<'a> Pieces<'a> {
    fn new(p: &'a ConvProblem) -> Self {
        let images = (PIECE_ELEMENTS / p.input.len()).clamp(1, p.n);
        let bands = p.input.len().div_ceil(PIECE_ELEMENTS).min(p.output.h);
        Self { p, images, bands }
    }

    fn count(&self) -> usize {
        self.p.n.div_ceil(self.images) * self.bands
    }

    fn piece(&self, index: usize) -> Piece {
        let Self { p, images, bands } = *self;
        let (group, band) = (index / bands, index % bands);
        let rows = slab_range(p.output.h, bands, band);
        let edge = |row: usize| (row * p.window.stride_h).min(p.input.h);
        let end = if band + 1 == bands { p.input.h } else { edge(rows.end) };
        Piece { images: group * images..((group + 1) * images).min(p.n), rows_in: edge(rows.start)..end, rows }
    }

    fn of(&self, range: Range<usize>) -> impl Iterator<Item = Piece> {
        range.map(|index| self.piece(index))
    }

    /// Elements of the input in front of a piece.
    fn start(&self, index: usize) -> usize {
        if index == self.count() {
            return self.p.n * self.p.input.len();
        }
        let piece = self.piece(index);
        piece.images.start * self.p.input.len() + piece.rows_in.start * self.p.input.w * self.p.input.c
    }
}

impl Piece {
    /// The blocks of what it reads: the input, and the gradient of the output.
    fn layouts(&self, p: &ConvProblem, gives_dx: bool) -> (BlockLayout, BlockLayout) {
        let of_x = BlockLayout::of_input(p, self.images.clone(), &self.rows);
        let mut rows = self.rows.clone();
        if gives_dx {
            let touching = rows_touching(p, &self.rows_in);
            rows = rows.start.min(touching.start)..rows.end.max(touching.end);
        }
        (of_x, BlockLayout::of_gradient(p, self.images.clone(), rows))
    }

    /// Makes zero what lies around the maps in the blocks of all pieces.
    #[inline(always)]
    fn clear_margins<V: Copy>(&self, p: &ConvProblem, gives_dx: bool, zero: V, (x, dy): (&mut [V], &mut [V])) {
        let (of_x, of_dy) = self.layouts(p, gives_dx);
        of_x.clear_margins(1, zero, x);
        of_dy.clear_margins(1, zero, dy);
    }

    /// Pixels of the input's gradient.
    fn pixels_in(&self, p: &ConvProblem) -> usize {
        self.images.len() * self.rows_in.len() * p.input.w
    }
}

/// The output rows under which some input rows lie.
fn rows_touching(p: &ConvProblem, rows_in: &Range<usize>) -> Range<usize> {
    let (window, h) = (p.window, p.output.h);
    let start = (rows_in.start + window.pad.top + 1).saturating_sub(window.k_h).div_ceil(window.stride_h).min(h);
    let end = (rows_in.end + window.pad.top).div_ceil(window.stride_h).min(h);
    start..end.max(start)
}

/// dw and dx (+)= in one walk over the pieces.
pub(in super::super) fn backward(
    p: &ConvProblem,
    x: &Source<'_>,
    w: &[f32],
    dy: &GradientSource<'_>,
    dx: Option<(&mut [f32], bool)>,
    dw: &mut [f32],
) -> PartialSums<f64> {
    let pieces = Pieces::new(p);
    let slab_count = slabs(pieces.count(), dw.len());
    let of_slab = |slab| slab_range(pieces.count(), slab_count, slab);
    let end = |slab| pieces.start(of_slab(slab).end);
    let mut flipped = Reused::zeros(w.len());
    flipped.chunks_exact_mut(p.input.c).zip(w.rchunks_exact(p.input.c)).for_each(|(to, tap)| to.copy_from_slice(tap));
    let is_streamed = streaming::is_gradient_streamed(dx.as_ref());
    let mut sums = x.partial_sums(slab_count);
    sum_slabs(slab_count, (dx, end), &mut sums, dw, |slab, dx, partial, row| {
        partial.fill(0.0);
        let dx = dx.map(|(dx, add)| InputGradient { flipped: &flipped, dx, add, is_streamed });
        let slab = (&pieces, of_slab(slab));
        match (x, dy) {
            (Source::Stored(x), GradientSource::Stored(dy)) => {
                walk(slab, (&Stored(x), None), &Stored(dy), dx, (partial, row));
            }
            (Source::Stored(x), GradientSource::Formed(dy)) => {
                walk(slab, (&Stored(x), None), dy, dx, (partial, row));
            }
            (Source::Normalised(x), GradientSource::Stored(dy)) => {
                walk(slab, (x, Some(x.gradient())), &Stored(dy), dx, (partial, row));
            }
            (Source::Normalised(x), GradientSource::Formed(dy)) => {
                walk(slab, (x, Some(x.gradient())), dy, dx, (partial, row));
            }
        }
    });
    sums
}

/// Where the gradient of the input goes.
struct InputGradient<'a> {
    /// The filter, turned round.
    flipped: &'a [f32],
    /// Of the rows of the input that the pieces cover.
    dx: &'a mut [f32],
    /// Whether to add to what is there.
    add: bool,
    /// Whether it is written past the caches.
    is_streamed: bool,
}

/// Adds the weight gradient of pieces that follow each other to `dw`, and to `total` the sums over the gradient of an input that was
/// normalised on load.
fn walk<X: VectorSource, Y: VectorSource>(
    (pieces, range): (&Pieces<'_>, Range<usize>),
    (x, gradient): (&X, Option<&MaskedGradient<'_>>),
    dy: &Y,
    dx: Option<InputGradient<'_>>,
    (dw, total): (&mut [f32], &mut [f64]),
) {
    let p = pieces.p;
    let mut sizes = Sizes { x: 0, dy: 0, dx: 0 };
    for piece in pieces.of(range.clone()) {
        let (of_x, of_dy) = piece.layouts(p, dx.is_some());
        sizes.x = sizes.x.max(of_x.vectors());
        sizes.dy = sizes.dy.max(of_dy.vectors());
        sizes.dx = sizes.dx.max(if dx.is_some() { piece.pixels_in(p) } else { 0 });
    }
    let vectors = p.input.c.div_ceil(lanes());
    let len = (vectors * (sizes.x + sizes.dy + sizes.dx) + 2 * p.window.taps()) * MAX_LANES;
    with_scratch(len, |scratch| {
        let before = gradient.map(|gradient| (gradient, total));
        dispatch(Kernel { pieces, range, x, dy, before, dx, dw, sizes, scratch });
    });
}

/// Vectors of each kind of block.
#[derive(Clone, Copy)]
struct Sizes {
    x: usize,
    dy: usize,
    dx: usize,
}

/// Memory of a walk.
struct Memory<'a, V> {
    /// A vector for each tap.
    filter: &'a mut [V],
    dw_sums: &'a mut [V],
    /// A block for each vector of channels.
    x_blocks: &'a mut [V],
    dy_blocks: &'a mut [V],
    dx_blocks: &'a mut [V],
}

impl<'a, V> Memory<'a, V> {
    #[inline(always)]
    fn new(memory: &'a mut [V], taps: usize, vectors: usize, sizes: Sizes) -> Self {
        let (filter, memory) = memory.split_at_mut(taps);
        let (dw_sums, memory) = memory.split_at_mut(taps);
        let (x_blocks, memory) = memory.split_at_mut(vectors * sizes.x);
        let (dy_blocks, memory) = memory.split_at_mut(vectors * sizes.dy);
        let dx_blocks = &mut memory[..vectors * sizes.dx];
        Self { filter, dw_sums, x_blocks, dy_blocks, dx_blocks }
    }
}

/// Pieces that follow each other.
struct Kernel<'a, X, Y> {
    pieces: &'a Pieces<'a>,
    range: Range<usize>,
    x: &'a X,
    dy: &'a Y,
    before: Option<(&'a MaskedGradient<'a>, &'a mut [f64])>,
    dx: Option<InputGradient<'a>>,
    dw: &'a mut [f32],
    sizes: Sizes,
    scratch: &'a mut [f32],
}

impl<X: VectorSource, Y: VectorSource> WithSimd for Kernel<'_, X, Y> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let window = self.pieces.p.window;
        specialised!(self, simd, window);
    }
}

impl<X: VectorSource, Y: VectorSource> Kernel<'_, X, Y> {
    fn run<S: Simd, const K: usize, const STRIDE: usize>(self, simd: S) {
        simd.vectorize(FixedKernel::<X, Y, K, STRIDE>(self));
    }
}

/// With the size of its filter and its stride, or 0 for any.
struct FixedKernel<'a, X, Y, const K: usize, const STRIDE: usize>(Kernel<'a, X, Y>);

impl<X: VectorSource, Y: VectorSource, const K: usize, const STRIDE: usize> WithSimd
    for FixedKernel<'_, X, Y, K, STRIDE>
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Kernel { pieces: pieces @ &Pieces { p, .. }, range, x, dy, before, mut dx, dw, sizes, scratch } = self.0;
        let (c, taps, vectors) = (p.input.c, p.window.taps(), p.input.c.div_ceil(S::F32_LANES));
        let (scratch, _) = S::as_mut_simd_f32s(scratch);
        let Memory { filter, dw_sums, x_blocks, dy_blocks, dx_blocks } = Memory::new(scratch, taps, vectors, sizes);
        if !range.is_empty() {
            pieces.piece(range.start).clear_margins(p, dx.is_some(), simd.splat_f32s(0.0), (x_blocks, dy_blocks));
        }
        let (gradient, mut total) = before.unzip();
        let (mut x_before, mut dy_before) = (None, None);
        let mut done = 0;
        for piece in pieces.of(range) {
            let (of_x, of_dy) = piece.layouts(p, dx.is_some());
            Fill { layout: &of_x, before: x_before.as_ref(), x, to: &mut *x_blocks, block: sizes.x }.run(simd);
            Fill { layout: &of_dy, before: dy_before.as_ref(), x: dy, to: &mut *dy_blocks, block: sizes.dy }.run(simd);
            for vector in 0..vectors {
                let channels = channels_of::<S>(vector, c);
                let (x_block, dy_block) = (&x_blocks[vector * sizes.x..], &dy_blocks[vector * sizes.dy..]);
                let blocks = Blocks { p, piece: &piece, of_x: &of_x, of_dy: &of_dy, x: x_block, dy: dy_block };
                // What the next piece reads comes while this one is summed.
                let (x, next_x) = (x.reader(simd, channels.clone()), of_x.end() + channels.start);
                blocks.weight_gradient::<S, K, STRIDE>(
                    simd,
                    (&mut *dw, dw_sums),
                    channels.clone(),
                    #[inline(always)]
                    |pixel| {
                        for under in 0..STRIDE * STRIDE {
                            VectorReader::<S>::prefetch(&x, next_x + (pixel * STRIDE * STRIDE + under) * c);
                        }
                    },
                );
                if let Some(dx) = &dx {
                    filter_of(simd, dx.flipped, c, channels.clone(), filter);
                    let to = PieceGradient {
                        line: &mut dx_blocks[vector * sizes.dx..],
                        add: if dx.add { Some(&dx.dx[done..]) } else { None },
                        before: gradient,
                        total: total.as_deref_mut(),
                    };
                    let (dy, next_dy) = (dy.reader(simd, channels.clone()), of_dy.end());
                    blocks.input_gradient::<S, K>(
                        simd,
                        filter,
                        to,
                        channels,
                        #[inline(always)]
                        |at| {
                            if STRIDE == 1 {
                                VectorReader::<S>::prefetch(&dy, next_dy + at);
                            }
                        },
                    );
                }
            }
            if let Some(dx) = &mut dx {
                let end = done + piece.pixels_in(p) * c;
                drain(simd, c, (&*dx_blocks, sizes.dx), &mut dx.dx[done..end], dx.is_streamed);
                done = end;
            }
            (x_before, dy_before) = (Some(of_x), Some(of_dy));
        }
    }
}

/// The blocks of a vector of channels.
struct Blocks<'a, V> {
    p: &'a ConvProblem,
    piece: &'a Piece,
    of_x: &'a BlockLayout,
    of_dy: &'a BlockLayout,
    x: &'a [V],
    dy: &'a [V],
}

impl<V: Copy> Blocks<'_, V> {
    /// Adds the weight gradient to some channels of `dw`, with memory for a vector for each tap; `ahead` hears of each pixel.
    #[inline(always)]
    fn weight_gradient<S: Simd<f32s = V>, const K: usize, const STRIDE: usize>(
        &self,
        simd: S,
        (dw, sums): (&mut [f32], &mut [V]),
        channels: Range<usize>,
        ahead: impl Fn(usize),
    ) {
        let Self { p, piece, of_x, of_dy, x, dy } = self;
        filter_of(simd, dw, p.input.c, channels.clone(), sums);
        let window = p.window;
        let kernel = RowKernel::<K, STRIDE> { k: window.k_w, stride: window.stride_w };
        for (i, image) in piece.images.clone().enumerate() {
            for row in piece.rows.clone() {
                let (kernel_rows, under) = kernel_rows(p, row);
                let first = (i * piece.rows.len() + row - piece.rows.start) * p.output.w;
                if kernel_rows.is_empty() || of_dy.columns.is_empty() {
                    continue;
                }
                let dy = dy.as_ptr().wrapping_add(of_dy.row(image, row) + of_dy.first);
                // The columns of dy that are not in the block have nothing but zeros under them.
                let x_start = of_x.row(image, under) + of_dy.columns.start * window.stride_w;
                let x = (x.as_ptr().wrapping_add(x_start), of_x.width);
                let sums = sums.as_mut_ptr().wrapping_add(kernel_rows.start * window.k_w);
                // SAFETY: the blocks hold these rows, with all columns of the output and those under them.
                unsafe {
                    let counts = (kernel_rows.len(), of_dy.columns.len());
                    kernel.add_weight_gradient(
                        simd,
                        (dy, of_dy.step),
                        x,
                        counts,
                        sums,
                        #[inline(always)]
                        |column| ahead(first + column),
                    );
                }
            }
        }
        for (dw, sum) in dw.chunks_exact_mut(p.input.c).zip(&*sums) {
            store(simd, &mut dw[channels.clone()], *sum);
        }
    }

    /// The input's gradient, `[images, rows, columns]`, summed where the input was normalised on load.
    #[inline(always)]
    fn input_gradient<S: Simd<f32s = V>, const K: usize>(
        &self,
        simd: S,
        filter: &[V],
        to: PieceGradient<'_, V>,
        channels: Range<usize>,
        prefetch: impl Fn(usize),
    ) {
        let Self { p, piece, of_dy, dy, .. } = self;
        let PieceGradient { line: to, add, before, mut total } = to;
        let (window, c, w) = (p.window, p.input.c, p.input.w);
        let kernel = RowKernel::<K, 1> { k: window.k_w, stride: 1 };
        #[allow(
            clippy::manual_map,
            reason = "a closure that is not inlined is compiled without the vector instructions"
        )]
        let masked = match before {
            Some(before) => Some(before.reader(simd, channels.clone())),
            None => None,
        };
        let first_pixel = (piece.images.start * p.input.h + piece.rows_in.start) * w;
        let (mut done, mut summed, mut sums) = (0, 0, SumVectors::new(simd));
        for image in piece.images.clone() {
            for row in piece.rows_in.clone() {
                let touching = rows_touching(p, &(row..row + 1));
                // The kernel row over the first of them, in the filter that is turned round.
                let first = (touching.start * window.stride_h + window.k_h).saturating_sub(1 + row + window.pad.top);
                let rows = WeightedRows {
                    x: dy.as_ptr().wrapping_add(if touching.is_empty() { 0 } else { of_dy.row(image, touching.start) }),
                    x_step: of_dy.width,
                    w: filter.as_ptr().wrapping_add(first * window.k_w),
                    w_step: window.stride_h * window.k_w,
                    count: touching.len(),
                };
                let line = &mut to[done..done + w];
                // SAFETY: the block holds the rows that touch this one, and so many columns beyond those of the input as the
                // filter has; the filter has its rows.
                unsafe {
                    kernel.filter(
                        simd,
                        rows,
                        simd.splat_f32s(0.0),
                        w,
                        #[inline(always)]
                        |column: usize, mut sum: S::f32s| {
                            let at = (done + column) * c + channels.start;
                            if let Some(dx) = add {
                                sum = simd.add_f32s(load(simd, &dx[at..at + channels.len()]), sum);
                            }
                            line[column] = sum;
                            prefetch(at);
                            if let Some(masked) = &masked {
                                masked.add(simd, first_pixel * c + at, sum, &mut sums);
                            }
                        },
                    );
                }
                done += w;
                summed += w;
                if let Some(total) = &mut total
                    && summed >= SUMMED_PIXELS
                {
                    std::mem::replace(&mut sums, SumVectors::new(simd)).add_to(simd, channels.clone(), total);
                    summed = 0;
                }
            }
        }
        if let Some(total) = total {
            sums.add_to(simd, channels, total);
        }
    }
}

/// Where the gradient of a piece of the input goes.
struct PieceGradient<'a, V> {
    /// A vector of channels of it.
    line: &'a mut [V],
    /// What to add it to, from the piece's first pixel on.
    add: Option<&'a [f32]>,
    before: Option<&'a MaskedGradient<'a>>,
    total: Option<&'a mut [f64]>,
}

/// Writes what blocks hold, each of so many vectors, pixel by pixel; past the caches where asked for, and possible.
#[inline(always)]
fn drain<S: Simd>(simd: S, c: usize, (blocks, block): (&[S::f32s], usize), to: &mut [f32], is_streamed: bool) {
    if is_streamed && streaming::is_aligned::<S>(to, c) {
        let vectors = c / S::F32_LANES;
        let (to, _) = S::as_mut_simd_f32s(to);
        for (pixel, to) in to.chunks_exact_mut(vectors).enumerate() {
            for (vector, to) in to.iter_mut().enumerate() {
                // SAFETY: it is aligned, and `finish` follows.
                unsafe { streaming::store::<S>(to, blocks[vector * block + pixel]) }
            }
        }
        streaming::finish();
        return;
    }
    for (pixel, to) in to.chunks_exact_mut(c).enumerate() {
        let mut at = pixel;
        for first in (0..c).step_by(S::F32_LANES) {
            store(simd, &mut to[first..(first + S::F32_LANES).min(c)], blocks[at]);
            at += block;
        }
    }
}
