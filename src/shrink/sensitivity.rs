//! One-block sensitivity: how much the loss on held-out images rises when a block alone is made linear, without any
//! training. Its rises, taken as additive, are the importances of an exact knapsack (`docs/methods.md` 1.8).

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::importance::{Importance, ImportanceRow};
use super::surgery::{Linearise, linearise};
use crate::data::{Augment, Dataset, Loader};
use crate::device::Device;
use crate::engine::{Engine, EngineOptions, Fusion};
use crate::graph::{BlockId, BlockState, Positions};
use crate::model::Model;
use crate::train::{Evaluation, Interrupt, evaluate_until, recalibrate};
use crate::{Error, Result};

/// How networks are judged without training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SensitivityConfig {
    /// Images of the training set that the loss is taken on, half of the set at most.
    pub images: usize,
    /// Batches of other training images that renew the batch-norm statistics first; 0 leaves them as they are.
    pub recalibration: usize,
    /// Images per pass.
    pub batch: usize,
}

impl Default for SensitivityConfig {
    fn default() -> Self {
        Self { images: 2000, recalibration: 8, batch: 125 }
    }
}

impl SensitivityConfig {
    /// Refuses values out of range.
    ///
    /// # Errors
    /// Names the key and its range.
    pub fn check(&self) -> Result<()> {
        let rules = [
            ("images", self.images, 1, 1 << 30),
            ("recalibration", self.recalibration, 0, 1 << 20),
            ("batch", self.batch, 1, 1 << 16),
        ];
        match rules.iter().find(|(_, got, low, high)| !(low..=high).contains(&got)) {
            Some((key, got, low, high)) => {
                Err(Error::Config(format!("search.sensitivity.{key} = {got}; give {low} to {high}")))
            }
            None => Ok(()),
        }
    }
}

/// Judges networks on training images that are set apart: one part for the loss, another for batch-norm statistics.
#[derive(Debug)]
pub struct Judge<'a> {
    device: &'a Device,
    interrupt: &'a Interrupt,
    held_out: Loader,
    others: Loader,
    batches: usize,
}

impl<'a> Judge<'a> {
    /// Sets images apart; which follows from the seed.
    ///
    /// # Errors
    /// Fewer than two images.
    pub fn new(
        device: &'a Device,
        images: &Dataset,
        config: &SensitivityConfig,
        seed: u64,
        interrupt: &'a Interrupt,
    ) -> Result<Self> {
        config.check()?;
        let order = images.shuffled(seed, 0);
        let count = config.images.min(order.len() / 2);
        if count == 0 {
            let problem = format!("{} has {} images; sensitivities need two or more", images.name(), images.len());
            return Err(Error::Data(problem));
        }
        let (held_out, rest) = order.split_at(count);
        let batch = config.batch.min(rest.len());
        let rest = &rest[..rest.len().min(batch * config.recalibration.max(1))];
        Ok(Self {
            device,
            interrupt,
            held_out: Loader::eval(Arc::new(images.subset(held_out)?), config.batch)?,
            others: Loader::train(Arc::new(images.subset(rest)?), batch, Augment::none(), seed)?,
            batches: config.recalibration,
        })
    }

    /// The score of a network with batch-norm statistics of its own.
    ///
    /// # Errors
    /// Images that do not fit the network, a failing device, or [`Error::Interrupted`].
    pub fn evaluate(&self, model: &Model) -> Result<Evaluation> {
        let renewed = match self.batches {
            0 => None,
            batches => Some(recalibrate(self.device, model, &self.others, batches, self.interrupt)?),
        };
        let batch = self.held_out.batch_size();
        let options = EngineOptions { batch, fusion: Fusion::OnLoad, training: false, taps: Vec::new() };
        let mut engine = Engine::new(self.device, renewed.as_ref().unwrap_or(model), &options)?;
        evaluate_until(&mut engine, &self.held_out, self.interrupt)
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
        let blocks = model.graph.blocks.len();
        if let Some(block) = BlockId::all(blocks).find(|&b| model.graph.state(b) != BlockState::Active) {
            let name = &model.graph.blocks[block].name;
            return Err(Error::Config(format!("block {name} has lost its activations; search in the original model")));
        }
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

    /// Keep scores in [0, 1]: the rises over the largest, 1 for blocks that stay.
    pub fn scores(&self) -> Vec<f32> {
        let rises = self.rises();
        let largest = rises.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        let score = |(freed, rise): (&Option<Evaluation>, &f64)| match freed {
            Some(_) => (rise / largest).clamp(0.0, 1.0) as f32,
            None => 1.0,
        };
        self.freed.iter().zip(&rises).map(score).collect()
    }

    /// The rises, with the other sign, as a table that solvers take: a row for each candidate. `path` is what messages
    /// name.
    ///
    /// # Errors
    /// A loss that is not finite.
    pub fn importance(&self, path: &Path, positions: &Positions) -> Result<Importance> {
        let rises = self.rises();
        let row = |(block, freed): (usize, &Option<Evaluation>)| {
            freed.map(|_| ImportanceRow::new(positions.blocks()[block].at, -rises[block]))
        };
        Importance::new(path, self.freed.iter().enumerate().filter_map(row).collect())
    }
}
