//! Folding one segment: the walk over its nodes that composes their maps.

use std::collections::BTreeMap;

use super::border::Response;
use super::chain::{Chain, check};
use super::compose::{Kernel, Layer};
use crate::graph::{Bias, Conv, NodeId, NodeRange, Op, Segment};
use crate::model::Model;
use crate::shape::Shape;
use crate::shrink::padding::PaddingMode;
use crate::{Error, Result};

/// The one convolution a segment is, in f64.
#[derive(Debug, Clone, PartialEq)]
pub struct Folded {
    /// Its channels, window, groups and kind of bias.
    pub conv: Conv,
    /// Weights in the layout of the convolution's family: depthwise `[k_h, k_w, c]`, pointwise `[c_out, c_in]`, dense
    /// `[c_out, k_h, k_w, c_in]`.
    pub weight: Vec<f64>,
    /// `[c_out]`, or `[h_out, w_out, c_out]` where `conv.bias` is a map.
    pub bias: Vec<f64>,
    /// Shape of its result.
    pub output: Shape,
    /// Which nodes it replaces.
    pub chain: Chain,
}

/// Folds one linear segment of a model into one convolution, in f64 throughout.
///
/// # Errors
/// As [`check`]: where the merge would not be exact.
pub fn fold(model: &Model, segment: &Segment, padding: PaddingMode) -> Result<Folded> {
    let graph = &model.graph;
    let shapes = graph.shapes()?;
    let chain = check(graph, &shapes, segment, padding)?;
    let refuse = |node: &str, why: &str| Error::Merge(format!("{}: {node} {why}", graph.describe_segment(segment)));
    let (users, input) = (graph.users(), shapes[segment.input]);
    let last_user = |id: NodeId| users[id].iter().copied().filter(|u| segment.nodes.contains(u)).max();
    let mut values = BTreeMap::from([(segment.input, (Kernel::identity(input.c), Response::zero(input)))]);
    for id in NodeRange::from(segment.nodes.start..=chain.output).iter() {
        let node = &graph.nodes[id];
        let (kernel, response) = &values[&node.inputs[0]];
        let value = match node.op {
            Op::Conv(conv) => {
                let layer = layer(model, &node.name, conv);
                (kernel.then(&layer), response.then(&layer))
            }
            Op::BatchNorm(bn) => {
                let (factors, shifts) = model.batch_norm_affine(&node.name, bn);
                let (mut kernel, mut response) = (kernel.clone(), response.clone());
                kernel.scale(&factors);
                response.scale_shift(&factors, &shifts);
                (kernel, response)
            }
            Op::Pad(pad) => {
                let moved = kernel.padded(pad).ok_or_else(|| refuse(&node.name, "cuts off more than was padded"))?;
                (moved, response.padded(pad))
            }
            Op::Add => {
                let (other, other_response) = &values[&node.inputs[1]];
                let sum = kernel.plus(other).ok_or_else(|| refuse(&node.name, "adds values that do not align"))?;
                (sum, response.plus(other_response))
            }
            _ => return Err(refuse(&node.name, "is not linear")),
        };
        values.retain(|&v, _| last_user(v).is_some_and(|u| u > id));
        values.insert(id, value);
    }
    let (kernel, response) = &values[&chain.output];
    let output = shapes[chain.output];
    let (bias, data) = match response.uniform() {
        Some(channel) => (Bias::Channel, channel.to_vec()),
        None => (Bias::Map, response.map()),
    };
    let window = chain.span.window(input, output);
    let conv = Conv { c_in: kernel.c_in, c_out: kernel.c_out, window, groups: kernel.groups(), bias };
    Ok(Folded { conv, weight: kernel.weight(), bias: data, output, chain })
}

fn layer(model: &Model, name: &str, conv: Conv) -> Layer {
    let wide = |name: String| model.weight(&name).data.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    let bias = match conv.bias {
        Bias::Channel => wide(format!("{name}.bias")),
        Bias::None | Bias::Map => vec![0.0; conv.c_out],
    };
    Layer { conv, weight: wide(format!("{name}.weight")), bias }
}
