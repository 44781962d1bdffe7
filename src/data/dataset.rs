//! A labelled set of images, in memory or decoded from files on demand.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::classes::ClassMatch;
#[cfg(feature = "parquet")]
use super::parquet_shards::ShardRows;
use super::picture::Picture;
use super::preprocess::{Preprocessing, Resize};
use super::random;
use crate::shape::Shape;
use crate::{Error, Result, memory};

/// Height, width and channels of every image of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageShape {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Values per pixel: 1 for grey, 3 for RGB.
    pub channels: usize,
}

impl ImageShape {
    /// Values of one image: height · width · channels.
    pub fn size(&self) -> usize {
        self.height * self.width * self.channels
    }
}

impl From<ImageShape> for Shape {
    fn from(shape: ImageShape) -> Self {
        Self::new(shape.height, shape.width, shape.channels)
    }
}

impl fmt::Display for ImageShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}", self.height, self.width, self.channels)
    }
}

/// Mean and standard deviation per channel, of pixel values scaled to 0..1. A network sees `(v / 255 - mean) / std`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Normalisation {
    /// Mean, one per channel.
    pub mean: Vec<f32>,
    /// Standard deviation, one per channel, above zero.
    pub std: Vec<f32>,
}

impl Normalisation {
    /// The normalisation from published constants.
    pub(super) fn new<const C: usize>(mean: [f32; C], std: [f32; C]) -> Self {
        Self { mean: mean.to_vec(), std: std.to_vec() }
    }

    /// What pretrained ImageNet networks expect.
    pub fn imagenet() -> Self {
        Self::new([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    }

    /// The exact statistics of `images`, `uint8` with `channels` interleaved.
    fn of(images: &[u8], channels: usize) -> Self {
        // Counts of the 256 values are integers, so the result depends on no order of summation.
        let mut counts = vec![[0u64; 256]; channels];
        for pixel in images.chunks_exact(channels) {
            for (count, &value) in counts.iter_mut().zip(pixel) {
                count[usize::from(value)] += 1;
            }
        }
        let total = (images.len() / channels) as f64;
        let (mut mean, mut std) = (Vec::new(), Vec::new());
        for count in &counts {
            let moment = |power: i32| -> f64 {
                count.iter().enumerate().map(|(v, &n)| (v as f64 / 255.0).powi(power) * n as f64).sum::<f64>() / total
            };
            let average = moment(1);
            let deviation = (moment(2) - average * average).max(0.0).sqrt();
            mean.push(average as f32);
            // A channel that never varies would divide by zero; it carries nothing at any scale.
            std.push(if deviation > 1e-4 { deviation as f32 } else { 1.0 });
        }
        Self { mean, std }
    }

    /// Refuses a normalisation that does not fit `channels` or would yield infinities.
    pub(super) fn check(&self, channels: usize) -> Result<()> {
        if self.mean.len() != channels || self.std.len() != channels {
            return Err(Error::Data(format!(
                "normalisation has {} means and {} deviations, the images have {channels} channels",
                self.mean.len(),
                self.std.len()
            )));
        }
        if self.mean.iter().any(|m| !m.is_finite()) || self.std.iter().any(|s| !(s.is_finite() && *s > 0.0)) {
            return Err(Error::Data("normalisation needs finite means and deviations above zero".to_owned()));
        }
        Ok(())
    }
}

/// Where the pixels are.
#[derive(Clone)]
enum Images {
    /// `uint8`, NHWC, contiguous.
    Memory(Vec<u8>),
    /// One picture per image, decoded and resized whenever it is asked for.
    Files { paths: Vec<PathBuf>, resize: Resize },
    /// One picture per row of Parquet files, likewise.
    #[cfg(feature = "parquet")]
    Shards { rows: ShardRows, resize: Resize },
}

/// Labelled images of one shape.
#[derive(Clone)]
pub struct Dataset {
    name: String,
    shape: ImageShape,
    class_names: Vec<String>,
    labels: Vec<u32>,
    images: Images,
    normalisation: Normalisation,
}

/// A training and a test set with the same image shape and classes.
#[derive(Debug, Clone)]
pub struct Data {
    /// What is learnt from.
    pub train: Dataset,
    /// What accuracy is measured on.
    pub test: Dataset,
}

impl Dataset {
    /// A set from `images`, `uint8` NHWC, one after another, and as many `labels` below `classes`. Its normalisation is
    /// that of the images; a test set should be given that of its training set by [`Self::with_normalisation`].
    pub fn from_memory(
        name: impl Into<String>,
        shape: ImageShape,
        classes: usize,
        images: Vec<u8>,
        labels: Vec<u32>,
    ) -> Result<Self> {
        let name = name.into();
        if shape.height == 0 || shape.width == 0 || shape.channels == 0 {
            return Err(Error::Data(format!("{name}: images of {shape} have no pixels")));
        }
        let wanted = shape
            .height
            .checked_mul(shape.width)
            .and_then(|area| area.checked_mul(shape.channels))
            .and_then(|size| size.checked_mul(labels.len()));
        if wanted != Some(images.len()) {
            return Err(Error::Data(format!(
                "{name}: {} labels want as many images of {shape}, but {} bytes of pixels came",
                labels.len(),
                images.len()
            )));
        }
        let class_names = (0..classes).map(|class| class.to_string()).collect();
        let normalisation = Normalisation::of(&images, shape.channels);
        Self { name, shape, class_names, labels, images: Images::Memory(images), normalisation }.checked()
    }

    /// A set of pictures, each brought to one shape when it is read.
    pub(super) fn from_files(
        name: &str,
        preprocessing: Preprocessing,
        class_names: Vec<String>,
        paths: Vec<PathBuf>,
        labels: Vec<u32>,
    ) -> Result<Self> {
        let Preprocessing { shape, resize, normalisation } = preprocessing;
        let images = Images::Files { paths, resize };
        Self { name: name.to_owned(), shape, class_names, labels, images, normalisation }.checked()
    }

    /// A set of pictures in Parquet shards, each brought to one shape when it is read.
    #[cfg(feature = "parquet")]
    pub(super) fn from_shards(
        name: &str,
        preprocessing: Preprocessing,
        class_names: Vec<String>,
        rows: ShardRows,
        labels: Vec<u32>,
    ) -> Result<Self> {
        let Preprocessing { shape, resize, normalisation } = preprocessing;
        let images = Images::Shards { rows, resize };
        Self { name: name.to_owned(), shape, class_names, labels, images, normalisation }.checked()
    }

    /// What holds for every set, wherever its images are.
    fn checked(self) -> Result<Self> {
        let classes = self.class_names.len();
        if self.labels.is_empty() {
            return Err(Error::Data(format!("{}: no images", self.name)));
        }
        if let Some((index, label)) = self.labels.iter().enumerate().find(|(_, label)| **label as usize >= classes) {
            return Err(Error::Data(format!(
                "{}: label {label} of image {index} is out of range, there are {classes} classes",
                self.name
            )));
        }
        Ok(self)
    }

    /// The same set with other names for its classes.
    pub fn with_class_names<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Result<Self> {
        let names: Vec<String> = names.into_iter().map(Into::into).collect();
        if names.len() != self.classes() {
            return Err(Error::Data(format!("{}: {} names for {} classes", self.name, names.len(), self.classes())));
        }
        self.class_names = names;
        Ok(self)
    }

    /// The same set with its classes as a match with those of a model has them.
    ///
    /// # Errors
    /// A match of another number of classes.
    pub fn with_classes(mut self, matched: ClassMatch) -> Result<Self> {
        if matched.places.len() != self.classes() {
            let (own, other) = (self.classes(), matched.places.len());
            return Err(Error::Data(format!("{}: {own} classes, matched as {other}", self.name)));
        }
        self.labels.iter_mut().for_each(|label| *label = matched.places[*label as usize]);
        self.with_class_names(matched.names)?.checked()
    }

    /// The same set with another normalisation.
    pub fn with_normalisation(mut self, normalisation: Normalisation) -> Result<Self> {
        normalisation.check(self.shape.channels)?;
        self.normalisation = normalisation;
        Ok(self)
    }

    /// The same pictures made otherwise. Images in memory have a shape already and are refused.
    pub fn with_preprocessing(mut self, preprocessing: &Preprocessing) -> Result<Self> {
        preprocessing.check()?;
        match &mut self.images {
            Images::Memory(_) => {
                return Err(Error::Data(format!("{}: its images are {} and stay so", self.name, self.shape)));
            }
            Images::Files { resize, .. } => *resize = preprocessing.resize,
            #[cfg(feature = "parquet")]
            Images::Shards { resize, .. } => *resize = preprocessing.resize,
        }
        self.shape = preprocessing.shape;
        self.normalisation = preprocessing.normalisation.clone();
        Ok(self)
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Never true: a set without images is refused when it is made.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The name it goes by in reports.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Shape of every image.
    pub fn shape(&self) -> ImageShape {
        self.shape
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.class_names.len()
    }

    /// Names of the classes, by label.
    pub fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// Labels of all images.
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }

    /// Mean and deviation that batches are normalised with.
    pub fn normalisation(&self) -> &Normalisation {
        &self.normalisation
    }

    /// How pictures are brought to the set's shape; `None` for images that have it already.
    pub fn resize(&self) -> Option<Resize> {
        match self.images {
            Images::Memory(_) => None,
            Images::Files { resize, .. } => Some(resize),
            #[cfg(feature = "parquet")]
            Images::Shards { resize, .. } => Some(resize),
        }
    }

    /// Writes one image as `uint8` HWC into `out`, which has [`ImageShape::size`] bytes.
    pub fn image(&self, index: usize, out: &mut [u8]) -> Result<()> {
        if index >= self.len() {
            return Err(Error::Data(format!("{}: image {index} of {}", self.name, self.len())));
        }
        if out.len() != self.shape.size() {
            return Err(Error::shape("image", format!("{} bytes", self.shape.size()), format!("{}", out.len())));
        }
        match self.resize() {
            Some(resize) => resize.apply(&self.picture(index)?, self.shape, out),
            None => {
                out.copy_from_slice(self.pixels(index).unwrap_or_default());
                Ok(())
            }
        }
    }

    /// One image in its own size: a picture as it is decoded, before it is brought to the set's shape.
    pub(super) fn picture(&self, index: usize) -> Result<Picture> {
        let ImageShape { height, width, channels } = self.shape;
        match &self.images {
            Images::Memory(pixels) => {
                let size = self.shape.size();
                let pixels = memory::copy(&pixels[index * size..][..size], "the pixels of an image")?;
                Ok(Picture { width, height, channels, pixels })
            }
            Images::Files { paths, .. } => Picture::read(&paths[index], channels),
            #[cfg(feature = "parquet")]
            Images::Shards { rows, .. } => rows.picture(index, channels),
        }
    }

    /// Lends one image as it is stored: its pixels, or the bytes of its picture.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub(super) fn encoded(&self, index: usize, mut look: impl FnMut(&[u8])) -> Result<()> {
        match &self.images {
            Images::Memory(_) => look(self.pixels(index).unwrap_or_default()),
            Images::Files { paths, .. } => look(&Picture::bytes(&paths[index])?),
            #[cfg(feature = "parquet")]
            Images::Shards { rows, .. } => rows.encoded(index, look)?,
        }
        Ok(())
    }

    /// The `uint8` pixels `[n, h, w, c]` of all images where they lie in memory; `None` when they are in files.
    pub(super) fn all_pixels(&self) -> Option<&[u8]> {
        match &self.images {
            Images::Memory(pixels) => Some(pixels),
            _ => None,
        }
    }

    /// The `uint8` HWC pixels of one image where they lie in memory; `None` when they are in files.
    pub(super) fn pixels(&self, index: usize) -> Option<&[u8]> {
        let size = self.shape.size();
        self.all_pixels().map(|pixels| &pixels[index * size..][..size])
    }

    /// The file of one image; `None` when images are in memory or many in a file.
    pub fn file(&self, index: usize) -> Option<&Path> {
        match &self.images {
            Images::Files { paths, .. } => paths.get(index).map(PathBuf::as_path),
            _ => None,
        }
    }

    /// The order of a shuffled epoch. Pictures in shards are shuffled in parts, see `parquet_shards`.
    pub fn shuffled(&self, seed: u64, epoch: u64) -> Vec<usize> {
        match &self.images {
            #[cfg(feature = "parquet")]
            Images::Shards { rows, .. } => rows.shuffled(seed, epoch),
            _ => random::shuffled(self.len(), seed, epoch),
        }
    }

    /// The images with these indices, in this order; classes and normalisation stay.
    pub fn subset(&self, indices: &[usize]) -> Result<Self> {
        if let Some(index) = indices.iter().find(|index| **index >= self.len()) {
            return Err(Error::Data(format!("{}: image {index} of {}", self.name, self.len())));
        }
        let images = match &self.images {
            Images::Memory(pixels) => {
                let size = self.shape.size();
                let mut kept = memory::room(indices.len() * size, "a part of the data set")?;
                indices.iter().for_each(|&index| kept.extend_from_slice(&pixels[index * size..][..size]));
                Images::Memory(kept)
            }
            Images::Files { paths, resize } => {
                let paths = indices.iter().map(|&index| paths[index].clone()).collect();
                Images::Files { paths, resize: *resize }
            }
            #[cfg(feature = "parquet")]
            Images::Shards { rows, resize } => Images::Shards { rows: rows.subset(indices), resize: *resize },
        };
        Self {
            name: self.name.clone(),
            shape: self.shape,
            class_names: self.class_names.clone(),
            labels: indices.iter().map(|&index| self.labels[index]).collect(),
            images,
            normalisation: self.normalisation.clone(),
        }
        .checked()
    }

    /// At most `n` images, as evenly over the classes as the set allows: the first ones of every class, in their old
    /// order. Folders list images class by class, so simply the first `n` could all be of one class.
    pub fn take(self, n: usize) -> Result<Self> {
        if n == 0 {
            return Err(Error::Config(format!("{}: a limit of 0 images leaves nothing; give 1 or more", self.name)));
        }
        if n >= self.len() {
            return Ok(self);
        }
        // (how many of its class came before, index): sorting puts the first image of every class before any second.
        let mut seen = vec![0usize; self.classes()];
        let mut ranked: Vec<(usize, usize)> = Vec::with_capacity(self.len());
        for (index, &label) in self.labels.iter().enumerate() {
            ranked.push((seen[label as usize], index));
            seen[label as usize] += 1;
        }
        ranked.sort_unstable();
        let mut kept: Vec<usize> = ranked[..n].iter().map(|(_, index)| *index).collect();
        kept.sort_unstable();
        self.subset(&kept)
    }
}

impl fmt::Debug for Dataset {
    /// Everything but the pixels and labels.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.images {
            Images::Memory(_) => "memory",
            Images::Files { .. } => "files",
            #[cfg(feature = "parquet")]
            Images::Shards { .. } => "shards",
        };
        write!(
            f,
            "Dataset({}: {} images of {}, {} classes, in {place})",
            self.name,
            self.len(),
            self.shape,
            self.classes()
        )
    }
}
