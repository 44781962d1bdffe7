//! Clamped activations with a slope outside the bounds.
//!
//! y = x inside (0, limit), q·x below 0, limit + q·(x − limit) above; q = 0 is ReLU/ReLU6, q = 1 the identity
//! (`docs/methods.md` 1.3). The derivative is 1 strictly inside the bounds and q elsewhere, as in PyTorch's hardtanh.

use serde::{Deserialize, Serialize};

use super::cuda;
use super::operation::{LoweredNode, Operation, bad, require};
use super::parallel::{Chunks, PartialSums};
use super::shared::Shared;
use super::simd::vectorised;
use super::step::{Backward, Io, Sink, SiteId, Step, Uses, ValueId, Work};
use super::team::each_chunk;
use crate::Result;
use crate::device::argument::Argument;
use crate::device::gpu::GpuView;
use crate::device::{View, ViewMut};
use crate::shape::{Lines, Shape};

/// A clamp to `[0, limit]` with a slope outside it: 0 is the plain activation, 1 is the identity
/// (DepthShrinker's removal by slope; `docs/methods.md` 1.3).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Activation {
    /// Upper bound: `Some(6.0)` is ReLU6, `None` is ReLU.
    pub limit: Option<f32>,
    /// The site this activation belongs to, if it can be switched; files call it `mask`.
    #[serde(rename = "mask")]
    pub site: Option<SiteId>,
    /// Slope outside the bounds while no mask overrides it.
    pub slope: f32,
}

impl Activation {
    /// Plain ReLU6.
    pub const RELU6: Self = Self { limit: Some(6.0), site: None, slope: 0.0 };
    /// Plain ReLU.
    pub const RELU: Self = Self { limit: None, site: None, slope: 0.0 };
}

/// The arithmetic of an activation with its present slope.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clamp {
    /// Upper bound; infinite for ReLU.
    pub limit: f32,
    /// Slope outside the bounds.
    pub slope: f32,
}

/// An activation as it is applied in one pass.
#[derive(Debug, Clone, Copy)]
pub struct Act<'a> {
    /// Its arithmetic, with the slope that the host knows.
    pub clamp: Clamp,
    /// That slope in a GPU's memory, `[1]`, where work that was recorded reads it anew.
    slope_at: Option<GpuView<'a>>,
}

impl<'a> Act<'a> {
    /// No activation.
    pub const NONE: Self = Self { clamp: Clamp::NONE, slope_at: None };

    /// An activation of a limit, `None` for ReLU, and a slope.
    pub fn new(limit: Option<f32>, slope: f32) -> Self {
        Clamp::new(limit, slope).into()
    }

    /// The same with its slope also on a GPU, where it is.
    pub fn at(self, slope: Option<View<'a>>) -> Self {
        let slope_at = match slope {
            Some(View::Gpu(at)) => Some(at),
            _ => None,
        };
        Self { slope_at, ..self }
    }

    /// Limit, slope and where the slope lies, as kernels take them.
    pub(super) fn arguments(self) -> [Argument; 3] {
        [self.clamp.limit.into(), self.clamp.slope.into(), self.slope_at.map_or(Argument::null(), Argument::from)]
    }
}

impl From<Clamp> for Act<'_> {
    fn from(clamp: Clamp) -> Self {
        Self { clamp, slope_at: None }
    }
}

impl Clamp {
    /// No activation.
    pub const NONE: Self = Self { limit: f32::INFINITY, slope: 1.0 };

    /// An activation of a limit, `None` for ReLU, and a slope.
    pub fn new(limit: Option<f32>, slope: f32) -> Self {
        Self { limit: limit.unwrap_or(f32::INFINITY), slope }
    }

    /// The value. Not-a-number stays so; a distance from the bounds is taken as finite, since slope 0 would make
    /// not-a-number of an infinite one.
    #[inline(always)]
    pub fn apply(self, x: f32) -> f32 {
        let low = if x < 0.0 { x.max(-f32::MAX) * self.slope } else { x };
        if x > self.limit { self.limit + self.slope * (x - self.limit).min(f32::MAX) } else { low }
    }

    /// The derivative.
    #[inline(always)]
    pub fn derivative(self, x: f32) -> f32 {
        if x > 0.0 && x < self.limit { 1.0 } else { self.slope }
    }

    /// x − φ(x) for the activation without slope: what the straight-through score gradient weighs
    /// (`docs/methods.md` 1.2).
    #[inline(always)]
    pub fn excess(self, x: f32) -> f32 {
        let low = if x < 0.0 { x } else { 0.0 };
        if x > self.limit { x - self.limit } else { low }
    }
}

/// y = φ(x); `x` and `y` are `[lines, w, c]`.
pub fn forward(act: Act<'_>, shape: Lines, x: View<'_>, y: ViewMut<'_>) {
    require("an activation", [("x", x.len(), shape.len()), ("y", y.len(), shape.len())]);
    if let View::Gpu(x) = x {
        return cuda::activation::forward(act, x, &y.gpu());
    }
    let (x, y, clamp) = (x.host(), y.host(), act.clamp);
    let chunks = Chunks::new(shape);
    each_chunk(y, chunks.chunk_len(), |chunk, y| {
        let x = &x[chunks.range(chunk)];
        vectorised(
            #[inline(always)]
            || y.iter_mut().zip(x).for_each(|(y, &x)| *y = clamp.apply(x)),
        );
    });
}

/// What the backward pass of an activation reads: x and the gradient of y.
#[derive(Debug, Clone, Copy)]
pub struct ActivationInputs<'a> {
    /// The input of the forward pass.
    pub x: View<'a>,
    /// Gradient of its output.
    pub dy: View<'a>,
}

/// dx (+)= dy·φ'(x); adds ⟨dy, x − φ(x)⟩ to `score` `[1]` where given.
pub fn backward(
    act: Act<'_>,
    shape: Lines,
    inputs: ActivationInputs<'_>,
    dx: ViewMut<'_>,
    accumulate: bool,
    score: Option<ViewMut<'_>>,
) {
    let ActivationInputs { x, dy } = inputs;
    let lens = [("x", x.len(), shape.len()), ("dy", dy.len(), shape.len()), ("dx", dx.len(), shape.len())];
    require("an activation", lens);
    if let View::Gpu(x) = x {
        let score = score.map(ViewMut::gpu);
        return cuda::activation::backward(act, x, dy.gpu(), &dx.gpu(), accumulate, score.as_ref());
    }
    let (x, dy, dx, clamp) = (x.host(), dy.host(), dx.host(), act.clamp);
    let wanted = score.is_some();
    let chunks = Chunks::new(shape);
    let dx = Shared::new(dx);
    let scores = PartialSums::<f64>::taken(chunks.count(), 1, 1, |chunk, score| {
        let range = chunks.range(chunk);
        // SAFETY: chunks share no element.
        let (dx, x, dy) = (unsafe { dx.range(range.clone()).slice() }, &x[range.clone()], &dy[range]);
        score[0] = vectorised(
            #[inline(always)]
            || {
                let n = dx.len();
                let (inputs, gradients) = (&x[..n], &dy[..n]);
                for i in 0..n {
                    let d = gradients[i] * clamp.derivative(inputs[i]);
                    dx[i] = if accumulate { dx[i] + d } else { d };
                }
                if wanted { excess_dot(clamp, x, dy) } else { 0.0 }
            },
        );
    });
    if let Some(score) = score {
        score.host()[0] += scores.rows().flatten().sum::<f64>() as f32;
    }
}

/// ⟨dy, x − φ(x)⟩ over a chunk.
#[inline(always)]
pub(super) fn excess_dot(clamp: Clamp, x: &[f32], dy: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let (xs, dys) = (x.chunks_exact(LANES), dy.chunks_exact(LANES));
    let tail: f32 = xs.remainder().iter().zip(dys.remainder()).map(|(&x, &dy)| dy * clamp.excess(x)).sum();
    for (x, dy) in xs.zip(dys) {
        for lane in 0..LANES {
            sums[lane] += dy[lane] * clamp.excess(x[lane]);
        }
    }
    sums.iter().map(|&s| f64::from(s)).sum::<f64>() + f64::from(tail)
}

/// An activation alone.
#[derive(Debug)]
pub struct ActivationStep {
    /// Shape of one image of x and y.
    pub shape: Shape,
    /// The activation.
    pub act: Activation,
    /// Input.
    pub x: ValueId,
    /// Output.
    pub y: ValueId,
}

/// Its backward pass.
#[derive(Debug)]
struct ActivationBackward {
    shape: Shape,
    act: Activation,
    x: ValueId,
    dy: ValueId,
    dx: Sink,
    score: Option<ValueId>,
}

impl Step for ActivationStep {
    fn describe(&self) -> String {
        "activation".into()
    }

    fn uses(&self) -> Uses {
        Uses::new([self.x], [self.y])
    }

    fn work(&self) -> Work {
        Work::vector(2 * self.shape.len() as u64)
    }

    fn run(&self, io: &mut Io<'_>) {
        forward(io.act(&self.act), Lines::of(self.shape, io.n()), io.read(self.x), io.write(self.y));
    }

    fn gradient(&self, to: &mut dyn Backward) {
        let (Some(dy), Some(dx)) = (to.stored(self.y), to.sink(self.x)) else { return };
        let score = to.score(Some(&self.act));
        to.push(Box::new(ActivationBackward { shape: self.shape, act: self.act, x: self.x, dy, dx, score }));
    }
}

impl Step for ActivationBackward {
    fn describe(&self) -> String {
        "activation gradient".into()
    }

    fn uses(&self) -> Uses {
        Uses::new([self.x, self.dy], self.score).with([self.dx])
    }

    fn work(&self) -> Work {
        Work::vector(3 * self.shape.len() as u64)
    }

    fn run(&self, io: &mut Io<'_>) {
        let inputs = ActivationInputs { x: io.read(self.x), dy: io.read(self.dy) };
        let score = self.score.and_then(|score| io.write_if_lent(score));
        let (dx, add) = io.write_into(self.dx);
        backward(io.act(&self.act), Lines::of(self.shape, io.n()), inputs, dx, add, score);
    }

    fn gradient(&self, _: &mut dyn Backward) {}
}

impl Operation for Activation {
    fn output_shape(&self, name: &str, inputs: &[Shape]) -> Result<Shape> {
        if !(0.0..=1.0).contains(&self.slope) || self.limit.is_some_and(|l| !(l > 0.0 && l.is_finite())) {
            return bad(name, "an activation needs a slope in 0..=1 and a limit above 0");
        }
        Ok(inputs[0])
    }

    fn describe(&self) -> String {
        self.limit.map_or_else(|| "relu".into(), |limit| format!("relu{limit}"))
    }

    fn lower(&self, node: &mut dyn LoweredNode) -> Result<Vec<Box<dyn Step>>> {
        let (shape, x, y) = (node.output_shape(), node.input(0), node.output());
        Ok(vec![Box::new(ActivationStep { shape, act: *self, x, y })])
    }
}
