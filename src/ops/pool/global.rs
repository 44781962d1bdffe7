//! The mean over all pixels: y[n, c] = mean of x[n, h·w, c].

use crate::Result;
use crate::device::{View, ViewMut};
use crate::ops::config::GlobalPoolProblem;
use crate::ops::cuda;
use crate::ops::operation::{LoweredNode, OnnxOperator, Operation, require};
use crate::ops::simd::vectorised;
use crate::ops::step::{Backward, Io, Sink, Step, Uses, ValueId, Work};
use crate::ops::team::each_chunk;
use crate::shape::Shape;

/// y `[n, c]` = mean over the pixels of x `[n, h, w, c]`, whose images have the shape `input`.
pub fn forward(input: Shape, x: View<'_>, y: ViewMut<'_>) {
    let (pixels, c) = check(input, x.len(), y.len());
    if let View::Gpu(x) = x {
        return cuda::pool::forward(GlobalPoolProblem { n: y.len() / c, pixels, c }, x, &y.gpu());
    }
    let (x, y) = (x.host(), y.host());
    let scale = 1.0 / pixels as f32;
    each_chunk(y, c, |image, y| {
        let x = &x[image * pixels * c..][..pixels * c];
        vectorised(
            #[inline(always)]
            || {
                y.fill(0.0);
                for pixel in x.chunks_exact(c) {
                    y.iter_mut().zip(pixel).for_each(|(y, x)| *y += x);
                }
                y.iter_mut().for_each(|y| *y *= scale);
            },
        );
    });
}

/// dx (+)= dy / pixels, the same for every pixel.
pub fn backward(input: Shape, dy: View<'_>, dx: ViewMut<'_>, accumulate: bool) {
    let (pixels, c) = check(input, dx.len(), dy.len());
    if let View::Gpu(dy) = dy {
        return cuda::pool::backward(GlobalPoolProblem { n: dy.len() / c, pixels, c }, dy, &dx.gpu(), accumulate);
    }
    let (dy, dx) = (dy.host(), dx.host());
    let scale = 1.0 / pixels as f32;
    each_chunk(dx, pixels * c, |image, dx| {
        let dy = &dy[image * c..][..c];
        vectorised(
            #[inline(always)]
            || {
                for pixel in dx.chunks_exact_mut(c) {
                    for (dx, dy) in pixel.iter_mut().zip(dy) {
                        *dx = if accumulate { *dx } else { 0.0 } + dy * scale;
                    }
                }
            },
        );
    });
}

/// Pixels and channels of operands that fit each other.
fn check(input: Shape, x: usize, y: usize) -> (usize, usize) {
    let n = y / input.c;
    require("a global pool", [("x", x, n * input.len()), ("y", y, n * input.c)]);
    (input.pixels(), input.c)
}

/// The mean over pixels in a plan.
#[derive(Debug)]
pub struct GlobalPoolStep {
    /// One image of x.
    pub input: Shape,
    /// Input.
    pub x: ValueId,
    /// Output.
    pub y: ValueId,
}

/// Its backward pass.
#[derive(Debug)]
struct GlobalPoolBackward {
    input: Shape,
    dy: ValueId,
    dx: Sink,
}

impl Step for GlobalPoolStep {
    fn describe(&self) -> String {
        "global_avg_pool".into()
    }

    fn uses(&self) -> Uses {
        Uses::new([self.x], [self.y])
    }

    fn work(&self) -> Work {
        Work::vector(self.input.len() as u64)
    }

    fn run(&self, io: &mut Io<'_>) {
        forward(self.input, io.read(self.x), io.write(self.y));
    }

    fn gradient(&self, to: &mut dyn Backward) {
        let (Some(dy), Some(dx)) = (to.stored(self.y), to.sink(self.x)) else { return };
        to.push(Box::new(GlobalPoolBackward { input: self.input, dy, dx }));
    }
}

impl Step for GlobalPoolBackward {
    fn describe(&self) -> String {
        "global_avg_pool gradient".into()
    }

    fn uses(&self) -> Uses {
        Uses::new([self.dy], []).with([self.dx])
    }

    fn work(&self) -> Work {
        Work::vector(self.input.len() as u64)
    }

    fn run(&self, io: &mut Io<'_>) {
        let (dx, add) = io.write_into(self.dx);
        backward(self.input, io.read(self.dy), dx, add);
    }

    fn gradient(&self, _: &mut dyn Backward) {}
}

/// The mean over all pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GlobalAvgPool;

impl Operation for GlobalAvgPool {
    fn output_shape(&self, _: &str, inputs: &[Shape]) -> Result<Shape> {
        Ok(Shape::new(1, 1, inputs[0].c))
    }

    fn describe(&self) -> String {
        "global_avg_pool".into()
    }

    fn lower(&self, node: &mut dyn LoweredNode) -> Result<Vec<Box<dyn Step>>> {
        Ok(vec![Box::new(GlobalPoolStep { input: node.input_shape(0), x: node.input(0), y: node.output() })])
    }

    fn onnx(&self) -> Option<OnnxOperator> {
        Some(OnnxOperator::bare("GlobalAveragePool"))
    }
}
