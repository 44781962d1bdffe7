//! Images from files of both kinds: safetensors with normalised tensors, and pictures.

use std::io::Read;
use std::path::{Path, PathBuf};

use super::infer::joined;
use crate::io::DataInfo;
use crate::{Error, Result, files};

/// How JPEG and PNG files begin.
const PICTURES: [&[u8]; 2] = [b"\xff\xd8\xff", b"\x89PNG"];

/// Files told apart by how they begin.
pub(super) struct ImageFiles<'a> {
    /// Safetensors files with a tensor `input`, NCHW.
    pub tensors: Vec<&'a Path>,
    /// JPEG and PNG files.
    pub pictures: Vec<&'a Path>,
}

impl<'a> ImageFiles<'a> {
    /// # Errors
    /// A file that cannot be read.
    pub fn new(files: &'a [PathBuf]) -> Result<Self> {
        let (mut tensors, mut pictures) = (Vec::new(), Vec::new());
        for path in files {
            let kind = if is_picture(path)? { &mut pictures } else { &mut tensors };
            kind.push(path.as_path());
        }
        Ok(Self { tensors, pictures })
    }

    /// Calls `take` with the pictures `[n, h, w, c]`, up to `batch` at a time, made to fit as `data` says.
    ///
    /// # Errors
    /// A file that is no picture, pictures without `data`, or what `take` returns.
    pub fn each_batch_of_pictures(
        &self,
        data: Option<&DataInfo>,
        batch: usize,
        mut take: impl FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        if self.pictures.is_empty() {
            return Ok(());
        }
        let data = data.ok_or_else(|| {
            Error::Config("the model's file does not say how pictures are normalised; give normalised tensors".into())
        })?;
        let preprocessing = data.preprocessing();
        for paths in self.pictures.chunks(batch) {
            let images: Vec<Vec<f32>> = paths.iter().map(|path| preprocessing.read(path)).collect::<Result<_>>()?;
            take(&joined(&images)?)?;
        }
        Ok(())
    }
}

fn is_picture(path: &Path) -> Result<bool> {
    let mut start = Vec::new();
    let file = files::open(path)?;
    file.take(8).read_to_end(&mut start).map_err(|e| Error::io(path, e))?;
    Ok(PICTURES.iter().any(|magic| start.starts_with(magic)))
}
