//! Noise to measure with: zeros would flatter the multipliers and a GPU's clock.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::Result;
use crate::device::{Buffer, Device};
use crate::ops::copy::copy;

/// Numbers of a block; larger buffers repeat it.
const BLOCK: usize = 1 << 20;
/// Standard deviation of weights and gradients: results stay near the inputs' scale, far from the limits of f16.
const SIGNED_STD: f32 = 0.05;

/// `len` standard normal numbers that follow from the seed; many repeat a block of them.
pub(super) fn normal(seed: u64, len: usize) -> Vec<f32> {
    let block: Vec<f32> = StandardNormal.sample_iter(ChaCha8Rng::seed_from_u64(seed)).take(len.min(BLOCK)).collect();
    block.iter().copied().cycle().take(len).collect()
}

/// Blocks of noise on a device, in the type of its activations.
pub(super) struct Noise {
    activations: Buffer,
    signed: Buffer,
}

impl Noise {
    pub fn new(device: &Device) -> Result<Self> {
        let numbers = normal(0, BLOCK);
        let put = |values: &[f32]| {
            let mut buffer = device.activations(BLOCK)?;
            buffer.write(values)?;
            Ok(buffer)
        };
        let activations: Vec<f32> = numbers.iter().map(|v| v.clamp(0.0, 6.0)).collect();
        let signed: Vec<f32> = numbers.iter().map(|v| v * SIGNED_STD).collect();
        Ok(Self { activations: put(&activations)?, signed: put(&signed)? })
    }

    /// Fills a buffer of the activations' type with what a ReLU6 leaves.
    pub fn fill_activations(&self, buffer: &mut Buffer) {
        fill(&self.activations, buffer);
    }

    /// Fills a buffer of the activations' type with small numbers of both signs.
    pub fn fill_signed(&self, buffer: &mut Buffer) {
        fill(&self.signed, buffer);
    }
}

fn fill(block: &Buffer, buffer: &mut Buffer) {
    for start in (0..buffer.len()).step_by(BLOCK) {
        let len = BLOCK.min(buffer.len() - start);
        copy(block.view(0..len), buffer.view_mut(start..start + len));
    }
}
