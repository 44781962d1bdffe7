//! `loss.cu`. Losses are summed on the device, in `f64`.

use std::sync::Arc;

use super::activation::summing_walk;
use super::{Call, configured, long};
use crate::Result;
use crate::device::View;
use crate::device::argument::Element;
use crate::device::gpu::{Gpu, GpuBuffer, GpuView, Snapshot, Workspace};
use crate::dtype::Dtype;
use crate::ops::config::KernelPass;
use crate::ops::loss::{Gradient, LossSum, SoftTarget};

/// `LossSums` of `loss.cu`.
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Sums {
    loss: f64,
    correct: u64,
    images: u64,
}

impl From<Sums> for LossSum {
    fn from(sums: Sums) -> Self {
        Self { loss: sums.loss, correct: sums.correct }
    }
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
        let sums = GpuBuffer::outcome(gpu, Dtype::F32, size_of::<Sums>() / size_of::<f32>())?;
        Ok(Self { sums, labels: GpuBuffer::input(gpu, Dtype::F32, batch)? })
    }

    /// Takes a batch's labels.
    pub fn set_labels(&mut self, labels: &[u32]) -> Result<()> {
        self.labels.write_bytes(bytemuck::cast_slice(labels))
    }

    /// Clears the sums.
    pub fn clear(&mut self) -> Result<()> {
        self.sums.clear()
    }

    /// Copies the sums to the host.
    pub fn sum(&self) -> Result<LossSum> {
        let mut sums = Sums::default();
        self.sums.read_bytes(bytemuck::bytes_of_mut(&mut sums))?;
        Ok(sums.into())
    }

    /// The sums as they were posted, if they are.
    pub fn posted_sum(&self, at: &Snapshot) -> LossSum {
        let mut sums = Sums::default();
        at.read(&self.sums, bytemuck::bytes_of_mut(&mut sums));
        sums.into()
    }

    /// Whether the sums can be posted.
    pub fn is_posted(&self) -> bool {
        self.sums.is_outcome()
    }

    fn labels(&self) -> GpuView<'_> {
        self.labels.view(0..self.labels.len())
    }

    /// Adds losses, and hits where there are such, to the sums.
    fn add(&self, losses: Workspace, hits: Option<Workspace>, images: usize, factor: f64) {
        let sums = self.sums.view(0..self.sums.len());
        Call::new(sums.gpu(), "loss_finish")
            .floats("the losses", losses, losses.len())
            .floats_if("the hits", hits, losses.len())
            .updates_memory("the sums", sums, Element::Struct("LossSums", size_of::<Sums>()), 1)
            .sizes([losses.len()])
            .value(factor)
            .sizes([images])
            .launch([1, 1, 1]);
    }
}

/// Room for a loss and a hit per row.
fn rows(gpu: &Gpu, n: usize) -> [Workspace; 2] {
    let both = gpu.workspace(2 * n);
    [both.part(0..n), both.part(n..2 * n)]
}

/// Extent of a batch of logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogitsShape {
    /// Images.
    pub n: usize,
    /// Logits of an image.
    pub classes: usize,
}

/// See [`crate::ops::loss::cross_entropy`].
pub fn cross_entropy(
    of: &GpuLoss,
    logits: GpuView<'_>,
    shape: LogitsShape,
    smoothing: f32,
    gradient: Option<Gradient<'_>>,
) {
    let LogitsShape { n, classes } = shape;
    let [losses, hits] = rows(logits.gpu(), n);
    let (to, scale) = gradient.map_or((None, None), |Gradient { to, scale }| (Some(to.gpu()), scale));
    Call::new(logits.gpu(), format!("cross_entropy<{}>", logits.dtype().kernel_name()))
        .reads("the logits", logits, n * classes)
        .reads_memory("the labels", of.labels(), Element::U32, n)
        .writes_if("the gradient", to.as_ref(), n * classes)
        .floats("the losses", losses, n)
        .floats("the hits", hits, n)
        .sizes([classes])
        .value(smoothing)
        .reads_if("the loss scale", scale.map(View::gpu), 1)
        .launch([n, 1, 1]);
    of.add(losses, Some(hits), n, 1.0);
}

/// See [`crate::ops::loss::distillation`].
pub fn distillation(
    of: &GpuLoss,
    logits: GpuView<'_>,
    target: SoftTarget<'_>,
    shape: LogitsShape,
    gradient: Gradient<'_>,
) {
    let LogitsShape { n, classes } = shape;
    let [losses, hits] = rows(logits.gpu(), n);
    Call::new(logits.gpu(), format!("distillation<{}>", logits.dtype().kernel_name()))
        .reads("the logits", logits, n * classes)
        .reads("the teacher's logits", target.teacher.gpu(), n * classes)
        .reads_memory("the labels", of.labels(), Element::U32, n)
        .writes("the gradient", &gradient.to.gpu(), n * classes)
        .floats("the losses", losses, n)
        .floats("the hits", hits, n)
        .sizes([classes])
        .value(target.alpha)
        .value(target.temperature)
        .reads_if("the loss scale", gradient.scale.map(View::gpu), 1)
        .launch([n, 1, 1]);
    of.add(losses, Some(hits), n, 1.0);
}

/// See [`crate::ops::loss::feature_mse`].
pub fn feature_mse(
    of: &GpuLoss,
    student: GpuView<'_>,
    teacher: GpuView<'_>,
    weight: f32,
    images: usize,
    gradient: Gradient<'_>,
) {
    let (gpu, n) = (student.gpu(), student.len());
    let Some(config) = configured(&summing_walk(student), KernelPass::Forward, student) else { return };
    let losses = gpu.workspace(config.workspace());
    Call::new(gpu, format!("feature_mse<{}>", student.dtype().kernel_name()))
        .reads("the student's features", student, n)
        .reads("the teacher's features", teacher, n)
        .writes("the gradient", &gradient.to.gpu(), n)
        .floats("the losses", losses, config.blocks)
        .value(weight)
        .reads_if("the loss scale", gradient.scale.map(View::gpu), 1)
        .value(long(n))
        .launch(config.grid());
    // The images were counted by the loss on the logits.
    of.add(losses, None, 0, f64::from(weight) * images as f64 / n.max(1) as f64);
}
