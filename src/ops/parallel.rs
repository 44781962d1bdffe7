//! Splitting work into chunks whose borders depend on the problem alone, never on the number of threads: this is what
//! makes every result bit-identical for any thread count.

use std::cell::RefCell;
use std::ops::Range;

use super::reused::{Reusable, Reused};
use super::shared::Shared;
use super::team::{each, each_chunk};
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

/// A row of numbers for each of some tasks, which they sum up: zeros at first.
pub(super) struct PartialSums<T: Reusable> {
    tasks: usize,
    /// Numbers of a row; may be 0.
    len: usize,
    values: Reused<T>,
}

impl<T: Reusable> PartialSums<T> {
    /// Of `tasks` rows of `len` numbers.
    pub fn new(tasks: usize, len: usize) -> Self {
        Self { tasks, len, values: Reused::zeros(tasks * len) }
    }

    /// Numbers of a row.
    pub fn row_len(&self) -> usize {
        self.len
    }

    /// The rows in the order of the tasks.
    pub fn rows(&self) -> impl Iterator<Item = &[T]> {
        (0..self.tasks).map(|task| &self.values[task * self.len..(task + 1) * self.len])
    }
}

impl<T: Reusable + Send> PartialSums<T> {
    /// Calls `task` with every number below `tasks` and with its row, in runs of so many tasks that one thread does one behind
    /// the other.
    pub fn taken(tasks: usize, len: usize, run: usize, task: impl Fn(usize, &mut [T]) + Sync) -> Self {
        let mut sums = Self::new(tasks, len);
        let rows = Shared::new(&mut sums.values);
        each(tasks.div_ceil(run), |part| {
            for number in part * run..((part + 1) * run).min(tasks) {
                // SAFETY: each task has a row of its own.
                task(number, unsafe { rows.range(number * len..(number + 1) * len).slice() });
            }
        });
        sums
    }
}

/// Channel coefficients repeated over neighbouring pixels, so that loops over them are long enough for the vector units
/// even where channels are few.
pub(super) fn tiled(c: usize, coefficient: impl Fn(usize) -> f32) -> Reused<f32> {
    let mut tile = Reused::zeros(tile_len(c));
    (0..c).for_each(|channel| tile[channel] = coefficient(channel));
    (c..tile.len()).step_by(c).for_each(|pixel| tile.copy_within(..c, pixel));
    tile
}

/// Elements of a tile of whole pixels of `c` channels.
pub(super) fn tile_len(c: usize) -> usize {
    const TILE: usize = 128;
    c * TILE.div_ceil(c)
}

/// A reduction in slabs: every slab writes its own part of `dx`, its own partial sum of `out` (of any content at first), which are
/// added in slab order, and its own rows of `sums`, as [`slab_range`] shares them out. `end(slab)` is where the slab's part of `dx`
/// ends.
pub(super) fn sum_slabs(
    count: usize,
    (dx, end): (Option<(&mut [f32], bool)>, impl Fn(usize) -> usize + Sync),
    sums: &mut PartialSums<f64>,
    out: &mut [f32],
    slab: impl Fn(usize, Option<(&mut [f32], bool)>, &mut [f32], &mut [f64]) + Sync,
) {
    let accumulate = dx.as_ref().is_some_and(|d| d.1);
    let start = |slab: usize| if slab == 0 { 0 } else { end(slab - 1) };
    assert!((0..count).all(|slab| start(slab) <= end(slab)), "a slab's part of the input's gradient");
    let (dx, len) = (dx.map(|d| d.0), out.len());
    PARTIALS.with_borrow_mut(|partials| {
        if partials.len() < count * len {
            partials.resize(count * len, 0.0);
        }
        let partials = &mut partials[..count * len];
        let (of_dx, of_partials, rows) = (dx.map(Shared::new), Shared::new(partials), Shared::new(&mut sums.values));
        each(count, |index| {
            let own = slab_range(sums.tasks, count, index);
            // SAFETY: slabs share no element of any.
            let (dx, partial, rows) = unsafe {
                let dx = of_dx.map(|dx| (dx.range(start(index)..end(index)).slice(), accumulate));
                let rows = rows.range(own.start * sums.len..own.end * sums.len).slice();
                (dx, of_partials.range(index * len..(index + 1) * len).slice(), rows)
            };
            slab(index, dx, partial, rows);
        });
        sum_partials(partials, out);
    });
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
