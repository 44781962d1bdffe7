//! Lowering a graph to forward steps: a table of rules, of which the first that matches a node takes it and the run of
//! nodes behind it (`docs/kernels.md` a). The last rule alone is the reference plan.

use crate::graph::{Activation, Bias, Conv, ConvFamily, Graph, NodeId, Op, ParamRole, ParamSpec};
use crate::ops::batch_norm::{NormaliseStep, PlannedNormalisation, PlannedStatistics};
use crate::ops::conv::winograd::{WinogradProblem, WinogradStep};
use crate::ops::conv::{ConvProblem, ConvStep};
use crate::ops::epilogue::PlannedEpilogue;
use crate::ops::inverted_residual::{InvertedResidualProblem, InvertedResidualStep, PlannedConv};
use crate::ops::operation::LoweredNode;
use crate::ops::step::{Backend, Operand, ParamId, Place, Step, ValueId, Values};
use crate::shape::Shape;
use crate::{Error, Result};

use super::plan::{Fusion, Target};

/// One row of the table.
struct Rule {
    /// The level that it belongs to.
    level: Fusion,
    /// Who has its steps.
    backends: &'static [Backend],
    /// Whether it is for training, or for inference.
    training: &'static [bool],
    /// Takes a node and some behind it, where they match.
    apply: fn(&mut Lowering<'_>, NodeId) -> Result<Option<Group>>,
}

const BOTH: &[Backend] = &[Backend::Host, Backend::Cuda];
const HOST: &[Backend] = &[Backend::Host];

/// Highest level first.
const RULES: &[Rule] = &[
    Rule { level: Fusion::Block, backends: BOTH, training: &[false], apply: inverted_residual },
    Rule { level: Fusion::OnLoad, backends: BOTH, training: &[false], apply: inverted_residual_that_pays },
    Rule { level: Fusion::OnLoad, backends: BOTH, training: &[true], apply: conv_bn_formed_on_load },
    Rule { level: Fusion::Epilogue, backends: BOTH, training: &[true], apply: conv_with_statistics },
    Rule { level: Fusion::Epilogue, backends: HOST, training: &[false], apply: conv_in_tiles },
    Rule { level: Fusion::Epilogue, backends: BOTH, training: &[false], apply: conv_with_epilogue },
    Rule { level: Fusion::PerNode, backends: BOTH, training: &[false, true], apply: node },
];

/// The steps that stand for a run of nodes.
#[derive(Debug)]
pub(super) struct Group {
    /// Nodes it covers, in order.
    pub nodes: Vec<NodeId>,
    /// Its steps, in order.
    pub steps: Vec<Box<dyn Step>>,
}

/// A plan in the making.
pub(super) struct Lowering<'a> {
    graph: &'a Graph,
    target: &'a Target,
    params: Vec<ParamSpec>,
    shapes: Vec<Shape>,
    users: Vec<Vec<NodeId>>,
    values: Values,
    /// What each node's value is to those that read it.
    operands: Vec<Option<Operand>>,
}

/// A convolution with what can follow it within a step.
struct ConvRun {
    nodes: Vec<NodeId>,
    batch_norm: Option<NodeId>,
    residual: Option<NodeId>,
    act: Option<Activation>,
}

impl ConvRun {
    fn output(&self) -> NodeId {
        self.nodes[self.nodes.len() - 1]
    }
}

impl<'a> Lowering<'a> {
    /// Begins with the image.
    pub fn new(graph: &'a Graph, target: &'a Target) -> Result<Self> {
        let (shapes, params) = (graph.shapes()?, graph.params()?);
        let mut values = Values::default();
        let mut operands = vec![None; graph.nodes.len()];
        operands[0] = Some(Operand::Stored(values.activation(shapes[0])));
        Ok(Self { graph, target, params, shapes, users: graph.users(), values, operands })
    }

    /// All nodes, in groups in order of execution.
    pub fn groups(&mut self) -> Result<Vec<Group>> {
        let mut groups: Vec<Group> = Vec::new();
        let mut covered = vec![false; self.graph.nodes.len()];
        for id in NodeId::all(self.graph.nodes.len()).skip(1) {
            if covered[id] {
                continue;
            }
            let group = self.first_match(id)?;
            group.nodes.iter().for_each(|&node| covered[node] = true);
            groups.push(group);
        }
        // A fused step stands where its last node stood: only there all that it reads is known to exist.
        groups.sort_by_key(|group| group.nodes.last().copied());
        Ok(groups)
    }

    /// The stored values by node, all values, and the nodes' shapes.
    pub fn finish(self) -> (Vec<Option<ValueId>>, Values, Vec<Shape>) {
        let stored = |operand: Option<Operand>| match operand {
            Some(Operand::Stored(value)) => Some(value),
            _ => None,
        };
        (self.operands.into_iter().map(stored).collect(), self.values, self.shapes)
    }

    fn first_match(&mut self, id: NodeId) -> Result<Group> {
        let Target { fusion, backend, training, .. } = *self.target;
        let applies = |rule: &&Rule| {
            rule.level <= fusion && rule.backends.contains(&backend) && rule.training.contains(&training)
        };
        for rule in RULES.iter().filter(applies) {
            if let Some(group) = (rule.apply)(self, id)? {
                return Ok(group);
            }
        }
        Err(Error::Graph(format!("{}: no step computes {}", self.graph.nodes[id].name, self.graph.nodes[id].op)))
    }

    fn op(&self, id: NodeId) -> Op {
        self.graph.nodes[id].op
    }

    /// A value that is read from memory.
    fn stored(&self, node: NodeId) -> Result<ValueId> {
        match self.operands[node] {
            Some(Operand::Stored(value)) => Ok(value),
            _ => Err(Error::Graph(format!("{} is read before it is written", self.graph.nodes[node].name))),
        }
    }

    fn operand(&self, node: NodeId) -> Result<Operand> {
        self.operands[node]
            .ok_or_else(|| Error::Graph(format!("{} is read before it is written", self.graph.nodes[node].name)))
    }

    /// The value that a node's step is to write.
    fn result(&mut self, node: NodeId) -> ValueId {
        let value = self.values.activation(self.shapes[node]);
        self.operands[node] = Some(Operand::Stored(value));
        value
    }

    /// A node whose result is to be `output`.
    fn at(&mut self, id: NodeId, output: ValueId) -> At<'_, 'a> {
        At { lowering: self, id, output }
    }

    /// The only reader of a value that nobody else needs.
    fn next(&self, id: NodeId) -> Option<NodeId> {
        match self.users[id][..] {
            [next] if !self.target.taps.contains(&id) => Some(next),
            _ => None,
        }
    }

    /// The convolution at a node, followed by a batch-norm where there is one and `batch_norm` wants it, then by a residual
    /// addition and an activation.
    fn conv_run(&self, id: NodeId, with_batch_norm: bool) -> Option<ConvRun> {
        let Op::Conv(conv) = self.op(id) else { return None };
        let mut run = ConvRun { nodes: vec![id], batch_norm: None, residual: None, act: None };
        if with_batch_norm {
            let bn =
                self.next(id).filter(|&next| matches!(self.op(next), Op::BatchNorm(_)) && conv.bias == Bias::None)?;
            run.batch_norm = Some(bn);
            run.nodes.push(bn);
        }
        let x = self.graph.nodes[id].inputs[0];
        let last = run.output();
        if let Some(add) = self.next(last).filter(|&next| self.op(next) == Op::Add) {
            let other = self.graph.nodes[add].inputs.iter().copied().find(|&i| i != last);
            // Two additions of two convolutions must not both take the other in; the later one does.
            if let Some(other) = other.filter(|&other| other < id && other != x) {
                run.nodes.push(add);
                run.residual = Some(other);
            }
        }
        if let Some(next) = self.next(run.output())
            && let Op::Activation(act) = self.op(next)
        {
            run.nodes.push(next);
            run.act = Some(act);
        }
        Some(run)
    }

    /// The convolution at a node with its own bias and nothing behind it.
    fn conv_step(&mut self, id: NodeId, y: ValueId) -> Result<ConvStep> {
        let Op::Conv(conv) = self.op(id) else {
            return Err(Error::Graph(format!("{} is no convolution", self.graph.nodes[id].name)));
        };
        let x = self.operand(self.graph.nodes[id].inputs[0])?;
        conv.planned(&mut self.at(id, y), x, y)
    }

    /// The convolutions of an inverted residual that begins at a node: expansion (or none), depthwise, projection, each with a
    /// bias per channel, the inner ones read by the next alone.
    fn inverted_residual(&self, id: NodeId) -> Option<Vec<ConvRun>> {
        // Nothing where one of them has no bias per channel.
        let families = |runs: &[ConvRun]| -> Vec<ConvFamily> {
            let family = |run: &ConvRun| match self.op(run.nodes[0]) {
                Op::Conv(conv) if conv.bias == Bias::Channel => Some(conv.family()),
                _ => None,
            };
            runs.iter().map(family).collect::<Option<_>>().unwrap_or_default()
        };
        const WITHOUT_EXPANSION: [ConvFamily; 2] = [ConvFamily::Depthwise, ConvFamily::Pointwise];
        let mut runs = vec![self.conv_run(id, false)?];
        while runs.len() < 3 && families(&runs)[..] != WITHOUT_EXPANSION {
            let last = &runs[runs.len() - 1];
            let next = self.next(last.output()).filter(|_| last.residual.is_none())?;
            runs.push(self.conv_run(next, false)?);
        }
        let [first, rest @ ..] = &families(&runs)[..] else { return None };
        let expands = *first == ConvFamily::Pointwise && *rest == WITHOUT_EXPANSION;
        (expands || families(&runs)[..] == WITHOUT_EXPANSION).then_some(runs)
    }

    /// What those convolutions compute together, where the backend has a step for it.
    fn inverted_residual_problem(&self, runs: &[ConvRun]) -> Option<InvertedResidualProblem> {
        let [.., depthwise, project] = runs else { return None };
        let Op::Conv(Conv { window, c_out: hidden, .. }) = self.op(depthwise.nodes[0]) else { return None };
        let input = self.shapes[self.graph.nodes[runs[0].nodes[0]].inputs[0]];
        let (hidden, c_out) = ((runs.len() == 3).then_some(hidden), self.shapes[project.output()].c);
        let problem = InvertedResidualProblem::new(1, input, hidden, c_out, window)?;
        problem.has_step(self.target.backend).then_some(problem)
    }

    /// Weights, bias and activation of a convolution within a block whose result is y; `None` for any other node.
    fn folded_conv(&mut self, run: &ConvRun, y: ValueId) -> Result<Option<PlannedConv>> {
        let Op::Conv(conv) = self.op(run.nodes[0]) else { return Ok(None) };
        let mut node = self.at(run.nodes[0], y);
        let w = node.param(Place::Weight, ParamRole::ConvWeight(conv.family()))?;
        let b = node.param(Place::Param, ParamRole::ConvBias)?;
        Ok(Some(PlannedConv { w, b, act: run.act }))
    }

    /// A convolution with bias, residual and activation.
    fn conv_with_epilogue(&mut self, run: &ConvRun) -> Result<ConvStep> {
        let residual = run.residual.map(|residual| self.stored(residual)).transpose()?;
        let y = self.result(run.output());
        let conv = self.conv_step(run.nodes[0], y)?;
        let epilogue = PlannedEpilogue { residual, act: run.act, ..conv.epilogue };
        Ok(ConvStep { epilogue, ..conv })
    }

    /// A convolution's raw result, its batch-norm and what follows; the result is not stored yet.
    fn conv_bn(&mut self, run: &ConvRun, bn: NodeId) -> Result<(ConvStep, PlannedNormalisation, PlannedStatistics)> {
        let raw = self.values.activation(self.shapes[bn]);
        let z = self.values.activation(self.shapes[run.output()]);
        let conv = self.conv_step(run.nodes[0], raw)?;
        let Op::BatchNorm(batch_norm) = self.op(bn) else {
            return Err(Error::Graph(format!("{} is no batch-norm", self.graph.nodes[bn].name)));
        };
        let (of, statistics) = batch_norm.planned(&mut self.at(bn, z), raw, z)?;
        let residual = run.residual.map(|residual| self.stored(residual)).transpose()?;
        let of = PlannedNormalisation { residual, act: run.act, ..of };
        let forms_gradient = self.forms_gradient(&conv.problem, &of);
        Ok((conv, PlannedNormalisation { forms_gradient, ..of }, statistics))
    }

    /// Whether a value's only reader can form it on load: the convolution of a fused step that looks at each pixel of it a
    /// few times only, and not as a residual.
    fn is_formed_on_load(&self, node: NodeId) -> bool {
        let Some(reader) = self.next(node) else { return false };
        let Op::Conv(conv) = self.op(reader) else { return false };
        let problem = ConvProblem::new(&conv, self.shapes[node], 1);
        let forms = problem.is_some_and(|problem| problem.forms_on_load(self.target.backend));
        forms && self.conv_run(reader, true).is_some()
    }

    /// Whether a convolution forms the gradient of its raw result on load, where it is normalised as `of` says: kernels do not
    /// look at a residual under the activation.
    fn forms_gradient(&self, problem: &ConvProblem, of: &PlannedNormalisation) -> bool {
        match self.target.backend {
            Backend::Host => true,
            Backend::Cuda => problem.forms_on_load(Backend::Cuda) && (of.residual.is_none() || of.act.is_none()),
        }
    }
}

/// Expansion, depthwise convolution, projection and residual with their activations, for inference: what lies between is
/// not stored (`docs/kernels.md` b).
fn inverted_residual(l: &mut Lowering<'_>, id: NodeId) -> Result<Option<Group>> {
    inverted_residual_where(l, id, |_, _| true)
}

/// The same where one step is sooner through than three.
fn inverted_residual_that_pays(l: &mut Lowering<'_>, id: NodeId) -> Result<Option<Group>> {
    inverted_residual_where(l, id, |problem, target| problem.pays(target.backend, target.kernels))
}

fn inverted_residual_where(
    l: &mut Lowering<'_>,
    id: NodeId,
    wanted: fn(&InvertedResidualProblem, &Target) -> bool,
) -> Result<Option<Group>> {
    let Some(mut runs) = l.inverted_residual(id) else { return Ok(None) };
    let problem = l.inverted_residual_problem(&runs).filter(|problem| wanted(problem, l.target));
    let Some(problem) = problem else { return Ok(None) };
    let (nodes, residual) = (runs.iter().flat_map(|run| run.nodes.clone()).collect(), runs[runs.len() - 1].residual);
    let (x, residual) = (l.stored(l.graph.nodes[id].inputs[0])?, residual.map(|node| l.stored(node)).transpose()?);
    let y = l.result(runs[runs.len() - 1].output());
    let project = runs.pop().map(|run| l.folded_conv(&run, y)).transpose()?.flatten();
    let depthwise = runs.pop().map(|run| l.folded_conv(&run, y)).transpose()?.flatten();
    let expand = runs.pop().map(|run| l.folded_conv(&run, y)).transpose()?.flatten();
    let (Some(depthwise), Some(project)) = (depthwise, project) else { return Ok(None) };
    let step = InvertedResidualStep { problem, x, expand, depthwise, project, residual, y };
    Ok(Some(Group { nodes, steps: vec![Box::new(step)] }))
}

/// Convolution and batch-norm whose result the next convolution forms on load (`docs/kernels.md` a).
fn conv_bn_formed_on_load(l: &mut Lowering<'_>, id: NodeId) -> Result<Option<Group>> {
    let Some(run) = l.conv_run(id, true) else { return Ok(None) };
    let (Some(bn), None, true) = (run.batch_norm, run.residual, l.is_formed_on_load(run.output())) else {
        return Ok(None);
    };
    let (conv, of, statistics) = l.conv_bn(&run, bn)?;
    l.operands[run.output()] = Some(Operand::Normalised(of));
    Ok(Some(Group { nodes: run.nodes, steps: conv.with_statistics(statistics, l.target.backend) }))
}

/// Convolution with the statistics of its result, then batch-norm, residual and activation in one pass.
fn conv_with_statistics(l: &mut Lowering<'_>, id: NodeId) -> Result<Option<Group>> {
    let Some(run) = l.conv_run(id, true) else { return Ok(None) };
    let Some(bn) = run.batch_norm else { return Ok(None) };
    let (conv, of, statistics) = l.conv_bn(&run, bn)?;
    l.operands[run.output()] = Some(Operand::Stored(of.z));
    let mut steps = conv.with_statistics(statistics, l.target.backend);
    steps.push(Box::new(NormaliseStep { of }));
    Ok(Some(Group { nodes: run.nodes, steps }))
}

/// The same as `conv_with_epilogue` with fewer multiplications, where that is sooner through.
fn conv_in_tiles(l: &mut Lowering<'_>, id: NodeId) -> Result<Option<Group>> {
    let Some(run) = l.conv_run(id, false) else { return Ok(None) };
    let Op::Conv(conv) = l.op(id) else { return Ok(None) };
    let input = l.shapes[l.graph.nodes[id].inputs[0]];
    let Some(problem) = ConvProblem::new(&conv, input, 1).and_then(WinogradProblem::new) else { return Ok(None) };
    let ConvStep { x: Operand::Stored(x), w, epilogue, y, .. } = l.conv_with_epilogue(&run)? else { return Ok(None) };
    Ok(Some(Group { nodes: run.nodes, steps: vec![Box::new(WinogradStep { problem, x, w, epilogue, y })] }))
}

/// Convolution with bias, residual and activation, for inference.
fn conv_with_epilogue(l: &mut Lowering<'_>, id: NodeId) -> Result<Option<Group>> {
    let Some(run) = l.conv_run(id, false) else { return Ok(None) };
    let conv = l.conv_with_epilogue(&run)?;
    Ok(Some(Group { nodes: run.nodes, steps: vec![Box::new(conv)] }))
}

/// One node: whatever its operation says.
fn node(l: &mut Lowering<'_>, id: NodeId) -> Result<Option<Group>> {
    let inputs = &l.graph.nodes[id].inputs;
    inputs.iter().try_for_each(|&input| l.stored(input).map(drop))?;
    let op = l.op(id);
    let y = l.result(id);
    let steps = op.operation().lower(&mut l.at(id, y))?;
    Ok(Some(Group { nodes: vec![id], steps }))
}

/// A node in the graph that is lowered.
struct At<'l, 'a> {
    lowering: &'l mut Lowering<'a>,
    id: NodeId,
    output: ValueId,
}

impl At<'_, '_> {
    fn input_node(&self, index: usize) -> NodeId {
        self.lowering.graph.nodes[self.id].inputs[index]
    }
}

impl LoweredNode for At<'_, '_> {
    fn input(&self, index: usize) -> ValueId {
        self.lowering.stored(self.input_node(index)).expect("a rule for single nodes finds its inputs stored")
    }

    fn input_shape(&self, index: usize) -> Shape {
        self.lowering.shapes[self.input_node(index)]
    }

    fn output(&self) -> ValueId {
        self.output
    }

    fn output_shape(&self) -> Shape {
        self.lowering.shapes[self.id]
    }

    fn training(&self) -> bool {
        self.lowering.target.training
    }

    fn param(&mut self, place: fn(ParamId) -> Place, role: ParamRole) -> Result<ValueId> {
        let Lowering { params, values, graph, .. } = &mut *self.lowering;
        let id = params.iter().position(|param| param.node == self.id && param.role == role);
        let id = id
            .map(ParamId::new)
            .ok_or_else(|| Error::Graph(format!("{} lacks its {role:?}", graph.nodes[self.id].name)))?;
        Ok(values.pinned(place(id), params[id].len()))
    }

    fn values(&mut self) -> &mut Values {
        &mut self.lowering.values
    }
}
