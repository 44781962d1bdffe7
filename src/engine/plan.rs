//! Lowering a graph to steps: one per node, or one per fusable run of nodes.

use crate::graph::{Activation, Bias, ConvFamily, Graph, NodeId, Op, ParamRole, ParamSpec};
use crate::ops::conv::ConvProblem;
use crate::ops::pool::PoolProblem;
use crate::shape::Shape;
use crate::{Error, Result};

use super::Fusion;

/// Index into [`Graph::params`].
pub type ParamId = usize;

/// The four tensors and two constants of a batch-norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BatchNormParams {
    /// γ.
    pub gamma: ParamId,
    /// β.
    pub beta: ParamId,
    /// Running mean.
    pub mean: ParamId,
    /// Running variance.
    pub var: ParamId,
    /// Added to the variance.
    pub eps: f32,
    /// Share of the new batch in the running statistics.
    pub momentum: f32,
}

/// What a step computes. A step's `inputs` are, in order, what the kind reads: x, then a residual where there is one.
#[derive(Debug, Clone, PartialEq)]
pub enum StepKind {
    /// Convolution with bias; in a fused inference plan with residual and activation too.
    Conv {
        /// The convolution, for one image.
        problem: ConvProblem,
        /// Its weights.
        weight: ParamId,
        /// Its bias.
        bias: Option<(ParamId, Bias)>,
        /// Activation at the end.
        act: Option<Activation>,
    },
    /// Convolution, batch-norm, residual and activation: the fused training step.
    ConvBatchNorm {
        /// The convolution, for one image.
        problem: ConvProblem,
        /// Its weights.
        weight: ParamId,
        /// The batch-norm.
        bn: BatchNormParams,
        /// Activation at the end.
        act: Option<Activation>,
    },
    /// Batch-norm alone.
    BatchNorm(BatchNormParams),
    /// Activation alone.
    Activation(Activation),
    /// Sum of two values.
    Add,
    /// Mean over pixels.
    GlobalAvgPool,
    /// Largest value of a window.
    MaxPool(PoolProblem),
    /// Fully connected layer.
    Linear {
        /// Its weights.
        weight: ParamId,
        /// Its bias.
        bias: ParamId,
    },
    /// Dropout; the identity at inference.
    Dropout(f32),
}

/// One step of a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Name of the last node it covers.
    pub name: String,
    /// Nodes it covers, in order.
    pub nodes: Vec<NodeId>,
    /// Values it reads.
    pub inputs: Vec<NodeId>,
    /// The value it writes.
    pub output: NodeId,
    /// Whether that value is stored. A fused training step leaves its normalised value out where the one convolution that
    /// reads it forms it on load (`kernels.md` a, level C).
    pub stored: bool,
    /// What it computes.
    pub kind: StepKind,
}

/// The steps of a network in order of execution.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Steps.
    pub steps: Vec<Step>,
    /// Shape of every value, by node.
    pub shapes: Vec<Shape>,
    /// Whether steps compute batch statistics and have a backward pass.
    pub training: bool,
}

impl Plan {
    /// Lowers a graph. `on_load` leaves out values which the convolution after them can form on load, `taps` are values
    /// that must exist, so nothing is fused across them. An inference plan fuses
    /// batch-norm only if it was folded before ([`crate::model::Model::folded`]).
    ///
    /// # Errors
    /// As [`Graph::shapes`].
    pub fn new(graph: &Graph, fusion: Fusion, training: bool, on_load: bool, taps: &[NodeId]) -> Result<Self> {
        let shapes = graph.shapes()?;
        let params = graph.params()?;
        let lowering =
            Lowering { graph, params: &params, shapes: &shapes, users: graph.users(), taps, fusion, training };
        let mut steps: Vec<Step> = Vec::new();
        let mut covered = vec![false; graph.nodes.len()];
        for id in 1..graph.nodes.len() {
            if !covered[id] {
                let step = lowering.step(id)?;
                for &node in &step.nodes {
                    covered[node] = true;
                }
                steps.push(step);
            }
        }
        // A fused step stands where its last node stood: only there all that it reads is known to exist.
        steps.sort_by_key(|s| s.output);
        let mut plan = Self { steps, shapes, training };
        if on_load {
            plan.form_on_load(taps);
        }
        Ok(plan)
    }

    /// Finds the values that need not be stored.
    fn form_on_load(&mut self, taps: &[NodeId]) {
        for index in 0..self.steps.len() {
            let step = &self.steps[index];
            let plain = matches!(step.kind, StepKind::ConvBatchNorm { .. }) && step.inputs.len() == 1;
            let mut readers = self.steps.iter().filter(|reader| reader.inputs.contains(&step.output));
            let only = readers.next().filter(|_| readers.next().is_none());
            let on_load = only.is_some_and(|reader| match &reader.kind {
                StepKind::ConvBatchNorm { problem, .. } => {
                    reader.inputs[0] == step.output
                        && reader.inputs.get(1) != Some(&step.output)
                        && problem.family() != ConvFamily::Dense
                }
                _ => false,
            });
            self.steps[index].stored = !(plain && on_load && !taps.contains(&step.output));
        }
    }

    /// The step that writes a value.
    pub(super) fn writer(&self, node: NodeId) -> Option<usize> {
        self.steps.iter().position(|step| step.output == node)
    }
}

impl Step {
    /// Multiply-accumulates of the forward pass per image.
    pub fn macs(&self) -> u64 {
        match &self.kind {
            StepKind::Conv { problem, .. } | StepKind::ConvBatchNorm { problem, .. } => problem.macs(),
            _ => 0,
        }
    }
}

struct Lowering<'a> {
    graph: &'a Graph,
    params: &'a [ParamSpec],
    shapes: &'a [Shape],
    users: Vec<Vec<NodeId>>,
    taps: &'a [NodeId],
    fusion: Fusion,
    training: bool,
}

impl Lowering<'_> {
    fn param(&self, node: NodeId, role: impl Fn(ParamRole) -> bool) -> Option<ParamId> {
        self.params.iter().position(|p| p.node == node && role(p.role))
    }

    fn required(&self, node: NodeId, role: impl Fn(ParamRole) -> bool) -> ParamId {
        self.param(node, role).expect("Graph::params lists every parameter of a node")
    }

    fn batch_norm(&self, id: NodeId, bn: crate::graph::BatchNorm) -> BatchNormParams {
        let param = |role| self.required(id, |r| r == role);
        BatchNormParams {
            gamma: param(ParamRole::BnWeight),
            beta: param(ParamRole::BnBias),
            mean: param(ParamRole::RunningMean),
            var: param(ParamRole::RunningVar),
            eps: bn.eps,
            momentum: bn.momentum,
        }
    }

    /// The step that starts at a node.
    fn step(&self, id: NodeId) -> Result<Step> {
        let node = &self.graph.nodes[id];
        let kind = match node.op {
            Op::Input { .. } => return Err(Error::Graph("a second input".into())),
            Op::Conv(conv) => return self.conv_step(id, conv),
            Op::BatchNorm(bn) => StepKind::BatchNorm(self.batch_norm(id, bn)),
            Op::Activation(act) => StepKind::Activation(act),
            Op::Add => StepKind::Add,
            Op::GlobalAvgPool => StepKind::GlobalAvgPool,
            Op::MaxPool { window } => {
                let (input, output) = (self.shapes[node.inputs[0]], self.shapes[id]);
                StepKind::MaxPool(PoolProblem { n: 1, input, output, window })
            }
            Op::Linear(_) => StepKind::Linear {
                weight: self.required(id, |r| r == ParamRole::LinearWeight),
                bias: self.required(id, |r| r == ParamRole::LinearBias),
            },
            Op::Dropout { p } => StepKind::Dropout(p),
        };
        Ok(Step {
            name: node.name.clone(),
            nodes: vec![id],
            inputs: node.inputs.clone(),
            output: id,
            stored: true,
            kind,
        })
    }

    fn conv_step(&self, id: NodeId, conv: crate::graph::Conv) -> Result<Step> {
        let node = &self.graph.nodes[id];
        let input = node.inputs[0];
        let problem = ConvProblem::new(&conv, self.shapes[input], 1)
            .ok_or_else(|| Error::Graph(format!("{}: the kernel does not fit", node.name)))?;
        let weight = self.required(id, |r| matches!(r, ParamRole::ConvWeight(_)));
        let bias = self
            .param(id, |r| matches!(r, ParamRole::ConvBias | ParamRole::ConvBiasMap))
            .map(|param| (param, conv.bias));
        let mut nodes = vec![id];
        let mut inputs = vec![input];
        let mut bn = None;
        let mut act = None;
        if self.fusion == Fusion::Fused {
            if self.training {
                bn = self.next(id).and_then(|next| match self.graph.nodes[next].op {
                    Op::BatchNorm(op) if bias.is_none() => {
                        nodes.push(next);
                        Some(self.batch_norm(next, op))
                    }
                    _ => None,
                });
            }
            // Without batch-norm the training step has no room for a tail: its backward would need the sum before it.
            if bn.is_some() || !self.training {
                self.fuse_tail(&mut nodes, &mut inputs, &mut act);
            }
        }
        let output = nodes[nodes.len() - 1];
        let kind = match bn {
            Some(bn) => StepKind::ConvBatchNorm { problem, weight, bn, act },
            None => StepKind::Conv { problem, weight, bias, act },
        };
        Ok(Step { name: self.graph.nodes[output].name.clone(), nodes, inputs, output, stored: true, kind })
    }

    /// The only reader of a value that nobody else needs.
    fn next(&self, id: NodeId) -> Option<NodeId> {
        match self.users[id][..] {
            [next] if !self.taps.contains(&id) => Some(next),
            _ => None,
        }
    }

    /// Takes in a residual addition and an activation that follow.
    fn fuse_tail(&self, nodes: &mut Vec<NodeId>, inputs: &mut Vec<NodeId>, act: &mut Option<Activation>) {
        let last = nodes[nodes.len() - 1];
        if let Some(add) = self.next(last)
            && self.graph.nodes[add].op == Op::Add
        {
            let other = self.graph.nodes[add].inputs.iter().copied().find(|&i| i != last);
            // Two additions of two convolutions must not both take the other in; the later one does.
            if let Some(other) = other.filter(|&other| other < nodes[0] && other != inputs[0]) {
                nodes.push(add);
                inputs.push(other);
            }
        }
        if let Some(next) = self.next(nodes[nodes.len() - 1])
            && let Op::Activation(op) = self.graph.nodes[next].op
        {
            nodes.push(next);
            *act = Some(op);
        }
    }
}

impl StepKind {
    /// A word for printouts.
    pub fn describe(&self) -> String {
        let conv = |problem: &ConvProblem| {
            let family = match problem.family() {
                ConvFamily::Depthwise => "depthwise",
                ConvFamily::Pointwise => "pointwise",
                ConvFamily::Dense => "conv",
            };
            format!("{family} {}x{}", problem.window.k_h, problem.window.k_w)
        };
        let tail = |act: &Option<Activation>| if act.is_some() { " + activation" } else { "" };
        match self {
            Self::Conv { problem, act, .. } => format!("{}{}", conv(problem), tail(act)),
            Self::ConvBatchNorm { problem, act, .. } => format!("{} + batch_norm{}", conv(problem), tail(act)),
            Self::BatchNorm(_) => "batch_norm".into(),
            Self::Activation(_) => "activation".into(),
            Self::Add => "add".into(),
            Self::GlobalAvgPool => "global_avg_pool".into(),
            Self::MaxPool(problem) => format!("max_pool {}x{}", problem.window.k_h, problem.window.k_w),
            Self::Linear { .. } => "linear".into(),
            Self::Dropout(_) => "dropout".into(),
        }
    }
}
