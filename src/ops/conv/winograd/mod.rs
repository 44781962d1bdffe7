//! Dense 3×3 and 5×5 convolutions of stride 1 with fewer multiplications, for inference on the host: Winograd's algorithm
//! (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016).
//!
//! The output is cut into tiles of m×m, the input into tiles of t×t that overlap, with m = t + 1 − k: F(4×4, 3×3) multiplies
//! 36 numbers where the sum of products takes 144, F(2×2, 5×5) 36 for 100, and F(2×2, 3×3), of 4×4 tiles and for the smallest
//! maps, 16 for 36. Y = Aᵀ[(G·w·Gᵀ) ⊙ (Bᵀ·d·B)]A, where ⊙, summed over input channels, is a product of tiles and weights at
//! each of the t² positions. Each tile is computed alone, in one order, so that results are the same bits however tiles are
//! shared out.
//!
//! The polynomials behind 6×6 tiles are evaluated at 0, ±3/4, ±3/2 and ∞: with pairs of points on both sides of 1 rounding
//! errors stay small (Alam, Anderson, Barabasz, Gregg, "Winograd Convolution for Deep Neural Networks: Efficient Point
//! Selection", 2022), here about twice those of the plain sum, where the usual 0, ±1, ±2 has five times; those behind 4×4 tiles
//! at 0, ±1 and ∞. All of Aᵀ and Bᵀ are exact in `f32`.

mod host;
mod step;

pub use step::WinogradStep;

use super::{ConvFamily, ConvProblem, require};
use crate::device::{View, ViewMut};
use crate::ops::activation::Act;
use crate::ops::epilogue::Epilogue;
use crate::ops::panels::PanelLayout;
use crate::ops::simd::{lanes, vectorised};
use crate::shape::Window;

/// Rows and columns of a tile of the input: of the large ones, and of the small ones.
const LARGE: usize = 6;
const SMALL: usize = 4;
/// The finite points of the large tiles: 0, ±A, ±B. Those of the small ones: 0, ±1.
const A: f32 = 0.75;
const B: f32 = 1.5;
/// Tiles of an image at least: of fewer, the transformed weights, up to four times as many as the weights, take longer to read
/// than they save.
const MIN_TILES: usize = 16;
/// Channels of the input at least: tiles are moved in whole vectors, so that fewer, such as those of a picture, take longer
/// than their operations say.
const MIN_CHANNELS: usize = 8;

/// A convolution that is computed in tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WinogradProblem {
    /// The convolution.
    conv: ConvProblem,
    /// Rows and columns of a tile of the input.
    tile: usize,
}

impl WinogradProblem {
    /// The problem of a convolution for which tiles are at least half again as fast by the operations counted: a dense one of
    /// one group and stride 1 with a 3×3 or 5×5 kernel, [`MIN_CHANNELS`] or more, and [`MIN_TILES`] in an image, of the large
    /// ones if there are so many. The number of images does not matter, so that every batch is computed alike.
    pub fn new(conv: ConvProblem) -> Option<Self> {
        let Window { k_h, k_w, stride_h, stride_w, .. } = conv.window;
        let fits = (stride_h, stride_w) == (1, 1) && k_h == k_w && matches!(k_h, 3 | 5) && conv.groups == 1;
        if conv.family() != ConvFamily::Dense || !fits || conv.input.c < MIN_CHANNELS {
            return None;
        }
        let tiles = [LARGE, SMALL].into_iter().filter(|tile| *tile > k_h);
        let of = tiles.map(|tile| Self { conv, tile }).find(|of| of.tiles_per_image() >= MIN_TILES)?;
        let plainly = conv.output.pixels() * conv.window.taps() * conv.input.c * conv.output.c;
        (3 * of.tiles_per_image() * of.tile_operations() <= 2 * plainly).then_some(of)
    }

    /// The same for so many images.
    pub fn batch(self, n: usize) -> Self {
        Self { conv: self.conv.batch(n), ..self }
    }

    /// The convolution.
    pub fn conv(&self) -> &ConvProblem {
        &self.conv
    }

    /// Rows and columns of a tile of the output.
    fn side(&self) -> usize {
        self.tile + 1 - self.conv.window.k_h
    }

    /// Elements of a tile of the input.
    fn positions(&self) -> usize {
        self.tile.pow(2)
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

    /// Multiplications, each with an addition, of the products and the transforms of a tile. A transform of a row or a column
    /// takes twelve of them or four.
    fn tile_operations(&self) -> usize {
        let (c_in, c_out, each) = (self.conv.input.c, self.conv.output.c, if self.tile == LARGE { 12 } else { 4 });
        self.positions() * c_in * c_out + each * (2 * self.tile * c_in + (self.tile + self.side()) * c_out)
    }

    /// Floating-point operations of an image.
    pub fn flops(&self) -> u64 {
        2 * (self.tiles_per_image() * self.tile_operations()) as u64
    }

    /// The products at all positions, as groups of one: weights `[t², c_out, c_in]`, with output channels of zeros up to a
    /// whole vector.
    fn products(&self) -> PanelLayout {
        PanelLayout { groups: self.positions(), c_out: padded(self.conv.output.c), k: self.conv.input.c }
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
        let mut transformed = vec![0.0; self.positions() * padded(c_out) * c_in];
        let rows = weight_transform(self.tile, k);
        vectorised(
            #[inline(always)]
            || {
                // One position of one output channel at a time: runs over input channels.
                let mut sums = vec![0.0; c_in];
                for (out, w) in w.chunks_exact(k * k * c_in).enumerate() {
                    for position in 0..self.positions() {
                        let (row, column) = (&rows[position / self.tile], &rows[position % self.tile]);
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

/// G `[t, k]`: the kernel's polynomial at each point, over what Bᵀ leaves there: Π(p − q) over the other finite points q.
fn weight_transform(tile: usize, k: usize) -> Vec<[f64; 5]> {
    let points: &[f32] = if tile == LARGE { &[0.0, A, -A, B, -B] } else { &[0.0, 1.0, -1.0] };
    let points: Vec<f64> = points.iter().copied().map(f64::from).collect();
    let at = |p: &f64| {
        let scale: f64 = points.iter().filter(|q| *q != p).map(|q| p - q).product();
        std::array::from_fn(|tap| if tap < k { p.powi(tap as i32) / scale } else { 0.0 })
    };
    let infinity = std::array::from_fn(|tap| f64::from(u8::from(tap + 1 == k)));
    points.iter().map(at).chain([infinity]).collect()
}
