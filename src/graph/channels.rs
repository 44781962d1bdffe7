//! Which channels of a network belong together: those that a sum, a batch-norm or a depthwise convolution ties to one another can
//! only be taken away together.

use super::node::{Block, Graph};
use super::op::{ConvFamily, Op};
use crate::index::NodeId;
use crate::{Error, Result};

/// Channels that belong together, under one number each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelGroup {
    /// The first node that gives them, a convolution where they can be changed: surgery keeps names.
    pub name: String,
    /// How many.
    pub channels: usize,
    /// The nodes whose values have them, in network order.
    pub values: Vec<NodeId>,
    /// Whether their number follows from something else: the image, the classes, groups of a convolution, or a layer that reads
    /// them pixel by pixel.
    pub is_fixed: bool,
}

/// The groups of a network, in the order of their first values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelGroups {
    groups: Vec<ChannelGroup>,
    of: Vec<usize>,
}

impl ChannelGroups {
    /// The groups of a graph.
    ///
    /// # Errors
    /// As [`Graph::shapes`].
    pub fn new(graph: &Graph) -> Result<Self> {
        let shapes = graph.shapes()?;
        // Every value points to an earlier one with the same channels, or to itself.
        let mut first: Vec<NodeId> = NodeId::all(graph.nodes.len()).collect();
        let mut fixed = vec![false; graph.nodes.len()];
        let root = |first: &[NodeId], mut at: NodeId| {
            while first[at] != at {
                at = first[at];
            }
            at
        };
        for (id, node) in NodeId::enumerate(&graph.nodes) {
            match node.op {
                Op::Input(_) => fixed[id] = true,
                Op::Linear(_) => {
                    let read = node.inputs[0];
                    fixed[id] = true;
                    fixed[read] |= (shapes[read].h, shapes[read].w) != (1, 1);
                }
                Op::Conv(conv) if conv.family() != ConvFamily::Depthwise => {
                    fixed[id] |= conv.groups > 1;
                    fixed[node.inputs[0]] |= conv.groups > 1;
                }
                _ => {
                    for &input in &node.inputs {
                        let (a, b) = (root(&first, input), root(&first, id));
                        first[a.max(b)] = a.min(b);
                    }
                }
            }
        }
        fixed[graph.output()] = true;
        let mut groups: Vec<ChannelGroup> = Vec::new();
        let mut of = vec![0; graph.nodes.len()];
        for (id, node) in NodeId::enumerate(&graph.nodes) {
            let own = root(&first, id);
            if own == id {
                of[id.index()] = groups.len();
                let (name, channels) = (node.name.clone(), shapes[id].c);
                groups.push(ChannelGroup { name, channels, values: Vec::new(), is_fixed: false });
            }
            of[id.index()] = of[own.index()];
            let group = &mut groups[of[id.index()]];
            group.values.push(id);
            group.is_fixed |= fixed[id];
        }
        Ok(Self { groups, of })
    }

    /// All groups.
    pub fn groups(&self) -> &[ChannelGroup] {
        &self.groups
    }

    /// The index of the group that a node's value has.
    pub fn of(&self, node: NodeId) -> usize {
        self.of[node.index()]
    }

    /// The index of the group whose first node has this name.
    ///
    /// # Errors
    /// No such group, or one whose channels are fixed.
    pub fn find(&self, network: &str, name: &str) -> Result<usize> {
        match self.groups.iter().position(|group| group.name == name) {
            Some(index) if !self.groups[index].is_fixed => Ok(index),
            Some(_) => Err(Error::Graph(format!("the channels of {name} in {network} cannot be changed"))),
            None => Err(Error::Graph(format!(
                "{network} has no channels that begin with {name}; name the first convolution that gives them"
            ))),
        }
    }

    /// The block within which all values of a group lie, other than what the block gives: its hidden channels.
    pub fn hidden_in<'a>(&self, graph: &'a Graph, group: usize) -> Option<&'a Block> {
        let values = &self.groups[group].values;
        let holds = |block: &&Block| values.iter().all(|value| block.nodes.contains(value));
        graph.blocks.iter().find(holds).filter(|block| self.of(block.output()) != group)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Activation, BatchNorm, GraphBuilder};
    use crate::shape::{Shape, Window};

    #[test]
    fn sums_batch_norms_and_depthwise_convolutions_tie_channels() {
        let mut b = GraphBuilder::new("n", Shape::new(8, 8, 3));
        let norm = |channels| BatchNorm { channels, eps: 1e-5, momentum: 0.1 };
        let conv = |c_in, c_out, groups| GraphBuilder::conv(c_in, c_out, Window::square(3, 1, 1), groups);
        let stem = b.conv_bn(("stem", conv(3, 8, 1)), ("stem_bn", norm(8)), NodeId::INPUT);
        let first = b.next_node();
        let hidden = b.conv_bn(("a", conv(8, 16, 1)), ("a_bn", norm(16)), stem);
        let hidden = b.activation(Activation::RELU6, hidden);
        let hidden = b.conv_bn(("dw", conv(16, 16, 16)), ("dw_bn", norm(16)), hidden);
        let out = b.conv_bn(("p", conv(16, 8, 1)), ("p_bn", norm(8)), hidden);
        let sum = b.push("add", Op::Add, &[stem, out]);
        b.block("block", stem, first);
        let grouped = b.conv_bn(("g", conv(8, 12, 4)), ("g_bn", norm(12)), sum);
        let wide = b.conv_bn(("w", conv(12, 20, 1)), ("w_bn", norm(20)), grouped);
        let pool = b.push("pool", Op::GlobalAvgPool, &[wide]);
        b.linear("fc", 20, 5, pool);
        let graph = b.finish().unwrap();
        let groups = ChannelGroups::new(&graph).unwrap();
        let told: Vec<_> = groups.groups().iter().map(|g| (g.name.as_str(), g.channels, g.is_fixed)).collect();
        let expected = [
            ("input", 3, true),
            // A convolution in four groups reads it.
            ("stem", 8, true),
            ("a", 16, false),
            ("g", 12, true),
            ("w", 20, false),
            ("fc", 5, true),
        ];
        assert_eq!(told, expected);
        assert_eq!(groups.hidden_in(&graph, 2).unwrap().name, "block");
        assert!([1, 4].iter().all(|group| groups.hidden_in(&graph, *group).is_none()));
        assert!(groups.find("n", "stem").unwrap_err().to_string().contains("cannot be changed"));
        assert!(groups.find("n", "dw").unwrap_err().to_string().contains("no channels that begin with dw"));
    }
}
