//! A Parquet file of unknown origin. The crate `parquet` believes what a file says of its own sizes, and recurses as deep as
//! its schema; so whatever it would take memory or stack for is compared with what the file can hold before it gets it.
//!
//! | claim | believed up to |
//! |--|--|
//! | length of the footer | [`MAX_FOOTER`] |
//! | elements of the schema; their children | [`MAX_FIELDS`], [`MAX_DEPTH`] deep; as many as there are elements |
//! | elements of any list of the footer | [`MAX_LIST`] |
//! | place of a column | the file |
//! | rows of a file | [`MIN_ROW_BYTES`] to each |
//! | size of a row group | [`MAX_GROUP`] |
//!
//! What pages claim is in `parquet_pages`. What the crate asserts nevertheless becomes an error ([`guarded`]).

use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

use parquet::basic::Compression;
use parquet::column::reader::{ColumnReader, get_column_reader};
use parquet::errors::ParquetError;
use parquet::file::FOOTER_SIZE;
use parquet::file::metadata::{ColumnChunkMetaData, FooterTail, ParquetMetaData, ParquetMetaDataReader};
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::schema::types::ColumnDescPtr;
use thrift::TConfiguration;
use thrift::protocol::{TCompactInputProtocol, TInputProtocol, TType};

use super::parquet_pages::{Codec, Pages};
use crate::{Error, Result, files};

/// Largest footer that is read, in bytes; in memory the elements of its lists take many times what they take there.
const MAX_FOOTER: usize = 4 << 20;
/// Most elements of a schema.
const MAX_FIELDS: usize = 1 << 10;
/// Deepest nesting of a schema.
const MAX_DEPTH: usize = 32;
/// Most elements of a list in the footer, row groups among them.
const MAX_LIST: usize = 1 << 16;
/// Fewest bytes of a file to a row: equal numbers take next to no room, but a picture does.
const MIN_ROW_BYTES: u64 = 16;
/// Largest row group that is read, in bytes.
pub(super) const MAX_GROUP: usize = 256 << 20;

/// A file with a sound footer.
pub(super) struct ParquetFile {
    path: PathBuf,
    file: Arc<File>,
    metadata: ParquetMetaData,
}

impl ParquetFile {
    /// Opens a file and reads its footer.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let no_parquet = |e: ParquetError| unreadable(path, &format!("is no Parquet file: {e}"));
        let mut file = files::open(path)?;
        let bytes = file.metadata().map_err(io)?.len();
        let Some(before_tail) = bytes.checked_sub(FOOTER_SIZE as u64) else {
            return Err(unreadable(path, "is no Parquet file: it is too short"));
        };
        let mut tail = [0; FOOTER_SIZE];
        file.seek(SeekFrom::Start(before_tail)).and_then(|_| file.read_exact(&mut tail)).map_err(io)?;
        let length = FooterTail::try_new(&tail).map_err(no_parquet)?.metadata_length();
        if length > MAX_FOOTER || length as u64 > before_tail {
            let problem =
                format!("claims a footer of {length} bytes in a file of {bytes}; at most {MAX_FOOTER} are read");
            return Err(unreadable(path, &problem));
        }
        let mut footer = vec![0; length];
        file.seek(SeekFrom::Start(before_tail - length as u64))
            .and_then(|_| file.read_exact(&mut footer))
            .map_err(io)?;
        check_footer(&footer).map_err(|problem| unreadable(path, &format!("has a bad footer: {problem}")))?;
        let metadata = ParquetMetaDataReader::decode_metadata(&footer).map_err(no_parquet)?;
        let sound = Self { path: path.to_owned(), file: Arc::new(file), metadata };
        sound.check_groups(bytes)?;
        Ok(sound)
    }

    /// Checks that all columns lie in the file, of `bytes` bytes, and that it has room for all rows.
    fn check_groups(&self, bytes: u64) -> Result<()> {
        let is_inside = |chunk: &ColumnChunkMetaData| {
            let start = chunk.dictionary_page_offset().unwrap_or(chunk.data_page_offset());
            let (start, size) = (u64::try_from(start), u64::try_from(chunk.compressed_size()));
            start.ok().zip(size.ok()).and_then(|(start, size)| start.checked_add(size)).is_some_and(|end| end <= bytes)
        };
        let mut rows = 0_u64;
        for (number, group) in self.metadata.row_groups().iter().enumerate() {
            let size = group.total_byte_size();
            if size > MAX_GROUP as i64 {
                let problem = format!(
                    "row group {number} has {size} bytes, at most {MAX_GROUP} are read; write it again in smaller ones, with \
                     `row_group_size` in pyarrow"
                );
                return Err(self.unusable(&problem));
            }
            if !group.columns().iter().all(is_inside) {
                return Err(self.unreadable(&format!("row group {number} is not within the file")));
            }
            rows = u64::try_from(group.num_rows()).map_or(u64::MAX, |more| rows.saturating_add(more));
        }
        if rows > bytes / MIN_ROW_BYTES {
            return Err(self.unreadable(&format!("claims {rows} rows in {bytes} bytes")));
        }
        Ok(())
    }

    /// The number of row groups.
    pub(super) fn groups(&self) -> usize {
        self.metadata.num_row_groups()
    }

    /// The rows of a row group, at most a [`MIN_ROW_BYTES`]th of the file's size.
    pub(super) fn rows(&self, group: usize) -> usize {
        self.metadata.row_group(group).num_rows() as usize
    }

    /// What was written into the file under a key.
    pub(super) fn value(&self, key: &str) -> Option<&str> {
        let pairs = self.metadata.file_metadata().key_value_metadata()?;
        pairs.iter().find(|pair| pair.key == key)?.value.as_deref()
    }

    /// All columns: the leaves of the schema, in the order of their numbers.
    pub(super) fn columns(&self) -> &[ColumnDescPtr] {
        self.metadata.file_metadata().schema_descr().columns()
    }

    /// A reader of a column of a row group.
    pub(super) fn reader(&self, group: usize, column: usize) -> Result<ColumnReader> {
        let group = self.metadata.row_group(group);
        let chunk = group.column(column);
        let codec = match chunk.compression() {
            Compression::UNCOMPRESSED => None,
            Compression::SNAPPY => Some(Codec::Snappy),
            Compression::GZIP(_) => Some(Codec::Gzip),
            Compression::ZSTD(_) => Some(Codec::Zstd),
            other => {
                let column = chunk.column_path().string();
                let problem = format!("has column `{column}` compressed with {other}");
                return Err(self.unusable(&format!("{problem}; write it again with Snappy, gzip, zstd or none")));
            }
        };
        // As if nothing were compressed: the crate would reserve whatever a page says it takes when it is not.
        let raw = chunk.clone().into_builder().set_compression(Compression::UNCOMPRESSED).build();
        let pages = raw
            .and_then(|raw| SerializedPageReader::new(Arc::clone(&self.file), &raw, group.num_rows() as usize, None));
        let pages = pages.map_err(|e| self.unreadable(&e.to_string()))?;
        let pages = Pages::new(pages, codec, chunk.compressed_size() as usize);
        Ok(get_column_reader(chunk.column_descr_ptr(), Box::new(pages)))
    }

    /// The error that this file cannot be read.
    pub(super) fn unreadable(&self, problem: &str) -> Error {
        unreadable(&self.path, problem)
    }

    /// The error that this file is sound but cannot be used; `problem` says what to do.
    pub(super) fn unusable(&self, problem: &str) -> Error {
        Error::file(&self.path, problem.replace('\n', " "))
    }
}

thread_local! {
    static IN_GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Does something with a file. The crate that reads it asserts what a damaged one may break; that is an error like any other,
/// and nothing but that error is printed of it.
pub(super) fn guarded<T>(file: &Path, read: impl FnOnce() -> Result<T>) -> Result<T> {
    static SILENCED: Once = Once::new();
    SILENCED.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !IN_GUARDED.get() {
                report(panic);
            }
        }));
    });
    IN_GUARDED.set(true);
    let outcome = panic::catch_unwind(AssertUnwindSafe(read));
    IN_GUARDED.set(false);
    outcome.unwrap_or_else(|_| Err(unreadable(file, "is damaged")))
}

fn unreadable(file: &Path, problem: &str) -> Error {
    Error::file(file, format!("{}; replace or remove it", problem.replace('\n', " ")))
}

/// Checks the sizes in a footer, a `FileMetaData` of Parquet's Thrift definition.
fn check_footer(footer: &[u8]) -> std::result::Result<(), String> {
    const SCHEMA: i16 = 2;
    let limits = TConfiguration::builder().max_container_size(Some(MAX_LIST)).max_string_size(Some(MAX_FOOTER)).build();
    let mut input = TCompactInputProtocol::with_config(footer, limits.map_err(|e| e.to_string())?);
    let mut check = || {
        input.read_struct_begin()?;
        loop {
            let field = input.read_field_begin()?;
            match field.field_type {
                TType::Stop => return Ok(()),
                TType::List if field.id == Some(SCHEMA) => check_schema(&mut input)?,
                _ if field.id == Some(SCHEMA) => return Err("its schema is no list".into()),
                other => input.skip(other)?,
            }
        }
    };
    // The crate's own `Display` names only the kind of the error.
    check().map_err(|e: thrift::Error| match e {
        thrift::Error::Protocol(e) => e.message,
        thrift::Error::Application(e) => e.message,
        other => other.to_string(),
    })
}

/// Checks the list of a schema's elements: the tree in depth-first order, where each one states its number of children.
fn check_schema(input: &mut impl TInputProtocol) -> thrift::Result<()> {
    const CHILDREN: i16 = 5;
    let list = input.read_list_begin()?;
    let count = list.size as usize;
    if list.element_type != TType::Struct || count > MAX_FIELDS {
        return Err(format!("{count} elements of a schema, at most {MAX_FIELDS} are read").into());
    }
    // Children still to come, of every element that the next one lies in.
    let mut open: Vec<usize> = Vec::new();
    for element in 0..count {
        let mut children = 0;
        input.read_struct_begin()?;
        loop {
            let field = input.read_field_begin()?;
            match field.field_type {
                TType::Stop => break,
                TType::I32 if field.id == Some(CHILDREN) => {
                    children = usize::try_from(input.read_i32()?).unwrap_or(usize::MAX);
                }
                _ if field.id == Some(CHILDREN) => return Err("its number of children is no number".into()),
                other => input.skip(other)?,
            }
        }
        input.read_struct_end()?;
        if children >= count - element {
            return Err(format!("element {element} of {count} of the schema has {children} children").into());
        }
        if let Some(siblings) = open.last_mut() {
            *siblings -= 1;
        }
        open.push(children);
        while open.last() == Some(&0) {
            open.pop();
        }
        if open.len() > MAX_DEPTH {
            return Err(format!("its schema is more than {MAX_DEPTH} levels deep").into());
        }
    }
    input.read_list_end()
}
