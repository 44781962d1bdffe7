//! Latency of whole networks and of single blocks, through the inference engine: on a GPU the time of the device's own
//! work, images and logits lying there, on the host that of a call.

use std::time::Duration;

use super::launches::sample_in_turns;
use super::network_run::NetworkRun;
use super::timer::{Summary, median};
use crate::device::Device;
use crate::graph::{Activation, BlockState, Graph, Input, Linear, Node, NodeId, Op};
use crate::model::{Model, Weights};
use crate::shape::Shape;
use crate::tensor::Tensor;
use crate::{Error, Result};

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

/// One block's time alone, original and merged.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockLatency {
    /// The block's name.
    pub name: String,
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

/// Time of every block alone, in network `before` (with its activations) and in network `after`, where some of the
/// same blocks are merged; `budget` is for all blocks together.
///
/// A block is cut out as a network of its own: its input, its nodes, and because a network ends in logits a global pool
/// and a linear layer to one class. Those two are measured on the block's output shape as a third network in the same
/// alternation, and the median of the paired differences is the block's time (never below 0).
///
/// # Errors
/// Networks whose blocks do not correspond, a batch of 0, or what the engine says.
pub fn block_latencies(
    device: &Device,
    before: &Model,
    after: &Model,
    batch: usize,
    budget: Duration,
) -> Result<Vec<BlockLatency>> {
    let count = before.graph.blocks.len();
    if after.graph.blocks.len() != count {
        let got = after.graph.blocks.len();
        return Err(Error::Graph(format!("block latencies compare equal blocks: expected {count} blocks, got {got}")));
    }
    let share = budget / count.max(1) as u32;
    let mut latencies = Vec::with_capacity(count);
    for index in 0..count {
        let original = block_model(before, index)?;
        let tail = tail_model(original.graph.nodes[original.graph.output() - 1].inputs[0], &original.graph)?;
        let unchanged = after.graph.blocks[index].state == before.graph.blocks[index].state
            || after.graph.blocks[index].state == BlockState::Active;
        let changed = if unchanged { None } else { Some(block_model(after, index)?) };
        let models: Vec<&Model> = [&tail, &original].into_iter().chain(&changed).collect();
        let samples = alternate_models(device, &models, batch, share)?;
        let alone = |with: &[f64]| {
            let differences: Vec<f64> = with.iter().zip(&samples[0]).map(|(block, tail)| block - tail).collect();
            median(&differences).max(0.0) * 1e6
        };
        let before_us = alone(&samples[1]);
        let after_us = samples.get(2).map_or(before_us, |s| alone(s));
        latencies.push(BlockLatency { name: before.graph.blocks[index].name.clone(), before_us, after_us });
    }
    Ok(latencies)
}

/// Block `index` of a model as a network of its own; masks are dropped, so an activation has its own slope.
fn block_model(model: &Model, index: usize) -> Result<Model> {
    let graph = &model.graph;
    let block = &graph.blocks[index];
    let shapes = graph.shapes()?;
    // Node 0 stands for the value the block reads, its nodes follow.
    let renumbered = |id: NodeId| if id == block.input { 0 } else { id - block.nodes.start + 1 };
    let mut nodes = vec![input_node(shapes[block.input])];
    for id in block.nodes.clone() {
        let node = &graph.nodes[id];
        let op = match node.op {
            Op::Activation(activation) => Op::Activation(Activation { mask: None, ..activation }),
            op => op,
        };
        let inputs = node.inputs.iter().map(|&i| renumbered(i)).collect();
        nodes.push(Node { name: node.name.clone(), inputs, op });
    }
    with_tail(&block.name, nodes, shapes[block.output()].c, &model.weights)
}

/// The network that only pools and classifies the value `output` of `graph`.
fn tail_model(output: NodeId, graph: &Graph) -> Result<Model> {
    let shape = graph.shapes()?[output];
    with_tail("tail", vec![input_node(shape)], shape.c, &Weights::new())
}

fn input_node(shape: Shape) -> Node {
    Node { name: "input".into(), inputs: Vec::new(), op: Op::Input(Input { shape }) }
}

/// Ends `nodes` with a pool and a one-class linear layer and gathers the weights the nodes need.
fn with_tail(name: &str, mut nodes: Vec<Node>, channels: usize, weights: &Weights) -> Result<Model> {
    let last = nodes.len() - 1;
    nodes.push(Node { name: "tail_pool".into(), inputs: vec![last], op: Op::GlobalAvgPool });
    let linear = Op::Linear(Linear { c_in: channels, c_out: 1 });
    nodes.push(Node { name: "tail_linear".into(), inputs: vec![last + 1], op: linear });
    let graph = Graph { name: name.to_owned(), nodes, blocks: Vec::new() };
    let mut own = Weights::new();
    for param in graph.params()? {
        let tensor = weights.get(&param.name).cloned().unwrap_or_else(|| Tensor::full(&param.shape, 1.0));
        own.insert(param.name, tensor);
    }
    Model::new(graph, own)
}
