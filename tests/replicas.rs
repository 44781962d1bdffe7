//! Training steps of several replicas against two networks that are trained by hand: the same bits on the host and on
//! emulated GPUs, for whole runs too.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use depthshrinker::data::{Augment, Dataset, ImageShape, Loader};
use depthshrinker::device::cache::Cache;
use depthshrinker::device::emulator::{Emulator, EmulatorOptions};
use depthshrinker::device::gpu::Gpu;
use depthshrinker::device::{Buffer, Device, View};
use depthshrinker::dtype::Dtype;
use depthshrinker::engine::{Engine, EngineOptions, Fusion};
use depthshrinker::graph::{Activation, BatchNorm, Dropout, GraphBuilder, NodeId, Op};
use depthshrinker::io::Checkpoint;
use depthshrinker::model::{Model, Weights};
use depthshrinker::ops::augment::ImageView;
use depthshrinker::ops::loss::{Gradient, LossRecord, LossSum, cross_entropy};
use depthshrinker::ops::optimizer::{Optimizer, OptimizerState, StepOutcome, Update};
use depthshrinker::shape::Window;
use depthshrinker::train::{
    Hook, Interrupt, Metrics, NoHook, Progress, Reporter, Session, Stage, StepBatch, StepImages, StepOptions,
    StepSettings, TrainConfig, TrainStep, train,
};
use depthshrinker::{Error, Result};

const CLASSES: usize = 10;
/// An odd batch: the first replica takes one image more.
const BATCH: usize = 7;
const PARTS: [Range<usize>; 2] = [0..4, 4..BATCH];
const SMOOTHING: f32 = 0.1;
const SHAPE: ImageShape = ImageShape { height: 12, width: 10, channels: 1 };

fn emulator(precision: Dtype) -> Device {
    let cache = Cache::at(Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels"));
    let driver = Emulator::new(EmulatorOptions::default(), cache).expect("a C++ compiler");
    Device::on(Gpu::new(Box::new(driver)), precision).expect("kernels that compile")
}

fn pairs() -> Vec<(&'static str, [Device; 2])> {
    let two = |precision| [emulator(precision), emulator(precision)];
    vec![
        ("host", [Device::Cpu, Device::Cpu]),
        ("f32", two(Dtype::F32)),
        ("f16", two(Dtype::F16)),
        ("host and f32", [Device::Cpu, emulator(Dtype::F32)]),
    ]
}

/// A small network with every kind of convolution, a residual, and dropout, which no two replicas may have alike.
fn model() -> Model {
    let mut b = GraphBuilder::new("tiny", SHAPE.into());
    let bn = |channels| BatchNorm { channels, eps: 1e-5, momentum: 0.1 };
    let dense = GraphBuilder::conv(1, 8, Window::square(3, 2, 1), 1);
    let mut x = b.conv_bn(("stem", dense), ("stem_bn", bn(8)), NodeId::INPUT);
    x = b.activation(Activation::RELU6, x);
    let (input, first) = (x, b.next_node());
    let act = Activation { site: Some(b.next_block().site()), ..Activation::RELU6 };
    x = b.conv_bn(("dw", GraphBuilder::conv(8, 8, Window::square(3, 1, 1), 8)), ("bn1", bn(8)), x);
    x = b.activation(act, x);
    x = b.conv_bn(("pw", GraphBuilder::conv(8, 8, Window::square(1, 1, 0), 1)), ("bn2", bn(8)), x);
    x = b.push("add", Op::Add, &[input, x]);
    b.block("block", input, first);
    x = b.push("pool", Op::GlobalAvgPool, &[x]);
    x = b.push("drop", Op::Dropout(Dropout { p: 0.2 }), &[x]);
    b.linear("classifier", 8, CLASSES, x);
    Model::initialise(b.finish().unwrap(), 3).unwrap()
}

fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// What a step gave, its numbers as bits.
#[derive(Debug, PartialEq)]
struct Outcome {
    loss: u64,
    correct: u64,
    scores: Vec<u32>,
    update: StepOutcome,
}

impl Outcome {
    fn new(sum: LossSum, scores: &[f32], update: StepOutcome) -> Self {
        let scores = scores.iter().map(|score| score.to_bits()).collect();
        Self { loss: sum.loss.to_bits(), correct: sum.correct, scores, update }
    }
}

fn bits(weights: &Weights) -> Vec<(&String, Vec<u32>)> {
    weights.iter().map(|(name, tensor)| (name, tensor.data.iter().map(|x| x.to_bits()).collect())).collect()
}

/// Two networks with an optimizer beside the first.
struct ByHand {
    engines: [Engine; 2],
    records: [LossRecord; 2],
    optimizer: OptimizerState,
}

impl ByHand {
    fn new(devices: &[Device; 2]) -> Self {
        let at = [0, 1];
        let mut engines = at.map(|at| {
            let options =
                EngineOptions { batch: PARTS[at].len(), fusion: Fusion::OnLoad, training: true, taps: Vec::new() };
            Engine::new(&devices[at], &model(), &options).unwrap()
        });
        let (spans, len) = (engines[0].optimizer_spans(), engines[0].trainable().0.len());
        let optimizer = OptimizerState::new(&devices[0], Optimizer::default(), spans, len).unwrap();
        let records = at.map(|at| LossRecord::new(&devices[at], PARTS[at].len(), CLASSES).unwrap());
        Self { engines, records, optimizer }
    }

    /// Forward and backward pass of one network; returns its gradients.
    fn gradients(&mut self, at: usize, images: &[f32], labels: &[u32], settings: StepSettings) -> Vec<f32> {
        let (engine, record, part) = (&mut self.engines[at], &mut self.records[at], PARTS[at].clone());
        let (device, len) = (engine.device().clone(), images.len() / BATCH);
        engine.set_step(settings.seed, 2 * settings.step + at as u64).unwrap();
        engine.set_loss_scale(self.optimizer.loss_scale());
        engine.set_images(View::Host(&images[part.start * len..part.end * len])).unwrap();
        record.begin(&labels[part.clone()]).unwrap();
        let logits = engine.run().unwrap().view(0..part.len() * CLASSES);
        let mut d = device.activations(part.len() * CLASSES).unwrap();
        let scale = device.upload(&[self.optimizer.loss_scale()]).unwrap();
        let gradient = Gradient { to: d.view_mut(0..part.len() * CLASSES), scale: Some(scale.view(0..1)) };
        cross_entropy(record, logits, SMOOTHING, Some(gradient)).unwrap();
        engine.backward(&d).unwrap();
        read(engine.trainable().1)
    }

    fn step(&mut self, images: &[f32], labels: &[u32], settings: StepSettings) -> Outcome {
        self.optimizer.begin(settings.update).unwrap();
        let [a, b] = [0, 1].map(|at| self.gradients(at, images, labels, settings));
        let mean = weighted(&a, &b);
        let [first, second] = &mut self.engines;
        first.trainable().1.write(&mean).unwrap();
        let (weights, gradients, copy) = first.for_update();
        self.optimizer.update(weights, gradients, copy).unwrap();
        second.trainable().0.write(&read(first.trainable().0)).unwrap();
        let scores = weighted(&first.score_gradients().unwrap(), &second.score_gradients().unwrap());
        let [a, b] = self.records.each_ref().map(|record| record.sum().unwrap());
        let sum = LossSum { loss: a.loss + b.loss, correct: a.correct + b.correct };
        Outcome::new(sum, &scores, self.optimizer.finish().unwrap())
    }
}

fn read(buffer: &Buffer) -> Vec<f32> {
    let mut out = vec![0.0; buffer.len()];
    buffer.read(&mut out).unwrap();
    out
}

fn weighted(a: &[f32], b: &[f32]) -> Vec<f32> {
    let share = PARTS.map(|part| part.len() as f32 / BATCH as f32);
    a.iter().zip(b).map(|(a, b)| share[0] * a + share[1] * b).collect()
}

fn options(recorded: bool) -> StepOptions<'static> {
    StepOptions {
        batch: BATCH,
        fusion: Fusion::OnLoad,
        optimizer: Optimizer::default(),
        label_smoothing: SMOOTHING,
        distillation: None,
        recorded,
    }
}

/// The batch, the slopes and the settings of a step.
fn inputs(step: u64, blocks: usize) -> (Vec<f32>, Vec<u32>, Vec<f32>, StepSettings) {
    let images = noise(step, BATCH * SHAPE.size());
    let labels = (0..BATCH as u32).map(|i| (i * 3 + step as u32) % CLASSES as u32).collect();
    let slopes = (0..blocks as u64).map(|block| f32::from((block + step).is_multiple_of(3))).collect();
    let update = Update { lr: 0.02 + 0.01 * step as f32, weight_decay: 1e-4, clip_norm: 5.0 };
    (images, labels, slopes, StepSettings { seed: 5, step, update })
}

/// Some steps, the last ones replayed where they are recorded, and the weights that come of them.
fn steps(devices: &[Device], recorded: bool) -> (Vec<Outcome>, Weights) {
    let mut step = TrainStep::new(devices, &model(), &options(recorded)).unwrap();
    step.collect_score_gradients(true);
    let outcome = |at| {
        let (images, labels, slopes, settings) = inputs(at, step.graph().blocks.len());
        step.set_slopes(&slopes).unwrap();
        let batch = StepBatch { images: StepImages::Normalised(&images), labels: &labels };
        let taken = step.run(&batch, settings).unwrap();
        assert_eq!(taken.images, BATCH);
        Outcome::new(taken.loss, &step.score_gradients().unwrap(), taken.update)
    };
    ((0..5).map(outcome).collect(), step.weights().unwrap())
}

#[test]
fn two_replicas_take_the_steps_of_two_networks_trained_by_hand() {
    for (name, devices) in pairs() {
        let mut by_hand = ByHand::new(&devices);
        let want: Vec<Outcome> = (0..5)
            .map(|at| {
                let (images, labels, slopes, settings) = inputs(at, model().graph.blocks.len());
                for engine in &mut by_hand.engines {
                    engine.set_slopes(&slopes).unwrap();
                    engine.collect_score_gradients(true);
                }
                by_hand.step(&images, &labels, settings)
            })
            .collect();
        assert!(want.iter().any(|outcome| !outcome.update.skipped), "{name}: a step is taken");
        let weights = by_hand.engines[0].weights().unwrap();
        for recorded in [true, false] {
            let (got, trained) = steps(&devices, recorded);
            assert_eq!(got, want, "{name}");
            assert!(bits(&trained) == bits(&weights), "{name}: weights or running statistics differ");
        }
        // Batch statistics are a replica's own, so one network does not learn the same.
        assert_ne!(steps(&devices[..1], true).0, want, "{name}");
    }
}

fn dataset(images: usize, seed: u64) -> Arc<Dataset> {
    let pixels = noise(seed, images * SHAPE.size()).iter().map(|x| (127.0 * (x + 1.0)) as u8).collect();
    let labels = (0..images as u32).map(|i| i % CLASSES as u32).collect();
    Arc::new(Dataset::from_memory("noise", SHAPE, CLASSES, pixels, labels).unwrap())
}

fn config(augment: Augment) -> TrainConfig {
    TrainConfig {
        epochs: 2,
        batch: BATCH,
        lr: 0.05,
        seed: 9,
        augment,
        label_smoothing: SMOOTHING,
        ..TrainConfig::default()
    }
}

fn run(devices: &[Device], config: &TrainConfig, hook: &mut dyn Hook, session: &mut Session) -> Result<Model> {
    let learn = Loader::train(dataset(24, 1), BATCH, config.augment.clone(), config.seed)?;
    let test = Loader::eval(dataset(9, 2), 4)?;
    let stage =
        Stage { name: "train", devices, model: model(), train: &learn, test: &test, config, hook, distillation: None };
    train(stage, session)
}

/// A batch's second part goes to the second replica, whether the host normalises images, or GPUs have the set or get bytes.
#[test]
fn a_run_on_two_devices_is_the_run_by_hand() {
    let looked_at = Augment { pad_crop: 1, flip: true, erase: 0.5, ..Augment::none() };
    let changed = Augment { color_jitter: 0.4, ..looked_at.clone() };
    for (name, devices) in pairs() {
        for augment in [&looked_at, &changed] {
            let config = config(augment.clone());
            let loader = Loader::train(dataset(24, 1), BATCH, augment.clone(), config.seed).unwrap();
            let mut by_hand = ByHand::new(&devices);
            let per_epoch = loader.steps_per_epoch() as u64;
            let batches = (0..config.epochs).flat_map(|epoch| loader.epoch(epoch, 0));
            for (step, batch) in (0..).zip(batches) {
                let batch = batch.unwrap();
                let lr = config.learning_rate(step, per_epoch);
                let update = Update { lr, weight_decay: config.weight_decay, clip_norm: config.clip_norm };
                by_hand.step(&batch.images, &batch.labels, StepSettings { seed: config.seed, step, update });
            }
            let trained = run(&devices, &config, &mut NoHook, &mut Session::silent()).unwrap();
            let weights = by_hand.engines[0].weights().unwrap();
            assert!(bits(&trained.weights) == bits(&weights), "{name} with {augment:?}");
        }
    }
}

/// Asks to stop after a step.
struct StopAfter(u64, Interrupt);

impl Hook for StopAfter {
    fn after_step(&mut self, _: &TrainStep<'_>, at: Progress<'_>) -> Result<()> {
        if at.step == self.0 {
            self.1.set();
        }
        Ok(())
    }
}

#[test]
fn a_stopped_run_of_two_replicas_resumes_to_the_same_bits() {
    let (devices, config) = ([Device::Cpu, Device::Cpu], config(Augment::none()));
    let want = run(&devices, &config, &mut NoHook, &mut Session::silent()).unwrap();
    for stop in 0..5 {
        let folder = tempfile::tempdir().unwrap();
        let (checkpoint, metrics) = (folder.path().join("checkpoint"), folder.path().join("metrics"));
        let mut session = Session::silent();
        session.checkpoint = Some(checkpoint.clone());
        session.metrics = Metrics::create(&metrics).unwrap();
        let mut hook = StopAfter(stop, session.interrupt.clone());
        let stopped = run(&devices, &config, &mut hook, &mut session).unwrap_err();
        assert!(matches!(stopped, Error::Interrupted(_)), "{stopped}");
        let saved = Checkpoint::read(&checkpoint).unwrap();
        let mut session = Session::resume(saved, &checkpoint, &metrics, String::new()).unwrap();
        session.reporter = Reporter::quiet();
        session.interrupt = Interrupt::new();
        let got = run(&devices, &config, &mut NoHook, &mut session).unwrap();
        assert!(bits(&got.weights) == bits(&want.weights), "stopped after {stop}");
    }
}

#[test]
fn what_replicas_cannot_share_is_refused() {
    let new = |devices: &[Device], batch| {
        TrainStep::new(devices, &model(), &StepOptions { batch, ..options(true) }).map(|_| ())
    };
    let refused = |outcome: Result<()>, part: &str| {
        let text = outcome.unwrap_err().to_string();
        assert!(text.contains(part) && !text.contains('\n'), "{text}");
    };
    refused(new(&[], BATCH), "one device");
    refused(new(&[Device::Cpu, Device::Cpu], 1), "2 devices");
    let mut step = TrainStep::new(&[Device::Cpu, Device::Cpu], &model(), &options(true)).unwrap();
    let (images, labels, _, settings) = inputs(0, 0);
    let mut run = |images, labels| step.run(&StepBatch { images, labels }, settings).map(|_| ());
    let whole = || StepImages::Normalised(&images);
    refused(run(whole(), &labels[1..]), "7 images");
    refused(run(StepImages::Normalised(&images[1..]), &labels), "whole images");
    refused(run(StepImages::Normalised(&images[..BATCH * 10]), &labels), "whole images");
    let views = [ImageView::default(); BATCH];
    refused(run(StepImages::Bytes { pixels: &[], views: views[..].into() }, &labels), "bytes");
    refused(run(whole(), &[CLASSES as u32; BATCH]), "label 10");
    run(whole(), &labels).expect("what was refused changes nothing");
}
