//! Element types of tensors on a device.

use half::slice::HalfFloatSliceExt;
use serde::{Deserialize, Serialize};

/// The type of an activation or of a weight as kernels read it. Sums are always `f32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit IEEE 754.
    #[default]
    F32,
    /// 16-bit IEEE 754: 11 significant bits, largest number 65504.
    F16,
    /// The upper half of an `f32`: 8 significant bits, its range.
    Bf16,
}

impl Dtype {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Its name in kernels.
    pub const fn kernel_name(self) -> &'static str {
        match self {
            Self::F32 => "float",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// The distance of 1 to the next number.
    pub const fn epsilon(self) -> f64 {
        match self {
            Self::F32 => f32::EPSILON as f64,
            Self::F16 => 1.0 / 1024.0,
            Self::Bf16 => 1.0 / 128.0,
        }
    }

    /// The bytes of numbers in this type, rounded to nearest even.
    pub fn encode(self, numbers: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => numbers.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::F16 => {
                let mut out = vec![half::f16::ZERO; numbers.len()];
                out.convert_from_f32_slice(numbers);
                out.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            Self::Bf16 => {
                let mut out = vec![half::bf16::ZERO; numbers.len()];
                out.convert_from_f32_slice(numbers);
                out.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
        }
    }

    /// The numbers behind bytes of this type; there must be as many as `out` takes.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), out.len() * self.bytes(), "bytes of another number of elements");
        match self {
            Self::F32 => out
                .iter_mut()
                .zip(bytes.chunks_exact(4))
                .for_each(|(v, b)| *v = f32::from_le_bytes(b.try_into().expect("four bytes"))),
            Self::F16 => {
                out.iter_mut()
                    .zip(bytes.chunks_exact(2))
                    .for_each(|(v, b)| *v = half::f16::from_le_bytes([b[0], b[1]]).to_f32());
            }
            Self::Bf16 => {
                out.iter_mut()
                    .zip(bytes.chunks_exact(2))
                    .for_each(|(v, b)| *v = half::bf16::from_le_bytes([b[0], b[1]]).to_f32());
            }
        }
    }
}

/// `value`, or 0 where it is subnormal (closer to 0 than [`f32::MIN_POSITIVE`]), as kernels take it. Weights that are
/// written for other programs go through it: there such numbers can cost more than all the rest of a network.
pub fn flush_subnormal(value: f32) -> f32 {
    if value.is_subnormal() { 0.0 } else { value }
}

impl std::str::FromStr for Dtype {
    type Err = crate::Error;

    fn from_str(name: &str) -> crate::Result<Self> {
        let found = Self::ALL.into_iter().find(|dtype| dtype.to_string() == name);
        found.ok_or_else(|| crate::Error::Config(format!("precision = {name:?}; expected f32, f16 or bf16")))
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}
