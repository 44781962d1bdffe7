//! The emulator as a device: the same kernel files, compiled by the host's C++ compiler and run on the host.
//!
//! Slow and exact: it is how every kernel is tested without a GPU. Blocks are spread over the current `rayon` pool.
//! Subnormal numbers count as zero in kernels, as on a GPU.

use std::alloc::Layout;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use libloading::{Library, Symbol};
use rayon::prelude::*;

use super::cache::Cache;
use super::calls::{CallLog, Calls};
use super::counters::{AllocationMap, CountedBlocks, CounterLog, Counters, LaunchCounters, TouchedMaps};
use super::driver::{
    Address, Argument, CapturedGraph, Driver, Event, Function, HostBlock, LOST, LaunchShape, OUT_OF_MEMORY, Queue,
    allocate_on_host, free_on_host, pointers,
};
use super::float_mode::flush_subnormals;
use super::queues::Queues;
use super::source::{Unit, write_all};
use crate::{Error, Result};

/// The content of new memory: not-a-number in every type, so that reads of unwritten memory show up.
const POISON: u8 = 0xff;
/// Threads in a launch below which spreading its blocks costs more than it gains.
const SPREAD_THREADS: u64 = 1 << 9;

/// The counting flavour: hooks at every load and store, which `kernels/emulator/block.h` has; the runtime that usually has
/// them is not linked, nor is any other library that is not named.
const COUNTING: [&str; 5] =
    ["-DEMULATOR_COUNTS", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-nodefaultlibs"];

/// How to run.
#[derive(Debug, Clone)]
pub struct EmulatorOptions {
    /// The architecture to be: decides which paths of a kernel run.
    pub arch: u32,
    /// 0 runs a block's threads in order; otherwise the seed of orders that change at every barrier.
    pub order_seed: u64,
    /// Sanitizers to compile with: `address`, `undefined` or both with a comma.
    pub sanitize: Option<String>,
    /// Bytes that can be allocated at once.
    pub memory: u64,
    /// Launches after which the device is lost.
    pub lost_after: u64,
    /// Whether freed memory is used again, as on a GPU. Without, every read of what is not written yet shows.
    pub keep_freed_memory: bool,
    /// Where launches are counted, if they are.
    pub counters: Option<CounterLog>,
    /// Where the driver's calls are counted.
    pub calls: CallLog,
}

impl Default for EmulatorOptions {
    fn default() -> Self {
        Self {
            arch: 80,
            order_seed: 0,
            sanitize: None,
            memory: u64::MAX,
            lost_after: u64::MAX,
            keep_freed_memory: false,
            counters: None,
            calls: CallLog::default(),
        }
    }
}

/// A device made of the host.
#[derive(Debug)]
pub struct Emulator {
    options: EmulatorOptions,
    cache: Cache,
    compiler: String,
    loaded: Mutex<Loaded>,
    allocations: Mutex<HashMap<Address, Allocation>>,
    launches: AtomicU64,
    recordings: Mutex<Recordings>,
    queues: Mutex<Queues>,
}

/// Memory that was allocated, and how often counted work had begun by then.
#[derive(Debug, Clone, Copy)]
struct Allocation {
    layout: Layout,
    begun: u64,
}

/// Launches and clearings that were recorded, by number of the graph, and those being recorded.
#[derive(Debug, Default)]
struct Recordings {
    current: Option<Vec<Recorded>>,
    graphs: Vec<Arc<[Recorded]>>,
}

/// What a recording holds.
#[derive(Debug)]
enum Recorded {
    Launch(Function, LaunchShape, Vec<Argument>),
    Zero(Address, usize),
}

#[derive(Debug, Default)]
struct Loaded {
    libraries: Vec<Library>,
    functions: Vec<(Launch, c_int)>,
}

/// `EmulatorOptions` of `kernels/emulator/launch.h`.
#[repr(C)]
struct RunOptions {
    size: u64,
    order_seed: u64,
    counters: *mut Counters,
    allocations: *const AllocationMap,
    allocation_count: u64,
    reserved: [u64; 3],
}

type Launch = unsafe extern "C" fn(
    c_int,
    *const [u32; 3],
    *const [u32; 3],
    u32,
    *mut *mut c_void,
    *const u32,
    c_int,
    u64,
    u64,
    *const RunOptions,
    *mut c_char,
    c_int,
) -> c_int;

impl Emulator {
    /// An emulated device.
    ///
    /// # Errors
    /// When there is no C++ compiler.
    pub fn new(options: EmulatorOptions, cache: Cache) -> Result<Self> {
        let set = std::env::var("CXX").ok().filter(|v| !v.is_empty());
        let candidates = set.map_or_else(|| vec!["g++".to_owned(), "clang++".to_owned()], |cxx| vec![cxx]);
        let version = |name: &String| {
            let output = Command::new(name).arg("--version").output().ok()?;
            output.status.success().then(|| format!("{name} {}", String::from_utf8_lossy(&output.stdout)))
        };
        let compiler = candidates.iter().find_map(version).ok_or_else(|| {
            Error::Device(format!(
                "the emulator needs a C++17 compiler, and {} does not run; install g++ or set CXX",
                candidates.join(" or ")
            ))
        })?;
        if options.counters.is_some() && compiler.starts_with("clang") {
            return Err(Error::Device(
                "counters need g++, whose hooks tell loads before they are joined; set CXX".into(),
            ));
        }
        let (loaded, allocations, launches, recordings, queues) = Default::default();
        Ok(Self { options, cache, compiler, loaded, allocations, launches, recordings, queues })
    }

    /// Whether only some blocks of a launch run, so that nobody wants their results. Memory is then not touched but by them.
    fn samples(&self) -> bool {
        self.options.counters.as_ref().is_some_and(|log| log.blocks != CountedBlocks::All)
    }

    /// Fails once the device is lost.
    fn require_device(&self, what: &str) -> Result<()> {
        if self.launches.load(Ordering::Relaxed) > self.options.lost_after {
            return Err(Error::DeviceLost(format!("cannot {what}: {LOST}")));
        }
        Ok(())
    }

    fn recordings(&self) -> MutexGuard<'_, Recordings> {
        self.recordings.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Gives the queue of work something that uses memory at these addresses.
    fn work_on(&self, used: impl IntoIterator<Item = Address>) -> Result<()> {
        let mut queues = self.queues();
        queues.give(Queue::Work)?;
        used.into_iter().try_for_each(|at| queues.uses(Queue::Work, at))
    }

    fn called(&self, of: impl FnOnce(&mut Calls) -> &mut u64) {
        self.options.calls.count(of);
    }

    /// # Safety
    /// As [`Driver::launch`].
    unsafe fn run_launch(&self, function: Function, shape: LaunchShape, arguments: &[Argument]) -> Result<()> {
        self.launches.fetch_add(1, Ordering::Relaxed);
        self.require_device("launch a kernel")?;
        self.work_on(arguments.iter().filter_map(Argument::address))?;
        let (launch, index) = self.loaded.lock().unwrap_or_else(|e| e.into_inner()).functions[function.0];
        let launch = Launched { launch, index, shape, arguments, order_seed: self.options.order_seed };
        match &self.options.counters {
            None => launch.all(|first, count| launch.run(first, count, None)),
            Some(log) => self.count(&launch, log),
        }
    }

    /// # Safety
    /// As [`Driver::zero`].
    unsafe fn run_zero(&self, at: Address, bytes: usize) -> Result<()> {
        self.work_on([at])?;
        if !self.samples() {
            // SAFETY: promised by the caller.
            unsafe { (at as *mut u8).write_bytes(0, bytes) };
        }
        Ok(())
    }

    fn flags(&self) -> Vec<String> {
        let mut flags: Vec<String> = [
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            "-fno-strict-aliasing",
            "-fno-exceptions",
            "-fno-rtti",
            "-fno-math-errno",
            // Results are those of a host without fused products, whatever the host has.
            "-ffp-contract=off",
            "-Wno-unknown-pragmas",
        ]
        .map(String::from)
        .to_vec();
        if !self.compiler.starts_with("clang") {
            // Without it two loaded files would share their thread-local state.
            flags.push("-fno-gnu-unique".into());
            // The sums that a kernel keeps in registers are arrays: they stay in memory unless the loops over them go, and
            // this compiler does not know of `#pragma unroll`.
            flags.extend(["-fpeel-loops", "-fvect-cost-model=dynamic"].map(String::from));
        }
        flags.extend(host_instructions().map(String::from));
        flags.push(format!("-DARCH={}0", self.options.arch));
        if self.options.counters.is_some() {
            flags.extend(COUNTING.map(String::from));
        }
        match &self.options.sanitize {
            None => flags.push("-O2".into()),
            Some(sanitizer) => {
                // Lines are enough to name a place.
                flags.extend(["-O1", "-g1", "-fno-omit-frame-pointer"].map(String::from));
                flags.push(format!("-fsanitize={sanitizer}"));
                if sanitizer.contains("undefined") {
                    // A null pointer ends the process anyway, and checks of each take a fifth of the compiler's time.
                    flags.extend(["-fno-sanitize=null", "-fno-sanitize-recover=undefined"].map(String::from));
                }
            }
        }
        flags
    }

    /// Compiles kernels from a text that may include the headers of `kernels/`, and loads them: how tests plant faults.
    ///
    /// # Errors
    /// As [`Driver::load`].
    pub fn load_text(&self, name: &str, text: &str, instances: &[&str]) -> Result<HashMap<String, Function>> {
        let folder = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
        let path = folder.path().join(format!("{name}.so"));
        self.compile(name, Some(text), instances, &path)?;
        self.open(&path)
    }

    /// Runs a launch, or a sample of its blocks, and notes what it did.
    fn count(&self, launch: &Launched<'_>, log: &CounterLog) -> Result<()> {
        let mut allocations: Vec<(Address, Allocation)> = {
            let allocations = self.allocations.lock().unwrap_or_else(|e| e.into_inner());
            allocations.iter().map(|(&begin, &allocation)| (begin, allocation)).collect()
        };
        allocations.sort_by_key(|&(begin, _)| begin);
        let ranges: Vec<Range<u64>> =
            allocations.iter().map(|(begin, of)| *begin..*begin + of.layout.size() as u64).collect();
        let sample = log.sample(launch.blocks());
        let touched = TouchedMaps::new(&ranges, sample.is_none());
        let all = Mutex::new(Counters::default());
        let run = |first: u64, count: u64, weight: u64| -> Result<()> {
            let mut counters = Counters::default();
            launch.run(first, count, Some((&mut counters, &touched)))?;
            all.lock().unwrap_or_else(|e| e.into_inner()).add(&counters, weight);
            Ok(())
        };
        match &sample {
            None => launch.all(|first, count| run(first, count, 1))?,
            Some(blocks) => blocks.par_iter().try_for_each(|&(block, weight)| run(block, 1, weight))?,
        }
        let (blocks, counters) = (launch.blocks(), all.into_inner().unwrap_or_else(|e| e.into_inner()));
        let counted = sample.map_or(blocks, |sample| sample.len() as u64);
        // Without a beginning all memory is that of operands.
        let is_workspace = |at: usize| log.begun() > 0 && allocations[at].1.begun == log.begun();
        let touched = touched.touched(is_workspace);
        log.push(LaunchCounters { blocks, counted, counters, touched });
        Ok(())
    }

    /// Compiles a file of `kernels/`, or a text of that name, into a shared library.
    fn compile(&self, name: &str, text: Option<&str>, instances: &[&str], to: &Path) -> Result<()> {
        let folder = to.with_extension("source");
        write_all(&folder)?;
        if let Some(text) = text {
            let path = folder.join(name);
            std::fs::write(&path, text).map_err(|e| Error::io(&path, e))?;
        }
        let instances: Vec<String> = instances.iter().map(|i| format!("EMULATED_KERNEL({i})")).collect();
        let text = format!(
            "#include \"emulator/emulator.h\"\n#include \"{}\"\n#include \"emulator/launch.h\"\nEMULATED_KERNELS(\n    {})\n",
            name,
            instances.join(",\n    ")
        );
        let main = folder.join("instances.cpp");
        std::fs::write(&main, text).map_err(|e| Error::io(&main, e))?;
        let compiler = self.compiler.split(' ').next().expect("split gives at least one part");
        let mut command = Command::new(compiler);
        command.args(self.flags()).arg("-I").arg(&folder).arg(&main).arg("-o").arg(to);
        if self.options.counters.is_some() {
            command.args(["-lstdc++", "-lm", "-lc", "-lgcc"]);
        }
        let output = command.output().map_err(|e| Error::Device(format!("{compiler}: {e}")))?;
        if !output.status.success() {
            let log = String::from_utf8_lossy(&output.stderr);
            let first = log.lines().find(|line| line.contains("error")).unwrap_or("it says nothing");
            return Err(Error::Device(format!("{compiler} cannot compile {name}: {first}")));
        }
        std::fs::remove_dir_all(&folder).map_err(|e| Error::io(&folder, e))
    }

    /// Loads a library that `compile` made.
    fn open(&self, path: &Path) -> Result<HashMap<String, Function>> {
        let broken = |e: libloading::Error| Error::file(path, format!("cannot be loaded ({e}); delete it"));
        // SAFETY: the library is one that `compile` made: its initialisers do nothing, and the symbols have these types.
        unsafe {
            let library = Library::new(path).map_err(broken)?;
            let mut loaded = self.loaded.lock().unwrap_or_else(|e| e.into_inner());
            let launch = *library.get::<Launch>(b"emulated_launch\0").map_err(broken)?;
            let count: Symbol<'_, extern "C" fn() -> c_int> =
                library.get(b"emulated_kernel_count\0").map_err(broken)?;
            let name: Symbol<'_, extern "C" fn(c_int) -> *const c_char> =
                library.get(b"emulated_kernel_name\0").map_err(broken)?;
            let mut functions = HashMap::new();
            for index in 0..count() {
                let name = CStr::from_ptr(name(index)).to_string_lossy().into_owned();
                functions.insert(name, Function(loaded.functions.len()));
                loaded.functions.push((launch, index));
            }
            loaded.libraries.push(library);
            Ok(functions)
        }
    }
}

/// A launch with all it takes.
struct Launched<'a> {
    launch: Launch,
    index: c_int,
    shape: LaunchShape,
    arguments: &'a [Argument],
    order_seed: u64,
}

impl Launched<'_> {
    fn blocks(&self) -> u64 {
        self.shape.grid.iter().map(|&n| u64::from(n)).product()
    }

    /// Runs `count` blocks from `first` on, and counts what they do.
    fn run(&self, first: u64, count: u64, counted: Option<(&mut Counters, &TouchedMaps)>) -> Result<()> {
        let mut pointers = pointers(self.arguments);
        let codes: Vec<u32> = self.arguments.iter().map(|argument| argument.kind().code()).collect();
        let mut text = [0u8; 512];
        let (counters, maps): (*mut Counters, &[AllocationMap]) =
            counted.map_or((std::ptr::null_mut(), &[]), |(counters, touched)| (counters, &touched.maps));
        let options = RunOptions {
            size: size_of::<RunOptions>() as u64,
            order_seed: self.order_seed,
            counters,
            allocations: maps.as_ptr(),
            allocation_count: maps.len() as u64,
            reserved: [0; 3],
        };
        // SAFETY: the function is loaded as long as the emulator lives; arguments and memory are promised by the caller of
        // `launch`; counters and maps live through the call.
        let code = flush_subnormals(|| unsafe {
            (self.launch)(
                self.index,
                &self.shape.grid,
                &self.shape.block,
                self.shape.shared,
                pointers.as_mut_ptr(),
                codes.as_ptr(),
                codes.len() as c_int,
                first,
                count,
                &options,
                text.as_mut_ptr().cast(),
                text.len() as c_int,
            )
        });
        if code == 0 {
            return Ok(());
        }
        let text = CStr::from_bytes_until_nul(&text).map_or_else(|_| "?".into(), CStr::to_string_lossy);
        Err(Error::Device(format!("emulator: {text}")))
    }

    /// Runs all blocks, in pieces where that is worth it.
    fn all(&self, run: impl Fn(u64, u64) -> Result<()> + Sync) -> Result<()> {
        let blocks = self.blocks();
        let threads: u64 = self.shape.block.iter().map(|&n| u64::from(n)).product();
        if blocks * threads < SPREAD_THREADS || blocks == 1 {
            return run(0, blocks);
        }
        let pieces = blocks.min(4 * rayon::current_num_threads() as u64);
        (0..pieces).into_par_iter().try_for_each(|piece| {
            let (first, end) = (piece * blocks / pieces, (piece + 1) * blocks / pieces);
            run(first, end - first)
        })
    }
}

/// What lets the compiler use the host's instructions for fused products and half precision, where it has them; elsewhere
/// the same results come from functions.
fn host_instructions() -> impl Iterator<Item = &'static str> {
    #[cfg(target_arch = "x86_64")]
    let has = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    #[cfg(not(target_arch = "x86_64"))]
    let has = false;
    ["-mavx2", "-mfma", "-mf16c"].into_iter().filter(move |_| has)
}

impl Driver for Emulator {
    fn name(&self) -> String {
        format!("emulator of sm_{}", self.options.arch)
    }

    fn arch(&self) -> u32 {
        self.options.arch
    }

    fn multiprocessors(&self) -> u32 {
        2
    }

    fn l2_bytes(&self) -> usize {
        0
    }

    fn is_emulated(&self) -> bool {
        true
    }

    fn memory(&self) -> Option<(u64, u64)> {
        None
    }

    fn keeps_freed_memory(&self) -> bool {
        self.options.keep_freed_memory
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        let out_of_memory = || Error::Device(format!("cannot allocate {bytes} bytes: out of memory; {OUT_OF_MEMORY}"));
        let mut allocations = self.allocations.lock().unwrap_or_else(|e| e.into_inner());
        let used: u64 = allocations.values().map(|allocation| allocation.layout.size() as u64).sum();
        if used.saturating_add(bytes as u64) > self.options.memory {
            return Err(out_of_memory());
        }
        let layout = Layout::from_size_align(bytes.max(1), 256).map_err(|_| out_of_memory())?;
        // SAFETY: the layout is not empty; the bytes written are those just allocated.
        let address = unsafe {
            let memory = std::alloc::alloc(layout);
            if memory.is_null() {
                return Err(out_of_memory());
            }
            if !self.samples() {
                memory.write_bytes(POISON, bytes);
            }
            memory as Address
        };
        let begun = self.options.counters.as_ref().map_or(0, CounterLog::begun);
        allocations.insert(address, Allocation { layout, begun });
        self.queues().allocated(address..address + layout.size() as u64);
        Ok(address)
    }

    unsafe fn free(&self, address: Address) {
        let allocation = self.allocations.lock().unwrap_or_else(|e| e.into_inner()).remove(&address);
        if let Some(Allocation { layout, .. }) = allocation {
            self.queues().freed(&(address..address + layout.size() as u64));
            // SAFETY: the address came from `allocate` with this layout, and is no longer in the table.
            unsafe { std::alloc::dealloc(address as *mut u8, layout) }
        }
    }

    unsafe fn upload(&self, to: Address, from: &[u8]) -> Result<()> {
        self.called(|calls| &mut calls.uploads);
        self.require_device("copy to the device")?;
        self.work_on([to])?;
        // SAFETY: promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    unsafe fn download(&self, to: &mut [u8], from: Address) -> Result<()> {
        self.called(|calls| &mut calls.downloads);
        self.called(|calls| &mut calls.waits);
        self.require_device("copy from the device")?;
        self.work_on([from])?;
        // SAFETY: promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        // SAFETY: whoever frees memory that a copy uses is told.
        unsafe { self.queues().wait(None) }
    }

    unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.called(|calls| &mut calls.copies);
        self.require_device("copy on the device")?;
        self.work_on([to, from])?;
        // SAFETY: promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    fn allocate_host(&self, bytes: usize) -> Result<HostBlock> {
        allocate_on_host(bytes, POISON)
    }

    unsafe fn free_host(&self, block: HostBlock) {
        self.queues().freed(&(block.at as u64..(block.at + block.len) as u64));
        // SAFETY: promised by the caller.
        unsafe { free_on_host(block) }
    }

    unsafe fn upload_beside(&self, to: Address, from: HostBlock, bytes: usize) -> Result<()> {
        self.called(|calls| &mut calls.uploads);
        self.require_device("copy to the device")?;
        // SAFETY: promised by the caller.
        unsafe { self.queues().upload(to, from, bytes) }
    }

    unsafe fn download_later(&self, to: HostBlock, from: Address, bytes: usize) -> Result<()> {
        self.called(|calls| &mut calls.downloads);
        self.require_device("copy from the device")?;
        self.work_on([from])?;
        // SAFETY: promised by the caller.
        unsafe {
            let data = std::slice::from_raw_parts(from as *const u8, bytes).to_vec();
            self.queues().download(to, data);
        }
        Ok(())
    }

    fn event(&self) -> Result<Event> {
        Ok(self.queues().event())
    }

    fn release_event(&self, _: Event) {}

    fn record(&self, event: Event, queue: Queue) -> Result<()> {
        self.called(|calls| &mut calls.events);
        self.queues().record(event, queue);
        Ok(())
    }

    fn order(&self, queue: Queue, behind: Event) -> Result<()> {
        self.called(|calls| &mut calls.events);
        // SAFETY: whoever frees memory that a copy uses is told.
        unsafe { self.queues().order(queue, behind) }
    }

    fn wait(&self, event: Event) -> Result<()> {
        self.called(|calls| &mut calls.waits);
        self.require_device("finish work")?;
        // SAFETY: as above.
        unsafe { self.queues().wait(Some(event)) }
    }

    unsafe fn zero(&self, at: Address, bytes: usize) -> Result<()> {
        if let Some(recorded) = &mut self.recordings().current {
            recorded.push(Recorded::Zero(at, bytes));
            return Ok(());
        }
        self.called(|calls| &mut calls.zeros);
        // SAFETY: promised by the caller.
        unsafe { self.run_zero(at, bytes) }
    }

    fn load(&self, unit: Unit) -> Result<HashMap<String, Function>> {
        let flags = self.flags();
        let mut options: Vec<&str> = flags.iter().map(String::as_str).collect();
        options.push(&self.compiler);
        let name = format!("{}-{}-{}.so", unit.file().name.trim_end_matches(".cu"), unit.dtype(), unit.key(&options));
        let instances: Vec<&str> = unit.instances().collect();
        let entry = self.cache.entry(&name, |path| self.compile(&unit.file().name, None, &instances, path))?;
        self.open(entry.path())
    }

    unsafe fn launch(&self, function: Function, shape: LaunchShape, arguments: &[Argument]) -> Result<()> {
        if let Some(recorded) = &mut self.recordings().current {
            recorded.push(Recorded::Launch(function, shape, arguments.to_vec()));
            return Ok(());
        }
        self.called(|calls| &mut calls.launches);
        // SAFETY: promised by the caller.
        unsafe { self.run_launch(function, shape, arguments) }
    }

    fn synchronize(&self) -> Result<()> {
        self.called(|calls| &mut calls.waits);
        self.require_device("finish work")?;
        // SAFETY: whoever frees memory that a copy uses is told.
        unsafe { self.queues().wait(None) }
    }

    fn begin_capture(&self) -> Result<()> {
        self.recordings().current = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<CapturedGraph> {
        let mut recordings = self.recordings();
        let recorded = recordings.current.take();
        let recorded = recorded.ok_or_else(|| Error::Device("no recording to end".into()))?;
        self.called(|calls| &mut calls.captures);
        recordings.graphs.push(recorded.into());
        Ok(CapturedGraph(recordings.graphs.len() - 1))
    }

    unsafe fn replay(&self, graph: CapturedGraph) -> Result<()> {
        self.called(|calls| &mut calls.replays);
        let recorded = self.recordings().graphs[graph.0].clone();
        recorded.iter().try_for_each(|step| {
            // SAFETY: promised by the caller, here and while recording.
            unsafe {
                match step {
                    Recorded::Launch(function, shape, arguments) => self.run_launch(*function, *shape, arguments)?,
                    Recorded::Zero(at, bytes) => self.run_zero(*at, *bytes)?,
                }
            }
            Ok(())
        })
    }

    fn release(&self, graph: CapturedGraph) {
        self.recordings().graphs[graph.0] = Arc::new([]);
    }

    fn time(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<f32> {
        let start = std::time::Instant::now();
        body()?;
        Ok(start.elapsed().as_secs_f32() * 1e3)
    }
}
