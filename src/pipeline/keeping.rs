//! A stage that writes its result the moment it has it: before the last evaluation, the last record and the last checkpoint,
//! any of which can fail on a full disk or be interrupted.

use serde_json::Value;

use crate::Result;
use crate::engine::Engine;
use crate::model::Model;
use crate::train::{Hook, HookRecord, Progress, TrainStep};

/// Writes a model where it belongs.
pub type KeepModel<'a> = dyn FnMut(&Model) -> Result<()> + 'a;

/// A hook, and what to do with it and the trained network in the end.
pub(super) struct Keeping<'a, H> {
    pub hook: &'a mut H,
    pub keep: &'a mut dyn FnMut(&H, &Model) -> Result<()>,
}

impl<H: Hook> Hook for Keeping<'_, H> {
    fn before_forward(&mut self, step: &mut TrainStep<'_>, at: Progress<'_>) -> Result<()> {
        self.hook.before_forward(step, at)
    }

    fn follows_steps(&self) -> bool {
        self.hook.follows_steps()
    }

    fn after_step(&mut self, step: &TrainStep<'_>, at: Progress<'_>) -> Result<()> {
        self.hook.after_step(step, at)
    }

    fn before_evaluation(&mut self, engine: &mut Engine, at: Progress<'_>) -> Result<()> {
        self.hook.before_evaluation(engine, at)
    }

    fn trained(&mut self, model: &Model) -> Result<bool> {
        self.hook.trained(model)?;
        (self.keep)(self.hook, model)?;
        Ok(true)
    }

    fn epoch_record(&mut self, at: Progress<'_>) -> Option<HookRecord> {
        self.hook.epoch_record(at)
    }

    fn state(&self) -> Value {
        self.hook.state()
    }

    fn restore(&mut self, state: &Value) -> Result<()> {
        self.hook.restore(state)
    }
}
