//! Checking a merge on images from files.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::infer::{joined, read_images};
use crate::io::DataInfo;
use crate::model::Model;
use crate::shrink::merge::{MergeError, Merged, Verifier, verify};
use crate::{Error, Result, files};

/// How JPEG and PNG files begin.
const PICTURES: [&[u8]; 2] = [b"\xff\xd8\xff", b"\x89PNG"];

/// Compares both networks on safetensors files of images (`input`, NCHW) and on JPEG or PNG pictures, which are made to
/// fit as `data` says; few images are in memory at a time. `None` without files.
///
/// # Errors
/// A file that cannot be read or does not fit, pictures without `data`, or as [`Verifier`].
pub fn verify_files(
    unmerged: &Model,
    merged: &Merged,
    files: &[PathBuf],
    data: Option<&DataInfo>,
) -> Result<Option<MergeError>> {
    let mut worst: Option<MergeError> = None;
    let mut note = |error: MergeError| worst = Some(worst.map_or(error, |worst| worst.worse(error)));
    let (shape, mut pictures) = (unmerged.graph.input_shape(), Vec::new());
    for path in files {
        if is_picture(path)? {
            pictures.push(path);
        } else {
            let images = read_images(path, shape)?;
            note(verify(unmerged, merged, &images, images.len() / shape.len())?);
        }
    }
    if !pictures.is_empty() {
        let data = data.ok_or_else(|| {
            Error::Config("the model's file does not say how pictures are normalised; give normalised tensors".into())
        })?;
        let (preprocessing, mut verifier) = (data.preprocessing(), Verifier::new(unmerged, merged)?);
        for paths in pictures.chunks(verifier.batch()) {
            let images: Vec<Vec<f32>> = paths.iter().map(|path| preprocessing.read(path)).collect::<Result<_>>()?;
            verifier.compare(&joined(&images)?)?;
        }
        note(verifier.error());
    }
    Ok(worst)
}

fn is_picture(path: &Path) -> Result<bool> {
    let mut start = Vec::new();
    let file = files::open(path)?;
    file.take(8).read_to_end(&mut start).map_err(|e| Error::io(path, e))?;
    Ok(PICTURES.iter().any(|magic| start.starts_with(magic)))
}
