//! Sums of outer products on the host: what the weight gradient of a product is.
//!
//! A tile of the result stays in registers while all pixels are added to it, so that nothing is packed or transposed. Vectors
//! run over the operand with more channels. Each sum is a chain of fused products in the order of the pixels.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::ahead::{Ahead, LINE};
use super::panels::MAX_VECTORS;
use super::product::most_rows;
use super::simd::MAX_LANES;
use super::simd::{dispatch, load, prefetch, store, unrolled, with_constant};

/// Lines of the cache that are asked for with each pixel.
const LINES: usize = 2;

/// Some channels of pixels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pixels<'a> {
    /// From the first pixel's first channel on.
    pub data: &'a [f32],
    /// How many.
    pub count: usize,
    /// From one pixel to the next.
    pub step: usize,
    /// Channels.
    pub c: usize,
}

impl<'a> Pixels<'a> {
    /// All channels of pixels that follow each other.
    pub fn new(data: &'a [f32], c: usize) -> Self {
        Self { data, count: data.len() / c, step: c, c }
    }

    /// Some of the channels.
    pub fn channels(&self, range: Range<usize>) -> Self {
        assert!(range.end <= self.c, "channels that pixels do not have");
        Self { data: &self.data[range.start..], c: range.len(), ..*self }
    }

    fn is_whole(&self) -> bool {
        self.c > 0 && self.count > 0 && (self.count - 1) * self.step + self.c <= self.data.len()
    }
}

/// out `[rows.c, columns.c]` = Σ over pixels of rows ⊗ columns, or added to it.
///
/// # Panics
/// When the operands have different pixels or none, or the result has another size.
pub(super) fn sum_outer(
    rows: Pixels<'_>,
    columns: Pixels<'_>,
    out: &mut [f32],
    accumulate: bool,
    ahead: &mut Ahead<'_>,
) {
    let pixels = columns.count;
    assert!(rows.count == pixels && rows.is_whole() && columns.is_whole(), "operands of other pixels, or of none");
    assert_eq!(out.len(), rows.c * columns.c, "a sum of outer products of another size");
    dispatch(Tiles { rows, columns, pixels, out, accumulate, ahead });
}

struct Tiles<'a, 'b> {
    rows: Pixels<'a>,
    columns: Pixels<'a>,
    pixels: usize,
    out: &'a mut [f32],
    accumulate: bool,
    ahead: &'a mut Ahead<'b>,
}

impl WithSimd for Tiles<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { rows, columns, pixels, out, accumulate, ahead } = self;
        let vectors = columns.c.div_ceil(S::F32_LANES);
        let panels = vectors.div_ceil(MAX_VECTORS);
        for panel in 0..panels {
            let range = panel * vectors / panels..(panel + 1) * vectors / panels;
            let tiles = rows.c.div_ceil(most_rows::<S>(range.len()));
            for tile in 0..tiles {
                let first_row = tile * rows.c / tiles;
                let count = (tile + 1) * rows.c / tiles - first_row;
                let first_column = range.start * S::F32_LANES;
                let ahead = ahead.take(pixels * LINES * LINE);
                let tile = Tile { rows, columns, pixels, out: &mut *out, accumulate, first_row, first_column, ahead };
                match range.len() {
                    1 => with_constant!(count, R => tile.run::<S, 1, R>(simd)),
                    2 => with_constant!(count, R => tile.run::<S, 2, R>(simd)),
                    _ => with_constant!(count, R => tile.run::<S, MAX_VECTORS, R>(simd)),
                }
            }
        }
    }
}

/// Some rows × some vectors of the result.
struct Tile<'a> {
    rows: Pixels<'a>,
    columns: Pixels<'a>,
    pixels: usize,
    out: &'a mut [f32],
    accumulate: bool,
    first_row: usize,
    first_column: usize,
    ahead: &'a [f32],
}

impl Tile<'_> {
    /// A function for each size: in one for all, the compiler gives up on keeping sums in registers.
    #[inline(never)]
    fn run<S: Simd, const V: usize, const R: usize>(self, simd: S) {
        simd.vectorize(FixedTile::<V, R>(self));
    }
}

/// A tile of `V` vectors × `R` rows.
struct FixedTile<'a, const V: usize, const R: usize>(Tile<'a>);

impl<const V: usize, const R: usize> WithSimd for FixedTile<'_, V, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let tile = self.0;
        let (row_step, column_step) = (tile.rows.step, tile.columns.step);
        let rows = &tile.rows.data[tile.first_row..];
        let columns = &tile.columns.data[tile.first_column..];
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        // Vectors of the last pixels reach behind the operand where channels do not fill them.
        let width = V * S::F32_LANES;
        let whole = columns.len().checked_sub(width).map_or(0, |rest| rest / column_step + 1).min(tile.pixels);
        assert!(rows.len() >= (tile.pixels - 1) * row_step + R);
        let (mut row, mut column) = (rows.as_ptr(), columns.as_ptr());
        let mut ahead = tile.ahead.chunks(LINES * LINE);
        for _ in 0..whole {
            if let Some(ahead) = ahead.next() {
                unrolled!(I < LINES, prefetch(ahead.as_ptr().wrapping_add(I * LINE)), 0 1);
            }
            let mut vectors = [simd.splat_f32s(0.0); V];
            // SAFETY: pixels below `whole` have all these elements of both operands, as counted above.
            unrolled!(J < V, vectors[J] = unsafe { column.add(J * S::F32_LANES).cast::<S::f32s>().read_unaligned() }, 0 1 2);
            unrolled!(I < R, {
                // SAFETY: as above.
                let x = simd.splat_f32s(unsafe { *row.add(I) });
                unrolled!(J < V, sums[I][J] = simd.mul_add_e_f32s(x, vectors[J], sums[I][J]), 0 1 2);
            });
            (row, column) = (row.wrapping_add(row_step), column.wrapping_add(column_step));
        }
        for pixel in whole..tile.pixels {
            let mut padded = [0.0; MAX_VECTORS * MAX_LANES];
            let there = &columns[pixel * column_step..];
            let len = there.len().min(width);
            padded[..len].copy_from_slice(&there[..len]);
            let (vectors, _) = S::as_simd_f32s(&padded);
            unrolled!(I < R, {
                let x = simd.splat_f32s(rows[pixel * row_step + I]);
                unrolled!(J < V, sums[I][J] = simd.mul_add_e_f32s(x, vectors[J], sums[I][J]), 0 1 2);
            });
        }
        let c = tile.columns.c;
        let last = (tile.first_column + width).min(c);
        unrolled!(I < R, {
            unrolled!(J < V, {
                let start = tile.first_column + J * S::F32_LANES;
                let at = (tile.first_row + I) * c;
                let out = &mut tile.out[at + start..at + (start + S::F32_LANES).min(last)];
                let sum = if tile.accumulate { simd.add_f32s(load(simd, out), sums[I][J]) } else { sums[I][J] };
                store(simd, out, sum);
            }, 0 1 2);
        });
    }
}
