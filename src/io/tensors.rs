//! The safetensors container: named tensors and text metadata in one file.
//!
//! Reading goes through the `safetensors` crate, which checks every offset. Writing is done here because the crate
//! keeps metadata in a hash map: its order, and so the file, would differ from run to run.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

use super::atomic::write_atomic;
use crate::dtype::Dtype;
use crate::tensor::Tensor;
use crate::{Error, Result, files, memory};

/// Largest file that is read; a bound on memory before anything in it has been believed.
const MAX_FILE_BYTES: u64 = 4 << 30;
/// Largest header that is parsed; that of a thousand-layer network takes about one megabyte.
const MAX_HEADER_BYTES: u64 = 32 << 20;
/// Longest name of a tensor, in bytes; names are compared and quoted, and those of networks have about thirty.
const MAX_NAME_BYTES: usize = 1024;
/// The header's length comes first, as a little-endian `u64`.
const LENGTH_BYTES: u64 = 8;
/// What memory is for.
const WEIGHTS: &str = "the numbers of a tensor";
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

/// Reads a safetensors file. `f16` and `bf16` tensors are widened, `f64` ones rounded; tensors of integers and flags (such
/// as PyTorch's `num_batches_tracked`) are left out.
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
        use safetensors::Dtype::{BF16, BOOL, F16, F32, F64, I8, I16, I32, I64, U8, U16, U32, U64};
        check_name(name).map_err(|fault| Error::file(path, fault))?;
        let data = match view.dtype() {
            F32 => decoded(Dtype::F32, view.data())?,
            F16 => decoded(Dtype::F16, view.data())?,
            BF16 => decoded(Dtype::Bf16, view.data())?,
            F64 => {
                let mut data = memory::room(view.data().len() / 8, WEIGHTS)?;
                data.extend(doubles(view.data()));
                data
            }
            BOOL | U8 | I8 | I16 | U16 | I32 | U32 | I64 | U64 => continue,
            other => return Err(unsupported(path, name, other)),
        };
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
pub(crate) fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let io = |e| Error::io(path, e);
    let file = files::open(path)?;
    let size = file.metadata().map_err(io)?.len();
    if size > MAX_FILE_BYTES {
        let limit = MAX_FILE_BYTES >> 30;
        return Err(Error::file(
            path,
            format!("has {size} bytes, more than the {limit} GiB that are read; save the weights alone"),
        ));
    }
    let mut bytes = memory::room(size as usize, "a file of weights")?;
    // The file may have grown since it was measured.
    memory::read_to_end(file.take(MAX_FILE_BYTES), &mut bytes).map_err(io)?;
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

fn decoded(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>> {
    let mut data = memory::zeros(bytes.len() / dtype.bytes(), WEIGHTS)?;
    dtype.decode(bytes, &mut data);
    Ok(data)
}

/// Little-endian `f64` numbers, rounded.
pub(super) fn doubles(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("eight bytes")) as f32)
}

/// Refuses a tensor's name that is no name, before it is copied and compared.
///
/// # Errors
/// What is wrong with it, without the path.
pub(super) fn check_name(name: &str) -> std::result::Result<(), String> {
    if name.len() <= MAX_NAME_BYTES {
        return Ok(());
    }
    let (start, bytes) = (short(name), name.len());
    Err(format!("a tensor's name {start} has {bytes} bytes, the limit is {MAX_NAME_BYTES}; make or download it again"))
}

/// A name for a message: escaped, and cut where it is long.
pub(super) fn short(name: &str) -> String {
    const SHOWN: usize = 80;
    let mut escaped = name.escape_debug();
    let start: String = escaped.by_ref().take(SHOWN).collect();
    if escaped.next().is_some() { format!("{start}…") } else { start }
}

fn unsupported(path: &Path, name: &str, dtype: safetensors::Dtype) -> Error {
    Error::file(
        path,
        format!("tensor {} has type {dtype}, expected F64, F32, F16 or BF16; convert it to F32", short(name)),
    )
}

/// A foreign message may quote file content; keep it to one readable line.
pub(super) fn one_line(text: &str) -> String {
    const LONGEST: usize = 600;
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(LONGEST).collect()
}
