//! Augmentation and normalisation of one image: crop, flip and `(v / 255 - mean) / std` in one pass over its rows.

use serde::{Deserialize, Serialize};

use super::dataset::{ImageShape, Normalisation};
use super::random::{Purpose, Random};
use crate::{Error, Result};

/// How many times a rectangle to erase is drawn before giving up on one that fits.
const ERASE_TRIES: usize = 10;

/// What is done at random to a training image. What an image gets depends on the seed, the epoch and its index alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {
    /// Black border on every side, in pixels, before a crop back to the old size at a random place; 0 = no crop.
    pub pad_crop: usize,
    /// Mirrors every second image left to right.
    pub flip: bool,
    /// Probability that a rectangle (2 to 33 % of the area, sides 0.3 to 3.3 to one) is set to the mean.
    pub erase: f32,
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
        Self { pad_crop: 0, flip: false, erase: 0.0 }
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
        Ok(())
    }

    /// What image `index` gets in this epoch. The draws are made in a fixed order whatever is switched on, so that
    /// switching one augmentation leaves the others as they were.
    pub(super) fn draw(&self, shape: ImageShape, seed: u64, epoch: u64, index: usize) -> View {
        if *self == Self::none() {
            return View::identity();
        }
        let mut random = Random::new(Purpose::Image, seed, epoch, index as u64);
        let mut offset = || random.below(2 * self.pad_crop + 1) as isize - self.pad_crop as isize;
        let (down, right) = (offset(), offset());
        let flip = random.below(2) == 1;
        let erased = if random.unit() < self.erase { rectangle(shape, &mut random) } else { None };
        View { down, right, flip: flip && self.flip, erased }
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
}

impl View {
    /// The image as it is.
    pub(super) fn identity() -> Self {
        Self { down: 0, right: 0, flip: false, erased: None }
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
            for out in out.chunks_exact_mut(row).skip(top).take(height) {
                out[left * channels..][..width * channels].fill(0.0);
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
            let augment = Augment { pad_crop: 4, flip: true, erase: 0.5 };
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
        let augment = Augment { pad_crop: 2, flip: true, erase: 0.25 };
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
        let both = Augment { pad_crop: 4, flip: true, erase: 0.5 };
        let crop = Augment { flip: false, erase: 0.0, ..both.clone() };
        for index in 0..50 {
            let (a, b) = (both.draw(shape, 1, 1, index), crop.draw(shape, 1, 1, index));
            assert_eq!((a.down, a.right), (b.down, b.right));
        }
    }
}
