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
//! | size of a page when decompressed | [`SNAPPY_RATIO`] times its size, [`MAX_GROUP`] for all pages of a column |
//! | entries of a dictionary | the bytes of its page |
//!
//! Encodings whose headers claim further sizes are not read. What the crate asserts nevertheless becomes an error
//! ([`guarded`]).

use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

use parquet::basic::{Compression, Encoding};
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::column::reader::{ColumnReader, get_column_reader};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::FOOTER_SIZE;
use parquet::file::metadata::{ColumnChunkMetaData, FooterTail, ParquetMetaData, ParquetMetaDataReader};
use parquet::file::serialized_reader::SerializedPageReader;
use thrift::TConfiguration;
use thrift::protocol::{TCompactInputProtocol, TInputProtocol, TType};

use crate::{Error, Result};

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
const MAX_GROUP: usize = 256 << 20;
/// What a byte can become: Snappy's longest copy is of 64 bytes and takes 3.
const SNAPPY_RATIO: usize = 22;

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
        let mut file = File::open(path).map_err(io)?;
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
                let problem = format!("row group {number} has {size} bytes, at most {MAX_GROUP} are read");
                return Err(self.unreadable(&problem));
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

    /// The number of a column; `None` if there is none with this path.
    pub(super) fn column(&self, path: &str) -> Option<usize> {
        let columns = self.metadata.file_metadata().schema_descr().columns();
        columns.iter().position(|column| column.path().string() == path)
    }

    /// A reader of a column of a row group.
    pub(super) fn reader(&self, group: usize, column: usize) -> Result<ColumnReader> {
        let group = self.metadata.row_group(group);
        let chunk = group.column(column);
        let snappy = match chunk.compression() {
            Compression::UNCOMPRESSED => false,
            Compression::SNAPPY => true,
            other => return Err(self.unreadable(&format!("is compressed with {other}; Snappy's and none are read"))),
        };
        // As if nothing were compressed: the crate would reserve whatever a page says it takes when it is not.
        let raw = chunk.clone().into_builder().set_compression(Compression::UNCOMPRESSED).build();
        let pages = raw
            .and_then(|raw| SerializedPageReader::new(Arc::clone(&self.file), &raw, group.num_rows() as usize, None));
        let pages = pages.map_err(|e| self.unreadable(&e.to_string()))?;
        Ok(get_column_reader(chunk.column_descr_ptr(), Box::new(Pages { pages, snappy, left: MAX_GROUP })))
    }

    /// The error that this file cannot be read.
    pub(super) fn unreadable(&self, problem: &str) -> Error {
        unreadable(&self.path, problem)
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

/// The pages of a column, decompressed.
struct Pages {
    /// Reads them as they are.
    pages: SerializedPageReader<File>,
    snappy: bool,
    /// Bytes that the pages still to come may take.
    left: usize,
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> ParquetResult<Option<Page>> {
        let Some(mut page) = self.pages.get_next_page()? else { return Ok(None) };
        if self.snappy {
            page = decompress(page, self.left)?;
        }
        let bytes = page.buffer().len();
        self.left = self.left.checked_sub(bytes).ok_or_else(|| too_large(bytes))?;
        check_page(&page)?;
        Ok(Some(page))
    }

    fn peek_next_page(&mut self) -> ParquetResult<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> ParquetResult<()> {
        self.pages.skip_next_page()
    }
}

impl Iterator for Pages {
    type Item = ParquetResult<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

/// A page whose values Snappy compressed, at most `most` bytes of them.
fn decompress(mut page: Page, most: usize) -> ParquetResult<Page> {
    // The levels of the second version are stored as they are, before the values.
    let levels = match &page {
        Page::DataPageV2 { is_compressed: false, .. } => return Ok(page),
        Page::DataPageV2 { def_levels_byte_len, rep_levels_byte_len, .. } => {
            *def_levels_byte_len as usize + *rep_levels_byte_len as usize
        }
        Page::DataPage { .. } | Page::DictionaryPage { .. } => 0,
    };
    let (Page::DataPage { buf, .. } | Page::DataPageV2 { buf, .. } | Page::DictionaryPage { buf, .. }) = &mut page;
    let (levels, values) = buf.split_at_checked(levels).ok_or_else(|| error("a page ends amid its levels"))?;
    let mut whole = levels.to_vec();
    if !values.is_empty() {
        let damaged = |e: snap::Error| error(format!("a page is damaged: {e}"));
        let size = snap::raw::decompress_len(values).map_err(damaged)?;
        if size > most || size / SNAPPY_RATIO > values.len() {
            return Err(too_large(size));
        }
        whole.resize(levels.len() + size, 0);
        snap::raw::Decoder::new().decompress(values, &mut whole[levels.len()..]).map_err(damaged)?;
    }
    *buf = whole.into();
    Ok(page)
}

/// Refuses what would make the decoders of values take more memory than the page.
fn check_page(page: &Page) -> ParquetResult<()> {
    /// The least that an entry of a dictionary takes: the length of one that is empty.
    const MIN_ENTRY: usize = size_of::<u32>();
    match page {
        Page::DictionaryPage { buf, num_values, .. } if *num_values as usize > buf.len() / MIN_ENTRY => {
            Err(error(format!("claims a dictionary of {num_values} entries in {} bytes", buf.len())))
        }
        Page::DataPage { encoding, .. } | Page::DataPageV2 { encoding, .. } => match encoding {
            Encoding::PLAIN | Encoding::PLAIN_DICTIONARY | Encoding::RLE_DICTIONARY | Encoding::DELTA_BINARY_PACKED => {
                Ok(())
            }
            other => Err(error(format!("has values in the encoding {other}, which is not read"))),
        },
        Page::DictionaryPage { .. } => Ok(()),
    }
}

fn too_large(size: usize) -> ParquetError {
    error(format!("claims a page of {size} bytes, which is more than it holds or more than is read"))
}

fn error(problem: impl Into<String>) -> ParquetError {
    ParquetError::General(problem.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dictionary(buf: Vec<u8>, num_values: u32) -> Page {
        Page::DictionaryPage { buf: buf.into(), num_values, encoding: Encoding::PLAIN, is_sorted: false }
    }

    fn values(buf: Vec<u8>, encoding: Encoding) -> Page {
        let (def_levels_byte_len, rep_levels_byte_len) = (2, 1);
        Page::DataPageV2 {
            buf: buf.into(),
            num_values: 4,
            encoding,
            num_nulls: 0,
            num_rows: 4,
            def_levels_byte_len,
            rep_levels_byte_len,
            is_compressed: true,
            statistics: None,
        }
    }

    #[test]
    fn a_dictionary_has_no_more_entries_than_its_page_has_room_for() {
        check_page(&dictionary(vec![0; 40], 10)).unwrap();
        let refused = check_page(&dictionary(vec![0; 40], u32::MAX)).unwrap_err().to_string();
        assert!(refused.contains("4294967295 entries in 40 bytes"), "{refused}");
    }

    #[test]
    fn encodings_that_claim_sizes_of_their_own_are_not_read() {
        check_page(&values(Vec::new(), Encoding::PLAIN)).unwrap();
        for encoding in [Encoding::DELTA_LENGTH_BYTE_ARRAY, Encoding::DELTA_BYTE_ARRAY, Encoding::BYTE_STREAM_SPLIT] {
            let refused = check_page(&values(Vec::new(), encoding)).unwrap_err().to_string();
            assert!(refused.contains(&encoding.to_string()), "{refused}");
        }
    }

    #[test]
    fn pages_are_decompressed_behind_their_levels_and_no_further_than_they_can_reach() {
        let original: Vec<u8> = (0..5000).map(|i| (i / 1000) as u8).collect();
        let compressed = snap::raw::Encoder::new().compress_vec(&original).unwrap();
        let page = |levels: &[u8]| values([levels, &compressed].concat(), Encoding::PLAIN);
        let whole = decompress(page(&[7, 8, 9]), 5000).unwrap();
        assert!(whole.buffer()[..] == [&[7, 8, 9], &original[..]].concat());
        let refused = |page: Page, most: usize| decompress(page, most).unwrap_err().to_string();
        assert!(refused(page(&[7, 8, 9]), 4999).contains("5000 bytes"));
        // Two gigabytes in seven bytes: the length is Snappy's own first field.
        let claim = values(vec![7, 8, 9, 0xff, 0xff, 0xff, 0xff, 0x07, 0, 0, 0], Encoding::PLAIN);
        assert!(refused(claim, usize::MAX).contains("2147483647 bytes"));
        assert!(refused(values(vec![7], Encoding::PLAIN), 10).contains("amid its levels"));
    }
}
