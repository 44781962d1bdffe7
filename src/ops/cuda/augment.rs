//! `augment.cu`.

use std::sync::Arc;

use super::{Call, configured};
use crate::Result;
use crate::device::argument::Element;
use crate::device::gpu::{Gpu, GpuBuffer, GpuView, GpuViewMut};
use crate::device::relay::Relay;
use crate::dtype::Dtype;
use crate::ops::augment::{ByteTables, ImageRoom, ImageView};
use crate::ops::config::{AugmentProblem, KernelPass};
use crate::shape::Shape;

/// Entries of a channel's table: one for each value of a byte.
const TABLE: usize = 256;

fn all(buffer: &GpuBuffer) -> GpuView<'_> {
    buffer.view(0..buffer.len())
}

/// Images, views and tables in a GPU's memory.
#[derive(Debug)]
pub struct GpuImages {
    /// What batches pass through, once one has.
    relay: Option<Relay>,
    pixels: GpuBuffer,
    views: GpuBuffer,
    tables: GpuBuffer,
    /// Images that there is room for.
    images: usize,
}

impl GpuImages {
    /// Allocates room for the images, the views of a batch, and the tables.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(gpu: &Arc<Gpu>, shape: Shape, tables: &ByteTables, room: ImageRoom) -> Result<Self> {
        let bytes = |len: usize| GpuBuffer::zeros(gpu, Dtype::F32, len.div_ceil(size_of::<f32>()));
        let mut new = Self {
            relay: None,
            pixels: bytes(room.images * shape.len())?,
            views: GpuBuffer::input(gpu, Dtype::F32, room.batch * size_of::<ImageView>() / size_of::<f32>())?,
            tables: GpuBuffer::zeros(gpu, Dtype::F32, tables.values().len())?,
            images: room.images,
        };
        new.tables.write(tables.values())?;
        Ok(new)
    }

    /// See [`crate::ops::augment::ByteImages::set_pixels`].
    pub fn set_pixels(&mut self, pixels: &[u8]) -> Result<()> {
        self.pixels.write_bytes(pixels)
    }

    /// See [`crate::ops::augment::ByteImages::pass_pixels`].
    pub fn pass_pixels(&mut self, pixels: &[u8]) -> Result<()> {
        let Self { relay, pixels: to, .. } = self;
        let relay = match relay {
            Some(relay) => relay,
            None => relay.insert(Relay::new(to.gpu(), to.bytes())?),
        };
        relay.send(pixels, to)
    }

    /// See [`crate::ops::augment::ByteImages::set_views`].
    pub fn set_views(&mut self, views: &[ImageView]) -> Result<()> {
        self.views.write_bytes(bytemuck::cast_slice(views))
    }

    /// See [`crate::ops::augment::ByteImages::write`], whose views were checked to lie within images that there is room for.
    pub fn write(&self, shape: Shape, n: usize, y: &GpuViewMut<'_>) {
        let (problem, t) = (AugmentProblem { n, len: shape.len() }, y.view().dtype());
        let Some(config) = configured(&problem, KernelPass::Forward, y.view()) else { return };
        Call::new(y.view().gpu(), config.instance("augment", t))
            .reads_memory("the images", all(&self.pixels), Element::U8, self.images * shape.len())
            .reads_memory("the views", all(&self.views), Element::Struct("ImageView", size_of::<ImageView>()), n)
            .reads("the tables", all(&self.tables), shape.c * TABLE)
            .writes("y", y, n * shape.len())
            .sizes([shape.h, shape.w, shape.c])
            .launch(config.augment_grid(&problem, t));
    }
}
