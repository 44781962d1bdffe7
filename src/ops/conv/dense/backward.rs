//! Backward pass: im2col of a few lines into the core's cache, then for each group a sum of outer products for the weights and a
//! product for the input.

use std::ops::Range;

use super::super::ConvProblem;
use super::super::source::{GradientSource, Source};
use super::{copy_group, stored};
use crate::device::float_mode::flush_subnormals;
use crate::ops::ahead::Ahead;
use crate::ops::outer::{Pixels, sum_outer};
use crate::ops::panels::{Packed, PanelLayout, transpose_in_place};
use crate::ops::parallel::{PartialSums, slab_range, slabs, sum_slabs, with_scratch};
use crate::ops::product::{Ends, Product, Rows, Starts};

/// Elements of one im2col piece: what fits beside the other operands in a core's second-level cache.
const COLUMN_ELEMENTS: usize = 1 << 15;
/// Pixels of a piece at least, so that sums of weights are loaded and stored for many.
const MIN_PIXELS: usize = 96;

/// Sizes of one group's products.
struct Geometry {
    c_in: usize,
    c_out: usize,
    /// Reduction length: taps · c_in.
    k: usize,
    /// Lines per im2col piece.
    piece: usize,
    /// Whether dwᵀ is summed instead of dw: vectors run over the side with more channels.
    is_transposed: bool,
}

impl Geometry {
    fn new(p: &ConvProblem) -> Self {
        let (c_in, c_out) = (p.input.c / p.groups, p.output.c / p.groups);
        let k = p.window.taps() * c_in;
        let pixels = (COLUMN_ELEMENTS / k).max(MIN_PIXELS);
        Self { c_in, c_out, k, piece: (pixels / p.output.w).max(1), is_transposed: c_out > k }
    }
}

/// dw = dyᵀ·im2col(x), dx (+)= col2im(dy·W), piece by piece.
pub(in crate::ops) fn backward(
    p: &ConvProblem,
    x: &Source<'_>,
    w: &[f32],
    dy: &GradientSource<'_>,
    dx: Option<(&mut [f32], bool)>,
    dw: &mut [f32],
) -> PartialSums<f64> {
    let (g, x) = (Geometry::new(p), stored(x));
    let (width, c) = (p.output.w, p.output.c);
    let slab_count = slabs(p.n, dw.len());
    let end = |slab| slab_range(p.n, slab_count, slab).end * p.input.len();
    // What it reads is stored.
    let mut sums = PartialSums::new(0, 0);
    // dx under one output pixel is dy·W.
    let transposed = PanelLayout { groups: p.groups, c_out: g.k, k: g.c_out };
    let packed = dx.is_some().then(|| Packed::transposed(transposed, w));
    let panels = packed.as_ref().map(Packed::panels);
    sum_slabs(slab_count, (dx, end), &mut sums, dw, |slab, mut dx, partial, _| {
        let images = slab_range(p.n, slab_count, slab);
        if let Some((dx, false)) = &mut dx {
            dx.fill(0.0);
        }
        let lines = images.start * p.output.h..images.end * p.output.h;
        let columns_len = g.piece * width * g.k;
        with_scratch(columns_len + dy.scratch_len(g.piece * width * c), |scratch| {
            let (columns, dy_scratch) = scratch.split_at_mut(columns_len);
            for start in lines.clone().step_by(g.piece) {
                let piece = start..(start + g.piece).min(lines.end);
                let columns = &mut columns[..piece.len() * width * g.k];
                let dy = dy.load(piece.start * width * c..piece.end * width * c, dy_scratch);
                for group in 0..p.groups {
                    im2col(p, &g, x, piece.clone(), group, columns);
                    let of_dy = Pixels::new(dy, c).channels(group * g.c_out..(group + 1) * g.c_out);
                    let of_columns = Pixels::new(columns, g.k);
                    let partial = &mut partial[group * g.c_out * g.k..][..g.c_out * g.k];
                    match g.is_transposed {
                        true => sum_outer(of_columns, of_dy, partial, start > lines.start, &mut Ahead::default()),
                        false => sum_outer(of_dy, of_columns, partial, start > lines.start, &mut Ahead::default()),
                    }
                    if let (Some((dx, _)), Some(panels)) = (&mut dx, panels) {
                        let starts = Starts::Every { count: piece.len() * width, elements: c };
                        let rows = Rows { data: &dy[group * g.c_out..], starts, step: 0, run: g.c_out };
                        Product::new(panels.of_group(group), rows, Ends::NONE).run(columns);
                        flush_subnormals(|| col2im(p, &g, columns, piece.clone(), group, images.start, dx));
                    }
                }
            }
        });
    });
    if g.is_transposed {
        for dw in dw.chunks_exact_mut(g.c_out * g.k) {
            transpose_in_place(dw, g.c_out, g.k);
        }
    }
    sums
}

/// For one output pixel the taps that lie inside the image: rows, and for each row the columns.
fn valid(offset: usize, k: usize, pad: usize, len: usize) -> Range<usize> {
    let start = pad.saturating_sub(offset).min(k);
    let end = (len + pad).saturating_sub(offset).min(k).max(start);
    start..end
}

/// Gathers the input under every output pixel of `lines`: columns `[pixels, k_h, k_w, c_in]`, zero outside the image.
fn im2col(p: &ConvProblem, g: &Geometry, x: &[f32], lines: Range<usize>, group: usize, columns: &mut [f32]) {
    let window = p.window;
    let (row_len, c) = (window.k_w * g.c_in, p.input.c);
    let mut out = columns.chunks_exact_mut(row_len);
    for line in lines {
        let (image, oh) = (line / p.output.h, line % p.output.h);
        let rows = valid(oh * window.stride_h, window.k_h, window.pad.top, p.input.h);
        for ow in 0..p.output.w {
            let left = ow * window.stride_w;
            let taps = valid(left, window.k_w, window.pad.left, p.input.w);
            for kh in 0..window.k_h {
                let out = out.next().expect("the scratch holds every pixel of the piece");
                if !rows.contains(&kh) || taps.is_empty() {
                    out.fill(0.0);
                    continue;
                }
                let ih = oh * window.stride_h + kh - window.pad.top;
                let iw = left + taps.start - window.pad.left;
                let from = ((image * p.input.h + ih) * p.input.w + iw) * c + group * g.c_in;
                out[..taps.start * g.c_in].fill(0.0);
                out[taps.end * g.c_in..].fill(0.0);
                copy_group(&x[from..], c, &mut out[taps.start * g.c_in..taps.end * g.c_in], g.c_in);
            }
        }
    }
}

/// Adds columns back where [`im2col`] took them from; `dx` starts at image `first`.
fn col2im(
    p: &ConvProblem,
    g: &Geometry,
    columns: &[f32],
    lines: Range<usize>,
    group: usize,
    first: usize,
    dx: &mut [f32],
) {
    let window = p.window;
    let (row_len, c) = (window.k_w * g.c_in, p.input.c);
    let mut columns = columns.chunks_exact(row_len);
    for line in lines {
        let (image, oh) = (line / p.output.h - first, line % p.output.h);
        let rows = valid(oh * window.stride_h, window.k_h, window.pad.top, p.input.h);
        for ow in 0..p.output.w {
            let left = ow * window.stride_w;
            let taps = valid(left, window.k_w, window.pad.left, p.input.w);
            for kh in 0..window.k_h {
                let column = columns.next().expect("the scratch holds every pixel of the piece");
                if !rows.contains(&kh) || taps.is_empty() {
                    continue;
                }
                let ih = oh * window.stride_h + kh - window.pad.top;
                let iw = left + taps.start - window.pad.left;
                let to = ((image * p.input.h + ih) * p.input.w + iw) * c + group * g.c_in;
                let column = &column[taps.start * g.c_in..taps.end * g.c_in];
                for (column, dx) in column.chunks_exact(g.c_in).zip(dx[to..].chunks_mut(c)) {
                    dx.iter_mut().zip(column).for_each(|(dx, column)| *dx += column);
                }
            }
        }
    }
}
