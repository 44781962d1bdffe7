//! A dense kernel as a sum of products of an input, a tap and an output factor, W[o, v, c] = Σ_m P₂[o, m]·D[m, v]·P₁[m, c]: what a
//! pointwise, a depthwise and a pointwise convolution compute.
//!
//! The matrix of one input channel, c_out × taps, is the sum of as many products as it has singular values, and so is that of one output
//! channel, c_in × taps. All of either kind together are the kernel: min(c_in, c_out)·taps products are always enough. Where there are
//! fewer, the largest singular values of all matrices are taken, the least squares among such sums.

use crate::graph::Conv;
use crate::tensor::Tensor;

/// Sweeps of Jacobi's rotations at most; matrices here are converged after a few.
const SWEEPS: usize = 60;

/// Products whose sum is a kernel, or near to it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Factors {
    /// P₁[m, ·], D[m, ·] and P₂[·, m].
    pub terms: Vec<[Vec<f64>; 3]>,
    /// Distance to the kernel, relative to it, in the Frobenius norm.
    pub error: f64,
}

/// The matrices that a kernel is cut into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Inputs,
    Outputs,
}

/// One product before it is balanced: which matrix, left vector times singular value, right vector over the taps.
struct Product {
    of: usize,
    left: Vec<f64>,
    taps: Vec<f64>,
    size: f64,
}

/// The best sum of so many products for weights `[c_out, k_h, k_w, c_in]`.
pub(super) fn factor(weight: &Tensor, conv: Conv, products: usize) -> Factors {
    let [inputs, outputs] = [Cut::Inputs, Cut::Outputs].map(|cut| cut_into(weight, conv, cut, products));
    if outputs.error < inputs.error { outputs } else { inputs }
}

fn cut_into(weight: &Tensor, conv: Conv, cut: Cut, products: usize) -> Factors {
    let (taps, matrices, rows) = match cut {
        Cut::Inputs => (conv.window.taps(), conv.c_in, conv.c_out),
        Cut::Outputs => (conv.window.taps(), conv.c_out, conv.c_in),
    };
    let value = |matrix: usize, row: usize, tap: usize| {
        let (o, c) = if cut == Cut::Inputs { (row, matrix) } else { (matrix, row) };
        f64::from(weight.data[(o * taps + tap) * conv.c_in + c])
    };
    let mut all: Vec<Product> = Vec::with_capacity(matrices * taps);
    for of in 0..matrices {
        let mut gram = vec![0.0; taps * taps];
        for row in 0..rows {
            for a in 0..taps {
                for b in 0..taps {
                    gram[a * taps + b] += value(of, row, a) * value(of, row, b);
                }
            }
        }
        for taps in eigenvectors(gram, taps) {
            let left: Vec<f64> =
                (0..rows).map(|row| taps.iter().enumerate().map(|(tap, v)| v * value(of, row, tap)).sum()).collect();
            let size = left.iter().map(|v| v * v).sum::<f64>().sqrt();
            all.push(Product { of, left, taps, size });
        }
    }
    all.sort_by(|a, b| b.size.total_cmp(&a.size));
    let squares = |products: &[Product]| products.iter().map(|product| product.size * product.size).sum::<f64>();
    let whole = squares(&all).max(f64::MIN_POSITIVE);
    let error = (squares(&all[products.min(all.len())..]) / whole).sqrt();
    all.truncate(products);
    let terms = all.into_iter().map(|product| product.balanced(cut, matrices)).collect();
    Factors { terms, error }
}

impl Product {
    /// The three factors, each with the cube root of the size.
    fn balanced(self, cut: Cut, matrices: usize) -> [Vec<f64>; 3] {
        let scale = if self.size > 0.0 { self.size.cbrt() } else { 1.0 };
        let scaled = |values: Vec<f64>, by: f64| values.into_iter().map(|value| value * by).collect();
        let mut one = vec![0.0; matrices];
        one[self.of] = scale;
        let (taps, left) = (scaled(self.taps, scale), scaled(self.left, 1.0 / (scale * scale)));
        match cut {
            Cut::Inputs => [one, taps, left],
            Cut::Outputs => [left, taps, one],
        }
    }
}

/// Orthonormal eigenvectors of a symmetric matrix, by Jacobi's rotations.
fn eigenvectors(mut a: Vec<f64>, n: usize) -> Vec<Vec<f64>> {
    let mut vectors: Vec<Vec<f64>> = (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    let total: f64 = a.iter().map(|v| v * v).sum();
    for _ in 0..SWEEPS {
        let off: f64 = (0..n).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| a[i * n + j] * a[i * n + j]).sum();
        if off <= total * f64::EPSILON * f64::EPSILON {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                rotate(&mut a, &mut vectors, n, (p, q));
            }
        }
    }
    vectors
}

/// Makes one entry beside the diagonal 0.
fn rotate(a: &mut [f64], vectors: &mut [Vec<f64>], n: usize, (p, q): (usize, usize)) {
    let entry = a[p * n + q];
    if entry == 0.0 {
        return;
    }
    let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * entry);
    let t = theta.signum() / (theta.abs() + theta.hypot(1.0));
    let (cos, sin) = (1.0 / t.hypot(1.0), t / t.hypot(1.0));
    for k in 0..n {
        let (x, y) = (a[k * n + p], a[k * n + q]);
        (a[k * n + p], a[k * n + q]) = (cos * x - sin * y, sin * x + cos * y);
    }
    for k in 0..n {
        let (x, y) = (a[p * n + k], a[q * n + k]);
        (a[p * n + k], a[q * n + k]) = (cos * x - sin * y, sin * x + cos * y);
    }
    let (low, high) = vectors.split_at_mut(q);
    for (x, y) in low[p].iter_mut().zip(&mut high[0]) {
        (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
    }
}
