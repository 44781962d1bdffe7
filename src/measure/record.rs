//! What was measured, as typed records. Their fields are the keys of the machine output: `bench --json`, `kernels.json`,
//! `network.json` and the columns of the CSV files.
//!
//! A record says what was timed (`work`), how long it took here (`own`) and how long a peer took (`peer`); in the output
//! all of these are fields of one flat object, and what inference `runtimes` took is a list in it. [`crate::report`] writes records as tables, JSON, CSV and SVG.

use std::collections::BTreeMap;

use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};

use super::layers::TimedLayer;
use super::limits::Limits;
use super::network_run::NetworkCase;
use super::peaks::Peaks;
use super::roofline::{KernelCost, Utilization};
use super::timer::{Summary, WARM_UP};
use crate::Result;
use crate::device::Device;
use crate::dtype::Dtype;

/// One timed thing: `W` says what it is, `T` how long it took, `P` how long a peer took.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(bound = "W: Serialize, T: Headline, PeerTiming<P>: Headline")]
pub struct BenchRecord<W, T, P> {
    /// What was timed.
    #[serde(flatten)]
    pub work: W,
    /// Its times, or why there are none.
    #[serde(flatten)]
    pub own: Measured<T>,
    /// A peer's times of the same work; absent where the peer was not asked for it.
    #[serde(flatten)]
    pub peer: Option<Measured<PeerTiming<P>>>,
    /// What inference runtimes took for the same network, in the order of [`RuntimesAbout::runtimes`]. Only a whole network
    /// that is run fused for inference has any: they get the ONNX file, and fuse as they can.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub runtimes: Vec<RuntimeRecord>,
}

/// A convolution layer in one pass: an entry of `bench kernels`.
pub type LayerRecord = BenchRecord<LayerWork, LayerTiming, LayerPeer>;

/// A whole network in one pass: an entry of `bench network`.
pub type NetworkRecord = BenchRecord<NetworkWork, NetworkTiming, NetworkPeer>;

impl<W, T, P> BenchRecord<W, T, P> {
    /// The times, where there are any.
    pub fn timing(&self) -> Option<&T> {
        self.own.value()
    }

    /// The times taken in turns with a peer, where it was asked and ran.
    pub fn peer_timing(&self) -> Option<&PeerTiming<P>> {
        self.peer.as_ref()?.value()
    }
}

/// What a bench has found so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Findings<R> {
    /// The records in the order of what was timed.
    pub records: Vec<R>,
    /// The peer, once it has started.
    pub peer: Option<PeerAbout>,
    /// The inference runtimes, once they were looked for.
    pub runtimes: Option<RuntimesAbout>,
}

/// What became of a measurement.
#[derive(Debug, Clone, PartialEq)]
pub enum Measured<T> {
    /// It was made.
    Timed(T),
    /// It failed, for this reason. The output has the [`Headline`] of `T` as null, and the reason.
    Failed(String),
}

impl<T> Measured<T> {
    /// What was measured, where it was.
    pub fn value(&self) -> Option<&T> {
        match self {
            Self::Timed(value) => Some(value),
            Self::Failed(_) => None,
        }
    }

    /// Why nothing was measured, where nothing was.
    pub fn error(&self) -> Option<&str> {
        match self {
            Self::Timed(_) => None,
            Self::Failed(error) => Some(error),
        }
    }
}

/// Names the two keys that tell of a failed measurement.
pub trait Headline: Serialize {
    /// The first key of the times, which is null where there are none.
    const KEY: &'static str;
    /// The key that has the reason.
    const ERROR_KEY: &'static str;
}

impl<T: Headline> Serialize for Measured<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Timed(value) => value.serialize(serializer),
            Self::Failed(error) => {
                let mut map = serializer.serialize_map(Some(2))?;
                map.serialize_entry(T::KEY, &None::<f64>)?;
                map.serialize_entry(T::ERROR_KEY, error)?;
                map.end()
            }
        }
    }
}

/// A convolution layer over a batch: everything that it takes to do the same work elsewhere.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerWork {
    /// The convolution's name where it first occurs.
    pub name: String,
    /// What is computed: `fwd`, `dgrad`, `wgrad`, `dgrad+wgrad`, `train-fwd` or `train-bwd`.
    pub pass: &'static str,
    /// The kernel family: `depthwise`, `pointwise` or `dense`.
    pub family: &'static str,
    /// Shape in words, such as `112x112x16 → 112x112x96 3x3 s1`.
    pub shape: String,
    /// How often the layer occurs in each network, by the network's name.
    pub count: BTreeMap<String, usize>,
    /// Name of the device.
    pub device: String,
    /// Precision of activations and weights, such as `f16`.
    pub precision: String,
    /// Configuration of the kernel that was timed, such as its tile; null where nothing is chosen, as on the CPU.
    pub config: Option<String>,
    /// Images of the batch.
    pub n: usize,
    /// Height of the input in pixels.
    pub h: usize,
    /// Width of the input in pixels.
    pub w: usize,
    /// Channels of the input.
    pub c_in: usize,
    /// Channels of the output.
    pub c_out: usize,
    /// Height and width of the kernel.
    pub kernel: [usize; 2],
    /// Stride down and across.
    pub stride: [usize; 2],
    /// Padding in pixels: top, left, bottom, right.
    pub padding: [usize; 4],
    /// Groups of channels.
    pub groups: usize,
    /// Whether a bias is added. A bias map is no operand of PyTorch's convolutions; the peer adds a bias per channel.
    pub bias: bool,
    /// Whether a residual is added.
    pub residual: bool,
    /// Whether an activation follows.
    pub activation: bool,
    /// Upper bound of the activation; null where it has none.
    pub activation_limit: Option<f32>,
    /// Whether the layer reads the image, which needs no gradient.
    pub reads_image: bool,
}

impl LayerWork {
    /// A layer of the `networks` it was found in, which runs on `device` with the kernel configuration `config`.
    pub fn new(layer: &TimedLayer, networks: &[&str], device: &Device, config: Option<String>) -> Self {
        let (p, act) = (layer.problem, layer.epilogue.act);
        let (window, pad) = (p.window, p.window.pad);
        Self {
            name: layer.name.clone(),
            pass: layer.pass.name(),
            family: layer.family(),
            shape: layer.shape(),
            count: networks.iter().map(|name| (*name).to_owned()).zip(layer.counts.iter().copied()).collect(),
            device: device.name(),
            precision: device.precision().to_string(),
            config,
            n: p.n,
            h: p.input.h,
            w: p.input.w,
            c_in: p.input.c,
            c_out: p.output.c,
            kernel: [window.k_h, window.k_w],
            stride: [window.stride_h, window.stride_w],
            padding: [pad.top, pad.left, pad.bottom, pad.right],
            groups: p.groups,
            bias: layer.epilogue.bias.operand().is_some(),
            residual: layer.epilogue.residual.is_some(),
            activation: act.is_some(),
            activation_limit: act.and_then(|act| act.limit),
            reads_image: layer.reads_image,
        }
    }
}

/// A network over a batch.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NetworkWork {
    /// How the network is run: `original`, `folded`, `fused` or `merged`.
    pub name: &'static str,
    /// `inference` or `training`.
    pub pass: &'static str,
    /// Name of the network.
    pub network: String,
    /// Name of the device.
    pub device: String,
    /// Precision of activations and weights, such as `f16`.
    pub precision: String,
    /// Images of the batch.
    pub batch: usize,
    /// Floating-point operations of the batch, a multiply-accumulate counted as two.
    pub flops: u64,
    /// Least bytes that the batch moves, fused as far as the planner can.
    pub bytes: u64,
    /// What the counts of its steps would allow on other devices; absent where it is not projected.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub projected: Vec<ProjectedRate>,
}

/// A network as it is projected to a GPU, which is no measurement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ProjectedRate {
    /// The GPU by whose data sheet it is projected.
    pub projected_to: &'static str,
    /// Precision of activations and weights.
    pub precision: Dtype,
    /// Images per second.
    pub projected_images_per_s: f64,
    /// Images per second that were published of it there; null where none were.
    pub published_images_per_s: Option<f64>,
}

impl NetworkWork {
    /// A case over a batch on a device, whose elements are as large as those of `limits`.
    ///
    /// # Errors
    /// As [`NetworkCase::costs`].
    pub fn new(case: &NetworkCase, batch: usize, device: &Device, limits: &Limits) -> Result<Self> {
        let (costs, element) = (case.costs(device.backend())?, limits.roofline.element_bytes);
        Ok(Self {
            name: case.name,
            pass: if case.training { "training" } else { "inference" },
            network: case.model.graph.name.clone(),
            device: device.name(),
            precision: device.precision().to_string(),
            batch,
            flops: costs.iter().map(|k| k.flops * batch as u64).sum(),
            bytes: costs.iter().map(|k| k.bytes(batch, element)).sum(),
            projected: Vec::new(),
        })
    }
}

/// A time and how sure it is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Timing {
    /// Median in microseconds.
    pub time_us: f64,
    /// Interquartile range in microseconds.
    pub iqr_us: f64,
    /// Samples behind both.
    pub samples: usize,
    /// Rounds that were run before them and not counted.
    pub warm_up: usize,
}

impl Timing {
    /// Statistics of samples in seconds.
    pub fn of_seconds(seconds: &Summary) -> Self {
        Self { time_us: seconds.median * 1e6, iqr_us: seconds.iqr * 1e6, samples: seconds.count, warm_up: WARM_UP }
    }
}

/// Where the peak comes from that a utilization is a share of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeakSource {
    /// The device's data sheet.
    Published,
    /// What this program's own copy and matrix product reached in the same run.
    Measured,
}

impl PeakSource {
    /// The name in machine output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Published => "published",
            Self::Measured => "measured",
        }
    }
}

/// How much of the limits a measured time used; each share is 1 at the limit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Used {
    /// Analytic FLOP / time / peak.
    pub flop_utilization: f64,
    /// Which peak that is.
    pub flop_utilization_of: PeakSource,
    /// Least bytes / time / measured copy bandwidth.
    pub byte_utilization: f64,
    /// Roofline time / time.
    pub roofline_fraction: f64,
}

impl Used {
    /// Of `limits` by kernels that took `seconds` together for a batch.
    pub fn of(limits: &Limits, kernels: &[KernelCost], batch: usize, seconds: f64) -> Self {
        let Utilization { flop, byte, roofline } = limits.roofline.utilization(kernels, batch, seconds);
        Self {
            flop_utilization: flop,
            flop_utilization_of: limits.flop_peak(),
            byte_utilization: byte,
            roofline_fraction: roofline,
        }
    }
}

/// How long a layer took, against its limits.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerTiming {
    /// Time of one launch over the batch.
    #[serde(flatten)]
    pub timing: Timing,
    /// Sets of operands that the launches rotate through, so that none stays in a cache.
    pub operand_sets: usize,
    /// Floating-point operations of the batch, a multiply-accumulate counted as two.
    pub flops: u64,
    /// Least bytes that the batch moves.
    pub bytes: u64,
    /// `flops` / `bytes`.
    pub flops_per_byte: f64,
    /// Shares of the limits.
    #[serde(flatten)]
    pub used: Used,
    /// Least time that the limits allow, in microseconds.
    pub roofline_us: f64,
}

impl LayerTiming {
    /// Of a layer whose launches rotated through `sets` sets of operands and took `seconds`.
    pub fn new(layer: &TimedLayer, seconds: &Summary, sets: usize, limits: &Limits) -> Self {
        let (n, element) = (layer.problem.n, limits.roofline.element_bytes);
        let (flops, bytes) = (layer.flops(), layer.bytes(element));
        Self {
            timing: Timing::of_seconds(seconds),
            operand_sets: sets,
            flops,
            bytes,
            flops_per_byte: flops as f64 / bytes as f64,
            used: Used::of(limits, std::slice::from_ref(&layer.cost), n, seconds.median),
            roofline_us: limits.roofline.time(&layer.cost, n) * 1e6,
        }
    }
}

impl Headline for LayerTiming {
    const KEY: &'static str = "time_us";
    const ERROR_KEY: &'static str = "error";
}

/// How long a network took, against its limits.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NetworkTiming {
    /// Throughput at the median.
    pub images_per_s: f64,
    /// Time of one pass over the batch.
    #[serde(flatten)]
    pub timing: Timing,
    /// Shares of the limits.
    #[serde(flatten)]
    pub used: Used,
    /// Most bytes of the device's memory that the network held at once.
    pub memory_bytes: u64,
}

impl Headline for NetworkTiming {
    const KEY: &'static str = "images_per_s";
    const ERROR_KEY: &'static str = "error";
}

/// What was measured in turns with a peer: `P` is the peer's part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PeerTiming<P> {
    /// Own median time in these turns, in microseconds: what the peer's is to be compared with. Null where it failed.
    pub turn_time_us: Option<f64>,
    /// The peer's medians.
    #[serde(flatten)]
    pub peer: P,
    /// What the peer says of how it did the work.
    #[serde(rename = "peer_note", skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// What went wrong in a turn, be it the peer's or the own one.
    #[serde(rename = "peer_error", skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A peer's medians for a layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerPeer {
    /// Time of the pass in microseconds; null where the peer gave none.
    pub peer_time_us: Option<f64>,
    /// Time of the convolution without what follows it, where the peer times that too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_conv_time_us: Option<f64>,
}

impl Headline for PeerTiming<LayerPeer> {
    const KEY: &'static str = "peer_time_us";
    const ERROR_KEY: &'static str = "peer_error";
}

/// A peer's medians for a network.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NetworkPeer {
    /// Throughput; null where the peer gave none.
    pub peer_images_per_s: Option<f64>,
    /// Most bytes that the peer held at once, where it tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_memory_bytes: Option<f64>,
    /// Time of a pass by that throughput, in microseconds.
    pub peer_time_us: Option<f64>,
}

impl Headline for PeerTiming<NetworkPeer> {
    const KEY: &'static str = "peer_images_per_s";
    const ERROR_KEY: &'static str = "peer_error";
}

/// A peer's description of itself, sent once at its start. Values that it does not report are absent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerAbout {
    /// The framework, such as `pytorch`.
    pub framework: String,
    /// Its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Where it computes: `cpu` or `cuda`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Precision of activations and weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<String>,
    /// Name of the GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<String>,
    /// Which GPU, from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ordinal: Option<u32>,
    /// Version of CUDA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cuda: Option<String>,
    /// Version of cuDNN as one number, such as 90100 for 9.1.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cudnn: Option<u64>,
    /// Threads on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Settings by which its times are to be judged, such as `allow_tf32`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub flags: BTreeMap<String, bool>,
    /// Peaks that the peer measured; absent until it was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peaks: Option<PeerPeaks>,
}

/// An inference runtime that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeAbout {
    /// Its name, and that of the provider where it has several: `onnxruntime`, `onnxruntime-cuda`, `openvino`, `tensorrt`.
    pub runtime: String,
    /// Its version.
    pub version: String,
}

/// An inference runtime that was looked for and not found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingRuntime {
    /// Its name.
    pub runtime: String,
    /// Why it cannot be used, such as the module that Python has not.
    pub reason: String,
}

/// The inference runtimes of a Python.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RuntimesAbout {
    /// Threads on the host that each may use.
    pub threads: Option<usize>,
    /// Those that there are.
    pub runtimes: Vec<RuntimeAbout>,
    /// Those that there are not.
    pub missing: Vec<MissingRuntime>,
    /// Why none could be looked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What a runtime took for a network, in turns with this program. The keys are a peer's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RuntimeRecord {
    /// Which runtime.
    #[serde(flatten)]
    pub about: RuntimeAbout,
    /// Its times and the own ones beside them.
    #[serde(flatten)]
    pub timing: PeerTiming<NetworkPeer>,
}

/// What a peer found of its own peaks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PeerPeaks {
    /// They were measured.
    Rates(PeerRates),
    /// They were not.
    Failed {
        /// For this reason.
        error: String,
    },
}

/// Peaks of a device through a peer's copy and matrix product.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PeerRates {
    /// Bytes per second of a large copy, read and written bytes both counted.
    pub copy_bytes_per_s: f64,
    /// FLOP per second of a large matrix product.
    pub gemm_flops_per_s: f64,
}

/// Limits of a device, against which times are judged.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LimitsRecord {
    /// Through this program's own copy and matrix product.
    pub measured: Peaks,
    /// By the data sheet; null where it is not known.
    pub published: Option<PublishedRecord>,
    /// What FLOP utilization is a share of.
    pub flop_utilization_of: PeakSource,
    /// What byte utilization is a share of.
    pub byte_utilization_of: PeakSource,
}

/// What a data sheet says in the precision of the run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PublishedRecord {
    /// The GPU and its form.
    pub name: &'static str,
    /// Memory bandwidth, bytes per second.
    pub copy_bytes_per_s: f64,
    /// Peak of the matrix units, FLOP per second.
    pub gemm_flops_per_s: f64,
    /// Peak of the vector units, FLOP per second.
    pub vector_flops_per_s: f64,
}
