//! ONNX out: a network as other runtimes take it.
//!
//! Input `input` `[batch, c, h, w]` and output `logits` `[batch, classes]` are `f32` with any batch. Batch-norms are
//! folded into the convolutions before them. In half precision weights and arithmetic are `f16`, between a cast of the
//! input and one of the logits; a runtime without half-precision kernels, such as ONNX Runtime on a CPU, widens by
//! itself. Nodes whose values pass the range of `f16` ([`HalfRange`] finds them) can stay in `f32`, between casts.
//!
//! No number of a file is subnormal in `f32`: what folding makes so is written as 0. Those of `f16`, from 2⁻²⁴ to 2⁻¹⁴,
//! are written as they are: ordinary weights lie there, a GPU computes with them at full speed, and a CPU widens them to
//! normal numbers.
//!
//! | here | ONNX |
//! |--|--|
//! | convolution | `Conv`; a bias map is an `Add` behind it |
//! | batch-norm that no convolution takes | `BatchNormalization` |
//! | activation | `Relu` or `Clip`; with a slope q: q·x + (1 − q)·clip(x), which is what it computes |
//! | padding | `Pad`, whose negative amounts cut off |
//! | sum, pools | `Add`, and the operator of the pool's name, such as `MaxPool` |
//! | linear layer | `Flatten` and `Gemm` |
//! | dropout | nothing |

mod half_range;
mod precision;
mod proto;

use std::path::Path;

pub use half_range::{HalfRange, LARGEST_F16, Overflow};
pub use precision::OnnxPrecision;

use precision::{NodeTypes, element, passes_on};
use prost::Message;
use proto::{
    AttributeProto, AttributeType, DimensionProto, ElementType, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto,
};

use super::atomic::write_atomic;
use super::layout;
use super::model::{ModelInfo, data_metadata};
use crate::dtype::{Dtype, flush_subnormal};
use crate::graph::{Activation, Bias, Conv, Node, NodeId, Op, ParamRole};
use crate::model::Model;
use crate::ops::operation::{OnnxAttribute, OnnxOperator};
use crate::{Error, Result};

/// ONNX 1.12 of 2022, the oldest version whose operators are all that is needed.
const OPSET: i64 = 17;
const IR_VERSION: i64 = 8;
/// Protobuf's limit on a message.
const MAX_BYTES: usize = i32::MAX as usize;
const INPUT: &str = "input";
const LOGITS: &str = "logits";

/// Writes a network as an ONNX file, atomically; the same network gives the same bytes.
///
/// # Errors
/// A precision other than `f32` and `f16`, weights too large for it or for one ONNX file, a node to keep in `f32` that is
/// not there, or as [`write_atomic`].
pub fn write_onnx(path: &Path, model: &Model, info: &ModelInfo, precision: &OnnxPrecision) -> Result<()> {
    let bytes = to_onnx(model, info, precision)?;
    write_atomic(path, |out| out.write_all(&bytes))
}

/// A network as an ONNX model.
///
/// # Errors
/// As [`write_onnx`].
pub fn to_onnx(model: &Model, info: &ModelInfo, precision: &OnnxPrecision) -> Result<Vec<u8>> {
    model.graph.check_classifier()?;
    let folded = model.folded()?;
    folded.check_finite()?;
    let graph = Exporter::new(&folded, precision)?.export()?;
    let props =
        data_metadata(&folded.graph, info)?.into_iter().map(|(key, value)| StringStringEntryProto { key, value });
    let proto = ModelProto {
        ir_version: IR_VERSION,
        producer_name: env!("CARGO_PKG_NAME").into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        graph: Some(graph),
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: OPSET }],
        metadata_props: props.collect(),
    };
    let bytes = proto.encoded_len();
    if bytes > MAX_BYTES {
        return Err(Error::Config(format!("{bytes} bytes do not fit into one ONNX file of {MAX_BYTES}; use f16")));
    }
    Ok(proto.encode_to_vec())
}

/// Builds an ONNX graph node by node.
struct Exporter<'a> {
    model: &'a Model,
    types: NodeTypes,
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
    /// The ONNX value that holds each node's.
    values: Vec<String>,
    /// The same in `f32`, where it lies in `f16` and someone reads it in `f32`.
    widened: Vec<Option<String>>,
}

impl<'a> Exporter<'a> {
    fn new(model: &'a Model, precision: &OnnxPrecision) -> Result<Self> {
        let types = NodeTypes::new(&model.graph, precision)?;
        let widened = vec![None; model.graph.nodes.len()];
        let (nodes, initializers, values) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { model, types, nodes, initializers, values, widened })
    }

    fn export(mut self) -> Result<GraphProto> {
        self.add_weights()?;
        let graph = &self.model.graph;
        for (id, node) in NodeId::enumerate(&graph.nodes) {
            let value = self.add_node(id, node)?;
            let (computed, stored) = (self.types.computed(id), self.types.stored(id));
            let value = match computed == stored {
                true => value,
                false => self.cast(&format!("{}.narrow", node.name), &value, None, stored),
            };
            self.values.push(value);
        }
        if self.types.stored(graph.output()) != Dtype::F32 {
            let logits = self.values[graph.output()].clone();
            self.cast("widen", &logits, Some(LOGITS), Dtype::F32);
        }
        let shape = graph.input_shape();
        Ok(GraphProto {
            name: graph.name.clone(),
            node: self.nodes,
            initializer: self.initializers,
            input: vec![value_info(INPUT, &[shape.c, shape.h, shape.w])],
            output: vec![value_info(LOGITS, &[graph.classes()])],
        })
    }

    /// All parameters as initializers, in the ecosystem's layout.
    fn add_weights(&mut self) -> Result<()> {
        for spec in self.model.graph.params()? {
            let mut shape = layout::file_shape(&spec);
            if spec.role == ParamRole::ConvBiasMap {
                // One map for all images of a batch.
                shape.insert(0, 1);
            }
            let data = layout::to_file(&spec, &self.model.weight(&spec.name).data);
            self.add_tensor(spec.node, spec.name, &shape, &data)?;
        }
        Ok(())
    }

    /// Adds what a node reads beside the values of others, in the type that it computes in.
    fn add_tensor(&mut self, of: NodeId, name: String, shape: &[usize], data: &[f32]) -> Result<String> {
        let dtype = self.types.computed(of);
        if dtype == Dtype::F16 && data.iter().any(|x| x.abs() > LARGEST_F16) {
            let node = &self.model.graph.nodes[of].name;
            return Err(Error::Config(format!(
                "{name} has numbers beyond the range of f16; use --precision f32, or --keep-f32 {node}"
            )));
        }
        self.initializers.push(TensorProto {
            dims: shape.iter().map(|&d| d as i64).collect(),
            data_type: element(dtype) as i32,
            name: name.clone(),
            raw_data: dtype.encode(data),
        });
        Ok(name)
    }

    /// Adds a list of integers that a node reads.
    fn add_integers(&mut self, name: String, values: &[isize]) -> String {
        self.initializers.push(TensorProto {
            dims: vec![values.len() as i64],
            data_type: ElementType::Int64 as i32,
            name: name.clone(),
            raw_data: values.iter().flat_map(|&v| (v as i64).to_le_bytes()).collect(),
        });
        name
    }

    /// Appends a cast; the name of its value.
    fn cast(&mut self, name: &str, x: &str, output: Option<&str>, to: Dtype) -> String {
        self.push("Cast", name, &[x], output, vec![int("to", element(to) as i64)])
    }

    /// The ONNX value of a node as one that computes in `dtype` reads it.
    fn value_in(&mut self, id: NodeId, dtype: Dtype) -> String {
        if self.types.stored(id) == dtype {
            return self.values[id].clone();
        }
        if let Some(widened) = &self.widened[id] {
            return widened.clone();
        }
        let (name, value) = (format!("{}.widen", self.model.graph.nodes[id].name), self.values[id].clone());
        let widened = self.cast(&name, &value, None, dtype);
        self.widened[id] = Some(widened.clone());
        widened
    }

    /// Appends what computes a node; the name of its value.
    fn add_node(&mut self, id: NodeId, node: &Node) -> Result<String> {
        let dtype = self.types.computed(id);
        let inputs: Vec<String> = node.inputs.iter().map(|&i| self.value_in(i, dtype)).collect();
        let param = |suffix: &str| format!("{}.{suffix}", node.name);
        let name = node.name.as_str();
        Ok(match node.op {
            op if passes_on(&op) => inputs[0].clone(),
            Op::Input { .. } if dtype == Dtype::F32 => INPUT.to_owned(),
            Op::Input { .. } => self.cast(name, INPUT, None, dtype),
            Op::Conv(conv) => self.add_conv(&conv, node, &inputs[0]),
            Op::BatchNorm(bn) => {
                let [w, b, mean, var] = ["weight", "bias", "running_mean", "running_var"].map(param);
                let epsilon = vec![float("epsilon", bn.eps)];
                self.push("BatchNormalization", name, &[&inputs[0], &w, &b, &mean, &var], None, epsilon)
            }
            Op::Activation(activation) => self.add_activation(id, &activation, &inputs[0])?,
            Op::Pad(pad) => {
                let pads = self.add_integers(param("pads"), &[0, 0, pad.top, pad.left, 0, 0, pad.bottom, pad.right]);
                self.push("Pad", name, &[&inputs[0], &pads], None, Vec::new())
            }
            Op::Linear(_) if id != self.model.graph.output() => {
                return Err(Error::Graph(format!("{name} is linear but not the last layer, which is not exported")));
            }
            Op::Linear(_) => {
                let flat = self.push("Flatten", &format!("{name}.flatten"), &[&inputs[0]], None, vec![int("axis", 1)]);
                let [w, b] = ["weight", "bias"].map(param);
                let output = (dtype == Dtype::F32).then_some(LOGITS);
                self.push("Gemm", name, &[&flat, &w, &b], output, vec![int("transB", 1)])
            }
            op => {
                let operator = op.operation().onnx();
                let operator = operator.ok_or_else(|| Error::Graph(format!("{name}: {op} is not exported")))?;
                let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
                let attributes = operator.attributes.into_iter().map(attribute_of).collect();
                self.push(operator.op_type, name, &inputs, None, attributes)
            }
        })
    }

    fn add_conv(&mut self, conv: &Conv, node: &Node, x: &str) -> String {
        let name = &node.name;
        let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
        let window = OnnxOperator::window_attributes(&conv.window);
        let mut attributes: Vec<AttributeProto> = window.into_iter().map(attribute_of).collect();
        attributes.push(int("group", conv.groups as i64));
        match conv.bias {
            Bias::None => self.push("Conv", name, &[x, &weight], None, attributes),
            Bias::Channel => self.push("Conv", name, &[x, &weight, &bias], None, attributes),
            Bias::Map => {
                let sums = self.push("Conv", name, &[x, &weight], None, attributes);
                self.push("Add", &format!("{name}.bias_map"), &[&sums, &format!("{name}.bias_map")], None, Vec::new())
            }
        }
    }

    fn add_activation(&mut self, id: NodeId, activation: &Activation, x: &str) -> Result<String> {
        let slope = flush_subnormal(activation.slope);
        let name = &self.model.graph.nodes[id].name;
        let clipped = match activation.limit {
            None => self.push("Relu", name, &[x], None, Vec::new()),
            Some(limit) => {
                let low = self.add_tensor(id, format!("{name}.low"), &[], &[0.0])?;
                let high = self.add_tensor(id, format!("{name}.high"), &[], &[limit])?;
                self.push("Clip", name, &[x, &low, &high], None, Vec::new())
            }
        };
        if slope == 0.0 {
            return Ok(clipped);
        }
        let q = self.add_tensor(id, format!("{name}.slope"), &[], &[slope])?;
        let rest = self.add_tensor(id, format!("{name}.rest"), &[], &[1.0 - slope])?;
        let outside = self.push("Mul", &format!("{name}.outside"), &[x, &q], None, Vec::new());
        let inside = self.push("Mul", &format!("{name}.inside"), &[&clipped, &rest], None, Vec::new());
        Ok(self.push("Add", &format!("{name}.sum"), &[&outside, &inside], None, Vec::new()))
    }

    /// Appends an operator; the name of its value, which is `output` or made from the operator's own. No parameter's
    /// name ends as the latter does.
    fn push(
        &mut self,
        op_type: &str,
        name: &str,
        inputs: &[&str],
        output: Option<&str>,
        attribute: Vec<AttributeProto>,
    ) -> String {
        let output = output.map_or_else(|| format!("{name}:0"), str::to_owned);
        self.nodes.push(NodeProto {
            input: inputs.iter().map(|&i| i.to_owned()).collect(),
            output: vec![output.clone()],
            name: name.to_owned(),
            op_type: op_type.to_owned(),
            attribute,
        });
        output
    }
}

fn attribute_of((name, value): (&'static str, OnnxAttribute)) -> AttributeProto {
    match value {
        OnnxAttribute::Int(value) => int(name, value),
        OnnxAttribute::Ints(ints) => AttributeProto { ints, ..attribute(name, AttributeType::Ints) },
    }
}

fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { i: Some(value), ..attribute(name, AttributeType::Int) }
}

fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto { f: Some(value), ..attribute(name, AttributeType::Float) }
}

fn attribute(name: &str, kind: AttributeType) -> AttributeProto {
    AttributeProto { name: name.to_owned(), r#type: kind as i32, ..AttributeProto::default() }
}

/// A tensor of floats whose first dimension is the batch.
fn value_info(name: &str, rest: &[usize]) -> ValueInfoProto {
    let batch = DimensionProto { dim_param: Some("batch".into()), dim_value: None };
    let fixed = rest.iter().map(|&d| DimensionProto { dim_value: Some(d as i64), dim_param: None });
    let shape = TensorShapeProto { dim: std::iter::once(batch).chain(fixed).collect() };
    let tensor_type = TensorTypeProto { elem_type: ElementType::Float as i32, shape: Some(shape) };
    ValueInfoProto { name: name.to_owned(), r#type: Some(TypeProto { tensor_type: Some(tensor_type) }) }
}
