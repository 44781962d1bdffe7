//! The training loop: it learns, it refuses what it cannot use, and a run that was stopped anywhere and resumed ends
//! with the same bits as one that was not.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use depthshrinker::data::{Augment, Dataset, ImageShape, Loader};
use depthshrinker::device::Device;
use depthshrinker::engine::{Engine, EngineOptions, Fusion};
use depthshrinker::graph::{Activation, BatchNorm, Dropout, GraphBuilder, NodeId, Op};
use depthshrinker::io::Checkpoint;
use depthshrinker::model::Model;
use depthshrinker::shape::{Shape, Window};
use depthshrinker::train::{
    Distillation, EpochRecord, Evaluation, Hook, HookRecord, Interrupt, Metrics, NoHook, Progress, Reporter,
    ScoreRecord, Session, Stage, TrainConfig, TrainStep, evaluate, train,
};
use depthshrinker::{Error, Result};
use serde_json::{Map, Value, json};

const IMAGES: usize = 100;
const BATCH: usize = 16;
/// 100 images in batches of 16; the rest of an epoch is dropped.
const STEPS: u64 = 6;
const CLASSES: usize = 4;

/// Noisy images of four directions of stripes.
fn dataset(images: usize, seed: u64) -> Arc<Dataset> {
    let shape = ImageShape { height: 8, width: 9, channels: 1 };
    let mut state = seed;
    let mut noise = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 57) as u8
    };
    let mut pixels = Vec::new();
    let labels: Vec<u32> = (0..images as u32).map(|i| i % CLASSES as u32).collect();
    for label in &labels {
        for (y, x) in (0..8).flat_map(|y| (0..9).map(move |x| (y, x))) {
            let stripe = [y, x, x + y, x + 8 - y][*label as usize] % 4 < 2;
            pixels.push(if stripe { 128 } else { 0 } + noise());
        }
    }
    Arc::new(Dataset::from_memory("stripes", shape, CLASSES, pixels, labels).unwrap())
}

fn model(seed: u64) -> Model {
    let mut b = GraphBuilder::new("tiny", Shape::new(8, 9, 1));
    let bn = |channels| BatchNorm { channels, eps: 1e-5, momentum: 0.1 };
    let window = Window::square(3, 1, 1);
    let mut x = b.conv_bn(("stem", GraphBuilder::conv(1, 8, window, 1)), ("stem_bn", bn(8)), NodeId::INPUT);
    x = b.activation(Activation::RELU6, x);
    for block in 0..2 {
        let (input, first) = (x, b.next_node());
        let act = Activation { site: Some(b.next_block().site()), ..Activation::RELU6 };
        let name = |part: &str| format!("blocks.{block}.{part}");
        x = b.conv_bn((&name("dw"), GraphBuilder::conv(8, 8, window, 8)), (&name("bn1"), bn(8)), x);
        x = b.activation(act, x);
        let project = GraphBuilder::conv(8, 8, Window::square(1, 1, 0), 1);
        x = b.conv_bn((&name("pw"), project), (&name("bn2"), bn(8)), x);
        x = b.push(name("add"), Op::Add, &[input, x]);
        b.block(format!("blocks.{block}"), input, first);
    }
    x = b.push("pool", Op::GlobalAvgPool, &[x]);
    x = b.push("drop", Op::Dropout(Dropout { p: 0.2 }), &[x]);
    b.linear("classifier", 8, CLASSES, x);
    Model::initialise(b.finish().unwrap(), seed).unwrap()
}

fn config() -> TrainConfig {
    let augment = Augment { pad_crop: 1, flip: true, ..Augment::none() };
    TrainConfig { epochs: 3, batch: BATCH, lr: 0.05, seed: 9, augment, evaluate_every: 2, ..TrainConfig::default() }
}

/// A hook with state of its own, that reads and sets what search does; it can also end the run at a step.
#[derive(Default)]
struct Scores {
    scores: Vec<f32>,
    stop: Option<(u64, Stop)>,
}

#[derive(Clone)]
enum Stop {
    /// Asks to stop, as Ctrl-C does.
    Interrupt(Interrupt),
    /// Ends at once without a last word, as a kill does.
    Kill,
    /// The same, at the first evaluation from this step on.
    KillInEvaluation,
    /// Copies the checkpoint aside and goes on.
    Copy(PathBuf, PathBuf),
    /// Asks to stop at the first evaluation from this step on.
    InterruptInEvaluation(Interrupt),
}

fn killed() -> Error {
    Error::Config("killed".into())
}

impl Scores {
    fn slopes(&self) -> Vec<f32> {
        self.scores.iter().map(|s| if *s > 0.0 { 1.0 } else { 0.0 }).collect()
    }
}

impl Hook for Scores {
    fn before_forward(&mut self, step: &mut TrainStep<'_>, _: Progress<'_>) -> Result<()> {
        self.scores.resize(step.graph().sites(), 0.0);
        step.collect_score_gradients(true);
        step.set_slopes(&self.slopes())
    }

    fn after_step(&mut self, step: &TrainStep<'_>, at: Progress<'_>) -> Result<()> {
        for (score, gradient) in self.scores.iter_mut().zip(step.score_gradients()?) {
            *score = *score * 0.9 - gradient / 3.0;
        }
        match &self.stop {
            Some((step, Stop::Interrupt(interrupt))) if *step == at.step => interrupt.set(),
            Some((step, Stop::Kill)) if *step == at.step => return Err(killed()),
            Some((step, Stop::Copy(from, to))) if *step == at.step => drop(fs::copy(from, to).unwrap()),
            _ => {}
        }
        Ok(())
    }

    fn before_evaluation(&mut self, engine: &mut Engine, at: Progress<'_>) -> Result<()> {
        match &self.stop {
            Some((step, Stop::KillInEvaluation)) if *step <= at.step => return Err(killed()),
            Some((step, Stop::InterruptInEvaluation(interrupt))) if *step <= at.step => interrupt.set(),
            _ => {}
        }
        engine.set_slopes(&self.slopes())
    }

    fn epoch_record(&mut self, _: Progress<'_>) -> Option<HookRecord> {
        // Every bit of the scores is in the line.
        let bits = self.scores.iter().fold(0, |sum: u64, score| sum.rotate_left(7) ^ u64::from(score.to_bits()));
        Some(HookRecord::Search { exploring: false, kept: vec![1, 0], mask_changes: bits })
    }

    fn state(&self) -> Value {
        json!(self.scores)
    }

    fn restore(&mut self, state: &Value) -> Result<()> {
        self.scores = serde_json::from_value(state.clone()).map_err(|e| Error::Config(e.to_string()))?;
        Ok(())
    }
}

fn run(config: &TrainConfig, hook: &mut dyn Hook, teacher: Option<&Distillation>, to: &mut Session) -> Result<Model> {
    let train_loader = Loader::train(dataset(IMAGES, 1), config.batch, config.augment.clone(), config.seed)?;
    let test = Loader::eval(dataset(30, 2), 8)?;
    let (name, devices, model) = ("search", &[Device::Cpu], model(4));
    train(Stage { name, devices, model, train: &train_loader, test: &test, config, hook, distillation: teacher }, to)
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

    /// The metrics without what depends on the clock.
    fn records(&self) -> Vec<Map<String, Value>> {
        let text = fs::read_to_string(self.metrics()).unwrap();
        let record = |line: &str| {
            let mut record: Map<String, Value> = serde_json::from_str(line).unwrap();
            assert!(record.remove("images_per_s").is_some() && record.remove("seconds").is_some());
            record
        };
        text.lines().map(record).collect()
    }
}

fn assert_same(name: &str, got: &Model, want: &Model) {
    assert_eq!(got.graph, want.graph);
    for (param, tensor) in &want.weights {
        let bits = |t: &depthshrinker::tensor::Tensor| t.data.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(bits(got.weight(param)) == bits(tensor), "{name}: {param} differs");
    }
}

fn with_threads<R: Send>(threads: usize, body: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(body)
}

#[test]
fn training_learns_and_writes_a_record_per_epoch() {
    let folder = Folder::new();
    let config = TrainConfig { epochs: 12, lr: 0.2, evaluate_every: 5, ..config() };
    let trained = run(&config, &mut NoHook, None, &mut folder.start()).unwrap();
    let records = folder.records();
    assert_eq!(records.len(), 12);
    let number = |epoch: usize, key: &str| records[epoch][key].as_f64();
    assert!(number(11, "train_loss") < number(0, "train_loss"));
    assert!(number(11, "test_top1").unwrap() > 70.0, "{records:?}");
    let evaluated: Vec<usize> = (0..12).filter(|&e| number(e, "test_top1").is_some()).map(|e| e + 1).collect();
    assert_eq!(evaluated, [5, 10, 12]);
    assert_eq!(records[3]["step"], json!(4 * STEPS));
    assert_eq!(records[3]["stage"], json!("search"));
    let keys: Vec<&str> = records[3].keys().map(String::as_str).collect();
    assert_eq!(keys, ["epoch", "lr", "stage", "step", "test_loss", "test_top1", "train_loss", "train_top1"]);
    assert_eq!((&records[3]["epoch"], &records[3]["test_loss"]), (&json!(4), &Value::Null));
    // An f32 has all digits of the number that it is.
    assert_eq!(records[0]["lr"], json!(config.learning_rate(STEPS - 1, STEPS)));

    let options = EngineOptions { batch: 8, fusion: Fusion::OnLoad, training: false, taps: Vec::new() };
    let mut engine = Engine::new(&Device::Cpu, &trained, &options).unwrap();
    let Evaluation { top1, loss, images } = evaluate(&mut engine, &Loader::eval(dataset(30, 2), 8).unwrap()).unwrap();
    assert_eq!((Some(top1), Some(loss), images), (number(11, "test_top1"), number(11, "test_loss"), 30));
}

/// The lines that scripts and older reports read, byte for byte.
#[test]
fn every_kind_of_line_has_its_keys() {
    let folder = Folder::new();
    let mut metrics = Metrics::create(&folder.metrics()).unwrap();
    let search = EpochRecord {
        stage: "search".into(),
        epoch: 1,
        step: 2,
        lr: 0.1,
        train_loss: 2.5,
        train_top1: 6.25,
        test_loss: Some(2.25),
        test_top1: None,
        images_per_s: None,
        seconds: 3.5,
        device_peak_bytes: None,
        hook: Some(HookRecord::Search { exploring: false, kept: vec![1, 0], mask_changes: 16 }),
    };
    metrics.append(&search).unwrap();
    let hook = Some(HookRecord::Finetune { removed_slope: 0.5, partial: true });
    metrics.append(&EpochRecord { stage: "finetune".into(), device_peak_bytes: Some(7), hook, ..search }).unwrap();
    metrics.append(&ScoreRecord { stage: "search".into(), step: 0, scores: vec![0.5, 0.207_011_67] }).unwrap();
    let text = fs::read_to_string(folder.metrics()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let numbers = r#""test_loss":2.25,"test_top1":null,"train_loss":2.5,"train_top1":6.25}"#;
    assert_eq!(
        lines,
        [
            format!(
                r#"{{"epoch":1,"exploring":false,"images_per_s":null,"kept":[1,0],"lr":0.10000000149011612,"mask_changes":16,"seconds":3.5,"stage":"search","step":2,{numbers}"#
            ),
            format!(
                r#"{{"device_peak_bytes":7,"epoch":1,"images_per_s":null,"lr":0.10000000149011612,"partial":true,"removed_slope":0.5,"seconds":3.5,"stage":"finetune","step":2,{numbers}"#
            ),
            r#"{"scores":[0.5,0.20701166987419128],"stage":"search","step":0}"#.to_owned(),
        ]
    );
    assert_eq!(metrics.len(), text.len() as u64);
}

#[test]
fn a_run_stopped_at_any_step_resumes_to_the_same_bits() {
    let whole = Folder::new();
    let want = run(&config(), &mut Scores::default(), None, &mut whole.start()).unwrap();
    for step in 0..3 * STEPS {
        let folder = Folder::new();
        let mut session = folder.start();
        let stop = Some((step, Stop::Interrupt(session.interrupt.clone())));
        let error = run(&config(), &mut Scores { stop, ..Scores::default() }, None, &mut session).unwrap_err();
        assert!(matches!(&error, Error::Interrupted(text) if text.contains("--resume")), "{error}");
        let got = run(&config(), &mut Scores::default(), None, &mut folder.resume()).unwrap();
        assert_same(&format!("interrupted at {step}"), &got, &want);
        assert_eq!(folder.records(), whole.records());
    }
}

#[test]
fn a_run_killed_at_any_step_resumes_to_the_same_bits() {
    let whole = Folder::new();
    let want = run(&config(), &mut Scores::default(), None, &mut whole.start()).unwrap();
    for step in 1..3 * STEPS {
        let folder = Folder::new();
        let mut session = folder.start();
        session.save_every = Duration::ZERO;
        let stop = Some((step, Stop::Kill));
        run(&config(), &mut Scores { stop, ..Scores::default() }, None, &mut session).unwrap_err();
        // A line that a kill cut off.
        let text = fs::read_to_string(folder.metrics()).unwrap();
        fs::write(folder.metrics(), text + "{\"half a li").unwrap();
        let got = run(&config(), &mut Scores::default(), None, &mut folder.resume()).unwrap();
        assert_same(&format!("killed at {step}"), &got, &want);
        assert_eq!(folder.records(), whole.records());
    }
}

#[test]
fn a_run_goes_on_from_an_old_checkpoint_to_the_same_bits() {
    let whole = Folder::new();
    let want = run(&config(), &mut Scores::default(), None, &mut whole.start()).unwrap();
    for step in 1..3 * STEPS {
        let folder = Folder::new();
        let aside = folder.checkpoint().with_extension("old");
        let mut session = folder.start();
        session.save_every = Duration::ZERO;
        let stop = Some((step, Stop::Copy(folder.checkpoint(), aside.clone())));
        run(&config(), &mut Scores { stop, ..Scores::default() }, None, &mut session).unwrap();
        // Everything after the copy, records included, is the future that a kill took.
        fs::rename(aside, folder.checkpoint()).unwrap();
        let got = run(&config(), &mut Scores::default(), None, &mut folder.resume()).unwrap();
        assert_same(&format!("back to {step}"), &got, &want);
        assert_eq!(folder.records(), whole.records());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_ends_the_run_with_one_line() {
    if !Path::new("/dev/full").exists() {
        return;
    }
    let mut session = Session::silent();
    session.metrics = Metrics::create(Path::new("/dev/full")).unwrap();
    let text = run(&config(), &mut NoHook, None, &mut session).unwrap_err().to_string();
    assert!(text.contains("free some space") && !text.contains('\n'), "{text}");
    let mut session = Session::silent();
    session.checkpoint = Some("/dev/full".into());
    let text = run(&config(), &mut NoHook, None, &mut session).unwrap_err().to_string();
    assert!(text.contains("free some space") && !text.contains('\n'), "{text}");
}

#[test]
fn a_run_stopped_while_it_evaluates_resumes_to_the_same_bits() {
    let whole = Folder::new();
    let want = run(&config(), &mut Scores::default(), None, &mut whole.start()).unwrap();
    for step in [1, 2 * STEPS + 1] {
        for kill in [true, false] {
            let folder = Folder::new();
            let mut session = folder.start();
            session.save_every = Duration::ZERO;
            let interrupt = Stop::InterruptInEvaluation(session.interrupt.clone());
            let stop = Some((step, if kill { Stop::KillInEvaluation } else { interrupt }));
            run(&config(), &mut Scores { stop, ..Scores::default() }, None, &mut session).unwrap_err();
            let got = run(&config(), &mut Scores::default(), None, &mut folder.resume()).unwrap();
            assert_same(&format!("evaluating from {step}"), &got, &want);
            assert_eq!(folder.records(), whole.records());
            // The process that wrote the record took no step of its epoch, so there is no speed to tell.
            let text = fs::read_to_string(folder.metrics()).unwrap();
            assert_eq!(text.matches("\"images_per_s\":null").count(), 1, "{text}");
        }
    }
}

#[test]
fn a_finished_stage_is_not_run_again() {
    let folder = Folder::new();
    let mut session = folder.start();
    session.job = json!({"done": ["train"]});
    let want = run(&config(), &mut Scores::default(), None, &mut session).unwrap();
    let mut session = folder.resume();
    assert_eq!(session.job, json!({"done": ["train"]}));
    assert!(session.resumed().unwrap().position.finished);
    let mut hook = Scores::default();
    let got = run(&config(), &mut hook, None, &mut session).unwrap();
    assert_same("finished", &got, &want);
    assert_eq!(hook.scores.len(), 2, "the hook has its state back");
    assert_eq!(folder.records().len(), 3);
    assert!(session.resumed().is_none());
}

#[test]
fn adamw_resumes_too() {
    let optimizer = depthshrinker::ops::optimizer::Optimizer::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };
    let config = TrainConfig { optimizer, lr: 2e-3, ..config() };
    let want = run(&config, &mut Scores::default(), None, &mut Session::silent()).unwrap();
    let folder = Folder::new();
    let mut session = folder.start();
    let stop = Some((7, Stop::Interrupt(session.interrupt.clone())));
    run(&config, &mut Scores { stop, ..Scores::default() }, None, &mut session).unwrap_err();
    let got = run(&config, &mut Scores::default(), None, &mut folder.resume()).unwrap();
    assert_same("adamw", &got, &want);
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let once = |threads| {
        with_threads(threads, || run(&config(), &mut Scores::default(), None, &mut Session::silent()).unwrap())
    };
    let one = once(1);
    assert_same("2 threads", &once(2), &one);
    assert_same("5 threads", &once(5), &one);
}

#[test]
fn a_student_follows_its_teacher() {
    let teacher = model(5);
    let output = teacher.graph.blocks[1].output();
    let stem = teacher.graph.blocks[0].input;
    let distillation = Distillation {
        teacher,
        alpha: 0.9,
        temperature: 2.0,
        feature_weight: 1e-2,
        feature_pairs: vec![(output, output), (stem, stem)],
    };
    let config = TrainConfig { epochs: 6, ..config() };
    let folder = Folder::new();
    let want = run(&config, &mut NoHook, Some(&distillation), &mut folder.start()).unwrap();
    let loss = |epoch: usize| folder.records()[epoch]["train_loss"].as_f64().unwrap();
    assert!(loss(5) < loss(0), "{} {}", loss(0), loss(5));
    let without = Distillation { feature_weight: 0.0, ..distillation.clone() };
    let plain = run(&config, &mut NoHook, Some(&without), &mut Session::silent()).unwrap();
    assert_ne!(plain.weights, want.weights, "features count");
    let again = run(&config, &mut NoHook, Some(&distillation), &mut Session::silent()).unwrap();
    assert_same("distillation", &again, &want);

    let misfit = Distillation { feature_pairs: vec![(output, NodeId::INPUT)], ..distillation.clone() };
    assert!(run(&config, &mut NoHook, Some(&misfit), &mut Session::silent()).is_err());
    let cold = Distillation { temperature: 0.0, ..distillation };
    assert!(matches!(run(&config, &mut NoHook, Some(&cold), &mut Session::silent()), Err(Error::Config(_))));
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint() {
    let folder = Folder::new();
    let mut session = folder.start();
    session.save_every = Duration::ZERO;
    let config = TrainConfig { lr: 1e30, clip_norm: 0.0, warmup_epochs: 0.0, ..config() };
    let error = run(&config, &mut NoHook, None, &mut session).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::NotFinite(_)), "{text}");
    assert!(text.contains("search") && text.contains("step") && text.contains("lower --lr"), "{text}");
    assert!(!text.contains('\n'));
    if folder.checkpoint().exists() {
        folder.resume();
    }
    let config = TrainConfig { clip_norm: 5.0, ..config };
    assert!(matches!(run(&config, &mut NoHook, None, &mut Session::silent()), Err(Error::NotFinite(_))));
}

#[test]
fn logits_that_are_not_finite_have_no_accuracy() {
    let mut broken = model(4);
    for tensor in broken.weights.values_mut().filter(|tensor| tensor.shape == [CLASSES, 8]) {
        tensor.data.fill(f32::MAX);
    }
    let options = EngineOptions { batch: 8, fusion: Fusion::OnLoad, training: false, taps: Vec::new() };
    let mut engine = Engine::new(&Device::Cpu, &broken, &options).unwrap();
    let error = evaluate(&mut engine, &Loader::eval(dataset(30, 2), 8).unwrap()).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::NotFinite(_)) && !text.contains('\n'), "{text}");
    assert!(text.contains("not finite") && text.contains("--lr"), "{text}");
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let refused = |change: fn(&mut TrainConfig)| {
        let mut config = config();
        change(&mut config);
        config.check().unwrap_err().to_string()
    };
    assert!(refused(|c| c.epochs = 0).contains("epochs"));
    assert!(refused(|c| c.lr = f32::NAN).contains("lr"));
    assert!(refused(|c| c.min_lr = 1.0).contains("min_lr"));
    assert!(refused(|c| c.clip_norm = -1.0).contains("clip_norm"));
    assert!(refused(|c| c.label_smoothing = 1.0).contains("label_smoothing"));
    let unknown = toml::from_str::<TrainConfig>("epocs = 3").unwrap_err().to_string();
    assert!(unknown.contains("epocs"), "{unknown}");
    let complete = toml::to_string(&config()).unwrap();
    assert_eq!(toml::from_str::<TrainConfig>(&complete).unwrap(), config());
    let adamw = "[optimizer]\nkind = \"adamw\"\nbeta1 = 0.9\nbeta2 = 0.99\neps = 1e-8";
    assert!(toml::from_str::<TrainConfig>(adamw).unwrap().check().is_ok());
    assert!(toml::from_str::<TrainConfig>(&format!("{adamw}\nbeta3 = 1.0")).is_err());
}

#[test]
fn data_that_does_not_fit_the_network_is_refused() {
    let shape = ImageShape { height: 9, width: 8, channels: 1 };
    let data = Arc::new(Dataset::from_memory("turned", shape, 4, vec![0; 72 * 32], vec![1; 32]).unwrap());
    let config = config();
    let turned = Loader::train(data.clone(), BATCH, Augment::none(), 1).unwrap();
    let test = Loader::eval(data, BATCH).unwrap();
    let go = |train_loader: &Loader, test: &Loader| {
        let (name, devices, model, hook) = ("train", &[Device::Cpu], model(4), &mut NoHook);
        let stage =
            Stage { name, devices, model, train: train_loader, test, config: &config, hook, distillation: None };
        train(stage, &mut Session::silent()).unwrap_err().to_string()
    };
    assert!(go(&turned, &test).contains("tiny takes 8x9x1"));
    let fitting = Loader::train(dataset(IMAGES, 1), BATCH, Augment::none(), 1).unwrap();
    assert!(go(&fitting, &test).contains("tiny takes 8x9x1"));
    let other = Loader::train(dataset(IMAGES, 1), 10, Augment::none(), 1).unwrap();
    assert!(go(&other, &test).contains("batch"));
}

/// Keeps what it is given, unless its disk is full.
#[derive(Default)]
struct Keeper {
    kept: Option<Model>,
    full: bool,
}

impl Hook for Keeper {
    fn trained(&mut self, model: &Model) -> Result<bool> {
        if self.full {
            return Err(Error::file("result", "cannot be written: the disk is full"));
        }
        self.kept = Some(model.clone());
        Ok(true)
    }
}

#[test]
fn a_run_outlives_its_checkpoints_but_not_its_result() {
    let want = run(&config(), &mut NoHook, None, &mut Folder::new().start()).unwrap();
    let folder = Folder::new();
    let without_checkpoints = || {
        let mut session = folder.start();
        session.save_every = Duration::ZERO;
        session.checkpoint = Some(folder.0.path().join("missing/checkpoint.safetensors"));
        session
    };
    let mut keeper = Keeper::default();
    let got = run(&config(), &mut keeper, None, &mut without_checkpoints()).unwrap();
    assert_same("without checkpoints", &got, &want);
    assert_same("as kept", &keeper.kept.unwrap(), &want);
    // A result that is neither kept nor in a checkpoint is lost, which is a failure.
    let full = || Keeper { full: true, ..Keeper::default() };
    for (hook, words) in [(&mut NoHook as &mut dyn Hook, "checkpoint.safetensors"), (&mut full(), "result")] {
        let error = run(&config(), hook, None, &mut without_checkpoints()).unwrap_err().to_string();
        assert!(error.contains(&format!("{words}: cannot be written")), "{error}");
    }
    // Where the checkpoint holds it, it is kept once there is room.
    run(&config(), &mut full(), None, &mut folder.start()).unwrap_err();
    let mut keeper = Keeper::default();
    run(&config(), &mut keeper, None, &mut folder.resume()).unwrap();
    assert_same("as kept in the end", &keeper.kept.unwrap(), &want);
    assert_eq!(folder.records().len(), 3);
}

#[test]
fn a_checkpoint_of_other_settings_or_another_network_is_refused() {
    let folder = Folder::new();
    let mut session = folder.start();
    session.fingerprint = "a".into();
    run(&config(), &mut NoHook, None, &mut session).unwrap();
    let saved = Checkpoint::read(&folder.checkpoint()).unwrap();
    saved.check_fingerprint("a").unwrap();
    let error = saved.check_fingerprint("b").unwrap_err();
    assert!(error.to_string().contains("other settings"), "{error}");
    let missing = Checkpoint::read(Path::new("no/such")).unwrap_err();
    assert!(matches!(missing, Error::Io { .. }), "{missing}");
}

/// A finished stage returns its model; the model of another network must not be accepted instead.
#[test]
fn a_finished_stage_of_another_network_is_refused() {
    let folder = Folder::new();
    run(&config(), &mut NoHook, None, &mut folder.start()).unwrap();
    let (config, mut other) = (config(), model(4));
    other.graph.name = "other".into();
    let train_loader = Loader::train(dataset(IMAGES, 1), BATCH, config.augment.clone(), config.seed).unwrap();
    let test = Loader::eval(dataset(30, 2), 8).unwrap();
    let (name, devices, model, hook) = ("search", &[Device::Cpu], other, &mut NoHook);
    let stage =
        Stage { name, devices, model, train: &train_loader, test: &test, config: &config, hook, distillation: None };
    let error = train(stage, &mut folder.resume()).unwrap_err().to_string();
    assert!(error.contains("another network (tiny, not other)") && error.contains("--force"), "{error}");
}
