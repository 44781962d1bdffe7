//! The algebra of affine maps on images in f64: convolutions one behind the other, batch-norm, and sums
//! (`docs/methods.md` 1.4).

use rayon::prelude::*;

use super::product::{Rows, add_product};
use crate::graph::{Conv, ConvFamily, Pad, Span};
use crate::shape::GemmSize;

/// A convolution with its weights in f64, in the layout of its family.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Channels, window and groups; the bias kind is not looked at.
    pub conv: Conv,
    /// Depthwise `[k_h, k_w, c]`, all others `[c_out, k_h, k_w, c_in / groups]`.
    pub weight: Vec<f64>,
    /// `[c_out]`, zeros where there is none.
    pub bias: Vec<f64>,
}

/// The taps of a [`Kernel`].
#[derive(Debug, Clone, PartialEq)]
pub enum Taps {
    /// `[k_h, k_w, c]`.
    Depthwise(Vec<f64>),
    /// `[k_h, k_w, c_out, c_in]`: by tap first, so that a composition is one matrix product per pair of taps.
    Dense(Vec<f64>),
}

/// The linear part of an affine map from a segment's input to one of its values.
#[derive(Debug, Clone, PartialEq)]
pub struct Kernel {
    /// Channels of the segment's input.
    pub c_in: usize,
    /// Channels of the value.
    pub c_out: usize,
    /// Kernel size, stride and padding.
    pub span: Span,
    /// The weights.
    pub taps: Taps,
}

impl Kernel {
    /// The map from a value of `c` channels to itself.
    pub fn identity(c: usize) -> Self {
        Self { c_in: c, c_out: c, span: Span::IDENTITY, taps: Taps::Depthwise(vec![1.0; c]) }
    }

    /// One more convolution behind this map: W21\[o,c,t] = Σ_m Σ_v W2\[o,m,v]·W1\[m,c,t − s1·v]. Depthwise behind
    /// depthwise stays depthwise, all else is dense.
    pub fn then(&self, layer: &Layer) -> Self {
        let conv = &layer.conv;
        let span = self.span.then(conv.window);
        let taps = span.kernel[0] * span.kernel[1];
        let dense = !(conv.family() == ConvFamily::Depthwise && matches!(self.taps, Taps::Depthwise(_)));
        let per_tap = if dense { conv.c_out * self.c_in } else { self.c_in };
        let mut data = vec![0.0; taps * per_tap];
        // One output tap per task, its sum taken in the order of v: the same bits for any number of threads.
        data.par_chunks_mut(per_tap.max(1)).enumerate().for_each(|(t, out)| {
            let (row, col) = (t / span.kernel[1], t % span.kernel[1]);
            for v in 0..conv.window.taps() {
                let (v_row, v_col) = (v / conv.window.k_w, v % conv.window.k_w);
                let row = row.checked_sub(v_row * self.span.stride[0]).filter(|&r| r < self.span.kernel[0]);
                let col = col.checked_sub(v_col * self.span.stride[1]).filter(|&c| c < self.span.kernel[1]);
                if let (Some(row), Some(col)) = (row, col) {
                    self.add_tap(row * self.span.kernel[1] + col, layer, v, out);
                }
            }
        });
        let taps = if dense { Taps::Dense(data) } else { Taps::Depthwise(data) };
        Self { c_in: self.c_in, c_out: conv.c_out, span, taps }
    }

    /// The map behind a padding; `None` as of [`Span::padded`].
    pub fn padded(&self, pad: Pad) -> Option<Self> {
        Some(Self { span: self.span.padded(pad)?, ..self.clone() })
    }

    /// Adds tap `v` of the layer times tap `u` of this map to one tap of the result.
    fn add_tap(&self, u: usize, layer: &Layer, v: usize, out: &mut [f64]) {
        let conv = &layer.conv;
        let (m, c) = (conv.c_in, self.c_in);
        match (&self.taps, conv.family()) {
            (Taps::Depthwise(own), ConvFamily::Depthwise) => {
                let (own, w) = (&own[u * c..][..c], &layer.weight[v * m..][..m]);
                out.iter_mut().zip(own).zip(w).for_each(|((o, a), b)| *o += a * b);
            }
            (Taps::Dense(own), ConvFamily::Depthwise) => {
                let own = &own[u * m * c..][..m * c];
                for ((out, own), w) in out.chunks_mut(c).zip(own.chunks(c)).zip(&layer.weight[v * m..][..m]) {
                    out.iter_mut().zip(own).for_each(|(o, a)| *o += w * a);
                }
            }
            (Taps::Depthwise(own), _) => {
                let own = &own[u * c..][..c];
                for (o, out) in out.chunks_mut(c).enumerate() {
                    let (first, w) = layer.row(o, v);
                    let group = first..first + w.len();
                    out[group.clone()].iter_mut().zip(&own[group]).zip(w).for_each(|((o, a), b)| *o += a * b);
                }
            }
            (Taps::Dense(own), _) => {
                let (group_out, group_in) = (conv.c_out / conv.groups, m / conv.groups);
                let taps = conv.window.taps();
                for g in 0..conv.groups {
                    let w = &layer.weight[(g * group_out * taps + v) * group_in..];
                    let a = Rows { data: w, stride: taps * group_in };
                    let b = Rows { data: &own[(u * m + g * group_in) * c..], stride: c };
                    let size = GemmSize { m: group_out, n: c, k: group_in };
                    add_product(size, a, b, &mut out[g * group_out * c..], c);
                }
            }
        }
    }

    /// Multiplies every output channel by its own factor, as a batch-norm does.
    pub fn scale(&mut self, factors: &[f64]) {
        match &mut self.taps {
            Taps::Depthwise(data) => {
                data.chunks_mut(factors.len()).for_each(|tap| tap.iter_mut().zip(factors).for_each(|(w, f)| *w *= f));
            }
            Taps::Dense(data) => {
                for (row, factor) in data.chunks_mut(self.c_in).zip(factors.iter().cycle()) {
                    row.iter_mut().for_each(|w| *w *= factor);
                }
            }
        }
    }

    /// The sum of two maps, taps P on one another: a residual adds 1 to the tap at P, a projection its weights.
    /// `None` where strides or channels differ.
    pub fn plus(&self, other: &Self) -> Option<Self> {
        let span = self.span.join(other.span).filter(|_| (self.c_in, self.c_out) == (other.c_in, other.c_out))?;
        let dense = matches!(self.taps, Taps::Dense(_)) || matches!(other.taps, Taps::Dense(_));
        let per_tap = if dense { self.c_out * self.c_in } else { self.c_in };
        let mut data = vec![0.0; span.kernel[0] * span.kernel[1] * per_tap];
        for part in [self, other] {
            part.add_into(span, dense, &mut data);
        }
        let taps = if dense { Taps::Dense(data) } else { Taps::Depthwise(data) };
        Some(Self { c_in: self.c_in, c_out: self.c_out, span, taps })
    }

    fn add_into(&self, span: Span, dense: bool, data: &mut [f64]) {
        let per_tap = if dense { self.c_out * self.c_in } else { self.c_in };
        for u in 0..self.span.kernel[0] * self.span.kernel[1] {
            let row = u / self.span.kernel[1] + span.pad[0] - self.span.pad[0];
            let col = u % self.span.kernel[1] + span.pad[1] - self.span.pad[1];
            let out = &mut data[(row * span.kernel[1] + col) * per_tap..][..per_tap];
            match &self.taps {
                Taps::Depthwise(own) if dense => {
                    let own = &own[u * self.c_in..][..self.c_in];
                    own.iter().enumerate().for_each(|(i, w)| out[i * self.c_in + i] += w);
                }
                Taps::Depthwise(own) | Taps::Dense(own) => {
                    out.iter_mut().zip(&own[u * per_tap..][..per_tap]).for_each(|(o, w)| *o += w);
                }
            }
        }
    }

    /// The weights in the layout of a convolution: depthwise `[k_h, k_w, c]`, dense `[c_out, k_h, k_w, c_in]`.
    pub fn weight(&self) -> Vec<f64> {
        match &self.taps {
            Taps::Depthwise(data) => data.clone(),
            Taps::Dense(data) => {
                let tap = self.c_out * self.c_in;
                let row = |o: usize| data.chunks(tap).flat_map(move |t| t[o * self.c_in..][..self.c_in].iter());
                (0..self.c_out).flat_map(row).copied().collect()
            }
        }
    }

    /// Channel groups of the convolution: one per channel where every member was depthwise.
    pub fn groups(&self) -> usize {
        if matches!(self.taps, Taps::Depthwise(_)) { self.c_in } else { 1 }
    }
}

impl Layer {
    /// Row `o` of tap `v` of a convolution that is not depthwise: its first input channel and its weights.
    pub(super) fn row(&self, o: usize, v: usize) -> (usize, &[f64]) {
        let Conv { c_in, c_out, groups, window, .. } = self.conv;
        let group_in = c_in / groups;
        (o / (c_out / groups) * group_in, &self.weight[(o * window.taps() + v) * group_in..][..group_in])
    }
}
