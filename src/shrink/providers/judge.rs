//! Images of the training set that are set apart to judge networks on, and what networks do on them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::inputs::ActivationInputs;
use super::{Done, check_active};
use crate::data::{Augment, Dataset, Loader};
use crate::device::Device;
use crate::engine::{Engine, EngineOptions, Fusion};
use crate::graph::Op;
use crate::model::Model;
use crate::ops::optimizer::{Optimizer, Update};
use crate::shrink::finetune::DistillConfig;
use crate::train::{
    Distillation, Evaluation, Interrupt, NoHook, Session, Stage, StepBatch, StepImages, StepOptions, StepSettings,
    TrainConfig, TrainStep, evaluate_until, observe, recalibrate, train,
};
use crate::{Error, Result};

/// Elements of activations that are held at once while they are looked at: 256 MiB in f32.
const OBSERVED_ELEMENTS: usize = 1 << 26;
/// Scales of the loss that are tried until gradients in f16 are finite.
const SCALES: usize = 32;

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
    /// Steps for which few-steps trains a network with one freed block.
    pub steps: usize,
}

impl Default for SensitivityConfig {
    fn default() -> Self {
        Self { images: 2000, recalibration: 8, batch: 125, steps: 30 }
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
            ("steps", self.steps, 1, 1 << 20),
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
    seed: u64,
    /// All training images, those that are not set apart, and the steps of a short training on them.
    images: &'a Dataset,
    rest: Vec<usize>,
    steps: usize,
}

impl<'a> Judge<'a> {
    /// Sets images apart; which follows from the seed.
    ///
    /// # Errors
    /// Fewer than two images.
    pub fn new(
        device: &'a Device,
        images: &'a Dataset,
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
        let few = &rest[..rest.len().min(batch * config.recalibration.max(1))];
        Ok(Self {
            device,
            interrupt,
            held_out: Loader::eval(Arc::new(images.subset(held_out)?), config.batch)?,
            others: Loader::train(Arc::new(images.subset(few)?), batch, Augment::none(), seed)?,
            batches: config.recalibration,
            seed,
            images,
            rest: rest.to_vec(),
            steps: config.steps,
        })
    }

    /// The score of a network with batch-norm statistics of its own.
    ///
    /// # Errors
    /// Images that do not fit the network, a failing device, or [`Error::Interrupted`].
    pub fn evaluate(&self, model: &Model) -> Result<Evaluation> {
        let batch = self.held_out.batch_size();
        let options = EngineOptions { batch, fusion: Fusion::OnLoad, training: false, taps: Vec::new() };
        let mut engine = Engine::new(self.device, &self.renewed(model)?, &options)?;
        evaluate_until(&mut engine, &self.held_out, self.interrupt)
    }

    /// The network with batch-norm statistics of its own.
    fn renewed(&self, model: &Model) -> Result<Model> {
        match self.batches {
            0 => Ok(model.clone()),
            batches => recalibrate(self.device, model, &self.others, batches, self.interrupt),
        }
    }

    /// What the classifier of a network with batch-norm statistics of its own reads of the images that are set apart, so many at
    /// most: one list for each.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate), and values that are not finite.
    pub fn features(&self, model: &Model, images: usize) -> Result<Vec<Vec<f32>>> {
        let graph = &model.graph;
        let last = &graph.nodes[graph.output()];
        let node = if matches!(last.op, Op::Linear(_)) { last.inputs[0] } else { graph.output() };
        let length = graph.shapes()?[node].len();
        let set = self.held_out.dataset();
        let first: Vec<usize> = (0..set.len().min(images)).collect();
        let images = Loader::eval(Arc::new(set.subset(&first)?), self.held_out.batch_size().min(first.len()))?;
        let mut features: Vec<Vec<f32>> = Vec::new();
        observe(self.device, &self.renewed(model)?, &[node], &images, self.interrupt, &mut |_, values| {
            if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                let problem = "what its classifier reads is";
                return Err(Error::NotFinite(format!("{}: {problem} {value}; train it with a lower --lr", graph.name)));
            }
            features.extend(values.chunks_exact(length).map(<[f32]>::to_vec));
            Ok(())
        })?;
        features.truncate(first.len());
        Ok(features)
    }

    /// The network after the few steps of training that the settings ask for, on images that are not set apart: the same ones
    /// for every network.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate), and a loss that is not finite.
    pub fn trained(&self, model: &Model, config: &TrainConfig) -> Result<Model> {
        self.few_steps(model, config, None)
    }

    /// As [`trained`](Self::trained), with a teacher from which it was made, whose blocks are those of the network or more.
    ///
    /// # Errors
    /// As [`trained`](Self::trained).
    pub fn aligned(
        &self,
        model: &Model,
        teacher: &Model,
        config: &TrainConfig,
        distill: &DistillConfig,
    ) -> Result<Model> {
        let pairs = model.graph.blocks.iter().zip(&teacher.graph.blocks).filter(|(own, _)| !own.nodes.is_empty());
        let distillation = Distillation {
            teacher: teacher.clone(),
            alpha: distill.alpha,
            temperature: distill.temperature,
            feature_weight: distill.feature_weight,
            feature_pairs: pairs.map(|(own, theirs)| (own.output(), theirs.output())).collect(),
        };
        self.few_steps(model, config, distill.is_on().then_some(&distillation))
    }

    fn few_steps(&self, model: &Model, config: &TrainConfig, distillation: Option<&Distillation>) -> Result<Model> {
        let batch = config.batch.min(self.rest.len());
        let few = &self.rest[..self.rest.len().min(self.steps.saturating_mul(batch))];
        let images = Arc::new(self.images.subset(few)?);
        let loader = Loader::train(images, batch, config.augment.clone(), self.seed)?;
        let epochs = self.steps.div_ceil(loader.steps_per_epoch()) as u64;
        let (seed, none) = (self.seed, Vec::new());
        let config =
            TrainConfig { epochs, batch, seed, evaluate_every: epochs, evaluate_after: none, ..config.clone() };
        // The loop ends with an evaluation, of which nothing is asked here.
        let test = Loader::eval(Arc::new(self.held_out.dataset().subset(&[0])?), 1)?;
        let mut session = Session::silent();
        session.interrupt = self.interrupt.clone();
        let stage = Stage {
            name: "few steps",
            devices: std::slice::from_ref(self.device),
            model: model.clone(),
            train: &loader,
            test: &test,
            config: &config,
            hook: &mut NoHook,
            distillation,
        };
        train(stage, &mut session)
    }

    /// Where the inputs of a network's activations lie on the images that are set apart, with the statistics that it has.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate), and values that are not finite.
    pub fn activation_inputs(&self, model: &Model, done: Done<'_>) -> Result<ActivationInputs> {
        check_active(model)?;
        let graph = &model.graph;
        let (mut inputs, shapes) = (ActivationInputs::none_of(graph)?, graph.shapes()?);
        let nodes = inputs.read_nodes(graph);
        let elements: usize = nodes.iter().map(|&node| shapes[node].len()).sum();
        let batch = (OBSERVED_ELEMENTS / elements.max(1)).clamp(1, self.held_out.batch_size());
        let images = Loader::eval(self.held_out.dataset().clone(), batch)?;
        let (total, last) = (images.steps_per_epoch(), nodes.last().copied());
        let mut passes = 0;
        done(0, total);
        observe(self.device, model, &nodes, &images, self.interrupt, &mut |node, values| {
            inputs.add(graph, node, values)?;
            if Some(node) == last {
                passes += 1;
                done(passes, total);
            }
            Ok(())
        })?;
        Ok(inputs)
    }

    /// Σ ⟨∂L/∂y, x − φ(x)⟩ of every site, the mean over whole batches of the images that are set apart: passes of training
    /// without an update.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate), and gradients that are not finite.
    pub fn score_gradients(&self, model: &Model, done: Done<'_>) -> Result<Vec<f64>> {
        let set = self.held_out.dataset();
        let images = Loader::train(set.clone(), self.held_out.batch_size().min(set.len()), Augment::none(), self.seed)?;
        let options = StepOptions {
            batch: images.batch_size(),
            fusion: Fusion::OnLoad,
            optimizer: Optimizer::default(),
            label_smoothing: 0.0,
            distillation: None,
            recorded: false,
        };
        let mut step = TrainStep::new(std::slice::from_ref(self.device), model, &options)?;
        step.collect_score_gradients(true);
        let (total, mut sums) = (images.steps_per_epoch(), vec![0.0; model.graph.sites()]);
        done(0, total);
        for (index, batch) in images.epoch(0, 0).enumerate() {
            if self.interrupt.is_set() {
                return Err(Error::Interrupted("the gradients were not all taken".into()));
            }
            let batch = batch?;
            let batch = StepBatch { images: StepImages::Normalised(&batch.images), labels: &batch.labels };
            let gradients = without_update(&mut step, &batch, index as u64)?;
            sums.iter_mut().zip(gradients).for_each(|(sum, gradient)| *sum += f64::from(gradient) / total as f64);
            done(index + 1, total);
        }
        Ok(sums)
    }
}

/// The score gradients of one batch, of which no weight takes notice.
///
/// # Errors
/// Gradients that are not finite at any scale of the loss, or a failing device.
fn without_update(step: &mut TrainStep<'_>, batch: &StepBatch<'_>, index: u64) -> Result<Vec<f32>> {
    let update = Update { lr: 0.0, weight_decay: 0.0, clip_norm: 0.0 };
    for _ in 0..SCALES {
        let taken = step.run(batch, StepSettings { seed: 0, step: index, update })?;
        let gradients = step.score_gradients()?;
        if !taken.update.skipped && taken.loss.loss.is_finite() && gradients.iter().all(|g| g.is_finite()) {
            return Ok(gradients);
        }
        // Where gradients in f16 overflow, the step lowers the scale of the loss.
        if !taken.update.scaled {
            break;
        }
    }
    Err(Error::NotFinite(format!(
        "the gradients of batch {index} are not finite; train the network again with a lower --lr"
    )))
}
