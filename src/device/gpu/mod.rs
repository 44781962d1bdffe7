//! A device that runs kernels, as operations use it: memory that is reused, kernels by name, launches.
//!
//! Launches are asynchronous, so an operation cannot say whether its kernels ran. The first failure is kept and told by
//! the next call that brings something back to the host.

mod buffer;
mod pool;
mod region;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rayon::prelude::*;

use super::argument::Argument;
use super::compiler;
use super::configurations::Configurations;
use super::driver::{Address, CapturedGraph, Driver, Function, LaunchShape};
use super::signature::Signature;
use super::source::Unit;
use crate::dtype::Dtype;
use crate::{Error, Result};
use pool::Pool;
use region::{Inputs, Outcomes};

pub use buffer::{GpuBuffer, GpuView, GpuViewMut, Tickets, Workspace};
pub use region::{Posted, Snapshot};

/// A GPU, real or emulated. Only one thread at a time may launch work: the contents of the workspace and of recordings
/// depend on the order of the launches.
#[derive(Debug)]
pub struct Gpu {
    driver: Box<dyn Driver>,
    functions: Mutex<HashMap<&'static str, (Function, Arc<Signature>)>>,
    launched: Mutex<BTreeMap<String, u64>>,
    pool: Mutex<Pool>,
    inputs: Mutex<Inputs>,
    inputs_changed: AtomicBool,
    outcomes: Mutex<Outcomes>,
    /// How much work it was given so far: what was read of it before is old.
    work: AtomicU64,
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

impl Gpu {
    /// A device over a driver.
    pub fn new(driver: Box<dyn Driver>) -> Arc<Self> {
        let (functions, launched, pool, failure) = Default::default();
        let (inputs, inputs_changed, outcomes, work) = Default::default();
        let (configurations, launches, recording, blocking) = Default::default();
        Arc::new(Self {
            driver,
            functions,
            launched,
            pool,
            inputs,
            inputs_changed,
            outcomes,
            work,
            failure,
            configurations,
            launches,
            recording,
            blocking,
        })
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
            self.begin_work()?;
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
        lock(&self.pool).end_recording(graph.as_ref().ok());
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
        self.begin_work()?;
        // SAFETY: promised by the caller.
        unsafe { self.driver.replay(graph) }
    }

    /// Gets inputs to the device before work that is not only recorded.
    fn begin_work(&self) -> Result<()> {
        if self.is_recording() {
            return Ok(());
        }
        self.work.fetch_add(1, Ordering::Relaxed);
        self.flush_inputs()
    }

    /// Sets bytes to zero. It may be part of a recording.
    ///
    /// # Safety
    /// The device's memory has as many.
    unsafe fn zero(&self, at: Address, bytes: usize) -> Result<()> {
        self.begin_work()?;
        // SAFETY: promised by the caller.
        unsafe { self.driver.zero(at, bytes) }
    }

    /// Forgets a recording, which is never replayed again, and gives back the workspaces that it alone had kept.
    pub fn forget(&self, graph: CapturedGraph) {
        self.driver.release(graph);
        let idle = lock(&self.pool).forget(graph);
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
        self.work.fetch_add(1, Ordering::Relaxed);
        // SAFETY: promised by the caller.
        unsafe { self.driver.upload(to, from) }
    }

    /// Copies within the device, after all work so far.
    ///
    /// # Safety
    /// Both have room.
    ///
    /// # Errors
    /// When the device fails, or is recording.
    unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.refuse_while_recording("a copy of a batch")?;
        self.work.fetch_add(1, Ordering::Relaxed);
        // SAFETY: promised by the caller.
        unsafe { self.driver.copy(to, from, bytes) }
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
        self.flush_inputs()?;
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
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.free_regions();
        let pool = std::mem::take(&mut *lock(&self.pool));
        for address in pool.into_addresses() {
            // SAFETY: buffers hold the device alive, so nothing but the pool is left.
            unsafe { self.driver.free(address) };
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
