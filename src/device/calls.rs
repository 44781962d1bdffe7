//! What a driver was asked to do, counted: a step should cost the host few calls.

use std::sync::{Arc, Mutex, MutexGuard};

/// How often a driver was called. What a replay does is one call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Calls {
    /// Copies to the device.
    pub uploads: u64,
    /// Copies to the host.
    pub downloads: u64,
    /// Copies within the device.
    pub copies: u64,
    /// Clearings.
    pub zeros: u64,
    /// Launches, those left out that are recorded.
    pub launches: u64,
    /// Recordings that were ended.
    pub captures: u64,
    /// Replays.
    pub replays: u64,
    /// Events that were recorded, and queues that were put behind one.
    pub events: u64,
    /// Waits of the host for the device.
    pub waits: u64,
}

/// Where calls are counted. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct CallLog(Arc<Mutex<Calls>>);

impl CallLog {
    /// Counts a call.
    pub(super) fn count(&self, of: impl FnOnce(&mut Calls) -> &mut u64) {
        *of(&mut self.calls()) += 1;
    }

    /// The calls since this was last called.
    pub fn take(&self) -> Calls {
        std::mem::take(&mut self.calls())
    }

    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}
