//! Batches of a data set, made ahead of time on a thread of their own.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::augment::Augment;
use super::dataset::Dataset;
use super::preprocess::{Interpolation, resize_cut};
use super::random::{ImageKey, Purpose};
use crate::ops::augment::{ByteTables, ImageView, write};
use crate::{Error, Result, memory};

/// Batches that wait, ready, for the consumer: enough to ride out a slow one, little enough to cost no memory.
const PREFETCH: usize = 3;

/// How often a consumer that waits for a batch is asked whether it still wants it.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long the end of an epoch waits for its thread. A read from a file system that hangs never ends.
const LEAVE_BEHIND: Duration = Duration::from_secs(1);
/// What memory is for.
const BATCH: &str = "a batch of images";

/// Normalised images with their labels.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// `[n, h, w, c]`.
    pub images: Vec<f32>,
    /// Label of each image.
    pub labels: Vec<u32>,
    /// Where each image is in the data set.
    pub indices: Vec<usize>,
}

/// Images as bytes with their labels, to be augmented where the network computes.
#[derive(Debug, Clone, PartialEq)]
pub struct ByteBatch {
    /// `[n, h, w, c]`; empty where the device has the whole set.
    pub pixels: Vec<u8>,
    /// How each image is looked at; its `image` counts in `pixels`, or in the whole set.
    pub views: Vec<ImageView>,
    /// Label of each image.
    pub labels: Vec<u32>,
}

/// Cuts a data set into batches, epoch by epoch. Holds the data by reference count, so a clone is cheap.
#[derive(Clone)]
pub struct Loader {
    dataset: Arc<Dataset>,
    tables: Arc<ByteTables>,
    /// The mean as bytes, which is put where an augmentation leaves nothing.
    fill: Arc<[u8]>,
    batch: usize,
    augment: Augment,
    /// The seed of a shuffled loader; `None` goes through the set in order.
    shuffle: Option<u64>,
}

impl Loader {
    /// Batches to learn from: shuffled anew in every epoch, augmented, all of size `batch`; what is left over of an
    /// epoch is dropped.
    pub fn train(dataset: Arc<Dataset>, batch: usize, augment: Augment, seed: u64) -> Result<Self> {
        augment.check(dataset.shape())?;
        if batch > dataset.len() {
            return Err(Error::Config(format!(
                "batch {batch} is larger than the {} training images of {}; give a smaller batch",
                dataset.len(),
                dataset.name()
            )));
        }
        Self::new(dataset, batch, augment, Some(seed))
    }

    /// Batches to evaluate on: every image once, as it is and in order; the last batch may be smaller.
    pub fn eval(dataset: Arc<Dataset>, batch: usize) -> Result<Self> {
        Self::new(dataset, batch, Augment::none(), None)
    }

    fn new(dataset: Arc<Dataset>, batch: usize, augment: Augment, shuffle: Option<u64>) -> Result<Self> {
        if batch == 0 {
            return Err(Error::Config("a batch of 0 images; give 1 or more".to_owned()));
        }
        let tables = Arc::new(ByteTables::new(&dataset.normalisation().mean, &dataset.normalisation().std));
        let fill = dataset.normalisation().mean.iter().map(|mean| (255.0 * mean).round_ties_even() as u8).collect();
        Ok(Self { dataset, tables, fill, batch, augment, shuffle })
    }

    /// Batches in an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        match self.shuffle {
            Some(_) => self.dataset.len() / self.batch,
            None => self.dataset.len().div_ceil(self.batch),
        }
    }

    /// Images in a batch; the last one of an evaluation may have fewer.
    pub fn batch_size(&self) -> usize {
        self.batch
    }

    /// The data behind it.
    pub fn dataset(&self) -> &Arc<Dataset> {
        &self.dataset
    }

    /// The batches of an epoch from `first_step` on, the same ones whether or not those before were made.
    pub fn epoch(&self, epoch: u64, first_step: usize) -> Batches {
        self.prefetch(epoch, first_step, Self::batch)
    }

    /// The same batches as bytes with views: without the bytes where `resident`, that is where the device has the
    /// [whole set](Self::resident).
    pub fn byte_epoch(&self, epoch: u64, first_step: usize, resident: bool) -> Batches<ByteBatch> {
        self.prefetch(epoch, first_step, move |loader, epoch, indices| loader.byte_batch(epoch, indices, resident))
    }

    /// The bytes of all images, if they are in memory and no augmentation changes them.
    pub fn resident(&self) -> Option<&[u8]> {
        self.dataset.all_pixels().filter(|_| self.needs_only_views())
    }

    /// Tables that normalise the bytes.
    pub fn tables(&self) -> &ByteTables {
        &self.tables
    }

    /// Whether views are the only augmentation, so that bytes never change.
    fn needs_only_views(&self) -> bool {
        !self.augment.changes_bytes() && self.augment.resized_crop.is_none()
    }

    fn prefetch<T: Send + 'static>(
        &self,
        epoch: u64,
        first_step: usize,
        make: impl Fn(&Self, u64, &[usize]) -> Result<T> + Send + 'static,
    ) -> Batches<T> {
        let left = self.steps_per_epoch().saturating_sub(first_step);
        let (sender, receiver) = mpsc::sync_channel(PREFETCH);
        let loader = self.clone();
        let work = move || {
            let order = loader.order(epoch);
            for indices in order.chunks(loader.batch).skip(first_step).take(left) {
                let batch = make(&loader, epoch, indices);
                let stop = batch.is_err();
                // Sending fails when the consumer has gone: then nobody wants the rest.
                if sender.send(batch).is_err() || stop {
                    return;
                }
            }
        };
        match Builder::new().name("loader".to_owned()).spawn(work) {
            Ok(thread) => Batches { receiver: Some(receiver), thread: Some(thread), left, failure: None },
            Err(error) => {
                let failure = Error::Data(format!("the loader's thread cannot be started: {error}"));
                Batches { receiver: None, thread: None, left, failure: Some(failure) }
            }
        }
    }

    /// The indices of an epoch.
    fn order(&self, epoch: u64) -> Vec<usize> {
        match self.shuffle {
            Some(seed) => self.dataset.shuffled(seed, epoch),
            None => (0..self.dataset.len()).collect(),
        }
    }

    fn batch(&self, epoch: u64, indices: &[usize]) -> Result<Batch> {
        let size = self.dataset.shape().size();
        let mut images = memory::zeros(indices.len() * size, BATCH)?;
        let in_memory = indices.first().is_some_and(|index| self.dataset.pixels(*index).is_some());
        if in_memory && self.needs_only_views() {
            // A copy through a table is too little work to share out, and the other cores are training.
            for (out, &index) in images.chunks_exact_mut(size).zip(indices) {
                if let Some(pixels) = self.dataset.pixels(index) {
                    self.write(epoch, index, pixels, out);
                }
            }
        } else {
            images.par_chunks_exact_mut(size).zip(indices).try_for_each_init(Vec::new, |pixels, (out, &index)| {
                memory::resize(pixels, size, "an image")?;
                self.pixels(epoch, index, pixels)?;
                self.write(epoch, index, pixels, out);
                Ok::<_, Error>(())
            })?;
        }
        let labels = indices.iter().map(|&index| self.dataset.labels()[index]).collect();
        Ok(Batch { images, labels, indices: indices.to_vec() })
    }

    fn byte_batch(&self, epoch: u64, indices: &[usize], resident: bool) -> Result<ByteBatch> {
        let size = self.dataset.shape().size();
        let mut pixels = memory::zeros(if resident { 0 } else { indices.len() * size }, BATCH)?;
        pixels
            .par_chunks_exact_mut(size)
            .zip(indices)
            .try_for_each(|(pixels, &index)| self.pixels(epoch, index, pixels))?;
        let view = |(place, &index): (usize, &usize)| ImageView {
            image: if resident { index } else { place } as i32,
            ..self.view(epoch, index)
        };
        let views = indices.iter().enumerate().map(view).collect();
        let labels = indices.iter().map(|&index| self.dataset.labels()[index]).collect();
        Ok(ByteBatch { pixels, views, labels })
    }

    fn write(&self, epoch: u64, index: usize, pixels: &[u8], out: &mut [f32]) {
        write(&self.view(epoch, index), pixels, self.dataset.shape().into(), &self.tables, out);
    }

    /// Writes the bytes of an image after all augmentations but its view.
    fn pixels(&self, epoch: u64, index: usize, pixels: &mut [u8]) -> Result<()> {
        let Some(seed) = self.shuffle else { return self.dataset.image(index, pixels) };
        let (key, shape) = (ImageKey { seed, epoch, index }, self.dataset.shape());
        let interpolation = self.dataset.resize().map_or(Interpolation::Bicubic, |resize| resize.interpolation);
        match &self.augment.resized_crop {
            Some(crop) => {
                let picture = self.dataset.picture(index)?;
                let cut = crop.draw(picture.width, picture.height, &mut key.random(Purpose::Crop));
                resize_cut(&picture, cut, interpolation, shape, pixels)?;
            }
            None => self.dataset.image(index, pixels)?,
        }
        self.augment.change(key, pixels, shape, &self.fill, interpolation);
        Ok(())
    }

    fn view(&self, epoch: u64, index: usize) -> ImageView {
        match self.shuffle {
            Some(seed) => self.augment.draw(ImageKey { seed, epoch, index }, self.dataset.shape()),
            None => ImageView::default(),
        }
    }
}

impl fmt::Debug for Loader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Loader({:?}, batch {}, {} steps)", self.dataset, self.batch, self.steps_per_epoch())
    }
}

/// The batches of one epoch. Dropping it stops its thread. After an error nothing more comes.
pub struct Batches<T = Batch> {
    receiver: Option<Receiver<Result<T>>>,
    thread: Option<JoinHandle<()>>,
    left: usize,
    failure: Option<Error>,
}

impl<T> Batches<T> {
    /// The next batch; while it is not there yet, `stop` is asked now and then whether to give it up.
    ///
    /// # Errors
    /// As the iterator, and [`Error::Interrupted`] where it was given up.
    pub fn next_unless(&mut self, stop: impl Fn() -> bool) -> Option<Result<T>> {
        if self.left == 0 {
            return None;
        }
        let received = match (self.failure.take(), &self.receiver) {
            (Some(failure), _) => Some(Err(failure)),
            (None, Some(receiver)) => loop {
                match receiver.recv_timeout(PATIENCE) {
                    Ok(batch) => break Some(batch),
                    Err(RecvTimeoutError::Disconnected) => break None,
                    Err(RecvTimeoutError::Timeout) if stop() => {
                        break Some(Err(Error::Interrupted("a batch was not waited for".to_owned())));
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                }
            },
            (None, None) => None,
        };
        match received {
            Some(Ok(batch)) => {
                self.left -= 1;
                Some(Ok(batch))
            }
            Some(Err(error)) => {
                self.left = 0;
                Some(Err(error))
            }
            None => {
                // Only a decoder that panicked ends the thread early without a word.
                let left = std::mem::take(&mut self.left);
                self.close();
                Some(Err(Error::Data(format!("the loader's thread ended with {left} batches to go; see the log"))))
            }
        }
    }

    fn close(&mut self) {
        // In this order: a thread that waits to send is woken by the end of the channel.
        self.receiver = None;
        let Some(thread) = self.thread.take() else { return };
        let begun = Instant::now();
        while !thread.is_finished() && begun.elapsed() < LEAVE_BEHIND {
            std::thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            // A panic of the thread has been printed, and there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

impl<T> Iterator for Batches<T> {
    type Item = Result<T>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_unless(|| false)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        // An error cuts the epoch short.
        (self.left.min(1), Some(self.left))
    }
}

impl<T> fmt::Debug for Batches<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Batches({} left)", self.left)
    }
}

impl<T> Drop for Batches<T> {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ImageShape;

    /// What a network share that does not answer looks like to the consumer.
    #[test]
    fn a_batch_that_never_comes_is_given_up_when_asked() {
        let shape = ImageShape { height: 1, width: 1, channels: 1 };
        let set = Dataset::from_memory("two", shape, 2, vec![0, 1], vec![0, 1]).unwrap();
        let loader = Loader::eval(Arc::new(set), 1).unwrap();
        let (hang, release) = mpsc::channel::<()>();
        let mut batches = loader.prefetch(0, 0, move |_, _, indices| {
            if indices == [1] {
                let _ = release.recv();
            }
            Ok(indices.to_vec())
        });
        let begun = Instant::now();
        assert_eq!(batches.next_unless(|| true).unwrap().unwrap(), [0]);
        let asked = std::cell::Cell::new(0);
        let stop = || asked.replace(asked.get() + 1) == 2;
        assert!(matches!(batches.next_unless(stop), Some(Err(Error::Interrupted(_)))));
        assert_eq!(asked.get(), 3);
        assert!(batches.next().is_none());
        // The thread still hangs and is left behind.
        drop(batches);
        assert!(begun.elapsed() < Duration::from_secs(10));
        drop(hang);
    }
}
