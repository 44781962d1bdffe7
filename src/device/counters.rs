//! What the emulator's counting flavour counts of a launch (`kernels/emulator/counters.h`), and which blocks it counts.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::Serialize;

/// Bytes of a sector, the unit in which global memory is moved.
pub const SECTOR: u64 = 32;
/// Bytes that one bit of a map of touched bytes stands for, and bits of its words.
const WORD_BITS: usize = 64;

/// Requests of warps to global memory: loads, or stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[repr(C)]
pub struct GlobalCounters {
    /// Requests.
    pub requests: u64,
    /// Lanes that took part, over all requests.
    pub lanes: u64,
    /// 32-byte sectors that they moved.
    pub sectors: u64,
    /// Sectors that would have held the bytes of each request.
    pub ideal_sectors: u64,
    /// 128-byte lines that they touched.
    pub lines: u64,
}

/// Requests of warps to shared memory: loads, or stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[repr(C)]
pub struct SharedCounters {
    /// Requests.
    pub requests: u64,
    /// Lanes that took part, over all requests.
    pub lanes: u64,
    /// Passes through the 32 banks.
    pub wavefronts: u64,
    /// Passes that the distinct words would have taken without conflicts.
    pub ideal_wavefronts: u64,
}

/// What a launch did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[repr(C)]
pub struct Counters {
    /// Loads from global memory, asynchronous copies among them.
    pub loads: GlobalCounters,
    /// Stores to global memory.
    pub stores: GlobalCounters,
    /// Loads from shared memory.
    pub shared_loads: SharedCounters,
    /// Stores to shared memory.
    pub shared_stores: SharedCounters,
    /// Barriers, one for each time a block meets at one.
    pub barriers: u64,
    /// Multiply-accumulates of tensor cores, those on padding among them.
    pub tensor_macs: u64,
}

impl GlobalCounters {
    fn add(&mut self, other: &Self, times: u64) {
        self.requests += times * other.requests;
        self.lanes += times * other.lanes;
        self.sectors += times * other.sectors;
        self.ideal_sectors += times * other.ideal_sectors;
        self.lines += times * other.lines;
    }
}

impl SharedCounters {
    fn add(&mut self, other: &Self, times: u64) {
        self.requests += times * other.requests;
        self.lanes += times * other.lanes;
        self.wavefronts += times * other.wavefronts;
        self.ideal_wavefronts += times * other.ideal_wavefronts;
    }
}

impl Counters {
    /// Adds so many times what other blocks, or other launches, did.
    pub fn add(&mut self, other: &Self, times: u64) {
        self.loads.add(&other.loads, times);
        self.stores.add(&other.stores, times);
        self.shared_loads.add(&other.shared_loads, times);
        self.shared_stores.add(&other.shared_stores, times);
        self.barriers += times * other.barriers;
        self.tensor_macs += times * other.tensor_macs;
    }

    /// Bytes moved between multiprocessors and the cache they share.
    pub fn moved_bytes(&self) -> u64 {
        SECTOR * (self.loads.sectors + self.stores.sectors)
    }

    /// Sectors that would have held every request's bytes, of those that were moved: 1 at best. `None` where nothing was.
    pub fn sector_efficiency(&self) -> Option<f64> {
        let moved = self.loads.sectors + self.stores.sectors;
        (moved > 0).then(|| (self.loads.ideal_sectors + self.stores.ideal_sectors) as f64 / moved as f64)
    }

    /// Wavefronts of shared memory.
    pub fn wavefronts(&self) -> u64 {
        self.shared_loads.wavefronts + self.shared_stores.wavefronts
    }

    /// Wavefronts over those without conflicts: 1 at best. `None` where shared memory was not used.
    pub fn wavefront_ratio(&self) -> Option<f64> {
        let ideal = self.shared_loads.ideal_wavefronts + self.shared_stores.ideal_wavefronts;
        (ideal > 0).then(|| self.wavefronts() as f64 / ideal as f64)
    }

    /// Mean lanes of a warp's request to memory, of 32. `None` where there was none.
    pub fn active_lanes(&self) -> Option<f64> {
        let requests =
            self.loads.requests + self.stores.requests + self.shared_loads.requests + self.shared_stores.requests;
        let lanes = self.loads.lanes + self.stores.lanes + self.shared_loads.lanes + self.shared_stores.lanes;
        (requests > 0).then(|| lanes as f64 / requests as f64)
    }
}

/// What was counted of one launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaunchCounters {
    /// Blocks of the launch.
    pub blocks: u64,
    /// Those that ran. Counts stand for all blocks: each that ran counts for its neighbours.
    pub counted: u64,
    /// What they did.
    pub counters: Counters,
    /// Bytes of memory that it touched; `None` where not all blocks ran.
    pub touched: Option<TouchedBytes>,
}

/// Bytes of global memory that a launch touched, however often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct TouchedBytes {
    /// Those of memory that was there before the work began ([`CounterLog::begin`]).
    pub operands: DistinctBytes,
    /// Those of memory that the work took itself, for partial sums.
    pub workspace: DistinctBytes,
}

/// Bytes, each counted once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct DistinctBytes {
    /// Those that it read.
    pub read: u64,
    /// Those that it wrote.
    pub written: u64,
}

impl DistinctBytes {
    /// Both. A byte that is read and written is moved twice.
    pub fn all(&self) -> u64 {
        self.read + self.written
    }
}

/// Which blocks of a launch run. Where not all do, results mean nothing, and memory is not filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CountedBlocks {
    /// All.
    #[default]
    All,
    /// So many at most, which stand for all.
    Sample(u64),
    /// That of this number, x innermost, which stands for itself.
    One(u64),
}

/// Which blocks of a launch run, and where what they did is collected.
#[derive(Debug, Clone, Default)]
pub struct CounterLog {
    /// The blocks.
    pub blocks: CountedBlocks,
    launches: Arc<Mutex<Vec<LaunchCounters>>>,
    /// How often work has begun.
    begun: Arc<AtomicU64>,
}

impl CounterLog {
    /// A log of launches of which these blocks run.
    pub fn new(blocks: CountedBlocks) -> Self {
        Self { blocks, ..Self::default() }
    }

    /// Says that work begins: memory that is allocated from now on is its workspace.
    pub fn begin(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    /// How often work has begun.
    pub(super) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    /// What was counted since the last call, in the order of the launches.
    pub fn take(&self) -> Vec<LaunchCounters> {
        std::mem::take(&mut *self.launches.lock().unwrap_or_else(|e| e.into_inner()))
    }

    pub(super) fn push(&self, launch: LaunchCounters) {
        self.launches.lock().unwrap_or_else(|e| e.into_inner()).push(launch);
    }

    /// The blocks of `blocks` that run, each with the number that it stands for; `None` where all do. One is drawn from each
    /// of as many equal stretches, by a fixed rule: a regular step would meet the same columns of tiles again and again.
    pub(super) fn sample(&self, blocks: u64) -> Option<Vec<(u64, u64)>> {
        let most = match self.blocks {
            CountedBlocks::One(block) => return Some(vec![(block, 1)]),
            CountedBlocks::Sample(most) if most < blocks => most,
            CountedBlocks::Sample(_) | CountedBlocks::All => return None,
        };
        let stretch = |i: u64| {
            let (first, end) = (i * blocks / most, (i + 1) * blocks / most);
            (first + mix(i) % (end - first), end - first)
        };
        Some((0..most).map(stretch).collect())
    }
}

/// splitmix64.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// `EmulatorAllocation` of `kernels/emulator/counters.h`.
#[derive(Debug)]
#[repr(C)]
pub(super) struct AllocationMap {
    begin: u64,
    end: u64,
    read: *mut u64,
    written: *mut u64,
}

/// Maps of the touched bytes of all allocations, while a launch runs.
#[derive(Debug)]
pub(super) struct TouchedMaps {
    /// As the allocations are ordered. Their pointers lead into `bits`.
    pub(super) maps: Vec<AllocationMap>,
    bits: Vec<u64>,
}

// SAFETY: kernels set bits through the pointers by atomic operations; nobody reads them before they have ended.
unsafe impl Sync for TouchedMaps {}

impl TouchedMaps {
    /// Of allocations in order of address. Without `bits` it tells only where they lie.
    pub(super) fn new(allocations: &[Range<u64>], bits: bool) -> Self {
        let words = |range: &Range<u64>| ((range.end - range.start) as usize).div_ceil(WORD_BITS);
        let all = if bits { 2 * allocations.iter().map(words).sum::<usize>() } else { 0 };
        let mut bits = vec![0u64; all];
        let mut rest = &mut bits[..];
        let mut part = |len: usize| {
            if all == 0 {
                return std::ptr::null_mut();
            }
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(len);
            rest = tail;
            part.as_mut_ptr()
        };
        let map = |range: &Range<u64>| AllocationMap {
            begin: range.start,
            end: range.end,
            read: part(words(range)),
            written: part(words(range)),
        };
        let maps = allocations.iter().map(map).collect();
        Self { maps, bits }
    }

    /// How many bytes were touched; `None` where there are no bits. `is_workspace` tells an allocation by its number.
    pub(super) fn touched(&self, is_workspace: impl Fn(usize) -> bool) -> Option<TouchedBytes> {
        if self.bits.is_empty() {
            return None;
        }
        let mut rest = &self.bits[..];
        let mut next = |len: usize| {
            let (part, tail) = rest.split_at(len);
            rest = tail;
            part.iter().map(|word| u64::from(word.count_ones())).sum::<u64>()
        };
        let mut touched = TouchedBytes::default();
        for (at, map) in self.maps.iter().enumerate() {
            let words = ((map.end - map.begin) as usize).div_ceil(WORD_BITS);
            let to = if is_workspace(at) { &mut touched.workspace } else { &mut touched.operands };
            to.read += next(words);
            to.written += next(words);
        }
        Some(touched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_stands_for_all_blocks() {
        for (blocks, most) in [(1, 4), (4, 4), (5, 4), (1000, 7), (65_537, 32)] {
            let Some(sample) = CounterLog::new(CountedBlocks::Sample(most)).sample(blocks) else {
                assert!(blocks <= most);
                continue;
            };
            assert_eq!(sample.len() as u64, most);
            assert_eq!(sample.iter().map(|&(_, weight)| weight).sum::<u64>(), blocks);
            assert!(sample.windows(2).all(|pair| pair[0].0 < pair[1].0) && sample.last().unwrap().0 < blocks);
        }
        assert_eq!(CounterLog::new(CountedBlocks::All).sample(1 << 40), None);
    }
}
