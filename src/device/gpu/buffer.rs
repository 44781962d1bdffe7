//! Buffers in a GPU's memory and views of them, as operations get and give them.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use super::Gpu;
use crate::device::argument::{Argument, Element};
use crate::device::driver::Address;
use crate::dtype::Dtype;
use crate::{Result, memory};

/// Numbers in a GPU's memory.
#[derive(Debug)]
pub struct GpuBuffer {
    gpu: Arc<Gpu>,
    address: Address,
    len: usize,
    dtype: Dtype,
    memory: Memory,
}

/// Whose memory a buffer lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Memory {
    Own,
    Inputs,
    Outcomes,
}

impl GpuBuffer {
    /// `len` zeros.
    pub fn zeros(gpu: &Arc<Gpu>, dtype: Dtype, len: usize) -> Result<Self> {
        let address = gpu.allocate(len * dtype.bytes())?;
        Self::cleared(Self { gpu: gpu.clone(), address, len, dtype, memory: Memory::Own })
    }

    /// `len` zeros for what the host writes before work and kernels read alone: with all others of the kind it comes to the
    /// device in one copy, before the next launch. Where there is no room for it, as [`zeros`](Self::zeros).
    pub fn input(gpu: &Arc<Gpu>, dtype: Dtype, len: usize) -> Result<Self> {
        match gpu.take_input(len * dtype.bytes())? {
            Some(address) => Self::cleared(Self { gpu: gpu.clone(), address, len, dtype, memory: Memory::Inputs }),
            None => Self::zeros(gpu, dtype, len),
        }
    }

    /// `len` zeros for what kernels write and the host reads after work: with all others of the kind it comes to the host in one
    /// copy. Where there is no room for it, as [`zeros`](Self::zeros).
    pub fn outcome(gpu: &Arc<Gpu>, dtype: Dtype, len: usize) -> Result<Self> {
        match gpu.take_outcome(len * dtype.bytes())? {
            Some(address) => Self::cleared(Self { gpu: gpu.clone(), address, len, dtype, memory: Memory::Outcomes }),
            None => Self::zeros(gpu, dtype, len),
        }
    }

    fn cleared(mut self) -> Result<Self> {
        self.clear()?;
        Ok(self)
    }

    /// Whether it is among the outcomes that [`Gpu::post_outcomes`] sends.
    pub fn is_outcome(&self) -> bool {
        self.memory == Memory::Outcomes
    }

    /// The device.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of bytes.
    pub fn bytes(&self) -> usize {
        self.len * self.dtype.bytes()
    }

    /// Where it lies.
    pub(in crate::device) fn address(&self) -> Address {
        self.address
    }

    /// Copies the first elements to the host.
    pub fn read(&self, out: &mut [f32]) -> Result<()> {
        let mut bytes: Vec<u8> = memory::zeros(out.len() * self.dtype.bytes(), "a copy from the device")?;
        self.read_bytes(&mut bytes)?;
        self.dtype.decode(&bytes, out);
        Ok(())
    }

    /// Copies numbers to the front.
    pub fn write(&mut self, data: &[f32]) -> Result<()> {
        assert!(data.len() <= self.len, "more numbers than the buffer holds");
        self.write_bytes(&self.dtype.encode(data))
    }

    /// Copies bytes of any meaning to the front.
    pub fn write_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= self.bytes(), "more bytes than the buffer holds");
        if self.memory == Memory::Inputs {
            return self.gpu.write_input(self.address, bytes);
        }
        // SAFETY: the buffer has room.
        unsafe { self.gpu.upload(self.address, bytes) }
    }

    /// Copies bytes of any meaning from the front of another buffer to the front. It cannot be part of a recording.
    pub fn copy_bytes(&mut self, from: &Self, bytes: usize) -> Result<()> {
        assert!(bytes <= self.bytes().min(from.bytes()), "more bytes than the buffers hold");
        assert!(Arc::ptr_eq(&self.gpu, &from.gpu), "buffers of two devices");
        // SAFETY: both have as many.
        unsafe { self.gpu.copy(self.address, from.address, bytes) }
    }

    /// Copies bytes of any meaning from the front.
    pub fn read_bytes(&self, bytes: &mut [u8]) -> Result<()> {
        assert!(bytes.len() <= self.bytes(), "more bytes than the buffer holds");
        if self.memory == Memory::Outcomes {
            return self.gpu.read_outcome(self.address, bytes);
        }
        // SAFETY: the buffer is as long.
        unsafe { self.gpu.download(bytes, self.address) }
    }

    /// Sets everything to zero. Unlike [`write`](Self::write) it may be part of a recording, inputs excepted.
    pub fn clear(&mut self) -> Result<()> {
        if self.memory == Memory::Inputs {
            return self.gpu.write_input(self.address, &vec![0; self.bytes()]);
        }
        // SAFETY: the buffer has this size.
        unsafe { self.gpu.zero(self.address, self.bytes()) }
    }

    /// A range, to be read.
    pub fn view(&self, range: Range<usize>) -> GpuView<'_> {
        assert!(range.start <= range.end && range.end <= self.len, "range past the end of a buffer");
        let address = self.address + (range.start * self.dtype.bytes()) as Address;
        GpuView { gpu: &self.gpu, address, len: range.len(), dtype: self.dtype }
    }

    /// A range, to be written.
    pub fn view_mut(&mut self, range: Range<usize>) -> GpuViewMut<'_> {
        GpuViewMut { view: self.view(range), exclusive: PhantomData }
    }
}

impl Drop for GpuBuffer {
    fn drop(&mut self) {
        match self.memory {
            Memory::Own => self.gpu.release(self.address, self.bytes()),
            Memory::Inputs => self.gpu.give_back_input(self.address, self.bytes()),
            Memory::Outcomes => self.gpu.give_back_outcome(self.address, self.bytes()),
        }
    }
}

/// Part of a [`GpuBuffer`], to be read.
#[derive(Debug, Clone, Copy)]
pub struct GpuView<'a> {
    gpu: &'a Gpu,
    address: Address,
    len: usize,
    dtype: Dtype,
}

impl<'a> GpuView<'a> {
    /// The device.
    pub fn gpu(&self) -> &'a Gpu {
        self.gpu
    }

    /// Where it lies.
    pub fn address(&self) -> Address {
        self.address
    }

    /// Part of it.
    pub fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "range past the end of a view");
        Self { address: self.address + (range.start * self.dtype.bytes()) as Address, len: range.len(), ..self }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Copies all elements to the host, after all work so far.
    ///
    /// # Errors
    /// When the device or an earlier launch failed.
    pub fn read(&self, out: &mut [f32]) -> Result<()> {
        assert_eq!(out.len(), self.len, "another number of elements");
        let mut bytes: Vec<u8> = memory::zeros(self.len * self.dtype.bytes(), "a copy from the device")?;
        // SAFETY: the view has as many elements.
        unsafe { self.gpu.download(&mut bytes, self.address)? };
        self.dtype.decode(&bytes, out);
        Ok(())
    }
}

/// Part of a [`GpuBuffer`], to be written.
#[derive(Debug)]
pub struct GpuViewMut<'a> {
    view: GpuView<'a>,
    exclusive: PhantomData<&'a mut ()>,
}

impl<'a> GpuViewMut<'a> {
    /// As a view to be read.
    pub fn view(&self) -> GpuView<'_> {
        self.view
    }

    /// As a view to be read, for as long.
    pub fn into_view(self) -> GpuView<'a> {
        self.view
    }

    /// The elements before a place, and those from it on.
    pub fn split_at(self, at: usize) -> (Self, Self) {
        let part = |range| Self { view: self.view.slice(range), exclusive: PhantomData };
        (part(0..at), part(at..self.view.len()))
    }

    /// The same, borrowed for a while.
    pub fn reborrow(&mut self) -> GpuViewMut<'_> {
        GpuViewMut { view: self.view, exclusive: PhantomData }
    }
}

/// Floats that one operation has to itself, of any content ([`Gpu::workspace`]).
#[derive(Debug, Clone, Copy)]
pub struct Workspace {
    pub(super) address: Address,
    pub(super) len: usize,
}

impl Workspace {
    /// Number of floats.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of it.
    ///
    /// # Panics
    /// When the part reaches past the end.
    pub fn part(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "a part past the end of a workspace");
        Self { address: self.address + (range.start * size_of::<f32>()) as Address, len: range.len() }
    }
}

/// Counters that are zero between launches ([`Gpu::tickets`]): by them the blocks of a launch find out which of them is last.
#[derive(Debug, Clone, Copy)]
pub struct Tickets {
    pub(super) address: Address,
    pub(super) len: usize,
}

impl From<Tickets> for Argument {
    fn from(of: Tickets) -> Self {
        Self::pointer(of.address, Element::U32, true)
    }
}

impl From<Workspace> for Argument {
    fn from(of: Workspace) -> Self {
        Self::pointer(of.address, Element::Number(Dtype::F32), true)
    }
}

impl From<GpuView<'_>> for Argument {
    fn from(view: GpuView<'_>) -> Self {
        Self::pointer(view.address, Element::Number(view.dtype), false)
    }
}

impl From<&GpuViewMut<'_>> for Argument {
    fn from(view: &GpuViewMut<'_>) -> Self {
        Self::pointer(view.view.address, Element::Number(view.view.dtype), true)
    }
}

/// A view or the null pointer.
impl From<Option<GpuView<'_>>> for Argument {
    fn from(view: Option<GpuView<'_>>) -> Self {
        view.map_or_else(Self::null, Self::from)
    }
}
