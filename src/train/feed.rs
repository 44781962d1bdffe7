//! How the images of a batch come to the network: normalised by the host, or as bytes that a GPU augments itself. A set
//! that fits goes to the GPU once, and from then on only the views of a batch do.

use crate::Result;
use crate::data::{Batch, Batches, ByteBatch, Loader};
use crate::device::{Device, View};
use crate::engine::Engine;
use crate::ops::augment::ByteImages;

/// Share of a GPU's free memory that a data set may take: activations need the rest.
const RESIDENT_SHARE: u64 = 4;

/// The images of one loader, for one engine.
#[derive(Debug)]
pub(super) enum Feed {
    /// Images are normalised by the host.
    Host,
    /// The GPU has the images' bytes.
    Bytes {
        images: Box<ByteImages>,
        /// Whether it has the whole set.
        resident: bool,
    },
}

/// A batch on its way.
#[derive(Debug)]
pub(super) enum Fed {
    Images(Batch),
    Bytes(ByteBatch),
}

impl Fed {
    /// Label of each image.
    pub fn labels(&self) -> &[u32] {
        match self {
            Self::Images(batch) => &batch.labels,
            Self::Bytes(batch) => &batch.labels,
        }
    }
}

/// The batches of an epoch.
#[derive(Debug)]
pub(super) enum FedBatches {
    Images(Batches),
    Bytes(Batches<ByteBatch>),
}

impl Iterator for FedBatches {
    type Item = Result<Fed>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Images(batches) => batches.next().map(|batch| batch.map(Fed::Images)),
            Self::Bytes(batches) => batches.next().map(|batch| batch.map(Fed::Bytes)),
        }
    }
}

impl Feed {
    /// For the batches of a loader. Copies the whole set to a GPU where it fits and will be looked at `often`.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(device: &Device, loader: &Loader, often: bool) -> Result<Self> {
        let Device::Gpu(gpu, _) = device else { return Ok(Self::Host) };
        let room = gpu.driver().memory().map_or(u64::MAX, |(free, _)| free / RESIDENT_SHARE);
        let resident = loader.resident().filter(|pixels| often && pixels.len() as u64 <= room);
        let (shape, batch) = (loader.dataset().shape().into(), loader.batch_size());
        let count = if resident.is_some() { loader.dataset().len() } else { batch };
        let mut images = Box::new(ByteImages::new(device, shape, loader.tables().clone(), (count, batch))?);
        if let Some(pixels) = resident {
            images.set_pixels(pixels)?;
        }
        Ok(Self::Bytes { images, resident: resident.is_some() })
    }

    /// The batches of an epoch from `first_step` on.
    pub fn epoch(&self, loader: &Loader, epoch: u64, first_step: usize) -> FedBatches {
        match self {
            Self::Host => FedBatches::Images(loader.epoch(epoch, first_step)),
            Self::Bytes { resident, .. } => FedBatches::Bytes(loader.byte_epoch(epoch, first_step, *resident)),
        }
    }

    /// Brings a batch to the device.
    ///
    /// # Errors
    /// When it does not fit the engine, or the device fails.
    pub fn set(&mut self, batch: &Fed, engine: &mut Engine) -> Result<()> {
        match (self, batch) {
            (Self::Bytes { images, resident }, Fed::Bytes(batch)) => {
                if !*resident {
                    images.set_pixels(&batch.pixels)?;
                }
                images.set_views(&batch.views)?;
                engine.begin(batch.views.len())
            }
            (_, Fed::Images(batch)) => engine.set_images(View::Host(&batch.images)),
            (Self::Host, Fed::Bytes(_)) => unreachable!("the batches are this feed's own"),
        }
    }

    /// Augments the batch that was set into the engine's input. On a GPU it may be part of recorded work.
    pub fn write(&self, engine: &mut Engine) {
        if let Self::Bytes { images, .. } = self {
            images.write(engine.images_mut());
        }
    }
}
