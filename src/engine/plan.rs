//! A network as a list of steps: the forward pass, and behind it the backward pass.

use crate::dtype::Dtype;
use crate::graph::{Graph, NodeId};
use crate::ops::config::KernelTarget;
use crate::ops::step::{Backend, ComputeUnit, Place, Step, Store, Uses, ValueId, Values};
use crate::shape::Shape;
use crate::{Error, Result};

use super::gradients::Gradients;
use super::lower::Lowering;

/// How much of a network one step takes in. Each level has the rules of those below it (`lower.rs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fusion {
    /// One step a node: the oracle.
    PerNode,
    /// Convolution, batch-norm, residual and activation together; batch-norm folded away for inference.
    Epilogue,
    /// Values which the convolution behind them can form on load are not stored.
    OnLoad,
    /// Whole inverted residuals, whose hidden values are not stored. The host runs them so from `OnLoad` on.
    Block,
}

/// What a plan is made for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Who runs it. A rule whose step a backend does not have is passed over.
    pub backend: Backend,
    /// What a GPU's kernels are chosen for; the host's are not.
    pub kernels: KernelTarget,
    /// Level of fusion.
    pub fusion: Fusion,
    /// Whether batch statistics are used and there is a backward pass.
    pub training: bool,
    /// Values that must be stored, and may be given a gradient of their own.
    pub taps: Vec<NodeId>,
}

impl Target {
    /// Inference, with everything fused that always pays; on a GPU in f32.
    pub fn inference(backend: Backend) -> Self {
        let kernels = KernelTarget { dtype: Dtype::F32, arch: 70 };
        Self { backend, kernels, fusion: Fusion::OnLoad, training: false, taps: Vec::new() }
    }

    /// What a GPU of an architecture runs at a level of fusion.
    pub fn gpu(kernels: KernelTarget, fusion: Fusion, training: bool) -> Self {
        Self { backend: Backend::Cuda, kernels, fusion, training, taps: Vec::new() }
    }

    /// A training step, with everything fused that always pays.
    pub fn training(backend: Backend) -> Self {
        Self { training: true, ..Self::inference(backend) }
    }
}

/// Which way a step goes through the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pass {
    /// From the image to the output.
    Forward,
    /// Gradients of a step's inputs and parameters.
    Backward,
}

/// A step in its place.
#[derive(Debug)]
pub struct PlannedStep {
    /// Name of the last node of its group.
    pub name: String,
    /// Nodes that its group covers, in order. Steps of one group stand for one run of nodes.
    pub nodes: Vec<NodeId>,
    /// Its direction.
    pub pass: Pass,
    /// What it does.
    pub step: Box<dyn Step>,
    /// What it reads and writes.
    pub uses: Uses,
}

/// What a step must move and compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepCost {
    /// The unit it computes on.
    pub unit: ComputeUnit,
    /// Floating-point operations per image, a multiply-accumulate counted as two.
    pub flops: u64,
    /// Elements per image in the type of activations that are read and written.
    pub activations: u64,
    /// Elements in the type of activations, whatever the batch: weights.
    pub weights: u64,
    /// Elements in `f32`, whatever the batch: biases, statistics, gradients of parameters.
    pub floats: u64,
}

/// The steps of a network in order of execution.
///
/// # Examples
/// What runs for a block at two levels of fusion, printed.
/// ```
/// use depthshrinker::engine::{Fusion, Plan, Target};
/// use depthshrinker::model::Model;
/// use depthshrinker::networks::{NetworkOptions, build};
/// use depthshrinker::ops::step::Backend;
/// use depthshrinker::shape::Shape;
///
/// let graph = build("mobilenetv2-0.1", &NetworkOptions::new(Shape::new(32, 32, 3), 5))?;
/// let graph = Model::initialise(graph, 7)?.folded()?.graph;
/// let print = |fusion| -> depthshrinker::Result<Vec<String>> {
///     let plan = Plan::new(&graph, &Target { fusion, ..Target::inference(Backend::Host) })?;
///     let of_block = plan.steps.iter().filter(|step| step.name.starts_with("blocks.1.1"));
///     Ok(of_block.map(|step| step.step.describe()).collect())
/// };
/// let epilogue = ["pointwise 1x1 + activation", "depthwise 3x3 + activation", "pointwise 1x1 + residual"];
/// assert_eq!(print(Fusion::Epilogue)?, epilogue);
/// assert_eq!(print(Fusion::Block)?, ["inverted_residual 3x3 + residual"]);
/// # Ok::<(), depthshrinker::Error>(())
/// ```
#[derive(Debug)]
pub struct Plan {
    /// Everything that steps read and write.
    pub values: Values,
    /// Forward steps, then those of the backward pass.
    pub steps: Vec<PlannedStep>,
    /// How many of them are the forward pass.
    pub forward: usize,
    /// Shape of every node's value.
    pub shapes: Vec<Shape>,
    /// What it was made for.
    pub target: Target,
    /// The value of every node that is stored.
    stored: Vec<Option<ValueId>>,
    /// Output and taps, each with its gradient.
    given: Vec<(NodeId, ValueId)>,
}

impl Plan {
    /// Lowers a graph. An inference plan fuses batch-norm only if it was folded before
    /// ([`crate::model::Model::folded`]).
    ///
    /// # Errors
    /// As [`Graph::shapes`].
    pub fn new(graph: &Graph, target: &Target) -> Result<Self> {
        let mut lowering = Lowering::new(graph, target)?;
        let groups = lowering.groups()?;
        let (stored, mut values, shapes) = lowering.finish();
        let mut steps = Vec::new();
        let mut backward = Vec::new();
        let mut given = Vec::new();
        if target.training {
            let image = stored[0].ok_or_else(|| Error::Graph("the image is not stored".into()))?;
            let mut gradients = Gradients::new(target.backend, &mut values, image);
            for &node in target.taps.iter().chain([&graph.output()]).collect::<std::collections::BTreeSet<_>>() {
                let value = stored[node].ok_or_else(|| Error::Graph(format!("node {node} is not stored")))?;
                given.push((node, gradients.give(value)));
            }
            for group in groups.iter().rev() {
                for step in group.steps.iter().rev() {
                    step.gradient(&mut gradients);
                    backward.extend(gradients.take().into_iter().map(|step| (group.nodes.clone(), step)));
                }
            }
        }
        let name = |nodes: &[NodeId]| nodes.last().map_or_else(String::new, |&last| graph.nodes[last].name.clone());
        let planned = |nodes: Vec<NodeId>, step: Box<dyn Step>, pass| {
            let uses = step.uses();
            PlannedStep { name: name(&nodes), nodes, pass, step, uses }
        };
        for group in groups {
            let nodes = group.nodes;
            steps.extend(group.steps.into_iter().map(|step| planned(nodes.clone(), step, Pass::Forward)));
        }
        let forward = steps.len();
        steps.extend(backward.into_iter().map(|(nodes, step)| planned(nodes, step, Pass::Backward)));
        Ok(Self { values, steps, forward, shapes, target: target.clone(), stored, given })
    }

    /// The stored value of a node.
    ///
    /// # Panics
    /// When the node's value is not stored; that of the image, of the output and of a tap always is.
    pub fn value(&self, node: NodeId) -> ValueId {
        self.stored[node].unwrap_or_else(|| panic!("the value of node {node} is not stored"))
    }

    /// Output and taps of a training plan, each with its gradient, which whoever runs it gives.
    pub fn given(&self) -> &[(NodeId, ValueId)] {
        &self.given
    }

    /// The gradient that is given to the output or to a tap.
    ///
    /// # Panics
    /// For any other node, and where nothing is trained.
    pub fn given_gradient(&self, node: NodeId) -> ValueId {
        let found = self.given.iter().find(|(given, _)| *given == node);
        found.unwrap_or_else(|| panic!("node {node} is given no gradient")).1
    }

    /// What a step must move and compute: each of its values is read once and written once.
    pub fn cost(&self, step: &PlannedStep) -> StepCost {
        StepCost::of(step.step.as_ref(), &step.uses, &self.values)
    }
}

impl StepCost {
    /// What a step over some values must move and compute.
    pub fn of(step: &dyn Step, uses: &Uses, values: &Values) -> Self {
        let work = step.work();
        let mut cost = Self { unit: work.unit, flops: work.flops, activations: 0, weights: 0, floats: 0 };
        for &id in uses.reads.iter().chain(&uses.writes).chain(&uses.adds) {
            let value = values.get(id);
            // Scores are there only during a search.
            if matches!(value.place, Place::Score(_)) {
                continue;
            }
            let per_image = value.len(1) as u64;
            match (value.extent, value.store) {
                (crate::ops::step::Extent::PerImage(_), _) => cost.activations += per_image,
                (_, Store::Activation) => cost.weights += per_image,
                (_, Store::Float | Store::Sum) => cost.floats += per_image,
            }
        }
        cost
    }

    /// Both together, one behind the other. Operations are those of the matrix units where either uses them: they limit,
    /// and what the vector units add is not of their kind.
    pub fn and(self, other: Self) -> Self {
        let (unit, flops) = match (self.unit, other.unit) {
            (a, b) if a == b => (a, self.flops + other.flops),
            (ComputeUnit::Matrix, _) => (self.unit, self.flops),
            _ => (other.unit, other.flops),
        };
        Self {
            unit,
            flops,
            activations: self.activations + other.activations,
            weights: self.weights + other.weights,
            floats: self.floats + other.floats,
        }
    }

    /// Least bytes that a batch moves.
    pub fn bytes(&self, batch: usize, precision: Dtype) -> u64 {
        precision.bytes() as u64 * (self.activations * batch as u64 + self.weights)
            + size_of::<f32>() as u64 * self.floats
    }
}
