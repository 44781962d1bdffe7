//! PyTorch's `.pth` files: the tensors of a state dict, and nothing else.
//!
//! | form | written by | looks like |
//! |--|--|--|
//! | zip | PyTorch ≥ 1.6 | an archive of `…/data.pkl` and one stored entry `…/data/<key>` per storage |
//! | old | before 1.6, or `_use_new_zipfile_serialization=False` | five pickles, then the storages |
//!
//! In both a pickle describes the tensors: views, by offset, shape and strides, of storages named by a key. `pickle`
//! interprets it without running anything, `choice` finds the state dict in it, `container` the storages' bytes, and `view`
//! says which of them a tensor has.

mod choice;
mod container;
mod pickle;
mod storage_class;
mod view;

use std::collections::BTreeMap;
use std::path::Path;

use choice::StateDict;
use container::Storages;
use view::View;

use super::tensors::{check_name, one_line, read_bounded};
use crate::tensor::Tensor;
use crate::{Error, Result, memory};

/// What went wrong, without the path.
type Fault = String;

/// The tensors of a `.pth` file.
#[derive(Debug, Clone, PartialEq)]
pub struct TorchFile {
    /// Tensors by name, as laid out in the file.
    pub tensors: BTreeMap<String, Tensor>,
    /// Which of the file's dicts they are, by its key, such as `state_dict_ema`, and by those of the dicts around it;
    /// empty where they are the file itself.
    pub part: String,
}

/// Reads the tensors of a `.pth` file, all floats as `f32` (doubles are rounded); tensors of integers (such as
/// `num_batches_tracked`) are left out.
///
/// # Errors
/// A path that cannot be read, or content that is no sound file of tensors, in one line. Nothing in the file is run: what
/// is no tensor is skipped, and where no tensors are left the message says what the file holds instead.
pub fn read_torch(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    parse_torch(path, &read_bounded(path)?)
}

/// As [`read_torch`], from bytes; `path` is what messages name. Memory stays below five times the file's size and 64 MiB: a
/// pickle makes a million values at most.
///
/// # Errors
/// As [`read_torch`].
pub fn parse_torch(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Tensor>> {
    Ok(parse_torch_file(path, bytes)?.tensors)
}

/// As [`parse_torch`], with which of the file's dicts the tensors are.
///
/// # Errors
/// As [`read_torch`].
pub fn parse_torch_file(path: &Path, bytes: &[u8]) -> Result<TorchFile> {
    file(bytes).map_err(|fault| Error::file(path, one_line(&fault)))
}

fn file(bytes: &[u8]) -> std::result::Result<TorchFile, Fault> {
    let (pickle, storages) = container::open(bytes)?;
    let StateDict { tensors: views, part } = choice::state_dict(&pickle)?;
    let mut tensors = BTreeMap::new();
    // Views may overlap and repeat, so a small file could ask for any number of elements. Every element that is not
    // shared takes at least two bytes of the file, which leaves room for all of them to be shared once.
    let mut left = bytes.len();
    for (name, view) in views {
        check_name(name)?;
        let len = view.len().filter(|&len| len <= left).ok_or_else(|| {
            let shape = &view.shape;
            format!("{name:?} has shape {shape:?}: more numbers than the file can hold; make or download it again")
        })?;
        left -= len;
        let data = read_view(view, &storages).map_err(|fault| format!("{name:?}: {fault}"))?;
        tensors.insert(name.to_owned(), Tensor { shape: view.shape.clone(), data });
    }
    Ok(TorchFile { tensors, part })
}

/// The numbers of a view, row-major.
fn read_view(view: &View<'_>, storages: &Storages<'_>) -> std::result::Result<Vec<f32>, Fault> {
    let storage = &view.storage;
    let bytes = storages.get(storage.key).ok_or_else(|| format!("its storage {:?} is missing", storage.key))?;
    let element = storage.class.element;
    let beyond = || format!("shape {:?} reaches beyond its storage of {} numbers", view.shape, storage.len);
    let end = view.end().filter(|&end| end <= storage.len).ok_or_else(beyond)?;
    if end.checked_mul(element.bytes()).is_none_or(|end| end > bytes.len()) {
        return Err(beyond());
    }
    let mut out = memory::room(view.len().unwrap_or(0), "the numbers of a tensor").map_err(|e| e.to_string())?;
    if view.is_contiguous() {
        let from = view.offset.min(end);
        element.decode(&bytes[from * element.bytes()..end * element.bytes()], &mut out);
        return Ok(out);
    }
    view.for_each_offset(|at| element.decode(&bytes[at * element.bytes()..(at + 1) * element.bytes()], &mut out));
    Ok(out)
}
