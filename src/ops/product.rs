//! Products of the host with weights in panels: y[i, c] = φ(b[c] + Σ x[i, k]·w[c, k] + r[i, c]).
//!
//! A tile of rows × channels stays in registers while the whole reduction is added to it; bias, residual and activation
//! are applied to it there. Weights lie in panels as wide as a tile, so that each step of the reduction reads one run of
//! them. A sum is a chain of fused products in the order of the reduction that starts at the bias, however the work is cut:
//! results are the same bits for any split into rows, channels or parts of the reduction.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::activation::Clamp;
use super::ahead::{Ahead, LINE, ask};
use super::panels::{MAX_VECTORS, Panels};
use super::shared::Shared;
use super::simd::{clamp_vector, dispatch, load, unrolled, with_constant};

/// Rows of a tile at most: more addresses than that are not kept in registers.
const MAX_ROWS: usize = 12;

/// The left operand. The reduction of a row is cut into runs of memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    pub data: &'a [f32],
    /// Where each row's first run begins.
    pub starts: Starts<'a>,
    /// From a run of a row to its next.
    pub step: usize,
    /// Elements of a run.
    pub run: usize,
}

/// Where rows begin.
#[derive(Debug, Clone, Copy)]
pub(super) enum Starts<'a> {
    /// So many, one every so many elements.
    Every { count: usize, elements: usize },
    /// At these places.
    At(&'a [usize]),
}

impl<'a> Rows<'a> {
    /// Rows of `k` elements that follow each other.
    pub fn contiguous(data: &'a [f32], k: usize) -> Self {
        Self { data, starts: Starts::Every { count: data.len() / k, elements: k }, step: 0, run: k }
    }

    fn count(&self) -> usize {
        match self.starts {
            Starts::Every { count, .. } => count,
            Starts::At(places) => places.len(),
        }
    }
}

/// What a sum starts from, and what is done to it behind the last product.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends<'a> {
    /// Whether to go on from what is there; else from the bias.
    pub accumulate: bool,
    /// `[pixels, c]`, repeated over the rows of the result: one pixel of a bias per channel, an image's of a bias map.
    pub bias: Option<&'a [f32]>,
    /// Of the layout of the result.
    pub residual: Option<&'a [f32]>,
    pub clamp: Clamp,
}

impl<'a> Ends<'a> {
    /// The sum alone.
    pub const NONE: Self = Self { accumulate: false, bias: None, residual: None, clamp: Clamp::NONE };

    /// A bias and an activation.
    pub fn activated(bias: &'a [f32], clamp: Clamp) -> Self {
        Self { bias: Some(bias), clamp, ..Self::NONE }
    }

    /// The ends of one of several parts of the reduction.
    pub fn of_part(&self, first: bool, last: bool) -> Self {
        Self {
            accumulate: self.accumulate || !first,
            bias: self.bias.filter(|_| first),
            residual: self.residual.filter(|_| last),
            clamp: if last { self.clamp } else { Clamp::NONE },
        }
    }
}

/// A product, or a part of one.
#[derive(Debug, Clone)]
pub(super) struct Product<'a> {
    pub panels: Panels<'a>,
    /// The group of channels.
    pub group: usize,
    /// Which of its panels.
    pub columns: Range<usize>,
    /// Which part of the reduction the rows hold.
    pub k: Range<usize>,
    pub rows: Rows<'a>,
    /// The number of the first row in the whole result.
    pub first_row: usize,
    pub ends: Ends<'a>,
    /// What is asked for meanwhile.
    pub ahead: Ahead<'a>,
}

/// Where sums go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Rows of all channels of all groups.
    Whole,
    /// A block for each vector of the channels that are formed.
    Blocks(BlockLines),
}

/// How rows that are the pixels of a map lie in a block of a vector of channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockLines {
    /// Pixels of a line of the map.
    pub pixels: usize,
    /// Where the first of them lies in a line of the block.
    pub first: usize,
    /// Vectors of a line of the block.
    pub width: usize,
}

impl BlockLines {
    /// Vectors of a block of so many rows.
    pub fn vectors(&self, rows: usize) -> usize {
        rows / self.pixels * self.width
    }
}

impl<'a> Product<'a> {
    /// Of all panels of the only group, the whole reduction.
    pub fn new(panels: Panels<'a>, rows: Rows<'a>, ends: Ends<'a>) -> Self {
        let layout = panels.layout;
        Self {
            panels,
            group: 0,
            columns: 0..layout.count(),
            k: 0..layout.k,
            rows,
            first_row: 0,
            ends,
            ahead: Ahead::default(),
        }
    }

    /// Writes `[rows, c]`: of each row the channels of the panels; those of other panels and groups stay.
    pub fn run(self, y: &mut [f32]) {
        // SAFETY: nobody else has the slice.
        unsafe { self.run_shared(Shared::new(y)) }
    }

    /// The same into a result that others write too.
    ///
    /// # Safety
    /// Nobody else may use the elements that it writes.
    pub unsafe fn run_shared(self, y: Shared<'_>) {
        self.run_at(Place::Whole, y);
    }

    /// Writes nothing but the channels of the panels, in blocks `[lines, width, lanes]`, one for each vector of them, so that
    /// whoever goes on with a vector at a time reads memory in order. What lies around the lines stays, and what a last
    /// vector lacks.
    pub fn run_in_blocks(self, lines: BlockLines, y: &mut [f32]) {
        self.run_at(Place::Blocks(lines), Shared::new(y));
    }

    /// Runs small products in a row that differ in their panels, the data of their rows and the result alone: what it costs to
    /// begin is paid once.
    ///
    /// # Safety
    /// Nobody else may use the elements that they write.
    pub unsafe fn run_each(self, operands: impl Iterator<Item = (Panels<'a>, &'a [f32], Shared<'a>)>) {
        struct Each<'a, I>(Product<'a>, I);
        impl<'a, I: Iterator<Item = (Panels<'a>, &'a [f32], Shared<'a>)>> WithSimd for Each<'a, I> {
            type Output = ();

            #[inline(always)]
            fn with_simd<S: Simd>(self, simd: S) {
                let Self(mut product, operands) = self;
                for (panels, data, y) in operands {
                    product.panels = panels;
                    product.rows.data = data;
                    Tiles { of: &product, y, place: Place::Whole }.with_simd(simd);
                }
            }
        }
        dispatch(Each(self, operands));
    }

    fn run_at(self, place: Place, y: Shared<'_>) {
        dispatch(Tiles { of: &self, y, place });
    }

    /// Where sums go, seen to be inside of the result.
    #[inline(always)]
    fn steps<S: Simd>(&self, place: Place, y: Shared<'_>) -> Steps {
        let layout = self.panels.layout;
        let all = layout.groups * layout.c_out;
        let (rows, lanes) = (self.rows.count(), S::F32_LANES);
        let vectors = layout.cut(lanes).vectors_of(self.columns.clone()).len();
        let steps = match place {
            Place::Whole => Steps { row: all, vector: lanes, line: usize::MAX, gap: 0, first: 0 },
            Place::Blocks(lines) => {
                assert!(
                    rows.is_multiple_of(lines.pixels) && lines.first + lines.pixels <= lines.width,
                    "lines of a block"
                );
                let (gap, first) = ((lines.width - lines.pixels) * lanes, lines.first * lanes);
                Steps { row: lanes, vector: lines.vectors(rows) * lanes, line: lines.pixels, gap, first }
            }
        };
        let elements = if place == Place::Whole { rows * all } else { vectors * steps.vector };
        assert!(elements <= y.len() && self.k.end <= layout.k && self.rows.run > 0, "a product's result too short");
        assert!(self.k.len().is_multiple_of(self.rows.run), "a product of part of a run");
        assert!(self.ends.residual.is_none_or(|residual| residual.len() >= elements), "a product's residual too short");
        assert!(self.ends.bias.is_none_or(|bias| bias.len() >= all && bias.len() % all == 0), "a bias of other pixels");
        steps
    }
}

/// Rows of a tile of so many vectors: sums take three quarters of the registers.
#[inline(always)]
pub(super) fn most_rows<S: Simd>(vectors: usize) -> usize {
    (S::REGISTER_COUNT * 3 / 4 / vectors).clamp(1, MAX_ROWS)
}

/// Distances in a result.
#[derive(Debug, Clone, Copy)]
struct Steps {
    /// From one row to the next.
    row: usize,
    /// From one vector of channels to the next.
    vector: usize,
    /// Rows of a line, and what lies between two lines.
    line: usize,
    gap: usize,
    /// In front of row 0.
    first: usize,
}

/// A walk over the rows of a result.
struct Walk {
    /// Where the row begins.
    at: usize,
    /// Rows of its line from it on.
    left: usize,
}

impl Steps {
    /// From a row on.
    #[inline(always)]
    fn walk(&self, row: usize) -> Walk {
        let line = row / self.line;
        Walk { at: self.first + row * self.row + line * self.gap, left: self.line - (row - line * self.line) }
    }
}

impl Walk {
    /// Where the row begins; goes on to the next.
    #[inline(always)]
    fn next(&mut self, steps: &Steps) -> usize {
        let at = self.at;
        self.left -= 1;
        let ends = self.left == 0;
        self.left = if ends { steps.line } else { self.left };
        self.at += steps.row + if ends { steps.gap } else { 0 };
        at
    }
}

/// A product in tiles.
struct Tiles<'t, 'a> {
    of: &'t Product<'a>,
    y: Shared<'t>,
    place: Place,
}

impl WithSimd for Tiles<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Product { panels, group, columns, k, rows, first_row, ends, ahead } = self.of;
        let mut ahead = *ahead;
        let (layout, steps) = (&panels.layout, self.of.steps::<S>(self.place, self.y));
        let (cut, len) = (layout.cut(S::F32_LANES), layout.group_len(S::F32_LANES));
        let group_data = &panels.data[group * len..][..len];
        let (count, origin) = (rows.count(), cut.vectors_of(columns.clone()).start);
        let tiles_of = |panel| count.div_ceil(most_rows::<S>(cut.vectors_of(panel..panel + 1).len()));
        let lines = match ahead.len() {
            0 => 0,
            len => len.div_ceil(LINE).div_ceil(columns.clone().map(tiles_of).sum::<usize>().max(1)),
        };
        for panel in columns.clone() {
            let vectors = cut.vectors_of(panel..panel + 1);
            let channels = layout.channels_of(vectors.clone(), S::F32_LANES);
            let width = vectors.len() * S::F32_LANES;
            let weights = &group_data[vectors.start * S::F32_LANES * layout.k..][..width * layout.k];
            let weights = &weights[k.start * width..k.end * width];
            let channel = group * layout.c_out + channels.start;
            let start = match self.place {
                Place::Whole => channel,
                Place::Blocks(_) => (vectors.start - origin) * steps.vector,
            };
            // Weights come from far away: the next panel's are asked for while this one's are used.
            let (next, after) = match panel + 1 < columns.end {
                true => (&group_data[vectors.end * S::F32_LANES * layout.k..], panel + 1),
                false => (panels.next, 0),
            };
            let next_len = cut.vectors_of(after..after + 1).len() * S::F32_LANES * k.len();
            let next = &next[..if k.len() == layout.k { next_len.min(next.len()) } else { 0 }];
            // Tiles of as many rows, or one more.
            let tiles = count.div_ceil(most_rows::<S>(vectors.len()));
            let (few, large) = (count.checked_div(tiles).unwrap_or(0), count.checked_rem(tiles).unwrap_or(0));
            let (next_large, next_few) = next.split_at(large * next.len() / tiles.max(1));
            for (range, tiles, next) in
                [(0..large * (few + 1), large, next_large), (large * (few + 1)..count, tiles - large, next_few)]
            {
                let mut strip = Strip {
                    weights,
                    rows,
                    first: range.start,
                    tiles,
                    steps: &steps,
                    start,
                    channels: channels.len(),
                    y: self.y,
                    ends,
                    bias: (channel, layout.groups * layout.c_out),
                    first_row: *first_row,
                    next,
                    ahead: (&mut ahead, lines),
                };
                if let Some(rows) = range.len().checked_div(tiles) {
                    match vectors.len() {
                        1 => with_constant!(rows, R => strip.run::<S, 1, R>(simd)),
                        2 => with_constant!(rows, R => strip.run::<S, 2, R>(simd)),
                        _ => with_constant!(rows, R => strip.run::<S, MAX_VECTORS, R>(simd)),
                    }
                }
            }
        }
    }
}

/// Tiles of the sums of as many rows each × a panel's channels.
struct Strip<'t, 'a> {
    weights: &'t [f32],
    rows: &'t Rows<'a>,
    /// Number of the first row.
    first: usize,
    tiles: usize,
    steps: &'t Steps,
    /// Where the first channel of row 0 lies in `y`.
    start: usize,
    /// Channels that are stored.
    channels: usize,
    y: Shared<'t>,
    ends: &'t Ends<'a>,
    /// The first channel in a pixel of the bias, and that pixel's elements.
    bias: (usize, usize),
    first_row: usize,
    /// Weights that are asked for meanwhile.
    next: &'t [f32],
    /// What else is, and how many lines of it with each tile.
    ahead: (&'t mut Ahead<'a>, usize),
}

impl Strip<'_, '_> {
    /// A function for each size: in one for all, the compiler gives up on keeping sums in registers.
    #[inline(never)]
    fn run<S: Simd, const V: usize, const R: usize>(&mut self, simd: S) {
        simd.vectorize(FixedStrip::<V, R>(self));
    }
}

/// Tiles of `V` vectors × `R` rows.
struct FixedStrip<'s, 't, 'a, const V: usize, const R: usize>(&'s mut Strip<'t, 'a>);

impl<const V: usize, const R: usize> WithSimd for FixedStrip<'_, '_, '_, V, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let strip = self.0;
        let (weights, _) = S::as_simd_f32s(strip.weights);
        let (weights, _) = weights.as_chunks::<V>();
        let (run, step, data) = (strip.rows.run, strip.rows.step, strip.rows.data);
        // From the first element of a row to behind its last.
        let reach = (weights.len() / run).saturating_sub(1) * step + run;
        if let Starts::Every { elements, .. } = strip.rows.starts {
            let last = (strip.first + strip.tiles * R - 1) * elements;
            assert!(last + reach <= data.len(), "a product's row outside of its operand");
        }
        let bias = strip.channel_bias::<S, V>(simd);
        let (clamp, in_registers) = (strip.ends.clamp, strip.is_finished_in_registers());
        let mut walk = strip.steps.walk(strip.first);
        for tile in 0..strip.tiles {
            strip.ask(tile);
            let first = strip.first + tile * R;
            let mut x = [std::ptr::null::<f32>(); R];
            match strip.rows.starts {
                Starts::Every { elements, .. } => {
                    unrolled!(I < R, x[I] = data.as_ptr().wrapping_add((first + I) * elements));
                }
                Starts::At(places) => {
                    let places = &places[first..first + R];
                    unrolled!(I < R, x[I] = data[places[I]..][..reach].as_ptr());
                }
            }
            let mut at = [0; R];
            unrolled!(I < R, at[I] = walk.next(strip.steps) + strip.start);
            let mut sums = [[simd.splat_f32s(0.0); V]; R];
            unrolled!(I < R, sums[I] = bias);
            if strip.ends.accumulate {
                unrolled!(
                    I < R,
                    unrolled!(J < V, sums[I][J] = strip.read::<S, V>(simd, strip.y.as_mut_ptr(), at[I], J), 0 1 2)
                );
            }
            for weights in weights.chunks_exact(run) {
                for (j, weights) in weights.iter().enumerate() {
                    unrolled!(I < R, {
                        // SAFETY: a run's elements, as many as weights, lie within the row's reach.
                        let x = simd.splat_f32s(unsafe { *x[I].add(j) });
                        unrolled!(J < V, sums[I][J] = simd.mul_add_e_f32s(x, weights[J], sums[I][J]), 0 1 2);
                    });
                }
                unrolled!(I < R, x[I] = x[I].wrapping_add(step));
            }
            if let Some(residual) = strip.ends.residual.filter(|_| in_registers) {
                unrolled!(I < R, {
                    unrolled!(J < V, {
                        let residual = strip.read::<S, V>(simd, residual.as_ptr(), at[I], J);
                        sums[I][J] = simd.add_f32s(sums[I][J], residual);
                    }, 0 1 2);
                });
            }
            if in_registers && clamp.slope == 0.0 {
                unrolled!(I < R, unrolled!(J < V, sums[I][J] = clamp_vector(simd, clamp, sums[I][J]), 0 1 2));
            }
            unrolled!(I < R, unrolled!(J < V, strip.write::<S, V>(simd, at[I], J, sums[I][J]), 0 1 2));
            if !in_registers {
                unrolled!(I < R, strip.finish::<S, V>(simd, first + I, at[I]));
            }
        }
    }
}

impl Strip<'_, '_> {
    /// Asks for what comes behind this strip, a part of it with each tile.
    #[inline(always)]
    fn ask(&mut self, tile: usize) {
        ask(&self.next[tile * self.next.len() / self.tiles..(tile + 1) * self.next.len() / self.tiles]);
        let (ahead, lines) = &mut self.ahead;
        if *lines > 0 {
            ask(ahead.take(*lines * LINE));
        }
    }

    /// What sums start from unless they go on: the bias per channel.
    #[inline(always)]
    fn channel_bias<S: Simd, const V: usize>(&self, simd: S) -> [S::f32s; V] {
        let mut vectors = [simd.splat_f32s(0.0); V];
        if let Some(bias) = self.ends.bias.filter(|bias| bias.len() == self.bias.1) {
            let bias = &bias[self.bias.0..][..self.channels];
            unrolled!(J < V, vectors[J] = load(simd, &bias[lanes_of::<S>(J, bias.len())]), 0 1 2);
        }
        vectors
    }

    /// Whether nothing follows the sums but a residual and an activation without slope.
    #[inline(always)]
    fn is_finished_in_registers(&self) -> bool {
        let has_map = self.ends.bias.is_some_and(|bias| bias.len() != self.bias.1);
        !has_map && matches!(self.ends.clamp.slope, 0.0 | 1.0)
    }

    /// Adds a bias that is a map and the residual to a row, and activates, in cache.
    #[inline(always)]
    fn finish<S: Simd, const V: usize>(&self, simd: S, row: usize, at: usize) {
        let (channel, c) = self.bias;
        for v in 0..V {
            let mut sum = self.read::<S, V>(simd, self.y.as_mut_ptr(), at, v);
            if let Some(map) = self.ends.bias.filter(|bias| bias.len() != c) {
                let map = &map[(self.first_row + row) * c % map.len() + channel..][..self.channels];
                sum = simd.add_f32s(sum, load(simd, &map[lanes_of::<S>(v, map.len())]));
            }
            if let Some(residual) = self.ends.residual {
                sum = simd.add_f32s(sum, self.read::<S, V>(simd, residual.as_ptr(), at, v));
            }
            if self.ends.clamp.slope != 1.0 {
                sum = clamp_vector(simd, self.ends.clamp, sum);
            }
            self.write::<S, V>(simd, at, v, sum);
        }
    }

    /// The elements of a vector of channels that are there; only the last vector may lack some.
    #[inline(always)]
    fn elements<S: Simd, const V: usize>(&self, vector: usize) -> usize {
        if vector + 1 < V { S::F32_LANES } else { self.channels - (V - 1) * S::F32_LANES }
    }

    /// A vector of the row that begins at an element, of the result or of what lies like it.
    #[inline(always)]
    fn read<S: Simd, const V: usize>(&self, simd: S, from: *const f32, row: usize, vector: usize) -> S::f32s {
        let (at, len) = (row + vector * self.steps.vector, self.elements::<S, V>(vector));
        debug_assert!(at + len <= self.y.len());
        // SAFETY: `run_at` has seen that all rows lie inside of the result and of what is read with it, and whoever runs it
        // that the result's are its own.
        unsafe {
            match len == S::F32_LANES {
                true => from.add(at).cast::<S::f32s>().read_unaligned(),
                false => simd.partial_load_f32s(std::slice::from_raw_parts(from.add(at), len)),
            }
        }
    }

    /// The opposite for the result.
    #[inline(always)]
    fn write<S: Simd, const V: usize>(&self, simd: S, row: usize, vector: usize, sum: S::f32s) {
        let (at, len) = (row + vector * self.steps.vector, self.elements::<S, V>(vector));
        debug_assert!(at + len <= self.y.len());
        // SAFETY: as for `read`.
        unsafe {
            let to = self.y.as_mut_ptr().add(at);
            match len == S::F32_LANES {
                true => to.cast::<S::f32s>().write_unaligned(sum),
                false => simd.partial_store_f32s(std::slice::from_raw_parts_mut(to, len), sum),
            }
        }
    }
}

/// The elements of a vector among those of several.
#[inline(always)]
fn lanes_of<S: Simd>(vector: usize, len: usize) -> Range<usize> {
    (vector * S::F32_LANES).min(len)..((vector + 1) * S::F32_LANES).min(len)
}
