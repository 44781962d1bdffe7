//! The kernels: rows of a block in, a row of sums or sums of weights out. Sums are chains of fused products that stay in
//! registers.

use pulp::Simd;

use crate::ops::simd::unrolled;

/// Columns whose sums are in registers at once; eight where there are 32 registers.
const STRIP: usize = 4;
const WIDE_STRIP: usize = 8;

/// Rows of a block and the kernel rows over them.
#[derive(Clone, Copy)]
pub(super) struct WeightedRows<V> {
    /// Where the first row begins.
    pub x: *const V,
    /// From a row to the next.
    pub x_step: usize,
    /// Where the kernel row over it begins.
    pub w: *const V,
    /// From a kernel row to the next.
    pub w_step: usize,
    /// How many.
    pub count: usize,
}

/// The size of a kernel along a row, and its stride: constants where `K` is not 0.
#[derive(Clone, Copy)]
pub(super) struct RowKernel<const K: usize, const STRIDE: usize> {
    /// Taps of a row.
    pub k: usize,
    /// Columns from one output to the next.
    pub stride: usize,
}

impl<const K: usize, const STRIDE: usize> RowKernel<K, STRIDE> {
    /// Columns of an output row: out[i] = start + Σ over rows and taps of x[stride·i + tap]·w[tap].
    ///
    /// # Safety
    /// Every row has stride·(columns − 1) + k vectors, and its kernel row k.
    #[inline(always)]
    pub unsafe fn filter<S: Simd>(
        self,
        simd: S,
        rows: WeightedRows<S::f32s>,
        start: S::f32s,
        columns: usize,
        mut put: impl FnMut(usize, S::f32s),
    ) {
        // Strips as evenly wide as they can be: a narrow one waits for its sums.
        let strips = columns.div_ceil(if S::REGISTER_COUNT >= 32 { WIDE_STRIP } else { STRIP });
        for strip in 0..strips {
            let (column, end) = (strip * columns / strips, (strip + 1) * columns / strips);
            // SAFETY: promised by the caller.
            unsafe {
                match end - column {
                    1 => self.strip::<S, 1>(simd, rows, start, column, &mut put),
                    2 => self.strip::<S, 2>(simd, rows, start, column, &mut put),
                    3 => self.strip::<S, 3>(simd, rows, start, column, &mut put),
                    4 => self.strip::<S, 4>(simd, rows, start, column, &mut put),
                    5 => self.strip::<S, 5>(simd, rows, start, column, &mut put),
                    6 => self.strip::<S, 6>(simd, rows, start, column, &mut put),
                    7 => self.strip::<S, 7>(simd, rows, start, column, &mut put),
                    _ => self.strip::<S, WIDE_STRIP>(simd, rows, start, column, &mut put),
                }
            }
        }
    }

    /// `N` columns from one on.
    ///
    /// # Safety
    /// As for [`filter`](Self::filter).
    #[inline(always)]
    unsafe fn strip<S: Simd, const N: usize>(
        self,
        simd: S,
        rows: WeightedRows<S::f32s>,
        start: S::f32s,
        column: usize,
        put: &mut impl FnMut(usize, S::f32s),
    ) {
        let stride = if K == 0 { self.stride } else { STRIDE };
        let mut sums = [start; N];
        for row in 0..rows.count {
            // SAFETY: promised by the caller.
            unsafe {
                let (x, w) = (rows.x.add(row * rows.x_step + column * stride), rows.w.add(row * rows.w_step));
                if K == 0 {
                    for tap in 0..self.k {
                        let w = *w.add(tap);
                        unrolled!(I < N, sums[I] = simd.mul_add_e_f32s(*x.add(I * stride + tap), w, sums[I]), 0 1 2 3 4 5 6 7);
                    }
                }
                unrolled!(TAP < K, {
                    let w = *w.add(TAP);
                    unrolled!(I < N, sums[I] = simd.mul_add_e_f32s(*x.add(I * STRIDE + TAP), w, sums[I]), 0 1 2 3 4 5 6 7);
                }, 0 1 2 3 4);
            }
        }
        unrolled!(I < N, put(column + I, sums[I]), 0 1 2 3 4 5 6 7);
    }

    /// dw[kernel row · k + tap] += Σ over columns of dy[step·i]·x[kernel row][stride·i + tap], for `count` kernel rows over
    /// rows of x that follow each other after `x_step`. `ahead` hears of each column.
    ///
    /// # Safety
    /// `dy` has step·(columns − 1) + 1 vectors, each row of x stride·(columns − 1) + k, and dw count·k.
    #[inline(always)]
    pub unsafe fn add_weight_gradient<S: Simd>(
        self,
        simd: S,
        dy: (*const S::f32s, usize),
        x: (*const S::f32s, usize),
        (count, columns): (usize, usize),
        dw: *mut S::f32s,
        ahead: impl Fn(usize),
    ) {
        // SAFETY: promised by the caller.
        unsafe {
            match (K, count) {
                // All taps at once where each finds a register.
                (3, 3) if S::REGISTER_COUNT >= 16 => self.add_rows::<S, 3>(simd, dy, x, columns, dw, ahead),
                (5, 5) if S::REGISTER_COUNT >= 32 => self.add_rows::<S, 5>(simd, dy, x, columns, dw, ahead),
                (3 | 5, _) => {
                    for row in 0..count {
                        self.add_rows::<S, 1>(simd, dy, (x.0.add(row * x.1), 0), columns, dw.add(row * K), &ahead);
                    }
                }
                _ => self.add_any(simd, dy, x, (count, columns), dw),
            }
        }
    }

    /// # Safety
    /// As for [`add_weight_gradient`](Self::add_weight_gradient).
    #[inline(always)]
    unsafe fn add_rows<S: Simd, const ROWS: usize>(
        self,
        simd: S,
        (dy, step): (*const S::f32s, usize),
        (x, x_step): (*const S::f32s, usize),
        columns: usize,
        dw: *mut S::f32s,
        ahead: impl Fn(usize),
    ) {
        let mut sums = [[simd.splat_f32s(0.0); K]; ROWS];
        // SAFETY: promised by the caller.
        unsafe {
            unrolled!(ROW < ROWS, unrolled!(TAP < K, sums[ROW][TAP] = *dw.add(ROW * K + TAP), 0 1 2 3 4), 0 1 2 3 4);
            for column in 0..columns {
                let (dy, x) = (*dy.add(column * step), x.add(column * STRIDE));
                ahead(column);
                unrolled!(ROW < ROWS, {
                    unrolled!(TAP < K, {
                        sums[ROW][TAP] = simd.mul_add_e_f32s(dy, *x.add(ROW * x_step + TAP), sums[ROW][TAP]);
                    }, 0 1 2 3 4);
                }, 0 1 2 3 4);
            }
            unrolled!(ROW < ROWS, unrolled!(TAP < K, *dw.add(ROW * K + TAP) = sums[ROW][TAP], 0 1 2 3 4), 0 1 2 3 4);
        }
    }

    /// # Safety
    /// As for [`add_weight_gradient`](Self::add_weight_gradient).
    #[inline(always)]
    unsafe fn add_any<S: Simd>(
        self,
        simd: S,
        (dy, step): (*const S::f32s, usize),
        (x, x_step): (*const S::f32s, usize),
        (count, columns): (usize, usize),
        dw: *mut S::f32s,
    ) {
        for (row, tap) in (0..count).flat_map(|row| (0..self.k).map(move |tap| (row, tap))) {
            // SAFETY: promised by the caller.
            unsafe {
                let mut sum = *dw.add(row * self.k + tap);
                for column in 0..columns {
                    let x = *x.add(row * x_step + column * self.stride + tap);
                    sum = simd.mul_add_e_f32s(*dy.add(column * step), x, sum);
                }
                *dw.add(row * self.k + tap) = sum;
            }
        }
    }
}
