//! Training on an emulated GPU that is given a step before the outcome of the last one is read: few calls a step, and the
//! bits, records, checkpoints and errors of a run that waits for every step.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use depthshrinker::check::training::pooled;
use depthshrinker::data::{Augment, Dataset, ImageShape, Loader};
use depthshrinker::device::Device;
use depthshrinker::device::cache::Cache;
use depthshrinker::device::calls::{CallLog, Calls};
use depthshrinker::device::emulator::{Emulator, EmulatorOptions};
use depthshrinker::device::gpu::{Gpu, GpuBuffer};
use depthshrinker::dtype::Dtype;
use depthshrinker::graph::NodeId;
use depthshrinker::io::Checkpoint;
use depthshrinker::model::Model;
use depthshrinker::train::{
    Distillation, Hook, Interrupt, Metrics, Progress, Reporter, Session, Stage, TrainConfig, TrainStep, train,
};
use depthshrinker::{Error, Result};

const CLASSES: usize = 10;
const BATCH: usize = 4;
/// Of an epoch.
const STEPS: u64 = 4;

fn driver(options: EmulatorOptions) -> Emulator {
    let cache = Cache::at(Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels"));
    Emulator::new(options, cache).expect("a C++ compiler")
}

fn emulator(precision: Dtype) -> (Device, CallLog) {
    let options = EmulatorOptions::default();
    let calls = options.calls.clone();
    (Device::on(Gpu::new(Box::new(driver(options))), precision).expect("kernels that compile"), calls)
}

fn dataset(images: usize, seed: u64) -> Arc<Dataset> {
    let shape = ImageShape { height: 13, width: 10, channels: 1 };
    let mut state = seed;
    let mut noise = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    let pixels = (0..images * shape.size()).map(|_| noise()).collect();
    let labels = (0..images as u32).map(|i| i % CLASSES as u32).collect();
    Arc::new(Dataset::from_memory("noise", shape, CLASSES, pixels, labels).unwrap())
}

fn model() -> Model {
    Model::initialise(pooled().unwrap(), 3).unwrap()
}

/// What a hook does, and what it saw.
#[derive(Default)]
struct Watcher {
    /// Whether it reads score gradients after every step.
    follows: bool,
    /// Calls of the driver between the beginnings of two steps.
    calls: Option<CallLog>,
    of_steps: Vec<Calls>,
    /// Asks to stop before this step.
    stop: Option<(u64, Interrupt)>,
}

impl Hook for Watcher {
    fn before_forward(&mut self, step: &mut TrainStep<'_>, at: Progress<'_>) -> Result<()> {
        self.of_steps.extend(self.calls.as_ref().map(CallLog::take));
        if let Some((last, interrupt)) = &self.stop
            && *last == at.step
        {
            interrupt.set();
        }
        step.collect_score_gradients(self.follows);
        let sites = step.graph().sites() as u64;
        step.set_slopes(&(0..sites).map(|site| f32::from((site + at.step).is_multiple_of(3))).collect::<Vec<_>>())
    }

    fn follows_steps(&self) -> bool {
        self.follows
    }

    fn after_step(&mut self, step: &TrainStep<'_>, _: Progress<'_>) -> Result<()> {
        assert!(step.score_gradients()?.iter().any(|score| *score != 0.0));
        Ok(())
    }
}

fn config(lr: f32) -> TrainConfig {
    TrainConfig { epochs: 2, batch: BATCH, lr, clip_norm: 5.0, seed: 9, evaluate_every: 2, ..TrainConfig::default() }
}

fn run(
    device: &Device,
    config: &TrainConfig,
    hook: &mut Watcher,
    teacher: Option<&Distillation>,
    to: &mut Session,
) -> Result<Model> {
    let data = dataset(BATCH * STEPS as usize, 1);
    let train_loader = Loader::train(data, config.batch, config.augment.clone(), config.seed)?;
    let test = Loader::eval(dataset(6, 2), 4)?;
    let (name, devices) = ("stage", std::slice::from_ref(device));
    let stage =
        Stage { name, devices, model: model(), train: &train_loader, test: &test, config, hook, distillation: teacher };
    train(stage, to)
}

/// A folder for one run's files.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn checkpoint(&self) -> PathBuf {
        self.0.path().join("checkpoint.safetensors")
    }

    fn metrics(&self) -> PathBuf {
        self.0.path().join("metrics.jsonl")
    }

    fn start(&self) -> Session {
        let mut session = Session::silent();
        session.checkpoint = Some(self.checkpoint());
        session.metrics = Metrics::create(&self.metrics()).unwrap();
        session
    }

    fn resume(&self) -> Session {
        let saved = Checkpoint::read(&self.checkpoint()).unwrap();
        let mut session = Session::resume(saved, &self.checkpoint(), &self.metrics(), String::new()).unwrap();
        session.reporter = Reporter::quiet();
        session.interrupt = Interrupt::new();
        session
    }

    /// The lines of the metrics without what depends on the clock and on how memory came to be used.
    fn records(&self) -> Vec<serde_json::Value> {
        let record = |line: &str| {
            let mut record: serde_json::Value = serde_json::from_str(line).unwrap();
            for key in ["images_per_s", "seconds", "device_peak_bytes"] {
                record.as_object_mut().unwrap().remove(key);
            }
            record
        };
        fs::read_to_string(self.metrics()).unwrap().lines().map(record).collect()
    }

    /// Optimizer and sums of the checkpoint.
    fn saved(&self) -> (Vec<Vec<u32>>, u64, String) {
        let saved = Checkpoint::read(&self.checkpoint()).unwrap();
        let bits = |buffer: &Vec<f32>| buffer.iter().map(|x| x.to_bits()).collect();
        (saved.optimizer.iter().map(bits).collect(), saved.optimizer_steps, format!("{:?}", saved.sums))
    }
}

fn bits(model: &Model) -> Vec<Vec<u32>> {
    model.weights.values().map(|tensor| tensor.data.iter().map(|x| x.to_bits()).collect()).collect()
}

#[test]
fn a_step_is_one_upload_one_replay_and_one_download() {
    let teacher = model();
    let distillation = Distillation {
        teacher,
        alpha: 0.9,
        temperature: 2.0,
        feature_weight: 0.1,
        feature_pairs: vec![(NodeId::new(5), NodeId::new(5))],
    };
    let one = Calls { uploads: 1, replays: 1, downloads: 1, events: 1, waits: 1, ..Calls::default() };
    // A batch that is not on the GPU comes by itself: a copy beside the work, one to where kernels read it, what each is
    // ordered behind, and a wait for the copy of two batches before.
    let jitter = Augment { color_jitter: 0.1, ..Augment::none() };
    let brought = Calls { uploads: 2, copies: 1, events: 5, waits: 2, ..one };
    let cases = [
        ("training", false, None, Augment::none(), one),
        ("a teacher", false, Some(&distillation), Augment::none(), one),
        ("score gradients", true, None, Augment::none(), one),
        ("batches of bytes", false, None, jitter, brought),
    ];
    for (name, follows, teacher, augment, want) in cases {
        let (device, calls) = emulator(Dtype::F16);
        let mut hook = Watcher { follows, calls: Some(calls), ..Watcher::default() };
        let config = TrainConfig { augment, ..config(0.02) };
        run(&device, &config, &mut hook, teacher, &mut Session::silent()).unwrap();
        // The first is done launch by launch, the second recorded, and its outcome read with the third. The epoch ends with the
        // outcome of its last step, and the next one waits for none before its own.
        assert_eq!(hook.of_steps.len() as u64, 2 * STEPS, "{name}");
        for step in [3, 6, 7] {
            assert_eq!(hook.of_steps[step], want, "{name}, step {step}");
        }
    }
}

#[test]
fn steps_that_are_told_late_give_the_same_bits_records_and_checkpoints() {
    for (precision, augment) in [
        (Dtype::F32, Augment { color_jitter: 0.2, flip: true, ..Augment::none() }),
        (Dtype::F16, Augment { pad_crop: 1, flip: true, ..Augment::none() }),
    ] {
        let config = TrainConfig { augment, ..config(0.02) };
        let [late, at_once] = [false, true].map(|follows| {
            let folder = Folder::new();
            let mut hook = Watcher { follows, ..Watcher::default() };
            let model = run(&emulator(precision).0, &config, &mut hook, None, &mut folder.start()).unwrap();
            (bits(&model), folder.records(), folder.saved())
        });
        assert!(late.0 == at_once.0, "{precision}: weights");
        assert_eq!(late.1, at_once.1, "{precision}");
        assert!(late.2 == at_once.2, "{precision}: the checkpoint");
    }
}

/// The loss scale and the steps since it changed, with which a run in f16 goes on behind its second step, and those of its
/// end; and how many steps are taken and not skipped.
#[test]
fn the_loss_scale_moves_at_the_same_steps() {
    let large = (1 << 20) as f32;
    for (scale, good_steps, want_scale, want_good_steps, want_taken) in
        [(large, 5.0, large / 4.0, 4.0, 6), (1024.0, 1998.0, 2048.0, 4.0, 8), (1024.0, 0.0, 1024.0, 6.0, 8)]
    {
        let (device, _) = emulator(Dtype::F16);
        let [late, at_once] = [false, true].map(|follows| {
            let folder = Folder::new();
            let mut session = folder.start();
            let mut hook = Watcher { stop: Some((1, session.interrupt.clone())), ..Watcher::default() };
            run(&device, &config(0.02), &mut hook, None, &mut session).unwrap_err();
            let mut saved = Checkpoint::read(&folder.checkpoint()).unwrap();
            *saved.optimizer.last_mut().unwrap() = vec![scale, good_steps];
            saved.write(&folder.checkpoint()).unwrap();
            let mut hook = Watcher { follows, ..Watcher::default() };
            let model = run(&device, &config(0.02), &mut hook, None, &mut folder.resume()).unwrap();
            let saved = Checkpoint::read(&folder.checkpoint()).unwrap();
            let scaling = saved.optimizer.last().unwrap().clone();
            assert_eq!((scaling, saved.optimizer_steps), (vec![want_scale, want_good_steps], want_taken));
            (bits(&model), folder.saved())
        });
        assert!(late == at_once, "{scale}");
    }
}

#[test]
fn a_run_that_is_stopped_anywhere_ends_with_the_same_bits() {
    let (device, _) = emulator(Dtype::F16);
    let want = run(&device, &config(0.02), &mut Watcher::default(), None, &mut Session::silent()).unwrap();
    for last in [0, 1, 2, 3, 6, 7] {
        let folder = Folder::new();
        let mut session = folder.start();
        let mut hook = Watcher { stop: Some((last, session.interrupt.clone())), ..Watcher::default() };
        let stopped = run(&device, &config(0.02), &mut hook, None, &mut session).unwrap_err();
        assert!(matches!(stopped, Error::Interrupted(_)), "{stopped}");
        let saved = Checkpoint::read(&folder.checkpoint()).unwrap();
        assert_eq!((saved.position.step, saved.sums.images), (last + 1, (last % STEPS + 1) * BATCH as u64));
        let got = run(&device, &config(0.02), &mut Watcher::default(), None, &mut folder.resume()).unwrap();
        assert!(bits(&got) == bits(&want), "stopped in step {last}");
    }
}

#[test]
fn divergence_is_told_with_the_step_that_diverged_and_is_in_no_checkpoint() {
    let [late, at_once] = [false, true].map(|follows| {
        let folder = Folder::new();
        let mut session = folder.start();
        session.save_every = Duration::ZERO;
        let config = TrainConfig { clip_norm: 0.0, ..config(1e25) };
        let mut hook = Watcher { follows, ..Watcher::default() };
        let error = run(&emulator(Dtype::F32).0, &config, &mut hook, None, &mut session).unwrap_err();
        assert!(matches!(error, Error::NotFinite(_)), "{error}");
        (error.to_string(), Checkpoint::read(&folder.checkpoint()).ok().map(|saved| saved.position.step))
    });
    assert!(late.0.contains("at step"), "{}", late.0);
    assert_eq!(late, at_once);
    // Without a checkpoint a step, the next one has been taken by then.
    let mut hook = Watcher::default();
    let config = TrainConfig { clip_norm: 0.0, ..config(1e25) };
    let error = run(&emulator(Dtype::F32).0, &config, &mut hook, None, &mut Session::silent()).unwrap_err();
    assert_eq!(error.to_string(), late.0);
}

#[test]
fn inputs_come_in_one_copy_before_work_and_outcomes_in_one_after_it() {
    let options = EmulatorOptions::default();
    let calls = options.calls.clone();
    let gpu = Gpu::new(Box::new(driver(options)));
    let input = |len| GpuBuffer::input(&gpu, Dtype::F32, len).unwrap();
    let outcome = |len| GpuBuffer::outcome(&gpu, Dtype::F32, len).unwrap();
    let (mut a, mut b, mut x, mut y) = (input(3), input(40), outcome(5), outcome(1));
    assert!(x.is_outcome() && !a.is_outcome());
    calls.take();
    a.write(&[1.0, 2.0, 3.0]).unwrap();
    b.write(&[4.0; 40]).unwrap();
    b.write(&[5.0; 2]).unwrap();
    assert_eq!(calls.take(), Calls::default(), "nothing before work");
    x.clear().unwrap();
    let of_work = calls.take();
    assert_eq!((of_work.uploads, of_work.zeros), (1, 1));
    b.write(&[5.0; 2]).unwrap();
    y.clear().unwrap();
    assert_eq!(calls.take().uploads, 0, "nothing that has not changed");
    let mut got = [0.0; 40];
    b.read(&mut got).unwrap();
    assert_eq!((got[0], got[1], got[2]), (5.0, 5.0, 4.0));
    // Outcomes that are written as buffers are, read at once and as they were.
    x.write(&[7.0; 5]).unwrap();
    y.write(&[8.0]).unwrap();
    let before = gpu.post_outcomes().unwrap();
    // What is posted and read in between takes another way.
    drop(gpu.post_outcomes().unwrap());
    drop(gpu.post_outcomes().unwrap());
    x.write(&[9.0; 5]).unwrap();
    calls.take();
    let mut five = [0.0; 5];
    x.read(&mut five).unwrap();
    let mut one = [0.0];
    y.read(&mut one).unwrap();
    assert_eq!((five, one, calls.take().downloads), ([9.0; 5], [8.0], 1));
    let (snapshot, mut bytes) = (before.snapshot().unwrap(), [0; 20]);
    snapshot.read(&x, &mut bytes);
    assert_eq!(bytes[..4], 7.0f32.to_ne_bytes());
    // What was read is old once there was work.
    y.clear().unwrap();
    y.read(&mut one).unwrap();
    assert_eq!((one, calls.take().downloads), ([0.0], 1));
    // Places are used again, and where there is no more room a buffer has its own memory.
    drop(a);
    let again = input(3);
    again.read(&mut got[..3]).unwrap();
    assert_eq!(got[..3], [0.0; 3]);
    let mut many: Vec<GpuBuffer> = (0..200).map(|_| outcome(16)).collect();
    assert!(many[0].is_outcome() && !many[199].is_outcome());
    for (value, buffer) in many.iter_mut().enumerate() {
        buffer.write(&[value as f32]).unwrap();
    }
    for (value, buffer) in many.iter().enumerate() {
        buffer.read(&mut one).unwrap();
        assert_eq!(one, [value as f32]);
    }
}
