//! Parts of pickles and of PyTorch's files, from which tests make their own.

use std::collections::BTreeMap;
use std::io::{Cursor, Write};

use depthshrinker::tensor::Tensor;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

pub const FLOATS: &[u8] = b"ctorch\nFloatStorage\n";
pub const REBUILD: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n";

pub fn text(s: &str) -> Vec<u8> {
    [&b"X"[..], &(s.len() as u32).to_le_bytes(), s.as_bytes()].concat()
}

pub fn int(i: u64) -> Vec<u8> {
    [&b"\x8a\x08"[..], &i.to_le_bytes()].concat()
}

pub fn ints(sizes: &[u64]) -> Vec<u8> {
    [b"(".to_vec(), sizes.iter().flat_map(|&s| int(s)).collect(), b"t".to_vec()].concat()
}

pub fn storage(class: &[u8], key: &str, len: u64) -> Vec<u8> {
    [&b"("[..], &text("storage"), class, &text(key), &text("cpu"), &int(len), b"tQ"].concat()
}

pub fn view(storage: &[u8], offset: u64, shape: &[u64], strides: &[u64]) -> Vec<u8> {
    [REBUILD, b"(", storage, &int(offset), &ints(shape), &ints(strides), b"\x89}tR"].concat()
}

/// A state dict of one tensor `w`.
pub fn dict_of(value: &[u8]) -> Vec<u8> {
    [&b"\x80\x02}"[..], &text("w"), value, b"s."].concat()
}

pub fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        zip.start_file(*name, stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// An archive of a state dict of one tensor, over a storage of 16 bytes.
pub fn zipped(value: &[u8]) -> Vec<u8> {
    archive(&[("a/data.pkl", &dict_of(value)), ("a/data/0", &[0; 16])])
}

pub fn pickled(pickle: &[u8]) -> Vec<u8> {
    archive(&[("a/data.pkl", pickle)])
}

/// Old form with this object, keys and storages.
pub fn old(object: &[u8], rest: &[u8]) -> Vec<u8> {
    let magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";
    [&magic[..], b"\x80\x02M\xe9\x03.", b"\x80\x02}.", object, rest].concat()
}

/// A state dict as PyTorch pickles it, and the storages it names, by their entries in [`archive`]; `first` is the first
/// storage's key.
pub fn state_dict(tensors: &BTreeMap<String, Tensor>, first: usize) -> (Vec<u8>, Vec<(String, Vec<u8>)>) {
    let (mut pickle, mut storages) = (b"ccollections\nOrderedDict\n)R(".to_vec(), Vec::new());
    for (key, (name, tensor)) in (first..).zip(tensors) {
        let (len, shape) = (tensor.data.len() as u64, tensor.shape.iter().map(|&d| d as u64).collect::<Vec<_>>());
        let strides: Vec<u64> = (1..=shape.len()).map(|dim| shape[dim..].iter().product()).collect();
        let own = storage(FLOATS, &key.to_string(), len);
        pickle.extend([text(name), view(&own, 0, &shape, &strides)].concat());
        storages.push((format!("a/data/{key}"), tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect()));
    }
    pickle.push(b'u');
    (pickle, storages)
}

/// A dict of the pickled values.
pub fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let entries: Vec<u8> = entries.iter().flat_map(|(key, value)| [text(key), value.clone()].concat()).collect();
    [&b"}("[..], &entries, b"u"].concat()
}

/// An archive of the pickled value, with these storages.
pub fn checkpoint(value: &[u8], storages: &[(String, Vec<u8>)]) -> Vec<u8> {
    let pickle = [b"\x80\x02", value, b"."].concat();
    let storages = storages.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()));
    archive(&[("a/data.pkl", pickle.as_slice())].into_iter().chain(storages).collect::<Vec<_>>())
}
