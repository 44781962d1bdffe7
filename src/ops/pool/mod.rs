//! Pooling: the mean over all pixels, and the largest value or the mean of each window per channel.

pub mod average;
pub mod global;
pub mod max;

use std::ops::Range;

use super::operation::{bad, is_sane, require, window_output};
use crate::Result;
use crate::shape::{Shape, Window};

/// A window that slides over every channel of one batch: x `[n, h_in, w_in, c]`, y `[n, h_out, w_out, c]`.
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
    /// The problem of one image for `n` of them.
    pub fn batch(&self, n: usize) -> Self {
        Self { n, ..*self }
    }

    /// Operands have the problem's sizes.
    pub(super) fn check(&self, x: usize, y: usize) {
        require("a pool", [("x", x, self.n * self.input.len()), ("y", y, self.n * self.output.len())]);
    }

    /// The rows and columns of the input under an output pixel.
    pub(super) fn under(&self, row: usize, col: usize) -> (Range<usize>, Range<usize>) {
        let Window { k_h, k_w, stride_h, stride_w, pad } = self.window;
        let axis = |at: usize, stride: usize, k: usize, before: usize, size: usize| {
            (at * stride).saturating_sub(before)..(at * stride + k - before).min(size)
        };
        (axis(row, stride_h, k_h, pad.top, self.input.h), axis(col, stride_w, k_w, pad.left, self.input.w))
    }
}

/// The shape that a pool makes of an input.
fn pooled_shape(window: Window, name: &str, input: Shape) -> Result<Shape> {
    let Window { k_h, k_w, pad, .. } = window;
    if !is_sane(window) || pad.top.max(pad.bottom) >= k_h || pad.left.max(pad.right) >= k_w {
        return bad(name, "a pool's kernel and stride must lie in 1..=1024, its padding below the kernel");
    }
    let (h, w) = window_output(name, window, input)?;
    Ok(Shape::new(h, w, input.c))
}
