//! Fully connected layer: y[n, c_out] = x[n, c_in]·Wᵀ + b, W `[c_out, c_in]`.

use rayon::prelude::*;

use super::cuda;
use super::gemm::{Matrix, gemm};
use crate::device::{View, ViewMut};

/// Images per task.
const ROWS: usize = 64;

/// Sizes of a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearProblem {
    /// Images.
    pub n: usize,
    /// Features in.
    pub c_in: usize,
    /// Features out.
    pub c_out: usize,
}

/// Forward.
pub fn forward(p: LinearProblem, x: View<'_>, w: View<'_>, b: View<'_>, y: ViewMut<'_>) {
    if let View::Gpu(x) = x {
        let epilogue = cuda::conv::Epilogue { bias: Some((b.gpu(), 1)), ..Default::default() };
        return cuda::conv::product_forward((p.n, p.c_in, p.c_out), x, w.gpu(), epilogue, &y.gpu());
    }
    let (x, w, b, y) = (x.host(), w.host(), b.host(), y.host());
    let LinearProblem { n, c_in, c_out } = p;
    y[..n * c_out].par_chunks_mut(ROWS * c_out).zip(x[..n * c_in].par_chunks(ROWS * c_in)).for_each(|(y, x)| {
        y.chunks_exact_mut(c_out).for_each(|row| row.copy_from_slice(b));
        gemm((y.len() / c_out, c_out, c_in), Matrix::rows(x, c_in), Matrix::transposed(w, c_in), y, c_out, true);
    });
}

/// dx = dy·W (where asked for), dw = dyᵀ·x, db = Σ dy.
pub fn backward(
    p: LinearProblem,
    (x, w, dy): (View<'_>, View<'_>, View<'_>),
    dx: Option<(ViewMut<'_>, bool)>,
    (dw, db): (ViewMut<'_>, ViewMut<'_>),
) {
    if let View::Gpu(x) = x {
        let (sizes, dy) = ((p.n, p.c_in, p.c_out), dy.gpu());
        if let Some((dx, accumulate)) = dx {
            cuda::conv::product_input_gradient(sizes, dy, w.gpu(), &dx.gpu(), accumulate);
        }
        cuda::conv::product_weight_gradient(sizes, x, dy, &dw.gpu());
        return cuda::conv::bias_gradient((p.n, p.c_out), dy, &db.gpu());
    }
    let (x, w, dy) = (x.host(), w.host(), dy.host());
    let LinearProblem { n, c_in, c_out } = p;
    if let Some((dx, accumulate)) = dx {
        let dx = dx.host();
        dx[..n * c_in].par_chunks_mut(ROWS * c_in).zip(dy[..n * c_out].par_chunks(ROWS * c_out)).for_each(
            |(dx, dy)| {
                let rows = dy.len() / c_out;
                gemm((rows, c_in, c_out), Matrix::rows(dy, c_out), Matrix::rows(w, c_in), dx, c_in, accumulate);
            },
        );
    }
    let (dw, db) = (dw.host(), db.host());
    gemm((c_out, c_in, n), Matrix::transposed(dy, c_out), Matrix::rows(x, c_in), dw, c_in, false);
    db.fill(0.0);
    for row in dy[..n * c_out].chunks_exact(c_out) {
        db.iter_mut().zip(row).for_each(|(db, dy)| *db += dy);
    }
}
