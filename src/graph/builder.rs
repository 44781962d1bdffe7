//! Builds a graph node by node.

use super::node::{Block, Graph, Node};
use super::op::{Input, Op};
use crate::Result;
use crate::index::{BlockId, NodeId};
use crate::ops::activation::Activation;
use crate::ops::batch_norm::BatchNorm;
use crate::ops::conv::{Bias, Conv};
use crate::ops::linear::Linear;
use crate::shape::{Shape, Window};

/// Appends nodes in order; [`finish`](Self::finish) checks the whole.
///
/// # Examples
/// A depthwise-separable block with its shortcut; its activation is the block's site, so that a mask can free it.
/// ```
/// use depthshrinker::graph::{Activation, BatchNorm, BlockId, BlockState, GraphBuilder, NodeId, Op};
/// use depthshrinker::shape::{Shape, Window};
///
/// let mut b = GraphBuilder::new("tiny", Shape::new(8, 6, 4));
/// let (image, first) = (NodeId::INPUT, b.next_node());
/// let bn = BatchNorm { channels: 4, eps: 1e-5, momentum: 0.1 };
/// let act = Activation { site: Some(b.next_block().site()), ..Activation::RELU6 };
/// let mut x = b.conv_bn(("dw", GraphBuilder::conv(4, 4, Window::square(3, 1, 1), 4)), ("bn1", bn), image);
/// x = b.activation(act, x);
/// x = b.conv_bn(("pw", GraphBuilder::conv(4, 4, Window::square(1, 1, 0), 1)), ("bn2", bn), x);
/// x = b.push("add", Op::Add, &[image, x]);
/// b.block("block", image, first);
/// x = b.push("pool", Op::GlobalAvgPool, &[x]);
/// b.linear("classifier", 4, 10, x);
/// let graph = b.finish()?;
///
/// assert_eq!((graph.classes(), graph.sites()), (10, 1));
/// assert_eq!(graph.state(BlockId::new(0)), BlockState::Active);
/// assert_eq!(graph.cost()?.macs(), 8 * 6 * (9 * 4 + 4 * 4) + 4 * 10);
/// # Ok::<(), depthshrinker::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct GraphBuilder {
    graph: Graph,
}

impl GraphBuilder {
    /// Starts a graph with its input; the input is node 0.
    pub fn new(name: impl Into<String>, input: Shape) -> Self {
        let node = Node { name: "input".into(), inputs: Vec::new(), op: Op::Input(Input { shape: input }) };
        Self { graph: Graph { name: name.into(), nodes: vec![node], blocks: Vec::new() } }
    }

    /// Appends any node.
    pub fn push(&mut self, name: impl Into<String>, op: Op, inputs: &[NodeId]) -> NodeId {
        let id = self.next_node();
        self.graph.nodes.push(Node { name: name.into(), inputs: inputs.to_vec(), op });
        id
    }

    /// Appends a convolution without bias followed by batch-norm.
    pub fn conv_bn(&mut self, conv: (&str, Conv), bn: (&str, BatchNorm), x: NodeId) -> NodeId {
        let y = self.push(conv.0, Op::Conv(conv.1), &[x]);
        self.push(bn.0, Op::BatchNorm(bn.1), &[y])
    }

    /// A convolution without bias, to be handed to [`conv_bn`](Self::conv_bn) or [`push`](Self::push).
    pub fn conv(c_in: usize, c_out: usize, window: Window, groups: usize) -> Conv {
        Conv { c_in, c_out, window, groups, bias: Bias::None }
    }

    /// Appends an activation named after the node it follows.
    pub fn activation(&mut self, activation: Activation, x: NodeId) -> NodeId {
        let name = format!("{}.act", self.graph.nodes[x].name);
        self.push(name, Op::Activation(activation), &[x])
    }

    /// Appends a linear layer.
    pub fn linear(&mut self, name: &str, c_in: usize, c_out: usize, x: NodeId) -> NodeId {
        self.push(name, Op::Linear(Linear { c_in, c_out }), &[x])
    }

    /// The index the next block will have: its activations take its site.
    pub fn next_block(&self) -> BlockId {
        BlockId::new(self.graph.blocks.len())
    }

    /// The id the next node will have.
    pub fn next_node(&self) -> NodeId {
        NodeId::new(self.graph.nodes.len())
    }

    /// Declares the nodes from `first` to the latest one a block that reads `input`.
    pub fn block(&mut self, name: impl Into<String>, input: NodeId, first: NodeId) {
        let nodes = (first..self.next_node()).into();
        self.graph.blocks.push(Block { name: name.into(), input, nodes });
    }

    /// The finished graph.
    ///
    /// # Errors
    /// As [`Graph::shapes`].
    pub fn finish(self) -> Result<Graph> {
        self.graph.shapes()?;
        Ok(self.graph)
    }
}
