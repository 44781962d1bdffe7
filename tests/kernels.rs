//! Every kernel on the emulator: the operation table in every precision, on both kinds of tensor core, in shuffled
//! thread orders; and the list of kernels that ran against the list that exists.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use depthshrinker::check::{cases, numbers};
use depthshrinker::device::cache::Cache;
use depthshrinker::device::emulator::{Emulator, EmulatorOptions};
use depthshrinker::device::gpu::Gpu;
use depthshrinker::device::source::FILES;
use depthshrinker::device::{Device, Recording, View};
use depthshrinker::dtype::Dtype;
use depthshrinker::engine::{Engine, EngineOptions, Fusion};
use depthshrinker::graph::{Activation, BatchNorm, Bias, Conv, Graph, GraphBuilder, Op};
use depthshrinker::model::Model;
use depthshrinker::models::{NetworkOptions, build};
use depthshrinker::ops::loss::{Gradient, LossRecord, cross_entropy};
use depthshrinker::ops::optimizer::{Optimizer, OptimizerState, Span, Update};
use depthshrinker::shape::{Shape, Window};
use libtest_mimic::{Arguments, Failed, Trial};

/// An emulated device of the table: architecture, precision, seed of the thread order.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Mode {
    arch: u32,
    precision: Dtype,
    order_seed: u64,
}

const MODES: [Mode; 6] = [
    Mode { arch: 80, precision: Dtype::F32, order_seed: 0 },
    Mode { arch: 80, precision: Dtype::F16, order_seed: 0 },
    Mode { arch: 80, precision: Dtype::Bf16, order_seed: 0 },
    Mode { arch: 70, precision: Dtype::F16, order_seed: 0 },
    Mode { arch: 80, precision: Dtype::F32, order_seed: 1 },
    Mode { arch: 80, precision: Dtype::F16, order_seed: 2 },
];

/// Compiled kernels are kept between runs of the tests.
fn cache() -> Cache {
    Cache::at(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kernels"))
}

impl Mode {
    fn open(self) -> Result<Device, String> {
        let (arch, order_seed) = (self.arch, self.order_seed);
        let options = EmulatorOptions { arch, order_seed, ..EmulatorOptions::default() };
        let emulator = Emulator::new(options, cache()).map_err(|e| e.to_string())?;
        Device::on(Gpu::new(Box::new(emulator)), self.precision).map_err(|e| e.to_string())
    }

    fn name(self) -> String {
        let order = if self.order_seed == 0 { "" } else { "/shuffled" };
        format!("sm_{}/{}{order}", self.arch, self.precision)
    }
}

/// One device per mode, which one case uses at a time.
static DEVICES: LazyLock<Vec<Result<Mutex<Device>, String>>> =
    LazyLock::new(|| MODES.iter().map(|mode| mode.open().map(Mutex::new)).collect());

fn device(mode: Mode) -> Result<MutexGuard<'static, Device>, String> {
    let at = MODES.iter().position(|&m| m == mode).expect("a mode of the table");
    let device = DEVICES[at].as_ref().map_err(Clone::clone)?;
    Ok(device.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Every instance that exists was launched by one mode or another.
fn coverage() -> Result<(), String> {
    let launched: BTreeSet<String> = DEVICES
        .iter()
        .flatten()
        .flat_map(|device| match &*device.lock().unwrap_or_else(PoisonError::into_inner) {
            Device::Cpu => BTreeSet::new(),
            Device::Gpu(gpu, _) => Arc::clone(gpu).launched(),
        })
        .collect();
    let missing: Vec<&str> = FILES
        .iter()
        .flat_map(|file| file.instances)
        .copied()
        .filter(|instance| !launched.contains(*instance))
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(format!("never launched: {}", missing.join("; "))) }
}

const CLASSES: usize = 10;

fn mobilenet() -> depthshrinker::Result<Graph> {
    let options = NetworkOptions {
        input_stride: Some(1),
        stage_strides: Some(vec![1, 2, 1, 1, 1, 1, 1]),
        head_channels: Some(64),
        ..NetworkOptions::new(Shape::new(12, 10, 1), CLASSES)
    };
    build("mobilenetv2-0.25", &options)
}

/// What ResNet and VGG have beside: max-pools, a biased convolution in front of a batch-norm, a projection, ReLU.
fn pooled() -> depthshrinker::Result<Graph> {
    let mut b = GraphBuilder::new("pooled", Shape::new(13, 10, 1));
    let bn = |channels| BatchNorm { channels, eps: 1e-5, momentum: 0.1 };
    let act = Activation { mask: Some(0), ..Activation::RELU };
    let biased = Conv { bias: Bias::Channel, ..GraphBuilder::conv(1, 8, Window::square(3, 1, 1), 1) };
    let mut x = b.push("stem", Op::Conv(biased), &[0]);
    x = b.push("stem_bn", Op::BatchNorm(bn(8)), &[x]);
    x = b.activation(Activation::RELU, x);
    let input = b.push("pool", Op::MaxPool { window: Window::square(3, 2, 1) }, &[x]);
    let first = b.next_node();
    let shortcut = GraphBuilder::conv(8, 12, Window::square(1, 2, 0), 1);
    let shortcut = b.conv_bn(("shortcut", shortcut), ("shortcut_bn", bn(12)), input);
    x = b.conv_bn(("a", GraphBuilder::conv(8, 12, Window::square(3, 2, 1), 1)), ("a_bn", bn(12)), input);
    x = b.activation(act, x);
    x = b.conv_bn(("b", GraphBuilder::conv(12, 12, Window::square(3, 1, 1), 1)), ("b_bn", bn(12)), x);
    x = b.push("add", Op::Add, &[shortcut, x]);
    x = b.activation(Activation::RELU, x);
    b.block("block", input, first);
    x = b.push("second_pool", Op::MaxPool { window: Window::square(2, 2, 0) }, &[x]);
    x = b.push("mean", Op::GlobalAvgPool, &[x]);
    b.linear("classifier", 12, CLASSES, x);
    b.finish()
}

/// Losses of 20 steps on one batch, clipped, as a training run takes them: each step as it is, or recorded and replayed.
fn train(device: &Device, fusion: Fusion, graph: Graph, recorded: bool) -> depthshrinker::Result<Vec<f64>> {
    let model = Model::initialise(graph, 3)?;
    let n = 8;
    let options = EngineOptions { batch: n, fusion, training: true, taps: Vec::new() };
    let mut engine = Engine::new(device, &model, &options)?;
    let params = engine.params().to_vec();
    let ranges = engine.trainable_ranges().to_vec();
    let spans = ranges.into_iter().map(|(p, range)| Span { range, decayed: params[p].role.is_decayed() }).collect();
    let len = engine.trainable().0.len();
    let mut state = OptimizerState::new(device, Optimizer::default(), spans, len)?;
    let mut d_logits = device.activations(n * CLASSES)?;
    let images = numbers(9, n * model.graph.input_shape().len());
    let labels: Vec<u32> = (0..n as u32).map(|i| i * 3 % 10).collect();
    let (mut losses, mut recording) = (Vec::new(), Recording::default());
    let mut record = LossRecord::new(device, n, CLASSES)?;
    for step in 0..20 {
        let slopes: Vec<f32> = (0..model.graph.blocks.len()).map(|b| f32::from((b + step) % 3 == 0)).collect();
        engine.set_slopes(&slopes)?;
        engine.collect_score_gradients(true);
        engine.set_loss_scale(state.loss_scale());
        engine.set_step(5, step as u64)?;
        engine.set_images(View::Host(&images))?;
        record.begin(&labels)?;
        // The learning rate changes too, so that a replay with the first one would show.
        state.begin(Update { lr: 0.001 + 1e-5 * step as f32, weight_decay: 1e-4, clip_norm: 5.0 })?;
        let mut pass = || {
            let logits = engine.run()?.view(0..n * CLASSES);
            let to = d_logits.view_mut(0..n * CLASSES);
            let gradient = Gradient { to, scale: state.loss_scale_at() };
            cross_entropy(&mut record, logits, 0.1, Some(gradient))?;
            engine.backward(&d_logits)?;
            let (weights, gradients, copy) = engine.for_update();
            state.update(weights, gradients, copy)
        };
        if recorded {
            // SAFETY: everything the pass uses lives as long as the recording.
            unsafe { recording.run(device, pass)? };
        } else {
            pass()?;
        }
        losses.push(record.sum()?.loss / n as f64);
        assert!(engine.score_gradients()?.iter().any(|s| *s != 0.0));
        state.finish()?;
    }
    Ok(losses)
}

fn trains_as_the_host_does(
    mode: Mode,
    fusion: Fusion,
    graph: fn() -> depthshrinker::Result<Graph>,
) -> Result<(), Failed> {
    let expected = train(&Device::Cpu, fusion, graph()?, false)?;
    let device = device(mode)?;
    let got = train(&device, fusion, graph()?, false)?;
    let tolerance = if mode.precision == Dtype::F32 { 1e-4 } else { 40.0 * mode.precision.epsilon() };
    let worst = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let diverged = got.iter().any(|loss| !loss.is_finite());
    if diverged || worst > tolerance || got[19] >= got[0] {
        return Err(
            format!("losses differ by up to {worst:e}, allowed {tolerance:e}: {got:?}, expected {expected:?}").into()
        );
    }
    let again = train(&device, fusion, graph()?, true)?;
    if again != got {
        return Err("a recorded run gives other losses than one that is not".into());
    }
    Ok(())
}

fn main() {
    let arguments = Arguments::from_args();
    let mut trials: Vec<Trial> = Vec::new();
    for mode in MODES {
        for case in cases() {
            let name = format!("{}/{}", mode.name(), case.name);
            trials.push(Trial::test(name, move || {
                let outcome = case.compare(&*device(mode)?).map_err(|e| e.to_string())?;
                outcome.map_err(Failed::from)
            }));
        }
    }
    for mode in MODES.into_iter().filter(|mode| mode.order_seed == 0) {
        let name = format!("{}/train/fused", mode.name());
        trials.push(Trial::test(name, move || trains_as_the_host_does(mode, Fusion::Fused, mobilenet)));
        let name = format!("{}/train/pooled", mode.name());
        trials.push(Trial::test(name, move || trains_as_the_host_does(mode, Fusion::Fused, pooled)));
    }
    let reference = || trains_as_the_host_does(MODES[0], Fusion::Reference, mobilenet);
    trials.push(Trial::test("sm_80/f32/train/reference", reference));
    let whole = arguments.filter.is_none() && arguments.skip.is_empty();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !conclusion.has_failed()
        && whole
        && !arguments.list
        && let Err(missing) = coverage()
    {
        eprintln!("{missing}");
        std::process::exit(101);
    }
    conclusion.exit();
}
