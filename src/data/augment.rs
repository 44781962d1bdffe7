//! Augmentation and normalisation of one image: shift, flip and `(v / 255 - mean) / std` in one pass over its rows, after
//! what changes its bytes (`crop`, `rand_augment`).

use serde::{Deserialize, Serialize};

use super::crop::ResizedCrop;
use super::dataset::{ImageShape, Normalisation};
use super::preprocess::Interpolation;
use super::rand_augment::{RandAugment, jitter};
use super::random::{Purpose, Random};
use crate::{Error, Result};

/// How many times a rectangle to erase is drawn before giving up on one that fits.
const ERASE_TRIES: usize = 10;

/// What an erased rectangle is filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EraseMode {
    /// The mean, which normalises to 0.
    #[default]
    Const,
    /// Normal noise, drawn for every value.
    Pixel,
}

/// What is done at random to a training image, in this order: `resized_crop`, `rand_augment`, `color_jitter`, `pad_crop`,
/// `flip`, `erase`. What an image gets depends on the seed, the epoch and its index alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {
    /// Black border on every side, in pixels, before a crop back to the old size at a random place; 0 = no crop.
    pub pad_crop: usize,
    /// Mirrors every second image left to right.
    pub flip: bool,
    /// Probability that a rectangle (2 to 33 % of the area, sides 0.3 to 3.3 to one) is erased.
    pub erase: f32,
    /// What is put there.
    pub erase_mode: EraseMode,
    /// Brightness, contrast and saturation change by up to this share; 0 = not at all. (timm leaves it out where there is
    /// RandAugment; here both are done if both are given.)
    pub color_jitter: f32,
    /// A random part of the picture instead of the centre.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resized_crop: Option<ResizedCrop>,
    /// Random operations on the pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rand_augment: Option<RandAugment>,
}

impl Default for Augment {
    /// None.
    fn default() -> Self {
        Self::none()
    }
}

impl Augment {
    /// The image as it is.
    pub fn none() -> Self {
        Self {
            pad_crop: 0,
            flip: false,
            erase: 0.0,
            erase_mode: EraseMode::Const,
            color_jitter: 0.0,
            resized_crop: None,
            rand_augment: None,
        }
    }

    /// Refuses settings that make no sense for images of `shape`.
    pub fn check(&self, shape: ImageShape) -> Result<()> {
        let side = shape.height.min(shape.width);
        if self.pad_crop >= side {
            return Err(Error::Config(format!(
                "augment.pad_crop {} would crop away whole images of {shape}; give less than {side}",
                self.pad_crop
            )));
        }
        if !(0.0..=1.0).contains(&self.erase) {
            return Err(Error::Config(format!("augment.erase {} is a probability, 0 to 1", self.erase)));
        }
        if !(0.0..=1.0).contains(&self.color_jitter) {
            return Err(Error::Config(format!("augment.color_jitter {} is a share, 0 to 1", self.color_jitter)));
        }
        if (self.changes_bytes() || self.resized_crop.is_some()) && !matches!(shape.channels, 1 | 3) {
            return Err(Error::Config(format!(
                "augment: resized_crop, rand_augment and color_jitter are for images of 1 or 3 channels, not {shape}"
            )));
        }
        self.resized_crop.map_or(Ok(()), |crop| crop.check())?;
        self.rand_augment.map_or(Ok(()), |policy| policy.check())
    }

    /// Whether more is done than what [`View`] does while it normalises.
    pub(super) fn changes_bytes(&self) -> bool {
        self.color_jitter > 0.0 || self.rand_augment.is_some()
    }

    /// Changes the bytes of image `index`: RandAugment and colour jitter.
    pub(super) fn change(
        &self,
        (pixels, shape): (&mut [u8], ImageShape),
        (fill, interpolation): (&[u8], Interpolation),
        (seed, epoch, index): (u64, u64, usize),
    ) {
        let random = |purpose| Random::new(purpose, seed, epoch, index as u64);
        let mut ops = self.rand_augment.map_or_else(Vec::new, |policy| policy.draw(&mut random(Purpose::RandAugment)));
        if self.color_jitter > 0.0 {
            ops.extend(jitter(self.color_jitter, &mut random(Purpose::Jitter)));
        }
        for op in ops {
            op.apply(pixels, shape, fill, interpolation);
        }
    }

    /// What image `index` gets in this epoch. The draws are made in a fixed order whatever is switched on, so that
    /// switching one augmentation leaves the others as they were.
    pub(super) fn draw(&self, shape: ImageShape, seed: u64, epoch: u64, index: usize) -> View {
        if self.pad_crop == 0 && !self.flip && self.erase == 0.0 {
            return View::identity();
        }
        let mut random = Random::new(Purpose::Image, seed, epoch, index as u64);
        let mut offset = || random.below(2 * self.pad_crop + 1) as isize - self.pad_crop as isize;
        let (down, right) = (offset(), offset());
        let flip = random.below(2) == 1;
        let erased = if random.unit() < self.erase { rectangle(shape, &mut random) } else { None };
        let noise = (self.erase_mode == EraseMode::Pixel).then_some((seed, epoch, index));
        View { down, right, flip: flip && self.flip, erased, noise }
    }
}

/// A rectangle to erase, or `None` if none of a few draws fits.
fn rectangle(shape: ImageShape, random: &mut Random) -> Option<Rectangle> {
    let area = (shape.height * shape.width) as f32;
    (0..ERASE_TRIES).find_map(|_| {
        let area = area * random.between(0.02, 0.33);
        // Upright or lying with equal chance. No exponential: its last bit differs between machines.
        let ratio = random.between(1.0, 3.3);
        let ratio = if random.below(2) == 1 { ratio } else { 1.0 / ratio };
        let height = ((area * ratio).sqrt() + 0.5) as usize;
        let width = ((area / ratio).sqrt() + 0.5) as usize;
        (1..shape.height).contains(&height).then_some(())?;
        (1..shape.width).contains(&width).then_some(())?;
        let top = random.below(shape.height - height + 1);
        let left = random.below(shape.width - width + 1);
        Some(Rectangle { top, left, height, width })
    })
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Rectangle {
    top: usize,
    left: usize,
    height: usize,
    width: usize,
}

/// One way to look at an image.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct View {
    /// Row and column of the image that come to the upper left corner; black where there is none.
    down: isize,
    right: isize,
    flip: bool,
    erased: Option<Rectangle>,
    /// (seed, epoch, index) of the noise that the rectangle is filled with; `None` fills it with the mean.
    noise: Option<(u64, u64, usize)>,
}

impl View {
    /// The image as it is.
    pub(super) fn identity() -> Self {
        Self { down: 0, right: 0, flip: false, erased: None, noise: None }
    }

    /// Writes `pixels` (HWC) as seen in this view, normalised by `tables`, to `out` (HWC).
    pub(super) fn write(&self, pixels: &[u8], shape: ImageShape, tables: &Tables, out: &mut [f32]) {
        let ImageShape { height, width, channels } = shape;
        let row = width * channels;
        // Columns of the crop that have a pixel behind them.
        let first = usize::try_from(-self.right).unwrap_or(0);
        let last = width - usize::try_from(self.right).unwrap_or(0);
        let from = (first as isize + self.right) as usize * channels;
        let seen = if self.flip { width - last..width - first } else { first..last };
        for (y, out) in out.chunks_exact_mut(row).enumerate() {
            let Some(line) = usize::try_from(y as isize + self.down).ok().filter(|line| *line < height) else {
                tables.fill_black(out);
                continue;
            };
            let source = &pixels[line * row + from..][..(last - first) * channels];
            let (border, rest) = out.split_at_mut(seen.start * channels);
            let (target, other_border) = rest.split_at_mut(seen.len() * channels);
            tables.fill_black(border);
            tables.fill_black(other_border);
            tables.normalise(source, self.flip, target);
        }
        if let Some(Rectangle { top, left, height, width }) = self.erased {
            let mut noise =
                self.noise.map(|(seed, epoch, index)| Random::new(Purpose::Noise, seed, epoch, index as u64));
            for out in out.chunks_exact_mut(row).skip(top).take(height) {
                let out = &mut out[left * channels..][..width * channels];
                match &mut noise {
                    None => out.fill(0.0),
                    Some(random) => {
                        for pair in out.chunks_mut(2) {
                            pair.copy_from_slice(&random.normals()[..pair.len()]);
                        }
                    }
                }
            }
        }
    }
}

/// The normalised value of each of the 256 byte values, per channel.
#[derive(Debug)]
pub(super) struct Tables(Vec<[f32; 256]>);

impl Tables {
    pub(super) fn new(normalisation: &Normalisation) -> Self {
        let channels = normalisation.mean.iter().zip(&normalisation.std);
        Self(channels.map(|(mean, std)| std::array::from_fn(|v| (v as f32 / 255.0 - mean) / std)).collect())
    }

    fn fill_black(&self, out: &mut [f32]) {
        for pixel in out.chunks_exact_mut(self.0.len()) {
            for (value, table) in pixel.iter_mut().zip(&self.0) {
                *value = table[0];
            }
        }
    }

    /// A run of pixels, from the last to the first if `flip`.
    fn normalise(&self, source: &[u8], flip: bool, out: &mut [f32]) {
        match self.0.as_slice() {
            [table] if flip => map(source.iter().rev(), table, out),
            [table] => map(source.iter(), table, out),
            tables if flip => interleaved(source.chunks_exact(tables.len()).rev(), tables, out),
            tables => interleaved(source.chunks_exact(tables.len()), tables, out),
        }
    }
}

fn map<'a>(source: impl Iterator<Item = &'a u8>, table: &[f32; 256], out: &mut [f32]) {
    for (value, &byte) in out.iter_mut().zip(source) {
        *value = table[usize::from(byte)];
    }
}

fn interleaved<'a>(source: impl Iterator<Item = &'a [u8]>, tables: &[[f32; 256]], out: &mut [f32]) {
    for (pixel, bytes) in out.chunks_exact_mut(tables.len()).zip(source) {
        for ((value, &byte), table) in pixel.iter_mut().zip(bytes).zip(tables) {
            *value = table[usize::from(byte)];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The view, pixel by pixel, from its definition.
    fn by_definition(view: &View, pixels: &[u8], shape: ImageShape, normalisation: &Normalisation) -> Vec<f32> {
        let mut out = Vec::new();
        for y in 0..shape.height {
            for x in 0..shape.width {
                let column = if view.flip { shape.width - 1 - x } else { x } as isize + view.right;
                let line = y as isize + view.down;
                let inside = (0..shape.height as isize).contains(&line) && (0..shape.width as isize).contains(&column);
                let erased = view
                    .erased
                    .is_some_and(|r| (r.top..r.top + r.height).contains(&y) && (r.left..r.left + r.width).contains(&x));
                for c in 0..shape.channels {
                    let at = (line * shape.width as isize + column) * shape.channels as isize + c as isize;
                    let byte = if inside { pixels[at as usize] } else { 0 };
                    let value = (f32::from(byte) / 255.0 - normalisation.mean[c]) / normalisation.std[c];
                    out.push(if erased { 0.0 } else { value });
                }
            }
        }
        out
    }

    #[test]
    fn the_row_wise_view_is_the_pixel_wise_one() {
        for channels in [1, 2, 3] {
            let shape = ImageShape { height: 7, width: 5, channels };
            let pixels: Vec<u8> = (0..shape.size()).map(|i| (i * 37 % 251) as u8).collect();
            let normalisation = Normalisation { mean: vec![0.3; channels], std: vec![0.2; channels] };
            let tables = Tables::new(&normalisation);
            let augment = Augment { pad_crop: 4, flip: true, erase: 0.5, ..Augment::none() };
            for index in 0..400 {
                let view = augment.draw(shape, 1, 2, index);
                let mut out = vec![f32::NAN; shape.size()];
                view.write(&pixels, shape, &tables, &mut out);
                assert_eq!(out, by_definition(&view, &pixels, shape, &normalisation), "{view:?}");
            }
        }
    }

    #[test]
    fn draws_cover_their_ranges() {
        let shape = ImageShape { height: 28, width: 28, channels: 1 };
        let augment = Augment { pad_crop: 2, flip: true, erase: 0.25, ..Augment::none() };
        let views: Vec<View> = (0..4000).map(|index| augment.draw(shape, 9, 0, index)).collect();
        for offset in -2..=2 {
            let share = views.iter().filter(|view| view.down == offset).count();
            assert!((650..950).contains(&share), "{share} of 4000 moved down by {offset}");
        }
        let flipped = views.iter().filter(|view| view.flip).count();
        assert!((1850..2150).contains(&flipped), "{flipped}");
        let erased: Vec<Rectangle> = views.iter().filter_map(|view| view.erased).collect();
        assert!((850..1150).contains(&erased.len()), "{}", erased.len());
        for r in erased {
            let area = (r.height * r.width) as f32 / 784.0;
            assert!((0.01..0.37).contains(&area), "{r:?}");
            assert!(r.top + r.height <= 28 && r.left + r.width <= 28, "{r:?}");
        }
    }

    #[test]
    fn one_augmentation_does_not_move_another() {
        let shape = ImageShape { height: 28, width: 28, channels: 1 };
        let both = Augment { pad_crop: 4, flip: true, erase: 0.5, ..Augment::none() };
        let crop = Augment { flip: false, erase: 0.0, ..both.clone() };
        for index in 0..50 {
            let (a, b) = (both.draw(shape, 1, 1, index), crop.draw(shape, 1, 1, index));
            assert_eq!((a.down, a.right), (b.down, b.right));
        }
    }

    #[test]
    fn noise_is_normal_and_stays_in_its_rectangle() {
        let shape = ImageShape { height: 40, width: 30, channels: 3 };
        let augment = Augment { erase: 1.0, erase_mode: EraseMode::Pixel, ..Augment::none() };
        let tables = Tables::new(&Normalisation { mean: vec![0.0; 3], std: vec![1.0; 3] });
        let mut noise = Vec::new();
        for index in 0..200 {
            let view = augment.draw(shape, 6, 0, index);
            let Some(r) = view.erased else { continue };
            let mut out = vec![0.0; shape.size()];
            view.write(&vec![255; shape.size()], shape, &tables, &mut out);
            for (at, &value) in out.iter().enumerate() {
                let (y, x) = (at / 90, at % 90 / 3);
                if (r.top..r.top + r.height).contains(&y) && (r.left..r.left + r.width).contains(&x) {
                    noise.push(f64::from(value));
                } else {
                    assert_eq!(value, 1.0, "{y}, {x} is outside {r:?}");
                }
            }
        }
        let n = noise.len() as f64;
        let mean = noise.iter().sum::<f64>() / n;
        let variance = noise.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        let beyond = noise.iter().filter(|v| v.abs() > 1.959_964).count() as f64 / n;
        assert!(n > 50_000.0 && mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "{n} {mean} {variance}");
        assert!((beyond - 0.05).abs() < 0.005, "{beyond}");
    }
}
