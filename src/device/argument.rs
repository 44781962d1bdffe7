//! Arguments of kernels: numbers, structs and pointers, each with its type, so that launches can be checked.

use std::fmt;

use super::driver::Address;
use crate::dtype::Dtype;

/// Size of the largest argument in words.
const WORDS: usize = 7;

/// The type that a pointer points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// A number in one of the types of tensors.
    Number(Dtype),
    /// `double`.
    F64,
    /// `int`.
    I32,
    /// `unsigned char`.
    U8,
    /// `unsigned`.
    U32,
    /// `unsigned long long`.
    U64,
    /// A struct by its name in kernels, and its bytes.
    Struct(&'static str, usize),
}

impl Element {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Self::Number(dtype) => dtype.bytes(),
            Self::U8 => 1,
            Self::I32 | Self::U32 => 4,
            Self::F64 | Self::U64 => 8,
            Self::Struct(_, bytes) => bytes,
        }
    }
}

/// The type of an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `int`.
    I32,
    /// `long long`.
    I64,
    /// `unsigned`.
    U32,
    /// `unsigned long long`.
    U64,
    /// `float`.
    F32,
    /// `double`.
    F64,
    /// A struct by its name in kernels, and its bytes; 0 where a signature does not know them.
    Struct(&'static str, usize),
    /// A pointer, and whether the kernel may write through it. It points to anything where that is not known, as a null
    /// pointer does.
    Pointer {
        /// What it points to.
        to: Option<Element>,
        /// Whether it may be written through.
        writable: bool,
    },
}

impl Kind {
    /// Whether an argument of this type can be given where `expected` is.
    pub fn fits(self, expected: Self) -> bool {
        match (self, expected) {
            (Self::Struct(a, _), Self::Struct(b, _)) => a == b,
            (Self::Pointer { to, writable }, Self::Pointer { to: expected, writable: written }) => {
                let same = match (to, expected) {
                    (Some(Element::Struct(a, _)), Some(Element::Struct(b, _))) => a == b,
                    (Some(to), Some(expected)) => to == expected,
                    _ => true,
                };
                same && (writable || !written)
            }
            _ => self == expected,
        }
    }

    /// The same for `kernels/emulator/launch.h`: see `Code` there.
    pub(super) fn code(self) -> u32 {
        let element = |to: Element| match to {
            Element::Number(Dtype::F32) => 1,
            Element::F64 => 2,
            Element::I32 => 3,
            Element::U32 => 4,
            Element::U64 => 6,
            Element::U8 => 7,
            Element::Number(Dtype::F16) => 8,
            Element::Number(Dtype::Bf16) => 9,
            Element::Struct(_, bytes) => 10 | (bytes as u32) << 16,
        };
        match self {
            Self::F32 => 1,
            Self::F64 => 2,
            Self::I32 => 3,
            Self::U32 => 4,
            Self::I64 => 5,
            Self::U64 => 6,
            Self::Struct(name, bytes) => element(Element::Struct(name, bytes)),
            Self::Pointer { to, writable } => 0x100 | u32::from(writable) << 9 | to.map_or(0, element),
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Number(dtype) => dtype.kernel_name(),
            Self::F64 => "double",
            Self::I32 => "int",
            Self::U8 => "u8",
            Self::U32 => "u32",
            Self::U64 => "u64",
            Self::Struct(name, _) => name,
        })
    }
}

/// The spelling in kernels.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::I32 => f.write_str("int"),
            Self::I64 => f.write_str("long long"),
            Self::U32 => f.write_str("u32"),
            Self::U64 => f.write_str("u64"),
            Self::F32 => f.write_str("float"),
            Self::F64 => f.write_str("double"),
            Self::Struct(name, _) => f.write_str(name),
            Self::Pointer { to, writable } => {
                let constant = if *writable { "" } else { "const " };
                match to {
                    Some(to) => write!(f, "{constant}{to}*"),
                    None => write!(f, "{constant}void*"),
                }
            }
        }
    }
}

/// One argument of a kernel: its bytes and its type.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Argument {
    words: [u64; WORDS],
    kind: Kind,
}

impl Argument {
    fn new(bytes: &[u8], kind: Kind) -> Self {
        let mut words = [0u64; WORDS];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Self { words, kind }
    }

    /// A struct under its name in kernels.
    ///
    /// # Panics
    /// When it is larger than any argument.
    pub fn of_struct<T: bytemuck::Pod>(name: &'static str, value: &T) -> Self {
        Self::new(bytemuck::bytes_of(value), Kind::Struct(name, size_of::<T>()))
    }

    /// A pointer to elements that the kernel reads, or writes too if `writable`.
    pub fn pointer(at: Address, to: Element, writable: bool) -> Self {
        Self::new(&at.to_ne_bytes(), Kind::Pointer { to: Some(to), writable })
    }

    /// The null pointer, where a kernel says that it takes one.
    pub fn null() -> Self {
        Self::new(&[0; size_of::<Address>()], Kind::Pointer { to: None, writable: true })
    }

    /// An address that comes as a number, as a pointer to an element that is read, or the null pointer; a pointer stays.
    pub fn into_pointer(self, to: Element) -> Self {
        match self.kind {
            Kind::U64 if self.words[0] == 0 => Self::null(),
            Kind::U64 => Self::pointer(self.words[0], to, false),
            _ => self,
        }
    }

    /// Its type.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where it points to, if it is a pointer and not the null pointer.
    pub(super) fn address(&self) -> Option<Address> {
        let is_pointer = matches!(self.kind, Kind::Pointer { .. });
        Some(self.words[0]).filter(|at| is_pointer && *at != 0)
    }

    /// Whether it is the null pointer.
    pub fn is_null(&self) -> bool {
        matches!(self.kind, Kind::Pointer { .. }) && self.words[0] == 0
    }

    /// Pointer to its bytes, as launches take them.
    pub(super) fn bytes(&self) -> *mut std::ffi::c_void {
        std::ptr::from_ref(&self.words).cast_mut().cast()
    }
}

macro_rules! arguments {
    ($($type:ty => $kind:ident),*) => {$(
        impl From<$type> for Argument {
            fn from(value: $type) -> Self {
                Self::new(&value.to_ne_bytes(), Kind::$kind)
            }
        }
    )*};
}
arguments!(i32 => I32, i64 => I64, u32 => U32, u64 => U64, f32 => F32, f64 => F64);
