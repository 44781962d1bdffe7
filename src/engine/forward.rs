//! Running a plan's steps in order.

use crate::Result;
use crate::device::{Buffer, View};
use crate::graph::{Activation, Bias, NodeId};
use crate::ops::activation::Clamp;
use crate::ops::batch_norm::{BatchNormProblem, BatchNormState, Tail};
use crate::ops::conv::{ConvBias, ConvProblem};
use crate::ops::conv_input::{ConvInput, Normalised};
use crate::ops::dropout::DropoutStream;
use crate::ops::linear::LinearProblem;
use crate::ops::pool::PoolProblem;
use crate::ops::{activation, add, batch_norm, conv, conv_bn, dropout, linear, pool};
use crate::shape::Shape;

use super::memory::{Layout, Memory};
use super::params::Params;
use super::plan::{BatchNormParams, ParamId, Plan, Step, StepKind};

/// Slopes of masked activations, by block; without them each activation has its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slopes<'a> {
    /// The slopes.
    pub values: Option<&'a [f32]>,
    /// The same on the device, where they may change under a recorded pass.
    pub at: Option<&'a Buffer>,
}

/// What is fixed during one pass.
pub(super) struct Pass<'a> {
    pub plan: &'a Plan,
    pub layout: &'a Layout,
    /// Images in this pass.
    pub n: usize,
    /// Slopes of masked activations.
    pub slopes: Slopes<'a>,
    /// What dropout draws from.
    pub dropout: &'a DropoutStream,
}

impl Pass<'_> {
    /// A value's elements for the images of this pass.
    pub fn value<'m>(&self, memory: &'m Memory, node: NodeId) -> View<'m> {
        let slot = self.layout.value[node].expect("a step reads only values that were planned");
        memory.slots[slot].view(0..self.len(node))
    }

    /// A value as a fused step reads it: where it was not stored, from what its step kept. `score` as there.
    pub fn conv_input<'m>(
        &self,
        memory: &'m Memory,
        params: &'m Params,
        saved: &'m [Buffer],
        node: NodeId,
        collects_scores: bool,
    ) -> ConvInput<'m> {
        if self.layout.value[node].is_some() {
            return ConvInput::Stored(self.value(memory, node));
        }
        let index = self.plan.writer(node).expect("only steps leave values out");
        let StepKind::ConvBatchNorm { bn, act, .. } = &self.plan.steps[index].kind else {
            unreachable!("only fused training steps leave values out")
        };
        let raw = self.layout.raw[index].expect("planned for every fused training step");
        ConvInput::Normalised(Normalised {
            y: memory.slots[raw].view(0..self.len(node)),
            gamma: params.value(bn.gamma),
            beta: params.value(bn.beta),
            saved: saved[index].view(0..2 * self.plan.shapes[node].c),
            clamp: act.as_ref().map(|act| self.clamp(act)),
            score: collects_scores && act.as_ref().is_some_and(|act| act.mask.is_some()),
        })
    }

    pub fn len(&self, node: NodeId) -> usize {
        self.n * self.plan.shapes[node].len()
    }

    /// An activation with the slope its mask gives it now.
    pub fn clamp(&self, act: &Activation) -> Clamp {
        let Some((mask, slopes)) = act.mask.zip(self.slopes.values) else { return Clamp::new(act.limit, act.slope) };
        let clamp = Clamp::new(act.limit, slopes[mask]);
        match self.slopes.at.map(|slopes| slopes.view(mask..mask + 1)) {
            Some(View::Gpu(slope)) => clamp.with_slope_at(slope),
            _ => clamp,
        }
    }

    pub fn batch_norm(&self, bn: &BatchNormParams, shape: Shape) -> BatchNormProblem {
        BatchNormProblem { lines: self.n * shape.h, w: shape.w, c: shape.c, eps: bn.eps, momentum: bn.momentum }
    }

    pub fn conv(&self, problem: &ConvProblem) -> ConvProblem {
        ConvProblem { n: self.n, ..*problem }
    }

    pub fn pool(&self, problem: &PoolProblem) -> PoolProblem {
        PoolProblem { n: self.n, ..*problem }
    }

    pub fn lines(&self, node: NodeId) -> (usize, usize, usize) {
        let shape = self.plan.shapes[node];
        (self.n * shape.h, shape.w, shape.c)
    }

    pub fn linear(&self, step: &Step) -> LinearProblem {
        let (c_in, c_out) = (self.plan.shapes[step.inputs[0]].c, self.plan.shapes[step.output].c);
        LinearProblem { n: self.n, c_in, c_out }
    }

    /// A training pass: batch statistics, saved for the backward pass in `saved` (one buffer per step).
    pub fn forward_training(&self, params: &mut Params, saved: &mut [Buffer], memory: &mut Memory) -> Result<()> {
        for (index, step) in self.plan.steps.iter().enumerate() {
            if let StepKind::ConvBatchNorm { problem, weight, bn, act } = &step.kind {
                self.conv_bn(params, saved, memory, index, (problem, *weight, bn, act.as_ref()));
                continue;
            }
            let mut out = memory.take(self.layout.value[step.output].expect("planned"));
            let y = out.view_mut(0..self.len(step.output));
            let shape = self.plan.shapes[step.output];
            match &step.kind {
                StepKind::BatchNorm(bn) => {
                    let running = params.running.view_mut_disjoint(bn.running(&params.ranges));
                    let state = BatchNormState {
                        gamma: params.values.view(params.ranges[bn.gamma].clone()),
                        beta: params.values.view(params.ranges[bn.beta].clone()),
                        running,
                        saved: saved[index].view_mut(0..2 * shape.c),
                    };
                    let x = self.value(memory, step.inputs[0]);
                    batch_norm::forward(&self.batch_norm(bn, shape), x, state, Tail::NONE, y);
                }
                StepKind::Dropout(p) => {
                    dropout::apply(*p, self.dropout, self.value(memory, step.inputs[0]), y, false);
                }
                _ => self.stateless(params, memory, step, y),
            }
            memory.slots[self.layout.value[step.output].expect("planned")] = out;
        }
        Ok(())
    }

    fn conv_bn(
        &self,
        params: &mut Params,
        saved: &mut [Buffer],
        memory: &mut Memory,
        index: usize,
        (problem, weight, bn, act): (&ConvProblem, ParamId, &BatchNormParams, Option<&Activation>),
    ) {
        let step = &self.plan.steps[index];
        let (shape, len) = (self.plan.shapes[step.output], self.len(step.output));
        let raw_slot = self.layout.raw[index].expect("planned for every fused training step");
        let mut raw = memory.take(raw_slot);
        let mut out = self.layout.value[step.output].map(|slot| (slot, memory.take(slot)));
        let mut statistics = std::mem::take(&mut saved[index]);
        let mut running = std::mem::take(&mut params.running);
        let state = BatchNormState {
            gamma: params.value(bn.gamma),
            beta: params.value(bn.beta),
            running: running.view_mut_disjoint(bn.running(&params.ranges)),
            saved: statistics.view_mut(0..2 * shape.c),
        };
        let x = self.conv_input(memory, params, saved, step.inputs[0], false);
        let z = out.as_mut().map(|(_, out)| (self.tail(memory, step, act), out.view_mut(0..len)));
        let problems = (&self.conv(problem), &self.batch_norm(bn, shape));
        conv_bn::forward(problems, (x, params.weight(weight)), state, raw.view_mut(0..len), z);
        memory.slots[raw_slot] = raw;
        if let Some((slot, out)) = out {
            memory.slots[slot] = out;
        }
        saved[index] = statistics;
        params.running = running;
    }

    /// An inference pass: nothing but `memory` changes.
    pub fn forward_inference(&self, params: &Params, memory: &mut Memory) {
        for step in &self.plan.steps {
            let slot = self.layout.value[step.output].expect("planned");
            let mut out = memory.take(slot);
            let y = out.view_mut(0..self.len(step.output));
            match &step.kind {
                StepKind::BatchNorm(bn) => {
                    let problem = self.batch_norm(bn, self.plan.shapes[step.output]);
                    let x = self.value(memory, step.inputs[0]);
                    let read = [
                        params.value(bn.gamma),
                        params.value(bn.beta),
                        params.statistic(bn.mean),
                        params.statistic(bn.var),
                    ];
                    batch_norm::forward_inference(&problem, x, read, Tail::NONE, y);
                }
                StepKind::Dropout(_) => add::backward(self.value(memory, step.inputs[0]), y, false),
                _ => self.stateless(params, memory, step, y),
            }
            memory.slots[slot] = out;
        }
    }

    fn tail<'m>(&self, memory: &'m Memory, step: &Step, act: Option<&Activation>) -> Tail<'m> {
        Tail { residual: step.inputs.get(1).map(|&r| self.value(memory, r)), clamp: act.map(|act| self.clamp(act)) }
    }

    /// Steps that do the same in training and at inference.
    fn stateless(&self, params: &Params, memory: &Memory, step: &Step, y: crate::device::ViewMut<'_>) {
        let x = self.value(memory, step.inputs[0]);
        match &step.kind {
            StepKind::Conv { problem, weight, bias, act } => {
                let bias = match bias {
                    Some((id, Bias::Map)) => ConvBias::Map(params.value(*id)),
                    Some((id, _)) => ConvBias::Channel(params.value(*id)),
                    None => ConvBias::None,
                };
                let tail = self.tail(memory, step, act.as_ref());
                let operands = (x, params.weight(*weight));
                conv::forward(&self.conv(problem), operands, bias, tail.residual, tail.clamp, y);
            }
            StepKind::Activation(act) => activation::forward(self.clamp(act), self.lines(step.output), x, y),
            StepKind::Add => add::forward(x, self.value(memory, step.inputs[1]), y),
            StepKind::GlobalAvgPool => {
                let shape = self.plan.shapes[step.inputs[0]];
                pool::forward((shape.pixels(), shape.c), x, y);
            }
            StepKind::MaxPool(problem) => pool::max_forward(&self.pool(problem), x, y),
            StepKind::Linear { weight, bias } => {
                linear::forward(self.linear(step), x, params.weight(*weight), params.value(*bias), y);
            }
            StepKind::ConvBatchNorm { .. } | StepKind::BatchNorm(_) | StepKind::Dropout(_) => {
                unreachable!("handled by the training and the inference pass, which differ in them")
            }
        }
    }
}
