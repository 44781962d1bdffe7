//! Depthwise k×k convolution on the CPU, weights `[k_h, k_w, c]`.
//!
//! Lanes run over channels. A piece of the work is some rows of an image, or some images. All channels of it are put into
//! [block]s, one for each vector of channels, in the order of memory, and formed on load where they are not stored; kernels
//! without borders go over the [rows] of each block; what they give is written in the order of memory again.

mod backward;
mod block;
mod forward;
mod rows;

use std::ops::Range;

pub(super) use backward::backward;
pub(super) use forward::forward;
pub(in crate::ops) use forward::{BlockFilter, forward_rows, rows_under};
use pulp::Simd;

use super::ConvProblem;

/// Elements of the input that a piece of the work covers, about: what is formed of them stays in the second-level cache for all
/// channels.
const PIECE_ELEMENTS: usize = 1 << 15;

/// The channels of a vector of them; the last may have fewer than it holds.
#[inline(always)]
fn channels_of<S: Simd>(vector: usize, c: usize) -> Range<usize> {
    vector * S::F32_LANES..((vector + 1) * S::F32_LANES).min(c)
}

/// The rows of the input under some output rows that lie in the image.
fn input_rows(p: &ConvProblem, rows: &Range<usize>) -> Range<usize> {
    let (window, h) = (p.window, p.input.h);
    let start = (rows.start * window.stride_h).saturating_sub(window.pad.top).min(h);
    let end = ((rows.end - 1) * window.stride_h + window.k_h).saturating_sub(window.pad.top);
    start..end.clamp(start, h)
}

/// The kernel rows over an output row that lie in the image, and the first input row under them.
#[inline(always)]
fn kernel_rows(p: &ConvProblem, row: usize) -> (Range<usize>, usize) {
    let (window, top) = (p.window, row * p.window.stride_h);
    let start = window.pad.top.saturating_sub(top).min(window.k_h);
    let end = (p.input.h + window.pad.top).saturating_sub(top).min(window.k_h).max(start);
    (start..end, (top + start).saturating_sub(window.pad.top))
}

/// Columns of a block from which all output columns have theirs.
fn input_width(p: &ConvProblem) -> usize {
    (p.output.w - 1) * p.window.stride_w + p.window.k_w
}

/// A range in pieces of at most some length.
fn pieces(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(len).map(move |start| start..(start + len).min(end))
}

/// Calls a kernel's `run` with the size of the filter and its stride as constants where it is specialised, else with 0.
macro_rules! specialised {
    ($kernel:expr, $simd:expr, $window:expr) => {{
        let (kernel, simd, window) = ($kernel, $simd, $window);
        match (window.k_h, window.k_w, window.stride_h, window.stride_w) {
            (3, 3, 1, 1) => kernel.run::<S, 3, 1>(simd),
            (3, 3, 2, 2) => kernel.run::<S, 3, 2>(simd),
            (5, 5, 1, 1) => kernel.run::<S, 5, 1>(simd),
            (5, 5, 2, 2) => kernel.run::<S, 5, 2>(simd),
            _ => kernel.run::<S, 0, 0>(simd),
        }
    }};
}
use specialised;
