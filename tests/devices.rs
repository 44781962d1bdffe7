//! Devices that fail: out of memory, lost, too old, without a compiler, without a place to keep kernels. Each is one clear
//! line, and what was there before is there after.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use assert_cmd::Command;
use depthshrinker::check::{Row, compare_all, training};
use depthshrinker::data::{Augment, Dataset, ImageShape, Loader};
use depthshrinker::device::Device;
use depthshrinker::device::cache::Cache;
use depthshrinker::device::compiler::compile;
use depthshrinker::device::emulator::{Emulator, EmulatorOptions};
use depthshrinker::device::gpu::Gpu;
use depthshrinker::device::source::Unit;
use depthshrinker::dtype::Dtype;
use depthshrinker::engine::{Engine, EngineOptions, Fusion};
use depthshrinker::io::Checkpoint;
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::ops::copy;
use depthshrinker::shape::Shape;
use depthshrinker::train::{Metrics, NoHook, Reporter, Session, Stage, TrainConfig, train};
use depthshrinker::{Error, Result};

const SIDE: usize = 12;
const CLASSES: usize = 3;
const BATCH: usize = 8;

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels")
}

fn emulator(options: EmulatorOptions, precision: Dtype) -> Result<Device> {
    Device::on(Gpu::new(Box::new(Emulator::new(options, Cache::at(kernels()))?)), precision)
}

fn model() -> Model {
    let options = NetworkOptions {
        input_stride: Some(1),
        stage_strides: Some(vec![1, 2, 1, 2, 1, 1, 1]),
        head_channels: Some(64),
        ..NetworkOptions::new(Shape::new(SIDE, SIDE, 1), CLASSES)
    };
    Model::initialise(build("mobilenetv2-0.25", &options).unwrap(), 1).unwrap()
}

fn training_engine(device: &Device, batch: usize) -> Result<Engine> {
    Engine::new(device, &model(), &EngineOptions { batch, fusion: Fusion::OnLoad, training: true, taps: Vec::new() })
}

fn assert_one_line(error: &Error, parts: &[&str]) {
    let text = error.to_string();
    let fine = !text.contains('\n') && text.len() < 400 && parts.iter().all(|part| text.contains(part));
    assert!(fine, "{text:?} should be one line with {parts:?}");
}

#[test]
fn out_of_memory_is_told_and_a_smaller_batch_fits() {
    let device = emulator(EmulatorOptions { memory: 8 << 20, ..EmulatorOptions::default() }, Dtype::F32).unwrap();
    let error = training_engine(&device, 256).unwrap_err();
    assert_one_line(&error, &["out of memory", "lower the batch", "--precision f16"]);
    let mut engine = training_engine(&device, 2).expect("what the larger one took was given back");
    engine.forward(&vec![0.5; 2 * SIDE * SIDE]).expect("memory for a batch of 2");
}

#[test]
fn a_batch_that_no_grid_holds_is_refused_before_memory_is_asked_for() {
    let device = emulator(EmulatorOptions { memory: 0, ..EmulatorOptions::default() }, Dtype::F32).unwrap();
    assert_one_line(&training_engine(&device, 65_536).unwrap_err(), &["up to 65535 images", "lower the batch"]);
}

#[test]
fn out_of_memory_amid_a_pass_is_told() {
    // Room for the buffers, which are planned, and not for the partial sums of the first kernel that wants some.
    let planned = {
        let device = emulator(EmulatorOptions::default(), Dtype::F32).unwrap();
        let _engine = training_engine(&device, BATCH).unwrap();
        let Device::Gpu(gpu, _) = &device else { unreachable!("an emulator is a GPU") };
        gpu.memory().0
    };
    let device = emulator(EmulatorOptions { memory: planned, ..EmulatorOptions::default() }, Dtype::F32).unwrap();
    let mut engine = training_engine(&device, BATCH).expect("exactly enough");
    let error = engine.forward(&vec![0.5; BATCH * SIDE * SIDE]).unwrap_err();
    assert_one_line(&error, &["out of memory", "lower the batch"]);
}

/// A folder with the files of a run.
struct Files(tempfile::TempDir);

impl Files {
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
        session.save_every = Duration::ZERO;
        session
    }

    fn resume(&self) -> Session {
        let saved = Checkpoint::read(&self.checkpoint()).unwrap();
        let mut session = Session::resume(saved, &self.checkpoint(), &self.metrics(), String::new()).unwrap();
        session.reporter = Reporter::quiet();
        session
    }
}

/// Two short epochs in f16.
fn short_run(device: &Device, session: &mut Session) -> Result<Model> {
    let data = |images: usize| {
        let shape = ImageShape { height: SIDE, width: SIDE, channels: 1 };
        let labels: Vec<u32> = (0..images).map(|i| (i % CLASSES) as u32).collect();
        let pixels = (0..images * SIDE * SIDE).map(|i| (i * 37 % 251) as u8).collect();
        Arc::new(Dataset::from_memory("noise", shape, CLASSES, pixels, labels).unwrap())
    };
    let config = TrainConfig { epochs: 2, batch: BATCH, lr: 0.01, ..TrainConfig::default() };
    let (train_loader, test) =
        (Loader::train(data(4 * BATCH), BATCH, Augment::none(), 1).unwrap(), Loader::eval(data(9), 8).unwrap());
    let (name, devices, model, hook) = ("train", std::slice::from_ref(device), model(), &mut NoHook);
    let stage =
        Stage { name, devices, model, train: &train_loader, test: &test, config: &config, hook, distillation: None };
    train(stage, session)
}

#[test]
fn a_lost_device_costs_no_more_than_the_steps_since_the_checkpoint() {
    let new = || Files(tempfile::tempdir().unwrap());
    let healthy = || emulator(EmulatorOptions::default(), Dtype::F16).unwrap();
    let want = short_run(&healthy(), &mut new().start()).unwrap();
    for lost_after in [700, 1500] {
        let files = new();
        let failing = EmulatorOptions { lost_after, ..EmulatorOptions::default() };
        let error = short_run(&emulator(failing, Dtype::F16).unwrap(), &mut files.start()).unwrap_err();
        assert_one_line(&error, &["lost", "saved up to step", "--resume"]);
        let got = short_run(&healthy(), &mut files.resume()).expect("a healthy device");
        for (name, tensor) in &want.weights {
            assert!(got.weight(name).data == tensor.data, "{name} differs after a loss at launch {lost_after}");
        }
    }
}

#[test]
fn a_check_tells_of_every_case_whatever_becomes_of_one() {
    // Room for the small cases, not for the large activation.
    let narrow = EmulatorOptions { memory: 400 << 10, ..EmulatorOptions::default() };
    let rows = compare_all(
        &emulator(narrow, Dtype::F32).unwrap(),
        |case| ["activation/", "cross_entropy/"].iter().any(|start| case.name.starts_with(start)),
        None,
    );
    let failed: Vec<&Row> = rows.iter().filter(|row| row.difference.is_some()).collect();
    assert!(rows.len() > 2 && failed.len() == 1 && failed[0].name == "activation/leaky", "{rows:?}");
    assert!(failed[0].difference.as_ref().unwrap().contains("out of memory"), "{rows:?}");

    let failing = EmulatorOptions { lost_after: 2, ..EmulatorOptions::default() };
    let rows = compare_all(&emulator(failing, Dtype::F32).unwrap(), |case| case.name.starts_with("pool/"), None);
    let [first, second] = &rows[..] else { panic!("{rows:?}") };
    assert!(first.difference.as_ref().unwrap().contains("global_pool"), "the kernel is named: {rows:?}");
    assert_eq!(second.difference.as_deref(), Some("not run: pool/3x20x24 lost the device"));
}

#[test]
fn memory_that_is_used_again_changes_no_bit() {
    let run = |keep_freed_memory| {
        let options = EmulatorOptions { keep_freed_memory, ..EmulatorOptions::default() };
        let device = emulator(options, Dtype::F16).unwrap();
        // The second takes over what the first gave back.
        [true, true]
            .map(|recorded| training::train(&device, Fusion::OnLoad, training::pooled().unwrap(), 4, recorded).unwrap())
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn a_type_that_the_device_lacks_is_refused() {
    let error = emulator(EmulatorOptions { arch: 70, ..EmulatorOptions::default() }, Dtype::Bf16).unwrap_err();
    assert_one_line(&error, &["sm_70 has no bf16", "--precision f16 or f32"]);
    let unit = Unit::all().unwrap().into_iter().find(|unit| unit.dtype() == Dtype::Bf16).expect("kernels in bf16");
    assert_one_line(&compile(unit, 70, &Cache::at(kernels())).unwrap_err(), &["sm_70 has no bf16"]);
}

/// Runs the program with a setting of its environment; its error is one line.
fn refused(arguments: &[&str], (name, value): (&str, &Path)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::cargo_bin("depthshrinker").unwrap();
    command.args(arguments).current_dir(folder.path()).env("DEPTHSHRINKER_CACHE", folder.path().join("cache"));
    let output = command.env(name, value).assert().code(1).get_output().clone();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    text
}

#[test]
fn without_a_compiler_it_is_told_how_to_get_one() {
    let build = ["kernels", "build", "--arch", "sm_80"];
    let text = refused(&build, ("DEPTHSHRINKER_NVRTC", Path::new("/nonexistent/libnvrtc.so")));
    assert!(text.contains("NVRTC was not found") && text.contains("pip install"), "{text}");
    let text = refused(&["check", "--device", "emulator"], ("CXX", Path::new("/nonexistent/g++")));
    assert!(text.contains("C++17 compiler") && text.contains("set CXX"), "{text}");
}

#[test]
fn kernels_are_read_from_a_folder_and_a_fault_there_is_told_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let kernels = folder.path().join("kernels");
    std::fs::create_dir_all(kernels.join("emulator")).unwrap();
    std::fs::write(kernels.join("pool.cu"), "// Pooling.\n\n__global__ void pool(int n) {}\n").unwrap();
    let text = refused(&["check", "--device", "emulator"], ("DEPTHSHRINKER_KERNEL_SOURCES", &kernels));
    assert!(text.contains("pool.cu: line 3: no `// instances:` line names pool"), "{text}");
    let text = refused(&["check", "--device", "emulator"], ("DEPTHSHRINKER_KERNEL_SOURCES", Path::new("/nonexistent")));
    assert!(text.contains("/nonexistent: cannot be read") && text.contains("DEPTHSHRINKER_KERNEL_SOURCES"), "{text}");
}

#[test]
fn without_a_place_to_keep_kernels_they_run_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let emulator = Emulator::new(EmulatorOptions::default(), Cache::at(file.join("cache"))).unwrap();
    // Not prepared: only the kernels of one file are compiled, when they are needed.
    let device = Device::Gpu(Gpu::new(Box::new(emulator)), Dtype::F32);
    let (a, mut b) = (device.upload(&[1.0, 2.0, 3.0]).unwrap(), device.upload(&[10.0; 3]).unwrap());
    copy::accumulate(a.view(0..3), b.view_mut(0..3));
    let mut sum = [0.0; 3];
    b.read(&mut sum).unwrap();
    assert_eq!(sum, [11.0, 12.0, 13.0]);
}
