//! What the blocks of a network became in another one that surgery or a merge made of it.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::node::Graph;
use super::op::Op;
use super::segment::Segment;
use crate::index::NodeId;
use crate::{Error, Result};

/// Blocks of one network and the same part of another: one block, or all that a merge took into one segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counterpart {
    /// Indices of the blocks.
    pub blocks: Range<usize>,
    /// What they are in the first network, with what a merge took in besides.
    pub before: Segment,
    /// What that is in the second.
    pub after: Segment,
}

impl Graph {
    /// For every node the node of the same name in `other`, if there is one: surgery keeps the names of what it keeps.
    pub fn map_by_name(&self, other: &Graph) -> Vec<Option<NodeId>> {
        let ids: HashMap<&str, NodeId> = NodeId::enumerate(&other.nodes).map(|(id, n)| (n.name.as_str(), id)).collect();
        self.nodes.iter().map(|node| ids.get(node.name.as_str()).copied()).collect()
    }

    /// Finds the blocks in `other`. `map` has for every node here the one there whose value stands for it; `None` is a
    /// value that is not computed any more. An activation that only `other` has belongs to the part whose value it reads.
    ///
    /// # Errors
    /// A map that does not belong to the two networks.
    pub fn counterparts(&self, other: &Graph, map: &[Option<NodeId>]) -> Result<Vec<Counterpart>> {
        let known = |id: NodeId| id.index() < other.nodes.len();
        if map.len() != self.nodes.len() || map[0] != Some(NodeId::INPUT) || !map.iter().flatten().all(|&id| known(id))
        {
            return Err(Error::Graph(format!(
                "the map from {} to {} belongs to other networks",
                self.name, other.name
            )));
        }
        let (users, other_users) = (self.users(), other.users());
        let images: HashSet<NodeId> = map.iter().copied().flatten().collect();
        // The value with the activation that was put behind it.
        let finished = |mut value: NodeId| {
            while let [user] = other_users[value][..]
                && matches!(other.nodes[user].op, Op::Activation(_))
                && !images.contains(&user)
            {
                value = user;
            }
            value
        };
        let (mut parts, mut first) = (Vec::new(), 0);
        for (index, block) in self.blocks.iter().enumerate() {
            let (mut input, mut start) = (self.blocks[first].input, self.blocks[first].nodes.start);
            let mut output = block.output();
            if map[output].is_none() && index + 1 < self.blocks.len() {
                continue;
            }
            while map[output].is_none()
                && let [user] = users[output][..]
            {
                output = user;
            }
            while map[input].is_none() {
                start = start.min(input);
                input = self.nodes[input].inputs[0];
            }
            let (Some(new_input), Some(new_output)) = (map[input], map[output]) else { continue };
            let (new_input, new_output) = (finished(new_input), finished(new_output));
            let before = Segment { input, nodes: (start..=output).into() };
            let after = Segment { input: new_input, nodes: (new_input.next()..=new_output).into() };
            self.check_segment(&before)?;
            other.check_segment(&after)?;
            parts.push(Counterpart { blocks: first..index + 1, before, after });
            first = index + 1;
        }
        Ok(parts)
    }
}
