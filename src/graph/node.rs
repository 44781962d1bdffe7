//! Nodes, blocks and the checks that make a graph well formed.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::ops::conv::Conv;
use crate::shape::{Shape, Window};
use crate::{Error, Result};

/// Index of a node, and of the one value it produces.
pub type NodeId = usize;

/// Largest number of elements of one image's activation, 256 MiB in f32: MobileNetV2 takes half as many at 1 024 pixels. A
/// graph can come from a file, so its claims are bounded before anything is allocated, and nothing but a graph's claim
/// stands behind the size of an activation.
const MAX_ACTIVATION: usize = 1 << 26;
/// Largest height and width.
const MAX_SIDE: usize = 1 << 15;
/// Largest number of elements of one parameter; a file must hold them too.
const MAX_ELEMENTS: usize = 1 << 28;
/// Longest name of a graph, a node or a block, in bytes.
const MAX_NAME_BYTES: usize = 512;
/// Largest number of nodes of a graph that comes from a file.
const MAX_NODES: usize = 10_000;

/// Batch normalisation over pixels and images, per channel.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchNorm {
    /// Channels.
    pub channels: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Share of the new batch in the running statistics.
    pub momentum: f32,
}

/// A clamp to `[0, limit]` with a slope outside it: 0 is the plain activation, 1 is the identity
/// (DepthShrinker's removal by slope; `methods.md` 1.3).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Activation {
    /// Upper bound: `Some(6.0)` is ReLU6, `None` is ReLU.
    pub limit: Option<f32>,
    /// The block whose mask switches this activation, if any.
    pub mask: Option<usize>,
    /// Slope outside the bounds while no mask overrides it.
    pub slope: f32,
}

impl Activation {
    /// Plain ReLU6.
    pub const RELU6: Self = Self { limit: Some(6.0), mask: None, slope: 0.0 };
    /// Plain ReLU.
    pub const RELU: Self = Self { limit: None, mask: None, slope: 0.0 };
}

/// A fully connected layer with bias; weights `[c_out, c_in]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linear {
    /// Features in.
    pub c_in: usize,
    /// Features out.
    pub c_out: usize,
}

/// What a node computes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Op {
    /// The image that goes in.
    Input {
        /// Its shape.
        shape: Shape,
    },
    /// Convolution.
    Conv(Conv),
    /// Batch normalisation.
    BatchNorm(BatchNorm),
    /// ReLU-like activation.
    Activation(Activation),
    /// Sum of two values of one shape.
    Add,
    /// Mean over all pixels.
    GlobalAvgPool,
    /// Largest value of a window per channel; padding is −∞, so it never wins.
    MaxPool {
        /// Kernel, stride and padding; the padding is smaller than the kernel.
        window: Window,
    },
    /// Fully connected layer.
    Linear(Linear),
    /// Zeroes features with probability `p` while training, scaling the rest.
    Dropout {
        /// Probability of a zero.
        p: f32,
    },
}

/// One operation and where its inputs come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Unique name; parameters are called `<name>.weight` and so on, as timm calls them.
    pub name: String,
    /// Values it reads; every one is produced earlier.
    pub inputs: Vec<NodeId>,
    /// What it computes.
    #[serde(flatten)]
    pub op: Op,
}

/// What has happened to a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockState {
    /// Its activations are in place.
    Active,
    /// Its inner activations are gone; it is linear up to a final activation.
    Linear,
    /// It is one convolution.
    Merged,
}

/// A run of nodes with one entry and one exit that can be made linear and then merged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Block {
    /// Prefix of its nodes' names.
    pub name: String,
    /// The value it reads.
    pub input: NodeId,
    /// Its nodes, in order; the last produces its output.
    pub nodes: Range<NodeId>,
    /// What has happened to it.
    pub state: BlockState,
}

impl Block {
    /// The value that leaves the block.
    pub fn output(&self) -> NodeId {
        self.nodes.end - 1
    }
}

/// A network: nodes in topological order, the first the input, the last the logits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Graph {
    /// The network's name, such as `mobilenetv2-0.5`.
    pub name: String,
    /// All nodes; a node reads only earlier ones.
    pub nodes: Vec<Node>,
    /// The mergeable blocks in network order; an activation's mask is an index into them.
    pub blocks: Vec<Block>,
}

impl Graph {
    /// The shape of the image.
    pub fn input_shape(&self) -> Shape {
        match self.nodes[0].op {
            Op::Input { shape } => shape,
            _ => unreachable!("checked when the graph was made: node 0 is the input"),
        }
    }

    /// The node whose value is the logits.
    pub fn output(&self) -> NodeId {
        self.nodes.len() - 1
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        match self.nodes[self.output()].op {
            Op::Linear(linear) => linear.c_out,
            _ => unreachable!("checked when the graph was made: the last node is linear"),
        }
    }

    /// The nodes that read each value.
    pub fn users(&self) -> Vec<Vec<NodeId>> {
        let mut users = vec![Vec::new(); self.nodes.len()];
        for (id, node) in self.nodes.iter().enumerate() {
            for &input in &node.inputs {
                users[input].push(id);
            }
        }
        users
    }

    /// One flag per block: whether its activations stay.
    pub fn kept(&self) -> Vec<bool> {
        self.blocks.iter().map(|b| b.state == BlockState::Active).collect()
    }

    /// Checks the graph and returns the shape of every value.
    ///
    /// # Errors
    /// Names the first node that reads a later value, has the wrong number of inputs, or does not fit its input; a
    /// graph from a file is never trusted further than this check.
    pub fn shapes(&self) -> Result<Vec<Shape>> {
        if self.nodes.len() > MAX_NODES {
            return Err(Error::Graph(format!("{} nodes, more than the limit of {MAX_NODES}", self.nodes.len())));
        }
        let names = self.nodes.iter().map(|n| &n.name).chain(self.blocks.iter().map(|b| &b.name)).chain([&self.name]);
        for name in names {
            if name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
                let start: String = name.escape_debug().take(40).collect();
                return Err(Error::Graph(format!(
                    "the name {start}… has {} bytes or control characters; names are one line of up to {MAX_NAME_BYTES}",
                    name.len()
                )));
            }
        }
        let mut shapes: Vec<Shape> = Vec::with_capacity(self.nodes.len());
        let mut names = std::collections::HashSet::new();
        for (id, node) in self.nodes.iter().enumerate() {
            if !names.insert(node.name.as_str()) {
                return Err(Error::Graph(format!("two nodes are called {}", node.name)));
            }
            if let Some(&late) = node.inputs.iter().find(|&&i| i >= id) {
                return Err(Error::Graph(format!("{} reads node {late}, which does not come before it", node.name)));
            }
            let expected = match node.op {
                Op::Input { .. } => 0,
                Op::Add => 2,
                _ => 1,
            };
            if node.inputs.len() != expected || (expected == 0) != (id == 0) {
                let got = node.inputs.len();
                return Err(Error::Graph(format!("{} has {got} inputs, its operation takes {expected}", node.name)));
            }
            let inputs: Vec<Shape> = node.inputs.iter().map(|&i| shapes[i]).collect();
            let shape = node.op.output_shape(&node.name, &inputs)?;
            let elements = shape.h.checked_mul(shape.w).and_then(|p| p.checked_mul(shape.c)).unwrap_or(usize::MAX);
            if elements == 0 || elements > MAX_ACTIVATION || shape.h.max(shape.w) > MAX_SIDE {
                return Err(Error::Graph(format!(
                    "{} has the unusable shape {shape}; an image has 1 to {MAX_ACTIVATION} numbers and at most {MAX_SIDE} \
                     rows and columns everywhere",
                    node.name
                )));
            }
            shapes.push(shape);
        }
        if self.nodes.len() < 2 || !matches!(self.nodes[self.nodes.len() - 1].op, Op::Linear(_)) {
            return Err(Error::Graph("the last node must be a linear layer that gives the logits".into()));
        }
        self.check_blocks()?;
        Ok(shapes)
    }

    /// Blocks lie in order, do not overlap, and have one entry and one exit.
    fn check_blocks(&self) -> Result<()> {
        let mut end = 1;
        let users = self.users();
        for block in &self.blocks {
            let Range { start, end: block_end } = block.nodes;
            if start < end || block_end <= start || block_end >= self.nodes.len() || block.input >= start {
                return Err(Error::Graph(format!("block {} does not lie in order within the graph", block.name)));
            }
            for id in block.nodes.clone() {
                let enters = self.nodes[id].inputs.iter().any(|&i| i != block.input && !block.nodes.contains(&i));
                let leaves = id != block.output() && users[id].iter().any(|u| !block.nodes.contains(u));
                if enters || leaves {
                    let node = &self.nodes[id].name;
                    return Err(Error::Graph(format!("block {} has a second entry or exit at {node}", block.name)));
                }
            }
            end = block_end;
        }
        for node in &self.nodes {
            if let Op::Activation(Activation { mask: Some(mask), .. }) = node.op
                && mask >= self.blocks.len()
            {
                return Err(Error::Graph(format!("{} has mask {mask}, which is no block", node.name)));
            }
        }
        Ok(())
    }
}

/// Whether a window, which may come from a file, is one that networks have.
fn is_sane(Window { k_h, k_w, stride_h, stride_w, pad }: Window) -> bool {
    [k_h, k_w, stride_h, stride_w].iter().all(|v| (1..=1024).contains(v))
        && [pad.top, pad.left, pad.bottom, pad.right].iter().all(|&v| v <= 1024)
}

fn too_small(window: Window) -> String {
    format!("at least {}x{} with padding", window.k_h, window.k_w)
}

impl Op {
    fn output_shape(&self, name: &str, inputs: &[Shape]) -> Result<Shape> {
        let mismatch = |expected: String, got: String| Err(Error::shape(name, expected, got));
        let bad = |what: &str| Err(Error::Graph(format!("{name}: {what}")));
        match *self {
            Op::Input { shape } => Ok(shape),
            Op::Conv(conv) => {
                let Conv { c_in, c_out, window, groups, .. } = conv;
                if groups == 0 || c_in == 0 || c_out == 0 || c_in % groups != 0 || c_out % groups != 0 {
                    return bad("channels must be multiples of the groups, all above 0");
                }
                if !is_sane(window) {
                    return bad("kernel, stride and padding must lie in 1..=1024 (padding from 0)");
                }
                let weights = (c_in / groups).checked_mul(c_out).and_then(|n| n.checked_mul(window.taps()));
                if weights.is_none_or(|n| n > MAX_ELEMENTS) {
                    return bad("the weights are unreasonably large");
                }
                if inputs[0].c != c_in {
                    return mismatch(format!("{c_in} channels"), inputs[0].to_string());
                }
                match window.output(inputs[0].h, inputs[0].w) {
                    Some((h, w)) => Ok(Shape::new(h, w, c_out)),
                    None => mismatch(too_small(window), inputs[0].to_string()),
                }
            }
            Op::BatchNorm(bn) => {
                if !(bn.eps > 0.0 && bn.eps.is_finite() && bn.momentum > 0.0 && bn.momentum <= 1.0) {
                    return bad("batch-norm needs eps > 0 and momentum in (0, 1]");
                }
                if inputs[0].c != bn.channels {
                    return mismatch(format!("{} channels", bn.channels), inputs[0].to_string());
                }
                Ok(inputs[0])
            }
            Op::Activation(act) => {
                if !(0.0..=1.0).contains(&act.slope) || act.limit.is_some_and(|l| !(l > 0.0 && l.is_finite())) {
                    return bad("an activation needs a slope in 0..=1 and a limit above 0");
                }
                Ok(inputs[0])
            }
            Op::Add if inputs[0] != inputs[1] => mismatch(inputs[0].to_string(), inputs[1].to_string()),
            Op::Dropout { p } if !(0.0..1.0).contains(&p) => bad("dropout needs a probability in 0..1"),
            Op::Add | Op::Dropout { .. } => Ok(inputs[0]),
            Op::GlobalAvgPool => Ok(Shape::new(1, 1, inputs[0].c)),
            Op::MaxPool { window } => {
                let Window { k_h, k_w, pad, .. } = window;
                if !is_sane(window) || pad.top.max(pad.bottom) >= k_h || pad.left.max(pad.right) >= k_w {
                    return bad("a pool's kernel and stride must lie in 1..=1024, its padding below the kernel");
                }
                match window.output(inputs[0].h, inputs[0].w) {
                    Some((h, w)) => Ok(Shape::new(h, w, inputs[0].c)),
                    None => mismatch(too_small(window), inputs[0].to_string()),
                }
            }
            Op::Linear(Linear { c_in, c_out }) => {
                if c_in.checked_mul(c_out).is_none_or(|n| n > MAX_ELEMENTS) {
                    return bad("the weights are unreasonably large");
                }
                if inputs[0] != Shape::new(1, 1, c_in) {
                    return mismatch(format!("1x1x{c_in}"), inputs[0].to_string());
                }
                Ok(Shape::new(1, 1, c_out))
            }
        }
    }
}
