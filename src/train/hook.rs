//! Hooks: how a stage extends plain training.

use serde_json::Value;

use super::metrics::HookRecord;
use super::step::TrainStep;
use crate::engine::Engine;
use crate::model::Model;
use crate::{Error, Result};

/// The progress of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The stage's name.
    pub stage: &'a str,
    /// The epoch, from 0.
    pub epoch: u64,
    /// Epochs of the stage.
    pub epochs: u64,
    /// The step over the whole stage, from 0.
    pub step: u64,
    /// Steps of the whole stage.
    pub total_steps: u64,
}

/// Extends plain training for a stage. The loop calls it at fixed points; all its numbers must follow from its state,
/// the step and the network, so that a resumed run repeats them bit for bit.
pub trait Hook {
    /// Before each training pass; the place to set slopes.
    ///
    /// # Errors
    /// Ends the training.
    fn before_forward(&mut self, step: &mut TrainStep<'_>, at: Progress<'_>) -> Result<()> {
        let _ = (step, at);
        Ok(())
    }

    /// Whether [`after_step`](Self::after_step) is to be called. Where it is not, a GPU takes the next step before what came of
    /// the last one is read.
    fn follows_steps(&self) -> bool {
        true
    }

    /// After each step, but for those that were skipped since a scaled gradient overflowed; the place to read score
    /// gradients.
    ///
    /// # Errors
    /// Ends the training.
    fn after_step(&mut self, step: &TrainStep<'_>, at: Progress<'_>) -> Result<()> {
        let _ = (step, at);
        Ok(())
    }

    /// Before an evaluation on the test images; sets the slopes of the engine that evaluates. `at` counts the steps taken.
    ///
    /// # Errors
    /// Ends the training.
    fn before_evaluation(&mut self, engine: &mut Engine, at: Progress<'_>) -> Result<()> {
        let _ = (engine, at);
        Ok(())
    }

    /// After the last step, with the network as it is trained then; the place to keep the stage's result, before anything
    /// that could fail for want of space or time. A stage that is resumed behind its last step calls it again. Returns
    /// whether the result is kept: the last checkpoint is then of no use but to resume, and no reason to fail.
    ///
    /// # Errors
    /// Ends the training.
    fn trained(&mut self, model: &Model) -> Result<bool> {
        let _ = model;
        Ok(false)
    }

    /// Further fields of the epoch's line in `metrics.jsonl`, where the stage has any.
    fn epoch_record(&mut self, at: Progress<'_>) -> Option<HookRecord> {
        let _ = at;
        None
    }

    /// Everything that changes from step to step, for a checkpoint. An `f32` survives JSON exactly.
    fn state(&self) -> Value {
        Value::Null
    }

    /// Goes on from a state that [`state`](Self::state) gave.
    ///
    /// # Errors
    /// A state that is not this hook's.
    fn restore(&mut self, state: &Value) -> Result<()> {
        if state.is_null() {
            return Ok(());
        }
        Err(Error::Config("the checkpoint holds the state of another kind of stage; start again with --force".into()))
    }
}

/// Plain training.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoHook;

impl Hook for NoHook {
    fn follows_steps(&self) -> bool {
        false
    }
}
