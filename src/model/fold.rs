//! Folding batch-norm's running statistics into the convolution before it.

use super::{Model, Weights};
use crate::Result;
use crate::graph::{Bias, ConvFamily, NodeId, Op};
use crate::tensor::Tensor;

impl Model {
    /// The network an inference engine runs: every batch-norm that follows a convolution is folded into it,
    /// W̃ = a·W and b̃ = a·(b − μ) + β with a = γ/√(σ² + ε) (`methods.md` 1.4), computed in f64.
    /// A batch-norm behind anything else stays.
    ///
    /// # Errors
    /// As [`crate::graph::Graph::shapes`].
    pub fn folded(&self) -> Result<Self> {
        self.folded_with_map().map(|(model, _)| model)
    }

    /// As [`folded`](Self::folded), with the new id of every old value.
    ///
    /// # Errors
    /// As [`folded`](Self::folded).
    pub fn folded_with_map(&self) -> Result<(Self, Vec<NodeId>)> {
        let users = self.graph.users();
        let mut weights = self.weights.clone();
        // For each convolution the batch-norm that disappears into it.
        let mut folded_by: Vec<Option<NodeId>> = vec![None; self.graph.nodes.len()];
        for (id, node) in self.graph.nodes.iter().enumerate() {
            if let Op::BatchNorm(bn) = node.op
                && let conv_id = node.inputs[0]
                && let Op::Conv(conv) = self.graph.nodes[conv_id].op
                && users[conv_id].len() == 1
                && conv.bias != Bias::Map
            {
                folded_by[conv_id] = Some(id);
                fold(&mut weights, &self.graph.nodes[conv_id].name, conv.family(), &node.name, f64::from(bn.eps));
            }
        }
        let (graph, map) = self.graph.rewrite_with_map(
            |id, node, out| match node.op {
                Op::Conv(conv) if folded_by[id].is_some() => {
                    let new = out.copy(node);
                    Ok(out.set_op(new, Op::Conv(crate::graph::Conv { bias: Bias::Channel, ..conv })))
                }
                Op::BatchNorm(_) if folded_by[node.inputs[0]] == Some(id) => Ok(out.value(node.inputs[0])),
                _ => Ok(out.copy(node)),
            },
            |_, state| state,
        )?;
        Ok((Self::new(graph, weights)?, map))
    }
}

/// Replaces `<conv>.weight` and `<conv>.bias` and removes the batch-norm's tensors.
fn fold(weights: &mut Weights, conv: &str, family: ConvFamily, bn: &str, eps: f64) {
    let mut take = |suffix: &str| weights.remove(&format!("{bn}.{suffix}")).expect("checked by Model::new").data;
    let (gamma, beta) = (take("weight"), take("bias"));
    let (mean, var) = (take("running_mean"), take("running_var"));
    let channels = gamma.len();
    let scale: Vec<f64> = (0..channels).map(|c| f64::from(gamma[c]) / (f64::from(var[c]) + eps).sqrt()).collect();

    let weight = weights.get_mut(&format!("{conv}.weight")).expect("checked by Model::new");
    // A depthwise weight has its channel last, all others their output channel first.
    let per_channel = weight.data.len() / channels;
    for (i, w) in weight.data.iter_mut().enumerate() {
        let c = if family == ConvFamily::Depthwise { i % channels } else { i / per_channel };
        *w = (f64::from(*w) * scale[c]) as f32;
    }
    let bias_name = format!("{conv}.bias");
    let old = weights.remove(&bias_name);
    let bias = (0..channels)
        .map(|c| {
            let b = old.as_ref().map_or(0.0, |t| f64::from(t.data[c]));
            (scale[c] * (b - f64::from(mean[c])) + f64::from(beta[c])) as f32
        })
        .collect();
    weights.insert(bias_name, Tensor { shape: vec![channels], data: bias });
}
