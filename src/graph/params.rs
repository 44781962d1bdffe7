//! The parameters a graph needs: names, shapes and roles, in one fixed order.

use super::node::Graph;
use crate::Result;
use crate::index::NodeId;
use crate::ops::operation::ParamRole;

/// One parameter of a graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamSpec {
    /// Full name, such as `blocks.1.0.conv_dw.weight`.
    pub name: String,
    /// The node it belongs to.
    pub node: NodeId,
    /// What it is.
    pub role: ParamRole,
    /// Dimensions in the engine's layout.
    pub shape: Vec<usize>,
}

impl ParamSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it holds no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Graph {
    /// All parameters in node order; within a node weight, bias, running mean, running variance.
    ///
    /// # Errors
    /// As [`Graph::shapes`].
    pub fn params(&self) -> Result<Vec<ParamSpec>> {
        let shapes = self.shapes()?;
        let mut params = Vec::new();
        for (node, n) in NodeId::enumerate(&self.nodes) {
            let own = n.op.operation().params(shapes[node]).into_iter();
            params.extend(own.map(|param| ParamSpec {
                name: format!("{}.{}", n.name, param.suffix),
                node,
                role: param.role,
                shape: param.shape,
            }));
        }
        Ok(params)
    }
}
