//! Subnormal numbers count as zero in every kernel, on every thread and on the emulator, and nowhere else: callers find
//! their threads as they left them, folding and merging keep every digit, and what they write holds no such number.

use std::hint::black_box;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{LazyLock, Mutex, PoisonError};

use depthshrinker::check::{CONVOLUTIONS, numbers, problem};
use depthshrinker::device::cache::Cache;
use depthshrinker::device::emulator::{Emulator, EmulatorOptions};
use depthshrinker::device::gpu::Gpu;
use depthshrinker::device::{Buffer, Device, View};
use depthshrinker::dtype::Dtype;
use depthshrinker::engine::{Engine, EngineOptions, Fusion};
use depthshrinker::graph::{BatchNorm, Bias, Conv, GraphBuilder, NodeId, Op, ParamRole};
use depthshrinker::io::tensors::read_tensors;
use depthshrinker::io::{ModelInfo, write_model};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::ops::activation::{self, Act, ActivationInputs};
use depthshrinker::ops::batch_norm::{self, BatchNormProblem, Normalised};
use depthshrinker::ops::conv::{self, ConvGradient, ConvInput, ConvProblem, GradientsOut};
use depthshrinker::ops::dropout::DropoutStream;
use depthshrinker::ops::epilogue::{BiasOperand, Epilogue};
use depthshrinker::ops::linear::{LinearGradientsOut, LinearInputs, LinearProblem};
use depthshrinker::ops::loss::{Gradient, LossRecord, SoftTarget, cross_entropy, distillation, feature_mse};
use depthshrinker::ops::optimizer::{Optimizer, OptimizerState, ParamSpan, Update};
use depthshrinker::ops::pool::{self, PoolProblem};
use depthshrinker::ops::{add, copy, dropout, linear};
use depthshrinker::shape::{Lines, Shape, Window};
use depthshrinker::shrink::merge::{MergeOptions, Merged, merge, verify_random};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, linearise};
use libtest_mimic::{Arguments, Failed, Trial};

/// A subnormal number, of which IEEE arithmetic makes others.
const SMALL: f32 = 1e-39;

type Outcome = depthshrinker::Result<Vec<f32>>;

/// An operation on subnormal operands, all of whose results are 0 where those count as zero, and not otherwise.
struct Case {
    name: String,
    run: Box<dyn Fn(&Device) -> Outcome + Send + Sync>,
    /// Multiply-accumulates; the emulator runs only small cases.
    macs: u64,
}

fn case(name: impl Into<String>, run: impl Fn(&Device) -> Outcome + Send + Sync + 'static) -> Case {
    Case { name: name.into(), run: Box::new(run), macs: 0 }
}

fn all(buffer: &Buffer) -> View<'_> {
    buffer.view(0..buffer.len())
}

fn read(buffer: &Buffer) -> Outcome {
    let mut out = vec![0.0; buffer.len()];
    buffer.read(&mut out)?;
    Ok(out)
}

fn filled(device: &Device, len: usize, value: f32) -> depthshrinker::Result<Buffer> {
    device.upload(&vec![value; len])
}

/// Operands of a convolution, each one number all over.
#[derive(Clone, Copy)]
struct Uniform {
    x: f32,
    w: f32,
    bias: f32,
    residual: f32,
}

fn conv_forward(p: &ConvProblem, of: Uniform, device: &Device) -> Outcome {
    let (x, w) = (filled(device, p.n * p.input.len(), of.x)?, filled(device, p.weight_len(), of.w)?);
    let len = p.n * p.output.len();
    let (bias, residual) = (filled(device, p.output.c, of.bias)?, filled(device, len, of.residual)?);
    let mut y = filled(device, len, f32::NAN)?;
    let epilogue = Epilogue { bias: BiasOperand::Channel(all(&bias)), residual: Some(all(&residual)), act: None };
    conv::forward(p, all(&x), all(&w), &epilogue, y.view_mut(0..len));
    read(&y)
}

/// dx, added to what is there and not, dw and db.
fn conv_backward(p: &ConvProblem, of: Uniform, dy: f32, device: &Device) -> Outcome {
    let (x, w) = (filled(device, p.n * p.input.len(), of.x)?, filled(device, p.weight_len(), of.w)?);
    let dy = filled(device, p.n * p.output.len(), dy)?;
    let mut results = Vec::new();
    for is_added in [false, true] {
        let mut dx = filled(device, x.len(), 0.0)?;
        let (mut dw, mut db) = (filled(device, w.len(), f32::NAN)?, filled(device, p.output.c, f32::NAN)?);
        let out = GradientsOut {
            dx: Some((dx.view_mut(0..x.len()), is_added)),
            dw: dw.view_mut(0..w.len()),
            db: Some(db.view_mut(0..p.output.c)),
            sums: None,
        };
        conv::backward(p, ConvInput::Stored(all(&x)), all(&w), ConvGradient::Stored(all(&dy)), out);
        results.extend([read(&dx)?, read(&dw)?, read(&db)?].concat());
    }
    Ok(results)
}

fn conv_cases() -> Vec<Case> {
    let zero = Uniform { x: 0.0, w: 0.0, bias: 0.0, residual: 0.0 };
    let forward = [
        ("x", Uniform { x: SMALL, w: 1.0, ..zero }),
        ("w", Uniform { x: 1.0, w: SMALL, ..zero }),
        // Normal numbers whose product is not.
        ("x·w", Uniform { x: 1e-19, w: 1e-20, ..zero }),
        ("bias", Uniform { bias: SMALL, ..zero }),
        ("residual", Uniform { residual: SMALL, ..zero }),
    ];
    let of_row = |row| {
        let p = problem(row);
        let name = format!("conv/{:?}/n{}_{}_to_{}_{:?}", p.family(), p.n, p.input, p.output.c, p.window.k_h);
        let mut cases: Vec<Case> = Vec::new();
        for (what, of) in forward {
            cases.push(case(format!("{name}/{what}"), move |device| conv_forward(&p, of, device)));
        }
        let ones = Uniform { x: 1.0, w: 1.0, ..zero };
        cases.push(case(format!("{name}/dy"), move |device| conv_backward(&p, ones, SMALL, device)));
        cases.iter_mut().for_each(|case| case.macs = (p.n * p.output.len() * p.weight_len() / p.output.c) as u64);
        cases
    };
    CONVOLUTIONS.iter().flat_map(of_row).collect()
}

fn norm_case(y: f32, beta: f32, residual: f32, device: &Device) -> Outcome {
    let shape = Lines { lines: 6, w: 5, c: 24 };
    let (c, len) = (shape.c, shape.len());
    let (raw, gamma, beta) = (filled(device, len, y)?, filled(device, c, 1.0)?, filled(device, c, beta)?);
    let statistics = device.upload(&[vec![0.0; c], vec![1.0; c]].concat())?;
    let (residual, mut z) = (filled(device, len, residual)?, filled(device, len, f32::NAN)?);
    let of = Normalised {
        y: all(&raw),
        gamma: all(&gamma),
        beta: all(&beta),
        statistics: all(&statistics),
        residual: Some(all(&residual)),
        act: None,
    };
    batch_norm::normalise(&BatchNormProblem { shape, eps: 1e-5, momentum: 0.1 }, &of, z.view_mut(0..len));
    read(&z)
}

fn linear_cases() -> Vec<Case> {
    let p = LinearProblem { n: 70, c_in: 33, c_out: 10 };
    let forward = move |x: f32, w: f32, b: f32, device: &Device| -> Outcome {
        let (x, w) = (filled(device, p.n * p.c_in, x)?, filled(device, p.c_in * p.c_out, w)?);
        let (b, mut y) = (filled(device, p.c_out, b)?, filled(device, p.n * p.c_out, f32::NAN)?);
        linear::forward(p, all(&x), all(&w), all(&b), y.view_mut(0..p.n * p.c_out));
        read(&y)
    };
    let backward = move |device: &Device| -> Outcome {
        let (x, w) = (filled(device, p.n * p.c_in, 1.0)?, filled(device, p.c_in * p.c_out, 1.0)?);
        let dy = filled(device, p.n * p.c_out, SMALL)?;
        let [mut dx, mut dw, mut db] =
            [filled(device, x.len(), 0.0)?, filled(device, w.len(), 1.0)?, filled(device, p.c_out, 1.0)?];
        let out = LinearGradientsOut {
            dx: Some((dx.view_mut(0..x.len()), true)),
            dw: dw.view_mut(0..w.len()),
            db: db.view_mut(0..p.c_out),
        };
        linear::backward(p, LinearInputs { x: all(&x), w: all(&w), dy: all(&dy) }, out);
        Ok([read(&dx)?, read(&dw)?, read(&db)?].concat())
    };
    vec![
        case("linear/x", move |device| forward(SMALL, 1.0, 0.0, device)),
        case("linear/b", move |device| forward(0.0, 1.0, SMALL, device)),
        case("linear/dy", backward),
    ]
}

/// A few thousand subnormal numbers through an operation of one operand.
fn unary(device: &Device, x: f32, run: impl Fn(View<'_>, &mut Buffer)) -> Outcome {
    const LEN: usize = 40_000;
    let (x, mut y) = (filled(device, LEN, x)?, filled(device, LEN, 0.0)?);
    run(all(&x), &mut y);
    read(&y)
}

fn small_cases() -> Vec<Case> {
    let mut cases = elementwise_cases();
    cases.extend(reducing_cases());
    cases
}

fn elementwise_cases() -> Vec<Case> {
    let lines = |len: usize| Lines { lines: 1, w: len, c: 1 };
    vec![
        case("batch_norm/y", |device| norm_case(SMALL, 0.0, 0.0, device)),
        case("batch_norm/beta", |device| norm_case(0.0, SMALL, 0.0, device)),
        case("batch_norm/residual", |device| norm_case(0.0, 0.0, SMALL, device)),
        case("add", |device| {
            unary(device, SMALL, |x, y| {
                let len = y.len();
                add::forward(x, x, y.view_mut(0..len));
            })
        }),
        case("accumulate", |device| {
            unary(device, SMALL, |x, y| {
                let len = y.len();
                copy::accumulate(x, y.view_mut(0..len));
            })
        }),
        case("activation/x", move |device| {
            // A normal number times the slope; one that is not is passed on, since nothing is computed with it.
            unary(device, -2e-38, |x, y| {
                let len = y.len();
                activation::forward(Act::new(Some(6.0), 0.3), lines(len), x, y.view_mut(0..len));
            })
        }),
        case("activation/dy", move |device| {
            unary(device, SMALL, |dy, dx| {
                let (len, act) = (dx.len(), Act::new(Some(6.0), 0.3));
                // The input counts as 0, where the derivative is the slope.
                let inputs = ActivationInputs { x: dy, dy };
                activation::backward(act, lines(len), inputs, dx.view_mut(0..len), true, None);
            })
        }),
        case("dropout", |device| {
            let stream = DropoutStream::new(device)?;
            unary(device, SMALL, |x, y| {
                let len = y.len();
                dropout::apply(0.2, &stream, x, y.view_mut(0..len), true);
            })
        }),
    ]
}

/// Pools, optimizers and losses.
fn reducing_cases() -> Vec<Case> {
    vec![
        case("global_pool", |device| {
            let (input, n) = (Shape::new(7, 7, 24), 3);
            let (x, mut y) = (filled(device, n * input.len(), SMALL)?, filled(device, n * input.c, f32::NAN)?);
            pool::global::forward(input, all(&x), y.view_mut(0..n * input.c));
            let (dy, mut dx) = (filled(device, n * input.c, SMALL)?, filled(device, n * input.len(), 0.0)?);
            pool::global::backward(input, all(&dy), dx.view_mut(0..n * input.len()), true);
            Ok([read(&y)?, read(&dx)?].concat())
        }),
        case("average_pool", |device| {
            let (input, output) = (Shape::new(9, 12, 16), Shape::new(5, 6, 16));
            let p = PoolProblem { n: 2, input, output, window: Window::square(3, 2, 1) };
            let (x, mut y) = (filled(device, 2 * input.len(), SMALL)?, filled(device, 2 * output.len(), f32::NAN)?);
            pool::average::forward(&p, all(&x), y.view_mut(0..2 * output.len()));
            let (dy, mut dx) = (filled(device, 2 * output.len(), SMALL)?, filled(device, 2 * input.len(), 0.0)?);
            pool::average::backward(&p, all(&dy), dx.view_mut(0..2 * input.len()), true);
            Ok([read(&y)?, read(&dx)?].concat())
        }),
        case("optimizer/sgd", |device| optimizer_case(Optimizer::default(), device)),
        case("optimizer/adamw", |device| {
            optimizer_case(Optimizer::AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8 }, device)
        }),
        case("cross_entropy", |device| {
            loss_case(device, |record, z, gradient| cross_entropy(record, z, 0.0, Some(gradient)))
        }),
        case("distillation", |device| {
            let teacher = device.upload(&LOGITS)?;
            let target = SoftTarget { teacher: all(&teacher), alpha: 0.5, temperature: 1.0 };
            loss_case(device, |record, z, gradient| distillation(record, z, target, gradient))
        }),
        case("feature_mse", |device| {
            let zeros = device.upload(&[0.0; 3])?;
            let small = device.upload(&[SMALL; 3])?;
            loss_case(device, |record, _, gradient| feature_mse(record, all(&small), all(&zeros), 1e3, gradient))
        }),
    ]
}

/// Weights and state after a step with subnormal gradients.
fn optimizer_case(optimizer: Optimizer, device: &Device) -> Outcome {
    let len = 40_000;
    let spans = vec![ParamSpan { range: 0..len, decayed: true }];
    let mut state = OptimizerState::new(device, optimizer, spans, len)?;
    let (mut weights, gradients) = (filled(device, len, 0.0)?, filled(device, len, SMALL)?);
    state.begin(Update { lr: 1.0, weight_decay: 0.0, clip_norm: 0.0 })?;
    state.update(&mut weights, &gradients, None)?;
    state.finish()?;
    let moments = state.save()?.into_iter().take(optimizer.buffers());
    Ok(moments.chain([read(&weights)?]).flatten().collect())
}

/// Class 0 is certain; the others have probabilities of 8e-40 and less.
const LOGITS: [f32; 3] = [0.0, -90.0, -95.0];

fn loss_case(
    device: &Device,
    loss: impl Fn(&mut LossRecord, View<'_>, Gradient<'_>) -> depthshrinker::Result<()>,
) -> Outcome {
    let (z, mut d) = (device.upload(&LOGITS)?, device.upload(&[f32::NAN; 3])?);
    let mut record = LossRecord::new(device, 1, 3)?;
    record.begin(&[0])?;
    loss(&mut record, all(&z), Gradient { to: d.view_mut(0..3), scale: None })?;
    read(&d)
}

/// Whether this thread computes with subnormal numbers as they are.
fn keeps_subnormals() -> bool {
    black_box(SMALL) * black_box(2.0) == SMALL * 2.0 && black_box(1e-30f32) * black_box(1e-9) == 1e-39
}

/// All zero, and no thread changed, on the calling thread and in pools of one thread and of three.
fn on_every_thread(case: &Case) -> Result<(), Failed> {
    let zeros = |values: Vec<f32>| match values.iter().position(|v| *v != 0.0) {
        Some(at) => Err(Failed::from(format!("element {at} is {:e}, and should be 0", values[at]))),
        None => Ok(()),
    };
    zeros((case.run)(&Device::Cpu)?)?;
    let mut kept = vec![keeps_subnormals()];
    for threads in [1, 3] {
        let threads = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        zeros(threads.install(|| (case.run)(&Device::Cpu))?)?;
        kept.extend(threads.broadcast(|_| keeps_subnormals()));
    }
    kept.extend(rayon::broadcast(|_| keeps_subnormals()));
    if kept.contains(&false) { Err("a thread was left in another mode".into()) } else { Ok(()) }
}

/// Emulated devices: in f32, and in f16 on both kinds of tensor core.
static EMULATORS: LazyLock<Vec<Mutex<Device>>> = LazyLock::new(|| {
    [(80, Dtype::F32), (80, Dtype::F16), (70, Dtype::F16)].map(|(arch, dtype)| Mutex::new(open(arch, dtype))).into()
});

fn open(arch: u32, dtype: Dtype) -> Device {
    let cache = Cache::at(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kernels"));
    let emulator = Emulator::new(EmulatorOptions { arch, ..EmulatorOptions::default() }, cache);
    Device::on(Gpu::new(Box::new(emulator.expect("a C++ compiler"))), dtype).expect("its kernels compile")
}

fn on_the_emulator(case: &Case) -> Result<(), Failed> {
    let device = EMULATORS[0].lock().unwrap_or_else(PoisonError::into_inner);
    let values = (case.run)(&device)?;
    device.check()?;
    match values.iter().position(|v| *v != 0.0) {
        Some(at) => Err(format!("element {at} is {:e}, and should be 0", values[at]).into()),
        None if keeps_subnormals() => Ok(()),
        None => Err("the thread was left in another mode".into()),
    }
}

/// The subnormal numbers of f16 are normal in f32, and stay what they are: through a sum, and through a matrix product.
fn half_keeps_its_own() -> Result<(), Failed> {
    const CHANNELS: usize = 16;
    let unit = 2f32.powi(-24);
    let x: Vec<f32> = (0..64 * CHANNELS).map(|i| unit * if i % 3 == 0 { -(i as f32) } else { i as f32 }).collect();
    assert!(x.iter().all(|x| x.abs() < 2f32.powi(-14)), "below the smallest normal f16");
    for device in &EMULATORS[1..] {
        let device = device.lock().unwrap_or_else(PoisonError::into_inner);
        let mut half = device.activations(x.len())?;
        half.write(&x)?;
        let (zeros, mut sum) = (device.activations(x.len())?, device.activations(x.len())?);
        add::forward(all(&half), all(&zeros), sum.view_mut(0..x.len()));
        assert_eq!(read(&sum)?, x, "added by {}", device.name());

        let conv =
            Conv { c_in: CHANNELS, c_out: CHANNELS, window: Window::square(1, 1, 0), groups: 1, bias: Bias::None };
        let p = ConvProblem::new(&conv, Shape::new(8, 8, CHANNELS), 1).ok_or("it fits")?;
        let identity: Vec<f32> = (0..CHANNELS * CHANNELS).map(|i| f32::from(i / CHANNELS == i % CHANNELS)).collect();
        let (mut w, mut y) = (device.activations(identity.len())?, device.activations(x.len())?);
        w.write(&identity)?;
        conv::forward(&p, all(&half), all(&w), &Epilogue::default(), y.view_mut(0..x.len()));
        assert_eq!(read(&y)?, x, "multiplied by {}", device.name());
    }
    Ok(())
}

/// A small network.
fn network() -> Result<Model, Failed> {
    let options = NetworkOptions {
        input_stride: Some(1),
        stage_strides: Some(vec![1, 2, 1, 2, 1, 1, 1]),
        head_channels: Some(64),
        ..NetworkOptions::new(Shape::new(12, 10, 3), 10)
    };
    Ok(Model::initialise(build("mobilenetv2-0.25", &options)?, 1)?)
}

/// Sets channels of every batch-norm as sparse training and pruning leave them.
fn kill_channels(model: &mut Model, beta: f32, is_dead: fn(usize) -> bool) {
    for (suffix, value) in [("weight", 0.0), ("bias", beta), ("running_mean", 0.0), ("running_var", 1e-38)] {
        let norms = model.graph.nodes.iter().filter(|node| matches!(node.op, Op::BatchNorm(_)));
        for name in norms.map(|node| format!("{}.{suffix}", node.name)) {
            let tensor = model.weights.get_mut(&name).expect("a batch-norm has it");
            tensor.data.iter_mut().enumerate().filter(|(c, _)| is_dead(*c)).for_each(|(_, v)| *v = value);
        }
    }
}

/// A network that is dead but for subnormal biases has logits of exactly 0, at every level of fusion, in inference and
/// training; so have the gradients behind subnormal ones. IEEE arithmetic gives logits near 1e-37.
fn dead_network(device: &Device, fusions: &[Fusion]) -> Result<(), Failed> {
    let mut model = network()?;
    kill_channels(&mut model, SMALL, |_| true);
    model.weights.get_mut("classifier.weight").ok_or("a classifier")?.data.fill(1.0);
    let images = numbers(3, 4 * model.graph.input_shape().len());
    let mut planned: Vec<(Model, Fusion, bool)> = Vec::new();
    for &fusion in fusions {
        planned.extend([(model.clone(), fusion, false), (model.clone(), fusion, true)]);
    }
    planned.push((merged(&model, PaddingMode::BorderBias)?.1.model, Fusion::OnLoad, false));
    for (model, fusion, training) in planned {
        let options = EngineOptions { batch: 4, fusion, training, taps: Vec::new() };
        let mut engine = Engine::new(device, &model, &options)?;
        let mut values = read(engine.forward(&images)?)?;
        if training {
            engine.backward(&device.upload(&[SMALL; 40])?)?;
            values.extend(read(engine.trainable().1)?);
        }
        if let Some(at) = values.iter().position(|v| *v != 0.0) {
            let what = format!("{fusion:?}, training {training}: logit or gradient {at}");
            return Err(format!("{what} is {:e}, and should be 0", values[at]).into());
        }
    }
    Ok(())
}

/// The network with every block freed, and merged.
fn merged(model: &Model, padding: PaddingMode) -> Result<(Model, Merged), Failed> {
    let kept = vec![false; model.graph.blocks.len()];
    let linear = linearise(model, &kept, &Linearise { final_activation: true, padding })?;
    let merged = merge(&linear, &MergeOptions { padding })?;
    Ok((linear, merged))
}

fn subnormals(values: &[f32]) -> usize {
    values.iter().filter(|v| v.is_subnormal()).count()
}

/// What folding writes, element by element: the product in f64, or 0 where f32 holds it only as a subnormal number.
fn folded_values() -> Result<(), Failed> {
    let mut b = GraphBuilder::new("fold", Shape::new(4, 4, 1));
    let bn = BatchNorm { channels: 6, eps: 1e-5, momentum: 0.1 };
    let x = b.conv_bn(("conv", GraphBuilder::conv(1, 6, Window::square(1, 1, 0), 1)), ("bn", bn), NodeId::INPUT);
    let x = b.push("alone", Op::Conv(GraphBuilder::conv(6, 6, Window::square(1, 1, 0), 6)), &[x]);
    let x = b.push("pool", Op::GlobalAvgPool, &[x]);
    b.linear("classifier", 6, 2, x);
    let mut model = Model::initialise(b.finish()?, 0)?;
    let smallest = f32::MIN_POSITIVE;
    let mut set = |name: &str, values: &[f32]| model.weights.get_mut(name).expect(name).data.copy_from_slice(values);
    // Subnormal weights whose product is normal, the reverse, and both sides of the border.
    set("conv.weight", &[1e-40, -1e-20, smallest * 1.01, smallest, -smallest * 0.99, 1.0]);
    set("bn.weight", &[1e10, 1e-20, 1.0, 1.0, 1.0, 3e-39]);
    set("bn.running_var", &[1.0; 6]);
    set("bn.bias", &[3e-41, -3e-41, smallest, 0.0, -smallest, 1.0]);
    set("alone.weight", &[1.0, -1e-41, smallest, -smallest, smallest / 2.0, 0.0]);
    set("classifier.bias", &[2e-42, -smallest]);
    let factor = 1.0 / (1.0 + f64::from(1e-5f32)).sqrt();
    let product = |w: f32, gamma: f32| (f64::from(w) * f64::from(gamma) * factor) as f32;
    let folded = model.folded()?;
    let values = |name: &str| folded.weights[name].data.clone();
    let expected = [product(1e-40, 1e10), 0.0, product(smallest * 1.01, 1.0), 0.0, 0.0, 0.0];
    assert_eq!(values("conv.weight"), expected);
    assert!((expected[0] / 1e-30 - 1.0).abs() < 1e-4, "1e-40 has 16 bits in f32, and they count: {}", expected[0]);
    assert_eq!(values("conv.bias"), [0.0, 0.0, smallest, 0.0, -smallest, 1.0]);
    assert_eq!(values("alone.weight"), [1.0, 0.0, smallest, -smallest, 0.0, 0.0]);
    assert_eq!(values("classifier.bias"), [0.0, -smallest]);
    Ok(())
}

/// Puts subnormal numbers into an ordinary network.
type Change = fn(&mut Model);

/// Networks of several kinds of subnormal numbers: how each is made of an ordinary one.
const MEMBERS: [(&str, Change); 4] = [
    ("beta", |model| kill_channels(model, 3e-41, |c| c % 4 != 0)),
    ("gamma", |model| each(model, |role| role == ParamRole::BnWeight, |v| *v *= 1e-40)),
    ("weights", |model| each(model, |role| matches!(role, ParamRole::ConvWeight(_)), |v| *v *= 1e-38)),
    // The border map of a block is made of products of these.
    ("border map", |model| each(model, |role| role == ParamRole::BnBias, |v| *v = 1e-36)),
];

/// Changes every third number of the parameters of a role.
fn each(model: &mut Model, is_meant: fn(ParamRole) -> bool, change: fn(&mut f32)) {
    let meant: Vec<String> = {
        let params = model.graph.params().expect("a well-formed graph");
        params.into_iter().filter(|param| is_meant(param.role)).map(|param| param.name).collect()
    };
    for name in meant {
        model.weights.get_mut(&name).expect("a parameter").data.iter_mut().skip(1).step_by(3).for_each(change);
    }
}

/// Merged convolutions hold no subnormal number, though their sums would; they pass verification in f64, a planted error
/// does not; and the network's logits stay what they were.
fn merged_values(change: fn(&mut Model)) -> Result<(), Failed> {
    let mut model = network()?;
    change(&mut model);
    for padding in [PaddingMode::BorderBias, PaddingMode::Reorder] {
        let (linear, merged) = merged(&model, padding)?;
        let convs = |merged: &Merged| -> Vec<String> {
            let names = merged.segments.iter().map(|segment| merged.model.graph.nodes[segment.conv].name.clone());
            names.collect()
        };
        for conv in convs(&merged) {
            let of_conv = merged.model.weights.iter().filter(|(name, _)| name.starts_with(&format!("{conv}.")));
            for (name, tensor) in of_conv {
                assert_eq!(subnormals(&tensor.data), 0, "{name}");
            }
        }
        let error = verify_random(&linear, &merged, 4, 3)?;
        error.check(&merged)?;
        assert!(error.max_rel_error < 1e-4, "{error:?}");

        let mut wrong = merged.clone();
        let weight = format!("{}.weight", convs(&merged)[merged.segments.len() / 2]);
        let data = &mut wrong.model.weights.get_mut(&weight).ok_or("a merged convolution")?.data;
        let largest = (0..data.len()).max_by(|&a, &b| data[a].abs().total_cmp(&data[b].abs())).ok_or("a weight")?;
        data[largest] *= 1.001;
        assert!(verify_random(&linear, &wrong, 4, 3)?.check(&wrong).is_err(), "a wrong tap passes");
    }
    Ok(())
}

/// `export` writes no subnormal number into a file of plain convolutions, and `merge` none into what it merged.
fn written_files(change: fn(&mut Model)) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let mut model = network()?;
    change(&mut model);
    let before: usize = model.weights.values().map(|tensor| subnormals(&tensor.data)).sum();
    write_model(&folder.path().join("m.safetensors"), &model, &ModelInfo::default())?;
    let run = |args: &[&str]| -> Result<(), Failed> {
        let output = Command::new(env!("CARGO_BIN_EXE_depthshrinker")).current_dir(&folder).args(args).output()?;
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned().into()) }
    };
    run(&["export", "m.safetensors", "-o", "folded.safetensors"])?;
    let keep = "1,0,1,0,1,0,1,0,1,0,1,0,1,0,1,0,1";
    run(&["merge", "m.safetensors", "--keep-list", keep, "-o", "merged.safetensors"])?;
    run(&["export", "merged.safetensors", "-o", "both.safetensors"])?;
    for (file, is_meant) in [("folded", ""), ("merged", ".conv."), ("both", "")] {
        let tensors = read_tensors(&folder.path().join(format!("{file}.safetensors")))?.tensors;
        let meant = tensors.iter().filter(|(name, _)| name.contains(is_meant));
        let left: Vec<&String> =
            meant.filter(|(_, tensor)| subnormals(&tensor.data) > 0).map(|(name, _)| name).collect();
        assert!(left.is_empty(), "{file}: {left:?}");
    }
    // What was there stays in models, which training goes on with.
    let kept = read_tensors(&folder.path().join("m.safetensors"))?.tensors;
    assert_eq!(kept.values().map(|tensor| subnormals(&tensor.data)).sum::<usize>(), before);
    Ok(())
}

fn main() {
    const EMULATED_MACS: u64 = 300_000;
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for cases in [conv_cases, linear_cases, small_cases] {
        for case in cases() {
            trials.push(Trial::test(format!("host/{}", case.name), move || on_every_thread(&case)));
        }
        for case in cases().into_iter().filter(|case| case.macs < EMULATED_MACS) {
            trials.push(Trial::test(format!("emulator/{}", case.name), move || on_the_emulator(&case)));
        }
    }
    let fusions = [Fusion::PerNode, Fusion::Epilogue, Fusion::OnLoad, Fusion::Block];
    trials.push(Trial::test("network/host", move || dead_network(&Device::Cpu, &fusions)));
    trials.push(Trial::test("network/emulator", move || {
        dead_network(&EMULATORS[0].lock().unwrap_or_else(PoisonError::into_inner), &fusions)
    }));
    trials.push(Trial::test("half_keeps_its_own", half_keeps_its_own));
    trials.push(Trial::test("folded_values", folded_values));
    for (name, change) in MEMBERS {
        trials.push(Trial::test(format!("merged/{name}"), move || merged_values(change)));
        trials.push(Trial::test(format!("written/{name}"), move || written_files(change)));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
