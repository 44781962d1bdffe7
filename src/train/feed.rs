//! Brings the images of a batch to the networks: normalised by the host, or as bytes that a GPU augments itself. A data set
//! that fits into the GPU's memory is copied once; afterwards a batch copies only its views.

use std::borrow::Cow;
use std::ops::Range;

use super::interrupt::Interrupt;
use crate::data::{Batch, Batches, ByteBatch, Loader};
use crate::device::{Device, View};
use crate::engine::Engine;
use crate::ops::augment::{ByteImages, ImageRoom, ImageView};
use crate::{Error, Result};

/// Share of a GPU's free memory that a data set may take: activations need the rest.
const RESIDENT_SHARE: u64 = 4;

/// The images and labels of one training step.
#[derive(Debug, Clone)]
pub struct StepBatch<'a> {
    /// The images.
    pub images: StepImages<'a>,
    /// Label of each image.
    pub labels: &'a [u32],
}

/// The images of a step, in one of the forms that networks accept.
#[derive(Debug, Clone)]
pub enum StepImages<'a> {
    /// Normalised by the host, `[n, h, w, c]`.
    Normalised(&'a [f32]),
    /// Bytes that a GPU augments and normalises.
    Bytes {
        /// `[n, h, w, c]`; empty where the device has the whole set.
        pixels: &'a [u8],
        /// The view of each image; `image` is an index into `pixels`, or into the whole set.
        views: Cow<'a, [ImageView]>,
    },
}

impl StepBatch<'_> {
    /// The images of a range, such as one of several networks gets.
    ///
    /// # Errors
    /// A batch whose images are not as many as its labels.
    pub(super) fn part(&self, range: Range<usize>) -> Result<StepBatch<'_>> {
        let n = self.labels.len();
        let of = |len: usize| {
            let whole = n > 0 && range.end <= n && len.is_multiple_of(n);
            let got = || format!("{len} numbers with {n} labels, of which {range:?} are asked for");
            let size = if whole { len / n } else { return Err(Error::shape("batch", "whole images", got())) };
            Ok(range.start * size..range.end * size)
        };
        let images = match &self.images {
            StepImages::Normalised(images) => StepImages::Normalised(&images[of(images.len())?]),
            StepImages::Bytes { pixels, views } => {
                let own = &views[of(views.len())?];
                // Indices are relative to the first image of `pixels`.
                let first = if pixels.is_empty() { 0 } else { range.start as i32 };
                let counted = |view: &ImageView| ImageView { image: view.image - first, ..*view };
                let views = if first == 0 { own.into() } else { own.iter().map(counted).collect() };
                StepImages::Bytes { pixels: &pixels[of(pixels.len())?], views }
            }
        };
        Ok(StepBatch { images, labels: &self.labels[range] })
    }
}

/// Where images are decoded and augmented; all devices that share a batch use the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Source {
    /// The host normalises them.
    #[default]
    Host,
    /// GPUs get the bytes of every batch.
    Bytes,
    /// GPUs have the bytes of the whole set.
    Resident,
}

impl Source {
    /// Selects how a loader's batches reach the devices. GPUs get the whole set if it fits into the memory of all of them
    /// and is read `often`.
    pub fn of<'d>(devices: impl IntoIterator<Item = &'d Device>, loader: &Loader, often: bool) -> Self {
        let set = loader.resident().filter(|_| often).map(|pixels| pixels.len() as u64);
        let mut source = if set.is_some() { Self::Resident } else { Self::Bytes };
        for device in devices {
            let Device::Gpu(gpu, _) = device else { return Self::Host };
            let room = gpu.driver().memory().map_or(u64::MAX, |(free, _)| free / RESIDENT_SHARE);
            if set.is_some_and(|bytes| bytes > room) {
                source = Self::Bytes;
            }
        }
        source
    }

    /// The batches of an epoch from `first_step` on.
    pub fn epoch(self, loader: &Loader, epoch: u64, first_step: usize) -> FedBatches {
        match self {
            Self::Host => FedBatches::Images(loader.epoch(epoch, first_step)),
            Self::Bytes | Self::Resident => {
                FedBatches::Bytes(loader.byte_epoch(epoch, first_step, self == Self::Resident))
            }
        }
    }
}

/// A batch that the loader has prepared.
#[derive(Debug)]
pub(super) enum LoadedBatch {
    Images(Batch),
    Bytes(ByteBatch),
}

impl LoadedBatch {
    /// Borrows the batch for a step.
    pub fn batch(&self) -> StepBatch<'_> {
        match self {
            Self::Images(batch) => StepBatch { images: StepImages::Normalised(&batch.images), labels: &batch.labels },
            Self::Bytes(batch) => {
                let images = StepImages::Bytes { pixels: &batch.pixels, views: batch.views.as_slice().into() };
                StepBatch { images, labels: &batch.labels }
            }
        }
    }
}

/// The batches of an epoch.
#[derive(Debug)]
pub(super) enum FedBatches {
    Images(Batches),
    Bytes(Batches<ByteBatch>),
}

impl FedBatches {
    /// The next batch, unless `interrupt` is set before it comes.
    ///
    /// # Errors
    /// As the loader's batches, and [`Error::Interrupted`].
    pub fn next_unless(&mut self, interrupt: &Interrupt) -> Option<Result<LoadedBatch>> {
        let stop = || interrupt.is_set();
        match self {
            Self::Images(batches) => batches.next_unless(stop).map(|batch| batch.map(LoadedBatch::Images)),
            Self::Bytes(batches) => batches.next_unless(stop).map(|batch| batch.map(LoadedBatch::Bytes)),
        }
    }
}

/// The images of batches, where one engine reads them.
#[derive(Debug, Default)]
pub(super) enum Feed {
    /// Images are normalised by the host.
    #[default]
    Host,
    /// The GPU has the images' bytes.
    Bytes {
        images: Box<ByteImages>,
        /// Whether it has the whole set.
        resident: bool,
    },
}

impl Feed {
    /// Room for `batch` images of a loader on a device. Copies the whole set to a GPU if that is where images come from.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(device: &Device, loader: &Loader, source: Source, batch: usize) -> Result<Self> {
        if source == Source::Host {
            return Ok(Self::Host);
        }
        let resident = loader.resident().filter(|_| source == Source::Resident);
        let count = if resident.is_some() { loader.dataset().len() } else { batch };
        let shape = loader.dataset().shape().into();
        let mut images =
            Box::new(ByteImages::new(device, shape, loader.tables().clone(), ImageRoom { images: count, batch })?);
        if let Some(pixels) = resident {
            images.set_pixels(pixels)?;
        }
        Ok(Self::Bytes { images, resident: resident.is_some() })
    }

    /// Brings images to the device.
    ///
    /// # Errors
    /// Images that do not fit the engine, or bytes where the host was to normalise them; a device that fails.
    pub fn set(&mut self, images: &StepImages<'_>, engine: &mut Engine) -> Result<()> {
        match (self, images) {
            (Self::Bytes { images, resident }, StepImages::Bytes { pixels, views }) => {
                if !*resident {
                    images.pass_pixels(pixels)?;
                }
                images.set_views(views)?;
                engine.begin(views.len())
            }
            (Self::Host, StepImages::Normalised(images)) => engine.set_images(View::Host(images)),
            (feed, _) => {
                let (host, bytes) = ("images that the host normalised", "bytes");
                let (takes, got) = if matches!(feed, Self::Host) { (host, bytes) } else { (bytes, host) };
                Err(Error::Config(format!("the network is fed with {takes} and was given {got}")))
            }
        }
    }

    /// Augments the images that were set into the engine's input. On a GPU it may be part of recorded work.
    pub fn write(&self, engine: &mut Engine) {
        if let Self::Bytes { images, .. } = self {
            images.write(engine.images_mut());
        }
    }
}
