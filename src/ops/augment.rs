//! Training images from bytes: shifted, flipped, a rectangle erased, and normalised to `(v / 255 - mean) / std`, in one
//! pass over the rows. The views are drawn by [`crate::data`] and carried out here, on the host or on a GPU.

use super::cuda::augment::GpuImages;
use super::random::noise;
use crate::Result;
use crate::device::{Device, ViewMut};
use crate::shape::Shape;

/// A view of an image: shift, flip and erased rectangle. `ImageView` of `kernels/augment.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct ImageView {
    /// Stream of the noise in the erased rectangle.
    pub stream: u64,
    /// Which of the images.
    pub image: i32,
    /// Row of the image that comes to the top; black where there is none.
    pub down: i32,
    /// Column of the image that comes to the left; black where there is none.
    pub right: i32,
    /// 1 mirrors left to right.
    pub flip: i32,
    /// First row of the erased rectangle.
    pub top: i32,
    /// First column of the erased rectangle.
    pub left: i32,
    /// Rows of the erased rectangle; 0 for none.
    pub height: i32,
    /// Columns of the erased rectangle.
    pub width: i32,
    /// 0 erases to the mean, which normalises to 0; 1 to normal noise.
    pub noisy: i32,
    /// Fills the struct.
    pub reserved: i32,
}

/// The normalised value of each of the 256 byte values, per channel.
#[derive(Debug, Clone, PartialEq)]
pub struct ByteTables(Vec<[f32; 256]>);

impl ByteTables {
    /// Tables of `(v / 255 - mean) / std`, one per channel.
    pub fn new(mean: &[f32], std: &[f32]) -> Self {
        let channels = mean.iter().zip(std);
        Self(channels.map(|(mean, std)| std::array::from_fn(|v| (v as f32 / 255.0 - mean) / std)).collect())
    }

    /// All values `[c, 256]`.
    pub(super) fn values(&self) -> &[f32] {
        self.0.as_flattened()
    }

    fn fill_black(&self, out: &mut [f32]) {
        for pixel in out.chunks_exact_mut(self.0.len()) {
            for (value, table) in pixel.iter_mut().zip(&self.0) {
                *value = table[0];
            }
        }
    }

    /// A run of pixels, from the last to the first if `flip`.
    fn normalise(&self, source: &[u8], flip: bool, out: &mut [f32]) {
        match self.0.as_slice() {
            [table] if flip => map(source.iter().rev(), table, out),
            [table] => map(source.iter(), table, out),
            // The usual case once more, with a number of channels that the compiler knows.
            [r, g, b] => {
                let pixels = source.chunks_exact(3);
                let put = |(out, bytes): (&mut [f32], &[u8])| {
                    out[0] = r[usize::from(bytes[0])];
                    out[1] = g[usize::from(bytes[1])];
                    out[2] = b[usize::from(bytes[2])];
                };
                if flip {
                    out.chunks_exact_mut(3).zip(pixels.rev()).for_each(put);
                } else {
                    out.chunks_exact_mut(3).zip(pixels).for_each(put);
                }
            }
            tables if flip => interleaved(source.chunks_exact(tables.len()).rev(), tables, out),
            tables => interleaved(source.chunks_exact(tables.len()), tables, out),
        }
    }
}

fn map<'a>(source: impl Iterator<Item = &'a u8>, table: &[f32; 256], out: &mut [f32]) {
    for (value, &byte) in out.iter_mut().zip(source) {
        *value = table[usize::from(byte)];
    }
}

fn interleaved<'a>(source: impl Iterator<Item = &'a [u8]>, tables: &[[f32; 256]], out: &mut [f32]) {
    for (pixel, bytes) in out.chunks_exact_mut(tables.len()).zip(source) {
        for ((value, &byte), table) in pixel.iter_mut().zip(bytes).zip(tables) {
            *value = table[usize::from(byte)];
        }
    }
}

/// Writes one image, `pixels` (HWC), as seen in `view` and normalised by `tables`, to `out` (HWC).
pub fn write(view: &ImageView, pixels: &[u8], shape: Shape, tables: &ByteTables, out: &mut [f32]) {
    let Shape { h, w, c } = shape;
    let row = w * c;
    // Columns of the shifted image that have a pixel behind them.
    let first = usize::try_from(-view.right).unwrap_or(0);
    let last = w - usize::try_from(view.right).unwrap_or(0);
    let from = (first as i32 + view.right) as usize * c;
    let flip = view.flip != 0;
    let seen = if flip { w - last..w - first } else { first..last };
    for (y, out) in out.chunks_exact_mut(row).enumerate() {
        let Some(line) = usize::try_from(y as i32 + view.down).ok().filter(|line| *line < h) else {
            tables.fill_black(out);
            continue;
        };
        let source = &pixels[line * row + from..][..(last - first) * c];
        let (border, rest) = out.split_at_mut(seen.start * c);
        let (target, other_border) = rest.split_at_mut(seen.len() * c);
        tables.fill_black(border);
        tables.fill_black(other_border);
        tables.normalise(source, flip, target);
    }
    let (left, width) = (view.left as usize * c, view.width as usize * c);
    for y in view.top as usize..(view.top + view.height) as usize {
        let at = y * row + left;
        for (i, value) in out[at..][..width].iter_mut().enumerate() {
            *value = if view.noisy != 0 { noise(view.stream, (at + i) as u64) } else { 0.0 };
        }
    }
}

/// How much a [`ByteImages`] can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageRoom {
    /// Images whose bytes are held at once.
    pub images: usize,
    /// Views of one batch.
    pub batch: usize,
}

/// Images as bytes where the network computes, and the views of a batch.
#[derive(Debug)]
pub struct ByteImages {
    shape: Shape,
    tables: ByteTables,
    images: usize,
    pixels: Vec<u8>,
    views: Vec<ImageView>,
    gpu: Option<GpuImages>,
}

impl ByteImages {
    /// Allocates room for images of `shape` and for the views of a batch.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(device: &Device, shape: Shape, tables: ByteTables, room: ImageRoom) -> Result<Self> {
        let gpu = match device {
            Device::Cpu => None,
            Device::Gpu(gpu, _) => Some(GpuImages::new(gpu, shape, &tables, room)?),
        };
        Ok(Self { shape, tables, images: room.images, pixels: Vec::new(), views: Vec::new(), gpu })
    }

    /// Takes the bytes `[n, h, w, c]` of the first images.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there is no room for them.
    pub fn set_pixels(&mut self, pixels: &[u8]) -> Result<()> {
        assert!(pixels.len() <= self.images * self.shape.len(), "more images than there is room for");
        match &mut self.gpu {
            Some(gpu) => gpu.set_pixels(pixels),
            None => {
                self.pixels = pixels.to_vec();
                Ok(())
            }
        }
    }

    /// As [`set_pixels`](Self::set_pixels), for batch after batch: a GPU works on while they come.
    ///
    /// # Errors
    /// When the device fails, or there is no memory to pass them through.
    ///
    /// # Panics
    /// When there is no room for them.
    pub fn pass_pixels(&mut self, pixels: &[u8]) -> Result<()> {
        assert!(pixels.len() <= self.images * self.shape.len(), "more images than there is room for");
        match &mut self.gpu {
            Some(gpu) => gpu.pass_pixels(pixels),
            None => self.set_pixels(pixels),
        }
    }

    /// Takes the views of a batch.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a view is of an image that there is no room for, or erases what lies outside of it.
    pub fn set_views(&mut self, views: &[ImageView]) -> Result<()> {
        let Shape { h, w, .. } = self.shape;
        let within = |from: i32, len: i32, of: usize| {
            let end = usize::try_from(from).ok().zip(usize::try_from(len).ok());
            end.is_some_and(|(from, len)| from + len <= of)
        };
        for view in views {
            let held = usize::try_from(view.image).is_ok_and(|image| image < self.images);
            let erases = within(view.top, view.height, h) && within(view.left, view.width, w);
            let shifts = view.down.unsigned_abs() as usize <= h && view.right.unsigned_abs() as usize <= w;
            assert!(held && erases && shifts, "a view beyond its image: {view:?}");
        }
        self.views = views.to_vec();
        self.gpu.as_mut().map_or(Ok(()), |gpu| gpu.set_views(views))
    }

    /// Writes the images of the batch `[n, h, w, c]`. On a GPU it may be part of recorded work.
    ///
    /// # Panics
    /// When `to` is of another size.
    pub fn write(&self, to: ViewMut<'_>) {
        let size = self.shape.len();
        assert_eq!(to.len(), self.views.len() * size, "a batch of another size");
        match &self.gpu {
            Some(gpu) => gpu.write(self.shape, self.views.len(), &to.gpu()),
            None => {
                for (view, out) in self.views.iter().zip(to.host().chunks_exact_mut(size)) {
                    write(view, &self.pixels[view.image as usize * size..][..size], self.shape, &self.tables, out);
                }
            }
        }
    }
}
