//! RandAugment and colour jitter: which operations an image gets, and how strong.

use serde::{Deserialize, Serialize};

use super::pixel_ops::PixelOp;
use super::random::Random;
use crate::{Error, Result};

/// The magnitude at which every operation is at its strongest.
const MAX_MAGNITUDE: f32 = 10.0;
/// Most operations one after another.
const MAX_LAYERS: usize = 16;
/// Operations to choose from.
const OPS: usize = 15;

/// RandAugment with timm's increasing policy (`rand-m5-mstd0.5-inc1` are the defaults): `layers` times, one of fifteen
/// operations is chosen and done with probability 1/2, with a magnitude drawn from a normal distribution and cut to 0..10.
/// At magnitude m:
///
/// | operation | strength |
/// |--|--|
/// | auto-contrast, equalize, invert | none |
/// | rotate | ±3·m degrees |
/// | posterize | 4 - ⌊0.4·m⌋ bits stay |
/// | solarize | values from 256 - ⌊25.6·m⌋ on |
/// | solarize-add | ⌊11·m⌋ is added to values below 128 |
/// | colour, contrast, brightness, sharpness | factor 1 ± 0.09·m, at least 0.1 |
/// | shear in x, in y | ±0.03·m pixels per pixel |
/// | shift in x, in y | ±4.5·m percent of the side |
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RandAugment {
    /// Mean magnitude, 0 to 10.
    pub magnitude: f32,
    /// Standard deviation of the magnitude.
    pub magnitude_std: f32,
    /// Operations that are chosen per image.
    pub layers: usize,
}

impl Default for RandAugment {
    fn default() -> Self {
        Self { magnitude: 5.0, magnitude_std: 0.5, layers: 2 }
    }
}

impl RandAugment {
    pub(super) fn check(&self) -> Result<()> {
        let rules = [
            ((0.0..=MAX_MAGNITUDE).contains(&self.magnitude), "magnitude", "0 to 10"),
            (self.magnitude_std >= 0.0 && self.magnitude_std.is_finite(), "magnitude_std", "0 or more"),
            ((1..=MAX_LAYERS).contains(&self.layers), "layers", "1 to 16"),
        ];
        match rules.iter().find(|rule| !rule.0) {
            Some((_, name, range)) => {
                Err(Error::Config(format!("augment.rand_augment.{name} is out of range; it must be {range}")))
            }
            None => Ok(()),
        }
    }

    /// The operations of one image, in order.
    pub(super) fn draw(&self, random: &mut Random) -> Vec<PixelOp> {
        let mut ops = Vec::with_capacity(self.layers);
        for _ in 0..self.layers {
            let (which, done) = (random.below(OPS), random.unit() < 0.5);
            let magnitude = (self.magnitude + self.magnitude_std * random.normal()).clamp(0.0, MAX_MAGNITUDE);
            let negative = random.below(2) == 1;
            if done {
                ops.push(op(which, magnitude, negative));
            }
        }
        ops
    }
}

/// The operation of a number, at a magnitude and, where it has two directions, in one of them.
fn op(which: usize, magnitude: f32, negative: bool) -> PixelOp {
    let level = magnitude / MAX_MAGNITUDE;
    let signed = f64::from(if negative { -level } else { level });
    let factor = (1.0 + 0.9 * signed as f32).max(0.1);
    match which {
        0 => PixelOp::AutoContrast,
        1 => PixelOp::Equalize,
        2 => PixelOp::Invert,
        3 => PixelOp::Rotate(30.0 * signed),
        4 => PixelOp::Posterize(4 - (level * 4.0) as u32),
        5 => PixelOp::Solarize(256 - (level * 256.0) as u16),
        6 => PixelOp::SolarizeAdd((level * 110.0) as u8),
        7 => PixelOp::Color(factor),
        8 => PixelOp::Contrast(factor),
        9 => PixelOp::Brightness(factor),
        10 => PixelOp::Sharpness(factor),
        11 => PixelOp::ShearX(0.3 * signed),
        12 => PixelOp::ShearY(0.3 * signed),
        13 => PixelOp::TranslateX(0.45 * signed),
        _ => PixelOp::TranslateY(0.45 * signed),
    }
}

/// Colour jitter as torchvision's: brightness, contrast and saturation, in an order of their own, each by a factor that is
/// uniform in `1 - strength` to `1 + strength`.
pub(super) fn jitter(strength: f32, random: &mut Random) -> [PixelOp; 3] {
    let mut factor = || random.between((1.0 - strength).max(0.0), 1.0 + strength);
    let mut ops = [PixelOp::Brightness(factor()), PixelOp::Contrast(factor()), PixelOp::Color(factor())];
    for last in (1..ops.len()).rev() {
        ops.swap(last, random.below(last + 1));
    }
    ops
}

#[cfg(test)]
mod tests {
    use super::super::random::Purpose;
    use super::*;

    #[test]
    fn the_strongest_and_the_weakest_are_those_of_the_table() {
        let at = |magnitude, negative| (0..OPS).map(|which| op(which, magnitude, negative)).collect::<Vec<_>>();
        use PixelOp::*;
        let still = [
            AutoContrast,
            Equalize,
            Invert,
            Rotate(0.0),
            Posterize(4),
            Solarize(256),
            SolarizeAdd(0),
            Color(1.0),
            Contrast(1.0),
            Brightness(1.0),
            Sharpness(1.0),
            ShearX(0.0),
            ShearY(0.0),
            TranslateX(0.0),
            TranslateY(0.0),
        ];
        assert_eq!(at(0.0, false), still);
        let full = [
            AutoContrast,
            Equalize,
            Invert,
            Rotate(-30.0),
            Posterize(0),
            Solarize(0),
            SolarizeAdd(110),
            Color(0.1),
            Contrast(0.1),
            Brightness(0.1),
            Sharpness(0.1),
            ShearX(-0.3),
            ShearY(-0.3),
            TranslateX(-0.45),
            TranslateY(-0.45),
        ];
        for (got, wanted) in at(10.0, true).into_iter().zip(full) {
            let same = match (got, wanted) {
                (Color(a), Color(b)) | (Contrast(a), Contrast(b)) => (a - b).abs() < 1e-6,
                (Brightness(a), Brightness(b)) | (Sharpness(a), Sharpness(b)) => (a - b).abs() < 1e-6,
                (a, b) => a == b,
            };
            assert!(same, "{got:?} {wanted:?}");
        }
        // int(25.6 · 5), int(0.4 · 5), int(11 · 5) of timm's levels.
        assert_eq!(
            [op(4, 5.0, false), op(5, 5.0, false), op(6, 5.0, false)],
            [Posterize(2), Solarize(128), SolarizeAdd(55)]
        );
    }

    #[test]
    fn operations_come_equally_often_and_magnitudes_are_normal() {
        let policy = RandAugment::default();
        let (mut counts, mut degrees) = ([0usize; OPS], Vec::new());
        const IMAGES: usize = 30_000;
        for index in 0..IMAGES {
            let ops = policy.draw(&mut Random::new(Purpose::RandAugment, 1, 2, index as u64));
            assert!(ops.len() <= 2);
            for op in ops {
                let known = (0..OPS).position(|which| {
                    std::mem::discriminant(&self::op(which, 1.0, false)) == std::mem::discriminant(&op)
                });
                counts[known.unwrap()] += 1;
                if let PixelOp::Rotate(d) = op {
                    degrees.push(d);
                }
            }
        }
        // One image has 2 · 1/2 operations: 2 000 of each kind, deviation 45.
        assert!(counts.iter().all(|n| (1_800..2_200).contains(n)), "{counts:?}");
        let n = degrees.len() as f64;
        let negative = degrees.iter().filter(|d| **d < 0.0).count() as f64 / n;
        let mean = degrees.iter().map(|d| d.abs()).sum::<f64>() / n;
        let deviation = (degrees.iter().map(|d| (d.abs() - mean).powi(2)).sum::<f64>() / n).sqrt();
        // 3 degrees per magnitude: 15 ± 1.5.
        assert!((0.45..0.55).contains(&negative), "{negative}");
        assert!((14.85..15.15).contains(&mean) && (1.4..1.6).contains(&deviation), "{mean} {deviation}");
    }

    #[test]
    fn jitter_draws_every_order_and_uniform_factors() {
        let mut orders = std::collections::HashMap::new();
        let mut factors = Vec::new();
        for index in 0..6_000 {
            let ops = jitter(0.4, &mut Random::new(Purpose::Jitter, 3, 0, index));
            *orders.entry(ops.map(|op| format!("{op:?}")[..3].to_owned())).or_insert(0) += 1;
            factors.extend(ops.map(|op| match op {
                PixelOp::Brightness(f) | PixelOp::Contrast(f) | PixelOp::Color(f) => f,
                other => panic!("{other:?}"),
            }));
        }
        assert!(orders.len() == 6 && orders.values().all(|n| (850..1150).contains(n)), "{orders:?}");
        assert!(factors.iter().all(|f| (0.6..1.4).contains(f)));
        for decile in 0..10 {
            let low = 0.6 + 0.08 * decile as f32;
            let share = factors.iter().filter(|f| (low..low + 0.08).contains(*f)).count() as f32 / factors.len() as f32;
            assert!((0.09..0.11).contains(&share), "{share} in decile {decile}");
        }
    }
}
