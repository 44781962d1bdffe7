//! Checking a merge on images from files.

use std::path::PathBuf;

use super::images::ImageFiles;
use super::infer::read_images;
use crate::Result;
use crate::io::DataInfo;
use crate::model::Model;
use crate::shrink::merge::{MergeError, Merged, Verifier, verify};

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
    let (shape, files) = (unmerged.graph.input_shape(), ImageFiles::new(files)?);
    for path in &files.tensors {
        let images = read_images(path, shape)?;
        note(verify(unmerged, merged, &images, images.len() / shape.len())?);
    }
    if !files.pictures.is_empty() {
        let mut verifier = Verifier::new(unmerged, merged)?;
        files.each_batch_of_pictures(data, verifier.batch(), |images| verifier.compare(images))?;
        note(verifier.error());
    }
    Ok(worst)
}
