//! Networks side by side: what others have published of them, what this device makes of them, and what another would.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::network_run::Series;
use super::record::{Headline, Measured, Used};

/// How a network is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// As DepthShrinker's repository did (`docs/methods.md` 1.5): f32, batch-norm as steps of its own, in a freed block's
    /// place a convolution alone, a row of passes timed as one behind passes that are not counted.
    AsPublished,
    /// As one deploys it: batch-norm folded, steps fused, freed blocks merged exactly; the median of single passes.
    Deployed,
}

impl Form {
    /// The name in machine output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AsPublished => "as-published",
            Self::Deployed => "deployed",
        }
    }
}

/// What was published of a network. A value that was not is null.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Published {
    /// Top-1 accuracy on ImageNet, percent.
    #[serde(rename = "published_top1")]
    pub top1: Option<f64>,
    /// Million operations per image of 224 pixels, by the counting of the source.
    #[serde(rename = "published_mflops")]
    pub mflops: Option<f64>,
    /// Images per second on a Tesla V100.
    #[serde(rename = "published_v100")]
    pub v100: Option<f64>,
    /// Images per second on an RTX 2080 Ti.
    #[serde(rename = "published_rtx2080ti")]
    pub rtx2080ti: Option<f64>,
    /// Images per second on a Jetson TX2.
    #[serde(rename = "published_tx2")]
    pub tx2: Option<f64>,
}

/// A network in one form, at one batch and precision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ComparisonWork {
    /// What it is called in the comparison.
    pub name: String,
    /// The network that is built; null where what it would be built from was not published.
    pub network: Option<String>,
    /// What is freed and merged; null where nothing is.
    pub selection: Option<String>,
    /// How it is timed.
    pub form: Form,
    /// Name of the device.
    pub device: String,
    /// Precision of activations and weights, such as `f16`.
    pub precision: String,
    /// Images of a pass.
    pub batch: usize,
    /// Height and width of the images in pixels.
    pub image: usize,
    /// Multiply-accumulates of an image at this size, as timed.
    pub macs: Option<u64>,
    /// Million operations of an image of 224 pixels by DepthShrinker's counting, of the network as its repository times it.
    pub counted_mflops: Option<f64>,
    /// What was published of it.
    #[serde(flatten)]
    pub published: Published,
    /// Images per second that [`super::Projection`] says of another device; null without one.
    pub projected_images_per_s: Option<f64>,
    /// The same of what was published: f32, 128 images of 224 pixels, as DepthShrinker's repository times a network.
    pub projected_as_published: Option<f64>,
}

impl ComparisonWork {
    /// Whether two rows time the same.
    pub fn is_same(&self, other: &Self) -> bool {
        let key = |work: &Self| (work.name.clone(), work.form, work.precision.clone(), work.batch, work.image);
        key(self) == key(other)
    }
}

/// How long a pass took, against the device's limits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ComparisonTiming {
    /// Throughput.
    pub images_per_s: f64,
    /// Microseconds of a pass: the median, or the mean of passes that were timed as one.
    pub time_us: f64,
    /// Interquartile range in microseconds; null where passes were timed as one.
    pub iqr_us: Option<f64>,
    /// Passes behind both.
    pub passes: usize,
    /// Passes before them that do not count.
    pub warm_up: usize,
    /// Shares of the limits.
    #[serde(flatten)]
    pub used: Used,
    /// Most bytes of the device's memory that the network held at once.
    pub memory_bytes: u64,
}

impl ComparisonTiming {
    /// Of a pass of `batch` images.
    pub fn new(series: &Series, batch: usize, used: Used, memory_bytes: u64) -> Self {
        let Series { seconds, iqr, passes, warm_up } = *series;
        Self {
            images_per_s: batch as f64 / seconds,
            time_us: seconds * 1e6,
            iqr_us: iqr.map(|iqr| iqr * 1e6),
            passes,
            warm_up,
            used,
            memory_bytes,
        }
    }
}

impl Headline for ComparisonTiming {
    const KEY: &'static str = "images_per_s";
    const ERROR_KEY: &'static str = "error";
}

/// A row of `bench table`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ComparisonRecord {
    /// What was timed.
    #[serde(flatten)]
    pub work: ComparisonWork,
    /// Its times, or why there are none.
    #[serde(flatten)]
    pub own: Measured<ComparisonTiming>,
}

impl ComparisonRecord {
    /// A row that an earlier run wrote and that has times; `None` for any other.
    pub fn timed_before(value: Value) -> Option<Self> {
        let own = Measured::Timed(serde_json::from_value(value.clone()).ok()?);
        Some(Self { work: serde_json::from_value(value).ok()?, own })
    }

    /// Throughput, where it was measured.
    pub fn images_per_s(&self) -> Option<f64> {
        self.own.value().map(|own| own.images_per_s)
    }
}
