//! Forward pass: a product whose left operand is never formed. The rows of pixels that a part reads are copied once, with the
//! border of zeros, so that under one kernel row the taps of every output pixel are one run of memory. Sums are taken in the
//! order (k_h, k_w, c_in), however the work is cut.

use std::cell::Cell;
use std::ops::Range;

use super::super::ConvProblem;
use super::super::parts::{Part, in_parts};
use super::super::source::Source;
use super::{copy_group, stored};
use crate::device::View;
use crate::ops::panels::Packed;
use crate::ops::parallel::{Chunks, PartialSums, with_scratch};
use crate::ops::product::{Ends, Product, Rows, Starts};

/// y = φ(x ∗ w + bias + residual).
pub(in crate::ops) fn forward(
    p: &ConvProblem,
    x: &Source<'_>,
    w: View<'_>,
    ends: &Ends<'_>,
    y: &mut [f32],
    takes_moments: bool,
) -> PartialSums<f32> {
    let x = stored(x);
    let patch = Patch::new(p);
    let packed = Packed::of_product(p, w);
    let panels = packed.panels();
    let sum = |Part { lines, panels: columns, y, .. }: Part<'_>| {
        let pixels = Pixels::of(&patch, lines.clone());
        with_scratch(patch.len(lines.clone()), |scratch| {
            for group in 0..p.groups {
                patch.copy(x, lines.clone(), group, scratch);
                let rows = Rows {
                    data: scratch,
                    starts: Starts::At(&pixels.0),
                    step: patch.row_len(),
                    run: p.window.k_w * patch.c_in,
                };
                let product = Product {
                    group,
                    columns: columns.clone(),
                    first_row: lines.start * p.output.w,
                    ..Product::new(panels, rows, ends.of_lines(p, &lines))
                };
                // SAFETY: tasks are given different lines or different panels.
                unsafe { product.run_shared(y) }
            }
        });
    };
    in_parts(p, (Chunks::new(p.output_lines()), panels.layout.count()), y, takes_moments, sum)
}

thread_local! {
    /// The memory of the last places, for the next ones.
    static PLACES: Cell<Vec<usize>> = const { Cell::new(Vec::new()) };
}

/// Where in a patch the first tap of every output pixel lies.
struct Pixels(Vec<usize>);

impl Pixels {
    fn of(patch: &Patch<'_>, lines: Range<usize>) -> Self {
        let mut pixels = PLACES.take();
        patch.pixels(lines, &mut pixels);
        Self(pixels)
    }
}

impl Drop for Pixels {
    fn drop(&mut self) {
        PLACES.set(std::mem::take(&mut self.0));
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
    fn pixels(&self, lines: Range<usize>, pixels: &mut Vec<usize>) {
        let (window, width) = (self.p.window, self.p.output.w);
        pixels.clear();
        let mut start = 0;
        for (_, _, count) in self.parts(lines) {
            for line in 0..count {
                let line = start + line * window.stride_h * self.row_len();
                pixels.extend((0..width).map(|ow| line + ow * window.stride_w * self.c_in));
            }
            start += self.rows(count) * self.row_len();
        }
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
