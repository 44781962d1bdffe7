//! What a network has beyond the range of f16, on images from files or on noise.

use std::path::PathBuf;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::images::ImageFiles;
use super::infer::read_images;
use crate::Result;
use crate::io::DataInfo;
use crate::io::onnx::{HalfRange, Overflow};
use crate::model::Model;

/// Images of noise that are looked at where none are given.
const NOISE_IMAGES: usize = 8;

/// What passes the range of f16 on safetensors files of images (`input`, NCHW) and on JPEG or PNG pictures, which are made
/// to fit as `data` says; without files, on images of standard normal noise.
///
/// # Errors
/// A file that cannot be read or does not fit, pictures without `data`, or as [`HalfRange`].
pub fn half_overflows(model: &Model, files: &[PathBuf], data: Option<&DataInfo>, seed: u64) -> Result<Vec<Overflow>> {
    let mut range = HalfRange::new(model)?;
    let (shape, batch) = (model.graph.input_shape(), range.batch());
    let given = ImageFiles::new(files)?;
    for path in &given.tensors {
        let images = read_images(path, shape)?;
        images.chunks(batch * shape.len()).try_for_each(|images| range.add(images))?;
    }
    given.each_batch_of_pictures(data, batch, |images| range.add(images))?;
    if files.is_empty() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for first in (0..NOISE_IMAGES).step_by(batch) {
            let numbers = batch.min(NOISE_IMAGES - first) * shape.len();
            let images: Vec<f32> = StandardNormal.sample_iter(&mut rng).take(numbers).collect();
            range.add(&images)?;
        }
    }
    Ok(range.overflows())
}
