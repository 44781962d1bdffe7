//! Matrix products on one thread, through the `gemm` crate, with the bounds checked.

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

    fn holds(&self, m: usize, n: usize) -> bool {
        m == 0 || n == 0 || (m - 1) * self.row + (n - 1) * self.col < self.data.len()
    }
}

/// C = A·B, or C += A·B where `accumulate`; A is m×k, B is k×n, C is m rows `ldc` apart.
pub(super) fn gemm(
    (m, n, k): (usize, usize, usize),
    a: Matrix<'_>,
    b: Matrix<'_>,
    c: &mut [f32],
    ldc: usize,
    accumulate: bool,
) {
    assert!(a.holds(m, k) && b.holds(k, n), "gemm operand too short");
    assert!(m == 0 || n == 0 || (m - 1) * ldc + n <= c.len(), "gemm result too short");
    let (beta_dst, read) = if accumulate { (1.0, true) } else { (0.0, false) };
    // SAFETY: the assertions above bound every element that the strides reach; `c` is borrowed mutably, so it
    // overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            ldc as isize,
            read,
            a.data.as_ptr(),
            a.col as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.col as isize,
            b.row as isize,
            beta_dst,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
