//! Batch normalisation over images and pixels, and what follows it: residual and activation.
//!
//! Training: ŷ = (y − μ)/√(σ² + ε) with the batch's μ and biased σ², z = φ(γ·ŷ + β + residual); the running variance is
//! the unbiased one (as PyTorch). Statistics are means and centred second moments per chunk, merged in chunk order
//! with Chan's formula in f64, so they do not lose the variance of a large mean and do not depend on threads.

mod backward;
mod forward;
mod step;

pub(super) use backward::{DyLoader, MaskedGradient, SUMMED_PIXELS, SumVectors, gradient_sums_len};
pub use backward::{SumsOut, gradient, gradient_sums};
pub(super) use forward::{Affine, AffineVectors, affine_rows, finish_statistics, moments, moments_len};
pub use forward::{StatisticsOut, normalise, running_statistics, statistics};
pub use step::{NormaliseStep, PlannedStatistics, PlannedSums, RunningStatisticsStep, StatisticsStep};

use serde::{Deserialize, Serialize};

use super::activation::{Act, Activation};
use super::operation::{LoweredNode, Operation, OperationParam, ParamRole, bad, mismatch};
use super::parallel::Chunks;
use super::step::{Io, Place, Step, ValueId};
use crate::Result;
use crate::device::View;
use crate::shape::{Lines, Shape};

/// Batch normalisation over pixels and images, per channel.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchNorm {
    /// Channels.
    pub channels: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Share of the new batch in the running statistics.
    pub momentum: f32,
}

/// One batch-norm over one batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BatchNormProblem {
    /// What is normalised.
    pub shape: Lines,
    /// Added to the variance.
    pub eps: f32,
    /// Share of the new batch in the running statistics.
    pub momentum: f32,
}

impl BatchNormProblem {
    /// The problem over `n` images of a shape.
    pub fn new(bn: &BatchNorm, image: Shape, n: usize) -> Self {
        Self { shape: Lines::of(image, n), eps: bn.eps, momentum: bn.momentum }
    }

    /// The problem of one image for `n` of them.
    pub(super) fn batch(&self, n: usize) -> Self {
        Self { shape: Lines { lines: n * self.shape.lines, ..self.shape }, ..*self }
    }

    pub(super) fn chunks(&self) -> Chunks {
        Chunks::new(self.shape)
    }
}

/// A value that is normalised: z = φ(γ·ŷ + β + residual) from y `[lines, w, c]`.
#[derive(Debug, Clone, Copy)]
pub struct Normalised<'a> {
    /// y.
    pub y: View<'a>,
    /// γ `[c]`.
    pub gamma: View<'a>,
    /// β `[c]`.
    pub beta: View<'a>,
    /// μ and 1/√(σ² + ε) `[2·c]`.
    pub statistics: View<'a>,
    /// Added after β, of y's shape.
    pub residual: Option<View<'a>>,
    /// Applied last.
    pub act: Option<Act<'a>>,
}

/// The same in a plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlannedNormalisation {
    /// The batch-norm, for one image.
    pub problem: BatchNormProblem,
    /// What is normalised.
    pub y: ValueId,
    /// γ.
    pub gamma: ValueId,
    /// β.
    pub beta: ValueId,
    /// μ and 1/√(σ² + ε).
    pub statistics: ValueId,
    /// Added after β.
    pub residual: Option<ValueId>,
    /// Applied last.
    pub act: Option<Activation>,
    /// The result, whether it is stored or not.
    pub z: ValueId,
    /// Whether the step that wrote y forms its gradient on load; otherwise it is stored.
    pub forms_gradient: bool,
}

impl PlannedNormalisation {
    /// The values that are read to form z or the gradient of y.
    pub fn reads(&self) -> Vec<ValueId> {
        [self.y, self.gamma, self.beta, self.statistics].into_iter().chain(self.residual).collect()
    }

    /// The same over the values of a run.
    pub fn lend<'a>(&self, io: &Io<'a>) -> Normalised<'a> {
        Normalised {
            y: io.read(self.y),
            gamma: io.read(self.gamma),
            beta: io.read(self.beta),
            statistics: io.read(self.statistics),
            residual: self.residual.map(|residual| io.read(residual)),
            act: self.act.as_ref().map(|act| io.act(act)),
        }
    }
}

/// The gradient of y, which can be formed on load once the sums over the batch are known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormGradient {
    /// What was normalised and what followed. The residual is looked at only under an activation.
    pub of: PlannedNormalisation,
    /// Gradient of z.
    pub dz: ValueId,
    /// Sums over the batch ([`gradient_sums`]).
    pub sums: ValueId,
}

impl NormGradient {
    /// The values that are read to have it.
    pub fn reads(&self) -> Vec<ValueId> {
        let mut reads = self.of.reads();
        reads.extend([self.dz, self.sums]);
        reads
    }
}

impl Operation for BatchNorm {
    fn output_shape(&self, name: &str, inputs: &[Shape]) -> Result<Shape> {
        if !(self.eps > 0.0 && self.eps.is_finite() && self.momentum > 0.0 && self.momentum <= 1.0) {
            return bad(name, "batch-norm needs eps > 0 and momentum in (0, 1]");
        }
        if inputs[0].c != self.channels {
            return mismatch(name, format!("{} channels", self.channels), inputs[0]);
        }
        Ok(inputs[0])
    }

    fn params(&self, _: Shape) -> Vec<OperationParam> {
        let param = |suffix, role| OperationParam::new(suffix, role, vec![self.channels]);
        vec![
            param("weight", ParamRole::BnWeight),
            param("bias", ParamRole::BnBias),
            param("running_mean", ParamRole::RunningMean),
            param("running_var", ParamRole::RunningVar),
        ]
    }

    fn describe(&self) -> String {
        "batch_norm".into()
    }

    fn lower(&self, node: &mut dyn LoweredNode) -> Result<Vec<Box<dyn Step>>> {
        let (y, z) = (node.input(0), node.output());
        let (of, to) = self.planned(node, y, z)?;
        let PlannedStatistics { problem, running, statistics } = to;
        let first: Box<dyn Step> = match node.training() {
            true => Box::new(StatisticsStep { y, to }),
            false => Box::new(RunningStatisticsStep { problem, running, statistics }),
        };
        Ok(vec![first, Box::new(NormaliseStep { of })])
    }
}

impl BatchNorm {
    /// The batch-norm over a value y, and its statistics; what follows is still to be added.
    ///
    /// # Errors
    /// A node that is no batch-norm.
    pub fn planned(
        &self,
        node: &mut dyn LoweredNode,
        y: ValueId,
        z: ValueId,
    ) -> Result<(PlannedNormalisation, PlannedStatistics)> {
        let problem = BatchNormProblem::new(self, node.output_shape(), 1);
        let gamma = node.param(Place::Param, ParamRole::BnWeight)?;
        let beta = node.param(Place::Param, ParamRole::BnBias)?;
        let mean = node.param(Place::Running, ParamRole::RunningMean)?;
        let var = node.param(Place::Running, ParamRole::RunningVar)?;
        let statistics = node.values().floats(2 * self.channels);
        let of = PlannedNormalisation {
            problem,
            y,
            gamma,
            beta,
            statistics,
            residual: None,
            act: None,
            z,
            forms_gradient: false,
        };
        Ok((of, PlannedStatistics { problem, statistics, running: [mean, var] }))
    }
}
