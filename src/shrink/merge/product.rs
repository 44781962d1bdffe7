//! Matrix products in f64 for folding weights. Plain multiply and add, never fused: the same bits on every processor.

use pulp::{Arch, NullaryFnOnce};

use crate::shape::GemmSize;

/// Rows of C computed together: with [`COLS`] the accumulators fill half of the sixteen vector registers of AVX2.
const ROWS: usize = 4;
/// Columns of C computed together: two vectors of AVX2.
const COLS: usize = 8;
/// Rows of B packed together: with [`COLS`] 16 KiB, half of a core's nearest cache.
const DEPTH: usize = 256;

/// Rows of numbers in a slice, `stride` apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    pub data: &'a [f64],
    pub stride: usize,
}

/// C += A·B on one thread; the rows of C are `stride` apart.
pub(super) fn add_product(size: GemmSize, a: Rows<'_>, b: Rows<'_>, c: &mut [f64], stride: usize) {
    struct Body<'a>(GemmSize, Rows<'a>, Rows<'a>, &'a mut [f64], usize);
    impl NullaryFnOnce for Body<'_> {
        type Output = ();
        #[inline(always)]
        fn call(self) {
            let Body(size, a, b, c, stride) = self;
            panels(size, a, b, c, stride);
        }
    }
    Arch::new().dispatch(Body(size, a, b, c, stride));
}

/// Packs B panel by panel, filled with zeros beyond its last column, and multiplies each by all of A.
#[inline(always)]
fn panels(size: GemmSize, a: Rows<'_>, b: Rows<'_>, c: &mut [f64], stride: usize) {
    let GemmSize { m, n, k } = size;
    let mut panel = [[0.0; COLS]; DEPTH];
    for first in (0..k).step_by(DEPTH) {
        let depth = DEPTH.min(k - first);
        for j in (0..n).step_by(COLS) {
            let cols = COLS.min(n - j);
            for (p, line) in panel[..depth].iter_mut().enumerate() {
                line[cols..].fill(0.0);
                line[..cols].copy_from_slice(&b.data[(first + p) * b.stride + j..][..cols]);
            }
            let a_row = |i: usize| &a.data[i * a.stride + first..][..depth];
            let mut add = |i: usize, sums: [f64; COLS]| {
                c[i * stride + j..][..cols].iter_mut().zip(sums).for_each(|(c, s)| *c += s);
            };
            let whole = m - m % ROWS;
            for i in (0..whole).step_by(ROWS) {
                let sums: [_; ROWS] = tile(std::array::from_fn(|r| a_row(i + r)), &panel[..depth]);
                sums.into_iter().enumerate().for_each(|(r, sums)| add(i + r, sums));
            }
            for i in whole..m {
                let [sums] = tile([a_row(i)], &panel[..depth]);
                add(i, sums);
            }
        }
    }
}

/// Products of some rows of A with a panel of B.
#[inline(always)]
#[allow(
    clippy::needless_range_loop,
    reason = "of zipped iterators not all are inlined here, and the sums lie in memory"
)]
fn tile<const R: usize>(rows: [&[f64]; R], panel: &[[f64; COLS]]) -> [[f64; COLS]; R] {
    let rows = rows.map(|row| &row[..panel.len()]);
    let mut sums = [[0.0; COLS]; R];
    for p in 0..panel.len() {
        for r in 0..R {
            for j in 0..COLS {
                sums[r][j] += rows[r][p] * panel[p][j];
            }
        }
    }
    sums
}
