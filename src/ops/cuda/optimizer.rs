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
        let group_buffer = GpuBuffer::zeros(gpu, Dtype::F32, len / 4)?;
        // SAFETY: a float of room per four groups.
        unsafe { gpu.driver().upload(group_buffer.view(0..len / 4).address(), &groups)? };
        Ok(Self { state, groups: group_buffer, scaled, host })
    }

    /// Factor on the loss of the next step.
    pub fn loss_scale(&self) -> f32 {
        self.host.loss_scale
    }

    /// Loss scale and good steps, for a checkpoint.
    pub fn save(&self) -> [f32; 2] {
        [self.host.loss_scale, self.host.good_steps as f32]
    }

    /// Goes on from a checkpoint.
    pub fn restore(&mut self, [scale, good_steps]: [f32; 2]) {
        (self.host.loss_scale, self.host.good_steps) = (scale, good_steps as u32);
    }

    /// One step; `copy` gets the new weights in the network's type.
    pub fn step(
        &mut self,
        optimizer: Optimizer,
        (weights, gradients): (&GpuViewMut<'_>, GpuView<'_>),
        buffers: &[GpuViewMut<'_>],
        copy: Option<&GpuViewMut<'_>>,
        steps: u64,
        size: Update,
    ) -> Result<StepOutcome> {
        let gpu = gradients.gpu();
        let n = gradients.len();
        let state = self.state.view(0..self.state.len());
        let groups = self.groups.view(0..self.groups.len());
        self.host = DeviceState { taken: steps, learning_rate: size.lr, ..self.host };
        let blocks = n.div_ceil(4096).clamp(1, 1024);
        let wants_norm = size.clip_norm > 0.0 || self.scaled;
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
            gpu.driver().upload(state.address(), bytemuck::bytes_of(&self.host))?;
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
            gpu.check()?;
            gpu.driver().download(bytemuck::bytes_of_mut(&mut self.host), state.address())?;
        }
        Ok(StepOutcome {
            gradient_norm: wants_norm.then(|| f64::from(self.host.gradient_norm)),
            skipped: self.host.skip != 0,
            scaled: self.scaled,
        })
    }
}
