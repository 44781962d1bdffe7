//! Batches on their way to a GPU that is at work on the one before.

use std::sync::Arc;

use super::driver::{Event, HostBlock, Queue};
use super::gpu::{Gpu, GpuBuffer};
use crate::dtype::Dtype;
use crate::{Error, Result};

/// Carries bytes to a buffer of a GPU, which works on while they come: the host writes them to one of two pieces of
/// page-locked memory, a queue of copies beside the work brings them to one of two rooms on the GPU, and the work takes them
/// from there when it comes to it. What is waited for:
///
/// - the host, before it writes, for the copy of two batches before;
/// - the copy, for the work to have taken what was in its room;
/// - the work, for the copy.
#[derive(Debug)]
pub struct Relay {
    gpu: Arc<Gpu>,
    slots: [Slot; 2],
    next: usize,
}

#[derive(Debug)]
struct Slot {
    host: HostBlock,
    room: GpuBuffer,
    /// Behind the copy from `host` to `room`.
    copied: Event,
    /// Behind the work that takes what is in `room`.
    taken: Event,
}

impl Relay {
    /// For up to `bytes` at once.
    ///
    /// # Errors
    /// When the device or the host is out of memory.
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self> {
        let driver = gpu.driver();
        let slot = || {
            let room = GpuBuffer::zeros(gpu, Dtype::F32, bytes.div_ceil(size_of::<f32>()))?;
            let slot =
                Slot { room, host: driver.allocate_host(bytes)?, copied: driver.event()?, taken: driver.event()? };
            // The room was just cleared.
            driver.record(slot.taken, Queue::Work)?;
            Ok::<Slot, Error>(slot)
        };
        Ok(Self { gpu: gpu.clone(), slots: [slot()?, slot()?], next: 0 })
    }

    /// Brings bytes to the front of a buffer, after all work so far and before all later. The caller may change them when this
    /// returns.
    ///
    /// # Errors
    /// When the device fails, perhaps in earlier work, or is recording.
    ///
    /// # Panics
    /// When there is no room for them.
    pub fn send(&mut self, bytes: &[u8], to: &mut GpuBuffer) -> Result<()> {
        self.gpu.check()?;
        let driver = self.gpu.driver();
        let slot = &mut self.slots[self.next];
        self.next = 1 - self.next;
        assert!(bytes.len() <= slot.host.len() && bytes.len() <= to.bytes(), "more bytes than there is room for");
        driver.wait(slot.copied)?;
        // SAFETY: the memory is this slot's own and lives until `drop`; the copy from it is done.
        unsafe { slot.host.bytes_mut()[..bytes.len()].copy_from_slice(bytes) };
        driver.order(Queue::Copies, slot.taken)?;
        // SAFETY: both have room, and stay until `drop`, which waits for the copy.
        unsafe { driver.upload_beside(slot.room.address(), slot.host, bytes.len())? };
        driver.record(slot.copied, Queue::Copies)?;
        driver.order(Queue::Work, slot.copied)?;
        to.copy_bytes(&slot.room, bytes.len())?;
        driver.record(slot.taken, Queue::Work)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let driver = self.gpu.driver();
        for slot in &self.slots {
            // An error here belongs to earlier work, which reports it itself.
            let _ = driver.wait(slot.copied);
            let _ = driver.wait(slot.taken);
            // SAFETY: allocated by this driver, and no copy is under way.
            unsafe { driver.free_host(slot.host) };
            driver.release_event(slot.copied);
            driver.release_event(slot.taken);
        }
    }
}
