//! Pointwise (1×1) convolution on the CPU: a product of pixels and weights in panels; both gradients from one pass over dy.

use super::ConvProblem;
use super::parts::{Part, in_parts};
use super::source::{GradientSource, Source};
use crate::device::View;
use crate::ops::ahead::Ahead;
use crate::ops::outer::{Pixels, sum_outer};
use crate::ops::panels::{Packed, PanelLayout, transpose_in_place};
use crate::ops::parallel::{Chunks, PartialSums, slab_range, slabs, sum_slabs, with_scratch};
use crate::ops::product::{Ends, Product, Rows};
use crate::ops::streaming;
use crate::shape::Lines;

/// y = φ(x·Wᵀ + bias + residual).
pub(super) fn forward(
    p: &ConvProblem,
    x: &Source<'_>,
    w: View<'_>,
    ends: &Ends<'_>,
    y: &mut [f32],
    takes_moments: bool,
) -> PartialSums<f32> {
    let (c_in, width) = (p.input.c, p.output.w);
    let packed = Packed::of_product(p, w);
    let panels = packed.panels();
    let sum = |Part { lines, next, panels: columns, y }: Part<'_>| {
        let ahead = Ahead { parts: [x.reads(next.start * width * c_in..next.end * width * c_in), &[], &[]] };
        let (pixels, ends) = (lines.start * width..lines.end * width, ends.of_lines(p, &lines));
        let range = pixels.start * c_in..pixels.end * c_in;
        with_scratch(x.scratch_len(range.len()), |scratch| {
            let rows = Rows::contiguous(x.load(range, scratch), c_in);
            let product = Product { columns, first_row: pixels.start, ahead, ..Product::new(panels, rows, ends) };
            // SAFETY: tasks are given different lines or different panels.
            unsafe { product.run_shared(y) }
        });
    };
    in_parts(p, (Chunks::new(p.output_lines()), panels.layout.count()), y, takes_moments, sum)
}

/// dx (+)= dy·W, dw = dyᵀ·x; dy is formed once per chunk and used by both while it is in cache.
pub(super) fn backward(
    p: &ConvProblem,
    x: &Source<'_>,
    w: &[f32],
    dy: &GradientSource<'_>,
    dx: Option<(&mut [f32], bool)>,
    dw: &mut [f32],
) -> PartialSums<f64> {
    let (c_in, c_out, width) = (p.input.c, p.output.c, p.output.w);
    // dy, x and dx of a chunk should stay in cache together.
    let chunks = Chunks::new(Lines { c: c_out.max(c_in), ..p.output_lines() });
    let slab_count = slabs(chunks.count(), dw.len());
    let line_in = width * c_in;
    let end = |slab| chunks.line_range(slab_range(chunks.count(), slab_count, slab).end - 1).end * line_in;
    let transposed = PanelLayout { groups: 1, c_out: c_in, k: c_out };
    let is_streamed = streaming::is_gradient_streamed(dx.as_ref());
    let packed = dx.is_some().then(|| Packed::transposed(transposed, w));
    let panels = packed.as_ref().map(Packed::panels);
    let mut sums = x.partial_sums(chunks.count());
    let row = sums.row_len();
    sum_slabs(slab_count, (dx, end), &mut sums, dw, |slab, mut dx, partial, rows| {
        for (i, chunk) in slab_range(chunks.count(), slab_count, slab).enumerate() {
            let lines = chunks.line_range(chunk);
            let range = lines.start * width * c_out..lines.end * width * c_out;
            let range_in = lines.start * width * c_in..lines.end * width * c_in;
            let dy_len = dy.scratch_len(range.len());
            with_scratch(dy_len + x.scratch_len(range_in.len()), |scratch| {
                let (dy_scratch, scratch) = scratch.split_at_mut(dy_len);
                let next = chunks.line_range((chunk + 1).min(chunks.count() - 1));
                let [y, dz] = dy.reads(next.start * width * c_out..next.end * width * c_out);
                let mut ahead = Ahead { parts: [y, dz, x.reads(next.start * width * c_in..next.end * width * c_in)] };
                let dy = dy.load(range, dy_scratch);
                let loaded = x.load(range_in.clone(), scratch);
                let (of_dy, of_x) = (Pixels::new(dy, c_out), Pixels::new(loaded, c_in));
                match is_transposed(p) {
                    true => sum_outer(of_x, of_dy, partial, i > 0, &mut ahead),
                    false => sum_outer(of_dy, of_x, partial, i > 0, &mut ahead),
                }
                if let (Some((dx, accumulate)), Some(panels)) = (&mut dx, panels) {
                    let (head, rest) = std::mem::take(dx).split_at_mut(range_in.len());
                    *dx = rest;
                    let ends = Ends { accumulate: *accumulate, ..Ends::NONE };
                    let product = |to: &mut [f32]| {
                        Product { ahead, ..Product::new(panels, Rows::contiguous(dy, c_out), ends) }.run(to);
                        x.add_sums(range_in, to, &mut rows[i * row..(i + 1) * row]);
                    };
                    if is_streamed {
                        with_scratch(head.len(), |to| {
                            product(to);
                            streaming::copy(to, head);
                        });
                    } else {
                        product(head);
                    }
                }
            });
        }
    });
    if is_transposed(p) {
        transpose_in_place(dw, c_out, c_in);
    }
    sums
}

/// Whether dwᵀ is summed instead of dw: vectors run over the side with more channels.
fn is_transposed(p: &ConvProblem) -> bool {
    p.output.c > p.input.c
}
