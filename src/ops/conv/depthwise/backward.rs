//! Both gradients, from one pass over dy.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::super::ConvProblem;
use super::super::source::{GradientSource, NormalisedSource, Source};
use super::block::{BlockLayout, Fill, filter_of};
use super::rows::{RowKernel, WeightedRows};
use super::{BLOCK_VECTORS, input_width, kernel_rows, pieces, specialised};
use crate::ops::batch_norm::{GradientSums, SUMMED_PIXELS, SumVectors};
use crate::ops::parallel::{slab_range, slabs, sum_slabs, with_scratch};
use crate::ops::product::MAX_LANES;
use crate::ops::simd::{dispatch, load, store};
use crate::ops::vector_source::{Stored, VectorSource};

/// Elements of the input that a unit of work covers, about: its values stay in the second-level cache for all channels.
const UNIT_ELEMENTS: usize = 1 << 16;

/// How the work is cut: groups of whole images, or bands of rows of one.
struct Units<'a> {
    p: &'a ConvProblem,
    images: usize,
    bands: usize,
}

/// Output rows of some images, and the input rows whose gradient the unit writes.
struct Unit {
    images: Range<usize>,
    rows: Range<usize>,
    rows_in: Range<usize>,
}

impl<'a> Units<'a> {
    fn new(p: &'a ConvProblem) -> Self {
        let images = (UNIT_ELEMENTS / p.input.len()).clamp(1, p.n);
        let bands = p.input.len().div_ceil(UNIT_ELEMENTS).min(p.output.h);
        // Rows of a band at least, so that few are formed twice.
        let bands = bands.min((p.output.h / (2 * p.window.k_h)).max(1));
        Self { p, images, bands }
    }

    fn count(&self) -> usize {
        self.p.n.div_ceil(self.images) * self.bands
    }

    fn unit(&self, index: usize) -> Unit {
        let Self { p, images, bands } = *self;
        let (group, band) = (index / bands, index % bands);
        let rows = slab_range(p.output.h, bands, band);
        let edge = |row: usize| (row * p.window.stride_h).min(p.input.h);
        let end = if band + 1 == bands { p.input.h } else { edge(rows.end) };
        Unit { images: group * images..((group + 1) * images).min(p.n), rows_in: edge(rows.start)..end, rows }
    }

    /// Elements of the input in front of a unit.
    fn start(&self, index: usize) -> usize {
        if index == self.count() {
            return self.p.n * self.p.input.len();
        }
        let unit = self.unit(index);
        unit.images.start * self.p.input.len() + unit.rows_in.start * self.p.input.w * self.p.input.c
    }
}

/// dw and dx (+)= in one walk over the units.
pub(in super::super) fn backward(
    p: &ConvProblem,
    x: &Source<'_>,
    w: &[f32],
    dy: &GradientSource<'_>,
    dx: Option<(&mut [f32], bool)>,
    dw: &mut [f32],
) -> Option<GradientSums> {
    let units = Units::new(p);
    let slab_count = slabs(units.count(), dw.len());
    let of_slab = |slab| slab_range(units.count(), slab_count, slab);
    let ends: Vec<usize> = (0..slab_count).map(|slab| units.start(of_slab(slab).end)).collect();
    let flipped: Vec<f32> = w.chunks_exact(p.input.c).rev().flatten().copied().collect();
    let sums = sum_slabs(slab_count, dx, &ends, dw, |slab, mut dx, partial| {
        partial.fill(0.0);
        let mut sums = Vec::new();
        for index in of_slab(slab) {
            let unit = units.unit(index);
            let dx = dx.as_mut().map(|(dx, add)| {
                let (head, rest) = std::mem::take(dx).split_at_mut(units.start(index + 1) - units.start(index));
                *dx = rest;
                InputGradient { flipped: &flipped, dx: head, add: *add }
            });
            sums.extend(unit.gradients(p, x, dy, dx, partial));
        }
        sums
    });
    x.total(sums.into_iter().flatten())
}

/// Where the gradient of the input goes.
struct InputGradient<'a> {
    /// The filter, turned round.
    flipped: &'a [f32],
    /// Of the unit's rows of the input.
    dx: &'a mut [f32],
    /// Whether to add to what is there.
    add: bool,
}

impl Unit {
    /// Adds the weight gradient to `dw`. Returns the sums over the gradient of an input that was normalised on load.
    fn gradients(
        self,
        p: &ConvProblem,
        x: &Source<'_>,
        dy: &GradientSource<'_>,
        dx: Option<InputGradient<'_>>,
        dw: &mut [f32],
    ) -> Option<GradientSums> {
        match (x, dy) {
            (Source::Stored(x), GradientSource::Stored(dy)) => self.form(p, &Stored(x), None, &Stored(dy), dx, dw),
            (Source::Stored(x), GradientSource::Formed(dy)) => self.form(p, &Stored(x), None, &**dy, dx, dw),
            (Source::Normalised(x), GradientSource::Stored(dy)) => self.form(p, &**x, Some(x), &Stored(dy), dx, dw),
            (Source::Normalised(x), GradientSource::Formed(dy)) => self.form(p, &**x, Some(x), &**dy, dx, dw),
        }
    }

    /// In pieces of which a block fits into the first-level cache.
    fn form<X: VectorSource, Y: VectorSource>(
        self,
        p: &ConvProblem,
        x: &X,
        before: Option<&NormalisedSource<'_>>,
        dy: &Y,
        mut dx: Option<InputGradient<'_>>,
        dw: &mut [f32],
    ) -> Option<GradientSums> {
        let width = input_width(p).max(p.input.w + p.window.k_w - 1);
        let mut sums = before.map(|before| before.gradient().no_sums());
        let rows_at_once = (BLOCK_VECTORS / width / p.window.stride_h).saturating_sub(p.window.k_h).max(2);
        // Several images go together as a whole: rows of each would not follow each other.
        let whole = rows_at_once >= self.rows.len();
        let images_at_once = if whole { (BLOCK_VECTORS / (width * p.input.h)).max(1) } else { 1 };
        for images in pieces(self.images.clone(), images_at_once) {
            for rows in pieces(self.rows.clone(), rows_at_once) {
                let piece = self.piece(p, images.clone(), rows);
                let dx = dx.as_mut().map(|dx| {
                    let image = images.start - self.images.start;
                    let row = image * self.rows_in.len() + piece.rows_in.start - self.rows_in.start;
                    let len = images.len() * piece.rows_in.len() * p.input.w * p.input.c;
                    let start = row * p.input.w * p.input.c;
                    InputGradient { flipped: dx.flipped, dx: &mut dx.dx[start..start + len], add: dx.add }
                });
                piece.run(p, (x, dy), before.zip(sums.as_mut()), dx, dw);
            }
        }
        sums
    }

    /// Part of it: some images with all their rows, or some rows of one.
    fn piece(&self, p: &ConvProblem, images: Range<usize>, rows: Range<usize>) -> Self {
        let edge = |row: usize| match row {
            _ if row == self.rows.start => self.rows_in.start,
            _ if row == self.rows.end => self.rows_in.end,
            row => (row * p.window.stride_h).min(p.input.h),
        };
        Self { images, rows_in: edge(rows.start)..edge(rows.end), rows }
    }

    fn run<X: VectorSource, Y: VectorSource>(
        &self,
        p: &ConvProblem,
        (x, dy): (&X, &Y),
        before: Option<(&NormalisedSource<'_>, &mut GradientSums)>,
        dx: Option<InputGradient<'_>>,
        dw: &mut [f32],
    ) {
        let of_x = BlockLayout::of_input(p, self.images.clone(), &self.rows);
        let mut rows = self.rows.clone();
        if dx.is_some() {
            let touching = rows_touching(p, &self.rows_in);
            rows = rows.start.min(touching.start)..rows.end.max(touching.end);
        }
        let of_dy = BlockLayout::of_gradient(p, self.images.clone(), rows);
        let taps = p.window.taps();
        with_scratch((of_x.vectors() + of_dy.vectors() + 2 * taps) * MAX_LANES, |scratch| {
            let kernel = Kernel { p, unit: self, x, dy, of_x: &of_x, of_dy: &of_dy, before, dx, dw, scratch };
            dispatch(kernel);
        });
    }
}

/// The output rows under which some input rows lie.
fn rows_touching(p: &ConvProblem, rows_in: &Range<usize>) -> Range<usize> {
    let (window, h) = (p.window, p.output.h);
    let start = (rows_in.start + window.pad.top + 1).saturating_sub(window.k_h).div_ceil(window.stride_h).min(h);
    let end = (rows_in.end + window.pad.top).div_ceil(window.stride_h).min(h);
    start..end.max(start)
}

/// A piece of a unit.
struct Kernel<'a, X, Y> {
    p: &'a ConvProblem,
    unit: &'a Unit,
    x: &'a X,
    dy: &'a Y,
    of_x: &'a BlockLayout,
    of_dy: &'a BlockLayout,
    before: Option<(&'a NormalisedSource<'a>, &'a mut GradientSums)>,
    dx: Option<InputGradient<'a>>,
    dw: &'a mut [f32],
    scratch: &'a mut [f32],
}

impl<X: VectorSource, Y: VectorSource> WithSimd for Kernel<'_, X, Y> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let window = self.p.window;
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
        let Kernel { p, unit, x, dy, of_x, of_dy, mut before, mut dx, dw, scratch } = self.0;
        let (c, taps) = (p.input.c, p.window.taps());
        let (scratch, _) = S::as_mut_simd_f32s(scratch);
        let (filter, scratch) = scratch.split_at_mut(taps);
        let (sums, blocks) = scratch.split_at_mut(taps);
        blocks.fill(simd.splat_f32s(0.0));
        let (x_block, dy_block) = blocks.split_at_mut(of_x.vectors());
        for first in (0..c).step_by(S::F32_LANES) {
            let channels = first..(first + S::F32_LANES).min(c);
            Fill { layout: of_x, x, channels: channels.clone(), to: &mut *x_block }.run(simd);
            Fill { layout: of_dy, x: dy, channels: channels.clone(), to: &mut *dy_block }.run(simd);
            filter_of(simd, dw, c, channels.clone(), sums);
            let blocks = Blocks { p, unit, of_x, of_dy, x: &*x_block, dy: &*dy_block };
            blocks.weight_gradient::<S, K, STRIDE>(simd, sums);
            for (dw, sum) in dw.chunks_exact_mut(c).zip(&*sums) {
                store(simd, &mut dw[channels.clone()], *sum);
            }
            if let Some(dx) = &mut dx {
                filter_of(simd, dx.flipped, c, channels.clone(), filter);
                let before = before.as_mut().map(|(before, sums)| (*before, &mut **sums));
                blocks.input_gradient::<S, K>(simd, filter, before, dx, channels);
            }
        }
    }
}

/// The blocks of a vector of channels.
struct Blocks<'a, V> {
    p: &'a ConvProblem,
    unit: &'a Unit,
    of_x: &'a BlockLayout,
    of_dy: &'a BlockLayout,
    x: &'a [V],
    dy: &'a [V],
}

impl<V: Copy> Blocks<'_, V> {
    /// Adds the weight gradient to a vector for each tap.
    #[inline(always)]
    fn weight_gradient<S: Simd<f32s = V>, const K: usize, const STRIDE: usize>(&self, simd: S, sums: &mut [V]) {
        let Self { p, unit, of_x, of_dy, x, dy } = self;
        let window = p.window;
        let kernel = RowKernel::<K, STRIDE> { k: window.k_w, stride: window.stride_w };
        for image in unit.images.clone() {
            for row in unit.rows.clone() {
                let (kernel_rows, under) = kernel_rows(p, row);
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
                    kernel.add_weight_gradient(simd, (dy, of_dy.step), x, counts, sums);
                }
            }
        }
    }

    /// Writes the input's gradient, and sums it where the input was normalised on load.
    #[inline(always)]
    fn input_gradient<S: Simd<f32s = V>, const K: usize>(
        &self,
        simd: S,
        filter: &[V],
        mut before: Option<(&NormalisedSource<'_>, &mut GradientSums)>,
        to: &mut InputGradient<'_>,
        channels: Range<usize>,
    ) {
        let Self { p, unit, of_dy, dy, .. } = self;
        let (window, c, w) = (p.window, p.input.c, p.input.w);
        let kernel = RowKernel::<K, 1> { k: window.k_w, stride: 1 };
        #[allow(
            clippy::manual_map,
            reason = "a closure that is not inlined is compiled without the vector instructions"
        )]
        let masked = match &before {
            Some((before, _)) => Some(before.gradient().reader(simd, channels.clone())),
            None => None,
        };
        let (mut line, mut summed, mut sums) = (channels.start, 0, SumVectors::new(simd));
        for image in unit.images.clone() {
            for row in unit.rows_in.clone() {
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
                let start = (image * p.input.h + row) * w * c + channels.start;
                let (dx, add) = (&mut *to.dx, to.add);
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
                            let dx = &mut dx[line + column * c..][..channels.len()];
                            if add {
                                sum = simd.add_f32s(load(simd, dx), sum);
                            }
                            store(simd, dx, sum);
                            if let Some(masked) = &masked {
                                masked.add(simd, start + column * c, sum, &mut sums);
                            }
                        },
                    );
                }
                line += w * c;
                summed += w;
                if let Some((_, total)) = &mut before
                    && summed >= SUMMED_PIXELS
                {
                    std::mem::replace(&mut sums, SumVectors::new(simd)).add_to(simd, channels.clone(), total);
                    summed = 0;
                }
            }
        }
        if let Some((_, total)) = before {
            sums.add_to(simd, channels, total);
        }
    }
}
