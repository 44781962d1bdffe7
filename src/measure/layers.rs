//! The convolution layers of networks as problems to be timed: each distinct one once, with how often it occurs.
//!
//! The same list serves `bench kernels`, the criterion benches and the peers.

use std::fmt;
use std::str::FromStr;

use std::sync::Arc;

use super::roofline::KernelCost;
use crate::device::{Backend, Device};
use crate::engine::{Fusion, Pass, Plan, PlannedStep, Sequence, Target};
use crate::graph::{Activation, Bias, ConvFamily, Graph, NodeId, Op};
use crate::ops::conv::{ConvProblem, LoneGradients};
use crate::ops::epilogue::{BiasOperand, Epilogue};
use crate::ops::step::Step;
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

/// Operations fused behind a convolution; the activation is described without the mask that may switch it.
pub type LayerEpilogue = Epilogue<(), Activation>;

/// A convolution layer in one pass, ready to be timed.
#[derive(Debug, Clone)]
pub struct TimedLayer {
    /// The convolution's name where it first occurs.
    pub name: String,
    /// The pass that is timed.
    pub pass: LayerPass,
    /// The convolution over a whole batch.
    pub problem: ConvProblem,
    /// Fused operations behind it; none for the gradients of the convolution alone.
    pub epilogue: LayerEpilogue,
    /// Whether it reads the image, which needs no gradient.
    pub reads_image: bool,
    /// How often it occurs in each of the networks.
    pub counts: Vec<usize>,
    /// The steps that compute it.
    pub steps: Sequence,
    /// Least work of these steps per image.
    pub cost: KernelCost,
}

impl TimedLayer {
    /// The distinct layers of networks as a backend computes them: pass by pass as asked for, each in network order.
    ///
    /// # Errors
    /// As [`Graph::shapes`].
    pub fn of_networks(networks: &[&Graph], batch: usize, passes: &[LayerPass], backend: Backend) -> Result<Vec<Self>> {
        let mut layers: Vec<Self> = Vec::new();
        for (index, graph) in networks.iter().enumerate() {
            let mut found = of_inference(&graph.without_batch_norm()?.0, batch, backend)?;
            found.extend(of_training(graph, batch, backend)?);
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
        (self.pass, self.problem, self.epilogue, self.reads_image)
            == (other.pass, other.problem, other.epilogue, other.reads_image)
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

/// The steps of a plan that stand for one run of nodes, those of its backward pass apart.
struct Group {
    nodes: Vec<NodeId>,
    forward: Sequence,
    backward: Option<Sequence>,
}

/// A plan cut into its groups.
fn groups(plan: Plan) -> Vec<Group> {
    let values = Arc::new(plan.values);
    let mut nodes: Vec<Vec<NodeId>> = Vec::new();
    let mut steps: Vec<[Vec<Box<dyn Step>>; 2]> = Vec::new();
    for PlannedStep { nodes: own, pass, step, .. } in plan.steps {
        let index = nodes.iter().position(|known| *known == own).unwrap_or_else(|| {
            nodes.push(own);
            steps.push(Default::default());
            nodes.len() - 1
        });
        steps[index][usize::from(pass == Pass::Backward)].push(step);
    }
    let sequence = |steps| Sequence { values: values.clone(), steps: Arc::new(steps) };
    let group = |(nodes, [forward, backward]): (_, [Vec<_>; 2])| {
        let backward = (!backward.is_empty()).then(|| sequence(backward));
        Group { nodes, forward: sequence(forward), backward }
    };
    nodes.into_iter().zip(steps).map(group).collect()
}

/// Builds a [`TimedLayer`] from the steps that compute some nodes of a graph.
struct Maker<'a> {
    graph: &'a Graph,
    batch: usize,
}

impl Maker<'_> {
    fn layer(&self, nodes: &[NodeId], problem: ConvProblem, pass: LayerPass, steps: Sequence) -> Option<TimedLayer> {
        let cost = steps.cost()?;
        let name = self.graph.nodes[nodes[0]].name.clone();
        let direction = match pass {
            LayerPass::Forward | LayerPass::StepForward => Pass::Forward,
            _ => Pass::Backward,
        };
        let words: Vec<String> = steps.steps.iter().map(|step| step.describe()).collect();
        let kind = words.join(", ");
        let bare = !matches!(pass, LayerPass::Forward | LayerPass::StepForward | LayerPass::StepBackward);
        Some(TimedLayer {
            cost: KernelCost::new(name.clone(), kind, direction, nodes.to_vec(), None, cost),
            name,
            pass,
            problem: problem.batch(self.batch),
            epilogue: if bare { LayerEpilogue::default() } else { epilogue(self.graph, nodes) },
            reads_image: self.reads_image(nodes),
            counts: Vec::new(),
            steps,
        })
    }

    /// Whether the run begins with the image, which needs no gradient.
    fn reads_image(&self, nodes: &[NodeId]) -> bool {
        self.graph.nodes[nodes[0]].inputs[0] == NodeId::INPUT
    }
}

/// What follows the convolution with which a run of nodes begins.
fn epilogue(graph: &Graph, nodes: &[NodeId]) -> LayerEpilogue {
    let mut epilogue = LayerEpilogue::default();
    for &node in nodes {
        match graph.nodes[node].op {
            Op::Conv(conv) => {
                epilogue.bias = match conv.bias {
                    Bias::None => BiasOperand::None,
                    Bias::Channel => BiasOperand::Channel(()),
                    Bias::Map => BiasOperand::Map(()),
                };
            }
            Op::Add => epilogue.residual = Some(()),
            Op::Activation(act) => epilogue.act = Some(Activation { site: None, ..act }),
            _ => {}
        }
    }
    epilogue
}

/// The convolution that a group computes, if it computes one.
fn convolution(group: &Group) -> Option<ConvProblem> {
    group.forward.steps.iter().find_map(|step| step.convolution().copied())
}

/// Every convolution of a network whose batch-norm is folded away, and its gradients alone.
fn of_inference(graph: &Graph, batch: usize, backend: Backend) -> Result<Vec<TimedLayer>> {
    let make = Maker { graph, batch };
    let mut layers = Vec::new();
    let target = Target { fusion: Fusion::Epilogue, ..Target::inference(backend) };
    for group in groups(Plan::new(graph, &target)?) {
        let Some(problem) = convolution(&group) else { continue };
        let nodes = &group.nodes;
        layers.extend(make.layer(nodes, problem, LayerPass::Forward, group.forward.clone()));
        let LoneGradients { values, weights, input } = LoneGradients::new(problem, backend);
        let values = Arc::new(values);
        let mut gradient = |pass, step: Box<dyn Step>| {
            let steps = Sequence { values: values.clone(), steps: Arc::new(vec![step]) };
            layers.extend(make.layer(nodes, problem, pass, steps));
        };
        gradient(LayerPass::WeightGradient, weights);
        // The image needs no gradient.
        if !make.reads_image(nodes) {
            let pass = match backend {
                Backend::Host => LayerPass::BothGradients,
                Backend::Cuda => LayerPass::InputGradient,
            };
            gradient(pass, input);
        }
    }
    Ok(layers)
}

/// Every convolution of a network's training step with what is fused around it, forward and backward, its operands
/// stored.
fn of_training(graph: &Graph, batch: usize, backend: Backend) -> Result<Vec<TimedLayer>> {
    let make = Maker { graph, batch };
    let target = Target { fusion: Fusion::Epilogue, ..Target::training(backend) };
    let mut layers = Vec::new();
    for group in groups(Plan::new(graph, &target)?) {
        let (Some(problem), true) = (convolution(&group), group.forward.steps.len() > 1) else { continue };
        layers.extend(make.layer(&group.nodes, problem, LayerPass::StepForward, group.forward.clone()));
        if let Some(backward) = &group.backward {
            layers.extend(make.layer(&group.nodes, problem, LayerPass::StepBackward, backward.clone()));
        }
    }
    Ok(layers)
}
