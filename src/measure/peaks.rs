//! What a device can do, measured in the same run as what is judged by it.

use std::time::Duration;

use serde::Serialize;

use super::launches::Launches;
use super::machine::Machine;
use super::noise::normal;
use super::timer::sample;
use crate::Result;
use crate::device::gpu::Gpu;
use crate::device::{Buffer, Device, View, ViewMut};
use crate::dtype::Dtype;
use crate::ops::copy;
use crate::ops::linear::{self, LinearProblem};
use crate::ops::team;

/// Bytes of each of the two copied arrays where the cache size is unknown or smaller; far beyond most last-level caches.
const MIN_COPY_BYTES: usize = 64 << 20;
/// Most bytes of each array: enough for any cache without filling a small machine's memory.
const MAX_COPY_BYTES: usize = 256 << 20;
/// Sides of the product measured on the host, of as many rows for each thread: its operands fit into no core's first cache, as those
/// of real layers.
const GEMM_SIDE: usize = 512;
/// Rows and sides of the product measured on a GPU: many waves of tiles, and long sums.
const GPU_GEMM: LinearProblem = LinearProblem { n: 4096, c_in: 4096, c_out: 4096 };
/// The same where the host imitates a GPU.
const EMULATED_GEMM: LinearProblem = LinearProblem { n: 64, c_in: 64, c_out: 64 };
/// Bytes of each array copied there.
const EMULATED_COPY_BYTES: usize = 1 << 16;

/// Peaks of a device in one precision, through this program's own copy and matrix product: lower bounds of what the
/// device could do.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Peaks {
    /// Bytes per second of a large copy, read and written bytes both counted.
    pub copy_bytes_per_s: f64,
    /// FLOP per second of large matrix products in the precision, on the units that multiply matrices.
    pub gemm_flops_per_s: f64,
    /// FLOP per second of `f32` matrix products on the units that also compute depthwise convolutions.
    pub vector_flops_per_s: f64,
}

/// Measures the peaks of a device in about `budget`: on the host of all threads together.
/// The best sample counts: a peak is what the machine can do, not what it does while disturbed.
///
/// # Errors
/// When the device is out of memory or fails.
pub fn measure_peaks(device: &Device, budget: Duration) -> Result<Peaks> {
    let Device::Gpu(gpu, precision) = device else {
        let copy_bytes_per_s = copy_rate(budget / 2)?;
        let gemm_flops_per_s = gemm_rate(budget / 2)?;
        return Ok(Peaks { copy_bytes_per_s, gemm_flops_per_s, vector_flops_per_s: gemm_flops_per_s });
    };
    // Before anything is taken, so that the copy does not find a GPU at rest.
    gpu_product(device, gpu, *precision)?.warm()?;
    let copy_bytes_per_s = gpu_copy_rate(device, gpu, budget / 3)?;
    let gemm_flops_per_s = gpu_gemm_rate(device, gpu, *precision, budget / 3)?;
    let vector_flops_per_s = match precision {
        Dtype::F32 => gemm_flops_per_s,
        _ => gpu_gemm_rate(device, gpu, Dtype::F32, budget / 3)?,
    };
    Ok(Peaks { copy_bytes_per_s, gemm_flops_per_s, vector_flops_per_s })
}

fn copy_rate(budget: Duration) -> Result<f64> {
    let bytes = (2 * Machine::here().largest_cache_bytes()).clamp(MIN_COPY_BYTES, MAX_COPY_BYTES);
    let len = bytes / size_of::<f32>();
    let (from, mut to) = (vec![1.0f32; len], vec![0.0f32; len]);
    let chunk = len.div_ceil(rayon::current_num_threads());
    let copy = || {
        team::each_chunk(&mut to, chunk, |index, to| to.copy_from_slice(&from[index * chunk..][..to.len()]));
        std::hint::black_box(&mut to);
        Ok(())
    };
    Ok(2.0 * bytes as f64 / fastest(&sample(copy, budget)?))
}

/// A linear layer's product of many rows with weights that are packed, shared out among the threads.
fn gemm_rate(budget: Duration) -> Result<f64> {
    const N: usize = GEMM_SIDE;
    let rows = N * rayon::current_num_threads();
    let problem = LinearProblem { n: rows, c_in: N, c_out: N };
    let layout = problem.panels();
    let (x, w, b) = (vec![0.5f32; rows * N], vec![0.25f32; N * N], vec![0.0; N]);
    let (mut panels, mut y) = (vec![0.0; layout.panel_elements()], vec![0.0; rows * N]);
    layout.pack(&w, &mut panels);
    let product = || {
        linear::forward(problem, View::Host(&x), View::Packed(&w, &panels), View::Host(&b), ViewMut::Host(&mut y));
        std::hint::black_box(&mut y);
        Ok(())
    };
    Ok(2.0 * (rows * N * N) as f64 / fastest(&sample(product, budget)?))
}

fn gpu_copy_rate(device: &Device, gpu: &Gpu, budget: Duration) -> Result<f64> {
    let bytes = match gpu.driver().is_emulated() {
        true => EMULATED_COPY_BYTES,
        false => (4 * gpu.driver().l2_bytes()).max(MAX_COPY_BYTES),
    };
    let len = bytes / size_of::<f32>();
    let (from, mut to) = (device.upload(&normal(0, len))?, device.zeros(len)?);
    let copy = move |_| {
        copy::copy(from.view(0..len), to.view_mut(0..len));
        Ok(())
    };
    Ok(2.0 * bytes as f64 / fastest(&Launches::new(device, 1, copy)?.sample(budget)?))
}

fn gpu_gemm_rate(device: &Device, gpu: &Gpu, precision: Dtype, budget: Duration) -> Result<f64> {
    let p = gpu_problem(gpu);
    let flops = 2.0 * (p.n * p.c_in * p.c_out) as f64;
    Ok(flops / fastest(&gpu_product(device, gpu, precision)?.sample(budget)?))
}

fn gpu_problem(gpu: &Gpu) -> LinearProblem {
    if gpu.driver().is_emulated() { EMULATED_GEMM } else { GPU_GEMM }
}

/// A large product, ready to be timed.
fn gpu_product(device: &Device, gpu: &Gpu, precision: Dtype) -> Result<Launches<'static>> {
    let p = gpu_problem(gpu);
    let put = |seed, len: usize| -> Result<Buffer> {
        if precision == Dtype::F32 {
            return device.upload(&normal(seed, len));
        }
        let mut buffer = device.activations(len)?;
        buffer.write(&normal(seed, len))?;
        Ok(buffer)
    };
    let (x, w, b) = (put(1, p.n * p.c_in)?, put(2, p.c_in * p.c_out)?, device.zeros(p.c_out)?);
    let mut y = put(3, p.n * p.c_out)?;
    Launches::new(device, 1, move |_| {
        let (x, w, b) = (x.view(0..x.len()), w.view(0..w.len()), b.view(0..b.len()));
        let len = y.len();
        linear::forward(p, x, w, b, y.view_mut(0..len));
        Ok(())
    })
}

fn fastest(seconds: &[f64]) -> f64 {
    seconds.iter().copied().fold(f64::INFINITY, f64::min).max(f64::MIN_POSITIVE)
}
