//! A device that does nothing, for what can be told without doing it: which kernels a piece of work launches, and how often
//! ([`Gpu::launched`](super::gpu::Gpu::launched)), of any network at any batch, in no memory and no time.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use super::driver::{
    Address, Argument, CapturedGraph, Driver, Event, Function, HostBlock, LaunchShape, Queue, allocate_on_host,
    free_on_host,
};
use super::source::Unit;
use crate::{Error, Result};

/// Where memory begins that does not exist; aligned as every allocator's is.
const FIRST_ADDRESS: Address = 1 << 20;

/// The device that does nothing.
#[derive(Debug)]
pub struct DryRun {
    arch: u32,
    next: AtomicU64,
}

impl DryRun {
    /// One of an architecture.
    pub fn new(arch: u32) -> Self {
        Self { arch, next: AtomicU64::new(FIRST_ADDRESS) }
    }
}

impl Driver for DryRun {
    fn name(&self) -> String {
        format!("dry run of sm_{}", self.arch)
    }

    fn arch(&self) -> u32 {
        self.arch
    }

    fn multiprocessors(&self) -> u32 {
        1
    }

    fn l2_bytes(&self) -> usize {
        0
    }

    fn is_emulated(&self) -> bool {
        true
    }

    fn records(&self) -> bool {
        false
    }

    fn memory(&self) -> Option<(u64, u64)> {
        None
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        Ok(self.next.fetch_add(bytes.next_multiple_of(256) as Address, Ordering::Relaxed))
    }

    unsafe fn free(&self, _: Address) {}

    unsafe fn upload(&self, _: Address, _: &[u8]) -> Result<()> {
        Ok(())
    }

    unsafe fn download(&self, to: &mut [u8], _: Address) -> Result<()> {
        to.fill(0);
        Ok(())
    }

    unsafe fn copy(&self, _: Address, _: Address, _: usize) -> Result<()> {
        Ok(())
    }

    fn allocate_host(&self, bytes: usize) -> Result<HostBlock> {
        allocate_on_host(bytes, 0)
    }

    unsafe fn free_host(&self, block: HostBlock) {
        // SAFETY: promised by the caller.
        unsafe { free_on_host(block) }
    }

    unsafe fn upload_beside(&self, _: Address, _: HostBlock, _: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn download_later(&self, _: HostBlock, _: Address, _: usize) -> Result<()> {
        Ok(())
    }

    fn event(&self) -> Result<Event> {
        Ok(Event(0))
    }

    fn release_event(&self, _: Event) {}

    fn record(&self, _: Event, _: Queue) -> Result<()> {
        Ok(())
    }

    fn order(&self, _: Queue, _: Event) -> Result<()> {
        Ok(())
    }

    fn wait(&self, _: Event) -> Result<()> {
        Ok(())
    }

    unsafe fn zero(&self, _: Address, _: usize) -> Result<()> {
        Ok(())
    }

    fn load(&self, unit: Unit) -> Result<HashMap<String, Function>> {
        Ok(unit.instances().map(|instance| (instance.to_owned(), Function(0))).collect())
    }

    unsafe fn launch(&self, _: Function, _: LaunchShape, _: &[Argument]) -> Result<()> {
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn begin_capture(&self) -> Result<()> {
        Err(Error::Device("a dry run records nothing".into()))
    }

    fn end_capture(&self) -> Result<CapturedGraph> {
        self.begin_capture().map(|()| CapturedGraph(0))
    }

    unsafe fn replay(&self, _: CapturedGraph) -> Result<()> {
        self.begin_capture()
    }

    fn release(&self, _: CapturedGraph) {}

    fn time(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<f32> {
        body().map(|()| 0.0)
    }
}
