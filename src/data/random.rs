//! Random numbers as a pure function of (purpose, seed, epoch, index), so that an epoch is the same whatever the thread
//! count and wherever a run was resumed.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The use of random numbers; keeps the streams of one seed apart.
#[derive(Clone, Copy)]
pub(super) enum Purpose {
    /// The order of an epoch.
    Order = 1,
    /// Shift, flip and erased rectangle of one image.
    Image = 2,
    /// The resized crop of one image.
    Crop = 3,
    /// The operations of RandAugment on one image.
    RandAugment = 4,
    /// The colour jitter of one image.
    Jitter = 5,
    /// What is written into the erased rectangle of one image.
    Noise = 6,
}

/// One image of one epoch: with a [`Purpose`] the key of its random numbers.
#[derive(Debug, Clone, Copy)]
pub(super) struct ImageKey {
    /// Seed of the run.
    pub(super) seed: u64,
    /// The epoch.
    pub(super) epoch: u64,
    /// Index of the image in its dataset.
    pub(super) index: usize,
}

impl ImageKey {
    /// The random numbers of this image for a purpose.
    pub(super) fn random(self, purpose: Purpose) -> Random {
        Random::new(purpose, self.seed, self.epoch, self.index as u64)
    }
}

/// A generator of its own for every key. The mapping from raw words to ranges is written out below rather than taken
/// from `rand`, whose sampling may change between versions: a checkpoint must resume alike after an upgrade.
pub(super) struct Random(ChaCha8Rng);

impl Random {
    pub(super) fn new(purpose: Purpose, seed: u64, epoch: u64, index: u64) -> Self {
        let mut key = [0; 32];
        for (bytes, word) in key.chunks_exact_mut(8).zip([purpose as u64, seed, epoch, index]) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Self(ChaCha8Rng::from_seed(key))
    }

    /// 64 random bits.
    pub(super) fn word(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Uniform in `0..n`, by the high half of a product; the bias is below `n / 2^64`.
    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.0.next_u64()) * n as u128) >> 64) as usize
    }

    /// Uniform in `[0, 1)`, a multiple of 2^-24, so exact in `f32`.
    pub(super) fn unit(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in `[low, high)`.
    pub(super) fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.unit()
    }

    /// One number from the standard normal distribution, by Box and Muller.
    pub(super) fn normal(&mut self) -> f32 {
        // From (0, 1], whose logarithm is finite.
        let radius = (-2.0 * (1.0 - f64::from(self.unit())).ln()).sqrt();
        (radius * (std::f64::consts::TAU * f64::from(self.unit())).cos()) as f32
    }
}

/// The order of one epoch over `len` images: a Fisher–Yates shuffle.
pub(super) fn shuffled(len: usize, seed: u64, epoch: u64) -> Vec<usize> {
    shuffled_part(len, seed, epoch, 0)
}

/// The order of a part of an epoch; every part has random numbers of its own.
pub(super) fn shuffled_part(len: usize, seed: u64, epoch: u64, part: u64) -> Vec<usize> {
    let mut random = Random::new(Purpose::Order, seed, epoch, part);
    let mut order: Vec<usize> = (0..len).collect();
    for last in (1..len).rev() {
        order.swap(last, random.below(last + 1));
    }
    order
}
