//! Cutting a forward convolution into tasks.

use std::ops::Range;

use super::ConvProblem;
use crate::ops::batch_norm::{moments, moments_len};
use crate::ops::parallel::{Chunks, PartialSums, slab_range, with_scratch};
use crate::ops::shared::Shared;
use crate::ops::streaming;
use crate::ops::team::each;

/// Tasks that there should be at least, while bands have so many pixels for which a panel of weights is loaded.
const BANDS: usize = 16;
const BAND_PIXELS: usize = 48;
/// Tasks that there should be in any case: where bands are fewer, their channels are shared out.
const TASKS: usize = 4;

/// Chunks that a thread takes one behind the other, so that it can ask for what the next one reads, while there are so many tasks.
const CHUNKS_OF_TASK: usize = 8;
const TASKS_OF_CHUNKS: usize = 32;

/// A part of the output.
pub(super) struct Part<'a> {
    pub lines: Range<usize>,
    /// Lines that the same thread forms next; may be none.
    pub next: Range<usize>,
    /// Panels of its channels.
    pub panels: Range<usize>,
    /// What the lines lie in.
    pub y: Shared<'a>,
}

/// Runs `sum` over all lines of the output, cut into chunks, and all panels of its channels (one where channels stay together),
/// and takes the moments of every chunk while it is in cache, where they are asked for. Where chunks are few, threads would not
/// share them evenly: then sums are taken in smaller parts.
pub(super) fn in_parts(
    p: &ConvProblem,
    (chunks, panels): (Chunks, usize),
    y: &mut [f32],
    takes_moments: bool,
    sum: impl Fn(Part<'_>) + Sync,
) -> PartialSums<f32> {
    let band = chunks.lines.div_ceil(BANDS).max(BAND_PIXELS.div_ceil(p.output.w));
    let bands = chunks.lines.div_ceil(band);
    let columns = TASKS.div_ceil(bands).min(panels);
    let in_bands = band < chunks.lines_per_chunk || columns > 1;
    if in_bands {
        let y = Shared::new(y);
        each(bands * columns, |task| {
            let lines = slab_range(chunks.lines, bands, task / columns);
            let part = y.range(lines.start * chunks.line_len..lines.end * chunks.line_len);
            let panels = slab_range(panels, columns, task % columns);
            sum(Part { next: lines.end..lines.end, lines, panels, y: part });
        });
    }
    let is_streamed = !in_bands && streaming::is_streamed(y.len());
    let y = Shared::new(y);
    let run = (chunks.count() / TASKS_OF_CHUNKS).clamp(1, CHUNKS_OF_TASK);
    let finish = |y: &[f32], row: &mut [f32]| {
        if takes_moments {
            moments(y, p.output.c, row);
        }
    };
    let row = if takes_moments { moments_len(p.output.c) } else { 0 };
    PartialSums::taken(chunks.count(), row, run, |chunk, row| {
        let (range, lines) = (chunks.range(chunk), chunks.line_range(chunk));
        let next = if (chunk + 1) % run == 0 || chunk + 1 == chunks.count() {
            lines.end..lines.end
        } else {
            chunks.line_range(chunk + 1)
        };
        let y = y.range(range.clone());
        if is_streamed {
            return with_scratch(range.len(), |sums| {
                sum(Part { lines, next, panels: 0..panels, y: Shared::new(sums) });
                finish(sums, row);
                // SAFETY: chunks share no element.
                streaming::copy(sums, unsafe { y.slice() });
            });
        }
        if !in_bands {
            sum(Part { lines, next, panels: 0..panels, y });
        }
        // SAFETY: chunks share no element, and its sums are taken.
        finish(unsafe { y.slice() }, row);
    })
}
