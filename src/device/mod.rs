//! Where numbers live and what computes on them: the host's cores, or a GPU through one of two drivers.
//!
//! Operations in [`crate::ops`] take views and do their work where those lie. Everything above `ops` is the same for
//! every device.

pub mod argument;
pub mod cache;
pub mod calls;
pub mod compiler;
pub mod configurations;
pub mod counters;
pub mod cuda;
pub mod driver;
pub mod dry_run;
pub mod emulator;
pub(crate) mod float_mode;
pub mod gpu;
pub mod nvrtc;
pub mod occupancy;
mod queues;
mod recording;
pub mod relay;
pub mod scan;
pub mod signature;
pub mod source;
pub mod tuned;

use std::ops::Range;
use std::sync::Arc;

use cache::Cache;
use cuda::Cuda;
use emulator::{Emulator, EmulatorOptions};
use gpu::{Gpu, GpuBuffer, GpuView, GpuViewMut};

pub use recording::{Recording, SizedRecordings};

use crate::dtype::Dtype;
use crate::{Error, Result, memory};

/// Which code runs an operation: operations differ in what they can take in at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// The host's cores.
    Host,
    /// CUDA kernels, on a GPU or emulated.
    Cuda,
}

/// A device that computes, and the precision it does so in.
#[derive(Debug, Clone)]
pub enum Device {
    /// The host's cores, through the current `rayon` pool, in `f32`.
    Cpu,
    /// A GPU, real or emulated. Activations, their gradients and the weights that kernels read have this type; sums,
    /// parameters and their gradients are `f32`.
    Gpu(Arc<Gpu>, Dtype),
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Cpu, Self::Cpu) => true,
            (Self::Gpu(a, p), Self::Gpu(b, q)) => Arc::ptr_eq(a, b) && p == q,
            _ => false,
        }
    }
}

impl Device {
    /// Opens a device by its name on the command line: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:N`,
    /// `emulator`.
    ///
    /// # Errors
    /// An unknown name, a device that this machine does not have, a precision that the device has not, or a named file of
    /// [tuned configurations](tuned) that does not fit.
    pub fn open(name: &str, precision: Dtype) -> Result<Self> {
        Self::check_name(name, precision)?;
        let cache = Cache::of_user();
        let gpu = |driver: Box<dyn driver::Driver>| {
            let gpu = Gpu::new(driver);
            tuned::adopt(&gpu, &cache)?;
            Self::on(gpu, precision)
        };
        match name {
            "cpu" => Ok(Self::Cpu),
            "auto" if Cuda::count() == 0 => Self::open("cpu", precision),
            "auto" => Self::or_host(Self::open("cuda", precision), precision),
            "emulator" => gpu(Box::new(Emulator::new(EmulatorOptions::default(), cache.clone())?)),
            _ => gpu(Box::new(Cuda::new(ordinal(name).unwrap_or(0), cache.clone())?)),
        }
    }

    /// Falls back to the host if a GPU that the user did not name cannot be used, such as an old one or one without a
    /// compiler. A precision that the host lacks was requested explicitly, so the error is returned then.
    fn or_host(gpu: Result<Self>, precision: Dtype) -> Result<Self> {
        match gpu {
            Err(error) if precision == Dtype::F32 => {
                tracing::warn!("{error}; computing on the CPU");
                Ok(Self::Cpu)
            }
            other => other,
        }
    }

    /// Frees idle memory of a GPU for work of other sizes, and for other programs.
    pub fn release_idle(&self) {
        if let Self::Gpu(gpu, _) = self {
            gpu.release_idle();
        }
    }

    /// Whether [`open`](Self::open) can open a device in a precision, as far as can be told without opening it.
    ///
    /// # Errors
    /// As there.
    pub fn check_name(name: &str, precision: Dtype) -> Result<()> {
        let unknown = || Error::Config(format!("device = {name:?}; expected auto, cpu, cuda, cuda:N or emulator"));
        match name {
            "cpu" if precision != Dtype::F32 => {
                Err(Error::Config(format!("the CPU computes in f32, not {precision}; take --precision f32")))
            }
            "auto" | "cpu" | "emulator" => Ok(()),
            _ => Cuda::require(ordinal(name).ok_or_else(unknown)?),
        }
    }

    /// A GPU in a precision. Compiles its kernels.
    ///
    /// # Errors
    /// When they cannot be compiled, or the GPU lacks the precision.
    pub fn on(gpu: Arc<Gpu>, precision: Dtype) -> Result<Self> {
        gpu.prepare(precision)?;
        Ok(Self::Gpu(gpu, precision))
    }

    /// Which code runs on it.
    pub fn backend(&self) -> Backend {
        match self {
            Self::Cpu => Backend::Host,
            Self::Gpu(..) => Backend::Cuda,
        }
    }

    /// The type of activations.
    pub fn precision(&self) -> Dtype {
        match self {
            Self::Cpu => Dtype::F32,
            Self::Gpu(_, precision) => *precision,
        }
    }

    /// The device in words.
    pub fn name(&self) -> String {
        match self {
            Self::Cpu => "cpu".into(),
            Self::Gpu(gpu, _) => gpu.driver().name(),
        }
    }

    /// Allocates `len` zeros of `f32`.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn zeros(&self, len: usize) -> Result<Buffer> {
        self.zeros_of(Dtype::F32, len)
    }

    /// Allocates `len` zeros of `f32` that the host writes before work, and that kernels read alone: a GPU gets all that were
    /// written in one copy.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn inputs(&self, len: usize) -> Result<Buffer> {
        match self {
            Self::Cpu => self.zeros(len),
            Self::Gpu(gpu, _) => GpuBuffer::input(gpu, Dtype::F32, len).map(Buffer::Gpu),
        }
    }

    /// Allocates `len` zeros of `f32` that kernels write, and that the host reads after work: from a GPU all come in one copy.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn outcomes(&self, len: usize) -> Result<Buffer> {
        match self {
            Self::Cpu => self.zeros(len),
            Self::Gpu(gpu, _) => GpuBuffer::outcome(gpu, Dtype::F32, len).map(Buffer::Gpu),
        }
    }

    /// Allocates `len` zeros of the type of activations.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn activations(&self, len: usize) -> Result<Buffer> {
        self.zeros_of(self.precision(), len)
    }

    /// Allocates `len` sums over a batch: `f64` on the host, `f32` on a GPU.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn sums(&self, len: usize) -> Result<Buffer> {
        match self {
            Self::Cpu => memory::zeros(len, "the sums of a pass").map(Buffer::HostSums),
            Self::Gpu(..) => self.zeros(len),
        }
    }

    fn zeros_of(&self, dtype: Dtype, len: usize) -> Result<Buffer> {
        match self {
            Self::Cpu => memory::zeros(len, "a value of the network or a parameter").map(Buffer::Host),
            Self::Gpu(gpu, _) => GpuBuffer::zeros(gpu, dtype, len).map(Buffer::Gpu),
        }
    }

    /// Copies numbers from the host, as `f32`.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn upload(&self, data: &[f32]) -> Result<Buffer> {
        match self {
            Self::Cpu => memory::copy(data, "a copy of an operand").map(Buffer::Host),
            Self::Gpu(..) => {
                let mut buffer = self.zeros(data.len())?;
                buffer.write(data)?;
                Ok(buffer)
            }
        }
    }

    /// Returns the first failure of an operation since the last check: operations on a GPU report errors late.
    ///
    /// # Errors
    /// That failure.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            Self::Gpu(gpu, _) => gpu.check(),
        }
    }
}

/// Which GPU `cuda` or `cuda:N` names.
fn ordinal(name: &str) -> Option<usize> {
    if name == "cuda" { Some(0) } else { name.strip_prefix("cuda:")?.parse().ok() }
}

/// Numbers on a device.
#[derive(Debug)]
pub enum Buffer {
    /// In the host's memory.
    Host(Vec<f32>),
    /// Sums over a batch in the host's memory.
    HostSums(Vec<f64>),
    /// In a GPU's memory.
    Gpu(GpuBuffer),
}

impl Default for Buffer {
    fn default() -> Self {
        Self::Host(Vec::new())
    }
}

/// Part of a buffer, to be read.
#[derive(Debug, Clone, Copy)]
pub enum View<'a> {
    /// In the host's memory.
    Host(&'a [f32]),
    /// Weights in the host's memory, and once more as its products read them.
    Packed(&'a [f32], &'a [f32]),
    /// Sums over a batch in the host's memory.
    HostSums(&'a [f64]),
    /// In a GPU's memory.
    Gpu(GpuView<'a>),
}

/// Part of a buffer, to be written.
#[derive(Debug)]
pub enum ViewMut<'a> {
    /// In the host's memory.
    Host(&'a mut [f32]),
    /// Sums over a batch in the host's memory.
    HostSums(&'a mut [f64]),
    /// In a GPU's memory.
    Gpu(GpuViewMut<'a>),
}

impl Buffer {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Host(data) => data.len(),
            Self::HostSums(data) => data.len(),
            Self::Gpu(buffer) => buffer.len(),
        }
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        let element = match self {
            Self::Host(_) => size_of::<f32>(),
            Self::HostSums(_) => size_of::<f64>(),
            Self::Gpu(buffer) => buffer.dtype().bytes(),
        };
        (self.len() * element) as u64
    }

    /// The elements of a range, to be read.
    pub fn view(&self, range: Range<usize>) -> View<'_> {
        match self {
            Self::Host(data) => View::Host(&data[range]),
            Self::HostSums(data) => View::HostSums(&data[range]),
            Self::Gpu(buffer) => View::Gpu(buffer.view(range)),
        }
    }

    /// The elements of a range, to be written.
    pub fn view_mut(&mut self, range: Range<usize>) -> ViewMut<'_> {
        match self {
            Self::Host(data) => ViewMut::Host(&mut data[range]),
            Self::HostSums(data) => ViewMut::HostSums(&mut data[range]),
            Self::Gpu(buffer) => ViewMut::Gpu(buffer.view_mut(range)),
        }
    }

    /// Copies the first `out.len()` elements to the host.
    ///
    /// # Errors
    /// When the device fails, or an operation before failed.
    pub fn read(&self, out: &mut [f32]) -> Result<()> {
        match self {
            Self::Host(data) => {
                out.copy_from_slice(&data[..out.len()]);
                Ok(())
            }
            Self::HostSums(data) => {
                out.iter_mut().zip(data).for_each(|(out, sum)| *out = *sum as f32);
                Ok(())
            }
            Self::Gpu(buffer) => buffer.read(out),
        }
    }

    /// Sets everything to zero.
    ///
    /// # Errors
    /// When the device fails.
    pub fn clear(&mut self) -> Result<()> {
        match self {
            Self::Host(data) => data.fill(0.0),
            Self::HostSums(data) => data.fill(0.0),
            Self::Gpu(buffer) => buffer.clear()?,
        }
        Ok(())
    }

    /// Copies numbers from the host to the front, rounded to the buffer's type.
    ///
    /// # Errors
    /// When the device fails.
    pub fn write(&mut self, data: &[f32]) -> Result<()> {
        match self {
            Self::Host(own) => {
                own[..data.len()].copy_from_slice(data);
                Ok(())
            }
            Self::HostSums(own) => {
                own.iter_mut().zip(data).for_each(|(own, value)| *own = f64::from(*value));
                Ok(())
            }
            Self::Gpu(buffer) => buffer.write(data),
        }
    }
}

impl<'a> View<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Host(data) | Self::Packed(data, _) => data.len(),
            Self::HostSums(data) => data.len(),
            Self::Gpu(view) => view.len(),
        }
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers, where they are on the host.
    ///
    /// # Panics
    /// When they are not: operands of one operation lie on one device.
    pub fn host(self) -> &'a [f32] {
        match self {
            Self::Host(data) | Self::Packed(data, _) => data,
            Self::HostSums(_) | Self::Gpu(_) => panic!("an operand on a GPU, or of sums, among operands on the host"),
        }
    }

    /// The numbers as the host's products read them, where they were packed.
    pub fn panels(self) -> Option<&'a [f32]> {
        match self {
            Self::Packed(_, panels) => Some(panels),
            _ => None,
        }
    }

    /// The sums, where they are on the host.
    ///
    /// # Panics
    /// When they are not: a plan is made for one device.
    pub fn sums(self) -> &'a [f64] {
        match self {
            Self::HostSums(data) => data,
            Self::Host(_) | Self::Packed(..) | Self::Gpu(_) => panic!("an operand that is not the host's sums"),
        }
    }

    /// Part of it.
    pub fn slice(self, range: Range<usize>) -> Self {
        match self {
            Self::Host(data) | Self::Packed(data, _) => Self::Host(&data[range]),
            Self::HostSums(data) => Self::HostSums(&data[range]),
            Self::Gpu(view) => Self::Gpu(view.slice(range)),
        }
    }

    /// The view, where it is on a GPU.
    ///
    /// # Panics
    /// When it is not: operands of one operation lie on one device.
    pub fn gpu(self) -> GpuView<'a> {
        match self {
            Self::Gpu(view) => view,
            _ => panic!("an operand on the host among operands on a GPU"),
        }
    }
}

impl<'a> ViewMut<'a> {
    /// The elements before a place, and those from it on.
    pub fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            Self::Host(data) => {
                let (head, tail) = data.split_at_mut(at);
                (Self::Host(head), Self::Host(tail))
            }
            Self::HostSums(data) => {
                let (head, tail) = data.split_at_mut(at);
                (Self::HostSums(head), Self::HostSums(tail))
            }
            Self::Gpu(view) => {
                let (head, tail) = view.split_at(at);
                (Self::Gpu(head), Self::Gpu(tail))
            }
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Host(data) => data.len(),
            Self::HostSums(data) => data.len(),
            Self::Gpu(view) => view.view().len(),
        }
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers, where they are on the host.
    ///
    /// # Panics
    /// When they are not: operands of one operation lie on one device.
    pub fn host(self) -> &'a mut [f32] {
        match self {
            Self::Host(data) => data,
            Self::HostSums(_) | Self::Gpu(_) => panic!("a result on a GPU, or of sums, among operands on the host"),
        }
    }

    /// The sums, where they are on the host.
    ///
    /// # Panics
    /// When they are not: a plan is made for one device.
    pub fn sums(self) -> &'a mut [f64] {
        match self {
            Self::HostSums(data) => data,
            Self::Host(_) | Self::Gpu(_) => panic!("a result that is not the host's sums"),
        }
    }

    /// The view, where it is on a GPU.
    ///
    /// # Panics
    /// When it is not: operands of one operation lie on one device.
    pub fn gpu(self) -> GpuViewMut<'a> {
        match self {
            Self::Host(_) | Self::HostSums(_) => panic!("a result on the host among operands on a GPU"),
            Self::Gpu(view) => view,
        }
    }

    /// The same, borrowed for a while.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        match self {
            Self::Host(data) => ViewMut::Host(data),
            Self::HostSums(data) => ViewMut::HostSums(data),
            Self::Gpu(view) => ViewMut::Gpu(view.reborrow()),
        }
    }

    /// The numbers, where they are on the host, borrowed for a while.
    pub fn host_mut(&mut self) -> &mut [f32] {
        self.reborrow().host()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_was_not_asked_for_may_be_of_no_use() {
        let unusable = || Err(Error::Device("NVRTC was not found".into()));
        assert_eq!(Device::or_host(unusable(), Dtype::F32).unwrap(), Device::Cpu);
        assert!(Device::or_host(unusable(), Dtype::F16).is_err(), "f16 was asked for");
    }
}
