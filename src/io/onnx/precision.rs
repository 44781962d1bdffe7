//! In what type each node of an ONNX file computes, and in what type its value lies between it and its readers.

use std::collections::BTreeSet;

use super::proto::ElementType;
use crate::dtype::Dtype;
use crate::graph::{Graph, NodeId, Op};
use crate::{Error, Result};

/// The type of an ONNX file's weights and arithmetic.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OnnxPrecision {
    /// `f32` or `f16`.
    pub dtype: Dtype,
    /// Names of the nodes that stay in `f32` in a file in `f16`, with their values.
    pub in_f32: BTreeSet<String>,
}

impl From<Dtype> for OnnxPrecision {
    fn from(dtype: Dtype) -> Self {
        Self { dtype, in_f32: BTreeSet::new() }
    }
}

/// The types of all nodes. A node that is to stay in `f32` has its value so, and whoever reads a value in `f32` computes in
/// `f32`, with its weights: a cast in between would make the value infinite after all. Its own value is `f16` again.
pub(super) struct NodeTypes {
    /// What each node computes in.
    computed: Vec<Dtype>,
    /// What its value lies in.
    stored: Vec<Dtype>,
}

impl NodeTypes {
    /// # Errors
    /// A precision other than `f32` and `f16`, or a name that no node has.
    pub fn new(graph: &Graph, precision: &OnnxPrecision) -> Result<Self> {
        let OnnxPrecision { dtype, in_f32 } = precision;
        if *dtype == Dtype::Bf16 {
            return Err(Error::Config("ONNX runtimes do not convolve in bf16; use --precision f32 or f16".into()));
        }
        let nodes = &graph.nodes;
        if let Some(unknown) = in_f32.iter().find(|name| nodes.iter().all(|node| node.name != **name)) {
            return Err(Error::Config(format!(
                "{} has no node {unknown} to keep in f32 (a folded batch-norm goes by its convolution's name); give a name \
                 that `export` prints, or auto",
                graph.name
            )));
        }
        let mut kept: Vec<bool> = nodes.iter().map(|node| in_f32.contains(&node.name)).collect();
        for id in NodeId::all(nodes.len()).rev() {
            if kept[id] && passes_on(&nodes[id].op) {
                kept[nodes[id].inputs[0]] = true;
            }
        }
        let (mut computed, mut stored) = (Vec::with_capacity(nodes.len()), Vec::with_capacity(nodes.len()));
        for (id, node) in NodeId::enumerate(nodes) {
            let reads_f32 = node.inputs.iter().any(|&input| stored[input] == Dtype::F32);
            let own = if kept[id] || reads_f32 { Dtype::F32 } else { *dtype };
            // The logits are `f32` outside, so they need not come back.
            let keeps = kept[id] || passes_on(&node.op) || id == graph.output();
            computed.push(own);
            stored.push(if keeps { own } else { *dtype });
        }
        Ok(Self { computed, stored })
    }

    /// What a node computes in.
    pub fn computed(&self, id: NodeId) -> Dtype {
        self.computed[id]
    }

    /// What its value lies in.
    pub fn stored(&self, id: NodeId) -> Dtype {
        self.stored[id]
    }
}

/// Whether a node's value is its input's, and the file has no operator for it.
pub(super) fn passes_on(op: &Op) -> bool {
    match op {
        Op::Dropout(_) => true,
        Op::Activation(activation) => activation.slope == 1.0,
        _ => false,
    }
}

/// ONNX's number for a type.
pub(super) fn element(dtype: Dtype) -> ElementType {
    match dtype {
        Dtype::F32 => ElementType::Float,
        Dtype::F16 => ElementType::Float16,
        Dtype::Bf16 => unreachable!("refused by NodeTypes::new"),
    }
}
