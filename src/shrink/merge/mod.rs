//! Stage 3: every linear block becomes one convolution, exactly (`methods.md` 1.4).
//!
//! Each value of a block is an affine map of the block's input. Its linear part is a [`Kernel`], its constant part a
//! [`Response`] to zeros; both are composed in f64 along the nodes and cast to f32 once at the end.

mod border;
mod chain;
mod compose;
mod fold;
mod product;
mod verify;

pub use border::Response;
pub use chain::{Chain, check};
pub use compose::{Kernel, Layer, Taps};
pub use fold::{Folded, fold_block};
pub use verify::{BlockError, MergeError, TOLERANCE, Verifier, verify, verify_random};

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::graph::{Bias, BlockState, Cost, Graph, Node, NodeId, Op};
use crate::model::Model;
use crate::shrink::padding::PaddingMode;
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Numbers of all merged weights of a network together at most, 1 GiB in f32.
const MAX_WEIGHTS: usize = 1 << 28;
/// Numbers of all its bias maps together at most, 128 MiB in f32. Small weights can claim any image; MobileNetV2 has
/// 10 million at 1 024 pixels.
const MAX_MAPS: usize = 1 << 25;

/// How to merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeOptions {
    /// How borders are made exact. [`PaddingMode::Reorder`] accepts only blocks whose padding is at the front
    /// already, so that a merged network never carries a bias map; [`PaddingMode::BorderBias`] accepts those too.
    pub padding: PaddingMode,
}

/// What one block became.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MergedSegment {
    /// Index of the block.
    pub block: usize,
    /// Name of the block.
    pub name: String,
    /// Kernel height and width of the merged convolution.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride of the merged convolution.
    pub stride: [usize; 2],
    /// Multiply-accumulates per image before.
    pub macs_before: u64,
    /// Multiply-accumulates per image after.
    pub macs_after: u64,
    /// Trained parameters before.
    pub params_before: u64,
    /// Trained parameters after, a bias map counted in full.
    pub params_after: u64,
    /// Whether the bias differs at the border.
    pub bias_map: bool,
}

/// Replaces every block in state [`BlockState::Linear`] by one convolution `<block>.conv`, followed by the block's
/// final activation where it has one. All other blocks stay as they are; without a linear block the model comes back
/// unchanged and the list is empty.
///
/// # Errors
/// [`Error::Merge`] naming the block and the node where a merge would not be exact, or where weights are not finite.
pub fn merge(model: &Model, options: &MergeOptions) -> Result<(Model, Vec<MergedSegment>)> {
    let graph = &model.graph;
    let linear: Vec<usize> = (0..graph.blocks.len()).filter(|&b| graph.blocks[b].state == BlockState::Linear).collect();
    check_size(graph, &linear, options.padding)?;
    let mut folded: Vec<Option<Folded>> = vec![None; graph.blocks.len()];
    let mut weights = model.weights.clone();
    let params = graph.params()?;
    for &index in &linear {
        let block = &graph.blocks[index];
        let result = fold_block(model, index, options.padding)?;
        for param in params.iter().filter(|p| block.nodes.contains(&p.node)) {
            weights.remove(&param.name);
        }
        let name = conv_name(graph, index);
        let (suffix, bias_shape) = result.conv.bias_param(result.output).expect("a folded block has a bias");
        let (weight, bias) = (format!("{name}.weight"), format!("{name}.{suffix}"));
        let weight_values = tensor(&weight, result.conv.weight_shape(), &result.weight)?;
        let bias_values = tensor(&bias, bias_shape, &result.bias)?;
        weights.extend([(weight, weight_values), (bias, bias_values)]);
        // What is left of it from here on is its structure.
        folded[index] = Some(Folded { weight: Vec::new(), bias: Vec::new(), ..result });
    }
    let merged = Model::new(replace_blocks(graph, &folded)?, weights)?;
    let (before, after) = (graph.cost()?, merged.graph.cost()?);
    let segments =
        linear.iter().filter_map(|&b| Some(segment(b, folded[b].as_ref()?, graph, &merged.graph, &before, &after)));
    let segments = segments.collect();
    Ok((merged, segments))
}

/// Refuses blocks that cannot be merged, and merged networks beyond all reason, before anything is folded.
fn check_size(graph: &Graph, linear: &[usize], padding: PaddingMode) -> Result<()> {
    let shapes = graph.shapes()?;
    let (mut weights, mut maps) = (0, 0);
    for &block in linear {
        let (of_weights, of_map) = check(graph, &shapes, block, padding)?.params(graph, &shapes, block, padding);
        (weights, maps) = (weights + of_weights, maps + of_map);
    }
    if weights > MAX_WEIGHTS {
        return Err(Error::Merge(format!("the merged blocks would have {weights} weights, more than {MAX_WEIGHTS}")));
    }
    if maps > MAX_MAPS {
        let image = shapes[0];
        return Err(Error::Merge(format!(
            "for images of {image} the bias maps of the merged blocks would have {maps} numbers, more than {MAX_MAPS}; \
             finetune and merge with --padding reorder, or take smaller images"
        )));
    }
    Ok(())
}

fn conv_name(graph: &Graph, block: usize) -> String {
    format!("{}.conv", graph.blocks[block].name)
}

/// One tensor of a merged convolution in f32.
fn tensor(name: &str, shape: Vec<usize>, values: &[f64]) -> Result<Tensor> {
    let data: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    if data.iter().all(|v| v.is_finite()) {
        return Tensor::new(shape, data);
    }
    Err(Error::Merge(format!("{name} would not be finite in f32; the unmerged block's weights are unusable")))
}

/// The graph with one convolution in the place of each folded block.
fn replace_blocks(graph: &Graph, folded: &[Option<Folded>]) -> Result<Graph> {
    let block_of = |id: NodeId| graph.blocks.iter().position(|b| b.nodes.contains(&id));
    graph.rewrite(
        |id, node, out| {
            let Some((index, folded)) = block_of(id).and_then(|b| Some((b, folded[b].as_ref()?))) else {
                return Ok(out.copy(node));
            };
            let input = out.value(graph.blocks[index].input);
            if id == folded.chain.output {
                let op = Op::Conv(folded.conv);
                return Ok(out.push(Node { name: conv_name(graph, index), inputs: vec![input], op }));
            }
            // Nothing outside the block reads its inner values, so they may stand for anything.
            Ok(if folded.chain.final_activation == Some(id) { out.copy(node) } else { input })
        },
        |block, state| if folded[block].is_some() { BlockState::Merged } else { state },
    )
}

fn segment(index: usize, folded: &Folded, old: &Graph, new: &Graph, before: &Cost, after: &Cost) -> MergedSegment {
    let params = |cost: &Cost, nodes: Range<NodeId>| cost.nodes[nodes].iter().map(|n| n.params).sum();
    let (was, is) = (&old.blocks[index], &new.blocks[index]);
    MergedSegment {
        block: index,
        name: was.name.clone(),
        kernel: folded.chain.span.kernel,
        stride: folded.chain.span.stride,
        macs_before: before.macs_of(was.nodes.clone()),
        macs_after: after.macs_of(is.nodes.clone()),
        params_before: params(before, was.nodes.clone()),
        params_after: params(after, is.nodes.clone()),
        bias_map: folded.conv.bias == Bias::Map,
    }
}
