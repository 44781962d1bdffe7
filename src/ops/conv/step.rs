//! Convolutions in a plan: the forward step, and its gradients as each backend computes them.

use super::{BatchNormBefore, ConvFamily, ConvGradient, ConvInput, ConvProblem, GradientsOut};
use crate::ops::batch_norm::{NormGradient, PlannedNormalisation, PlannedStatistics, PlannedSums, StatisticsStep};
use crate::ops::epilogue::PlannedEpilogue;
use crate::ops::packing::Packing;
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
    /// Where the statistics of y go, which are taken while it is in cache or in registers; without an epilogue.
    pub statistics: Option<PlannedStatistics>,
}

impl ConvStep {
    /// The step together with the statistics of its result, which it takes itself where the backend can.
    pub fn with_statistics(self, to: PlannedStatistics, backend: Backend) -> Vec<Box<dyn Step>> {
        if self.problem.takes_statistics(backend) {
            return vec![Box::new(Self { statistics: Some(to), ..self })];
        }
        let y = self.y;
        vec![Box::new(self), Box::new(StatisticsStep { y, to })]
    }
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

    fn packed(&self) -> Vec<(ValueId, Packing)> {
        self.problem.panels().map(|layout| (self.w, Packing::Panels(layout))).into_iter().collect()
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
        let dx = to.sink(match self.x {
            Operand::Stored(x) => x,
            Operand::Normalised(of) => of.z,
        });
        let before = match (self.x, dx) {
            (Operand::Normalised(of), Some(dx)) => {
                Some(PlannedBefore { of, sums: PlannedSums::new(&of, to), dz: dx.value })
            }
            _ => None,
        };
        let (problem, x, w) = (self.problem, self.x, self.w);
        // On load, some kernels have both gradients of one walk over dy, as the host has those of any convolution. A pointwise
        // one has none of the weights alone.
        let on_load = matches!(x, Operand::Normalised(_)) || matches!(dy, GradientOperand::Formed(_));
        let has_both = dx.is_some() || problem.family() == ConvFamily::Depthwise;
        let at_once = on_load && has_both && problem.has_gradients_at_once(to.backend());
        match to.backend() {
            Backend::Cuda if !at_once => {
                if let (Some(db), GradientOperand::Stored(dy)) = (db, dy) {
                    to.push(Box::new(BiasGradientStep { problem, dy, db }));
                }
                if let Some(dx) = dx {
                    to.push(Box::new(InputGradientStep { problem, w, dy, dx, before }));
                }
                to.push(Box::new(WeightGradientStep { problem, x, dy, dw }));
            }
            _ => to.push(Box::new(ConvGradients { problem, x, w, dy, dx, dw, db, before })),
        }
        if let Some(PlannedBefore { of, sums, dz }) = before {
            NormGradient { of, dz, sums: sums.sums }.give(to);
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
        let host = |dx| ConvGradients { problem, x: operand, w, dy: gradient, dx, dw, db: None, before: None };
        let (weights, input): (Box<dyn Step>, Box<dyn Step>) = match backend {
            Backend::Host => (Box::new(host(None)), Box::new(host(Some(dx)))),
            Backend::Cuda => (
                Box::new(WeightGradientStep { problem, x: operand, dy: gradient, dw }),
                Box::new(InputGradientStep { problem, w, dy: gradient, dx, before: None }),
            ),
        };
        Self { values, weights, input }
    }
}

/// The batch-norm in front of a convolution, where x is normalised on load: the step that has dx sums it.
#[derive(Debug, Clone, Copy)]
struct PlannedBefore {
    of: PlannedNormalisation,
    sums: PlannedSums,
    /// dx, which is the gradient of its result.
    dz: ValueId,
}

impl PlannedBefore {
    fn describe(before: Option<&Self>) -> &'static str {
        if before.is_some() { " + batch_norm gradient sums" } else { "" }
    }

    fn writes(&self) -> impl Iterator<Item = ValueId> {
        self.sums.writes()
    }
}

/// All gradients of a convolution in one walk over dy.
#[derive(Debug)]
struct ConvGradients {
    problem: ConvProblem,
    x: Operand,
    w: ValueId,
    dy: GradientOperand,
    dx: Option<Sink>,
    dw: ValueId,
    db: Option<ValueId>,
    before: Option<PlannedBefore>,
}

impl GradientOperand {
    /// What is done to have it.
    fn describe(&self) -> &'static str {
        if matches!(self, Self::Formed(_)) { "batch_norm gradient on load + " } else { "" }
    }
}

impl Step for ConvGradients {
    fn describe(&self) -> String {
        let both = if self.dx.is_some() { "gradients" } else { "weight gradient" };
        let (on_load, sums) = (self.dy.describe(), PlannedBefore::describe(self.before.as_ref()));
        format!("{on_load}{} {both}{sums}", self.problem.describe())
    }

    fn uses(&self) -> Uses {
        let reads = self.x.reads().into_iter().chain([self.w]).chain(self.dy.reads());
        let sums = self.before.iter().flat_map(PlannedBefore::writes);
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
            sums: self.before.as_ref().map(|before| before.sums.lend(io)),
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
    dy: GradientOperand,
    dx: Sink,
    before: Option<PlannedBefore>,
}

impl Step for InputGradientStep {
    fn describe(&self) -> String {
        let (on_load, sums) = (self.dy.describe(), PlannedBefore::describe(self.before.as_ref()));
        format!("{on_load}{} input gradient{sums}", self.problem.describe())
    }

    fn uses(&self) -> Uses {
        let before = self.before.iter().flat_map(|before| before.of.reads());
        let reads = [self.w].into_iter().chain(self.dy.reads()).chain(before);
        Uses::new(reads, self.before.iter().flat_map(PlannedBefore::writes)).with([self.dx])
    }

    fn work(&self) -> Work {
        Work { flops: 2 * self.problem.macs(), unit: self.problem.unit() }
    }

    fn run(&self, io: &mut Io<'_>) {
        let dx = io.write_into(self.dx);
        let before = self.before.as_ref();
        let before =
            before.map(|PlannedBefore { of, sums, .. }| BatchNormBefore { of: of.lend(io), sums: sums.lend(io) });
        super::input_gradient(&self.problem.batch(io.n()), self.dy.lend(io), io.read(self.w), dx, before);
    }

    fn gradient(&self, _: &mut dyn Backward) {}
}

/// dw of a convolution: CUDA's.
#[derive(Debug)]
struct WeightGradientStep {
    problem: ConvProblem,
    x: Operand,
    dy: GradientOperand,
    dw: ValueId,
}

impl Step for WeightGradientStep {
    fn describe(&self) -> String {
        let x = if matches!(self.x, Operand::Normalised(_)) { "batch_norm on load + " } else { "" };
        format!("{}{x}{} weight gradient", self.dy.describe(), self.problem.describe())
    }

    fn uses(&self) -> Uses {
        Uses::new(self.x.reads().into_iter().chain(self.dy.reads()), [self.dw])
    }

    fn work(&self) -> Work {
        Work { flops: 2 * self.problem.macs(), unit: self.problem.unit() }
    }

    fn run(&self, io: &mut Io<'_>) {
        let dw = io.write(self.dw);
        super::weight_gradient(&self.problem.batch(io.n()), self.x.lend(io), self.dy.lend(io), dw);
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
