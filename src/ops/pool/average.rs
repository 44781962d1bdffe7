//! The mean of each window per channel; padding does not count, as in PyTorch with `count_include_pad=False`.

use serde::{Deserialize, Serialize};

use super::{PoolProblem, pooled_shape};
use crate::Result;
use crate::device::gpu::{GpuView, GpuViewMut};
use crate::device::{View, ViewMut};
use crate::ops::config::KernelPass;
use crate::ops::cuda::{Call, configured, pool::window};
use crate::ops::operation::{LoweredNode, OnnxOperator, Operation};
use crate::ops::simd::vectorised;
use crate::ops::step::{Backward, Io, Sink, Step, Uses, ValueId, Work};
use crate::ops::team::each_chunk;
use crate::shape::{Shape, Window};

/// y `[n, h_out, w_out, c]` = the mean over the pixels of x `[n, h_in, w_in, c]` that each window holds.
pub fn forward(p: &PoolProblem, x: View<'_>, y: ViewMut<'_>) {
    p.check(x.len(), y.len());
    if let View::Gpu(x) = x {
        return forward_on_gpu(p, x, &y.gpu());
    }
    let (x, y, input, output) = (x.host(), y.host(), p.input, p.output);
    each_chunk(y, output.w * output.c, |line, y| {
        let image = &x[line / output.h * input.len()..][..input.len()];
        for (col, y) in y.chunks_exact_mut(output.c).enumerate() {
            let (rows, cols) = p.under(line % output.h, col);
            let scale = 1.0 / (rows.len() * cols.len()) as f32;
            y.fill(0.0);
            for (row, col) in rows.flat_map(|row| cols.clone().map(move |col| (row, col))) {
                let pixel = &image[(row * input.w + col) * input.c..][..input.c];
                vectorised(
                    #[inline(always)]
                    || y.iter_mut().zip(pixel).for_each(|(y, x)| *y += x),
                );
            }
            y.iter_mut().for_each(|y| *y *= scale);
        }
    });
}

/// dx (+)= dy of each window over the pixels it holds, added over the windows in row-major order.
pub fn backward(p: &PoolProblem, dy: View<'_>, dx: ViewMut<'_>, accumulate: bool) {
    p.check(dx.len(), dy.len());
    if let View::Gpu(dy) = dy {
        return backward_on_gpu(p, dy, &dx.gpu(), accumulate);
    }
    let (dy, dx, input, output) = (dy.host(), dx.host(), p.input, p.output);
    each_chunk(dx, input.len(), |image, dx| {
        let dy = &dy[image * output.len()..][..output.len()];
        if !accumulate {
            dx.fill(0.0);
        }
        for (pixel, dy) in dy.chunks_exact(output.c).enumerate() {
            let (rows, cols) = p.under(pixel / output.w, pixel % output.w);
            let scale = 1.0 / (rows.len() * cols.len()) as f32;
            for (row, col) in rows.flat_map(|row| cols.clone().map(move |col| (row, col))) {
                let dx = &mut dx[(row * input.w + col) * input.c..][..input.c];
                vectorised(
                    #[inline(always)]
                    || dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx += dy * scale),
                );
            }
        }
    });
}

fn forward_on_gpu(p: &PoolProblem, x: GpuView<'_>, y: &GpuViewMut<'_>) {
    let Some(config) = configured(p, KernelPass::Forward, x) else { return };
    Call::new(x.gpu(), config.instance("avg_pool_forward", x.dtype()))
        .reads("x", x, p.n * p.input.len())
        .writes("y", y, p.n * p.output.len())
        .value(window(p))
        .sizes([config.lanes(p.input.c, x.dtype()).lanes])
        .launch(config.window_pool_grid(p, p.output.pixels(), x.dtype()));
}

fn backward_on_gpu(p: &PoolProblem, dy: GpuView<'_>, dx: &GpuViewMut<'_>, accumulate: bool) {
    let Some(config) = configured(p, KernelPass::Backward, dy) else { return };
    Call::new(dy.gpu(), config.instance("avg_pool_backward", dy.dtype()))
        .reads("dy", dy, p.n * p.output.len())
        .writes("dx", dx, p.n * p.input.len())
        .value(i32::from(accumulate))
        .value(window(p))
        .sizes([config.lanes(p.input.c, dy.dtype()).lanes])
        .launch(config.window_pool_grid(p, p.input.pixels(), dy.dtype()));
}

/// An average pool in a plan.
#[derive(Debug)]
pub struct AvgPoolStep {
    /// The pool, for one image.
    pub problem: PoolProblem,
    /// Input.
    pub x: ValueId,
    /// Output.
    pub y: ValueId,
}

/// Its backward pass.
#[derive(Debug)]
struct AvgPoolBackward {
    problem: PoolProblem,
    dy: ValueId,
    dx: Sink,
}

impl Step for AvgPoolStep {
    fn describe(&self) -> String {
        format!("avg_pool {}x{}", self.problem.window.k_h, self.problem.window.k_w)
    }

    fn uses(&self) -> Uses {
        Uses::new([self.x], [self.y])
    }

    fn work(&self) -> Work {
        Work::vector((self.problem.output.len() * self.problem.window.taps()) as u64)
    }

    fn run(&self, io: &mut Io<'_>) {
        forward(&self.problem.batch(io.n()), io.read(self.x), io.write(self.y));
    }

    fn gradient(&self, to: &mut dyn Backward) {
        let (Some(dy), Some(dx)) = (to.stored(self.y), to.sink(self.x)) else { return };
        to.push(Box::new(AvgPoolBackward { problem: self.problem, dy, dx }));
    }
}

impl Step for AvgPoolBackward {
    fn describe(&self) -> String {
        format!("avg_pool {}x{} gradient", self.problem.window.k_h, self.problem.window.k_w)
    }

    fn uses(&self) -> Uses {
        Uses::new([self.dy], []).with([self.dx])
    }

    fn work(&self) -> Work {
        Work::vector((self.problem.output.len() * self.problem.window.taps()) as u64)
    }

    fn run(&self, io: &mut Io<'_>) {
        let (dx, add) = io.write_into(self.dx);
        backward(&self.problem.batch(io.n()), io.read(self.dy), dx, add);
    }

    fn gradient(&self, _: &mut dyn Backward) {}
}

/// The mean of a window per channel, over the pixels that it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AvgPool {
    /// Kernel, stride and padding; the padding is smaller than the kernel.
    pub window: Window,
}

impl Operation for AvgPool {
    fn output_shape(&self, name: &str, inputs: &[Shape]) -> Result<Shape> {
        pooled_shape(self.window, name, inputs[0])
    }

    fn describe(&self) -> String {
        let Window { k_h, k_w, stride_h, stride_w, .. } = self.window;
        format!("avg_pool {k_h}x{k_w} s{}", stride_h.max(stride_w))
    }

    fn lower(&self, node: &mut dyn LoweredNode) -> Result<Vec<Box<dyn Step>>> {
        let (input, output) = (node.input_shape(0), node.output_shape());
        let problem = PoolProblem { n: 1, input, output, window: self.window };
        Ok(vec![Box::new(AvgPoolStep { problem, x: node.input(0), y: node.output() })])
    }

    /// ONNX leaves padding out of the mean too, unless told otherwise.
    fn onnx(&self) -> Option<OnnxOperator> {
        Some(OnnxOperator { op_type: "AveragePool", attributes: OnnxOperator::window_attributes(&self.window) })
    }
}
