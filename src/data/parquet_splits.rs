//! Which Parquet files below a folder are the shards of which split: as Hugging Face's `datasets` finds them, by the words in
//! the names of files and folders.
//!
//! `data/train-00000-of-00002.parquet`, `valid-0.parquet`, `plain_text/test/0000.parquet` and `cifar10-train.parquet` all
//! say what they are.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Words for the split that is learnt from.
const TRAIN: [&str; 2] = ["train", "training"];
/// Words for the splits that accuracy is measured on, of which the first that is there is taken: labels of a test split are
/// often kept secret.
const TEST: [&[&str]; 2] = [&["validation", "valid", "val", "dev"], &["test", "testing", "eval", "evaluation"]];
/// What is looked for, in words.
const TRAIN_FILES: &str = "train-*.parquet or train/*.parquet";
const TEST_FILES: &str = "validation-*.parquet or validation/*.parquet (or valid, val, dev, test)";
/// Folders within folders that are looked into.
const MAX_DEPTH: usize = 3;
/// Most files that are looked at.
const MAX_FILES: usize = 1 << 16;
/// The folder that is taken where several hold a training split, the given one aside.
const USUAL: &str = "data";

/// The shards of a data set, sorted.
#[derive(Debug, Default)]
pub(super) struct Splits {
    root: PathBuf,
    train: Vec<PathBuf>,
    test: Vec<PathBuf>,
}

/// What the name of a file, or of a folder above it, says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Split {
    Train,
    /// By its place in [`TEST`].
    Test(usize),
}

/// The files of one data set: a folder may hold several, each in one of its own.
#[derive(Debug, Default)]
struct Set {
    /// Where it lies below the given folder, without folders that are named after splits.
    folder: PathBuf,
    files: Vec<(Option<Split>, PathBuf)>,
}

impl Splits {
    /// Finds the shards below a folder.
    ///
    /// # Errors
    /// A folder that is none or holds no Parquet files, or several data sets.
    pub(super) fn find(root: &Path) -> Result<Self> {
        if !root.is_dir() {
            let problem = if root.is_file() {
                "is a file; give the folder that it lies in"
            } else {
                "is no folder; give the one that holds the .parquet files, if it was moved with --data-dir"
            };
            return Err(Error::file(root, problem));
        }
        let mut files = Vec::new();
        collect(root, MAX_DEPTH, &mut files)?;
        files.sort_unstable();
        let Some(set) = chosen(root, sets(root, files))? else {
            return Err(Error::file(
                root,
                format!("holds no .parquet files; looked for {TRAIN_FILES} and {TEST_FILES} in it and in its folders"),
            ));
        };
        let of = |split: Option<Split>| -> Vec<PathBuf> {
            set.files.iter().filter(|(own, _)| *own == split).map(|(_, path)| path.clone()).collect()
        };
        let mut train = of(Some(Split::Train));
        if train.is_empty() {
            // Without a word on what they are, they are what there is to learn from.
            train = of(None);
        }
        let test = (0..TEST.len()).map(|kind| of(Some(Split::Test(kind)))).find(|files| !files.is_empty());
        Ok(Self { root: root.to_owned(), train, test: test.unwrap_or_default() })
    }

    /// The shards to learn from; empty where there are none.
    pub(super) fn train(&self) -> &[PathBuf] {
        &self.train
    }

    /// The shards to measure accuracy on; empty where there are none.
    pub(super) fn test(&self) -> &[PathBuf] {
        &self.test
    }

    /// The error that there are no training images.
    pub(super) fn no_train(&self) -> Error {
        let problem = format!("holds {} and no training split; looked for {TRAIN_FILES}", self.listed(&self.test));
        Error::file(&self.root, problem)
    }

    /// The error that there are no test images.
    pub(super) fn no_test(&self) -> Error {
        let problem = format!(
            "holds {} and no test split; looked for {TEST_FILES}; add one, such as the `test` of datasets' \
             `train_test_split`, as validation-00000.parquet",
            self.listed(&self.train)
        );
        Error::file(&self.root, problem)
    }

    /// The first of some files, and how many more there are.
    fn listed(&self, files: &[PathBuf]) -> String {
        match files {
            [] => "no shards".to_owned(),
            [only] => format!("one shard, {},", self.own(only)),
            [first, rest @ ..] => format!("{} and {} more shards", self.own(first), rest.len()),
        }
    }

    /// A file as it is called below the root.
    fn own(&self, path: &Path) -> String {
        path.strip_prefix(&self.root).unwrap_or(path).display().to_string()
    }
}

/// Adds the Parquet files of a folder, and of its folders down to `depth`, hidden ones left out.
fn collect(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let entry = entry.map_err(|e| Error::io(folder, e))?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        let is_shard = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("parquet"));
        // A download's files are links into a store.
        if is_shard && path.is_file() {
            files.push(path);
        } else if depth > 0 && path.is_dir() {
            collect(&path, depth - 1, files)?;
        }
        if files.len() > MAX_FILES {
            return Err(Error::file(
                folder,
                format!("holds more than {MAX_FILES} .parquet files; give a folder of fewer"),
            ));
        }
    }
    Ok(())
}

/// The data sets that sorted files make up, one a folder.
fn sets(root: &Path, files: Vec<PathBuf>) -> Vec<Set> {
    let mut sets: Vec<Set> = Vec::new();
    for path in files {
        let below = path.strip_prefix(root).unwrap_or(&path);
        let mut split = below.file_stem().and_then(|stem| split_of(&stem.to_string_lossy()));
        let mut folder = below.parent().unwrap_or(Path::new("")).to_owned();
        if split.is_none() {
            split = folder.file_name().and_then(|name| split_of(&name.to_string_lossy()));
            if split.is_some() {
                folder.pop();
            }
        }
        match sets.iter_mut().find(|set| set.folder == folder) {
            Some(set) => set.files.push((split, path)),
            None => sets.push(Set { folder, files: vec![(split, path)] }),
        }
    }
    sets
}

/// The split that a name tells: that of the first word that is one.
fn split_of(name: &str) -> Option<Split> {
    name.split(|c: char| "-._ ".contains(c) || c.is_ascii_digit()).find_map(|word| {
        let is = |words: &[&str]| words.iter().any(|known| word.eq_ignore_ascii_case(known));
        if is(&TRAIN) { Some(Split::Train) } else { TEST.iter().position(|words| is(words)).map(Split::Test) }
    })
}

/// The data set that is meant: the given folder's own, the usual folder's, or the only one.
fn chosen(root: &Path, mut sets: Vec<Set>) -> Result<Option<Set>> {
    let says = |set: &Set| set.files.iter().any(|(split, _)| split.is_some());
    if sets.iter().any(says) {
        sets.retain(says);
    }
    let usual = [Path::new(""), Path::new(USUAL)];
    if let Some(own) = usual.iter().find_map(|folder| sets.iter().position(|set| set.folder == **folder)) {
        return Ok(Some(sets.swap_remove(own)));
    }
    if sets.len() > 1 {
        let folders: Vec<String> = sets.iter().take(4).map(|set| set.folder.display().to_string()).collect();
        return Err(Error::file(
            root,
            format!(
                "holds {} data sets, in {}{}; give the folder of one",
                sets.len(),
                folders.join(", "),
                if sets.len() > folders.len() { ", …" } else { "" }
            ),
        ));
    }
    Ok(sets.pop())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (files, training split, test split)
    #[test]
    fn names_of_files_and_folders_tell_the_split() {
        let rows: [(&str, &str, &str); 19] = [
            ("train-0.parquet validation-0.parquet", "train-0.parquet", "validation-0.parquet"),
            ("train-1.parquet train-0.parquet val.parquet", "train-0.parquet train-1.parquet", "val.parquet"),
            ("data/train-0.parquet data/valid-0.parquet", "data/train-0.parquet", "data/valid-0.parquet"),
            ("train-0.parquet test-0.parquet dev-0.parquet", "train-0.parquet", "dev-0.parquet"),
            ("train/0000.parquet validation/0000.parquet", "train/0000.parquet", "validation/0000.parquet"),
            (
                "plain_text/train-0.parquet plain_text/test-0.parquet",
                "plain_text/train-0.parquet",
                "plain_text/test-0.parquet",
            ),
            ("p/train/0000.parquet p/test/0001.parquet", "p/train/0000.parquet", "p/test/0001.parquet"),
            ("d/cifar10-train.parquet d/cifar10-test.parquet", "d/cifar10-train.parquet", "d/cifar10-test.parquet"),
            ("training.parquet evaluation.parquet", "training.parquet", "evaluation.parquet"),
            ("Train.parquet Test.PARQUET", "Train.parquet", "Test.PARQUET"),
            ("train2017.parquet val2017.parquet", "train2017.parquet", "val2017.parquet"),
            ("a/partial-train/0.parquet a/test/0.parquet", "a/partial-train/0.parquet", "a/test/0.parquet"),
            ("train-0.parquet data/validation-0.parquet", "train-0.parquet", ""),
            (
                "b/train-0.parquet data/train-0.parquet data/test-0.parquet",
                "data/train-0.parquet",
                "data/test-0.parquet",
            ),
            ("0000.parquet", "0000.parquet", ""),
            ("0000.parquet d/train.parquet d/test.parquet", "d/train.parquet", "d/test.parquet"),
            ("test-0.parquet", "", "test-0.parquet"),
            ("training_set/a.parquet trainer.parquet .cache/train.parquet", "training_set/a.parquet", ""),
            ("a/b/c/train.parquet a/b/c/test.parquet", "a/b/c/train.parquet", "a/b/c/test.parquet"),
        ];
        for (files, train, test) in rows {
            let root = tempfile::tempdir().unwrap();
            for file in files.split(' ') {
                let path = root.path().join(file);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, "").unwrap();
            }
            let found = Splits::find(root.path()).unwrap();
            let names = |paths: &[PathBuf]| paths.iter().map(|path| found.own(path)).collect::<Vec<_>>().join(" ");
            assert_eq!((names(found.train()), names(found.test())), (train.to_owned(), test.to_owned()), "{files}");
        }
    }

    #[test]
    fn two_data_sets_in_a_folder_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        for file in ["coarse/train-0.parquet", "fine/train-0.parquet", "fine/test-0.parquet"] {
            std::fs::create_dir_all(root.path().join(file).parent().unwrap()).unwrap();
            std::fs::write(root.path().join(file), "").unwrap();
        }
        let told = Splits::find(root.path()).unwrap_err().to_string();
        assert!(told.contains("2 data sets, in coarse, fine; give the folder of one"), "{told}");
        let told = Splits::find(&root.path().join("fine/test-0.parquet")).unwrap_err().to_string();
        assert!(told.contains("give the folder that it lies in"), "{told}");
        assert_eq!(Splits::find(&root.path().join("fine")).unwrap().test().len(), 1);
        let told = Splits::find(&root.path().join("coarse")).unwrap().no_test().to_string();
        assert!(
            told.contains("one shard, train-0.parquet, and no test split; looked for validation-*.parquet"),
            "{told}"
        );
    }
}
