//! A network as data: nodes in topological order, the blocks that can be made shallow, shapes and costs.
//!
//! Everything reads this one graph: training, mask search, merging, cost models, export and benchmarks.

mod batch_norm_fold;
mod builder;
mod channels;
mod cost;
mod counterpart;
mod display;
mod file;
mod node;
mod op;
mod params;
mod position;
mod rewrite;
mod segment;

pub use crate::index::{BlockId, NodeId, NodeRange, ParamId, SiteId};
pub use crate::ops::operation::ParamRole;
pub use builder::GraphBuilder;
pub use channels::{ChannelGroup, ChannelGroups};
pub use cost::{Cost, NodeCost};
pub use counterpart::Counterpart;
pub use node::{Block, BlockState, Graph, Node};
pub use op::*;
pub use params::ParamSpec;
pub use position::{BlockInterval, ChainConv, ExtendedSegment, Interval, MergeKey, Positions};
pub use rewrite::Emitter;
pub use segment::{Segment, SegmentEnds, Span, read_padding};
