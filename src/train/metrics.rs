//! `metrics.jsonl`: one JSON object per epoch and line.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::{Error, Result};

/// The line of one epoch.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EpochRecord {
    /// The stage, such as `train`.
    pub stage: String,
    /// The epoch, from 1.
    pub epoch: u64,
    /// Steps of the stage taken by its end.
    pub step: u64,
    /// Learning rate of its last step.
    pub lr: f32,
    /// Mean loss of the training images.
    pub train_loss: f64,
    /// Accuracy on the augmented training images, percent.
    pub train_top1: f64,
    /// Mean loss of the test images; null in epochs without evaluation.
    pub test_loss: Option<f64>,
    /// Accuracy on the test images, percent; null in epochs without evaluation.
    pub test_top1: Option<f64>,
    /// Training speed; null where a resumed run had only the evaluation left to do.
    pub images_per_s: Option<f64>,
    /// Wall time since the epoch began or was resumed, without its evaluation.
    pub seconds: f64,
    /// Most bytes of device memory held so far; absent on the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_peak_bytes: Option<u64>,
    /// What the stage adds.
    #[serde(flatten)]
    pub hook: Option<HookRecord>,
}

/// The line of an evaluation within an epoch ([`TrainConfig::evaluate_after`](super::TrainConfig::evaluate_after)).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EvaluationRecord {
    /// The stage.
    pub stage: String,
    /// Steps of the stage taken.
    pub step: u64,
    /// Mean loss of the test images.
    pub test_loss: f64,
    /// Accuracy on the test images, percent.
    pub test_top1: f64,
}

/// What a stage adds to an epoch's line.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum HookRecord {
    /// The mask search.
    Search {
        /// Whether the masks of the epoch's last step were still drawn at random.
        exploring: bool,
        /// The mask that the scores give now: one entry per block, 1 = its activations stay.
        kept: Vec<u8>,
        /// How often a block went from kept to freed or back in this epoch.
        mask_changes: u64,
    },
    /// Finetuning without the freed activations.
    Finetune {
        /// Mean slope of the freed blocks outside their bounds: 0 = activation, 1 = identity.
        removed_slope: f32,
        /// Whether a slope is below 1: the accuracy is then that of a network between the original and the shrunk one.
        partial: bool,
    },
}

/// The line of one step of the mask search.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScoreRecord {
    /// The stage.
    pub stage: String,
    /// Steps of the stage taken.
    pub step: u64,
    /// Keep scores in [0, 1], one per block.
    pub scores: Vec<f32>,
}

/// Appends lines to a metrics file, or nowhere.
#[derive(Debug, Default)]
pub struct Metrics {
    file: Option<(PathBuf, File)>,
    len: u64,
    /// Whole lines that could not be written yet.
    waiting: String,
}

impl Metrics {
    /// Keeps nothing.
    pub fn nowhere() -> Self {
        Self::default()
    }

    /// Starts a new file.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn create(path: &Path) -> Result<Self> {
        let mut metrics = Self::append_to(path)?;
        metrics.truncate(0)?;
        Ok(metrics)
    }

    /// Goes on with a file.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn append_to(path: &Path) -> Result<Self> {
        let open = || {
            let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
            let len = file.seek(SeekFrom::End(0))?;
            Ok((file, len))
        };
        let (file, len) = open().map_err(|e| Error::io(path, e))?;
        Ok(Self { file: Some((path.to_owned(), file)), len, waiting: String::new() })
    }

    /// Bytes written so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing has been written.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets everything behind `len` bytes; a shorter file stays as it is.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn truncate(&mut self, len: u64) -> Result<()> {
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        if len < self.len {
            file.set_len(len).and_then(|()| file.seek(SeekFrom::Start(len))).map_err(|e| Error::io(&path, e))?;
            self.len = len;
        }
        Ok(())
    }

    /// Appends a line: an [`EpochRecord`], an [`EvaluationRecord`] or a [`ScoreRecord`]. Keys are sorted, and an `f32` has the digits of the `f64`
    /// that equals it.
    ///
    /// # Errors
    /// When it cannot be written. No part of it is in the file then, and it is tried again with the next one.
    pub fn append<R: Serialize>(&mut self, record: &R) -> Result<()> {
        let Some((path, _)) = &self.file else { return Ok(()) };
        let value: Value = serde_json::to_value(record).map_err(|e| Error::file(path, e.to_string()))?;
        self.waiting.push_str(&format!("{value}\n"));
        self.write_waiting()
    }

    fn write_waiting(&mut self) -> Result<()> {
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        if let Err(e) = file.write_all(self.waiting.as_bytes()) {
            // What was written of a line must not be taken for a line.
            let _ = file.set_len(self.len).and_then(|()| file.seek(SeekFrom::Start(self.len)));
            return Err(Error::file(
                path,
                format!("cannot be written: {e}; free some space, and go on with --resume if the run has ended"),
            ));
        }
        self.len += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }

    /// Waits until all lines are on disk.
    ///
    /// # Errors
    /// When the operating system refuses, also of lines that [`append`](Self::append) could not write.
    pub fn sync(&mut self) -> Result<()> {
        self.write_waiting()?;
        match &mut self.file {
            Some((path, file)) => file.sync_data().map_err(|e| Error::io(path, e)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_could_not_be_written_is_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = Metrics::create(&path).unwrap();
        metrics.append(&1).unwrap();
        let good = metrics.file.replace((path.clone(), File::open(&path).unwrap())).unwrap();
        for record in [2, 3] {
            let error = metrics.append(&record).unwrap_err().to_string();
            assert!(error.contains("metrics.jsonl: cannot be written") && error.contains("--resume"), "{error}");
        }
        assert!(metrics.sync().is_err());
        assert_eq!((metrics.len(), std::fs::read_to_string(&path).unwrap().as_str()), (2, "1\n"));
        metrics.file = Some(good);
        metrics.append(&4).unwrap();
        metrics.sync().unwrap();
        assert_eq!((metrics.len(), std::fs::read_to_string(&path).unwrap().as_str()), (8, "1\n2\n3\n4\n"));
    }
}
