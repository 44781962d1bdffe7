//! Configurations of whole inverted residuals: `inverted_residual.cu`, whose blocks have tiles of pixels, and
//! `inverted_residual_band.cu`, whose blocks have whole rows.

use std::fmt;
use std::str::FromStr;

use super::InvertedResidualProblem;
use crate::dtype::Dtype;
use crate::ops::config::{KernelFamily, KernelPass, KernelTarget, Problem, refused, whole_vectors};
use crate::{Error, Result};

/// How a GPU runs an inverted residual.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InvertedResidualConfig {
    /// In tiles of pixels, of any block that has a kernel.
    Tile(TileConfig),
    /// In bands of rows, of small maps in 16 bits.
    Band(BandConfig),
}

/// Columns of output pixels of a tile.
const TILE_COLUMNS: usize = 8;

/// The tile of a block: output channels, and whether operands are read as vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TileConfig {
    /// Output channels: fewer take fewer registers where they are all of them.
    pub channels: usize,
    /// Whether all channels are whole vectors.
    pub vector: bool,
}

impl TileConfig {
    fn choose(p: &InvertedResidualProblem, dtype: Dtype) -> Self {
        let vector = has_vectors(p, dtype);
        let channels = match p.window.stride_h {
            1 if vector && p.output.c > 64 => 128,
            1 => 64,
            _ => 128,
        };
        Self { channels, vector }
    }

    fn check(self, p: &InvertedResidualProblem, dtype: Dtype) -> Result<()> {
        if self.vector && !has_vectors(p, dtype) {
            return Err(refused(self, "the channels are no whole vectors"));
        }
        let made = match p.window.stride_h {
            1 => self.channels == 64 || (self.channels == 128 && self.vector),
            _ => self.channels == 128,
        };
        if made { Ok(()) } else { Err(refused(self, "there is no kernel of this tile for this stride")) }
    }

    /// Output rows of a tile.
    fn rows(p: &InvertedResidualProblem) -> usize {
        if p.window.stride_h == 1 { 8 } else { 4 }
    }

    /// Blocks: tiles of output pixels and channels, of all images.
    pub fn grid(self, p: &InvertedResidualProblem) -> [usize; 3] {
        let (rows, columns) = (p.output.h.div_ceil(Self::rows(p)), p.output.w.div_ceil(TILE_COLUMNS));
        [p.n * rows * columns * p.output.c.div_ceil(self.channels), 1, 1]
    }

    /// The name expression of the kernel.
    pub fn instance(self, p: &InvertedResidualProblem, dtype: Dtype) -> String {
        let (t, k, stride) = (dtype.kernel_name(), p.window.k_h, p.window.stride_h);
        format!("inverted_residual<{t}, {k}, {stride}, {}, {}>", self.channels, self.vector)
    }
}

/// Whether all channels are whole vectors.
fn has_vectors(p: &InvertedResidualProblem, dtype: Dtype) -> bool {
    [p.input.c, p.hidden, p.output.c].iter().all(|&c| whole_vectors(dtype, c))
}

/// The sizes that there are kernels of: pixels of a band's input and output at most, stride, and output channels at most.
const BANDS: [(BandSize, &[usize]); 2] = [
    (BandSize { input: 128, output: 128, stride: 1 }, &[64, 96, 160]),
    (BandSize { input: 208, output: 64, stride: 2 }, &[96, 160]),
];
/// Side of the window of the depthwise convolution in a band.
const BAND_WINDOW: usize = 3;
/// Hidden channels that are on chip at a time, and elements between the lines of a tile, which have a vector of padding.
const SLICE: usize = 32;
const LINE: usize = SLICE + 8;
/// Bytes of a number, and of sums of eight warps on their way through shared memory.
const ELEMENT: usize = 2;
const SUMS: usize = 8 * 16 * 20 * 4;
/// Panels of 32 input channels at most.
const PANELS: usize = 8;

/// Pixels of a band's input and output at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct BandSize {
    input: usize,
    output: usize,
    stride: usize,
}

/// The band of a block, and its output channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BandConfig {
    size: BandSize,
    /// Output channels at most.
    pub channels: usize,
}

/// Output rows of a band, and images whose rows it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BandRows {
    /// Output rows.
    pub rows: usize,
    /// Images; more than one only where the rows are all rows.
    pub images: usize,
    /// Bands of an image.
    pub bands: usize,
}

impl BandConfig {
    /// The one that is taken; `None` where bands do not suit the problem: they are for vectors of 16 bits, and for maps of so
    /// few pixels and channels that hardly any hidden value is formed twice.
    pub fn choose(p: &InvertedResidualProblem, on: KernelTarget) -> Option<Self> {
        let all =
            BANDS.iter().flat_map(|&(size, channels)| channels.iter().map(move |&channels| Self { size, channels }));
        let mut fitting = all.filter(|config| config.check(p, on).is_ok());
        fitting.next().filter(|config| config.forms_few_twice(p))
    }

    /// Whether rows that several bands form are at most a third of all.
    fn forms_few_twice(self, p: &InvertedResidualProblem) -> bool {
        let Some(BandRows { rows, bands, .. }) = self.rows(p) else { return false };
        3 * bands * rows_under(p, rows) <= 4 * p.input.h
    }

    fn check(self, p: &InvertedResidualProblem, on: KernelTarget) -> Result<()> {
        let window = p.window;
        let no = |why: &str| Err(refused(self, why));
        if on.dtype == Dtype::F32 || (on.dtype == Dtype::Bf16 && on.arch < 80) {
            return no("bands are for tensor cores");
        }
        let square = [window.k_h, window.k_w] == [BAND_WINDOW; 2] && window.stride_h == window.stride_w;
        if !square || !p.has_expand || window.stride_h != self.size.stride {
            return no("it has another window, another stride or no expansion");
        }
        if !has_vectors(p, on.dtype) {
            return no("the channels are no whole vectors");
        }
        if self.rows(p).is_none() || p.output.c > self.channels {
            return no("a row has more pixels, or the output more channels");
        }
        let shared = self.shared(p);
        if p.input.c.div_ceil(SLICE) > PANELS || shared > shared_limit(on.arch) {
            return no(&format!("it takes {shared} bytes of shared memory"));
        }
        Ok(())
    }

    /// Rows and images of a band; `None` where not one row fits.
    pub fn rows(self, p: &InvertedResidualProblem) -> Option<BandRows> {
        let BandSize { input, output, .. } = self.size;
        let images = (input / p.input.pixels().max(1)).min(output / p.output.pixels().max(1));
        // As many whole images as shared memory has room for.
        let images = (1..=images)
            .rev()
            .find(|&images| self.bytes(p, p.output.h, images) <= shared_limit(70))
            .or((images > 0).then_some(1));
        if let Some(images) = images {
            return Some(BandRows { rows: p.output.h, images: images.min(p.n.max(1)), bands: 1 });
        }
        let fits = |rows: &usize| rows_under(p, *rows) * p.input.w <= input && rows * p.output.w <= output;
        let most = (1..=p.output.h).take_while(fits).last()?;
        // Bands of about the same size.
        let rows = p.output.h.div_ceil(p.output.h.div_ceil(most));
        Some(BandRows { rows, images: 1, bands: p.output.h.div_ceil(rows) })
    }

    /// Blocks: bands of all images.
    pub fn grid(self, p: &InvertedResidualProblem) -> [usize; 3] {
        let Some(BandRows { images, bands, .. }) = self.rows(p) else { return [0, 1, 1] };
        [p.n.div_ceil(images) * bands, 1, 1]
    }

    /// Bytes of shared memory of a block; 0 where not one row fits.
    pub fn shared(self, p: &InvertedResidualProblem) -> usize {
        self.rows(p).map_or(0, |of| self.bytes(p, of.rows, of.images))
    }

    fn bytes(self, p: &InvertedResidualProblem, rows: usize, images: usize) -> usize {
        let BandSize { input, output, stride } = self.size;
        let panels = p.input.c.div_ceil(SLICE);
        // h has a place for every pixel that is read.
        let hidden = images * under(rows, stride) * under(p.output.w, stride) * SLICE;
        // x and the weights of the expansion, weights of the projection; d, or sums.
        let elements = panels * (input + SLICE) * LINE + self.channels * LINE + hidden;
        elements * ELEMENT + (output * LINE * ELEMENT).max(SUMS)
    }

    /// The name expression of the kernel.
    pub fn instance(self, dtype: Dtype) -> String {
        let BandSize { input, output, stride } = self.size;
        format!("inverted_residual_band<{}, {input}, {output}, {stride}, {}>", dtype.kernel_name(), self.channels)
    }
}

/// Rows, or columns, of the input under so many of the output.
fn under(outputs: usize, stride: usize) -> usize {
    (outputs - 1) * stride + BAND_WINDOW
}

/// Input rows of an image under so many output rows in its middle.
fn rows_under(p: &InvertedResidualProblem, rows: usize) -> usize {
    under(rows, p.window.stride_h).min(p.input.h)
}

/// Bytes of shared memory that a block may ask for. What has most is not asked for more than a V100 has, so that a choice
/// depends on the problem alone wherever it can.
fn shared_limit(arch: u32) -> usize {
    if arch == 75 { 64 << 10 } else { 96 << 10 }
}

impl Problem for InvertedResidualProblem {
    type Config = InvertedResidualConfig;

    fn family(&self) -> KernelFamily {
        KernelFamily::InvertedResidual
    }

    fn choose(&self, _: KernelPass, on: KernelTarget) -> InvertedResidualConfig {
        let band = BandConfig::choose(self, on).map(InvertedResidualConfig::Band);
        band.unwrap_or_else(|| InvertedResidualConfig::Tile(TileConfig::choose(self, on.dtype)))
    }

    fn list(&self, pass: KernelPass, on: KernelTarget) -> Vec<InvertedResidualConfig> {
        all().filter(|&config| self.check(config, pass, on).is_ok()).collect()
    }

    fn check(&self, config: InvertedResidualConfig, _: KernelPass, on: KernelTarget) -> Result<()> {
        match config {
            InvertedResidualConfig::Tile(tile) => tile.check(self, on.dtype),
            InvertedResidualConfig::Band(band) => band.check(self, on),
        }
    }
}

/// All configurations that there are kernels of.
fn all() -> impl Iterator<Item = InvertedResidualConfig> {
    let tiles = [64, 128].into_iter().flat_map(|channels| [true, false].map(|vector| TileConfig { channels, vector }));
    let bands =
        BANDS.iter().flat_map(|&(size, channels)| channels.iter().map(move |&channels| BandConfig { size, channels }));
    tiles.map(InvertedResidualConfig::Tile).chain(bands.map(InvertedResidualConfig::Band))
}

/// `64ch-vector`.
impl fmt::Display for TileConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ch-{}", self.channels, if self.vector { "vector" } else { "scalar" })
    }
}

/// `96ch-band128`.
impl fmt::Display for BandConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ch-band{}", self.channels, self.size.input)
    }
}

impl fmt::Display for InvertedResidualConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tile(tile) => tile.fmt(f),
            Self::Band(band) => band.fmt(f),
        }
    }
}

impl FromStr for InvertedResidualConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = all().find(|config| config.to_string() == text);
        found.ok_or_else(|| {
            Error::Config(format!("no configuration {text:?}; expected one like 64ch-vector or 96ch-band128"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::{Padding, Shape, Window};

    fn problem(n: usize, side: usize, channels: [usize; 3], stride: usize) -> InvertedResidualProblem {
        let window = Window { pad: Padding::all(1), ..Window::square(3, stride, 0) };
        let [c_in, hidden, c_out] = channels;
        InvertedResidualProblem::new(n, Shape::new(side, side, c_in), Some(hidden), c_out, window).unwrap()
    }

    #[test]
    fn bands_hold_the_late_blocks_of_mobilenets() {
        let on = KernelTarget { dtype: Dtype::F16, arch: 70 };
        for (side, channels, stride, name, rows, grid) in [
            (14, [64, 384, 64], 1, "64ch-band128", (7, 1, 2), 256),
            (14, [96, 576, 96], 1, "96ch-band128", (7, 1, 2), 256),
            (14, [96, 576, 160], 2, "160ch-band208", (7, 1, 1), 128),
            (7, [160, 960, 160], 1, "160ch-band128", (7, 2, 1), 64),
            (4, [160, 960, 136], 1, "160ch-band128", (4, 4, 1), 32),
            (28, [32, 192, 64], 2, "96ch-band208", (3, 1, 5), 640),
        ] {
            let p = problem(128, side, channels, stride);
            let chosen = p.choose(KernelPass::Forward, on);
            assert_eq!(chosen.to_string(), name, "{p:?}");
            let InvertedResidualConfig::Band(band) = chosen else { panic!("no band") };
            let BandRows { rows: of, images, bands } = band.rows(&p).unwrap();
            assert_eq!(((of, images, bands), band.grid(&p)), (rows, [grid, 1, 1]), "{p:?}");
        }
        // Too many pixels, another type, channels that are no vectors, and a GPU with less shared memory.
        let tile = |p: InvertedResidualProblem, on: KernelTarget| {
            matches!(p.choose(KernelPass::Forward, on), InvertedResidualConfig::Tile(_))
        };
        let late = problem(128, 7, [160, 960, 160], 1);
        assert!(tile(problem(1, 56, [24, 144, 24], 1), on) && tile(problem(1, 14, [64, 380, 64], 1), on));
        assert!(tile(late, KernelTarget { dtype: Dtype::F32, ..on }));
        assert!(tile(late, KernelTarget { arch: 75, ..on }) && !tile(late, on));
        assert!(tile(problem(128, 7, [160, 960, 320], 1), on), "more channels than a block has");
    }
}
