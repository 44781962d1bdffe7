//! What a file is that is none of those that are read here, seen from its first bytes: messages say what to do with it
//! instead of what is wrong with it.

use std::path::Path;

use crate::{Error, Result};

/// What a file is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A model of this program.
    Model,
    /// Another project's weights.
    Weights,
    /// Images as numbers.
    Images,
}

/// A kind of file.
struct Kind {
    what: &'static str,
    is: fn(&[u8]) -> bool,
    /// What to do where a model was expected, where weights were, and where images were; `None` where it can be read.
    remedies: [Option<&'static str>; 3],
}

const SAVE_WEIGHTS: Option<&str> =
    Some("save the network's weights with `torch.save(model.state_dict(), path)` and import those");
const SAVE_IMAGES: Option<&str> = Some("save the images with `safetensors.torch.save_file({'input': images}, path)`");
const SAVE_ARRAY: Option<&str> = Some("save the images with `safetensors.numpy.save_file({'input': images}, path)`");
const UNPACK: Option<&str> = Some("unpack it and give the file within");
const FETCH: Option<&str> = Some("fetch the file itself with `git lfs pull`");
const DOWNLOAD: Option<&str> = Some("download the file itself; its link is another one than that of the page about it");
const IMPORT: &str = "make a model of it first with `depthshrinker import NET FILE -o MODEL`";

const KINDS: [Kind; 11] = [
    Kind {
        what: "a zip archive, as PyTorch writes",
        is: |b| b.starts_with(b"PK\x03\x04"),
        remedies: [Some(IMPORT), None, SAVE_IMAGES],
    },
    Kind {
        what: "a file of PyTorch's",
        is: |b| b.starts_with(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."),
        remedies: [Some(IMPORT), None, SAVE_IMAGES],
    },
    Kind {
        what: "a pickle that PyTorch did not write",
        is: |b| matches!(b, [0x80, 2..=5, ..]),
        remedies: [SAVE_WEIGHTS, SAVE_WEIGHTS, SAVE_IMAGES],
    },
    Kind {
        what: "an ONNX file, which is written here and not read",
        is: is_onnx,
        remedies: [
            Some("give the model file that it was exported from, or import the weights that it was made of"),
            SAVE_WEIGHTS,
            SAVE_IMAGES,
        ],
    },
    Kind {
        what: "a NumPy array",
        is: |b| b.starts_with(b"\x93NUMPY"),
        remedies: [SAVE_WEIGHTS, SAVE_WEIGHTS, SAVE_ARRAY],
    },
    Kind {
        what: "a file of HDF5, as Keras writes",
        is: |b| b.starts_with(b"\x89HDF\r\n\x1a\n"),
        remedies: [SAVE_WEIGHTS, SAVE_WEIGHTS, SAVE_ARRAY],
    },
    Kind {
        what: "a picture",
        is: |b| b.starts_with(b"\xff\xd8\xff") || b.starts_with(b"\x89PNG\r\n\x1a\n"),
        remedies: [
            Some("give the model file first and pictures behind it"),
            SAVE_WEIGHTS,
            Some("give pictures without --input"),
        ],
    },
    Kind { what: "a gzip archive", is: |b| b.starts_with(b"\x1f\x8b"), remedies: [UNPACK; 3] },
    Kind { what: "a tar archive", is: |b| b.get(257..262) == Some(b"ustar"), remedies: [UNPACK; 3] },
    Kind {
        what: "a pointer of Git LFS, not the file",
        is: |b| b.starts_with(b"version https://git-lfs"),
        remedies: [FETCH; 3],
    },
    Kind {
        what: "a web page",
        is: |b| {
            let start: Vec<u8> = b.iter().take(14).map(u8::to_ascii_lowercase).collect();
            start.starts_with(b"<!doctype html") || start.starts_with(b"<html")
        },
        remedies: [DOWNLOAD; 3],
    },
];

/// Its message begins with a field for the version of the format, a small number, and another field follows.
fn is_onnx(bytes: &[u8]) -> bool {
    // Producer, its version, domain, model version, text, graph, operator sets.
    const FIELDS: [u8; 7] = [0x12, 0x1a, 0x22, 0x28, 0x32, 0x3a, 0x42];
    matches!(bytes, [0x08, 1..=32, field, ..] if FIELDS.contains(field))
}

/// Refuses a file of a kind that cannot be read for this purpose; all that are not known pass.
///
/// # Errors
/// What the file is and what to do with it.
pub(crate) fn refuse(path: &Path, bytes: &[u8], purpose: Purpose) -> Result<()> {
    let Some(kind) = KINDS.iter().find(|kind| (kind.is)(bytes)) else { return Ok(()) };
    match kind.remedies[purpose as usize] {
        Some(remedy) => Err(Error::file(path, format!("is {}; {remedy}", kind.what))),
        None => Ok(()),
    }
}
