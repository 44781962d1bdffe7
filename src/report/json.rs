//! Records as JSON: what `--json` prints, and the files of a bench.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::json;

use crate::measure::{ComparisonRecord, LimitsRecord, PeerAbout, RuntimesAbout};

/// Version of the layout of [`BenchFile`]; it rises when a field changes its meaning or goes.
pub const BENCH_SCHEMA: u32 = 1;

/// `kernels.json` and `network.json`: the records of a bench and what they were measured on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchFile<'a, R> {
    /// [`BENCH_SCHEMA`].
    pub schema: u32,
    /// Name of the network.
    pub network: &'a str,
    /// Name of the device.
    pub device: String,
    /// Precision of activations and weights.
    pub precision: String,
    /// Images of a batch.
    pub batch: usize,
    /// Version of this program.
    pub version: &'static str,
    /// Whether the bench has ended; an interrupted one leaves what it found.
    pub complete: bool,
    /// The device's limits.
    pub peaks: LimitsRecord,
    /// The peer; null where none has started.
    pub peer: Option<&'a PeerAbout>,
    /// The inference runtimes; absent where none was looked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtimes: Option<&'a RuntimesAbout>,
    /// The records: layers, or the cases of a network.
    #[serde(rename = "layers")]
    pub records: &'a [R],
}

/// `table.json`: networks side by side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ComparisonFile<'a> {
    /// [`BENCH_SCHEMA`].
    pub schema: u32,
    /// Version of this program.
    pub version: &'static str,
    /// Whether all rows are there; an interrupted run leaves what it found.
    pub complete: bool,
    /// What `projected_images_per_s` is projected to; null where nothing is.
    pub projected_to: Option<&'a str>,
    /// The device's limits by precision.
    pub peaks: BTreeMap<String, LimitsRecord>,
    /// The rows.
    pub rows: &'a [ComparisonRecord],
}

/// Indented JSON with a line feed at its end. Keys are sorted, and an `f32` has the digits of the `f64` that equals it.
///
/// # Panics
/// Where a key of a map is no text, which no record has.
pub fn json_text<T: Serialize + ?Sized>(value: &T) -> String {
    format!("{:#}\n", json!(value))
}
