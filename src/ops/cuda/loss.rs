//! `loss.cu`. Losses are summed on the device, in `f64`.

use std::sync::Arc;

use super::activation::walking_blocks;
use super::{grid, int, long};
use crate::Result;
use crate::device::driver::Argument;
use crate::device::gpu::{Gpu, GpuBuffer, GpuView};
use crate::dtype::Dtype;
use crate::ops::loss::{Gradient, LossSum, SoftTarget};

/// `LossSums` of `loss.cu`.
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Sums {
    loss: f64,
    correct: u64,
    images: u64,
}

/// Labels and sums of a batch.
#[derive(Debug)]
pub struct GpuLoss {
    sums: GpuBuffer,
    labels: GpuBuffer,
}

impl GpuLoss {
    /// For batches of up to `batch` images.
    pub fn new(gpu: &Arc<Gpu>, batch: usize) -> Result<Self> {
        let sums = GpuBuffer::zeros(gpu, Dtype::F32, size_of::<Sums>() / size_of::<f32>())?;
        Ok(Self { sums, labels: GpuBuffer::zeros(gpu, Dtype::F32, batch)? })
    }

    /// Takes a batch's labels, and clears the sums.
    pub fn begin(&mut self, labels: &[u32]) -> Result<()> {
        self.labels.write_bytes(bytemuck::cast_slice(labels))?;
        self.sums.clear()
    }

    /// Copies the sums to the host.
    pub fn sum(&self) -> Result<LossSum> {
        let mut sums = Sums::default();
        self.sums.read_bytes(bytemuck::bytes_of_mut(&mut sums))?;
        Ok(LossSum { loss: sums.loss, correct: sums.correct })
    }

    fn labels(&self) -> GpuView<'_> {
        self.labels.view(0..self.labels.len())
    }

    /// Adds `count` losses and hits, which lie behind each other, to the sums.
    fn add(&self, losses: u64, hits: u64, (count, images): (usize, usize), factor: f64) {
        let sums = self.sums.view(0..self.sums.len());
        let arguments: [Argument; 6] =
            [losses.into(), hits.into(), sums.into(), int(count).into(), factor.into(), int(images).into()];
        // SAFETY: arguments as the kernel's header says; `losses` and `hits` are workspaces of `count` floats.
        unsafe { sums.gpu().launch("loss_finish", grid(1, 1, 1), &arguments) }
    }
}

/// Room for a loss and a hit per row.
fn rows(gpu: &Gpu, n: usize) -> (u64, u64) {
    let losses = gpu.workspace(2 * n);
    (losses, losses + (n * size_of::<f32>()) as u64)
}

/// Where the gradient goes and the factor on it, as kernels take them.
fn gradient_arguments(gradient: Option<Gradient<'_>>) -> [Argument; 2] {
    match gradient {
        None => [0u64.into(), 0u64.into()],
        Some(Gradient { to, scale }) => [(&to.gpu()).into(), scale.map(|scale| scale.gpu()).into()],
    }
}

/// See [`crate::ops::loss::cross_entropy`].
pub fn cross_entropy(
    of: &GpuLoss,
    logits: GpuView<'_>,
    (n, classes): (usize, usize),
    smoothing: f32,
    gradient: Option<Gradient<'_>>,
) {
    let (losses, hits) = rows(logits.gpu(), n);
    let [d, scale] = gradient_arguments(gradient);
    let name = format!("cross_entropy<{}>", logits.dtype().kernel_name());
    let rest = [losses.into(), hits.into(), int(classes).into(), smoothing.into(), scale];
    let arguments: Vec<Argument> = [logits.into(), of.labels().into(), d].into_iter().chain(rest).collect();
    // SAFETY: arguments as the kernel's header says; lengths were checked by the caller.
    unsafe { logits.gpu().launch(&name, grid(n, 1, 1), &arguments) };
    of.add(losses, hits, (n, n), 1.0);
}

/// See [`crate::ops::loss::distillation`].
pub fn distillation(
    of: &GpuLoss,
    logits: GpuView<'_>,
    target: SoftTarget<'_>,
    (n, classes): (usize, usize),
    gradient: Gradient<'_>,
) {
    let (losses, hits) = rows(logits.gpu(), n);
    let [d, scale] = gradient_arguments(Some(gradient));
    let name = format!("distillation<{}>", logits.dtype().kernel_name());
    let head = [logits.into(), target.teacher.gpu().into(), of.labels().into(), d, losses.into(), hits.into()];
    let rest = [int(classes).into(), target.alpha.into(), target.temperature.into(), scale];
    let arguments: Vec<Argument> = head.into_iter().chain(rest).collect();
    // SAFETY: arguments as the kernel's header says; lengths were checked by the caller.
    unsafe { logits.gpu().launch(&name, grid(n, 1, 1), &arguments) };
    of.add(losses, hits, (n, n), 1.0);
}

/// See [`crate::ops::loss::feature_mse`].
pub fn feature_mse(
    of: &GpuLoss,
    (student, teacher): (GpuView<'_>, GpuView<'_>),
    weight: f32,
    images: usize,
    gradient: Gradient<'_>,
) {
    let (gpu, n) = (student.gpu(), student.len());
    let count = walking_blocks(student.dtype(), n);
    let losses = gpu.workspace(count);
    let [d, scale] = gradient_arguments(Some(gradient));
    let name = format!("feature_mse<{}>", student.dtype().kernel_name());
    let head = [student.into(), teacher.into(), d, losses.into()];
    let arguments: Vec<Argument> = head.into_iter().chain([weight.into(), scale, long(n).into()]).collect();
    // SAFETY: arguments as the kernel's header says; lengths were checked by the caller.
    unsafe { gpu.launch(&name, grid(count, 1, 1), &arguments) };
    // The images were counted by the loss on the logits.
    of.add(losses, 0, (count, 0), f64::from(weight) * images as f64 / n.max(1) as f64);
}
