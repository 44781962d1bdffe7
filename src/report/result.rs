//! `result.json`, schema 1: the numbers of a run that scripts read.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::measure::{Comparison, Latency, Utilization};
use crate::shrink::{Matched, SearchMethod};

/// Version of the file's layout; it rises when a field changes its meaning or goes.
pub const SCHEMA: u32 = 1;

/// Everything a finished run reports. Optional parts are left out of the file when empty.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Device, such as `cpu`.
    pub device: String,
    /// Precision, such as `f32`.
    pub precision: String,
    /// Seed of the run.
    pub seed: u64,
    /// Name of the network, such as `mobilenetv2-0.5`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// The machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineResult>,
    /// The data.
    pub data: DataResult,
    /// Original, unmerged and merged, those that exist.
    pub networks: Vec<NetworkResult>,
    /// Images/s of the merged network over those of the original: the median of pairs measured in alternation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
    /// One entry per block in network order, 1 = its activations stayed.
    pub kept: Vec<u8>,
    /// How the blocks were chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<SearchMethod>,
    /// Names of the blocks of which only the shortcut is left.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bypassed: Vec<String>,
    /// Channels that are left, and that there were, of those that became fewer, by the first convolution that gives them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub channels: BTreeMap<String, [usize; 2]>,
    /// What the times of blocks were priced by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<String>,
    /// Time of the merged network by the run's latency table, as a share of the original's; absent where none was needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_share: Option<f64>,
    /// How near the budget is by the clock, where the clock decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub matched: Option<Matched>,
    /// The merge; absent when nothing was merged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge: Option<MergeResult>,
    /// Latency of each block alone, before and after.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blocks: Vec<BlockResult>,
    /// Networks finetuned with selected masks, one per seed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub learned_masks: Vec<MaskTrial>,
    /// Networks finetuned with random masks of the same size or time, one per seed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub random_masks: Vec<MaskTrial>,
    /// Time of each stage, in order.
    pub stages: Vec<StageTime>,
}

/// The machine a run was measured on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineResult {
    /// The processor's name.
    pub cpu: String,
    /// Threads used.
    pub threads: usize,
}

/// The data of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataResult {
    /// Name of the dataset.
    pub name: String,
    /// Training images.
    pub train: usize,
    /// Test images.
    pub test: usize,
}

/// Which of a run's networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkStage {
    /// As trained, all activations in place.
    Original,
    /// Finetuned without the removed activations, not merged yet.
    Unmerged,
    /// The same network with its linear blocks merged.
    Merged,
}

impl std::fmt::Display for NetworkStage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Original => "original",
            Self::Unmerged => "unmerged",
            Self::Merged => "merged",
        })
    }
}

/// One network: how good, how large, how fast.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NetworkResult {
    /// Which network.
    pub name: NetworkStage,
    /// Accuracy on the test images, percent.
    pub top1: f64,
    /// Mean cross-entropy on the test images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Trained parameters.
    pub params: u64,
    /// Multiply-accumulates per image.
    pub macs: u64,
    /// Images per pass of the latency measurement.
    pub batch: usize,
    /// Time of one pass.
    pub latency_ms: LatencyResult,
    /// Throughput at the median.
    pub images_per_s: f64,
    /// Share of the machine's measured peaks that was used.
    pub utilization: Utilization,
}

impl NetworkResult {
    /// Fills in a measured latency.
    pub fn with_latency(mut self, latency: &Latency) -> Self {
        self.batch = latency.batch;
        self.latency_ms = LatencyResult { median: latency.median_ms, iqr: latency.iqr_ms };
        self.images_per_s = latency.images_per_s;
        self
    }
}

/// Median and spread of a latency, milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct LatencyResult {
    /// Median.
    pub median: f64,
    /// Interquartile range.
    pub iqr: f64,
}

/// How exact the merge was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MergeResult {
    /// Runs of convolutions that became one.
    pub segments: usize,
    /// Largest difference of a logit.
    pub max_abs_error: f64,
    /// The same relative to the logits' scale.
    pub max_rel_error: f64,
}

/// One block's latency alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlockResult {
    /// The block's name.
    pub name: String,
    /// 1 = its activations stayed.
    pub kept: u8,
    /// Microseconds in the original network.
    pub before_us: f64,
    /// Microseconds in the merged network.
    pub after_us: f64,
}

/// One mask and what the network reached with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MaskTrial {
    /// Seed of the trial.
    pub seed: u64,
    /// One entry per block, 1 = its activations stayed.
    pub kept: Vec<u8>,
    /// Accuracy after finetuning, percent.
    pub top1: f64,
}

/// Wall time of one stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageTime {
    /// The stage's name, such as `train`.
    pub name: String,
    /// Seconds.
    pub seconds: f64,
}

impl RunResult {
    /// The network of a stage, if the run has one.
    pub fn network(&self, name: NetworkStage) -> Option<&NetworkResult> {
        self.networks.iter().find(|n| n.name == name)
    }

    /// How many blocks became one convolution and how many a shortcut alone.
    pub fn freed(&self) -> [usize; 2] {
        let freed = self.kept.iter().filter(|&&kept| kept == 0).count();
        [freed.saturating_sub(self.bypassed.len()), self.bypassed.len()]
    }

    /// Channels that are left, and that there were, of all that became fewer; `None` where none did.
    pub fn channels_left(&self) -> Option<[usize; 2]> {
        let sum = |sum: [usize; 2], of: &[usize; 2]| [sum[0] + of[0], sum[1] + of[1]];
        (!self.channels.is_empty()).then(|| self.channels.values().fold([0, 0], sum))
    }

    /// Speed of a network relative to the original: the paired ratio for the merged one where it was measured, else the
    /// quotient of the medians.
    pub fn speed_up(&self, name: NetworkStage) -> Option<f64> {
        match (name, self.ratio) {
            (NetworkStage::Merged, Some(ratio)) => Some(ratio),
            _ => {
                let original = self.network(NetworkStage::Original)?.images_per_s;
                (original > 0.0).then_some(self.network(name)?.images_per_s / original)
            }
        }
    }

    /// Takes latencies and the paired ratio from a comparison whose networks are named as [`NetworkStage`] prints them.
    pub fn set_latencies(&mut self, comparison: &Comparison) {
        for ((name, latency), &speed_up) in comparison.networks.iter().zip(&comparison.speed_up) {
            if let Some(network) = self.networks.iter_mut().find(|n| n.name.to_string() == *name) {
                *network = network.clone().with_latency(latency);
                if network.name == NetworkStage::Merged {
                    self.ratio = Some(speed_up);
                }
            }
        }
    }
}
