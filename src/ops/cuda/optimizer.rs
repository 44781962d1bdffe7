//! `optimizer.cu`.

use super::{grid, int, long};
use crate::Result;
use crate::device::driver::Argument;
use crate::device::gpu::{Gpu, GpuBuffer, GpuView, GpuViewMut};
use crate::dtype::Dtype;
use crate::ops::optimizer::{Optimizer, Span, StepOutcome, Update};
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

/// What a GPU's optimizer keeps besides its flat buffers.
#[derive(Debug)]
pub struct GpuOptimizer {
    state: GpuBuffer,
    /// A byte per element: 0 untouched, 1 without weight decay, 2 with it.
    groups: GpuBuffer,
    /// Whether the loss is scaled.
    scaled: bool,
    host: DeviceState,
}

/// Where the loss scale lies in the state, in floats.
const LOSS_SCALE_AT: usize = std::mem::offset_of!(DeviceState, loss_scale) / size_of::<f32>();
/// The loss scale that f16 training starts with.
const FIRST_LOSS_SCALE: f32 = 65536.0;

impl GpuOptimizer {
    /// For flat buffers of `len` elements, a multiple of 4.
    pub fn new(gpu: &Arc<Gpu>, precision: Dtype, spans: &[Span], len: usize) -> Result<Self> {
        assert!(len.is_multiple_of(4), "flat buffers are padded to whole vectors");
        let mut groups = vec![0u8; len];
        for span in spans {
            groups[span.range.clone()].fill(if span.decayed { 2 } else { 1 });
        }
        let scaled = precision == Dtype::F16;
        let host =
            DeviceState { loss_scale: if scaled { FIRST_LOSS_SCALE } else { 1.0 }, ..bytemuck::Zeroable::zeroed() };
        let state = GpuBuffer::zeros(gpu, Dtype::F32, size_of::<DeviceState>() / 4)?;
        // A float of room per four groups.
        let mut group_buffer = GpuBuffer::zeros(gpu, Dtype::F32, len / 4)?;
        group_buffer.write_bytes(&groups)?;
        Ok(Self { state, groups: group_buffer, scaled, host })
    }

    /// Factor on the loss of the next step.
    pub fn loss_scale(&self) -> f32 {
        self.host.loss_scale
    }

    /// The same, where kernels read it.
    pub fn loss_scale_at(&self) -> GpuView<'_> {
        self.state.view(LOSS_SCALE_AT..LOSS_SCALE_AT + 1)
    }

    /// Loss scale and good steps, for a checkpoint.
    pub fn save(&self) -> [f32; 2] {
        [self.host.loss_scale, self.host.good_steps as f32]
    }

    /// Goes on from a checkpoint.
    pub fn restore(&mut self, [scale, good_steps]: [f32; 2]) {
        (self.host.loss_scale, self.host.good_steps) = (scale, good_steps as u32);
    }

    /// Puts the learning rate of the next step, which follows `steps` others, where kernels read it.
    pub fn begin(&mut self, lr: f32, steps: u64) -> Result<()> {
        (self.host.learning_rate, self.host.taken) = (lr, steps);
        self.state.write_bytes(bytemuck::bytes_of(&self.host))
    }

    /// Launches one step; `copy` gets the new weights in the network's type.
    pub fn step(
        &self,
        optimizer: Optimizer,
        (weights, gradients): (&GpuViewMut<'_>, GpuView<'_>),
        buffers: &[GpuViewMut<'_>],
        copy: Option<&GpuViewMut<'_>>,
        size: Update,
    ) {
        let gpu = gradients.gpu();
        let n = gradients.len();
        let state = self.state.view(0..self.state.len());
        let groups = self.groups.view(0..self.groups.len());
        let wants_norm = self.wants_norm(size);
        let blocks = n.div_ceil(4096).clamp(1, 1024);
        let betas = match optimizer {
            Optimizer::Sgd { .. } => [0.0, 0.0],
            Optimizer::AdamW { beta1, beta2, .. } => [beta1, beta2],
        };
        let partials = gpu.workspace(blocks);
        let wide = grid(n.div_ceil(1024).clamp(1, 65535), 1, 1);
        let t = copy.map_or(Dtype::F32, |copy| copy.view().dtype()).kernel_name();
        let copy = copy.map_or_else(|| 0u64.into(), Argument::from);
        // SAFETY: arguments as the kernels' header says; all flat buffers have `n` elements.
        unsafe {
            if wants_norm {
                let arguments = [gradients.into(), groups.into(), partials.into(), long(n).into()];
                gpu.launch("gradient_squares", grid(blocks, 1, 1), &arguments);
            }
            let count = if wants_norm { blocks } else { 0 };
            let tail = [int(count).into(), size.clip_norm.into(), betas[0].into(), betas[1].into()];
            let dynamic = i32::from(self.scaled).into();
            let arguments = [state.into(), partials.into(), tail[0], tail[1], tail[2], tail[3], dynamic];
            gpu.launch("optimizer_prepare", grid(1, 1, 1), &arguments);
            let mut arguments: Vec<Argument> = vec![state.into(), weights.into(), gradients.into()];
            arguments.extend(buffers.iter().map(Argument::from));
            arguments.extend([groups.into(), copy]);
            let name = match optimizer {
                Optimizer::Sgd { momentum, nesterov } => {
                    arguments.extend([momentum, size.weight_decay].map(Argument::from));
                    arguments.push(i32::from(nesterov).into());
                    format!("optimizer_sgd<{t}>")
                }
                Optimizer::AdamW { beta1, beta2, eps } => {
                    arguments.extend([beta1, beta2, eps, size.weight_decay].map(Argument::from));
                    format!("optimizer_adamw<{t}>")
                }
            };
            arguments.push(long(n).into());
            gpu.launch(&name, wide, &arguments);
        }
    }

    /// What became of the step.
    pub fn finish(&mut self, size: Update) -> Result<StepOutcome> {
        self.state.read_bytes(bytemuck::bytes_of_mut(&mut self.host))?;
        Ok(StepOutcome {
            gradient_norm: self.wants_norm(size).then(|| f64::from(self.host.gradient_norm)),
            skipped: self.host.skip != 0,
            scaled: self.scaled,
        })
    }

    fn wants_norm(&self, size: Update) -> bool {
        size.clip_norm > 0.0 || self.scaled
    }
}
