//! Maps in blocks of a vector of channels, with zeros left and right of them: `[images, rows, columns]`.
//!
//! In a block every output pixel has all its columns, so that the kernels have no borders, and a row's pixels follow each other,
//! which in memory lie as far apart as there are channels. Values that are formed on load are formed when they are put there.

use std::ops::Range;

use pulp::Simd;

use super::super::ConvProblem;
use super::{channels_of, input_rows, input_width};
use crate::ops::simd::load;
use crate::ops::vector_source::{VectorReader, VectorSource};
use crate::shape::Shape;

/// Some rows of some images, and where their columns lie in a block.
#[derive(Debug, Clone)]
pub(super) struct BlockLayout {
    /// One image of the map in memory.
    map: Shape,
    /// Which images.
    pub images: Range<usize>,
    /// Which rows of each.
    pub rows: Range<usize>,
    /// Columns of the map that are in the block.
    pub columns: Range<usize>,
    /// Where the first of them lies in a row.
    pub first: usize,
    /// From one of them to the next; what is between them is zero.
    pub step: usize,
    /// Vectors of a row.
    pub width: usize,
}

impl BlockLayout {
    /// The input under some output rows.
    pub fn of_input(p: &ConvProblem, images: Range<usize>, rows: &Range<usize>) -> Self {
        let (columns, first) = (0..p.input.w, p.window.pad.left);
        // A last column may lie under no output.
        let width = input_width(p).max(first + p.input.w);
        Self { map: p.input, images, rows: input_rows(p, rows), columns, first, step: 1, width }
    }

    /// The gradient of some output rows, with zeros between its columns where a stride leaves out columns of the input: the
    /// input's gradient is the convolution of it with the filter turned round.
    pub fn of_gradient(p: &ConvProblem, images: Range<usize>, rows: Range<usize>) -> Self {
        let (k, stride, left) = (p.window.k_w, p.window.stride_w, p.window.pad.left);
        let width = p.input.w + k - 1;
        // Column i lies at stride·i + k − 1 − left; what lies outside of the row touches no input.
        let start = (left + 1).saturating_sub(k).div_ceil(stride);
        let end = (width + left + 1).saturating_sub(k).div_ceil(stride).min(p.output.w);
        let first = (start * stride + k).saturating_sub(1 + left);
        Self { map: p.output, images, rows, columns: start..end.max(start), first, step: stride, width }
    }

    /// Makes what lies around the columns of the map, and between them, zero in any number of blocks. A vector has so many elements.
    #[inline(always)]
    pub fn clear_margins<V: Copy>(&self, elements: usize, zero: V, blocks: &mut [V]) {
        if self.step > 1 {
            blocks.fill(zero);
            return;
        }
        for line in blocks.chunks_exact_mut(self.width * elements) {
            line[..self.first * elements].fill(zero);
            line[(self.first + self.columns.len()) * elements..].fill(zero);
        }
    }

    /// The element of the map behind its rows, where what follows it is read.
    pub fn end(&self) -> usize {
        ((self.images.end - 1) * self.map.h + self.rows.end) * self.map.w * self.map.c
    }

    /// Vectors of a block.
    pub fn vectors(&self) -> usize {
        self.images.len() * self.rows.len() * self.width
    }

    /// Moves the rows that blocks hold of the layout before, and that this one has first, to their places: `block` vectors lie from
    /// one block to the next. Returns how many rows these are.
    #[inline(always)]
    fn keep<V: Copy>(&self, before: &Self, blocks: &mut [V], block: usize) -> usize {
        let held = before.rows.start..=before.rows.end;
        if self.images.len() > 1 || self.images != before.images || !held.contains(&self.rows.start) {
            return 0;
        }
        let rows = before.rows.end.min(self.rows.end) - self.rows.start;
        let from = (self.rows.start - before.rows.start) * self.width;
        if from > 0 {
            for block in blocks.chunks_exact_mut(block) {
                block.copy_within(from..from + rows * self.width, 0);
            }
        }
        rows
    }

    /// The vector where a row of the map begins.
    #[inline(always)]
    pub fn row(&self, image: usize, row: usize) -> usize {
        ((image - self.images.start) * self.rows.len() + row - self.rows.start) * self.width
    }
}

/// Vectors of channels at most that are read of one pixel before the next: what forms so many is at hand.
const GROUP: usize = 8;

/// Puts all channels into blocks, one for each vector of them. What lies around the map stays.
pub(super) struct Fill<'a, X, V> {
    pub layout: &'a BlockLayout,
    /// What the blocks hold: rows that are wanted again are moved.
    pub before: Option<&'a BlockLayout>,
    pub x: &'a X,
    pub to: &'a mut [V],
    /// Vectors from one block to the next.
    pub block: usize,
}

impl<X: VectorSource, V: Copy> Fill<'_, X, V> {
    /// Nearly in the order of memory.
    #[inline(always)]
    pub fn run<S: Simd<f32s = V>>(self, simd: S) {
        let Self { layout, before, x, to, block } = self;
        let BlockLayout { map, columns, first, step, .. } = layout;
        let kept = before.map_or(0, |before| layout.keep(before, to, block));
        let vectors = map.c.div_ceil(S::F32_LANES);
        assert!(to.len() >= vectors * block && block >= layout.vectors(), "blocks too short");
        let groups = vectors.div_ceil(GROUP);
        for group in 0..groups {
            let group = group * vectors / groups..(group + 1) * vectors / groups;
            let readers: [X::Reader<'_, S>; GROUP] = std::array::from_fn(
                #[inline(always)]
                |i| x.reader(simd, channels_of::<S>((group.start + i).min(group.end - 1), map.c)),
            );
            for image in layout.images.clone() {
                for row in layout.rows.start + kept..layout.rows.end {
                    let to_row = group.start * block + layout.row(image, row) + first;
                    let from_row = ((image * map.h + row) * map.w + columns.start) * map.c + group.start * S::F32_LANES;
                    for column in 0..columns.len() {
                        let (mut at, mut from) = (to_row + column * step, from_row + column * map.c);
                        for reader in &readers[..group.len()] {
                            // SAFETY: a pixel of a row of the layout, in one of the blocks.
                            unsafe { *to.get_unchecked_mut(at) = reader.vector(simd, from) };
                            at += block;
                            from += S::F32_LANES;
                        }
                    }
                }
            }
        }
    }
}

/// The weights of some channels, one vector for each tap.
#[inline(always)]
pub(super) fn filter_of<S: Simd>(simd: S, w: &[f32], c: usize, channels: Range<usize>, to: &mut [S::f32s]) {
    for (to, w) in to.iter_mut().zip(w.chunks_exact(c)) {
        *to = load(simd, &w[channels.clone()]);
    }
}
