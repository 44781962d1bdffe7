//! Splitting work into chunks whose borders depend on the problem alone, never on the number of threads: this is what
//! makes every result bit-identical for any thread count.

use std::cell::RefCell;
use std::ops::Range;

use super::shared::Shared;
use super::team::{each_chunk, map};
use crate::shape::Lines;

/// Elements of an activation chunk: small enough to stay in a core's cache between the convolution that writes it and
/// the epilogue that reads it again.
const CHUNK_ELEMENTS: usize = 1 << 13;
/// Pixels a chunk holds at least, so that a panel of weights is loaded for many.
const CHUNK_MIN_PIXELS: usize = 128;
/// Partial sums of a weight gradient: so many for threads to share, more where each is still over so many units of work, since
/// each costs memory and a start without what a unit leaves for the next; and at most so many elements altogether.
const FEW_SLABS: usize = 8;
const SLAB_UNITS: usize = 14;
const MAX_SLABS: usize = 32;
const MAX_SLAB_ELEMENTS: usize = 1 << 22;

/// Consecutive lines (rows of pixels) of an activation `[n, h, w, c]`, cut into chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunks {
    /// Lines in all: n·h.
    pub lines: usize,
    /// Lines per chunk; the last may be shorter.
    pub lines_per_chunk: usize,
    /// Elements per line: w·c.
    pub line_len: usize,
}

impl Chunks {
    /// Cuts an activation.
    pub fn new(lines: Lines) -> Self {
        Self::of(lines, CHUNK_ELEMENTS)
    }

    /// Cuts an activation into chunks of about so many elements.
    pub fn of(Lines { lines, w, c }: Lines, elements: usize) -> Self {
        let pixels = (elements / c.max(1)).max(CHUNK_MIN_PIXELS);
        Self { lines, lines_per_chunk: pixels.div_ceil(w).clamp(1, lines.max(1)), line_len: w * c }
    }

    /// Number of chunks.
    pub fn count(&self) -> usize {
        self.lines.div_ceil(self.lines_per_chunk)
    }

    /// Elements per chunk; the last may be shorter.
    pub fn chunk_len(&self) -> usize {
        self.lines_per_chunk * self.line_len
    }

    /// The elements of a chunk.
    pub fn range(&self, chunk: usize) -> Range<usize> {
        let lines = self.line_range(chunk);
        lines.start * self.line_len..lines.end * self.line_len
    }

    /// The lines of a chunk.
    pub fn line_range(&self, chunk: usize) -> Range<usize> {
        let start = chunk * self.lines_per_chunk;
        start..(start + self.lines_per_chunk).min(self.lines)
    }
}

/// How many partial sums a reduction over `units` work units into `len` elements keeps.
pub(super) fn slabs(units: usize, len: usize) -> usize {
    let slabs = (units / SLAB_UNITS).clamp(FEW_SLABS, MAX_SLABS).min(units);
    slabs.min(MAX_SLAB_ELEMENTS / len.max(1)).max(1)
}

/// The work units of a slab: an even, ordered split.
pub(super) fn slab_range(units: usize, slabs: usize, slab: usize) -> Range<usize> {
    slab * units / slabs..(slab + 1) * units / slabs
}

/// Channel coefficients repeated over neighbouring pixels, so that loops over them are long enough for the vector units
/// even where channels are few.
pub(super) fn tiled(coefficients: &[f32]) -> Vec<f32> {
    let c = coefficients.len();
    coefficients.iter().copied().cycle().take(tile_len(c)).collect()
}

/// Elements of a tile of whole pixels of `c` channels.
pub(super) fn tile_len(c: usize) -> usize {
    const TILE: usize = 128;
    c * TILE.div_ceil(c)
}

/// A reduction in slabs: every slab writes its own part of `dx` and its own partial sum of `out` (of any content at
/// first), and the partial sums are added in slab order. `ends[slab]` is where the slab's part of `dx` ends. What the
/// slabs return comes back in their order.
pub(super) fn sum_slabs<R: Send>(
    count: usize,
    dx: Option<(&mut [f32], bool)>,
    ends: &[usize],
    out: &mut [f32],
    slab: impl Fn(usize, Option<(&mut [f32], bool)>, &mut [f32]) -> R + Sync,
) -> Vec<R> {
    let accumulate = dx.as_ref().is_some_and(|d| d.1);
    assert!(ends.is_sorted() && ends.len() == count, "a slab's part of the input's gradient");
    let dx = dx.map(|d| d.0);
    let len = out.len();
    PARTIALS.with_borrow_mut(|partials| {
        if partials.len() < count * len {
            partials.resize(count * len, 0.0);
        }
        let partials = &mut partials[..count * len];
        let (of_dx, of_partials) = (dx.map(Shared::new), Shared::new(partials));
        let results = map(count, |index| {
            let start = if index == 0 { 0 } else { ends[index - 1] };
            // SAFETY: slabs share no element of either.
            let (dx, partial) = unsafe {
                let dx = of_dx.map(|dx| (dx.range(start..ends[index]).slice(), accumulate));
                (dx, of_partials.range(index * len..(index + 1) * len).slice())
            };
            slab(index, dx, partial)
        });
        sum_partials(partials, out);
        results
    })
}

/// Adds `partials` `[count, out.len()]` in order.
fn sum_partials(partials: &[f32], out: &mut [f32]) {
    const BLOCK: usize = 4096;
    let len = out.len();
    each_chunk(out, BLOCK, |block, out| {
        super::simd::vectorised(
            #[inline(always)]
            || {
                let start = block * BLOCK;
                out.copy_from_slice(&partials[start..start + out.len()]);
                for partial in partials[len..].chunks_exact(len) {
                    for (o, p) in out.iter_mut().zip(&partial[start..]) {
                        *o += p;
                    }
                }
            },
        );
    });
}

thread_local! {
    static PARTIALS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// Memory that nobody borrows at present.
    static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Lends scratch memory of at least `len` elements, of any content. The thread keeps it for whoever asks next.
pub(super) fn with_scratch<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut scratch = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    let result = body(&mut scratch[..len]);
    SCRATCH.with_borrow_mut(|free| free.push(scratch));
    result
}
