//! Configurations of batch normalisation: `batch_norm.cu`.

use std::fmt;
use std::str::FromStr;

use super::lanes::{LaneConfig, Lanes};
use super::{GRID_LIMIT, KernelFamily, KernelPass, KernelTarget, Parts, Problem, SUM_BLOCKS, around, refused};
use crate::dtype::Dtype;
use crate::ops::batch_norm::BatchNormProblem;
use crate::{Error, Result};

/// Pixels of a thread of a two-stage sum, at least, where slabs are chosen: below, its sums cost more than its pixels.
const SUM_PIXELS: usize = 16;
/// Pixels of a thread where nothing is summed: enough that reading the coefficients weighs little.
const MAP_PIXELS: usize = 8;
/// Channels of a block of the second stages.
const FINISH_CHANNELS: usize = 8;
/// Coefficients of a channel that the backward pass keeps between its stages: a, b, s, o.
const COEFFICIENTS: usize = 4;

/// How pixels and channels are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NormConfig {
    /// Channels of a thread.
    pub lane: LaneConfig,
    /// Pixels of a slab of a two-stage sum.
    pub sum: usize,
    /// Pixels of a slab where nothing is summed.
    pub map: usize,
}

impl NormConfig {
    /// How channels are shared by threads.
    pub fn lanes(&self, p: &BatchNormProblem, dtype: Dtype) -> Lanes {
        self.lane.lanes(p.shape.c, dtype)
    }

    /// Slabs of a two-stage sum.
    pub fn sum_slabs(&self, p: &BatchNormProblem) -> usize {
        p.shape.pixels().div_ceil(self.sum)
    }

    /// Blocks of the first stage of a sum: tiles of channels, slabs.
    pub fn sum_grid(&self, p: &BatchNormProblem, dtype: Dtype) -> [usize; 3] {
        [self.lanes(p, dtype).tiles, self.sum_slabs(p), 1]
    }

    /// Blocks where nothing is summed: tiles of channels, slabs.
    pub fn map_grid(&self, p: &BatchNormProblem, dtype: Dtype) -> [usize; 3] {
        [self.lanes(p, dtype).tiles, p.shape.pixels().div_ceil(self.map), 1]
    }

    /// Blocks of the second stage of a sum.
    pub fn finish_grid(c: usize) -> [usize; 3] {
        [c.div_ceil(FINISH_CHANNELS), 1, 1]
    }

    /// Floats of the partial sums `[slabs, 2, c]`.
    pub fn partials(&self, p: &BatchNormProblem) -> usize {
        self.sum_slabs(p) * 2 * p.shape.c
    }

    /// Floats of the coefficients `[4, c]`.
    pub fn coefficients(c: usize) -> usize {
        COEFFICIENTS * c
    }

    /// Floats of the partial sums of a score `[slabs, tiles]`.
    pub fn scores(&self, p: &BatchNormProblem, dtype: Dtype) -> usize {
        self.lanes(p, dtype).tiles * self.sum_slabs(p)
    }

    /// Floats that the backward pass keeps between its stages.
    pub fn workspace(&self, p: &BatchNormProblem, dtype: Dtype) -> usize {
        self.partials(p) + self.scores(p, dtype)
    }
}

impl Problem for BatchNormProblem {
    type Config = NormConfig;

    fn family(&self) -> KernelFamily {
        KernelFamily::BatchNorm
    }

    fn choose(&self, _: KernelPass, on: KernelTarget) -> NormConfig {
        let lane = LaneConfig::choose(self.shape.c, on.dtype);
        let (pixels, lanes) = (self.shape.pixels(), lane.lanes(self.shape.c, on.dtype));
        let wanted = pixels.div_ceil(SUM_PIXELS * lanes.rows).min(SUM_BLOCKS.div_ceil(lanes.tiles));
        let map = (MAP_PIXELS * lanes.rows).max(pixels.div_ceil(GRID_LIMIT));
        NormConfig { lane, sum: pixels.div_ceil(wanted), map }
    }

    fn list(&self, pass: KernelPass, on: KernelTarget) -> Vec<NormConfig> {
        let NormConfig { sum, map, .. } = self.choose(pass, on);
        let (sums, maps) = (around(sum, 2, 1..=self.shape.pixels()), around(map, 2, 1..=self.shape.pixels()));
        let cuts: Vec<(usize, usize)> = sums.iter().flat_map(|&sum| maps.iter().map(move |&map| (sum, map))).collect();
        let all = LaneConfig::list(self.shape.c, on.dtype).into_iter();
        let all = all.flat_map(|lane| cuts.iter().map(move |&(sum, map)| NormConfig { lane, sum, map }));
        all.filter(|&config| self.check(config, pass, on).is_ok()).collect()
    }

    fn check(&self, config: NormConfig, _: KernelPass, on: KernelTarget) -> Result<()> {
        config.lane.check(self.shape.c, on.dtype)?;
        let fits = |slab: usize| slab > 0 && self.shape.pixels().div_ceil(slab) <= GRID_LIMIT;
        if !fits(config.sum) || !fits(config.map) {
            return Err(refused(config, format!("1 to {GRID_LIMIT} slabs are possible")));
        }
        Ok(())
    }
}

/// `vector-sum96-map256`.
impl fmt::Display for NormConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-sum{}-map{}", self.lane, self.sum, self.map)
    }
}

impl FromStr for NormConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = Parts::new(text, "vector-sum96-map256");
        let lane = LaneConfig { vector: parts.vector()? };
        let (sum, map) = (parts.numbered("sum")?, parts.numbered("map")?);
        parts.end(Self { lane, sum, map })
    }
}
