//! The fused step and batch-norm alone.

use super::{Case, On, Output};
use crate::Result;
use crate::device::Backend;
use crate::engine::{Backpropagated, Sequence, SequenceRun};
use crate::ops::activation::Activation;
use crate::ops::batch_norm::{
    BatchNorm, BatchNormProblem, NormaliseStep, PlannedNormalisation, PlannedStatistics, RunningStatisticsStep,
    StatisticsStep,
};
use crate::ops::conv::{Bias, Conv, ConvProblem, ConvStep};
use crate::ops::epilogue::PlannedEpilogue;
use crate::ops::step::{Operand, ParamId, Place, SiteId, Step, ValueId, Values};
use crate::shape::{Shape, Window};

/// lines, w, c, whether a residual follows, limit and slope of an activation.
pub type NormRow = (usize, usize, usize, bool, Option<(f32, f32)>);

/// The parameters of the cases.
const WEIGHT: ParamId = ParamId::new(0);
const GAMMA: ParamId = ParamId::new(1);
const BETA: ParamId = ParamId::new(2);
const RUNNING: [ParamId; 2] = [ParamId::new(3), ParamId::new(4)];

/// With and without residual and activation; a slope of 1 and of 0; one pixel per line; many channels and few.
pub const NORMS: &[NormRow] = &[
    (6, 5, 8, false, None),
    (7, 9, 24, false, Some((1.0, 0.0))),
    (130, 28, 16, false, Some((6.0, 0.0))),
    (4, 3, 5, true, None),
    (12, 4, 13, true, Some((0.8, 0.0))),
    (9, 7, 40, true, Some((1.2, 0.3))),
    (8, 2, 1280, false, Some((1.0, 1.0))),
    (3, 1, 3, false, Some((f32::INFINITY, 0.0))),
];

pub(super) fn cases(row: &NormRow) -> Vec<Case> {
    let row = *row;
    let name = format!("{}x{}x{}_residual_{}_{:?}", row.0, row.1, row.2, row.3, row.4);
    vec![
        Case::new(format!("conv_bn/{name}"), move |on| fused(row, on)),
        Case::new(format!("batch_norm/{name}"), move |on| alone(row, on)),
    ]
}

/// A mean far from zero, where naive variances lose their digits.
fn activations(c: usize, len: usize, on: &On<'_>) -> Vec<f32> {
    on.round(super::numbers(11, len).iter().enumerate().map(|(i, v)| v + (i % c % 5) as f32 * 3.0).collect())
}

/// A batch-norm in a plan of its own, where it normalises `y`.
struct Planned {
    values: Values,
    of: PlannedNormalisation,
    to: PlannedStatistics,
}

impl Planned {
    /// With what follows it; the residual is a value of its own.
    fn new(mut values: Values, y: ValueId, row: NormRow) -> Self {
        let (lines, w, c, with_residual, act) = row;
        let shape = Shape::new(lines, w, c);
        let problem = BatchNormProblem::new(&BatchNorm { channels: c, eps: 1e-5, momentum: 0.1 }, shape, 1);
        let statistics = values.floats(2 * c);
        let of = PlannedNormalisation {
            problem,
            y,
            gamma: values.pinned(Place::Param(GAMMA), c),
            beta: values.pinned(Place::Param(BETA), c),
            statistics,
            residual: with_residual.then(|| values.activation(shape)),
            act: act.map(|(limit, slope)| Activation { limit: Some(limit), site: Some(SiteId::new(0)), slope }),
            z: values.activation(shape),
            forms_gradient: false,
        };
        let running = RUNNING.map(|param| values.pinned(Place::Running(param), c));
        Self { values, of, to: PlannedStatistics { problem, statistics, running } }
    }

    /// Fills γ, β and the running statistics.
    fn fill(&self, on: &On<'_>, run: &mut SequenceRun) -> Result<()> {
        on.set(run, self.of.gamma, |c| super::numbers(14, c).iter().map(|v| 1.0 + 0.3 * v).collect())?;
        on.fill_floats(run, self.of.beta, 15)?;
        on.set(run, self.to.running[0], |c| vec![0.5; c])?;
        on.set(run, self.to.running[1], |c| vec![2.0; c])?;
        self.of.residual.map_or(Ok(()), |residual| on.fill(run, residual, 13))
    }
}

/// Behind an identity-like pointwise convolution, so that the whole step runs as the backend fuses it.
fn fused(row: NormRow, on: &On<'_>) -> Result<Vec<Output>> {
    let (lines, w, c, ..) = row;
    let conv = Conv { c_in: c, c_out: c, window: Window::square(1, 1, 0), groups: 1, bias: Bias::None };
    let shape = Shape::new(lines, w, c);
    let problem = ConvProblem::new(&conv, shape, 1).expect("a pointwise kernel fits");
    let mut values = Values::default();
    let (x, raw) = (values.activation(shape), values.activation(shape));
    let weight = values.pinned(Place::Weight(WEIGHT), c * c);
    let planned = Planned::new(values, raw, row);
    let backend = on.device.backend();
    let conv = ConvStep {
        problem,
        x: Operand::Stored(x),
        w: weight,
        epilogue: PlannedEpilogue::default(),
        y: raw,
        statistics: None,
    };
    // Kernels that form the gradient on load do not look at a residual under the activation.
    let forms_gradient = backend == Backend::Host || planned.of.residual.is_none() || planned.of.act.is_none();
    let of = PlannedNormalisation { forms_gradient, ..planned.of };
    let mut steps = conv.with_statistics(planned.to, backend);
    steps.push(Box::new(NormaliseStep { of }));
    let forward = Sequence::new(planned.values.clone(), steps);
    let mut run = SequenceRun::new(on.device, &forward, 1)?;
    on.set(&mut run, x, |len| activations(c, len, on))?;
    on.set(&mut run, weight, |len| (0..len).map(|i| if i % (c + 1) == 0 { 1.0 } else { 0.0 }).collect())?;
    planned.fill(on, &mut run)?;
    on.spoil(&mut run, planned.of.z)?;
    run.run();
    let z = on.get(run.buffer(planned.of.z))?;
    let statistics = on.get(run.buffer(planned.of.statistics))?;
    let running = [on.get(run.buffer(planned.to.running[0]))?, on.get(run.buffer(planned.to.running[1]))?].concat();
    let pixels = lines * w;
    let mut outputs = vec![
        Output::rounded("z", z, pixels),
        Output::float("statistics", statistics, pixels),
        Output::float("running statistics", running, pixels),
    ];
    let added_to: Vec<ValueId> = planned.of.residual.into_iter().collect();
    let back = forward.backward(backend, &[planned.of.z], &added_to);
    outputs.extend(gradients(&planned, back, &mut run, on)?);
    Ok(outputs)
}

/// The gradients behind a forward run, whose values are taken over. The residual's is added to ones, and the score's to a
/// quarter, to see accumulation.
fn gradients(planned: &Planned, back: Backpropagated, forward: &mut SequenceRun, on: &On<'_>) -> Result<Vec<Output>> {
    let Backpropagated { steps, given, gradients } = back;
    let mut run = SequenceRun::new(on.device, &steps, 1)?;
    for (id, _) in planned.values.iter() {
        run.take_from(forward, id);
    }
    on.fill(&mut run, given[0], 12)?;
    if let Some(&d_residual) = given.get(1) {
        on.set(&mut run, d_residual, |len| vec![1.0; len])?;
    }
    let score = steps.values.iter().find(|(_, value)| matches!(value.place, Place::Score(_))).map(|(id, _)| id);
    if let Some(score) = score {
        on.set(&mut run, score, |len| vec![0.25; len])?;
    }
    run.run();
    let (len, pixels) = (planned.of.problem.shape.len(), planned.of.problem.shape.pixels());
    let of = |place: Place| steps.values.iter().find(|(_, value)| value.place == place).map(|(id, _)| id);
    let mut outputs = Vec::new();
    for (id, _) in planned.values.iter() {
        let Some(gradient) = gradients.of(id).filter(|gradient| !given.contains(gradient)) else { continue };
        if run.buffer_mut(gradient).is_none() {
            continue;
        }
        let values = on.get(run.buffer(gradient))?;
        outputs.push(match steps.values.get(gradient).place {
            // Products of the rounded dy with x, whose mean is large while that of dy is 0.
            Place::ParamGradient(WEIGHT) => Output::derived("dw", values, 100 * pixels, 8.0 * (pixels as f64).sqrt()),
            Place::ParamGradient(GAMMA) => Output::float("dγ", values, pixels),
            Place::ParamGradient(_) => Output::float("dβ", values, pixels),
            // The host forms the gradient of the raw result on load, and stores none.
            _ if id == planned.of.y && of(Place::ParamGradient(WEIGHT)).is_some() => continue,
            _ => Output::rounded("dx", values, pixels),
        });
    }
    if let Some(&d_residual) = given.get(1) {
        outputs.push(Output::rounded("residual's gradient", on.get(run.buffer(d_residual))?, 1));
    }
    if let Some(score) = score {
        outputs.push(Output::float("score", on.get(run.buffer(score))?, len));
    }
    Ok(outputs)
}

/// Statistics and normalised value of a stored input, its gradient added to ones, and inference with running statistics.
fn alone((lines, w, c, _, act): NormRow, on: &On<'_>) -> Result<Vec<Output>> {
    let shape = Shape::new(lines, w, c);
    let mut values = Values::default();
    let y = values.activation(shape);
    let planned = Planned::new(values, y, (lines, w, c, false, None));
    let steps: Vec<Box<dyn Step>> =
        vec![Box::new(StatisticsStep { y, to: planned.to }), Box::new(NormaliseStep { of: planned.of })];
    let forward = Sequence::new(planned.values.clone(), steps);
    let mut run = SequenceRun::new(on.device, &forward, 1)?;
    on.set(&mut run, y, |len| activations(c, len, on))?;
    planned.fill(on, &mut run)?;
    run.run();
    let pixels = lines * w;
    let mut outputs = vec![Output::rounded("z", on.get(run.buffer(planned.of.z))?, pixels)];
    let running = [0, 1].map(|i| on.get(run.buffer(planned.to.running[i])));
    let back = forward.backward(on.device.backend(), &[planned.of.z], &[y]);
    let [running_mean, running_var] = running;
    let (running, inputs) = ([running_mean?, running_var?], on.get(run.buffer(y))?);
    outputs.extend(gradients(&planned, back, &mut run, on)?);
    outputs.push(inference(&planned, act, &running, &inputs, on)?);
    Ok(outputs)
}

/// The same batch-norm with its running statistics and an activation.
fn inference(
    planned: &Planned,
    act: Option<(f32, f32)>,
    running: &[Vec<f32>; 2],
    y: &[f32],
    on: &On<'_>,
) -> Result<Output> {
    let act = act.map(|(limit, slope)| Activation { limit: Some(limit), site: None, slope });
    let of = PlannedNormalisation { act, ..planned.of };
    let PlannedStatistics { problem, statistics, running: ids } = planned.to;
    let steps: Vec<Box<dyn Step>> =
        vec![Box::new(RunningStatisticsStep { problem, running: ids, statistics }), Box::new(NormaliseStep { of })];
    let mut run = SequenceRun::new(on.device, &Sequence::new(planned.values.clone(), steps), 1)?;
    planned.fill(on, &mut run)?;
    on.set(&mut run, of.y, |_| y.to_vec())?;
    for (id, values) in ids.into_iter().zip(running) {
        on.set(&mut run, id, |_| values.clone())?;
    }
    run.run();
    Ok(Output::rounded("z at inference", on.get(run.buffer(of.z))?, planned.of.problem.shape.pixels()))
}
