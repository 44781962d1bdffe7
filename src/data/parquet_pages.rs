//! The pages of a column of a Parquet file, decompressed within bounds and checked before their values are decoded.
//!
//! | claim | believed up to |
//! |--|--|
//! | size of all pages of a column when decompressed | [`RATIO`] times their size in the file or [`FREE`], at most [`MAX_GROUP`] |
//! | size of a page of Snappy | [`SNAPPY_RATIO`] times its size |
//! | window of a zstd frame | 2^[`MAX_WINDOW_LOG`] bytes |
//! | entries of a dictionary | the bytes of its page |
//!
//! Encodings whose headers claim further sizes are not read.

use std::fs::File;
use std::io::Read;

use flate2::read::MultiGzDecoder;
use parquet::basic::Encoding;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::serialized_reader::SerializedPageReader;

use super::parquet_file::MAX_GROUP;

/// What a byte of a column can become. Pictures are compressed already; columns of equal labels fit into [`FREE`].
const RATIO: usize = 64;
/// Bytes that the pages of a column may take however small they are in the file.
const FREE: usize = 8 << 20;
/// What a byte of Snappy can become: its longest copy is of 64 bytes and takes 3.
const SNAPPY_RATIO: usize = 22;
/// Largest window of a zstd frame, as a power of two: what level 19 takes, four times.
const MAX_WINDOW_LOG: u32 = 25;

/// How pages are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    Snappy,
    Gzip,
    Zstd,
}

/// The pages of a column, decompressed.
pub(super) struct Pages {
    /// Reads them as they are.
    pages: SerializedPageReader<File>,
    codec: Option<Codec>,
    /// Bytes that the pages still to come may take.
    left: usize,
}

impl Pages {
    /// The pages that `pages` reads as they are, which take `bytes` in the file.
    pub(super) fn new(pages: SerializedPageReader<File>, codec: Option<Codec>, bytes: usize) -> Self {
        Self { pages, codec, left: bytes.saturating_mul(RATIO).clamp(FREE, MAX_GROUP) }
    }
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> ParquetResult<Option<Page>> {
        let Some(mut page) = self.pages.get_next_page()? else { return Ok(None) };
        if let Some(codec) = self.codec {
            page = decompress(page, codec, self.left)?;
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

/// A page whose values were compressed, at most `most` bytes of them.
fn decompress(mut page: Page, codec: Codec, most: usize) -> ParquetResult<Page> {
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
        match codec {
            Codec::Snappy => unsnap(values, most, &mut whole)?,
            Codec::Gzip => inflate(MultiGzDecoder::new(values), most, &mut whole)?,
            Codec::Zstd => {
                let mut frames = zstd::Decoder::with_buffer(values).map_err(damaged)?;
                frames.window_log_max(MAX_WINDOW_LOG).map_err(damaged)?;
                inflate(frames, most, &mut whole)?;
            }
        }
    }
    *buf = whole.into();
    Ok(page)
}

/// Puts what Snappy compressed behind `whole`.
fn unsnap(values: &[u8], most: usize, whole: &mut Vec<u8>) -> ParquetResult<()> {
    let size = snap::raw::decompress_len(values).map_err(damaged)?;
    if size > most || size / SNAPPY_RATIO > values.len() {
        return Err(too_large(size));
    }
    let start = whole.len();
    whole.resize(start + size, 0);
    snap::raw::Decoder::new().decompress(values, &mut whole[start..]).map_err(damaged)?;
    Ok(())
}

/// Puts what `values` decompresses to behind `whole`: it grows with what comes, so that nothing needs to be claimed.
fn inflate(values: impl Read, most: usize, whole: &mut Vec<u8>) -> ParquetResult<()> {
    let read = values.take(most as u64 + 1).read_to_end(whole).map_err(damaged)?;
    if read > most {
        return Err(error(format!("holds a page of more than {most} bytes, which is more than is read")));
    }
    whole.shrink_to_fit();
    Ok(())
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

fn damaged(e: impl std::fmt::Display) -> ParquetError {
    error(format!("a page is damaged: {e}"))
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

    fn values_page(buf: Vec<u8>) -> Page {
        values(buf, Encoding::PLAIN)
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

    /// The same page in every codec, as its own writer compresses it.
    fn compressed(original: &[u8]) -> [(Codec, Vec<u8>); 3] {
        let mut gzip = Vec::new();
        flate2::read::GzEncoder::new(original, flate2::Compression::best()).read_to_end(&mut gzip).unwrap();
        [
            (Codec::Snappy, snap::raw::Encoder::new().compress_vec(original).unwrap()),
            (Codec::Gzip, gzip),
            (Codec::Zstd, zstd::encode_all(original, 3).unwrap()),
        ]
    }

    #[test]
    fn pages_are_decompressed_behind_their_levels_and_no_further_than_they_can_reach() {
        let original: Vec<u8> = (0..5000).map(|i| (i / 1000) as u8).collect();
        for (codec, compressed) in compressed(&original) {
            let page = |levels: &[u8], values: &[u8]| values_page([levels, values].concat());
            let whole = decompress(page(&[7, 8, 9], &compressed), codec, 5000).unwrap();
            assert!(whole.buffer()[..] == [&[7, 8, 9], &original[..]].concat(), "{codec:?}");
            let refused = |page: Page, most| decompress(page, codec, most).unwrap_err().to_string();
            assert!(refused(page(&[7, 8, 9], &compressed), 4999).contains("which is more than"), "{codec:?}");
            assert!(refused(page(&[7], &[]), 10).contains("amid its levels"), "{codec:?}");
            for cut in [1, compressed.len() / 2, compressed.len() - 1] {
                let told = refused(page(&[7, 8, 9], &compressed[..cut]), 5000);
                assert!(
                    told.contains("a page is damaged") || told.contains("more than it holds"),
                    "{codec:?}, {cut}: {told}"
                );
            }
            assert!(refused(page(&[7, 8, 9], b"no such thing"), 5000).contains("a page is damaged"), "{codec:?}");
            assert!(decompress(page(&[7, 8, 9], &[]), codec, 10).unwrap().buffer()[..] == [7, 8, 9], "{codec:?}");
        }
    }

    #[test]
    fn a_few_bytes_become_no_more_than_is_free() {
        // Two gigabytes in seven bytes: the length is Snappy's own first field.
        let claim = values_page(vec![7, 8, 9, 0xff, 0xff, 0xff, 0xff, 0x07, 0, 0, 0]);
        let told = decompress(claim, Codec::Snappy, usize::MAX).unwrap_err().to_string();
        assert!(told.contains("2147483647 bytes"), "{told}");
        let zeros = vec![0; FREE + 1];
        for (codec, bomb) in compressed(&zeros).into_iter().skip(1) {
            assert!(bomb.len() < FREE / 900, "{codec:?}: {}", bomb.len());
            let told = decompress(values_page([&[7, 8, 9], &bomb[..]].concat()), codec, FREE).unwrap_err().to_string();
            assert!(told.contains("more than 8388608 bytes"), "{codec:?}: {told}");
        }
        // A frame that wants a window of 64 MiB: magic number, no size, a window of 2^26.
        let window = [&[7, 8, 9][..], &[0x28, 0xb5, 0x2f, 0xfd, 0, 16 << 3, 1, 0, 0]].concat();
        let told = decompress(values_page(window), Codec::Zstd, FREE).unwrap_err().to_string();
        assert!(told.contains("memory"), "{told}");
    }
}
