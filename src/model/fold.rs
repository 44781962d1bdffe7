//! Folding batch-norm's running statistics into the convolution before it.

use super::{Model, Weights};
use crate::Result;
use crate::dtype::flush_subnormal;
use crate::graph::{BatchNorm, ConvFamily, NodeId, Op};
use crate::tensor::Tensor;

impl Model {
    /// Batch-norm on running statistics as a factor a = γ/√(σ² + ε) and a shift β − a·μ per channel, in f64; `bn` is the
    /// node called `name`, with its own ε (`docs/methods.md` 1.4).
    pub fn batch_norm_affine(&self, name: &str, bn: BatchNorm) -> (Vec<f64>, Vec<f64>) {
        let of = |suffix: &str| self.weight(&format!("{name}.{suffix}")).data.iter().map(|&v| f64::from(v));
        let factors: Vec<f64> =
            of("weight").zip(of("running_var")).map(|(gamma, var)| gamma / (var + f64::from(bn.eps)).sqrt()).collect();
        let shifts =
            of("bias").zip(of("running_mean")).zip(&factors).map(|((beta, mean), a)| beta - a * mean).collect();
        (factors, shifts)
    }

    /// The network an inference engine runs: every batch-norm that follows a convolution is folded into it,
    /// W̃ = a·W and b̃ = a·b + (β − a·μ), computed in f64.
    /// A batch-norm behind anything else stays. Of all weights, those that are subnormal become 0.
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
        let mut weights = self.weights.clone();
        for (conv_id, bn_id) in NodeId::enumerate(self.graph.batch_norm_folds()) {
            let Some(bn_id) = bn_id else { continue };
            let (conv, norm) = (&self.graph.nodes[conv_id], &self.graph.nodes[bn_id]);
            if let (Op::Conv(op), Op::BatchNorm(bn)) = (conv.op, norm.op) {
                let (factors, shifts) = self.batch_norm_affine(&norm.name, bn);
                fold(&mut weights, &conv.name, op.family(), &factors, &shifts);
                for suffix in ["weight", "bias", "running_mean", "running_var"] {
                    weights.remove(&format!("{}.{suffix}", norm.name));
                }
            }
        }
        weights.values_mut().flat_map(|tensor| &mut tensor.data).for_each(|w| *w = flush_subnormal(*w));
        let (graph, map) = self.graph.without_batch_norm()?;
        Ok((Self::new(graph, weights)?, map))
    }
}

/// Replaces `<conv>.weight` and `<conv>.bias` by what they are behind a batch-norm's factors and shifts.
fn fold(weights: &mut Weights, conv: &str, family: ConvFamily, factors: &[f64], shifts: &[f64]) {
    let channels = factors.len();
    let weight = weights.get_mut(&format!("{conv}.weight")).expect("checked by Model::new");
    // A depthwise weight has its channel last, all others their output channel first.
    let per_channel = weight.data.len() / channels;
    for (i, w) in weight.data.iter_mut().enumerate() {
        let c = if family == ConvFamily::Depthwise { i % channels } else { i / per_channel };
        *w = (f64::from(*w) * factors[c]) as f32;
    }
    let bias_name = format!("{conv}.bias");
    let old = weights.remove(&bias_name);
    let bias = |c: usize| {
        let b = old.as_ref().map_or(0.0, |t| f64::from(t.data[c]));
        (factors[c] * b + shifts[c]) as f32
    };
    weights.insert(bias_name, Tensor { shape: vec![channels], data: (0..channels).map(bias).collect() });
}
