//! Configurations of matrix products: `pointwise.cu` and `dense.cu`.

use std::fmt;
use std::str::FromStr;

use super::{
    GRID_LIMIT, KernelFamily, KernelPass, KernelTarget, Parts, Problem, SUM_BLOCKS, refused, vector_word, whole_vectors,
};
use crate::dtype::Dtype;
use crate::ops::conv::{ConvFamily, ConvProblem};
use crate::{Error, Result};

/// Multiprocessors of a large GPU, about. A constant, so that a problem is launched alike on every GPU.
const MULTIPROCESSORS: usize = 128;
/// Blocks of 128×128 tiles of a weight gradient: a GPU runs fewer of them at a time than of small ones ([`SUM_BLOCKS`]), and
/// a multiprocessor of a large one has one, or two.
const LARGE_SUM_BLOCKS: usize = 160;
/// Pixels of a slab of a weight gradient at least: below, the partial sums outweigh what is summed.
const SLAB_PIXELS: usize = 256;
/// Slabs are whole numbers of the pixels that a tile stages at once.
const SLAB_STEP: usize = 32;

/// The matrix products of a convolution's passes, as many as it has groups (and, in the input's gradient, phases of the
/// stride).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GemmProblem {
    /// [`KernelFamily::Pointwise`] or [`KernelFamily::Dense`].
    pub family: KernelFamily,
    /// Pixels of the result over the batch, or rows of a fully connected layer.
    pub pixels: usize,
    /// Input pixels of the largest phase of the stride, over the batch.
    pub phase_pixels: usize,
    /// Phases of the stride: s_h·s_w.
    pub phases: usize,
    /// Input channels of a group.
    pub c_in: usize,
    /// Output channels of a group.
    pub c_out: usize,
    /// Taps of the kernel: k_h·k_w.
    pub taps: usize,
    /// Groups.
    pub groups: usize,
    /// Whether operands are formed on load, or sums taken of a gradient, which leaves no registers for large tiles of the
    /// gradients.
    pub on_load: bool,
}

impl GemmProblem {
    /// y `[m, c_out]` = x `[m, c_in]`·Wᵀ and its gradients.
    pub fn product(m: usize, c_in: usize, c_out: usize) -> Self {
        let family = KernelFamily::Pointwise;
        Self { family, pixels: m, phase_pixels: m, phases: 1, c_in, c_out, taps: 1, groups: 1, on_load: false }
    }

    /// Those of a pointwise or dense convolution.
    pub fn of(p: &ConvProblem) -> Self {
        let family = if p.family() == ConvFamily::Pointwise { KernelFamily::Pointwise } else { KernelFamily::Dense };
        let (s_h, s_w) = (p.window.stride_h, p.window.stride_w);
        Self {
            family,
            pixels: p.n * p.output.pixels(),
            phase_pixels: p.n * p.input.h.div_ceil(s_h) * p.input.w.div_ceil(s_w),
            phases: s_h * s_w,
            c_in: p.input.c / p.groups,
            c_out: p.output.c / p.groups,
            taps: p.window.taps(),
            groups: p.groups,
            on_load: false,
        }
    }

    /// Whether a tile serves a pass.
    fn serves(&self, sides: (usize, usize), pass: KernelPass) -> bool {
        match sides {
            SMALL => true,
            NARROW => pass != KernelPass::WeightGradient,
            LARGE => pass == KernelPass::Forward || !self.on_load,
            _ => pass == KernelPass::Forward,
        }
    }

    /// Number of weights.
    pub fn weights(&self) -> usize {
        self.groups * self.c_out * self.taps * self.c_in
    }

    /// Extent of a pass's result.
    fn result(&self, pass: KernelPass) -> Extent {
        let (rows, columns) = match pass {
            KernelPass::Forward => (self.pixels, self.c_out),
            KernelPass::InputGradient => (self.phase_pixels, self.c_in),
            KernelPass::WeightGradient => (self.c_out, self.taps * self.c_in),
            KernelPass::Backward => panic!("a matrix product's gradients are two passes"),
        };
        Extent { rows, columns }
    }
}

/// Extent of a matrix.
#[derive(Debug, Clone, Copy)]
struct Extent {
    rows: usize,
    columns: usize,
}

/// The tile of a block, how it reads, and the slabs that a weight gradient is summed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GemmConfig {
    /// Rows of the tile.
    pub tile_m: usize,
    /// Columns of the tile.
    pub tile_n: usize,
    /// Whether operands are read by 16-byte vectors.
    pub vector: bool,
    /// Pixels of a slab of a weight gradient; `None` in the other passes.
    pub slab: Option<usize>,
}

/// Sides of the tile that serves every type, of the largest one, and of the small one for few columns.
const SMALL: (usize, usize) = (64, 64);
const LARGE: (usize, usize) = (128, 128);
const NARROW: (usize, usize) = (128, 32);
/// Sides of all tiles, and what a product takes in them, in quarters of what it takes in the largest: tensor cores wait where more is loaded
/// for a product than the cache that multiprocessors share gives meanwhile. Those stand first that are chosen where they cost the same.
const TILES: [((usize, usize), usize); 6] =
    [(LARGE, 4), ((128, 96), 4), ((128, 64), 5), ((256, 32), 7), (SMALL, 7), (NARROW, 8)];

impl GemmConfig {
    fn tile(sides: (usize, usize), vector: bool) -> Self {
        let (tile_m, tile_n) = sides;
        Self { tile_m, tile_n, vector, slab: None }
    }

    fn sides(&self) -> (usize, usize) {
        (self.tile_m, self.tile_n)
    }

    fn is_large(&self) -> bool {
        self.sides() == LARGE
    }

    /// Threads of a block: warps of 64 × 32 sums, or four where that would be fewer.
    pub fn threads(&self) -> usize {
        (self.area() / 64).max(128)
    }

    /// Tiles that cover a result.
    fn tiles(&self, result: Extent) -> usize {
        result.rows.div_ceil(self.tile_m) * result.columns.div_ceil(self.tile_n)
    }

    /// Whether tiles of this size compute at most a quarter more than those of 64 × 64 to cover a result.
    fn is_filled(&self, result: Extent) -> bool {
        let Extent { rows, columns } = result;
        let covered = |tile_m, tile_n| rows.next_multiple_of(tile_m) * columns.next_multiple_of(tile_n);
        4 * covered(self.tile_m, self.tile_n) <= 5 * covered(SMALL.0, SMALL.1)
    }

    /// What such a tile computes.
    fn area(&self) -> usize {
        self.tile_m * self.tile_n
    }

    /// Tiles that cover the rows of a pass's result: the slabs of sums over its columns.
    pub fn row_tiles(&self, p: &GemmProblem, pass: KernelPass) -> usize {
        p.result(pass).rows.div_ceil(self.tile_m)
    }

    /// Slabs of a weight gradient; 1 in the other passes.
    pub fn slabs(&self, p: &GemmProblem) -> usize {
        self.slab.map_or(1, |slab| p.pixels.div_ceil(slab))
    }

    /// Blocks: tiles of the result; slabs or phases; groups.
    pub fn grid(&self, p: &GemmProblem, pass: KernelPass) -> [usize; 3] {
        let y = if pass == KernelPass::InputGradient { p.phases } else { self.slabs(p) };
        [self.tiles(p.result(pass)), y, p.groups]
    }

    /// Floats of the partial sums `[slabs, weights]`; none where one slab writes the result itself.
    pub fn workspace(&self, p: &GemmProblem) -> usize {
        match self.slabs(p) {
            1 => 0,
            slabs => slabs * p.weights(),
        }
    }

    /// The name expression of a kernel.
    pub fn instance(&self, kernel: &str, dtype: Dtype) -> String {
        format!("{kernel}<{}, {}, {}, {}>", dtype.kernel_name(), self.tile_m, self.tile_n, self.vector)
    }

    /// The same with slabs that make `splits` of the pixels, about.
    fn split(self, p: &GemmProblem, splits: usize) -> Self {
        Self { slab: Some(p.pixels.div_ceil(splits).next_multiple_of(SLAB_STEP)), ..self }
    }

    /// The same with as many slabs as fill a GPU and no more, since the partial sums of every slab are written and read.
    fn filling(self, p: &GemmProblem) -> Self {
        let blocks = if self.is_large() { LARGE_SUM_BLOCKS } else { SUM_BLOCKS };
        let tiles = self.tiles(p.result(KernelPass::WeightGradient)) * p.groups;
        self.split(p, (blocks / tiles).clamp(1, (p.pixels / SLAB_PIXELS).max(1)))
    }
}

/// The tiles that cost least, among those of which there are enough for every multiprocessor; a weight gradient's
/// slabs make as many blocks as are wanted.
impl Problem for GemmProblem {
    type Config = GemmConfig;

    fn family(&self) -> KernelFamily {
        self.family
    }

    fn choose(&self, pass: KernelPass, on: KernelTarget) -> GemmConfig {
        let vector = whole_vectors(on.dtype, self.c_in) && whole_vectors(on.dtype, self.c_out);
        let [small, large] = [SMALL, LARGE].map(|sides| GemmConfig::tile(sides, vector));
        let result @ Extent { rows, columns } = self.result(pass);
        let on_tensor_cores = on.dtype != Dtype::F32 && vector;
        if pass == KernelPass::WeightGradient {
            let serves = on_tensor_cores && self.serves(LARGE, pass);
            let fits = serves && rows >= 128 && columns >= 128 && large.is_filled(result);
            return if fits { large } else { small }.filling(self);
        }
        if !on_tensor_cores {
            return small;
        }
        let tiles = TILES.map(|(sides, cost)| (GemmConfig::tile(sides, vector), cost)).into_iter();
        let enough = |tile: GemmConfig| tile.area() <= small.area() || tile.tiles(result) >= MULTIPROCESSORS;
        let fitting = tiles.filter(|&(tile, _)| self.serves(tile.sides(), pass) && enough(tile));
        fitting.min_by_key(|(tile, cost)| tile.tiles(result) * tile.area() * cost).map_or(small, |(tile, _)| tile)
    }

    fn list(&self, pass: KernelPass, on: KernelTarget) -> Vec<GemmConfig> {
        let tiles = TILES.into_iter().flat_map(|(sides, _)| [false, true].map(|v| GemmConfig::tile(sides, v)));
        let slabs = |tile: GemmConfig| -> Vec<GemmConfig> {
            if pass != KernelPass::WeightGradient {
                return vec![tile];
            }
            let splits =
                (0..).map(|power| 1 << power).take_while(|splits| splits * SLAB_STEP < 2 * self.pixels.max(SLAB_STEP));
            let few =
                splits.take_while(|splits| splits * tile.tiles(self.result(pass)) * self.groups <= 4 * SUM_BLOCKS);
            let mut all: Vec<GemmConfig> = few.map(|splits| tile.split(self, splits)).collect();
            all.push(tile.filling(self));
            all.sort_unstable_by_key(|config| config.slab);
            all.dedup();
            all
        };
        tiles.flat_map(slabs).filter(|&config| self.check(config, pass, on).is_ok()).collect()
    }

    fn check(&self, config: GemmConfig, pass: KernelPass, on: KernelTarget) -> Result<()> {
        let sides = config.sides();
        if pass == KernelPass::Backward {
            return Err(refused(config, "its kernels have one gradient"));
        }
        if !self.serves(sides, pass) {
            return Err(refused(config, "there are no such tiles in this pass"));
        }
        if sides != SMALL && (on.dtype == Dtype::F32 || !config.vector) {
            return Err(refused(config, "only vectors of f16 and bf16 have tiles of this size"));
        }
        if config.vector && !(whole_vectors(on.dtype, self.c_in) && whole_vectors(on.dtype, self.c_out)) {
            return Err(refused(config, "the channels are no whole vectors"));
        }
        match (config.slab, pass) {
            (None, KernelPass::WeightGradient) => Err(refused(config, "a weight gradient has slabs")),
            (Some(_), KernelPass::Forward | KernelPass::InputGradient | KernelPass::Backward) => {
                Err(refused(config, "only a weight gradient has slabs"))
            }
            (Some(slab), _) if slab == 0 || !slab.is_multiple_of(SLAB_STEP) => {
                Err(refused(config, format!("slabs are multiples of {SLAB_STEP} pixels")))
            }
            _ if config.slabs(self) > GRID_LIMIT => Err(refused(config, format!("more than {GRID_LIMIT} slabs"))),
            _ => Ok(()),
        }
    }
}

/// `128x128-vector`, and in a weight gradient `64x64-scalar-slab256`.
impl fmt::Display for GemmConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tile_m, tile_n, vector, slab } = self;
        write!(f, "{tile_m}x{tile_n}-{}", vector_word(*vector))?;
        slab.map_or(Ok(()), |slab| write!(f, "-slab{slab}"))
    }
}

impl FromStr for GemmConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = Parts::new(text, "128x128-vector or 64x64-scalar-slab256");
        let tile = parts.word()?;
        let sides = TILES.into_iter().map(|(sides, _)| sides).find(|(m, n)| format!("{m}x{n}") == tile);
        let sides = sides.ok_or_else(|| parts.error())?;
        let config = Self::tile(sides, parts.vector()?);
        let slab = parts.numbered_if("slab")?;
        parts.end(Self { slab, ..config })
    }
}
