//! Data sets and batches: labelled images from the binary itself, from IDX or CIFAR files, from CSV files of signals, from folders of pictures or from shards of them,
//! augmented, normalised and handed out as NHWC `f32` batches by a background thread.
//!
//! | file | holds |
//! |--|--|
//! | `source` | [`DataSource`] and [`open`]: a name and where to look → a training and a test set |
//! | `dataset` | [`Dataset`]: images, labels, class names, normalisation |
//! | `contents` | [`Contents`]: what a set holds, to tell it from another |
//! | `embedded` | the cut of Fashion-MNIST inside the binary |
//! | `fashion_mnist`, `cifar`, `signals`, `image_folder` | the readers; `idx`, `picture` and `locate` are what they read with |
//! | `classes` | [`ClassMatch`]: the order of class names, and those of a data set on those of a model |
//! | `parquet_shards` | pictures in Parquet files; `parquet_splits` finds the files, `parquet_columns` what to read of them, `parquet_file` and `parquet_pages` read; with the feature `parquet` |
//! | `preprocess` | [`Preprocessing`]: a picture of any size → a network's input |
//! | `imagenet` | names of ImageNet's classes |
//! | `augment` | [`Augment`]: shift, flip, erase and normalise, one pass per row |
//! | `crop`, `rand_augment` | what is drawn for a training image beside: [`ResizedCrop`], [`RandAugment`], colour jitter |
//! | `pixel_ops`, `warp` | [`PixelOp`]: the operations that those are made of |
//! | `loader` | [`Loader`] and [`Batches`]: order, batches, prefetch |
//! | `random` | random numbers that depend on (seed, epoch, image) and on nothing else |
//!
//! ```
//! use depthshrinker::data::{self, Augment, DataSource, Loader};
//! use std::sync::Arc;
//!
//! let data = data::open(&DataSource::default())?;
//! let loader = Loader::train(Arc::new(data.train), 64, Augment { pad_crop: 2, flip: true, ..Augment::none() }, 1)?;
//! let batch = loader.epoch(0, 0).next().expect("an epoch has batches")?;
//! assert_eq!(batch.images.len(), 64 * 28 * 28);
//! # Ok::<(), depthshrinker::Error>(())
//! ```

mod augment;
mod cifar;
mod classes;
mod contents;
mod crop;
mod dataset;
mod embedded;
mod fashion_mnist;
mod idx;
mod image_folder;
mod imagenet;
mod loader;
mod locate;
#[cfg(feature = "parquet")]
mod parquet_columns;
#[cfg(feature = "parquet")]
mod parquet_file;
#[cfg(feature = "parquet")]
mod parquet_pages;
#[cfg(feature = "parquet")]
mod parquet_shards;
#[cfg(feature = "parquet")]
mod parquet_splits;
mod picture;
mod pixel_ops;
mod preprocess;
mod rand_augment;
mod random;
mod signals;
mod source;
mod warp;

pub use augment::{Augment, EraseMode};
pub use cifar::parse_cifar10;
pub use classes::ClassMatch;
pub use contents::Contents;
pub use crop::ResizedCrop;
pub use dataset::{Data, Dataset, ImageShape, Normalisation};
pub use idx::{Split, parse_idx};
pub use imagenet::{IMAGENET_CLASSES, imagenet_class_names};
pub use loader::{Batch, Batches, ByteBatch, Loader};
pub use pixel_ops::PixelOp;
pub use preprocess::{IMAGENET_SIZE, Interpolation, Preprocessing, Resize};
pub use rand_augment::RandAugment;
pub use source::{DataSource, open, open_test};
