//! Latency of whole networks and of single blocks, through the inference engine: on a GPU the time of the device's own
//! work, images and logits lying there, on the host that of a call.

use std::ops::Range;
use std::time::Duration;

use super::launches::sample_in_turns;
use super::network_run::NetworkRun;
use super::timer::{Summary, median};
use crate::Result;
use crate::device::Device;
use crate::graph::{Counterpart, NodeId};
use crate::model::Model;

/// Measured time of one forward pass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Latency {
    /// Images per pass.
    pub batch: usize,
    /// Median over the passes, milliseconds.
    pub median_ms: f64,
    /// Interquartile range over the passes, milliseconds.
    pub iqr_ms: f64,
    /// Throughput at the median.
    pub images_per_s: f64,
}

/// Several networks measured in one alternating run.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// One name and latency per network, in the order given.
    pub networks: Vec<(String, Latency)>,
    /// Speed relative to the first network: the median over rounds of time(first) / time(this). The first is 1.
    pub speed_up: Vec<f64>,
}

/// The time of one block, or of several that were merged into one, alone, original and merged.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockLatency {
    /// The block's name, or that of the segment.
    pub name: String,
    /// Indices of the blocks.
    pub blocks: Range<usize>,
    /// Microseconds of the fused, BN-folded block of the first network for one batch.
    pub before_us: f64,
    /// Microseconds of the second network's block; the same measurement where the block was not changed.
    pub after_us: f64,
}

impl Latency {
    fn of(seconds: &[f64], batch: usize) -> Self {
        let (median, iqr) = Summary::of(seconds).map_or((0.0, 0.0), |s| (s.median, s.iqr));
        let images_per_s = batch as f64 / median.max(f64::MIN_POSITIVE);
        Self { batch, median_ms: median * 1e3, iqr_ms: iqr * 1e3, images_per_s }
    }
}

/// Seconds per round of each model in strict alternation.
fn alternate_models(device: &Device, models: &[&Model], batch: usize, budget: Duration) -> Result<Vec<Vec<f64>>> {
    let mut runs =
        models.iter().map(|model| NetworkRun::inference(device, model, batch)).collect::<Result<Vec<_>>>()?;
    let mut launches = runs.iter_mut().map(NetworkRun::launches).collect::<Result<Vec<_>>>()?;
    sample_in_turns(&mut launches, budget).into_iter().collect()
}

/// Latency of one network, batch-norm folded and fused, in about `budget`.
///
/// # Errors
/// A batch of 0, or what the engine says.
pub fn network_latency(device: &Device, model: &Model, batch: usize, budget: Duration) -> Result<Latency> {
    let samples = alternate_models(device, &[model], batch, budget)?;
    Ok(Latency::of(&samples[0], batch))
}

/// Latency of several networks in strict alternation (A B C A B C …) within one `budget`, so that drift of the machine
/// meets all of them alike; the ratios are medians over neighbouring passes.
///
/// # Errors
/// A batch of 0, or what the engine says.
pub fn compare(device: &Device, models: &[(&str, &Model)], batch: usize, budget: Duration) -> Result<Comparison> {
    let bare: Vec<&Model> = models.iter().map(|(_, model)| *model).collect();
    let samples = alternate_models(device, &bare, batch, budget)?;
    let networks =
        models.iter().zip(&samples).map(|((name, _), s)| ((*name).to_owned(), Latency::of(s, batch))).collect();
    let speed_up = samples
        .iter()
        .map(|own| {
            let ratios: Vec<f64> = samples[0].iter().zip(own).map(|(first, this)| first / this).collect();
            median(&ratios)
        })
        .collect();
    Ok(Comparison { networks, speed_up })
}

/// A network before and after a transformation.
#[derive(Debug, Clone, Copy)]
pub struct Change<'a> {
    /// The network as it was.
    pub before: &'a Model,
    /// The transformed network.
    pub after: &'a Model,
    /// Per node of `before` the node of `after` with the same value, as
    /// [`Graph::counterparts`](crate::graph::Graph::counterparts) takes it.
    pub map: &'a [Option<NodeId>],
}

/// Times every block of the network before a change, with its activations, and what became of it. Each is cut out as a
/// network of its own, from the value that it reads to its output. Blocks merged into one segment share an entry, and all
/// blocks together take about `budget`.
///
/// # Errors
/// A map of other networks, a batch of 0, or what the engine says.
pub fn block_latencies(
    device: &Device,
    change: Change<'_>,
    batch: usize,
    budget: Duration,
) -> Result<Vec<BlockLatency>> {
    let Change { before, after, map } = change;
    let parts = before.graph.counterparts(&after.graph, map)?;
    let share = budget / parts.len().max(1) as u32;
    let time = |part: Counterpart| {
        let (original, changed) = (before.cut(&part.before)?, after.cut(&part.after)?);
        let is_changed = original.graph.nodes != changed.graph.nodes;
        let models: Vec<&Model> = [&original].into_iter().chain(is_changed.then_some(&changed)).collect();
        let samples = alternate_models(device, &models, batch, share)?;
        let before_us = median(&samples[0]) * 1e6;
        let after_us = samples.get(1).map_or(before_us, |seconds| median(seconds) * 1e6);
        let name = before.graph.segment_name(&part.before);
        Ok(BlockLatency { name, blocks: part.blocks, before_us, after_us })
    };
    parts.into_iter().map(time).collect()
}
