//! Pointwise (1×1) convolution on the CPU: a product of pixels and weights in panels; both gradients from one pass over dy.

use std::ops::Range;

use super::ConvProblem;
use super::parts::in_parts;
use super::source::Source;
use crate::device::View;
use crate::ops::batch_norm::GradientSums;
use crate::ops::gemm::{Matrix, gemm};
use crate::ops::parallel::{Chunks, slab_range, slabs, sum_slabs, with_scratch};
use crate::ops::product::{Ends, Packed, Product, Rows, Shared};
use crate::shape::{GemmSize, Lines};

/// y = φ(x·Wᵀ + bias + residual).
pub(super) fn forward<R: Send>(
    p: &ConvProblem,
    x: &Source<'_>,
    w: View<'_>,
    ends: &Ends<'_>,
    y: &mut [f32],
    finish: impl Fn(Range<usize>, &mut [f32]) -> R + Sync,
) -> Vec<R> {
    let (c_in, width) = (p.input.c, p.output.w);
    let packed = Packed::of_product(p, w);
    let panels = packed.panels();
    let sum = |lines: Range<usize>, columns: Range<usize>, y: Shared<'_>| {
        let (pixels, ends) = (lines.start * width..lines.end * width, ends.of_lines(p, &lines));
        let range = pixels.start * c_in..pixels.end * c_in;
        with_scratch(x.scratch_len(range.len()), |scratch| {
            let rows = Rows::contiguous(x.load(range, scratch), c_in);
            let product = Product { columns, first_row: pixels.start, ..Product::new(panels, rows, ends) };
            // SAFETY: tasks are given different lines or different panels.
            unsafe { product.run_shared(y) }
        });
    };
    in_parts(p, panels.layout().count(), y, sum, finish)
}

/// dx (+)= dy·W, dw = dyᵀ·x; dy is formed once per chunk and used by both while it is in cache.
pub(super) fn backward(
    p: &ConvProblem,
    x: &Source<'_>,
    w: &[f32],
    load: impl Fn(Range<usize>, &mut [f32]) + Sync,
    dx: Option<(&mut [f32], bool)>,
    dw: &mut [f32],
) -> Option<GradientSums> {
    let (c_in, c_out, width) = (p.input.c, p.output.c, p.output.w);
    // dy, x and dx of a chunk should stay in cache together.
    let chunks = Chunks::new(Lines { c: c_out.max(c_in), ..p.output_lines() });
    let slab_count = slabs(chunks.count(), dw.len());
    let line_in = width * c_in;
    let ends: Vec<usize> = (0..slab_count)
        .map(|slab| chunks.line_range(slab_range(chunks.count(), slab_count, slab).end - 1).end * line_in)
        .collect();
    let sums = sum_slabs(slab_count, dx, &ends, dw, |slab, mut dx, partial| {
        let mut sums = Vec::new();
        for (i, chunk) in slab_range(chunks.count(), slab_count, slab).enumerate() {
            let lines = chunks.line_range(chunk);
            let range = lines.start * width * c_out..lines.end * width * c_out;
            let range_in = lines.start * width * c_in..lines.end * width * c_in;
            let pixels = lines.len() * width;
            with_scratch(range.len() + x.scratch_len(range_in.len()), |scratch| {
                let (dy, scratch) = scratch.split_at_mut(range.len());
                load(range, dy);
                let loaded = x.load(range_in.clone(), scratch);
                let (dy_t, rows) = (Matrix::transposed(dy, c_out), Matrix::rows(loaded, c_in));
                gemm(GemmSize { m: c_out, n: c_in, k: pixels }, dy_t, rows, partial, c_in, i > 0);
                if let Some((dx, accumulate)) = &mut dx {
                    let (head, rest) = std::mem::take(dx).split_at_mut(pixels * c_in);
                    *dx = rest;
                    let (dy, w) = (Matrix::rows(dy, c_out), Matrix::rows(w, c_in));
                    gemm(GemmSize { m: pixels, n: c_in, k: c_out }, dy, w, head, c_in, *accumulate);
                    sums.extend(x.gradient_sums(range_in, head));
                }
            });
        }
        sums
    });
    x.total(sums.into_iter().flatten())
}
