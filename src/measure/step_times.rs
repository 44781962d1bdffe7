//! How long each step of a network takes on the host inside of a pass, and how near that is to what the machine allows.
//!
//! A step's least time is the larger of FLOP / product rate and bytes / copy rate. Activations are moved at the rate of the cache in
//! which all that the step touches fits; weights at that of the cache in which those of the whole network fit, since between two
//! passes all of them are read. Both rates are measured by copies of half as much as the cache holds.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::machine::Machine;
use super::network_run::{NetworkCase, NetworkRun};
use super::peaks::Peaks;
use super::timer::sample;
use crate::Result;
use crate::device::Device;
use crate::engine::Pass;
use crate::ops::team;

/// Sizes of caches where the system tells none.
const CORE_CACHE: usize = 1 << 20;
const SHARED_CACHE: usize = 8 << 20;
/// Copies that a thread makes of what stays in a cache before time is looked at.
const COPIES: usize = 16;
/// Passes before those that are timed.
const WARM: usize = 2;

/// What the host's memory and arithmetic can do, of all threads together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct HostRates {
    /// FLOP per second of matrix products.
    pub flops_per_s: f64,
    /// Bytes that the cores' own caches hold, and bytes per second of copies within them, read and written ones counted.
    pub core_bytes: usize,
    /// As above.
    pub core_bytes_per_s: f64,
    /// The same of the largest cache.
    pub shared_bytes: usize,
    /// As above.
    pub shared_bytes_per_s: f64,
    /// Bytes per second of large copies.
    pub memory_bytes_per_s: f64,
}

impl HostRates {
    /// Measures the caches in about `budget`; the rest is known.
    ///
    /// # Errors
    /// None but those of the timer.
    pub fn measure(peaks: &Peaks, budget: Duration) -> Result<Self> {
        let (machine, threads) = (Machine::here(), rayon::current_num_threads());
        let known = |bytes: usize, otherwise: usize| if bytes > 0 { bytes } else { otherwise };
        let core_bytes = known(machine.core_cache_bytes(), CORE_CACHE) * threads;
        let shared_bytes = known(machine.largest_cache_bytes(), SHARED_CACHE).max(core_bytes);
        Ok(Self {
            flops_per_s: peaks.gemm_flops_per_s,
            core_bytes,
            core_bytes_per_s: copy_rate(core_bytes / 2, budget / 2)?.max(peaks.copy_bytes_per_s),
            shared_bytes,
            shared_bytes_per_s: copy_rate(shared_bytes / 2, budget / 2)?.max(peaks.copy_bytes_per_s),
            memory_bytes_per_s: peaks.copy_bytes_per_s,
        })
    }

    /// Bytes per second where so many are moved again and again.
    fn bytes_per_s(&self, bytes: u64) -> f64 {
        match usize::try_from(bytes).unwrap_or(usize::MAX) {
            bytes if bytes <= self.core_bytes => self.core_bytes_per_s,
            bytes if bytes <= self.shared_bytes => self.shared_bytes_per_s,
            _ => self.memory_bytes_per_s,
        }
    }
}

/// Bytes per second of copies between two arrays that hold so many together, a part for each thread.
fn copy_rate(bytes: usize, budget: Duration) -> Result<f64> {
    let threads = rayon::current_num_threads();
    let len = (bytes / 2 / size_of::<f32>() / threads).max(1);
    let (from, mut to) = (vec![1.0f32; len * threads], vec![0.0f32; len * threads]);
    let copies = || {
        team::each_chunk(&mut to, len, |part, to| {
            for _ in 0..COPIES {
                to.copy_from_slice(std::hint::black_box(&from[part * len..][..len]));
                std::hint::black_box(&mut *to);
            }
        });
        Ok(())
    };
    let fastest = sample(copies, budget)?.into_iter().fold(f64::INFINITY, f64::min).max(f64::MIN_POSITIVE);
    Ok((2 * COPIES * len * threads * size_of::<f32>()) as f64 / fastest)
}

/// One step of a network, timed inside of whole passes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepTime {
    /// The network's case, such as `fused`.
    pub network: &'static str,
    /// The step's name.
    pub step: String,
    /// What it computes, in words.
    pub kind: String,
    /// Its direction.
    pub pass: Pass,
    /// Whether the pass is a training step.
    pub training: bool,
    /// Microseconds of it in a pass over a batch, the mean of all passes.
    pub time_us: f64,
    /// Its share of all steps' time.
    pub share: f64,
    /// FLOP and least bytes of a batch.
    pub flops: u64,
    /// As above.
    pub bytes: u64,
    /// Least time that the machine allows, by its measured rates.
    pub least_us: f64,
    /// Whether that is what arithmetic takes; else what memory does.
    pub is_bound_by_arithmetic: bool,
    /// Least time ÷ time.
    pub roofline_fraction: f64,
}

/// Times the steps of a case on the host in passes over a batch that take about `budget`.
///
/// # Errors
/// Errors of the engine.
pub fn step_times(case: &NetworkCase, batch: usize, rates: &HostRates, budget: Duration) -> Result<Vec<StepTime>> {
    let mut run = NetworkRun::new(&Device::Cpu, case, batch)?;
    for _ in 0..WARM {
        run.pass()?;
    }
    run.engine_mut().time_steps();
    let (start, mut passes) = (Instant::now(), 0u32);
    while passes == 0 || start.elapsed() < budget {
        run.pass()?;
        passes += 1;
    }
    let at_once = run.images_at_once() as u64;
    let engine = run.engine_mut();
    let (plan, seconds) = (engine.plan(), engine.step_seconds());
    let all: f64 = seconds.iter().sum();
    let costs: Vec<_> = plan.steps.iter().map(|step| plan.cost(step)).collect();
    let float = size_of::<f32>() as u64;
    let weights = float * costs.iter().map(|cost| cost.weights).sum::<u64>();
    let times = plan.steps.iter().zip(costs).zip(seconds).map(|((step, cost), seconds)| {
        let (n, seconds) = (batch as u64, seconds / f64::from(passes));
        let fixed = float * (cost.weights + cost.floats);
        let passing = float * cost.activations * n;
        let arithmetic = (cost.flops * n) as f64 / rates.flops_per_s;
        let touched = float * cost.activations * at_once.min(n);
        let memory = passing as f64 / rates.bytes_per_s(touched) + fixed as f64 / rates.bytes_per_s(weights);
        let least = arithmetic.max(memory);
        StepTime {
            network: case.name,
            step: step.name.clone(),
            kind: step.step.describe(),
            pass: step.pass,
            training: case.training,
            time_us: seconds * 1e6,
            share: seconds * f64::from(passes) / all,
            flops: cost.flops * n,
            bytes: passing + fixed,
            least_us: least * 1e6,
            is_bound_by_arithmetic: arithmetic >= memory,
            roofline_fraction: least / seconds.max(f64::MIN_POSITIVE),
        }
    });
    Ok(times.collect())
}
