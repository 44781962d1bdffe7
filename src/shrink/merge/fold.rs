//! Folding one block: the walk over its nodes that composes their maps.

use std::collections::BTreeMap;

use super::border::Response;
use super::chain::{Chain, check};
use super::compose::{Kernel, Layer};
use crate::graph::{BatchNorm, Bias, Conv, ConvFamily, NodeId, Op};
use crate::model::Model;
use crate::shrink::padding::PaddingMode;
use crate::{Error, Result};

/// The one convolution a block is, in f64.
#[derive(Debug, Clone, PartialEq)]
pub struct Folded {
    /// Its channels, window, groups and kind of bias.
    pub conv: Conv,
    /// Weights in the layout of the convolution's family: depthwise `[k_h, k_w, c]`, pointwise `[c_out, c_in]`, dense
    /// `[c_out, k_h, k_w, c_in]`.
    pub weight: Vec<f64>,
    /// `[c_out]`, or `[h_out, w_out, c_out]` where `conv.bias` is a map.
    pub bias: Vec<f64>,
    /// Output height and width.
    pub size: (usize, usize),
    /// Which nodes it replaces.
    pub chain: Chain,
}

impl Folded {
    /// Dimensions of the weights.
    pub fn weight_shape(&self) -> Vec<usize> {
        let Conv { c_in, c_out, window, groups, .. } = self.conv;
        match self.conv.family() {
            ConvFamily::Depthwise => vec![window.k_h, window.k_w, c_in],
            ConvFamily::Pointwise => vec![c_out, c_in],
            ConvFamily::Dense => vec![c_out, window.k_h, window.k_w, c_in / groups],
        }
    }

    /// The last part of the bias's parameter name.
    pub fn bias_suffix(&self) -> &'static str {
        if self.conv.bias == Bias::Map { "bias_map" } else { "bias" }
    }

    /// Dimensions of the bias.
    pub fn bias_shape(&self) -> Vec<usize> {
        match self.conv.bias {
            Bias::Map => vec![self.size.0, self.size.1, self.conv.c_out],
            _ => vec![self.conv.c_out],
        }
    }
}

/// Folds one linear block of a model into one convolution, in f64 throughout.
///
/// # Errors
/// As [`check`]: where the merge would not be exact. `block` out of range is refused too.
pub fn fold_block(model: &Model, block: usize, padding: PaddingMode) -> Result<Folded> {
    let graph = &model.graph;
    let Some(b) = graph.blocks.get(block) else {
        return Err(Error::Merge(format!("{} has {} blocks, no block {block}", graph.name, graph.blocks.len())));
    };
    let shapes = graph.shapes()?;
    let chain = check(graph, &shapes, block, padding)?;
    let users = graph.users();
    let last_user = |id: NodeId| users[id].iter().copied().filter(|u| b.nodes.contains(u)).max();
    let mut values =
        BTreeMap::from([(b.input, (Kernel::identity(shapes[b.input].c), Response::zero(shapes[b.input])))]);
    for id in b.nodes.start..=chain.output {
        let node = &graph.nodes[id];
        let (kernel, response) = &values[&node.inputs[0]];
        let value = match node.op {
            Op::Conv(conv) => {
                let layer = layer(model, &node.name, conv);
                (kernel.then(&layer), response.then(&layer))
            }
            Op::BatchNorm(bn) => {
                let (factors, shifts) = factors(model, &node.name, bn);
                let (mut kernel, mut response) = (kernel.clone(), response.clone());
                kernel.scale(&factors);
                response.scale_shift(&factors, &shifts);
                (kernel, response)
            }
            Op::Add => {
                let (other, other_response) = &values[&node.inputs[1]];
                let sum = kernel.plus(other).ok_or_else(|| {
                    Error::Merge(format!("block {}: {} adds values that do not align", b.name, node.name))
                })?;
                (sum, response.plus(other_response))
            }
            _ => return Err(Error::Merge(format!("block {}: {} is not linear", b.name, node.name))),
        };
        values.retain(|&v, _| last_user(v).is_some_and(|u| u > id));
        values.insert(id, value);
    }
    let (kernel, response) = &values[&chain.output];
    let (input, output) = (shapes[b.input], shapes[chain.output]);
    let (bias, data) = match response.uniform() {
        Some(channel) => (Bias::Channel, channel.to_vec()),
        None => (Bias::Map, response.map()),
    };
    let window = chain.span.window(input, output);
    let conv = Conv { c_in: kernel.c_in, c_out: kernel.c_out, window, groups: kernel.groups(), bias };
    Ok(Folded { conv, weight: kernel.weight(), bias: data, size: (output.h, output.w), chain })
}

fn layer(model: &Model, name: &str, conv: Conv) -> Layer {
    let wide = |name: String| model.weight(&name).data.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    let bias = match conv.bias {
        Bias::Channel => wide(format!("{name}.bias")),
        Bias::None | Bias::Map => vec![0.0; conv.c_out],
    };
    Layer { conv, weight: wide(format!("{name}.weight")), bias }
}

/// Batch-norm on running statistics as factor a = γ/√(σ² + ε) and shift β − a·μ, with its own ε.
fn factors(model: &Model, name: &str, bn: BatchNorm) -> (Vec<f64>, Vec<f64>) {
    let of = |suffix: &str| model.weight(&format!("{name}.{suffix}")).data.iter().map(|&v| f64::from(v));
    let factors: Vec<f64> =
        of("weight").zip(of("running_var")).map(|(gamma, var)| gamma / (var + f64::from(bn.eps)).sqrt()).collect();
    let shifts = of("bias").zip(of("running_mean")).zip(&factors).map(|((beta, mean), a)| beta - a * mean).collect();
    (factors, shifts)
}
