//! Stage 2's changes of the graph: inner activations of freed blocks go, a final activation comes, and the padding
//! moves to the front (`methods.md` 1.3 and 1.4).

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::merge::check;
use super::padding::{PaddingMode, reordered};
use crate::graph::{Activation, Block, BlockState, Conv, ConvFamily, Graph, Node, NodeId, Op};
use crate::model::{Model, Weights};
use crate::shape::{Padding, Window};
use crate::{Error, Result};

/// What happens to a block whose activations go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linearise {
    /// Whether the block gets a ReLU6 behind its output, after the residual sum. Inverted-residual blocks only; the
    /// depthwise-separable block stays without.
    pub final_activation: bool,
    /// Whether the padding moves to the front now, so that finetuning sees the function that is merged later.
    pub padding: PaddingMode,
}

/// Makes every block with `kept[b] == false` linear: its masked activations disappear, and what `options` asks for is
/// done. A block that is linear already stays as it is.
///
/// # Errors
/// A mask of the wrong length, one that keeps a block whose activations are gone, one that frees a merged block, or a
/// block that could not be merged afterwards; said before anything is trained.
pub fn linearise(model: &Model, kept: &[bool], options: &Linearise) -> Result<Model> {
    let prepared = prepare_finetune(model, kept, options)?;
    let removed: Vec<bool> = kept.iter().map(|k| !k).collect();
    drop_linear_activations(&prepared, &removed)
}

/// As [`linearise`], but the masked activations and the blocks' states stay, so that finetuning can move the slope of
/// the freed blocks from 0 to 1; [`drop_linear_activations`] ends it. Preparing a prepared model changes nothing.
///
/// # Errors
/// As [`linearise`].
pub fn prepare_finetune(model: &Model, kept: &[bool], options: &Linearise) -> Result<Model> {
    with_weights(prepared(&model.graph, kept, options)?, model)
}

/// Refuses blocks that could not be merged if their activations went: the same as [`linearise`] says, from the graph alone.
///
/// # Errors
/// As [`linearise`].
pub fn check_linearise(graph: &Graph, kept: &[bool], options: &Linearise) -> Result<()> {
    prepared(graph, kept, options).map(drop)
}

/// The graph that finetuning starts with.
fn prepared(graph: &Graph, kept: &[bool], options: &Linearise) -> Result<Graph> {
    check_mask(graph, kept)?;
    let freed = |b: usize| !kept[b] && graph.blocks[b].state == BlockState::Active;
    let graph = if options.final_activation { add_final_activations(graph, freed)? } else { graph.clone() };
    let graph = if options.padding == PaddingMode::Reorder { reorder_padding(&graph, freed)? } else { graph };
    // Blocks that cannot be merged are refused here, before hours of finetuning.
    let linear = without_masked(&graph, freed)?;
    let shapes = linear.shapes()?;
    for block in (0..kept.len()).filter(|&b| freed(b)) {
        check(&linear, &shapes, block, options.padding)?;
    }
    Ok(graph)
}

/// Removes the masked activations of the blocks with `removed[b] == true`, whose slope has reached 1: the identity.
/// Blocks that have lost them already stay as they are, so that blocks can be freed one after the other.
///
/// # Errors
/// A list of the wrong length.
pub fn drop_linear_activations(model: &Model, removed: &[bool]) -> Result<Model> {
    check_length(&model.graph, removed)?;
    let freed = |b: usize| removed[b] && model.graph.blocks[b].state == BlockState::Active;
    with_weights(without_masked(&model.graph, freed)?, model)
}

/// A mask has one entry per block.
fn check_length(graph: &Graph, mask: &[bool]) -> Result<()> {
    let (got, blocks) = (mask.len(), graph.blocks.len());
    if got == blocks {
        return Ok(());
    }
    Err(Error::Merge(format!("the mask has {got} entries, {} has {blocks} blocks; give one per block", graph.name)))
}

/// A mask agrees with what has happened to the blocks.
fn check_mask(graph: &Graph, kept: &[bool]) -> Result<()> {
    check_length(graph, kept)?;
    for (block, &kept) in graph.blocks.iter().zip(kept) {
        let problem = match (block.state, kept) {
            (BlockState::Linear | BlockState::Merged, true) => "has lost its activations, the mask cannot keep it",
            (BlockState::Merged, false) => "is merged already",
            _ => continue,
        };
        return Err(Error::Merge(format!("block {} {problem}; start from the unmerged model", block.name)));
    }
    Ok(())
}

/// The graph without the masked activations of the freed blocks, which become linear.
fn without_masked(graph: &Graph, freed: impl Fn(usize) -> bool) -> Result<Graph> {
    graph.rewrite(
        |_, node, out| match node.op {
            Op::Activation(Activation { mask: Some(mask), .. }) if freed(mask) => Ok(out.value(node.inputs[0])),
            _ => Ok(out.copy(node)),
        },
        |block, state| if freed(block) { BlockState::Linear } else { state },
    )
}

/// ReLU6 behind the output of the freed blocks that expand and do not end in an unmasked activation yet.
fn add_final_activations(graph: &Graph, freed: impl Fn(usize) -> bool) -> Result<Graph> {
    let ends_in_activation =
        |block: &Block| matches!(graph.nodes[block.output()].op, Op::Activation(a) if a.mask.is_none());
    let outputs: HashSet<NodeId> = graph
        .blocks
        .iter()
        .enumerate()
        .filter(|(b, block)| freed(*b) && !is_depthwise_separable(graph, block) && !ends_in_activation(block))
        .map(|(_, block)| block.output())
        .collect();
    graph.rewrite(
        |id, node, out| {
            let output = out.copy(node);
            if !outputs.contains(&id) {
                return Ok(output);
            }
            let name = format!("{}.act", node.name);
            Ok(out.push(Node { name, inputs: vec![output], op: Op::Activation(Activation::RELU6) }))
        },
        |_, state| state,
    )
}

/// Whether a block begins with its depthwise convolution, without expansion.
fn is_depthwise_separable(graph: &Graph, block: &Block) -> bool {
    let first = graph.nodes[block.nodes.clone()].iter().find_map(|n| match n.op {
        Op::Conv(conv) => Some(conv),
        _ => None,
    });
    first.is_some_and(|conv| conv.family() == ConvFamily::Depthwise)
}

/// R1 on every freed block.
fn reorder_padding(graph: &Graph, freed: impl Fn(usize) -> bool) -> Result<Graph> {
    let shapes = graph.shapes()?;
    let mut moved: HashMap<NodeId, Padding> = HashMap::new();
    for (_, block) in graph.blocks.iter().enumerate().filter(|(b, _)| freed(*b)) {
        moved.extend(reordered(graph, &shapes, block)?);
    }
    graph.rewrite(
        |id, node, out| {
            let new = out.copy(node);
            Ok(match (node.op, moved.get(&id)) {
                (Op::Conv(conv), Some(&pad)) => {
                    out.set_op(new, Op::Conv(Conv { window: Window { pad, ..conv.window }, ..conv }))
                }
                _ => new,
            })
        },
        |_, state| state,
    )
}

/// The model's weights on the changed graph. A pointwise convolution that gets padding is dense from then on, and the
/// reverse; the numbers are the same in the same order, `[c_out, c_in]` and `[c_out, 1, 1, c_in]`.
fn with_weights(graph: Graph, model: &Model) -> Result<Model> {
    let mut weights = Weights::new();
    for param in graph.params()? {
        if let Some(tensor) = model.weights.get(&param.name) {
            let mut tensor = tensor.clone();
            if tensor.data.len() == param.len() {
                tensor.shape = param.shape;
            }
            weights.insert(param.name, tensor);
        }
    }
    Model::new(graph, weights)
}
