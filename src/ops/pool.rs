//! Pooling: the mean over all pixels, y[n, c] = mean of x[n, h·w, c], and the largest value of each window per channel.

use std::ops::Range;

use rayon::prelude::*;

use super::cuda;
use super::simd::vectorised;
use crate::device::{View, ViewMut};
use crate::shape::{Shape, Window};

/// One max-pooling over one batch: x `[n, h_in, w_in, c]`, y `[n, h_out, w_out, c]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolProblem {
    /// Images.
    pub n: usize,
    /// One image of the input.
    pub input: Shape,
    /// One image of the output.
    pub output: Shape,
    /// Kernel, stride and padding; the padding is smaller than the kernel, so that every window holds a pixel.
    pub window: Window,
}

impl PoolProblem {
    /// The rows and columns of the input under an output pixel.
    fn under(&self, row: usize, col: usize) -> (Range<usize>, Range<usize>) {
        let Window { k_h, k_w, stride_h, stride_w, pad } = self.window;
        let axis = |at: usize, stride: usize, k: usize, before: usize, size: usize| {
            (at * stride).saturating_sub(before)..(at * stride + k - before).min(size)
        };
        (axis(row, stride_h, k_h, pad.top, self.input.h), axis(col, stride_w, k_w, pad.left, self.input.w))
    }
}

/// Forward; `pixels` = h·w.
pub fn forward((pixels, c): (usize, usize), x: View<'_>, y: ViewMut<'_>) {
    if let View::Gpu(x) = x {
        return cuda::pool::forward((y.len() / c, pixels, c), x, &y.gpu());
    }
    let (x, y) = (x.host(), y.host());
    let scale = 1.0 / pixels as f32;
    y.par_chunks_mut(c).zip(x.par_chunks(pixels * c)).for_each(|(y, x)| {
        vectorised(
            #[inline(always)]
            || {
                y.fill(0.0);
                for pixel in x.chunks_exact(c) {
                    y.iter_mut().zip(pixel).for_each(|(y, x)| *y += x);
                }
                y.iter_mut().for_each(|y| *y *= scale);
            },
        );
    });
}

/// dx (+)= dy / pixels, the same for every pixel.
pub fn backward((pixels, c): (usize, usize), dy: View<'_>, dx: ViewMut<'_>, accumulate: bool) {
    if let View::Gpu(dy) = dy {
        return cuda::pool::backward((dy.len() / c, pixels, c), dy, &dx.gpu(), accumulate);
    }
    let (dy, dx) = (dy.host(), dx.host());
    let scale = 1.0 / pixels as f32;
    dx.par_chunks_mut(pixels * c).zip(dy.par_chunks(c)).for_each(|(dx, dy)| {
        vectorised(
            #[inline(always)]
            || {
                for pixel in dx.chunks_exact_mut(c) {
                    for (dx, dy) in pixel.iter_mut().zip(dy) {
                        *dx = if accumulate { *dx } else { 0.0 } + dy * scale;
                    }
                }
            },
        );
    });
}

/// y = the largest x of each window; not-a-number wins over all, as in PyTorch.
pub fn max_forward(p: &PoolProblem, x: View<'_>, y: ViewMut<'_>) {
    if let View::Gpu(x) = x {
        return cuda::pool::max_forward(p, x, &y.gpu());
    }
    let (x, y) = (x.host(), y.host());
    let (input, output) = (p.input, p.output);
    y.par_chunks_mut(output.w * output.c).enumerate().for_each(|(line, y)| {
        let image = &x[line / output.h * input.len()..][..input.len()];
        for (col, y) in y.chunks_exact_mut(output.c).enumerate() {
            let (rows, cols) = p.under(line % output.h, col);
            y.fill(f32::NEG_INFINITY);
            for (row, col) in rows.flat_map(|row| cols.clone().map(move |col| (row, col))) {
                let pixel = &image[(row * input.w + col) * input.c..][..input.c];
                vectorised(
                    #[inline(always)]
                    || y.iter_mut().zip(pixel).for_each(|(y, &x)| *y = if wins(x, *y) { x } else { *y }),
                );
            }
        }
    });
}

/// dx (+)= the gradients of the windows in which a pixel is the largest; of equal pixels the first in row-major order is.
/// The sums run over the windows in row-major order.
pub fn max_backward(p: &PoolProblem, (x, dy): (View<'_>, View<'_>), dx: ViewMut<'_>, accumulate: bool) {
    if let (View::Gpu(x), View::Gpu(dy)) = (x, dy) {
        return cuda::pool::max_backward(p, (x, dy), &dx.gpu(), accumulate);
    }
    let (x, dy, dx) = (x.host(), dy.host(), dx.host());
    let (input, output) = (p.input, p.output);
    let images = dx.par_chunks_mut(input.len()).zip(x.par_chunks(input.len())).zip(dy.par_chunks(output.len()));
    images.for_each(|((dx, x), dy)| {
        if !accumulate {
            dx.fill(0.0);
        }
        let (mut best, mut winner) = (vec![0.0f32; input.c], vec![0usize; input.c]);
        for (pixel, dy) in dy.chunks_exact(output.c).enumerate() {
            let (rows, cols) = p.under(pixel / output.w, pixel % output.w);
            best.fill(f32::NEG_INFINITY);
            winner.fill(rows.start * input.w + cols.start);
            for (row, col) in rows.flat_map(|row| cols.clone().map(move |col| (row, col))) {
                let at = row * input.w + col;
                let x = &x[at * input.c..][..input.c];
                vectorised(
                    #[inline(always)]
                    || {
                        for ((best, winner), &x) in best.iter_mut().zip(&mut winner).zip(x) {
                            (*best, *winner) = if wins(x, *best) { (x, at) } else { (*best, *winner) };
                        }
                    },
                );
            }
            for (c, (&at, dy)) in winner.iter().zip(dy).enumerate() {
                dx[at * input.c + c] += dy;
            }
        }
    });
}

/// Whether a value takes the place of the largest so far.
#[inline(always)]
fn wins(x: f32, best: f32) -> bool {
    x > best || x.is_nan()
}
