//! Cutting a forward convolution into tasks.

use std::ops::Range;

use super::ConvProblem;
use crate::ops::parallel::{Chunks, slab_range};
use crate::ops::product::Shared;
use crate::ops::team::{each, map};

/// Tasks that there should be at least, while bands have so many pixels for which a panel of weights is loaded.
const BANDS: usize = 16;
const BAND_PIXELS: usize = 48;
/// Tasks that there should be in any case: where bands are fewer, their channels are shared out.
const TASKS: usize = 4;

/// Runs `sum` over all lines of the output, cut into chunks, and all panels of its channels (one where channels stay together),
/// then `finish` over every chunk, whose answers come back in order. Where chunks are few, threads would not share them evenly:
/// then sums are taken in smaller parts.
pub(super) fn in_parts<R: Send>(
    p: &ConvProblem,
    chunks: Chunks,
    panels: usize,
    y: &mut [f32],
    sum: impl Fn(Range<usize>, Range<usize>, Shared<'_>) + Sync,
    finish: impl Fn(Range<usize>, &mut [f32]) -> R + Sync,
) -> Vec<R> {
    let band = chunks.lines.div_ceil(BANDS).max(BAND_PIXELS.div_ceil(p.output.w));
    let bands = chunks.lines.div_ceil(band);
    let columns = TASKS.div_ceil(bands).min(panels);
    let in_bands = band < chunks.lines_per_chunk || columns > 1;
    if in_bands {
        let y = Shared::new(y);
        each(bands * columns, |task| {
            let lines = slab_range(chunks.lines, bands, task / columns);
            let part = y.range(lines.start * chunks.line_len..lines.end * chunks.line_len);
            sum(lines, slab_range(panels, columns, task % columns), part);
        });
    }
    let y = Shared::new(y);
    map(chunks.count(), |chunk| {
        let (range, lines) = (chunks.range(chunk), chunks.line_range(chunk));
        let y = y.range(range.clone());
        if !in_bands {
            sum(lines, 0..panels, y);
        }
        // SAFETY: chunks share no element, and its sums are taken.
        finish(range, unsafe { y.slice() })
    })
}
