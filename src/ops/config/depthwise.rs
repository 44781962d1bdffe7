//! Configurations of depthwise convolutions: `depthwise.cu` and `depthwise_bn.cu`.

use std::fmt;
use std::str::FromStr;

use super::lanes::Lanes;
use super::{GRID_LIMIT, KernelPass, Parts, SUM_BLOCKS, around, refused};
use crate::ops::conv::ConvProblem;
use crate::{Error, Result};

/// Rows that a thread marches down at most where nothing else is asked for: far enough that the rows it reads above and
/// below its own weigh little, and short enough that there are threads to fill a GPU.
const MARCH: usize = 16;
/// Columns that a thread of the marching kernels has.
const STRIP: usize = 2;
/// Channels that a thread of the marching kernels has.
const CHANNELS: usize = 2;
/// Strips of a thread of a marching weight gradient, at least, where slabs are chosen.
const STRIPS_PER_ROW: usize = 2;
/// The same for pixels of the kernels that take any window: a pixel is less work than a strip.
const PIXELS_PER_ROW: usize = 32;

/// Which kernel, how far its threads march, and the slabs that a weight gradient is summed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DepthwiseConfig {
    /// Rows that a thread of the marching kernels goes down; `None` for the kernels that take any window.
    pub march: Option<usize>,
    /// Strips, or pixels with any window, of a slab of a weight gradient; `None` in the other passes.
    pub slab: Option<usize>,
}

/// The kernel size and stride that the marching kernels are made for.
pub(crate) fn specialised(p: &ConvProblem) -> Option<(usize, usize)> {
    let w = p.window;
    let square = w.k_h == w.k_w && w.stride_h == w.stride_w;
    let made = [3, 5, 7].contains(&w.k_h) && [1, 2].contains(&w.stride_h) && p.input.c.is_multiple_of(CHANNELS);
    (square && made).then_some((w.k_h, w.stride_h))
}

/// Rows and columns that the threads of a marching kernel share: those of the result, or with a strided input gradient the
/// pairs of them.
fn extent(p: &ConvProblem, pass: KernelPass) -> (usize, usize) {
    let pairs = |len: usize, pad: usize| (len - 1 + pad) / 2 - pad / 2 + 1;
    match pass {
        KernelPass::InputGradient | KernelPass::Backward if p.window.stride_h == 1 => (p.input.h, p.input.w),
        KernelPass::InputGradient | KernelPass::Backward => {
            (pairs(p.input.h, p.window.pad.top), pairs(p.input.w, p.window.pad.left))
        }
        _ => (p.output.h, p.output.w),
    }
}

/// Whether a pass sums a weight gradient, in slabs.
fn sums_weights(pass: KernelPass) -> bool {
    matches!(pass, KernelPass::WeightGradient | KernelPass::Backward)
}

impl DepthwiseConfig {
    /// How channels are shared by threads.
    pub fn lanes(&self, p: &ConvProblem) -> Lanes {
        Lanes::new(p.input.c, if self.march.is_some() { CHANNELS } else { 1 })
    }

    /// Strips, or pixels with any window, that the rows of threads share.
    fn units(&self, p: &ConvProblem, pass: KernelPass) -> usize {
        match (self.march, pass) {
            (Some(rows), _) => {
                let (h, w) = extent(p, pass);
                p.n * h.div_ceil(rows) * w.div_ceil(STRIP)
            }
            (None, KernelPass::InputGradient) => p.n * p.input.pixels(),
            (None, _) => p.n * p.output.pixels(),
        }
    }

    /// Slabs of a pass that sums a weight gradient; 1 in the other passes.
    pub fn slabs(&self, p: &ConvProblem, pass: KernelPass) -> usize {
        self.slab.map_or(1, |slab| self.units(p, pass).div_ceil(slab))
    }

    /// Blocks: tiles of channels by rows of threads; in a weight gradient tiles, slabs, and taps with any window.
    pub fn grid(&self, p: &ConvProblem, pass: KernelPass) -> [usize; 3] {
        let lanes = self.lanes(p);
        if sums_weights(pass) {
            return [lanes.tiles, self.slabs(p, pass), if self.march.is_some() { 1 } else { p.window.taps() }];
        }
        [lanes.tiles * self.units(p, pass).div_ceil(lanes.rows), 1, 1]
    }

    /// Floats of the partial sums `[slabs, weights]`; none where one slab writes the result itself.
    pub fn workspace(&self, p: &ConvProblem, pass: KernelPass) -> usize {
        match self.slabs(p, pass) {
            1 => 0,
            slabs => slabs * p.weight_len(),
        }
    }

    /// The same with as many slabs as fill a GPU and no more.
    fn filling(self, p: &ConvProblem, pass: KernelPass) -> Self {
        let (lanes, units) = (self.lanes(p), self.units(p, pass));
        let per_row = if self.march.is_some() { STRIPS_PER_ROW } else { PIXELS_PER_ROW };
        let wanted = units.div_ceil(per_row * lanes.rows).min(SUM_BLOCKS.div_ceil(lanes.tiles));
        Self { slab: Some(units.div_ceil(wanted)), ..self }
    }

    /// The kernels that march where there are such, as far as divides the rows evenly.
    pub(super) fn choose(p: &ConvProblem, pass: KernelPass) -> Self {
        let (h, _) = extent(p, pass);
        let march = specialised(p).map(|_| h.div_ceil(h.div_ceil(MARCH)));
        let config = Self { march, slab: None };
        if sums_weights(pass) { config.filling(p, pass) } else { config }
    }

    pub(super) fn list(p: &ConvProblem, pass: KernelPass) -> Vec<Self> {
        let (h, _) = extent(p, pass);
        let chosen = Self::choose(p, pass);
        let marches = chosen.march.map_or_else(Vec::new, |march| around(march, 4, 1..=h));
        let marches = marches.into_iter().map(Some).chain([None]);
        let slabs = |config: Self| match (sums_weights(pass), config.filling(p, pass).slab) {
            (true, Some(slab)) => around(slab, 3, 1..=config.units(p, pass)).into_iter().map(Some).collect(),
            _ => vec![None],
        };
        let all = marches.map(|march| Self { march, slab: None });
        let all = all.flat_map(|config| slabs(config).into_iter().map(move |slab| Self { slab, ..config }));
        all.filter(|config| config.check(p, pass).is_ok()).collect()
    }

    pub(super) fn check(self, p: &ConvProblem, pass: KernelPass) -> Result<()> {
        if self.march.is_some() && specialised(p).is_none() {
            return Err(refused(self, "the window or the channels are none that marching kernels are made for"));
        }
        if self.march.is_none() && pass == KernelPass::Backward {
            return Err(refused(self, "only marching kernels have both gradients at once"));
        }
        if sums_weights(pass) != self.slab.is_some() {
            return Err(refused(self, "a weight gradient has slabs, and no other pass"));
        }
        if self.march == Some(0) || self.slab == Some(0) {
            return Err(refused(self, "nothing is done in steps of 0"));
        }
        if self.slabs(p, pass) > GRID_LIMIT {
            return Err(refused(self, format!("more than {GRID_LIMIT} slabs")));
        }
        Ok(())
    }
}

/// `march14` or `any`, and in a weight gradient `march14-slab96`.
impl fmt::Display for DepthwiseConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.march {
            Some(rows) => write!(f, "march{rows}")?,
            None => f.write_str("any")?,
        }
        self.slab.map_or(Ok(()), |slab| write!(f, "-slab{slab}"))
    }
}

impl FromStr for DepthwiseConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = Parts::new(text, "march14, any or march14-slab96");
        let march = parts.numbered_if("march")?;
        if march.is_none() && parts.word()? != "any" {
            return Err(parts.error());
        }
        let slab = parts.numbered_if("slab")?;
        parts.end(Self { march, slab })
    }
}
