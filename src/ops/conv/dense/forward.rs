//! Forward pass: a tile of output pixels × channels stays in registers while all taps and input channels are added to it.
//!
//! It is a GEMM whose left operand is never formed: the rows of pixels that a chunk reads are copied once, with the border
//! of zeros, so that under one kernel row the taps of every output pixel are one run of memory. Weights are packed once per
//! pass, in panels as wide as a tile. Sums are taken in the order (k_h, k_w, c_in), however the work is cut.

use std::cell::Cell;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::super::ConvProblem;
use super::super::source::Source;
use super::{copy_group, stored};
use crate::device::float_mode::flush_subnormals;
use crate::ops::parallel::{Chunks, with_scratch};
use crate::shape::Lines;

/// Vectors of channels of a tile at most.
const MAX_VECTORS: usize = 3;
/// Pixels of a tile at most: more addresses than that are not kept in registers.
const MAX_PIXELS: usize = 12;
/// Parts that there should be at least, while they have so many pixels for which a panel of weights is loaded.
const BANDS: usize = 16;
const BAND_PIXELS: usize = 48;

/// y = x ∗ w.
pub(in crate::ops) fn forward<R: Send>(
    p: &ConvProblem,
    x: &Source<'_>,
    w: &[f32],
    y: &mut [f32],
    finish: impl Fn(Range<usize>, &mut [f32]) -> R + Sync,
) -> Vec<R> {
    let x = stored(x);
    let Lines { lines, w: width, .. } = p.output_lines();
    let chunks = Chunks::new(p.output_lines());
    let panels = Panels::pack(p, w);
    let patch = Patch::new(p);
    let sum = |lines: Range<usize>, y: &mut [f32]| {
        let pixels = patch.pixels(lines.clone());
        with_scratch(patch.len(lines.clone()), |rows| {
            for group in 0..p.groups {
                patch.copy(x, lines.clone(), group, rows);
                let tiles = Tiles { patch: &patch, panels: &panels, group, rows, pixels: &pixels, y };
                flush_subnormals(|| Arch::new().dispatch(tiles));
            }
        });
    };
    // Where chunks are few, the threads would not share them evenly. But what `finish` gives is per chunk.
    let band = lines.div_ceil(BANDS).max(BAND_PIXELS.div_ceil(width));
    let in_bands = band < chunks.lines_per_chunk;
    if in_bands {
        y.par_chunks_mut(band * chunks.line_len)
            .enumerate()
            .for_each(|(i, y)| sum(i * band..lines.min((i + 1) * band), y));
    }
    y.par_chunks_mut(chunks.chunk_len())
        .enumerate()
        .map(|(chunk, y)| {
            if !in_bands {
                sum(chunks.line_range(chunk), y);
            }
            finish(chunks.range(chunk), y)
        })
        .collect()
}

thread_local! {
    /// The memory of the last panels, for the next ones.
    static PANELS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// The weights of all groups, in panels of some vectors of output channels: panel, tap and input channel, output channel,
/// with zeros where a group has fewer channels.
struct Panels {
    data: Vec<f32>,
    /// Output channels of a group.
    c_out: usize,
    /// taps · c_in.
    k: usize,
    /// The widths of a group's panels, in vectors.
    vectors: Vec<usize>,
}

impl Panels {
    fn pack(p: &ConvProblem, w: &[f32]) -> Self {
        let lanes = Arch::new().dispatch(Lanes);
        let (c_out, k) = (p.output.c / p.groups, p.window.taps() * (p.input.c / p.groups));
        let total = c_out.div_ceil(lanes);
        let count = total.div_ceil(MAX_VECTORS);
        // As even as they can be.
        let vectors: Vec<usize> = (0..count).map(|i| (i + 1) * total / count - i * total / count).collect();
        let mut data = PANELS.take();
        data.resize(p.groups * total * lanes * k, 0.0);
        let mut parts = Vec::with_capacity(p.groups * count);
        let mut rest = &mut data[..];
        for group in 0..p.groups {
            let mut first = 0;
            for vectors in &vectors {
                let (panel, tail) = std::mem::take(&mut rest).split_at_mut(vectors * lanes * k);
                let channels = (c_out - first).min(vectors * lanes);
                parts.push((panel, vectors * lanes, &w[(group * c_out + first) * k..][..channels * k]));
                (rest, first) = (tail, first + channels);
            }
        }
        parts.into_par_iter().for_each(|(panel, width, w)| transpose(w, k, panel, width));
        Self { data, c_out, k, vectors }
    }
}

impl Drop for Panels {
    fn drop(&mut self) {
        PANELS.set(std::mem::take(&mut self.data));
    }
}

/// Rows of `k` elements → columns of a matrix with rows of `width`, whose other columns become zero.
fn transpose(rows: &[f32], k: usize, out: &mut [f32], width: usize) {
    /// Columns that are read at once: a line of the cache of each row.
    const BLOCK: usize = 16;
    /// Of them together what stays in cache until it is written.
    const TASK: usize = 16 * BLOCK;
    let count = rows.len() / k;
    out.par_chunks_mut(TASK * width).enumerate().for_each(|(task, out)| {
        for (block, out) in out.chunks_mut(BLOCK * width).enumerate() {
            let start = task * TASK + block * BLOCK;
            let len = out.len() / width;
            for column in 0..count {
                let row = &rows[column * k + start..][..len];
                for i in 0..len {
                    out[i * width + column] = row[i];
                }
            }
            for out in out.chunks_exact_mut(width) {
                out[count..].fill(0.0);
            }
        }
    });
}

/// The number of elements of the widest vector.
struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
    }
}

/// The input under some output lines, of one group, with its border.
struct Patch<'a> {
    p: &'a ConvProblem,
    c_in: usize,
    /// Pixels of a row, border included.
    width: usize,
}

impl<'a> Patch<'a> {
    fn new(p: &'a ConvProblem) -> Self {
        let width = (p.output.w - 1) * p.window.stride_w + p.window.k_w;
        Self { p, c_in: p.input.c / p.groups, width }
    }

    fn row_len(&self) -> usize {
        self.width * self.c_in
    }

    /// Lines of one image each: the image, the first line there, and how many.
    fn parts(&self, lines: Range<usize>) -> impl Iterator<Item = (usize, usize, usize)> {
        let height = self.p.output.h;
        (lines.start / height..lines.end.div_ceil(height)).map(move |image| {
            let first = lines.start.max(image * height);
            (image, first - image * height, lines.end.min((image + 1) * height) - first)
        })
    }

    /// Input rows under so many lines of an image.
    fn rows(&self, lines: usize) -> usize {
        (lines - 1) * self.p.window.stride_h + self.p.window.k_h
    }

    /// Elements that [`copy`](Self::copy) needs.
    fn len(&self, lines: Range<usize>) -> usize {
        self.parts(lines).map(|(_, _, count)| self.rows(count)).sum::<usize>() * self.row_len()
    }

    /// Where in it the first tap of every output pixel lies.
    fn pixels(&self, lines: Range<usize>) -> Vec<usize> {
        let (window, width) = (self.p.window, self.p.output.w);
        let mut pixels = Vec::with_capacity(lines.len() * width);
        let mut start = 0;
        for (_, _, count) in self.parts(lines) {
            for line in 0..count {
                let line = start + line * window.stride_h * self.row_len();
                pixels.extend((0..width).map(|ow| line + ow * window.stride_w * self.c_in));
            }
            start += self.rows(count) * self.row_len();
        }
        pixels
    }

    /// Copies it.
    fn copy(&self, x: &[f32], lines: Range<usize>, group: usize, mut rows: &mut [f32]) {
        let (p, c, c_in, row_len) = (self.p, self.p.input.c, self.c_in, self.row_len());
        let window = p.window;
        // What of a row the image covers.
        let covered = window.pad.left.min(self.width)..(window.pad.left + p.input.w).min(self.width);
        for (image, first, count) in self.parts(lines) {
            let (part, tail) = rows.split_at_mut(self.rows(count) * row_len);
            for (r, row) in part.chunks_exact_mut(row_len).enumerate() {
                let ih = (first * window.stride_h + r).checked_sub(window.pad.top).filter(|ih| *ih < p.input.h);
                let Some(ih) = ih else {
                    row.fill(0.0);
                    continue;
                };
                row[..covered.start * c_in].fill(0.0);
                row[covered.end * c_in..].fill(0.0);
                let from = &x[(image * p.input.h + ih) * p.input.w * c + group * c_in..];
                copy_group(from, c, &mut row[covered.start * c_in..covered.end * c_in], c_in);
            }
            rows = tail;
        }
    }
}

/// The output pixels of a chunk, in tiles.
struct Tiles<'a> {
    patch: &'a Patch<'a>,
    panels: &'a Panels,
    group: usize,
    rows: &'a [f32],
    /// Where every pixel's first tap lies in `rows`.
    pixels: &'a [usize],
    y: &'a mut [f32],
}

impl WithSimd for Tiles<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { patch, panels, group, rows, pixels, y } = self;
        let c = patch.p.output.c;
        let kernel_row = patch.p.window.k_w * patch.c_in;
        let group_len: usize = panels.vectors.iter().sum::<usize>() * S::F32_LANES * panels.k;
        let mut weights = &panels.data[group * group_len..][..group_len];
        let mut first = 0;
        for &vectors in &panels.vectors {
            let (panel, rest) = weights.split_at(vectors * S::F32_LANES * panels.k);
            let channels = (panels.c_out - first).min(vectors * S::F32_LANES);
            // Three quarters of the registers hold sums.
            let most = (S::REGISTER_COUNT * 3 / 4 / vectors).clamp(1, MAX_PIXELS);
            let tiles = pixels.len().div_ceil(most);
            for tile in 0..tiles {
                let range = tile * pixels.len() / tiles..(tile + 1) * pixels.len() / tiles;
                let y = &mut y[range.start * c + group * panels.c_out + first..];
                let pixels = &pixels[range];
                let run = Tile { panel, rows, row_len: patch.row_len(), kernel_row, pixels, y, c, channels };
                match vectors {
                    1 => run.pixels::<S, 1>(simd),
                    2 => run.pixels::<S, 2>(simd),
                    _ => run.pixels::<S, MAX_VECTORS>(simd),
                }
            }
            (weights, first) = (rest, first + channels);
        }
    }
}

/// A tile: the sums of some pixels × a panel's channels.
struct Tile<'a> {
    panel: &'a [f32],
    rows: &'a [f32],
    /// From one row of pixels to the next.
    row_len: usize,
    /// Elements that a kernel row reads for a pixel.
    kernel_row: usize,
    pixels: &'a [usize],
    y: &'a mut [f32],
    /// From one pixel of `y` to the next.
    c: usize,
    /// Channels that are stored.
    channels: usize,
}

impl Tile<'_> {
    #[inline(always)]
    fn pixels<S: Simd, const V: usize>(self, simd: S) {
        match self.pixels.len() {
            1 => self.run::<S, V, 1>(simd),
            2 => self.run::<S, V, 2>(simd),
            3 => self.run::<S, V, 3>(simd),
            4 => self.run::<S, V, 4>(simd),
            5 => self.run::<S, V, 5>(simd),
            6 => self.run::<S, V, 6>(simd),
            7 => self.run::<S, V, 7>(simd),
            8 => self.run::<S, V, 8>(simd),
            9 => self.run::<S, V, 9>(simd),
            10 => self.run::<S, V, 10>(simd),
            11 => self.run::<S, V, 11>(simd),
            _ => self.run::<S, V, MAX_PIXELS>(simd),
        }
    }

    /// A function for each size: in one for all, the compiler gives up on keeping sums in registers.
    #[inline(never)]
    fn run<S: Simd, const V: usize, const P: usize>(self, simd: S) {
        simd.vectorize(FixedTile::<V, P>(self));
    }
}

/// A tile of `V` vectors × `P` pixels.
struct FixedTile<'a, const V: usize, const P: usize>(Tile<'a>);

impl<const V: usize, const P: usize> WithSimd for FixedTile<'_, V, P> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Tile { panel, rows, row_len, kernel_row, pixels, y, c, channels } = self.0;
        let pixels: &[usize; P] = pixels.try_into().expect("a tile of as many pixels");
        let (weights, _) = S::as_simd_f32s(panel);
        let (weights, _) = weights.as_chunks::<V>();
        let mut sums = [[simd.splat_f32s(0.0); V]; P];
        for (kh, weights) in weights.chunks_exact(kernel_row).enumerate() {
            let mut x = [std::ptr::null::<f32>(); P];
            for i in 0..P {
                x[i] = rows[pixels[i] + kh * row_len..][..kernel_row].as_ptr();
            }
            for (j, weights) in weights.iter().enumerate() {
                for i in 0..P {
                    // SAFETY: `x[i]` is the start of a slice of `kernel_row` elements, and there are as many weights.
                    let x = simd.splat_f32s(unsafe { *x[i].add(j) });
                    for v in 0..V {
                        sums[i][v] = simd.mul_add_e_f32s(x, weights[v], sums[i][v]);
                    }
                }
            }
        }
        for i in 0..P {
            let mut y = &mut y[i * c..][..channels];
            for v in 0..V {
                let (to, rest) = y.split_at_mut(S::F32_LANES.min(y.len()));
                match S::as_mut_simd_f32s(to).0 {
                    [to] => *to = sums[i][v],
                    _ => simd.partial_store_f32s(to, sums[i][v]),
                }
                y = rest;
            }
        }
    }
}
