//! Fully connected layer: y[n, c_out] = x[n, c_in]·Wᵀ + b, W `[c_out, c_in]`.

use serde::{Deserialize, Serialize};

use super::ahead::Ahead;
use super::config::BiasProblem;
use super::conv::{self, ConvProblem};
use super::cuda;
use super::epilogue::{BiasOperand, Epilogue};
use super::operation::{LoweredNode, MAX_PARAM_ELEMENTS, Operation, OperationParam, ParamRole, bad, mismatch, require};
use super::outer::{Pixels, sum_outer};
use super::packing::Packing;
use super::panels::{Packed, PanelLayout};
use super::parallel::slab_range;
use super::product::{Ends, Product, Rows};
use super::shared::Shared;
use super::step::{Backward, ComputeUnit, Io, Place, Sink, Step, Uses, ValueId, Work};
use super::team::{each, each_part};
use crate::Result;
use crate::device::float_mode::flush_subnormals;
use crate::device::{View, ViewMut};
use crate::shape::{Shape, Window};

/// Tasks of a gradient at least, where rows or panels are as many.
const TASKS: usize = 16;

/// A fully connected layer with bias; weights `[c_out, c_in]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linear {
    /// Features in.
    pub c_in: usize,
    /// Features out.
    pub c_out: usize,
}

/// A linear layer over one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearProblem {
    /// Images.
    pub n: usize,
    /// Features in.
    pub c_in: usize,
    /// Features out.
    pub c_out: usize,
}

impl LinearProblem {
    /// The same as a convolution of single pixels.
    fn pointwise(&self) -> ConvProblem {
        let (input, output) = (Shape::new(1, 1, self.c_in), Shape::new(1, 1, self.c_out));
        ConvProblem { n: self.n, input, output, window: Window::square(1, 1, 0), groups: 1 }
    }

    /// How the host's products read the weights.
    pub fn panels(&self) -> PanelLayout {
        PanelLayout { groups: 1, c_out: self.c_out, k: self.c_in }
    }

    /// Operands have the problem's sizes.
    fn check(&self, x: usize, w: usize, b: usize, y: usize) {
        let Self { n, c_in, c_out } = *self;
        require("a linear layer", [("x", x, n * c_in), ("w", w, c_in * c_out), ("b", b, c_out), ("y", y, n * c_out)]);
    }
}

/// y `[n, c_out]` = x `[n, c_in]`·Wᵀ + b.
pub fn forward(p: LinearProblem, x: View<'_>, w: View<'_>, b: View<'_>, y: ViewMut<'_>) {
    p.check(x.len(), w.len(), b.len(), y.len());
    if let View::Gpu(x) = x {
        let epilogue = cuda::conv::GpuEpilogue { bias: BiasOperand::Channel(b.gpu()), ..Default::default() };
        return cuda::conv::product_forward(p, x, w.gpu(), epilogue, &y.gpu());
    }
    let epilogue = Epilogue { bias: BiasOperand::Channel(b), ..Epilogue::default() };
    conv::forward(&p.pointwise(), x, w, &epilogue, y);
}

/// What the backward pass reads.
#[derive(Debug, Clone, Copy)]
pub struct LinearInputs<'a> {
    /// The input of the forward pass.
    pub x: View<'a>,
    /// Weights.
    pub w: View<'a>,
    /// Gradient of the output.
    pub dy: View<'a>,
}

/// What the backward pass writes.
#[derive(Debug)]
pub struct LinearGradientsOut<'a> {
    /// dx (+)= dy·W, where it is asked for.
    pub dx: Option<(ViewMut<'a>, bool)>,
    /// dw = dyᵀ·x.
    pub dw: ViewMut<'a>,
    /// db = Σ dy.
    pub db: ViewMut<'a>,
}

/// All gradients.
pub fn backward(p: LinearProblem, inputs: LinearInputs<'_>, out: LinearGradientsOut<'_>) {
    let (LinearInputs { x, w, dy }, LinearGradientsOut { dx, dw, db }) = (inputs, out);
    p.check(x.len(), dw.len(), db.len(), dy.len());
    require("a linear layer", [("w", w.len(), dw.len())]);
    if let Some((dx, _)) = &dx {
        require("a linear layer", [("dx", dx.len(), x.len())]);
    }
    if let View::Gpu(x) = x {
        let dy = dy.gpu();
        if let Some((dx, accumulate)) = dx {
            cuda::conv::product_input_gradient(p, dy, w.gpu(), &dx.gpu(), accumulate);
        }
        cuda::conv::product_weight_gradient(p, x, dy, &dw.gpu());
        return cuda::conv::bias_gradient(BiasProblem { pixels: p.n, c: p.c_out }, dy, &db.gpu());
    }
    let (x, w, dy) = (x.host(), w.host(), dy.host());
    let LinearProblem { n, c_in, c_out } = p;
    if let Some((dx, accumulate)) = dx {
        let packed = Packed::transposed(PanelLayout { groups: 1, c_out: c_in, k: c_out }, w);
        let (panels, dx) = (packed.panels(), Shared::new(&mut dx.host()[..n * c_in]));
        let (count, ends) = (panels.layout.count(), Ends { accumulate, ..Ends::NONE });
        let tasks = TASKS.min(count);
        each(tasks, |task| {
            let product = Product::new(panels, Rows::contiguous(&dy[..n * c_out], c_out), ends);
            // SAFETY: tasks have different panels.
            unsafe { Product { columns: slab_range(count, tasks, task), ..product }.run_shared(dx) };
        });
    }
    let (dw, db) = (dw.host(), db.host());
    let (of_dy, of_x) = (Pixels::new(&dy[..n * c_out], c_out), Pixels::new(&x[..n * c_in], c_in));
    each_part(dw, c_in, TASKS.min(c_out), |rows, dw| {
        sum_outer(of_dy.channels(rows), of_x, dw, false, &mut Ahead::default());
    });
    db.fill(0.0);
    flush_subnormals(|| {
        for row in dy[..n * c_out].chunks_exact(c_out) {
            db.iter_mut().zip(row).for_each(|(db, dy)| *db += dy);
        }
    });
}

/// A linear layer in a plan.
#[derive(Debug)]
pub struct LinearStep {
    /// The layer.
    pub layer: Linear,
    /// Input.
    pub x: ValueId,
    /// Weights.
    pub w: ValueId,
    /// Bias.
    pub b: ValueId,
    /// Output.
    pub y: ValueId,
}

/// Its backward pass.
#[derive(Debug)]
struct LinearBackward {
    layer: Linear,
    x: ValueId,
    w: ValueId,
    dy: ValueId,
    dx: Option<Sink>,
    dw: ValueId,
    db: ValueId,
}

impl Linear {
    fn batch(&self, n: usize) -> LinearProblem {
        LinearProblem { n, c_in: self.c_in, c_out: self.c_out }
    }

    fn macs_per_image(&self) -> u64 {
        (self.c_in * self.c_out) as u64
    }
}

impl Step for LinearStep {
    fn describe(&self) -> String {
        "linear".into()
    }

    fn uses(&self) -> Uses {
        Uses::new([self.x, self.w, self.b], [self.y])
    }

    fn work(&self) -> Work {
        Work { flops: 2 * self.layer.macs_per_image(), unit: ComputeUnit::Matrix }
    }

    fn packed(&self) -> Vec<(ValueId, Packing)> {
        let Linear { c_in, c_out } = self.layer;
        vec![(self.w, Packing::Panels(LinearProblem { n: 1, c_in, c_out }.panels()))]
    }

    fn run(&self, io: &mut Io<'_>) {
        forward(self.layer.batch(io.n()), io.read(self.x), io.read(self.w), io.read(self.b), io.write(self.y));
    }

    fn gradient(&self, to: &mut dyn Backward) {
        let Some(dy) = to.stored(self.y) else { return };
        let (dw, db) = (to.param_gradient(self.w), to.param_gradient(self.b));
        let dx = to.sink(self.x);
        to.push(Box::new(LinearBackward { layer: self.layer, x: self.x, w: self.w, dy, dx, dw, db }));
    }
}

impl Step for LinearBackward {
    fn describe(&self) -> String {
        "linear gradients".into()
    }

    fn uses(&self) -> Uses {
        Uses::new([self.x, self.w, self.dy], [self.dw, self.db]).with(self.dx)
    }

    fn work(&self) -> Work {
        let gradients = if self.dx.is_some() { 2 } else { 1 };
        Work { flops: 2 * gradients * self.layer.macs_per_image(), unit: ComputeUnit::Matrix }
    }

    fn run(&self, io: &mut Io<'_>) {
        let out = LinearGradientsOut {
            dx: self.dx.map(|dx| io.write_into(dx)),
            dw: io.write(self.dw),
            db: io.write(self.db),
        };
        let inputs = LinearInputs { x: io.read(self.x), w: io.read(self.w), dy: io.read(self.dy) };
        backward(self.layer.batch(io.n()), inputs, out);
    }

    fn gradient(&self, _: &mut dyn Backward) {}
}

impl Operation for Linear {
    fn output_shape(&self, name: &str, inputs: &[Shape]) -> Result<Shape> {
        if self.c_in.checked_mul(self.c_out).is_none_or(|n| n > MAX_PARAM_ELEMENTS) {
            return bad(name, "the weights are unreasonably large");
        }
        if inputs[0] != Shape::new(1, 1, self.c_in) {
            return mismatch(name, format!("1x1x{}", self.c_in), inputs[0]);
        }
        Ok(Shape::new(1, 1, self.c_out))
    }

    fn params(&self, _: Shape) -> Vec<OperationParam> {
        vec![
            OperationParam::new("weight", ParamRole::LinearWeight, vec![self.c_out, self.c_in]),
            OperationParam::new("bias", ParamRole::LinearBias, vec![self.c_out]),
        ]
    }

    fn macs(&self, _: Shape) -> u64 {
        self.macs_per_image()
    }

    fn describe(&self) -> String {
        "linear".into()
    }

    fn lower(&self, node: &mut dyn LoweredNode) -> Result<Vec<Box<dyn Step>>> {
        let w = node.param(Place::Weight, ParamRole::LinearWeight)?;
        let b = node.param(Place::Param, ParamRole::LinearBias)?;
        Ok(vec![Box::new(LinearStep { layer: *self, x: node.input(0), w, b, y: node.output() })])
    }
}
