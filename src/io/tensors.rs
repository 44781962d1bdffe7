//! The safetensors container: named tensors and text metadata in one file.
//!
//! Reading goes through the `safetensors` crate, which checks every offset. Writing is done here because the crate
//! keeps metadata in a hash map: its order, and so the file, would differ from run to run.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use super::atomic::write_atomic;
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
    let bytes = read_bounded(path)?;
    let bad = |e: safetensors::SafeTensorError| Error::file(path, format!("{}; {REMEDY}", one_line(&e.to_string())));
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(bad)?;
    let file = SafeTensors::deserialize(&bytes).map_err(bad)?;
    let mut out = TensorFile::default();
    for (key, text) in header.metadata().iter().flatten() {
        out.metadata.insert(key.clone(), text.clone());
    }
    for (name, view) in file.iter() {
        if let Some(data) = to_f32(view.dtype(), view.data()).map_err(|dtype| unsupported(path, name, dtype))? {
            out.tensors.insert(name.to_owned(), Tensor { shape: view.shape().to_vec(), data });
        }
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

/// Reads a regular file whose size and header length are believable.
fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let io = |e| Error::io(path, e);
    let mut file = File::open(path).map_err(io)?;
    let meta = file.metadata().map_err(io)?;
    if !meta.is_file() {
        return Err(Error::file(path, "this is not a regular file; give a .safetensors file"));
    }
    let size = meta.len();
    if size > MAX_FILE_BYTES {
        let limit = MAX_FILE_BYTES >> 30;
        return Err(Error::file(path, format!("{size} bytes, more than the limit of {limit} GiB; {REMEDY}")));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact(&mut length)
        .map_err(|_| Error::file(path, format!("{size} bytes, too short for a header; {REMEDY}")))?;
    let header = u64::from_le_bytes(length);
    if header > MAX_HEADER_BYTES || header > size - LENGTH_BYTES {
        return Err(Error::file(path, format!("claims a header of {header} bytes in a file of {size}; {REMEDY}")));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    bytes.extend_from_slice(&length);
    // The file may have grown since it was measured.
    file.take(MAX_FILE_BYTES - LENGTH_BYTES).read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}

/// The numbers of a float tensor, `None` for integers, the type's name for what cannot be read.
fn to_f32(dtype: Dtype, bytes: &[u8]) -> std::result::Result<Option<Vec<f32>>, Dtype> {
    let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    Ok(Some(match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::BF16 => halves().map(|h| f32::from_bits(u32::from(h) << 16)).collect(),
        Dtype::F16 => halves().map(f16_to_f32).collect(),
        Dtype::I64 | Dtype::I32 | Dtype::U8 | Dtype::BOOL => return Ok(None),
        other => return Err(other),
    }))
}

/// Widens an IEEE half (1 sign, 5 exponent, 10 mantissa bits), exactly.
fn f16_to_f32(half: u16) -> f32 {
    let sign = u32::from(half >> 15) << 31;
    let (exponent, mantissa) = (u32::from(half >> 10) & 31, u32::from(half) & 0x3ff);
    match exponent {
        // Subnormal: mantissa · 2⁻²⁴, which f32 holds exactly.
        0 => f32::from_bits((mantissa as f32 * 2.0f32.powi(-24)).to_bits() | sign),
        31 => f32::from_bits(sign | 0x7f80_0000 | mantissa << 13),
        // Both exponents are biased: by 15 and by 127.
        _ => f32::from_bits(sign | (exponent + 112) << 23 | mantissa << 13),
    }
}

fn unsupported(path: &Path, name: &str, dtype: Dtype) -> Error {
    Error::file(path, format!("tensor {name:?} has type {dtype}, expected F32, F16 or BF16; convert it to F32"))
}

/// A foreign message may quote file content; keep it to one readable line.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::f16_to_f32;

    #[test]
    fn halves_widen_exactly() {
        let cases = [
            (0x0000, 0.0),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x0400, 6.103_515_6e-5),
            (0x0001, 5.960_464_5e-8),
            (0x83ff, -6.097_555e-5),
            (0x3555, 0.333_251_95),
        ];
        for (bits, value) in cases {
            assert_eq!(f16_to_f32(bits), value, "{bits:#06x}");
        }
        assert!(f16_to_f32(0x7c00).is_infinite() && f16_to_f32(0x7e00).is_nan());
        assert!(f16_to_f32(0x8000).is_sign_negative());
    }
}
