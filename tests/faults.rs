//! The emulator finds what it is there to find: planted faults, each in a kernel of its own, and the whole operation
//! table under the sanitizers of addresses and undefined behaviour. And the real compiler accepts every kernel, without local memory.

use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use depthshrinker::check::cases;
use depthshrinker::device::Device;
use depthshrinker::device::argument::{Argument, Element};
use depthshrinker::device::cache::Cache;
use depthshrinker::device::compiler::{ARCHITECTURES, compile};
use depthshrinker::device::driver::{Driver, LaunchShape};
use depthshrinker::device::emulator::{Emulator, EmulatorOptions};
use depthshrinker::device::gpu::Gpu;
use depthshrinker::device::nvrtc::{Nvrtc, Target};
use depthshrinker::device::source::Unit;
use depthshrinker::dtype::Dtype;
use depthshrinker::ops::conv::{self, Bias, Conv, ConvProblem};
use depthshrinker::ops::epilogue::Epilogue;
use depthshrinker::shape::{Shape, Window};
use libtest_mimic::{Arguments, Failed, Trial};

const FAULTS: &str = r#"
#include "numeric.cuh"

// Reverses 256 floats through shared memory. The barrier between writing and reading is what it is about.
template <bool BARRIER>
__global__ void __launch_bounds__(256) reverse(float* values) {
    SHARED_ARRAY(float, shared, 256);
    shared[threadIdx.x] = values[threadIdx.x];
    if (BARRIER) __syncthreads();
    values[threadIdx.x] = shared[255 - threadIdx.x];
}

// Reads `reach` elements past its own.
__global__ void __launch_bounds__(256) copy(const float* from, float* to, int reach) {
    to[threadIdx.x] = from[threadIdx.x + reach];
}

// Overflows an int where `by` is above 0.
__global__ void __launch_bounds__(256) count(const float* from, float* to, int by) {
    const int last = 2147483392 + static_cast<int>(threadIdx.x);
    to[threadIdx.x] = from[threadIdx.x] + static_cast<float>(last + by);
}

// Writes all elements but the last.
__global__ void __launch_bounds__(256) forget(float* to) {
    if (threadIdx.x != 255) to[threadIdx.x] = 1.0f;
}
"#;

const BLOCK: LaunchShape = LaunchShape { grid: [1, 1, 1], block: [256, 1, 1], shared: 0 };

fn cache() -> Cache {
    Cache::at(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kernels"))
}

fn emulator(order_seed: u64, sanitize: Option<&str>) -> Result<Emulator, Failed> {
    let options = EmulatorOptions { order_seed, sanitize: sanitize.map(String::from), ..EmulatorOptions::default() };
    Ok(Emulator::new(options, cache())?)
}

/// Launches one of the faults on 256 floats 0, 1, …; `extra` is the argument after the pointers.
fn run(emulator: &Emulator, kernel: &str, extra: Option<i32>) -> Result<Vec<f32>, Failed> {
    let functions =
        emulator.load_text("faults.cu", FAULTS, &["reverse<true>", "reverse<false>", "copy", "count", "forget"])?;
    let (from, to) = (emulator.allocate(1024)?, emulator.allocate(1024)?);
    let numbers: Vec<u8> = (0..256).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let mut out = vec![0u8; 1024];
    // SAFETY: both allocations have 1024 bytes; the arguments are those of the kernels above.
    unsafe {
        emulator.upload(from, &numbers)?;
        let result = if extra.is_some() || kernel == "forget" { to } else { from };
        let float = |at, writable| Argument::pointer(at, Element::Number(Dtype::F32), writable);
        let arguments = match extra {
            Some(reach) => vec![float(from, false), float(to, true), reach.into()],
            None => vec![float(result, true)],
        };
        emulator.launch(functions[kernel], BLOCK, &arguments)?;
        emulator.download(&mut out, result)?;
        emulator.free(from);
        emulator.free(to);
    }
    Ok(out.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect())
}

/// With its barrier the kernel is right in every order; without it, it is wrong in one of a few.
fn missing_barrier() -> Result<(), Failed> {
    let expected: Vec<f32> = (0..256).rev().map(|i| i as f32).collect();
    let mut caught = false;
    for seed in 0..4 {
        if run(&emulator(seed, None)?, "reverse<true>", None)? != expected {
            return Err("the barrier does not hold".into());
        }
        caught |= run(&emulator(seed, None)?, "reverse<false>", None)? != expected;
    }
    if caught { Ok(()) } else { Err("a missing barrier went unnoticed".into()) }
}

/// Launches a fault with arguments that are not its own.
fn refuse(kernel: &str, arguments: &[Argument]) -> Result<String, Failed> {
    let emulator = emulator(0, None)?;
    let functions = emulator.load_text("faults.cu", FAULTS, &["copy", "forget"])?;
    // SAFETY: no kernel runs: that is what is looked at.
    match unsafe { emulator.launch(functions[kernel], BLOCK, arguments) } {
        Ok(()) => Err("the launch went through".into()),
        Err(error) => Ok(error.to_string()),
    }
}

/// The emulator itself refuses arguments that are not the kernel's.
fn wrong_arguments() -> Result<(), Failed> {
    let (float, half) = (Element::Number(Dtype::F32), Element::Number(Dtype::F16));
    let (from, to) = (Argument::pointer(256, float, false), Argument::pointer(512, float, true));
    for (arguments, expected) in [
        (&[from, to][..], "another number of arguments"),
        (&[from, to, 1i32.into(), 1i32.into()], "another number of arguments"),
        (&[from, to, 1i64.into()], "argument 3 is of another type"),
        (&[Argument::pointer(256, half, false), to, 1i32.into()], "argument 1 is of another type"),
        (&[from, from, 1i32.into()], "argument 2 is of another type"),
    ] {
        let told = refuse("copy", arguments)?;
        if !told.contains(expected) {
            return Err(format!("expected {expected:?}, got {told:?}").into());
        }
    }
    Ok(())
}

/// A device refuses a launch that does not fit, and says which kernel, which argument, and what was expected.
fn refused_launches() -> Result<(), Failed> {
    let gpu = Gpu::new(Box::new(emulator(0, None)?));
    let device = Device::Gpu(gpu.clone(), Dtype::F32);
    let (a, mut z) = (device.upload(&[1.0; 256])?, device.zeros(256)?);
    let read = Argument::from(a.view(0..256).gpu());
    let written = Argument::from(&z.view_mut(0..256).gpu());
    for (arguments, expected) in [
        (&[read, read, written][..], "takes 4 arguments (a, b, z, n), got 3"),
        (&[read, read, written, 256i32.into()], "argument 4, n, is long long, got int"),
        (&[read, 1.0f32.into(), written, 256i64.into()], "argument 2, b, is const float*, got float"),
        (&[read, read, read, 256i64.into()], "argument 3, z, is float*, got const float*"),
        (&[read, Argument::null(), written, 256i64.into()], "argument 2, b, is const float*, got a null pointer"),
    ] {
        // SAFETY: pointers lead to 256 floats each, and what does not fit is not launched.
        unsafe { gpu.launch("add<float, true>", BLOCK, arguments) };
        let told = gpu.check().err().map_or_else(|| "the launch went through".into(), |e| e.to_string());
        if !(told.contains("add<float, true>: ") && told.contains(expected)) {
            return Err(format!("expected {expected:?}, got {told:?}").into());
        }
    }
    // SAFETY: as above.
    unsafe { gpu.launch("add<float, true>", BLOCK, &[read, read, written, 256i64.into()]) };
    let mut sum = [0.0; 256];
    z.read(&mut sum)?;
    if sum == [2.0; 256] { Ok(()) } else { Err(format!("{sum:?}").into()) }
}

/// An operation whose operand is too short is not launched.
fn short_operand() -> Result<(), Failed> {
    let device = Device::Gpu(Gpu::new(Box::new(emulator(0, None)?)), Dtype::F32);
    let conv = Conv { c_in: 4, c_out: 4, window: Window::square(3, 1, 1), groups: 4, bias: Bias::None };
    let p = ConvProblem::new(&conv, Shape::new(5, 5, 4), 2).ok_or("a problem")?;
    let (x, w, mut y) = (device.zeros(200)?, device.zeros(36)?, device.zeros(200)?);
    let mut run = |x_len: usize, w_len: usize, y_len: usize| {
        let operands = (x.view(0..x_len), w.view(0..w_len));
        let y = y.view_mut(0..y_len);
        let run = || conv::forward(&p, operands.0, operands.1, &Epilogue::default(), y);
        let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).err();
        told.map(|told| told.downcast_ref::<String>().cloned().unwrap_or_default())
    };
    for (lens, expected) in [
        ((199, 36, 200), "x has 199 elements, and 200 are needed"),
        ((200, 35, 200), "w has 35 elements, and 36 are needed"),
        ((200, 36, 196), "y has 196 elements, and 200 are needed"),
    ] {
        let told = run(lens.0, lens.1, lens.2).unwrap_or_else(|| "the launch went through".into());
        if !told.contains(expected) {
            return Err(format!("expected {expected:?}, got {told:?}").into());
        }
    }
    run(200, 36, 200).map_or(Ok(()), |told| Err(told.into()))
}

fn unwritten_output() -> Result<(), Failed> {
    let got = run(&emulator(0, None)?, "forget", None)?;
    if got[255].is_nan() && got[..255].iter().all(|v| *v == 1.0) { Ok(()) } else { Err(format!("{got:?}").into()) }
}

/// Runs this program again under the sanitizers; the library of the one for addresses must be loaded first.
fn under_sanitizer(task: &str) -> Result<std::process::Output, Failed> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    let found = Command::new(compiler).arg("-print-file-name=libasan.so").output()?;
    let library = String::from_utf8_lossy(&found.stdout).trim().to_owned();
    let mut child = Command::new(std::env::current_exe()?);
    child.env("LD_PRELOAD", library).env("ASAN_OPTIONS", "detect_leaks=0").env("DEPTHSHRINKER_SANITIZED", task);
    Ok(child.output()?)
}

/// A kernel is fine with 0 for its last argument, and caught with 1.
fn caught(kernel: &str, message: &str) -> Result<(), Failed> {
    let output = under_sanitizer(&format!("{kernel} 0"))?;
    if !output.status.success() {
        return Err(format!("without a fault: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let output = under_sanitizer(&format!("{kernel} 1"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && text.contains(message) {
        return Ok(());
    }
    Err(format!("{message} went unnoticed: {text}").into())
}

fn table_under_sanitizer(precision: Dtype) -> Result<(), Failed> {
    let output = under_sanitizer(&format!("table {precision}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(text.lines().take(40).collect::<Vec<_>>().join("\n").into())
}

/// What the child does.
fn sanitized(task: &str) -> Result<(), Failed> {
    let emulator = emulator(0, Some("address,undefined"))?;
    match task.split_once(' ') {
        Some((kernel @ ("copy" | "count"), fault)) => run(&emulator, kernel, Some(fault.parse()?)).map(|_| ()),
        Some(("table", precision)) => {
            let device = Device::on(Gpu::new(Box::new(emulator)), precision.parse()?)?;
            // Without tensor cores the largest problems run on the tiles of the small ones. Whole training steps put together
            // what the other cases run.
            let large = |name: &str| precision == "f32" && name.contains("64x64x");
            let more = |name: &str| !(large(name) || name.starts_with("training/"));
            for case in cases().into_iter().filter(|case| more(&case.name)) {
                case.compare(&device)?.map_err(|difference| format!("{}: {difference}", case.name))?;
            }
            Ok(())
        }
        _ => Err(format!("unknown task {task}").into()),
    }
}

/// The program, with kernels from `brought` alone where there is no compiler.
fn program(folder: &Path, compiler: bool, brought: Option<&Path>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_depthshrinker"));
    command.current_dir(folder).env("DEPTHSHRINKER_CACHE", "empty");
    if !compiler {
        command.env("DEPTHSHRINKER_NVRTC", "/nonexistent/libnvrtc.so");
    }
    if let Some(brought) = brought {
        command.env("DEPTHSHRINKER_KERNELS", brought);
    }
    command
}

/// The real compiler takes every kernel and gives none local memory; what `kernels build` made serves without a compiler.
fn compiles(arch: u32) -> Result<(), Failed> {
    let (folder, made) = (tempfile::tempdir()?, PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("cubins"));
    let arch = format!("sm_{arch}");
    let mut build = program(folder.path(), true, None);
    let built = build.args(["kernels", "build", "--arch", &arch, "--out"]).arg(&made).output()?;
    let mut report = program(folder.path(), false, Some(&made));
    let reported = report.args(["kernels", "report", "--arch", &arch, "--json"]).output()?;
    if !built.status.success() || !reported.status.success() {
        return Err(format!("{built:?}; {:?}", reported.stderr).into());
    }
    let kernels: Vec<serde_json::Value> = serde_json::from_slice(&reported.stdout)?;
    let number = |kernel: &serde_json::Value, of: &str| kernel[of].as_u64().ok_or(format!("no {of}: {kernel}"));
    for kernel in &kernels {
        if number(kernel, "stack")? + number(kernel, "spills")? > 0 || number(kernel, "registers")? == 0 {
            return Err(kernel.to_string().into());
        }
    }
    if kernels.len() > 50 { Ok(()) } else { Err(format!("{} kernels", kernels.len()).into()) }
}

/// Additions in f32 in a compiled unit, and those among them that count subnormal numbers as zero: instructions of 16 bytes,
/// of which FADD is 0x021 in the lowest 9 bits and flushes with bit 80, from sm_70 on.
fn additions(image: &[u8]) -> (usize, usize) {
    let number = |at: usize, len: usize| {
        let mut bytes = [0; 8];
        bytes[..len].copy_from_slice(&image[at..][..len]);
        u64::from_le_bytes(bytes) as usize
    };
    // The header of an ELF file says where its sections are told, in how many bytes each, and how many there are.
    let (table, entry, sections) = (number(0x28, 8), number(0x3a, 2), number(0x3c, 2));
    let (mut all, mut flushed) = (0, 0);
    for section in (0..sections).map(|section| table + section * entry) {
        let is_code = number(section + 4, 4) == 1 && number(section + 8, 8) & 4 != 0;
        let (start, len) = (number(section + 24, 8), number(section + 32, 8));
        for at in (start..start + len).step_by(16).filter(|&at| is_code && number(at, 8) & 0x1ff == 0x021) {
            all += 1;
            flushed += number(at + 8, 8) >> 16 & 1;
        }
    }
    (all, flushed)
}

/// A GPU counts subnormal numbers as zero, as the emulator does.
fn flushes(arch: u32) -> Result<(), Failed> {
    let mut units = Unit::all()?.into_iter();
    let is_sum = |unit: &Unit| (&*unit.file().name, unit.dtype()) == ("elementwise.cu", Dtype::F32);
    let (all, flushed) =
        additions(&Nvrtc::find()?.compile(units.find(is_sum).ok_or("sums")?, Target::Machine(arch))?.image);
    if all > 0 && all == flushed { Ok(()) } else { Err(format!("{flushed} of {all} additions flush").into()) }
}

/// An architecture that NVRTC does not know gets PTX of the newest that it knows, in a file of its own, which serves without
/// a compiler too.
fn newer_than_the_compiler() -> Result<(), Failed> {
    const NEWER: u32 = 150;
    let is_sum = |unit: &Unit| (&*unit.file().name, unit.dtype()) == ("elementwise.cu", Dtype::F32);
    let unit = Unit::all()?.into_iter().find(is_sum).ok_or("sums")?;
    let Target::Ptx(known) = Nvrtc::find()?.target(NEWER)? else { return Err("sm_150 is known".into()) };
    for arch in ARCHITECTURES {
        assert_eq!(Nvrtc::find()?.target(arch)?, Target::Machine(arch));
    }
    let folder = tempfile::tempdir()?;
    let compiled = compile(unit, NEWER, &Cache::at(folder.path()))?;
    let text = CStr::from_bytes_with_nul(&compiled.image)?.to_str()?;
    assert!((90..NEWER).contains(&known) && compiled.target == Target::Ptx(known), "{:?}", compiled.target);
    assert!(text.contains(&format!("\n.target sm_{known}\n")) && text.contains(".ftz"), "{}", &text[..400]);
    for kernel in &compiled.kernels {
        assert!(text.contains(&format!(".entry {}(", kernel.symbol)), "{kernel:?}");
    }
    compile(unit, known, &Cache::at(folder.path()))?;
    let mut files: Vec<String> = std::fs::read_dir(folder.path())?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<std::io::Result<_>>()?;
    files.sort();
    let keys: Vec<&str> = files.iter().filter_map(|name| name.split('-').nth(3)).collect();
    assert!(files.len() == 2 && keys[0] != keys[1], "{files:?}");
    assert!(
        files[0].starts_with(&format!("elementwise-f32-compute_{known}-")) && files[0].ends_with(".ptx"),
        "{files:?}"
    );
    assert!(files[1].starts_with(&format!("elementwise-f32-sm_{known}-")) && files[1].ends_with(".cubin"), "{files:?}");
    // Brought along, it serves whatever is newer.
    let brought = compile(unit, NEWER + 1, &Cache::at(folder.path().join("empty")).with_seed(folder.path()))?;
    assert!(brought.image == compiled.image && brought.target == compiled.target);
    Ok(())
}

/// Without a compiler and without kernels that were brought along there are none.
fn no_kernels() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let output = program(folder.path(), false, None).args(["kernels", "report", "--arch", "sm_75"]).output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(1) && told.contains("NVRTC") { Ok(()) } else { Err(format!("{output:?}").into()) }
}

fn main() {
    if let Ok(task) = std::env::var("DEPTHSHRINKER_SANITIZED") {
        // The sanitizer is for this process, and would make the compilers that it starts twice as slow.
        // SAFETY: no other thread runs yet.
        unsafe { std::env::remove_var("LD_PRELOAD") };
        if let Err(error) = sanitized(&task) {
            eprintln!("{}", error.message().unwrap_or("failed"));
            std::process::exit(1);
        }
        return;
    }
    let arguments = Arguments::from_args();
    let mut trials = vec![
        Trial::test("planted/missing_barrier", missing_barrier),
        Trial::test("planted/out_of_bounds_read", || caught("copy", "heap-buffer-overflow")),
        Trial::test("planted/integer_overflow", || caught("count", "signed integer overflow")),
        Trial::test("planted/unwritten_output", unwritten_output),
        Trial::test("launch/wrong_arguments", wrong_arguments),
        Trial::test("launch/refused", refused_launches),
        Trial::test("launch/short_operand", short_operand),
        Trial::test("sanitized/f32", || table_under_sanitizer(Dtype::F32)),
        Trial::test("sanitized/f16", || table_under_sanitizer(Dtype::F16)),
    ];
    // `tests/run` brings the compiler; a bare `cargo test` may do without.
    let missing = Nvrtc::find().is_err();
    for arch in ARCHITECTURES {
        trials.push(Trial::test(format!("nvrtc/sm_{arch}"), move || compiles(arch)).with_ignored_flag(missing));
        trials.push(Trial::test(format!("nvrtc/flushes/sm_{arch}"), move || flushes(arch)).with_ignored_flag(missing));
    }
    trials.push(Trial::test("nvrtc/newer", newer_than_the_compiler).with_ignored_flag(missing));
    trials.push(Trial::test("nvrtc/none", no_kernels));
    libtest_mimic::run(&arguments, trials).exit();
}
