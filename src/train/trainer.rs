//! The one loop: every stage trains through it and only differs in its [`Hook`], its settings and its teacher.
//!
//! A run that was stopped at any step and resumed ends with the same bits: the data's order follows from (seed, epoch),
//! dropout from (seed, step), the learning rate from the step, and all else is in the checkpoint. Time decides only when
//! a checkpoint is written.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::config::TrainConfig;
use super::evaluate::{Evaluation, check_data, evaluate_until};
use super::feed::StepBatch;
use super::hook::{Hook, Progress};
use super::metrics::{EpochRecord, EvaluationRecord};
use super::session::Session;
use super::step::{StepOptions, StepSettings, TakenStep, TrainStep};
use super::teacher::Distillation;
use crate::data::Loader;
use crate::device::Device;
use crate::engine::{Engine, EngineOptions, Fusion};
use crate::graph::Graph;
use crate::io::{Checkpoint, Position, Sums};
use crate::model::{Model, Weights};
use crate::ops::optimizer::Update;
use crate::{Error, Result};

/// One stage of training.
pub struct Stage<'a> {
    /// The stage's name in records and checkpoints.
    pub name: &'a str,
    /// Where it computes: each device takes its part of every batch. The first evaluates too.
    pub devices: &'a [Device],
    /// The network it starts from.
    pub model: Model,
    /// Training images, in batches of the configured size.
    pub train: &'a Loader,
    /// Test images.
    pub test: &'a Loader,
    /// Its settings.
    pub config: &'a TrainConfig,
    /// What it adds to plain training.
    pub hook: &'a mut dyn Hook,
    /// The teacher it follows, if any.
    pub distillation: Option<&'a Distillation>,
}

/// Trains a network, or goes on where the session's checkpoint of this stage stood. Writes one record per epoch, and
/// checkpoints by the clock, at the end and when interrupted.
///
/// # Errors
/// Settings out of range, data or files that cannot be used, a loss that is not finite, or [`Error::Interrupted`] after
/// the checkpoint was written.
pub fn train(stage: Stage<'_>, session: &mut Session) -> Result<Model> {
    let resumed = session.take_checkpoint(stage.name);
    if let Some(saved) = &resumed {
        if saved.model.graph != stage.model.graph {
            return Err(other_network(stage.name, &saved.model.graph, &stage.model.graph));
        }
        if saved.position.finished {
            stage.hook.restore(&saved.hook)?;
            stage.hook.trained(&saved.model)?;
            return Ok(saved.model.clone());
        }
    }
    let mut run = Run::new(stage, resumed)?;
    session.reporter.begin(run.stage.name, run.position.step, run.total_steps());
    let outcome = run.run(session);
    session.reporter.end();
    outcome.map_err(|error| run.with_way_back(error))
}

/// Says how the network of a checkpoint differs from the one that is to be trained.
fn other_network(stage: &str, saved: &Graph, own: &Graph) -> Error {
    let of = |graph: &Graph| (graph.input_shape(), graph.output_shape().c);
    let ((saved_images, saved_classes), (images, classes)) = (of(saved), of(own));
    let (difference, remedy) = if (saved_images, saved_classes) == (images, classes) {
        (format!("holds another network ({}, not {})", saved.name, own.name), "go on with the settings of the run")
    } else {
        let difference = format!(
            "is of images of {saved_images} and {saved_classes} classes, and the data has {images} and {classes}"
        );
        (difference, "give the data that the run was started with")
    };
    Error::Config(format!("{stage}: the checkpoint {difference}; {remedy}, or start again with --force"))
}

/// A stage in progress.
struct Run<'a> {
    stage: Stage<'a>,
    step: TrainStep<'a>,
    /// For inference; gets the trained weights before each evaluation.
    evaluator: Engine,
    position: Position,
    /// Steps taken whose outcome was not read yet, and their learning rates.
    untold: VecDeque<(Progress<'a>, f32)>,
    /// Of all steps of the epoch whose outcome was read.
    sums: Sums,
    saved: Instant,
    /// Step of the checkpoint on disk, if there is one.
    saved_step: Option<u64>,
    /// Start of this epoch in this process, and the images seen in it: for display only.
    epoch_start: Instant,
    epoch_images: u64,
    /// Whether the hook has kept the trained network.
    kept: bool,
}

impl<'a> Run<'a> {
    fn new(stage: Stage<'a>, resumed: Option<Checkpoint>) -> Result<Self> {
        let config = stage.config;
        config.check()?;
        if stage.train.batch_size() != config.batch || steps_per_epoch(&stage) == 0 {
            let (own, steps) = (stage.train.batch_size(), steps_per_epoch(&stage));
            return Err(Error::Config(format!(
                "batch is {}, the loader gives {steps} batches of {own}; lower batch to the number of images or below",
                config.batch
            )));
        }
        check_data(&stage.model.graph, stage.train)?;
        let model = resumed.as_ref().map_or(&stage.model, |saved| &saved.model);
        let options = StepOptions {
            batch: config.batch,
            fusion: Fusion::OnLoad,
            optimizer: config.optimizer,
            label_smoothing: config.label_smoothing,
            distillation: stage.distillation,
            recorded: true,
        };
        let mut step = TrainStep::new(stage.devices, model, &options)?;
        let batch = stage.test.batch_size();
        let options = EngineOptions { batch, fusion: Fusion::OnLoad, training: false, taps: Vec::new() };
        let evaluator = Engine::new(step.device(), model, &options)?;
        step.feed_from(stage.train)?;
        let mut position = Position { stage: stage.name.to_owned(), ..Position::default() };
        let mut sums = Sums::default();
        let saved_step = resumed.as_ref().map(|saved| saved.position.step);
        if let Some(saved) = resumed {
            step.restore_optimizer(&saved.optimizer, saved.optimizer_steps)?;
            stage.hook.restore(&saved.hook)?;
            position = saved.position;
            sums = saved.sums;
        }
        let now = Instant::now();
        let (epoch_start, epoch_images, kept) = (now, 0, false);
        let untold = VecDeque::new();
        Ok(Self {
            stage,
            step,
            evaluator,
            position,
            untold,
            sums,
            saved: now,
            saved_step,
            epoch_start,
            epoch_images,
            kept,
        })
    }

    fn run(&mut self, session: &mut Session) -> Result<Model> {
        let epochs = self.stage.config.epochs;
        while self.position.epoch < epochs {
            self.epoch(session)?;
            if self.position.epoch + 1 == epochs {
                self.keep(session)?;
            }
            self.end_epoch(session)?;
        }
        if !self.kept {
            // It was stopped behind its last epoch, in another process.
            self.keep(session)?;
        }
        self.position.finished = true;
        session.metrics.sync()?;
        if self.kept {
            self.save_or_tell(session, "the result is written; only --resume would take the last steps again")?;
        } else {
            self.save(session)?;
        }
        self.model()
    }

    /// Hands the trained network to the hook, before a record or a checkpoint can fail.
    fn keep(&mut self, session: &mut Session) -> Result<()> {
        let model = self.model()?;
        match self.stage.hook.trained(&model) {
            Ok(kept) => self.kept = kept,
            Err(error) => {
                // What could not be written where it belongs is not lost.
                self.save_or_tell(session, "neither is the result")?;
                return Err(error);
            }
        }
        Ok(())
    }

    /// All steps of the epoch that are not yet taken.
    fn epoch(&mut self, session: &mut Session) -> Result<()> {
        (self.epoch_start, self.epoch_images) = (Instant::now(), 0);
        let first = self.position.step_in_epoch;
        if first >= steps_per_epoch(&self.stage) {
            return Ok(());
        }
        let train = self.stage.train;
        let mut batches = self.step.epoch(train, self.position.epoch, first as usize);
        while let Some(batch) = batches.next_unless(&session.interrupt) {
            let batch = match batch {
                Err(Error::Interrupted(_)) => return Err(self.interrupted(session)),
                other => other?,
            };
            self.evaluate_between(session)?;
            self.take_step(&batch.batch())?;
            self.position.step_in_epoch += 1;
            self.position.step += 1;
            // Of the steps that were told, which before the second may be none.
            let loss = self.sums.loss / self.sums.images.max(1) as f64;
            session.reporter.step(self.position.step, format_args!("loss {loss:.3}"));
            if session.interrupt.is_set() {
                return Err(self.interrupted(session));
            }
            self.save_if_due(session, session.save_every)?;
        }
        self.settle()
    }

    /// Evaluates where the settings ask for it at this step, and the last epoch has not ended with an evaluation. Nothing is
    /// saved between this and the step that follows, so that a run which goes on repeats both or neither.
    fn evaluate_between(&mut self, session: &mut Session) -> Result<()> {
        let config = self.stage.config;
        let Position { step, step_in_epoch, epoch, .. } = self.position;
        let is_done = step > 0 && step_in_epoch == 0 && epoch.is_multiple_of(config.evaluate_every);
        if is_done || !config.evaluate_after.contains(&step) {
            return Ok(());
        }
        self.settle()?;
        let start = Instant::now();
        let evaluation = match self.evaluate(session) {
            Err(Error::Interrupted(_)) => return Err(self.interrupted(session)),
            other => other?,
        };
        let Evaluation { top1, loss, .. } = evaluation;
        let record = EvaluationRecord { stage: self.stage.name.to_owned(), step, test_loss: loss, test_top1: top1 };
        told(session.metrics.append(&record), "the run goes on, and the line is tried again")?;
        session.reporter.line(&format!("{} step {step}: test top-1 {top1:.2} %, loss {loss:.4}", record.stage));
        // The speed of the epoch is that of its steps.
        self.epoch_start += start.elapsed();
        Ok(())
    }

    fn take_step(&mut self, batch: &StepBatch<'_>) -> Result<()> {
        let config = self.stage.config;
        let lr = config.learning_rate(self.position.step, steps_per_epoch(&self.stage));
        let at = progress(&self.stage, &self.position);
        self.stage.hook.before_forward(&mut self.step, at)?;
        let update = Update { lr, weight_decay: config.weight_decay, clip_norm: config.clip_norm };
        let settings = StepSettings { seed: config.seed, step: at.step, update };
        self.untold.push_back((at, lr));
        if !self.stage.hook.follows_steps() {
            let told = self.step.run_ahead(batch, settings)?;
            return told.map_or(Ok(()), |taken| self.tell(&taken));
        }
        let taken = self.step.run(batch, settings)?;
        self.tell(&taken)?;
        if !taken.update.skipped {
            self.stage.hook.after_step(&self.step, at)?;
        }
        Ok(())
    }

    /// Reads what came of the steps taken so far.
    fn settle(&mut self) -> Result<()> {
        let told = self.step.settle()?;
        told.map_or(Ok(()), |taken| self.tell(&taken))
    }

    /// Takes note of the outcome of the first step that was not told yet.
    fn tell(&mut self, taken: &TakenStep) -> Result<()> {
        let (at, lr) = self.untold.pop_front().expect("a step that was taken");
        if !taken.loss.loss.is_finite() {
            return Err(diverged(&at, "loss", taken.loss.loss / taken.images as f64, lr));
        }
        let outcome = taken.update;
        if outcome.skipped && !outcome.scaled {
            return Err(diverged(&at, "gradient", outcome.gradient_norm.unwrap_or(f64::NAN), lr));
        }
        self.sums.loss += taken.loss.loss;
        self.sums.correct += taken.loss.correct;
        self.sums.images += taken.images as u64;
        self.epoch_images += taken.images as u64;
        Ok(())
    }

    /// Evaluates, writes the record, and moves to the next epoch.
    fn end_epoch(&mut self, session: &mut Session) -> Result<()> {
        let config = self.stage.config;
        let seconds = self.epoch_start.elapsed().as_secs_f64();
        // An evaluation can take long and saves nothing itself.
        self.save_if_due(session, session.save_every / 2)?;
        let epoch = self.position.epoch + 1;
        let evaluation = if epoch.is_multiple_of(config.evaluate_every) || epoch == config.epochs {
            match self.evaluate(session) {
                Err(Error::Interrupted(_)) => return Err(self.interrupted(session)),
                other => Some(other?),
            }
        } else {
            None
        };
        let record = self.record(evaluation, seconds);
        told(session.metrics.append(&record), "the run goes on, and the line is tried again")?;
        session.reporter.line(&self.line(evaluation, seconds));
        self.position.epoch = epoch;
        self.position.step_in_epoch = 0;
        self.sums = Sums::default();
        self.save_if_due(session, session.save_every / 2)
    }

    fn evaluate(&mut self, session: &Session) -> Result<Evaluation> {
        let weights = self.weights()?;
        self.evaluator.load(&weights)?;
        let at = progress(&self.stage, &self.position);
        self.stage.hook.before_evaluation(&mut self.evaluator, at)?;
        match evaluate_until(&mut self.evaluator, self.stage.test, &session.interrupt) {
            Err(Error::NotFinite(_)) => Err(diverged(&at, "loss on the test images", f64::NAN, self.stage.config.lr)),
            other => other,
        }
    }

    /// Training speed of this epoch; `None` where no step of it was taken in this process, which went on from a
    /// checkpoint before the evaluation.
    fn images_per_s(&self, seconds: f64) -> Option<f64> {
        (self.epoch_images > 0).then(|| self.epoch_images as f64 / seconds.max(1e-9))
    }

    fn record(&mut self, evaluation: Option<Evaluation>, seconds: f64) -> EpochRecord {
        let images = self.sums.images.max(1) as f64;
        let last = self.position.step.saturating_sub(1);
        EpochRecord {
            stage: self.stage.name.to_owned(),
            epoch: self.position.epoch + 1,
            step: self.position.step,
            lr: self.stage.config.learning_rate(last, steps_per_epoch(&self.stage)),
            train_loss: self.sums.loss / images,
            train_top1: 100.0 * self.sums.correct as f64 / images,
            test_loss: evaluation.map(|e| e.loss),
            test_top1: evaluation.map(|e| e.top1),
            images_per_s: self.images_per_s(seconds),
            seconds,
            device_peak_bytes: match self.step.device() {
                Device::Gpu(gpu, _) => Some(gpu.memory().1),
                Device::Cpu => None,
            },
            hook: self.stage.hook.epoch_record(progress(&self.stage, &self.position)),
        }
    }

    fn line(&self, evaluation: Option<Evaluation>, seconds: f64) -> String {
        let images = self.sums.images.max(1) as f64;
        let (loss, top1) = (self.sums.loss / images, 100.0 * self.sums.correct as f64 / images);
        let test = evaluation.map_or_else(String::new, |e| format!(", test top-1 {:.2} %", e.top1));
        let speed = self.images_per_s(seconds).map_or_else(String::new, |speed| format!(", {speed:.0} images/s"));
        format!(
            "{} epoch {}/{}: loss {loss:.4}, top-1 {top1:.2} %{test}{speed}",
            self.stage.name,
            self.position.epoch + 1,
            self.stage.config.epochs
        )
    }

    /// Saves a checkpoint and reports it.
    fn interrupted(&mut self, session: &mut Session) -> Error {
        match self.save(session) {
            Err(e) => e,
            Ok(()) => session.interrupted(),
        }
    }

    /// A failed device takes what came after the last checkpoint with it; says where the run can go on.
    fn with_way_back(&self, error: Error) -> Error {
        let Some(step) = self.saved_step else { return error };
        let saved = |text| format!("{text}; the run is saved up to step {step}, go on with --resume");
        match error {
            Error::Device(text) => Error::Device(saved(text)),
            Error::DeviceLost(text) => Error::DeviceLost(saved(text)),
            other => other,
        }
    }

    /// Saves a checkpoint when it is time. Where it cannot be written the one before it is still there, and the run is
    /// worth more than the steps between the two.
    fn save_if_due(&mut self, session: &mut Session, every: Duration) -> Result<()> {
        if self.saved.elapsed() < every {
            return Ok(());
        }
        self.save_or_tell(session, "the run goes on without this checkpoint")
    }

    /// Saves a checkpoint; one that cannot be written is only told, with what that means.
    fn save_or_tell(&mut self, session: &mut Session, so: &str) -> Result<()> {
        told(self.save(session), so)?;
        // Not tried again at every step where it failed.
        self.saved = Instant::now();
        Ok(())
    }

    fn save(&mut self, session: &mut Session) -> Result<()> {
        self.settle()?;
        if let Some(path) = &session.checkpoint {
            let checkpoint = Checkpoint {
                model: self.model()?,
                optimizer: self.step.optimizer().save()?,
                optimizer_steps: self.step.optimizer().steps(),
                position: self.position.clone(),
                sums: self.sums,
                metrics_bytes: session.metrics.len(),
                hook: self.stage.hook.state(),
                job: session.job.clone(),
                fingerprint: session.fingerprint.clone(),
                data: session.data.clone(),
            };
            // Lines the checkpoint counts must be on disk before it is.
            session.metrics.sync()?;
            checkpoint.write(path)?;
            self.saved_step = Some(self.position.step);
        }
        self.saved = Instant::now();
        Ok(())
    }

    fn model(&self) -> Result<Model> {
        Model::new(self.stage.model.graph.clone(), self.weights()?)
    }

    /// The weights, which are never handed on when they are not finite: a good checkpoint must not be lost to them.
    fn weights(&self) -> Result<Weights> {
        let weights = self.step.weights()?;
        match weights.iter().find(|(_, tensor)| tensor.data.iter().any(|x| !x.is_finite())) {
            None => Ok(weights),
            Some((name, _)) => {
                let lr = self.stage.config.lr;
                Err(diverged(&progress(&self.stage, &self.position), &format!("weight {name}"), f64::NAN, lr))
            }
        }
    }

    fn total_steps(&self) -> u64 {
        self.stage.config.epochs * steps_per_epoch(&self.stage)
    }
}

/// Tells what could not be written and what that means, where the run is worth more.
fn told(written: Result<()>, so: &str) -> Result<()> {
    match written {
        Err(error @ (Error::File { .. } | Error::Io { .. } | Error::Memory(_))) => {
            tracing::error!("{error}; {so}");
            Ok(())
        }
        other => other,
    }
}

fn steps_per_epoch(stage: &Stage<'_>) -> u64 {
    stage.train.steps_per_epoch() as u64
}

fn progress<'a>(stage: &Stage<'a>, position: &Position) -> Progress<'a> {
    let epochs = stage.config.epochs;
    let total_steps = epochs * steps_per_epoch(stage);
    Progress { stage: stage.name, epoch: position.epoch, epochs, step: position.step, total_steps }
}

fn diverged(at: &Progress<'_>, what: &str, value: f64, lr: f32) -> Error {
    Error::NotFinite(format!(
        "{}: the {what} is {value} at step {} of {} (epoch {}); lower --lr (now {lr}) or clip_norm, or lengthen \
         warmup_epochs",
        at.stage,
        at.step,
        at.total_steps,
        at.epoch + 1
    ))
}
