//! Zeros around an image, or a cut of its rim: what a shortcut needs where the padding of the chain beside it has moved to the
//! front (`docs/methods.md` 1.4, R1).
//!
//! y\[row, col] = x\[row − top, col − left], 0 outside of x; a negative amount cuts rows or columns off. The gradient is the
//! same with the amounts' signs turned.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::config::KernelPass;
use super::cuda::{Call, configured};
use super::operation::{LoweredNode, Operation, bad, require};
use super::simd::vectorised;
use super::step::{Backward, Io, Sink, Step, Uses, ValueId, Work};
use crate::Result;
use crate::device::gpu::{GpuView, GpuViewMut};
use crate::device::{View, ViewMut};
use crate::shape::Shape;

/// Most rows or columns on one side.
const MAX_PAD: isize = 1024;

/// A padding of one batch: x `[n, h_in, w_in, c]`, y `[n, h_out, w_out, c]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PadProblem {
    /// Images.
    pub n: usize,
    /// One image of the input.
    pub input: Shape,
    /// One image of the output, of as many channels.
    pub output: Shape,
    /// Rows above; below 0 so many are cut off. Those below follow from the sizes.
    pub top: isize,
    /// Columns to the left, likewise.
    pub left: isize,
}

impl PadProblem {
    /// The problem of one image for `n` of them.
    pub fn batch(&self, n: usize) -> Self {
        Self { n, ..*self }
    }

    /// What undoes the shift: the problem of the gradient.
    pub fn transposed(&self) -> Self {
        Self { input: self.output, output: self.input, top: -self.top, left: -self.left, ..*self }
    }

    /// The first column of x that is read, the column of y that it goes to, and how many columns follow.
    fn columns(&self) -> (usize, usize, usize) {
        let (from, to) = ((-self.left).max(0) as usize, self.left.max(0) as usize);
        (from, to, self.input.w.saturating_sub(from).min(self.output.w.saturating_sub(to)))
    }
}

/// y (+)= x, moved.
pub fn forward(p: &PadProblem, x: View<'_>, y: ViewMut<'_>, accumulate: bool) {
    require("a padding", [("x", x.len(), p.n * p.input.len()), ("y", y.len(), p.n * p.output.len())]);
    if let View::Gpu(x) = x {
        return forward_on_gpu(p, x, &y.gpu(), accumulate);
    }
    let (x, y, input, output) = (x.host(), y.host(), p.input, p.output);
    let (from, to, columns) = p.columns();
    y.par_chunks_mut(output.w * output.c).enumerate().for_each(|(line, y)| {
        if !accumulate {
            y.fill(0.0);
        }
        let row = (line % output.h).checked_add_signed(-p.top).filter(|&row| row < input.h);
        let Some(row) = row else { return };
        let x = &x[((line / output.h * input.h + row) * input.w + from) * input.c..][..columns * input.c];
        let y = &mut y[to * output.c..][..columns * output.c];
        vectorised(
            #[inline(always)]
            || y.iter_mut().zip(x).for_each(|(y, x)| *y += x),
        );
    });
}

fn forward_on_gpu(p: &PadProblem, x: GpuView<'_>, y: &GpuViewMut<'_>, accumulate: bool) {
    let Some(config) = configured(p, KernelPass::Forward, x) else { return };
    Call::new(x.gpu(), config.instance("pad", x.dtype()))
        .reads("x", x, p.n * p.input.len())
        .writes("y", y, p.n * p.output.len())
        .value(i32::from(accumulate))
        .sizes([p.input.h, p.input.w, p.output.h, p.output.w, p.input.c])
        .value(p.top as i32)
        .value(p.left as i32)
        .sizes([config.lanes(p.input.c, x.dtype()).lanes])
        .launch(config.pad_grid(p, x.dtype()));
}

/// A padding in a plan, and, transposed, its backward pass.
#[derive(Debug)]
pub struct PadStep {
    /// The padding, for one image.
    pub problem: PadProblem,
    /// Input.
    pub x: ValueId,
    /// Output.
    pub y: Sink,
}

impl Step for PadStep {
    fn describe(&self) -> String {
        "pad".into()
    }

    fn uses(&self) -> Uses {
        Uses::new([self.x], []).with([self.y])
    }

    fn work(&self) -> Work {
        Work::vector(self.problem.output.len() as u64)
    }

    fn run(&self, io: &mut Io<'_>) {
        let (y, add) = io.write_into(self.y);
        forward(&self.problem.batch(io.n()), io.read(self.x), y, add);
    }

    fn gradient(&self, to: &mut dyn Backward) {
        let (Some(x), Some(y)) = (to.stored(self.y.value), to.sink(self.x)) else { return };
        to.push(Box::new(Self { problem: self.problem.transposed(), x, y }));
    }
}

/// Zeros around an image; negative amounts cut its rim off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pad {
    /// Rows above.
    pub top: isize,
    /// Columns to the left.
    pub left: isize,
    /// Rows below.
    pub bottom: isize,
    /// Columns to the right.
    pub right: isize,
}

impl Pad {
    /// The size of one axis behind it; `None` where nothing of the input is left.
    fn along(size: usize, [before, after]: [isize; 2]) -> Option<usize> {
        let size = size as isize;
        (size + before.min(0) + after.min(0) > 0).then_some((size + before + after) as usize)
    }
}

impl Operation for Pad {
    fn output_shape(&self, name: &str, inputs: &[Shape]) -> Result<Shape> {
        let Self { top, left, bottom, right } = *self;
        if [top, left, bottom, right].iter().any(|v| !(-MAX_PAD..=MAX_PAD).contains(v)) {
            return bad(name, "a padding must lie in -1024..=1024");
        }
        let Shape { h, w, c } = inputs[0];
        match (Self::along(h, [top, bottom]), Self::along(w, [left, right])) {
            (Some(h), Some(w)) => Ok(Shape::new(h, w, c)),
            _ => bad(name, "a padding must leave a pixel of what it cuts"),
        }
    }

    fn describe(&self) -> String {
        let Self { top, left, bottom, right } = self;
        format!("pad {top},{left},{bottom},{right}")
    }

    fn lower(&self, node: &mut dyn LoweredNode) -> Result<Vec<Box<dyn Step>>> {
        let (input, output) = (node.input_shape(0), node.output_shape());
        let problem = PadProblem { n: 1, input, output, top: self.top, left: self.left };
        let y = Sink { value: node.output(), add: false };
        Ok(vec![Box::new(PadStep { problem, x: node.input(0), y })])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes() {
        let of = |top, left, bottom, right| Pad { top, left, bottom, right };
        let shape = |pad: Pad| pad.output_shape("pad", &[Shape::new(4, 3, 2)]);
        assert_eq!(shape(of(1, -1, 2, 0)).unwrap(), Shape::new(7, 2, 2));
        for wrong in [of(-2, 0, -2, 0), of(-4, 0, 9, 0), of(0, 1025, 0, 0)] {
            assert!(shape(wrong).unwrap_err().to_string().contains("pad: a padding must"));
        }
    }
}
