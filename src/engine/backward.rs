//! The reverse walk: every step turns the gradient of its output into those of its inputs and parameters.
//!
//! A value's gradient is written by the first step that reaches it and added to by the others. Parameter gradients are
//! written, since every parameter belongs to one step.

use crate::Result;
use crate::device::{Buffer, View, ViewMut};
use crate::graph::NodeId;
use crate::ops::batch_norm::{BackwardInputs, GradientSums, Tail};
use crate::ops::{activation, add, batch_norm, conv, conv_bn, dropout, linear, pool};

use super::forward::Pass;
use super::memory::Memory;
use super::params::Params;
use super::plan::{BatchNormParams, Step, StepKind};

/// What a backward pass works on.
pub(super) struct Backward<'a> {
    pub pass: Pass<'a>,
    pub params: &'a mut Params,
    pub saved: &'a [Buffer],
    pub memory: &'a mut Memory,
    /// Which values' gradients hold something already.
    pub written: Vec<bool>,
    /// Sums that the convolution after a step took on its behalf, by the step's output.
    pub sums: Vec<Option<GradientSums>>,
    /// Σ ⟨dy, x − φ(x)⟩ by block, where they are collected.
    pub scores: Option<&'a mut Buffer>,
}

/// A gradient buffer taken out of memory to be written.
struct Taken {
    node: NodeId,
    buffer: Buffer,
    accumulate: bool,
}

impl Taken {
    fn view(&mut self, len: usize) -> (ViewMut<'_>, bool) {
        (self.buffer.view_mut(0..len), self.accumulate)
    }
}

impl Backward<'_> {
    /// Runs all steps in reverse; the output's gradient is in place and marked as written.
    pub fn run(&mut self) -> Result<()> {
        let plan = self.pass.plan;
        for (index, step) in plan.steps.iter().enumerate().rev() {
            match &step.kind {
                StepKind::Add => {
                    // One input after the other: both may be the same value.
                    for &input in &step.inputs {
                        self.through(step, input, |pass, memory, dy, (dx, accumulate)| {
                            let _ = (pass, memory);
                            add::backward(dy, dx, accumulate);
                        });
                    }
                }
                StepKind::GlobalAvgPool => self.through(step, step.inputs[0], |pass, _, dy, (dx, accumulate)| {
                    let shape = pass.plan.shapes[step.inputs[0]];
                    pool::backward((shape.pixels(), shape.c), dy, dx, accumulate);
                }),
                StepKind::MaxPool(problem) => {
                    self.through(step, step.inputs[0], |pass, memory, dy, (dx, accumulate)| {
                        let x = pass.value(memory, step.inputs[0]);
                        pool::max_backward(&pass.pool(problem), (x, dy), dx, accumulate);
                    });
                }
                StepKind::Dropout(p) => self.through(step, step.inputs[0], |pass, _, dy, (dx, accumulate)| {
                    dropout::apply(*p, pass.dropout, dy, dx, accumulate);
                }),
                StepKind::Activation(act) => {
                    let mut scores = self.scores.take();
                    self.through(step, step.inputs[0], |pass, memory, dy, dx| {
                        let x = pass.value(memory, step.inputs[0]);
                        let score = act.mask.zip(scores.as_deref_mut()).map(|(block, s)| s.view_mut(block..block + 1));
                        activation::backward(pass.clamp(act), pass.lines(step.output), (x, dy), dx, score);
                    });
                    self.scores = scores;
                }
                StepKind::BatchNorm(bn) => self.batch_norm(index, step, bn),
                StepKind::Conv { .. } => self.conv(step),
                StepKind::ConvBatchNorm { .. } => self.conv_bn(index, step),
                StepKind::Linear { .. } => self.linear(step),
            }
        }
        Ok(())
    }

    /// Takes out the gradient of a value; `None` for the image, whose gradient nobody needs.
    fn take(&mut self, node: NodeId) -> Option<Taken> {
        let slot = self.pass.layout.gradient[node]?;
        let accumulate = std::mem::replace(&mut self.written[node], true);
        Some(Taken { node, buffer: self.memory.take(slot), accumulate })
    }

    fn put(&mut self, taken: Option<Taken>) {
        if let Some(taken) = taken {
            let slot = self.pass.layout.gradient[taken.node].expect("it was taken from there");
            self.memory.slots[slot] = taken.buffer;
        }
    }

    /// The gradient of a step's output.
    fn dy<'m>(pass: &Pass<'_>, memory: &'m Memory, step: &Step) -> View<'m> {
        let slot = pass.layout.gradient[step.output].expect("every step's output leads to the logits");
        memory.slots[slot].view(0..pass.len(step.output))
    }

    /// A step without parameters: from the output's gradient to one input's.
    fn through(
        &mut self,
        step: &Step,
        input: NodeId,
        body: impl FnOnce(&Pass<'_>, &Memory, View<'_>, (ViewMut<'_>, bool)),
    ) {
        let mut dx = self.take(input);
        if let Some(dx) = &mut dx {
            let len = self.pass.len(input);
            body(&self.pass, self.memory, Self::dy(&self.pass, self.memory, step), dx.view(len));
        }
        self.put(dx);
    }

    fn batch_norm(&mut self, index: usize, step: &Step, bn: &BatchNormParams) {
        let input = step.inputs[0];
        let mut dx = self.take(input).expect("a batch-norm reads a convolution, never the image");
        let shape = self.pass.plan.shapes[step.output];
        let inputs = BackwardInputs {
            y: self.pass.value(self.memory, input),
            dz: Self::dy(&self.pass, self.memory, step),
            gamma: self.params.values.view(self.params.range(bn.gamma)),
            beta: self.params.values.view(self.params.range(bn.beta)),
            saved: self.saved[index].view(0..2 * shape.c),
            tail: Tail::NONE,
        };
        let d_params = self.params.gradients.view_mut_disjoint(bn.affine(&self.params.ranges));
        batch_norm::backward(&self.pass.batch_norm(bn, shape), inputs, dx.view(self.pass.len(input)), d_params);
        self.put(Some(dx));
    }

    fn conv(&mut self, step: &Step) {
        let StepKind::Conv { problem, weight, bias, .. } = &step.kind else { unreachable!("dispatched on the kind") };
        let input = step.inputs[0];
        let mut dx = self.take(input);
        let mut gradients = std::mem::take(&mut self.params.gradients);
        let read =
            (self.pass.value(self.memory, input), self.params.weight(*weight), Self::dy(&self.pass, self.memory, step));
        let len = self.pass.len(input);
        let (dw, db) = match bias {
            Some((bias, _)) => {
                let ranges = [self.params.ranges[*weight].clone(), self.params.ranges[*bias].clone()];
                let [dw, db] = gradients.view_mut_disjoint(ranges);
                (dw, Some(db))
            }
            None => (gradients.view_mut(self.params.range(*weight)), None),
        };
        conv::backward(&self.pass.conv(problem), read, dx.as_mut().map(|dx| dx.view(len)), dw, db);
        self.params.gradients = gradients;
        self.put(dx);
    }

    fn conv_bn(&mut self, index: usize, step: &Step) {
        let StepKind::ConvBatchNorm { problem, weight, bn, act } = &step.kind else {
            unreachable!("dispatched on the kind")
        };
        let input = step.inputs[0];
        let residual = step.inputs.get(1).copied();
        let mut dx = self.take(input);
        let mut d_residual = residual.and_then(|r| self.take(r));
        let mut gradients = std::mem::take(&mut self.params.gradients);
        let mut dy_buffer = std::mem::take(&mut self.memory.dy);
        let (pass, memory, params) = (&self.pass, &*self.memory, &*self.params);
        let shape = pass.plan.shapes[step.output];
        let raw = pass.layout.raw[index].expect("planned for every fused training step");
        let inputs = BackwardInputs {
            y: memory.slots[raw].view(0..pass.len(step.output)),
            dz: Self::dy(pass, memory, step),
            gamma: params.value(bn.gamma),
            beta: params.value(bn.beta),
            saved: self.saved[index].view(0..2 * shape.c),
            tail: Tail {
                // Read only under an activation; without one its memory may be in other use by now.
                residual: residual.filter(|_| act.is_some()).map(|r| pass.value(memory, r)),
                clamp: act.as_ref().map(|act| pass.clamp(act)),
            },
        };
        let [gamma, beta] = bn.affine(&params.ranges);
        let [dw, d_gamma, d_beta] = gradients.view_mut_disjoint([params.range(*weight), gamma, beta]);
        let out = conv_bn::Gradients {
            dx: dx.as_mut().map(|dx| dx.view(pass.len(input))),
            d_residual: d_residual.as_mut().map(|d| d.view(pass.len(step.output))),
            dw,
            d_bn: [d_gamma, d_beta],
        };
        let collects_scores = self.scores.is_some();
        let block = act.as_ref().and_then(|act| act.mask).filter(|_| collects_scores);
        let problems = (&pass.conv(problem), &pass.batch_norm(bn, shape));
        let x = pass.conv_input(memory, params, self.saved, input, collects_scores);
        let sums = self.sums[step.output].take();
        let score = block.and_then(|block| self.scores.as_deref_mut().map(|scores| scores.view_mut(block..block + 1)));
        let dy = (!dy_buffer.is_empty()).then(|| dy_buffer.view_mut(0..pass.len(step.output)));
        self.sums[input] = conv_bn::backward(problems, (x, params.weight(*weight)), inputs, sums, out, score, dy);
        self.params.gradients = gradients;
        self.memory.dy = dy_buffer;
        self.put(dx);
        self.put(d_residual);
    }

    fn linear(&mut self, step: &Step) {
        let StepKind::Linear { weight, bias } = &step.kind else { unreachable!("dispatched on the kind") };
        let input = step.inputs[0];
        let mut dx = self.take(input);
        let mut gradients = std::mem::take(&mut self.params.gradients);
        let read =
            (self.pass.value(self.memory, input), self.params.weight(*weight), Self::dy(&self.pass, self.memory, step));
        let len = self.pass.len(input);
        let ranges = [self.params.ranges[*weight].clone(), self.params.ranges[*bias].clone()];
        let [dw, db] = gradients.view_mut_disjoint(ranges);
        linear::backward(self.pass.linear(step), read, dx.as_mut().map(|dx| dx.view(len)), (dw, db));
        self.params.gradients = gradients;
        self.put(dx);
    }
}
