//! Where the zero padding of a linear block sits, which decides how its border can be merged exactly
//! (`methods.md` 1.4, "the border problem").

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::graph::{Block, Graph, NodeId, Op};
use crate::shape::{Padding, Shape, Window};
use crate::{Error, Result};

/// How the border of a merged block is made exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PaddingMode {
    /// R1: before finetuning all padding moves to the block's first convolution. Changes the function at the border,
    /// then every chain merges into a convolution with a plain bias.
    Reorder,
    /// R3: the padding stays where it was trained and the merged convolution gets a bias per position. Needs no
    /// finetuning; for blocks where only 1×1 convolutions come before the padded one.
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

/// Which pixels of a block's input one output pixel reads: the window of the one convolution that replaces a chain.
/// Each pair is (vertical, horizontal).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Kernel size K = 1 + Σ (k_l − 1) Π_{j<l} s_j.
    pub kernel: [usize; 2],
    /// Stride S = Π s_l.
    pub stride: [usize; 2],
    /// Padding above and to the left, P = Σ p_l Π_{j<l} s_j: the tap that lies on the pixel (S·row, S·column).
    pub pad: [usize; 2],
}

impl Span {
    /// A value that is its own source.
    pub const IDENTITY: Self = Self { kernel: [1, 1], stride: [1, 1], pad: [0, 0] };

    /// The span behind one more convolution.
    pub fn then(self, window: Window) -> Self {
        let axis = |i: usize, k: usize, s: usize, p: usize| {
            // Saturating: a graph from a file may ask for absurd strides, which the checks behind this refuse.
            let stride = self.stride[i];
            let kernel = self.kernel[i].saturating_add((k - 1).saturating_mul(stride));
            (kernel, stride.saturating_mul(s), self.pad[i].saturating_add(p.saturating_mul(stride)))
        };
        let (k_h, s_h, p_h) = axis(0, window.k_h, window.stride_h, window.pad.top);
        let (k_w, s_w, p_w) = axis(1, window.k_w, window.stride_w, window.pad.left);
        Self { kernel: [k_h, k_w], stride: [s_h, s_w], pad: [p_h, p_w] }
    }

    /// The span of the sum of two values, their taps P on one another; `None` where the strides differ.
    pub fn join(self, other: Self) -> Option<Self> {
        let pad = [self.pad[0].max(other.pad[0]), self.pad[1].max(other.pad[1])];
        let beyond = |s: &Self, i: usize| (pad[i] - s.pad[i]).saturating_add(s.kernel[i]);
        let kernel = [0, 1].map(|i| beyond(&self, i).max(beyond(&other, i)));
        (self.stride == other.stride).then_some(Self { kernel, stride: self.stride, pad })
    }

    /// The window that gives exactly `output` from `input`: below and to the right it pads only what is read.
    pub fn window(self, input: Shape, output: Shape) -> Window {
        let end = |i: usize, size: usize, out: usize| {
            let read = (out - 1).saturating_mul(self.stride[i]).saturating_add(self.kernel[i]);
            read.saturating_sub(size.saturating_add(self.pad[i]))
        };
        Window {
            k_h: self.kernel[0],
            k_w: self.kernel[1],
            stride_h: self.stride[0],
            stride_w: self.stride[1],
            pad: Padding {
                top: self.pad[0],
                left: self.pad[1],
                bottom: end(0, input.h, output.h),
                right: end(1, input.w, output.w),
            },
        }
    }
}

/// The part of a convolution's padding that its output reads; a strided convolution can leave the last rows unread.
pub fn read_padding(window: Window, input: Shape, output: Shape) -> Padding {
    Span::IDENTITY.then(window).window(input, output).pad
}

/// R1: the padding every convolution of a block gets so that the first holds all of it and the block's output keeps
/// its size: P = Σ p_l Π_{j<l} s_j above and to the left, below and to the right what the size needs. Lists only the
/// convolutions that change. What starts at the block's input, a skip or a projection, needs no crop, for it keeps its
/// size.
///
/// # Errors
/// A block that is not one chain of convolutions with shortcuts from its input only, so that some value would need a crop.
pub fn reordered(graph: &Graph, shapes: &[Shape], block: &Block) -> Result<Vec<(NodeId, Padding)>> {
    let refuse = |id: NodeId, why: &str| {
        let node = &graph.nodes[id].name;
        Error::Merge(format!("block {}: {node} {why}; use --padding border-bias or keep this block", block.name))
    };
    let chain = main_chain(graph, block);
    let mut shortcuts = block.nodes.clone().filter(|id| !chain.contains(id));
    if let Some(id) = shortcuts.find(|&id| graph.nodes[id].inputs.iter().any(|input| chain.contains(input))) {
        return Err(refuse(id, "branches off the chain, and its padding cannot move to the front"));
    }
    let mut convs: Vec<(NodeId, Window)> = Vec::new();
    let mut span = Span::IDENTITY;
    // The span and output of the chain of convolutions, up to the first shortcut that joins it.
    let mut joined = None;
    let mut current = block.input;
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
    Ok(move_to_front(&convs[..count], span.window(shapes[block.input], shapes[end]).pad, shapes, graph))
}

/// The nodes of a block from its input to its output, in order: of two values that are added the way goes on through the
/// one behind more convolutions, of equals through the later.
fn main_chain(graph: &Graph, block: &Block) -> Vec<NodeId> {
    let mut depth = vec![0usize; block.nodes.len()];
    let at = |depth: &[usize], id: NodeId| if id < block.nodes.start { 0 } else { depth[id - block.nodes.start] };
    for id in block.nodes.clone() {
        let node = &graph.nodes[id];
        let deepest = node.inputs.iter().map(|&i| at(&depth, i)).max().unwrap_or(0);
        depth[id - block.nodes.start] = deepest + usize::from(matches!(node.op, Op::Conv(_)));
    }
    let mut chain = Vec::new();
    let mut next = block.output();
    while block.nodes.contains(&next) {
        chain.push(next);
        let inputs = graph.nodes[next].inputs.iter().copied();
        next = inputs.max_by_key(|&i| (at(&depth, i), i)).expect("a node inside a block reads something");
    }
    chain.reverse();
    chain
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
