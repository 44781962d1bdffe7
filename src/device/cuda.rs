//! The NVIDIA driver as a device, loaded at run time.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Mutex, Once};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::cache::Cache;
use super::compiler;
use super::driver::{
    Address, Argument, CapturedGraph, Driver, Event, Function, HostBlock, LOST, LaunchShape, OUT_OF_MEMORY, Queue,
    pointers,
};
use super::nvrtc::Target;
use super::occupancy::{LANES, Limits, Needs};
use super::source::Unit;
use crate::{Error, Result};

/// The oldest driver that is supported, as the driver counts versions: what a compiler of version 12 makes needs CUDA 12 (R525).
const OLDEST_DRIVER: i32 = 12_000;
/// Bytes of shared memory that a block has unasked; a kernel that is launched with more must be given them.
const UNASKED_SHARED_BYTES: u32 = 48 << 10;

/// The carve-out of a kernel that leaves it to the driver.
const DRIVERS_CHOICE: i32 = -1;

/// Properties of a GPU that can be read without opening it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties {
    /// The name its maker gave it.
    pub name: String,
    /// Compute capability times ten.
    pub arch: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of the cache that all multiprocessors share.
    pub l2_bytes: usize,
    /// Bytes of memory.
    pub memory_bytes: u64,
}

/// One GPU with two streams: of work, and of copies beside it.
#[derive(Debug)]
pub struct Cuda {
    ordinal: usize,
    properties: Properties,
    context: sys::CUcontext,
    stream: sys::CUstream,
    copies: sys::CUstream,
    staging: Mutex<Staging>,
    cache: Cache,
    /// Tells once that the driver compiles kernels.
    jit: Once,
    limits: Limits,
    functions: Mutex<Vec<Loaded>>,
    /// By number; empty where released.
    graphs: Mutex<Vec<Option<Handle<sys::CUgraphExec>>>>,
    /// By number; empty where released.
    events: Mutex<Vec<Option<Handle<sys::CUevent>>>>,
}

/// A kernel, and what its launches were given so far.
#[derive(Debug)]
struct Loaded {
    function: Handle<sys::CUfunction>,
    registers: u32,
    /// Bytes of static shared memory.
    shared: u32,
    /// Bytes of dynamic shared memory that it may be launched with.
    granted: u32,
    /// The percentage of a multiprocessor's memory that it asked for as shared; `None` leaves it to the driver.
    carve_out: Option<u32>,
}

impl Loaded {
    /// # Safety
    /// The function is loaded, and its context current.
    unsafe fn new(function: sys::CUfunction) -> std::result::Result<Self, DriverError> {
        use sys::CUfunction_attribute_enum::{CU_FUNC_ATTRIBUTE_NUM_REGS, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES};
        // SAFETY: promised by the caller.
        let attribute = |which| unsafe { result::function::get_function_attribute(function, which) };
        let number = |value: i32| u32::try_from(value).unwrap_or(0);
        Ok(Self {
            function: Handle(function),
            registers: number(attribute(CU_FUNC_ATTRIBUTE_NUM_REGS)?),
            shared: number(attribute(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?),
            granted: UNASKED_SHARED_BYTES,
            carve_out: None,
        })
    }

    /// Gives a launch its shared memory: leave to have more of it than unasked, and a split of a multiprocessor's memory that
    /// holds as many blocks as its registers allow.
    ///
    /// # Safety
    /// The context is current.
    unsafe fn give_shared(&mut self, limits: Limits, shape: &LaunchShape) -> std::result::Result<(), DriverError> {
        use sys::CUfunction_attribute_enum::{
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
        };
        let set = |which, value: i32| {
            // SAFETY: the function stays loaded; promised by the caller.
            unsafe { result::function::set_function_attribute(self.function.0, which, value) }
        };
        if shape.shared > self.granted {
            set(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shape.shared as i32)?;
            self.granted = shape.shared;
        }
        let (threads, shared) = (shape.block.iter().product(), self.shared + shape.shared);
        let wanted = limits.carve_out(Needs { registers: self.registers, threads, shared });
        if self.carve_out != wanted {
            let percent = wanted.map_or(DRIVERS_CHOICE, |percent| percent as i32);
            set(CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, percent)?;
            self.carve_out = wanted;
        }
        Ok(())
    }
}

/// Bytes of the memory that small uploads pass through.
const STAGING_BYTES: usize = 4 << 20;
/// Bytes of an upload that is small: all inputs of a step, not its images.
const STAGED_BYTES: usize = 1 << 16;

/// Page-locked memory of the host, from which the GPU copies while the host goes on. Uploads take one piece after the
/// other, and begin anew when what was copied from there is known to be done.
#[derive(Debug)]
struct Staging {
    memory: *mut u8,
    used: usize,
}

/// A handle of the driver, which any thread may use once the context is current there.
#[derive(Debug, Clone, Copy)]
struct Handle<T>(T);

// SAFETY: the driver's handles are not bound to threads; every call here makes the context current first.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: as above.
unsafe impl Send for Cuda {}
// SAFETY: as above; the driver is thread-safe.
unsafe impl Sync for Cuda {}

impl Cuda {
    /// Number of GPUs; 0 without a driver.
    pub fn count() -> usize {
        if start().is_err() {
            return 0;
        }
        result::device::get_count().map_or(0, |n| usize::try_from(n).unwrap_or(0))
    }

    /// The version of CUDA that the driver speaks, major and minor.
    ///
    /// # Errors
    /// When there is no driver.
    pub fn driver_version() -> Result<(i32, i32)> {
        start()?;
        let mut version = 0;
        // SAFETY: the driver is loaded, and writes one integer.
        unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(|e| failed("ask the driver", e))?;
        Ok((version / 1000, version % 1000 / 10))
    }

    /// Whether there is a GPU number `ordinal`.
    ///
    /// # Errors
    /// When there is no driver, an outdated one, or no such GPU.
    pub fn require(ordinal: usize) -> Result<()> {
        start()?;
        let (major, minor) = Self::driver_version()?;
        if major * 1000 + minor * 10 < OLDEST_DRIVER {
            return Err(Error::Device(format!(
                "the NVIDIA driver speaks CUDA {major}.{minor}; one for 12.0 (R525) or newer is needed"
            )));
        }
        let count = Self::count();
        if ordinal >= count {
            return Err(Error::Device(format!("there is no cuda:{ordinal}; this machine has {count} GPU(s)")));
        }
        Ok(())
    }

    /// What GPU number `ordinal` is.
    ///
    /// # Errors
    /// When it is not there, or does not answer.
    pub fn properties(ordinal: usize) -> Result<Properties> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE as L2,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as COUNT,
        };
        Self::require(ordinal)?;
        let refused = |e| failed("ask the GPU", e);
        let device = result::device::get(ordinal as i32).map_err(refused)?;
        // SAFETY: the device handle is valid.
        let attribute = |which| unsafe { result::device::get_attribute(device, which) }.map_err(refused);
        Ok(Properties {
            name: result::device::get_name(device).map_err(refused)?,
            arch: (attribute(MAJOR)? * 10 + attribute(MINOR)?) as u32,
            multiprocessors: attribute(COUNT)? as u32,
            l2_bytes: usize::try_from(attribute(L2)?).unwrap_or(0),
            // SAFETY: the device handle is valid.
            memory_bytes: unsafe { result::device::total_mem(device) }.map_err(refused)? as u64,
        })
    }

    /// GPU number `ordinal`.
    ///
    /// # Errors
    /// When it is not there, or too old.
    pub fn new(ordinal: usize, cache: Cache) -> Result<Self> {
        let properties = Self::properties(ordinal)?;
        if properties.arch < 70 {
            let arch = properties.arch;
            return Err(Error::Device(format!("cuda:{ordinal} is sm_{arch}; sm_70 or newer is needed")));
        }
        let device = result::device::get(ordinal as i32).map_err(|e| failed("open the GPU", e))?;
        // SAFETY: the device handle is valid; the context and the streams live until `drop`.
        let (context, [stream, copies]) = unsafe {
            let context = result::primary_ctx::retain(device).map_err(|e| failed("open a context", e))?;
            result::ctx::set_current(context).map_err(|e| failed("open a context", e))?;
            let stream = || {
                let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
                stream.map_err(|e| failed("open a stream", e))
            };
            (context, [stream()?, stream()?])
        };
        // SAFETY: the context is current; the memory lives until `drop`.
        let memory = unsafe { result::malloc_host(STAGING_BYTES, 0) }.map_err(|e| failed("allocate host memory", e))?;
        let staging = Mutex::new(Staging { memory: memory.cast(), used: 0 });
        let (functions, graphs, events) = Default::default();
        let limits = limits(device, properties.arch)?;
        let jit = Once::new();
        Ok(Self {
            ordinal,
            properties,
            context,
            stream,
            copies,
            staging,
            cache,
            jit,
            limits,
            functions,
            graphs,
            events,
        })
    }

    /// Copies a small upload to page-locked memory and from there to the GPU, without waiting for that.
    ///
    /// # Safety
    /// As [`Driver::upload`].
    unsafe fn upload_staged(&self, to: Address, from: &[u8]) -> Result<()> {
        // Held until the copy is in the stream: whoever begins anew waits for the stream.
        let mut staging = self.staging.lock().unwrap_or_else(|e| e.into_inner());
        if staging.used + from.len() > STAGING_BYTES {
            self.synchronize()?;
            staging.used = 0;
        }
        // SAFETY: the piece lies within the memory, and no copy from it is under way; the rest is promised by the caller.
        unsafe {
            let piece = std::slice::from_raw_parts_mut(staging.memory.add(staging.used), from.len());
            piece.copy_from_slice(from);
            result::memcpy_htod_async(to, piece, self.stream).map_err(|e| failed("copy to the GPU", e))?;
        }
        staging.used += from.len().next_multiple_of(64);
        Ok(())
    }

    fn stream_of(&self, queue: Queue) -> sys::CUstream {
        match queue {
            Queue::Work => self.stream,
            Queue::Copies => self.copies,
        }
    }

    fn event_of(&self, event: Event) -> sys::CUevent {
        let event = self.events.lock().unwrap_or_else(|e| e.into_inner())[event.0];
        event.expect("a released event is never used").0
    }

    fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| failed("use the GPU", e))
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.enter().is_ok() {
            let staging = self.staging.get_mut().unwrap_or_else(|e| e.into_inner());
            // SAFETY: streams and memory are this device's own, and the streams have come to rest. Modules, graphs and the
            // primary context go with the process.
            unsafe {
                let _ = result::stream::synchronize(self.stream);
                let _ = result::stream::synchronize(self.copies);
                let _ = result::free_host(staging.memory.cast());
                let _ = result::stream::destroy(self.stream);
                let _ = result::stream::destroy(self.copies);
            }
        }
    }
}

/// What a multiprocessor of a GPU has room for.
fn limits(device: sys::CUdevice, arch: u32) -> Result<Limits> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR as BLOCKS,
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR as SHARED,
        CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR as THREADS,
        CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK as RESERVED,
    };
    let attribute = |which| {
        // SAFETY: the device handle is valid.
        let value = unsafe { result::device::get_attribute(device, which) };
        value.map(|value| u32::try_from(value).unwrap_or(0)).map_err(|e| failed("ask the GPU", e))
    };
    Ok(Limits {
        warps: attribute(THREADS)? / LANES,
        blocks: attribute(BLOCKS)?,
        shared: attribute(SHARED)?.max(1),
        reserved: attribute(RESERVED)?,
        unit: if arch < 80 { 256 } else { 128 },
    })
}

/// Loads the driver, which is an error and never a panic where there is none.
fn start() -> Result<()> {
    // SAFETY: only tries to open the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Device(
            "no NVIDIA driver (libcuda.so.1) on this machine; use --device cpu, or --device emulator to test kernels"
                .into(),
        ));
    }
    result::init().map_err(|e| failed("start the NVIDIA driver", e))
}

fn failed(what: &str, error: DriverError) -> Error {
    // The driver's own words, without the wrapping of their debug form.
    let text = error.error_string().map_or_else(|_| format!("{:?}", error.0), |s| s.to_string_lossy().into_owned());
    let text = format!("cannot {what}: {text}");
    match error.0 {
        code if is_sticky(code) => Error::DeviceLost(format!("{text}; {LOST}")),
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::Device(format!("{text}; {OUT_OF_MEMORY}")),
        _ => Error::Device(format!("{text}; see `devices` and `check`")),
    }
}

/// Whether an error stays with the context: from then on every call of this process fails alike.
fn is_sticky(code: sys::CUresult) -> bool {
    use sys::CUresult::*;
    matches!(
        code,
        CUDA_ERROR_DEINITIALIZED
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_CONTAINED
            | CUDA_ERROR_UNKNOWN
    )
}

impl Driver for Cuda {
    fn name(&self) -> String {
        self.properties.name.clone()
    }

    fn ordinal(&self) -> usize {
        self.ordinal
    }

    fn arch(&self) -> u32 {
        self.properties.arch
    }

    fn multiprocessors(&self) -> u32 {
        self.properties.multiprocessors
    }

    fn l2_bytes(&self) -> usize {
        self.properties.l2_bytes
    }

    fn memory(&self) -> Option<(u64, u64)> {
        self.enter().ok()?;
        result::mem_get_info().ok().map(|(free, total)| (free as u64, total as u64))
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.enter()?;
        // SAFETY: the context is current.
        unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|e| failed(&format!("allocate {bytes} bytes"), e))
    }

    unsafe fn free(&self, address: Address) {
        if self.enter().is_ok() {
            // SAFETY: promised by the caller. An error here belongs to earlier work, which reports it itself.
            unsafe {
                let _ = result::free_sync(address);
            }
        }
    }

    unsafe fn upload(&self, to: Address, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        self.enter()?;
        if from.len() <= STAGED_BYTES {
            // SAFETY: promised by the caller.
            return unsafe { self.upload_staged(to, from) };
        }
        // SAFETY: promised by the caller; the host memory outlives the copy since the stream is waited for.
        unsafe { result::memcpy_htod_async(to, from, self.stream) }.map_err(|e| failed("copy to the GPU", e))?;
        self.synchronize()
    }

    unsafe fn download(&self, to: &mut [u8], from: Address) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: promised by the caller; the host memory outlives the copy since the stream is waited for.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream) }.map_err(|e| failed("copy from the GPU", e))?;
        self.synchronize()
    }

    unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: promised by the caller.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }.map_err(|e| failed("copy on the GPU", e))
    }

    fn allocate_host(&self, bytes: usize) -> Result<HostBlock> {
        self.enter()?;
        // SAFETY: the context is current. The memory is as long, and initialised before anybody has it.
        unsafe {
            let memory = result::malloc_host(bytes.max(1), 0)
                .map_err(|e| failed(&format!("lock {bytes} bytes of the host's memory"), e))?;
            memory.cast::<u8>().write_bytes(0, bytes);
            Ok(HostBlock { at: memory as usize, len: bytes })
        }
    }

    unsafe fn free_host(&self, block: HostBlock) {
        if self.enter().is_ok() {
            // SAFETY: promised by the caller. An error here belongs to earlier work, which reports it itself.
            unsafe {
                let _ = result::free_host(block.at as *mut _);
            }
        }
    }

    unsafe fn upload_beside(&self, to: Address, from: HostBlock, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: promised by the caller, for as long as the copy takes.
        unsafe { result::memcpy_htod_async(to, &from.bytes()[..bytes], self.copies) }
            .map_err(|e| failed("copy to the GPU", e))
    }

    unsafe fn download_later(&self, mut to: HostBlock, from: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: promised by the caller, for as long as the copy takes.
        unsafe { result::memcpy_dtoh_async(&mut to.bytes_mut()[..bytes], from, self.stream) }
            .map_err(|e| failed("copy from the GPU", e))
    }

    fn event(&self) -> Result<Event> {
        self.enter()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(|e| failed("create an event", e))?;
        let mut events = self.events.lock().unwrap_or_else(|e| e.into_inner());
        events.push(Some(Handle(event)));
        Ok(Event(events.len() - 1))
    }

    fn release_event(&self, event: Event) {
        let event = self.events.lock().unwrap_or_else(|e| e.into_inner())[event.0].take();
        if let (Some(event), Ok(())) = (event, self.enter()) {
            // SAFETY: taken out of the table, so nobody else has it; the driver waits for work that does.
            unsafe {
                let _ = result::event::destroy(event.0);
            }
        }
    }

    fn record(&self, event: Event, queue: Queue) -> Result<()> {
        self.enter()?;
        // SAFETY: events live until they are released, and the streams as long as `self`.
        unsafe { result::event::record(self.event_of(event), self.stream_of(queue)) }
            .map_err(|e| failed("record an event", e))
    }

    fn order(&self, queue: Queue, behind: Event) -> Result<()> {
        self.enter()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: as in `record`.
        unsafe { result::stream::wait_event(self.stream_of(queue), self.event_of(behind), flags) }
            .map_err(|e| failed("put work behind an event", e))
    }

    fn wait(&self, event: Event) -> Result<()> {
        self.enter()?;
        // SAFETY: as in `record`.
        unsafe { result::event::synchronize(self.event_of(event)) }.map_err(|e| failed("finish work on the GPU", e))
    }

    unsafe fn zero(&self, at: Address, bytes: usize) -> Result<()> {
        // A recording takes no node of no size.
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: promised by the caller.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream) }.map_err(|e| failed("clear memory", e))
    }

    fn load(&self, unit: Unit) -> Result<HashMap<String, Function>> {
        let arch = self.properties.arch;
        let compiled = compiler::compile(unit, arch, &self.cache)?;
        if let Target::Ptx(_) = compiled.target {
            self.jit.call_once(|| tracing::warn!("{}", compiler::without_machine_code(arch, compiled.target)));
        }
        self.enter()?;
        // SAFETY: the image is a whole cubin, or PTX with the zero byte at its end, as its checksum says; the module is never
        // unloaded.
        unsafe {
            let module = result::module::load_data(compiled.image.as_ptr().cast())
                .map_err(|e| failed(&format!("load {unit}"), e))?;
            let mut functions = self.functions.lock().unwrap_or_else(|e| e.into_inner());
            let mut found = HashMap::new();
            for kernel in compiled.kernels {
                let symbol = CString::new(kernel.symbol).expect("symbols hold no zero byte");
                let function = result::module::get_function(module, symbol)
                    .map_err(|e| failed(&format!("find {}", kernel.instance), e))?;
                let loaded = Loaded::new(function).map_err(|e| failed("ask for a kernel's needs", e))?;
                found.insert(kernel.instance, Function(functions.len()));
                functions.push(loaded);
            }
            Ok(found)
        }
    }

    unsafe fn launch(&self, function: Function, shape: LaunchShape, arguments: &[Argument]) -> Result<()> {
        self.enter()?;
        let function = {
            let loaded = &mut self.functions.lock().unwrap_or_else(|e| e.into_inner())[function.0];
            // SAFETY: the context is current.
            unsafe { loaded.give_shared(self.limits, &shape) }
                .map_err(|e| failed("give a kernel its shared memory", e))?;
            loaded.function.0
        };
        let mut pointers = pointers(arguments);
        let triple = |[x, y, z]: [u32; 3]| (x, y, z);
        // SAFETY: promised by the caller.
        unsafe {
            result::launch_kernel(
                function,
                triple(shape.grid),
                triple(shape.block),
                shape.shared,
                self.stream,
                &mut pointers,
            )
        }
        .map_err(|e| failed("launch a kernel", e))
    }

    fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(|e| failed("finish work on the GPU", e))
    }

    fn begin_capture(&self) -> Result<()> {
        self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(|e| failed("record a graph", e))
    }

    fn end_capture(&self) -> Result<CapturedGraph> {
        self.enter()?;
        // SAFETY: the stream lives as long as `self`; the graph is instantiated before it is destroyed.
        unsafe {
            let graph = result::stream::end_capture(self.stream).map_err(|e| failed("record a graph", e))?;
            let flags = sys::CUgraphInstantiate_flags(0);
            let executable = result::graph::instantiate(graph, flags).map_err(|e| failed("instantiate a graph", e));
            let _ = result::graph::destroy(graph);
            let mut graphs = self.graphs.lock().unwrap_or_else(|e| e.into_inner());
            graphs.push(Some(Handle(executable?)));
            Ok(CapturedGraph(graphs.len() - 1))
        }
    }

    unsafe fn replay(&self, graph: CapturedGraph) -> Result<()> {
        self.enter()?;
        let graph = self.graphs.lock().unwrap_or_else(|e| e.into_inner())[graph.0];
        let graph = graph.expect("a released graph is never replayed").0;
        // SAFETY: graphs live until they are released; memory is promised by the caller.
        unsafe { result::graph::launch(graph, self.stream) }.map_err(|e| failed("replay a graph", e))
    }

    fn release(&self, graph: CapturedGraph) {
        let graph = self.graphs.lock().unwrap_or_else(|e| e.into_inner())[graph.0].take();
        if let (Some(graph), Ok(())) = (graph, self.enter()) {
            // SAFETY: taken out of the table, so nobody else has it; the driver waits for a replay in progress.
            unsafe {
                let _ = result::graph::exec_destroy(graph.0);
            }
        }
    }

    fn time(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<f32> {
        self.enter()?;
        let create =
            || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(|e| failed("create an event", e));
        let (start, end) = (create()?, create()?);
        // SAFETY: events and stream are valid; the events are destroyed after their last use.
        unsafe {
            let outcome = (|| {
                result::event::record(start, self.stream).map_err(|e| failed("record an event", e))?;
                body()?;
                result::event::record(end, self.stream).map_err(|e| failed("record an event", e))?;
                result::event::synchronize(end).map_err(|e| failed("finish work on the GPU", e))?;
                result::event::elapsed(start, end).map_err(|e| failed("read an event", e))
            })();
            let _ = result::event::destroy(start);
            let _ = result::event::destroy(end);
            outcome
        }
    }
}
