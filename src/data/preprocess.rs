//! How pictures of any size become a network's input: resized, their centre cut out, normalised.

use std::cell::RefCell;
use std::path::Path;

use fast_image_resize::images::{TypedCroppedImage, TypedImage, TypedImageRef};
use fast_image_resize::pixels::{U8, U8x3};
use fast_image_resize::{FilterType, PixelTrait, ResizeAlg, ResizeOptions, Resizer};
use serde::{Deserialize, Serialize};

use super::dataset::{ImageShape, Normalisation};
use super::picture::Picture;
use crate::ops::augment::{ByteTables, ImageView, write};
use crate::{Error, Result, memory};

/// Side of the input that most ImageNet networks take.
pub const IMAGENET_SIZE: usize = 224;
/// Longest side that pictures are resized to.
const MAX_SIDE: usize = 16_384;

/// What memory is for.
const INPUT: &str = "an input of the network";

thread_local! {
    /// With the pixels between its two passes; kept from one picture to the next.
    static RESIZER: RefCell<(Resizer, Vec<u8>)> = RefCell::new((Resizer::new(), Vec::new()));
}

/// How a resized pixel is mixed from its neighbours. Both widen when they shrink (antialiasing), as in Pillow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    /// Linear.
    Bilinear,
    /// Cubic with a = -0.5 (Catmull-Rom).
    Bicubic,
}

/// The resize of an evaluation: the picture's shorter side becomes `shorter_side`, then the centre is cut out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// Pixels, at least the shorter side of the network's input; its ratio to that is timm's 1 / `crop_pct`.
    pub shorter_side: usize,
    /// How.
    pub interpolation: Interpolation,
}

/// Everything between a picture and a network's input.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocessing {
    /// Shape of the input; pictures can be made to 1 and 3 channels.
    pub shape: ImageShape,
    /// How pictures are made to fit.
    pub resize: Resize,
    /// What the network expects of the values.
    pub normalisation: Normalisation,
}

/// A part of a picture, in its pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Window {
    pub left: f64,
    pub top: f64,
    pub width: f64,
    pub height: f64,
}

impl Resize {
    /// The usual one of ImageNet networks: 256 pixels for an input of 224 (a `crop_pct` of 0.875), bicubic.
    pub fn imagenet(size: usize) -> Self {
        Self { shorter_side: size * 256 / 224, interpolation: Interpolation::Bicubic }
    }

    /// The picture just covers the input, bicubic; one of the input's shape stays as it is.
    pub fn cover(shape: ImageShape) -> Self {
        Self { shorter_side: shape.height.min(shape.width), interpolation: Interpolation::Bicubic }
    }

    /// Refuses a resize that would leave an input of `shape` with empty borders, or ask for absurd sizes.
    pub fn check(&self, shape: ImageShape) -> Result<()> {
        let least = shape.height.min(shape.width);
        if (least..=MAX_SIDE).contains(&self.shorter_side) {
            return Ok(());
        }
        let side = self.shorter_side;
        Err(Error::Data(format!(
            "pictures resized to a shorter side of {side}; images of {shape} need {least} to {MAX_SIDE}"
        )))
    }

    /// The part of a `width` x `height` picture that becomes the input. Resizing only this part gives the same pixels as
    /// resizing everything and cropping after, and costs no memory for what a panorama would throw away.
    fn window(&self, width: usize, height: usize, shape: ImageShape) -> Window {
        let shorter = shape.height.min(shape.width);
        let (box_height, box_width) =
            (self.shorter_side * shape.height / shorter, self.shorter_side * shape.width / shorter);
        // Integer division, like the resize of torchvision.
        let (resized_height, resized_width) = if width * box_height >= height * box_width {
            (box_height, (box_height * width / height).max(box_width))
        } else {
            ((box_width * height / width).max(box_height), box_width)
        };
        let span = |side: usize, resized: usize, kept: usize| {
            let scale = side as f64 / resized as f64;
            let start = ((resized - kept) as f64 / 2.0).round_ties_even() * scale;
            (start, (kept as f64 * scale).min(side as f64 - start))
        };
        let (top, height) = span(height, resized_height, shape.height);
        let (left, width) = span(width, resized_width, shape.width);
        Window { left, top, width, height }
    }

    /// Writes `picture`, made to fit `shape`, to `out` (`uint8` HWC).
    pub(super) fn apply(&self, picture: &Picture, shape: ImageShape, out: &mut [u8]) -> Result<()> {
        let window = self.window(picture.width, picture.height, shape);
        let whole = Window { left: 0.0, top: 0.0, width: picture.width as f64, height: picture.height as f64 };
        resize(picture, whole, window, self.interpolation, shape, out)
    }
}

/// Writes a part of `picture` of whole pixels, cut out and then resized to `shape`, to `out` (`uint8` HWC).
pub(super) fn resize_cut(
    picture: &Picture,
    cut: Window,
    interpolation: Interpolation,
    shape: ImageShape,
    out: &mut [u8],
) -> Result<()> {
    resize(picture, cut, Window { left: 0.0, top: 0.0, ..cut }, interpolation, shape, out)
}

/// Writes the part `window` of what `cut` leaves of `picture`, resized to `shape`, to `out` (`uint8` HWC). `cut` is of
/// whole pixels. Pixels around the window count where the filter reaches them.
fn resize(
    picture: &Picture,
    cut: Window,
    window: Window,
    interpolation: Interpolation,
    shape: ImageShape,
    out: &mut [u8],
) -> Result<()> {
    match (picture.channels, shape.channels) {
        (1, 1) => resize_as::<U8>(picture, cut, window, interpolation, shape, out),
        (3, 3) => resize_as::<U8x3>(picture, cut, window, interpolation, shape, out),
        (got, expected) => Err(Error::shape("resize", format!("{expected} channels"), got.to_string())),
    }
}

/// [`resize`] with a type for the pixel: the resizer is built for the two that there are, and for one kind of source.
///
/// Rows first, columns after, with bytes between them, as Pillow does it. The other order would be faster, but where
/// bicubic overshoots black or white in both directions it clips other pixels.
fn resize_as<P: PixelTrait>(
    picture: &Picture,
    cut: Window,
    window: Window,
    interpolation: Interpolation,
    shape: ImageShape,
    out: &mut [u8],
) -> Result<()> {
    let (filter, radius) = match interpolation {
        Interpolation::Bilinear => (FilterType::Bilinear, 1.0),
        Interpolation::Bicubic => (FilterType::CatmullRom, 2.0),
    };
    let Window { left, top, width, height } = window;
    // The lines of the picture that the window's lines are mixed from.
    let reach = radius * (height / shape.height as f64).max(1.0) + 1.0;
    let first = (top - reach).floor().max(0.0);
    let last = (top + height + reach).ceil().min(cut.height);
    let lines = (last - first) as usize;
    let of_picture = |e: String| Error::shape("crop", format!("a part of {}x{}", picture.width, picture.height), e);
    let pixels = TypedImageRef::<P>::from_buffer(picture.width as u32, picture.height as u32, &picture.pixels);
    let pixels = pixels.map_err(|e| of_picture(e.to_string()))?;
    let [x, y, w, h] = [cut.left, cut.top, cut.width, cut.height].map(|side| side as u32);
    let source = TypedCroppedImage::from_ref(&pixels, x, y, w, h).map_err(|e| of_picture(e.to_string()))?;
    let fault = |e: String| Error::shape("resize", format!("{shape} bytes"), e);
    let mut target =
        TypedImage::<P>::from_buffer(shape.width as u32, shape.height as u32, out).map_err(|e| fault(e.to_string()))?;
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter)).use_alpha(false);
    let along_rows = options.crop(left, first, width, lines as f64);
    let along_columns = options.crop(0.0, top - first, shape.width as f64, height);
    RESIZER.with_borrow_mut(|(resizer, buffer)| {
        memory::resize(buffer, lines * shape.width * shape.channels, "a resized picture")?;
        let mut narrow = TypedImage::<P>::from_buffer(shape.width as u32, lines as u32, buffer);
        let narrow = narrow.as_mut().map_err(|e| fault(e.to_string()))?;
        resizer.resize_typed(&source, narrow, &along_rows).map_err(|e| fault(e.to_string()))?;
        resizer.resize_typed(&*narrow, &mut target, &along_columns).map_err(|e| fault(e.to_string()))
    })
}

impl Preprocessing {
    /// The usual one of ImageNet networks, for inputs of `size` x `size` x 3.
    pub fn imagenet(size: usize) -> Self {
        Self {
            shape: ImageShape { height: size, width: size, channels: 3 },
            resize: Resize::imagenet(size),
            normalisation: Normalisation::imagenet(),
        }
    }

    /// The same for square inputs of another size: the crop keeps its share of the resized picture, as far as whole pixels
    /// tell it; [`crate::networks::preprocessing_at`] knows the share that was published.
    pub fn at(mut self, size: usize) -> Self {
        let old = self.shape.height.min(self.shape.width);
        self.resize.shorter_side = self.resize.shorter_side * size / old;
        self.shape = ImageShape { height: size, width: size, channels: self.shape.channels };
        self
    }

    /// Refuses what fits no picture or contradicts itself.
    pub fn check(&self) -> Result<()> {
        if !matches!(self.shape.channels, 1 | 3) {
            return Err(Error::Data(format!(
                "pictures have 1 or 3 channels, the network takes {}",
                self.shape.channels
            )));
        }
        self.normalisation.check(self.shape.channels)?;
        self.resize.check(self.shape)
    }

    /// The picture at `path` as a network's input, `f32` HWC.
    ///
    /// # Errors
    /// A file that is no picture (named), or a preprocessing that [`check`](Self::check) refuses.
    pub fn read(&self, path: &Path) -> Result<Vec<f32>> {
        self.check()?;
        self.input(&Picture::read(path, self.shape.channels)?)
    }

    /// As [`read`](Self::read), from the bytes of a picture; `path` is what messages name.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(&self, path: &Path, bytes: &[u8]) -> Result<Vec<f32>> {
        self.check()?;
        self.input(&Picture::decode(bytes, path, self.shape.channels)?)
    }

    fn input(&self, picture: &Picture) -> Result<Vec<f32>> {
        let mut pixels = memory::zeros(self.shape.size(), INPUT)?;
        self.resize.apply(picture, self.shape, &mut pixels)?;
        let mut input = memory::zeros(pixels.len(), INPUT)?;
        let tables = ByteTables::new(&self.normalisation.mean, &self.normalisation.std);
        write(&ImageView::default(), &pixels, self.shape.into(), &tables, &mut input);
        Ok(input)
    }
}
