//! The types of storages, by the classes that pickles name them with.

use crate::dtype::Dtype;
use crate::io::tensors::doubles;

/// How a storage's elements are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    Float(Dtype),
    Double,
    /// Of this many bytes; not read.
    Skipped(usize),
}

/// A class such as `torch.FloatStorage`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StorageClass {
    /// Without its module.
    pub name: &'static str,
    pub element: Element,
}

pub(super) const STORAGES: &[StorageClass] = &[
    class("FloatStorage", Element::Float(Dtype::F32)),
    class("HalfStorage", Element::Float(Dtype::F16)),
    class("BFloat16Storage", Element::Float(Dtype::Bf16)),
    class("DoubleStorage", Element::Double),
    class("LongStorage", Element::Skipped(8)),
    class("IntStorage", Element::Skipped(4)),
    class("ShortStorage", Element::Skipped(2)),
    class("CharStorage", Element::Skipped(1)),
    class("ByteStorage", Element::Skipped(1)),
    class("BoolStorage", Element::Skipped(1)),
    class("ComplexFloatStorage", Element::Skipped(8)),
    class("ComplexDoubleStorage", Element::Skipped(16)),
    class("QInt8Storage", Element::Skipped(1)),
    class("QUInt8Storage", Element::Skipped(1)),
    class("QInt32Storage", Element::Skipped(4)),
    class("QUInt4x2Storage", Element::Skipped(1)),
    class("QUInt2x4Storage", Element::Skipped(1)),
    // Its length is in bytes.
    class("UntypedStorage", Element::Skipped(1)),
];

const fn class(name: &'static str, element: Element) -> StorageClass {
    StorageClass { name, element }
}

impl Element {
    pub fn bytes(self) -> usize {
        match self {
            Self::Float(dtype) => dtype.bytes(),
            Self::Double => 8,
            Self::Skipped(bytes) => bytes,
        }
    }

    /// Whether its tensors are read.
    pub fn is_float(self) -> bool {
        !matches!(self, Self::Skipped(_))
    }

    /// Appends the numbers behind whole elements.
    pub fn decode(self, bytes: &[u8], out: &mut Vec<f32>) {
        match self {
            Self::Float(dtype) => {
                let start = out.len();
                out.resize(start + bytes.len() / dtype.bytes(), 0.0);
                dtype.decode(bytes, &mut out[start..]);
            }
            Self::Double => out.extend(doubles(bytes)),
            Self::Skipped(_) => {}
        }
    }
}
