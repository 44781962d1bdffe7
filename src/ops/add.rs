//! Sums of two values.

use rayon::prelude::*;

use super::cuda::elementwise;
use super::simd::vectorised;
use crate::device::{View, ViewMut};

const BLOCK: usize = 1 << 14;

/// y = a + b.
pub fn forward(a: View<'_>, b: View<'_>, y: ViewMut<'_>) {
    if let View::Gpu(a) = a {
        return elementwise::add(a, b.gpu(), &y.gpu());
    }
    let (a, b, y) = (a.host(), b.host(), y.host());
    y.par_chunks_mut(BLOCK).zip(a.par_chunks(BLOCK).zip(b.par_chunks(BLOCK))).for_each(|(y, (a, b))| {
        vectorised(
            #[inline(always)]
            || y.iter_mut().zip(a).zip(b).for_each(|((y, a), b)| *y = a + b),
        );
    });
}

/// dx (+)= dy: an addition's gradient to either input.
pub fn backward(dy: View<'_>, dx: ViewMut<'_>, accumulate: bool) {
    if let View::Gpu(dy) = dy {
        return if accumulate { elementwise::accumulate(&dx.gpu(), dy) } else { elementwise::cast(dy, &dx.gpu()) };
    }
    let (dy, dx) = (dy.host(), dx.host());
    dx.par_chunks_mut(BLOCK).zip(dy.par_chunks(BLOCK)).for_each(|(dx, dy)| {
        if accumulate {
            vectorised(
                #[inline(always)]
                || dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx += dy),
            );
        } else {
            dx.copy_from_slice(dy);
        }
    });
}
