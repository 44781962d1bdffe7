//! What a node can compute: the one list of operations.

use serde::{Deserialize, Serialize};

// A node holds the operation's own description.
pub use crate::ops::activation::Activation;
pub use crate::ops::batch_norm::BatchNorm;
pub use crate::ops::conv::{Bias, Conv, ConvFamily};
pub use crate::ops::dropout::Dropout;
pub use crate::ops::linear::Linear;
pub use crate::ops::pad::Pad;
pub use crate::ops::pool::average::AvgPool;
pub use crate::ops::pool::max::MaxPool;

use crate::ops::add::Add;
use crate::ops::operation::{LoweredNode, Operation};
use crate::ops::pool::global::GlobalAvgPool;
use crate::ops::step::Step;
use crate::shape::Shape;
use crate::{Error, Result};

/// What a node computes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Op {
    /// The image that goes in.
    Input(Input),
    /// Convolution.
    Conv(Conv),
    /// Batch normalisation.
    BatchNorm(BatchNorm),
    /// ReLU-like activation.
    Activation(Activation),
    /// Sum of two values of one shape.
    Add,
    /// Mean over all pixels.
    GlobalAvgPool,
    /// Largest value of a window per channel.
    MaxPool(MaxPool),
    /// Mean of a window per channel.
    AvgPool(AvgPool),
    /// Zeros around an image, or a cut of its rim.
    Pad(Pad),
    /// Fully connected layer.
    Linear(Linear),
    /// Dropout.
    Dropout(Dropout),
}

impl Op {
    /// What the operation's own file says of it.
    pub fn operation(&self) -> &dyn Operation {
        match self {
            Self::Input(input) => input,
            Self::Conv(conv) => conv,
            Self::BatchNorm(bn) => bn,
            Self::Activation(act) => act,
            Self::Add => &Add,
            Self::GlobalAvgPool => &GlobalAvgPool,
            Self::MaxPool(pool) => pool,
            Self::AvgPool(pool) => pool,
            Self::Pad(pad) => pad,
            Self::Linear(linear) => linear,
            Self::Dropout(dropout) => dropout,
        }
    }
}

impl std::fmt::Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.operation().describe())
    }
}

/// The image that goes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// Its shape.
    pub shape: Shape,
}

impl Operation for Input {
    fn arity(&self) -> usize {
        0
    }

    fn output_shape(&self, _: &str, _: &[Shape]) -> Result<Shape> {
        Ok(self.shape)
    }

    fn describe(&self) -> String {
        "input".into()
    }

    fn lower(&self, _: &mut dyn LoweredNode) -> Result<Vec<Box<dyn Step>>> {
        Err(Error::Graph("a second input".into()))
    }
}
