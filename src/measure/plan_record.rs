//! What a plan costs, as a typed record: the keys of `plan --json`.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use super::roofline::{DATA_SHEETS, DataSheet, KernelCost};
use crate::dtype::Dtype;
use crate::engine::Pass;
use crate::graph::Graph;

/// A plan over a batch and what it costs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlanRecord {
    /// Name of the network.
    pub network: String,
    /// Images of the batch.
    pub batch: usize,
    /// Whether a training step is planned instead of inference.
    pub training: bool,
    /// Bytes of an element in the `bytes` of the steps; the known devices count with their own.
    pub element_bytes: u64,
    /// The steps in order; those of a backward pass follow in reverse order.
    pub steps: Vec<StepRecord>,
    /// Launches of kernels on a GPU, all together.
    pub launches: u64,
    /// Launches of each kernel, by its name.
    pub kernels: BTreeMap<String, u64>,
    /// Least bytes of the batch.
    pub bytes: u64,
    /// Floating-point operations of the batch, a multiply-accumulate counted as two.
    pub flops: u64,
    /// Roofline times by the data sheets of known devices, each in f16 and f32; an object by name in JSON.
    #[serde(rename = "roofline_ms", serialize_with = "by_name")]
    pub roofline: Vec<DeviceTime>,
}

/// One step of a plan over the batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StepRecord {
    /// The step's name: that of its last node.
    pub name: String,
    /// What it computes, in words.
    pub kind: String,
    /// Its direction.
    pub pass: Pass,
    /// How many nodes it covers.
    pub nodes: usize,
    /// The block it lies in; null where it lies in none.
    pub block: Option<String>,
    /// Least bytes.
    pub bytes: u64,
    /// Floating-point operations.
    pub flops: u64,
}

/// Least time of a plan on a device.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceTime {
    /// The device and the precision, such as `H100 SXM f16`.
    pub device: String,
    /// Milliseconds.
    pub ms: f64,
}

impl PlanRecord {
    /// Of the steps of a plan of `graph` and their `costs`; `kernels` says how often a GPU launches each kernel.
    pub fn new(graph: &Graph, costs: &[KernelCost], kernels: BTreeMap<String, u64>, size: PlanSize) -> Self {
        let PlanSize { batch, training, element_bytes } = size;
        let step = |cost: &KernelCost| StepRecord {
            name: cost.name.clone(),
            kind: cost.kind.clone(),
            pass: cost.pass,
            nodes: cost.nodes.len(),
            block: cost.block.map(|block| graph.blocks[block].name.clone()),
            bytes: cost.bytes(batch, element_bytes),
            flops: cost.flops * batch as u64,
        };
        let steps: Vec<StepRecord> = costs.iter().map(step).collect();
        Self {
            network: graph.name.clone(),
            batch,
            training,
            element_bytes,
            launches: kernels.values().sum(),
            kernels,
            bytes: steps.iter().map(|step| step.bytes).sum(),
            flops: steps.iter().map(|step| step.flops).sum(),
            steps,
            roofline: roofline(costs, batch),
        }
    }
}

/// What a plan is counted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanSize {
    /// Images of a batch.
    pub batch: usize,
    /// Whether a training step is planned instead of inference.
    pub training: bool,
    /// Bytes of an element.
    pub element_bytes: u64,
}

fn roofline(costs: &[KernelCost], batch: usize) -> Vec<DeviceTime> {
    let sheets = DATA_SHEETS.iter().flat_map(|sheet| [Dtype::F16, Dtype::F32].map(|precision| (sheet, precision)));
    let time = |(sheet, precision): (&DataSheet, Dtype)| {
        let limits = sheet.roofline(precision);
        let seconds: f64 = costs.iter().map(|cost| limits.time(cost, batch)).sum();
        DeviceTime { device: format!("{} {precision}", sheet.name), ms: seconds * 1e3 }
    };
    sheets.map(time).collect()
}

fn by_name<S: Serializer>(times: &[DeviceTime], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(times.iter().map(|time| (&time.device, time.ms)))
}
