//! Losses on logits and on feature maps, each with its gradient in the same pass.
//!
//! With p = softmax(z): cross-entropy with label smoothing ε is −Σ_k t_k log p_k, t = (1−ε)·onehot(y) + ε/K, and its
//! gradient p − t. Distillation (Hinton et al., 2015, in the form of DepthShrinker, `methods.md` 1.3) is
//! α·T²·CE(softmax(z_t/T), softmax(z_s/T)) + (1−α)·CE(y, softmax(z_s/T)). Everything is a mean over the batch.
//!
//! Rows are handled in chunks of a fixed size whose `f64` sums are added in order: the same bits for any thread count.

use rayon::prelude::*;

use super::cuda;
use crate::device::{View, ViewMut};
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
    /// Images whose highest logit (the first of equal ones) is the label's.
    pub correct: u64,
}

/// How logits of a student follow those of a teacher.
#[derive(Debug, Clone, Copy)]
pub struct SoftTarget<'a> {
    /// The teacher's logits `[n, classes]`.
    pub teacher: View<'a>,
    /// Weight α of the teacher's term; the labels' term has 1 − α.
    pub alpha: f32,
    /// Temperature T, above 0.
    pub temperature: f32,
}

/// Softmax cross-entropy of logits `[n, classes]` against `labels` `[n]`, with label smoothing ε in 0..1.
/// Writes the gradient of the mean over the batch to `d_logits` `[n, classes]` where given.
///
/// # Errors
/// Shapes that do not agree, or a label that is no class.
pub fn cross_entropy(
    logits: View<'_>,
    labels: &[u32],
    classes: usize,
    smoothing: f32,
    scale: f32,
    d_logits: Option<ViewMut<'_>>,
) -> Result<LossSum> {
    let d_len = d_logits.as_ref().map(ViewMut::len);
    check("cross-entropy", logits.len(), labels, classes, d_len)?;
    match (logits, d_logits) {
        (View::Gpu(logits), d_logits) => {
            let d = d_logits.map(ViewMut::gpu);
            cuda::loss::cross_entropy(logits, labels, classes, smoothing, scale, d.as_ref())
        }
        (View::Host(logits), Some(d)) => {
            Ok(cpu::cross_entropy(logits, labels, classes, smoothing, f64::from(scale), d.host()))
        }
        (View::Host(logits), None) => Ok(cpu::cross_entropy_value(logits, labels, classes, smoothing)),
    }
}

/// Distillation loss of a student's logits `[n, classes]`; the gradient of the mean goes to `d_logits`.
/// Labels are used without smoothing, and both terms divide the student's logits by T.
///
/// # Errors
/// As [`cross_entropy`].
pub fn distillation(
    logits: View<'_>,
    target: SoftTarget<'_>,
    labels: &[u32],
    classes: usize,
    scale: f32,
    d_logits: ViewMut<'_>,
) -> Result<LossSum> {
    check("distillation", logits.len(), labels, classes, Some(d_logits.len()))?;
    check("distillation's teacher", target.teacher.len(), labels, classes, None)?;
    let SoftTarget { teacher, alpha, temperature } = target;
    match logits {
        View::Gpu(student) => cuda::loss::distillation(student, target, labels, classes, scale, &d_logits.gpu()),
        View::Host(student) => {
            let scale = f64::from(scale);
            Ok(cpu::distillation(
                (student, teacher.host()),
                (alpha, temperature),
                labels,
                classes,
                scale,
                d_logits.host(),
            ))
        }
    }
}

/// Mean squared difference of two equally shaped feature maps, times `weight`; the gradient with respect to the student
/// is written to `d_student`.
///
/// # Errors
/// Lengths that differ.
pub fn feature_mse(
    student: View<'_>,
    teacher: View<'_>,
    weight: f32,
    scale: f32,
    d_student: ViewMut<'_>,
) -> Result<f64> {
    if student.len() != teacher.len() || student.len() != d_student.len() {
        let got = format!("{} of the teacher, {} for the gradient", teacher.len(), d_student.len());
        return Err(Error::shape("feature loss", format!("{} elements", student.len()), got));
    }
    match student {
        View::Gpu(student) => cuda::loss::feature_mse(student, teacher.gpu(), weight, scale, &d_student.gpu()),
        View::Host(student) => {
            Ok(cpu::feature_mse(student, teacher.host(), weight, f64::from(scale), d_student.host()))
        }
    }
}

fn check(op: &str, logits: usize, labels: &[u32], classes: usize, d_logits: Option<usize>) -> Result<()> {
    let expected = labels.len().checked_mul(classes);
    if labels.is_empty() || classes == 0 || expected != Some(logits) || d_logits.is_some_and(|d| d != logits) {
        let got = format!("{logits} logits and a gradient of {d_logits:?}");
        return Err(Error::shape(op, format!("{} rows of {classes} classes", labels.len()), got));
    }
    match labels.iter().position(|&y| y as usize >= classes) {
        Some(at) => Err(Error::Data(format!("image {at} of the batch has label {}, of {classes} classes", labels[at]))),
        None => Ok(()),
    }
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
        let rows = CHUNK_ROWS * classes;
        let chunks = logits.par_chunks(rows).zip(labels.par_chunks(CHUNK_ROWS)).zip(d.par_chunks_mut(rows));
        ordered(chunks.map(|((logits, labels), d)| {
            let mut p = vec![0.0; classes];
            let mut sum = LossSum::default();
            for ((z, &y), d) in logits.chunks_exact(classes).zip(labels).zip(d.chunks_exact_mut(classes)) {
                sum.add(smoothed_row(z, y as usize, smoothing, &mut p));
                for (k, (d, p)) in d.iter_mut().zip(&p).enumerate() {
                    *d = ((p - smoothed(k == y as usize, smoothing, classes)) * scale) as f32;
                }
            }
            sum
        }))
    }

    pub fn cross_entropy_value(logits: &[f32], labels: &[u32], classes: usize, smoothing: f32) -> LossSum {
        let chunks = logits.par_chunks(CHUNK_ROWS * classes).zip(labels.par_chunks(CHUNK_ROWS));
        ordered(chunks.map(|(logits, labels)| {
            let mut p = vec![0.0; classes];
            let mut sum = LossSum::default();
            for (z, &y) in logits.chunks_exact(classes).zip(labels) {
                sum.add(smoothed_row(z, y as usize, smoothing, &mut p));
            }
            sum
        }))
    }

    pub fn distillation(
        (student, teacher): (&[f32], &[f32]),
        (alpha, temperature): (f32, f32),
        labels: &[u32],
        classes: usize,
        scale: f64,
        d: &mut [f32],
    ) -> LossSum {
        let (alpha, t) = (f64::from(alpha), f64::from(temperature));
        // One 1/T comes from differentiating z/T.
        let scale = scale / (labels.len() as f64 * t);
        let rows = CHUNK_ROWS * classes;
        let logits = student.par_chunks(rows).zip(teacher.par_chunks(rows));
        let chunks = logits.zip(labels.par_chunks(CHUNK_ROWS)).zip(d.par_chunks_mut(rows));
        ordered(chunks.map(|(((student, teacher), labels), d)| {
            let (mut p, mut q) = (vec![0.0; classes], vec![0.0; classes]);
            let mut sum = LossSum::default();
            let logits = student.chunks_exact(classes).zip(teacher.chunks_exact(classes));
            for (((z_s, z_t), &y), d) in logits.zip(labels).zip(d.chunks_exact_mut(classes)) {
                let y = y as usize;
                let log_norm = softmax(z_s, t, &mut p);
                softmax(z_t, t, &mut q);
                let soft: f64 = q.iter().zip(z_s).map(|(q, &z)| q * (log_norm - f64::from(z) / t)).sum();
                let hard = log_norm - f64::from(z_s[y]) / t;
                let loss = alpha * t * t * soft + (1.0 - alpha) * hard;
                sum.add(LossSum { loss, correct: u64::from(first_highest(z_s) == y) });
                for (k, d) in d.iter_mut().enumerate() {
                    let label = if k == y { 1.0 } else { 0.0 };
                    let g = alpha * t * t * (p[k] - q[k]) + (1.0 - alpha) * (p[k] - label);
                    *d = (g * scale) as f32;
                }
            }
            sum
        }))
    }

    pub fn feature_mse(student: &[f32], teacher: &[f32], weight: f32, scale: f64, d: &mut [f32]) -> f64 {
        let scale = scale * 2.0 * f64::from(weight) / student.len().max(1) as f64;
        let pairs = student.par_chunks(CHUNK_ELEMENTS).zip(teacher.par_chunks(CHUNK_ELEMENTS));
        let sums: Vec<f64> = pairs
            .zip(d.par_chunks_mut(CHUNK_ELEMENTS))
            .map(|((student, teacher), d)| {
                let mut sum = 0.0;
                for ((d, s), t) in d.iter_mut().zip(student).zip(teacher) {
                    let difference = f64::from(s - t);
                    sum += difference * difference;
                    *d = (scale * difference) as f32;
                }
                sum
            })
            .collect();
        f64::from(weight) * sums.iter().sum::<f64>() / student.len().max(1) as f64
    }

    /// Loss of one image; leaves the probabilities in `p`.
    fn smoothed_row(z: &[f32], y: usize, smoothing: f32, p: &mut [f64]) -> LossSum {
        let log_norm = softmax(z, 1.0, p);
        let hard = log_norm - f64::from(z[y]);
        let smoothing = f64::from(smoothing);
        let uniform = log_norm - z.iter().map(|&z| f64::from(z)).sum::<f64>() / z.len() as f64;
        let loss = (1.0 - smoothing) * hard + smoothing * uniform;
        LossSum { loss, correct: u64::from(first_highest(z) == y) }
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

    fn first_highest(z: &[f32]) -> usize {
        let mut best = 0;
        for (k, value) in z.iter().enumerate() {
            if *value > z[best] {
                best = k;
            }
        }
        best
    }

    fn ordered(chunks: impl IndexedParallelIterator<Item = LossSum>) -> LossSum {
        let sums: Vec<LossSum> = chunks.collect();
        let mut total = LossSum::default();
        sums.into_iter().for_each(|sum| total.add(sum));
        total
    }

    impl LossSum {
        fn add(&mut self, other: Self) {
            self.loss += other.loss;
            self.correct += other.correct;
        }
    }
}
