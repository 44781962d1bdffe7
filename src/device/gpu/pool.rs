//! Memory of a GPU that is used again: freed buffers by size, workspaces, counters.

use std::collections::BTreeMap;

use super::{Gpu, Tickets, Workspace, lock};
use crate::Result;
use crate::device::driver::{Address, CapturedGraph};

/// Freed memory by size, and what is in use.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: BTreeMap<usize, Vec<Address>>,
    used: u64,
    peak: u64,
    /// Memory lent to one operation at a time. Outgrown ones stay as long as a recording holds their address.
    workspaces: Vec<Lent>,
    /// Most bytes that one operation has asked of them.
    workspace_peak: u64,
    /// Bytes that small buffers share.
    pub(super) regions: u64,
    /// Counters that are zero between launches. Outgrown ones stay, for recordings hold their addresses.
    tickets: Vec<Tickets>,
}

/// Memory that workspaces are lent from.
#[derive(Debug)]
pub(super) struct Lent {
    pub address: Address,
    pub bytes: usize,
    /// The recordings that hold its address.
    holders: Vec<CapturedGraph>,
    /// Whether the recording in progress will.
    recording: bool,
}

impl Lent {
    fn is_held(&self) -> bool {
        self.recording || !self.holders.is_empty()
    }
}

/// Bytes to which allocations are rounded, so that freed ones fit others.
const GRANULE: usize = 512;
/// Tickets that are allocated at once, at least: enough for the statistics of most networks.
const FEWEST_TICKETS: usize = 4096;

impl Pool {
    /// The recording in progress is over: it holds the workspaces that it was lent, where something came of it.
    pub fn end_recording(&mut self, graph: Option<&CapturedGraph>) {
        for lent in self.workspaces.iter_mut().filter(|lent| lent.recording) {
            lent.holders.extend(graph);
            lent.recording = false;
        }
    }

    /// Takes out the outgrown workspaces that a recording alone held.
    pub fn forget(&mut self, graph: CapturedGraph) -> Vec<Lent> {
        self.workspaces.iter_mut().for_each(|lent| lent.holders.retain(|holder| *holder != graph));
        let outgrown = self.workspaces.len().saturating_sub(1);
        self.workspaces.extract_if(..outgrown, |lent| !lent.is_held()).collect()
    }

    /// All memory that belongs to no buffer.
    pub fn into_addresses(self) -> impl Iterator<Item = Address> {
        let workspaces = self.workspaces.into_iter().map(|w| w.address);
        let tickets = self.tickets.into_iter().map(|t| t.address);
        self.free.into_values().flatten().chain(workspaces).chain(tickets)
    }
}

impl Gpu {
    /// Bytes in use now, and at most so far.
    pub fn memory(&self) -> (u64, u64) {
        let pool = lock(&self.pool);
        (pool.used, pool.peak)
    }

    /// Bytes of all buffers, workspaces left out, which are as large as any operation so far wanted them, and small buffers that
    /// share memory.
    pub fn buffer_bytes(&self) -> u64 {
        let pool = lock(&self.pool);
        let workspaces = pool.workspaces.iter().map(|w| w.bytes);
        let tickets = pool.tickets.iter().map(|t| t.len * size_of::<u32>());
        pool.used - pool.regions - workspaces.chain(tickets).map(|bytes| self.rounded(bytes) as u64).sum::<u64>()
    }

    /// Most bytes of workspace that one operation asked for since this was last called.
    pub fn take_workspace_peak(&self) -> u64 {
        std::mem::take(&mut lock(&self.pool).workspace_peak)
    }

    pub(super) fn allocate(&self, bytes: usize) -> Result<Address> {
        let bytes = self.rounded(bytes);
        let mut pool = lock(&self.pool);
        let reused = pool.free.get_mut(&bytes).and_then(Vec::pop);
        let address = match reused {
            Some(address) => address,
            None => self.driver.allocate(bytes).or_else(|error| {
                // What lies idle in other sizes may be enough.
                let idle = std::mem::take(&mut pool.free);
                if idle.is_empty() {
                    return Err(error);
                }
                for address in idle.into_values().flatten() {
                    // SAFETY: nobody holds an address of the pool.
                    unsafe { self.driver.free(address) };
                }
                self.driver.allocate(bytes)
            })?,
        };
        pool.used += bytes as u64;
        pool.peak = pool.peak.max(pool.used);
        Ok(address)
    }

    /// Frees idle memory, so that another process can use it.
    pub fn release_idle(&self) {
        let idle = std::mem::take(&mut lock(&self.pool).free);
        for address in idle.into_values().flatten() {
            // SAFETY: nobody holds an address of the pool.
            unsafe { self.driver.free(address) };
        }
    }

    pub(super) fn release(&self, address: Address, bytes: usize) {
        let bytes = self.rounded(bytes);
        let mut pool = lock(&self.pool);
        pool.used -= bytes as u64;
        if self.driver.keeps_freed_memory() {
            pool.free.entry(bytes).or_default().push(address);
        } else {
            // SAFETY: the owner gives it back, and only once.
            unsafe { self.driver.free(address) };
        }
    }

    fn rounded(&self, bytes: usize) -> usize {
        if self.driver.keeps_freed_memory() { bytes.next_multiple_of(GRANULE) } else { bytes }
    }

    /// Memory of `len` floats for partial sums, of any content, until the next call: work on a device is done in order,
    /// so that one operation after the other may use it. A failure shows at the next [`check`](Self::check).
    pub fn workspace(&self, len: usize) -> Workspace {
        Workspace { address: self.lend(len), len }
    }

    /// At least `len` counters that are zero, and that whoever counts with them leaves zero. A failure shows at the next
    /// [`check`](Self::check).
    pub fn tickets(&self, len: usize) -> Tickets {
        let last = lock(&self.pool).tickets.last().copied();
        if let Some(tickets) = last.filter(|tickets| tickets.len >= len) {
            return tickets;
        }
        let len = len.next_power_of_two().max(FEWEST_TICKETS);
        let bytes = len * size_of::<u32>();
        let zeroed = self.allocate(bytes).and_then(|address| {
            // SAFETY: the memory was just allocated, and nobody else has its address.
            unsafe { self.driver.zero(address, bytes) }.map(|()| address)
        });
        let tickets = Tickets {
            address: zeroed.unwrap_or_else(|error| {
                self.fail(error);
                0
            }),
            len,
        };
        lock(&self.pool).tickets.push(tickets);
        tickets
    }

    fn lend(&self, len: usize) -> Address {
        let bytes = len * size_of::<f32>();
        let recorded = self.is_recording();
        {
            let peak = &mut lock(&self.pool).workspace_peak;
            *peak = (*peak).max(bytes as u64);
        }
        // Where freed memory is not kept, new memory every time finds reads of what an earlier operation left.
        if self.driver.keeps_freed_memory()
            && let Some(last) = lock(&self.pool).workspaces.last_mut()
            && last.bytes >= bytes
        {
            last.recording |= recorded;
            return last.address;
        }
        // Whatever takes over an outgrown one does its work after the operations that were lent it.
        if !recorded || self.driver.keeps_freed_memory() {
            let outgrown: Vec<Lent> = lock(&self.pool).workspaces.extract_if(.., |w| !w.is_held()).collect();
            outgrown.into_iter().for_each(|w| self.release(w.address, w.bytes));
        }
        match self.allocate(bytes) {
            Ok(address) => {
                lock(&self.pool).workspaces.push(Lent { address, bytes, holders: Vec::new(), recording: recorded });
                address
            }
            Err(error) => {
                self.fail(error);
                0
            }
        }
    }
}
