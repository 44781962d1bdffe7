//! `optimizer.cu`.

use super::{Call, configured, long};
use crate::Result;
use crate::device::argument::Element;
use crate::device::gpu::{Gpu, GpuBuffer, GpuView, GpuViewMut, Snapshot};
use crate::dtype::Dtype;
use crate::ops::config::{KernelPass, OptimizerProblem};
use crate::ops::optimizer::{Optimizer, ParamSpan, StepOutcome, Update};
use std::sync::Arc;

/// `OptimizerState` of `optimizer.cu`.
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct DeviceState {
    seen: u64,
    taken: u64,
    learning_rate: f32,
    /// Factor on the loss.
    pub loss_scale: f32,
    /// Steps since the loss scale changed.
    pub good_steps: u32,
    skipped: u32,
    gradient_norm: f32,
    factor: f32,
    adam_step: f32,
    adam_root: f32,
    skip: u32,
    reserved: u32,
}

/// The state of a GPU's optimizer, its flat buffers excepted.
#[derive(Debug)]
pub struct GpuOptimizer {
    /// Written by the kernels alone, from one step to the next.
    state: GpuBuffer,
    /// The learning rate `[1]`.
    rate: GpuBuffer,
    /// A byte per element: 0 untouched, 1 without weight decay, 2 with it.
    groups: GpuBuffer,
    /// Whether the loss is scaled.
    scaled: bool,
    /// The state after the last step whose outcome was read.
    host: DeviceState,
}

/// The name of the state in the kernels.
const STATE: Element = Element::Struct("OptimizerState", size_of::<DeviceState>());
/// Where the loss scale lies in the state, in floats.
const LOSS_SCALE_AT: usize = std::mem::offset_of!(DeviceState, loss_scale) / size_of::<f32>();
/// The loss scale that f16 training starts with.
const FIRST_LOSS_SCALE: f32 = 65536.0;

impl GpuOptimizer {
    /// For flat buffers of `len` elements, a multiple of 4.
    pub fn new(gpu: &Arc<Gpu>, precision: Dtype, spans: &[ParamSpan], len: usize) -> Result<Self> {
        assert!(len.is_multiple_of(4), "flat buffers are padded to whole vectors");
        let mut groups = vec![0u8; len];
        for span in spans {
            groups[span.range.clone()].fill(if span.decayed { 2 } else { 1 });
        }
        let scaled = precision == Dtype::F16;
        let host =
            DeviceState { loss_scale: if scaled { FIRST_LOSS_SCALE } else { 1.0 }, ..bytemuck::Zeroable::zeroed() };
        let mut state = GpuBuffer::outcome(gpu, Dtype::F32, size_of::<DeviceState>() / 4)?;
        state.write_bytes(bytemuck::bytes_of(&host))?;
        let rate = GpuBuffer::input(gpu, Dtype::F32, 1)?;
        // A float of room per four groups.
        let mut group_buffer = GpuBuffer::zeros(gpu, Dtype::F32, len / 4)?;
        group_buffer.write_bytes(&groups)?;
        Ok(Self { state, rate, groups: group_buffer, scaled, host })
    }

    /// Factor on the loss of the next step.
    pub fn loss_scale(&self) -> f32 {
        self.host.loss_scale
    }

    /// The loss scale `[1]` in the device's memory, where kernels read it.
    pub fn loss_scale_at(&self) -> GpuView<'_> {
        self.state.view(LOSS_SCALE_AT..LOSS_SCALE_AT + 1)
    }

    /// Loss scale and good steps, for a checkpoint.
    pub fn save(&self) -> [f32; 2] {
        [self.host.loss_scale, self.host.good_steps as f32]
    }

    /// Goes on behind `steps` others, with the loss scale and its good steps of a checkpoint that has them.
    ///
    /// # Errors
    /// When the device fails.
    pub fn restore(&mut self, saved: Option<[f32; 2]>, steps: u64) -> Result<()> {
        if let Some([loss_scale, good_steps]) = saved {
            (self.host.loss_scale, self.host.good_steps) = (loss_scale, good_steps as u32);
        }
        self.host.taken = steps;
        self.state.write_bytes(bytemuck::bytes_of(&self.host))
    }

    /// Writes the learning rate of the next step to where kernels read it.
    ///
    /// # Errors
    /// When the device fails.
    pub fn begin(&mut self, lr: f32) -> Result<()> {
        self.rate.write(&[lr])
    }

    /// Launches one step; `copy` gets the new weights in the network's type.
    pub fn step(
        &self,
        optimizer: Optimizer,
        weights: &GpuViewMut<'_>,
        gradients: GpuView<'_>,
        buffers: &[GpuViewMut<'_>],
        copy: Option<&GpuViewMut<'_>>,
        size: Update,
    ) {
        let (gpu, n) = (gradients.gpu(), gradients.len());
        assert!(n.is_multiple_of(4), "flat buffers are padded to whole vectors");
        let Some(config) = configured(&OptimizerProblem { len: n }, KernelPass::Forward, gradients) else { return };
        let state = self.state.view(0..self.state.len());
        let groups = self.groups.view(0..self.groups.len());
        let partials = gpu.workspace(config.workspace());
        let wants_norm = self.wants_norm(size);
        if wants_norm {
            Call::new(gpu, "gradient_squares")
                .reads("the gradients", gradients, n)
                .reads_memory("the groups", groups, Element::U8, n)
                .floats("the partial sums", partials, config.norm)
                .value(long(n))
                .launch(config.norm_grid());
        }
        let betas = match optimizer {
            Optimizer::Sgd { .. } => [0.0, 0.0],
            Optimizer::AdamW { beta1, beta2, .. } => [beta1, beta2],
        };
        let count = if wants_norm { config.norm } else { 0 };
        Call::new(gpu, "optimizer_prepare")
            .updates_memory("the state", state, STATE, 1)
            .reads("the learning rate", self.rate.view(0..1), 1)
            .floats("the partial sums", partials, count)
            .sizes([count])
            .value(size.clip_norm)
            .value(betas[0])
            .value(betas[1])
            .value(i32::from(self.scaled))
            .launch([1, 1, 1]);
        let t = copy.map_or(Dtype::F32, |copy| copy.view().dtype()).kernel_name();
        let kernel = match optimizer {
            Optimizer::Sgd { .. } => format!("optimizer_sgd<{t}>"),
            Optimizer::AdamW { .. } => format!("optimizer_adamw<{t}>"),
        };
        let call = Call::new(gpu, kernel)
            .reads_memory("the state", state, STATE, 1)
            .writes("the weights", weights, n)
            .reads("the gradients", gradients, n);
        let call = buffers.iter().fold(call, |call, buffer| call.writes("a buffer", buffer, n));
        let call = call.reads_memory("the groups", groups, Element::U8, n).writes_if("the copy", copy, n);
        let call = match optimizer {
            Optimizer::Sgd { momentum, nesterov } => {
                call.value(momentum).value(size.weight_decay).value(i32::from(nesterov))
            }
            Optimizer::AdamW { beta1, beta2, eps } => {
                call.value(beta1).value(beta2).value(eps).value(size.weight_decay)
            }
        };
        call.value(long(n)).launch(config.step_grid());
    }

    /// Reads the outcome of the step back.
    ///
    /// # Errors
    /// When the device or an earlier launch failed.
    pub fn finish(&mut self, size: Update) -> Result<StepOutcome> {
        self.state.read_bytes(bytemuck::bytes_of_mut(&mut self.host))?;
        Ok(self.outcome(size))
    }

    /// The outcome of a step that was posted behind it.
    pub fn finish_posted(&mut self, size: Update, at: &Snapshot) -> StepOutcome {
        at.read(&self.state, bytemuck::bytes_of_mut(&mut self.host));
        self.outcome(size)
    }

    /// Whether the outcome can be posted.
    pub fn is_posted(&self) -> bool {
        self.state.is_outcome()
    }

    fn outcome(&self, size: Update) -> StepOutcome {
        StepOutcome {
            gradient_norm: self.wants_norm(size).then(|| f64::from(self.host.gradient_norm)),
            skipped: self.host.skip != 0,
            scaled: self.scaled,
        }
    }

    fn wants_norm(&self, size: Update) -> bool {
        size.clip_norm > 0.0 || self.scaled
    }
}
