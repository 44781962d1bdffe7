//! One-block sensitivity: how much the loss on held-out images rises when a block alone is made linear, without any
//! training. Its rises, taken as additive, are the importances of an exact knapsack (`docs/methods.md` 1.8).

use std::path::Path;

use super::{Asked, BlockCosts, Done, Judge, Provider, all_but, check_active, each_candidate};
use crate::Result;
use crate::graph::Positions;
use crate::model::Model;
use crate::shrink::importance::Importance;
use crate::shrink::surgery::{Linearise, linearise};
use crate::train::Evaluation;

/// The rise of the loss on held-out images when a block alone is made linear, with batch-norm statistics renewed.
#[derive(Debug, Clone, Copy)]
pub struct Sensitivity;

impl Provider for Sensitivity {
    fn costs(&self, asked: &Asked<'_>, done: Done<'_>) -> Result<Option<BlockCosts>> {
        let Asked { judge, model, candidates, linearise, .. } = *asked;
        Ok(Some(Sensitivities::measure(judge, model, candidates, linearise, done)?.costs()))
    }
}

/// What networks with one freed block score.
#[derive(Debug, Clone, PartialEq)]
pub struct Sensitivities {
    /// The network as it is.
    pub original: Evaluation,
    /// With each block alone made linear as finetuning begins with it; `None` for those that stay.
    pub freed: Vec<Option<Evaluation>>,
}

impl Sensitivities {
    /// Judges a network once as it is and once for each candidate.
    ///
    /// # Errors
    /// A network with a block whose activations are gone, a candidate that could not be merged, or as
    /// [`Judge::evaluate`].
    pub fn measure(
        judge: &Judge<'_>,
        model: &Model,
        candidates: &[bool],
        options: &Linearise,
        done: Done<'_>,
    ) -> Result<Self> {
        check_active(model)?;
        let freed =
            |_: &Evaluation, block| judge.evaluate(&linearise(model, &all_but(candidates.len(), block), options)?);
        let (original, freed) = each_candidate(candidates, done, || judge.evaluate(model), freed)?;
        Ok(Self { original, freed })
    }

    /// How much the loss rises with each block; 0 for those that stay.
    pub fn rises(&self) -> Vec<f64> {
        let rise = |freed: &Option<Evaluation>| freed.map_or(0.0, |freed| freed.loss - self.original.loss);
        self.freed.iter().map(rise).collect()
    }

    /// The rises as costs.
    pub fn costs(&self) -> BlockCosts {
        let rises = self.rises();
        BlockCosts::new(self.freed.iter().zip(rises).map(|(freed, rise)| freed.map(|_| rise)).collect())
    }

    /// Keep scores in [0, 1] ([`BlockCosts::scores`]).
    pub fn scores(&self) -> Vec<f32> {
        self.costs().scores()
    }

    /// The rises, with the other sign, as a table that solvers take ([`BlockCosts::importance`]).
    ///
    /// # Errors
    /// A loss that is not finite.
    pub fn importance(&self, path: &Path, positions: &Positions) -> Result<Importance> {
        self.costs().importance(path, positions)
    }
}
