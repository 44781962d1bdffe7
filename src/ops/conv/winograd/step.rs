//! A convolution in tiles in a plan.

use super::WinogradProblem;
use crate::ops::conv::ConvProblem;
use crate::ops::epilogue::PlannedEpilogue;
use crate::ops::packing::Packing;
use crate::ops::step::{Backward, ComputeUnit, Io, Step, Uses, ValueId, Work};

/// y = φ(conv(x, w) + bias + residual) in tiles, for inference on the host.
#[derive(Debug)]
pub struct WinogradStep {
    /// The convolution, for one image.
    pub problem: WinogradProblem,
    /// Input.
    pub x: ValueId,
    /// Weights, as those of any dense convolution.
    pub w: ValueId,
    /// What follows within the step.
    pub epilogue: PlannedEpilogue,
    /// Result.
    pub y: ValueId,
}

impl Step for WinogradStep {
    fn describe(&self) -> String {
        let Self { problem, epilogue, .. } = self;
        format!("{} as {}{}", problem.conv().describe(), problem.describe(), epilogue.describe())
    }

    fn uses(&self) -> Uses {
        Uses::new([self.x, self.w].into_iter().chain(self.epilogue.reads()), [self.y])
    }

    fn work(&self) -> Work {
        Work { flops: self.problem.flops(), unit: ComputeUnit::Matrix }
    }

    fn packed(&self) -> Vec<(ValueId, Packing)> {
        vec![(self.w, Packing::Winograd(self.problem))]
    }

    fn run(&self, io: &mut Io<'_>) {
        let problem = self.problem.batch(io.n());
        let y = io.write(self.y);
        super::forward(&problem, io.read(self.x), io.read(self.w), &self.epilogue.lend(io), y);
    }

    /// The transformed weights are not kept for a backward pass.
    fn gradient(&self, _: &mut dyn Backward) {}

    fn convolution(&self) -> Option<&ConvProblem> {
        Some(self.problem.conv())
    }
}
