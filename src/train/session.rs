//! The state that outlives a stage: its records, its checkpoints, and the checkpoint that it may resume from.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::interrupt::Interrupt;
use super::metrics::Metrics;
use super::reporter::Reporter;
use crate::io::atomic::remove_leftovers;
use crate::io::{Checkpoint, FolderLock};
use crate::{Error, Result};

/// Seconds from one checkpoint to the next. With the step in progress it stays below the 30 s that are promised.
const SAVE_EVERY: Duration = Duration::from_secs(20);

/// The surroundings of one or more stages.
#[derive(Debug)]
pub struct Session {
    /// Where checkpoints go; `None` keeps none.
    pub checkpoint: Option<PathBuf>,
    /// One line per epoch.
    pub metrics: Metrics,
    /// Shows how far the stage is.
    pub reporter: Reporter,
    /// Asks the loop to save and stop.
    pub interrupt: Interrupt,
    /// Identifies the settings of the whole job ([`crate::io::checkpoint::fingerprint`]).
    pub fingerprint: String,
    /// What the job around the stages wants to find again in the checkpoint.
    pub job: Value,
    /// What the data set holds, which a resumed run compares.
    pub data: Value,
    /// Keeps other processes from the run's folder.
    pub lock: Option<FolderLock>,
    /// Time from one checkpoint to the next.
    pub save_every: Duration,
    resume: Option<Checkpoint>,
}

impl Session {
    /// Keeps and shows nothing.
    pub fn silent() -> Self {
        Self {
            checkpoint: None,
            metrics: Metrics::nowhere(),
            reporter: Reporter::quiet(),
            interrupt: Interrupt::new(),
            fingerprint: String::new(),
            job: Value::Null,
            data: Value::Null,
            lock: None,
            save_every: SAVE_EVERY,
            resume: None,
        }
    }

    /// A new run that keeps its checkpoint and its metrics in these files, with a bar or lines and Ctrl-C caught.
    ///
    /// # Errors
    /// When the metrics file cannot be made or Ctrl-C cannot be caught.
    pub fn start(checkpoint: &Path, metrics: &Path, fingerprint: String) -> Result<Self> {
        Ok(Self {
            checkpoint: Some(checkpoint.to_owned()),
            metrics: Metrics::create(metrics)?,
            reporter: Reporter::new(),
            interrupt: Interrupt::on_ctrl_c()?,
            fingerprint,
            ..Self::silent()
        })
    }

    /// A run that goes on from its checkpoint, `saved`, which lies in `checkpoint`; [`job`](Self::job), [`data`](Self::data)
    /// and [`resumed`](Self::resumed) then say where it stood. Lines of the metrics file that were written after the
    /// checkpoint are dropped: they will be written again.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn resume(saved: Checkpoint, checkpoint: &Path, metrics: &Path, fingerprint: String) -> Result<Self> {
        remove_leftovers(checkpoint);
        let mut metrics = Metrics::append_to(metrics)?;
        metrics.truncate(saved.metrics_bytes)?;
        Ok(Self {
            checkpoint: Some(checkpoint.to_owned()),
            metrics,
            reporter: Reporter::new(),
            interrupt: Interrupt::on_ctrl_c()?,
            fingerprint,
            job: saved.job.clone(),
            data: saved.data.clone(),
            resume: Some(saved),
            ..Self::silent()
        })
    }

    /// The checkpoint the run goes on from, until its stage has taken it.
    pub fn resumed(&self) -> Option<&Checkpoint> {
        self.resume.as_ref()
    }

    /// The error that ends an interrupted run, after its state was saved.
    pub fn interrupted(&self) -> Error {
        Error::Interrupted(match &self.checkpoint {
            Some(path) => format!("checkpoint written to {}; go on with --resume", path.display()),
            None => "no checkpoint was asked for, so nothing was saved".into(),
        })
    }

    /// For work between stages, which keeps nothing: ends it where the run was asked to stop.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub fn check_interrupt(&self) -> Result<()> {
        if self.interrupt.is_set() { Err(self.interrupted()) } else { Ok(()) }
    }

    /// Takes the checkpoint if it belongs to this stage.
    pub(super) fn take_checkpoint(&mut self, stage: &str) -> Option<Checkpoint> {
        self.resume.take_if(|saved| saved.position.stage == stage)
    }
}
