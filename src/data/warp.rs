//! Affine transforms of one image, as Pillow's `Image.transform`.

use super::dataset::ImageShape;
use super::preprocess::Interpolation;

/// Replaces `pixels` (`uint8` HWC) by what lies at `(a·x + b·y + c, d·x + e·y + f)`, `(x, y)` being the centre of a pixel and
/// the matrix `[a, b, c, d, e, f]`; `fill` where that is outside. Bicubic is the sharper cubic (a = -1) that Pillow has for
/// transforms.
pub(super) fn warp(pixels: &mut [u8], shape: ImageShape, matrix: [f64; 6], fill: &[u8], interpolation: Interpolation) {
    let source = pixels.to_vec();
    match (interpolation, shape.channels) {
        (Interpolation::Bilinear, 1) => run::<1>(&source, pixels, shape, matrix, fill, bilinear::<1>),
        (Interpolation::Bilinear, _) => run::<3>(&source, pixels, shape, matrix, fill, bilinear::<3>),
        (Interpolation::Bicubic, 1) => run::<1>(&source, pixels, shape, matrix, fill, bicubic::<1>),
        (Interpolation::Bicubic, _) => run::<3>(&source, pixels, shape, matrix, fill, bicubic::<3>),
    }
}

/// A place between pixels: the one to its upper left, which may lie just outside, and how far beyond it.
struct Place {
    x: isize,
    y: isize,
    dx: f32,
    dy: f32,
}

fn run<const C: usize>(
    source: &[u8],
    pixels: &mut [u8],
    shape: ImageShape,
    [a, b, c, d, e, f]: [f64; 6],
    fill: &[u8],
    sample: impl Fn(&[u8], ImageShape, &Place) -> [f32; C],
) {
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
            let place = Place { x: left as isize, y: top as isize, dx: (x - left) as f32, dy: (y - top) as f32 };
            for (out, value) in out.iter_mut().zip(sample(source, shape, &place)) {
                // A cast of a float saturates and rounds towards zero.
                *out = value as u8;
            }
        }
    }
}

fn pixel<const C: usize>(source: &[u8], shape: ImageShape, x: isize, y: isize) -> [f32; C] {
    let x = x.clamp(0, shape.width as isize - 1) as usize;
    let y = y.clamp(0, shape.height as isize - 1) as usize;
    let at = &source[(y * shape.width + x) * C..][..C];
    std::array::from_fn(|channel| f32::from(at[channel]))
}

fn bilinear<const C: usize>(source: &[u8], shape: ImageShape, place: &Place) -> [f32; C] {
    let mix = |p: [f32; C], q: [f32; C], d: f32| std::array::from_fn(|i| p[i] + (q[i] - p[i]) * d);
    let across = |y: isize| {
        let [p, q] = [0, 1].map(|step| pixel::<C>(source, shape, place.x + step, y));
        mix(p, q, place.dx)
    };
    mix(across(place.y), across(place.y + 1), place.dy)
}

fn bicubic<const C: usize>(source: &[u8], shape: ImageShape, place: &Place) -> [f32; C] {
    let mix = |[p, q, r, s]: [[f32; C]; 4], d: f32| {
        std::array::from_fn(|i| {
            let (p1, p2) = (q[i], r[i] - p[i]);
            let p3 = 2.0 * (p[i] - q[i]) + r[i] - s[i];
            let p4 = -p[i] + q[i] - r[i] + s[i];
            p1 + d * (p2 + d * (p3 + d * p4))
        })
    };
    let across = |y: isize| {
        if place.dx == 0.0 {
            return pixel(source, shape, place.x, y);
        }
        mix([-1, 0, 1, 2].map(|step| pixel::<C>(source, shape, place.x + step, y)), place.dx)
    };
    // Shears and shifts move along one axis only.
    if place.dy == 0.0 { across(place.y) } else { mix([-1, 0, 1, 2].map(|step| across(place.y + step)), place.dy) }
}
