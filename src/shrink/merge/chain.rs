//! Whether and why a segment is one convolution: a walk over its nodes that looks at shapes only.

use std::collections::BTreeMap;

use crate::graph::{Bias, Conv, Graph, NodeId, Op, Pad, Segment, Span, read_padding};
use crate::shape::{Padding, Shape};
use crate::shrink::padding::PaddingMode;
use crate::{Error, Result};

/// A segment that can be merged exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chain {
    /// The value in front of the final activation: what the merged convolution computes.
    pub output: NodeId,
    /// The activation that stays behind the merged convolution.
    pub final_activation: Option<NodeId>,
    /// Kernel, stride and padding of the merged convolution.
    pub span: Span,
}

impl Chain {
    /// How many numbers the merged convolution has at most: weights, and where a padding may leave one a bias map.
    pub(super) fn params(&self, shapes: &[Shape], segment: &Segment, padding: PaddingMode) -> (usize, usize) {
        let (c_in, output) = (shapes[segment.input].c, shapes[self.output]);
        let [k_h, k_w] = self.span.kernel;
        let maps = padding == PaddingMode::BorderBias && self.span.pad != [0, 0];
        (k_h * k_w * c_in * output.c, if maps { output.len() } else { 0 })
    }
}

/// Checks that a segment is exactly one convolution under `padding`.
///
/// Every value of the segment is affine in its input, so skips and projections fold wherever they start. What
/// cannot be repaired is a convolution that zero-pads values which already span several pixels: the merged
/// convolution would read real data where the original read zeros.
///
/// # Errors
/// Names the segment and the node that stands in the way, and what to do.
pub fn check(graph: &Graph, shapes: &[Shape], segment: &Segment, padding: PaddingMode) -> Result<Chain> {
    graph.check_segment(segment)?;
    let what = graph.describe_segment(segment);
    let refuse = |id: NodeId, why: String| Error::Merge(format!("{what}: {} {why}", graph.nodes[id].name));
    let mut spans = BTreeMap::from([(segment.input, Span::IDENTITY)]);
    let (mut output, mut final_activation, mut convs) = (segment.output(), None, 0);
    for id in segment.nodes.iter() {
        let node = &graph.nodes[id];
        let source = spans[&node.inputs[0]];
        let span = match node.op {
            Op::Conv(conv) => {
                convs += 1;
                let read = read_padding(conv.window, shapes[node.inputs[0]], shapes[id]);
                check_border(&conv, read, source, node.inputs[0] == segment.input, padding)
                    .map_err(|why| refuse(id, why))?;
                if is_cut(read, source, shapes[node.inputs[0]], shapes[segment.input]) {
                    return Err(refuse(id, "pads where rows or columns were cut off; keep this block".into()));
                }
                let span = source.then(conv.window);
                let channels = shapes[segment.input].c * conv.c_out;
                check_size(span, channels).map_err(|why| refuse(id, why))?;
                span
            }
            Op::BatchNorm(_) => source,
            Op::Pad(pad) => {
                moved(pad, source, node.inputs[0] == segment.input).map_err(|why| refuse(id, why.into()))?
            }
            Op::Add => source.join(spans[&node.inputs[1]]).ok_or_else(|| {
                refuse(id, "adds a skip of another stride; such a skip cannot be folded, keep this block".into())
            })?,
            Op::Activation(act) if id == segment.output() && act.site.is_none() => {
                (output, final_activation) = (node.inputs[0], Some(id));
                source
            }
            Op::Activation(_) => {
                let why = "is an activation inside the linear part; remove it, or end before it";
                return Err(refuse(id, why.into()));
            }
            // Whatever is not affine, or not known to be.
            _ => {
                return Err(refuse(id, "is neither convolution, batch-norm nor sum; keep this block".into()));
            }
        };
        spans.insert(id, span);
    }
    if convs == 0 {
        return Err(Error::Merge(format!("{what} holds no convolution; there is nothing to merge")));
    }
    let span = spans[&output];
    let (input, result) = (shapes[segment.input], shapes[output]);
    if span.window(input, result).output(input.h, input.w) != Some((result.h, result.w)) {
        return Err(refuse(output, "is cut off below or to the right, where one convolution would go on".into()));
    }
    Ok(Chain { output, final_activation, span })
}

/// Whether a convolution reads zeros below or to the right where the merged one would read what was cut off.
fn is_cut(read: Padding, source: Span, value: Shape, input: Shape) -> bool {
    let reads = |i: usize, size: usize, of: usize| size.saturating_mul(source.stride[i]) < of + source.pad[i];
    (read.bottom > 0 && reads(0, value.h, input.h)) || (read.right > 0 && reads(1, value.w, input.w))
}

/// The span behind a padding. Zeros around the segment's input are those that the merged convolution reads there; anywhere
/// else they are not what the chain gives beyond the border.
fn moved(pad: Pad, source: Span, is_first: bool) -> std::result::Result<Span, &'static str> {
    if !is_first && [pad.top, pad.left, pad.bottom, pad.right].iter().any(|&amount| amount > 0) {
        return Err("pads inside the linear part; pad what the segment reads instead");
    }
    source.padded(pad).ok_or("cuts off more than was padded before it")
}

/// Whether a merged convolution of this span, with c_in·c_out = `channels`, is of a sane size.
fn check_size(span: Span, channels: usize) -> std::result::Result<(), String> {
    let [k_h, k_w] = span.kernel;
    if !span.is_sane(channels) {
        return Err(format!("would make the merged kernel {k_h}x{k_w}, unreasonably large; keep this block"));
    }
    Ok(())
}

/// Whether the zeros that a convolution reads at the border are the zeros that the merged convolution reads.
fn check_border(
    conv: &Conv,
    read: Padding,
    source: Span,
    is_first: bool,
    padding: PaddingMode,
) -> std::result::Result<(), String> {
    if conv.bias == Bias::Map {
        return Err("has a bias per position and is the result of a merge; merge the unmerged model instead".into());
    }
    let [k_h, k_w] = source.kernel;
    let pads_real_data = (read.top + read.bottom > 0 && k_h > 1) || (read.left + read.right > 0 && k_w > 1);
    if padding == PaddingMode::Reorder && read != Padding::ZERO && !is_first {
        let other = if pads_real_data { "" } else { ", or merge with --padding border-bias" };
        return Err(format!("pads behind the block's first convolution; finetune with --padding reorder{other}"));
    }
    if pads_real_data {
        return Err(format!(
            "zero-pads values that span {k_h}x{k_w} pixels already, which no bias can correct; finetune with --padding \
             reorder or keep this block"
        ));
    }
    Ok(())
}
