//! Selections of single layers, as the two-stage dynamic programme and LayerMerge make them (`docs/methods.md` 2.6): which
//! activations go and come at any position, which convolutions are pruned, and what merges, within blocks and over them.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::mask::Mask;
use super::selection::Selection;
use crate::graph::{Activation, ChainConv, Graph, Interval, Node, NodeId, Op, Positions, SegmentEnds};
use crate::model::Model;
use crate::{Error, Result};

/// What happens to single layers, by the names of their nodes: surgery keeps names where it renumbers nodes and positions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Layers {
    /// Activations that go. All others of their blocks stay.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub freed: Vec<String>,
    /// Values behind which an activation comes, such as those of linear bottlenecks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub activated: Vec<String>,
    /// Convolutions in whose place the identity is, that of their batch-norms included.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pruned: Vec<String>,
}

/// What is selected of a network, by positions.
#[derive(Debug, Clone, Copy)]
pub struct LayerChoice<'a> {
    /// Positions behind which there is an activation.
    pub activations: &'a [usize],
    /// Positions between which convolutions become one, both ends of the network included.
    pub boundaries: &'a [usize],
    /// Positions of the convolutions that are pruned.
    pub pruned: &'a [usize],
}

impl LayerChoice<'_> {
    /// The choice by names. A block counts as kept where no activation of it goes.
    ///
    /// # Errors
    /// Boundaries that bound no segment, an activation that lies in no block, or a convolution that the identity cannot
    /// replace.
    pub fn selection(&self, graph: &Graph, positions: &Positions) -> Result<Selection> {
        let name = |node: NodeId| graph.nodes[node].name.clone();
        let (mut layers, mut kept) = (Layers::default(), vec![true; graph.blocks.len()]);
        for (position, conv) in (1..).zip(positions.convs()) {
            if self.pruned.contains(&position) {
                if !conv.is_reducible() {
                    let problem = "changes the channels or has a stride, so the identity cannot take its place";
                    return Err(Error::Config(format!("{} {problem}", name(conv.node))));
                }
                layers.pruned.push(name(conv.node));
            }
            match (conv.activation, self.activations.contains(&position)) {
                (Some(activation), false) => {
                    let block = graph.block_of(activation).ok_or_else(|| {
                        Error::Config(format!("{} lies in no block and cannot be freed", name(activation)))
                    })?;
                    kept[block.index()] = false;
                    layers.freed.push(name(activation));
                }
                (None, true) => layers.activated.push(name(conv.value)),
                _ => {}
            }
        }
        let gone = layers.pruned_nodes(graph);
        let mut segments = Vec::new();
        for ends in self.boundaries.windows(2) {
            segments.extend(self.segment(graph, positions, Interval { st: ends[0], end: ends[1] }, &gone)?);
        }
        Ok(Selection { segments, layers: Some(layers), ..Mask::new(kept).into() })
    }

    /// The ends of a segment by what is left of it; `None` where that is a convolution with its batch-norm, which there is
    /// nothing to merge with.
    fn segment(
        &self,
        graph: &Graph,
        positions: &Positions,
        at: Interval,
        gone: &BTreeSet<NodeId>,
    ) -> Result<Option<SegmentEnds>> {
        let nodes = positions.segment(at).map(|segment| segment.nodes);
        let nodes = nodes.ok_or_else(|| {
            Error::Config(format!("{at} is no segment of {} that can become one convolution", positions.network()))
        })?;
        let is_left = |id: &NodeId| !gone.contains(id) && !matches!(graph.nodes[*id].op, Op::Activation(_));
        let left: Vec<NodeId> = nodes.iter().filter(is_left).collect();
        let counts = |wanted: fn(&Op) -> bool| left.iter().filter(|&&id| wanted(&graph.nodes[id].op)).count();
        let (convs, sums) = (counts(|op| matches!(op, Op::Conv(_))), counts(|op| matches!(op, Op::Add)));
        let name = |id: NodeId| graph.nodes[id].name.clone();
        Ok(match left[..] {
            [first, .., last] if convs + sums > 1 => Some(SegmentEnds { first: name(first), last: name(last) }),
            _ => None,
        })
    }
}

impl Layers {
    /// The graph with the pruned convolutions gone, the new activations there, and as site of a block that is not `kept`
    /// those of its activations that are freed. What is done already stays as it is.
    ///
    /// # Errors
    /// A convolution that the identity cannot replace, or names of another network.
    pub(super) fn applied(&self, graph: &Graph, kept: &[bool]) -> Result<Graph> {
        self.check_names(graph)?;
        let gone = self.pruned_nodes(graph);
        let fallback = graph.nodes.iter().find_map(|node| match node.op {
            Op::Activation(activation) => Some(Activation { site: None, slope: 0.0, ..activation }),
            _ => None,
        });
        let new = fallback.unwrap_or(Activation::RELU6);
        let users = graph.users();
        let activated: BTreeSet<&str> = self.activated.iter().map(String::as_str).collect();
        let is_activated =
            |id: NodeId| matches!(users[id][..], [user] if matches!(graph.nodes[user].op, Op::Activation(_)));
        let shapes = graph.shapes()?;
        graph.rewrite(|id, node, out| {
            let mut value = match node.op {
                _ if gone.contains(&id) => {
                    if shapes[id] != shapes[node.inputs[0]] {
                        let problem = "changes the shape, so the identity cannot take its place";
                        return Err(Error::Config(format!("{} {problem}", node.name)));
                    }
                    out.value(node.inputs[0])
                }
                Op::Activation(activation) => {
                    let block = graph.block_of(id).filter(|block| !kept[block.index()]);
                    let freed = self.freed.contains(&node.name);
                    let site = block.map_or(activation.site, |block| freed.then_some(block.site()));
                    let new = out.copy(node);
                    out.set_op(new, Op::Activation(Activation { site, ..activation }))
                }
                _ => out.copy(node),
            };
            if activated.contains(node.name.as_str()) && !is_activated(id) {
                let name = format!("{}.act", node.name);
                value = out.push(Node { name, inputs: vec![value], op: Op::Activation(new) });
            }
            Ok(value)
        })
    }

    /// The pruned convolutions with the batch-norms that read them.
    fn pruned_nodes(&self, graph: &Graph) -> BTreeSet<NodeId> {
        let names: BTreeSet<&str> = self.pruned.iter().map(String::as_str).collect();
        let mut gone = BTreeSet::new();
        for (id, node) in NodeId::enumerate(&graph.nodes) {
            let is_pruned = matches!(node.op, Op::Conv(_)) && names.contains(node.name.as_str());
            if is_pruned || (matches!(node.op, Op::BatchNorm(_)) && gone.contains(&node.inputs[0])) {
                gone.insert(id);
            }
        }
        gone
    }

    /// Names are those of the network, all of a kind, or those of one in which all of a kind is done.
    fn check_names(&self, graph: &Graph) -> Result<()> {
        let has = |name: &&String| graph.nodes.iter().any(|node| node.name == **name);
        for (what, names) in [("activations", &self.freed), ("values", &self.activated), ("convolutions", &self.pruned)]
        {
            let missing = names.iter().find(|name| !has(name));
            if let Some(missing) = missing.filter(|_| names.iter().any(|name| has(&name))) {
                let problem = "but others of the plan; it is of another network";
                return Err(Error::Merge(format!("{} has no {missing} among its {what}, {problem}", graph.name)));
            }
        }
        Ok(())
    }
}

/// The sums of the magnitudes of each convolution's weights, by position.
pub fn norms(model: &Model, positions: &Positions) -> Vec<f64> {
    let norm = |conv: &ChainConv| {
        let weight = model.weight(&format!("{}.weight", model.graph.nodes[conv.node].name));
        weight.data.iter().map(|&w| f64::from(w).abs()).sum()
    };
    positions.convs().iter().map(norm).collect()
}
