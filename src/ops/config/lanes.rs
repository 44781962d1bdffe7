//! How blocks share channels, and configurations with little else: pools, bias gradients, augmentation.

use std::fmt;
use std::str::FromStr;

use super::{
    GRID_LIMIT, KernelFamily, KernelPass, KernelTarget, Parts, Problem, SUM_BLOCKS, THREADS, around, refused,
    vector_len, vector_word, whole_vectors,
};
use crate::dtype::Dtype;
use crate::ops::pad::PadProblem;
use crate::ops::pool::PoolProblem;
use crate::{Error, Result};

/// Vectors of channels that a block has at most: with 64 it still has four rows of threads.
const BLOCK_VECTORS: usize = 64;
/// Vectors of channels of a tile that is one of several, at least.
const LEAST_LANES: usize = 16;
/// Elements of 16 bits in a sector, the 32 bytes that memory is moved by; those of f32 are two sectors.
const SECTOR_ELEMENTS: usize = 16;
/// Pixels of a slab of a bias gradient at least.
const BIAS_SLAB: usize = 256;

/// How blocks share `[pixels, c]` with `n` channels to a thread (`kernels/slab.cuh`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lanes {
    /// Vectors of channels of a block.
    pub lanes: usize,
    /// Blocks that cover all channels.
    pub tiles: usize,
    /// Rows of threads of a block.
    pub rows: usize,
}

impl Lanes {
    /// For `c` channels, `n` to a thread. Channels that need several tiles are cut at whole sectors of memory, so that most
    /// threads have work and, of such cuts, tiles are widest.
    pub fn new(c: usize, n: usize) -> Self {
        let vectors = c.div_ceil(n);
        let of = |lanes: usize| Self { lanes, tiles: vectors.div_ceil(lanes), rows: THREADS / lanes };
        if vectors <= BLOCK_VECTORS {
            return of(vectors);
        }
        // Threads with work are vectors · rows of each of the tiles.
        let busier = |a: &Self, b: &Self| (a.rows * b.tiles).cmp(&(b.rows * a.tiles));
        let cuts = (LEAST_LANES..=BLOCK_VECTORS).step_by((SECTOR_ELEMENTS / n).max(1)).map(of);
        cuts.max_by(busier).expect("there are such lanes")
    }
}

/// Whether a thread has a 16-byte vector of channels or one channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LaneConfig {
    /// Whether it has a vector.
    pub vector: bool,
}

impl LaneConfig {
    /// Vectors where the channels allow them.
    pub(super) fn choose(c: usize, dtype: Dtype) -> Self {
        Self { vector: whole_vectors(dtype, c) }
    }

    pub(super) fn list(c: usize, dtype: Dtype) -> Vec<Self> {
        [true, false]
            .map(|vector| Self { vector })
            .into_iter()
            .filter(|config| config.check(c, dtype).is_ok())
            .collect()
    }

    pub(super) fn check(self, c: usize, dtype: Dtype) -> Result<()> {
        if self.vector && !whole_vectors(dtype, c) {
            return Err(refused(self, "the channels are no whole vectors"));
        }
        Ok(())
    }

    /// How `c` channels of a type are shared.
    pub fn lanes(&self, c: usize, dtype: Dtype) -> Lanes {
        Lanes::new(c, self.elements(dtype))
    }

    /// Elements of a thread.
    pub fn elements(&self, dtype: Dtype) -> usize {
        if self.vector { vector_len(dtype) } else { 1 }
    }

    /// The name expression of a kernel.
    pub fn instance(&self, kernel: &str, dtype: Dtype) -> String {
        format!("{kernel}<{}, {}>", dtype.kernel_name(), self.vector)
    }

    /// Blocks of a global pool: tiles of channels, images.
    pub fn global_pool_grid(&self, p: &GlobalPoolProblem, dtype: Dtype) -> [usize; 3] {
        [self.lanes(p.c, dtype).tiles, p.n, 1]
    }

    /// Blocks of a pool whose windows slide and whose result has `pixels` an image: rows of threads, tiles of channels, images.
    pub fn window_pool_grid(&self, p: &PoolProblem, pixels: usize, dtype: Dtype) -> [usize; 3] {
        let lanes = self.lanes(p.input.c, dtype);
        [pixels.div_ceil(lanes.rows), lanes.tiles, p.n]
    }

    /// Blocks of a padding: rows of threads over the result's pixels, tiles of channels, images.
    pub fn pad_grid(&self, p: &PadProblem, dtype: Dtype) -> [usize; 3] {
        let lanes = self.lanes(p.input.c, dtype);
        [p.output.pixels().div_ceil(lanes.rows), lanes.tiles, p.n]
    }

    /// Blocks of an augmentation: pieces of an image, images.
    pub fn augment_grid(&self, p: &AugmentProblem, dtype: Dtype) -> [usize; 3] {
        [p.len.div_ceil(THREADS * self.elements(dtype)), p.n, 1]
    }
}

/// `vector` or `scalar`.
impl fmt::Display for LaneConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(vector_word(self.vector))
    }
}

impl FromStr for LaneConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = Parts::new(text, "vector or scalar");
        let vector = parts.vector()?;
        parts.end(Self { vector })
    }
}

/// y `[n, c]` = the mean over pixels of x `[n, pixels, c]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GlobalPoolProblem {
    /// Images.
    pub n: usize,
    /// Pixels of an image.
    pub pixels: usize,
    /// Channels.
    pub c: usize,
}

/// Training images from bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AugmentProblem {
    /// Images.
    pub n: usize,
    /// Elements of an image, h·w·c.
    pub len: usize,
}

macro_rules! by_lanes {
    ($problem:ty, $family:expr, $p:ident => $c:expr) => {
        impl Problem for $problem {
            type Config = LaneConfig;

            fn family(&self) -> KernelFamily {
                $family
            }

            fn choose(&self, _: KernelPass, on: KernelTarget) -> LaneConfig {
                let $p = self;
                LaneConfig::choose($c, on.dtype)
            }

            fn list(&self, _: KernelPass, on: KernelTarget) -> Vec<LaneConfig> {
                let $p = self;
                LaneConfig::list($c, on.dtype)
            }

            fn check(&self, config: LaneConfig, _: KernelPass, on: KernelTarget) -> Result<()> {
                let $p = self;
                config.check($c, on.dtype)
            }
        }
    };
}
by_lanes!(GlobalPoolProblem, KernelFamily::GlobalPool, p => p.c);
by_lanes!(PoolProblem, KernelFamily::WindowPool, p => p.input.c);
by_lanes!(PadProblem, KernelFamily::Pad, p => p.input.c);
by_lanes!(AugmentProblem, KernelFamily::Augment, p => p.len);

/// db `[c]` = Σ dy over `pixels`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BiasProblem {
    /// Pixels over the batch.
    pub pixels: usize,
    /// Channels.
    pub c: usize,
}

/// How a bias's gradient is read, and the slabs that it is summed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BiasConfig {
    /// Channels of a thread.
    pub lane: LaneConfig,
    /// Pixels of a slab.
    pub slab: usize,
}

impl BiasConfig {
    /// Slabs.
    pub fn slabs(&self, p: &BiasProblem) -> usize {
        p.pixels.div_ceil(self.slab)
    }

    /// Blocks: tiles of channels, slabs.
    pub fn grid(&self, p: &BiasProblem, dtype: Dtype) -> [usize; 3] {
        [self.lane.lanes(p.c, dtype).tiles, self.slabs(p), 1]
    }

    /// Floats of the partial sums `[slabs, c]`; none where one slab writes the result itself.
    pub fn workspace(&self, p: &BiasProblem) -> usize {
        match self.slabs(p) {
            1 => 0,
            slabs => slabs * p.c,
        }
    }
}

impl Problem for BiasProblem {
    type Config = BiasConfig;

    fn family(&self) -> KernelFamily {
        KernelFamily::Bias
    }

    fn choose(&self, _: KernelPass, on: KernelTarget) -> BiasConfig {
        let slab = self.pixels.div_ceil(SUM_BLOCKS).max(BIAS_SLAB);
        BiasConfig { lane: LaneConfig::choose(self.c, on.dtype), slab }
    }

    fn list(&self, pass: KernelPass, on: KernelTarget) -> Vec<BiasConfig> {
        let slabs = around(self.choose(pass, on).slab, 3, 1..=self.pixels);
        let all = LaneConfig::list(self.c, on.dtype).into_iter();
        let all = all.flat_map(|lane| slabs.iter().map(move |&slab| BiasConfig { lane, slab }));
        all.filter(|&config| self.check(config, pass, on).is_ok()).collect()
    }

    fn check(&self, config: BiasConfig, _: KernelPass, on: KernelTarget) -> Result<()> {
        config.lane.check(self.c, on.dtype)?;
        if config.slab == 0 || config.slabs(self) > GRID_LIMIT {
            return Err(refused(config, format!("1 to {GRID_LIMIT} slabs are possible")));
        }
        Ok(())
    }
}

/// `vector-slab256`.
impl fmt::Display for BiasConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-slab{}", self.lane, self.slab)
    }
}

impl FromStr for BiasConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = Parts::new(text, "vector-slab256");
        let lane = LaneConfig { vector: parts.vector()? };
        let slab = parts.numbered("slab")?;
        parts.end(Self { lane, slab })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_all_channels_in_whole_sectors() {
        // Channels, channels of a thread; lanes and tiles.
        for (c, n, lanes, tiles) in [
            (24, 2, 12, 1),
            (128, 2, 64, 1),
            (144, 2, 24, 3),
            (192, 2, 32, 3),
            (384, 2, 64, 3),
            (576, 2, 32, 9),
            (960, 2, 32, 15),
            (576, 8, 36, 2),
            (960, 8, 64, 2),
            (1280, 8, 32, 5),
            (70, 1, 16, 5),
        ] {
            let got = Lanes::new(c, n);
            assert_eq!(
                (got.lanes, got.tiles, got.rows),
                (lanes, tiles, THREADS / lanes),
                "{c} channels, {n} to a thread"
            );
            assert!(got.lanes * got.tiles * n >= c);
            assert!(tiles == 1 || lanes * n % SECTOR_ELEMENTS == 0, "{c} channels, {n} to a thread");
        }
    }
}
