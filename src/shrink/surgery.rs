//! Stage 2's changes of the graph: inner activations of freed blocks go, a final activation comes, and the padding
//! moves to the front (`docs/methods.md` 1.3 and 1.4).

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::layers::Layers;
use super::mask::{Mask, fits};
use super::merge::check;
use super::narrow::{ChannelList, narrow, narrow_graph};
use super::padding::{PaddingMode, Reordering};
use super::selection::{Selection, future_segments};
use crate::graph::{
    Activation, Block, BlockId, BlockState, ConvFamily, Graph, Node, NodeId, Op, Segment, SegmentEnds, SiteId,
};
use crate::model::{Model, Weights};
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

/// What is freed: sites by mask, and the segments that are to become one convolution where they are more than blocks.
#[derive(Debug, Clone, Copy)]
pub struct Freed<'a> {
    /// One flag per block, and perhaps per further site: whether its activations stay.
    pub kept: &'a [bool],
    /// As in [`Selection::segments`].
    pub segments: &'a [SegmentEnds],
    /// Whether freed blocks are bypassed ([`bypass`]) rather than made linear.
    pub bypass: bool,
    /// Names of freed blocks that are bypassed where the others are made linear.
    pub bypassed: &'a [String],
    /// How many channels stay, where some go first.
    pub channels: Option<&'a ChannelList>,
    /// As in [`Selection::layers`].
    pub layers: Option<&'a Layers>,
}

impl<'a> From<&'a [bool]> for Freed<'a> {
    fn from(kept: &'a [bool]) -> Self {
        Self { kept, segments: &[], bypass: false, bypassed: &[], channels: None, layers: None }
    }
}

impl<'a> From<&'a Vec<bool>> for Freed<'a> {
    fn from(kept: &'a Vec<bool>) -> Self {
        kept.as_slice().into()
    }
}

impl<'a, const N: usize> From<&'a [bool; N]> for Freed<'a> {
    fn from(kept: &'a [bool; N]) -> Self {
        kept.as_slice().into()
    }
}

impl<'a> From<&'a Mask> for Freed<'a> {
    fn from(mask: &'a Mask) -> Self {
        mask.kept().into()
    }
}

impl<'a> From<&'a Selection> for Freed<'a> {
    fn from(selection: &'a Selection) -> Self {
        let Selection { keep, segments, bypass, bypassed, channels, layers, .. } = selection;
        let (channels, layers) = (channels.as_ref(), layers.as_ref());
        Self { kept: keep.kept(), segments, bypass: *bypass, bypassed, channels, layers }
    }
}

impl Freed<'_> {
    /// Whether the activations of a site are to go.
    fn frees(self, site: SiteId) -> bool {
        self.kept.get(site.index()).is_some_and(|kept| !kept)
    }
}

/// Makes every block that is freed linear: its activations disappear, and what `options` asks for is done. A block that is
/// linear already stays as it is.
///
/// # Errors
/// A mask of the wrong length, one that keeps a block whose activations are gone, one that frees a merged block, or a
/// block or segment that could not be merged afterwards; said before anything is trained.
pub fn linearise<'a>(model: &Model, freed: impl Into<Freed<'a>>, options: &Linearise) -> Result<Model> {
    let freed = freed.into();
    let prepared = prepare_finetune(model, freed, options)?;
    let removed: Vec<bool> = freed.kept.iter().map(|k| !k).collect();
    drop_linear_activations(&prepared, &removed)
}

/// As [`linearise`], but the freed activations stay, so that finetuning can move their slope from 0 to 1;
/// [`drop_linear_activations`] ends it. Preparing a prepared model changes nothing.
///
/// # Errors
/// As [`linearise`].
pub fn prepare_finetune<'a>(model: &Model, freed: impl Into<Freed<'a>>, options: &Linearise) -> Result<Model> {
    let freed = freed.into();
    match freed.channels {
        Some(list) => {
            let model = narrow(model, list)?;
            with_weights(prepared(&model.graph, freed, options)?, &model)
        }
        None => with_weights(prepared(&model.graph, freed, options)?, model),
    }
}

/// Refuses blocks that could not be merged if their activations went: the same as [`linearise`] says, from the graph alone.
///
/// # Errors
/// As [`linearise`].
pub fn check_linearise<'a>(graph: &Graph, freed: impl Into<Freed<'a>>, options: &Linearise) -> Result<()> {
    let freed = freed.into();
    match freed.channels {
        Some(list) => prepared(&narrow_graph(graph, list)?, freed, options).map(drop),
        None => prepared(graph, freed, options).map(drop),
    }
}

/// The network with the shortcut alone of every block that is not kept: its value is the block's input. A block that is gone
/// already stays gone.
///
/// # Errors
/// A mask of the wrong length, or a block whose input is not added to its output.
pub fn bypass(model: &Model, kept: &[bool]) -> Result<Model> {
    with_weights(bypassed(&model.graph, kept)?, model)
}

fn bypassed(graph: &Graph, kept: &[bool]) -> Result<Graph> {
    check_length(graph, kept)?;
    let gone: Vec<&Block> = graph
        .blocks
        .iter()
        .zip(kept)
        .filter(|(block, kept)| !**kept && !block.nodes.is_empty())
        .map(|(b, _)| b)
        .collect();
    let shapes = graph.shapes()?;
    let is_bypassed = |block: &&Block| {
        let adds = |node: &Node| matches!(node.op, Op::Add) && node.inputs.contains(&block.input);
        shapes[block.input] == shapes[block.output()] && graph.nodes[block.nodes].iter().any(adds)
    };
    if let Some(block) = gone.iter().find(|block| !is_bypassed(block)) {
        return Err(Error::Merge(format!(
            "block {} has no shortcut from its input to its output, so it cannot be bypassed; keep it",
            block.name
        )));
    }
    graph.rewrite(|id, node, out| match gone.iter().find(|block| block.nodes.contains(&id)) {
        // Nothing outside of a block reads its inner values.
        Some(block) => Ok(out.value(block.input)),
        None => Ok(out.copy(node)),
    })
}

/// The graph that finetuning starts with where some freed blocks are bypassed: the others are prepared as if those stayed.
fn partly_bypassed(graph: &Graph, freed: Freed<'_>, options: &Linearise) -> Result<Graph> {
    check_length(graph, freed.kept)?;
    for name in freed.bypassed {
        let place = graph.blocks.iter().position(|block| block.name == *name);
        if place.is_none_or(|block| freed.kept[block]) {
            let problem = "is to be bypassed and is no block that is freed";
            return Err(Error::Merge(format!("{name} {problem}; give it a 0 in \"kept\"")));
        }
    }
    let stays: Vec<bool> = graph.blocks.iter().map(|block| !freed.bypassed.contains(&block.name)).collect();
    let kept: Vec<bool> =
        (0..freed.kept.len()).map(|site| freed.kept[site] || stays.get(site) == Some(&false)).collect();
    let others = prepared(graph, Freed { kept: &kept, bypassed: &[], ..freed }, options)?;
    bypassed(&others, &stays)
}

/// The graph that finetuning starts with.
fn prepared(graph: &Graph, freed: Freed<'_>, options: &Linearise) -> Result<Graph> {
    if freed.bypass {
        return bypassed(graph, freed.kept);
    }
    if !freed.bypassed.is_empty() {
        return partly_bypassed(graph, freed, options);
    }
    check_mask(graph, freed.kept)?;
    let blocks: Vec<BlockId> = BlockId::all(graph.blocks.len())
        .filter(|&b| freed.frees(b.site()) && graph.state(b) == BlockState::Active)
        .collect();
    let graph = match freed.layers {
        Some(layers) => layers.applied(graph, freed.kept)?,
        None if options.final_activation => add_final_activations(graph, &blocks, freed)?,
        None => graph.clone(),
    };
    // Segments are those of the graph without activations, where blocks that cannot be merged are refused before hours of
    // finetuning.
    let linear = without_activations(&graph, |site| freed.frees(site))?;
    // Of single layers, what becomes one convolution is named.
    let blocks = blocks.into_iter().filter(|_| freed.layers.is_none());
    let segments = future_segments(&linear, blocks, freed.segments, options.padding)?;
    let moved = match options.padding {
        PaddingMode::Reorder => Reordering::of_all(&linear, &segments)?,
        PaddingMode::BorderBias => Reordering::default(),
    };
    let ends: Vec<SegmentEnds> = segments.iter().map(|segment| linear.segment_ends(segment)).collect();
    let linear = moved.applied(&linear)?;
    let shapes = linear.shapes()?;
    for ends in &ends {
        check(&linear, &shapes, &linear.segment(ends)?, options.padding)?;
    }
    moved.applied(&graph)
}

/// Removes the activations of the sites with `removed[site] == true`, whose slope has reached 1: the identity. Sites that
/// have lost them already stay as they are, so that blocks can be freed one after the other.
///
/// # Errors
/// A list of the wrong length.
pub fn drop_linear_activations(model: &Model, removed: &[bool]) -> Result<Model> {
    let kept: Vec<bool> = removed.iter().map(|removed| !removed).collect();
    check_length(&model.graph, &kept)?;
    with_weights(without_activations(&model.graph, |site| removed.get(site.index()) == Some(&true))?, model)
}

/// A mask has one entry per block, and may go on with one for each further site.
fn check_length(graph: &Graph, kept: &[bool]) -> Result<()> {
    let (got, blocks, sites) = (kept.len(), graph.blocks.len(), graph.sites());
    if fits(kept, graph) {
        return Ok(());
    }
    let more = if sites > blocks { format!(" and {} more that can be freed", sites - blocks) } else { String::new() };
    Err(Error::Merge(format!(
        "the mask has {got} entries, {} has {blocks} blocks{more}; give one per block",
        graph.name
    )))
}

/// A mask agrees with what has happened to the blocks.
fn check_mask(graph: &Graph, kept: &[bool]) -> Result<()> {
    check_length(graph, kept)?;
    // Of a block without nodes nothing is left to be kept or freed: it is bypassed, or a part of a later one.
    for (id, (block, &kept)) in
        BlockId::enumerate(graph.blocks.iter().zip(kept)).filter(|(_, (b, _))| !b.nodes.is_empty())
    {
        let problem = match (graph.state(id), kept) {
            (BlockState::Linear | BlockState::Merged, true) => "has lost its activations, the mask cannot keep it",
            (BlockState::Merged, false) => "is merged already",
            _ => continue,
        };
        return Err(Error::Merge(format!("block {} {problem}; start from the model from before", block.name)));
    }
    Ok(())
}

/// The graph without the activations of the freed sites.
fn without_activations(graph: &Graph, freed: impl Fn(SiteId) -> bool) -> Result<Graph> {
    graph.rewrite(|_, node, out| match node.site() {
        Some(site) if freed(site) => Ok(out.value(node.inputs[0])),
        _ => Ok(out.copy(node)),
    })
}

/// ReLU6 behind the output of the freed blocks that expand and do not end in an activation yet, nor go on in a segment.
fn add_final_activations(graph: &Graph, freed_blocks: &[BlockId], freed: Freed<'_>) -> Result<Graph> {
    let segments = freed.segments.iter().map(|ends| graph.segment(ends)).collect::<Result<Vec<Segment>>>()?;
    let ends_in_activation =
        |block: &Block| matches!(graph.nodes[block.output()].op, Op::Activation(a) if a.site.is_none());
    let goes_on = |output: NodeId| segments.iter().any(|s| s.nodes.contains(&output) && s.output() != output);
    let outputs: HashSet<NodeId> = freed_blocks
        .iter()
        .map(|&b| &graph.blocks[b])
        .filter(|block| !is_depthwise_separable(graph, block) && !ends_in_activation(block))
        .map(Block::output)
        .filter(|&output| !goes_on(output))
        .collect();
    graph.rewrite(|id, node, out| {
        let output = out.copy(node);
        if !outputs.contains(&id) {
            return Ok(output);
        }
        let name = format!("{}.act", node.name);
        Ok(out.push(Node { name, inputs: vec![output], op: Op::Activation(Activation::RELU6) }))
    })
}

/// Whether a block begins with its depthwise convolution, without expansion.
fn is_depthwise_separable(graph: &Graph, block: &Block) -> bool {
    let first = graph.nodes[block.nodes].iter().find_map(|n| match n.op {
        Op::Conv(conv) => Some(conv),
        _ => None,
    });
    first.is_some_and(|conv| conv.family() == ConvFamily::Depthwise)
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
