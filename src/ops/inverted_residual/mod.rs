//! The inverted residual as one operation, for inference (`docs/kernels.md` b):
//! y = φ₃(W₃·φ₂(w₂ ∗ φ₁(W₁·x + b₁) + b₂) + b₃ + residual).
//!
//! x `[n, h_in, w_in, c_in]`, y `[n, h_out, w_out, c_out]`; W₁ `[hidden, c_in]`, w₂ `[k_h, k_w, hidden]`, W₃
//! `[c_out, hidden]`; batch norms are folded into weights and biases beforehand. The hidden values, `hidden` channels
//! before and after the depthwise convolution, are formed in slices of channels for a band (on a GPU: a tile) of output
//! pixels at a time and are never stored whole: x is read and y written, and what three operations move between them is
//! not moved. A block without expansion (t = 1) is the same with x in the place of φ₁(…).
//!
//! Rows of hidden values at the border of two bands are formed for both.

mod config;
mod cuda;
mod host;
mod step;

pub use config::{BandConfig, BandRows, InvertedResidualConfig, TileConfig};
pub use step::{InvertedResidualStep, PlannedConv};

use super::activation::Clamp;
use super::config::KernelTarget;
use super::conv::ConvProblem;
use super::step::Backend;
use crate::device::{View, ViewMut};
use crate::shape::{Shape, Window};

/// Hidden channels up to which one step is sooner through than three on a GPU where it runs in tiles.
const MOST_HIDDEN: usize = 192;

/// One inverted residual over one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InvertedResidualProblem {
    /// Images.
    pub n: usize,
    /// One image of the input.
    pub input: Shape,
    /// Channels of the depthwise convolution.
    pub hidden: usize,
    /// One image of the output.
    pub output: Shape,
    /// Kernel, stride and padding of the depthwise convolution.
    pub window: Window,
    /// Whether there is a 1×1 expansion; without, `hidden` is the input's channels.
    pub has_expand: bool,
}

/// A convolution of the block, with the batch norm after it folded in.
#[derive(Debug, Clone, Copy)]
pub struct FoldedConv<'a> {
    /// Weights, in the layout of the convolution's family.
    pub w: View<'a>,
    /// Bias, one `f32` per output channel.
    pub b: View<'a>,
    /// The activation after it, [`Clamp::NONE`] for none. Its slope is a constant: none that a GPU reads anew.
    pub clamp: Clamp,
}

/// What an inverted residual reads.
#[derive(Debug, Clone, Copy)]
pub struct InvertedResidualOperands<'a> {
    /// `[n, h_in, w_in, c_in]`.
    pub x: View<'a>,
    /// Weights `[hidden, c_in]`; there where the problem has an expansion.
    pub expand: Option<FoldedConv<'a>>,
    /// Weights `[k_h, k_w, hidden]`.
    pub depthwise: FoldedConv<'a>,
    /// Weights `[c_out, hidden]`; the activation comes after the residual.
    pub project: FoldedConv<'a>,
    /// `[n, h_out, w_out, c_out]`, added to the projection: x itself in a block with a shortcut.
    pub residual: Option<View<'a>>,
}

impl InvertedResidualProblem {
    /// The problem of `n` images; `hidden` is `None` for a block without expansion. `None` comes back where the window
    /// does not fit the input.
    pub fn new(n: usize, input: Shape, hidden: Option<usize>, c_out: usize, window: Window) -> Option<Self> {
        let (h, w) = window.output(input.h, input.w)?;
        let (has_expand, hidden) = (hidden.is_some(), hidden.unwrap_or(input.c));
        Some(Self { n, input, hidden, output: Shape::new(h, w, c_out), window, has_expand })
    }

    /// Whether a backend has a step for it: on a GPU, a square window of 3 or 5 with stride 1 or 2; on the host, any.
    pub fn has_step(&self, backend: Backend) -> bool {
        let Window { k_h, k_w, stride_h, stride_w, .. } = self.window;
        let has_kernel = k_h == k_w && stride_h == stride_w && [3, 5].contains(&k_h) && [1, 2].contains(&stride_h);
        backend == Backend::Host || has_kernel
    }

    /// Whether one step is sooner through than three. On a GPU that is what the machine code asks of each unit of a V100
    /// (`docs/kernels.md` b): bands of rows pay wherever there are kernels for them; in tiles the larger windows form most
    /// hidden values twice, and many hidden channels make the products around them, not memory, the bound.
    pub fn pays(&self, backend: Backend, on: KernelTarget) -> bool {
        let in_tiles = self.window.k_h == 3 && self.hidden <= MOST_HIDDEN;
        backend == Backend::Host || in_tiles || BandConfig::choose(self, on).is_some()
    }

    /// The expansion on its own, where there is one.
    pub fn expand(&self) -> Option<ConvProblem> {
        let output = Shape { c: self.hidden, ..self.input };
        let window = Window::square(1, 1, 0);
        self.has_expand.then_some(ConvProblem { n: self.n, input: self.input, output, window, groups: 1 })
    }

    /// The depthwise convolution on its own.
    pub fn depthwise(&self) -> ConvProblem {
        let (input, output) = (Shape { c: self.hidden, ..self.input }, Shape { c: self.hidden, ..self.output });
        ConvProblem { n: self.n, input, output, window: self.window, groups: self.hidden }
    }

    /// The projection on its own.
    pub fn project(&self) -> ConvProblem {
        let input = Shape { c: self.hidden, ..self.output };
        ConvProblem { n: self.n, input, output: self.output, window: Window::square(1, 1, 0), groups: 1 }
    }

    fn convs(&self) -> impl Iterator<Item = ConvProblem> {
        self.expand().into_iter().chain([self.depthwise(), self.project()])
    }

    /// Multiply-accumulates of the three convolutions over the batch. What is formed twice at the border of bands and
    /// tiles is not counted.
    pub fn macs(&self) -> u64 {
        self.convs().map(|conv| conv.macs()).sum()
    }

    /// Floating-point operations: two per multiply-accumulate.
    pub fn flops(&self) -> u64 {
        2 * self.macs()
    }

    /// Number of weights of the three convolutions.
    pub fn weight_len(&self) -> usize {
        self.convs().map(|conv| conv.weight_len()).sum()
    }

    /// Elements that are moved at least: input, output and weights once, and no hidden value.
    pub fn min_elements(&self) -> u64 {
        (self.n * (self.input.len() + self.output.len()) + self.weight_len()) as u64
    }

    /// Stops where operands are not those of the problem: everything after relies on it.
    fn require(&self, of: &InvertedResidualOperands<'_>, y: usize) {
        let (len_in, len) = (self.n * self.input.len(), self.n * self.output.len());
        assert!(of.x.len() >= len_in && y >= len, "activation of an inverted residual too short");
        assert!(of.residual.is_none_or(|r| r.len() >= len), "residual of an inverted residual too short");
        assert_eq!(of.expand.is_some(), self.has_expand, "an expansion in the problem or in the operands alone");
        assert!(self.has_expand || self.hidden == self.input.c, "without expansion, hidden channels are the input's");
        for (conv, operand) in self.convs().zip(of.expand.iter().chain([&of.depthwise, &of.project])) {
            let fits = operand.w.len() == conv.weight_len() && operand.b.len() == conv.output.c;
            assert!(fits, "parameters of an inverted residual of another size");
        }
    }
}

/// y = the block's result. On a GPU `p.has_step` must hold, and y may overlap no operand.
pub fn forward(p: &InvertedResidualProblem, of: InvertedResidualOperands<'_>, y: ViewMut<'_>) {
    p.require(&of, y.len());
    match of.x {
        View::Gpu(x) => cuda::forward(p, x, &of, &y.gpu()),
        _ => host::forward(p, &of, y.host()),
    }
}
