//! Losses on logits and on feature maps, each with its gradient in the same pass.
//!
//! With p = softmax(z): cross-entropy with label smoothing ε is −Σ_k t_k log p_k, t = (1−ε)·onehot(y) + ε/K, and its
//! gradient p − t. Distillation (Hinton et al., 2015, in the form of DepthShrinker, `docs/methods.md` 1.3) is
//! α·T²·CE(softmax(z_t/T), softmax(z_s/T)) + (1−α)·CE(y, softmax(z_s/T)). Everything is a mean over the batch.
//!
//! Rows are handled in chunks of a fixed size whose `f64` sums are added in order: the same bits for any thread count.

use std::ops::Range;

use super::cuda;
use super::cuda::loss::{GpuLoss, LogitsShape};
use super::parallel::PartialSums;
use super::reused::Reused;
use super::shared::Shared;
use crate::device::float_mode::flush_subnormals;
use crate::device::gpu::Snapshot;
use crate::device::{Device, View, ViewMut};
use crate::{Error, Result};

/// Rows of logits that one task handles.
const CHUNK_ROWS: usize = 32;
/// Elements of a feature map that one task handles.
const CHUNK_ELEMENTS: usize = 1 << 14;

/// What a batch adds to an epoch's sums.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossSum {
    /// Sum of the loss over the images; divide by their number for the mean.
    pub loss: f64,
    /// Images whose highest logit (the first of equal ones) is the label's; none with a logit that is not finite.
    pub correct: u64,
}

/// A batch's labels and the sums of the losses taken on it, where the network computes. What is read from the host and
/// told to it passes through here, so that the losses themselves can be part of recorded work.
#[derive(Debug)]
pub struct LossRecord {
    batch: usize,
    classes: usize,
    labels: Vec<u32>,
    sum: LossSum,
    gpu: Option<GpuLoss>,
}

impl LossRecord {
    /// Room for batches of up to `batch` images.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(device: &Device, batch: usize, classes: usize) -> Result<Self> {
        let gpu = match device {
            Device::Cpu => None,
            Device::Gpu(gpu, _) => Some(GpuLoss::new(gpu, batch)?),
        };
        Ok(Self { batch, classes, labels: Vec::new(), sum: LossSum::default(), gpu })
    }

    /// Begins a batch: takes its labels, and forgets the sums of those before.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub fn begin(&mut self, labels: &[u32]) -> Result<()> {
        self.next(labels)?;
        self.clear()
    }

    /// Goes on to the next batch: takes its labels, and goes on with the sums.
    ///
    /// # Errors
    /// More labels than there is room for, a label that is no class, or a device that fails.
    pub fn next(&mut self, labels: &[u32]) -> Result<()> {
        if labels.is_empty() || labels.len() > self.batch {
            return Err(Error::shape("labels", format!("1 to {}", self.batch), labels.len().to_string()));
        }
        if let Some(at) = labels.iter().position(|&y| y as usize >= self.classes) {
            let (label, classes) = (labels[at], self.classes);
            return Err(Error::Data(format!("image {at} of the batch has label {label}, of {classes} classes")));
        }
        self.labels.clear();
        self.labels.extend_from_slice(labels);
        self.gpu.as_mut().map_or(Ok(()), |gpu| gpu.set_labels(labels))
    }

    /// Forgets the sums. On a GPU it may be part of recorded work.
    ///
    /// # Errors
    /// When the device fails.
    pub fn clear(&mut self) -> Result<()> {
        self.sum = LossSum::default();
        self.gpu.as_mut().map_or(Ok(()), GpuLoss::clear)
    }

    /// The sums of all losses since they were last forgotten.
    ///
    /// # Errors
    /// When the device fails, or an operation before failed.
    pub fn sum(&self) -> Result<LossSum> {
        self.gpu.as_ref().map_or(Ok(self.sum), GpuLoss::sum)
    }

    /// The sums as they were [posted](crate::device::gpu::Gpu::post_outcomes).
    ///
    /// # Panics
    /// On the host, or where they [are not](Self::is_posted).
    pub fn posted_sum(&self, at: &Snapshot) -> LossSum {
        self.gpu().posted_sum(at)
    }

    /// Whether the sums are among what a GPU posts.
    pub fn is_posted(&self) -> bool {
        self.gpu.as_ref().is_some_and(GpuLoss::is_posted)
    }

    /// Images of the batch.
    pub fn images(&self) -> usize {
        self.labels.len()
    }

    fn gpu(&self) -> &GpuLoss {
        self.gpu.as_ref().expect("a record on the logits' device")
    }

    fn logits_shape(&self) -> LogitsShape {
        LogitsShape { n: self.images(), classes: self.classes }
    }

    fn add(&mut self, sum: LossSum) {
        self.sum.loss += sum.loss;
        self.sum.correct += sum.correct;
    }

    fn check(&self, op: &str, logits: usize, d_logits: Option<usize>) -> Result<()> {
        let (n, classes) = (self.labels.len(), self.classes);
        if n == 0 || logits != n * classes || d_logits.is_some_and(|d| d != logits) {
            let got = format!("{logits} logits and a gradient of {d_logits:?}");
            return Err(Error::shape(op, format!("{n} rows of {classes} classes"), got));
        }
        Ok(())
    }
}

/// The destination of a gradient, and the factor on it.
#[derive(Debug)]
pub struct Gradient<'a> {
    /// As long as what it is the gradient of.
    pub to: ViewMut<'a>,
    /// The loss scale `[1]`; `None` for 1.
    pub scale: Option<View<'a>>,
}

impl Gradient<'_> {
    fn host_scale(&self) -> f64 {
        self.scale.map_or(1.0, |scale| f64::from(scale.host()[0]))
    }
}

/// The teacher's logits and how strongly a student follows them.
#[derive(Debug, Clone, Copy)]
pub struct SoftTarget<'a> {
    /// The teacher's logits `[n, classes]`.
    pub teacher: View<'a>,
    /// Weight α of the teacher's term; the labels' term has 1 − α.
    pub alpha: f32,
    /// Temperature T, above 0.
    pub temperature: f32,
}

/// Adds the softmax cross-entropy of logits `[n, classes]`, with label smoothing ε in 0..1, to the record. Writes the
/// gradient of the mean over the batch where asked to.
///
/// # Errors
/// Shapes that do not agree.
pub fn cross_entropy(
    record: &mut LossRecord,
    logits: View<'_>,
    smoothing: f32,
    gradient: Option<Gradient<'_>>,
) -> Result<()> {
    record.check("cross-entropy", logits.len(), gradient.as_ref().map(|g| g.to.len()))?;
    let classes = record.classes;
    match (logits, gradient) {
        (View::Gpu(logits), gradient) => {
            cuda::loss::cross_entropy(record.gpu(), logits, record.logits_shape(), smoothing, gradient);
        }
        (logits, Some(gradient)) => {
            let logits = logits.host();
            let scale = gradient.host_scale();
            let d = gradient.to.host();
            record.add(cpu::cross_entropy(logits, &record.labels, classes, smoothing, scale, d));
        }
        (logits, None) => {
            record.add(cpu::cross_entropy_value(logits.host(), &record.labels, classes, smoothing));
        }
    }
    Ok(())
}

/// Adds the distillation loss of a student's logits `[n, classes]` to the record, and writes the gradient of the mean.
/// Labels are used without smoothing, and both terms divide the student's logits by T.
///
/// # Errors
/// Shapes that do not agree.
pub fn distillation(
    record: &mut LossRecord,
    logits: View<'_>,
    target: SoftTarget<'_>,
    gradient: Gradient<'_>,
) -> Result<()> {
    record.check("distillation", logits.len(), Some(gradient.to.len()))?;
    record.check("distillation's teacher", target.teacher.len(), None)?;
    let classes = record.classes;
    match logits {
        View::Gpu(student) => {
            cuda::loss::distillation(record.gpu(), student, target, record.logits_shape(), gradient);
        }
        student => {
            let (scale, logits) = (gradient.host_scale(), student.host());
            let d = gradient.to.host();
            record.add(cpu::distillation(logits, target, &record.labels, classes, scale, d));
        }
    }
    Ok(())
}

/// Adds the mean squared difference of two equally shaped feature maps, times `weight`, to the record (once per image,
/// as sums are over images), and writes its gradient with respect to the student.
///
/// # Errors
/// Lengths that differ.
pub fn feature_mse(
    record: &mut LossRecord,
    student: View<'_>,
    teacher: View<'_>,
    weight: f32,
    gradient: Gradient<'_>,
) -> Result<()> {
    if student.len() != teacher.len() || student.len() != gradient.to.len() {
        let got = format!("{} of the teacher, {} for the gradient", teacher.len(), gradient.to.len());
        return Err(Error::shape("feature loss", format!("{} elements", student.len()), got));
    }
    match student {
        View::Gpu(student) => {
            cuda::loss::feature_mse(record.gpu(), student, teacher.gpu(), weight, record.images(), gradient);
        }
        student => {
            let scale = gradient.host_scale();
            let loss = cpu::feature_mse(student.host(), teacher.host(), weight, scale, gradient.to.host());
            record.add(LossSum { loss: loss * record.images() as f64, correct: 0 });
        }
    }
    Ok(())
}

mod cpu {
    use super::*;

    pub fn cross_entropy(
        logits: &[f32],
        labels: &[u32],
        classes: usize,
        smoothing: f32,
        scale: f64,
        d: &mut [f32],
    ) -> LossSum {
        let scale = scale / labels.len() as f64;
        let d = Shared::new(d);
        ordered(labels.len(), |images| {
            let rows = images.start * classes..images.end * classes;
            // SAFETY: chunks share no row.
            let (logits, labels, d) = (&logits[rows.clone()], &labels[images], unsafe { d.range(rows).slice() });
            let mut p = Reused::zeros(classes);
            let mut sum = LossSum::default();
            for ((z, &y), d) in logits.chunks_exact(classes).zip(labels).zip(d.chunks_exact_mut(classes)) {
                sum.add(smoothed_row(z, y as usize, smoothing, &mut p));
                for (k, (d, p)) in d.iter_mut().zip(p.iter()).enumerate() {
                    *d = ((p - smoothed(k == y as usize, smoothing, classes)) * scale) as f32;
                }
            }
            sum
        })
    }

    pub fn cross_entropy_value(logits: &[f32], labels: &[u32], classes: usize, smoothing: f32) -> LossSum {
        ordered(labels.len(), |images| {
            let (logits, labels) = (&logits[images.start * classes..images.end * classes], &labels[images]);
            let mut p = Reused::zeros(classes);
            let mut sum = LossSum::default();
            for (z, &y) in logits.chunks_exact(classes).zip(labels) {
                sum.add(smoothed_row(z, y as usize, smoothing, &mut p));
            }
            sum
        })
    }

    pub fn distillation(
        student: &[f32],
        target: SoftTarget<'_>,
        labels: &[u32],
        classes: usize,
        scale: f64,
        d: &mut [f32],
    ) -> LossSum {
        let (teacher, alpha, t) = (target.teacher.host(), f64::from(target.alpha), f64::from(target.temperature));
        // One 1/T comes from differentiating z/T.
        let scale = scale / (labels.len() as f64 * t);
        let d = Shared::new(d);
        ordered(labels.len(), |images| {
            let rows = images.start * classes..images.end * classes;
            let (student, teacher, labels) = (&student[rows.clone()], &teacher[rows.clone()], &labels[images]);
            // SAFETY: chunks share no row.
            let d = unsafe { d.range(rows).slice() };
            let (mut p, mut q) = (Reused::zeros(classes), Reused::zeros(classes));
            let mut sum = LossSum::default();
            let logits = student.chunks_exact(classes).zip(teacher.chunks_exact(classes));
            for (((z_s, z_t), &y), d) in logits.zip(labels).zip(d.chunks_exact_mut(classes)) {
                let y = y as usize;
                let log_norm = softmax(z_s, t, &mut p);
                softmax(z_t, t, &mut q);
                let soft: f64 = q.iter().zip(z_s).map(|(q, &z)| q * (log_norm - f64::from(z) / t)).sum();
                let hard = log_norm - f64::from(z_s[y]) / t;
                let loss = alpha * t * t * soft + (1.0 - alpha) * hard;
                sum.add(LossSum { loss, correct: u64::from(is_hit(z_s, y)) });
                for (k, d) in d.iter_mut().enumerate() {
                    let label = if k == y { 1.0 } else { 0.0 };
                    let g = alpha * t * t * (p[k] - q[k]) + (1.0 - alpha) * (p[k] - label);
                    *d = (g * scale) as f32;
                }
            }
            sum
        })
    }

    pub fn feature_mse(student: &[f32], teacher: &[f32], weight: f32, scale: f64, d: &mut [f32]) -> f64 {
        let scale = scale * 2.0 * f64::from(weight) / student.len().max(1) as f64;
        let d = Shared::new(d);
        let sums = PartialSums::taken(student.len().div_ceil(CHUNK_ELEMENTS), 1, 1, |chunk, sum| {
            let range = chunk * CHUNK_ELEMENTS..student.len().min((chunk + 1) * CHUNK_ELEMENTS);
            let (student, teacher) = (&student[range.clone()], &teacher[range.clone()]);
            // SAFETY: chunks share no element.
            let d = unsafe { d.range(range).slice() };
            sum[0] = flush_subnormals(|| {
                let mut sum = 0.0;
                for ((d, s), t) in d.iter_mut().zip(student).zip(teacher) {
                    let difference = f64::from(s - t);
                    sum += difference * difference;
                    *d = (scale * difference) as f32;
                }
                sum
            });
        });
        f64::from(weight) * sums.rows().flatten().sum::<f64>() / student.len().max(1) as f64
    }

    /// Loss of one image; leaves the probabilities in `p`.
    fn smoothed_row(z: &[f32], y: usize, smoothing: f32, p: &mut [f64]) -> LossSum {
        let log_norm = softmax(z, 1.0, p);
        let hard = log_norm - f64::from(z[y]);
        let smoothing = f64::from(smoothing);
        let uniform = log_norm - z.iter().map(|&z| f64::from(z)).sum::<f64>() / z.len() as f64;
        let loss = (1.0 - smoothing) * hard + smoothing * uniform;
        LossSum { loss, correct: u64::from(is_hit(z, y)) }
    }

    fn smoothed(is_label: bool, smoothing: f32, classes: usize) -> f64 {
        let smoothing = f64::from(smoothing);
        let uniform = smoothing / classes as f64;
        if is_label { 1.0 - smoothing + uniform } else { uniform }
    }

    /// softmax(z / t) into `p`; returns log Σ exp(z / t).
    fn softmax(z: &[f32], t: f64, p: &mut [f64]) -> f64 {
        let highest = z.iter().fold(f32::NEG_INFINITY, |m, &z| m.max(z));
        let highest = f64::from(highest) / t;
        let mut sum = 0.0;
        for (p, &z) in p.iter_mut().zip(z) {
            *p = (f64::from(z) / t - highest).exp();
            sum += *p;
        }
        p.iter_mut().for_each(|p| *p /= sum);
        highest + sum.ln()
    }

    /// Whether the highest logit, the first of equal ones, is that of `y`.
    fn is_hit(z: &[f32], y: usize) -> bool {
        // NaN is neither higher nor lower, so a row of them would have its first class for its highest.
        z.iter().all(|value| value.is_finite())
            && z[..y].iter().all(|value| *value < z[y])
            && z[y..].iter().all(|value| *value <= z[y])
    }

    /// The sum over all chunks of images, added in their order.
    fn ordered(images: usize, of: impl Fn(Range<usize>) -> LossSum + Sync) -> LossSum {
        let sums = PartialSums::taken(images.div_ceil(CHUNK_ROWS), 2, 1, |chunk, row| {
            let sum = flush_subnormals(|| of(chunk * CHUNK_ROWS..images.min((chunk + 1) * CHUNK_ROWS)));
            row.copy_from_slice(&[sum.loss, sum.correct as f64]);
        });
        let mut total = LossSum::default();
        sums.rows().for_each(|row| total.add(LossSum { loss: row[0], correct: row[1] as u64 }));
        total
    }

    impl LossSum {
        fn add(&mut self, other: Self) {
            self.loss += other.loss;
            self.correct += other.correct;
        }
    }
}
