//! What DepthShrinker's repository times and counts in place of a merged network (`docs/methods.md` 1.5): it never merges
//! weights, and what it puts in a block's place lacks what the block adds to its convolution.

use super::mask::fits;
use crate::graph::{Block, Conv, ConvFamily, Graph, GraphBuilder, Node, Op};
use crate::ops::conv::Conv as Convolution;
use crate::{Error, Result};

/// The network that is timed there for a mask: a freed inverted residual is one dense convolution with the depthwise one's
/// kernel and stride, without bias, batch-norm, residual and final activation; a freed block without expansion, and a site
/// outside of blocks, only lose their activations. It computes another function than the merged network: its time and its
/// counts are all that it is for.
///
/// # Errors
/// A mask of another length, or a freed block that is no inverted residual.
pub fn simulated_merge(graph: &Graph, kept: &[bool]) -> Result<Graph> {
    if !fits(kept, graph) {
        let (got, blocks) = (kept.len(), graph.blocks.len());
        return Err(Error::Merge(format!("the mask has {got} entries, {} has {blocks} blocks", graph.name)));
    }
    let freed = |site: usize| kept.get(site) == Some(&false);
    let mut replaced = Vec::new();
    for (index, block) in graph.blocks.iter().enumerate().filter(|(index, _)| freed(*index)) {
        if let Some(conv) = replacement(graph, block)? {
            replaced.push((&graph.blocks[index], conv));
        }
    }
    graph.rewrite(|id, node, out| {
        if let Some((block, conv)) = replaced.iter().find(|(block, _)| block.nodes.contains(&id)) {
            let input = out.value(block.input);
            return Ok(match id == block.output() {
                true => out.push(Node { name: block.name.clone(), inputs: vec![input], op: Op::Conv(*conv) }),
                // Nothing is left that reads it.
                false => input,
            });
        }
        match node.site() {
            Some(site) if freed(site.index()) => Ok(out.value(node.inputs[0])),
            _ => Ok(out.copy(node)),
        }
    })
}

/// The convolution in a freed block's place; `None` where the block has no expansion and stays.
fn replacement(graph: &Graph, block: &Block) -> Result<Option<Conv>> {
    let convs: Vec<Conv> = graph.nodes[block.nodes]
        .iter()
        .filter_map(|node| match node.op {
            Op::Conv(conv) => Some(conv),
            _ => None,
        })
        .collect();
    let families: Vec<ConvFamily> = convs.iter().map(Convolution::family).collect();
    match (families.as_slice(), convs.as_slice()) {
        ([ConvFamily::Pointwise, ConvFamily::Depthwise, ConvFamily::Pointwise], [expand, depthwise, project]) => {
            Ok(Some(GraphBuilder::conv(expand.c_in, project.c_out, depthwise.window, 1)))
        }
        ([ConvFamily::Depthwise, ConvFamily::Pointwise], _) => Ok(None),
        _ => Err(Error::Merge(format!(
            "block {} is no inverted residual, and DepthShrinker's repository simulates the merge of no other",
            block.name
        ))),
    }
}

/// Operations per image as that repository counts them: multiply-accumulates, five for each element that a batch-norm
/// writes, and one for each that the pool at the end reads. Its published figures are millions, rounded down.
///
/// # Errors
/// As [`Graph::shapes`].
pub fn counted_operations(graph: &Graph) -> Result<u64> {
    let shapes = graph.shapes()?;
    let elements = graph.nodes.iter().map(|node| match node.op {
        Op::BatchNorm(_) => 5 * shapes[node.inputs[0]].len() as u64,
        Op::GlobalAvgPool => shapes[node.inputs[0]].len() as u64,
        _ => 0,
    });
    Ok(graph.cost()?.macs() + elements.sum::<u64>())
}
