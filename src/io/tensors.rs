//! The safetensors container: named tensors and text metadata in one file.
//!
//! Reading goes through the `safetensors` crate, which checks every offset. Writing is done here because the crate
//! keeps metadata in a hash map: its order, and so the file, would differ from run to run.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

use super::atomic::write_atomic;
use crate::dtype::Dtype;
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Largest file that is read; a bound on memory before anything in it has been believed.
const MAX_FILE_BYTES: u64 = 4 << 30;
/// Largest header that is parsed; that of a thousand-layer network takes about one megabyte.
const MAX_HEADER_BYTES: u64 = 32 << 20;
/// The header's length comes first, as a little-endian `u64`.
const LENGTH_BYTES: u64 = 8;
/// What a reader can do about a damaged file.
const REMEDY: &str = "the file is damaged or no safetensors file; make or download it again";

/// The content of a safetensors file, all tensors as `f32`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TensorFile {
    /// Tensors by name, as laid out in the file.
    pub tensors: BTreeMap<String, Tensor>,
    /// Text by key.
    pub metadata: BTreeMap<String, String>,
}

/// Reads a safetensors file. `f16` and `bf16` tensors are widened; tensors of integers (such as PyTorch's
/// `num_batches_tracked`) are left out.
///
/// # Errors
/// A path that cannot be read, or content that is not a sound safetensors file of floats, in one line.
pub fn read_tensors(path: &Path) -> Result<TensorFile> {
    parse_tensors(path, &read_bounded(path)?)
}

/// As [`read_tensors`], from bytes; `path` is what messages name.
///
/// # Errors
/// As [`read_tensors`].
pub fn parse_tensors(path: &Path, bytes: &[u8]) -> Result<TensorFile> {
    check_header(path, bytes)?;
    let bad = |e: safetensors::SafeTensorError| Error::file(path, format!("{}; {REMEDY}", one_line(&e.to_string())));
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(bad)?;
    let file = SafeTensors::deserialize(bytes).map_err(bad)?;
    let mut out = TensorFile::default();
    for (key, text) in header.metadata().iter().flatten() {
        out.metadata.insert(key.clone(), text.clone());
    }
    for (name, view) in file.iter() {
        let dtype = match view.dtype() {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::BF16 => Dtype::Bf16,
            safetensors::Dtype::I64 | safetensors::Dtype::I32 | safetensors::Dtype::U8 | safetensors::Dtype::BOOL => {
                continue;
            }
            other => return Err(unsupported(path, name, other)),
        };
        let mut data = vec![0.0; view.data().len() / dtype.bytes()];
        dtype.decode(view.data(), &mut data);
        out.tensors.insert(name.to_owned(), Tensor { shape: view.shape().to_vec(), data });
    }
    Ok(out)
}

/// Writes a safetensors file atomically. Tensors lie in the order of their names: the same content gives the same bytes.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_tensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!(metadata));
    let mut offset = 0;
    for (name, tensor) in tensors {
        let end = offset + tensor.data.len() * size_of::<f32>();
        header.insert(name.clone(), json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // Readers that map the file want the numbers aligned.
    header.resize(header.len().next_multiple_of(LENGTH_BYTES as usize), b' ');
    write_atomic(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        tensors.values().try_for_each(|tensor| write_numbers(out, &tensor.data))
    })
}

fn write_numbers(out: &mut dyn Write, data: &[f32]) -> std::io::Result<()> {
    if cfg!(target_endian = "little") {
        return out.write_all(bytemuck::cast_slice(data));
    }
    data.iter().try_for_each(|x| out.write_all(&x.to_le_bytes()))
}

/// Reads a regular file of believable size.
pub(super) fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let io = |e| Error::io(path, e);
    let file = File::open(path).map_err(io)?;
    let meta = file.metadata().map_err(io)?;
    if !meta.is_file() {
        return Err(Error::file(path, "this is not a regular file; give a file of weights"));
    }
    let size = meta.len();
    if size > MAX_FILE_BYTES {
        let limit = MAX_FILE_BYTES >> 30;
        return Err(Error::file(path, format!("{size} bytes, more than the limit of {limit} GiB")));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    // The file may have grown since it was measured.
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}

/// Refuses a header whose length is not believable, before it is parsed.
fn check_header(path: &Path, bytes: &[u8]) -> Result<()> {
    let size = bytes.len() as u64;
    let Some(length) = bytes.first_chunk() else {
        return Err(Error::file(path, format!("{size} bytes, too short for a header; {REMEDY}")));
    };
    let header = u64::from_le_bytes(*length);
    if header > MAX_HEADER_BYTES || header > size - LENGTH_BYTES {
        return Err(Error::file(path, format!("claims a header of {header} bytes in a file of {size}; {REMEDY}")));
    }
    Ok(())
}

fn unsupported(path: &Path, name: &str, dtype: safetensors::Dtype) -> Error {
    Error::file(path, format!("tensor {name:?} has type {dtype}, expected F32, F16 or BF16; convert it to F32"))
}

/// A foreign message may quote file content; keep it to one readable line.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
}
