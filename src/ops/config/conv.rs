//! Configurations of a convolution, whichever its family is.

use std::fmt;
use std::str::FromStr;

use super::direct::is_direct;
use super::{
    DepthwiseConfig, DirectConfig, GemmConfig, GemmProblem, KernelFamily, KernelPass, KernelTarget,
    PointwiseBackwardConfig, Problem, refused,
};
use crate::ops::conv::{ConvFamily, ConvProblem};
use crate::{Error, Result};

/// That of one of the ways to compute a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ConvConfig {
    /// For pointwise and dense convolutions.
    Gemm(GemmConfig),
    /// For depthwise ones.
    Depthwise(DepthwiseConfig),
    /// For both gradients of pointwise ones at once.
    PointwiseBackward(PointwiseBackwardConfig),
    /// For dense ones of an image.
    Direct(DirectConfig),
}

impl Problem for ConvProblem {
    type Config = ConvConfig;

    fn family(&self) -> KernelFamily {
        match ConvProblem::family(self) {
            ConvFamily::Pointwise => KernelFamily::Pointwise,
            ConvFamily::Dense => KernelFamily::Dense,
            ConvFamily::Depthwise => KernelFamily::Depthwise,
        }
    }

    fn choose(&self, pass: KernelPass, on: KernelTarget) -> ConvConfig {
        match (ConvProblem::family(self), pass) {
            (ConvFamily::Depthwise, _) => ConvConfig::Depthwise(DepthwiseConfig::choose(self, pass)),
            (ConvFamily::Pointwise, KernelPass::Backward) => {
                ConvConfig::PointwiseBackward(PointwiseBackwardConfig::choose(self))
            }
            _ if is_direct(self, pass) => ConvConfig::Direct(DirectConfig::choose(self, pass)),
            _ => ConvConfig::Gemm(GemmProblem::of(self).choose(pass, on)),
        }
    }

    fn list(&self, pass: KernelPass, on: KernelTarget) -> Vec<ConvConfig> {
        match (ConvProblem::family(self), pass) {
            (ConvFamily::Depthwise, _) => {
                DepthwiseConfig::list(self, pass).into_iter().map(ConvConfig::Depthwise).collect()
            }
            (ConvFamily::Pointwise, KernelPass::Backward) => {
                PointwiseBackwardConfig::list(self).into_iter().map(ConvConfig::PointwiseBackward).collect()
            }
            _ => {
                let direct = if is_direct(self, pass) { DirectConfig::list(self, pass) } else { Vec::new() };
                let products = GemmProblem::of(self).list(pass, on).into_iter().map(ConvConfig::Gemm);
                direct.into_iter().map(ConvConfig::Direct).chain(products).collect()
            }
        }
    }

    fn check(&self, config: ConvConfig, pass: KernelPass, on: KernelTarget) -> Result<()> {
        match (config, ConvProblem::family(self)) {
            (ConvConfig::Depthwise(config), ConvFamily::Depthwise) => config.check(self, pass),
            (ConvConfig::PointwiseBackward(config), ConvFamily::Pointwise) if pass == KernelPass::Backward => {
                config.check(self)
            }
            (ConvConfig::Direct(config), ConvFamily::Dense) => config.check(self, pass),
            (ConvConfig::Gemm(config), ConvFamily::Pointwise | ConvFamily::Dense) => {
                GemmProblem::of(self).check(config, pass, on)
            }
            _ => Err(refused(config, "it is one of another family, or of another pass")),
        }
    }
}

/// A convolution between batch-norms in training, by the kernels that form operands on load or take sums. They are others than those
/// of the convolution alone, and what is fastest for one says nothing of the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BetweenNorms(pub ConvProblem);

impl Problem for BetweenNorms {
    type Config = ConvConfig;

    fn family(&self) -> KernelFamily {
        Problem::family(&self.0)
    }

    fn choose(&self, pass: KernelPass, on: KernelTarget) -> ConvConfig {
        self.0.choose(pass, on)
    }

    fn list(&self, pass: KernelPass, on: KernelTarget) -> Vec<ConvConfig> {
        self.0.list(pass, on).into_iter().filter(|&config| self.check(config, pass, on).is_ok()).collect()
    }

    fn check(&self, config: ConvConfig, pass: KernelPass, on: KernelTarget) -> Result<()> {
        match config {
            ConvConfig::Depthwise(DepthwiseConfig { march: None, .. }) => {
                Err(refused(config, "kernels that take any window form nothing on load"))
            }
            _ => self.0.check(config, pass, on),
        }
    }
}

impl fmt::Display for ConvConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gemm(config) => config.fmt(f),
            Self::Depthwise(config) => config.fmt(f),
            Self::PointwiseBackward(config) => config.fmt(f),
            Self::Direct(config) => config.fmt(f),
        }
    }
}

impl FromStr for ConvConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let gemm = text.parse().map(Self::Gemm);
        let others = || {
            let depthwise = text.parse().map(Self::Depthwise);
            let backward = depthwise.or_else(|_| text.parse().map(Self::PointwiseBackward));
            backward.or_else(|_| text.parse().map(Self::Direct))
        };
        gemm.or_else(|error| others().map_err(|_: Error| error))
    }
}
