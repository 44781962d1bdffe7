//! Losses and optimizers: PyTorch's values, finite differences, a plain re-implementation, and the same bits for any
//! number of threads.

use std::path::{Path, PathBuf};

use depthshrinker::Result;
use depthshrinker::device::{Buffer, Device, View, ViewMut};
use depthshrinker::engine::Fusion;
use depthshrinker::io::layout;
use depthshrinker::io::tensors::{TensorFile, read_tensors};
use depthshrinker::model::{Model, Weights};
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::ops::loss::{self, Gradient, LossRecord, LossSum, SoftTarget};
use depthshrinker::ops::optimizer::{Optimizer, OptimizerState, ParamSpan, StepSize, Update, clip_coefficient};
use depthshrinker::shape::Shape;
use depthshrinker::tensor::Tensor;
use depthshrinker::train::{StepBatch, StepImages, StepOptions, StepSettings, TrainStep};

/// A cheap source of numbers in −1..1.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn fixture(name: &str) -> (PathBuf, TensorFile, Vec<u32>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    let bytes = std::fs::read(&path).unwrap();
    let raw = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let labels = raw.tensor("labels").unwrap();
    let labels = labels.data().chunks_exact(8).map(|b| u32::from(b[0])).collect();
    let file = read_tensors(&path).unwrap();
    (path, file, labels)
}

fn assert_close(name: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{name}");
    let scale = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * scale, "{name}[{i}]: got {g}, want {w}, scale {scale}");
    }
}

fn with_threads<R: Send>(threads: usize, body: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(body)
}

/// A record of one batch on the host.
fn record(labels: &[u32], classes: usize) -> Result<LossRecord> {
    let mut record = LossRecord::new(&Device::Cpu, labels.len(), classes)?;
    record.begin(labels)?;
    Ok(record)
}

fn cross_entropy(z: &[f32], labels: &[u32], classes: usize, smoothing: f32, d: Option<&mut [f32]>) -> Result<LossSum> {
    let mut record = record(labels, classes)?;
    let gradient = d.map(|d| Gradient { to: ViewMut::Host(d), scale: None });
    loss::cross_entropy(&mut record, View::Host(z), smoothing, gradient)?;
    record.sum()
}

fn distillation(z: &[f32], target: SoftTarget<'_>, labels: &[u32], classes: usize, d: &mut [f32]) -> Result<LossSum> {
    let mut record = record(labels, classes)?;
    loss::distillation(&mut record, View::Host(z), target, Gradient { to: ViewMut::Host(d), scale: None })?;
    record.sum()
}

fn feature_mse(student: &[f32], teacher: &[f32], weight: f32, d: &mut [f32]) -> Result<f64> {
    let mut record = record(&[0], 1)?;
    let gradient = Gradient { to: ViewMut::Host(d), scale: None };
    loss::feature_mse(&mut record, View::Host(student), View::Host(teacher), weight, gradient)?;
    Ok(record.sum()?.loss)
}

#[test]
fn losses_are_pytorch_s() {
    let (_, file, labels) = fixture("losses.safetensors");
    let data = |name: &str| file.tensors[name].data.as_slice();
    let (student, teacher, classes) = (data("student"), data("teacher"), 7);
    let check = |name: &str, value: f64, d: &[f32]| {
        assert_close(&format!("{name} value"), &[value as f32], data(&format!("{name}/value")), 1e-6);
        assert_close(&format!("{name} gradient"), d, data(&format!("{name}/grad")), 1e-6);
    };
    let n = labels.len() as f64;
    for (name, smoothing) in [("ce_0", 0.0), ("ce_01", 0.1)] {
        let mut d = vec![0.0; student.len()];
        let d_view = Some(&mut d[..]);
        let sum = cross_entropy(student, &labels, classes, smoothing, d_view).unwrap();
        check(name, sum.loss / n, &d);
        assert_eq!(sum, cross_entropy(student, &labels, classes, smoothing, None).unwrap());
    }
    for (name, alpha, temperature) in [("kd_a07_t1", 0.7, 1.0), ("kd_a05_t3", 0.5, 3.0)] {
        let mut d = vec![0.0; student.len()];
        let target = SoftTarget { teacher: View::Host(teacher), alpha, temperature };
        let sum = distillation(student, target, &labels, classes, &mut d).unwrap();
        check(name, sum.loss / n, &d);
    }
    let (own, other) = (data("mse/student"), data("mse/teacher"));
    let mut d = vec![0.0; own.len()];
    let value = feature_mse(own, other, 1.0, &mut d).unwrap();
    check("mse", value, &d);
}

#[test]
fn a_row_that_is_not_finite_is_no_hit() {
    for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in 0..3 {
            let mut z = vec![3.0, 1.0, 2.0, 3.0, 3.0, 2.0];
            z[at] = broken;
            for labels in [[0, 0], [1, 0], [2, 0]] {
                let sum = cross_entropy(&z, &labels, 3, 0.0, None).unwrap();
                assert_eq!(sum.correct, 1, "{z:?} {labels:?}: the second row's alone");
                assert!(!sum.loss.is_finite());
                let target = SoftTarget { teacher: View::Host(&[0.5; 6]), alpha: 0.5, temperature: 1.0 };
                assert_eq!(distillation(&z, target, &labels, 3, &mut [0.0; 6]).unwrap().correct, 1);
            }
        }
    }
    let equal = cross_entropy(&[2.0, 2.0, 1.0], &[1], 3, 0.0, None).unwrap();
    assert_eq!(equal.correct, 0, "the first of equal ones");
}

/// Central differences of a loss that sums over the batch.
fn differences(z: &[f32], loss: impl Fn(&[f32]) -> f64) -> Vec<f32> {
    const STEP: f32 = 1.0 / 256.0;
    let shifted = |i: usize, by: f32| {
        let mut z = z.to_vec();
        z[i] += by;
        loss(&z)
    };
    (0..z.len()).map(|i| ((shifted(i, STEP) - shifted(i, -STEP)) / (2.0 * f64::from(STEP))) as f32).collect()
}

#[test]
fn gradients_are_those_of_the_values() {
    let (n, classes) = (67, 3);
    let z: Vec<f32> = numbers(n * classes, 1).iter().map(|x| 4.0 * x).collect();
    let teacher = numbers(n * classes, 2);
    let labels: Vec<u32> = (0..n as u32).map(|i| i % 3).collect();
    let mean = |sum: LossSum| sum.loss / n as f64;
    let mut d = vec![0.0; z.len()];
    cross_entropy(&z, &labels, classes, 0.2, Some(&mut d)).unwrap();
    let value = |z: &[f32]| mean(cross_entropy(z, &labels, classes, 0.2, None).unwrap());
    assert_close("cross-entropy", &d, &differences(&z, value), 1e-4);

    let target = SoftTarget { teacher: View::Host(&teacher), alpha: 0.3, temperature: 2.5 };
    distillation(&z, target, &labels, classes, &mut d).unwrap();
    let value = |z: &[f32]| {
        let mut d = vec![0.0; z.len()];
        mean(distillation(z, target, &labels, classes, &mut d).unwrap())
    };
    assert_close("distillation", &d, &differences(&z, value), 1e-4);

    feature_mse(&z, &teacher, 0.5, &mut d).unwrap();
    let value = |z: &[f32]| {
        let mut d = vec![0.0; z.len()];
        feature_mse(z, &teacher, 0.5, &mut d).unwrap()
    };
    assert_close("features", &d, &differences(&z, value), 1e-4);
}

#[test]
fn extreme_logits_stay_finite_and_bad_ones_show() {
    let z = [3e38, -3e38, 0.0, -3e38, -3e38, -3e38];
    let mut d = [0.0; 6];
    let sum = cross_entropy(&z, &[0, 2], 3, 0.0, Some(&mut d)).unwrap();
    assert!(sum.loss.is_finite() && d.iter().all(|x| x.is_finite()), "{sum:?} {d:?}");
    assert_eq!(sum.correct, 1, "the first of equal logits is the answer");
    let sum = cross_entropy(&[f32::NAN, 0.0], &[0], 2, 0.0, None).unwrap();
    assert!(sum.loss.is_nan());
    let label = cross_entropy(&z, &[0, 3], 3, 0.0, None).unwrap_err().to_string();
    assert!(label.contains("label 3"), "{label}");
    assert!(cross_entropy(&z, &[0], 3, 0.0, None).is_err());
    assert!(feature_mse(&z, &z[1..], 1.0, &mut d).is_err());
}

#[test]
fn losses_have_the_same_bits_for_any_number_of_threads() {
    let (n, classes) = (1000, 10);
    let (z, teacher) = (numbers(n * classes, 5), numbers(n * classes, 6));
    let labels: Vec<u32> = (0..n as u32).map(|i| i % 10).collect();
    let run = || {
        let (mut a, mut b, mut c) = (vec![0.0; z.len()], vec![0.0; z.len()], vec![0.0; z.len()]);
        let hard = cross_entropy(&z, &labels, classes, 0.1, Some(&mut a)).unwrap();
        let target = SoftTarget { teacher: View::Host(&teacher), alpha: 0.7, temperature: 1.0 };
        let soft = distillation(&z, target, &labels, classes, &mut b).unwrap();
        let features = feature_mse(&z, &teacher, 1.0, &mut c).unwrap();
        (a, b, c, hard.loss.to_bits(), soft.loss.to_bits(), features.to_bits())
    };
    let one = with_threads(1, run);
    assert!([2, 3, 5].iter().all(|&threads| with_threads(threads, run) == one));
}

/// The parameters of the optimizer tests: more than a chunk, with gaps that must not be touched.
const LEN: usize = 40_000;
const SGD: Optimizer = Optimizer::Sgd { momentum: 0.9, nesterov: true };
const ADAMW: Optimizer = Optimizer::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };

fn test_spans() -> Vec<ParamSpan> {
    [(3..17, true), (17..20_000, false), (20_004..33_000, true), (33_000..33_001, false), (36_000..39_999, true)]
        .map(|(range, decayed)| ParamSpan { range, decayed })
        .to_vec()
}

/// What `torch.optim` computes for one parameter, in `f64`.
fn reference(optimizer: Optimizer, mut w: f64, gradients: &[f64], lr: f64, decay: f64) -> f64 {
    let (mut a, mut b) = (0.0, 0.0);
    for (step, &gradient) in gradients.iter().enumerate() {
        match optimizer {
            Optimizer::Sgd { momentum, nesterov } => {
                let momentum = f64::from(momentum);
                let g = gradient + decay * w;
                a = if step == 0 { g } else { momentum * a + g };
                w -= lr * if nesterov { g + momentum * a } else { a };
            }
            Optimizer::AdamW { beta1, beta2, eps } => {
                let (beta1, beta2) = (f64::from(beta1), f64::from(beta2));
                let step = step as i32 + 1;
                w -= lr * decay * w;
                a = beta1 * a + (1.0 - beta1) * gradient;
                b = beta2 * b + (1.0 - beta2) * gradient * gradient;
                let root = (b / (1.0 - beta2.powi(step))).sqrt() + f64::from(eps);
                w -= lr * a / (1.0 - beta1.powi(step)) / root;
            }
        }
    }
    w
}

fn optimize(optimizer: Optimizer, steps: u32, size: StepSize) -> Vec<f32> {
    let mut state = OptimizerState::new(&Device::Cpu, optimizer, test_spans(), LEN).unwrap();
    let mut w = Buffer::Host(numbers(LEN, 1));
    for step in 0..steps {
        state.step(&mut w, &Buffer::Host(numbers(LEN, 100 + step)), size).unwrap();
    }
    let mut out = vec![0.0; LEN];
    w.read(&mut out).unwrap();
    out
}

#[test]
fn optimizers_follow_their_formulas_within_their_spans() {
    let (start, steps) = (numbers(LEN, 1), 4);
    let gradients: Vec<Vec<f32>> = (0..steps).map(|step| numbers(LEN, 100 + step)).collect();
    let plain = Optimizer::Sgd { momentum: 0.9, nesterov: false };
    for optimizer in [SGD, plain, ADAMW] {
        let got = optimize(optimizer, steps, StepSize { lr: 0.1, weight_decay: 0.3, scale: 0.5 });
        let spans = test_spans();
        for i in 0..LEN {
            let Some(span) = spans.iter().find(|span| span.range.contains(&i)) else {
                assert_eq!(got[i].to_bits(), start[i].to_bits(), "{optimizer:?} touches a gap at {i}");
                continue;
            };
            let gradients: Vec<f64> = gradients.iter().map(|g| 0.5 * f64::from(g[i])).collect();
            let decay = if span.decayed { 0.3f32 } else { 0.0 };
            let want = reference(optimizer, start[i].into(), &gradients, 0.1f32.into(), decay.into());
            assert!((f64::from(got[i]) - want).abs() < 2e-6, "{optimizer:?} at {i}: {} against {want}", got[i]);
        }
    }
}

#[test]
fn optimizers_have_the_same_bits_for_any_number_of_threads() {
    let state = OptimizerState::new(&Device::Cpu, SGD, test_spans(), LEN).unwrap();
    let gradients = Buffer::Host(numbers(LEN, 3));
    let run = || {
        let size = StepSize { lr: 0.1, weight_decay: 0.3, scale: 0.5 };
        (optimize(SGD, 3, size), optimize(ADAMW, 3, size), state.gradient_norm(&gradients).unwrap().to_bits())
    };
    let one = with_threads(1, run);
    assert!([2, 3, 5].iter().all(|&threads| with_threads(threads, run) == one));
}

#[test]
fn norms_and_clipping_are_pytorch_s() {
    let spans = test_spans();
    let gradients = numbers(LEN, 3);
    let want: f64 = spans.iter().flat_map(|s| &gradients[s.range.clone()]).map(|&g| f64::from(g).powi(2)).sum();
    let state = OptimizerState::new(&Device::Cpu, SGD, spans, LEN).unwrap();
    let norm = state.gradient_norm(&Buffer::Host(gradients)).unwrap();
    assert!((norm - want.sqrt()).abs() < 1e-9 * norm);
    assert_eq!(clip_coefficient(3.0, 5.0), 1.0);
    assert!((f64::from(clip_coefficient(10.0, 5.0)) - 0.5).abs() < 1e-6);
    let overlapping = vec![ParamSpan { range: 0..4, decayed: true }, ParamSpan { range: 3..5, decayed: true }];
    assert!(OptimizerState::new(&Device::Cpu, SGD, overlapping, 5).is_err());
}

#[test]
fn a_restored_optimizer_goes_on_with_the_same_bits() {
    for optimizer in [SGD, ADAMW] {
        let size = StepSize { lr: 0.1, weight_decay: 0.3, scale: 0.5 };
        let whole = optimize(optimizer, 5, size);
        let mut w = Buffer::Host(numbers(LEN, 1));
        let mut saved = (Vec::new(), 0);
        for step in 0..5 {
            let mut state = OptimizerState::new(&Device::Cpu, optimizer, test_spans(), LEN).unwrap();
            if step > 0 {
                state.restore(&saved.0, saved.1).unwrap();
            }
            state.step(&mut w, &Buffer::Host(numbers(LEN, 100 + step)), size).unwrap();
            saved = (state.save().unwrap(), state.steps());
        }
        assert_eq!(w.view(0..LEN).host(), whole);
        let mut other = OptimizerState::new(&Device::Cpu, optimizer, test_spans(), LEN).unwrap();
        assert!(other.restore(&[vec![0.0; 3]], 1).is_err());
    }
}

/// The network whose training PyTorch recorded, with its starting weights.
fn recorded_network(file: &TensorFile) -> Model {
    let options = NetworkOptions {
        input_stride: Some(1),
        stage_strides: Some(vec![1, 2, 2, 2, 1, 2, 1]),
        head_channels: Some(64),
        ..NetworkOptions::new(Shape::new(20, 28, 1), 10)
    };
    let graph = build("mobilenetv2-0.25", &options).unwrap();
    let mut weights = Weights::new();
    for spec in graph.params().unwrap() {
        let tensor = &file.tensors[&format!("weights/{}", spec.name)];
        assert_eq!(tensor.shape, layout::file_shape(&spec), "{}", spec.name);
        let data = layout::from_file(&spec, tensor.data.clone());
        weights.insert(spec.name.clone(), Tensor::new(spec.shape, data).unwrap());
    }
    Model::new(graph, weights).unwrap()
}

#[test]
fn training_steps_are_pytorch_s() {
    let (_, file, labels) = fixture("mobilenet_v2_tiny.safetensors");
    let images = layout::nchw_to_nhwc(&file.tensors["input"].data, 1, 20 * 28);
    let adamw = Update { lr: 2e-3, weight_decay: 0.01, clip_norm: 5.0 };
    let sgd = Update { lr: 0.05, weight_decay: 1e-4, clip_norm: 5.0 };
    let batch = StepBatch { images: StepImages::Normalised(&images), labels: &labels };
    for (run, optimizer, update) in [("steps", SGD, sgd), ("adamw", ADAMW, adamw)] {
        let options = StepOptions {
            batch: labels.len(),
            fusion: Fusion::OnLoad,
            optimizer,
            label_smoothing: 0.1,
            distillation: None,
            recorded: true,
        };
        let mut training = TrainStep::new(&[Device::Cpu], &recorded_network(&file), &options).unwrap();
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        for step in 0..8 {
            let taken = training.run(&batch, StepSettings { seed: 0, step, update }).unwrap();
            losses.push((taken.loss.loss / labels.len() as f64) as f32);
            norms.push(taken.update.gradient_norm.unwrap() as f32);
        }
        assert_close(&format!("{run} losses"), &losses, &file.tensors[&format!("{run}/loss")].data, 1e-4);
        assert_close(&format!("{run} norms"), &norms, &file.tensors[&format!("{run}/grad_norm")].data, 1e-3);
    }
}
