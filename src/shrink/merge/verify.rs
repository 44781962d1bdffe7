//! Proof that a merged network computes what the unmerged one computes.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::Serialize;

use crate::device::Device;
use crate::engine::{Engine, EngineOptions, Fusion};
use crate::model::Model;
use crate::{Error, Result};

/// Largest [`MergeError::max_rel_error`] of a merge that counts as exact in f32.
pub const TOLERANCE: f64 = 1e-4;
/// Images per pass: enough to keep every core busy, few enough for little memory.
const BATCH: usize = 16;

/// How far the logits of two networks lie apart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MergeError {
    /// Largest difference of a logit.
    pub max_abs_error: f64,
    /// The same, divided by the largest logit of the unmerged network in magnitude.
    pub max_rel_error: f64,
}

/// Runs `n` images `[n, h, w, c]` through both networks on the host, in inference, and compares their logits.
///
/// # Errors
/// Networks of different inputs or classes, images that do not fit, or logits that are not finite.
pub fn verify(unmerged: &Model, merged: &Model, images: &[f32], n: usize) -> Result<MergeError> {
    let shape = unmerged.graph.input_shape();
    let classes = unmerged.graph.classes();
    if (merged.graph.input_shape(), merged.graph.classes()) != (shape, classes) {
        let expected = format!("{shape} and {classes} classes");
        let got = format!("{} and {} classes", merged.graph.input_shape(), merged.graph.classes());
        return Err(Error::shape("verify", expected, got));
    }
    if n == 0 || images.len() != n * shape.len() {
        return Err(Error::shape("verify", format!("{n} > 0 images of {shape}"), format!("{} numbers", images.len())));
    }
    let expected = logits(unmerged, images)?;
    let got = logits(merged, images)?;
    if let Some(bad) = expected.iter().chain(&got).find(|v| !v.is_finite()) {
        return Err(Error::NotFinite(format!("verify: a logit is {bad}; the weights or images are unusable")));
    }
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let max_abs_error = largest(&mut expected.iter().zip(&got).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()));
    let scale = largest(&mut expected.iter().map(|v| f64::from(v.abs())));
    let max_rel_error =
        if max_abs_error == 0.0 { 0.0 } else { max_abs_error / scale.max(f64::from(f32::MIN_POSITIVE)) };
    Ok(MergeError { max_abs_error, max_rel_error })
}

/// As [`verify`], on `n` images of standard normal noise; the same seed gives the same images on every machine.
///
/// # Errors
/// As [`verify`].
pub fn verify_random(unmerged: &Model, merged: &Model, n: usize, seed: u64) -> Result<MergeError> {
    let rng = ChaCha8Rng::seed_from_u64(seed);
    let images: Vec<f32> = StandardNormal.sample_iter(rng).take(n * unmerged.graph.input_shape().len()).collect();
    verify(unmerged, merged, &images, n)
}

fn logits(model: &Model, images: &[f32]) -> Result<Vec<f32>> {
    let image = model.graph.input_shape().len();
    let batch = BATCH.min(images.len() / image);
    let options = EngineOptions { batch, fusion: Fusion::Fused, training: false, taps: Vec::new() };
    let mut engine = Engine::new(&Device::Cpu, model, &options)?;
    let mut logits = Vec::with_capacity(images.len() / image * model.graph.classes());
    for chunk in images.chunks(batch * image) {
        let start = logits.len();
        logits.resize(start + chunk.len() / image * model.graph.classes(), 0.0);
        engine.forward(chunk)?.read(&mut logits[start..])?;
    }
    Ok(logits)
}
