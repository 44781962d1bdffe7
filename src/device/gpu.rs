//! A device that runs kernels, as operations use it: memory that is reused, kernels by name, launches.
//!
//! Launches are asynchronous, so an operation cannot say whether its kernels ran. The first failure is kept and told by
//! the next call that brings something back to the host.

use std::collections::{BTreeMap, HashMap};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rayon::prelude::*;

use super::argument::{Argument, Element};
use super::compiler;
use super::configurations::Configurations;
use super::driver::{Address, CapturedGraph, Driver, Function, LaunchShape};
use super::signature::Signature;
use super::source::Unit;
use crate::dtype::Dtype;
use crate::{Error, Result, memory};

/// A GPU, real or emulated. Only one thread at a time may launch work: the contents of the workspace and of recordings
/// depend on the order of the launches.
#[derive(Debug)]
pub struct Gpu {
    driver: Box<dyn Driver>,
    functions: Mutex<HashMap<&'static str, (Function, Arc<Signature>)>>,
    launched: Mutex<BTreeMap<String, u64>>,
    pool: Mutex<Pool>,
    failure: Mutex<Option<Error>>,
    configurations: Configurations,
    /// Launches, while somebody watches them.
    launches: Mutex<Option<Vec<Launch>>>,
    /// Whether launches are recorded instead of done.
    recording: AtomicBool,
    /// Whether every launch is waited for.
    blocking: AtomicBool,
}

/// What was launched, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Name expression of the kernel.
    pub instance: String,
    /// Grid and block.
    pub shape: LaunchShape,
}

/// Freed memory by size, and what is in use.
#[derive(Debug, Default)]
struct Pool {
    free: BTreeMap<usize, Vec<Address>>,
    used: u64,
    peak: u64,
    /// Memory lent to one operation at a time. Outgrown ones stay as long as a recording holds their address.
    workspaces: Vec<Lent>,
    /// Most bytes that one operation has asked of them.
    workspace_peak: u64,
    /// Counters that are zero between launches. Outgrown ones stay, for recordings hold their addresses.
    tickets: Vec<Tickets>,
}

/// Memory that workspaces are lent from.
#[derive(Debug)]
struct Lent {
    address: Address,
    bytes: usize,
    /// The recordings that hold its address.
    holders: Vec<CapturedGraph>,
    /// Whether the recording in progress will.
    recording: bool,
}

impl Lent {
    fn is_held(&self) -> bool {
        self.recording || !self.holders.is_empty()
    }
}

/// Bytes to which allocations are rounded, so that freed ones fit others.
const GRANULE: usize = 512;
/// Tickets that are allocated at once, at least: enough for the statistics of most networks.
const FEWEST_TICKETS: usize = 4096;

impl Gpu {
    /// A device over a driver.
    pub fn new(driver: Box<dyn Driver>) -> Arc<Self> {
        let (functions, launched, pool, failure) = Default::default();
        let (configurations, launches, recording, blocking) = Default::default();
        Arc::new(Self { driver, functions, launched, pool, failure, configurations, launches, recording, blocking })
    }

    /// The driver.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// Compiles and loads all kernels for an element type, in parallel.
    ///
    /// # Errors
    /// When the device lacks the type, or they cannot be compiled.
    pub fn prepare(&self, dtype: Dtype) -> Result<()> {
        compiler::require(dtype, self.driver.arch())?;
        let needed = |unit: &Unit| unit.dtype() == dtype || unit.dtype() == Dtype::F32;
        let missing = |unit: &Unit| unit.instances().next().is_some_and(|i| !lock(&self.functions).contains_key(i));
        let units: Vec<Unit> = Unit::all()?.into_iter().filter(needed).filter(missing).collect();
        units.into_par_iter().try_for_each(|unit| self.load(unit))
    }

    fn load(&self, unit: Unit) -> Result<()> {
        let found = self.driver.load(unit)?;
        let mut functions = lock(&self.functions);
        for instance in unit.instances() {
            let function = found.get(instance);
            let function = function.ok_or_else(|| Error::Device(format!("{unit} lacks {instance}")))?;
            let signature = Signature::new(unit.file().kernel(instance), instance)?;
            functions.insert(instance, (*function, Arc::new(signature)));
        }
        Ok(())
    }

    /// Launches a kernel by its name expression. A failure shows at the next [`check`](Self::check), and so does a launch
    /// that is not done since its arguments are not the kernel's in number, order and type.
    ///
    /// # Safety
    /// Pointers lead to this device's memory, which has room for what the kernel reads and writes.
    pub unsafe fn launch(&self, instance: &str, shape: LaunchShape, arguments: &[Argument]) {
        if lock(&self.failure).is_some() {
            return;
        }
        let mut outcome = self.function(instance).and_then(|(function, signature)| {
            signature.check(arguments)?;
            self.count(instance);
            if let Some(launches) = &mut *lock(&self.launches) {
                launches.push(Launch { instance: instance.to_owned(), shape });
            }
            // SAFETY: number and types were checked; the rest is promised by the caller.
            unsafe { self.driver.launch(function, shape, arguments) }
        });
        if self.blocking.load(Ordering::Relaxed) && !self.is_recording() {
            outcome = outcome.and_then(|()| self.driver.synchronize());
        }
        let named = |text: String| format!("{instance}: {text}");
        match outcome {
            Ok(()) => {}
            Err(Error::DeviceLost(text)) => self.fail(Error::DeviceLost(named(text))),
            Err(Error::Device(text)) => self.fail(Error::Device(named(text))),
            Err(other) => self.fail(other),
        }
    }

    /// Waits for every launch, recorded ones apart, so that a failure names its kernel and not one that came later.
    pub fn set_blocking(&self, on: bool) {
        self.blocking.store(on, Ordering::Relaxed);
    }

    /// Which configurations launches use.
    pub fn configurations(&self) -> &Configurations {
        &self.configurations
    }

    /// Runs `work` and returns its launches, in order.
    ///
    /// # Errors
    /// What the work returns, and the first failure of a launch.
    pub fn watch_launches(&self, work: impl FnOnce() -> Result<()>) -> Result<Vec<Launch>> {
        *lock(&self.launches) = Some(Vec::new());
        let outcome = work().and_then(|()| self.check());
        let seen = lock(&self.launches).take().unwrap_or_default();
        outcome.map(|()| seen)
    }

    /// Keeps a failure for the next [`check`](Self::check).
    pub(crate) fn fail(&self, error: Error) {
        lock(&self.failure).get_or_insert(error);
    }

    fn function(&self, instance: &str) -> Result<(Function, Arc<Signature>)> {
        let known = lock(&self.functions).get(instance).cloned();
        match known {
            Some(function) => Ok(function),
            None => {
                self.load(Unit::of(instance)?)?;
                Ok(lock(&self.functions)[instance].clone())
            }
        }
    }

    fn count(&self, instance: &str) {
        let mut launched = lock(&self.launched);
        match launched.get_mut(instance) {
            Some(count) => *count += 1,
            None => drop(launched.insert(instance.to_owned(), 1)),
        }
    }

    /// How often each instance was launched so far, or recorded.
    pub fn launched(&self) -> BTreeMap<String, u64> {
        lock(&self.launched).clone()
    }

    /// Returns the first failure of a launch since the last check.
    ///
    /// # Errors
    /// That failure.
    pub fn check(&self) -> Result<()> {
        lock(&self.failure).take().map_or(Ok(()), Err)
    }

    /// Waits for all work.
    ///
    /// # Errors
    /// When some of it failed.
    pub fn synchronize(&self) -> Result<()> {
        self.check()?;
        self.driver.synchronize()
    }

    /// Records the launches and clearings of `body` instead of doing them. Whatever else it does is done, once.
    ///
    /// # Errors
    /// When `body` fails or copies to or from the host, or the device fails.
    pub fn capture(&self, body: impl FnOnce() -> Result<()>) -> Result<CapturedGraph> {
        self.check()?;
        self.driver.begin_capture()?;
        self.recording.store(true, Ordering::Relaxed);
        let outcome = body();
        self.recording.store(false, Ordering::Relaxed);
        let graph = self.driver.end_capture();
        for lent in &mut lock(&self.pool).workspaces {
            let holder = graph.as_ref().ok().filter(|_| lent.recording);
            lent.holders.extend(holder);
            lent.recording = false;
        }
        let failure = self.check();
        match (graph, outcome.and(failure)) {
            (Ok(graph), Ok(())) => Ok(graph),
            (Ok(graph), Err(error)) => {
                self.forget(graph);
                Err(error)
            }
            (Err(error), outcome) => Err(outcome.err().unwrap_or(error)),
        }
    }

    /// Does everything that was recorded, in order.
    ///
    /// # Safety
    /// All buffers that were used while recording are still there. Workspaces stay until it is [forgotten](Self::forget).
    ///
    /// # Errors
    /// When the device fails.
    pub unsafe fn replay(&self, graph: CapturedGraph) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { self.driver.replay(graph) }
    }

    /// Forgets a recording, which is never replayed again, and gives back the workspaces that it alone had kept.
    pub fn forget(&self, graph: CapturedGraph) {
        self.driver.release(graph);
        let idle: Vec<Lent> = {
            let workspaces = &mut lock(&self.pool).workspaces;
            workspaces.iter_mut().for_each(|lent| lent.holders.retain(|holder| *holder != graph));
            let outgrown = workspaces.len().saturating_sub(1);
            workspaces.extract_if(..outgrown, |lent| !lent.is_held()).collect()
        };
        idle.into_iter().for_each(|lent| self.release(lent.address, lent.bytes));
    }

    /// Whether work is being recorded, so that launches are not done.
    pub(super) fn is_recording(&self) -> bool {
        self.recording.load(Ordering::Relaxed)
    }

    /// Whether somebody looks at single launches, which a replay has none of.
    pub(super) fn is_watched(&self) -> bool {
        self.blocking.load(Ordering::Relaxed) || self.configurations.is_watched() || lock(&self.launches).is_some()
    }

    /// Copies to the device, after all work so far; the host's memory is free to change when it returns.
    ///
    /// # Safety
    /// The device's memory has room.
    ///
    /// # Errors
    /// When the device fails, or is recording.
    pub unsafe fn upload(&self, to: Address, from: &[u8]) -> Result<()> {
        self.refuse_while_recording("a copy to the device")?;
        // SAFETY: promised by the caller.
        unsafe { self.driver.upload(to, from) }
    }

    /// Copies to the host, after all work so far.
    ///
    /// # Safety
    /// The device's memory is as long.
    ///
    /// # Errors
    /// When the device or an earlier launch failed, or it is recording.
    pub unsafe fn download(&self, to: &mut [u8], from: Address) -> Result<()> {
        self.check()?;
        self.refuse_while_recording("a copy to the host")?;
        // SAFETY: promised by the caller.
        unsafe { self.driver.download(to, from) }
    }

    /// A recording replays launches alone: what passes by the host would be done once, and be missing from then on.
    fn refuse_while_recording(&self, what: &str) -> Result<()> {
        if self.is_recording() {
            return Err(Error::Device(format!("{what} cannot be part of a recording")));
        }
        Ok(())
    }

    /// Bytes in use now, and at most so far.
    pub fn memory(&self) -> (u64, u64) {
        let pool = lock(&self.pool);
        (pool.used, pool.peak)
    }

    /// Bytes of all buffers, workspaces left out: those are as large as any operation so far wanted them.
    pub fn buffer_bytes(&self) -> u64 {
        let pool = lock(&self.pool);
        let workspaces = pool.workspaces.iter().map(|w| w.bytes);
        let tickets = pool.tickets.iter().map(|t| t.len * size_of::<u32>());
        pool.used - workspaces.chain(tickets).map(|bytes| self.rounded(bytes) as u64).sum::<u64>()
    }

    /// Most bytes of workspace that one operation asked for since this was last called.
    pub fn take_workspace_peak(&self) -> u64 {
        std::mem::take(&mut lock(&self.pool).workspace_peak)
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        let bytes = self.rounded(bytes);
        let mut pool = lock(&self.pool);
        let reused = pool.free.get_mut(&bytes).and_then(Vec::pop);
        let address = match reused {
            Some(address) => address,
            None => self.driver.allocate(bytes).or_else(|error| {
                // What lies idle in other sizes may be enough.
                let idle = std::mem::take(&mut pool.free);
                if idle.is_empty() {
                    return Err(error);
                }
                for address in idle.into_values().flatten() {
                    // SAFETY: nobody holds an address of the pool.
                    unsafe { self.driver.free(address) };
                }
                self.driver.allocate(bytes)
            })?,
        };
        pool.used += bytes as u64;
        pool.peak = pool.peak.max(pool.used);
        Ok(address)
    }

    /// Frees idle memory, so that another process can use it.
    pub fn release_idle(&self) {
        let idle = std::mem::take(&mut lock(&self.pool).free);
        for address in idle.into_values().flatten() {
            // SAFETY: nobody holds an address of the pool.
            unsafe { self.driver.free(address) };
        }
    }

    fn release(&self, address: Address, bytes: usize) {
        let bytes = self.rounded(bytes);
        let mut pool = lock(&self.pool);
        pool.used -= bytes as u64;
        if self.driver.keeps_freed_memory() {
            pool.free.entry(bytes).or_default().push(address);
        } else {
            // SAFETY: the owner gives it back, and only once.
            unsafe { self.driver.free(address) };
        }
    }

    fn rounded(&self, bytes: usize) -> usize {
        if self.driver.keeps_freed_memory() { bytes.next_multiple_of(GRANULE) } else { bytes }
    }

    /// Memory of `len` floats for partial sums, of any content, until the next call: work on a device is done in order,
    /// so that one operation after the other may use it. A failure shows at the next [`check`](Self::check).
    pub fn workspace(&self, len: usize) -> Workspace {
        Workspace { address: self.lend(len), len }
    }

    /// At least `len` counters that are zero, and that whoever counts with them leaves zero. A failure shows at the next
    /// [`check`](Self::check).
    pub fn tickets(&self, len: usize) -> Tickets {
        let last = lock(&self.pool).tickets.last().copied();
        if let Some(tickets) = last.filter(|tickets| tickets.len >= len) {
            return tickets;
        }
        let len = len.next_power_of_two().max(FEWEST_TICKETS);
        let bytes = len * size_of::<u32>();
        let zeroed = self.allocate(bytes).and_then(|address| {
            // SAFETY: the memory was just allocated, and nobody else has its address.
            unsafe { self.driver.zero(address, bytes) }.map(|()| address)
        });
        let tickets = Tickets {
            address: zeroed.unwrap_or_else(|error| {
                self.fail(error);
                0
            }),
            len,
        };
        lock(&self.pool).tickets.push(tickets);
        tickets
    }

    fn lend(&self, len: usize) -> Address {
        let bytes = len * size_of::<f32>();
        let recorded = self.is_recording();
        {
            let peak = &mut lock(&self.pool).workspace_peak;
            *peak = (*peak).max(bytes as u64);
        }
        // Where freed memory is not kept, new memory every time finds reads of what an earlier operation left.
        if self.driver.keeps_freed_memory()
            && let Some(last) = lock(&self.pool).workspaces.last_mut()
            && last.bytes >= bytes
        {
            last.recording |= recorded;
            return last.address;
        }
        // Whatever takes over an outgrown one does its work after the operations that were lent it.
        if !recorded || self.driver.keeps_freed_memory() {
            let outgrown: Vec<Lent> = lock(&self.pool).workspaces.extract_if(.., |w| !w.is_held()).collect();
            outgrown.into_iter().for_each(|w| self.release(w.address, w.bytes));
        }
        match self.allocate(bytes) {
            Ok(address) => {
                lock(&self.pool).workspaces.push(Lent { address, bytes, holders: Vec::new(), recording: recorded });
                address
            }
            Err(error) => {
                self.fail(error);
                0
            }
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        let pool = std::mem::take(&mut *lock(&self.pool));
        let workspaces = pool.workspaces.into_iter().map(|w| w.address);
        let tickets = pool.tickets.into_iter().map(|t| t.address);
        for address in pool.free.into_values().flatten().chain(workspaces).chain(tickets) {
            // SAFETY: buffers hold the device alive, so nothing but the pool is left.
            unsafe { self.driver.free(address) };
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Numbers in a GPU's memory.
#[derive(Debug)]
pub struct GpuBuffer {
    gpu: Arc<Gpu>,
    address: Address,
    len: usize,
    dtype: Dtype,
}

impl GpuBuffer {
    /// `len` zeros.
    pub fn zeros(gpu: &Arc<Gpu>, dtype: Dtype, len: usize) -> Result<Self> {
        let mut buffer = Self { gpu: gpu.clone(), address: gpu.allocate(len * dtype.bytes())?, len, dtype };
        buffer.clear()?;
        Ok(buffer)
    }

    /// The device.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Copies the first elements to the host.
    pub fn read(&self, out: &mut [f32]) -> Result<()> {
        self.view(0..out.len()).read(out)
    }

    /// Copies numbers to the front.
    pub fn write(&mut self, data: &[f32]) -> Result<()> {
        assert!(data.len() <= self.len, "more numbers than the buffer holds");
        self.write_bytes(&self.dtype.encode(data))
    }

    /// Copies bytes of any meaning to the front.
    pub fn write_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= self.len * self.dtype.bytes(), "more bytes than the buffer holds");
        // SAFETY: the buffer has room.
        unsafe { self.gpu.upload(self.address, bytes) }
    }

    /// Copies bytes of any meaning from the front.
    pub fn read_bytes(&self, bytes: &mut [u8]) -> Result<()> {
        assert!(bytes.len() <= self.len * self.dtype.bytes(), "more bytes than the buffer holds");
        // SAFETY: the buffer is as long.
        unsafe { self.gpu.download(bytes, self.address) }
    }

    /// Sets everything to zero. Unlike [`write`](Self::write) it may be part of a recording.
    pub fn clear(&mut self) -> Result<()> {
        // SAFETY: the buffer has this size.
        unsafe { self.gpu.driver.zero(self.address, self.len * self.dtype.bytes()) }
    }

    /// A range, to be read.
    pub fn view(&self, range: Range<usize>) -> GpuView<'_> {
        assert!(range.start <= range.end && range.end <= self.len, "range past the end of a buffer");
        let address = self.address + (range.start * self.dtype.bytes()) as Address;
        GpuView { gpu: &self.gpu, address, len: range.len(), dtype: self.dtype }
    }

    /// A range, to be written.
    pub fn view_mut(&mut self, range: Range<usize>) -> GpuViewMut<'_> {
        GpuViewMut { view: self.view(range), exclusive: PhantomData }
    }

    /// Ranges that do not overlap, to be written.
    pub fn view_mut_disjoint<const N: usize>(&mut self, ranges: [Range<usize>; N]) -> [GpuViewMut<'_>; N] {
        for (i, a) in ranges.iter().enumerate() {
            let apart = |b: &Range<usize>| a.end <= b.start || b.end <= a.start;
            assert!(ranges[..i].iter().all(apart), "ranges planned apart from each other");
        }
        let shared = &*self;
        ranges.map(|range| GpuViewMut { view: shared.view(range), exclusive: PhantomData })
    }

    /// Any number of ranges that do not overlap, to be written, in the order given.
    pub fn view_mut_all(&mut self, ranges: &[Range<usize>]) -> Vec<GpuViewMut<'_>> {
        for (i, a) in ranges.iter().enumerate() {
            let apart = |b: &Range<usize>| a.end <= b.start || b.end <= a.start;
            assert!(ranges[..i].iter().all(apart), "ranges planned apart from each other");
        }
        let shared = &*self;
        ranges.iter().map(|range| GpuViewMut { view: shared.view(range.clone()), exclusive: PhantomData }).collect()
    }
}

impl Drop for GpuBuffer {
    fn drop(&mut self) {
        self.gpu.release(self.address, self.len * self.dtype.bytes());
    }
}

/// Part of a [`GpuBuffer`], to be read.
#[derive(Debug, Clone, Copy)]
pub struct GpuView<'a> {
    gpu: &'a Gpu,
    address: Address,
    len: usize,
    dtype: Dtype,
}

impl<'a> GpuView<'a> {
    /// The device.
    pub fn gpu(&self) -> &'a Gpu {
        self.gpu
    }

    /// Where it lies.
    pub fn address(&self) -> Address {
        self.address
    }

    /// Part of it.
    pub fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "range past the end of a view");
        Self { address: self.address + (range.start * self.dtype.bytes()) as Address, len: range.len(), ..self }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Copies all elements to the host, after all work so far.
    ///
    /// # Errors
    /// When the device or an earlier launch failed.
    pub fn read(&self, out: &mut [f32]) -> Result<()> {
        assert_eq!(out.len(), self.len, "another number of elements");
        let mut bytes: Vec<u8> = memory::zeros(self.len * self.dtype.bytes(), "a copy from the device")?;
        // SAFETY: the view has as many elements.
        unsafe { self.gpu.download(&mut bytes, self.address)? };
        self.dtype.decode(&bytes, out);
        Ok(())
    }
}

/// Part of a [`GpuBuffer`], to be written.
#[derive(Debug)]
pub struct GpuViewMut<'a> {
    view: GpuView<'a>,
    exclusive: PhantomData<&'a mut ()>,
}

impl<'a> GpuViewMut<'a> {
    /// As a view to be read.
    pub fn view(&self) -> GpuView<'_> {
        self.view
    }

    /// As a view to be read, for as long.
    pub fn into_view(self) -> GpuView<'a> {
        self.view
    }

    /// The same, borrowed for a while.
    pub fn reborrow(&mut self) -> GpuViewMut<'_> {
        GpuViewMut { view: self.view, exclusive: PhantomData }
    }
}

/// Floats that one operation has to itself, of any content ([`Gpu::workspace`]).
#[derive(Debug, Clone, Copy)]
pub struct Workspace {
    address: Address,
    len: usize,
}

impl Workspace {
    /// Number of floats.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of it.
    ///
    /// # Panics
    /// When the part reaches past the end.
    pub fn part(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "a part past the end of a workspace");
        Self { address: self.address + (range.start * size_of::<f32>()) as Address, len: range.len() }
    }
}

/// Counters that are zero between launches ([`Gpu::tickets`]): by them the blocks of a launch find out which of them is last.
#[derive(Debug, Clone, Copy)]
pub struct Tickets {
    address: Address,
    len: usize,
}

impl From<Tickets> for Argument {
    fn from(of: Tickets) -> Self {
        Self::pointer(of.address, Element::U32, true)
    }
}

impl From<Workspace> for Argument {
    fn from(of: Workspace) -> Self {
        Self::pointer(of.address, Element::Number(Dtype::F32), true)
    }
}

impl From<GpuView<'_>> for Argument {
    fn from(view: GpuView<'_>) -> Self {
        Self::pointer(view.address, Element::Number(view.dtype), false)
    }
}

impl From<&GpuViewMut<'_>> for Argument {
    fn from(view: &GpuViewMut<'_>) -> Self {
        Self::pointer(view.view.address, Element::Number(view.view.dtype), true)
    }
}

/// A view or the null pointer.
impl From<Option<GpuView<'_>>> for Argument {
    fn from(view: Option<GpuView<'_>>) -> Self {
        view.map_or_else(Self::null, Self::from)
    }
}
