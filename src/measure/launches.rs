//! Timing one piece of work on any device, over operands that do not stay in its caches.
//!
//! On a GPU the work is captured into a graph, some dozens of times where it is small, each time over another set of
//! operands. The device's events time one replay, then two in a row: the difference is one replay without what it takes
//! to start a graph and to read the clock. Elsewhere the host's clock times one call after the other.
//! `benches/peers/clock.py` does the same to PyTorch.

use std::time::{Duration, Instant};

use super::machine::Machine;
use super::timer::{Timed, interleave};
use crate::device::Device;
use crate::device::driver::CapturedGraph;
use crate::device::gpu::Gpu;
use crate::{Error, Result};

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
/// Launches of small work in a graph at least: the GPU is then still busy with one replay while the host starts the next.
const MIN_LAUNCHES: usize = 24;
/// Bytes that a graph moves at least where its launches are counted by them: half a millisecond at 1 TB/s.
const GRAPH_BYTES: usize = 500_000_000;
/// Warm-up of a GPU before its work is timed: its clock is low at rest and rises over some hundred milliseconds.
const RAMP: Duration = Duration::from_millis(300);
/// Retries of a sample in which two replays took no longer than one, which happens on a disturbed machine.
const ATTEMPTS: usize = 8;

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
    captured: Option<Captured>,
}

/// Work captured so many times.
#[derive(Clone, Copy)]
struct Captured {
    graph: CapturedGraph,
    launches: usize,
}

impl<'a> Launches<'a> {
    /// Prepares small work that rotates through sets of operands: runs it once, and captures it where the device can.
    ///
    /// # Errors
    /// What `body` returns, or the device.
    pub fn new(device: &Device, sets: usize, body: impl FnMut(usize) -> Result<()> + 'a) -> Result<Self> {
        Self::prepare(device, sets, MIN_LAUNCHES.next_multiple_of(sets), body)
    }

    /// The same for work that moves so many bytes: where each launch takes long, a graph has fewer.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(super) fn of_bytes(
        device: &Device,
        sets: usize,
        bytes: usize,
        body: impl FnMut(usize) -> Result<()> + 'a,
    ) -> Result<Self> {
        let launches = GRAPH_BYTES.div_ceil(bytes.max(1)).clamp(1, MIN_LAUNCHES).next_multiple_of(sets);
        Self::prepare(device, sets, launches, body)
    }

    /// Prepares work so large that one launch of it is a sample, such as a network's pass.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn whole(device: &Device, mut body: impl FnMut() -> Result<()> + 'a) -> Result<Self> {
        Self::prepare(device, 1, 1, move |_| body())
    }

    fn prepare(
        device: &Device,
        sets: usize,
        launches: usize,
        body: impl FnMut(usize) -> Result<()> + 'a,
    ) -> Result<Self> {
        let mut this = Self { device: device.clone(), body: Box::new(body), sets, next: 0, captured: None };
        this.once()?;
        if let Device::Gpu(gpu, _) = device {
            gpu.synchronize()?;
            if !gpu.driver().is_emulated() {
                let graph = gpu.capture(|| (0..launches).try_for_each(|_| this.once()))?;
                this.captured = Some(Captured { graph, launches });
            }
        }
        Ok(this)
    }

    /// Sets of operands that it rotates through.
    pub fn sets(&self) -> usize {
        self.sets
    }

    fn once(&mut self) -> Result<()> {
        self.next = (self.next + 1) % self.sets;
        (self.body)(self.next)
    }

    /// Seconds of one launch: one sample.
    ///
    /// # Errors
    /// When the device fails.
    pub fn seconds(&mut self) -> Result<f64> {
        match (&self.device.clone(), self.captured) {
            (Device::Gpu(gpu, _), Some(captured)) => captured.seconds(gpu),
            (Device::Gpu(gpu, _), None) => time_on(gpu, || self.once()),
            (Device::Cpu, _) => {
                let start = Instant::now();
                self.once()?;
                Ok(start.elapsed().as_secs_f64())
            }
        }
    }

    /// Samples for about `budget`, after a warm-up.
    ///
    /// # Errors
    /// When the device fails.
    pub fn sample(&mut self, budget: Duration) -> Result<Vec<f64>> {
        interleave(&mut [Box::new(|| self.seconds())], budget).remove(0)
    }

    /// Time of `count` launches, as a bench harness asks for it.
    ///
    /// # Errors
    /// When the device fails.
    pub fn total(&mut self, count: u64) -> Result<Duration> {
        // A sample is the mean of all launches in a graph.
        let samples = count.div_ceil(self.captured.map_or(1, |captured| captured.launches as u64));
        let sum = (0..samples).try_fold(0.0, |sum, _| self.seconds().map(|s| sum + s))?;
        Ok(Duration::from_secs_f64(sum * count as f64 / samples.max(1) as f64))
    }

    /// Keeps a GPU busy until its clock has risen; the host needs no such thing.
    ///
    /// # Errors
    /// When the device fails.
    pub fn warm(&mut self) -> Result<()> {
        let start = Instant::now();
        while self.captured.is_some() && start.elapsed() < RAMP {
            self.seconds()?;
        }
        Ok(())
    }
}

/// Samples of several, each in its turn, within one `budget`. What fails is left out from then on.
pub(super) fn sample_in_turns<'l, 'a: 'l>(
    launches: impl IntoIterator<Item = &'l mut Launches<'a>>,
    budget: Duration,
) -> Vec<Result<Vec<f64>>> {
    let mut timed: Vec<Timed<'_>> =
        launches.into_iter().map(|launches| Box::new(move || launches.seconds()) as Timed<'_>).collect();
    interleave(&mut timed, budget)
}

impl Drop for Launches<'_> {
    fn drop(&mut self) {
        if let (Device::Gpu(gpu, _), Some(captured)) = (&self.device, self.captured) {
            gpu.forget(captured.graph);
        }
    }
}

impl Captured {
    /// Seconds of one launch.
    fn seconds(self, gpu: &Gpu) -> Result<f64> {
        for _ in 0..ATTEMPTS {
            let one = self.replays(gpu, 1)?;
            let difference = self.replays(gpu, 2)? - one;
            if difference > 0.0 {
                return Ok(difference / self.launches as f64);
            }
        }
        Err(Error::Device(format!(
            "{ATTEMPTS} times, doing work twice took no longer than once: too short to be timed"
        )))
    }

    fn replays(self, gpu: &Gpu, count: usize) -> Result<f64> {
        // SAFETY: operands belong to the work, which lives as long as what times it.
        time_on(gpu, || (0..count).try_for_each(|_| unsafe { gpu.replay(self.graph) }))
    }
}

fn time_on(gpu: &Gpu, mut body: impl FnMut() -> Result<()>) -> Result<f64> {
    let ms = gpu.driver().time(&mut body)?;
    gpu.check()?;
    Ok(f64::from(ms) * 1e-3)
}
