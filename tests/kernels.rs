//! Every kernel on the emulator: the operation table in every precision, on both kinds of tensor core, in shuffled
//! thread orders; a few problems of each family in every configuration; and the list of kernels that ran against the list
//! that exists.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use depthshrinker::check::training::{mobilenet, pooled, train};
use depthshrinker::check::{CONVOLUTIONS, NORMS, cases, problem};
use depthshrinker::device::Device;
use depthshrinker::device::cache::Cache;
use depthshrinker::device::emulator::{Emulator, EmulatorOptions};
use depthshrinker::device::gpu::Gpu;
use depthshrinker::device::source::files;
use depthshrinker::dtype::Dtype;
use depthshrinker::engine::Fusion;
use depthshrinker::graph::Graph;
use depthshrinker::ops::batch_norm::BatchNormProblem;
use depthshrinker::ops::config::{
    AugmentProblem, BetweenNorms, BiasProblem, GlobalPoolProblem, KernelFamily, KernelPass, KernelTarget, Kernels,
    OptimizerProblem, Problem, WalkProblem, force,
};
use depthshrinker::ops::conv::ConvProblem;
use depthshrinker::ops::pad::PadProblem;
use depthshrinker::ops::pool::PoolProblem;
use depthshrinker::shape::{Lines, Shape, Window};
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
            Device::Gpu(gpu, _) => gpu.launched().into_keys().collect(),
        })
        .collect();
    let instances = files().map_err(|e| e.to_string())?.iter().flat_map(|file| &file.instances);
    let missing: Vec<&str> = instances.filter(|i| !launched.contains(*i)).map(String::as_str).collect();
    if missing.is_empty() { Ok(()) } else { Err(format!("never launched: {}", missing.join("; "))) }
}

/// Steps of a training run: enough for the loss to fall.
const STEPS: usize = 6;

fn trains_as_the_host_does(
    mode: Mode,
    fusion: Fusion,
    graph: fn() -> depthshrinker::Result<Graph>,
) -> Result<(), Failed> {
    let expected = train(&Device::Cpu, fusion, graph()?, STEPS, false)?.losses;
    let device = device(mode)?;
    let trained = train(&device, fusion, graph()?, STEPS, false)?;
    let got = &trained.losses;
    let tolerance = if mode.precision == Dtype::F32 { 1e-4 } else { 40.0 * mode.precision.epsilon() };
    let worst = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let diverged = got.iter().any(|loss| !loss.is_finite());
    if diverged || worst > tolerance || got[STEPS - 1] >= got[0] {
        return Err(
            format!("losses differ by up to {worst:e}, allowed {tolerance:e}: {got:?}, expected {expected:?}").into()
        );
    }
    let again = train(&device, fusion, graph()?, STEPS, true)?;
    if again != trained {
        return Err("a recorded run has other losses than one that is not recorded".into());
    }
    Ok(())
}

/// Cases that are run in every configuration of some kernels, and the names of those in a precision.
struct Sweep {
    kernels: &'static str,
    /// What the names of the cases begin with, and end with.
    cases: (String, &'static str),
    names: Box<dyn Fn(KernelTarget) -> Vec<String> + Send + Sync>,
}

impl Sweep {
    fn new<P: Problem + Send + Sync + 'static>(kernels: &'static str, cases: impl Into<String>, problem: P) -> Self {
        let pass = kernels.parse::<Kernels>().expect("a name of the table").pass;
        let names = move |on| problem.list(pass, on).iter().map(ToString::to_string).collect();
        Self { kernels, cases: (cases.into(), ""), names: Box::new(names) }
    }

    fn run(&self, mode: Mode) -> Result<(), Failed> {
        let device = device(mode)?;
        let Device::Gpu(gpu, dtype) = &*device else { unreachable!("an emulator is a GPU") };
        let kernels: Kernels = self.kernels.parse()?;
        let (start, end) = &self.cases;
        let meant = |name: &str| name.starts_with(start) && name.ends_with(end);
        let cases: Vec<_> = cases().into_iter().filter(|case| meant(&case.name)).collect();
        let names = (self.names)(KernelTarget { dtype: *dtype, arch: mode.arch });
        if cases.is_empty() || names.is_empty() {
            return Err(format!("{} cases {start}, {} configurations", cases.len(), names.len()).into());
        }
        for name in names {
            force(gpu, kernels, Some(&name))?;
            let outcomes = cases.iter().map(|case| case.compare(&device).map(|outcome| (&case.name, outcome)));
            let outcomes = outcomes.collect::<depthshrinker::Result<Vec<_>>>();
            force(gpu, kernels, None)?;
            if let Some((case, Err(difference))) = outcomes?.into_iter().find(|(_, outcome)| outcome.is_err()) {
                return Err(format!("{case} as {name}: {difference}").into());
            }
        }
        Ok(())
    }
}

/// A few problems of each family of convolutions.
fn convolutions() -> Vec<Sweep> {
    let mut sweeps = Vec::new();
    // Images, input channels, output channels and height of a row of the table.
    for (n, c_in, c_out, h) in [
        (2, 160, 320, 2),
        (5, 48, 8, 28),
        (1, 72, 72, 15),
        (3, 13, 7, 5),
        (2, 16, 24, 9),
        (2, 12, 18, 5),
        (2, 16, 24, 12),
        (1, 96, 64, 7),
        (2, 3, 16, 9),
        (2, 48, 48, 9),
        (3, 24, 24, 9),
        (2, 20, 20, 11),
        (1, 11, 11, 13),
    ] {
        let is = |p: &ConvProblem| (p.n, p.input.c, p.output.c, p.input.h) == (n, c_in, c_out, h);
        let p = CONVOLUTIONS.iter().map(problem).find(is).expect("a row of the table");
        let family = format!("{:?}", p.family()).to_lowercase();
        let cases = format!("conv/{family}/n{n}_{}_to_{c_out}_k{}x{}_", p.input, p.window.k_h, p.window.k_w);
        let of_family = |pass| Kernels { family: Problem::family(&p), pass }.name();
        for (pass, end) in [
            (KernelPass::Forward, "/finish"),
            (KernelPass::InputGradient, "/gradient"),
            (KernelPass::WeightGradient, "/gradient"),
        ] {
            let sweep = Sweep::new(of_family(pass), cases.clone(), p);
            sweeps.push(Sweep { cases: (cases.clone(), end), ..sweep });
        }
        if [KernelFamily::Pointwise, KernelFamily::Dense].contains(&Problem::family(&p)) {
            sweeps.push(Sweep::new(of_family(KernelPass::Forward), cases.replace("conv", "on_load"), BetweenNorms(p)));
        }
        if (c_out, h) == (24, 9) {
            let bias = BiasProblem { pixels: p.n * p.output.pixels(), c: p.output.c };
            sweeps.push(Sweep::new("bias_gradient", cases, bias));
        }
    }
    sweeps
}

/// A few problems of each family.
fn sweeps() -> Vec<Sweep> {
    let mut sweeps = convolutions();
    for (lines, w, c, ..) in [NORMS[1], NORMS[4]] {
        let p = BatchNormProblem { shape: Lines { lines, w, c }, eps: 1e-5, momentum: 0.1 };
        for kernels in ["batch_norm_forward", "batch_norm_backward"] {
            sweeps.push(Sweep::new(kernels, format!("batch_norm/{lines}x{w}x{c}_"), p));
        }
    }
    let pool = GlobalPoolProblem { n: 3, pixels: 20, c: 24 };
    let (input, output, window) = (Shape::new(9, 12, 16), Shape::new(5, 6, 16), Window::square(3, 2, 1));
    let max_pool = PoolProblem { n: 2, input, output, window };
    let (input, output) = (Shape::new(7, 5, 16), Shape::new(8, 8, 16));
    let pad = PadProblem { n: 2, input, output, top: 1, left: 2 };
    let walk = |family, len, aligned| WalkProblem { family, len, aligned };
    sweeps.extend([
        Sweep::new("global_pool_forward", "pool/3x20x24", pool),
        Sweep::new("global_pool_backward", "pool/3x20x24", pool),
        Sweep::new("window_pool_forward", "max_pool/3x3_s2", max_pool),
        Sweep::new("window_pool_backward", "max_pool/3x3_s2", max_pool),
        Sweep::new("pad", "pad/zeros_around", pad),
        Sweep::new("elementwise", "add/from_0", walk(KernelFamily::Elementwise, 5000, true)),
        Sweep::new("elementwise", "add/from_1", walk(KernelFamily::Elementwise, 5000, false)),
        Sweep::new("activation_forward", "activation/relu6", walk(KernelFamily::Activation, 4999, true)),
        Sweep::new("activation_backward", "activation/relu6", walk(KernelFamily::Activation, 4999, true)),
        Sweep::new("activation_forward", "feature_mse/", walk(KernelFamily::Activation, 6007, true)),
        Sweep::new("dropout", "dropout/", walk(KernelFamily::Dropout, 5000, true)),
        Sweep::new("augment", "augment/5x9x8x4", AugmentProblem { n: 5, len: 9 * 8 * 4 }),
        Sweep::new("optimizer", "optimizer/", OptimizerProblem { len: 6000 }),
    ]);
    sweeps
}

fn main() {
    let arguments = Arguments::from_args();
    let mut trials: Vec<Trial> = Vec::new();
    // The longest first, so that no thread is left with one at the end.
    for mode in MODES.into_iter().filter(|mode| mode.order_seed == 0) {
        let name = format!("{}/train/fused", mode.name());
        trials.push(Trial::test(name, move || trains_as_the_host_does(mode, Fusion::OnLoad, mobilenet)));
        let name = format!("{}/train/pooled", mode.name());
        trials.push(Trial::test(name, move || trains_as_the_host_does(mode, Fusion::OnLoad, pooled)));
    }
    let reference = || trains_as_the_host_does(MODES[0], Fusion::PerNode, mobilenet);
    trials.push(Trial::test("sm_80/f32/train/reference", reference));
    for mode in MODES {
        // Whole training steps have rows of their own above. One mode compares their scores, too.
        let has_row = |name: &str| mode != MODES[0] && name.starts_with("training/");
        for case in cases().into_iter().filter(|case| !has_row(&case.name)) {
            let name = format!("{}/{}", mode.name(), case.name);
            trials.push(Trial::test(name, move || {
                let device = device(mode)?;
                // One mode on each kind of kernel tells whether results repeat.
                let repeats = (mode == MODES[0] || mode == MODES[1]) && !case.name.starts_with("training/");
                let outcome = if repeats { case.compare_twice(&device) } else { case.compare(&device) };
                Ok(outcome.map_err(|e| e.to_string())??)
            }));
        }
    }
    // Both kinds of tensor core, and both types, have every tile.
    const TILED: [&str; 2] = ["pointwise_forward", "dense_forward"];
    for (at, mode) in MODES[..4].iter().enumerate() {
        for sweep in sweeps().into_iter().filter(|sweep| at < 2 || TILED.contains(&sweep.kernels)) {
            let name = format!("{}/configurations/{}/{}", mode.name(), sweep.kernels, sweep.cases.0);
            trials.push(Trial::test(name, move || sweep.run(*mode)));
        }
    }
    let is_skipped = |trial: &Trial| arguments.skip.iter().any(|skip| trial.name().contains(skip));
    let whole = arguments.filter.is_none() && !trials.iter().any(is_skipped);
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
