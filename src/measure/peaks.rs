//! What this machine can do, measured in the same run as what is judged by it.

use std::time::Duration;

use rayon::prelude::*;

use super::machine::Machine;
use super::timer::sample;
use crate::Result;
use crate::device::{View, ViewMut};
use crate::ops::linear::{self, LinearProblem};

/// Bytes of each of the two copied arrays where the cache size is unknown or smaller; far beyond most last-level caches.
const MIN_COPY_BYTES: usize = 64 << 20;
/// Most bytes of each array: enough for any cache without filling a small machine's memory.
const MAX_COPY_BYTES: usize = 256 << 20;
/// Sides of the measured matrix product: its three operands (3 MiB) are blocked by the GEMM, as in real layers.
const GEMM_SIDE: usize = 512;

/// Peaks of the machine through the current thread pool.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Peaks {
    /// Bytes per second of a large copy by all threads, read and written bytes both counted.
    pub copy_bytes_per_s: f64,
    /// FLOP per second of `f32` matrix products by all threads, each thread its own product.
    pub gemm_flops_per_s: f64,
}

/// Measures the peaks in about `budget` (half for each). The best sample counts: a peak is what the machine can do, not
/// what it does while disturbed.
///
/// # Errors
/// None today; a device may fail.
pub fn measure_peaks(budget: Duration) -> Result<Peaks> {
    Ok(Peaks { copy_bytes_per_s: copy_rate(budget / 2)?, gemm_flops_per_s: gemm_rate(budget / 2)? })
}

fn copy_rate(budget: Duration) -> Result<f64> {
    let bytes = (2 * Machine::here().largest_cache_bytes()).clamp(MIN_COPY_BYTES, MAX_COPY_BYTES);
    let len = bytes / size_of::<f32>();
    let (from, mut to) = (vec![1.0f32; len], vec![0.0f32; len]);
    let chunk = len.div_ceil(rayon::current_num_threads());
    let copy = || {
        to.par_chunks_mut(chunk).zip(from.par_chunks(chunk)).for_each(|(to, from)| to.copy_from_slice(from));
        std::hint::black_box(&mut to);
        Ok(())
    };
    Ok(2.0 * bytes as f64 / fastest(&sample(copy, budget)?))
}

/// A linear layer's weight gradient dw = dyᵀ·x is one single-threaded GEMM; every thread computes one at a time, as the
/// convolutions do.
fn gemm_rate(budget: Duration) -> Result<f64> {
    const N: usize = GEMM_SIDE;
    const PRODUCTS_PER_THREAD: usize = 4;
    let problem = LinearProblem { n: N, c_in: N, c_out: N };
    let (x, dy) = (vec![0.5f32; N * N], vec![0.25f32; N * N]);
    let threads = rayon::current_num_threads();
    let mut gradients: Vec<(Vec<f32>, Vec<f32>)> = (0..threads).map(|_| (vec![0.0; N * N], vec![0.0; N])).collect();
    let products = || {
        gradients.par_iter_mut().for_each(|(dw, db)| {
            for _ in 0..PRODUCTS_PER_THREAD {
                let read = (View::Host(&x), View::Host(&x), View::Host(&dy));
                linear::backward(problem, read, None, (ViewMut::Host(dw), ViewMut::Host(db)));
            }
        });
        std::hint::black_box(&mut gradients);
        Ok(())
    };
    let flops = 2.0 * (N * N * N) as f64 * (PRODUCTS_PER_THREAD * threads) as f64;
    Ok(flops / fastest(&sample(products, budget)?))
}

fn fastest(seconds: &[f64]) -> f64 {
    seconds.iter().copied().fold(f64::INFINITY, f64::min).max(f64::MIN_POSITIVE)
}
