//! Where numbers live. One variant today, the host; a CUDA device joins as a second variant of each enum here, and the
//! operations in [`crate::ops`] dispatch on it.

use crate::Result;

/// A device that computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// The host's cores, through the current `rayon` pool.
    Cpu,
}

impl Device {
    /// Allocates `len` zeros.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn zeros(&self, len: usize) -> Result<Buffer> {
        match self {
            Self::Cpu => Ok(Buffer::Host(vec![0.0; len])),
        }
    }

    /// Copies numbers from the host.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn upload(&self, data: &[f32]) -> Result<Buffer> {
        match self {
            Self::Cpu => Ok(Buffer::Host(data.to_vec())),
        }
    }
}

/// `f32` numbers on a device.
#[derive(Debug)]
pub enum Buffer {
    /// In the host's memory.
    Host(Vec<f32>),
}

impl Default for Buffer {
    fn default() -> Self {
        Self::Host(Vec::new())
    }
}

/// Part of a buffer, to be read.
#[derive(Debug, Clone, Copy)]
pub enum View<'a> {
    /// In the host's memory.
    Host(&'a [f32]),
}

/// Part of a buffer, to be written.
#[derive(Debug)]
pub enum ViewMut<'a> {
    /// In the host's memory.
    Host(&'a mut [f32]),
}

impl Buffer {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Host(data) => data.len(),
        }
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements of a range, to be read.
    pub fn view(&self, range: std::ops::Range<usize>) -> View<'_> {
        match self {
            Self::Host(data) => View::Host(&data[range]),
        }
    }

    /// The elements of a range, to be written.
    pub fn view_mut(&mut self, range: std::ops::Range<usize>) -> ViewMut<'_> {
        match self {
            Self::Host(data) => ViewMut::Host(&mut data[range]),
        }
    }

    /// The elements of several ranges that do not overlap, to be written.
    ///
    /// # Panics
    /// When ranges overlap or reach past the end: an error of the caller, who planned them.
    pub fn view_mut_disjoint<const N: usize>(&mut self, ranges: [std::ops::Range<usize>; N]) -> [ViewMut<'_>; N] {
        match self {
            Self::Host(data) => {
                data.get_disjoint_mut(ranges).expect("ranges planned apart from each other").map(ViewMut::Host)
            }
        }
    }

    /// Copies the first `out.len()` elements to the host.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read(&self, out: &mut [f32]) -> Result<()> {
        match self {
            Self::Host(data) => out.copy_from_slice(&data[..out.len()]),
        }
        Ok(())
    }

    /// Copies numbers from the host to the front.
    ///
    /// # Errors
    /// When the device fails.
    pub fn write(&mut self, data: &[f32]) -> Result<()> {
        match self {
            Self::Host(own) => own[..data.len()].copy_from_slice(data),
        }
        Ok(())
    }
}

impl<'a> View<'a> {
    /// The numbers, where they are on the host.
    pub fn host(self) -> &'a [f32] {
        match self {
            Self::Host(data) => data,
        }
    }
}

impl<'a> ViewMut<'a> {
    /// The numbers, where they are on the host.
    pub fn host(self) -> &'a mut [f32] {
        match self {
            Self::Host(data) => data,
        }
    }

    /// The numbers, where they are on the host, borrowed for a while.
    pub fn host_mut(&mut self) -> &mut [f32] {
        match self {
            Self::Host(data) => data,
        }
    }
}
