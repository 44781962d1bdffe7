//! What the rest of the library needs of a CUDA device: memory, copies, compiled kernels, launches, graphs, events.
//!
//! Two implementations: the NVIDIA driver ([`super::cuda`]) and the emulator on the host ([`super::emulator`]).

use std::collections::HashMap;

pub use super::argument::Argument;
use super::source::Unit;
use crate::Result;

/// The advice in the error of an allocation that failed.
pub(super) const OUT_OF_MEMORY: &str = "lower the batch or use --precision f16";
/// The advice in the error of a device that failed during work.
pub(super) const LOST: &str = "the device is lost to this process; start again, and run `check` on it";

/// A place in a device's memory.
pub type Address = u64;

/// Handle of a loaded kernel; only its driver can interpret it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Function(pub(super) usize);

/// Grid, block and dynamic shared memory of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaunchShape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// Geometry of a convolution as kernels take it (`kernels/geometry.cuh`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are named as in the kernels' struct")]
pub struct ConvGeometry {
    pub n: i32,
    pub h_in: i32,
    pub w_in: i32,
    pub c_in: i32,
    pub h_out: i32,
    pub w_out: i32,
    pub c_out: i32,
    pub k_h: i32,
    pub k_w: i32,
    pub stride_h: i32,
    pub stride_w: i32,
    pub pad_top: i32,
    pub pad_left: i32,
    pub groups: i32,
}

impl From<ConvGeometry> for Argument {
    fn from(value: ConvGeometry) -> Self {
        Self::of_struct("ConvGeometry", &value)
    }
}

/// A captured sequence of launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CapturedGraph(pub(super) usize);

/// A queue of a device. What is in one is done in order; the two run side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// Launches, clearings, and copies unless they say otherwise.
    Work,
    /// Copies from page-locked memory beside the work.
    Copies,
}

/// A place in a queue that the host or the other queue can wait for. One that was never recorded is behind nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event(pub(super) usize);

/// Page-locked memory of the host, which a device reads and writes while the host goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostBlock {
    pub(super) at: usize,
    pub(super) len: usize,
}

impl HostBlock {
    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    ///
    /// # Safety
    /// It was not freed, and nobody writes to it, nor does a copy of the device that is under way.
    pub unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: promised by the caller; a driver gives as many bytes, and initialised.
        unsafe { std::slice::from_raw_parts(self.at as *const u8, self.len) }
    }

    /// The bytes, to be written.
    ///
    /// # Safety
    /// It was not freed, and nobody else uses it, nor does a copy of the device that is under way.
    pub unsafe fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.at as *mut u8, self.len) }
    }
}

/// A device that runs kernels. All work goes to one queue and is done in order; copies can be put into another.
///
/// # Safety
/// Callers of the unsafe methods promise that addresses come from this driver's `allocate`, were not freed, and have
/// room for what is read or written.
pub trait Driver: Send + Sync + std::fmt::Debug {
    /// The device in words.
    fn name(&self) -> String;

    /// Its number among the devices of its kind, as in `cuda:N`.
    fn ordinal(&self) -> usize {
        0
    }

    /// Compute capability times ten, as kernels see it in `ARCH`.
    fn arch(&self) -> u32;

    /// Multiprocessors.
    fn multiprocessors(&self) -> u32;

    /// Bytes of the cache that all multiprocessors share; 0 where there is none.
    fn l2_bytes(&self) -> usize;

    /// Whether the host imitates the device, so that times say nothing about any GPU.
    fn is_emulated(&self) -> bool {
        false
    }

    /// Free and total bytes, where the device knows.
    fn memory(&self) -> Option<(u64, u64)>;

    /// Whether it records work and replays it.
    fn records(&self) -> bool {
        true
    }

    /// Whether freed memory is kept for the next allocation: allocating stalls a GPU.
    fn keeps_freed_memory(&self) -> bool {
        true
    }

    /// Memory of any content.
    ///
    /// # Errors
    /// When there is not enough.
    fn allocate(&self, bytes: usize) -> Result<Address>;

    /// Frees memory.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn free(&self, address: Address);

    /// Host to device, after all earlier work; the host's memory is free to change when it returns.
    ///
    /// # Safety
    /// See the trait.
    ///
    /// # Errors
    /// When the device fails, perhaps in earlier work.
    unsafe fn upload(&self, to: Address, from: &[u8]) -> Result<()>;

    /// Device to host, after all earlier work.
    ///
    /// # Safety
    /// See the trait.
    ///
    /// # Errors
    /// When the device fails, perhaps in earlier work.
    unsafe fn download(&self, to: &mut [u8], from: Address) -> Result<()>;

    /// Device to device, after all earlier work and before all later.
    ///
    /// # Safety
    /// See the trait.
    ///
    /// # Errors
    /// When the device fails, perhaps in earlier work.
    unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()>;

    /// Page-locked memory.
    ///
    /// # Errors
    /// When there is not enough.
    fn allocate_host(&self, bytes: usize) -> Result<HostBlock>;

    /// Frees page-locked memory.
    ///
    /// # Safety
    /// It came from `allocate_host`, was not freed, and no copy to or from it is under way.
    unsafe fn free_host(&self, block: HostBlock);

    /// Page-locked memory to device, in the queue of copies. The host goes on at once, and must leave the memory alone until
    /// it has waited for an event behind this.
    ///
    /// # Safety
    /// See the trait; the host's memory is as long, and stays.
    ///
    /// # Errors
    /// When the device fails, perhaps in earlier work.
    unsafe fn upload_beside(&self, to: Address, from: HostBlock, bytes: usize) -> Result<()>;

    /// Device to page-locked memory, after all earlier work. The host goes on at once, and finds the bytes there when it has
    /// waited for an event behind this.
    ///
    /// # Safety
    /// As `upload_beside`.
    ///
    /// # Errors
    /// When the device fails, perhaps in earlier work.
    unsafe fn download_later(&self, to: HostBlock, from: Address, bytes: usize) -> Result<()>;

    /// An event.
    ///
    /// # Errors
    /// When the device fails.
    fn event(&self) -> Result<Event>;

    /// Forgets an event, which is never used again.
    fn release_event(&self, event: Event);

    /// Moves an event to the end of a queue as it is now.
    ///
    /// # Errors
    /// When the device fails, perhaps in earlier work.
    fn record(&self, event: Event, queue: Queue) -> Result<()>;

    /// Lets everything that a queue is given from now on begin behind an event.
    ///
    /// # Errors
    /// When the device fails, perhaps in earlier work.
    fn order(&self, queue: Queue, behind: Event) -> Result<()>;

    /// Lets the host wait for an event.
    ///
    /// # Errors
    /// When work before it failed.
    fn wait(&self, event: Event) -> Result<()>;

    /// Sets bytes to zero.
    ///
    /// # Safety
    /// See the trait.
    ///
    /// # Errors
    /// When the device fails, perhaps in earlier work.
    unsafe fn zero(&self, at: Address, bytes: usize) -> Result<()>;

    /// Compiles a unit, or takes it from the cache, and loads it. Returns its kernels by name expression.
    ///
    /// # Errors
    /// When there is no compiler, or the unit needs a newer device.
    fn load(&self, unit: Unit) -> Result<HashMap<String, Function>>;

    /// Launches a kernel.
    ///
    /// # Safety
    /// Number, order and types of the arguments are the kernel's; memory as in the trait.
    ///
    /// # Errors
    /// When the device refuses.
    unsafe fn launch(&self, function: Function, shape: LaunchShape, arguments: &[Argument]) -> Result<()>;

    /// Waits for all work, but not for copies beside it.
    ///
    /// # Errors
    /// When some of it failed.
    fn synchronize(&self) -> Result<()>;

    /// Starts to record launches and clearings instead of doing them.
    ///
    /// # Errors
    /// When the device fails.
    fn begin_capture(&self) -> Result<()>;

    /// Ends the recording.
    ///
    /// # Errors
    /// When something in it cannot be recorded.
    fn end_capture(&self) -> Result<CapturedGraph>;

    /// Does everything recorded, in order.
    ///
    /// # Safety
    /// All memory that was used while recording is still there.
    ///
    /// # Errors
    /// When the device fails.
    unsafe fn replay(&self, graph: CapturedGraph) -> Result<()>;

    /// Forgets a recording, which is never replayed again.
    fn release(&self, graph: CapturedGraph);

    /// Returns the milliseconds that the device needed for the work that `body` launches.
    ///
    /// # Errors
    /// When the device fails, or `body` does.
    fn time(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<f32>;
}

/// Pointers to the arguments, as a launch takes them.
pub(super) fn pointers(arguments: &[Argument]) -> Vec<*mut std::ffi::c_void> {
    arguments.iter().map(Argument::bytes).collect()
}

/// Memory of the host for a driver that has no page-locked memory, filled with a byte.
pub(super) fn allocate_on_host(bytes: usize, fill: u8) -> Result<HostBlock> {
    let mut memory: Vec<u8> = crate::memory::zeros(bytes, "page-locked memory")?;
    memory.fill(fill);
    let memory = Box::leak(memory.into_boxed_slice());
    Ok(HostBlock { at: memory.as_mut_ptr() as usize, len: bytes })
}

/// Frees memory of [`allocate_on_host`].
///
/// # Safety
/// It came from there, and nobody uses it any more.
pub(super) unsafe fn free_on_host(mut block: HostBlock) {
    // SAFETY: promised by the caller: this is the box that was leaked.
    drop(unsafe { Box::from_raw(std::ptr::from_mut(block.bytes_mut())) });
}
