//! The graph as model files have it: every block beside its state, which here follows from its nodes.

use serde::{Deserialize, Serialize};

use super::node::{Block, BlockState, Graph, Node};
use crate::index::{BlockId, NodeId, NodeRange};

/// A graph in a file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct GraphFile {
    name: String,
    nodes: Vec<Node>,
    blocks: Vec<BlockFile>,
}

/// A block in a file. Its state is written for whoever reads the file, and left aside here, where it could contradict
/// the nodes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BlockFile {
    name: String,
    input: NodeId,
    nodes: NodeRange,
    #[serde(default = "unknown")]
    state: BlockState,
}

fn unknown() -> BlockState {
    BlockState::Active
}

impl From<Graph> for GraphFile {
    fn from(graph: Graph) -> Self {
        let state = |block: BlockId| match graph.blocks[block].nodes.end.index() <= graph.nodes.len() {
            true => graph.state(block),
            false => unknown(),
        };
        let states: Vec<BlockState> = BlockId::all(graph.blocks.len()).map(state).collect();
        let blocks = graph.blocks.into_iter().zip(states);
        let blocks = blocks.map(|(Block { name, input, nodes }, state)| BlockFile { name, input, nodes, state });
        Self { name: graph.name, nodes: graph.nodes, blocks: blocks.collect() }
    }
}

impl From<GraphFile> for Graph {
    fn from(file: GraphFile) -> Self {
        let blocks = file.blocks.into_iter().map(|BlockFile { name, input, nodes, .. }| Block { name, input, nodes });
        Self { name: file.name, nodes: file.nodes, blocks: blocks.collect() }
    }
}
