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
use crate::ops::step::{Operand, ParamId, Place, SiteId, ValueId, Values};
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

fn between_batch_norms(p: &ConvProblem, on: &On<'_>) -> Result<Vec<Output>> {
    let on_load = p.forms_on_load(Backend::Cuda);
    let mut values = Values::default();
    let (x, y) = (values.activation(p.input), values.activation(p.output));
    let w = values.pinned(WEIGHT, p.weight_len());
    let before = batch_norm(&mut values, x, p.input, 1);
    let after = PlannedNormalisation { forms_gradient: on_load, ..batch_norm(&mut values, y, p.output, 3) };
    let running = [5, 6].map(|param| values.pinned(Place::Running(ParamId::new(param)), p.output.c));
    let conv = ConvStep {
        problem: p.batch(1),
        x: if on_load { Operand::Normalised(before) } else { Operand::Stored(x) },
        w,
        epilogue: PlannedEpilogue::default(),
        y,
        statistics: None,
    };
    let to = PlannedStatistics { problem: after.problem, statistics: after.statistics, running };
    let mut steps = conv.with_statistics(to, on.device.backend());
    steps.push(Box::new(NormaliseStep { of: after }));
    let forward = Sequence::new(values, steps);
    let mut run = SequenceRun::new(on.device, &forward, p.n)?;
    on.fill(&mut run, x, 1)?;
    on.fill(&mut run, w, 2)?;
    fill(&before, &mut run, on, 3)?;
    fill(&after, &mut run, on, 6)?;
    on.set(&mut run, running[0], |c| vec![0.5; c])?;
    on.set(&mut run, running[1], |c| vec![2.0; c])?;
    on.spoil(&mut run, y)?;
    run.run();
    let pixels = p.n * p.output.pixels();
    let running = [on.get(run.buffer(running[0]))?, on.get(run.buffer(running[1]))?].concat();
    let mut outputs = vec![
        Output::derived("y", on.get(run.buffer(y))?, terms(p), 4.0),
        Output::derived("running statistics", running, pixels, 4.0),
    ];

    // The gradient, of a y that does not depend on the device: rounding would move values across an activation's bound.
    let Backpropagated { steps, given, gradients } = forward.backward(on.device.backend(), &[after.z], &[]);
    let mut run = SequenceRun::new(on.device, &steps, p.n)?;
    on.fill(&mut run, x, 1)?;
    on.fill(&mut run, w, 2)?;
    on.fill(&mut run, y, 9)?;
    fill(&before, &mut run, on, 3)?;
    fill(&after, &mut run, on, 6)?;
    on.fill(&mut run, given[0], 10)?;
    let written = [("dx", x), ("dw", w), ("dγ", before.gamma), ("dβ", before.beta)];
    let written: Vec<(&str, ValueId)> =
        written.into_iter().filter_map(|(name, id)| Some((name, gradients.of(id)?))).collect();
    for &(_, id) in &written {
        on.spoil(&mut run, id)?;
    }
    let scores: Vec<ValueId> =
        steps.values.iter().filter(|(_, value)| matches!(value.place, Place::Score(_))).map(|(id, _)| id).collect();
    for &score in &scores {
        on.set(&mut run, score, |len| vec![0.25; len])?;
    }
    run.run();
    // Sums of products of numbers that were rounded before, dy among them, whose own sum is zero.
    let roundings = 8.0 * (pixels as f64).sqrt();
    for (name, id) in written {
        outputs.push(Output::derived(name, on.get(run.buffer(id))?, 16 * pixels, roundings));
    }
    for score in scores {
        outputs.push(Output::derived("score", on.get(run.buffer(score))?, p.n * p.input.len(), roundings));
    }
    Ok(outputs)
}
