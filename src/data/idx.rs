//! The IDX format of MNIST and its relatives: a big-endian header, then bytes. Plain or gzip, told apart by content.
//!
//! The header is not believed: what it claims is compared with what the file can hold before memory is spent on it, and
//! no more is unpacked than it claims.

use std::io::{self, BufReader, Cursor, ErrorKind, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use super::dataset::ImageShape;
use crate::{Error, Result, files, memory};

const IMAGE_MAGIC: u32 = 0x0803;
const LABEL_MAGIC: u32 = 0x0801;
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// DEFLATE codes at best 258 bytes in two bits.
const DEFLATE_MAX_RATIO: u64 = 1032;
/// The largest body that is read into memory; MNIST has 47 MB, the largest EMNIST 547 MB.
const MAX_BODY: u64 = 2 << 30;
const MAX_SIDE: u64 = 1 << 14;
const AGAIN: &str = "fetch the file again";

/// Images and labels of one split, grey, `uint8` HWC.
#[derive(Debug)]
pub struct Split {
    /// Shape of an image.
    pub shape: ImageShape,
    /// One byte per pixel, image after image.
    pub pixels: Vec<u8>,
    /// One per image.
    pub labels: Vec<u32>,
}

/// Reads a pair of files; every label must be below `classes`.
pub(super) fn read_split(images: &Path, labels: &Path, classes: usize) -> Result<Split> {
    split(Stream::open(images)?, Stream::open(labels)?, classes)
}

/// Images and their labels from the bytes of two IDX files, plain or gzip; each comes with the name that messages should
/// give it. Every label must be below `classes`.
///
/// # Errors
/// Headers that claim what the bytes do not hold, a damaged archive, or a label out of range.
pub fn parse_idx(images: (&Path, &[u8]), labels: (&Path, &[u8]), classes: usize) -> Result<Split> {
    split(Stream::of_bytes(images.0, images.1)?, Stream::of_bytes(labels.0, labels.1)?, classes)
}

fn split(mut images: Stream<'_>, mut labels: Stream<'_>, classes: usize) -> Result<Split> {
    let [count, height, width] = images.header(IMAGE_MAGIC)?;
    if count == 0 || height == 0 || width == 0 {
        return Err(images.wrong(format!("holds {count} images of {height}x{width}: nothing to learn from")));
    }
    if height > MAX_SIDE || width > MAX_SIDE {
        return Err(images.wrong(format!("claims images of {height}x{width}, beyond {MAX_SIDE}; {AGAIN}")));
    }
    let [labelled] = labels.header(LABEL_MAGIC)?;
    if count != labelled {
        return Err(images.wrong(format!(
            "holds {count} images but {} holds {labelled} labels; both must come from the same split",
            labels.name.display()
        )));
    }
    let pixels = images.body(count * height * width, &format!("{count} images of {height}x{width}"))?;
    let bytes = labels.body(labelled, &format!("{labelled} labels"))?;
    if let Some((index, label)) = bytes.iter().enumerate().find(|(_, label)| usize::from(**label) >= classes) {
        return Err(labels.wrong(format!("label {label} of image {index} is out of range, 0 to {}", classes - 1)));
    }
    let shape = ImageShape { height: height as usize, width: width as usize, channels: 1 };
    Ok(Split { shape, pixels, labels: bytes.into_iter().map(u32::from).collect() })
}

/// An IDX file being read.
struct Stream<'a> {
    name: &'a Path,
    bytes: Box<dyn Read + 'a>,
    gzip: bool,
    /// More than this cannot come out, whatever the header claims.
    most: u64,
}

impl<'a> Stream<'a> {
    fn open(path: &'a Path) -> Result<Self> {
        let mut file = files::open(path)?;
        let length = file.metadata().map_err(|e| Error::io(path, e))?.len();
        let mut start = Vec::new();
        file.by_ref().take(2).read_to_end(&mut start).map_err(|e| Error::io(path, e))?;
        let gzip = start == GZIP_MAGIC;
        Ok(Self::new(path, BufReader::new(Cursor::new(start).chain(file)), gzip, length))
    }

    fn of_bytes(name: &'a Path, bytes: &'a [u8]) -> Result<Self> {
        Ok(Self::new(name, BufReader::new(bytes), bytes.starts_with(&GZIP_MAGIC), bytes.len() as u64))
    }

    fn new(name: &'a Path, reader: BufReader<impl Read + 'a>, gzip: bool, length: u64) -> Self {
        if gzip {
            let most = length.saturating_mul(DEFLATE_MAX_RATIO);
            Self { name, bytes: Box::new(MultiGzDecoder::new(reader)), gzip, most }
        } else {
            Self { name, bytes: Box::new(reader), gzip, most: length }
        }
    }

    fn wrong(&self, problem: String) -> Error {
        Error::file(self.name, problem)
    }

    /// A read that failed: a damaged archive is the file's fault, the rest the operating system's.
    fn failed(&self, error: io::Error) -> Error {
        match error.kind() {
            ErrorKind::UnexpectedEof if self.gzip => self.wrong(format!("the gzip stream is cut short; {AGAIN}")),
            ErrorKind::UnexpectedEof => self.wrong(format!("ends inside the header of an IDX file; {AGAIN}")),
            ErrorKind::InvalidData | ErrorKind::InvalidInput => {
                self.wrong(format!("the gzip stream is damaged ({error}); {AGAIN}"))
            }
            _ => Error::io(self.name, error),
        }
    }

    /// The magic number, then `N` sizes.
    fn header<const N: usize>(&mut self, magic: u32) -> Result<[u64; N]> {
        let found = self.word()?;
        if found != magic {
            let kind = |magic| match magic {
                IMAGE_MAGIC => " (images)",
                LABEL_MAGIC => " (labels)",
                _ => "",
            };
            return Err(self.wrong(format!(
                "starts with {found:#010x}{}, expected {magic:#010x}{}; is it the right file?",
                kind(found),
                kind(magic)
            )));
        }
        let mut sizes = [0; N];
        for size in &mut sizes {
            *size = u64::from(self.word()?);
        }
        Ok(sizes)
    }

    fn word(&mut self) -> Result<u32> {
        let mut word = [0; 4];
        self.bytes.read_exact(&mut word).map_err(|e| self.failed(e))?;
        Ok(u32::from_be_bytes(word))
    }

    /// The rest of the file, which must be exactly `claimed` bytes.
    fn body(&mut self, claimed: u64, what: &str) -> Result<Vec<u8>> {
        if claimed > self.most {
            return Err(self.wrong(format!(
                "the header claims {what} ({claimed} bytes) but the file cannot hold more than {}; {AGAIN}",
                self.most
            )));
        }
        if claimed > MAX_BODY {
            return Err(self.wrong(format!("the header claims {what} ({claimed} bytes); at most {MAX_BODY} are read")));
        }
        // The buffer grows with what comes, not with what is claimed. The one byte beyond shows what trails, and makes
        // the gzip reader check its checksum.
        let mut body = Vec::new();
        memory::read_to_end(self.bytes.by_ref().take(claimed + 1), &mut body).map_err(|e| self.failed(e))?;
        let came = body.len() as u64;
        if came < claimed {
            return Err(self.wrong(format!("cut short: {what} are {claimed} bytes, {came} came; {AGAIN}")));
        }
        if came > claimed {
            return Err(
                self.wrong(format!("bytes follow after {what} ({claimed} bytes), where it should end; {AGAIN}"))
            );
        }
        Ok(body)
    }
}
