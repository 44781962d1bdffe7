//! `loss.cu`. Losses come back to the host in `f64`, so every call waits for the device.

use super::activation::walking_blocks;
use super::{grid, int, long};
use crate::Result;
use crate::device::driver::Argument;
use crate::device::gpu::{Gpu, GpuView, GpuViewMut};
use crate::ops::loss::{LossSum, SoftTarget};

/// `LossSums` of `loss.cu`.
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Sums {
    loss: f64,
    correct: u64,
    images: u64,
}

/// Memory of one loss: sums, labels, and a loss and a hit per row.
struct Work {
    sums: u64,
    labels: u64,
    losses: u64,
    hits: u64,
}

impl Work {
    fn new(gpu: &Gpu, labels: &[u32], count: usize) -> Result<Self> {
        let sums = gpu.workspace(6 + labels.len() + 2 * count);
        gpu.check()?;
        let at = |floats: usize| sums + (floats * size_of::<f32>()) as u64;
        let work = Self { sums, labels: at(6), losses: at(6 + labels.len()), hits: at(6 + labels.len() + count) };
        // SAFETY: the workspace has room for both.
        unsafe {
            gpu.driver().upload(work.sums, bytemuck::bytes_of(&Sums::default()))?;
            gpu.driver().upload(work.labels, bytemuck::cast_slice(labels))?;
        }
        Ok(work)
    }

    /// Adds the rows up and brings the sums to the host.
    fn finish(&self, gpu: &Gpu, count: usize, hits: bool, factor: f64) -> Result<LossSum> {
        let hits = if hits { self.hits } else { 0 };
        let arguments: [Argument; 6] =
            [self.losses.into(), hits.into(), self.sums.into(), int(count).into(), factor.into(), int(count).into()];
        let mut sums = Sums::default();
        // SAFETY: arguments as the kernel's header says; all lie in the workspace.
        unsafe {
            gpu.launch("loss_finish", grid(1, 1, 1), &arguments);
            gpu.check()?;
            gpu.driver().download(bytemuck::bytes_of_mut(&mut sums), self.sums)?;
        }
        Ok(LossSum { loss: sums.loss, correct: sums.correct })
    }
}

/// See [`crate::ops::loss::cross_entropy`].
pub fn cross_entropy(
    logits: GpuView<'_>,
    labels: &[u32],
    classes: usize,
    smoothing: f32,
    scale: f32,
    d_logits: Option<&GpuViewMut<'_>>,
) -> Result<LossSum> {
    let (gpu, n) = (logits.gpu(), labels.len());
    let work = Work::new(gpu, labels, n)?;
    let scale_at = upload_scale(gpu, &work, scale)?;
    let name = format!("cross_entropy<{}>", logits.dtype().kernel_name());
    let d = d_logits.map_or_else(|| 0u64.into(), Argument::from);
    let arguments: [Argument; 8] = [
        logits.into(),
        work.labels.into(),
        d,
        work.losses.into(),
        work.hits.into(),
        int(classes).into(),
        smoothing.into(),
        scale_at.into(),
    ];
    // SAFETY: arguments as the kernel's header says; lengths were checked by the caller.
    unsafe { gpu.launch(&name, grid(n, 1, 1), &arguments) };
    work.finish(gpu, n, true, 1.0)
}

/// See [`crate::ops::loss::distillation`].
pub fn distillation(
    logits: GpuView<'_>,
    target: SoftTarget<'_>,
    labels: &[u32],
    classes: usize,
    scale: f32,
    d_logits: &GpuViewMut<'_>,
) -> Result<LossSum> {
    let (gpu, n) = (logits.gpu(), labels.len());
    let work = Work::new(gpu, labels, n)?;
    let scale_at = upload_scale(gpu, &work, scale)?;
    let name = format!("distillation<{}>", logits.dtype().kernel_name());
    let arguments: [Argument; 10] = [
        logits.into(),
        target.teacher.gpu().into(),
        work.labels.into(),
        d_logits.into(),
        work.losses.into(),
        work.hits.into(),
        int(classes).into(),
        target.alpha.into(),
        target.temperature.into(),
        scale_at.into(),
    ];
    // SAFETY: arguments as the kernel's header says; lengths were checked by the caller.
    unsafe { gpu.launch(&name, grid(n, 1, 1), &arguments) };
    work.finish(gpu, n, true, 1.0)
}

/// See [`crate::ops::loss::feature_mse`].
pub fn feature_mse(
    student: GpuView<'_>,
    teacher: GpuView<'_>,
    weight: f32,
    scale: f32,
    d_student: &GpuViewMut<'_>,
) -> Result<f64> {
    let (gpu, n) = (student.gpu(), student.len());
    let count = walking_blocks(student.dtype(), n);
    let work = Work::new(gpu, &[], count)?;
    let scale_at = upload_scale(gpu, &work, scale)?;
    let name = format!("feature_mse<{}>", student.dtype().kernel_name());
    let arguments: [Argument; 7] = [
        student.into(),
        teacher.into(),
        d_student.into(),
        work.losses.into(),
        weight.into(),
        scale_at.into(),
        long(n).into(),
    ];
    // SAFETY: arguments as the kernel's header says; lengths were checked by the caller.
    unsafe { gpu.launch(&name, grid(count, 1, 1), &arguments) };
    let sum = work.finish(gpu, count, false, f64::from(weight) / n.max(1) as f64)?;
    Ok(sum.loss)
}

/// Puts the loss scale where the epoch's image count lies, which one loss does not need.
fn upload_scale(gpu: &Gpu, work: &Work, scale: f32) -> Result<u64> {
    let at = work.sums + 16;
    // SAFETY: the sums take 24 bytes.
    unsafe { gpu.driver().upload(at, &scale.to_ne_bytes())? };
    Ok(at)
}
