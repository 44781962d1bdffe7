//! The tiles on the host: transforms in registers, a vector of channels at a time, around one product per position.

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::{A, B, POSITIONS, TILE, WinogradProblem, padded};
use crate::device::View;
use crate::ops::activation::Clamp;
use crate::ops::conv::ConvProblem;
use crate::ops::parallel::{slab_range, with_scratch};
use crate::ops::product::{Ends, Panels, Product, Rows, Shared, Starts};
use crate::ops::simd::{clamp_vector, dispatch, load, store, unrolled};
use crate::ops::team::{each, threads};

/// Elements that a core's second-level cache holds, and those of the transformed tiles of a task, which are to stay there.
const CACHE_ELEMENTS: usize = 256 << 10;
const TASK_ELEMENTS: usize = 96 << 10;
/// Tiles of a task at least, so that weights are read for many.
const MIN_TASK_TILES: usize = 24;
/// Elements between the tiles of two positions, so that these do not fall on the same lines of a cache.
const GAP: usize = 16;

/// y = φ(x ∗ w + bias + residual); `w` as [`WinogradProblem::pack`] packs it, or packed here for one pass.
pub(super) fn forward(of: &WinogradProblem, x: &[f32], w: View<'_>, ends: &Ends<'_>, y: &mut [f32]) {
    let mut own = Vec::new();
    let packed = w.panels().unwrap_or_else(|| {
        own.resize(of.packed_elements(), 0.0);
        of.pack(w.host(), &mut own);
        &own
    });
    let (panels, y) = (Panels::new(of.products(), packed), Shared::new(y));
    let ConvProblem { n, input, output, .. } = *of.conv();
    let tiles = n * of.tiles_per_image();
    let threads = threads();
    // Weights that no cache keeps, for few tiles: threads share out the positions, so that each reads its part of them only.
    let weights = input.c * output.c;
    if threads > 1 && tiles * (input.c + output.c) < weights && POSITIONS * weights > CACHE_ELEMENTS {
        return Held::with(of, 0..tiles, |held| {
            each(threads, |part| held.read(x, slab_range(tiles, threads, part)));
            each(threads, |part| held.multiply(panels, slab_range(POSITIONS, threads, part)));
            each(threads, |part| held.write(ends, y, slab_range(tiles, threads, part)));
        });
    }
    let per_task = (TASK_ELEMENTS / (POSITIONS * (input.c + output.c))).max(MIN_TASK_TILES);
    let tasks = tiles.div_ceil(per_task).next_multiple_of(threads).min(tiles);
    each(tasks, |task| {
        let tiles = slab_range(tiles, tasks, task);
        Held::with(of, tiles.clone(), |held| {
            held.read(x, tiles.clone());
            held.multiply(panels, 0..POSITIONS);
            held.write(ends, y, tiles);
        });
    });
}

/// Tiles that are in memory together.
struct Held<'a> {
    of: &'a WinogradProblem,
    tiles: Range<usize>,
    /// V `[36, tiles, c_in]` of whole vectors of channels, with `read` elements from one position to the next.
    v: Shared<'a>,
    read: usize,
    /// M `[36, tiles, c_out]` likewise.
    m: Shared<'a>,
    written: usize,
}

impl Held<'_> {
    fn with(of: &WinogradProblem, tiles: Range<usize>, body: impl FnOnce(&Held<'_>)) {
        let (c_in, c_out) = (padded(of.conv().input.c), padded(of.conv().output.c));
        let (read, written) = (tiles.len() * c_in + GAP, tiles.len() * c_out + GAP);
        with_scratch(POSITIONS * (read + written), |scratch| {
            let (v, m) = scratch.split_at_mut(POSITIONS * read);
            body(&Held { of, tiles, v: Shared::new(v), read, m: Shared::new(m), written });
        });
    }

    /// x → V of some of the tiles.
    fn read(&self, x: &[f32], tiles: Range<usize>) {
        with_scratch(self.of.conv().input.c, |zeros| {
            zeros.fill(0.0);
            dispatch(Read { held: self, x, zeros, tiles });
        });
    }

    /// V → M at some positions, all of whose tiles were read.
    fn multiply(&self, panels: Panels<'_>, positions: Range<usize>) {
        let (count, conv) = (self.tiles.len(), self.of.conv());
        for position in positions {
            // SAFETY: nobody writes V any more.
            let v = unsafe { self.v.range(position * self.read..(position + 1) * self.read).slice() };
            let starts = Starts::Every { count, elements: padded(conv.input.c) };
            let product = Product::new(
                panels.of_group(position),
                Rows { data: v, starts, step: 0, run: conv.input.c },
                Ends::NONE,
            );
            let start = position * self.written;
            // SAFETY: a position belongs to one task.
            unsafe { product.run_shared(self.m.range(start..start + count * padded(conv.output.c))) };
        }
    }

    /// M → y of some of the tiles, at which all positions were multiplied.
    fn write(&self, ends: &Ends<'_>, y: Shared<'_>, tiles: Range<usize>) {
        dispatch(Write { held: self, tiles, ends, y });
    }
}

/// Where a tile lies.
struct Place {
    image: usize,
    /// Its first row and column of the output.
    row: usize,
    column: usize,
}

/// Loads the channels of a vector that there are; `from` points to the first of them.
///
/// # Safety
/// So many elements can be read there.
#[inline(always)]
unsafe fn load_at<S: Simd>(simd: S, from: *const f32, lanes: usize) -> S::f32s {
    // SAFETY: as promised.
    unsafe {
        match lanes == S::F32_LANES {
            true => from.cast::<S::f32s>().read_unaligned(),
            false => simd.partial_load_f32s(std::slice::from_raw_parts(from, lanes)),
        }
    }
}

impl WinogradProblem {
    #[inline(always)]
    fn place(&self, tile: usize) -> Place {
        let (per_image, per_row, side) = (self.tiles_per_image(), self.tiles_per_row(), self.side());
        let of_image = tile % per_image;
        Place { image: tile / per_image, row: of_image / per_row * side, column: of_image % per_row * side }
    }
}

/// Six vectors: a row or a column of a tile.
type Six<V> = [V; TILE];

/// Bᵀ·d at the points p and −p of a pair, where q² is the square of the other pair: (d4 − q²·d2) ± p·(d3 − q²·d1).
#[inline(always)]
fn read_pair<S: Simd>(simd: S, d: &Six<S::f32s>, p: f32, q2: f32) -> [S::f32s; 2] {
    let (p, q2) = (simd.splat_f32s(p), simd.splat_f32s(-q2));
    let (even, odd) = (simd.mul_add_e_f32s(q2, d[2], d[4]), simd.mul_add_e_f32s(q2, d[1], d[3]));
    [simd.mul_add_e_f32s(p, odd, even), simd.mul_add_e_f32s(simd.neg_f32s(p), odd, even)]
}

/// Bᵀ·d.
#[inline(always)]
fn read_transform<S: Simd>(simd: S, d: Six<S::f32s>) -> Six<S::f32s> {
    const A2: f32 = A * A;
    const B2: f32 = B * B;
    let (product, sum) = (simd.splat_f32s(A2 * B2), simd.splat_f32s(-(A2 + B2)));
    let [a, minus_a] = read_pair(simd, &d, A, B2);
    let [b, minus_b] = read_pair(simd, &d, B, A2);
    // At 0 and ∞.
    let first = simd.mul_add_e_f32s(product, d[0], simd.mul_add_e_f32s(sum, d[2], d[4]));
    let last = simd.mul_add_e_f32s(product, d[1], simd.mul_add_e_f32s(sum, d[3], d[5]));
    [first, a, minus_a, b, minus_b, last]
}

/// Aᵀ·m for as many rows of the output as a tile has: four or two.
#[inline(always)]
fn write_transform<S: Simd, const SIDE: usize>(simd: S, m: Six<S::f32s>) -> [S::f32s; SIDE] {
    let (even_a, odd_a) = (simd.add_f32s(m[1], m[2]), simd.sub_f32s(m[1], m[2]));
    let (even_b, odd_b) = (simd.add_f32s(m[3], m[4]), simd.sub_f32s(m[3], m[4]));
    let mut y = [m[0]; SIDE];
    unrolled!(I < SIDE, {
        let (a, b) = (simd.splat_f32s(A.powi(I as i32)), simd.splat_f32s(B.powi(I as i32)));
        let (of_a, of_b) = if I.is_multiple_of(2) { (even_a, even_b) } else { (odd_a, odd_b) };
        y[I] = match I {
            0 => simd.add_f32s(m[0], simd.add_f32s(of_a, of_b)),
            _ if I + 1 == SIDE => simd.mul_add_e_f32s(a, of_a, simd.mul_add_e_f32s(b, of_b, m[5])),
            _ => simd.mul_add_e_f32s(a, of_a, simd.mul_f32s(b, of_b)),
        };
    }, 0 1 2 3);
    y
}

/// x → V.
struct Read<'a> {
    held: &'a Held<'a>,
    x: &'a [f32],
    /// A pixel outside of the image.
    zeros: &'a [f32],
    tiles: Range<usize>,
}

impl WithSimd for Read<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { held: &Held { of, tiles: ref all, v, read: step, .. }, x, zeros, tiles } = self;
        let ConvProblem { input, .. } = *of.conv();
        let c = padded(input.c);
        assert!(all.start <= tiles.start && tiles.end <= all.end, "tiles that are held");
        for tile in tiles {
            let pixels = of.pixels(x, zeros, tile);
            for channel in (0..input.c).step_by(S::F32_LANES) {
                let lanes = S::F32_LANES.min(input.c - channel);
                let mut half = MaybeUninit::<[[S::f32s; TILE]; TILE]>::uninit();
                for (i, pixels) in pixels.iter().enumerate() {
                    let mut d = [simd.splat_f32s(0.0); TILE];
                    // SAFETY: a pixel has all channels, be it of x or of zeros.
                    unrolled!(J < TILE, d[J] = unsafe { load_at(simd, pixels[J].add(channel), lanes) }, 0 1 2 3 4 5);
                    let d = read_transform(simd, d);
                    // SAFETY: a row of six.
                    unsafe { half.as_mut_ptr().cast::<Six<S::f32s>>().add(i).write(d) };
                }
                // SAFETY: all rows were written.
                let half = unsafe { half.assume_init_ref() };
                let at = (tile - all.start) * c + channel;
                for j in 0..TILE {
                    let mut d = [simd.splat_f32s(0.0); TILE];
                    unrolled!(I < TILE, d[I] = half[I][j], 0 1 2 3 4 5);
                    let d = read_transform(simd, d);
                    // SAFETY: a whole vector of a tile of a position, as was asserted.
                    unrolled!(I < TILE, unsafe {
                            v.as_mut_ptr().add((I * TILE + j) * step + at).cast::<S::f32s>().write_unaligned(d[I]);
                        }, 0 1 2 3 4 5);
                }
            }
        }
    }
}

impl WinogradProblem {
    /// Where the pixels under a tile begin; those outside of the image are `zeros`.
    #[inline(always)]
    fn pixels(&self, x: &[f32], zeros: &[f32], tile: usize) -> [[*const f32; TILE]; TILE] {
        let ConvProblem { input, window, .. } = self.conv;
        let Place { image, row, column } = self.place(tile);
        let image = &x[image * input.len()..][..input.len()];
        let mut pixels = [[zeros.as_ptr(); TILE]; TILE];
        for (i, pixels) in pixels.iter_mut().enumerate() {
            let Some(row) = (row + i).checked_sub(window.pad.top).filter(|row| *row < input.h) else { continue };
            let line = &image[row * input.w * input.c..][..input.w * input.c];
            for (j, pixel) in pixels.iter_mut().enumerate() {
                let at = (column + j).checked_sub(window.pad.left).filter(|column| *column < input.w);
                *pixel = at.map_or(*pixel, |column| line[column * input.c..].as_ptr());
            }
        }
        pixels
    }
}

/// M → y.
struct Write<'a> {
    held: &'a Held<'a>,
    tiles: Range<usize>,
    ends: &'a Ends<'a>,
    y: Shared<'a>,
}

impl WithSimd for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.held.of.side() {
            4 => self.tiles_of::<S, 4>(simd),
            _ => self.tiles_of::<S, 2>(simd),
        }
    }
}

impl Write<'_> {
    #[inline(always)]
    fn tiles_of<S: Simd, const SIDE: usize>(&self, simd: S) {
        let &Held { of, tiles: ref all, m, written: step, .. } = self.held;
        let (c, width) = (of.conv().output.c, padded(of.conv().output.c));
        assert!(all.start <= self.tiles.start && self.tiles.end <= all.end, "tiles that are held");
        for tile in self.tiles.clone() {
            let place = of.place(tile);
            for channel in (0..c).step_by(S::F32_LANES) {
                let at = (tile - all.start) * width + channel;
                // Columns of the half that is done.
                let mut half = MaybeUninit::<[[S::f32s; SIDE]; TILE]>::uninit();
                for j in 0..TILE {
                    let mut d = [simd.splat_f32s(0.0); TILE];
                    // SAFETY: a whole vector of a tile of a position, as was asserted.
                    unrolled!(I < TILE, d[I] = unsafe { load_at(simd, m.as_mut_ptr().add((I * TILE + j) * step + at), S::F32_LANES) }, 0 1 2 3 4 5);
                    let d = write_transform::<S, SIDE>(simd, d);
                    // SAFETY: a column of six.
                    unsafe { half.as_mut_ptr().cast::<[S::f32s; SIDE]>().add(j).write(d) };
                }
                // SAFETY: all columns were written.
                let half = unsafe { half.assume_init_ref() };
                let channels = channel..(channel + S::F32_LANES).min(c);
                for i in 0..SIDE {
                    let mut d = [simd.splat_f32s(0.0); TILE];
                    unrolled!(J < TILE, d[J] = half[J][i], 0 1 2 3 4 5);
                    self.row::<S, SIDE>(simd, &place, i, channels.clone(), write_transform(simd, d));
                }
            }
        }
    }

    /// Ends some channels of a row of a tile and writes what lies in the image.
    #[inline(always)]
    fn row<S: Simd, const SIDE: usize>(
        &self,
        simd: S,
        place: &Place,
        i: usize,
        channels: Range<usize>,
        sums: [S::f32s; SIDE],
    ) {
        let (output, Ends { bias, residual, clamp, .. }) = (self.held.of.conv().output, *self.ends);
        if place.row + i >= output.h {
            return;
        }
        let first = ((place.row + i) * output.w + place.column) * output.c + channels.start;
        let base = place.image * output.len();
        for (j, &sum) in sums.iter().enumerate().take(output.w - place.column) {
            let (at, mut sum) = (first + j * output.c, sum);
            if let Some(bias) = bias {
                let start = if bias.len() == output.c { channels.start } else { at };
                sum = simd.add_f32s(sum, load(simd, &bias[start..start + channels.len()]));
            }
            let range = base + at..base + at + channels.len();
            if let Some(residual) = residual {
                sum = simd.add_f32s(sum, load(simd, &residual[range.clone()]));
            }
            if clamp != Clamp::NONE {
                sum = clamp_vector(simd, clamp, sum);
            }
            // SAFETY: the pixel belongs to this tile alone, and the tile to this task.
            store(simd, unsafe { self.y.range(range).slice() }, sum);
        }
    }
}
