//! A layer on a device: operands of noise, rotated, and the launch that is timed.

use super::launches::{Launches, rotation};
use super::layers::{Layer, LayerPass};
use super::noise::Noise;
use crate::Result;
use crate::device::{Buffer, Device, View, ViewMut};
use crate::graph::{Activation, Bias};
use crate::ops::activation::Clamp;
use crate::ops::batch_norm::{BackwardInputs, BatchNormProblem, BatchNormState, Tail};
use crate::ops::conv::{self, ConvBias, ConvProblem};
use crate::ops::conv_bn;
use crate::ops::conv_input::ConvInput;

/// Elements that the start of every operand is a multiple of, so that all allow the widest accesses.
const ALIGNMENT: usize = 64;

/// Times layers on one device.
pub struct LayerBench {
    device: Device,
    noise: Noise,
}

impl LayerBench {
    /// A bench on a device.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self { device: device.clone(), noise: Noise::new(device)? })
    }

    /// A layer ready to be timed.
    ///
    /// # Errors
    /// When the device is out of memory or a launch fails.
    pub fn launches(&self, layer: &Layer) -> Result<Launches<'static>> {
        let bytes = usize::try_from(layer.bytes(self.device.precision().bytes() as u64)).unwrap_or(usize::MAX);
        let sets = rotation(&self.device, bytes);
        let mut operands = Operands::new(self, layer, sets)?;
        Launches::new(&self.device, sets, move |set| {
            operands.launch(set);
            Ok(())
        })
    }
}

/// Several values of one shape in one buffer.
#[derive(Default)]
struct Rotated {
    buffer: Buffer,
    len: usize,
}

impl Rotated {
    fn stride(len: usize) -> usize {
        len.next_multiple_of(ALIGNMENT)
    }

    fn view(&self, set: usize) -> View<'_> {
        let start = set * Self::stride(self.len);
        self.buffer.view(start..start + self.len)
    }

    fn view_mut(&mut self, set: usize) -> ViewMut<'_> {
        let start = set * Self::stride(self.len);
        self.buffer.view_mut(start..start + self.len)
    }
}

/// What a layer's passes read and write; what its own pass does not need is empty.
struct Operands {
    pass: LayerPass,
    problem: ConvProblem,
    bias: (Bias, Buffer),
    clamp: Option<Clamp>,
    has_residual: bool,
    x: Rotated,
    w: Rotated,
    /// The convolution's result, or its gradient.
    y: Rotated,
    /// The step's result, or its gradient.
    z: Rotated,
    residual: Rotated,
    dx: Rotated,
    dw: Rotated,
    d_residual: Rotated,
    /// Gradient of y, which a GPU stores on the way.
    dy: Rotated,
    gamma: Buffer,
    beta: Buffer,
    running: Buffer,
    saved: Buffer,
    d_bn: Buffer,
}

impl Operands {
    fn new(bench: &LayerBench, layer: &Layer, sets: usize) -> Result<Self> {
        use LayerPass::{BothGradients, Forward, InputGradient, StepBackward, StepForward, WeightGradient};
        let LayerBench { device, noise } = bench;
        let (p, pass, tail) = (layer.problem, layer.pass, layer.tail);
        let (x, y, w, c) = (p.n * p.input.len(), p.n * p.output.len(), p.weight_len(), p.output.c);
        let in_pass = |passes: &[LayerPass], len: usize| if passes.contains(&pass) { len } else { 0 };
        let room = |len: usize, fill: &dyn Fn(&Noise, &mut Buffer)| {
            let mut buffer = device.activations(sets * Rotated::stride(len))?;
            fill(noise, &mut buffer);
            Ok::<_, crate::Error>(Rotated { buffer, len })
        };
        let activations: &dyn Fn(&Noise, &mut Buffer) = &Noise::fill_activations;
        let signed: &dyn Fn(&Noise, &mut Buffer) = &Noise::fill_signed;
        let steps = [StepForward, StepBackward];
        let residual = in_pass(&[Forward, StepForward, StepBackward], if tail.residual { y } else { 0 });
        let dw = in_pass(&[WeightGradient, BothGradients, StepBackward], w);
        let has_input_gradient = layer.pass != StepBackward || !layer.reads_image;
        let dx = if has_input_gradient { in_pass(&[InputGradient, BothGradients, StepBackward], x) } else { 0 };
        let on_gpu = *device != Device::Cpu;
        let bias = match tail.bias {
            Bias::None => 0,
            Bias::Channel => c,
            Bias::Map => p.output.len(),
        };
        let c = in_pass(&steps, c);
        Ok(Self {
            pass,
            problem: p,
            bias: (tail.bias, device.upload(&vec![0.1; bias])?),
            clamp: tail.act.map(|act: Activation| Clamp::new(act.limit, act.slope)),
            has_residual: tail.residual,
            x: room(in_pass(&[Forward, WeightGradient, BothGradients, StepForward, StepBackward], x), activations)?,
            w: room(w, signed)?,
            y: room(y, signed)?,
            z: room(in_pass(&steps, y), signed)?,
            residual: room(residual, activations)?,
            dx: room(dx, signed)?,
            dw: Rotated { buffer: device.zeros(sets * Rotated::stride(dw))?, len: dw },
            d_residual: room(if pass == StepBackward { residual } else { 0 }, signed)?,
            dy: room(if on_gpu { in_pass(&[StepBackward], y) } else { 0 }, signed)?,
            gamma: device.upload(&vec![1.0; c])?,
            beta: device.zeros(c)?,
            running: device.upload(&vec![1.0; 2 * c])?,
            // μ = 0 and 1/σ = 1, as far as the backward pass knows.
            saved: device.upload(&[vec![0.0; c], vec![1.0; c]].concat())?,
            d_bn: device.zeros(2 * c)?,
        })
    }

    /// The layer's pass over one set of operands.
    fn launch(&mut self, set: usize) {
        let p = self.problem;
        match self.pass {
            LayerPass::Forward => {
                let bias = self.bias.1.view(0..self.bias.1.len());
                let bias = match self.bias.0 {
                    Bias::None => ConvBias::None,
                    Bias::Channel => ConvBias::Channel(bias),
                    Bias::Map => ConvBias::Map(bias),
                };
                let residual = self.has_residual.then(|| self.residual.view(set));
                let operands = (self.x.view(set), self.w.view(set));
                conv::forward(&p, operands, bias, residual, self.clamp, self.y.view_mut(set));
            }
            LayerPass::InputGradient => {
                let (dy, w) = (self.y.view(set).gpu(), self.w.view(set).gpu());
                conv::gpu_input_gradient(&p, dy, w, (self.dx.view_mut(set), false));
            }
            LayerPass::WeightGradient | LayerPass::BothGradients => {
                let read = (self.x.view(set), self.w.view(set), self.y.view(set));
                let both = self.pass == LayerPass::BothGradients;
                let dx = both.then(|| (self.dx.view_mut(set), false));
                conv::backward(&p, read, dx, self.dw.view_mut(set), None);
            }
            LayerPass::StepForward => self.step_forward(set),
            LayerPass::StepBackward => self.step_backward(set),
        }
    }

    fn batch_norm(&self) -> BatchNormProblem {
        let ConvProblem { n, output, .. } = self.problem;
        BatchNormProblem { lines: n * output.h, w: output.w, c: output.c, eps: 1e-5, momentum: 0.1 }
    }

    fn step_forward(&mut self, set: usize) {
        let (bn, c) = (self.batch_norm(), self.problem.output.c);
        let state = BatchNormState {
            gamma: self.gamma.view(0..c),
            beta: self.beta.view(0..c),
            running: self.running.view_mut_disjoint([0..c, c..2 * c]),
            saved: self.saved.view_mut(0..2 * c),
        };
        let tail = Tail { residual: self.has_residual.then(|| self.residual.view(set)), clamp: self.clamp };
        let operands = (ConvInput::Stored(self.x.view(set)), self.w.view(set));
        let z = Some((tail, self.z.view_mut(set)));
        conv_bn::forward((&self.problem, &bn), operands, state, self.y.view_mut(set), z);
    }

    fn step_backward(&mut self, set: usize) {
        let (bn, c) = (self.batch_norm(), self.problem.output.c);
        let residual = self.has_residual.then(|| self.residual.view(set));
        let inputs = BackwardInputs {
            y: self.y.view(set),
            dz: self.z.view(set),
            gamma: self.gamma.view(0..c),
            beta: self.beta.view(0..c),
            saved: self.saved.view(0..2 * c),
            tail: Tail { residual, clamp: self.clamp },
        };
        let out = conv_bn::Gradients {
            dx: (self.dx.len > 0).then(|| (self.dx.view_mut(set), false)),
            d_residual: self.has_residual.then(|| (self.d_residual.view_mut(set), false)),
            dw: self.dw.view_mut(set),
            d_bn: self.d_bn.view_mut_disjoint([0..c, c..2 * c]),
        };
        let operands = (ConvInput::Stored(self.x.view(set)), self.w.view(set));
        let dy = (self.dy.len > 0).then(|| self.dy.view_mut(set));
        conv_bn::backward((&self.problem, &bn), operands, inputs, None, out, None, dy);
    }
}
