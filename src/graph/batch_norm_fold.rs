//! Which batch-norms disappear into a convolution at inference: one rule for networks with weights and without.

use super::node::Graph;
use super::op::Op;
use crate::Result;
use crate::index::NodeId;
use crate::ops::conv::{Bias, Conv};

impl Graph {
    /// For each node the batch-norm that folds into it: the sole reader of a convolution without a bias per position.
    pub fn batch_norm_folds(&self) -> Vec<Option<NodeId>> {
        let users = self.users();
        let fold = |(id, users): (NodeId, &Vec<NodeId>)| match (self.nodes[id].op, &users[..]) {
            (Op::Conv(conv), &[next]) if conv.bias != Bias::Map => {
                matches!(self.nodes[next].op, Op::BatchNorm(_)).then_some(next)
            }
            _ => None,
        };
        NodeId::enumerate(&users).map(fold).collect()
    }

    /// The graph that inference runs, and the new id of every old value: each batch-norm of
    /// [`batch_norm_folds`](Self::batch_norm_folds) leaves a bias per channel behind.
    ///
    /// # Errors
    /// As [`Graph::shapes`].
    pub fn without_batch_norm(&self) -> Result<(Graph, Vec<NodeId>)> {
        let folds = self.batch_norm_folds();
        self.rewrite_with_map(|id, node, out| match node.op {
            Op::Conv(conv) if folds[id].is_some() => {
                let new = out.copy(node);
                Ok(out.set_op(new, Op::Conv(Conv { bias: Bias::Channel, ..conv })))
            }
            Op::BatchNorm(_) if folds[node.inputs[0]] == Some(id) => Ok(out.value(node.inputs[0])),
            _ => Ok(out.copy(node)),
        })
    }
}
