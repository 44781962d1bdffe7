//! `inverted_residual.cu`.

use std::fmt;
use std::str::FromStr;

use super::{InvertedResidualOperands, InvertedResidualProblem};
use crate::device::driver::ConvGeometry;
use crate::device::gpu::{GpuView, GpuViewMut};
use crate::dtype::Dtype;
use crate::ops::activation::Act;
use crate::ops::config::{KernelFamily, KernelPass, KernelTarget, Problem, refused, whole_vectors};
use crate::ops::cuda::conv::geometry;
use crate::ops::cuda::{Call, configured};
use crate::ops::step::Backend;
use crate::{Error, Result};

/// Threads of a block, and columns of output pixels that it has.
const THREADS: usize = 128;
const COLUMNS: usize = 8;

/// The tile of a block: output channels, and whether operands are read as vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InvertedResidualConfig {
    /// Output channels: fewer take fewer registers where they are all of them.
    pub channels: usize,
    /// Whether all channels are whole vectors.
    pub vector: bool,
}

impl InvertedResidualConfig {
    /// Output rows of a block.
    fn rows(p: &InvertedResidualProblem) -> usize {
        if p.window.stride_h == 1 { 8 } else { 4 }
    }

    /// Blocks: tiles of output pixels and channels, of all images.
    pub fn grid(&self, p: &InvertedResidualProblem) -> [usize; 3] {
        let (rows, columns) = (p.output.h.div_ceil(Self::rows(p)), p.output.w.div_ceil(COLUMNS));
        [p.n * rows * columns * p.output.c.div_ceil(self.channels), 1, 1]
    }

    /// The name expression of the kernel.
    pub fn instance(&self, p: &InvertedResidualProblem, dtype: Dtype) -> String {
        let (t, k, stride) = (dtype.kernel_name(), p.window.k_h, p.window.stride_h);
        format!("inverted_residual<{t}, {k}, {stride}, {}, {}>", self.channels, self.vector)
    }
}

impl Problem for InvertedResidualProblem {
    type Config = InvertedResidualConfig;

    fn family(&self) -> KernelFamily {
        KernelFamily::InvertedResidual
    }

    fn choose(&self, _: KernelPass, on: KernelTarget) -> InvertedResidualConfig {
        let vector = [self.input.c, self.hidden, self.output.c].iter().all(|&c| whole_vectors(on.dtype, c));
        let channels = match self.window.stride_h {
            1 if vector && self.output.c > 64 => 128,
            1 => 64,
            _ => 128,
        };
        InvertedResidualConfig { channels, vector }
    }

    fn list(&self, pass: KernelPass, on: KernelTarget) -> Vec<InvertedResidualConfig> {
        let all = [64, 128]
            .into_iter()
            .flat_map(|channels| [true, false].map(|vector| InvertedResidualConfig { channels, vector }));
        all.filter(|&config| self.check(config, pass, on).is_ok()).collect()
    }

    fn check(&self, config: InvertedResidualConfig, _: KernelPass, on: KernelTarget) -> Result<()> {
        if config.vector && !self.choose(KernelPass::Forward, on).vector {
            return Err(refused(config, "the channels are no whole vectors"));
        }
        let made = match self.window.stride_h {
            1 => config.channels == 64 || (config.channels == 128 && config.vector),
            _ => config.channels == 128,
        };
        if made { Ok(()) } else { Err(refused(config, "there is no kernel of this tile for this stride")) }
    }
}

/// `64ch-vector`.
impl fmt::Display for InvertedResidualConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ch-{}", self.channels, if self.vector { "vector" } else { "scalar" })
    }
}

impl FromStr for InvertedResidualConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let known = [64, 128].into_iter().flat_map(|channels| [true, false].map(|vector| Self { channels, vector }));
        let found = known.into_iter().find(|config| config.to_string() == text);
        found.ok_or_else(|| Error::Config(format!("no configuration {text:?}; expected one like 64ch-vector")))
    }
}

/// y = the block's result, hidden values staying on chip.
pub(super) fn forward(
    p: &InvertedResidualProblem,
    x: GpuView<'_>,
    of: &InvertedResidualOperands<'_>,
    y: &GpuViewMut<'_>,
) {
    assert!(p.has_step(Backend::Cuda), "no kernel for a depthwise window of {:?}", p.window);
    let Some(config) = configured(p, KernelPass::Forward, x) else { return };
    // The window is the depthwise convolution's, the channels are the block's.
    let block =
        ConvGeometry { c_in: p.input.c as i32, c_out: p.output.c as i32, groups: 1, ..geometry(&p.depthwise()) };
    let (expand, hidden) = (p.expand().map_or(0, |expand| expand.weight_len()), p.hidden);
    let act = |conv: &super::FoldedConv<'_>| Some(Act::from(conv.clamp));
    Call::new(x.gpu(), config.instance(p, x.dtype()))
        .reads("x", x, p.n * p.input.len())
        .reads_if("the expansion's weights", of.expand.map(|conv| conv.w.gpu()), expand)
        .reads_if("the expansion's bias", of.expand.map(|conv| conv.b.gpu()), hidden)
        .reads("the depthwise weights", of.depthwise.w.gpu(), p.depthwise().weight_len())
        .reads("the depthwise bias", of.depthwise.b.gpu(), hidden)
        .reads("the projection's weights", of.project.w.gpu(), p.project().weight_len())
        .reads("the projection's bias", of.project.b.gpu(), p.output.c)
        .reads_if("the residual", of.residual.map(|residual| residual.gpu()), p.n * p.output.len())
        .act(act(&of.expand.unwrap_or(of.depthwise)))
        .act(act(&of.depthwise))
        .act(act(&of.project))
        .writes("y", y, p.n * p.output.len())
        .value(block)
        .sizes([hidden])
        .launch_of(THREADS, config.grid(p));
}
