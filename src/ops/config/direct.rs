//! Configurations of a network's first layer: `dense_direct.cu`.

use std::fmt;
use std::str::FromStr;

use super::{GRID_LIMIT, KernelPass, Lanes, Parts, SUM_BLOCKS, THREADS, around, refused};
use crate::dtype::Dtype;
use crate::ops::conv::{ConvFamily, ConvProblem};
use crate::{Error, Result};

/// Channels of a thread, and of a block at most.
const CHANNELS: usize = 8;
const BLOCK_CHANNELS: usize = 64;
/// Columns of a strip, forward and in the weights' gradient.
const STRIP: usize = 4;
const WGRAD_STRIP: usize = 2;
/// Strips of a thread, at least, where slabs are chosen: a block stages weights, or writes partial sums, for all of them.
const STRIPS: usize = 4;

/// The slabs that a block takes one of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DirectConfig {
    /// Strips of a slab.
    pub slab: usize,
}

/// Whether a pass has a direct kernel beside the matrix product: all but the gradient of the image, of a 3×3 convolution over one
/// or three channels with stride 1 or 2.
pub(super) fn is_direct(p: &ConvProblem, pass: KernelPass) -> bool {
    let w = p.window;
    let made = (w.k_h, w.k_w) == (3, 3) && w.stride_h == w.stride_w && [1, 2].contains(&w.stride_h);
    let channels = [1, 3].contains(&p.input.c) && p.output.c.is_multiple_of(CHANNELS);
    let has_kernel = matches!(pass, KernelPass::Forward | KernelPass::WeightGradient);
    has_kernel && p.family() == ConvFamily::Dense && p.groups == 1 && made && channels
}

impl DirectConfig {
    /// How channels are shared by threads; in the weights' gradient a block has the vectors once for each row of the kernel.
    pub fn lanes(p: &ConvProblem, pass: KernelPass) -> Lanes {
        let vectors = p.output.c.div_ceil(CHANNELS);
        let tiles = p.output.c.div_ceil(BLOCK_CHANNELS);
        let lanes = vectors.div_ceil(tiles);
        let copies = if pass == KernelPass::WeightGradient { p.window.k_h } else { 1 };
        Lanes { lanes, tiles, rows: THREADS / (lanes * copies) }
    }

    fn strips(p: &ConvProblem, pass: KernelPass) -> usize {
        let strip = if pass == KernelPass::WeightGradient { WGRAD_STRIP } else { STRIP };
        p.n * p.output.h * p.output.w.div_ceil(strip)
    }

    /// Slabs.
    pub fn slabs(&self, p: &ConvProblem, pass: KernelPass) -> usize {
        Self::strips(p, pass).div_ceil(self.slab)
    }

    /// Blocks: tiles of channels, slabs.
    pub fn grid(&self, p: &ConvProblem, pass: KernelPass) -> [usize; 3] {
        [Self::lanes(p, pass).tiles, self.slabs(p, pass), 1]
    }

    /// Floats of the partial sums `[slabs, weights]` of the weights' gradient; none where one slab writes the result itself.
    pub fn workspace(&self, p: &ConvProblem) -> usize {
        match self.slabs(p, KernelPass::WeightGradient) {
            1 => 0,
            slabs => slabs * p.weight_len(),
        }
    }

    /// The name expression of a kernel.
    pub fn instance(kernel: &str, p: &ConvProblem, dtype: Dtype) -> String {
        format!("{kernel}<{}, {}, {}>", dtype.kernel_name(), p.input.c, p.window.stride_h)
    }

    /// As many slabs as fill a GPU: forward they cost little, with partial sums as few as do.
    pub(super) fn choose(p: &ConvProblem, pass: KernelPass) -> Self {
        let (Lanes { tiles, rows, .. }, strips) = (Self::lanes(p, pass), Self::strips(p, pass));
        let blocks = if pass == KernelPass::WeightGradient { SUM_BLOCKS } else { 4 * SUM_BLOCKS };
        let wanted = strips.div_ceil(STRIPS * rows).min(blocks.div_ceil(tiles));
        Self { slab: strips.div_ceil(wanted) }
    }

    pub(super) fn list(p: &ConvProblem, pass: KernelPass) -> Vec<Self> {
        let all = around(Self::choose(p, pass).slab, 3, 1..=Self::strips(p, pass));
        all.into_iter().map(|slab| Self { slab }).filter(|config| config.check(p, pass).is_ok()).collect()
    }

    pub(super) fn check(self, p: &ConvProblem, pass: KernelPass) -> Result<()> {
        if !is_direct(p, pass) {
            return Err(refused(self, "it is for 3x3 convolutions of images, but for the gradient of the image"));
        }
        if self.slabs(p, pass) > GRID_LIMIT {
            return Err(refused(self, format!("more than {GRID_LIMIT} slabs")));
        }
        Ok(())
    }
}

/// `direct-slab96`.
impl fmt::Display for DirectConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "direct-slab{}", self.slab)
    }
}

impl FromStr for DirectConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = Parts::new(text, "direct-slab96");
        if parts.word()? != "direct" {
            return Err(parts.error());
        }
        let slab = parts.numbered("slab")?;
        parts.end(Self { slab })
    }
}
