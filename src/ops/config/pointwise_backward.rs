//! Configurations of both gradients of a pointwise convolution at once: `pointwise_backward.cu`.

use std::fmt;
use std::str::FromStr;

use super::{GRID_LIMIT, Parts, SUM_BLOCKS, around, refused};
use crate::dtype::Dtype;
use crate::ops::conv::{ConvFamily, ConvProblem};
use crate::{Error, Result};

/// Pixels, and channels of dy, that a block multiplies at a time.
const CHUNK: usize = 64;
/// Channels that are whole 16-byte vectors in every type.
const VECTOR: usize = 8;
/// Chunks of dy that kernels are made for, and how many weights they pay for. Each tile of channels of x forms dy again, and
/// every slab has a partial sum for each weight: beyond, two passes are sooner through.
const CHUNKS: [(usize, usize); 3] = [(1, 576 * 96), (3, 576 * 96), (6, 64 * 384)];
/// Pixels of a slab at least: below, the partial sums outweigh what is summed.
const SLAB_PIXELS: usize = 128;
/// Blocks of 256 threads: a multiprocessor of a large GPU has one of them, or two.
const LARGE_SUM_BLOCKS: usize = 160;

/// The channels of x of a block, and the slabs that sums over pixels are cut into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PointwiseBackwardConfig {
    /// Channels of x of a block: 32 or 64.
    pub tile: usize,
    /// Pixels of a slab.
    pub slab: usize,
}

/// Whether the gradients of a convolution are those of a matrix product with few enough weights.
pub(crate) fn has_few_weights(p: &ConvProblem) -> bool {
    let (c_in, c_out) = (p.input.c, p.output.c);
    let whole = c_in.is_multiple_of(VECTOR) && c_out.is_multiple_of(VECTOR);
    p.family() == ConvFamily::Pointwise && whole && chunks(p).is_some()
}

/// Chunks of the kernel that has enough of them, where there is one that pays.
fn chunks(p: &ConvProblem) -> Option<usize> {
    let (c_in, c_out) = (p.input.c, p.output.c);
    let enough = CHUNKS.into_iter().find(|(chunks, _)| c_out <= chunks * CHUNK);
    enough.filter(|(_, weights)| c_in * c_out <= *weights).map(|(chunks, _)| chunks)
}

/// The narrow tile, and how many chunks it has kernels for: its threads have more to stage than those of the wide one.
const NARROW: usize = 32;
const NARROW_CHUNKS: usize = 3;

impl PointwiseBackwardConfig {
    /// Tiles that cover the channels of x.
    fn tiles(&self, p: &ConvProblem) -> usize {
        p.input.c.div_ceil(self.tile)
    }

    /// Slabs of sums over pixels.
    pub fn slabs(&self, p: &ConvProblem) -> usize {
        (p.n * p.output.pixels()).div_ceil(self.slab)
    }

    /// Blocks: tiles of channels of x, slabs.
    pub fn grid(&self, p: &ConvProblem) -> [usize; 3] {
        [self.tiles(p), self.slabs(p), 1]
    }

    /// Threads of a block.
    pub fn threads(&self) -> usize {
        4 * self.tile
    }

    /// Floats of the partial sums `[slabs, weights]`; none where one slab writes the result itself.
    pub fn workspace(&self, p: &ConvProblem) -> usize {
        match self.slabs(p) {
            1 => 0,
            slabs => slabs * p.weight_len(),
        }
    }

    /// The name expression of the kernel.
    ///
    /// # Panics
    /// For a problem that the configuration was not checked against.
    pub fn instance(&self, p: &ConvProblem, dtype: Dtype) -> String {
        let chunks = chunks(p).expect("a configuration is checked against its problem");
        format!("pointwise_bn_backward<{}, {}, {chunks}>", dtype.kernel_name(), self.tile)
    }

    /// The tile with as many slabs as fill a GPU and no more, since the partial sums of every slab are written and read.
    fn filling(tile: usize, p: &ConvProblem) -> Self {
        let (blocks, pixels) = (if tile == CHUNK { LARGE_SUM_BLOCKS } else { SUM_BLOCKS }, p.n * p.output.pixels());
        let wanted = (blocks / p.input.c.div_ceil(tile)).clamp(1, (pixels / SLAB_PIXELS).max(1));
        Self { tile, slab: pixels.div_ceil(wanted).next_multiple_of(CHUNK) }
    }

    /// The wide tile where it has more channels to take than the narrow one.
    pub(super) fn choose(p: &ConvProblem) -> Self {
        let narrow = p.input.c <= NARROW && p.output.c <= NARROW_CHUNKS * CHUNK;
        Self::filling(if narrow { NARROW } else { CHUNK }, p)
    }

    pub(super) fn list(p: &ConvProblem) -> Vec<Self> {
        let slabs = |tile| {
            let steps = Self::filling(tile, p).slab / CHUNK;
            around(steps, 3, 1..=(p.n * p.output.pixels()).div_ceil(CHUNK)).into_iter().map(|steps| steps * CHUNK)
        };
        let all = [NARROW, CHUNK].into_iter().flat_map(|tile| slabs(tile).map(move |slab| Self { tile, slab }));
        all.filter(|config| config.check(p).is_ok()).collect()
    }

    pub(super) fn check(self, p: &ConvProblem) -> Result<()> {
        if !has_few_weights(p) {
            return Err(refused(self, "only pointwise convolutions of few weights have both gradients at once"));
        }
        if self.tile == NARROW && p.output.c > NARROW_CHUNKS * CHUNK {
            return Err(refused(self, format!("the narrow tile takes {} channels of dy", NARROW_CHUNKS * CHUNK)));
        }
        if !self.slab.is_multiple_of(CHUNK) {
            return Err(refused(self, format!("slabs are multiples of {CHUNK} pixels")));
        }
        if self.slabs(p) > GRID_LIMIT {
            return Err(refused(self, format!("more than {GRID_LIMIT} slabs")));
        }
        Ok(())
    }
}

/// `channels32-slab1568`.
impl fmt::Display for PointwiseBackwardConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "channels{}-slab{}", self.tile, self.slab)
    }
}

impl FromStr for PointwiseBackwardConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = Parts::new(text, "channels32-slab1568");
        let tile = parts.numbered("channels")?;
        if ![NARROW, CHUNK].contains(&tile) {
            return Err(parts.error());
        }
        let slab = parts.numbered("slab")?;
        parts.end(Self { tile, slab })
    }
}
