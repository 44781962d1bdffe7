//! One JPEG or PNG file → its pixels.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use image::{DynamicImage, GrayAlphaImage, GrayImage, ImageFormat, ImageReader, Limits, RgbImage, RgbaImage};

use crate::{Error, Result};

const MAX_FILE: u64 = 256 << 20;
const MAX_SIDE: u32 = 32_768;
/// Bytes of pixels; Pillow, too, refuses pictures of more than about 179 million RGB pixels.
const MAX_DECODED: u64 = 512 << 20;

/// A decoded picture.
#[derive(Debug)]
pub(super) struct Picture {
    pub width: usize,
    pub height: usize,
    /// 1 for grey, 3 for RGB.
    pub channels: usize,
    /// `uint8` HWC.
    pub pixels: Vec<u8>,
}

impl Picture {
    /// Decodes the file at `path` to `channels` channels. Grey becomes RGB by repetition, RGB grey by its luma, alpha is
    /// dropped, 16 bits become 8, and the orientation that a camera noted is not applied: all as torchvision does.
    pub(super) fn read(path: &Path, channels: usize) -> Result<Self> {
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(wrong(path, format!("is larger than {MAX_FILE} bytes")));
        }
        Self::decode(&bytes, path, channels)
    }

    /// Decodes `bytes`, which came from `path`.
    pub(super) fn decode(bytes: &[u8], path: &Path, channels: usize) -> Result<Self> {
        let picture = eight_bits(decoded(bytes).map_err(|problem| wrong(path, problem))?);
        let (width, height) = (picture.width() as usize, picture.height() as usize);
        if width == 0 || height == 0 {
            return Err(wrong(path, "has no pixels".to_owned()));
        }
        let pixels = match channels {
            1 => grey(picture),
            3 => picture.into_rgb8().into_raw(),
            _ => return Err(Error::Data(format!("pictures have 1 or 3 channels, the network takes {channels}"))),
        };
        Ok(Self { width, height, channels, pixels })
    }
}

fn wrong(path: &Path, problem: String) -> Error {
    Error::file(path, format!("{problem}; replace or remove it"))
}

fn decoded(bytes: &[u8]) -> std::result::Result<DynamicImage, String> {
    // By content: pictures named .jpg that are PNG are common.
    let format = image::guess_format(bytes).map_err(|_| "is neither JPEG nor PNG".to_owned())?;
    // The decoder fills what is missing of a cut JPEG with grey and says nothing.
    if format == ImageFormat::Jpeg && !bytes.windows(2).rev().any(|marker| marker == [0xff, 0xd9]) {
        return Err("JPEG is cut short: it has no end marker".to_owned());
    }
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_DECODED);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(limits);
    reader.decode().map_err(|e| format!("cannot be decoded: {}", e.to_string().replace('\n', " ")))
}

/// Only the upper byte of 16 bits, as Pillow; `image` would round.
fn eight_bits(picture: DynamicImage) -> DynamicImage {
    fn upper(samples: &[u16]) -> Vec<u8> {
        samples.iter().map(|sample| (sample >> 8) as u8).collect()
    }
    let (width, height) = (picture.width(), picture.height());
    let cut = match &picture {
        DynamicImage::ImageLuma16(p) => GrayImage::from_raw(width, height, upper(p.as_raw())).map(Into::into),
        DynamicImage::ImageLumaA16(p) => GrayAlphaImage::from_raw(width, height, upper(p.as_raw())).map(Into::into),
        DynamicImage::ImageRgb16(p) => RgbImage::from_raw(width, height, upper(p.as_raw())).map(Into::into),
        DynamicImage::ImageRgba16(p) => RgbaImage::from_raw(width, height, upper(p.as_raw())).map(Into::into),
        _ => None,
    };
    cut.unwrap_or(picture)
}

/// The grey of one RGB pixel, with the weights of ITU-R BT.601 as JPEG and Pillow have them; `image` would take BT.709's.
pub(super) fn luma(rgb: &[u8]) -> u8 {
    let [r, g, b] = [0, 1, 2].map(|c| u32::from(rgb[c]));
    ((19_595 * r + 38_470 * g + 7_471 * b + 0x8000) >> 16) as u8
}

fn grey(picture: DynamicImage) -> Vec<u8> {
    if !picture.color().has_color() {
        return picture.into_luma8().into_raw();
    }
    picture.into_rgb8().as_raw().chunks_exact(3).map(luma).collect()
}
