//! Rewriting a graph node by node, carrying the blocks along.

use super::node::{Block, Graph, Node};
use super::op::Op;
use crate::Result;
use crate::index::NodeId;

/// Collects the nodes of the new graph while the old one is walked.
#[derive(Debug)]
pub struct Emitter {
    nodes: Vec<Node>,
    map: Vec<NodeId>,
}

impl Emitter {
    /// The new id of an old value that was walked already.
    pub fn value(&self, old: NodeId) -> NodeId {
        self.map[old]
    }

    /// Copies an old node, its inputs taken from the new graph.
    pub fn copy(&mut self, node: &Node) -> NodeId {
        let inputs = node.inputs.iter().map(|&i| self.map[i]).collect();
        self.push(Node { inputs, ..node.clone() })
    }

    /// Changes what a new node computes and returns its id.
    pub fn set_op(&mut self, id: NodeId, op: Op) -> NodeId {
        self.nodes[id].op = op;
        id
    }

    /// Appends a node whose inputs are ids of the new graph.
    pub fn push(&mut self, node: Node) -> NodeId {
        let id = self.next();
        self.nodes.push(node);
        id
    }

    /// The id that the next new node will have.
    fn next(&self) -> NodeId {
        NodeId::new(self.nodes.len())
    }
}

impl Graph {
    /// Walks the nodes in order; `emit` appends what each becomes and returns the id that now stands for its value.
    /// A block keeps the nodes emitted for its old nodes.
    ///
    /// # Errors
    /// What `emit` returns, or [`Graph::shapes`] of the result.
    pub fn rewrite(&self, emit: impl FnMut(NodeId, &Node, &mut Emitter) -> Result<NodeId>) -> Result<Graph> {
        self.rewrite_with_map(emit).map(|(graph, _)| graph)
    }

    /// As [`rewrite`](Self::rewrite), with the new id of every old value.
    ///
    /// # Errors
    /// As [`rewrite`](Self::rewrite).
    pub fn rewrite_with_map(
        &self,
        mut emit: impl FnMut(NodeId, &Node, &mut Emitter) -> Result<NodeId>,
    ) -> Result<(Graph, Vec<NodeId>)> {
        let mut emitter = Emitter { nodes: Vec::new(), map: Vec::new() };
        let mut starts = Vec::with_capacity(self.nodes.len() + 1);
        for (id, node) in NodeId::enumerate(&self.nodes) {
            starts.push(emitter.next());
            let new = emit(id, node, &mut emitter)?;
            emitter.map.push(new);
        }
        starts.push(emitter.next());
        let block = |block: &Block| Block {
            name: block.name.clone(),
            input: emitter.map[block.input],
            nodes: (starts[block.nodes.start]..starts[block.nodes.end]).into(),
        };
        let blocks = self.blocks.iter().map(block).collect();
        let graph = Graph { name: self.name.clone(), nodes: emitter.nodes, blocks };
        graph.shapes()?;
        Ok((graph, emitter.map))
    }
}
