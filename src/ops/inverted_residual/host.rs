//! The host's inverted residual: bands of rows, so that hidden values stay in a core's cache.

use std::cell::Cell;
use std::ops::Range;

use super::{FoldedConv, InvertedResidualOperands, InvertedResidualProblem};
use crate::device::{View, ViewMut};
use crate::ops::conv::depthwise::{self, BlockFilter};
use crate::ops::conv::{self, ConvProblem};
use crate::ops::epilogue::{BiasOperand, Epilogue};
use crate::ops::parallel::{slab_range, with_scratch};
use crate::ops::product::{Ends, MAX_LANES, MAX_VECTORS, Packed, Panels, Product, Rows, Shared, Starts};
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
        self.n < team::threads() && self.input.pixels() * self.hidden <= WHOLE_ELEMENTS
    }
}

thread_local! {
    /// The memory of the last hidden values that were formed as a whole, for the next ones.
    static HIDDEN: Cell<[Vec<f32>; 2]> = const { Cell::new([const { Vec::new() }; 2]) };
}

/// One convolution after the other: every one is shared out among the threads.
fn forward_whole(p: &InvertedResidualProblem, of: &InvertedResidualOperands<'_>, y: &mut [f32]) {
    let [mut expanded, mut filtered] = HIDDEN.take();
    let expand = p.expand().zip(of.expand);
    if let Some((expand, _)) = expand {
        expanded.resize(expand.n * expand.output.len(), 0.0);
    }
    filtered.resize(p.n * p.depthwise().output.len(), 0.0);
    let conv = |p: &ConvProblem, x, conv: &FoldedConv<'_>, residual, y: &mut [f32]| {
        let epilogue = Epilogue { bias: BiasOperand::Channel(conv.b), residual, act: Some(conv.clamp.into()) };
        conv::forward(p, x, conv.w, &epilogue, ViewMut::Host(y));
    };
    let x = match expand {
        Some((problem, parameters)) => {
            conv(&problem, of.x, &parameters, None, &mut expanded);
            View::Host(&expanded)
        }
        None => of.x,
    };
    conv(&p.depthwise(), x, &of.depthwise, None, &mut filtered);
    conv(&p.project(), View::Host(&filtered), &of.project, of.residual, y);
    HIDDEN.set([expanded, filtered]);
}

/// y = the block's result.
pub(super) fn forward(p: &InvertedResidualProblem, of: &InvertedResidualOperands<'_>, y: &mut [f32]) {
    let y = &mut y[..p.n * p.output.len()];
    if p.is_shared_out_whole() {
        return forward_whole(p, of, y);
    }
    let expand = of.expand.zip(p.expand()).map(|(expand, problem)| Packed::of_product(&problem, expand.w));
    let project = Packed::of_product(&p.project(), of.project.w);
    let block = Block { p, of, expand: expand.as_ref().map(Packed::panels), project: project.panels() };
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
        let (lanes, layout) = (lanes(), panels.layout());
        let (of_block, pixels, taps) = (BlockFilter::new(part), part.output.pixels(), part.window.taps());
        let per_slice = (SLICE / layout.channels(0..1).len().max(1)).max(1);
        let blocks = (per_slice * MAX_VECTORS).min(self.p.hidden.div_ceil(lanes));
        with_scratch(of_block.block_len() * blocks + (pixels * blocks + taps) * lanes, |scratch| {
            let (expanded, rest) = scratch.split_at_mut(of_block.block_len() * blocks);
            let (filtered, filter) = rest.split_at_mut(pixels * blocks * lanes);
            of_block.clear_margins(expanded);
            for first in (0..layout.count()).step_by(per_slice) {
                let columns = first..(first + per_slice).min(layout.count());
                let channels = layout.channels(columns.clone());
                let rows = Rows::contiguous(x, self.p.input.c);
                let product = Product::new(panels, rows, Ends::activated(expand.b.host(), expand.clamp));
                Product { columns, ..product }.run_in_blocks(of_block.lines(), expanded);
                let blocks = expanded.chunks_exact(of_block.block_len()).zip(filtered.chunks_exact_mut(pixels * lanes));
                for (channel, (expanded, filtered)) in channels.clone().step_by(lanes).zip(blocks) {
                    self.filter(&of_block, channel, expanded, &mut filter[..taps * lanes], filtered);
                }
                self.project(channels, pixels, filtered, ends, y);
            }
        });
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

    /// Adds a slice's part of the projection, of whole blocks and then of what there is of a last one.
    fn project(&self, channels: Range<usize>, pixels: usize, blocks: &[f32], ends: &Ends<'_>, y: &mut [f32]) {
        let lanes = lanes();
        let whole = channels.end - channels.len() % lanes;
        let mut add = |k: Range<usize>, blocks: &[f32], run: usize| {
            if !k.is_empty() {
                let starts = Starts::Every { count: pixels, elements: lanes };
                let rows = Rows { data: blocks, starts, step: pixels * lanes, run };
                let ends = ends.of_part(k.start == 0, k.end == self.p.hidden);
                Product { k, ..Product::new(self.project, rows, ends) }.run(y);
            }
        };
        add(channels.start..whole, blocks, lanes);
        add(whole..channels.end, &blocks[(whole - channels.start) * pixels..], channels.end - whole);
    }
}
