//! PyTorch's `.pth` files: the tensors of a state dict, and nothing else.
//!
//! | form | written by | looks like |
//! |--|--|--|
//! | zip | PyTorch ≥ 1.6 | an archive of `…/data.pkl` and one stored entry `…/data/<key>` per storage |
//! | old | before 1.6, or `_use_new_zipfile_serialization=False` | five pickles, then the storages |
//!
//! In both a pickle describes the tensors: views, by offset, shape and strides, of storages named by a key. `pickle`
//! interprets it without running anything, `container` finds the storages' bytes, `view` says which of them a tensor has.

mod container;
mod pickle;
mod view;

use std::collections::BTreeMap;
use std::path::Path;

use container::Storages;
use pickle::{Pickle, Value};
use view::{Element, View};

use super::tensors::{check_name, one_line, read_bounded};
use crate::tensor::Tensor;
use crate::{Error, Result, memory};

/// What went wrong, without the path.
type Fault = String;

/// Where training scripts put the state dict, looked for in this order before the file's own top level. Averaged weights
/// come first, as in timm: they are what such a checkpoint is published for.
const NESTED: [&str; 6] = ["state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "net"];

/// Reads the tensors of a `.pth` file, all floats as `f32` (doubles are rounded); tensors of integers (such as
/// `num_batches_tracked`) are left out.
///
/// # Errors
/// A path that cannot be read, or content that is no sound file of tensors, in one line. Nothing in the file is run: a
/// pickle that names any function but those that rebuild tensors, and classes of plain data that are skipped, is refused by
/// that name.
pub fn read_torch(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    parse_torch(path, &read_bounded(path)?)
}

/// As [`read_torch`], from bytes; `path` is what messages name. Memory stays below five times the file's size and 64 MiB: a
/// pickle makes a million values at most.
///
/// # Errors
/// As [`read_torch`].
pub fn parse_torch(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Tensor>> {
    tensors(bytes).map_err(|fault| Error::file(path, one_line(&fault)))
}

fn tensors(bytes: &[u8]) -> std::result::Result<BTreeMap<String, Tensor>, Fault> {
    let (pickle, storages) = container::open(bytes)?;
    let mut out = BTreeMap::new();
    // Views may overlap and repeat, so a small file could ask for any number of elements. Every element that is not
    // shared takes at least two bytes of the file, which leaves room for all of them to be shared once.
    let mut left = bytes.len();
    for (name, view) in state_dict(&pickle)? {
        let (Element::Float(_) | Element::Double) = view.storage.element else { continue };
        check_name(name)?;
        let len = view.len().filter(|&len| len <= left).ok_or_else(|| {
            let shape = &view.shape;
            format!("{name:?} has shape {shape:?}: more numbers than the file can hold; make or download it again")
        })?;
        left -= len;
        let data = read_view(view, &storages).map_err(|fault| format!("{name:?}: {fault}"))?;
        out.insert(name.to_owned(), Tensor { shape: view.shape.clone(), data });
    }
    Ok(out)
}

/// The tensors by name: of the first nested state dict, or of the file's top level.
fn state_dict<'p, 'a>(pickle: &'p Pickle<'a>) -> std::result::Result<Vec<(&'a str, &'p View<'a>)>, Fault> {
    let tensors_of = |dict: &'p Value<'a>| -> Vec<(&'a str, &'p View<'a>)> {
        pickle
            .entries(dict)
            .filter_map(|(key, value)| match (key, value) {
                (&Value::Text(key), Value::Tensor(view)) => Some((key, &**view)),
                _ => None,
            })
            .collect()
    };
    let root = pickle.root();
    let nested = NESTED.iter().filter_map(|name| {
        pickle.entries(root).find(|(key, _)| matches!(key, Value::Text(text) if text == name)).map(|(_, value)| value)
    });
    let mut found = nested.chain([root]).map(tensors_of);
    found.find(|tensors| !tensors.is_empty()).ok_or_else(|| {
        "holds no tensors by name; save the state dict alone, `torch.save(model.state_dict(), path)`".to_owned()
    })
}

/// The numbers of a view, row-major.
fn read_view(view: &View<'_>, storages: &Storages<'_>) -> std::result::Result<Vec<f32>, Fault> {
    let storage = &view.storage;
    let bytes = storages.get(storage.key).ok_or_else(|| format!("its storage {:?} is missing", storage.key))?;
    let element = storage.element.bytes();
    let beyond = || format!("shape {:?} reaches beyond its storage of {} numbers", view.shape, storage.len);
    let end = view.end().filter(|&end| end <= storage.len).ok_or_else(beyond)?;
    if end.checked_mul(element).is_none_or(|end| end > bytes.len()) {
        return Err(beyond());
    }
    let mut out = memory::room(view.len().unwrap_or(0), "the numbers of a tensor").map_err(|e| e.to_string())?;
    if view.is_contiguous() {
        let from = view.offset.min(end);
        storage.element.decode(&bytes[from * element..end * element], &mut out);
        return Ok(out);
    }
    view.for_each_offset(|at| storage.element.decode(&bytes[at * element..(at + 1) * element], &mut out));
    Ok(out)
}
