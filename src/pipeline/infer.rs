//! Running a model on a few images: logits of tensors and of pictures.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::data::Preprocessing;
use crate::device::Device;
use crate::engine::{Engine, EngineOptions, Fusion};
use crate::io::kind::{Purpose, refuse};
use crate::io::layout::nchw_to_nhwc;
use crate::io::tensors::{parse_tensors, read_bounded, write_tensors};
use crate::model::Model;
use crate::shape::Shape;
use crate::tensor::Tensor;
use crate::{Error, Result, memory};

/// Images per pass.
const BATCH: usize = 64;

/// Logits `[n, classes]` of images `[n, h, w, c]`.
///
/// # Errors
/// Numbers that are no whole images of the network's shape, or a failing device.
pub fn logits(device: &Device, model: &Model, images: &[f32]) -> Result<Vec<f32>> {
    let shape = model.graph.input_shape();
    if images.is_empty() || !images.len().is_multiple_of(shape.len()) {
        return Err(Error::shape(
            "infer",
            format!("one or more images of {shape}"),
            format!("{} numbers", images.len()),
        ));
    }
    let batches = images.chunks(BATCH * shape.len());
    run(device, model, images.len() / shape.len(), batches.map(|batch| Ok(Cow::Borrowed(batch))))
}

/// Logits `[n, classes]` of JPEG or PNG files, made to fit as `preprocessing` says; few of them are in memory at a time.
///
/// # Errors
/// A file that is no picture, a preprocessing for another input than the network's, or a failing device.
pub fn picture_logits(
    device: &Device,
    model: &Model,
    paths: &[PathBuf],
    preprocessing: &Preprocessing,
) -> Result<Vec<f32>> {
    let batch = |paths: &[PathBuf]| {
        let images: Vec<Vec<f32>> = paths.par_iter().map(|path| preprocessing.read(path)).collect::<Result<_>>()?;
        joined(&images).map(Cow::Owned)
    };
    run(device, model, paths.len(), paths.chunks(BATCH).map(batch))
}

/// Images one behind the other.
pub(super) fn joined(images: &[Vec<f32>]) -> Result<Vec<f32>> {
    let mut all = memory::room(images.iter().map(Vec::len).sum(), "a batch of images")?;
    images.iter().for_each(|image| all.extend_from_slice(image));
    Ok(all)
}

/// Logits of `count` images that come in batches of [`BATCH`], the last one of what is left.
fn run<'a>(
    device: &Device,
    model: &Model,
    count: usize,
    batches: impl Iterator<Item = Result<Cow<'a, [f32]>>>,
) -> Result<Vec<f32>> {
    let batch = BATCH.min(count);
    let options = EngineOptions { batch, fusion: Fusion::OnLoad, training: false, taps: Vec::new() };
    let mut engine = Engine::new(device, model, &options)?;
    let classes = model.graph.classes();
    let mut out = memory::zeros(count * classes, "the logits of all images")?;
    for (images, out) in batches.zip(out.chunks_mut(batch * classes)) {
        engine.forward(&images?)?.read(out)?;
    }
    Ok(out)
}

/// Images `[n, h, w, c]` from the tensor `input`, `[n, c, h, w]`, of a safetensors file.
///
/// # Errors
/// A file that cannot be read, has no such tensor, or one of another shape.
pub fn read_images(path: &Path, shape: Shape) -> Result<Vec<f32>> {
    let bytes = read_bounded(path)?;
    refuse(path, &bytes, Purpose::Images)?;
    let mut file = parse_tensors(path, &bytes)?;
    let tensor = file
        .tensors
        .remove("input")
        .ok_or_else(|| Error::file(path, "has no tensor `input` of floats; name it so, [n, c, h, w]"))?;
    match *tensor.shape.as_slice() {
        [n, c, h, w] if n > 0 && Shape::new(h, w, c) == shape => Ok(nchw_to_nhwc(&tensor.data, c, h * w)),
        ref got => {
            let Shape { h, w, c } = shape;
            Err(Error::file(
                path,
                format!("`input` has shape {got:?}, the model takes [n, {c}, {h}, {w}]; make it of that shape"),
            ))
        }
    }
}

/// Writes logits `[n, classes]` as the tensor `logits` of a safetensors file.
///
/// # Errors
/// What the operating system says.
pub fn write_logits(path: &Path, logits: &[f32], classes: usize) -> Result<()> {
    let tensor = Tensor::new(vec![logits.len() / classes, classes], memory::copy(logits, "the logits of all images")?)?;
    write_tensors(path, &BTreeMap::from([("logits".to_owned(), tensor)]), &BTreeMap::new())
}

/// A class and how likely it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Top {
    /// Its index.
    pub class: usize,
    /// Softmax of its logit.
    pub probability: f64,
}

/// The `count` likeliest classes of one row of logits, likeliest first.
pub fn top_classes(logits: &[f32], count: usize) -> Vec<Top> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|&z| f64::from(z - highest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    order.into_iter().take(count).map(|class| Top { class, probability: weights[class] / sum }).collect()
}
