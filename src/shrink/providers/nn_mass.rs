//! NN-Mass, the training-free measure of Restructurable Activation Networks (Ghosh et al., arXiv 2208.08562, after Bhardwaj et
//! al., CVPR 2021): m = Σ 2·dim over blocks, dim the channels that a block's shortcut joins. Networks of equal mass are
//! expected to train alike, whatever their depth.
//!
//! Read from the repository: the sum, by which RAN-i scales ConvNeXt in depth and width. Decided here: a freed block is a layer no
//! longer and takes its 2·dim with it; dim is the channels that the block gives; blocks without a shortcut count, too. So
//! within a time the knapsack keeps as much mass as it can.

use super::{Asked, BlockCosts, Done, Provider};
use crate::Result;
use crate::graph::BlockId;

/// What a block adds to the network's mass.
#[derive(Debug, Clone, Copy)]
pub struct NnMass;

impl Provider for NnMass {
    fn costs(&self, asked: &Asked<'_>, done: Done<'_>) -> Result<Option<BlockCosts>> {
        done(1, 1);
        let graph = &asked.model.graph;
        let shapes = graph.shapes()?;
        let mass = |block: BlockId| 2.0 * shapes[graph.blocks[block].output()].c as f64;
        let cost = |(block, &candidate): (BlockId, &bool)| candidate.then(|| mass(block));
        Ok(Some(BlockCosts::new(BlockId::enumerate(asked.candidates).map(cost).collect())))
    }

    fn is_measured(&self) -> bool {
        false
    }
}
