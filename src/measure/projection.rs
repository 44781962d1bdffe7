//! What a GPU that is not there would make of a network, from the counts of its steps alone.
//!
//! Of each step it is the longest of what its resources take: least bytes over the bandwidth, operations over the peak of the
//! tensor cores or of fused multiply-adds, and where they were counted wavefronts of shared memory over one a cycle of every
//! multiprocessor; bandwidth and peaks as far as large copies and products reach them. What multiprocessors do takes as long
//! as the one with the most blocks takes (the quantisation of the grid); and no launch takes less than what any kernel takes.
//! It knows no cache, no latency and no instructions beside the products, so it is what a network could reach there, not
//! what it does.

use std::collections::BTreeMap;

use serde::Serialize;

use super::network_run::{NetworkCase, gpu_plan};
use super::record::ProjectedRate;
use super::roofline::{DataSheet, KernelCost};
use super::step_launches::{DistinctStep, distinct_steps, resources};
use crate::Result;
use crate::device::cache::Cache;
use crate::device::compiler::CompiledKernel;
use crate::device::gpu::Launch;
use crate::device::occupancy::Occupancy;
use crate::dtype::Dtype;
use crate::engine::{Fusion, Pass};
use crate::graph::Graph;
use crate::ops::config::KernelTarget;
use crate::ops::step::ComputeUnit;

/// Share of a data sheet's bandwidth and rates that a large copy and a large matrix product reach (`docs/kernels.md`).
const REACHED: f64 = 0.85;
/// Least seconds of a kernel on a GPU, from its start to that of the next one in a graph.
const LEAST_SECONDS: f64 = 3e-6;

/// What limits a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Bytes of memory.
    Memory,
    /// Tensor cores.
    Tensor,
    /// Fused multiply-adds outside of tensor cores.
    Fma,
    /// Wavefronts of shared memory.
    Shared,
    /// What any launch takes.
    Launch,
}

impl Bound {
    /// The name in machine output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Tensor => "tensor",
            Self::Fma => "fma",
            Self::Shared => "shared",
            Self::Launch => "launch",
        }
    }
}

/// The projected time of one step over a batch, and what it is made of. Times are microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ProjectedTime {
    /// The longest of the others, and the least time of its launches.
    pub projected_us: f64,
    /// Which that is.
    pub bound: Bound,
    /// Least bytes over the bandwidth.
    pub memory_us: f64,
    /// Operations over the peak of tensor cores; zero where it does not use them.
    pub tensor_us: f64,
    /// Operations over the peak of fused multiply-adds; zero where tensor cores do them.
    pub fma_us: f64,
    /// Wavefronts of shared memory; null where they were not counted.
    pub shared_us: Option<f64>,
    /// Blocks of the busiest multiprocessor over the mean, which the last three include.
    pub imbalance: f64,
}

/// A step as it is projected.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProjectedStep {
    /// Name of the first step of its kind.
    pub name: String,
    /// What it computes, in words.
    pub kind: String,
    /// Its direction.
    pub pass: Pass,
    /// How many steps launch the same.
    pub count: usize,
    /// Least bytes.
    pub bytes: u64,
    /// Floating-point operations, a multiply-accumulate counted as two.
    pub flops: u64,
    /// Launches.
    pub launches: usize,
    /// The kernel of the largest launch.
    pub kernel: String,
    /// Its blocks.
    pub blocks: u64,
    /// Share of a multiprocessor's warps that it fills; null where its registers are not known.
    pub occupancy: Option<f64>,
    /// Its blocks over those that the GPU holds at once.
    pub waves: Option<f64>,
    /// Its time.
    #[serde(flatten)]
    pub time: ProjectedTime,
}

/// A network as it is projected: no measurement.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProjectedNetwork {
    /// How the network is run: `original`, `folded`, `fused` or `merged`.
    pub name: String,
    /// `inference` or `training`.
    pub pass: &'static str,
    /// The GPU by whose data sheet it is projected.
    pub projected_to: &'static str,
    /// Precision of activations and weights.
    pub precision: Dtype,
    /// Images of the batch.
    pub batch: usize,
    /// Images per second that the counts of the steps would allow.
    pub projected_images_per_s: f64,
    /// Microseconds of a pass.
    pub projected_us: f64,
    /// Images per second that were published of this network on this GPU, in f32 and over 128 images; null for any other.
    pub published_images_per_s: Option<f64>,
    /// The steps, those that launch the same as one. The optimizer is none of them.
    pub steps: Vec<ProjectedStep>,
}

impl ProjectedNetwork {
    /// Its rate alone.
    pub fn rate(&self) -> ProjectedRate {
        let Self { projected_to, precision, projected_images_per_s, published_images_per_s, .. } = *self;
        ProjectedRate { projected_to, precision, projected_images_per_s, published_images_per_s }
    }
}

/// A GPU that is projected to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Projection {
    /// The device.
    pub sheet: &'static DataSheet,
}

impl Projection {
    /// The device whose name begins so, in any case: `v100` is the first of its forms.
    pub fn named(name: &str) -> Option<Self> {
        DataSheet::starting(name).map(|sheet| Self { sheet })
    }

    /// The time of a step with its launches, of which `wavefronts` of shared memory were counted.
    pub fn time(
        &self,
        (cost, launches): (&KernelCost, &[Launch]),
        batch: usize,
        precision: Dtype,
        wavefronts: Option<u64>,
    ) -> ProjectedTime {
        let limits = self.sheet.roofline(precision);
        let us = |seconds: f64| seconds / REACHED * 1e6;
        let memory_us = us(cost.bytes(batch, limits.element_bytes) as f64 / limits.bandwidth);
        let imbalance = largest(launches).map_or(1.0, |launch| self.imbalance(blocks(launch)));
        let products = us(cost.flops as f64 * batch as f64 / limits.flops(cost.unit)) * imbalance;
        let on_tensor_cores = cost.unit == ComputeUnit::Matrix && precision != Dtype::F32;
        let (tensor_us, fma_us) = if on_tensor_cores { (products, 0.0) } else { (0.0, products) };
        let shared_us = wavefronts.map(|n| us(n as f64 / self.sheet.cycles_per_s()) * imbalance);
        let least = LEAST_SECONDS * 1e6;
        let all = [
            (memory_us, Bound::Memory),
            (tensor_us, Bound::Tensor),
            (fma_us, Bound::Fma),
            (shared_us.unwrap_or(0.0), Bound::Shared),
            (least, Bound::Launch),
        ];
        let (longest, bound) = all.into_iter().fold((0.0, Bound::Launch), |a, b| if b.0 > a.0 { b } else { a });
        // Beside the largest launch those that finish its sums take what any kernel takes.
        let projected_us = longest + least * launches.len().saturating_sub(1) as f64;
        ProjectedTime { projected_us, bound, memory_us, tensor_us, fma_us, shared_us, imbalance }
    }

    /// Blocks of the busiest multiprocessor over the mean.
    fn imbalance(&self, blocks: u64) -> f64 {
        let all = u64::from(self.sheet.multiprocessors);
        (blocks.div_ceil(all) * all) as f64 / blocks.max(1) as f64
    }

    /// A case over a batch. Occupancy is known where `cache` has its kernels or there is a compiler.
    ///
    /// # Errors
    /// As [`Graph::shapes`], or a precision that the device lacks.
    pub fn network(
        &self,
        case: &NetworkCase,
        batch: usize,
        precision: Dtype,
        cache: &Cache,
    ) -> Result<ProjectedNetwork> {
        let (graph, plan) = case.planned(KernelTarget { dtype: precision, arch: self.sheet.arch })?;
        let steps = distinct_steps(&graph, plan, batch, precision, self.sheet.arch)?;
        let launches: Vec<&Launch> = steps.iter().filter_map(|step| largest(&step.launches)).collect();
        let kernels = resources(&launches, self.sheet.arch, cache).unwrap_or_else(|error| {
            tracing::debug!("occupancy is not known: {error}");
            BTreeMap::new()
        });
        let steps: Vec<ProjectedStep> = steps.iter().map(|step| self.step(step, batch, precision, &kernels)).collect();
        let projected_us = steps.iter().map(|step| step.count as f64 * step.time.projected_us).sum();
        Ok(ProjectedNetwork {
            name: case.name.to_owned(),
            pass: if case.training { "training" } else { "inference" },
            projected_to: self.sheet.name,
            precision,
            batch,
            projected_images_per_s: batch as f64 / projected_us * 1e6,
            projected_us,
            published_images_per_s: None,
            steps,
        })
    }

    /// Images per second of inference at a level of fusion; batch-norm is folded but at one step a node.
    ///
    /// # Errors
    /// As [`network`](Self::network).
    pub fn images_per_s(&self, graph: &Graph, fusion: Fusion, batch: usize, precision: Dtype) -> Result<f64> {
        let (graph, plan) = gpu_plan(graph, fusion, false, KernelTarget { dtype: precision, arch: self.sheet.arch })?;
        let steps = distinct_steps(&graph, plan, batch, precision, self.sheet.arch)?;
        let us = |step: &DistinctStep| {
            step.count as f64 * self.time((&step.cost, &step.launches), batch, precision, None).projected_us
        };
        Ok(batch as f64 / steps.iter().map(us).sum::<f64>() * 1e6)
    }

    fn step(
        &self,
        step: &DistinctStep,
        batch: usize,
        precision: Dtype,
        kernels: &BTreeMap<String, CompiledKernel>,
    ) -> ProjectedStep {
        let DistinctStep { cost, count, launches, .. } = step;
        let launch = largest(launches);
        let kernel = launch.and_then(|launch| kernels.get(&launch.instance));
        let occupancy = launch
            .zip(kernel)
            .and_then(|(launch, kernel)| Occupancy::of(kernel, launch.shape.block.iter().product(), self.sheet.arch));
        let blocks = launch.map_or(0, blocks);
        ProjectedStep {
            name: cost.name.clone(),
            kind: cost.kind.clone(),
            pass: cost.pass,
            count: *count,
            bytes: cost.bytes(batch, precision.bytes() as u64),
            flops: cost.flops * batch as u64,
            launches: launches.len(),
            kernel: launch.map_or_else(String::new, |launch| launch.instance.clone()),
            blocks,
            occupancy: occupancy.map(|o| o.occupancy),
            waves: occupancy.and_then(|o| o.waves(blocks, self.sheet.multiprocessors)),
            time: self.time((cost, launches), batch, precision, None),
        }
    }
}

/// The launch with the most threads.
fn largest(launches: &[Launch]) -> Option<&Launch> {
    let threads = |launch: &&Launch| blocks(launch) * launch.shape.block.iter().map(|&n| u64::from(n)).product::<u64>();
    launches.iter().max_by_key(threads)
}

fn blocks(launch: &Launch) -> u64 {
    launch.shape.grid.iter().map(|&n| u64::from(n)).product()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::driver::LaunchShape;

    /// A step of one image that moves and computes so much, as launches of so many blocks.
    fn time(activations: u64, flops: u64, blocks: &[u32], precision: Dtype, wavefronts: Option<u64>) -> ProjectedTime {
        let (name, kind, nodes) = Default::default();
        let (unit, pass) = (ComputeUnit::Matrix, Pass::Forward);
        let cost = KernelCost { name, kind, pass, nodes, block: None, unit, flops, activations, weights: 0, floats: 0 };
        let shape = |&n: &u32| LaunchShape { grid: [n, 1, 1], block: [256, 1, 1], shared: 0 };
        let launches: Vec<Launch> =
            blocks.iter().map(|n| Launch { instance: String::new(), shape: shape(n) }).collect();
        let v100 = Projection::named("v100").unwrap();
        v100.time((&cost, &launches), 1, precision, wavefronts)
    }

    #[test]
    fn a_step_takes_what_its_longest_resource_takes() {
        // 900 GB/s, 125 and 15.7 TFLOP/s, 80 multiprocessors with a wavefront each at 1.533 GHz; 85 % of all.
        let of = |time: ProjectedTime| (time.bound, (time.projected_us * 10.0).round() / 10.0);
        let (f16, f32) = (Dtype::F16, Dtype::F32);
        assert_eq!(of(time(450_000_000, 0, &[80], f16, None)), (Bound::Memory, 1176.5));
        assert_eq!(of(time(1, 125_000_000_000, &[80], f16, None)), (Bound::Tensor, 1176.5));
        assert_eq!(of(time(1, 15_700_000_000, &[80], f32, None)), (Bound::Fma, 1176.5));
        assert_eq!(of(time(1, 0, &[80], f16, Some(122_656_250))), (Bound::Shared, 1176.5));
        // One block more than multiprocessors takes one of them twice as long.
        assert_eq!(of(time(1, 81 * 15_700_000_000 / 80, &[81], f32, None)), (Bound::Fma, 2352.9));
        // Each launch takes three microseconds, and the largest stands for the step.
        assert_eq!(of(time(1, 1, &[80], f16, None)), (Bound::Launch, 3.0));
        assert_eq!(of(time(450_000_000, 0, &[1, 80, 1], f16, None)), (Bound::Memory, 1182.5));
    }
}
