//! Everything it takes to go on with a training run as if it had never stopped, bit for bit.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::model::{file_weights, graph_metadata, read_graph, read_weights};
use super::tensors::{TensorFile, parse_tensors, read_tensors, write_tensors};
use crate::model::Model;
use crate::tensor::Tensor;
use crate::{Error, Result, files, memory};

pub(super) const STATE_KEY: &str = "depthshrinker.checkpoint";
/// Prefix of the optimizer's tensors, which no node of a network can have: timm's names hold no colon.
const OPTIMIZER: &str = "optimizer:";
/// What to do about a checkpoint that cannot be used.
const REMEDY: &str = "start again with --force";

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// The stage, such as `train` or `search`.
    pub stage: String,
    /// Epochs of this stage that are complete.
    pub epoch: u64,
    /// Steps taken of the epoch that is not.
    pub step_in_epoch: u64,
    /// Steps taken of this stage altogether.
    pub step: u64,
    /// Whether the stage has ended; then the model is its result.
    pub finished: bool,
}

/// What an epoch has added up so far.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sums {
    /// Sum of the loss over all images.
    pub loss: f64,
    /// Images whose highest logit was the label's.
    pub correct: u64,
    /// Images seen.
    pub images: u64,
}

/// A run at one instant.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// The network with its weights, running statistics included.
    pub model: Model,
    /// The optimizer's flat buffers, in its own order.
    pub optimizer: Vec<Vec<f32>>,
    /// Steps the optimizer has taken.
    pub optimizer_steps: u64,
    /// Where the run stands.
    pub position: Position,
    /// What the epoch has added up so far.
    pub sums: Sums,
    /// Length of the metrics file in bytes; what lies behind it belongs to the lost future.
    pub metrics_bytes: u64,
    /// What the stage's hook keeps.
    pub hook: Value,
    /// What the job around the stages keeps.
    pub job: Value,
    /// Identifies the settings; a run is only continued with the same.
    pub fingerprint: String,
    /// What the data set held; null where nobody looked.
    pub data: Value,
}

/// All of a checkpoint but its tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    position: Position,
    sums: Sums,
    metrics_bytes: u64,
    optimizer_steps: u64,
    optimizer_buffers: usize,
    hook: Value,
    job: Value,
    fingerprint: String,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    data: Value,
}

impl Checkpoint {
    /// Writes the checkpoint atomically.
    ///
    /// # Errors
    /// As [`super::write_atomic`]; the checkpoint before it is then still there.
    pub fn write(&self, path: &Path) -> Result<()> {
        let state = State {
            position: self.position.clone(),
            sums: self.sums,
            metrics_bytes: self.metrics_bytes,
            optimizer_steps: self.optimizer_steps,
            optimizer_buffers: self.optimizer.len(),
            hook: self.hook.clone(),
            job: self.job.clone(),
            fingerprint: self.fingerprint.clone(),
            data: self.data.clone(),
        };
        let json = serde_json::to_string(&state)
            .map_err(|e| Error::file(path, format!("the checkpoint cannot be written as JSON: {e}")))?;
        let mut metadata = graph_metadata(&self.model.graph)?;
        metadata.insert(STATE_KEY.into(), json);
        let mut tensors = file_weights(&self.model.graph, &self.model.weights)?;
        for (i, data) in self.optimizer.iter().enumerate() {
            let copy = memory::copy(data, "a checkpoint of the optimizer")?;
            tensors.insert(format!("{OPTIMIZER}{i}"), Tensor { shape: vec![data.len()], data: copy });
        }
        write_tensors(path, &tensors, &metadata)
    }

    /// Reads a checkpoint.
    ///
    /// # Errors
    /// A file that is unreadable, damaged, or no checkpoint.
    pub fn read(path: &Path) -> Result<Self> {
        Self::of(path, read_tensors(path)?)
    }

    /// As [`read`](Self::read), from bytes; `path` is what messages name.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        Self::of(path, parse_tensors(path, bytes)?)
    }

    fn of(path: &Path, mut file: TensorFile) -> Result<Self> {
        let Some(json) = file.metadata.get(STATE_KEY) else {
            return Err(Error::file(path, format!("is no checkpoint of this program; {REMEDY}")));
        };
        let state: State = serde_json::from_str(json)
            .map_err(|e| Error::file(path, format!("the checkpoint is damaged: {e}; {REMEDY}")))?;
        let graph = read_graph(path, &file.metadata)?;
        let optimizer = take_optimizer(path, &mut file, state.optimizer_buffers)?;
        let weights = read_weights(path, &graph, &mut file.tensors, |spec| spec.name.clone(), REMEDY)?;
        Ok(Self {
            model: Model::new(graph, weights).map_err(|e| Error::file(path, e.to_string()))?,
            optimizer,
            optimizer_steps: state.optimizer_steps,
            position: state.position,
            sums: state.sums,
            metrics_bytes: state.metrics_bytes,
            hook: state.hook,
            job: state.job,
            fingerprint: state.fingerprint,
            data: state.data,
        })
    }

    /// Refuses to go on with other settings than those the checkpoint was made with.
    ///
    /// # Errors
    /// When the fingerprints differ.
    pub fn check_fingerprint(&self, own: &str) -> Result<()> {
        if self.fingerprint == own {
            return Ok(());
        }
        Err(Error::Config(format!(
            "the checkpoint was made with other settings ({} against {own}); give the same settings, or {REMEDY}",
            self.fingerprint.escape_debug()
        )))
    }
}

/// A text that differs when the settings do: SHA-256 of their JSON.
///
/// # Errors
/// Settings that cannot be written as JSON.
pub fn fingerprint(settings: &impl Serialize) -> Result<String> {
    let json = serde_json::to_vec(settings).map_err(|e| Error::Config(format!("cannot be written as JSON: {e}")))?;
    Ok(format!("{:x}", Sha256::digest(json)))
}

/// A text that differs when the content of a file does: its SHA-256.
///
/// # Errors
/// A file that cannot be read.
pub fn file_fingerprint(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    std::io::copy(&mut files::open(path)?, &mut hash).map_err(|e| Error::io(path, e))?;
    Ok(format!("{:x}", hash.finalize()))
}

fn take_optimizer(path: &Path, file: &mut TensorFile, buffers: usize) -> Result<Vec<Vec<f32>>> {
    let tensors: &mut BTreeMap<String, Tensor> = &mut file.tensors;
    let take = |i| {
        let missing = || Error::file(path, format!("the checkpoint's optimizer state {i} is missing; {REMEDY}"));
        tensors.remove(&format!("{OPTIMIZER}{i}")).map(|t| t.data).ok_or_else(missing)
    };
    // A claim of more buffers than there are tensors ends at the first missing one.
    (0..buffers).map(take).collect()
}
