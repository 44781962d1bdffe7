//! What a GPU is asked to do: work that repeats is one replay, whatever changes from one time to the next, and gives the bits
//! that it gives when it is done launch by launch.

use std::path::Path;
use std::sync::Arc;

use depthshrinker::check::training::{mobilenet, pooled};
use depthshrinker::data::{Dataset, ImageShape, Loader};
use depthshrinker::device::Device;
use depthshrinker::device::cache::Cache;
use depthshrinker::device::calls::{CallLog, Calls};
use depthshrinker::device::configurations::Choice;
use depthshrinker::device::emulator::{Emulator, EmulatorOptions};
use depthshrinker::device::gpu::Gpu;
use depthshrinker::dtype::Dtype;
use depthshrinker::engine::{Engine, EngineOptions, Fusion};
use depthshrinker::model::Model;
use depthshrinker::ops::config::force;
use depthshrinker::train::evaluate;

const CLASSES: usize = 10;

/// An emulated GPU that keeps freed memory or not, and its calls.
fn emulator(precision: Dtype, keep_freed_memory: bool) -> (Device, CallLog) {
    let cache = Cache::at(Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels"));
    let options = EmulatorOptions { keep_freed_memory, ..EmulatorOptions::default() };
    let calls = options.calls.clone();
    let driver = Emulator::new(options, cache).expect("a C++ compiler");
    (Device::on(Gpu::new(Box::new(driver)), precision).expect("kernels that compile"), calls)
}

fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn engine(device: &Device, model: &Model, batch: usize) -> Engine {
    let options = EngineOptions { batch, fusion: Fusion::OnLoad, training: false, taps: Vec::new() };
    Engine::new(device, model, &options).unwrap()
}

fn logits(engine: &mut Engine, images: &[f32], n: usize) -> Vec<u32> {
    let mut out = vec![0.0; n * CLASSES];
    engine.forward(images).unwrap().read(&mut out).unwrap();
    out.iter().map(|value| value.to_bits()).collect()
}

/// What changes before a pass.
enum Change {
    Nothing,
    Weights,
    Slopes(f32),
    /// Other work, with another workspace, on the same device.
    OtherWork,
    /// Another way to launch the pointwise convolutions, or again the one that is chosen.
    Forced(Option<&'static str>),
    /// The same for one problem, which is none of the network's.
    Tuned,
}

/// Images of the pass, what changes before it, and whether it is a replay: a size is recorded the second time.
const PASSES: [(usize, Change, bool); 26] = {
    use Change::{Forced, Nothing, OtherWork, Slopes, Tuned, Weights};
    [
        (4, Nothing, false),
        (4, Nothing, true),
        (3, Nothing, false),
        (4, Weights, true),
        (3, Nothing, true),
        (3, OtherWork, true),
        (4, Nothing, true),
        (4, Slopes(1.0), false),
        (4, Nothing, true),
        (4, Slopes(1.0), true),
        (3, Slopes(0.25), false),
        (4, Nothing, false),
        (4, Forced(Some("64x64-scalar")), false),
        (4, Nothing, true),
        (4, Forced(None), false),
        (4, Nothing, true),
        (4, Tuned, false),
        (4, Nothing, true),
        (1, Nothing, false),
        (2, Nothing, false),
        (3, Nothing, false),
        (4, Nothing, true),
        (4, Weights, true),
        // One size more than are kept, at the cost of the one not asked for longest.
        (5, Nothing, false),
        (4, Nothing, true),
        (1, Nothing, false),
    ]
};

#[test]
fn inference_is_replayed_and_gives_the_bits_of_single_launches() {
    use Change::{Forced, Nothing, OtherWork, Slopes, Tuned, Weights};
    for (precision, keeps) in [(Dtype::F32, false), (Dtype::F16, true)] {
        let (device, calls) = emulator(precision, keeps);
        let Device::Gpu(gpu, _) = &device else { panic!("an emulated GPU") };
        let graph = mobilenet().unwrap();
        let len = graph.input_shape().len();
        let mut model = Model::initialise(graph, 1).unwrap();
        let mut tested = engine(&device, &model, 5);
        let mut slopes = None;
        for (at, (n, change, replayed)) in PASSES.iter().enumerate() {
            match change {
                Nothing => {}
                Weights => {
                    model = Model::initialise(mobilenet().unwrap(), at as u64).unwrap();
                    tested.load(&model.weights).unwrap();
                }
                Slopes(slope) => slopes = Some(vec![*slope; model.graph.sites()]),
                OtherWork => {
                    let other = Model::initialise(pooled().unwrap(), 2).unwrap();
                    let images = noise(3, 9 * other.graph.input_shape().len());
                    logits(&mut engine(&device, &other, 9), &images, 9);
                }
                Tuned => {
                    let (kernels, problem) = ("pointwise_forward".to_owned(), String::new());
                    gpu.configurations().tune(Choice { kernels, precision, problem }, Some("64x64-scalar".into()));
                }
                Forced(name) => force(gpu, "pointwise_forward".parse().unwrap(), *name).unwrap(),
            }
            let images = noise(at as u64, n * len);
            if let Some(slopes) = &slopes {
                tested.set_slopes(slopes).unwrap();
            }
            calls.take();
            let got = logits(&mut tested, &images, *n);
            let Calls { launches, replays, .. } = calls.take();
            // New weights are brought to the kernels' type before the pass.
            let expected = if *replayed {
                (u64::from(matches!(change, Weights) && precision != Dtype::F32), 1)
            } else {
                (launches, 0)
            };
            assert_eq!((launches, replays), expected, "{precision}, pass {at}");
            assert!(*replayed || launches > 20, "{precision}, pass {at}: {launches} launches");
            // An engine's first pass is done launch by launch.
            let mut direct = engine(&device, &model, 5);
            if let Some(slopes) = &slopes {
                direct.set_slopes(slopes).unwrap();
            }
            assert!(got == logits(&mut direct, &images, *n), "{precision}, pass {at}");
        }
    }
}

#[test]
fn whoever_watches_launches_sees_them_in_every_pass() {
    let (device, calls) = emulator(Dtype::F32, false);
    let Device::Gpu(gpu, _) = &device else { panic!("an emulated GPU") };
    let model = Model::initialise(mobilenet().unwrap(), 1).unwrap();
    let mut watched = engine(&device, &model, 2);
    let images = noise(1, 2 * model.graph.input_shape().len());
    let mut launches = || gpu.watch_launches(|| watched.forward(&images).map(|_| ())).unwrap().len();
    let counts = [0; 3].map(|_| launches());
    assert!(counts[0] > 20 && counts == [counts[0]; 3], "{counts:?}");
    assert_eq!(calls.take().replays, 0);
}

#[test]
fn an_evaluation_replays_its_passes_and_reads_the_sums_once() {
    let shape = ImageShape { height: 12, width: 10, channels: 1 };
    let images = 4 * 6 + 3;
    let pixels = noise(1, images * shape.size()).iter().map(|x| (127.0 * (x + 1.0)) as u8).collect();
    let labels = (0..images as u32).map(|i| i % CLASSES as u32).collect();
    let data = Arc::new(Dataset::from_memory("noise", shape, CLASSES, pixels, labels).unwrap());
    let test = Loader::eval(data, 4).unwrap();
    let model = Model::initialise(mobilenet().unwrap(), 1).unwrap();
    let (device, calls) = emulator(Dtype::F32, false);
    let mut tested = engine(&device, &model, 4);
    let first = evaluate(&mut tested, &test).unwrap();
    // The first pass is done launch by launch, and so is the one over the last images.
    assert_eq!(calls.take().replays, 5);
    let again = evaluate(&mut tested, &test).unwrap();
    let Calls { replays, downloads, .. } = calls.take();
    assert_eq!((replays, downloads), (7, 1));
    assert_eq!(first, again);
    let on_host = evaluate(&mut engine(&Device::Cpu, &model, 4), &test).unwrap();
    assert_eq!((on_host.images, on_host.top1), (first.images, first.top1));
    assert!((on_host.loss - first.loss).abs() < 1e-5, "{on_host:?} {first:?}");
}

#[test]
fn a_workspace_is_kept_as_long_as_a_recording_holds_it() {
    for keeps in [false, true] {
        let (device, _) = emulator(Dtype::F32, keeps);
        let Device::Gpu(gpu, _) = &device else { panic!("an emulated GPU") };
        let of = |floats: usize| (floats * size_of::<f32>()) as u64;
        let before = gpu.memory().0;
        let lend = |floats| {
            gpu.workspace(floats);
            Ok(())
        };
        let graph = gpu.capture(|| lend(1 << 10)).unwrap();
        lend(1 << 12).unwrap();
        assert_eq!(gpu.memory().0 - before, of(1 << 10) + of(1 << 12));
        // Another recording holds the larger, and what outgrows both leaves them.
        let other = gpu.capture(|| lend(1 << 12)).unwrap();
        lend(1 << 14).unwrap();
        assert_eq!(gpu.memory().0 - before, of(1 << 10) + of(1 << 12) + of(1 << 14));
        gpu.forget(graph);
        assert_eq!(gpu.memory().0 - before, of(1 << 12) + of(1 << 14));
        gpu.forget(other);
        assert_eq!(gpu.memory().0 - before, of(1 << 14));
    }
}
