//! The two containers of a `.pth` file: where its pickle and the bytes of its storages lie.

use std::collections::HashMap;
use std::io::{self, Cursor};

use zip::{CompressionMethod, ZipArchive};

use super::Fault;
use super::pickle::{Pickle, Value};
use super::view::Storage;

const ZIP_MAGIC: &[u8] = b"PK\x03\x04";
/// Little-endian bytes of 0x1950a86a20f9469cfc6c, the first pickle of the old form.
const OLD_MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const OLD_PROTOCOL: i64 = 1001;
const PICKLE: &str = "data.pkl";
const AGAIN: &str = "make or download it again";

type Outcome<T> = Result<T, Fault>;

/// The bytes of each storage by its key.
pub(super) type Storages<'a> = HashMap<&'a str, &'a [u8]>;

/// The pickle of a file and the storages it names.
pub(super) fn open(bytes: &[u8]) -> Outcome<(Pickle<'_>, Storages<'_>)> {
    if bytes.starts_with(ZIP_MAGIC) {
        return Archive::open(bytes)?.read();
    }
    let not_torch = || {
        "is no file of PyTorch's, neither zip nor the old form; give a .pth of `torch.save(model.state_dict(), path)` or \
         a .safetensors file"
            .to_owned()
    };
    let (first, length) = Pickle::read(bytes).map_err(|_| not_torch())?;
    if *first.value(first.root()) != Value::Long(&OLD_MAGIC) {
        return Err(not_torch());
    }
    read_old(&bytes[length..])
}

/// The old form behind its magic number: protocol, system, the object, its storages' keys, and each storage as a
/// little-endian `u64` count and its elements.
fn read_old(mut rest: &[u8]) -> Outcome<(Pickle<'_>, Storages<'_>)> {
    let protocol = next(&mut rest)?;
    if *protocol.value(protocol.root()) != Value::Int(OLD_PROTOCOL) {
        return Err(format!("has a protocol other than {OLD_PROTOCOL}; load it with PyTorch and save it again"));
    }
    // A system of the other byte order has never been met; its sizes would be refused below.
    next(&mut rest)?;
    let object = next(&mut rest)?;
    let keys = next(&mut rest)?;
    let mut storages = Storages::new();
    for key in keys.items(keys.root()) {
        let &Value::Text(key) = key else { return Err(format!("names a storage by what is no text; {AGAIN}")) };
        let Some(&storage) = object.storages.get(key) else {
            return Err(format!(
                "has a storage {key:?} that no tensor of a known type uses, so its length is not known; save the state dict \
                 alone, `torch.save(model.state_dict(), path)`"
            ));
        };
        let (count, behind) =
            rest.split_first_chunk().ok_or_else(|| format!("ends before the storage {key:?}; {AGAIN}"))?;
        check_length(&storage, u64::from_le_bytes(*count), "elements", storage.len as u64)?;
        let length = storage.len.checked_mul(storage.class.element.bytes());
        let (bytes, behind) = length
            .and_then(|length| behind.split_at_checked(length))
            .ok_or_else(|| format!("ends within the storage {key:?} of {} elements; {AGAIN}", storage.len))?;
        storages.insert(storage.key, bytes);
        rest = behind;
    }
    Ok((object, storages))
}

/// Takes one pickle from the front.
fn next<'a>(rest: &mut &'a [u8]) -> Outcome<Pickle<'a>> {
    let (pickle, length) = Pickle::read(rest)?;
    *rest = &rest[length..];
    Ok(pickle)
}

fn check_length(storage: &Storage<'_>, found: u64, unit: &str, expected: u64) -> Outcome<()> {
    if found == expected {
        return Ok(());
    }
    Err(format!("its storage {:?} has {found} {unit}, its pickle says {expected}; {AGAIN}", storage.key))
}

/// The zip form. Entries are stored, so their bytes are slices of the file.
struct Archive<'a> {
    bytes: &'a [u8],
    zip: ZipArchive<Cursor<&'a [u8]>>,
    /// What the names of all entries begin with, such as `archive/`.
    prefix: String,
}

impl<'a> Archive<'a> {
    fn open(bytes: &'a [u8]) -> Outcome<Self> {
        let zip = ZipArchive::new(Cursor::new(bytes)).map_err(|e| format!("is a damaged zip archive: {e}; {AGAIN}"))?;
        let prefix = zip
            .file_names()
            .filter_map(Result::ok)
            .find_map(|name| {
                name.strip_suffix(PICKLE).filter(|prefix| prefix.is_empty() || prefix.ends_with('/')).map(str::to_owned)
            })
            .ok_or("is a zip archive without a data.pkl, so it is no file of PyTorch's")?;
        Ok(Self { bytes, zip, prefix })
    }

    fn read(mut self) -> Outcome<(Pickle<'a>, Storages<'a>)> {
        let big_endian = self.entry("byteorder").is_ok_and(|order| order == b"big");
        if big_endian {
            return Err("was written on a big-endian machine; load it with PyTorch and save it again".into());
        }
        let (pickle, _) = Pickle::read(self.entry(PICKLE)?)?;
        let mut storages = Storages::new();
        // Entries of a sound archive do not overlap, so together they are no longer than the file.
        let mut left = self.bytes.len();
        for (&key, storage) in &pickle.storages {
            let bytes = self.entry(&format!("data/{key}"))?;
            left = left.checked_sub(bytes.len()).ok_or_else(|| format!("has entries that overlap; {AGAIN}"))?;
            let expected = (storage.len as u64).saturating_mul(storage.class.element.bytes() as u64);
            check_length(storage, bytes.len() as u64, "bytes", expected)?;
            storages.insert(key, bytes);
        }
        Ok((pickle, storages))
    }

    /// The bytes of an entry whose checksum holds.
    fn entry(&mut self, name: &str) -> Outcome<&'a [u8]> {
        let bad = |problem: &str| format!("its entry {name:?} {problem}; {AGAIN}");
        let full_name = format!("{}{name}", self.prefix);
        let mut entry = self.zip.by_name(&full_name).map_err(|e| bad(&format!("cannot be read: {e}")))?;
        if entry.compression() != CompressionMethod::Stored
            || entry.encrypted()
            || entry.size() != entry.compressed_size()
        {
            return Err(bad("is compressed or encrypted, which PyTorch never does"));
        }
        let range = entry.data_start().and_then(|start| {
            let (start, size) = (usize::try_from(start).ok()?, usize::try_from(entry.size()).ok()?);
            Some(start..start.checked_add(size)?)
        });
        let slice = range.and_then(|range| self.bytes.get(range)).ok_or_else(|| bad("reaches beyond the file"))?;
        // Reading to the end is what checks the sum.
        io::copy(&mut entry, &mut io::sink()).map_err(|e| bad(&format!("is damaged: {e}")))?;
        Ok(slice)
    }
}
