//! One-block sensitivity: how much the loss on held-out images rises when a block alone is made linear, without any
//! training. Its rises, taken as additive, are the importances of an exact knapsack (`docs/methods.md` 1.8).

use std::path::Path;

use super::{Asked, BlockCosts, Done, Judge, Provider, check_active};
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
        let total = 1 + asked.candidates.iter().filter(|candidate| **candidate).count();
        done(0, total);
        let mut judged = |networks| done(networks, total);
        let Asked { judge, model, candidates, linearise, .. } = *asked;
        Ok(Some(Sensitivities::measure(judge, model, candidates, linearise, &mut judged)?.costs()))
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
    /// Judges a network once as it is and once for each candidate. `progress` is called with the number of networks that
    /// are judged.
    ///
    /// # Errors
    /// A network with a block whose activations are gone, a candidate that could not be merged, or as
    /// [`Judge::evaluate`].
    pub fn measure(
        judge: &Judge<'_>,
        model: &Model,
        candidates: &[bool],
        options: &Linearise,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self> {
        check_active(model)?;
        let blocks = model.graph.blocks.len();
        let original = judge.evaluate(model)?;
        progress(1);
        let (mut freed, mut done) = (Vec::with_capacity(blocks), 1);
        for (block, &candidate) in candidates.iter().enumerate() {
            let kept: Vec<bool> = (0..blocks).map(|b| b != block).collect();
            freed.push(match candidate {
                true => Some(judge.evaluate(&linearise(model, &kept, options)?)?),
                false => None,
            });
            done += usize::from(candidate);
            progress(done);
        }
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
