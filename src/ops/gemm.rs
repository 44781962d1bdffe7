//! Matrix products on one thread, through the `gemm` crates, with the bounds checked. Subnormal numbers count as zero.

use crate::device::float_mode::flush_subnormals;

use crate::shape::GemmSize;

/// A matrix in a slice: element (i, j) lies at `i * row + j * col`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub col: usize,
}

impl<'a> Matrix<'a> {
    /// Rows of `cols` contiguous elements.
    pub fn rows(data: &'a [f32], cols: usize) -> Self {
        Self { data, row: cols, col: 1 }
    }

    /// The transpose of rows of `cols` contiguous elements.
    pub fn transposed(data: &'a [f32], cols: usize) -> Self {
        Self { data, row: 1, col: cols }
    }

    fn transpose(self) -> Self {
        Self { row: self.col, col: self.row, ..self }
    }

    fn holds(&self, m: usize, n: usize) -> bool {
        m == 0 || n == 0 || (m - 1) * self.row + (n - 1) * self.col < self.data.len()
    }
}

/// C = A·B, or C += A·B where `accumulate`; A is m×k, B is k×n, C is m rows `ldc` apart.
///
/// # Panics
/// When an operand or the result is too short.
pub(super) fn gemm(size: GemmSize, a: Matrix<'_>, b: Matrix<'_>, c: &mut [f32], ldc: usize, accumulate: bool) {
    let GemmSize { m, n, k } = size;
    assert!(a.holds(m, k) && b.holds(k, n), "gemm operand too short");
    assert!(m == 0 || n == 0 || (m - 1) * ldc + n <= c.len(), "gemm result too short");
    let (beta_dst, read) = if accumulate { (1.0, true) } else { (0.0, false) };
    // The kernels want columns that lie side by side: rows are the columns of the transpose, Cᵀ = Bᵀ·Aᵀ.
    let (m, n, left, right) = if ldc > 1 { (n, m, b.transpose(), a.transpose()) } else { (m, n, a, b) };
    // SAFETY: the assertions above bound every element that the strides reach; `c` is borrowed mutably, so it
    // overlaps neither operand.
    flush_subnormals(|| unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            m,
            n,
            k,
            c.as_mut_ptr(),
            ldc as isize,
            1,
            read,
            left.data.as_ptr(),
            left.col as isize,
            left.row as isize,
            right.data.as_ptr(),
            right.col as isize,
            right.row as isize,
            beta_dst,
            1.0,
            false,
            false,
            false,
            gemm_common::Parallelism::None,
        );
    });
}
