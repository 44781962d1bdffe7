//! Where the zero padding of a linear segment sits, which decides how its border can be merged exactly
//! (`docs/methods.md` 1.4, "the border problem").

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::graph::{Graph, NodeId, Op, Segment, Span, read_padding};
use crate::shape::{Padding, Shape, Window};
use crate::{Error, Result};

/// How the border of a merged segment is made exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PaddingMode {
    /// R1: before finetuning all padding moves to the segment's first convolution. Changes the function at the border,
    /// then every chain merges into a convolution with a plain bias.
    Reorder,
    /// R3: the padding stays where it was trained and the merged convolution gets a bias per position. Needs no
    /// finetuning; for segments where only 1×1 convolutions come before the padded one.
    BorderBias,
}

impl fmt::Display for PaddingMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reorder => "reorder",
            Self::BorderBias => "border-bias",
        })
    }
}

impl FromStr for PaddingMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "reorder" => Ok(Self::Reorder),
            "border-bias" => Ok(Self::BorderBias),
            _ => Err(Error::Config(format!("unknown padding {text:?}; use reorder or border-bias"))),
        }
    }
}

/// R1: the padding every convolution of a segment gets so that the first holds all of it and the segment's output keeps
/// its size: P = Σ p_l Π_{j<l} s_j above and to the left, below and to the right what the size needs. Lists only the
/// convolutions that change. What starts at the segment's input, a skip or a projection, needs no crop, for it keeps its
/// size.
///
/// # Errors
/// A segment that is not one chain of convolutions with shortcuts from its input only, so that some value would need a crop.
pub fn reordered(graph: &Graph, shapes: &[Shape], segment: &Segment) -> Result<Vec<(NodeId, Padding)>> {
    let refuse = |id: NodeId, why: &str| {
        let node = &graph.nodes[id].name;
        let what = graph.describe_segment(segment);
        Error::Merge(format!("{what}: {node} {why}; use --padding border-bias or keep this block"))
    };
    let chain = graph.main_chain(segment);
    let mut shortcuts = segment.nodes.iter().filter(|id| !chain.contains(id));
    if let Some(id) = shortcuts.find(|&id| graph.nodes[id].inputs.iter().any(|input| chain.contains(input))) {
        return Err(refuse(id, "branches off the chain, and its padding cannot move to the front"));
    }
    let mut convs: Vec<(NodeId, Window)> = Vec::new();
    let mut span = Span::IDENTITY;
    // The span and output of the chain of convolutions, up to the first shortcut that joins it.
    let mut joined = None;
    let mut current = segment.input;
    for &id in &chain {
        let node = &graph.nodes[id];
        match node.op {
            Op::Conv(conv) => {
                let padding = read_padding(conv.window, shapes[node.inputs[0]], shapes[id]);
                if joined.is_some() && padding != Padding::ZERO {
                    return Err(refuse(id, "pads behind a skip, and that padding cannot move to the front"));
                }
                span = span.then(conv.window);
                convs.push((id, conv.window));
            }
            Op::Add => {
                if node.inputs.iter().any(|&i| i != current && chain.contains(&i)) {
                    return Err(refuse(id, "adds a value that would need a crop once the padding is at the front"));
                }
                joined = joined.or(Some((span, convs.len(), current)));
            }
            _ => {}
        }
        current = id;
    }
    let (span, count, end) = joined.unwrap_or((span, convs.len(), current));
    Ok(move_to_front(&convs[..count], span.window(shapes[segment.input], shapes[end]).pad, shapes, graph))
}

/// All padding on the first convolution, unless everything that is read is there already.
fn move_to_front(
    convs: &[(NodeId, Window)],
    front: Padding,
    shapes: &[Shape],
    graph: &Graph,
) -> Vec<(NodeId, Padding)> {
    let is_read = |&(id, window): &(NodeId, Window)| {
        read_padding(window, shapes[graph.nodes[id].inputs[0]], shapes[id]) != Padding::ZERO
    };
    if !convs.iter().skip(1).any(is_read) {
        return Vec::new();
    }
    let padding = std::iter::once(front).chain(std::iter::repeat(Padding::ZERO));
    convs.iter().zip(padding).filter(|((_, w), p)| w.pad != *p).map(|(&(id, _), p)| (id, p)).collect()
}
