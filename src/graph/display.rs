//! A readable printout of a graph, one line a node.

use std::fmt;

use super::node::Graph;
use crate::index::{BlockId, NodeId};

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Ok(shapes), Ok(cost)) = (self.shapes(), self.cost()) else {
            return write!(f, "{} (malformed)", self.name);
        };
        writeln!(f, "{}: {} nodes, {} MACs, {} parameters", self.name, self.nodes.len(), cost.macs(), cost.params())?;
        for (id, node) in NodeId::enumerate(&self.nodes) {
            for (index, block) in BlockId::enumerate(&self.blocks).filter(|(_, b)| b.nodes.start == id) {
                writeln!(f, "  block {} ({:?})", block.name, self.state(index))?;
            }
            let inputs: Vec<String> = node.inputs.iter().map(|i| format!("%{i}")).collect();
            write!(f, "  %{id:<4}{:<28} {:<34}", node.name, format!("{}({})", node.op, inputs.join(", ")))?;
            write!(f, " {:>12}", shapes[id].to_string())?;
            if cost.nodes[id].macs > 0 {
                write!(f, " {:>12} MACs {:>9} params", cost.nodes[id].macs, cost.nodes[id].params)?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
