//! What merging costs and saves by the roofline: the latency table of a reproducible search.

use super::roofline::{KernelCost, Roofline, kernel_costs};
use crate::Result;
use crate::engine::Pass;
use crate::graph::{BlockId, Graph, Segment};
use crate::ops::step::ComputeUnit;

/// Roofline seconds of one block as it is and as one dense convolution.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockCost {
    /// The block's name.
    pub name: String,
    /// Sum over the block's fused kernels.
    pub before: f64,
    /// The single dense convolution the block would merge into.
    pub after: f64,
}

impl BlockCost {
    /// Seconds saved by merging; negative where the dense convolution is dearer.
    pub fn saving(&self) -> f64 {
        self.before - self.after
    }
}

/// Roofline cost of every block before and after merging. The merged convolution has the window of
/// [`Graph::span`], shortcuts in its centre tap and a bias per channel.
///
/// # Errors
/// As [`Graph::shapes`] and [`Graph::span`].
pub fn block_costs(graph: &Graph, batch: usize, roofline: &Roofline) -> Result<Vec<BlockCost>> {
    let kernels = kernel_costs(graph)?;
    let mut costs = Vec::with_capacity(graph.blocks.len());
    for (id, block) in BlockId::enumerate(&graph.blocks) {
        let own = kernels.iter().filter(|k| k.block == Some(id));
        let before = own.map(|k| roofline.time(k, batch)).sum();
        let after = match block.segment() {
            Some(segment) => roofline.time(&merged_cost(graph, &segment)?, batch),
            None => before,
        };
        costs.push(BlockCost { name: block.name.clone(), before, after });
    }
    Ok(costs)
}

/// The dense convolution that a segment composes to.
///
/// # Errors
/// As [`Graph::shapes`] and [`Graph::span`].
pub fn merged_cost(graph: &Graph, segment: &Segment) -> Result<KernelCost> {
    let shapes = graph.shapes()?;
    let (x, y) = (shapes[segment.input], shapes[segment.output()]);
    let [k_h, k_w] = graph.span(segment)?.kernel;
    let weights = (k_h * k_w * x.c * y.c) as u64;
    Ok(KernelCost {
        name: graph.segment_name(segment),
        kind: format!("conv {k_h}x{k_w}"),
        pass: Pass::Forward,
        nodes: Vec::new(),
        block: None,
        unit: ComputeUnit::Matrix,
        flops: 2 * weights * y.pixels() as u64,
        activations: (x.len() + y.len()) as u64,
        weights,
        floats: y.c as u64,
    })
}
