//! A network as data: nodes in topological order, the blocks that can be made shallow, shapes and costs.
//!
//! Everything reads this one graph: training, mask search, merging, cost models, export and benchmarks.

mod builder;
mod cost;
mod display;
mod node;
mod params;
mod rewrite;

pub use builder::GraphBuilder;
pub use cost::{Cost, NodeCost};
// A node holds the operation's own description.
pub use crate::ops::conv::{Bias, Conv, ConvFamily};
pub use node::{Activation, BatchNorm, Block, BlockState, Graph, Linear, Node, NodeId, Op};
pub use params::{ParamRole, ParamSpec};
pub use rewrite::Emitter;
