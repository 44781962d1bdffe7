//! What an operation is to a graph: its shape rule, parameters and counts, its words, its reference step, and what it is
//! called in ONNX. An operation's own file implements this; graph, lowering and export only ask.

use super::conv::ConvFamily;
use super::step::{ParamId, Place, Step, ValueId, Values};
use crate::shape::{Shape, Window};
use crate::{Error, Result};

/// Largest number of elements of one parameter: a graph can come from a file, so its claims are bounded before anything
/// is allocated.
pub const MAX_PARAM_ELEMENTS: usize = 1 << 28;

/// What a parameter is, and so how it is laid out, decayed and initialised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParamRole {
    /// Weights of a convolution, in the layout of its family.
    ConvWeight(ConvFamily),
    /// Bias per channel `[c_out]`.
    ConvBias,
    /// Bias per position `[h_out, w_out, c_out]`.
    ConvBiasMap,
    /// Batch-norm's γ.
    BnWeight,
    /// Batch-norm's β.
    BnBias,
    /// Batch-norm's running mean; not trained.
    RunningMean,
    /// Batch-norm's running variance (unbiased); not trained.
    RunningVar,
    /// Weights of a linear layer `[c_out, c_in]`.
    LinearWeight,
    /// Bias of a linear layer `[c_out]`.
    LinearBias,
}

impl ParamRole {
    /// Whether an optimizer changes it.
    pub fn is_trained(self) -> bool {
        !matches!(self, Self::RunningMean | Self::RunningVar)
    }

    /// Whether weight decay applies: weights of convolutions and linear layers, never biases or batch-norm.
    pub fn is_decayed(self) -> bool {
        matches!(self, Self::ConvWeight(_) | Self::LinearWeight)
    }
}

/// A parameter that an operation needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperationParam {
    /// Last part of its name, such as `weight`.
    pub suffix: &'static str,
    /// What it is.
    pub role: ParamRole,
    /// Dimensions in the engine's layout.
    pub shape: Vec<usize>,
}

impl OperationParam {
    /// A parameter by suffix, role and dimensions.
    pub fn new(suffix: &'static str, role: ParamRole, shape: Vec<usize>) -> Self {
        Self { suffix, role, shape }
    }
}

/// An attribute of an ONNX operator.
#[derive(Debug, Clone, PartialEq)]
pub enum OnnxAttribute {
    /// An integer.
    Int(i64),
    /// Several integers.
    Ints(Vec<i64>),
}

/// An ONNX operator that computes an operation of its inputs alone.
#[derive(Debug, Clone, PartialEq)]
pub struct OnnxOperator {
    /// Its name in ONNX.
    pub op_type: &'static str,
    /// Its attributes.
    pub attributes: Vec<(&'static str, OnnxAttribute)>,
}

impl OnnxOperator {
    /// An operator without attributes.
    pub fn bare(op_type: &'static str) -> Self {
        Self { op_type, attributes: Vec::new() }
    }

    /// The attributes of a window; ONNX lists the padding above, left, below, right.
    pub fn window_attributes(window: &Window) -> Vec<(&'static str, OnnxAttribute)> {
        let Window { k_h, k_w, stride_h, stride_w, pad } = *window;
        let ints = |values: &[usize]| OnnxAttribute::Ints(values.iter().map(|&v| v as i64).collect());
        vec![
            ("kernel_shape", ints(&[k_h, k_w])),
            ("strides", ints(&[stride_h, stride_w])),
            ("pads", ints(&[pad.top, pad.left, pad.bottom, pad.right])),
        ]
    }
}

/// An operation of a graph.
pub trait Operation {
    /// How many values it reads.
    fn arity(&self) -> usize {
        1
    }

    /// The shape of its result; `name` is its node's.
    ///
    /// # Errors
    /// Settings out of range, or inputs that do not fit: they may come from a file.
    fn output_shape(&self, name: &str, inputs: &[Shape]) -> Result<Shape>;

    /// Its parameters: weight, bias, running mean, running variance.
    fn params(&self, output: Shape) -> Vec<OperationParam> {
        let _ = output;
        Vec::new()
    }

    /// Multiply-accumulates of convolutions and linear layers per image.
    fn macs(&self, output: Shape) -> u64 {
        let _ = output;
        0
    }

    /// In words, such as `max_pool 3x3 s2`.
    fn describe(&self) -> String;

    /// The steps that compute it alone: the reference plan.
    ///
    /// # Errors
    /// A graph that is not well formed.
    fn lower(&self, node: &mut dyn LoweredNode) -> Result<Vec<Box<dyn Step>>>;

    /// The ONNX operator that computes it of its inputs alone; `None` where export needs more than one, or parameters.
    fn onnx(&self) -> Option<OnnxOperator> {
        None
    }
}

/// A node on its way to a step.
pub trait LoweredNode {
    /// An input's value.
    fn input(&self, index: usize) -> ValueId;

    /// An input's shape.
    fn input_shape(&self, index: usize) -> Shape;

    /// The node's value.
    fn output(&self) -> ValueId;

    /// The node's shape.
    fn output_shape(&self) -> Shape;

    /// Whether batch statistics are used and there is a backward pass.
    fn training(&self) -> bool;

    /// Where the node's parameter of a role lies.
    ///
    /// # Errors
    /// When the operation has none.
    fn param(&mut self, place: fn(ParamId) -> Place, role: ParamRole) -> Result<ValueId>;

    /// The table of values.
    fn values(&mut self) -> &mut Values;
}

/// Stops where operands have not the lengths that an operation needs: everything behind relies on them, on a GPU too.
///
/// # Panics
/// With the first operand that is too short or too long; whoever plans a launch makes them fit.
pub(super) fn require<const N: usize>(operation: &str, operands: [(&str, usize, usize); N]) {
    for (operand, got, needed) in operands {
        assert!(got == needed, "{operation}: {operand} has {got} elements, and {needed} are needed");
    }
}

/// An error that says what is wrong with a node's settings.
pub(super) fn bad<T>(name: &str, what: &str) -> Result<T> {
    Err(Error::Graph(format!("{name}: {what}")))
}

/// An error that says which input a node expected.
pub(super) fn mismatch<T>(name: &str, expected: String, got: Shape) -> Result<T> {
    Err(Error::shape(name, expected, got.to_string()))
}

/// Whether a window, which may come from a file, is one that networks have.
pub(super) fn is_sane(Window { k_h, k_w, stride_h, stride_w, pad }: Window) -> bool {
    [k_h, k_w, stride_h, stride_w].iter().all(|v| (1..=1024).contains(v))
        && [pad.top, pad.left, pad.bottom, pad.right].iter().all(|&v| v <= 1024)
}

/// The rows and columns that a window makes of an input.
pub(super) fn window_output(name: &str, window: Window, input: Shape) -> Result<(usize, usize)> {
    match window.output(input.h, input.w) {
        Some(size) => Ok(size),
        None => mismatch(name, format!("at least {}x{} with padding", window.k_h, window.k_w), input),
    }
}
