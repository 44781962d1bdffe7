//! Fashion-MNIST and MNIST from IDX files: where to look for them and what they are called.

use std::path::{Path, PathBuf};

use super::dataset::{Data, Dataset, Normalisation};
use super::idx::{self, Split};
use super::locate::{Place, locate};
use crate::{Error, Result};

/// The garments, by label.
pub(super) const CLASSES: [&str; 10] =
    ["T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"];
const DIGITS: [&str; 10] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];

/// What the Debian and Ubuntu package `dataset-fashion-mnist` installs.
const SYSTEM: &str = "/usr/share/datasets/fashion-mnist";

/// Mean and deviation of the 60 000 training images.
pub(super) fn normalisation() -> Normalisation {
    Normalisation::new([0.2860], [0.3530])
}

/// Fashion-MNIST: 60 000 training and 10 000 test images of 28x28x1.
pub(super) fn open_fashion_mnist(dir: Option<&Path>) -> Result<Data> {
    let place = Place {
        set: "fashion-mnist",
        folders: &["fashion-mnist", "FashionMNIST/raw"],
        system: Some(SYSTEM),
        wanted: "train-images-idx3-ubyte[.gz]",
        remedy: "`apt-get install dataset-fashion-mnist`, or give the folder of the four IDX files with --data-dir",
    };
    open(&place, dir, &CLASSES, normalisation())
}

/// MNIST: 60 000 training and 10 000 test images of 28x28x1.
pub(super) fn open_mnist(dir: Option<&Path>) -> Result<Data> {
    let place = Place {
        set: "mnist",
        folders: &["mnist", "MNIST/raw"],
        system: None,
        wanted: "train-images-idx3-ubyte[.gz]",
        remedy: "give the folder of its four IDX files with --data-dir",
    };
    open(&place, dir, &DIGITS, Normalisation::new([0.1307], [0.3081]))
}

fn open(place: &Place, dir: Option<&Path>, classes: &[&str], normalisation: Normalisation) -> Result<Data> {
    let folder = locate(place, dir, std::env::var_os(super::locate::VARIABLE), |folder| {
        file(folder, "train", "images", 3).is_some()
    })?;
    let split = |prefix: &str| -> Result<(PathBuf, Split)> {
        let images = existing(&folder, prefix, "images", 3)?;
        let labels = existing(&folder, prefix, "labels", 1)?;
        let split = idx::read_split(&images, &labels, classes.len())?;
        Ok((images, split))
    };
    let (train_images, train) = split("train")?;
    let (test_images, test) = split("t10k")?;
    if train.shape != test.shape {
        return Err(Error::file(
            test_images,
            format!(
                "its images are {}, those of {} are {}; both splits must come from the same set",
                test.shape,
                train_images.display(),
                train.shape
            ),
        ));
    }
    data(place.set, train, test, classes, normalisation)
}

/// Both splits as sets under one name.
pub(super) fn data(
    name: &str,
    train: Split,
    test: Split,
    classes: &[&str],
    normalisation: Normalisation,
) -> Result<Data> {
    let set = |split: Split| {
        Dataset::from_memory(name, split.shape, classes.len(), split.pixels, split.labels)?
            .with_class_names(classes.iter().copied())?
            .with_normalisation(normalisation.clone())
    };
    Ok(Data { train: set(train)?, test: set(test)? })
}

/// The names under which one of the four files goes around.
fn names(prefix: &str, what: &str, dimensions: usize) -> [String; 4] {
    let dashed = format!("{prefix}-{what}-idx{dimensions}-ubyte");
    let dotted = format!("{prefix}-{what}.idx{dimensions}-ubyte");
    [dashed.clone(), format!("{dashed}.gz"), dotted.clone(), format!("{dotted}.gz")]
}

fn file(folder: &Path, prefix: &str, what: &str, dimensions: usize) -> Option<PathBuf> {
    names(prefix, what, dimensions).iter().map(|name| folder.join(name)).find(|path| path.is_file())
}

fn existing(folder: &Path, prefix: &str, what: &str, dimensions: usize) -> Result<PathBuf> {
    file(folder, prefix, what, dimensions).ok_or_else(|| {
        let names = names(prefix, what, dimensions).join(", ");
        Error::file(folder, format!("has the training images but none of {names}; add the missing file"))
    })
}
