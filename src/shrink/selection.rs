//! What a selection decides, and the segments that follow from it (`docs/methods.md` 2.2).

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::layers::Layers;
use super::mask::Mask;
use super::matching::Matched;
use super::merge::check;
use super::method::SearchMethod;
use super::narrow::ChannelList;
use super::padding::{PaddingMode, Reordering};
use crate::graph::{BlockId, BlockState, Graph, NodeId, Op, Segment, SegmentEnds};
use crate::io::write_atomic;
use crate::{Error, Result, files};

/// Which activations stay and which segments become one convolution: what `search` writes to `plan.json` and `finetune` and
/// `merge` read with `--plan`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Selection {
    /// Which sites keep their activations.
    #[serde(rename = "kept")]
    pub keep: Mask,
    /// Segments to merge where they are more than what the mask implies ([`linear_segments`]), in network order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub segments: Vec<SegmentEnds>,
    /// Whether freed blocks are bypassed, so that only their shortcuts are left, rather than made linear and merged.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bypass: bool,
    /// Names of those freed blocks that are bypassed where the others are made linear.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bypassed: Vec<String>,
    /// How many channels stay where some go; they go before anything else does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channels: Option<ChannelList>,
    /// What happens to single layers, where activations go at other places than whole blocks or convolutions are pruned. Then
    /// nothing merges but `segments`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// How borders are made exact, where the selection was made for one way; else the settings decide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub padding: Option<PaddingMode>,
    /// Its time by the latency table as a share of the original's, where single layers were selected by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_share: Option<f64>,
    /// What chose; none for a selection by hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<SearchMethod>,
    /// Keep scores, one per block, in [0, 1] but for DepthShrinker's search as published; empty for a selection by hand or by chance.
    #[serde(default)]
    pub scores: Vec<f32>,
    /// Masks of other sizes from the same ranking, by the number of kept blocks.
    #[serde(default)]
    pub nested: Vec<NestedMask>,
    /// How near to its budget the selection is by the clock, where the clock was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matched: Option<Matched>,
}

/// A mask of another size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NestedMask {
    /// Number of blocks that keep their activations.
    pub keep: usize,
    /// One entry per block.
    pub kept: Mask,
}

impl From<Mask> for Selection {
    fn from(keep: Mask) -> Self {
        Self {
            keep,
            segments: Vec::new(),
            bypass: false,
            bypassed: Vec::new(),
            channels: None,
            layers: None,
            padding: None,
            latency_share: None,
            method: None,
            scores: Vec::new(),
            nested: Vec::new(),
            matched: None,
        }
    }
}

impl Selection {
    /// A network of so many blocks that keeps them all, and fewer channels.
    pub fn of_channels(blocks: usize, channels: ChannelList) -> Self {
        Self { channels: Some(channels), ..Mask::all(blocks).into() }
    }

    /// Names of the freed blocks of a network of which only the shortcut is left.
    pub fn bypassed_blocks(&self, graph: &Graph) -> Vec<String> {
        let freed = graph.blocks.iter().zip(self.keep.kept()).filter(|(_, kept)| !**kept).map(|(block, _)| &block.name);
        freed.filter(|name| self.bypass || self.bypassed.contains(name)).cloned().collect()
    }

    /// Reads `plan.json`.
    ///
    /// # Errors
    /// A file that cannot be read or says nothing usable about blocks.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(path, &files::read_text(path)?)
    }

    /// As [`read`](Self::read), from text; `path` is what messages name.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        serde_json::from_str(text)
            .map_err(|e| Error::file(path, format!("is no plan ({e}); it needs \"kept\": one 0 or 1 per block")))
    }

    /// The segments of the graph that was made for this selection which merge.
    ///
    /// # Errors
    /// As [`linear_segments`].
    pub fn merging(&self, graph: &Graph, padding: PaddingMode) -> Result<Vec<Segment>> {
        match self.layers {
            Some(_) => segments_of(graph, std::iter::empty(), &self.segments, |_| false),
            None => linear_segments(graph, &self.segments, padding),
        }
    }

    /// Writes `plan.json` atomically.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = format!("{:#}\n", serde_json::json!(self));
        write_atomic(path, |out| out.write_all(text.as_bytes()))
    }
}

/// The segments of a graph that merge: those `given`, and every other linear block. Where a block reads a convolution
/// outside of all blocks without an activation in between, as the first one does once the stem's activation is gone, its
/// segment begins there if that is exact under `padding`.
///
/// # Errors
/// Names that bound no segment.
pub fn linear_segments(graph: &Graph, given: &[SegmentEnds], padding: PaddingMode) -> Result<Vec<Segment>> {
    let shapes = graph.shapes()?;
    let linear = BlockId::all(graph.blocks.len()).filter(|&b| graph.state(b) == BlockState::Linear);
    segments_of(graph, linear, given, |segment| check(graph, &shapes, segment, padding).is_ok())
}

/// As [`linear_segments`], of blocks that are to be linear in a graph whose padding may still move.
pub(super) fn future_segments(
    graph: &Graph,
    blocks: impl Iterator<Item = BlockId>,
    given: &[SegmentEnds],
    padding: PaddingMode,
) -> Result<Vec<Segment>> {
    let shapes = graph.shapes()?;
    segments_of(graph, blocks, given, |segment| match padding {
        PaddingMode::BorderBias => check(graph, &shapes, segment, padding).is_ok(),
        PaddingMode::Reorder => is_exact_reordered(graph, segment),
    })
}

/// Whether a segment is one convolution once its padding is at its front.
fn is_exact_reordered(graph: &Graph, segment: &Segment) -> bool {
    let checked = || -> Result<()> {
        let moved = Reordering::of_all(graph, std::slice::from_ref(segment))?.applied(graph)?;
        let again = moved.segment(&graph.segment_ends(segment))?;
        check(&moved, &moved.shapes()?, &again, PaddingMode::Reorder).map(drop)
    };
    checked().is_ok()
}

/// The given segments and the other blocks, each as long as `fits` allows.
fn segments_of(
    graph: &Graph,
    blocks: impl Iterator<Item = BlockId>,
    given: &[SegmentEnds],
    fits: impl Fn(&Segment) -> bool,
) -> Result<Vec<Segment>> {
    let mut segments = given.iter().map(|ends| graph.segment(ends)).collect::<Result<Vec<Segment>>>()?;
    let given = segments.clone();
    let taken = |node: NodeId| given.iter().any(|segment| segment.nodes.contains(&node));
    for block in blocks.filter_map(|block| graph.blocks[block].segment()) {
        if block.nodes.iter().any(taken) {
            continue;
        }
        let wider = with_front(graph, &block).filter(|wider| !wider.nodes.iter().any(taken) && fits(wider));
        segments.push(wider.unwrap_or(block));
    }
    segments.sort_by_key(|segment| segment.nodes.start);
    Ok(segments)
}

/// A block with the convolutions outside of all blocks that it reads without an activation in between.
fn with_front(graph: &Graph, block: &Segment) -> Option<Segment> {
    let (mut input, mut wider) = (block.input, None);
    while input > NodeId::INPUT {
        let node = &graph.nodes[input];
        if graph.block_of(input).is_some() || !matches!(node.op, Op::Conv(_) | Op::BatchNorm(_)) {
            break;
        }
        if matches!(node.op, Op::Conv(_)) {
            wider = Some(Segment { input: node.inputs[0], nodes: (input..block.nodes.end).into() });
        }
        input = node.inputs[0];
    }
    wider.filter(|wider| graph.check_segment(wider).is_ok())
}
