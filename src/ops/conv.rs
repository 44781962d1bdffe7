//! Convolution: its description, the problem that all three families share, and the choice among them.
//!
//! x `[n, h_in, w_in, c_in]`, y `[n, h_out, w_out, c_out]`; weights in the layout of the family
//! ([`ConvFamily`]). Cross-correlation: y[o, u] = Σ w[o, c, v]·x[c, s·u + v − p].

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::activation::Clamp;
use super::batch_norm::GradientSums;
use super::conv_input::{ConvInput, Source};
use super::parallel::tiled;
use super::simd::vectorised;
use super::{cuda, dense, depthwise, pointwise};
use crate::device::gpu::GpuView;
use crate::device::{View, ViewMut};
use crate::shape::{Shape, Window};

/// What a convolution adds to its sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// Nothing.
    None,
    /// One number per output channel, shape `[c_out]`.
    Channel,
    /// One number per output position and channel, shape `[h_out, w_out, c_out]`: what an exactly merged block needs
    /// whose inner convolution zero-pads (border bias).
    Map,
}

/// A convolution without dilation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conv {
    /// Channels in.
    pub c_in: usize,
    /// Channels out.
    pub c_out: usize,
    /// Kernel, stride, padding.
    pub window: Window,
    /// Channel groups; `c_in` for a depthwise convolution.
    pub groups: usize,
    /// Bias.
    pub bias: Bias,
}

/// Which kernel family computes a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConvFamily {
    /// One filter per channel; weights `[k_h, k_w, c]`.
    Depthwise,
    /// 1×1, stride 1, no padding, one group; weights `[c_out, c_in]`.
    Pointwise,
    /// All others; weights `[c_out, k_h, k_w, c_in / groups]`.
    Dense,
}

impl Conv {
    /// The kernel family this convolution belongs to.
    pub fn family(&self) -> ConvFamily {
        if self.groups > 1 && self.groups == self.c_in && self.c_in == self.c_out {
            ConvFamily::Depthwise
        } else if self.groups == 1 && self.window == Window::square(1, 1, 0) {
            ConvFamily::Pointwise
        } else {
            ConvFamily::Dense
        }
    }

    /// Dimensions of the weights, in the layout of the family.
    pub fn weight_shape(&self) -> Vec<usize> {
        let Self { c_in, c_out, window: Window { k_h, k_w, .. }, groups, .. } = *self;
        match self.family() {
            ConvFamily::Depthwise => vec![k_h, k_w, c_in],
            ConvFamily::Pointwise => vec![c_out, c_in],
            ConvFamily::Dense => vec![c_out, k_h, k_w, c_in / groups],
        }
    }

    /// The last part of the bias's parameter name and its dimensions, where there is a bias; `output` is the shape of the
    /// convolution's result.
    pub fn bias_param(&self, output: Shape) -> Option<(&'static str, Vec<usize>)> {
        match self.bias {
            Bias::None => None,
            Bias::Channel => Some(("bias", vec![self.c_out])),
            Bias::Map => Some(("bias_map", vec![output.h, output.w, self.c_out])),
        }
    }

    /// Multiply-accumulates per output pixel.
    pub fn macs_per_pixel(&self) -> u64 {
        (self.window.taps() * (self.c_in / self.groups) * self.c_out) as u64
    }
}

/// One convolution over one batch: everything a kernel, a cost model or a bench needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConvProblem {
    /// Images.
    pub n: usize,
    /// One image of the input.
    pub input: Shape,
    /// One image of the output.
    pub output: Shape,
    /// Kernel, stride, padding.
    pub window: Window,
    /// Channel groups.
    pub groups: usize,
}

impl ConvProblem {
    /// The problem of a convolution; `None` where the kernel does not fit the input.
    pub fn new(conv: &Conv, input: Shape, n: usize) -> Option<Self> {
        let (h, w) = conv.window.output(input.h, input.w)?;
        Some(Self { n, input, output: Shape::new(h, w, conv.c_out), window: conv.window, groups: conv.groups })
    }

    /// The description back.
    fn conv(&self) -> Conv {
        Conv { c_in: self.input.c, c_out: self.output.c, window: self.window, groups: self.groups, bias: Bias::None }
    }

    /// The kernel family.
    pub fn family(&self) -> ConvFamily {
        self.conv().family()
    }

    /// Multiply-accumulates of the forward pass over the batch; each gradient takes as many.
    pub fn macs(&self) -> u64 {
        self.conv().macs_per_pixel() * (self.n * self.output.pixels()) as u64
    }

    /// Number of weights.
    pub fn weight_len(&self) -> usize {
        self.window.taps() * (self.input.c / self.groups) * self.output.c
    }

    /// Elements the forward pass moves at least: input, output and weights once.
    pub fn min_elements(&self) -> u64 {
        (self.n * (self.input.len() + self.output.len()) + self.weight_len()) as u64
    }

    /// Lines, pixels per line and channels of the output.
    pub(super) fn output_lines(&self) -> (usize, usize, usize) {
        (self.n * self.output.h, self.output.w, self.output.c)
    }
}

/// What is added to a convolution's sums.
#[derive(Debug, Clone, Copy)]
pub enum ConvBias<'a> {
    /// Nothing.
    None,
    /// `[c_out]`.
    Channel(View<'a>),
    /// `[h_out, w_out, c_out]`.
    Map(View<'a>),
}

/// y = conv(x, w), then bias, residual `[n, h_out, w_out, c_out]` and activation on each piece while it is in cache.
pub fn forward(
    p: &ConvProblem,
    (x, w): (View<'_>, View<'_>),
    bias: ConvBias<'_>,
    residual: Option<View<'_>>,
    clamp: Option<Clamp>,
    y: ViewMut<'_>,
) {
    if let View::Gpu(x) = x {
        let bias = match bias {
            ConvBias::None => None,
            ConvBias::Channel(b) => Some((b.gpu(), 1)),
            ConvBias::Map(b) => Some((b.gpu(), p.output.pixels())),
        };
        let epilogue = cuda::conv::Epilogue { bias, residual: residual.map(View::gpu), clamp };
        return cuda::conv::forward(p, x, w.gpu(), epilogue, &y.gpu());
    }
    let residual = residual.map(View::host);
    let clamp = clamp.unwrap_or(Clamp::NONE);
    // A channel bias is a map of a few pixels; both repeat over the elements.
    let tile;
    let map = match bias {
        ConvBias::None => None,
        ConvBias::Channel(b) => {
            tile = tiled(b.host());
            Some(&tile[..])
        }
        ConvBias::Map(b) => Some(b.host()),
    };
    let finish = |range: Range<usize>, y: &mut [f32]| {
        if map.is_none() && residual.is_none() && clamp.slope == 1.0 {
            return;
        }
        vectorised(
            #[inline(always)]
            || {
                if let Some(map) = map {
                    let (head, rest) = y.split_at_mut((map.len() - range.start % map.len()).min(y.len()));
                    head.iter_mut().zip(&map[range.start % map.len()..]).for_each(|(y, b)| *y += b);
                    for y in rest.chunks_mut(map.len()) {
                        y.iter_mut().zip(map).for_each(|(y, b)| *y += b);
                    }
                }
                if let Some(residual) = residual {
                    y.iter_mut().zip(&residual[range]).for_each(|(y, r)| *y += r);
                }
                if clamp.slope != 1.0 {
                    y.iter_mut().for_each(|y| *y = clamp.apply(*y));
                }
            },
        );
    };
    forward_with(p, &Source::new(ConvInput::Stored(x), p.input.w), w.host(), y.host(), finish);
}

/// Gradients of a plain convolution: dx (+)= where asked for, dw written, db `[c_out]` or the map's `[h, w, c]`.
pub fn backward(
    p: &ConvProblem,
    (x, w, dy): (View<'_>, View<'_>, View<'_>),
    dx: Option<(ViewMut<'_>, bool)>,
    dw: ViewMut<'_>,
    db: Option<ViewMut<'_>>,
) {
    if let View::Gpu(x) = x {
        let dy = dy.gpu();
        if let Some(db) = db {
            let (db, pixels) = (db.gpu(), p.n * p.output.pixels());
            if db.view().len() == p.output.c {
                cuda::conv::bias_gradient((pixels, p.output.c), dy, &db);
            } else {
                cuda::conv::bias_map_gradient((p.n, p.output.len()), dy, &db);
            }
        }
        return gpu_gradients(p, x, w, dy, dx, dw);
    }
    let dy = dy.host();
    if let Some(db) = db {
        let db = db.host();
        db.fill(0.0);
        for dy in dy[..p.n * p.output.len()].chunks_exact(db.len()) {
            db.iter_mut().zip(dy).for_each(|(db, dy)| *db += dy);
        }
    }
    let dx = dx.map(|(dx, accumulate)| (dx.host(), accumulate));
    let load = |range: Range<usize>, out: &mut [f32]| out.copy_from_slice(&dy[range]);
    backward_with(p, &Source::new(ConvInput::Stored(x), p.input.w), w.host(), load, dx, dw.host());
}

/// dx (+)= the input gradient alone, which only a GPU has a kernel for: the host forms both gradients in one walk.
pub fn gpu_input_gradient(p: &ConvProblem, dy: GpuView<'_>, w: GpuView<'_>, dx: (ViewMut<'_>, bool)) {
    cuda::conv::input_gradient(p, dy, w, &dx.0.gpu(), dx.1);
}

/// Both gradients on a GPU.
pub(super) fn gpu_gradients(
    p: &ConvProblem,
    x: GpuView<'_>,
    w: View<'_>,
    dy: GpuView<'_>,
    dx: Option<(ViewMut<'_>, bool)>,
    dw: ViewMut<'_>,
) {
    if let Some((dx, accumulate)) = dx {
        cuda::conv::input_gradient(p, dy, w.gpu(), &dx.gpu(), accumulate);
    }
    cuda::conv::weight_gradient(p, x, dy, &dw.gpu());
}

/// The forward pass in chunks; `finish` sees each chunk's elements and their range while they are in cache, and its
/// answers come back in chunk order.
pub(super) fn forward_with<R: Send>(
    p: &ConvProblem,
    x: &Source<'_>,
    w: &[f32],
    y: &mut [f32],
    finish: impl Fn(Range<usize>, &mut [f32]) -> R + Sync,
) -> Vec<R> {
    assert!(x.len() >= p.n * p.input.len() && w.len() == p.weight_len(), "convolution operand too short");
    let y = &mut y[..p.n * p.output.len()];
    match p.family() {
        ConvFamily::Pointwise => pointwise::forward(p, x, w, y, finish),
        ConvFamily::Depthwise => depthwise::forward(p, x, w, y, finish),
        ConvFamily::Dense => dense::forward(p, x, w, y, finish),
    }
}

/// Both gradients in one walk; `load` forms dy for a range of output elements, so that a fused batch-norm and
/// activation backward never stores it. Returns the sums over the gradient of an input that was normalised on load.
pub(super) fn backward_with(
    p: &ConvProblem,
    x: &Source<'_>,
    w: &[f32],
    load: impl Fn(Range<usize>, &mut [f32]) + Sync,
    dx: Option<(&mut [f32], bool)>,
    dw: &mut [f32],
) -> Option<GradientSums> {
    assert!(x.len() >= p.n * p.input.len() && w.len() == p.weight_len(), "convolution operand too short");
    assert!(dw.len() == p.weight_len(), "weight gradient of another size");
    let dx = dx.map(|(dx, accumulate)| (&mut dx[..p.n * p.input.len()], accumulate));
    match p.family() {
        ConvFamily::Pointwise => pointwise::backward(p, x, w, load, dx, dw),
        ConvFamily::Depthwise => depthwise::backward(p, x, w, load, dx, dw),
        ConvFamily::Dense => dense::backward(p, x, w, load, dx, dw),
    }
}
