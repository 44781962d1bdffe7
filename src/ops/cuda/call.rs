//! The one place where operations launch kernels (`docs/kernels.md` c).

use crate::device::argument::{Argument, Element};
use crate::device::driver::LaunchShape;
use crate::device::gpu::{Gpu, GpuView, GpuViewMut, Workspace};
use crate::ops::activation::Act;
use crate::ops::config::THREADS;

/// An integer argument of a kernel.
pub(in crate::ops) fn int(n: usize) -> i32 {
    i32::try_from(n).expect("a tensor's dimensions and slabs fit 31 bits")
}

/// A count of elements.
pub(in crate::ops) fn long(n: usize) -> i64 {
    n as i64
}

/// Floats that a kernel may find in a buffer or in a workspace.
#[derive(Debug, Clone, Copy)]
pub struct Floats {
    argument: Argument,
    len: usize,
}

impl From<&GpuViewMut<'_>> for Floats {
    fn from(view: &GpuViewMut<'_>) -> Self {
        Self { argument: view.into(), len: view.view().len() }
    }
}

impl From<GpuView<'_>> for Floats {
    fn from(view: GpuView<'_>) -> Self {
        Self { argument: view.into(), len: view.len() }
    }
}

impl From<Workspace> for Floats {
    fn from(of: Workspace) -> Self {
        Self { argument: of.into(), len: of.len() }
    }
}

/// A launch of one kernel, whose arguments are given in the kernel's order.
#[derive(Debug)]
pub(in crate::ops) struct Call<'a> {
    gpu: &'a Gpu,
    instance: String,
    arguments: Vec<Argument>,
}

impl<'a> Call<'a> {
    /// Starts a launch of the instance with this name expression.
    pub(in crate::ops) fn new(gpu: &'a Gpu, instance: impl Into<String>) -> Self {
        // As many as any kernel takes.
        Self { gpu, instance: instance.into(), arguments: Vec::with_capacity(18) }
    }

    fn require(&self, what: &str, got: usize, needed: usize) {
        assert!(got >= needed, "{}: {what} has {got} elements, and {needed} are needed", self.instance);
    }

    fn require_here(&self, what: &str, on: &Gpu) {
        assert!(std::ptr::eq(self.gpu, on), "{}: {what} lies on another device", self.instance);
    }

    fn push(mut self, argument: Argument) -> Self {
        self.arguments.push(argument);
        self
    }

    /// An operand of which `len` elements are read.
    ///
    /// # Panics
    /// When it is shorter, or on another device.
    pub(in crate::ops) fn reads(self, what: &str, view: GpuView<'_>, len: usize) -> Self {
        self.require(what, view.len(), len);
        self.require_here(what, view.gpu());
        self.push(view.into())
    }

    /// The same, or the null pointer.
    pub(in crate::ops) fn reads_if(self, what: &str, view: Option<GpuView<'_>>, len: usize) -> Self {
        match view {
            Some(view) => self.reads(what, view, len),
            None => self.push(Argument::null()),
        }
    }

    /// So many null pointers.
    pub(in crate::ops) fn nulls(mut self, count: usize) -> Self {
        self.arguments.extend(std::iter::repeat_n(Argument::null(), count));
        self
    }

    /// A result of which `len` elements are written.
    ///
    /// # Panics
    /// When it is shorter, or on another device.
    pub(in crate::ops) fn writes(self, what: &str, view: &GpuViewMut<'_>, len: usize) -> Self {
        self.require(what, view.view().len(), len);
        self.require_here(what, view.view().gpu());
        self.push(view.into())
    }

    /// The same, or the null pointer.
    pub(in crate::ops) fn writes_if(self, what: &str, view: Option<&GpuViewMut<'_>>, len: usize) -> Self {
        match view {
            Some(view) => self.writes(what, view, len),
            None => self.push(Argument::null()),
        }
    }

    /// Floats, `len` of which are read or written.
    ///
    /// # Panics
    /// When there are fewer.
    pub(in crate::ops) fn floats(self, what: &str, floats: impl Into<Floats>, len: usize) -> Self {
        let floats = floats.into();
        self.require(what, floats.len, len);
        self.push(floats.argument)
    }

    /// The same, or the null pointer.
    pub(in crate::ops) fn floats_if(self, what: &str, floats: Option<Workspace>, len: usize) -> Self {
        match floats {
            Some(floats) => self.floats(what, floats, len),
            None => self.push(Argument::null()),
        }
    }

    /// `count` elements of type `of`, which the kernel reads. They lie in a buffer of floats.
    ///
    /// # Panics
    /// When the buffer has fewer, or is on another device.
    pub(in crate::ops) fn reads_memory(self, what: &str, view: GpuView<'_>, of: Element, count: usize) -> Self {
        self.require_memory(what, view, of, count);
        self.push(Argument::pointer(view.address(), of, false))
    }

    /// `count` elements of type `of`, which the kernel reads and writes. They lie in a buffer of floats.
    ///
    /// # Panics
    /// When the buffer has fewer, or is on another device.
    pub(in crate::ops) fn updates_memory(self, what: &str, view: GpuView<'_>, of: Element, count: usize) -> Self {
        self.require_memory(what, view, of, count);
        self.push(Argument::pointer(view.address(), of, true))
    }

    fn require_memory(&self, what: &str, view: GpuView<'_>, of: Element, count: usize) {
        self.require(what, view.len() * view.dtype().bytes() / of.bytes(), count);
        self.require_here(what, view.gpu());
    }

    /// A number or a struct.
    pub(in crate::ops) fn value(self, value: impl Into<Argument>) -> Self {
        self.push(value.into())
    }

    /// Dimensions and counts that a kernel takes as `int`.
    pub(in crate::ops) fn sizes<const N: usize>(mut self, sizes: [usize; N]) -> Self {
        self.arguments.extend(sizes.map(|n| Argument::from(int(n))));
        self
    }

    /// Limit, slope and where the slope lies, for kernels that read it on the device.
    pub(in crate::ops) fn act_at(mut self, act: Option<Act<'_>>) -> Self {
        self.arguments.extend(act.unwrap_or(Act::NONE).arguments());
        self
    }

    /// Limit and slope, for kernels that take the slope as a number.
    ///
    /// # Panics
    /// When the slope is to be read on the device: the number would go stale in work that is recorded.
    pub(in crate::ops) fn act(mut self, act: Option<Act<'_>>) -> Self {
        let [limit, slope, slope_at] = act.unwrap_or(Act::NONE).arguments();
        assert!(slope_at.is_null(), "{} takes its slope as a number, and it is on the device", self.instance);
        self.arguments.extend([limit, slope]);
        self
    }

    /// Launches blocks of 256 threads.
    pub(in crate::ops) fn launch(self, grid: [usize; 3]) {
        self.launch_of(THREADS, grid);
    }

    /// Launches blocks of so many threads.
    pub(in crate::ops) fn launch_of(self, threads: usize, grid: [usize; 3]) {
        self.launch_with(threads, grid, 0);
    }

    /// Launches blocks of so many threads with so many bytes of dynamic shared memory.
    pub(in crate::ops) fn launch_with(self, threads: usize, grid: [usize; 3], shared: usize) {
        let dimension = |n: usize| u32::try_from(n).expect("a batch that fits a device's memory fits its grids");
        let shape =
            LaunchShape { grid: grid.map(dimension), block: [dimension(threads), 1, 1], shared: dimension(shared) };
        // SAFETY: `Gpu::launch` checks number and types of the arguments. Pointers come from views and workspaces of this
        // device, which live until the launch is in its stream; each was taken with the number of elements that the kernel
        // reads or writes under this grid, and refused if it had fewer.
        unsafe { self.gpu.launch(&self.instance, shape, &self.arguments) }
    }
}
