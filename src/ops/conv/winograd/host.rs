//! The tiles on the host: transforms in registers, a vector of channels at a time, around one product per position.

use std::mem::MaybeUninit;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::{A, B, LARGE, SMALL, WinogradProblem, padded};
use crate::device::View;
use crate::ops::activation::Clamp;
use crate::ops::ahead::ask_at;
use crate::ops::conv::ConvProblem;
use crate::ops::panels::Panels;
use crate::ops::parallel::{slab_range, with_scratch};
use crate::ops::product::{Ends, Product, Rows, Starts};
use crate::ops::shared::Shared;
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
    let (tiles, positions, threads) = (n * of.tiles_per_image(), of.positions(), threads());
    // Weights that no cache keeps, for few tiles: threads share out the positions, so that each reads its part of them only.
    let weights = input.c * output.c;
    if threads > 1 && tiles * (input.c + output.c) < weights && positions * weights > CACHE_ELEMENTS {
        return Held::with(of, 0..tiles, |held| {
            each(threads, |part| held.read(x, slab_range(tiles, threads, part)));
            each(threads, |part| held.multiply(panels, slab_range(positions, threads, part)));
            each(threads, |part| held.write(ends, y, slab_range(tiles, threads, part)));
        });
    }
    let per_task = (TASK_ELEMENTS / (positions * (input.c + output.c))).max(MIN_TASK_TILES);
    let tasks = tiles.div_ceil(per_task).next_multiple_of(threads).min(tiles);
    each(tasks, |task| {
        let tiles = slab_range(tiles, tasks, task);
        Held::with(of, tiles.clone(), |held| {
            held.read(x, tiles.clone());
            held.multiply(panels, 0..positions);
            held.write(ends, y, tiles);
        });
    });
}

/// Tiles that are in memory together.
struct Held<'a> {
    of: &'a WinogradProblem,
    tiles: Range<usize>,
    /// V `[t², tiles, c_in]` of whole vectors of channels, with `read` elements from one position to the next.
    v: Shared<'a>,
    read: usize,
    /// M `[t², tiles, c_out]` likewise.
    m: Shared<'a>,
    written: usize,
}

impl Held<'_> {
    fn with(of: &WinogradProblem, tiles: Range<usize>, body: impl FnOnce(&Held<'_>)) {
        let (c_in, c_out) = (padded(of.conv().input.c), padded(of.conv().output.c));
        let (read, written) = (tiles.len() * c_in + GAP, tiles.len() * c_out + GAP);
        with_scratch(of.positions() * (read + written), |scratch| {
            let (v, m) = scratch.split_at_mut(of.positions() * read);
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
        let (count, ConvProblem { input, output, .. }) = (self.tiles.len(), *self.of.conv());
        let (read, written) = (padded(input.c), padded(output.c));
        let rows = Rows { data: &[], starts: Starts::Every { count, elements: read }, step: 0, run: input.c };
        let operands = positions.map(|position| {
            // SAFETY: nobody writes V any more.
            let data = unsafe { self.v.range(position * self.read..(position + 1) * self.read).slice() };
            let start = position * self.written;
            (panels.of_group(position), &*data, self.m.range(start..start + count * written))
        });
        // SAFETY: a position belongs to one task.
        unsafe { Product::new(panels.of_group(0), rows, Ends::NONE).run_each(operands) };
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

/// Bᵀ·d of the large tiles at the points p and −p of a pair, where q² is the square of the other pair:
/// (d4 − q²·d2) ± p·(d3 − q²·d1).
#[inline(always)]
fn read_pair<S: Simd, const T: usize>(simd: S, d: &[S::f32s; T], p: f32, q2: f32) -> [S::f32s; 2] {
    let (p, q2) = (simd.splat_f32s(p), simd.splat_f32s(-q2));
    let (even, odd) = (simd.mul_add_e_f32s(q2, d[2], d[4]), simd.mul_add_e_f32s(q2, d[1], d[3]));
    [simd.mul_add_e_f32s(p, odd, even), simd.mul_add_e_f32s(simd.neg_f32s(p), odd, even)]
}

/// Bᵀ·d.
#[inline(always)]
fn read_transform<S: Simd, const T: usize>(simd: S, d: [S::f32s; T]) -> [S::f32s; T] {
    let mut v = d;
    if T == SMALL {
        // At ±1, so that nothing is multiplied.
        v[0] = simd.sub_f32s(d[2], d[0]);
        v[1] = simd.add_f32s(d[2], d[1]);
        v[2] = simd.sub_f32s(d[2], d[1]);
        v[3] = simd.sub_f32s(d[3], d[1]);
        return v;
    }
    const A2: f32 = A * A;
    const B2: f32 = B * B;
    let (product, sum) = (simd.splat_f32s(A2 * B2), simd.splat_f32s(-(A2 + B2)));
    [v[1], v[2]] = read_pair(simd, &d, A, B2);
    [v[3], v[4]] = read_pair(simd, &d, B, A2);
    // At 0 and ∞.
    v[0] = simd.mul_add_e_f32s(product, d[0], simd.mul_add_e_f32s(sum, d[2], d[4]));
    v[5] = simd.mul_add_e_f32s(product, d[1], simd.mul_add_e_f32s(sum, d[3], d[5]));
    v
}

/// Aᵀ·m for as many rows of the output as a tile has: four or two.
#[inline(always)]
fn write_transform<S: Simd, const T: usize, const SIDE: usize>(simd: S, m: [S::f32s; T]) -> [S::f32s; SIDE] {
    let mut y = [m[0]; SIDE];
    let (even_a, odd_a) = (simd.add_f32s(m[1], m[2]), simd.sub_f32s(m[1], m[2]));
    if T == SMALL {
        y[0] = simd.add_f32s(m[0], even_a);
        y[1] = simd.add_f32s(m[3], odd_a);
        return y;
    }
    let (even_b, odd_b) = (simd.add_f32s(m[3], m[4]), simd.sub_f32s(m[3], m[4]));
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
        match self.held.of.tile {
            LARGE => self.tiles_of::<S, LARGE>(simd),
            _ => self.tiles_of::<S, SMALL>(simd),
        }
    }
}

impl Read<'_> {
    #[inline(always)]
    fn tiles_of<S: Simd, const T: usize>(self, simd: S) {
        let Self { held: &Held { of, tiles: ref all, v, read: step, .. }, x, zeros, tiles } = self;
        let ConvProblem { input, .. } = *of.conv();
        let c = padded(input.c);
        assert!(all.start <= tiles.start && tiles.end <= all.end, "tiles that are held");
        let mut pixels = [[zeros.as_ptr(); T]; T];
        for tile in tiles {
            of.pixels(x, zeros, tile, &mut pixels);
            // What the next tile reads beyond this one; behind the last of a row it is a hint in vain.
            for pixels in &pixels {
                ask_at(pixels[T - 1].wrapping_add(input.c), of.side() * input.c);
            }
            for channel in (0..input.c).step_by(S::F32_LANES) {
                let lanes = S::F32_LANES.min(input.c - channel);
                let mut half = MaybeUninit::<[[S::f32s; T]; T]>::uninit();
                for (i, pixels) in pixels.iter().enumerate() {
                    let mut d = [simd.splat_f32s(0.0); T];
                    // SAFETY: a pixel has all channels, be it of x or of zeros.
                    unrolled!(J < T, d[J] = unsafe { load_at(simd, pixels[J].add(channel), lanes) }, 0 1 2 3 4 5);
                    let d = read_transform(simd, d);
                    // SAFETY: a row of the tile.
                    unsafe { half.as_mut_ptr().cast::<[S::f32s; T]>().add(i).write(d) };
                }
                // SAFETY: all rows were written.
                let half = unsafe { half.assume_init_ref() };
                let at = (tile - all.start) * c + channel;
                for j in 0..T {
                    let mut d = [simd.splat_f32s(0.0); T];
                    unrolled!(I < T, d[I] = half[I][j], 0 1 2 3 4 5);
                    let d = read_transform(simd, d);
                    // SAFETY: a whole vector of a tile of a position, as was asserted.
                    unrolled!(I < T, unsafe {
                            v.as_mut_ptr().add((I * T + j) * step + at).cast::<S::f32s>().write_unaligned(d[I]);
                        }, 0 1 2 3 4 5);
                }
            }
        }
    }
}

impl WinogradProblem {
    /// Where the pixels under a tile begin; those outside of the image are `zeros`.
    #[inline(always)]
    fn pixels<const T: usize>(&self, x: &[f32], zeros: &[f32], tile: usize, pixels: &mut [[*const f32; T]; T]) {
        let ConvProblem { input, window, .. } = self.conv;
        let Place { image, row, column } = self.place(tile);
        let image = &x[image * input.len()..][..input.len()];
        for (i, pixels) in pixels.iter_mut().enumerate() {
            *pixels = [zeros.as_ptr(); T];
            let Some(row) = (row + i).checked_sub(window.pad.top).filter(|row| *row < input.h) else { continue };
            let line = &image[row * input.w * input.c..][..input.w * input.c];
            for (j, pixel) in pixels.iter_mut().enumerate() {
                let at = (column + j).checked_sub(window.pad.left).filter(|column| *column < input.w);
                *pixel = at.map_or(*pixel, |column| line[column * input.c..].as_ptr());
            }
        }
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
        match (self.held.of.tile, self.held.of.side()) {
            (LARGE, 4) => self.tiles_of::<S, LARGE, 4>(simd),
            (LARGE, _) => self.tiles_of::<S, LARGE, 2>(simd),
            _ => self.tiles_of::<S, SMALL, 2>(simd),
        }
    }
}

impl Write<'_> {
    #[inline(always)]
    fn tiles_of<S: Simd, const T: usize, const SIDE: usize>(&self, simd: S) {
        let &Held { of, tiles: ref all, m, written: step, .. } = self.held;
        let output = of.conv().output;
        let (c, width) = (output.c, padded(output.c));
        assert!(all.start <= self.tiles.start && self.tiles.end <= all.end, "tiles that are held");
        for tile in self.tiles.clone() {
            let place = of.place(tile);
            // Where the next tile is written.
            for i in 0..SIDE {
                let next = ((place.row + i) * output.w + place.column + SIDE) * c;
                ask_at(self.y.as_mut_ptr().wrapping_add(place.image * output.len() + next), SIDE * c);
            }
            for channel in (0..c).step_by(S::F32_LANES) {
                let at = (tile - all.start) * width + channel;
                // Columns of the half that is done.
                let mut half = MaybeUninit::<[[S::f32s; SIDE]; T]>::uninit();
                for j in 0..T {
                    let mut d = [simd.splat_f32s(0.0); T];
                    // SAFETY: a whole vector of a tile of a position, as was asserted.
                    unrolled!(I < T, d[I] = unsafe { load_at(simd, m.as_mut_ptr().add((I * T + j) * step + at), S::F32_LANES) }, 0 1 2 3 4 5);
                    let d = write_transform::<S, T, SIDE>(simd, d);
                    // SAFETY: a column of the tile.
                    unsafe { half.as_mut_ptr().cast::<[S::f32s; SIDE]>().add(j).write(d) };
                }
                // SAFETY: all columns were written.
                let half = unsafe { half.assume_init_ref() };
                let channels = channel..(channel + S::F32_LANES).min(c);
                for i in 0..SIDE {
                    let mut d = [simd.splat_f32s(0.0); T];
                    unrolled!(J < T, d[J] = half[J][i], 0 1 2 3 4 5);
                    self.row::<S, SIDE>(simd, &place, i, channels.clone(), write_transform::<S, T, SIDE>(simd, d));
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
