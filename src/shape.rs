//! Shapes of activations and of convolution windows.

use serde::{Deserialize, Serialize};

/// One image's activation: height, width and channels, laid out HWC. The batch is not part of a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
    /// Channels.
    pub c: usize,
}

impl Shape {
    /// A shape from height, width and channels.
    pub const fn new(h: usize, w: usize, c: usize) -> Self {
        Self { h, w, c }
    }

    /// Number of elements.
    pub const fn len(self) -> usize {
        self.h * self.w * self.c
    }

    /// Whether the shape holds no element at all.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Number of pixels.
    pub const fn pixels(self) -> usize {
        self.h * self.w
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}x{}", self.h, self.w, self.c)
    }
}

/// A batch of activations as lines of pixels, `[lines, w, c]`: all that work which looks at one pixel at a time knows of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lines {
    /// Rows of all images.
    pub lines: usize,
    /// Pixels per line.
    pub w: usize,
    /// Channels.
    pub c: usize,
}

impl Lines {
    /// A batch of `n` images.
    pub const fn of(image: Shape, n: usize) -> Self {
        Self { lines: n * image.h, w: image.w, c: image.c }
    }

    /// Number of pixels.
    pub const fn pixels(self) -> usize {
        self.lines * self.w
    }

    /// Number of elements.
    pub const fn len(self) -> usize {
        self.pixels() * self.c
    }

    /// Whether there is no element at all.
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// Zero padding of each side, in pixels. Asymmetric for TensorFlow's "same" padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Padding {
    /// Rows above.
    pub top: usize,
    /// Columns to the left.
    pub left: usize,
    /// Rows below.
    pub bottom: usize,
    /// Columns to the right.
    pub right: usize,
}

impl Padding {
    /// No padding.
    pub const ZERO: Self = Self::all(0);

    /// The same padding on all four sides.
    pub const fn all(p: usize) -> Self {
        Self { top: p, left: p, bottom: p, right: p }
    }
}

/// How a convolution slides: kernel, stride and padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Kernel height.
    pub k_h: usize,
    /// Kernel width.
    pub k_w: usize,
    /// Vertical stride.
    pub stride_h: usize,
    /// Horizontal stride.
    pub stride_w: usize,
    /// Zero padding.
    pub pad: Padding,
}

impl Window {
    /// A square kernel `k` with stride `s` and symmetric padding `p`.
    pub const fn square(k: usize, s: usize, p: usize) -> Self {
        Self { k_h: k, k_w: k, stride_h: s, stride_w: s, pad: Padding::all(p) }
    }

    /// Number of taps.
    pub const fn taps(self) -> usize {
        self.k_h * self.k_w
    }

    /// Rows and columns that come out of an `h` × `w` input, or `None` where the kernel does not fit.
    pub fn output(self, h: usize, w: usize) -> Option<(usize, usize)> {
        let h = (h + self.pad.top + self.pad.bottom).checked_sub(self.k_h)? / self.stride_h + 1;
        let w = (w + self.pad.left + self.pad.right).checked_sub(self.k_w)? / self.stride_w + 1;
        Some((h, w))
    }
}

/// Extents of a product of an m×k and a k×n matrix.
#[derive(Debug, Clone, Copy)]
pub struct GemmSize {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
}
