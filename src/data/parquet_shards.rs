//! Pictures in Parquet shards, as Hugging Face stores them: a column of {bytes, path} or of bytes, and one of labels, in files
//! that their names put to a split.
//!
//! A row can be read only with the row group it is in, about a hundred pictures of ImageNet. So an epoch's order is no
//! full shuffle: row groups are shuffled, then the images within each run of [`WINDOW`] groups. It depends on seed and epoch
//! alone, like any other. What is in memory are the row groups of two such runs at most.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, DataType};

use super::classes;
use super::dataset::{Data, Dataset};
use super::parquet_columns::{self, Kind, LabelColumn};
use super::parquet_file::{ParquetFile, guarded};
use super::parquet_splits::Splits;
use super::picture::Picture;
use super::preprocess::Preprocessing;
use super::random;
use crate::{Error, Result};

/// Row groups whose images are shuffled together.
const WINDOW: usize = 16;
/// Most classes; a label beyond them is none.
const MAX_CLASSES: u32 = 1 << 20;
/// Most classes of words of which every second row has one of its own: more are captions.
const MAX_RARE_WORDS: usize = 1 << 10;

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
        let name = format!("{} (row group {}, row {row})", place.path.display(), place.number);
        let decode = |bytes: &[u8]| Picture::decode(bytes, Path::new(&name), channels);
        self.of_row(index, decode)?
    }

    /// Lends the encoded picture of image `index`.
    pub(super) fn encoded(&self, index: usize, look: impl FnOnce(&[u8])) -> Result<()> {
        self.of_row(index, look)
    }

    /// What `take` makes of the bytes of a picture, once its row group is read.
    fn of_row<R>(&self, index: usize, take: impl FnOnce(&[u8]) -> R) -> Result<R> {
        let (group, row) = self.rows[index];
        let place = &self.shards.groups[group as usize];
        let read = self.shards.group(group as usize);
        match read.get_or_init(|| guarded(&place.path, || pictures(place)).map_err(|e| e.to_string())) {
            Ok(pictures) => Ok(take(pictures[row as usize].data())),
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

/// Opens the shards below `root`. Reads all labels, but no picture.
///
/// # Errors
/// A split or a column that is not there, or files that cannot be used.
pub(super) fn open(root: &Path, name: &str, image_size: usize) -> Result<Data> {
    let splits = Splits::find(root)?;
    let (train, test) = sets(&splits, name, image_size)?;
    train.map(|train| Data { train, test }).ok_or_else(|| splits.no_train())
}

/// The test images below `root` alone; there need not be others, but the labels of those that are there count as classes.
///
/// # Errors
/// As [`open`].
pub(super) fn open_test(root: &Path, name: &str, image_size: usize) -> Result<Dataset> {
    Ok(sets(&Splits::find(root)?, name, image_size)?.1)
}

/// The training images, where there are any, and the test images.
fn sets(splits: &Splits, name: &str, image_size: usize) -> Result<(Option<Dataset>, Dataset)> {
    if splits.test().is_empty() {
        return Err(splits.no_test());
    }
    let mut classes = Classes::default();
    let (train, mut train_labels) = split(splits.train(), &mut classes)?;
    let (test, mut test_labels) = split(splits.test(), &mut classes)?;
    let names = classes.names([&mut train_labels, &mut test_labels]);
    let preprocessing = Preprocessing::imagenet(image_size);
    let set = |rows, labels| Dataset::from_shards(name, preprocessing.clone(), names.clone(), rows, labels);
    let train = if splits.train().is_empty() { None } else { Some(set(train, train_labels)?) };
    Ok((train, set(test, test_labels)?))
}

/// All rows and labels of the shards of a split.
fn split(files: &[PathBuf], classes: &mut Classes) -> Result<(ShardRows, Vec<u32>)> {
    let (mut groups, mut rows, mut labels) = (Vec::new(), Vec::new(), Vec::new());
    for file in files {
        guarded(file, || list(file, &mut groups, &mut rows, &mut labels, classes))?;
    }
    let shards = Arc::new(Shards { groups, recent: Mutex::default() });
    Ok((ShardRows { shards, rows }, labels))
}

/// Adds the row groups, rows and labels of a shard.
fn list(
    file: &Path,
    groups: &mut Vec<Place>,
    rows: &mut Vec<(u32, u32)>,
    labels: &mut Vec<u32>,
    classes: &mut Classes,
) -> Result<()> {
    let shard = ParquetFile::open(file)?;
    let label = parquet_columns::find(&shard)?.label;
    classes.agree(&shard, file, &label)?;
    let path = Arc::new(file.to_owned());
    for number in 0..shard.groups() {
        let count = shard.rows(number);
        labels.extend(classes.labels(&shard, number, &label)?);
        rows.extend((0..count as u32).map(|row| (groups.len() as u32, row)));
        groups.push(Place { path: Arc::clone(&path), number });
    }
    classes.require_repeats(&shard, &label, labels.len())
}

/// What the shards so far say of the classes.
#[derive(Default)]
struct Classes {
    /// The first shard, and whether its labels are words.
    first: Option<(PathBuf, bool)>,
    /// The names of numbers, and the shard that told them first.
    names: Option<(PathBuf, Vec<String>)>,
    /// The classes of labels that are words, numbered as they came.
    words: HashMap<String, u32>,
}

impl Classes {
    /// Refuses a shard whose labels are of another kind, or have other names, than those before it.
    fn agree(&mut self, shard: &ParquetFile, file: &Path, label: &LabelColumn) -> Result<()> {
        let are_words = label.kind == Kind::Words;
        let (first, expected) = self.first.get_or_insert_with(|| (file.to_owned(), are_words));
        if *expected != are_words {
            let column = label.name.escape_debug();
            return Err(shard.unusable(&format!(
                "has {} in column `{column}` and {} has {}; both need the same kind of labels",
                label.kind,
                first.display(),
                if are_words { "numbers" } else { "text" }
            )));
        }
        let Some(own) = &label.classes else { return Ok(()) };
        if let Some(bad) = own.iter().find(|name| name.chars().any(char::is_control)) {
            return Err(shard.unusable(&format!("names a class {bad:?}; names must not hold control characters")));
        }
        let (told, names) = self.names.get_or_insert_with(|| (file.to_owned(), own.clone()));
        match (0..names.len().max(own.len())).find(|class| names.get(*class) != own.get(*class)) {
            None => Ok(()),
            Some(class) => {
                let name = |names: &[String]| names.get(class).map_or("nothing".to_owned(), |name| format!("`{name}`"));
                Err(shard.unusable(&format!(
                    "calls class {class} {}, {} calls it {}; give shards of one data set",
                    name(own),
                    told.display(),
                    name(names)
                )))
            }
        }
    }

    /// The labels of a row group; those of words are numbered as they come.
    fn labels(&mut self, shard: &ParquetFile, group: usize, column: &LabelColumn) -> Result<Vec<u32>> {
        let name = column.name.as_str();
        let signed = column.kind == Kind::Integer { signed: true };
        match shard.reader(group, column.number)? {
            ColumnReader::BoolColumnReader(reader) => {
                Ok(read_rows(shard, group, column.number, reader)?.into_iter().map(u32::from).collect())
            }
            ColumnReader::Int32ColumnReader(reader) => {
                let values = read_rows(shard, group, column.number, reader)?.into_iter();
                values.map(|value| label(shard, if signed { value.into() } else { (value as u32).into() })).collect()
            }
            ColumnReader::Int64ColumnReader(reader) => {
                let values = read_rows(shard, group, column.number, reader)?.into_iter();
                values.map(|value| label(shard, if signed { value.into() } else { (value as u64).into() })).collect()
            }
            ColumnReader::ByteArrayColumnReader(reader) => {
                let values = read_rows(shard, group, column.number, reader)?;
                values.iter().map(|value| self.word(shard, name, value.data())).collect()
            }
            _ => Err(shard.unreadable(&format!("has labels in column `{name}` that are neither integers nor text"))),
        }
    }

    /// The number of a word.
    fn word(&mut self, shard: &ParquetFile, column: &str, word: &[u8]) -> Result<u32> {
        let word = std::str::from_utf8(word)
            .map_err(|_| shard.unreadable(&format!("has labels in `{column}` that are no UTF-8")))?;
        if let Some(known) = self.words.get(word) {
            return Ok(*known);
        }
        if word.chars().any(char::is_control) || self.words.len() >= MAX_CLASSES as usize {
            let problem = format!(
                "has the label {word:?} in column `{column}`; at most {MAX_CLASSES} classes, without control characters, are read"
            );
            return Err(shard.unusable(&problem));
        }
        let number = self.words.len() as u32;
        self.words.insert(word.to_owned(), number);
        Ok(number)
    }

    /// Refuses text of which nearly every one of `rows` rows has its own.
    fn require_repeats(&self, shard: &ParquetFile, label: &LabelColumn, rows: usize) -> Result<()> {
        if self.words.len() <= MAX_RARE_WORDS || self.words.len() <= rows / 2 {
            return Ok(());
        }
        Err(shard.unusable(&format!(
            "has {} different texts in {rows} rows of column `{}`, which are no classes; put the classes into a column `label`",
            self.words.len(),
            label.name
        )))
    }

    /// The names of all classes; the labels of words become places among them.
    fn names(self, labels: [&mut Vec<u32>; 2]) -> Vec<String> {
        if let Some((_, names)) = self.names {
            return names;
        }
        if self.first.is_none_or(|(_, are_words)| !are_words) {
            let count = labels.iter().flat_map(|labels| labels.iter()).max().map_or(0, |most| *most as usize + 1);
            return (0..count).map(|class| class.to_string()).collect();
        }
        let mut names: Vec<String> = self.words.keys().cloned().collect();
        classes::sort(&mut names);
        let mut places = vec![0; names.len()];
        for (place, name) in names.iter().enumerate() {
            places[self.words[name] as usize] = place as u32;
        }
        labels.into_iter().flatten().for_each(|label| *label = places[*label as usize]);
        names
    }
}

/// A label that was read as a number.
fn label(shard: &ParquetFile, value: i128) -> Result<u32> {
    u32::try_from(value).ok().filter(|label| *label < MAX_CLASSES).ok_or_else(|| {
        shard.unreadable(&format!("has label {value}; labels count from 0 (-1 means unknown) to {}", MAX_CLASSES - 1))
    })
}

/// The encoded pictures of a row group.
fn pictures(place: &Place) -> Result<Vec<ByteArray>> {
    let shard = ParquetFile::open(&place.path)?;
    let column = parquet_columns::find(&shard)?.image;
    let ColumnReader::ByteArrayColumnReader(reader) = shard.reader(place.number, column)? else {
        return Err(shard.unreadable("has pictures that are not bytes"));
    };
    read_rows(&shard, place.number, column, reader)
}

/// The values of a column in all rows of a row group.
fn read_rows<T: DataType>(
    shard: &ParquetFile,
    group: usize,
    column: usize,
    mut reader: ColumnReaderImpl<T>,
) -> Result<Vec<T::T>> {
    let (mut values, mut levels) = (Vec::new(), Vec::new());
    let (rows, column) = (shard.rows(group), &shard.columns()[column]);
    let place = || format!("row group {group}, column `{}`", column.path().string().escape_debug());
    let read = reader.read_records(rows, Some(&mut levels), None, &mut values);
    read.map_err(|e| shard.unreadable(&format!("{}: {e}", place())))?;
    if values.len() == rows {
        return Ok(values);
    }
    // A row without a value has a level below the highest.
    match levels.iter().position(|level| *level < column.max_def_level()) {
        Some(row) => Err(shard.unusable(&format!(
            "{}: row {row} has no value; every row needs a label, and the bytes of a picture, not its path alone",
            place()
        ))),
        None => Err(shard.unreadable(&format!("{}: {} values for {rows} rows", place(), values.len()))),
    }
}
