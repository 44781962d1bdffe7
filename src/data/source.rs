//! Which data to use: from what the user named to a training and a test set.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::dataset::{Data, Dataset};
use super::preprocess::IMAGENET_SIZE;
use super::{cifar, embedded, fashion_mnist, image_folder, signals};
use crate::{Error, Result};

const MAX_IMAGE_SIZE: usize = 4096;
/// What names a folder of Parquet shards.
const SHARDS: &str = "parquet:";
/// What names a folder of CSV files with signals.
const SIGNALS: &str = "signals:";
/// The sets that go by a name of their own.
const NAMED: [&str; 6] = ["embedded", "fashion-mnist", "mnist", "cifar10", "cifar100", image_folder::IMAGENET];

/// What data to use and where to look for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSource {
    /// `embedded`, `fashion-mnist`, `mnist`, `cifar10`, `cifar100`, `imagenet`, the path of a folder of
    /// pictures, `signals:` and that of a folder of CSV files, or `parquet:` and that of a folder of Parquet shards (with the
    /// feature `parquet`).
    pub name: String,
    /// The folder of the named set, or one that contains it. Without it `DEPTHSHRINKER_DATA` is searched, then where
    /// the system's packages put data; a set that is named by its path lies there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// Side that pictures of a folder are brought to, in pixels; 224 if not given. Other sets have a size of their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,
}

impl Default for DataSource {
    /// The cut of Fashion-MNIST inside the binary.
    fn default() -> Self {
        Self { name: "embedded".to_owned(), dir: None, image_size: None }
    }
}

impl DataSource {
    /// The new place of this set, if that is what `given` names: another folder for a set that is in files. A set keeps the
    /// name that it had.
    pub fn moved(&self, given: &str) -> Option<PathBuf> {
        let is_place = !NAMED.contains(&given) && given != self.name && self.name != "embedded";
        let kind = |name: &str| [SHARDS, SIGNALS].into_iter().find(|kind| name.starts_with(kind)).unwrap_or_default();
        let folder = given.strip_prefix(kind(&self.name)).filter(|_| is_place && kind(given) == kind(&self.name));
        folder.map(PathBuf::from)
    }
}

/// Opens a data set: reads it whole, or lists its pictures. Whatever is wrong with its files is told in one line.
pub fn open(source: &DataSource) -> Result<Data> {
    if let Some(data) = open_pair(source)? {
        return Ok(data);
    }
    let (root, image_size) = pictures(source)?;
    image_folder::open(&root, &source.name, image_size)
}

/// The test set alone, which is all that an evaluation needs: a folder of pictures or of shards need not have training images,
/// and no training picture is listed.
///
/// # Errors
/// As [`open`].
pub fn open_test(source: &DataSource) -> Result<Dataset> {
    if let Some(folder) = source.name.strip_prefix(SHARDS) {
        return open_test_shards(folder, source.dir.as_deref(), source.image_size);
    }
    if let Some(data) = open_pair(source)? {
        return Ok(data.test);
    }
    let (root, image_size) = pictures(source)?;
    image_folder::open_test(&root, &source.name, image_size)
}

/// A set whose two parts are opened together; `None` if `source` is a folder of pictures.
fn open_pair(source: &DataSource) -> Result<Option<Data>> {
    let dir = source.dir.as_deref();
    let data = match source.name.as_str() {
        "embedded" if dir.is_some() => {
            return Err(Error::Config(
                "the embedded data is inside the binary; with a data folder, name the set that it holds".to_owned(),
            ));
        }
        "embedded" => embedded::open()?,
        "fashion-mnist" => fashion_mnist::open_fashion_mnist(dir)?,
        "mnist" => fashion_mnist::open_mnist(dir)?,
        "cifar10" => cifar::open_cifar10(dir)?,
        "cifar100" => cifar::open_cifar100(dir)?,
        name => {
            if let Some(folder) = name.strip_prefix(SHARDS) {
                return open_shards(folder, dir, source.image_size).map(Some);
            }
            let Some(folder) = name.strip_prefix(SIGNALS) else { return Ok(None) };
            signals::open(&folder_at(folder, dir), name)?
        }
    };
    let shape = data.train.shape();
    match source.image_size {
        Some(size) if size != shape.height || size != shape.width => Err(Error::Config(format!(
            "image size {size} is for folders of pictures; the images of {} are {}x{}: leave it out",
            source.name, shape.height, shape.width
        ))),
        _ => Ok(Some(data)),
    }
}

/// The folder of pictures that is meant, and the side that they are brought to.
fn pictures(source: &DataSource) -> Result<(PathBuf, usize)> {
    let image_size = folder_size(source.image_size)?;
    let (name, dir) = (source.name.as_str(), source.dir.as_deref());
    if name == image_folder::IMAGENET {
        return Ok((image_folder::locate_imagenet(dir)?, image_size));
    }
    let tried = places(name, dir);
    let is_it = |place: &&PathBuf| place.is_dir() && (dir != Some(place) || image_folder::holds_pictures(place));
    match tried.iter().find(|place| !name.is_empty() && is_it(place)) {
        Some(root) => Ok((root.clone(), image_size)),
        None => {
            let tried: Vec<String> = tried.iter().map(|place| place.display().to_string()).collect();
            Err(Error::Config(format!(
                "unknown data `{name}`: expected {}, or a folder that holds train/ and val/ ({} is no folder; if it was \
                 moved, give the new place with --data-dir)",
                NAMED.join(", "),
                tried.join(" or ")
            )))
        }
    }
}

/// Where a set that is named by its path may be: there, or in `dir`, or it is `dir`, under whatever name it lies now.
fn places(name: &str, dir: Option<&Path>) -> Vec<PathBuf> {
    match dir {
        None => vec![PathBuf::from(name)],
        // Joining an absolute path would forget the folder.
        Some(dir) if Path::new(name).is_absolute() => vec![dir.to_owned()],
        Some(dir) => vec![dir.join(name), dir.to_owned()],
    }
}

/// The first of the places of a set that is a folder, or else the first, for its absence to be told.
fn folder_at(name: &str, dir: Option<&Path>) -> PathBuf {
    let mut tried = places(name, dir);
    let found = tried.iter().position(|place| place.is_dir()).unwrap_or(0);
    tried.swap_remove(found)
}

/// The side that pictures of a folder are brought to.
fn folder_size(asked: Option<usize>) -> Result<usize> {
    let image_size = asked.unwrap_or(IMAGENET_SIZE);
    if (1..=MAX_IMAGE_SIZE).contains(&image_size) {
        return Ok(image_size);
    }
    Err(Error::Config(format!("image size {image_size} is not in 1 to {MAX_IMAGE_SIZE}")))
}

#[cfg(feature = "parquet")]
fn open_shards(name: &str, dir: Option<&Path>, image_size: Option<usize>) -> Result<Data> {
    super::parquet_shards::open(&folder_at(name, dir), name, folder_size(image_size)?)
}

#[cfg(feature = "parquet")]
fn open_test_shards(name: &str, dir: Option<&Path>, image_size: Option<usize>) -> Result<Dataset> {
    super::parquet_shards::open_test(&folder_at(name, dir), name, folder_size(image_size)?)
}

#[cfg(not(feature = "parquet"))]
fn open_shards<T>(name: &str, _: Option<&Path>, _: Option<usize>) -> Result<T> {
    Err(Error::Config(format!(
        "this program was built without Parquet, which {SHARDS}{name} needs; build it with `--features parquet`"
    )))
}

#[cfg(not(feature = "parquet"))]
use open_shards as open_test_shards;
