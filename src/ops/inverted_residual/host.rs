//! The host's inverted residual: bands of rows, so that hidden values stay in a core's cache.

use std::cell::Cell;
use std::ops::Range;

use super::{FoldedConv, InvertedResidualOperands, InvertedResidualProblem};
use crate::ops::conv::ConvProblem;
use crate::ops::conv::depthwise::{self, BlockFilter};
use crate::ops::panels::{MAX_VECTORS, Packed, Panels};
use crate::ops::parallel::{slab_range, with_scratch};
use crate::ops::product::{Ends, Product, Rows, Starts};
use crate::ops::shared::Shared;
use crate::ops::simd::MAX_LANES;
use crate::ops::simd::lanes;
use crate::ops::team::{self, each};

/// Hidden channels that are formed at a time, about.
const SLICE: usize = 96;
/// Expanded elements of a band, about: half a megabyte, so that they stay in a core's second-level cache.
const BAND_ELEMENTS: usize = 1 << 17;
/// Hidden values of an image, at most, that are formed as a whole where threads share an image: bands of so few rows would
/// form most of their rows twice.
const WHOLE_ELEMENTS: usize = 1 << 17;

impl InvertedResidualProblem {
    /// Bands of an image: of few enough rows for the cache, and where threads share the image as many for each.
    fn bands(&self) -> usize {
        let Self { n, input, output, window, hidden, has_expand } = *self;
        // Without an expansion no row is formed twice, so that bands may be low, and all channels are filtered together.
        let (elements, channels) =
            if has_expand { (BAND_ELEMENTS, hidden.min(SLICE)) } else { (BAND_ELEMENTS / 4, hidden) };
        let under = elements / (input.w * channels).max(1);
        let rows = under.saturating_sub(window.k_h) / window.stride_h + 1;
        let (bands, threads) = (output.h.div_ceil(rows), team::threads());
        if n >= threads {
            return bands;
        }
        bands.next_multiple_of(threads).min(output.h.max(1))
    }

    /// Whether there are fewer images than threads, and hidden values are few.
    fn is_shared_out_whole(&self) -> bool {
        self.has_expand && self.n < team::threads() && self.input.pixels() * self.hidden <= WHOLE_ELEMENTS
    }
}

thread_local! {
    /// The memory of the last hidden values that were formed as a whole, for the next ones.
    static HIDDEN: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// y = the block's result.
pub(super) fn forward(p: &InvertedResidualProblem, of: &InvertedResidualOperands<'_>, y: &mut [f32]) {
    let y = &mut y[..p.n * p.output.len()];
    let expand = of.expand.zip(p.expand()).map(|(expand, problem)| Packed::of_product(&problem, expand.w));
    let project = Packed::of_product(&p.project(), of.project.w);
    let block = Block { p, of, expand: expand.as_ref().map(Packed::panels), project: project.panels() };
    if p.is_shared_out_whole() {
        return (0..p.n).for_each(|image| block.whole(image, &mut y[image * p.output.len()..][..p.output.len()]));
    }
    let (image_len, line_len, bands) = (p.output.len(), p.output.w * p.output.c, p.bands());
    let y = Shared::new(y);
    each(p.n * bands, |task| {
        let (image, band) = (task / bands, task % bands);
        let rows = slab_range(p.output.h, bands, band);
        let start = image * image_len;
        // SAFETY: bands share no row.
        let y = unsafe { y.range(start + rows.start * line_len..start + rows.end * line_len).slice() };
        block.band(image, rows, y);
    });
}

/// The operands on the host.
struct Block<'a> {
    p: &'a InvertedResidualProblem,
    of: &'a InvertedResidualOperands<'a>,
    expand: Option<Panels<'a>>,
    project: Panels<'a>,
}

impl Block<'_> {
    /// Some output rows of one image.
    fn band(&self, image: usize, rows: Range<usize>, y: &mut [f32]) {
        let (p, of) = (self.p, self.of);
        let (under, part) = depthwise::rows_under(&p.depthwise(), rows.clone());
        let line = p.input.w * p.input.c;
        let x = &of.x.host()[image * p.input.len()..][under.start * line..under.end * line];
        let start = image * p.output.len() + rows.start * p.output.w * p.output.c;
        let residual = of.residual.map(|residual| &residual.host()[start..start + y.len()]);
        let ends = Ends { residual, ..Ends::activated(of.project.b.host(), of.project.clamp) };
        match (self.expand, of.expand) {
            (Some(panels), Some(expand)) => self.in_slices(&part, x, (panels, &expand), &ends, y),
            _ => with_scratch(part.output.len(), |filtered| {
                let of_depthwise = Ends::activated(of.depthwise.b.host(), of.depthwise.clamp);
                depthwise::forward_rows(&part, x, of.depthwise.w.host(), of_depthwise, filtered);
                Product::new(self.project, Rows::contiguous(filtered, p.hidden), ends).run(y);
            }),
        }
    }

    /// One image, first its hidden channels shared out in slices, then the channels of the result: every weight is read once.
    fn whole(&self, image: usize, y: &mut [f32]) {
        let (p, of, lanes) = (self.p, self.of, lanes());
        let (Some(panels), Some(expand)) = (self.expand, of.expand) else { panic!("a block with an expansion") };
        let x = &of.x.host()[image * p.input.len()..][..p.input.len()];
        let part = ConvProblem { n: 1, ..p.depthwise() };
        let (slices, pixels) = (Slices::new(&part, panels), p.output.pixels());
        let mut hidden = HIDDEN.take();
        hidden.resize((p.hidden.div_ceil(lanes) * lanes * pixels).max(hidden.len()), 0.0);
        let filtered = Shared::new(&mut hidden);
        each(slices.count(), |slice| {
            let channels = panels.layout.channels(slices.columns(slice));
            let blocks = channels.start / lanes..channels.end.div_ceil(lanes);
            // SAFETY: slices share no block.
            let filtered =
                unsafe { filtered.range(blocks.start * lanes * pixels..blocks.end * lanes * pixels).slice() };
            slices.with_memory(|expanded, filter| {
                self.slice(&slices, slice, x, (panels, &expand), expanded, filter, filtered);
            });
        });
        let residual = of.residual.map(|residual| &residual.host()[image * p.output.len()..][..p.output.len()]);
        let ends = Ends { residual, ..Ends::activated(of.project.b.host(), of.project.clamp) };
        let (count, threads) = (self.project.layout.count(), team::threads());
        // Where threads cannot have as many panels each, rows are shared out too.
        let parts = if count.is_multiple_of(threads) { 1 } else { threads };
        let y = Shared::new(y);
        each(count * parts, |task| {
            let rows = slab_range(pixels, parts, task % parts);
            let projection = Projection { columns: task / parts..task / parts + 1, rows, channels: 0..p.hidden };
            // SAFETY: tasks have different panels or different rows.
            unsafe { self.project(&projection, pixels, &hidden, &ends, y) };
        });
        HIDDEN.set(hidden);
    }

    /// Hidden channels in slices of a few panels. A slice lies in blocks of a vector of channels each, which the depthwise
    /// convolution reads and writes in order, one by one.
    fn in_slices(
        &self,
        part: &ConvProblem,
        x: &[f32],
        (panels, expand): (Panels<'_>, &FoldedConv<'_>),
        ends: &Ends<'_>,
        y: &mut [f32],
    ) {
        let (slices, pixels) = (Slices::new(part, panels), part.output.pixels());
        let y = Shared::new(y);
        with_scratch(slices.blocks() * pixels * lanes(), |filtered| {
            slices.with_memory(|expanded, filter| {
                for slice in 0..slices.count() {
                    self.slice(&slices, slice, x, (panels, expand), expanded, filter, filtered);
                    let channels = panels.layout.channels(slices.columns(slice));
                    let projection = Projection { columns: 0..self.project.layout.count(), rows: 0..pixels, channels };
                    // SAFETY: nobody else has the rows.
                    unsafe { self.project(&projection, pixels, filtered, ends, y) };
                }
            });
        });
    }

    /// Forms the filtered values of a slice, `[blocks, pixels, lanes]`.
    #[allow(clippy::too_many_arguments, reason = "three of them are memory that the caller lends")]
    fn slice(
        &self,
        slices: &Slices<'_>,
        slice: usize,
        x: &[f32],
        (panels, expand): (Panels<'_>, &FoldedConv<'_>),
        expanded: &mut [f32],
        filter: &mut [f32],
        filtered: &mut [f32],
    ) {
        let (lanes, of_block, columns) = (lanes(), &slices.of_block, slices.columns(slice));
        let channels = panels.layout.channels(columns.clone());
        let rows = Rows::contiguous(x, self.p.input.c);
        let product = Product::new(panels, rows, Ends::activated(expand.b.host(), expand.clamp));
        Product { columns, ..product }.run_in_blocks(of_block.lines(), expanded);
        let filtered = filtered.chunks_exact_mut(slices.part.output.pixels() * lanes);
        for ((channel, expanded), filtered) in
            channels.step_by(lanes).zip(expanded.chunks_exact(of_block.block_len())).zip(filtered)
        {
            self.filter(of_block, channel, expanded, filter, filtered);
        }
    }

    /// The depthwise convolution of a block of channels, of which the last ones may be none.
    fn filter(&self, of_block: &BlockFilter, first: usize, x: &[f32], w: &mut [f32], y: &mut [f32]) {
        let (lanes, hidden, depthwise) = (lanes(), self.p.hidden, &self.of.depthwise);
        let channels = first..(first + lanes).min(hidden);
        let mut bias = [0.0; MAX_LANES];
        bias[..channels.len()].copy_from_slice(&depthwise.b.host()[channels.clone()]);
        for (w, from) in w.chunks_exact_mut(lanes).zip(depthwise.w.host().chunks_exact(hidden)) {
            let (own, none) = w.split_at_mut(channels.len());
            own.copy_from_slice(&from[channels.clone()]);
            none.fill(0.0);
        }
        of_block.filter(x, w, Ends::activated(&bias[..lanes], depthwise.clamp), y);
    }

    /// Adds a part of the projection, of whole blocks and then of what there is of a last one.
    ///
    /// # Safety
    /// Nobody else may use the elements of the result's rows and columns.
    unsafe fn project(&self, of: &Projection, pixels: usize, blocks: &[f32], ends: &Ends<'_>, y: Shared<'_>) {
        let (lanes, c) = (lanes(), self.p.output.c);
        let Projection { columns, rows, channels } = of;
        let whole = channels.end - channels.len() % lanes;
        let range = rows.start * c..rows.end * c;
        let ends = Ends { residual: ends.residual.map(|residual| &residual[range.clone()]), ..*ends };
        let y = y.range(range);
        for (k, run) in [(channels.start..whole, lanes), (whole..channels.end, channels.end - whole)] {
            if k.is_empty() {
                continue;
            }
            let starts = Starts::Every { count: rows.len(), elements: lanes };
            let data = &blocks[(k.start - channels.start) * pixels + rows.start * lanes..];
            let rows = Rows { data, starts, step: pixels * lanes, run };
            let ends = ends.of_part(k.start == 0, k.end == self.p.hidden);
            let product = Product { k, columns: columns.clone(), ..Product::new(self.project, rows, ends) };
            // SAFETY: promised by the caller.
            unsafe { product.run_shared(y) };
        }
    }
}

/// A part of a projection.
struct Projection {
    /// Which panels of its weights.
    columns: Range<usize>,
    /// Which pixels.
    rows: Range<usize>,
    /// Which hidden channels, from the first of the blocks on.
    channels: Range<usize>,
}

/// Slices of the hidden channels.
struct Slices<'a> {
    part: &'a ConvProblem,
    of_block: BlockFilter,
    panels: usize,
    /// Panels of a slice.
    per_slice: usize,
    hidden: usize,
}

impl<'a> Slices<'a> {
    fn new(part: &'a ConvProblem, panels: Panels<'_>) -> Self {
        let layout = &panels.layout;
        let per_slice = (SLICE / layout.channels(0..1).len().max(1)).max(1);
        let (panels, hidden) = (layout.count(), layout.c_out);
        Self { part, of_block: BlockFilter::new(part), panels, per_slice, hidden }
    }

    fn count(&self) -> usize {
        self.panels.div_ceil(self.per_slice)
    }

    /// The panels of a slice.
    fn columns(&self, slice: usize) -> Range<usize> {
        slice * self.per_slice..((slice + 1) * self.per_slice).min(self.panels)
    }

    /// Blocks of a slice at most.
    fn blocks(&self) -> usize {
        (self.per_slice * MAX_VECTORS).min(self.hidden.div_ceil(lanes()))
    }

    /// Lends memory for the expanded values of a slice, their margins cleared, and for a filter.
    fn with_memory(&self, body: impl FnOnce(&mut [f32], &mut [f32])) {
        let (expanded, filter) = (self.of_block.block_len() * self.blocks(), self.part.window.taps() * lanes());
        with_scratch(expanded + filter, |scratch| {
            let (expanded, filter) = scratch.split_at_mut(expanded);
            self.of_block.clear_margins(expanded);
            body(expanded, filter);
        });
    }
}
