//! The convolution layers of networks as problems to be timed: each distinct one once, with how often it occurs.
//!
//! The same list serves `bench kernels`, the criterion benches and the peers.

use std::fmt;
use std::str::FromStr;

use super::roofline::{ComputeUnit, KernelCost, Pass, plan_costs, without_batch_norm};
use crate::device::Device;
use crate::engine::{Fusion, Plan, Step, StepKind};
use crate::graph::{Activation, Bias, ConvFamily, Graph};
use crate::ops::conv::ConvProblem;
use crate::{Error, Result};

/// What is computed of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerPass {
    /// Inference: convolution, bias, residual and activation, batch-norm folded.
    Forward,
    /// Gradient of the input.
    InputGradient,
    /// Gradient of the weights.
    WeightGradient,
    /// Both gradients in one walk: how the host computes them.
    BothGradients,
    /// Training: convolution, batch-norm with the batch's statistics, residual and activation.
    StepForward,
    /// All gradients of that step.
    StepBackward,
}

impl LayerPass {
    /// Those that can be asked for.
    pub const ALL: [Self; 5] =
        [Self::Forward, Self::InputGradient, Self::WeightGradient, Self::StepForward, Self::StepBackward];

    /// Its name on the command line and in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Forward => "fwd",
            Self::InputGradient => "dgrad",
            Self::WeightGradient => "wgrad",
            Self::BothGradients => "dgrad+wgrad",
            Self::StepForward => "train-fwd",
            Self::StepBackward => "train-bwd",
        }
    }

    /// The passes that a device has for those asked for: where there is no input gradient alone, both together.
    pub fn on(device: &Device, asked: &[Self]) -> Vec<Self> {
        let of = |&pass: &Self| match (device, pass) {
            (Device::Cpu, Self::InputGradient) => Self::BothGradients,
            _ => pass,
        };
        asked.iter().map(of).collect()
    }
}

impl fmt::Display for LayerPass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for LayerPass {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let known = Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|pass| pass.name() == text);
        found.ok_or_else(|| Error::Config(format!("unknown pass {text:?}; known are {known}")))
    }
}

/// What follows a convolution within its step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerTail {
    /// Its bias; none before a batch-norm.
    pub bias: Bias,
    /// Whether a residual is added.
    pub residual: bool,
    /// The activation, without the mask that may switch it.
    pub act: Option<Activation>,
}

/// One thing to be timed.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// The convolution's name where it first occurs.
    pub name: String,
    /// What is computed.
    pub pass: LayerPass,
    /// The convolution over a whole batch.
    pub problem: ConvProblem,
    /// What follows it; nothing for the gradients of the convolution alone.
    pub tail: LayerTail,
    /// Whether it reads the image, which needs no gradient.
    pub reads_image: bool,
    /// How often it occurs in each of the networks.
    pub counts: Vec<usize>,
    /// What it must move and compute, per image.
    pub cost: KernelCost,
}

const BARE: LayerTail = LayerTail { bias: Bias::None, residual: false, act: None };

impl Layer {
    /// The distinct layers of networks: pass by pass as asked for, each in network order.
    ///
    /// # Errors
    /// As [`Graph::shapes`].
    pub fn of_networks(networks: &[&Graph], batch: usize, passes: &[LayerPass]) -> Result<Vec<Self>> {
        let mut layers: Vec<Self> = Vec::new();
        for (index, graph) in networks.iter().enumerate() {
            let mut found = Vec::new();
            for training in [false, true] {
                let planned = if training { (*graph).clone() } else { without_batch_norm(graph)? };
                let plan = Plan::new(&planned, Fusion::Fused, training, false, &[])?;
                let costs = plan_costs(&planned, &plan)?;
                for step in &plan.steps {
                    found.extend(of_step(&planned, step, &costs, training, batch));
                }
            }
            for mut layer in found.into_iter().filter(|layer| passes.contains(&layer.pass)) {
                match layers.iter_mut().find(|known| known.same_work(&layer)) {
                    Some(known) => known.counts[index] += 1,
                    None => {
                        layer.counts = vec![0; networks.len()];
                        layer.counts[index] = 1;
                        layers.push(layer);
                    }
                }
            }
        }
        layers.sort_by_key(|layer| passes.iter().position(|&pass| pass == layer.pass));
        Ok(layers)
    }

    fn same_work(&self, other: &Self) -> bool {
        (self.pass, self.problem, self.tail, self.reads_image)
            == (other.pass, other.problem, other.tail, other.reads_image)
    }

    /// The kernel family.
    pub fn family(&self) -> &'static str {
        match self.problem.family() {
            ConvFamily::Depthwise => "depthwise",
            ConvFamily::Pointwise => "pointwise",
            ConvFamily::Dense => "dense",
        }
    }

    /// Floating-point operations of the batch.
    pub fn flops(&self) -> u64 {
        self.cost.flops * self.problem.n as u64
    }

    /// Least bytes of the batch, with elements of so many bytes.
    pub fn bytes(&self, element_bytes: u64) -> u64 {
        self.cost.bytes(self.problem.n, element_bytes)
    }

    /// Shape in words, such as `112x112x16 → 112x112x96 3x3 s1`.
    pub fn shape(&self) -> String {
        let ConvProblem { input, output, window, .. } = self.problem;
        format!("{input} → {output} {}x{} s{}", window.k_h, window.k_w, window.stride_h)
    }
}

/// What there is to time of a convolution's step.
fn of_step(graph: &Graph, step: &Step, costs: &[KernelCost], training: bool, batch: usize) -> Vec<Layer> {
    let (problem, bias, act) = match &step.kind {
        StepKind::Conv { problem, bias, act, .. } if !training => {
            (problem, bias.map_or(Bias::None, |(_, bias)| bias), act)
        }
        StepKind::ConvBatchNorm { problem, act, .. } => (problem, Bias::None, act),
        _ => return Vec::new(),
    };
    let act = act.map(|act| Activation { mask: None, ..act });
    let tail = LayerTail { bias, residual: step.inputs.len() > 1, act };
    let cost_of = |pass: Pass| {
        let of = costs.iter().find(|cost| cost.pass == pass && cost.nodes == step.nodes);
        of.expect("every step has a cost").clone()
    };
    let layer = |pass, tail, cost| Layer {
        name: graph.nodes[step.nodes[0]].name.clone(),
        pass,
        problem: ConvProblem { n: batch, ..*problem },
        tail,
        reads_image: step.inputs[0] == 0,
        counts: Vec::new(),
        cost,
    };
    if training {
        return vec![
            layer(LayerPass::StepForward, tail, step_cost(problem, step, &cost_of(Pass::Forward))),
            layer(LayerPass::StepBackward, tail, step_cost(problem, step, &cost_of(Pass::Backward))),
        ];
    }
    let gradient = |pass| layer(pass, BARE, gradient_cost(problem, pass, &cost_of(Pass::Forward)));
    let mut layers = vec![layer(LayerPass::Forward, tail, cost_of(Pass::Forward)), gradient(LayerPass::WeightGradient)];
    // The image needs no gradient.
    if step.inputs[0] != 0 {
        layers.extend([LayerPass::InputGradient, LayerPass::BothGradients].map(gradient));
    }
    layers
}

/// What a training step alone must move: forward it reads x, w and the residual and writes y, which is kept, and z;
/// backward it reads x, w, y, dz and the residual and writes the gradients. What it moves more often than once is lost.
fn step_cost(problem: &ConvProblem, step: &Step, planned: &KernelCost) -> KernelCost {
    let (x, y) = (problem.input.len() as u64, problem.output.len() as u64);
    let residual = if step.inputs.len() > 1 { y } else { 0 };
    let dx = if step.inputs[0] == 0 { 0 } else { x };
    let activations = match planned.pass {
        Pass::Forward => x + 2 * y + residual,
        Pass::Backward => x + dx + 2 * y + 2 * residual,
    };
    KernelCost { activations, ..planned.clone() }
}

/// Either gradient alone reads two of x, w and dy and writes the third's; together they read all three once.
fn gradient_cost(problem: &ConvProblem, pass: LayerPass, forward: &KernelCost) -> KernelCost {
    let (x, y, w) = (problem.input.len() as u64, problem.output.len() as u64, problem.weight_len() as u64);
    let both = pass == LayerPass::BothGradients;
    let unit = match problem.family() {
        ConvFamily::Depthwise => ComputeUnit::Vector,
        ConvFamily::Pointwise | ConvFamily::Dense => ComputeUnit::Matrix,
    };
    KernelCost {
        kind: pass.name().to_owned(),
        pass: Pass::Backward,
        unit,
        flops: if both { 4 } else { 2 } * problem.macs(),
        activations: if both { 2 * x + y } else { x + y },
        params: if both { 2 * w } else { w },
        ..forward.clone()
    }
}
