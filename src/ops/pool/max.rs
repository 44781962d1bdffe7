//! The largest value of each window per channel.

use serde::{Deserialize, Serialize};

use super::{PoolProblem, pooled_shape};
use crate::Result;
use crate::device::{View, ViewMut};
use crate::ops::cuda;
use crate::ops::operation::{LoweredNode, OnnxOperator, Operation, require};
use crate::ops::reused::Reused;
use crate::ops::simd::vectorised;
use crate::ops::step::{Backward, Io, Sink, Step, Uses, ValueId, Work};
use crate::ops::team::each_chunk;
use crate::shape::{Shape, Window};

/// y = the largest x of each window; not-a-number wins over all, as in PyTorch.
pub fn forward(p: &PoolProblem, x: View<'_>, y: ViewMut<'_>) {
    p.check(x.len(), y.len());
    if let View::Gpu(x) = x {
        return cuda::pool::max_forward(p, x, &y.gpu());
    }
    let (x, y) = (x.host(), y.host());
    let (input, output) = (p.input, p.output);
    each_chunk(y, output.w * output.c, |line, y| {
        let image = &x[line / output.h * input.len()..][..input.len()];
        for (col, y) in y.chunks_exact_mut(output.c).enumerate() {
            let (rows, cols) = p.under(line % output.h, col);
            y.fill(f32::NEG_INFINITY);
            for (row, col) in rows.flat_map(|row| cols.clone().map(move |col| (row, col))) {
                let pixel = &image[(row * input.w + col) * input.c..][..input.c];
                vectorised(
                    #[inline(always)]
                    || y.iter_mut().zip(pixel).for_each(|(y, &x)| *y = if wins(x, *y) { x } else { *y }),
                );
            }
        }
    });
}

/// dx (+)= the gradients of the windows in which a pixel is the largest; of equal pixels the first in row-major order is.
/// The sums run over the windows in row-major order.
pub fn backward(p: &PoolProblem, x: View<'_>, dy: View<'_>, dx: ViewMut<'_>, accumulate: bool) {
    p.check(x.len(), dy.len());
    require("a pool", [("dx", dx.len(), x.len())]);
    if let (View::Gpu(x), View::Gpu(dy)) = (x, dy) {
        return cuda::pool::max_backward(p, x, dy, &dx.gpu(), accumulate);
    }
    let (x, dy, dx) = (x.host(), dy.host(), dx.host());
    let (input, output) = (p.input, p.output);
    each_chunk(dx, input.len(), |image, dx| {
        let (x, dy) = (&x[image * input.len()..][..input.len()], &dy[image * output.len()..][..output.len()]);
        if !accumulate {
            dx.fill(0.0);
        }
        let (mut best, mut winner) = (Reused::zeros(input.c), Reused::zeros(input.c));
        for (pixel, dy) in dy.chunks_exact(output.c).enumerate() {
            let (rows, cols) = p.under(pixel / output.w, pixel % output.w);
            best.fill(f32::NEG_INFINITY);
            winner.fill(rows.start * input.w + cols.start);
            for (row, col) in rows.flat_map(|row| cols.clone().map(move |col| (row, col))) {
                let at = row * input.w + col;
                let x = &x[at * input.c..][..input.c];
                vectorised(
                    #[inline(always)]
                    || {
                        for ((best, winner), &x) in best.iter_mut().zip(winner.iter_mut()).zip(x) {
                            (*best, *winner) = if wins(x, *best) { (x, at) } else { (*best, *winner) };
                        }
                    },
                );
            }
            for (c, (&at, dy)) in winner.iter().zip(dy).enumerate() {
                dx[at * input.c + c] += dy;
            }
        }
    });
}

/// Whether a value takes the place of the largest so far.
#[inline(always)]
fn wins(x: f32, best: f32) -> bool {
    x > best || x.is_nan()
}

/// A max-pool in a plan.
#[derive(Debug)]
pub struct MaxPoolStep {
    /// The pool, for one image.
    pub problem: PoolProblem,
    /// Input.
    pub x: ValueId,
    /// Output.
    pub y: ValueId,
}

/// Its backward pass.
#[derive(Debug)]
struct MaxPoolBackward {
    problem: PoolProblem,
    x: ValueId,
    dy: ValueId,
    dx: Sink,
}

impl Step for MaxPoolStep {
    fn describe(&self) -> String {
        format!("max_pool {}x{}", self.problem.window.k_h, self.problem.window.k_w)
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
        to.push(Box::new(MaxPoolBackward { problem: self.problem, x: self.x, dy, dx }));
    }
}

impl Step for MaxPoolBackward {
    fn describe(&self) -> String {
        format!("max_pool {}x{} gradient", self.problem.window.k_h, self.problem.window.k_w)
    }

    /// It reads x to find the winners.
    fn uses(&self) -> Uses {
        Uses::new([self.x, self.dy], []).with([self.dx])
    }

    fn work(&self) -> Work {
        Work::vector((self.problem.output.len() * self.problem.window.taps()) as u64)
    }

    fn run(&self, io: &mut Io<'_>) {
        let (dx, add) = io.write_into(self.dx);
        backward(&self.problem.batch(io.n()), io.read(self.x), io.read(self.dy), dx, add);
    }

    fn gradient(&self, _: &mut dyn Backward) {}
}

/// Largest value of a window per channel; padding is −∞, so it never wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaxPool {
    /// Kernel, stride and padding; the padding is smaller than the kernel.
    pub window: Window,
}

impl Operation for MaxPool {
    fn output_shape(&self, name: &str, inputs: &[Shape]) -> Result<Shape> {
        pooled_shape(self.window, name, inputs[0])
    }

    fn describe(&self) -> String {
        let Window { k_h, k_w, stride_h, stride_w, .. } = self.window;
        format!("max_pool {k_h}x{k_w} s{}", stride_h.max(stride_w))
    }

    fn lower(&self, node: &mut dyn LoweredNode) -> Result<Vec<Box<dyn Step>>> {
        let (input, output) = (node.input_shape(0), node.output_shape());
        let problem = PoolProblem { n: 1, input, output, window: self.window };
        Ok(vec![Box::new(MaxPoolStep { problem, x: node.input(0), y: node.output() })])
    }

    fn onnx(&self) -> Option<OnnxOperator> {
        Some(OnnxOperator { op_type: "MaxPool", attributes: OnnxOperator::window_attributes(&self.window) })
    }
}
