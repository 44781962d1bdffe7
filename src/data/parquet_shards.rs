//! Pictures in Parquet shards, as Hugging Face stores them: `train-*.parquet` and `validation-*.parquet` with the columns
//! `image` {bytes, path} and `label`.
//!
//! A row can be read only with the row group it is in, about a hundred pictures of ImageNet. So an epoch's order is no
//! full shuffle: row groups are shuffled, then the images within each run of [`WINDOW`] groups. It depends on seed and epoch
//! alone, like any other. What is in memory are the row groups of two such runs at most.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, DataType};

use super::dataset::{Data, Dataset};
use super::parquet_file::{ParquetFile, guarded};
use super::picture::Picture;
use super::preprocess::Preprocessing;
use super::random;
use crate::{Error, Result};

/// Row groups whose images are shuffled together.
const WINDOW: usize = 16;
/// Most classes; a label beyond them is none.
const MAX_CLASSES: u32 = 1 << 20;
/// Where the files lie below the given folder.
const FOLDERS: [&str; 2] = ["", "data"];
const IMAGE: &str = "image.bytes";
const LABEL: &str = "label";

/// The encoded pictures of a row group, once they are read; or why they cannot be.
type Group = Arc<OnceLock<std::result::Result<Vec<ByteArray>, String>>>;

/// The row groups of all shards of a split.
pub(super) struct Shards {
    groups: Vec<Place>,
    /// The last groups that were asked for, oldest first.
    recent: Mutex<VecDeque<(usize, Group)>>,
}

/// A row group: its file and its number there.
struct Place {
    path: Arc<PathBuf>,
    number: usize,
}

/// The images of a data set: row groups and rows in them.
#[derive(Clone)]
pub(super) struct ShardRows {
    shards: Arc<Shards>,
    rows: Vec<(u32, u32)>,
}

impl ShardRows {
    /// Decodes the picture of image `index`.
    pub(super) fn picture(&self, index: usize, channels: usize) -> Result<Picture> {
        let (group, row) = self.rows[index];
        let place = &self.shards.groups[group as usize];
        let read = self.shards.group(group as usize);
        let pictures = read.get_or_init(|| guarded(&place.path, || pictures(place)).map_err(|e| e.to_string()));
        match pictures {
            Ok(pictures) => {
                let name = format!("{} (row group {}, row {row})", place.path.display(), place.number);
                Picture::decode(pictures[row as usize].data(), Path::new(&name), channels)
            }
            Err(problem) => Err(Error::Data(problem.clone())),
        }
    }

    /// The same for some of the images.
    pub(super) fn subset(&self, indices: &[usize]) -> Self {
        Self { shards: Arc::clone(&self.shards), rows: indices.iter().map(|index| self.rows[*index]).collect() }
    }

    /// The order of an epoch: row groups shuffled, and the images of every [`WINDOW`] of them.
    pub(super) fn shuffled(&self, seed: u64, epoch: u64) -> Vec<usize> {
        let mut of_group = vec![Vec::new(); self.shards.groups.len()];
        for (index, (group, _)) in self.rows.iter().enumerate() {
            of_group[*group as usize].push(index);
        }
        of_group.retain(|images| !images.is_empty());
        let groups = random::shuffled(of_group.len(), seed, epoch);
        let mut order = Vec::with_capacity(self.rows.len());
        for (number, window) in groups.chunks(WINDOW).enumerate() {
            let images: Vec<usize> = window.iter().flat_map(|group| of_group[*group].iter().copied()).collect();
            // One stream per window: the epoch's own is spent on the groups.
            let places = random::shuffled_part(images.len(), seed, epoch, number as u64 + 1);
            order.extend(places.into_iter().map(|place| images[place]));
        }
        order
    }
}

impl Shards {
    /// A row group, kept until twice [`WINDOW`] others have been asked for after it.
    fn group(&self, group: usize) -> Group {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, known)) = recent.iter().find(|(number, _)| *number == group) {
            return Arc::clone(known);
        }
        if recent.len() >= 2 * WINDOW {
            recent.pop_front();
        }
        let new = Group::default();
        recent.push_back((group, Arc::clone(&new)));
        new
    }
}

/// Opens the shards in `root`, or in `data` below it. Reads all labels, but no picture.
pub(super) fn open(root: &Path, name: &str, image_size: usize) -> Result<Data> {
    let find = |kinds: &[&str]| {
        FOLDERS.iter().map(|folder| root.join(folder)).find_map(|folder| shards(&folder, kinds).transpose()).transpose()
    };
    let missing =
        |kind: &str| Error::file(root, format!("has no {kind}-*.parquet; give the folder that has (or its parent)"));
    let train = find(&["train"])?.ok_or_else(|| missing("train"))?;
    let test = find(&["validation", "val", "test"])?.ok_or_else(|| missing("validation"))?;
    let mut classes = None;
    let (train_rows, train_labels) = split(&train, &mut classes)?;
    let (test_rows, test_labels) = split(&test, &mut classes)?;
    let count = train_labels.iter().max().map_or(0, |most| *most as usize + 1);
    let classes = classes.unwrap_or_else(|| (0..count).map(|class| class.to_string()).collect());
    let preprocessing = Preprocessing::imagenet(image_size);
    let set = |rows, labels| Dataset::from_shards(name, preprocessing.clone(), classes.clone(), rows, labels);
    Ok(Data { train: set(train_rows, train_labels)?, test: set(test_rows, test_labels)? })
}

/// The sorted shards of the first kind that `folder` has any of.
fn shards(folder: &Path, kinds: &[&str]) -> Result<Option<Vec<PathBuf>>> {
    if !folder.is_dir() {
        return Ok(None);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        files.push(entry.map_err(|e| Error::io(folder, e))?.path());
    }
    files.sort_unstable();
    let of_kind = |kind: &str| {
        let is = |path: &&PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.ends_with(".parquet") && name.strip_prefix(kind).is_some_and(|rest| rest.starts_with(['-', '.']))
        };
        files.iter().filter(is).cloned().collect::<Vec<_>>()
    };
    Ok(kinds.iter().map(|kind| of_kind(kind)).find(|files| !files.is_empty()))
}

/// All rows and labels of the shards of a split; the class names if a shard has them.
fn split(files: &[PathBuf], classes: &mut Option<Vec<String>>) -> Result<(ShardRows, Vec<u32>)> {
    let (mut groups, mut rows, mut labels) = (Vec::new(), Vec::new(), Vec::new());
    for file in files {
        guarded(file, || list(file, &mut groups, &mut rows, &mut labels, classes))?;
    }
    let shards = Arc::new(Shards { groups, recent: Mutex::default() });
    Ok((ShardRows { shards, rows }, labels))
}

/// Adds the row groups, rows and labels of a shard; and the class names, where it is the first to tell them.
fn list(
    file: &Path,
    groups: &mut Vec<Place>,
    rows: &mut Vec<(u32, u32)>,
    labels: &mut Vec<u32>,
    classes: &mut Option<Vec<String>>,
) -> Result<()> {
    let shard = ParquetFile::open(file)?;
    if classes.is_none() {
        *classes = shard.value("huggingface").and_then(class_names);
    }
    column(&shard, IMAGE)?;
    let label = column(&shard, LABEL)?;
    let path = Arc::new(file.to_owned());
    for number in 0..shard.groups() {
        let count = shard.rows(number);
        labels.extend(read_labels(&shard, number, label)?);
        rows.extend((0..count as u32).map(|row| (groups.len() as u32, row)));
        groups.push(Place { path: Arc::clone(&path), number });
    }
    Ok(())
}

/// The number of a column.
fn column(shard: &ParquetFile, name: &str) -> Result<usize> {
    let missing = || shard.unreadable(&format!("has no column `{name}`; shards need image (bytes, path) and label"));
    shard.column(name).ok_or_else(missing)
}

/// The names of the labels in the description that Hugging Face puts into every shard.
fn class_names(description: &str) -> Option<Vec<String>> {
    let json: serde_json::Value = serde_json::from_str(description).ok()?;
    let names = json.pointer("/info/features/label/names")?.as_array()?;
    names
        .iter()
        .map(|name| name.as_str().filter(|name| !name.chars().any(char::is_control)).map(str::to_owned))
        .collect()
}

/// The labels of a row group.
fn read_labels(shard: &ParquetFile, group: usize, column: usize) -> Result<Vec<u32>> {
    let ColumnReader::Int64ColumnReader(reader) = shard.reader(group, column)? else {
        return Err(shard.unreadable("has labels that are not 64-bit integers"));
    };
    let label = |value: i64| {
        u32::try_from(value).ok().filter(|label| *label < MAX_CLASSES).ok_or_else(|| {
            let problem = format!("has label {value}; labels count from 0 (-1 means unknown) to {}", MAX_CLASSES - 1);
            shard.unreadable(&problem)
        })
    };
    read_rows(shard, group, reader)?.into_iter().map(label).collect()
}

/// The encoded pictures of a row group.
fn pictures(place: &Place) -> Result<Vec<ByteArray>> {
    let shard = ParquetFile::open(&place.path)?;
    let ColumnReader::ByteArrayColumnReader(reader) = shard.reader(place.number, column(&shard, IMAGE)?)? else {
        return Err(shard.unreadable("has images that are not bytes"));
    };
    read_rows(&shard, place.number, reader)
}

/// The values of a column in all rows of a row group.
fn read_rows<T: DataType>(shard: &ParquetFile, group: usize, mut reader: ColumnReaderImpl<T>) -> Result<Vec<T::T>> {
    let (mut values, mut levels) = (Vec::new(), Vec::new());
    let rows = shard.rows(group);
    let read = reader.read_records(rows, Some(&mut levels), None, &mut values);
    read.map_err(|e| shard.unreadable(&format!("row group {group}: {e}")))?;
    if values.len() != rows {
        return Err(shard.unreadable(&format!("row group {group} has {} values for {rows} rows", values.len())));
    }
    Ok(values)
}
