//! The inverted residual in a plan.

use super::{FoldedConv, InvertedResidualOperands, InvertedResidualProblem, forward};
use crate::ops::activation::{Activation, Clamp};
use crate::ops::packing::Packing;
use crate::ops::step::{Backward, ComputeUnit, Io, Step, Uses, ValueId, Work};

/// A convolution of the block in a plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlannedConv {
    /// Weights.
    pub w: ValueId,
    /// Bias per channel.
    pub b: ValueId,
    /// The activation after it.
    pub act: Option<Activation>,
}

/// A whole inverted residual, for inference.
#[derive(Debug)]
pub struct InvertedResidualStep {
    /// The block, for one image.
    pub problem: InvertedResidualProblem,
    /// Input.
    pub x: ValueId,
    /// Expansion, where there is one.
    pub expand: Option<PlannedConv>,
    /// Depthwise convolution.
    pub depthwise: PlannedConv,
    /// Projection; its activation comes after the residual.
    pub project: PlannedConv,
    /// Added to the projection.
    pub residual: Option<ValueId>,
    /// Output.
    pub y: ValueId,
}

impl PlannedConv {
    fn lend<'a>(&self, io: &Io<'a>) -> FoldedConv<'a> {
        let clamp = self.act.as_ref().map_or(Clamp::NONE, |act| io.act(act).clamp);
        FoldedConv { w: io.read(self.w), b: io.read(self.b), clamp }
    }
}

impl Step for InvertedResidualStep {
    fn describe(&self) -> String {
        let window = self.problem.window;
        let residual = if self.residual.is_some() { " + residual" } else { "" };
        format!("inverted_residual {}x{}{residual}", window.k_h, window.k_w)
    }

    fn uses(&self) -> Uses {
        let convs = self.expand.iter().chain([&self.depthwise, &self.project]);
        // A shortcut around the block adds what is read anyway.
        let residual = self.residual.filter(|&residual| residual != self.x);
        let reads = [self.x].into_iter().chain(convs.flat_map(|conv| [conv.w, conv.b])).chain(residual);
        Uses::new(reads, [self.y])
    }

    fn work(&self) -> Work {
        Work { flops: self.problem.flops(), unit: ComputeUnit::Matrix }
    }

    fn packed(&self) -> Vec<(ValueId, Packing)> {
        let expand = self.expand.zip(self.problem.expand()).map(|(conv, problem)| (conv.w, problem));
        let products = expand.into_iter().chain([(self.project.w, self.problem.project())]);
        products.filter_map(|(w, problem)| Some((w, Packing::Panels(problem.panels()?)))).collect()
    }

    fn run(&self, io: &mut Io<'_>) {
        let y = io.write(self.y);
        let operands = InvertedResidualOperands {
            x: io.read(self.x),
            expand: self.expand.map(|expand| expand.lend(io)),
            depthwise: self.depthwise.lend(io),
            project: self.project.lend(io),
            residual: self.residual.map(|residual| io.read(residual)),
        };
        let problem = InvertedResidualProblem { n: io.n(), ..self.problem };
        forward(&problem, operands, y);
    }

    /// Hidden values are not kept, so that nothing can be trained.
    fn gradient(&self, _: &mut dyn Backward) {}
}
