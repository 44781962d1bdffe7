//! Small buffers that share a piece of a GPU's memory, so that one copy carries them all.
//!
//! *Inputs* come from the host: labels, views, slopes, a learning rate. What is written to them is kept on the host until the
//! next launch or replay, and then copied at once. *Outcomes* are what kernels made of a step: sums, the optimizer's state,
//! scores. Who reads one copies all, and who reads another before more work was given finds it there; or all are
//! [posted](Gpu::post_outcomes) and read when the host has done something else.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Gpu, GpuBuffer, lock};
use crate::Result;
use crate::device::driver::{Address, Event, HostBlock, Queue};

/// Bytes of all inputs: the views and labels of a batch of a thousand images, and the slopes of many networks.
const INPUT_BYTES: usize = 64 << 10;
/// Bytes of all outcomes: those of dozens of networks in training.
const OUTCOME_BYTES: usize = 8 << 10;
/// Bytes to which a small buffer is aligned.
const UNIT: usize = 64;

/// A piece of memory that small buffers share, and its content as the host knows it.
#[derive(Debug, Default)]
struct Region {
    address: Address,
    /// Empty as long as nobody wanted any.
    image: Vec<u8>,
    /// Bytes from the front that were ever given out.
    end: usize,
    /// Places that were given back, by size.
    free: BTreeMap<usize, Vec<usize>>,
}

impl Region {
    fn size(bytes: usize) -> usize {
        bytes.max(1).next_multiple_of(UNIT)
    }

    /// A place for so many bytes, if there is room.
    fn take(&mut self, bytes: usize) -> Option<usize> {
        let size = Self::size(bytes);
        if let Some(at) = self.free.get_mut(&size).and_then(Vec::pop) {
            return Some(at);
        }
        let at = self.end;
        (at + size <= self.image.len()).then(|| {
            self.end += size;
            at
        })
    }

    fn give_back(&mut self, at: usize, bytes: usize) {
        self.free.entry(Self::size(bytes)).or_default().push(at);
    }

    fn place(&self, address: Address) -> usize {
        (address - self.address) as usize
    }
}

/// Inputs, and which of them the device has not got yet.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    region: Region,
    changed: Option<Range<usize>>,
}

/// Outcomes, and where they come to on the host.
#[derive(Debug, Default)]
pub(super) struct Outcomes {
    region: Region,
    slots: Vec<Slot>,
    /// Those that nobody has.
    idle: Vec<usize>,
    /// How much work there had been when the image was made.
    image_of: Option<u64>,
}

/// Page-locked memory for all outcomes.
#[derive(Debug, Clone, Copy)]
struct Slot {
    host: HostBlock,
    /// Behind the copy to `host`.
    copied: Event,
}

/// Outcomes on their way to the host.
#[derive(Debug)]
pub struct Posted {
    gpu: Arc<Gpu>,
    sent: Sent,
}

/// Where outcomes are on their way to.
#[derive(Debug, Clone, Copy)]
struct Sent {
    slot: usize,
    /// Bytes of them.
    len: usize,
    /// How much work there was before.
    work: u64,
}

impl Posted {
    /// Waits for them.
    ///
    /// # Errors
    /// When the device failed.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let of = &mut *lock(&self.gpu.outcomes);
        self.gpu.arrive(of, self.sent)?;
        Ok(Snapshot { address: of.region.address, bytes: of.region.image[..self.sent.len].to_vec() })
    }
}

impl Drop for Posted {
    fn drop(&mut self) {
        // Whatever comes to this place next comes after what is still on its way.
        lock(&self.gpu.outcomes).idle.push(self.sent.slot);
    }
}

/// All outcomes as they were when they were posted.
#[derive(Debug)]
pub struct Snapshot {
    address: Address,
    bytes: Vec<u8>,
}

impl Snapshot {
    /// Copies a buffer's first bytes as they were.
    ///
    /// # Panics
    /// When the buffer is no [outcome](GpuBuffer::is_outcome), or was made later.
    pub fn read(&self, of: &GpuBuffer, to: &mut [u8]) {
        assert!(of.is_outcome() && to.len() <= of.bytes(), "a buffer of outcomes with as many bytes");
        let at = (of.address() - self.address) as usize;
        to.copy_from_slice(&self.bytes[at..at + to.len()]);
    }
}

impl Gpu {
    /// A place among the inputs, if there is room. What lies there is any.
    pub(super) fn take_input(&self, bytes: usize) -> Result<Option<Address>> {
        let Inputs { region, .. } = &mut *lock(&self.inputs);
        self.make(region, INPUT_BYTES)?;
        Ok(region.take(bytes).map(|at| region.address + at as Address))
    }

    /// A place among the outcomes, if there is room. What lies there is any.
    pub(super) fn take_outcome(&self, bytes: usize) -> Result<Option<Address>> {
        let Outcomes { region, .. } = &mut *lock(&self.outcomes);
        self.make(region, OUTCOME_BYTES)?;
        Ok(region.take(bytes).map(|at| region.address + at as Address))
    }

    /// Allocates a region's memory, the first time that somebody wants some.
    fn make(&self, region: &mut Region, bytes: usize) -> Result<()> {
        if !region.image.is_empty() {
            return Ok(());
        }
        self.refuse_while_recording("the memory of small buffers")?;
        region.address = self.allocate(bytes)?;
        region.image = vec![0; bytes];
        lock(&self.pool).regions += bytes as u64;
        // SAFETY: the memory was just allocated.
        unsafe { self.driver.zero(region.address, bytes) }
    }

    pub(super) fn give_back_input(&self, address: Address, bytes: usize) {
        let region = &mut lock(&self.inputs).region;
        region.give_back(region.place(address), bytes);
    }

    pub(super) fn give_back_outcome(&self, address: Address, bytes: usize) {
        let region = &mut lock(&self.outcomes).region;
        region.give_back(region.place(address), bytes);
    }

    /// Changes an input, before the next launch.
    pub(super) fn write_input(&self, address: Address, bytes: &[u8]) -> Result<()> {
        self.refuse_while_recording("a copy to the device")?;
        let Inputs { region, changed } = &mut *lock(&self.inputs);
        let at = region.place(address);
        let image = &mut region.image[at..at + bytes.len()];
        if image == bytes {
            return Ok(());
        }
        image.copy_from_slice(bytes);
        let (start, end) = changed.take().map_or((at, at + bytes.len()), |range| (range.start, range.end));
        *changed = Some(start.min(at)..end.max(at + bytes.len()));
        self.inputs_changed.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Copies the inputs that changed to the device, before work that may read them.
    pub(super) fn flush_inputs(&self) -> Result<()> {
        // Launches come by here: a lock only where it is needed.
        if !self.inputs_changed.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let Inputs { region, changed } = &mut *lock(&self.inputs);
        let Some(range) = changed.take() else { return Ok(()) };
        // SAFETY: the range lies within the region, all of which the image is of.
        unsafe { self.driver.upload(region.address + range.start as Address, &region.image[range]) }
    }

    /// Sends all outcomes of the work so far to the host, which need not wait for them.
    ///
    /// # Errors
    /// When the device or an earlier launch failed, or it is recording.
    pub fn post_outcomes(self: &Arc<Self>) -> Result<Posted> {
        let sent = self.send(&mut lock(&self.outcomes))?;
        Ok(Posted { gpu: self.clone(), sent })
    }

    fn send(&self, of: &mut Outcomes) -> Result<Sent> {
        self.check()?;
        self.refuse_while_recording("a copy to the host")?;
        let slot = match of.idle.pop() {
            Some(slot) => slot,
            None => {
                let (host, copied) = (self.driver.allocate_host(OUTCOME_BYTES)?, self.driver.event()?);
                of.slots.push(Slot { host, copied });
                of.slots.len() - 1
            }
        };
        let (Slot { host, copied }, len) = (of.slots[slot], of.region.end);
        // SAFETY: both are as long. The memory on the host is read by whoever has the slot when the event has come, and never
        // written by the host.
        let sent = unsafe { self.driver.download_later(host, of.region.address, len) };
        if let Err(error) = sent.and_then(|()| self.driver.record(copied, Queue::Work)) {
            of.idle.push(slot);
            return Err(error);
        }
        Ok(Sent { slot, len, work: self.work.load(Ordering::Relaxed) })
    }

    /// Waits for outcomes that were sent, and makes them the image.
    fn arrive(&self, of: &mut Outcomes, Sent { slot, len, work }: Sent) -> Result<()> {
        let Slot { host, copied } = of.slots[slot];
        self.driver.wait(copied)?;
        // SAFETY: the copy is done, and as long as somebody has the slot there is no other.
        let bytes = unsafe { host.bytes() };
        of.region.image[..len].copy_from_slice(&bytes[..len]);
        of.image_of = Some(work);
        Ok(())
    }

    /// Copies an outcome to the host, after all work so far.
    pub(super) fn read_outcome(&self, address: Address, to: &mut [u8]) -> Result<()> {
        self.check()?;
        let of = &mut *lock(&self.outcomes);
        if of.image_of != Some(self.work.load(Ordering::Relaxed)) {
            let sent = self.send(of)?;
            let arrived = self.arrive(of, sent);
            of.idle.push(sent.slot);
            arrived?;
        }
        let at = of.region.place(address);
        to.copy_from_slice(&of.region.image[at..at + to.len()]);
        Ok(())
    }

    /// Frees what the regions hold.
    pub(super) fn free_regions(&self) {
        let (inputs, outcomes) = (std::mem::take(&mut *lock(&self.inputs)), std::mem::take(&mut *lock(&self.outcomes)));
        for slot in outcomes.slots {
            // An error here belongs to earlier work, which reports it itself.
            let _ = self.driver.wait(slot.copied);
            // SAFETY: allocated by this driver, and no copy to it is under way.
            unsafe { self.driver.free_host(slot.host) };
            self.driver.release_event(slot.copied);
        }
        for region in [inputs.region, outcomes.region].into_iter().filter(|region| !region.image.is_empty()) {
            // SAFETY: buffers hold the device alive, so nobody has an address within.
            unsafe { self.driver.free(region.address) };
        }
    }
}
