//! Segments: runs of nodes with one entry and one exit, what is made linear, merged, timed and priced as one thing. A block
//! is one, and so are several blocks, or the stem and the first block (`docs/methods.md` 2.1).

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::node::{Graph, Node};
use super::op::{Input, Op};
use crate::index::{BlockId, NodeId, NodeRange};
use crate::ops::activation::Activation;
use crate::ops::pad::Pad;
use crate::shape::{Padding, Shape, Window};
use crate::{Error, Result};

/// Largest kernel size, stride or padding of a merged convolution, as [`Graph::shapes`] has it.
const MAX_WINDOW: usize = 1024;
/// Largest number of weights of a merged convolution, in f64 512 MiB; a few such are held at once. The largest of a
/// known network's blocks, ResNet-50's last, has 38 million.
const MAX_WEIGHTS: usize = 1 << 26;

/// A run of nodes that reads one value from outside and of whose values only the last is read outside.
///
/// # Examples
/// Stem and first block of a MobileNetV2, as what they would merge into: a 3×3 of stride 2 and a depthwise 3×3 behind it.
/// ```
/// use depthshrinker::graph::SegmentEnds;
/// use depthshrinker::networks::{NetworkOptions, build};
/// use depthshrinker::shape::Shape;
///
/// let graph = build("mobilenetv2-0.35", &NetworkOptions::new(Shape::new(32, 32, 3), 5))?;
/// let ends = SegmentEnds { first: "conv_stem".into(), last: "blocks.0.0.bn2".into() };
/// let segment = graph.segment(&ends)?;
/// assert!(graph.segments().contains(&segment));
/// assert_eq!(graph.segment_name(&segment), "conv_stem+blocks.0.0");
///
/// let span = graph.span(&segment)?;
/// assert_eq!((span.kernel, span.stride), ([7, 7], [2, 2]));
/// assert!(!graph.is_linear(&segment), "its activations are there");
/// assert_eq!(graph.cut(&segment)?.input_shape(), graph.input_shape());
/// # Ok::<(), depthshrinker::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Segment {
    /// The value it reads.
    pub input: NodeId,
    /// Its nodes, in order and not empty; the last produces its output.
    pub nodes: NodeRange,
}

impl Segment {
    /// The value that leaves the segment.
    pub fn output(&self) -> NodeId {
        self.nodes.last().expect("a segment has nodes")
    }
}

/// A segment by the names of its first and last node, which surgery keeps where it renumbers nodes: what files hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentEnds {
    /// Name of the first node.
    pub first: String,
    /// Name of the last node.
    pub last: String,
}

/// Which pixels of a segment's input one output pixel reads: the window of the one convolution that replaces a chain.
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

    /// The span behind a padding; `None` where it cuts off more than was padded before, so that the tap P is gone.
    pub fn padded(self, pad: Pad) -> Option<Self> {
        let axis = |i: usize, amount: isize| {
            let stride = isize::try_from(self.stride[i]).ok()?;
            self.pad[i].checked_add_signed(amount.checked_mul(stride)?)
        };
        Some(Self { pad: [axis(0, pad.top)?, axis(1, pad.left)?], ..self })
    }

    /// Whether a merged convolution of this span, with c_in·c_out = `channels`, or c if it is depthwise, is of a size that can be
    /// built.
    pub fn is_sane(self, channels: usize) -> bool {
        let [k_h, k_w] = self.kernel;
        let largest = self.kernel.into_iter().chain(self.stride).chain(self.pad).max();
        largest <= Some(MAX_WINDOW) && (k_h * k_w).checked_mul(channels).is_some_and(|weights| weights <= MAX_WEIGHTS)
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

impl Graph {
    /// Checks that a segment lies in the graph and has one entry and one exit.
    ///
    /// # Errors
    /// Names the node where another value enters or leaves.
    pub fn check_segment(&self, segment: &Segment) -> Result<()> {
        let NodeRange { start, end } = segment.nodes;
        if segment.input >= start || end <= start || end.index() > self.nodes.len() {
            return Err(Error::Graph(format!("nodes {start} to {end} of {} are no segment", self.name)));
        }
        match self.second_way(segment, &self.users()) {
            None => Ok(()),
            Some(id) => {
                let (what, node) = (self.describe_segment(segment), &self.nodes[id].name);
                Err(Error::Graph(format!("{what} has a second entry or exit at {node}")))
            }
        }
    }

    /// The first node of a segment where a second value enters or leaves.
    pub(super) fn second_way(&self, segment: &Segment, users: &[Vec<NodeId>]) -> Option<NodeId> {
        segment.nodes.iter().find(|&id| {
            let enters = self.nodes[id].inputs.iter().any(|i| *i != segment.input && !segment.nodes.contains(i));
            let leaves = id != segment.output() && users[id].iter().any(|u| !segment.nodes.contains(u));
            enters || leaves
        })
    }

    /// The segment between two nodes by name, and the paddings in front of the first that are read within it alone.
    ///
    /// # Errors
    /// A name that no node has, or nodes that do not bound a segment.
    pub fn segment(&self, ends: &SegmentEnds) -> Result<Segment> {
        let find = |name: &str| {
            let id = self.nodes.iter().position(|node| node.name == name);
            id.map(NodeId::new)
                .ok_or_else(|| Error::Graph(format!("{} has no node {name:?} to bound a segment", self.name)))
        };
        let (mut first, last) = (find(&ends.first)?, find(&ends.last)?);
        let users = self.users();
        let is_own = |id: NodeId| {
            matches!(self.nodes[id].op, Op::Pad(_)) && users[id].iter().all(|user| (first..=last).contains(user))
        };
        let paddings = (1..first.index()).rev().take_while(|&id| is_own(NodeId::new(id))).count();
        first = NodeId::new(first.index() - paddings);
        let input = self.nodes[first].inputs.first().copied().unwrap_or(first);
        let segment = Segment { input, nodes: (first..=last).into() };
        self.check_segment(&segment)?;
        Ok(segment)
    }

    /// The names that [`segment`](Self::segment) finds it by. An activation at the end is left out: surgery may remove it.
    pub fn segment_ends(&self, segment: &Segment) -> SegmentEnds {
        let plain = |id: &NodeId| !matches!(self.nodes[*id].op, Op::Activation(_));
        let last = segment.nodes.iter().rev().find(plain).unwrap_or(segment.output());
        SegmentEnds { first: self.nodes[segment.nodes.start].name.clone(), last: self.nodes[last].name.clone() }
    }

    /// What to call a segment: the block it is, or its first and last part with a plus; a part is a block that begins or
    /// ends with the segment, else a node.
    pub fn segment_name(&self, segment: &Segment) -> String {
        let start = segment.nodes.start;
        let rest_is_activation =
            |nodes: NodeRange| self.nodes[nodes].iter().all(|node| matches!(node.op, Op::Activation(_)));
        let first = self.blocks.iter().find(|b| b.nodes.start == start && !b.nodes.is_empty());
        let first = first.map_or(&self.nodes[start].name, |b| &b.name);
        let output = segment.output();
        let last = self
            .blocks
            .iter()
            .find(|b| b.nodes.contains(&output) && rest_is_activation((output.next()..b.nodes.end).into()));
        let last = last.map_or(&self.nodes[output].name, |b| &b.name);
        if first == last { first.clone() } else { format!("{first}+{last}") }
    }

    /// A segment in messages: `block blocks.2.0` or `segment conv_stem+blocks.0.0`.
    pub fn describe_segment(&self, segment: &Segment) -> String {
        let name = self.segment_name(segment);
        let kind = if self.blocks.iter().any(|b| b.name == name) { "block" } else { "segment" };
        format!("{kind} {name}")
    }

    /// The blocks that a segment holds nodes of, in order.
    pub fn blocks_in(&self, segment: &Segment) -> Vec<BlockId> {
        let meets = |nodes: &NodeRange| nodes.start < segment.nodes.end && segment.nodes.start < nodes.end;
        BlockId::all(self.blocks.len()).filter(|&b| meets(&self.blocks[b].nodes)).collect()
    }

    /// Whether a segment is affine in its input, an activation that cannot be switched allowed at its end.
    pub fn is_linear(&self, segment: &Segment) -> bool {
        segment.nodes.iter().all(|id| match self.nodes[id].op {
            Op::Conv(_) | Op::BatchNorm(_) | Op::Add | Op::Pad(_) => true,
            Op::Activation(activation) => id == segment.output() && activation.site.is_none(),
            _ => false,
        })
    }

    /// The window from a segment's input to its output as if its activations were not there.
    ///
    /// # Errors
    /// A sum of two values of different strides, or a padding that cuts off more than was padded.
    pub fn span(&self, segment: &Segment) -> Result<Span> {
        let mut spans = HashMap::from([(segment.input, Span::IDENTITY)]);
        for id in segment.nodes.iter() {
            let node = &self.nodes[id];
            let mut inputs = node.inputs.iter().map(|input| spans.get(input).copied().unwrap_or(Span::IDENTITY));
            let first = inputs.next().unwrap_or(Span::IDENTITY);
            let joined = inputs.try_fold(first, Span::join);
            let span = joined.ok_or_else(|| Error::Graph(format!("{} adds values of different strides", node.name)))?;
            let span = match node.op {
                Op::Conv(conv) => span.then(conv.window),
                Op::Pad(pad) => span
                    .padded(pad)
                    .ok_or_else(|| Error::Graph(format!("{} cuts off more than was padded", node.name)))?,
                _ => span,
            };
            spans.insert(id, span);
        }
        Ok(spans[&segment.output()])
    }

    /// The nodes of a segment from its input to its output, in order: of two values that are added the way goes on through
    /// the one behind more convolutions, of equals through the later.
    pub fn main_chain(&self, segment: &Segment) -> Vec<NodeId> {
        let mut depth = vec![0usize; segment.nodes.end.index()];
        for id in segment.nodes.iter() {
            let node = &self.nodes[id];
            let deepest = node.inputs.iter().map(|&i| depth[i]).max().unwrap_or(0);
            depth[id] = deepest + usize::from(matches!(node.op, Op::Conv(_)));
        }
        let mut chain = Vec::new();
        let mut next = segment.output();
        while segment.nodes.contains(&next) {
            chain.push(next);
            let inputs = self.nodes[next].inputs.iter().copied();
            next = inputs.max_by_key(|&i| (depth[i], i)).expect("a node inside a segment reads something");
        }
        chain.reverse();
        chain
    }

    /// The segment as a graph of its own: its input is the image, its last value the output. Its activations belong to no
    /// site any more, so that each has its own slope, and it has no blocks.
    ///
    /// # Errors
    /// As [`check_segment`](Self::check_segment).
    pub fn cut(&self, segment: &Segment) -> Result<Graph> {
        self.check_segment(segment)?;
        let input = Op::Input(Input { shape: self.shapes()?[segment.input] });
        let mut nodes = vec![Node { name: self.nodes[0].name.clone(), inputs: Vec::new(), op: input }];
        let renumbered = |id: &NodeId| match *id == segment.input {
            true => NodeId::INPUT,
            false => NodeId::new(id.index() - segment.nodes.start.index() + 1),
        };
        nodes.extend(segment.nodes.iter().map(|id| {
            let Node { name, inputs, op } = &self.nodes[id];
            let op = match *op {
                Op::Activation(activation) => Op::Activation(Activation { site: None, ..activation }),
                op => op,
            };
            Node { name: name.clone(), inputs: inputs.iter().map(renumbered).collect(), op }
        }));
        let graph = Graph { name: self.segment_name(segment), nodes, blocks: Vec::new() };
        graph.shapes()?;
        Ok(graph)
    }

    /// All segments that would be one convolution without their activations, by first and then last node: from any
    /// convolution to any value that a batch-norm or a shortcut from within does not go on to complete. A residual lies
    /// whole in a segment, is disjoint from it, or holds it.
    pub fn segments(&self) -> Vec<Segment> {
        let users = self.users();
        let mut segments = Vec::new();
        for start in NodeId::all(self.nodes.len()).skip(1) {
            if !matches!(self.nodes[start].op, Op::Conv(_)) {
                continue;
            }
            let input = self.nodes[start].inputs[0];
            // The last node that reads a value of the segment other than its output.
            let mut read_until = NodeId::INPUT;
            for (end, node) in NodeId::enumerate(&self.nodes).skip(start.index()) {
                let within = |i: &NodeId| *i == input || (start..end).contains(i);
                let affine =
                    matches!(node.op, Op::Conv(_) | Op::BatchNorm(_) | Op::Add | Op::Pad(_) | Op::Activation(_));
                if !affine || !node.inputs.iter().all(within) {
                    break;
                }
                let completes = |user: &NodeId| match self.nodes[*user].op {
                    Op::BatchNorm(_) => true,
                    Op::Add => self.nodes[*user].inputs.iter().all(|i| *i == end || within(i)),
                    _ => false,
                };
                let complete = !matches!(users[end][..], [user] if completes(&user));
                if read_until <= end && complete && !matches!(node.op, Op::Activation(_)) {
                    segments.push(Segment { input, nodes: (start..=end).into() });
                }
                read_until = users[end].iter().copied().fold(read_until, NodeId::max);
            }
        }
        segments
    }
}
