//! Nodes, blocks and the checks that make a graph well formed.

use serde::{Deserialize, Serialize};

use super::file::GraphFile;
use super::op::Op;
use super::segment::Segment;
use crate::index::{BlockId, NodeId, NodeRange, SiteId};
use crate::shape::Shape;
use crate::{Error, Result};

/// Largest number of elements of one image's activation, 256 MiB in f32: MobileNetV2 takes half as many at 1 024 pixels. A
/// graph can come from a file, so its claims are bounded before anything is allocated, and nothing but a graph's claim
/// stands behind the size of an activation.
const MAX_ACTIVATION: usize = 1 << 26;
/// Largest height and width.
const MAX_SIDE: usize = 1 << 15;
/// Longest name of a graph, a node or a block, in bytes.
const MAX_NAME_BYTES: usize = 512;
/// Largest number of nodes of a graph that comes from a file.
const MAX_NODES: usize = 10_000;

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

impl Node {
    /// The site of an activation that can be switched.
    pub fn site(&self) -> Option<SiteId> {
        match self.op {
            Op::Activation(activation) => activation.site,
            _ => None,
        }
    }
}

/// What has happened to a block, as its nodes tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockState {
    /// It has activations that can be switched, or others within that stay.
    Active,
    /// Those activations are gone; it is linear up to a final activation.
    Linear,
    /// It is one convolution, or part of a wider segment that became one.
    Merged,
}

/// A named run of nodes with one entry and one exit whose activations are one site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Prefix of its nodes' names.
    pub name: String,
    /// The value it reads.
    pub input: NodeId,
    /// Its nodes, in order; the last produces its output. Empty where a merge took the block into the segment of a later
    /// one, whose first node stands at this place.
    pub nodes: NodeRange,
}

impl Block {
    /// The value that leaves the block; of an empty block the one that enters it.
    pub fn output(&self) -> NodeId {
        self.nodes.last().unwrap_or(self.input)
    }

    /// The block as a segment; an empty one has none.
    pub fn segment(&self) -> Option<Segment> {
        (!self.nodes.is_empty()).then_some(Segment { input: self.input, nodes: self.nodes })
    }
}

/// A network: nodes in topological order, the first the input, the last the output, of a classifier its logits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "GraphFile", into = "GraphFile")]
pub struct Graph {
    /// The network's name, such as `mobilenetv2-0.5`.
    pub name: String,
    /// All nodes; a node reads only earlier ones.
    pub nodes: Vec<Node>,
    /// The mergeable blocks in network order; block b's activations are site b.
    pub blocks: Vec<Block>,
}

impl Graph {
    /// The shape of the image.
    pub fn input_shape(&self) -> Shape {
        match self.nodes[0].op {
            Op::Input(input) => input.shape,
            _ => unreachable!("checked when the graph was made: node 0 is the input"),
        }
    }

    /// The node whose value is the output.
    pub fn output(&self) -> NodeId {
        NodeId::new(self.nodes.len() - 1)
    }

    /// The shape of the output.
    pub fn output_shape(&self) -> Shape {
        match self.nodes[self.output()].op {
            Op::Linear(linear) => Shape::new(1, 1, linear.c_out),
            _ => *self.shapes().expect("checked when the graph was made").last().expect("a graph has nodes"),
        }
    }

    /// Number of classes: the output's channels. Only a graph that [`check_classifier`](Self::check_classifier) lets
    /// pass has classes.
    pub fn classes(&self) -> usize {
        self.output_shape().c
    }

    /// Refuses a graph whose output is not one number per class, where images are to be classified.
    ///
    /// # Errors
    /// Names the output and its shape.
    pub fn check_classifier(&self) -> Result<()> {
        let shape = self.output_shape();
        if (shape.h, shape.w) == (1, 1) {
            return Ok(());
        }
        let (name, last) = (&self.name, &self.nodes[self.output()].name);
        Err(Error::Graph(format!(
            "{name} classifies nothing: it ends in {last}, {shape}; take a network with a classifier"
        )))
    }

    /// Number of sites: one per block, then those that belong to no block.
    pub fn sites(&self) -> usize {
        let sites = self.nodes.iter().filter_map(Node::site);
        sites.map(|site| site.index() + 1).fold(self.blocks.len(), usize::max)
    }

    /// What has happened to a block: with a switchable activation, or another one that is not its last node, it is active;
    /// without, a single convolution (with its final activation) or no node at all is merged, everything else linear.
    pub fn state(&self, block: BlockId) -> BlockState {
        let nodes = &self.nodes[self.blocks[block].nodes];
        let is_final = |at: usize, node: &Node| at + 1 == nodes.len() && node.site().is_none();
        let stays = |(at, node): (usize, &Node)| matches!(node.op, Op::Activation(_)) && !is_final(at, node);
        if nodes.iter().enumerate().any(stays) {
            return BlockState::Active;
        }
        match nodes {
            [] => BlockState::Merged,
            [conv] | [conv, Node { op: Op::Activation(_), .. }] if matches!(conv.op, Op::Conv(_)) => BlockState::Merged,
            _ => BlockState::Linear,
        }
    }

    /// The index of the block that holds a node.
    pub fn block_of(&self, node: NodeId) -> Option<BlockId> {
        self.blocks.iter().position(|block| block.nodes.contains(&node)).map(BlockId::new)
    }

    /// The nodes that read each value.
    pub fn users(&self) -> Vec<Vec<NodeId>> {
        let mut users = vec![Vec::new(); self.nodes.len()];
        for (id, node) in NodeId::enumerate(&self.nodes) {
            for &input in &node.inputs {
                users[input].push(id);
            }
        }
        users
    }

    /// One flag per block: whether its activations stay.
    pub fn kept(&self) -> Vec<bool> {
        BlockId::all(self.blocks.len()).map(|b| self.state(b) == BlockState::Active).collect()
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
        for (id, node) in NodeId::enumerate(&self.nodes) {
            if !names.insert(node.name.as_str()) {
                return Err(Error::Graph(format!("two nodes are called {}", node.name)));
            }
            if let Some(&late) = node.inputs.iter().find(|&&i| i >= id) {
                return Err(Error::Graph(format!("{} reads node {late}, which does not come before it", node.name)));
            }
            let operation = node.op.operation();
            let expected = operation.arity();
            if node.inputs.len() != expected || (expected == 0) != (id == NodeId::INPUT) {
                let got = node.inputs.len();
                return Err(Error::Graph(format!("{} has {got} inputs, its operation takes {expected}", node.name)));
            }
            let inputs: Vec<Shape> = node.inputs.iter().map(|&i| shapes[i]).collect();
            let shape = operation.output_shape(&node.name, &inputs)?;
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
        if self.nodes.len() < 2 {
            return Err(Error::Graph(format!("{} computes nothing; a graph has a node behind its input", self.name)));
        }
        self.check_blocks()?;
        Ok(shapes)
    }

    /// Blocks lie in order, do not overlap, and have one entry and one exit.
    fn check_blocks(&self) -> Result<()> {
        let mut end = NodeId::INPUT.next();
        let users = self.users();
        for block in &self.blocks {
            let NodeRange { start, end: block_end } = block.nodes;
            if start < end || block_end < start || block_end.index() > self.nodes.len() || block.input >= start {
                return Err(Error::Graph(format!("block {} does not lie in order within the graph", block.name)));
            }
            if let Some(node) = block.segment().and_then(|segment| self.second_way(&segment, &users)) {
                let node = &self.nodes[node].name;
                return Err(Error::Graph(format!("block {} has a second entry or exit at {node}", block.name)));
            }
            end = block_end;
        }
        for node in &self.nodes {
            if let Some(site) = node.site().filter(|site| site.index() >= MAX_NODES) {
                return Err(Error::Graph(format!("{} has mask {site}; there are {MAX_NODES} at most", node.name)));
            }
        }
        Ok(())
    }
}
