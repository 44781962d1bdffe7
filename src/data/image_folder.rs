//! Folders of pictures: `train/<class>/*` and `val/<class>/*`, the layout of ImageNet in torchvision and timm.

use std::fs;
use std::path::{Path, PathBuf};

use super::dataset::{Data, Dataset};
use super::preprocess::Preprocessing;
use crate::{Error, Result};

const TEST_FOLDERS: [&str; 3] = ["val", "validation", "test"];
const EXTENSIONS: [&str; 3] = ["jpg", "jpeg", "png"];

/// Lists the pictures below `root`; classes are the sorted names of the folders of `train`.
pub(super) fn open(root: &Path, name: &str, image_size: usize) -> Result<Data> {
    let train = root.join("train");
    if !train.is_dir() {
        return Err(Error::file(root, "has no folder `train`; expected train/<class>/*.jpg and val/<class>/*.jpg"));
    }
    let test = TEST_FOLDERS.iter().map(|folder| root.join(folder)).find(|folder| folder.is_dir()).ok_or_else(|| {
        Error::file(root, "has `train` but none of `val`, `validation`, `test`; add one with the same classes")
    })?;
    let classes = classes(&train)?;
    let test_classes = self::classes(&test)?;
    if classes != test_classes {
        return Err(differing(&train, &classes, &test, &test_classes));
    }
    Ok(Data { train: split(&train, name, image_size, &classes)?, test: split(&test, name, image_size, &classes)? })
}

/// Names of the folders in `folder`, sorted; hidden ones are not classes.
fn classes(folder: &Path) -> Result<Vec<String>> {
    let mut classes = Vec::new();
    for path in entries(folder)? {
        if path.is_dir() {
            classes.push(file_name(&path)?.to_owned());
        }
    }
    if classes.is_empty() {
        return Err(Error::file(folder, "has no class folders; expected <class>/*.jpg"));
    }
    Ok(classes)
}

fn split(folder: &Path, name: &str, image_size: usize, classes: &[String]) -> Result<Dataset> {
    let (mut files, mut labels) = (Vec::new(), Vec::new());
    for (label, class) in classes.iter().enumerate() {
        let folder = folder.join(class);
        let before = files.len();
        files.extend(entries(&folder)?.into_iter().filter(|path| is_picture(path)));
        if files.len() == before {
            return Err(Error::file(
                folder,
                "has no .jpg, .jpeg or .png files; pictures must lie directly in the folder of their class",
            ));
        }
        labels.resize(files.len(), label as u32);
    }
    Dataset::from_files(name, Preprocessing::imagenet(image_size), classes.to_vec(), files, labels)
}

/// What is in a folder, sorted, without hidden files: the order of the file system differs from machine to machine.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let entry = entry.map_err(|e| Error::io(folder, e))?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            paths.push(entry.path());
        }
    }
    paths.sort_unstable();
    Ok(paths)
}

fn is_picture(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| EXTENSIONS.iter().any(|known| extension.eq_ignore_ascii_case(known)))
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
