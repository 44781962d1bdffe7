//! Timing one piece of work on any device, over operands that do not stay in its caches.
//!
//! On a GPU the work is captured some dozens of times into a graph, each time over another set of operands, and the
//! replays are timed with the device's events; what an empty graph takes is subtracted. Elsewhere the host's clock
//! times one call after the other.

use std::time::{Duration, Instant};

use super::machine::Machine;
use super::timer::{collect, median};
use crate::Result;
use crate::device::Device;
use crate::device::driver::CapturedGraph;
use crate::device::gpu::Gpu;

/// How much larger than the largest cache all sets of operands together are.
const CACHES: usize = 3;
/// Fewest sets on a GPU, so that large operands rotate too.
const MIN_SETS: usize = 4;
/// Most sets: what is small beyond this stays in the cache, as it would in a network.
const MAX_SETS: usize = 64;
/// Most bytes of all sets on the host.
const MAX_HOST_BYTES: usize = 512 << 20;
/// Share of a GPU's free memory that all sets may take: one part in so many.
const GPU_SHARE: usize = 3;
/// Launches in a graph at least: enough to hide what starting it takes.
const MIN_LAUNCHES: usize = 24;

/// How many sets of operands of `bytes` each a device rotates through.
pub fn rotation(device: &Device, bytes: usize) -> usize {
    let (cache, least, room) = match device {
        Device::Cpu => (Machine::here().largest_cache_bytes(), 1, MAX_HOST_BYTES),
        Device::Gpu(gpu, _) => {
            let driver = gpu.driver();
            if driver.is_emulated() {
                return 2;
            }
            let free = driver.memory().map_or(usize::MAX, |(free, _)| usize::try_from(free).unwrap_or(usize::MAX));
            (driver.l2_bytes(), MIN_SETS, free / GPU_SHARE)
        }
    };
    let bytes = bytes.max(1);
    (CACHES * cache).div_ceil(bytes).clamp(least, MAX_SETS).min((room / bytes).max(1))
}

/// Work that can be repeated and timed: `body(i)` does it over operand set `i % sets`.
pub struct Launches<'a> {
    device: Device,
    body: Box<dyn FnMut(usize) -> Result<()> + 'a>,
    sets: usize,
    next: usize,
    graph: Option<Graph>,
}

/// Work captured several times.
struct Graph {
    graph: CapturedGraph,
    launches: usize,
    /// Seconds that a graph takes with nothing in it.
    empty: f64,
}

impl<'a> Launches<'a> {
    /// Prepares the work: runs it once, and captures it where the device can.
    ///
    /// # Errors
    /// What `body` returns, or the device.
    pub fn new(device: &Device, sets: usize, body: impl FnMut(usize) -> Result<()> + 'a) -> Result<Self> {
        let mut this = Self { device: device.clone(), body: Box::new(body), sets, next: 0, graph: None };
        this.once()?;
        if let Device::Gpu(gpu, _) = device {
            gpu.synchronize()?;
            let launches = MIN_LAUNCHES.next_multiple_of(sets);
            if !gpu.driver().is_emulated() {
                let graph = gpu.capture(|| (0..launches).try_for_each(|_| this.once()))?;
                this.graph = Some(Graph { graph, launches, empty: empty_replay(gpu)? });
            }
        }
        Ok(this)
    }

    fn once(&mut self) -> Result<()> {
        self.next = (self.next + 1) % self.sets;
        (self.body)(self.next)
    }

    /// Seconds of one launch: one sample a replay of the graph, or a call where there is none.
    ///
    /// # Errors
    /// When the device fails.
    pub fn sample(&mut self, budget: Duration) -> Result<Vec<f64>> {
        match (&self.device.clone(), &self.graph) {
            (Device::Gpu(gpu, _), Some(Graph { graph, launches, empty })) => {
                let once = || {
                    let seconds = replay(gpu, *graph)?;
                    Ok(((seconds - empty) / *launches as f64).max(f64::MIN_POSITIVE))
                };
                collect(once, budget)
            }
            (Device::Gpu(gpu, _), None) => collect(|| time_on(gpu, || self.once()), budget),
            (Device::Cpu, _) => collect(|| self.time_on_host(), budget),
        }
    }

    /// Time of `count` launches, as a bench harness asks for it.
    ///
    /// # Errors
    /// When the device fails.
    pub fn total(&mut self, count: u64) -> Result<Duration> {
        let seconds = match (&self.device.clone(), &self.graph) {
            (Device::Gpu(gpu, _), Some(Graph { graph, launches, empty })) => {
                let replays = count.div_ceil(*launches as u64);
                let mut seconds = 0.0;
                for _ in 0..replays {
                    seconds += replay(gpu, *graph)? - empty;
                }
                seconds * count as f64 / (replays * *launches as u64).max(1) as f64
            }
            (Device::Gpu(gpu, _), None) => time_on(gpu, || (0..count).try_for_each(|_| self.once()))?,
            (Device::Cpu, _) => (0..count).try_fold(0.0, |sum, _| self.time_on_host().map(|s| sum + s))?,
        };
        Ok(Duration::from_secs_f64(seconds.max(0.0)))
    }

    fn time_on_host(&mut self) -> Result<f64> {
        let start = Instant::now();
        self.once()?;
        Ok(start.elapsed().as_secs_f64())
    }
}

impl Drop for Launches<'_> {
    fn drop(&mut self) {
        if let (Device::Gpu(gpu, _), Some(graph)) = (&self.device, &self.graph) {
            gpu.driver().release(graph.graph);
        }
    }
}

fn time_on(gpu: &Gpu, mut body: impl FnMut() -> Result<()>) -> Result<f64> {
    let ms = gpu.driver().time(&mut body)?;
    gpu.check()?;
    Ok(f64::from(ms) * 1e-3)
}

fn replay(gpu: &Gpu, graph: CapturedGraph) -> Result<f64> {
    // SAFETY: operands belong to the work, which lives as long as what times it; workspaces are never freed.
    time_on(gpu, || unsafe { gpu.driver().replay(graph) })
}

/// Seconds of a graph with nothing in it.
fn empty_replay(gpu: &Gpu) -> Result<f64> {
    let graph = gpu.capture(|| Ok(()))?;
    let seconds = collect(|| replay(gpu, graph), Duration::from_millis(1));
    gpu.driver().release(graph);
    Ok(median(&seconds?))
}
