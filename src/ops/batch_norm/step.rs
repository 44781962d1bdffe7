//! Batch-norm in a plan: statistics, the normalised value, and the two halves of the backward pass.

use super::{BatchNormProblem, NormGradient, PlannedNormalisation, StatisticsOut, SumsOut};
use crate::device::View;
use crate::ops::step::{Backend, Backward, Extent, Io, Place, Sink, Step, Store, Uses, ValueId, Work};

/// Where the statistics of a batch go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlannedStatistics {
    /// The batch-norm, for one image.
    pub problem: BatchNormProblem,
    /// μ and 1/√(σ² + ε).
    pub statistics: ValueId,
    /// Running mean and variance, which are updated.
    pub running: [ValueId; 2],
}

impl PlannedStatistics {
    /// The values that are written.
    pub fn writes(&self) -> [ValueId; 3] {
        [self.statistics, self.running[0], self.running[1]]
    }

    /// The same over the values of a run.
    pub fn lend<'a>(&self, io: &mut Io<'a>) -> StatisticsOut<'a> {
        StatisticsOut { statistics: io.write(self.statistics), running: self.running.map(|running| io.write(running)) }
    }
}

/// Statistics of a stored value.
#[derive(Debug)]
pub struct StatisticsStep {
    /// The value.
    pub y: ValueId,
    /// Where they go.
    pub to: PlannedStatistics,
}

impl Step for StatisticsStep {
    fn describe(&self) -> String {
        "batch statistics".into()
    }

    fn uses(&self) -> Uses {
        Uses { adds: self.to.running.to_vec(), ..Uses::new([self.y], self.to.writes()) }
    }

    fn work(&self) -> Work {
        Work::vector(self.to.problem.shape.len() as u64)
    }

    fn run(&self, io: &mut Io<'_>) {
        let p = self.to.problem.batch(io.n());
        super::statistics(&p, io.read(self.y), self.to.lend(io));
    }

    /// The gradient goes through the normalised value, which depends on them.
    fn gradient(&self, _: &mut dyn Backward) {}
}

/// Statistics from the running ones, for inference.
#[derive(Debug)]
pub struct RunningStatisticsStep {
    /// The batch-norm, for one image.
    pub problem: BatchNormProblem,
    /// Running mean and variance.
    pub running: [ValueId; 2],
    /// μ and 1/√(σ² + ε).
    pub statistics: ValueId,
}

impl Step for RunningStatisticsStep {
    fn describe(&self) -> String {
        "running statistics".into()
    }

    fn uses(&self) -> Uses {
        Uses::new(self.running, [self.statistics])
    }

    fn work(&self) -> Work {
        Work::vector(0)
    }

    fn run(&self, io: &mut Io<'_>) {
        let [mean, var] = self.running.map(|running| io.read(running));
        super::running_statistics(&self.problem.batch(io.n()), mean, var, io.write(self.statistics));
    }

    fn gradient(&self, _: &mut dyn Backward) {}
}

/// The normalised value, with residual and activation.
#[derive(Debug)]
pub struct NormaliseStep {
    /// What is normalised, and what follows.
    pub of: PlannedNormalisation,
}

/// The sums over a batch and what they give, in a plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlannedSums {
    /// What [`super::gradient`] takes of them.
    pub sums: ValueId,
    d_gamma: ValueId,
    d_beta: ValueId,
    score: Option<ValueId>,
}

impl PlannedSums {
    /// Adds the values of a normalisation's.
    pub fn new(of: &PlannedNormalisation, to: &mut dyn Backward) -> Self {
        let c = of.problem.shape.c;
        let len = match to.backend() {
            Backend::Host => 2 * c,
            Backend::Cuda => 4 * c,
        };
        let sums = to.values().add(Extent::Fixed(len), Store::Sum, Place::Planned);
        let (d_gamma, d_beta) = (to.param_gradient(of.gamma), to.param_gradient(of.beta));
        Self { sums, d_gamma, d_beta, score: to.score(of.act.as_ref()) }
    }

    /// The values that are written.
    pub fn writes(&self) -> impl Iterator<Item = ValueId> {
        [self.sums, self.d_gamma, self.d_beta].into_iter().chain(self.score)
    }

    /// The same over the values of a run.
    pub fn lend<'a>(&self, io: &mut Io<'a>) -> SumsOut<'a> {
        SumsOut {
            sums: io.write(self.sums),
            d_gamma: io.write(self.d_gamma),
            d_beta: io.write(self.d_beta),
            score: self.score.and_then(|score| io.write_if_lent(score)),
        }
    }
}

impl Step for NormaliseStep {
    fn describe(&self) -> String {
        let residual = if self.of.residual.is_some() { " + residual" } else { "" };
        let act = if self.of.act.is_some() { " + activation" } else { "" };
        format!("batch_norm{residual}{act}")
    }

    fn uses(&self) -> Uses {
        Uses::new(self.of.reads(), [self.of.z])
    }

    fn work(&self) -> Work {
        Work::vector(2 * self.of.problem.shape.len() as u64)
    }

    fn run(&self, io: &mut Io<'_>) {
        super::normalise(&self.of.problem.batch(io.n()), &self.of.lend(io), io.write(self.of.z));
    }

    fn gradient(&self, to: &mut dyn Backward) {
        let Some(dz) = to.stored(self.of.z) else { return };
        let d_residual = self.of.residual.and_then(|residual| to.sink(residual));
        // Without an activation its value says nothing about the gradient.
        let of = PlannedNormalisation { residual: self.of.residual.filter(|_| self.of.act.is_some()), ..self.of };
        let out = PlannedSums::new(&of, to);
        to.push(Box::new(GradientSumsStep { of, dz, d_residual, out }));
        NormGradient { of, dz, sums: out.sums }.give(to);
    }
}

/// The first half of the backward pass: sums, the parameters' gradients and the residual's.
#[derive(Debug)]
struct GradientSumsStep {
    of: PlannedNormalisation,
    dz: ValueId,
    d_residual: Option<Sink>,
    out: PlannedSums,
}

impl Step for GradientSumsStep {
    fn describe(&self) -> String {
        "batch_norm gradient sums".into()
    }

    fn uses(&self) -> Uses {
        let mut uses = Uses::new(self.of.reads(), self.out.writes()).with(self.d_residual);
        uses.reads.push(self.dz);
        uses
    }

    fn work(&self) -> Work {
        Work::vector(4 * self.of.problem.shape.len() as u64)
    }

    fn run(&self, io: &mut Io<'_>) {
        let d_residual = self.d_residual.map(|sink| io.write_into(sink));
        let (of, dz) = (self.of.lend(io), io.read(self.dz));
        super::gradient_sums(&self.of.problem.batch(io.n()), &of, dz, d_residual, self.out.lend(io));
    }

    fn gradient(&self, _: &mut dyn Backward) {}
}

impl NormGradient {
    /// Gives y its gradient: formed on load by the step that wrote y, or stored by one of its own.
    pub(in crate::ops) fn give(self, to: &mut dyn Backward) {
        if self.of.forms_gradient {
            to.form(self.of.y, self);
        } else if let Some(dy) = to.sink(self.of.y) {
            to.push(Box::new(NormGradientStep { gradient: self, dy }));
        }
    }
}

/// The second half, where the gradient of y is stored.
#[derive(Debug)]
struct NormGradientStep {
    gradient: NormGradient,
    dy: Sink,
}

impl Step for NormGradientStep {
    fn describe(&self) -> String {
        "batch_norm gradient".into()
    }

    fn uses(&self) -> Uses {
        Uses::new(self.gradient.reads(), []).with([self.dy])
    }

    fn work(&self) -> Work {
        Work::vector(4 * self.gradient.of.problem.shape.len() as u64)
    }

    fn run(&self, io: &mut Io<'_>) {
        let NormGradient { of, dz, sums } = self.gradient;
        let (dz, sums): (View<'_>, View<'_>) = (io.read(dz), io.read(sums));
        let (dy, add) = io.write_into(self.dy);
        super::gradient(&of.problem.batch(io.n()), &of.lend(io), dz, sums, dy, add);
    }

    fn gradient(&self, _: &mut dyn Backward) {}
}
