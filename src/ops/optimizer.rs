//! Optimizer steps over flat buffers: all trained parameters in one, their gradients in another.
//!
//! SGD and AdamW follow `torch.optim` and clipping follows `clip_grad_norm_`, operation by operation. Buffers are cut
//! into chunks of a fixed size whose partial sums are added in order: the same bits for any thread count.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::cuda::optimizer::GpuOptimizer;
use super::parallel::PartialSums;
use super::shared::Shared;
use super::simd::vectorised;
use super::team::each_chunk_pair;
use crate::device::gpu::{GpuViewMut, Snapshot};
use crate::device::{Buffer, Device, View};
use crate::{Error, Result, memory};

/// Elements that one task handles.
const CHUNK: usize = 1 << 14;
/// Lanes of the norm's partial sums, so that they fit vector registers.
const LANES: usize = 8;
/// What `clip_grad_norm_` adds to the norm.
const CLIP_EPS: f64 = 1e-6;

/// The rule that turns gradients into new weights.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Optimizer {
    /// g ← g + λw; v ← μv + g; w ← w − lr·(g + μv) with Nesterov, else w − lr·v.
    Sgd {
        /// Momentum μ.
        momentum: f32,
        /// Nesterov's variant.
        nesterov: bool,
    },
    /// w ← (1 − lr·λ)w; m, v ← moving averages of g and g²; w ← w − lr·m̂ / (√v̂ + ε).
    #[serde(rename = "adamw")]
    AdamW {
        /// Decay of the average of g.
        beta1: f32,
        /// Decay of the average of g².
        beta2: f32,
        /// Keeps the quotient finite.
        eps: f32,
    },
}

impl Default for Optimizer {
    fn default() -> Self {
        Self::Sgd { momentum: 0.9, nesterov: true }
    }
}

impl Optimizer {
    /// Number of buffers it keeps, each as long as the parameters.
    pub fn buffers(self) -> usize {
        match self {
            Self::Sgd { .. } => 1,
            Self::AdamW { .. } => 2,
        }
    }

    /// Whether its numbers make sense.
    ///
    /// # Errors
    /// Names the one that does not.
    pub fn check(self) -> Result<()> {
        let fine = match self {
            Self::Sgd { momentum, nesterov } => (0.0..1.0).contains(&momentum) && !(nesterov && momentum == 0.0),
            Self::AdamW { beta1, beta2, eps } => [beta1, beta2].iter().all(|b| (0.0..1.0).contains(b)) && eps > 0.0,
        };
        if fine {
            return Ok(());
        }
        Err(Error::Config(format!(
            "{self:?} is unusable; momentum and betas lie in 0..1 (above 0 with nesterov), eps above 0"
        )))
    }
}

/// A run of the flat buffer that is treated alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamSpan {
    /// Elements of the flat buffers; spans lie in order and do not overlap.
    pub range: Range<usize>,
    /// Whether weight decay applies.
    pub decayed: bool,
}

/// The numbers of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepSize {
    /// Learning rate.
    pub lr: f32,
    /// Weight decay λ of the decayed spans.
    pub weight_decay: f32,
    /// Factor on every gradient: the clipping coefficient, 1 for none.
    pub scale: f32,
}

/// A step that clips by the norm of all gradients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    /// Learning rate.
    pub lr: f32,
    /// Weight decay λ of the decayed spans.
    pub weight_decay: f32,
    /// Largest norm that gradients keep; 0 for no clipping.
    pub clip_norm: f32,
}

/// What became of an update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOutcome {
    /// Norm of the gradients without the loss scale, where it was taken.
    pub gradient_norm: Option<f64>,
    /// Whether no weight was changed, since a gradient was not finite.
    pub skipped: bool,
    /// Whether the loss is scaled, so that a skipped step only means a scale too large.
    pub scaled: bool,
}

/// What an optimizer remembers between steps.
#[derive(Debug)]
pub struct OptimizerState {
    optimizer: Optimizer,
    spans: Vec<ParamSpan>,
    buffers: Vec<Buffer>,
    steps: u64,
    len: usize,
    gpu: Option<GpuOptimizer>,
    /// The step begun, and on the host what became of it.
    begun: Option<Update>,
    outcome: Option<StepOutcome>,
}

impl OptimizerState {
    /// A fresh state for flat buffers of `len` elements; elements outside the spans are never touched.
    ///
    /// # Errors
    /// Spans out of order or out of range, or a device without memory.
    pub fn new(device: &Device, optimizer: Optimizer, spans: Vec<ParamSpan>, len: usize) -> Result<Self> {
        let mut end = 0;
        for span in &spans {
            if span.range.start < end || span.range.end < span.range.start || span.range.end > len {
                let got = format!("{:?} after {end}", span.range);
                return Err(Error::shape("optimizer", format!("spans in order within {len} elements"), got));
            }
            end = span.range.end;
        }
        let buffers = (0..optimizer.buffers()).map(|_| device.zeros(len)).collect::<Result<_>>()?;
        let gpu = match device {
            Device::Cpu => None,
            Device::Gpu(gpu, precision) => Some(GpuOptimizer::new(gpu, *precision, &spans, len)?),
        };
        Ok(Self { optimizer, spans, buffers, steps: 0, len, gpu, begun: None, outcome: None })
    }

    /// Factor that the loss of the next step must carry: above 1 in f16, whose small gradients would vanish.
    pub fn loss_scale(&self) -> f32 {
        self.gpu.as_ref().map_or(1.0, GpuOptimizer::loss_scale)
    }

    /// The same where losses read it; `None` is 1.
    pub fn loss_scale_at(&self) -> Option<View<'_>> {
        self.gpu.as_ref().map(|gpu| View::Gpu(gpu.loss_scale_at()))
    }

    /// Begins a step: what changes from step to step goes to the device. All but the learning rate stays the same in work
    /// that was recorded.
    ///
    /// # Errors
    /// When the device fails.
    pub fn begin(&mut self, update: Update) -> Result<()> {
        self.begun = Some(update);
        self.gpu.as_mut().map_or(Ok(()), |gpu| gpu.begin(update.lr))
    }

    /// Clips, then changes the weights by the step begun. On a GPU `copy` gets the new weights in the network's type.
    ///
    /// # Errors
    /// Buffers of another length, or no step begun.
    pub fn update(&mut self, weights: &mut Buffer, gradients: &Buffer, copy: Option<&mut Buffer>) -> Result<()> {
        self.check_len(weights.len())?;
        self.check_len(gradients.len())?;
        let update = self.begun()?;
        let all = 0..self.len;
        if let Some(gpu) = &self.gpu {
            let buffers: Vec<GpuViewMut<'_>> =
                self.buffers.iter_mut().map(|buffer| buffer.view_mut(all.clone()).gpu()).collect();
            let weights = weights.view_mut(all.clone()).gpu();
            let gradients = gradients.view(all.clone()).gpu();
            let copy = copy.map(|copy| copy.view_mut(all).gpu());
            gpu.step(self.optimizer, &weights, gradients, &buffers, copy.as_ref(), update);
            return Ok(());
        }
        let Update { lr, weight_decay, clip_norm } = update;
        let gradient_norm = if clip_norm > 0.0 { Some(self.gradient_norm(gradients)?) } else { None };
        let skipped = gradient_norm.is_some_and(|norm| !norm.is_finite());
        if !skipped {
            let scale = gradient_norm.map_or(1.0, |norm| clip_coefficient(norm, clip_norm));
            self.step(weights, gradients, StepSize { lr, weight_decay, scale })?;
        }
        self.outcome = Some(StepOutcome { gradient_norm, skipped, scaled: false });
        Ok(())
    }

    /// Ends the step begun: what became of it.
    ///
    /// # Errors
    /// When the device failed, or no step was done.
    pub fn finish(&mut self) -> Result<StepOutcome> {
        let update = self.begun()?;
        self.begun = None;
        match &mut self.gpu {
            Some(gpu) => {
                let outcome = gpu.finish(update)?;
                self.steps += u64::from(!outcome.skipped);
                Ok(outcome)
            }
            None => self.outcome.take().ok_or_else(|| Error::Config("a step was begun and never done".into())),
        }
    }

    /// What became of a step by `update` whose outcome was [posted](crate::device::gpu::Gpu::post_outcomes) behind it; the next
    /// one may have begun. Steps are told in their order.
    ///
    /// # Panics
    /// On the host, or where outcomes [are not posted](Self::is_posted).
    pub fn finish_posted(&mut self, update: Update, at: &Snapshot) -> StepOutcome {
        let outcome = self.gpu.as_mut().expect("the optimizer of a GPU").finish_posted(update, at);
        self.steps += u64::from(!outcome.skipped);
        outcome
    }

    /// Whether outcomes are among what a GPU posts.
    pub fn is_posted(&self) -> bool {
        self.gpu.as_ref().is_some_and(GpuOptimizer::is_posted)
    }

    fn begun(&self) -> Result<Update> {
        self.begun.ok_or_else(|| Error::Config("a step must be begun before it is done".into()))
    }

    /// Bytes of what it remembers.
    pub fn allocated_bytes(&self) -> u64 {
        self.buffers.iter().map(Buffer::bytes).sum()
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Copies the buffers to the host, for a checkpoint.
    ///
    /// # Errors
    /// When the device fails.
    pub fn save(&self) -> Result<Vec<Vec<f32>>> {
        let read = |buffer: &Buffer| {
            let mut data = memory::zeros(buffer.len(), "a checkpoint of the optimizer")?;
            buffer.read(&mut data).map(|()| data)
        };
        let mut saved: Vec<Vec<f32>> = self.buffers.iter().map(read).collect::<Result<_>>()?;
        saved.extend(self.gpu.as_ref().map(|gpu| gpu.save().to_vec()));
        Ok(saved)
    }

    /// Goes on from a checkpoint.
    ///
    /// # Errors
    /// Buffers that are not this optimizer's.
    pub fn restore(&mut self, buffers: &[Vec<f32>], steps: u64) -> Result<()> {
        // A GPU saves its loss scale behind the buffers; runs may go on on another device.
        let (buffers, rest) = buffers.split_at(self.buffers.len().min(buffers.len()));
        let scaling = match rest {
            [scaling] => <[f32; 2]>::try_from(scaling.as_slice()).ok(),
            _ => None,
        };
        if buffers.len() != self.buffers.len() || buffers.iter().any(|b| b.len() != self.len) {
            let got = format!("{:?} elements", buffers.iter().map(Vec::len).collect::<Vec<_>>());
            return Err(Error::shape("optimizer", format!("{} buffers of {}", self.buffers.len(), self.len), got));
        }
        for (own, saved) in self.buffers.iter_mut().zip(buffers) {
            own.write(saved)?;
        }
        self.steps = steps;
        self.gpu.as_mut().map_or(Ok(()), |gpu| gpu.restore(scaling, steps))
    }

    /// Euclidean norm of all gradients, in `f64`.
    ///
    /// # Errors
    /// A buffer of another length.
    pub fn gradient_norm(&self, gradients: &Buffer) -> Result<f64> {
        self.check_len(gradients.len())?;
        match gradients.view(0..self.len) {
            View::Gpu(_) => Err(Error::Device("a GPU takes the norm within its update".into())),
            g => Ok(cpu::norm(g.host(), &self.spans)),
        }
    }

    /// Changes the weights by one step.
    ///
    /// # Errors
    /// Buffers of another length.
    pub fn step(&mut self, weights: &mut Buffer, gradients: &Buffer, size: StepSize) -> Result<()> {
        self.check_len(weights.len())?;
        self.check_len(gradients.len())?;
        self.steps += 1;
        let all = 0..self.len;
        let spans = &self.spans;
        match (self.optimizer, self.buffers.as_mut_slice()) {
            (Optimizer::Sgd { momentum, nesterov }, [velocity]) => {
                let (w, g) = (weights.view_mut(all.clone()).host(), gradients.view(all.clone()).host());
                let v = velocity.view_mut(all).host();
                cpu::sgd(w, g, v, spans, size, momentum, nesterov);
            }
            (Optimizer::AdamW { beta1, beta2, eps }, [mean, square]) => {
                let (w, g) = (weights.view_mut(all.clone()).host(), gradients.view(all.clone()).host());
                let (m, v) = (mean.view_mut(all.clone()).host(), square.view_mut(all).host());
                let exponent = i32::try_from(self.steps).unwrap_or(i32::MAX);
                let correction = |beta: f32| 1.0 - f64::from(beta).powi(exponent);
                let adam = cpu::Adam {
                    beta1,
                    beta2,
                    eps,
                    step: (f64::from(size.lr) / correction(beta1)) as f32,
                    root: correction(beta2).sqrt() as f32,
                };
                cpu::adamw(w, g, m, v, spans, size, adam);
            }
            _ => unreachable!("`new` made as many buffers as the optimizer keeps"),
        }
        Ok(())
    }

    fn check_len(&self, len: usize) -> Result<()> {
        if len == self.len {
            return Ok(());
        }
        Err(Error::shape("optimizer", format!("{} elements", self.len), len.to_string()))
    }
}

/// The factor that brings a gradient of norm `norm` down to `max_norm`, as `clip_grad_norm_` computes it; 1 below it.
pub fn clip_coefficient(norm: f64, max_norm: f32) -> f32 {
    (f64::from(max_norm) / (norm + CLIP_EPS)).min(1.0) as f32
}

mod cpu {
    use super::*;

    #[derive(Debug, Clone, Copy)]
    pub struct Adam {
        pub beta1: f32,
        pub beta2: f32,
        pub eps: f32,
        /// lr over the bias correction of the mean.
        pub step: f32,
        /// Root of the bias correction of the square.
        pub root: f32,
    }

    pub fn sgd(
        w: &mut [f32],
        g: &[f32],
        velocity: &mut [f32],
        spans: &[ParamSpan],
        size: StepSize,
        momentum: f32,
        nesterov: bool,
    ) {
        each_chunk_pair(w, CHUNK, velocity, CHUNK, |chunk, w, velocity| {
            let g = &g[chunk * CHUNK..][..w.len()];
            for (part, decay) in parts(spans, chunk, w.len(), size.weight_decay) {
                let (w, g, velocity) = (&mut w[part.clone()], &g[part.clone()], &mut velocity[part]);
                vectorised(
                    #[inline(always)]
                    || {
                        for ((w, &g), v) in w.iter_mut().zip(g).zip(velocity) {
                            let g = g * size.scale + decay * *w;
                            *v = momentum * *v + g;
                            let direction = if nesterov { g + momentum * *v } else { *v };
                            *w -= size.lr * direction;
                        }
                    },
                );
            }
        });
    }

    pub fn adamw(
        w: &mut [f32],
        g: &[f32],
        m: &mut [f32],
        v: &mut [f32],
        spans: &[ParamSpan],
        size: StepSize,
        adam: Adam,
    ) {
        let w = Shared::new(w);
        each_chunk_pair(m, CHUNK, v, CHUNK, |chunk, m, v| {
            let range = chunk * CHUNK..chunk * CHUNK + m.len();
            // SAFETY: chunks share no element.
            let (w, g) = (unsafe { w.range(range.clone()).slice() }, &g[range]);
            for (part, decay) in parts(spans, chunk, w.len(), size.weight_decay) {
                let (w, g) = (&mut w[part.clone()], &g[part.clone()]);
                let (m, v) = (&mut m[part.clone()], &mut v[part]);
                let keep = 1.0 - size.lr * decay;
                let Adam { beta1, beta2, eps, step, root } = adam;
                vectorised(
                    #[inline(always)]
                    || {
                        for (((w, &g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
                            let g = g * size.scale;
                            *m += (1.0 - beta1) * (g - *m);
                            *v = beta2 * *v + (1.0 - beta2) * g * g;
                            *w = *w * keep - step * (*m / (v.sqrt() / root + eps));
                        }
                    },
                );
            }
        });
    }

    pub fn norm(g: &[f32], spans: &[ParamSpan]) -> f64 {
        let sums = PartialSums::taken(g.len().div_ceil(CHUNK), 1, 1, |chunk, sum| {
            let g = &g[chunk * CHUNK..g.len().min((chunk + 1) * CHUNK)];
            sum[0] = parts(spans, chunk, g.len(), 0.0).map(|(part, _)| squares(&g[part])).sum::<f64>();
        });
        sums.rows().flatten().sum::<f64>().sqrt()
    }

    fn squares(g: &[f32]) -> f64 {
        vectorised(
            #[inline(always)]
            || {
                let mut lanes = [0.0f64; LANES];
                let chunks = g.chunks_exact(LANES);
                let tail: f64 = chunks.remainder().iter().map(|&x| f64::from(x) * f64::from(x)).sum();
                for chunk in chunks {
                    for (lane, &x) in lanes.iter_mut().zip(chunk) {
                        *lane += f64::from(x) * f64::from(x);
                    }
                }
                lanes.iter().sum::<f64>() + tail
            },
        )
    }

    /// The parts of a chunk that belong to spans, relative to the chunk, with their weight decay.
    fn parts(
        spans: &[ParamSpan],
        chunk: usize,
        len: usize,
        weight_decay: f32,
    ) -> impl Iterator<Item = (Range<usize>, f32)> + '_ {
        let start = chunk * CHUNK;
        let end = start + len;
        let first = spans.partition_point(|span| span.range.end <= start);
        spans[first..].iter().take_while(move |span| span.range.start < end).map(move |span| {
            let part = span.range.start.max(start) - start..span.range.end.min(end) - start;
            (part, if span.decayed { weight_decay } else { 0.0 })
        })
    }
}
