//! The crop of ImageNet training: a rectangle of random area, shape and place.

use serde::{Deserialize, Serialize};

use super::preprocess::Window;
use super::random::Random;
use crate::{Error, Result};

/// How many rectangles are drawn before giving up on one that fits.
const TRIES: usize = 10;

/// A random part of the picture, resized to the network's input, as torchvision's `RandomResizedCrop`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResizedCrop {
    /// Least and largest share of the picture's area; uniform.
    pub scale: [f32; 2],
    /// Least and largest width / height; uniform in its logarithm.
    pub ratio: [f32; 2],
}

impl Default for ResizedCrop {
    fn default() -> Self {
        Self { scale: [0.08, 1.0], ratio: [3.0 / 4.0, 4.0 / 3.0] }
    }
}

impl ResizedCrop {
    pub(super) fn check(&self) -> Result<()> {
        let [low, high] = self.scale;
        if !(low > 0.0 && low <= high && high <= 1.0) {
            return Err(Error::Config(format!(
                "augment.resized_crop.scale is [{low}, {high}]; give two shares of the area, 0 < least <= largest <= 1"
            )));
        }
        let [low, high] = self.ratio;
        if !(low > 0.01 && low <= high && high < 100.0) {
            return Err(Error::Config(format!(
                "augment.resized_crop.ratio is [{low}, {high}]; give two of width / height, 0.01 < least <= largest < 100"
            )));
        }
        Ok(())
    }

    /// A rectangle of whole pixels inside a `width` x `height` picture.
    pub(super) fn draw(&self, width: usize, height: usize, random: &mut Random) -> Window {
        let [low, high] = self.ratio.map(f64::from);
        let area = (width * height) as f64;
        for _ in 0..TRIES {
            let area = area * f64::from(random.between(self.scale[0], self.scale[1]));
            let ratio = (low.ln() + (high.ln() - low.ln()) * f64::from(random.unit())).exp();
            let (w, h) = ((area * ratio).sqrt().round_ties_even(), (area / ratio).sqrt().round_ties_even());
            if (1.0..=width as f64).contains(&w) && (1.0..=height as f64).contains(&h) {
                let top = random.below(height - h as usize + 1);
                let left = random.below(width - w as usize + 1);
                return Window { left: left as f64, top: top as f64, width: w, height: h };
            }
        }
        // The centre, as wide or as high as the ratio lets it be.
        let (width, height) = (width as f64, height as f64);
        let ratio = (width / height).clamp(low, high);
        let (w, h) = if width / height < ratio {
            (width, (width / ratio).round_ties_even().max(1.0))
        } else {
            ((height * ratio).round_ties_even().clamp(1.0, width), height)
        };
        Window { left: ((width - w) / 2.0).floor(), top: ((height - h) / 2.0).floor(), width: w, height: h }
    }
}

#[cfg(test)]
mod tests {
    use super::super::random::Purpose;
    use super::*;

    fn draws(crop: ResizedCrop, width: usize, height: usize, count: u64) -> Vec<Window> {
        (0..count).map(|i| crop.draw(width, height, &mut Random::new(Purpose::Crop, 4, 1, i))).collect()
    }

    #[test]
    fn areas_ratios_and_places_are_spread_as_defined() {
        // Small enough that every rectangle fits, so that no draw is thrown away and the marginals are the plain ones.
        let crop = ResizedCrop { scale: [0.05, 0.5], ratio: [0.75, 4.0 / 3.0] };
        let windows = draws(crop, 1000, 1000, 8_000);
        let quarter = |value: f64, low: f64, high: f64| (((value - low) / (high - low) * 4.0) as usize).min(3);
        let (mut areas, mut ratios, mut tops) = ([0; 4], [0; 4], [0; 4]);
        for w in &windows {
            assert!(w.left >= 0.0 && w.top >= 0.0 && w.left + w.width <= 1000.0 && w.top + w.height <= 1000.0, "{w:?}");
            areas[quarter(w.width * w.height / 1e6, 0.05, 0.5)] += 1;
            ratios[quarter((w.width / w.height).ln(), 0.75f64.ln(), (4.0f64 / 3.0).ln())] += 1;
            tops[quarter(w.top, 0.0, 1000.0 - w.height)] += 1;
        }
        for counts in [areas, ratios, tops] {
            assert!(counts.iter().all(|n| (1_850..2_150).contains(n)), "{counts:?}");
        }
    }

    #[test]
    fn pictures_that_no_rectangle_fits_give_their_centre() {
        let crop = ResizedCrop { scale: [0.9, 1.0], ..ResizedCrop::default() };
        for w in draws(crop, 1000, 10, 50) {
            // At most 4/3 as wide as high.
            assert_eq!(w, Window { left: 493.0, top: 0.0, width: 13.0, height: 10.0 });
        }
        for w in draws(crop, 10, 1000, 50) {
            assert_eq!(w, Window { left: 0.0, top: 493.0, width: 10.0, height: 13.0 });
        }
        for w in draws(ResizedCrop::default(), 1, 1, 50) {
            assert_eq!(w, Window { left: 0.0, top: 0.0, width: 1.0, height: 1.0 });
        }
    }
}
