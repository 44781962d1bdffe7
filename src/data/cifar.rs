//! CIFAR-10 and CIFAR-100 in their binary version: records of label bytes and 3072 pixels, one colour plane after
//! another.

use std::io::Read;
use std::path::Path;

use super::dataset::{Data, Dataset, ImageShape, Normalisation};
use super::locate::{Place, VARIABLE, locate};
use crate::{Error, Result, files, memory};

const SIDE: usize = 32;
const PLANE: usize = SIDE * SIDE;
const SHAPE: ImageShape = ImageShape { height: SIDE, width: SIDE, channels: 3 };
/// The largest file of either set has 154 MB.
const MAX_FILE: u64 = 1 << 30;

const CLASSES_10: [&str; 10] =
    ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];
const FORMAT_10: Format = Format { label_bytes: 1, classes: 10, per_file: [10_000, 10_000] };
const TRAIN_10: [&str; 5] =
    ["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"];

/// How the records of one of the two sets look.
struct Format {
    /// Label bytes before the pixels; the last one is the class.
    label_bytes: usize,
    classes: usize,
    /// Images per file as published; another count is allowed, with a warning.
    per_file: [usize; 2],
}

/// CIFAR-10: 50 000 training and 10 000 test images of 32x32x3.
pub(super) fn open_cifar10(dir: Option<&Path>) -> Result<Data> {
    let place = Place {
        set: "cifar10",
        folders: &["cifar-10-batches-bin", "cifar10"],
        system: None,
        wanted: "data_batch_1.bin",
        remedy: "give the folder of the unpacked cifar-10-binary.tar.gz (the binary version) with --data-dir",
    };
    let folder = locate(&place, dir, std::env::var_os(VARIABLE), |folder| folder.join("data_batch_1.bin").is_file())?;
    let normalisation = Normalisation::new([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]);
    FORMAT_10.open(
        place.set,
        &folder,
        &TRAIN_10,
        "test_batch.bin",
        CLASSES_10.map(str::to_owned).to_vec(),
        normalisation,
    )
}

/// The pixels, `uint8` HWC, and labels of one file of CIFAR-10; `path` is what messages name.
///
/// # Errors
/// Bytes that are no whole records, or a label beyond 9.
pub fn parse_cifar10(path: &Path, bytes: &[u8]) -> Result<(Vec<u8>, Vec<u32>)> {
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    FORMAT_10.parse(path, bytes, FORMAT_10.per_file[0], &mut pixels, &mut labels)?;
    Ok((pixels, labels))
}

/// CIFAR-100 with its fine labels: 50 000 training and 10 000 test images of 32x32x3.
pub(super) fn open_cifar100(dir: Option<&Path>) -> Result<Data> {
    let place = Place {
        set: "cifar100",
        folders: &["cifar-100-binary", "cifar100"],
        system: None,
        wanted: "train.bin",
        remedy: "give the folder of the unpacked cifar-100-binary.tar.gz (the binary version) with --data-dir",
    };
    let folder = locate(&place, dir, std::env::var_os(VARIABLE), |folder| folder.join("train.bin").is_file())?;
    let format = Format { label_bytes: 2, classes: 100, per_file: [50_000, 10_000] };
    let normalisation = Normalisation::new([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]);
    let names = fine_label_names(&folder, format.classes);
    format.open(place.set, &folder, &["train.bin"], "test.bin", names, normalisation)
}

/// The names that come with the set; numbers where the list is missing or is not one of `classes` names.
fn fine_label_names(folder: &Path, classes: usize) -> Vec<String> {
    let path = folder.join("fine_label_names.txt");
    let text = read_capped(&path).ok().and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default();
    let names: Vec<String> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
    if names.len() == classes {
        return names;
    }
    tracing::warn!("{}: no list of {classes} names; classes go by number", path.display());
    (0..classes).map(|class| class.to_string()).collect()
}

impl Format {
    fn open(
        &self,
        name: &str,
        folder: &Path,
        train: &[&str],
        test: &str,
        class_names: Vec<String>,
        normalisation: Normalisation,
    ) -> Result<Data> {
        let set = |files: &[&str], per_file: usize| -> Result<Dataset> {
            let (mut pixels, mut labels) = (Vec::new(), Vec::new());
            for file in files {
                self.read(&folder.join(file), per_file, &mut pixels, &mut labels)?;
            }
            Dataset::from_memory(name, SHAPE, self.classes, pixels, labels)?
                .with_class_names(class_names.iter().cloned())?
                .with_normalisation(normalisation.clone())
        };
        Ok(Data { train: set(train, self.per_file[0])?, test: set(&[test], self.per_file[1])? })
    }

    /// Appends the images of one file, planes interleaved to HWC.
    fn read(&self, path: &Path, expected: usize, pixels: &mut Vec<u8>, labels: &mut Vec<u32>) -> Result<()> {
        self.parse(path, &read_capped(path)?, expected, pixels, labels)
    }

    /// As [`read`](Self::read), from bytes.
    fn parse(
        &self,
        path: &Path,
        bytes: &[u8],
        expected: usize,
        pixels: &mut Vec<u8>,
        labels: &mut Vec<u32>,
    ) -> Result<()> {
        let record = self.label_bytes + 3 * PLANE;
        if bytes.is_empty() || !bytes.len().is_multiple_of(record) {
            return Err(Error::file(
                path,
                format!(
                    "{} bytes are no whole number of {record}-byte records: cut short or not the binary version; \
                     unpack the archive again",
                    bytes.len()
                ),
            ));
        }
        let count = bytes.len() / record;
        if count != expected {
            tracing::warn!("{}: {count} images, the published file has {expected}", path.display());
        }
        memory::reserve(pixels, count * 3 * PLANE, "the images of a file")?;
        for (index, record) in bytes.chunks_exact(record).enumerate() {
            let (label, planes) = record.split_at(self.label_bytes);
            let label = label[self.label_bytes - 1];
            if usize::from(label) >= self.classes {
                return Err(Error::file(
                    path,
                    format!(
                        "label {label} of image {index} is out of range, 0 to {}; is it the right set?",
                        self.classes - 1
                    ),
                ));
            }
            labels.push(u32::from(label));
            let (red, rest) = planes.split_at(PLANE);
            let (green, blue) = rest.split_at(PLANE);
            pixels.extend(red.iter().zip(green).zip(blue).flat_map(|((r, g), b)| [*r, *g, *b]));
        }
        Ok(())
    }
}

/// A whole file, unless it is far larger than any file of these sets.
fn read_capped(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = files::open(path)?;
    memory::read_to_end(file.take(MAX_FILE + 1), &mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::file(path, format!("is larger than {MAX_FILE} bytes, so it is no CIFAR file")));
    }
    Ok(bytes)
}
