//! Recordings: repeated work as one CUDA graph.

use std::sync::Arc;

use super::Device;
use super::driver::CapturedGraph;
use super::gpu::Gpu;
use crate::Result;

/// Work that a device repeats. A GPU runs it directly the first time, which loads kernels and allocates memory, records it
/// the second time, and replays the recording from then on, which costs the host a single launch.
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
                unsafe { gpu.driver().replay(graph) }
            }
            // SAFETY: promised by the caller; workspaces are never freed.
            State::Recorded(_, graph) => unsafe { gpu.driver().replay(graph) },
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if let State::Recorded(gpu, graph) = &self.0 {
            gpu.driver().release(*graph);
        }
    }
}
