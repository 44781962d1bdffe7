//! Convolutions in a plan: the forward step, and its gradients as each backend computes them.

use super::{ConvFamily, ConvGradient, ConvInput, ConvProblem, GradientsOut};
use crate::ops::batch_norm::{PlannedStatistics, PlannedSums};
use crate::ops::epilogue::PlannedEpilogue;
use crate::ops::step::{
    Backend, Backward, ComputeUnit, GradientOperand, Io, Operand, ParamId, Place, Sink, Step, Uses, ValueId, Values,
    Work,
};

/// y = φ(conv(x, w) + bias + residual), or y = conv(x, w) with the statistics of y.
#[derive(Debug)]
pub struct ConvStep {
    /// The convolution, for one image.
    pub problem: ConvProblem,
    /// Input.
    pub x: Operand,
    /// Weights.
    pub w: ValueId,
    /// What follows within the step. In training nothing but a bias does.
    pub epilogue: PlannedEpilogue,
    /// Result.
    pub y: ValueId,
    /// Where the statistics of y go, which are taken while it is in cache. The host's; without an epilogue.
    pub statistics: Option<PlannedStatistics>,
}

impl ConvProblem {
    /// The unit that limits it.
    pub fn unit(&self) -> ComputeUnit {
        match self.family() {
            ConvFamily::Depthwise => ComputeUnit::Vector,
            ConvFamily::Pointwise | ConvFamily::Dense => ComputeUnit::Matrix,
        }
    }

    /// Such as `depthwise 3x3`.
    pub fn describe(&self) -> String {
        format!("{} {}x{}", self.family().describe(), self.window.k_h, self.window.k_w)
    }
}

impl Operand {
    fn lend<'a>(&self, io: &Io<'a>) -> ConvInput<'a> {
        match self {
            Self::Stored(x) => ConvInput::Stored(io.read(*x)),
            Self::Normalised(of) => ConvInput::Normalised(of.lend(io)),
        }
    }
}

impl GradientOperand {
    fn lend<'a>(&self, io: &Io<'a>) -> ConvGradient<'a> {
        match self {
            Self::Stored(dy) => ConvGradient::Stored(io.read(*dy)),
            Self::Formed(gradient) => ConvGradient::Formed {
                problem: gradient.of.problem.batch(io.n()),
                of: gradient.of.lend(io),
                dz: io.read(gradient.dz),
                sums: io.read(gradient.sums),
            },
        }
    }
}

impl Step for ConvStep {
    fn describe(&self) -> String {
        let on_load = if matches!(self.x, Operand::Normalised(_)) { "batch_norm on load + " } else { "" };
        let statistics = if self.statistics.is_some() { " + batch statistics" } else { "" };
        format!("{on_load}{}{}{statistics}", self.problem.describe(), self.epilogue.describe())
    }

    fn uses(&self) -> Uses {
        let reads = self.x.reads().into_iter().chain([self.w]).chain(self.epilogue.reads());
        let statistics = self.statistics.iter().flat_map(PlannedStatistics::writes);
        let adds = self.statistics.iter().flat_map(|statistics| statistics.running).collect();
        Uses { adds, ..Uses::new(reads, [self.y].into_iter().chain(statistics)) }
    }

    fn work(&self) -> Work {
        Work { flops: 2 * self.problem.macs(), unit: self.problem.unit() }
    }

    fn run(&self, io: &mut Io<'_>) {
        let p = self.problem.batch(io.n());
        let (w, y) = (io.read(self.w), io.write(self.y));
        match (&self.statistics, self.x.lend(io)) {
            (Some(statistics), x) => {
                let bn = statistics.problem.batch(io.n());
                super::forward_with_statistics(&p, x, w, y, &bn, statistics.lend(io));
            }
            (None, x) => super::forward(&p, x.stored(), w, &self.epilogue.lend(io), y),
        }
    }

    fn gradient(&self, to: &mut dyn Backward) {
        let Some(dy) = to.of(self.y) else { return };
        let dw = to.param_gradient(self.w);
        let db = self.epilogue.bias.operand().map(|bias| to.param_gradient(bias));
        let (x, dx) = match self.x {
            Operand::Stored(x) => (x, to.sink(x)),
            Operand::Normalised(of) => (of.z, to.sink(of.z)),
        };
        let gradients = ConvGradients { problem: self.problem, x: self.x, w: self.w, dy, dx, dw, db, sums: None };
        match (to.backend(), dy) {
            (Backend::Cuda, GradientOperand::Stored(dy)) => {
                if let Some(db) = db {
                    to.push(Box::new(BiasGradientStep { problem: self.problem, dy, db }));
                }
                if let Some(dx) = dx {
                    to.push(Box::new(InputGradientStep { problem: self.problem, w: self.w, dy, dx }));
                }
                to.push(Box::new(WeightGradientStep { problem: self.problem, x, dy, dw }));
            }
            _ => gradients.push_with_sums(to),
        }
    }

    fn convolution(&self) -> Option<&ConvProblem> {
        Some(&self.problem)
    }
}

/// The gradients of a convolution alone that a backend has a step for, over values of their own: what a bench times.
#[derive(Debug)]
pub struct LoneGradients {
    /// x, weights, dy and their gradients.
    pub values: Values,
    /// Gradient of the weights; on the host in one walk with that of the input, where `input` is the same step.
    pub weights: Box<dyn Step>,
    /// Gradient of the input: alone on a GPU, with that of the weights on the host.
    pub input: Box<dyn Step>,
}

impl LoneGradients {
    /// Those of a problem for one image.
    pub fn new(problem: ConvProblem, backend: Backend) -> Self {
        let mut values = Values::default();
        let (x, dy) = (values.activation(problem.input), values.activation(problem.output));
        let dx = Sink { value: values.activation(problem.input), add: false };
        let w = values.pinned(Place::Weight(ParamId::new(0)), problem.weight_len());
        let dw = values.pinned(Place::ParamGradient(ParamId::new(0)), problem.weight_len());
        let (operand, gradient) = (Operand::Stored(x), GradientOperand::Stored(dy));
        let host = |dx| ConvGradients { problem, x: operand, w, dy: gradient, dx, dw, db: None, sums: None };
        let (weights, input): (Box<dyn Step>, Box<dyn Step>) = match backend {
            Backend::Host => (Box::new(host(None)), Box::new(host(Some(dx)))),
            Backend::Cuda => (
                Box::new(WeightGradientStep { problem, x, dy, dw }),
                Box::new(InputGradientStep { problem, w, dy, dx }),
            ),
        };
        Self { values, weights, input }
    }
}

/// All gradients of a convolution in one walk over dy: the host's.
#[derive(Debug)]
struct ConvGradients {
    problem: ConvProblem,
    x: Operand,
    w: ValueId,
    dy: GradientOperand,
    dx: Option<Sink>,
    dw: ValueId,
    db: Option<ValueId>,
    /// The sums that the batch-norm in front needs of dx, where x was normalised on load.
    sums: Option<PlannedSums>,
}

impl ConvGradients {
    fn push_with_sums(mut self, to: &mut dyn Backward) {
        if let (Operand::Normalised(of), Some(dx)) = (self.x, self.dx) {
            let sums = PlannedSums::new(&of, to);
            to.form(of.y, crate::ops::batch_norm::NormGradient { of, dz: dx.value, sums: sums.sums });
            self.sums = Some(sums);
        }
        to.push(Box::new(self));
    }
}

impl Step for ConvGradients {
    fn describe(&self) -> String {
        let both = if self.dx.is_some() { "gradients" } else { "weight gradient" };
        let on_load = if matches!(self.dy, GradientOperand::Formed(_)) { "batch_norm gradient on load + " } else { "" };
        let sums = if self.sums.is_some() { " + batch_norm gradient sums" } else { "" };
        format!("{on_load}{} {both}{sums}", self.problem.describe())
    }

    fn uses(&self) -> Uses {
        let reads = self.x.reads().into_iter().chain([self.w]).chain(self.dy.reads());
        let sums = self.sums.iter().flat_map(PlannedSums::writes);
        Uses::new(reads, [self.dw].into_iter().chain(self.db).chain(sums)).with(self.dx)
    }

    fn work(&self) -> Work {
        let gradients = if self.dx.is_some() { 2 } else { 1 };
        Work { flops: 2 * gradients * self.problem.macs(), unit: self.problem.unit() }
    }

    fn run(&self, io: &mut Io<'_>) {
        let out = GradientsOut {
            dx: self.dx.map(|dx| io.write_into(dx)),
            dw: io.write(self.dw),
            db: self.db.map(|db| io.write(db)),
            sums: self.sums.as_ref().map(|sums| sums.lend(io)),
        };
        super::backward(&self.problem.batch(io.n()), self.x.lend(io), io.read(self.w), self.dy.lend(io), out);
    }

    fn gradient(&self, _: &mut dyn Backward) {}
}

/// dx of a convolution: CUDA's.
#[derive(Debug)]
struct InputGradientStep {
    problem: ConvProblem,
    w: ValueId,
    dy: ValueId,
    dx: Sink,
}

impl Step for InputGradientStep {
    fn describe(&self) -> String {
        format!("{} input gradient", self.problem.describe())
    }

    fn uses(&self) -> Uses {
        Uses::new([self.w, self.dy], []).with([self.dx])
    }

    fn work(&self) -> Work {
        Work { flops: 2 * self.problem.macs(), unit: self.problem.unit() }
    }

    fn run(&self, io: &mut Io<'_>) {
        let (dx, add) = io.write_into(self.dx);
        super::input_gradient(&self.problem.batch(io.n()), io.read(self.dy), io.read(self.w), dx, add);
    }

    fn gradient(&self, _: &mut dyn Backward) {}
}

/// dw of a convolution: CUDA's.
#[derive(Debug)]
struct WeightGradientStep {
    problem: ConvProblem,
    x: ValueId,
    dy: ValueId,
    dw: ValueId,
}

impl Step for WeightGradientStep {
    fn describe(&self) -> String {
        format!("{} weight gradient", self.problem.describe())
    }

    fn uses(&self) -> Uses {
        Uses::new([self.x, self.dy], [self.dw])
    }

    fn work(&self) -> Work {
        Work { flops: 2 * self.problem.macs(), unit: self.problem.unit() }
    }

    fn run(&self, io: &mut Io<'_>) {
        let dw = io.write(self.dw);
        super::weight_gradient(&self.problem.batch(io.n()), io.read(self.x), io.read(self.dy), dw);
    }

    fn gradient(&self, _: &mut dyn Backward) {}
}

/// db of a convolution: CUDA's.
#[derive(Debug)]
struct BiasGradientStep {
    problem: ConvProblem,
    dy: ValueId,
    db: ValueId,
}

impl Step for BiasGradientStep {
    fn describe(&self) -> String {
        "bias gradient".into()
    }

    fn uses(&self) -> Uses {
        Uses::new([self.dy], [self.db])
    }

    fn work(&self) -> Work {
        Work::vector(self.problem.output.len() as u64)
    }

    fn run(&self, io: &mut Io<'_>) {
        let db = io.write(self.db);
        super::bias_gradient(&self.problem.batch(io.n()), io.read(self.dy), db);
    }

    fn gradient(&self, _: &mut dyn Backward) {}
}
