//! One JPEG or PNG file → RGB of a fixed size.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::{ImageFormat, ImageReader, Limits};

use crate::{Error, Result};

const MAX_FILE: u64 = 256 << 20;
const MAX_SIDE: u32 = 32_768;
const MAX_DECODED: u64 = 1 << 30;

/// Decodes the picture at `path` and writes its centre, `size` x `size` RGB, into `out`.
///
/// The shorter side becomes `size · 256 / 224`, then the centre is cut out, as in the evaluation of ImageNet networks;
/// bicubic (Catmull-Rom), widened when it shrinks. Grey becomes RGB, transparency is ignored.
pub(super) fn decode(path: &Path, size: usize, out: &mut [u8]) -> Result<()> {
    let picture = read(path)?;
    let (width, height) = picture.dimensions();
    let wrong = |problem: String| Error::file(path, format!("{problem}; replace or remove it"));
    if width == 0 || height == 0 {
        return Err(wrong("has no pixels".to_owned()));
    }
    let (left, crop_width) = centre(width, height, size);
    let (top, crop_height) = centre(height, width, size);
    let source = ImageRef::new(width, height, picture.as_raw(), PixelType::U8x3).map_err(|e| wrong(e.to_string()))?;
    let mut target = Image::from_slice_u8(size as u32, size as u32, out, PixelType::U8x3)
        .map_err(|e| Error::shape("picture", format!("{size}x{size}x3 bytes"), e.to_string()))?;
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom)).crop(
        left,
        top,
        crop_width,
        crop_height,
    );
    Resizer::new().resize(&source, &mut target, &options).map_err(|e| wrong(e.to_string()))
}

/// Start and length of the centre crop along `side`, in pixels of the source. Resizing only this window gives the same
/// pixels as resizing everything and cropping after, and costs no memory for what a panorama would throw away.
fn centre(side: u32, other: u32, size: usize) -> (f64, f64) {
    let shorter = (size * 256 / 224) as u64;
    // Integer division, like the resize of torchvision.
    let resized = if side <= other { shorter } else { shorter * u64::from(side) / u64::from(other) };
    let scale = f64::from(side) / resized as f64;
    let start = ((resized - size as u64) as f64 / 2.0).round_ties_even() * scale;
    (start, (size as f64 * scale).min(f64::from(side) - start))
}

fn read(path: &Path) -> Result<image::RgbImage> {
    let wrong = |problem: String| Error::file(path, format!("{problem}; replace or remove it"));
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(wrong(format!("is larger than {MAX_FILE} bytes")));
    }
    // By content: pictures named .jpg that are PNG are common.
    let format = image::guess_format(&bytes).map_err(|_| wrong("is neither JPEG nor PNG".to_owned()))?;
    // The decoder fills what is missing of a cut JPEG with grey and says nothing.
    if format == ImageFormat::Jpeg && !bytes.windows(2).rev().any(|marker| marker == [0xff, 0xd9]) {
        return Err(wrong("JPEG is cut short: it has no end marker".to_owned()));
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_DECODED);
    let mut reader = ImageReader::with_format(Cursor::new(&bytes), format);
    reader.limits(limits);
    let picture = reader.decode().map_err(|e| wrong(format!("cannot be decoded: {e}")))?;
    Ok(picture.into_rgb8())
}
