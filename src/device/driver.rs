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

/// A device that runs kernels. All work goes to one stream and is done in order.
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

    /// Waits for all work.
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
