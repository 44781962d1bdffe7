//! How a GPU solves a problem, as a value: problem → configuration → launch (`docs/kernels.md` c).
//!
//! A configuration says what a launch has a choice about: tiles, slabs, vectors, blocks. It is plain data with a name that
//! reads back ([`std::fmt::Display`], [`std::str::FromStr`]). [`Problem::list`] has those that solve a problem,
//! [`Problem::choose`] the one that is taken, and grids and workspaces follow from it by its methods, here and nowhere
//! else: the headers of `kernels/` refer to them by name.
//!
//! ```
//! use depthshrinker::dtype::Dtype;
//! use depthshrinker::ops::config::{GemmConfig, GemmProblem, KernelPass, KernelTarget, Kernels, Problem};
//!
//! // y [6272, 64] = x [6272, 384]·Wᵀ, on an A100 in f16.
//! let problem = GemmProblem::product(6272, 384, 64);
//! let on = KernelTarget { dtype: Dtype::F16, arch: 80 };
//! let chosen = problem.choose(KernelPass::Forward, on);
//! assert_eq!(chosen.to_string(), "64x64-vector");
//! assert_eq!(chosen.grid(&problem, KernelPass::Forward), [98, 1, 1]);
//! assert!(problem.list(KernelPass::Forward, on).contains(&chosen));
//!
//! // Names read back; one that does not solve a problem is refused.
//! let narrow: GemmConfig = "128x32-vector".parse()?;
//! problem.check(narrow, KernelPass::Forward, on)?;
//! assert!(problem.check(narrow, KernelPass::Forward, KernelTarget { dtype: Dtype::F32, ..on }).is_err());
//! let kernels = Kernels { family: problem.family(), pass: KernelPass::Forward };
//! assert_eq!(format!("{kernels}={narrow}"), "pointwise_forward=128x32-vector");
//! # Ok::<(), depthshrinker::Error>(())
//! ```
//!
//! What decides the order of a sum follows from the problem and its configuration, never from the device, so that results
//! repeat bit by bit on GPUs of one architecture; how a tensor core adds within one instruction differs among them.

mod conv;
mod depthwise;
mod direct;
mod gemm;
mod lanes;
mod norm;
mod pointwise_backward;
mod walk;

use std::fmt;
use std::str::FromStr;

pub use conv::{BetweenNorms, ConvConfig};
pub use depthwise::DepthwiseConfig;
pub(crate) use depthwise::specialised;
pub use direct::DirectConfig;
pub use gemm::{GemmConfig, GemmProblem};
pub use lanes::{AugmentProblem, BiasConfig, BiasProblem, GlobalPoolProblem, LaneConfig, Lanes};
pub use norm::NormConfig;
pub use pointwise_backward::PointwiseBackwardConfig;
pub(crate) use pointwise_backward::has_few_weights;
pub use walk::{OptimizerConfig, OptimizerProblem, WalkConfig, WalkProblem};

use crate::device::Device;
use crate::device::configurations::{Choice, Decision};
use crate::device::gpu::Gpu;
use crate::dtype::Dtype;
use crate::ops::inverted_residual::InvertedResidualConfig;
use crate::{Error, Result};

/// Threads of a block of every kernel that says nothing else.
pub const THREADS: usize = 256;
/// Blocks that the hardware takes in the second and third dimension of a grid.
pub const GRID_LIMIT: usize = 65_535;
/// Blocks of the first stage of a sum over pixels: four for each multiprocessor of a large GPU. More cost more partial sums,
/// which are written and read; fewer leave multiprocessors idle.
pub const SUM_BLOCKS: usize = 512;

/// What a kernel computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KernelFamily {
    /// Matrix products of 1×1 convolutions and fully connected layers: `pointwise.cu` and `pointwise_backward.cu`.
    Pointwise,
    /// Other convolutions: `dense.cu`, and `dense_direct.cu` those of an image.
    Dense,
    /// `depthwise.cu` and `depthwise_bn.cu`.
    Depthwise,
    /// Whole blocks: `inverted_residual.cu`.
    InvertedResidual,
    /// Gradient of a bias: `bias_gradient` of `conv_reduce.cu`.
    Bias,
    /// `batch_norm.cu`.
    BatchNorm,
    /// The global average of `pool.cu`.
    GlobalPool,
    /// What slides a window in `pool.cu`.
    WindowPool,
    /// `pad.cu`.
    Pad,
    /// Conversion and addition: `elementwise.cu`.
    Elementwise,
    /// `activation.cu`, and `feature_mse` of `loss.cu`, which sum on the way.
    Activation,
    /// `dropout.cu`.
    Dropout,
    /// `optimizer.cu`.
    Optimizer,
    /// `augment.cu`.
    Augment,
}

/// Selects kernels of a family: those of the forward pass, of one gradient, or of all gradients at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KernelPass {
    /// The result.
    Forward,
    /// The input's gradient, alone.
    InputGradient,
    /// The weights' or the bias's gradient, alone.
    WeightGradient,
    /// All gradients.
    Backward,
}

/// The kernels that share one configuration: those of a family in one pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kernels {
    /// The family.
    pub family: KernelFamily,
    /// The pass.
    pub pass: KernelPass,
}

/// The hardware and precision that a configuration is chosen for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelTarget {
    /// The type of activations.
    pub dtype: Dtype,
    /// Compute capability times ten.
    pub arch: u32,
}

impl KernelTarget {
    /// A device, in a precision.
    pub fn of(gpu: &Gpu, dtype: Dtype) -> Self {
        Self { dtype, arch: gpu.driver().arch() }
    }
}

/// A problem that a GPU can solve in several ways. What it prints for debugging names it in files of tuned configurations.
pub trait Problem: fmt::Debug {
    /// One way to solve it.
    type Config: fmt::Display + FromStr<Err = Error> + Copy + PartialEq + fmt::Debug;

    /// The family of kernels that solves the problem.
    fn family(&self) -> KernelFamily;

    /// The configuration that launches use unless another one is forced.
    fn choose(&self, pass: KernelPass, on: KernelTarget) -> Self::Config;

    /// All configurations that solve the problem, including the chosen one. Counts that may have any value are listed in
    /// powers of 2.
    fn list(&self, pass: KernelPass, on: KernelTarget) -> Vec<Self::Config>;

    /// Checks that a configuration solves the problem.
    ///
    /// # Errors
    /// [`Error::Config`] with the reason in one line if it does not.
    fn check(&self, config: Self::Config, pass: KernelPass, on: KernelTarget) -> Result<()>;
}

/// What there is to choose for a launch.
fn choice<P: Problem>(problem: &P, kernels: Kernels, precision: Dtype) -> Choice {
    Choice { kernels: kernels.name().to_owned(), precision, problem: format!("{problem:?}") }
}

/// Notes what a launch took of all that it could, where somebody watches.
pub(super) fn note<P: Problem>(problem: &P, pass: KernelPass, (gpu, dtype): (&Gpu, Dtype), taken: P::Config) {
    let kernels = Kernels { family: problem.family(), pass };
    gpu.configurations().note(|| {
        let listed = problem.list(pass, KernelTarget::of(gpu, dtype));
        Decision {
            choice: choice(problem, kernels, dtype),
            taken: taken.to_string(),
            listed: listed.iter().map(P::Config::to_string).collect(),
        }
    });
}

/// Returns the configuration that a launch uses: the forced one if there is one, else the tuned one, else the chosen one.
///
/// # Errors
/// [`Error::Config`] if the forced or tuned configuration does not solve the problem.
pub fn resolve<P: Problem>(problem: &P, pass: KernelPass, gpu: &Gpu, dtype: Dtype) -> Result<P::Config> {
    let on = KernelTarget::of(gpu, dtype);
    let kernels = Kernels { family: problem.family(), pass };
    let named = gpu.configurations().named(kernels.name(), || choice(problem, kernels, dtype));
    let Some(name) = named else { return Ok(problem.choose(pass, on)) };
    let told = |e: Error| match e {
        Error::Config(text) => Error::Config(format!("{kernels}: {text}")),
        other => other,
    };
    let config = name.parse().map_err(told)?;
    problem.check(config, pass, on).map_err(told)?;
    Ok(config)
}

/// Returns the name of the configuration that a launch on a device uses; `None` on the host, which has no
/// configurations.
///
/// # Errors
/// [`Error::Config`] if the forced configuration does not solve the problem.
pub fn chosen<P: Problem>(problem: &P, pass: KernelPass, device: &Device) -> Result<Option<String>> {
    match device {
        Device::Cpu => Ok(None),
        Device::Gpu(gpu, dtype) => resolve(problem, pass, gpu, *dtype).map(|config| Some(config.to_string())),
    }
}

/// Forces all launches of some kernels on a GPU to use the named configuration; `None` restores the choice. A
/// configuration that does not solve a problem fails at the launch, which the next check of the device reports.
///
/// # Errors
/// [`Error::Config`] if the family has no configuration of this name.
pub fn force(gpu: &Gpu, kernels: Kernels, name: Option<&str>) -> Result<()> {
    if let Some(name) = name {
        (kernels.row().parse)(name)?;
    }
    gpu.configurations().force(kernels.name(), name);
    Ok(())
}

/// A row of the table of kernels.
#[derive(Debug, Clone, Copy)]
struct KernelsRow {
    kernels: Kernels,
    name: &'static str,
    /// Whether a name is that of a configuration.
    parse: fn(&str) -> Result<()>,
}

const fn row(family: KernelFamily, pass: KernelPass, name: &'static str, parse: fn(&str) -> Result<()>) -> KernelsRow {
    KernelsRow { kernels: Kernels { family, pass }, name, parse }
}

fn reads<C: FromStr<Err = Error>>(name: &str) -> Result<()> {
    name.parse::<C>().map(drop)
}

/// All kernels that have a configuration, by name.
const KERNELS: &[KernelsRow] = &[
    row(KernelFamily::Pointwise, KernelPass::Forward, "pointwise_forward", reads::<GemmConfig>),
    row(KernelFamily::Pointwise, KernelPass::InputGradient, "pointwise_dgrad", reads::<GemmConfig>),
    row(KernelFamily::Pointwise, KernelPass::WeightGradient, "pointwise_wgrad", reads::<GemmConfig>),
    row(KernelFamily::Pointwise, KernelPass::Backward, "pointwise_backward", reads::<PointwiseBackwardConfig>),
    row(KernelFamily::Dense, KernelPass::Forward, "dense_forward", reads::<ConvConfig>),
    row(KernelFamily::Dense, KernelPass::InputGradient, "dense_dgrad", reads::<ConvConfig>),
    row(KernelFamily::Dense, KernelPass::WeightGradient, "dense_wgrad", reads::<ConvConfig>),
    row(KernelFamily::Depthwise, KernelPass::Forward, "depthwise_forward", reads::<DepthwiseConfig>),
    row(KernelFamily::Depthwise, KernelPass::InputGradient, "depthwise_dgrad", reads::<DepthwiseConfig>),
    row(KernelFamily::Depthwise, KernelPass::WeightGradient, "depthwise_wgrad", reads::<DepthwiseConfig>),
    row(KernelFamily::Depthwise, KernelPass::Backward, "depthwise_backward", reads::<DepthwiseConfig>),
    row(KernelFamily::InvertedResidual, KernelPass::Forward, "inverted_residual", reads::<InvertedResidualConfig>),
    row(KernelFamily::Bias, KernelPass::WeightGradient, "bias_gradient", reads::<BiasConfig>),
    row(KernelFamily::BatchNorm, KernelPass::Forward, "batch_norm_forward", reads::<NormConfig>),
    row(KernelFamily::BatchNorm, KernelPass::Backward, "batch_norm_backward", reads::<NormConfig>),
    row(KernelFamily::GlobalPool, KernelPass::Forward, "global_pool_forward", reads::<LaneConfig>),
    row(KernelFamily::GlobalPool, KernelPass::Backward, "global_pool_backward", reads::<LaneConfig>),
    row(KernelFamily::WindowPool, KernelPass::Forward, "window_pool_forward", reads::<LaneConfig>),
    row(KernelFamily::WindowPool, KernelPass::Backward, "window_pool_backward", reads::<LaneConfig>),
    row(KernelFamily::Pad, KernelPass::Forward, "pad", reads::<LaneConfig>),
    row(KernelFamily::Elementwise, KernelPass::Forward, "elementwise", reads::<WalkConfig>),
    row(KernelFamily::Activation, KernelPass::Forward, "activation_forward", reads::<WalkConfig>),
    row(KernelFamily::Activation, KernelPass::Backward, "activation_backward", reads::<WalkConfig>),
    row(KernelFamily::Dropout, KernelPass::Forward, "dropout", reads::<WalkConfig>),
    row(KernelFamily::Optimizer, KernelPass::Forward, "optimizer", reads::<OptimizerConfig>),
    row(KernelFamily::Augment, KernelPass::Forward, "augment", reads::<LaneConfig>),
];

impl Kernels {
    /// All kernels that have a configuration.
    pub fn all() -> impl Iterator<Item = Self> {
        KERNELS.iter().map(|row| row.kernels)
    }

    /// Its row.
    ///
    /// # Panics
    /// For a pass that the family has no kernels for.
    fn row(self) -> &'static KernelsRow {
        let found = KERNELS.iter().find(|row| row.kernels == self);
        found.unwrap_or_else(|| panic!("{:?} has no {:?} pass", self.family, self.pass))
    }

    /// Its name: `pointwise_wgrad`.
    ///
    /// # Panics
    /// For a pass that the family has no kernels for.
    pub fn name(self) -> &'static str {
        self.row().name
    }
}

impl fmt::Display for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kernels {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = KERNELS.iter().find(|row| row.name == text).map(|row| row.kernels);
        found.ok_or_else(|| {
            let names: Vec<&str> = KERNELS.iter().map(|row| row.name).collect();
            Error::Config(format!("no kernels {text:?}; expected one of {}", names.join(", ")))
        })
    }
}

/// Elements of a 16-byte vector.
pub(super) fn vector_len(dtype: Dtype) -> usize {
    16 / dtype.bytes()
}

/// Whether `c` channels are whole vectors.
pub(super) fn whole_vectors(dtype: Dtype, c: usize) -> bool {
    c.is_multiple_of(vector_len(dtype))
}

/// Parser of a configuration's name: words and numbered words between hyphens, in a fixed order.
struct Parts<'a> {
    text: &'a str,
    like: &'static str,
    rest: std::iter::Peekable<std::str::Split<'a, char>>,
}

impl<'a> Parts<'a> {
    /// Starts to parse `text`; errors quote `like` as an example of a valid name.
    fn new(text: &'a str, like: &'static str) -> Self {
        Self { text, like, rest: text.split('-').peekable() }
    }

    fn error(&self) -> Error {
        Error::Config(format!("no configuration {:?}; expected one like {}", self.text, self.like))
    }

    fn word(&mut self) -> Result<&'a str> {
        self.rest.next().ok_or_else(|| self.error())
    }

    /// The number behind a word, where the next part begins with it.
    fn numbered_if(&mut self, word: &str) -> Result<Option<usize>> {
        let Some(number) = self.rest.next_if(|part| part.starts_with(word)).map(|part| &part[word.len()..]) else {
            return Ok(None);
        };
        match number.parse() {
            // One spelling for a number: what is printed again is what was read.
            Ok(n) if n > 0 && usize::to_string(&n) == number => Ok(Some(n)),
            _ => Err(self.error()),
        }
    }

    fn numbered(&mut self, word: &str) -> Result<usize> {
        self.numbered_if(word)?.ok_or_else(|| self.error())
    }

    /// `vector` or `scalar`.
    fn vector(&mut self) -> Result<bool> {
        match self.word()? {
            "vector" => Ok(true),
            "scalar" => Ok(false),
            _ => Err(self.error()),
        }
    }

    fn end<T>(mut self, config: T) -> Result<T> {
        if self.rest.next().is_none() { Ok(config) } else { Err(self.error()) }
    }
}

/// `vector` or `scalar`.
fn vector_word(vector: bool) -> &'static str {
    if vector { "vector" } else { "scalar" }
}

/// A configuration that does not solve a problem.
pub(super) fn refused(config: impl fmt::Display, why: impl fmt::Display) -> Error {
    Error::Config(format!("configuration {config} does not serve: {why}"))
}

/// Numbers around the chosen one: its halves and doubles within bounds, up to `steps` each way, and itself.
fn around(chosen: usize, steps: u32, bounds: std::ops::RangeInclusive<usize>) -> Vec<usize> {
    let mut all: Vec<usize> = (0..=steps).flat_map(|step| [chosen >> step, chosen << step]).collect();
    all.retain(|n| bounds.contains(n) || *n == chosen);
    all.sort_unstable();
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::batch_norm::BatchNormProblem;
    use crate::ops::conv::{Bias, Conv, ConvProblem};
    use crate::shape::{Lines, Shape, Window};

    fn target(dtype: Dtype) -> KernelTarget {
        KernelTarget { dtype, arch: 80 }
    }

    const CONV_PASSES: [KernelPass; 3] = [KernelPass::Forward, KernelPass::InputGradient, KernelPass::WeightGradient];

    fn conv(n: usize, side: usize, c_in: usize, c_out: usize, window: Window, groups: usize) -> ConvProblem {
        let conv = Conv { c_in, c_out, window, groups, bias: Bias::None };
        ConvProblem::new(&conv, Shape::new(side, side, c_in), n).unwrap()
    }

    /// What is chosen decides the bits of a result and the times in README: a change is meant, and is told here.
    #[test]
    fn choices_are_those_that_timings_were_taken_with() {
        let (one, three) = (Window::square(1, 1, 0), Window::square(3, 1, 1));
        let names = |p: &ConvProblem, dtype| CONV_PASSES.map(|pass| p.choose(pass, target(dtype)).to_string());
        let expand = conv(128, 14, 96, 576, one, 1);
        assert_eq!(names(&expand, Dtype::F16), ["128x96-vector", "128x128-vector", "64x64-vector-slab896"]);
        assert_eq!(names(&expand, Dtype::F32), ["64x64-vector", "64x64-vector", "64x64-vector-slab896"]);
        let merged = conv(64, 14, 128, 128, three, 1);
        assert_eq!(names(&merged, Dtype::F16), ["128x64-vector", "64x64-vector", "128x128-vector-slab768"]);
        let narrow = conv(128, 56, 16, 96, one, 1);
        assert_eq!(names(&narrow, Dtype::F16), ["128x96-vector", "128x32-vector", "64x64-vector-slab1568"]);
        let forward = |n, side, c_in, c_out| {
            conv(n, side, c_in, c_out, three, 1).choose(KernelPass::Forward, target(Dtype::F16)).to_string()
        };
        assert_eq!(
            [forward(128, 28, 32, 32), forward(128, 14, 64, 64), forward(1, 28, 32, 32), forward(1, 14, 64, 64)],
            ["256x32-vector", "128x64-vector", "128x32-vector", "64x64-vector"]
        );
        let depthwise = conv(128, 28, 192, 192, three, 192);
        assert_eq!(names(&depthwise, Dtype::F16), ["march14", "march14", "march14-slab21"]);
        let first = conv(128, 224, 3, 32, Window::square(3, 2, 1), 1);
        assert_eq!(names(&first, Dtype::F16), ["direct-slab256", "64x64-scalar", "direct-slab1568"]);
        let backward = |p: &ConvProblem| p.choose(KernelPass::Backward, target(Dtype::F16)).to_string();
        assert_eq!(
            (backward(&narrow), backward(&conv(128, 14, 384, 64, one, 1))),
            ("channels32-slab832".into(), "channels64-slab1024".into())
        );
        let shape = Lines { lines: 128 * 14, w: 14, c: 576 };
        let norm = BatchNormProblem { shape, eps: 1e-5, momentum: 0.1 }.choose(KernelPass::Forward, target(Dtype::F16));
        assert_eq!(norm.to_string(), "vector-sum112-map56");
    }

    #[test]
    fn names_that_mean_nothing_are_told() {
        for name in ["", "64x64", "64x64-vector-slab0", "64x64-vector-slab032", "64x64-vector-slab32-x", "12x12-vector"]
        {
            let told = name.parse::<GemmConfig>().unwrap_err().to_string();
            assert!(told.contains(&format!("no configuration {name:?}; expected one like 128x128-vector")), "{told}");
        }
        assert!("march".parse::<DepthwiseConfig>().is_err() && "march14-sum2".parse::<ConvConfig>().is_err());
        assert!("scalar-map8-sum8".parse::<NormConfig>().is_err() && "vector-".parse::<LaneConfig>().is_err());
        assert!("convolution".parse::<Kernels>().unwrap_err().to_string().contains("pointwise_wgrad"));
        for KernelsRow { kernels, name, .. } in KERNELS {
            assert_eq!(name.parse::<Kernels>().unwrap(), *kernels);
        }
    }

    #[test]
    fn the_host_has_no_configuration() {
        assert_eq!(chosen(&OptimizerProblem { len: 8 }, KernelPass::Forward, &Device::Cpu).unwrap(), None);
    }
}
