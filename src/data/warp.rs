//! Affine transforms of one image, as Pillow's `Image.transform`.

use super::dataset::ImageShape;
use super::preprocess::Interpolation;
use crate::ops::simd::vectorised;

/// Replaces `pixels` (`uint8` HWC) by what lies at `(a·x + b·y + c, d·x + e·y + f)`, `(x, y)` being the centre of a pixel and
/// the matrix `[a, b, c, d, e, f]`; `fill` where that is outside. Bicubic is the sharper cubic (a = -1) that Pillow has for
/// transforms.
pub(super) fn warp(pixels: &mut [u8], shape: ImageShape, matrix: [f64; 6], fill: &[u8], interpolation: Interpolation) {
    let source = pixels.to_vec();
    vectorised(|| match (interpolation, shape.channels) {
        (Interpolation::Bilinear, 1) => run::<1, 2>(&source, pixels, shape, matrix, fill),
        (Interpolation::Bilinear, _) => run::<3, 2>(&source, pixels, shape, matrix, fill),
        (Interpolation::Bicubic, 1) => run::<1, 4>(&source, pixels, shape, matrix, fill),
        (Interpolation::Bicubic, _) => run::<3, 4>(&source, pixels, shape, matrix, fill),
    });
}

/// Values of the pixels in one row that a pixel is mixed from, one after another; the rest is not used.
type Taps = [f32; 4 * 3];

/// Mixes every pixel of `C` values from `K` x `K` pixels: 2 for linear, 4 for cubic.
#[inline(always)]
fn run<const C: usize, const K: usize>(
    source: &[u8],
    pixels: &mut [u8],
    shape: ImageShape,
    matrix: [f64; 6],
    fill: &[u8],
) {
    let [a, b, c, d, e, f] = matrix;
    let (width, height) = (shape.width as f64, shape.height as f64);
    for (line, out) in pixels.chunks_exact_mut(shape.width * C).enumerate() {
        let y_out = line as f64 + 0.5;
        for (column, out) in out.chunks_exact_mut(C).enumerate() {
            let x_out = column as f64 + 0.5;
            let (x, y) = (a * x_out + b * y_out + c, d * x_out + e * y_out + f);
            if !(0.0..width).contains(&x) || !(0.0..height).contains(&y) {
                out.copy_from_slice(fill);
                continue;
            }
            let (x, y) = (x - 0.5, y - 0.5);
            let (left, top) = (x.floor(), y.floor());
            let (dx, dy) = ((x - left) as f32, (y - top) as f32);
            let (left, top) = (left as isize, top as isize);
            // Shears and shifts move along one axis only.
            let columns = if dy == 0.0 {
                row::<C, K>(source, shape, left, top)
            } else {
                let before = (K / 2 - 1) as isize;
                let rows: [Taps; K] =
                    std::array::from_fn(|k| row::<C, K>(source, shape, left, top + k as isize - before));
                std::array::from_fn(|i| mix::<K>(std::array::from_fn(|k| rows[k][i]), dy))
            };
            for (i, out) in out.iter_mut().enumerate() {
                // A cast of a float saturates and rounds towards zero.
                *out = mix::<K>(std::array::from_fn(|k| columns[k * C + i]), dx) as u8;
            }
        }
    }
}

/// The `K` pixels around column `x` in row `y`; beyond the border, that of the border.
#[inline(always)]
fn row<const C: usize, const K: usize>(source: &[u8], shape: ImageShape, x: isize, y: isize) -> Taps {
    let y = y.clamp(0, shape.height as isize - 1) as usize;
    let line = &source[y * shape.width * C..][..shape.width * C];
    let first = x - (K / 2 - 1) as isize;
    let mut taps = [0.0; 12];
    if first >= 0 && first as usize + K <= shape.width {
        let bytes = &line[first as usize * C..][..K * C];
        taps.iter_mut().zip(bytes).for_each(|(tap, byte)| *tap = f32::from(*byte));
    } else {
        for k in 0..K {
            let x = (first + k as isize).clamp(0, shape.width as isize - 1) as usize;
            for i in 0..C {
                taps[k * C + i] = f32::from(line[x * C + i]);
            }
        }
    }
    taps
}

/// The value at `d` between the two middle ones of `v`.
#[inline(always)]
fn mix<const K: usize>(v: [f32; K], d: f32) -> f32 {
    if K == 2 {
        return v[0] + (v[1] - v[0]) * d;
    }
    let [p, q, r, s] = std::array::from_fn(|k| v[k]);
    q + d * (r - p + d * (2.0 * (p - q) + r - s + d * (-p + q - r + s)))
}
