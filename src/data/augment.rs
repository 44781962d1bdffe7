//! Augmentation of one training image: its bytes are changed (`crop`, `rand_augment`), then a view of them is normalised
//! ([`crate::ops::augment`]).

use serde::{Deserialize, Serialize};

use super::crop::ResizedCrop;
use super::dataset::ImageShape;
use super::preprocess::Interpolation;
use super::rand_augment::{RandAugment, jitter};
use super::random::{ImageKey, Purpose, Random};
use crate::ops::augment::ImageView;
use crate::{Error, Result};

/// How many times a rectangle to erase is drawn before giving up on one that fits. This and what follows are timm's.
const ERASE_TRIES: usize = 10;
/// Least and largest share of the image that is erased; uniform.
const ERASE_AREA: [f32; 2] = [0.02, 1.0 / 3.0];
/// Least height / width of an erased rectangle; uniform in its logarithm up to the inverse.
const ERASE_RATIO: f64 = 0.3;

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

/// Random augmentations of a training image, in this order: `resized_crop`, `rand_augment`, `color_jitter`, `pad_crop`,
/// `flip`, `erase`. They depend on the seed, the epoch and the image's index alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {
    /// Black border on every side, in pixels, before a crop back to the old size at a random place; 0 = no crop.
    pub pad_crop: usize,
    /// Mirrors every second image left to right.
    pub flip: bool,
    /// Probability that a rectangle (2 to 33 % of the area, sides 0.3 to 3.3 to one) is erased, as timm's `RandomErasing`.
    pub erase: f32,
    /// Content of the erased rectangle.
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
    /// No augmentation.
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

    /// Whether the bytes change before an [`ImageView`] normalises them.
    pub(super) fn changes_bytes(&self) -> bool {
        self.color_jitter > 0.0 || self.rand_augment.is_some()
    }

    /// Applies RandAugment and colour jitter to the bytes of an image, `uint8` HWC. Pixels that an operation moves in from
    /// outside of the image get the colour `fill`.
    pub(super) fn change(
        &self,
        key: ImageKey,
        pixels: &mut [u8],
        shape: ImageShape,
        fill: &[u8],
        interpolation: Interpolation,
    ) {
        let mut ops =
            self.rand_augment.map_or_else(Vec::new, |policy| policy.draw(&mut key.random(Purpose::RandAugment)));
        if self.color_jitter > 0.0 {
            ops.extend(jitter(self.color_jitter, &mut key.random(Purpose::Jitter)));
        }
        for op in ops {
            op.apply(pixels, shape, fill, interpolation);
        }
    }

    /// Draws the view of an image. The draws are made in a fixed order whatever is switched on, so that switching one
    /// augmentation on or off does not change the others.
    pub(super) fn draw(&self, key: ImageKey, shape: ImageShape) -> ImageView {
        if self.pad_crop == 0 && !self.flip && self.erase == 0.0 {
            return ImageView::default();
        }
        let mut random = key.random(Purpose::Image);
        let mut offset = || random.below(2 * self.pad_crop + 1) as i32 - self.pad_crop as i32;
        let (down, right) = (offset(), offset());
        let flip = random.below(2) == 1;
        let erased = if random.unit() < self.erase { rectangle(shape, &mut random) } else { None };
        let [top, left, height, width] = erased.unwrap_or_default().map(|v| v as i32);
        let noisy = i32::from(self.erase_mode == EraseMode::Pixel);
        let stream = if noisy == 1 { key.random(Purpose::Noise).word() } else { 0 };
        let flip = i32::from(flip && self.flip);
        ImageView { stream, down, right, flip, top, left, height, width, noisy, ..ImageView::default() }
    }
}

/// Top, left, height and width of a rectangle to erase, or `None` if none of a few draws fits.
fn rectangle(shape: ImageShape, random: &mut Random) -> Option<[usize; 4]> {
    let area = (shape.height * shape.width) as f64;
    (0..ERASE_TRIES).find_map(|_| {
        let area = area * f64::from(random.between(ERASE_AREA[0], ERASE_AREA[1]));
        let ratio = (ERASE_RATIO.ln() * f64::from(random.between(-1.0, 1.0))).exp();
        let height = (area * ratio).sqrt().round_ties_even() as usize;
        let width = (area / ratio).sqrt().round_ties_even() as usize;
        (height < shape.height && width < shape.width).then_some(())?;
        let top = random.below(shape.height - height + 1);
        let left = random.below(shape.width - width + 1);
        Some([top, left, height, width])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    use super::super::dataset::Normalisation;
    use crate::ops::augment::{ByteTables, write};

    fn erased(view: &ImageView, y: usize, x: usize) -> bool {
        let within = |at: usize, from: i32, len: i32| (from..from + len).contains(&(at as i32));
        within(y, view.top, view.height) && within(x, view.left, view.width)
    }

    /// The view, pixel by pixel, from its definition.
    fn by_definition(view: &ImageView, pixels: &[u8], shape: ImageShape, normalisation: &Normalisation) -> Vec<f32> {
        let mut out = Vec::new();
        for y in 0..shape.height {
            for x in 0..shape.width {
                let column = if view.flip == 1 { shape.width - 1 - x } else { x } as i32 + view.right;
                let line = y as i32 + view.down;
                let inside = (0..shape.height as i32).contains(&line) && (0..shape.width as i32).contains(&column);
                for c in 0..shape.channels {
                    let at = (line * shape.width as i32 + column) * shape.channels as i32 + c as i32;
                    let byte = if inside { pixels[at as usize] } else { 0 };
                    let value = (f32::from(byte) / 255.0 - normalisation.mean[c]) / normalisation.std[c];
                    out.push(if erased(view, y, x) { 0.0 } else { value });
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
            let tables = ByteTables::new(&normalisation.mean, &normalisation.std);
            let augment = Augment { pad_crop: 4, flip: true, erase: 0.5, ..Augment::none() };
            for index in 0..400 {
                let view = augment.draw(ImageKey { seed: 1, epoch: 2, index }, shape);
                let mut out = vec![f32::NAN; shape.size()];
                write(&view, &pixels, shape.into(), &tables, &mut out);
                assert_eq!(out, by_definition(&view, &pixels, shape, &normalisation), "{view:?}");
            }
        }
    }

    #[test]
    fn draws_cover_their_ranges() {
        let shape = ImageShape { height: 28, width: 28, channels: 1 };
        let augment = Augment { pad_crop: 2, flip: true, erase: 0.25, ..Augment::none() };
        let views: Vec<ImageView> =
            (0..4000).map(|index| augment.draw(ImageKey { seed: 9, epoch: 0, index }, shape)).collect();
        for offset in -2..=2 {
            let share = views.iter().filter(|view| view.down == offset).count();
            assert!((650..950).contains(&share), "{share} of 4000 moved down by {offset}");
        }
        let flipped = views.iter().filter(|view| view.flip == 1).count();
        assert!((1850..2150).contains(&flipped), "{flipped}");
        let erased: Vec<&ImageView> = views.iter().filter(|view| view.height > 0).collect();
        assert!((850..1150).contains(&erased.len()), "{}", erased.len());
        for r in erased {
            let area = (r.height * r.width) as f32 / 784.0;
            assert!((0.01..0.37).contains(&area), "{r:?}");
            assert!(r.top + r.height <= 28 && r.left + r.width <= 28, "{r:?}");
        }
    }

    /// The shares of timm's rectangles (1.0.31, 200 000 of them on 64x48) below these areas and logarithms of height / width.
    #[test]
    fn erased_rectangles_are_distributed_as_timm_s() {
        const AREAS: [(f64, f64); 6] =
            [(0.05, 0.0987), (0.1, 0.2627), (0.15, 0.4288), (0.2, 0.5951), (0.25, 0.7561), (0.3, 0.9063)];
        const RATIOS: [(f64, f64); 5] = [(-0.8, 0.1400), (-0.4, 0.3147), (0.0, 0.4739), (0.4, 0.6549), (0.8, 0.8278)];
        let shape = ImageShape { height: 64, width: 48, channels: 3 };
        let augment = Augment { erase: 1.0, ..Augment::none() };
        let sizes: Vec<(f64, f64)> = (0..20_000)
            .map(|index| augment.draw(ImageKey { seed: 5, epoch: 0, index }, shape))
            .map(|view| (f64::from(view.height), f64::from(view.width)))
            .collect();
        let share = |below: &dyn Fn(f64, f64) -> bool| {
            sizes.iter().filter(|(h, w)| below(*h, *w)).count() as f64 / sizes.len() as f64
        };
        // Four standard errors of a share.
        let close = |what: &str, got: f64, want: f64| assert!((got - want).abs() < 0.014, "{what}: {got}, {want}");
        for (area, want) in AREAS {
            close(&format!("area below {area}"), share(&|h, w| h * w / (64.0 * 48.0) < area), want);
        }
        for (ratio, want) in RATIOS {
            close(&format!("log ratio below {ratio}"), share(&|h, w| (h / w).ln() < ratio), want);
        }
    }

    #[test]
    fn one_augmentation_does_not_move_another() {
        let shape = ImageShape { height: 28, width: 28, channels: 1 };
        let both = Augment { pad_crop: 4, flip: true, erase: 0.5, ..Augment::none() };
        let crop = Augment { flip: false, erase: 0.0, ..both.clone() };
        for index in 0..50 {
            let (a, b) = (
                both.draw(ImageKey { seed: 1, epoch: 1, index }, shape),
                crop.draw(ImageKey { seed: 1, epoch: 1, index }, shape),
            );
            assert_eq!((a.down, a.right), (b.down, b.right));
        }
    }

    #[test]
    fn noise_is_normal_and_stays_in_its_rectangle() {
        let shape = ImageShape { height: 40, width: 30, channels: 3 };
        let augment = Augment { erase: 1.0, erase_mode: EraseMode::Pixel, ..Augment::none() };
        let tables = ByteTables::new(&[0.0; 3], &[1.0; 3]);
        let mut noise = Vec::new();
        for index in 0..200 {
            let view = augment.draw(ImageKey { seed: 6, epoch: 0, index }, shape);
            let mut out = vec![0.0; shape.size()];
            write(&view, &vec![255; shape.size()], shape.into(), &tables, &mut out);
            for (at, &value) in out.iter().enumerate() {
                let (y, x) = (at / 90, at % 90 / 3);
                if erased(&view, y, x) {
                    noise.push(f64::from(value));
                } else {
                    assert_eq!(value, 1.0, "{y}, {x} is outside {view:?}");
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
