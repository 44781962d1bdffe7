//! Running a model on a few images: logits, and pictures made to fit.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;

use image::imageops::FilterType;
use image::{ImageReader, Limits};

use crate::device::Device;
use crate::engine::{Engine, EngineOptions, Fusion};
use crate::io::DataInfo;
use crate::io::layout::nchw_to_nhwc;
use crate::io::tensors::{read_tensors, write_tensors};
use crate::model::Model;
use crate::shape::Shape;
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Images per pass.
const BATCH: usize = 64;
/// Largest side of a picture that is decoded.
const MAX_SIDE: u32 = 32_768;

/// Logits `[n, classes]` of images `[n, h, w, c]`.
///
/// # Errors
/// Numbers that are no whole images of the network's shape, or a failing device.
pub fn logits(device: &Device, model: &Model, images: &[f32]) -> Result<Vec<f32>> {
    let (shape, classes) = (model.graph.input_shape(), model.graph.classes());
    if images.is_empty() || !images.len().is_multiple_of(shape.len()) {
        return Err(Error::shape(
            "infer",
            format!("one or more images of {shape}"),
            format!("{} numbers", images.len()),
        ));
    }
    let batch = BATCH.min(images.len() / shape.len());
    let options = EngineOptions { batch, fusion: Fusion::Fused, training: false, taps: Vec::new() };
    let mut engine = Engine::new(device, model, &options)?;
    let mut out = vec![0.0; images.len() / shape.len() * classes];
    for (images, out) in images.chunks(batch * shape.len()).zip(out.chunks_mut(batch * classes)) {
        engine.forward(images)?.read(out)?;
    }
    Ok(out)
}

/// A JPEG or PNG file as one normalised image `[h, w, c]`: scaled to cover the network's input, its centre cut out, and
/// made grey where the network takes one channel.
///
/// # Errors
/// A file that is no picture, or a network that takes neither 1 nor 3 channels.
pub fn picture(path: &Path, shape: Shape, data: &DataInfo) -> Result<Vec<f32>> {
    let wrong = |problem: String| Error::file(path, format!("{problem}; give a JPEG or PNG file"));
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let mut reader = ImageReader::new(Cursor::new(&bytes)).with_guessed_format().map_err(|e| Error::io(path, e))?;
    let mut limits = Limits::default();
    (limits.max_image_width, limits.max_image_height) = (Some(MAX_SIDE), Some(MAX_SIDE));
    reader.limits(limits);
    let picture = reader.decode().map_err(|e| wrong(format!("cannot be decoded: {e}")))?;
    let fitted = if (picture.width() as usize, picture.height() as usize) == (shape.w, shape.h) {
        picture
    } else {
        picture.resize_to_fill(shape.w as u32, shape.h as u32, FilterType::CatmullRom)
    };
    let pixels = match shape.c {
        1 => fitted.into_luma8().into_raw(),
        3 => fitted.into_rgb8().into_raw(),
        c => return Err(Error::Data(format!("the network takes {c} channels; pictures have 1 or 3, give --input"))),
    };
    let scale = |(i, &v): (usize, &u8)| (f32::from(v) / 255.0 - data.mean[i % shape.c]) / data.std[i % shape.c];
    Ok(pixels.iter().enumerate().map(scale).collect())
}

/// Images `[n, h, w, c]` from the tensor `input`, `[n, c, h, w]`, of a safetensors file.
///
/// # Errors
/// A file that cannot be read, has no such tensor, or one of another shape.
pub fn read_images(path: &Path, shape: Shape) -> Result<Vec<f32>> {
    let mut file = read_tensors(path)?;
    let tensor = file
        .tensors
        .remove("input")
        .ok_or_else(|| Error::file(path, "has no tensor `input` of floats; name it so, [n, c, h, w]"))?;
    match *tensor.shape.as_slice() {
        [n, c, h, w] if n > 0 && Shape::new(h, w, c) == shape => Ok(nchw_to_nhwc(&tensor.data, c, h * w)),
        ref got => {
            let Shape { h, w, c } = shape;
            Err(Error::file(path, format!("`input` has shape {got:?}, the model takes [n, {c}, {h}, {w}]")))
        }
    }
}

/// Writes logits `[n, classes]` as the tensor `logits` of a safetensors file.
///
/// # Errors
/// What the operating system says.
pub fn write_logits(path: &Path, logits: &[f32], classes: usize) -> Result<()> {
    let tensor = Tensor::new(vec![logits.len() / classes, classes], logits.to_vec())?;
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
