//! Depthwise k×k convolution on the CPU, weights `[k_h, k_w, c]`.
//!
//! Lanes run over channels. The forward pass keeps a strip of output pixels in registers, so that every input vector
//! is loaded once per kernel row; the weight gradient keeps one kernel row of taps in registers.

use std::ops::Range;

use super::ConvProblem;
use super::parts::in_parts;
use super::source::Source;
use crate::ops::activation::Clamp;
use crate::ops::batch_norm::GradientSums;
use crate::ops::parallel::{slab_range, slabs, sum_slabs, with_scratch};
use crate::ops::product::{Ends, Shared};
use crate::ops::simd::{clamp_vector, vectorised, with_simd};
use pulp::{Simd, WithSimd};

/// Output pixels whose sums are in registers at once: with a row of three weights and one input they fill the 16
/// vector registers of AVX2.
const STRIP: usize = 4;
/// The same where there are 32 registers.
const WIDE_STRIP: usize = 8;
/// Pixels of a backward work unit at least; images are grouped up to it.
const UNIT_PIXELS: usize = 128;

/// y = x ∗ w.
pub(super) fn forward<R: Send>(
    p: &ConvProblem,
    x: &Source<'_>,
    w: &[f32],
    ends: &Ends<'_>,
    y: &mut [f32],
    finish: impl Fn(Range<usize>, &mut [f32]) -> R + Sync,
) -> Vec<R> {
    let line_len = p.output.w * p.output.c;
    let sum = |lines: Range<usize>, _, y: Shared<'_>| {
        let mut line = lines.start;
        while line < lines.end {
            let (image, first) = (line / p.output.h, line % p.output.h);
            let count = (p.output.h - first).min(lines.end - line);
            let part = (line - lines.start) * line_len..(line - lines.start + count) * line_len;
            // SAFETY: tasks are given different lines.
            let y = unsafe { y.range(part).slice() };
            band(p, x, w, &ends.of_lines(p, &(line..line + count)), image, first..first + count, y);
            line += count;
        }
    };
    in_parts(p, 1, y, sum, finish)
}

/// Some output rows of one image, from just the input rows under them.
fn band(p: &ConvProblem, x: &Source<'_>, w: &[f32], ends: &Ends<'_>, image: usize, rows: Range<usize>, y: &mut [f32]) {
    let (line_in, line_out) = (p.input.w * p.input.c, p.output.w * p.output.c);
    let bias = ends.bias.map(|bias| match bias.len() == p.output.c {
        true => bias,
        false => &bias[rows.start * line_out..rows.end * line_out],
    });
    let ends = Ends { bias, ..*ends };
    let (under, part) = rows_under(p, rows);
    let start = image * p.input.len();
    let range = start + under.start * line_in..start + under.end * line_in;
    with_scratch(x.scratch_len(range.len()), |scratch| forward_rows(&part, x.load(range, scratch), w, ends, y));
}

/// The input rows under some output rows of an image, and the problem of just these.
pub(in crate::ops) fn rows_under(p: &ConvProblem, rows: Range<usize>) -> (Range<usize>, ConvProblem) {
    let window = p.window;
    let above = rows.start * window.stride_h;
    let top = above.saturating_sub(window.pad.top).min(p.input.h);
    let bottom = ((rows.end - 1) * window.stride_h + window.k_h).saturating_sub(window.pad.top).clamp(top, p.input.h);
    let mut part = ConvProblem { n: 1, ..*p };
    part.input.h = bottom - top;
    part.output.h = rows.len();
    part.window.pad.top = (window.pad.top + top).saturating_sub(above);
    (top..bottom, part)
}

/// y = φ(x ∗ w + bias + residual) for the images of a problem, on one thread.
pub(in crate::ops) fn forward_rows(p: &ConvProblem, x: &[f32], w: &[f32], ends: Ends<'_>, y: &mut [f32]) {
    with_simd(p.output.c, Lines { p, x, w, y, ends });
}

/// dw and dx (+)= in one walk over groups of images; dy is formed once per group.
pub(super) fn backward(
    p: &ConvProblem,
    x: &Source<'_>,
    w: &[f32],
    load: impl Fn(Range<usize>, &mut [f32]) + Sync,
    dx: Option<(&mut [f32], bool)>,
    dw: &mut [f32],
) -> Option<GradientSums> {
    let group = (UNIT_PIXELS / p.output.pixels()).clamp(1, p.n);
    let units = p.n.div_ceil(group);
    let slab_count = slabs(units, dw.len());
    let (in_len, out_len) = (p.input.len(), p.output.len());
    let images = |units: Range<usize>| units.start * group..(units.end * group).min(p.n);
    let ends: Vec<usize> =
        (0..slab_count).map(|slab| images(slab_range(units, slab_count, slab)).end * in_len).collect();
    let transposed = Transposed::new(p, w);
    let sums = sum_slabs(slab_count, dx, &ends, dw, |slab, mut dx, partial| {
        partial.fill(0.0);
        let mut sums = Vec::new();
        for unit in slab_range(units, slab_count, slab) {
            let images = images(unit..unit + 1);
            let range = images.start * in_len..images.end * in_len;
            with_scratch(images.len() * out_len + x.scratch_len(range.len()), |scratch| {
                let (dy, scratch) = scratch.split_at_mut(images.len() * out_len);
                load(images.start * out_len..images.end * out_len, dy);
                let problem = ConvProblem { n: images.len(), ..*p };
                let loaded = x.load(range.clone(), scratch);
                with_simd(p.output.c, WeightGradient { p: &problem, x: loaded, dy, dw: partial });
                if let Some((dx, accumulate)) = &mut dx {
                    let (head, rest) = std::mem::take(dx).split_at_mut(range.len());
                    *dx = rest;
                    transposed.apply(images.len(), dy, head, *accumulate);
                    sums.extend(x.gradient_sums(range, head));
                }
            });
        }
        sums
    });
    x.total(sums.into_iter().flatten())
}

/// The input gradient: with stride 1 a forward convolution with the flipped filter, else a gather by output row.
enum Transposed<'a> {
    Flipped { p: ConvProblem, w: Vec<f32> },
    Strided { p: ConvProblem, w: &'a [f32] },
}

impl<'a> Transposed<'a> {
    fn new(p: &ConvProblem, w: &'a [f32]) -> Self {
        let (window, c) = (p.window, p.input.c);
        let fits = window.pad.top < window.k_h && window.pad.left < window.k_w;
        if window.stride_h != 1 || window.stride_w != 1 || !fits {
            return Self::Strided { p: *p, w };
        }
        let mut window = window;
        window.pad.top = window.k_h - 1 - window.pad.top;
        window.pad.left = window.k_w - 1 - window.pad.left;
        let flipped = w.chunks_exact(c).rev().flatten().copied().collect();
        Self::Flipped { p: ConvProblem { input: p.output, output: p.input, window, ..*p }, w: flipped }
    }

    fn apply(&self, n: usize, dy: &[f32], dx: &mut [f32], accumulate: bool) {
        match self {
            Self::Flipped { p, w } => {
                let p = ConvProblem { n, ..*p };
                forward_rows(&p, dy, w, Ends { accumulate, ..Ends::NONE }, dx);
            }
            Self::Strided { p, w } => {
                let line = p.input.w * p.input.c;
                for (index, dx) in dx.chunks_exact_mut(line).enumerate() {
                    vectorised(
                        #[inline(always)]
                        || strided_line(p, dy, w, index, dx, accumulate),
                    );
                }
            }
        }
    }
}

/// One line of dx: the output rows and taps that reach it.
#[inline(always)]
fn strided_line(p: &ConvProblem, dy: &[f32], w: &[f32], index: usize, dx: &mut [f32], accumulate: bool) {
    let (window, c) = (p.window, p.input.c);
    let (image, ih) = (index / p.input.h, index % p.input.h);
    if !accumulate {
        dx.fill(0.0);
    }
    for kh in 0..window.k_h {
        let Some(offset) = (ih + window.pad.top).checked_sub(kh) else { continue };
        let oh = offset / window.stride_h;
        if offset % window.stride_h != 0 || oh >= p.output.h {
            continue;
        }
        let dy = &dy[(image * p.output.h + oh) * p.output.w * c..][..p.output.w * c];
        for kw in 0..window.k_w {
            let w = &w[(kh * window.k_w + kw) * c..][..c];
            let columns = columns_reaching(p, kw);
            for ow in columns {
                let iw = ow * window.stride_w + kw - window.pad.left;
                let (dx, dy) = (&mut dx[iw * c..][..c], &dy[ow * c..][..c]);
                for i in 0..c {
                    dx[i] += dy[i] * w[i];
                }
            }
        }
    }
}

/// The output columns whose tap `kw` lies inside the image.
#[inline(always)]
fn columns_reaching(p: &ConvProblem, kw: usize) -> Range<usize> {
    let (stride, pad) = (p.window.stride_w, p.window.pad.left);
    let start = pad.saturating_sub(kw).div_ceil(stride);
    let end = (p.input.w + pad).saturating_sub(kw).div_ceil(stride).min(p.output.w);
    start..end.max(start)
}

/// The taps of a kernel row or column that lie inside `0..len` for an output at `offset` = index·stride.
#[inline(always)]
fn taps_inside(offset: usize, k: usize, pad: usize, len: usize) -> Range<usize> {
    let start = pad.saturating_sub(offset).min(k);
    start..(len + pad).saturating_sub(offset).min(k).max(start)
}

/// Forward convolution of whole images into `y`.
struct Lines<'a> {
    p: &'a ConvProblem,
    x: &'a [f32],
    w: &'a [f32],
    y: &'a mut [f32],
    /// With `accumulate` the sum is added to what is there.
    ends: Ends<'a>,
}

impl WithSimd for Lines<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let w = self.p.window;
        match (w.k_h, w.k_w, w.stride_h, w.stride_w) {
            (3, 3, 1, 1) => self.run::<S, 3, 1>(simd),
            (3, 3, 2, 2) => self.run::<S, 3, 2>(simd),
            (5, 5, 1, 1) => self.run::<S, 5, 1>(simd),
            (5, 5, 2, 2) => self.run::<S, 5, 2>(simd),
            _ => self.rest::<S>(0),
        }
    }
}

impl Lines<'_> {
    /// Every output line: where its image starts in `x`, its first kernel row's input row, the kernel rows inside the image,
    /// and its start in `y`.
    #[inline(always)]
    fn each_line(&self, mut body: impl FnMut(usize, usize, Range<usize>, usize)) {
        let p = self.p;
        let line_len = p.output.w * p.output.c;
        for image in 0..self.y.len() / p.output.len() {
            for oh in 0..p.output.h {
                let top = oh * p.window.stride_h;
                let rows = taps_inside(top, p.window.k_h, p.window.pad.top, p.input.h);
                body(image * p.input.len(), top, rows, image * p.output.len() + oh * line_len);
            }
        }
    }

    /// A vector of channels at a time, through all lines: the input rows that it reads again stay in the first-level cache.
    #[inline(always)]
    fn run<S: Simd, const K: usize, const STRIDE: usize>(self, simd: S) {
        let (p, c) = (self.p, self.p.output.c);
        let (pad, w_in, w_out) = (p.window.pad, p.input.w, p.output.w);
        let lanes = S::F32_LANES;
        let vectors = c / lanes;
        // Output columns whose taps all lie inside the image.
        let inner_start = pad.left.div_ceil(STRIDE).min(w_out);
        let inner_end = match (w_in + pad.left).checked_sub(K) {
            Some(last) => (last / STRIDE + 1).clamp(inner_start, w_out),
            None => inner_start,
        };
        let images = self.y.len() / p.output.len();
        assert!(images * p.input.len() <= self.x.len() && self.w.len() == K * K * c);
        assert_eq!(images * p.output.len(), self.y.len(), "whole images");
        let (x, y) = (self.x.as_ptr(), self.y.as_mut_ptr());
        for v in 0..vectors {
            self.each_line(|image, top, rows, line| {
                let ends = LineEnds::new(p, line, &self.ends);
                // SAFETY: the assertions above and the clamped ranges keep every row and column that is read inside the image
                // of `x`; weights, the output line and what is added to it have the lengths checked there.
                unsafe {
                    let strip = |ow: usize, taps: Range<usize>| Strip {
                        x: x.add(image + v * lanes),
                        w: self.w.as_ptr().add(v * lanes),
                        y: y.add(line + ow * c + v * lanes),
                        left: (ow * STRIDE) as isize - pad.left as isize,
                        top: top as isize - pad.top as isize,
                        rows: rows.clone(),
                        taps,
                        row_len: w_in * c,
                        c,
                        ends: &ends,
                        column: ow,
                        channel: v * lanes,
                    };
                    for ow in (0..inner_start).chain(inner_end..w_out) {
                        strip(ow, taps_inside(ow * STRIDE, K, pad.left, w_in)).edge::<S, K>(simd);
                    }
                    let mut ow = inner_start;
                    while S::REGISTER_COUNT >= 32 && ow + WIDE_STRIP <= inner_end {
                        strip(ow, 0..K).inner::<S, K, STRIDE, WIDE_STRIP>(simd);
                        ow += WIDE_STRIP;
                    }
                    while ow + STRIP <= inner_end {
                        strip(ow, 0..K).inner::<S, K, STRIDE, STRIP>(simd);
                        ow += STRIP;
                    }
                    while ow < inner_end {
                        strip(ow, 0..K).inner::<S, K, STRIDE, 1>(simd);
                        ow += 1;
                    }
                }
            });
        }
        if vectors * lanes < c {
            self.rest::<S>(vectors * lanes);
        }
    }

    /// The channels from `first` on.
    #[inline(always)]
    fn rest<S: Simd>(self, first: usize) {
        let Self { p, x, w, y, ends } = self;
        let line_len = p.output.w * p.output.c;
        for (line, y) in y.chunks_exact_mut(line_len).enumerate() {
            let (image, oh) = (line / p.output.h, line % p.output.h);
            let top = oh * p.window.stride_h;
            let rows = taps_inside(top, p.window.k_h, p.window.pad.top, p.input.h);
            let x = &x[image * p.input.len()..][..p.input.len()];
            scalar_line::<S>(p, x, w, (top, &rows), y, first, &LineEnds::new(p, line * line_len, &ends));
        }
    }
}

/// The channels from `first` on of one output line. Products are fused where those of vectors are.
#[inline(always)]
fn scalar_line<S: Simd>(
    p: &ConvProblem,
    x: &[f32],
    w: &[f32],
    (top, rows): (usize, &Range<usize>),
    y: &mut [f32],
    first: usize,
    ends: &LineEnds<'_>,
) {
    let (window, c) = (p.window, p.output.c);
    for (ow, y) in y.chunks_exact_mut(c).enumerate() {
        let y = &mut y[first..];
        match ends.bias {
            _ if ends.accumulate => {}
            Some(bias) => y.copy_from_slice(&bias[ow * ends.bias_step + first..][..c - first]),
            None => y.fill(0.0),
        }
        let left = ow * window.stride_w;
        let taps = taps_inside(left, window.k_w, window.pad.left, p.input.w);
        for kh in rows.clone() {
            let ih = top + kh - window.pad.top;
            for kw in taps.clone() {
                let iw = left + kw - window.pad.left;
                let x = &x[(ih * p.input.w + iw) * c + first..][..c - first];
                let w = &w[(kh * window.k_w + kw) * c + first..][..c - first];
                for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                    *y = if S::F32_LANES > 1 { x.mul_add(*w, *y) } else { x * w + *y };
                }
            }
        }
        if let Some(residual) = ends.residual {
            y.iter_mut().zip(&residual[ow * c + first..]).for_each(|(y, r)| *y += r);
        }
        if ends.clamp.slope != 1.0 {
            y.iter_mut().for_each(|y| *y = ends.clamp.apply(*y));
        }
    }
}

/// What is added to one output line, and its activation.
struct LineEnds<'a> {
    accumulate: bool,
    bias: Option<&'a [f32]>,
    /// From one pixel of the bias to the next.
    bias_step: usize,
    residual: Option<&'a [f32]>,
    clamp: Clamp,
}

impl<'a> LineEnds<'a> {
    /// Of the line that begins at an element of the result.
    #[inline(always)]
    fn new(p: &ConvProblem, start: usize, ends: &Ends<'a>) -> Self {
        let (c, line_len) = (p.output.c, p.output.w * p.output.c);
        let (bias, bias_step) = match ends.bias {
            Some(map) if map.len() != c => (Some(&map[start % p.output.len()..][..line_len]), c),
            bias => (bias, 0),
        };
        let residual = ends.residual.map(|residual| &residual[start..][..line_len]);
        Self { accumulate: ends.accumulate, bias, bias_step, residual, clamp: ends.clamp }
    }
}

/// One vector of channels of a few neighbouring output pixels.
struct Strip<'a> {
    /// The image, at the channel vector.
    x: *const f32,
    w: *const f32,
    y: *mut f32,
    /// Input column and row under the first tap; negative in the padding.
    left: isize,
    top: isize,
    /// Kernel rows and columns inside the image.
    rows: Range<usize>,
    taps: Range<usize>,
    row_len: usize,
    c: usize,
    ends: &'a LineEnds<'a>,
    /// The first pixel in its line, and the first channel.
    column: usize,
    channel: usize,
}

impl Strip<'_> {
    /// `N` output pixels whose columns all lie inside the image.
    ///
    /// # Safety
    /// Rows `top + rows` and columns `left .. left + (N−1)·STRIDE + K` lie inside the image, and `y` holds `N` pixels.
    #[inline(always)]
    unsafe fn inner<S: Simd, const K: usize, const STRIDE: usize, const N: usize>(self, simd: S) {
        // SAFETY: promised by the caller.
        unsafe {
            let mut sums = [simd.splat_f32s(0.0); N];
            for i in 0..N {
                sums[i] = self.start(simd, i);
            }
            for kh in self.rows.clone() {
                let row = (self.top + kh as isize) * self.row_len as isize + self.left * self.c as isize;
                let x = self.x.offset(row);
                let mut w = [simd.splat_f32s(0.0); K];
                for (kw, w) in w.iter_mut().enumerate() {
                    *w = load::<S>(self.w.add((kh * K + kw) * self.c));
                }
                for column in 0..(N - 1) * STRIDE + K {
                    let x = load::<S>(x.add(column * self.c));
                    for (i, sum) in sums.iter_mut().enumerate() {
                        if column >= i * STRIDE && column - i * STRIDE < K {
                            *sum = simd.mul_add_e_f32s(x, w[column - i * STRIDE], *sum);
                        }
                    }
                }
            }
            for (i, sum) in sums.into_iter().enumerate() {
                self.put(simd, i, sum);
            }
        }
    }

    /// One output pixel with some columns outside the image.
    ///
    /// # Safety
    /// Rows `top + rows` and columns `left + taps` lie inside the image, and `y` holds a pixel.
    #[inline(always)]
    unsafe fn edge<S: Simd, const K: usize>(self, simd: S) {
        // SAFETY: promised by the caller.
        unsafe {
            let mut sum = self.start(simd, 0);
            for kh in self.rows.clone() {
                let row = (self.top + kh as isize) * self.row_len as isize + self.left * self.c as isize;
                for kw in self.taps.clone() {
                    let x = load::<S>(self.x.offset(row + (kw * self.c) as isize));
                    sum = simd.mul_add_e_f32s(x, load::<S>(self.w.add((kh * K + kw) * self.c)), sum);
                }
            }
            self.put(simd, 0, sum);
        }
    }

    /// What the sum of pixel `i` starts from.
    ///
    /// # Safety
    /// The line has pixel `i`.
    #[inline(always)]
    unsafe fn start<S: Simd>(&self, simd: S, i: usize) -> S::f32s {
        let Some(bias) = self.ends.bias else { return simd.splat_f32s(0.0) };
        // SAFETY: promised by the caller; a bias has a line's pixels, or one that stands for all.
        unsafe { load::<S>(bias.as_ptr().add((self.column + i) * self.ends.bias_step + self.channel)) }
    }

    /// # Safety
    /// `y` and the line hold pixel `i`.
    #[inline(always)]
    unsafe fn put<S: Simd>(&self, simd: S, i: usize, mut sum: S::f32s) {
        // SAFETY: promised by the caller.
        unsafe {
            let y = self.y.add(i * self.c);
            if self.ends.accumulate {
                sum = simd.add_f32s(load::<S>(y), sum);
            }
            if let Some(residual) = self.ends.residual {
                sum = simd.add_f32s(sum, load::<S>(residual.as_ptr().add((self.column + i) * self.c + self.channel)));
            }
            if self.ends.clamp.slope != 1.0 {
                sum = clamp_vector(simd, self.ends.clamp, sum);
            }
            y.cast::<S::f32s>().write_unaligned(sum);
        }
    }
}

/// # Safety
/// A whole vector lies at `at`.
#[inline(always)]
unsafe fn load<S: Simd>(at: *const f32) -> S::f32s {
    // SAFETY: promised by the caller.
    unsafe { at.cast::<S::f32s>().read_unaligned() }
}

/// dw += Σ over images and pixels of dy·x.
struct WeightGradient<'a> {
    p: &'a ConvProblem,
    x: &'a [f32],
    dy: &'a [f32],
    dw: &'a mut [f32],
}

impl WithSimd for WeightGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let done = match (self.p.window.k_h, self.p.window.k_w) {
            (3, 3) => self.run::<S, 3>(simd),
            (5, 5) => self.run::<S, 5>(simd),
            _ => 0,
        };
        if done < self.p.output.c {
            self.rest(done);
        }
    }
}

impl WeightGradient<'_> {
    /// Whole vectors of channels; returns how many channels are done.
    #[inline(always)]
    fn run<S: Simd, const K: usize>(&mut self, simd: S) -> usize {
        let (p, c) = (self.p, self.p.output.c);
        let lanes = S::F32_LANES;
        assert!(self.x.len() >= p.n * p.input.len() && self.dy.len() >= p.n * p.output.len());
        assert!(self.dw.len() == K * K * c);
        let window = p.window;
        let (row_len, stride) = (p.input.w * c, window.stride_w);
        // Output columns whose taps all lie inside the image.
        let inner_start = window.pad.left.div_ceil(stride).min(p.output.w);
        let inner_end = match (p.input.w + window.pad.left).checked_sub(K) {
            Some(last) => (last / stride + 1).clamp(inner_start, p.output.w),
            None => inner_start,
        };
        for v in 0..c / lanes {
            // One kernel row at a time: its K sums stay in registers over all images.
            for kh in 0..K {
                let mut sums = [simd.splat_f32s(0.0); K];
                for line in 0..p.n * p.output.h {
                    let (image, oh) = (line / p.output.h, line % p.output.h);
                    let Some(ih) = (oh * window.stride_h + kh).checked_sub(window.pad.top) else { continue };
                    if ih >= p.input.h {
                        continue;
                    }
                    // SAFETY: the assertions above give the lengths; rows and columns are inside the image, and a
                    // vector of channels fits since (v + 1)·lanes ≤ c.
                    unsafe {
                        let dy = self.dy.as_ptr().add(line * p.output.w * c + v * lanes);
                        let row = self.x.as_ptr().add(image * p.input.len() + ih * row_len + v * lanes);
                        for ow in (0..inner_start).chain(inner_end..p.output.w) {
                            let taps = taps_inside(ow * stride, K, window.pad.left, p.input.w);
                            let dy = load::<S>(dy.add(ow * c));
                            for (kw, sum) in sums.iter_mut().enumerate() {
                                if taps.contains(&kw) {
                                    let x = load::<S>(row.add((ow * stride + kw - window.pad.left) * c));
                                    *sum = simd.mul_add_e_f32s(dy, x, *sum);
                                }
                            }
                        }
                        let mut x = row.wrapping_add((inner_start * stride).wrapping_sub(window.pad.left) * c);
                        for ow in inner_start..inner_end {
                            let dy = load::<S>(dy.add(ow * c));
                            for (kw, sum) in sums.iter_mut().enumerate() {
                                *sum = simd.mul_add_e_f32s(dy, load::<S>(x.add(kw * c)), *sum);
                            }
                            x = x.wrapping_add(stride * c);
                        }
                    }
                }
                for (kw, sum) in sums.iter().enumerate() {
                    let at = (kh * K + kw) * c + v * lanes;
                    // SAFETY: `dw` holds K·K·c elements, checked above.
                    unsafe {
                        let dw = self.dw.as_mut_ptr().add(at);
                        dw.cast::<S::f32s>().write_unaligned(simd.add_f32s(load::<S>(dw), *sum));
                    }
                }
            }
        }
        c / lanes * lanes
    }

    /// The channels from `first` on, any kernel.
    #[inline(always)]
    fn rest(self, first: usize) {
        let (p, c, window) = (self.p, self.p.output.c, self.p.window);
        for line in 0..p.n * p.output.h {
            let (image, oh) = (line / p.output.h, line % p.output.h);
            let top = oh * window.stride_h;
            for kh in taps_inside(top, window.k_h, window.pad.top, p.input.h) {
                let ih = image * p.input.h + top + kh - window.pad.top;
                for kw in 0..window.k_w {
                    let dw = &mut self.dw[(kh * window.k_w + kw) * c + first..][..c - first];
                    for ow in columns_reaching(p, kw) {
                        let iw = ow * window.stride_w + kw - window.pad.left;
                        let x = &self.x[(ih * p.input.w + iw) * c + first..][..c - first];
                        let dy = &self.dy[(line * p.output.w + ow) * c + first..][..c - first];
                        for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
                            *dw += x * dy;
                        }
                    }
                }
            }
        }
    }
}
