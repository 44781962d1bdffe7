//! Maps in blocks of a vector of channels, with zeros left and right of them: `[images, rows, columns]`.
//!
//! In a block every output pixel has all its columns, so that the kernels have no borders; it is small enough for the
//! first-level cache, and values that are formed on load are formed when they are put there.

use std::ops::Range;

use pulp::Simd;

use super::super::ConvProblem;
use super::{input_rows, input_width};
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

    /// Makes what lies around the map zero, in any number of blocks of a map with single steps. A vector has so many elements.
    pub fn clear_margins<V: Copy>(&self, elements: usize, zero: V, blocks: &mut [V]) {
        for line in blocks.chunks_exact_mut(self.width * elements) {
            line[..self.first * elements].fill(zero);
            line[(self.first + self.columns.len()) * elements..].fill(zero);
        }
    }

    /// Vectors of a block.
    pub fn vectors(&self) -> usize {
        self.images.len() * self.rows.len() * self.width
    }

    /// The vector where a row of the map begins.
    #[inline(always)]
    pub fn row(&self, image: usize, row: usize) -> usize {
        ((image - self.images.start) * self.rows.len() + row - self.rows.start) * self.width
    }
}

/// Puts some channels, at most as many as a vector has, into a block. What lies around the map stays.
pub(super) struct Fill<'a, X, V> {
    pub layout: &'a BlockLayout,
    pub x: &'a X,
    pub channels: Range<usize>,
    pub to: &'a mut [V],
}

impl<X: VectorSource, V> Fill<'_, X, V> {
    #[inline(always)]
    pub fn run<S: Simd<f32s = V>>(self, simd: S) {
        let Self { layout, x, channels, to } = self;
        let BlockLayout { map, columns, first, step, .. } = layout;
        if columns.is_empty() {
            return;
        }
        let reader = x.reader(simd, channels.clone());
        for image in layout.images.clone() {
            for row in layout.rows.clone() {
                let from = ((image * map.h + row) * map.w + columns.start) * map.c + channels.start;
                let to = &mut to[layout.row(image, row) + first..][..(columns.len() - 1) * step + 1];
                for (column, to) in to.iter_mut().step_by(*step).enumerate() {
                    *to = reader.vector(simd, from + column * map.c);
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
