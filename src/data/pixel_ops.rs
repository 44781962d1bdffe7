//! Operations on the bytes of one image, as Pillow has them (`ImageOps`, `ImageEnhance`, `Image.transform`): what
//! RandAugment and colour jitter are made of.

use super::dataset::ImageShape;
use super::picture::luma;
use super::preprocess::Interpolation;
use super::warp::warp;

/// One operation with its magnitude. Enhancements leave the image as it is at a factor of 1; below they take away, above they
/// exaggerate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PixelOp {
    /// Stretches every channel to 0..255.
    AutoContrast,
    /// Flattens the histogram of every channel.
    Equalize,
    /// 255 - v.
    Invert,
    /// Keeps the upper bits of every value, 0 to 8 of them.
    Posterize(u32),
    /// Inverts values from the threshold on.
    Solarize(u16),
    /// Adds to values below 128.
    SolarizeAdd(u8),
    /// Enhances colour against the image's own grey.
    Color(f32),
    /// Enhances contrast against the mean grey.
    Contrast(f32),
    /// Enhances brightness against black.
    Brightness(f32),
    /// Enhances sharpness against the image smoothed over 3x3 pixels.
    Sharpness(f32),
    /// Turns counter-clockwise about the centre, in degrees.
    Rotate(f64),
    /// Shifts every row by this many pixels per row.
    ShearX(f64),
    /// Shifts every column by this many pixels per column.
    ShearY(f64),
    /// Shifts to the left by this share of the width.
    TranslateX(f64),
    /// Shifts up by this share of the height.
    TranslateY(f64),
}

impl PixelOp {
    /// Changes `pixels`, `uint8` HWC of `shape` with 1 or 3 channels. Where a shift leaves nothing, there is `fill`, one value
    /// per channel.
    pub fn apply(self, pixels: &mut [u8], shape: ImageShape, fill: &[u8], interpolation: Interpolation) {
        let channels = shape.channels;
        let (w, h) = (shape.width as f64, shape.height as f64);
        let mut moved = |matrix| warp(pixels, shape, matrix, fill, interpolation);
        match self {
            Self::Rotate(degrees) => moved(rotation(degrees, w, h)),
            Self::ShearX(factor) => moved([1.0, factor, 0.0, 0.0, 1.0, 0.0]),
            Self::ShearY(factor) => moved([1.0, 0.0, 0.0, factor, 1.0, 0.0]),
            Self::TranslateX(share) => moved([1.0, 0.0, share * w, 0.0, 1.0, 0.0]),
            Self::TranslateY(share) => moved([1.0, 0.0, 0.0, 0.0, 1.0, share * h]),
            Self::AutoContrast => by_histogram(pixels, channels, stretched),
            Self::Equalize => by_histogram(pixels, channels, equalized),
            Self::Invert => by_value(pixels, |v| 255 - v),
            Self::Posterize(bits) => by_value(pixels, |v| v & (0xff00u32 >> bits.min(8)) as u8),
            Self::Solarize(threshold) => by_value(pixels, |v| if u16::from(v) < threshold { v } else { 255 - v }),
            Self::SolarizeAdd(add) => by_value(pixels, |v| if v < 128 { v.saturating_add(add) } else { v }),
            Self::Brightness(factor) => by_value(pixels, |v| blend(0, v, factor)),
            Self::Contrast(factor) => {
                let grey = mean_grey(pixels, channels);
                by_value(pixels, |v| blend(grey, v, factor));
            }
            Self::Color(factor) if channels == 3 => {
                for rgb in pixels.chunks_exact_mut(3) {
                    let grey = luma(rgb);
                    rgb.iter_mut().for_each(|v| *v = blend(grey, *v, factor));
                }
            }
            // Grey has no colour.
            Self::Color(_) => {}
            Self::Sharpness(factor) => sharpen(pixels, shape, factor),
        }
    }
}

/// From `degenerate` at a factor of 0 over `value` at 1 and on.
fn blend(degenerate: u8, value: u8, factor: f32) -> u8 {
    let (from, to) = (f32::from(degenerate), f32::from(value));
    // A cast of a float saturates and rounds towards zero.
    (from + factor * (to - from)) as u8
}

fn by_value(pixels: &mut [u8], map: impl Fn(u8) -> u8) {
    let table: [u8; 256] = std::array::from_fn(|v| map(v as u8));
    pixels.iter_mut().for_each(|v| *v = table[usize::from(*v)]);
}

/// Maps the values of every channel by a table made from the channel's histogram.
fn by_histogram(pixels: &mut [u8], channels: usize, table: impl Fn(&[u32; 256]) -> Option<[u8; 256]>) {
    for channel in 0..channels {
        let mut histogram = [0u32; 256];
        pixels.iter().skip(channel).step_by(channels).for_each(|&v| histogram[usize::from(v)] += 1);
        if let Some(table) = table(&histogram) {
            pixels.iter_mut().skip(channel).step_by(channels).for_each(|v| *v = table[usize::from(*v)]);
        }
    }
}

/// Lowest value to 0, highest to 255; `None` where all are equal.
fn stretched(histogram: &[u32; 256]) -> Option<[u8; 256]> {
    let low = histogram.iter().position(|n| *n > 0)?;
    let high = histogram.iter().rposition(|n| *n > 0).filter(|high| *high > low)?;
    let scale = 255.0 / (high - low) as f64;
    let offset = -(low as f64) * scale;
    Some(std::array::from_fn(|v| (v as f64 * scale + offset) as u8))
}

/// By the cumulated histogram; `None` where there is too little to spread.
fn equalized(histogram: &[u32; 256]) -> Option<[u8; 256]> {
    let last = *histogram.iter().rfind(|n| **n > 0)?;
    let step = (histogram.iter().sum::<u32>() - last) / 255;
    if step == 0 {
        return None;
    }
    let mut sum = step / 2;
    Some(std::array::from_fn(|v| {
        let level = (sum / step).min(255) as u8;
        sum += histogram[v];
        level
    }))
}

fn mean_grey(pixels: &[u8], channels: usize) -> u8 {
    let sum: u64 = match channels {
        3 => pixels.chunks_exact(3).map(|rgb| u64::from(luma(rgb))).sum(),
        _ => pixels.iter().map(|v| u64::from(*v)).sum(),
    };
    (sum as f64 / (pixels.len() / channels).max(1) as f64 + 0.5) as u8
}

/// Against a 3x3 mean with five shares for the middle; the border, which has no neighbours, stays.
fn sharpen(pixels: &mut [u8], shape: ImageShape, factor: f32) {
    let ImageShape { height, width, channels } = shape;
    let row = width * channels;
    if height < 3 || width < 3 {
        return;
    }
    let source = pixels.to_vec();
    for y in 1..height - 1 {
        let lines = [y - 1, y, y + 1].map(|y| &source[y * row..][..row]);
        for at in channels..row - channels {
            let across =
                |line: &[u8]| u32::from(line[at - channels]) + u32::from(line[at]) + u32::from(line[at + channels]);
            let sum = across(lines[0]) + across(lines[1]) + across(lines[2]) + 4 * u32::from(lines[1][at]);
            let smooth = (2 * sum + 13) / 26;
            pixels[y * row + at] = blend(smooth as u8, lines[1][at], factor);
        }
    }
}

/// Where each pixel of the turned image comes from, as rows of a 2x3 matrix.
fn rotation(degrees: f64, width: f64, height: f64) -> [f64; 6] {
    let (sin, cos) = (-degrees.to_radians()).sin_cos();
    let (x, y) = (width / 2.0, height / 2.0);
    [cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y]
}
