//! Convolutions between two batch-norms: an input that is normalised on load, statistics of the result, a gradient that is
//! formed on load, and the sums over the input's.

use super::conv::{name, terms};
use super::{Case, On, Output};
use crate::Result;
use crate::device::Backend;
use crate::engine::{Backpropagated, Sequence, SequenceRun};
use crate::graph::Activation;
use crate::ops::batch_norm::{BatchNorm, BatchNormProblem, NormaliseStep, PlannedNormalisation, PlannedStatistics};
use crate::ops::conv::{ConvProblem, ConvStep};
use crate::ops::epilogue::PlannedEpilogue;
use crate::ops::step::{Operand, ParamId, Place, SiteId, Value, ValueId, Values};
use crate::shape::Shape;

const WEIGHT: Place = Place::Weight(ParamId::new(0));

pub(super) fn case(p: ConvProblem) -> Case {
    Case::new(format!("on_load/{}", name(&p)), move |on| between_batch_norms(&p, on))
}

/// A batch-norm with its activation; γ, β and the running statistics are the parameters from `first` on.
fn batch_norm(values: &mut Values, y: ValueId, shape: Shape, first: usize) -> PlannedNormalisation {
    let c = shape.c;
    let problem = BatchNormProblem::new(&BatchNorm { channels: c, eps: 1e-5, momentum: 0.1 }, shape, 1);
    let mut param = |at: usize| values.pinned(Place::Param(ParamId::new(first + at)), c);
    let (gamma, beta) = (param(0), param(1));
    let act = Some(Activation { limit: Some(1.5), site: Some(SiteId::new(first)), slope: 0.25 });
    let (statistics, z) = (values.floats(2 * c), values.activation(shape));
    PlannedNormalisation { problem, y, gamma, beta, statistics, residual: None, act, z, forms_gradient: false }
}

/// Fills γ, β and the statistics of a batch-norm with what does not depend on the device.
fn fill(of: &PlannedNormalisation, run: &mut SequenceRun, on: &On<'_>, seed: u64) -> Result<()> {
    on.set(run, of.gamma, |c| super::numbers(seed, c).iter().map(|v| 1.0 + 0.3 * v).collect())?;
    on.fill_floats(run, of.beta, seed + 1)?;
    on.set(run, of.statistics, |len| {
        let spread = super::numbers(seed + 2, len);
        spread.iter().enumerate().map(|(i, v)| if i < len / 2 { *v } else { 1.5 + 0.5 * v }).collect()
    })
}

/// A convolution between two batch-norms in a plan of its own.
struct Between {
    forward: Sequence,
    x: ValueId,
    w: ValueId,
    y: ValueId,
    before: PlannedNormalisation,
    after: PlannedNormalisation,
    running: [ValueId; 2],
}

impl Between {
    /// Formed on load where a GPU has kernels for it, on the host too.
    fn new(p: &ConvProblem, backend: Backend) -> Self {
        let on_load = p.forms_on_load(Backend::Cuda);
        let mut values = Values::default();
        let (x, y) = (values.activation(p.input), values.activation(p.output));
        let w = values.pinned(WEIGHT, p.weight_len());
        let before = batch_norm(&mut values, x, p.input, 1);
        let after = PlannedNormalisation { forms_gradient: on_load, ..batch_norm(&mut values, y, p.output, 3) };
        let running = [5, 6].map(|param| values.pinned(Place::Running(ParamId::new(param)), p.output.c));
        let x_read = if on_load { Operand::Normalised(before) } else { Operand::Stored(x) };
        let epilogue = PlannedEpilogue::default();
        let conv = ConvStep { problem: p.batch(1), x: x_read, w, epilogue, y, statistics: None };
        let to = PlannedStatistics { problem: after.problem, statistics: after.statistics, running };
        let mut steps = conv.with_statistics(to, backend);
        steps.push(Box::new(NormaliseStep { of: after }));
        Self { forward: Sequence::new(values, steps), x, w, y, before, after, running }
    }

    /// Fills what both passes read.
    fn fill(&self, run: &mut SequenceRun, on: &On<'_>) -> Result<()> {
        on.fill(run, self.x, 1)?;
        on.fill(run, self.w, 2)?;
        fill(&self.before, run, on, 3)?;
        fill(&self.after, run, on, 6)
    }

    /// The result and its statistics.
    fn run(&self, p: &ConvProblem, on: &On<'_>) -> Result<Vec<Output>> {
        let mut run = SequenceRun::new(on.device, &self.forward, p.n)?;
        self.fill(&mut run, on)?;
        on.set(&mut run, self.running[0], |c| vec![0.5; c])?;
        on.set(&mut run, self.running[1], |c| vec![2.0; c])?;
        on.spoil(&mut run, self.y)?;
        run.run();
        let running = [on.get(run.buffer(self.running[0]))?, on.get(run.buffer(self.running[1]))?].concat();
        Ok(vec![
            Output::derived("y", on.get(run.buffer(self.y))?, terms(p), 4.0),
            Output::derived("running statistics", running, p.n * p.output.pixels(), 4.0),
        ])
    }

    /// All gradients, of a y that does not depend on the device: rounding would move values across an activation's bound.
    fn gradients(&self, p: &ConvProblem, on: &On<'_>) -> Result<Vec<Output>> {
        let Backpropagated { steps, given, gradients } =
            self.forward.backward(on.device.backend(), &[self.after.z], &[]);
        let mut run = SequenceRun::new(on.device, &steps, p.n)?;
        self.fill(&mut run, on)?;
        on.fill(&mut run, self.y, 9)?;
        on.fill(&mut run, given[0], 10)?;
        let written = [("dx", self.x), ("dw", self.w), ("dγ", self.before.gamma), ("dβ", self.before.beta)];
        let written: Vec<(&str, ValueId)> =
            written.into_iter().filter_map(|(name, id)| Some((name, gradients.of(id)?))).collect();
        for &(_, id) in &written {
            on.spoil(&mut run, id)?;
        }
        let is_score = |value: &Value| matches!(value.place, Place::Score(_));
        let scores: Vec<ValueId> = steps.values.iter().filter(|(_, value)| is_score(value)).map(|(id, _)| id).collect();
        for &score in &scores {
            on.set(&mut run, score, |len| vec![0.25; len])?;
        }
        run.run();
        // Sums of products of numbers that were rounded before, dy among them, whose own sum is zero.
        let pixels = p.n * p.output.pixels();
        let roundings = 8.0 * (pixels as f64).sqrt();
        let sums = written.into_iter().map(|(name, id)| (name, id, 16 * pixels));
        let scores = scores.into_iter().map(|score| ("score", score, p.n * p.input.len()));
        let output = |(name, id, terms)| Ok(Output::derived(name, on.get(run.buffer(id))?, terms, roundings));
        sums.chain(scores).map(output).collect()
    }
}

fn between_batch_norms(p: &ConvProblem, on: &On<'_>) -> Result<Vec<Output>> {
    let between = Between::new(p, on.device.backend());
    let mut outputs = between.run(p, on)?;
    outputs.extend(between.gradients(p, on)?);
    Ok(outputs)
}
