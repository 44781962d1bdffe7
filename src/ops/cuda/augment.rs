//! `augment.cu`.

use std::sync::Arc;

use super::{grid, int, vector_len};
use crate::Result;
use crate::device::driver::Argument;
use crate::device::gpu::{Gpu, GpuBuffer, GpuViewMut};
use crate::dtype::Dtype;
use crate::ops::augment::{ByteTables, ImageView};
use crate::shape::Shape;

/// Images, views and tables in a GPU's memory.
#[derive(Debug)]
pub struct GpuImages {
    pixels: GpuBuffer,
    views: GpuBuffer,
    tables: GpuBuffer,
}

impl GpuImages {
    /// Room for `images` images and views of up to `batch`.
    pub fn new(gpu: &Arc<Gpu>, shape: Shape, tables: &ByteTables, (images, batch): (usize, usize)) -> Result<Self> {
        let bytes = |len: usize| GpuBuffer::zeros(gpu, Dtype::F32, len.div_ceil(size_of::<f32>()));
        let mut new = Self {
            pixels: bytes(images * shape.len())?,
            views: bytes(batch * size_of::<ImageView>())?,
            tables: GpuBuffer::zeros(gpu, Dtype::F32, tables.values().len())?,
        };
        new.tables.write(tables.values())?;
        Ok(new)
    }

    /// See [`crate::ops::augment::ByteImages::set_pixels`].
    pub fn set_pixels(&mut self, pixels: &[u8]) -> Result<()> {
        self.pixels.write_bytes(pixels)
    }

    /// See [`crate::ops::augment::ByteImages::set_views`].
    pub fn set_views(&mut self, views: &[ImageView]) -> Result<()> {
        self.views.write_bytes(bytemuck::cast_slice(views))
    }

    /// See [`crate::ops::augment::ByteImages::write`].
    pub fn write(&self, shape: Shape, n: usize, y: &GpuViewMut<'_>) {
        let t = y.view().dtype();
        let vector = shape.len().is_multiple_of(vector_len(t));
        let per_block = 256 * if vector { vector_len(t) } else { 1 };
        let [pixels, views, tables] =
            [&self.pixels, &self.views, &self.tables].map(|b| Argument::from(b.view(0..b.len())));
        let sizes = [int(shape.h).into(), int(shape.w).into(), int(shape.c).into()];
        let arguments = [pixels, views, tables, y.into(), sizes[0], sizes[1], sizes[2]];
        let name = format!("augment<{}, {vector}>", t.kernel_name());
        // SAFETY: arguments as the kernel's header says; views were checked to lie within their images.
        unsafe { y.view().gpu().launch(&name, grid(shape.len().div_ceil(per_block), n, 1), &arguments) }
    }
}
