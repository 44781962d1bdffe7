//! Dense 3×3 and 5×5 convolutions of stride 1 with fewer multiplications, for inference on the host: Winograd's algorithm
//! (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016).
//!
//! The output is cut into tiles of m×m, the input into tiles of 6×6 that overlap, with m = 7 − k: F(4×4, 3×3) multiplies 36
//! numbers where the sum of products takes 144, F(2×2, 5×5) 36 for 100. Y = Aᵀ[(G·w·Gᵀ) ⊙ (Bᵀ·d·B)]A, where ⊙, summed over
//! input channels, is a product of tiles and weights at each of the 36 positions. Each tile is computed alone, in one order,
//! so that results are the same bits however tiles are shared out.
//!
//! The polynomials behind it are evaluated at 0, ±3/4, ±3/2 and ∞: with pairs of points on both sides of 1 rounding errors
//! stay small (Alam, Anderson, Barabasz, Gregg, "Winograd Convolution for Deep Neural Networks: Efficient Point Selection",
//! 2022), here about twice those of the plain sum, where the usual 0, ±1, ±2 has five times; and all of Aᵀ and Bᵀ are exact in
//! `f32`.

mod host;
mod step;

pub use step::WinogradStep;

use super::{ConvFamily, ConvProblem, require};
use crate::device::{View, ViewMut};
use crate::ops::activation::Act;
use crate::ops::epilogue::Epilogue;
use crate::ops::product::PanelLayout;
use crate::ops::simd::{lanes, vectorised};
use crate::shape::Window;

/// Rows and columns of a tile of the input.
const TILE: usize = 6;
/// Positions of a tile.
const POSITIONS: usize = TILE * TILE;
/// The finite points: 0, ±A, ±B.
const A: f32 = 0.75;
const B: f32 = 1.5;
/// Tiles of an image at least: of fewer, the transformed weights, four times as many as the weights, take longer to read than
/// they save.
const MIN_TILES: usize = 16;
/// Vector operations of both transforms of a tile, per channel that is read and per channel that is written.
const READ_OPERATIONS: usize = 144;
const WRITE_OPERATIONS: usize = 120;

/// A convolution that is computed in tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WinogradProblem {
    /// The convolution.
    conv: ConvProblem,
}

impl WinogradProblem {
    /// The problem of a convolution for which tiles are at least twice as fast by the operations counted: a dense one of
    /// one group and stride 1 with a 3×3 or 5×5 kernel, enough channels, and [`MIN_TILES`] in an image. The number of images
    /// does not matter, so that every batch is computed alike.
    pub fn new(conv: ConvProblem) -> Option<Self> {
        let Window { k_h, k_w, stride_h, stride_w, .. } = conv.window;
        let fits = (stride_h, stride_w) == (1, 1) && k_h == k_w && matches!(k_h, 3 | 5) && conv.groups == 1;
        let of = (conv.family() == ConvFamily::Dense && fits).then_some(Self { conv })?;
        let (c_in, c_out) = (conv.input.c, conv.output.c);
        let plainly = of.side().pow(2) * conv.window.taps() * c_in * c_out;
        (of.tiles_per_image() >= MIN_TILES && 2 * of.tile_operations() <= plainly).then_some(of)
    }

    /// The convolution.
    pub fn conv(&self) -> &ConvProblem {
        &self.conv
    }

    /// Rows and columns of a tile of the output.
    fn side(&self) -> usize {
        TILE + 1 - self.conv.window.k_h
    }

    fn tiles_per_row(&self) -> usize {
        self.conv.output.w.div_ceil(self.side())
    }

    fn tiles_per_image(&self) -> usize {
        self.conv.output.h.div_ceil(self.side()) * self.tiles_per_row()
    }

    /// Such as `F(4x4, 3x3)`.
    pub fn describe(&self) -> String {
        let (m, Window { k_h: k, .. }) = (self.side(), self.conv.window);
        format!("F({m}x{m}, {k}x{k})")
    }

    /// Multiplications, each with an addition, of the products and the transforms of a tile.
    fn tile_operations(&self) -> usize {
        let (c_in, c_out) = (self.conv.input.c, self.conv.output.c);
        POSITIONS * c_in * c_out + READ_OPERATIONS * c_in + WRITE_OPERATIONS * c_out
    }

    /// Floating-point operations of an image.
    pub fn flops(&self) -> u64 {
        2 * (self.tiles_per_image() * self.tile_operations()) as u64
    }

    /// The products at all positions, as groups of one: weights `[36, c_out, c_in]`, with output channels of zeros up to a
    /// whole vector.
    fn products(&self) -> PanelLayout {
        PanelLayout { groups: POSITIONS, c_out: padded(self.conv.output.c), k: self.conv.input.c }
    }

    /// Elements of the transformed weights in panels.
    pub fn packed_elements(&self) -> usize {
        self.products().panel_elements()
    }

    /// Transforms weights `[c_out, k, k, c_in]` and packs them.
    ///
    /// # Panics
    /// When `w` or `to` has another length.
    pub fn pack(&self, w: &[f32], to: &mut [f32]) {
        assert_eq!(w.len(), self.conv.weight_len(), "weights of another convolution");
        let (k, c_in, c_out) = (self.conv.window.k_h, self.conv.input.c, self.conv.output.c);
        let mut transformed = vec![0.0; POSITIONS * padded(c_out) * c_in];
        let rows = weight_transform(k);
        vectorised(
            #[inline(always)]
            || {
                // One position of one output channel at a time: runs over input channels.
                let mut sums = vec![0.0; c_in];
                for (out, w) in w.chunks_exact(k * k * c_in).enumerate() {
                    for position in 0..POSITIONS {
                        let (row, column) = (&rows[position / TILE], &rows[position % TILE]);
                        sums.fill(0.0);
                        for (tap, w) in w.chunks_exact(c_in).enumerate() {
                            let factor = row[tap / k] * column[tap % k];
                            sums.iter_mut().zip(w).for_each(|(sum, w)| *sum += factor * f64::from(*w));
                        }
                        let to = &mut transformed[(position * padded(c_out) + out) * c_in..][..c_in];
                        to.iter_mut().zip(&sums).for_each(|(to, sum)| *to = *sum as f32);
                    }
                }
            },
        );
        self.products().pack(&transformed, to);
    }
}

/// Channels up to a whole vector.
fn padded(channels: usize) -> usize {
    channels.next_multiple_of(lanes())
}

/// y = φ(conv(x, w) + bias + residual); `w` packed ahead, or packed here for one pass.
///
/// # Panics
/// When an operand has another size, or is on a GPU.
pub fn forward(of: &WinogradProblem, x: View<'_>, w: View<'_>, epilogue: &Epilogue<View<'_>, Act<'_>>, y: ViewMut<'_>) {
    of.conv.check(x.len(), w.len(), y.len());
    epilogue.check(&of.conv);
    if let Some(packed) = w.panels() {
        require("a convolution in tiles", [("packed weights", packed.len(), of.packed_elements())]);
    }
    host::forward(of, x.host(), w, &epilogue.host(), y.host());
}

/// G `[6, k]`: the kernel's polynomial at each point, over what Bᵀ leaves there: Π(p − q) over the other finite points q.
fn weight_transform(k: usize) -> [[f64; 5]; TILE] {
    let points = [0.0, A, -A, B, -B].map(f64::from);
    let mut rows = [[0.0; 5]; TILE];
    for (p, row) in points.iter().zip(&mut rows) {
        let scale: f64 = points.iter().filter(|q| *q != p).map(|q| p - q).product();
        (0..k).for_each(|tap| row[tap] = p.powi(tap as i32) / scale);
    }
    rows[TILE - 1][k - 1] = 1.0;
    rows
}
