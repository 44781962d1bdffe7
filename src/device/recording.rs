//! Recordings: repeated work as one CUDA graph.

use std::sync::Arc;

use super::Device;
use super::driver::CapturedGraph;
use super::gpu::Gpu;
use crate::Result;

/// Work that a device repeats. A GPU runs it directly the first time, which loads kernels and allocates memory, records it
/// the second time, and replays the recording from then on, which costs the host a single launch. Within work that is being
/// recorded it is done directly: it becomes a part of that recording.
#[derive(Debug, Default)]
pub struct Recording(State);

#[derive(Debug, Default)]
enum State {
    #[default]
    New,
    Done,
    Recorded(Arc<Gpu>, CapturedGraph),
}

impl Recording {
    /// Does the work. It must be the same every time: whatever changes lies in the device's memory, at the same places,
    /// and is put there beforehand.
    ///
    /// # Safety
    /// All buffers that the work uses live until the recording is dropped.
    ///
    /// # Errors
    /// When the work or the device fails.
    pub unsafe fn run(&mut self, device: &Device, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let Device::Gpu(gpu, _) = device else { return work() };
        if gpu.is_recording() || !gpu.driver().records() {
            return work();
        }
        match self.0 {
            State::New => {
                work()?;
                self.0 = State::Done;
                Ok(())
            }
            State::Done => {
                let graph = gpu.capture(work)?;
                self.0 = State::Recorded(gpu.clone(), graph);
                // SAFETY: as below.
                unsafe { gpu.replay(graph) }
            }
            // SAFETY: promised by the caller.
            State::Recorded(_, graph) => unsafe { gpu.replay(graph) },
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if let State::Recorded(gpu, graph) = &self.0 {
            gpu.forget(*graph);
        }
    }
}

/// Sizes whose work is kept recorded at once.
const MOST_SIZES: usize = 4;

/// Recordings of work that comes in few sizes, such as whole batches and the last of every epoch. The size that was not
/// asked for longest is given up for a new one.
#[derive(Debug, Default)]
pub struct SizedRecordings {
    /// By size, the one asked for last at the end.
    recordings: Vec<(usize, Recording)>,
    /// How often configurations had changed when they were made.
    changes: u64,
}

impl SizedRecordings {
    /// As [`Recording::run`], for work that is the same every time for one `size`. Where somebody looks at single launches
    /// it is done directly.
    ///
    /// # Safety
    /// As there, until these are dropped or [forgotten](Self::forget).
    ///
    /// # Errors
    /// As there.
    pub unsafe fn run(&mut self, device: &Device, size: usize, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let Device::Gpu(gpu, _) = device else { return work() };
        if gpu.is_watched() {
            return work();
        }
        let changes = gpu.configurations().changes();
        if changes != self.changes {
            self.forget();
            self.changes = changes;
        }
        let recording = match self.recordings.iter().position(|(of, _)| *of == size) {
            Some(at) => self.recordings.remove(at).1,
            None => Recording::default(),
        };
        if self.recordings.len() == MOST_SIZES {
            self.recordings.remove(0);
        }
        self.recordings.push((size, recording));
        let (_, recording) = self.recordings.last_mut().expect("one was just pushed");
        // SAFETY: promised by the caller.
        unsafe { recording.run(device, work) }
    }

    /// Forgets everything that was recorded: the work is another from now on.
    pub fn forget(&mut self) {
        self.recordings.clear();
    }
}
