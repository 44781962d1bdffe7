//! Exact counts: multiply-accumulates, parameters, and the least bytes a node must move.

use super::node::Graph;
use super::segment::Segment;
use crate::Result;
use crate::index::NodeId;

/// What one node costs per image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NodeCost {
    /// Multiply-accumulates of convolutions and linear layers.
    pub macs: u64,
    /// Elements read: the inputs.
    pub reads: u64,
    /// Elements written: the output.
    pub writes: u64,
    /// Parameter elements, running statistics left out (as the field counts them).
    pub params: u64,
}

/// What a whole network costs per image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cost {
    /// One entry per node.
    pub nodes: Vec<NodeCost>,
}

impl Cost {
    /// Multiply-accumulates of convolutions and linear layers per image.
    pub fn macs(&self) -> u64 {
        self.nodes.iter().map(|n| n.macs).sum()
    }

    /// Trained parameters.
    pub fn params(&self) -> u64 {
        self.nodes.iter().map(|n| n.params).sum()
    }

    /// What a segment costs: the sum of its nodes, each of which reads and writes its own values.
    pub fn of(&self, segment: &Segment) -> NodeCost {
        let sum = |of: fn(&NodeCost) -> u64| self.nodes[segment.nodes].iter().map(of).sum();
        NodeCost {
            macs: sum(|n| n.macs),
            reads: sum(|n| n.reads),
            writes: sum(|n| n.writes),
            params: sum(|n| n.params),
        }
    }
}

impl Graph {
    /// Counts the graph.
    ///
    /// # Errors
    /// As [`Graph::shapes`].
    pub fn cost(&self) -> Result<Cost> {
        let shapes = self.shapes()?;
        let mut nodes = vec![NodeCost::default(); self.nodes.len()];
        for (id, node) in NodeId::enumerate(&self.nodes) {
            let macs = node.op.operation().macs(shapes[id]);
            let reads = node.inputs.iter().map(|&i| shapes[i].len() as u64).sum();
            nodes[id] = NodeCost { macs, reads, writes: shapes[id].len() as u64, params: 0 };
        }
        for param in self.params()? {
            if param.role.is_trained() {
                nodes[param.node].params += param.len() as u64;
            }
        }
        Ok(Cost { nodes })
    }
}
