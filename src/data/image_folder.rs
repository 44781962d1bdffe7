//! Folders of pictures: `train/<class>/*` and `val/<class>/*`, the layout of ImageNet in torchvision and timm.

use std::fs;
use std::path::{Path, PathBuf};

use super::dataset::{Data, Dataset};
use super::locate::{Place, VARIABLE, locate};
use super::preprocess::Preprocessing;
use crate::{Error, Result};

/// What the set goes by.
pub(super) const IMAGENET: &str = "imagenet";
const TEST_FOLDERS: [&str; 3] = ["val", "validation", "test"];
const EXTENSIONS: [&str; 3] = ["jpg", "jpeg", "png"];

/// Where ImageNet lies, as its archives unpack: one folder per class.
pub(super) fn locate_imagenet(dir: Option<&Path>) -> Result<PathBuf> {
    let place = Place {
        set: IMAGENET,
        folders: &[IMAGENET],
        system: None,
        wanted: "train/ or val/",
        remedy: "give the folder that holds train/<class>/*.JPEG and val/<class>/*.JPEG with --data-dir",
    };
    locate(&place, dir, std::env::var_os(VARIABLE), holds_pictures)
}

/// Whether a folder is laid out as a set of pictures, at first sight.
pub(super) fn holds_pictures(folder: &Path) -> bool {
    ["train"].iter().chain(&TEST_FOLDERS).any(|part| folder.join(part).is_dir())
}

/// Lists the pictures below `root`; classes are the names of the folders of `train`, in the order of their labels.
pub(super) fn open(root: &Path, name: &str, image_size: usize) -> Result<Data> {
    let train = root.join("train");
    if !train.is_dir() {
        return Err(Error::file(root, "has no folder `train`; expected train/<class>/*.jpg and val/<class>/*.jpg"));
    }
    let test = open_test(root, name, image_size)?;
    Ok(Data { train: split(&train, name, image_size, test.class_names())?, test })
}

/// Lists the test pictures below `root` alone. Where there is a folder `train`, its classes must be the same.
pub(super) fn open_test(root: &Path, name: &str, image_size: usize) -> Result<Dataset> {
    let test = TEST_FOLDERS.iter().map(|folder| root.join(folder)).find(|folder| folder.is_dir()).ok_or_else(|| {
        Error::file(root, "has none of `val`, `validation`, `test`; add a folder with the same classes as `train`")
    })?;
    let test_classes = classes(&test)?;
    let train = root.join("train");
    if train.is_dir() {
        let classes = classes(&train)?;
        if classes != test_classes {
            return Err(differing(&train, &classes, &test, &test_classes));
        }
    }
    split(&test, name, image_size, &test_classes)
}

/// Names of the folders in `folder`, in the order of their labels; hidden ones are not classes.
fn classes(folder: &Path) -> Result<Vec<String>> {
    let folders = entries(folder)?.into_iter().filter(|entry| entry.kind == Kind::Folder);
    let mut classes = folders.map(|entry| file_name(&entry.path).map(str::to_owned)).collect::<Result<Vec<_>>>()?;
    super::classes::sort(&mut classes);
    if classes.is_empty() {
        return Err(Error::file(folder, "has no class folders; expected <class>/*.jpg"));
    }
    Ok(classes)
}

fn split(folder: &Path, name: &str, image_size: usize, classes: &[String]) -> Result<Dataset> {
    let (mut files, mut labels) = (Vec::new(), Vec::new());
    let mut left_out: Vec<PathBuf> = Vec::new();
    for (label, class) in classes.iter().enumerate() {
        let folder = folder.join(class);
        let (pictures, others): (Vec<Entry>, Vec<Entry>) = entries(&folder)?.into_iter().partition(Entry::is_picture);
        if pictures.is_empty() {
            let found = others.first().map_or_else(String::new, |other| format!(" (but {})", other.path.display()));
            return Err(Error::file(
                folder,
                format!(
                    "has no .jpg, .jpeg or .png files{found}; pictures must lie directly in the folder of their class"
                ),
            ));
        }
        files.extend(pictures.into_iter().map(|picture| picture.path));
        labels.resize(files.len(), label as u32);
        left_out.extend(others.into_iter().map(|other| other.path));
    }
    if let Some(example) = left_out.first() {
        // A class of which most pictures are of another kind would be learnt from the rest without a word.
        tracing::warn!(
            "{}: {} of {} entries are left out, as they are no regular files named .jpg, .jpeg or .png, such as {}",
            folder.display(),
            left_out.len(),
            left_out.len() + files.len(),
            example.display()
        );
    }
    Dataset::from_files(name, Preprocessing::imagenet(image_size), classes.to_vec(), files, labels)
}

/// What is in a folder.
struct Entry {
    path: PathBuf,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Folder,
    File,
    /// A named pipe, a socket or a device: opening one could wait for ever.
    Other,
}

impl Kind {
    fn of(kind: fs::FileType) -> Self {
        match kind {
            kind if kind.is_dir() => Self::Folder,
            kind if kind.is_file() => Self::File,
            _ => Self::Other,
        }
    }
}

impl Entry {
    fn is_picture(&self) -> bool {
        let extension = self.path.extension().and_then(|extension| extension.to_str());
        self.kind == Kind::File
            && extension.is_some_and(|own| EXTENSIONS.iter().any(|known| own.eq_ignore_ascii_case(known)))
    }
}

/// What is in a folder, sorted, without hidden files: the order of the file system differs from machine to machine.
fn entries(folder: &Path) -> Result<Vec<Entry>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let entry = entry.map_err(|e| Error::io(folder, e))?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        // The listing states the kind of every entry except links, so a million pictures need no system call each.
        let own = entry.file_type().map_err(|e| Error::io(&path, e))?;
        let kind = if own.is_symlink() {
            // A link that leads nowhere counts as a picture: reading it will name it, where leaving it out would not.
            fs::metadata(&path).map_or(Kind::File, |target| Kind::of(target.file_type()))
        } else {
            Kind::of(own)
        };
        found.push(Entry { path, kind });
    }
    found.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

fn file_name(path: &Path) -> Result<&str> {
    path.file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(|| Error::file(path, "the name of a class folder must be UTF-8; rename it"))
}

fn differing(train: &Path, classes: &[String], test: &Path, test_classes: &[String]) -> Error {
    let missing = |from: &[String], other: &[String]| from.iter().find(|class| !other.contains(class)).cloned();
    let example = match (missing(classes, test_classes), missing(test_classes, classes)) {
        (Some(class), _) => format!("`{class}` is missing"),
        (None, Some(class)) => format!("`{class}` is not among those of the other"),
        (None, None) => "the names differ".to_owned(),
    };
    Error::file(
        test,
        format!(
            "has {} classes, {} has {}; {example}; both need the same class folders",
            test_classes.len(),
            train.display(),
            classes.len()
        ),
    )
}
