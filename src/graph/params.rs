//! The parameters a graph needs: names, shapes and roles, in one fixed order.

use super::node::{Graph, NodeId, Op};
use crate::Result;
use crate::ops::conv::{Bias, ConvFamily};

/// What a parameter is, and so how it is laid out, decayed and initialised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParamRole {
    /// Weights of a convolution, in the layout of its family.
    ConvWeight(ConvFamily),
    /// Bias per channel `[c_out]`.
    ConvBias,
    /// Bias per position `[h_out, w_out, c_out]`.
    ConvBiasMap,
    /// Batch-norm's γ.
    BnWeight,
    /// Batch-norm's β.
    BnBias,
    /// Batch-norm's running mean; not trained.
    RunningMean,
    /// Batch-norm's running variance (unbiased); not trained.
    RunningVar,
    /// Weights of a linear layer `[c_out, c_in]`.
    LinearWeight,
    /// Bias of a linear layer `[c_out]`.
    LinearBias,
}

impl ParamRole {
    /// Whether an optimizer changes it.
    pub fn is_trained(self) -> bool {
        !matches!(self, Self::RunningMean | Self::RunningVar)
    }

    /// Whether weight decay applies: weights of convolutions and linear layers, never biases or batch-norm.
    pub fn is_decayed(self) -> bool {
        matches!(self, Self::ConvWeight(_) | Self::LinearWeight)
    }
}

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
        for (node, n) in self.nodes.iter().enumerate() {
            let mut push = |suffix: &str, role, shape| {
                params.push(ParamSpec { name: format!("{}.{suffix}", n.name), node, role, shape })
            };
            match n.op {
                Op::Conv(conv) => {
                    push("weight", ParamRole::ConvWeight(conv.family()), conv.weight_shape());
                    if let Some((suffix, shape)) = conv.bias_param(shapes[node]) {
                        let role = if conv.bias == Bias::Map { ParamRole::ConvBiasMap } else { ParamRole::ConvBias };
                        push(suffix, role, shape);
                    }
                }
                Op::BatchNorm(bn) => {
                    push("weight", ParamRole::BnWeight, vec![bn.channels]);
                    push("bias", ParamRole::BnBias, vec![bn.channels]);
                    push("running_mean", ParamRole::RunningMean, vec![bn.channels]);
                    push("running_var", ParamRole::RunningVar, vec![bn.channels]);
                }
                Op::Linear(linear) => {
                    push("weight", ParamRole::LinearWeight, vec![linear.c_out, linear.c_in]);
                    push("bias", ParamRole::LinearBias, vec![linear.c_out]);
                }
                Op::Input { .. }
                | Op::Activation(_)
                | Op::Add
                | Op::GlobalAvgPool
                | Op::MaxPool { .. }
                | Op::Dropout { .. } => {}
            }
        }
        Ok(params)
    }
}
