//! Every kernel on the emulator: the operation table in every precision, on both kinds of tensor core, in shuffled
//! thread orders; and the list of kernels that ran against the list that exists.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use depthshrinker::check::cases;
use depthshrinker::check::training::{mobilenet, pooled, train};
use depthshrinker::device::Device;
use depthshrinker::device::cache::Cache;
use depthshrinker::device::emulator::{Emulator, EmulatorOptions};
use depthshrinker::device::gpu::Gpu;
use depthshrinker::device::source::FILES;
use depthshrinker::dtype::Dtype;
use depthshrinker::engine::Fusion;
use depthshrinker::graph::Graph;
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
    let missing: Vec<&str> = FILES
        .iter()
        .flat_map(|file| file.instances)
        .copied()
        .filter(|instance| !launched.contains(*instance))
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(format!("never launched: {}", missing.join("; "))) }
}

/// Steps of a training run.
const STEPS: usize = 20;

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
        trials.push(Trial::test(name, move || trains_as_the_host_does(mode, Fusion::OnLoad, mobilenet)));
        let name = format!("{}/train/pooled", mode.name());
        trials.push(Trial::test(name, move || trains_as_the_host_does(mode, Fusion::OnLoad, pooled)));
    }
    let reference = || trains_as_the_host_does(MODES[0], Fusion::PerNode, mobilenet);
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
