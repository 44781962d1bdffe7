//! The constant part of an affine map on images: its response to an image of zeros.
//!
//! A convolution that zero-pads a biased value sees zeros where the interior has the bias, so the response differs at
//! the border: it is the bias map b\[o] − E\[o,u] of `docs/methods.md` 1.4 (R3), for any stride and padding. Rows and columns
//! that see the same taps share a class, so that only a few positions are computed.

use std::collections::HashMap;

use super::compose::Layer;
use crate::graph::{ConvFamily, Pad};
use crate::shape::{Shape, Window};

/// Response of a value to a segment input of zeros.
#[derive(Debug, Clone, PartialEq)]
pub struct Response {
    /// The class of every row and of every column.
    classes: [Vec<usize>; 2],
    /// Number of column classes.
    col_classes: usize,
    c: usize,
    /// `[row classes, column classes, c]`.
    values: Vec<f64>,
}

/// The class of every output line, and per class the input class under each tap; `None` is padding.
type Lines = (Vec<usize>, Vec<Vec<Option<usize>>>);

impl Response {
    /// The response of the segment's input itself.
    pub fn zero(shape: Shape) -> Self {
        Self { classes: [vec![0; shape.h], vec![0; shape.w]], col_classes: 1, c: shape.c, values: vec![0.0; shape.c] }
    }

    /// The response behind a convolution, as its own padding makes it.
    pub fn then(&self, layer: &Layer) -> Self {
        let Window { k_h, k_w, stride_h, stride_w, pad } = layer.conv.window;
        let (rows, row_taps) = lines(&self.classes[0], k_h, stride_h, [pad.top, pad.bottom]);
        let (cols, col_taps) = lines(&self.classes[1], k_w, stride_w, [pad.left, pad.right]);
        let mut values = Vec::with_capacity(row_taps.len() * col_taps.len() * layer.conv.c_out);
        for row in &row_taps {
            for col in &col_taps {
                let start = values.len();
                values.extend_from_slice(&layer.bias);
                for (v, (row, col)) in row.iter().flat_map(|r| col.iter().map(move |c| (r, c))).enumerate() {
                    if let (Some(row), Some(col)) = (row, col) {
                        add_tap(layer, v, self.at(*row, *col), &mut values[start..]);
                    }
                }
            }
        }
        Self { classes: [rows, cols], col_classes: col_taps.len(), c: layer.conv.c_out, values }
    }

    /// The response behind a padding.
    pub fn padded(&self, pad: Pad) -> Self {
        let (rows, row_sources) = moved(&self.classes[0], pad.top, pad.bottom);
        let (cols, col_sources) = moved(&self.classes[1], pad.left, pad.right);
        let mut values = Vec::with_capacity(row_sources.len() * col_sources.len() * self.c);
        for (row, col) in row_sources.iter().flat_map(|row| col_sources.iter().map(move |col| (row, col))) {
            match (row, col) {
                (Some(row), Some(col)) => values.extend_from_slice(self.at(*row, *col)),
                _ => values.resize(values.len() + self.c, 0.0),
            }
        }
        Self { classes: [rows, cols], col_classes: col_sources.len(), c: self.c, values }
    }

    /// Batch-norm: every channel times its factor plus its shift.
    pub fn scale_shift(&mut self, factors: &[f64], shifts: &[f64]) {
        for pixel in self.values.chunks_mut(self.c) {
            pixel.iter_mut().zip(factors).zip(shifts).for_each(|((v, f), s)| *v = *v * f + s);
        }
    }

    /// The sum of two responses of one shape.
    pub fn plus(&self, other: &Self) -> Self {
        let (rows, row_pairs) = pairs(&self.classes[0], &other.classes[0]);
        let (cols, col_pairs) = pairs(&self.classes[1], &other.classes[1]);
        let mut values = Vec::new();
        for (r1, r2) in &row_pairs {
            for (c1, c2) in &col_pairs {
                values.extend(self.at(*r1, *c1).iter().zip(other.at(*r2, *c2)).map(|(a, b)| a + b));
            }
        }
        Self { classes: [rows, cols], col_classes: col_pairs.len(), c: self.c, values }
    }

    /// The bias `[c]` where it is the same at every position.
    pub fn uniform(&self) -> Option<&[f64]> {
        let first = &self.values[..self.c];
        self.values.chunks(self.c).all(|pixel| pixel == first).then_some(first)
    }

    /// The bias at every position, `[h, w, c]`.
    pub fn map(&self) -> Vec<f64> {
        let [rows, cols] = &self.classes;
        let mut map = Vec::with_capacity(rows.len() * cols.len() * self.c);
        for (&row, &col) in rows.iter().flat_map(|row| cols.iter().map(move |col| (row, col))) {
            map.extend_from_slice(self.at(row, col));
        }
        map
    }

    fn at(&self, row: usize, col: usize) -> &[f64] {
        &self.values[(row * self.col_classes + col) * self.c..][..self.c]
    }
}

/// Adds one tap of a convolution over the value `x` of one pixel.
fn add_tap(layer: &Layer, v: usize, x: &[f64], out: &mut [f64]) {
    if layer.conv.family() == ConvFamily::Depthwise {
        let w = &layer.weight[v * x.len()..][..x.len()];
        out.iter_mut().zip(w).zip(x).for_each(|((o, w), x)| *o += w * x);
        return;
    }
    for (o, out) in out.iter_mut().enumerate() {
        let (first, w) = layer.row(o, v);
        *out += w.iter().zip(&x[first..]).map(|(w, x)| w * x).sum::<f64>();
    }
}

/// Groups the output lines of one axis of a convolution by what lies under their taps; `pad` is the padding before and after.
fn lines(classes: &[usize], k: usize, stride: usize, pad: [usize; 2]) -> Lines {
    let [before, after] = pad;
    let out = (classes.len() + before + after - k) / stride + 1;
    group((0..out).map(|u| {
        let tap = |v: usize| (u * stride + v).checked_sub(before).and_then(|i| classes.get(i)).copied();
        (0..k).map(tap).collect()
    }))
}

/// Groups the output lines of one axis of a padding by the input class that lies there; `None` is a line of zeros.
fn moved(classes: &[usize], before: isize, after: isize) -> (Vec<usize>, Vec<Option<usize>>) {
    let out = classes.len().saturating_add_signed(before).saturating_add_signed(after);
    group((0..out).map(|u| u.checked_add_signed(-before).and_then(|i| classes.get(i)).copied()))
}

/// Groups the lines of one axis by their pair of classes.
fn pairs(a: &[usize], b: &[usize]) -> (Vec<usize>, Vec<(usize, usize)>) {
    group(a.iter().copied().zip(b.iter().copied()))
}

/// Numbers the distinct keys in order of appearance.
fn group<K: Clone + Eq + std::hash::Hash>(keys: impl Iterator<Item = K>) -> (Vec<usize>, Vec<K>) {
    let mut seen = HashMap::new();
    let mut distinct = Vec::new();
    let classes = keys.map(|key| {
        *seen.entry(key).or_insert_with_key(|key| {
            distinct.push(key.clone());
            distinct.len() - 1
        })
    });
    let classes = classes.collect();
    (classes, distinct)
}
