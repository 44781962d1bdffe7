//! One JPEG or PNG file → its pixels.

use std::io::{Cursor, Read};
use std::path::Path;

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::{Error, Result, files, memory};

const MAX_FILE: u64 = 256 << 20;
const MAX_SIDE: usize = 32_768;
/// Bytes of pixels; Pillow, too, refuses pictures of more than about 179 million RGB pixels.
const MAX_DECODED: usize = 512 << 20;
/// What memory is for.
const PIXELS: &str = "the pixels of a picture";
const JPEG: &[u8] = b"\xff\xd8\xff";
const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";

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
        Self::decode(&Self::bytes(path)?, path, channels)
    }

    /// The bytes of the file at `path`.
    pub(super) fn bytes(path: &Path) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let file = files::open(path)?;
        memory::read_to_end(file.take(MAX_FILE + 1), &mut bytes).map_err(|e| Error::io(path, e))?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(wrong(path, format!("is larger than {MAX_FILE} bytes")));
        }
        Ok(bytes)
    }

    /// Decodes `bytes`, which came from `path`.
    pub(super) fn decode(bytes: &[u8], path: &Path, channels: usize) -> Result<Self> {
        if channels != 1 && channels != 3 {
            return Err(Error::Data(format!("pictures have 1 or 3 channels, the network takes {channels}")));
        }
        let samples = decoded(bytes).map_err(|fault| fault.at(path))?;
        let (width, height) = (samples.width, samples.height);
        if width == 0 || height == 0 {
            return Err(wrong(path, "has no pixels".to_owned()));
        }
        Ok(Self { width, height, channels, pixels: samples.with_channels(channels)? })
    }
}

/// A picture as it is stored in its file.
struct Samples {
    width: usize,
    height: usize,
    /// 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
    channels: usize,
    /// `uint8` HWC.
    bytes: Vec<u8>,
}

impl Samples {
    /// The same in grey (1) or RGB (3), without alpha.
    fn with_channels(self, channels: usize) -> Result<Vec<u8>> {
        if self.channels == channels {
            return Ok(self.bytes);
        }
        let pixels = self.bytes.chunks_exact(self.channels);
        let mut out = memory::room(pixels.len() * channels, PIXELS)?;
        match (self.channels < 3, channels) {
            (true, 1) => out.extend(pixels.map(|p| p[0])),
            (true, _) => pixels.for_each(|p| out.extend([p[0]; 3])),
            (false, 1) => out.extend(pixels.map(luma)),
            (false, _) => pixels.for_each(|p| out.extend([p[0], p[1], p[2]])),
        }
        Ok(out)
    }
}

/// Why a picture is not decoded.
enum Fault {
    /// What is wrong with its bytes.
    Picture(String),
    /// The machine's fault.
    Machine(Error),
}

impl Fault {
    /// The error for a picture from `path`.
    fn at(self, path: &Path) -> Error {
        match self {
            Self::Picture(problem) => wrong(path, problem),
            Self::Machine(error) => error,
        }
    }
}

impl From<String> for Fault {
    fn from(problem: String) -> Self {
        Self::Picture(problem)
    }
}

fn wrong(path: &Path, problem: String) -> Error {
    Error::file(path, format!("{problem}; replace or remove it"))
}

/// Decodes by content, since pictures named .jpg that are PNG are common.
fn decoded(bytes: &[u8]) -> std::result::Result<Samples, Fault> {
    let decoded = if bytes.starts_with(JPEG) {
        // The decoder fills what is missing of a cut JPEG with grey and says nothing.
        if !bytes.windows(2).rev().any(|marker| marker == [0xff, 0xd9]) {
            return Err("JPEG is cut short: it has no end marker".to_owned().into());
        }
        jpeg(bytes)
    } else if bytes.starts_with(PNG) {
        png(bytes)
    } else {
        return Err("is neither JPEG nor PNG".to_owned().into());
    };
    decoded.map_err(|fault| match fault {
        Fault::Picture(problem) => format!("cannot be decoded: {}", problem.replace('\n', " ")).into(),
        machine => machine,
    })
}

fn jpeg(bytes: &[u8]) -> std::result::Result<Samples, Fault> {
    let options = DecoderOptions::default().set_strict_mode(false).set_max_width(MAX_SIDE).set_max_height(MAX_SIDE);
    let decoder = |options| JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    let mut head = decoder(options);
    head.decode_headers().map_err(|e| e.to_string())?;
    let (width, height) = head.dimensions().ok_or_else(|| "it has no size".to_owned())?;
    // Colour of any kind, CMYK included, becomes RGB.
    let (space, channels) = match head.input_colorspace() {
        Some(ColorSpace::Luma) => (ColorSpace::Luma, 1),
        _ => (ColorSpace::RGB, 3),
    };
    let mut samples = Samples { width, height, channels, bytes: room(width, height, channels)? };
    decoder(options.jpeg_set_out_colorspace(space)).decode_into(&mut samples.bytes).map_err(|e| e.to_string())?;
    Ok(samples)
}

fn png(bytes: &[u8]) -> std::result::Result<Samples, Fault> {
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), png::Limits { bytes: MAX_DECODED });
    // Nothing is made of these, and a few kilobytes can hold as much of them as the limit allows.
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    // Palettes and fewer than eight bits become eight; of sixteen bits only the upper byte is taken, as Pillow does.
    decoder.set_transformations(png::Transformations::EXPAND | png::Transformations::STRIP_16);
    let (width, height) = decoder.read_header_info().map_err(|e| e.to_string())?.size();
    let (width, height) = (width as usize, height as usize);
    if width.max(height) > MAX_SIDE {
        return Err(format!("it is {width}x{height}, larger than {MAX_SIDE} pixels a side").into());
    }
    let mut reader = decoder.read_info().map_err(|e| e.to_string())?;
    let channels = reader.output_color_type().0.samples();
    let mut samples = Samples { width, height, channels, bytes: room(width, height, channels)? };
    reader.next_frame(&mut samples.bytes).map_err(|e| e.to_string())?;
    Ok(samples)
}

/// Memory for the pixels of a picture.
fn room(width: usize, height: usize, channels: usize) -> std::result::Result<Vec<u8>, Fault> {
    let len = width.saturating_mul(height).saturating_mul(channels);
    if len > MAX_DECODED {
        return Err(format!("its pixels take {len} bytes, more than {MAX_DECODED}").into());
    }
    memory::zeros(len, PIXELS).map_err(Fault::Machine)
}

/// The grey of one RGB pixel, with the weights of ITU-R BT.601 as JPEG and Pillow have them.
pub(super) fn luma(rgb: &[u8]) -> u8 {
    let [r, g, b] = [0, 1, 2].map(|c| u32::from(rgb[c]));
    ((19_595 * r + 38_470 * g + 7_471 * b + 0x8000) >> 16) as u8
}
