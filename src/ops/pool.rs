//! Global average pooling: y[n, c] = mean over pixels of x[n, h·w, c].

use rayon::prelude::*;

use super::cuda;
use super::simd::vectorised;
use crate::device::{View, ViewMut};

/// Forward; `pixels` = h·w.
pub fn forward((pixels, c): (usize, usize), x: View<'_>, y: ViewMut<'_>) {
    if let View::Gpu(x) = x {
        return cuda::pool::forward((y.len() / c, pixels, c), x, &y.gpu());
    }
    let (x, y) = (x.host(), y.host());
    let scale = 1.0 / pixels as f32;
    y.par_chunks_mut(c).zip(x.par_chunks(pixels * c)).for_each(|(y, x)| {
        vectorised(
            #[inline(always)]
            || {
                y.fill(0.0);
                for pixel in x.chunks_exact(c) {
                    y.iter_mut().zip(pixel).for_each(|(y, x)| *y += x);
                }
                y.iter_mut().for_each(|y| *y *= scale);
            },
        );
    });
}

/// dx (+)= dy / pixels, the same for every pixel.
pub fn backward((pixels, c): (usize, usize), dy: View<'_>, dx: ViewMut<'_>, accumulate: bool) {
    if let View::Gpu(dy) = dy {
        return cuda::pool::backward((dy.len() / c, pixels, c), dy, &dx.gpu(), accumulate);
    }
    let (dy, dx) = (dy.host(), dx.host());
    let scale = 1.0 / pixels as f32;
    dx.par_chunks_mut(pixels * c).zip(dy.par_chunks(c)).for_each(|(dx, dy)| {
        vectorised(
            #[inline(always)]
            || {
                for pixel in dx.chunks_exact_mut(c) {
                    for (dx, dy) in pixel.iter_mut().zip(dy) {
                        *dx = if accumulate { *dx } else { 0.0 } + dy * scale;
                    }
                }
            },
        );
    });
}
