//! Ctrl-C as a flag that the loop checks between steps.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::{Error, Result, terminal};

/// Exit code of an interrupted run.
const FAILED: i32 = 1;
/// A signal this soon after the first belongs to the same request: `timeout` and terminals signal a process and its group, both.
const SAME_WISH: Duration = Duration::from_secs(1);

/// A request to stop. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// A flag that only [`set`](Self::set) sets.
    pub fn new() -> Self {
        Self::default()
    }

    /// The flag that Ctrl-C (and a polite kill) sets; a second one, a second later or more, ends the process at once.
    /// Installed once per process.
    ///
    /// # Errors
    /// When the operating system refuses the handler.
    pub fn on_ctrl_c() -> Result<Self> {
        static INSTALLED: OnceLock<std::result::Result<Interrupt, Refusal>> = OnceLock::new();
        let installed = INSTALLED.get_or_init(|| {
            let flag = Self::new();
            let handler = flag.clone();
            let mut first: Option<Instant> = None;
            ctrlc::set_handler(move || match first {
                None => {
                    first = Some(Instant::now());
                    handler.set();
                }
                Some(at) if at.elapsed() < SAME_WISH => {}
                Some(_) => end("interrupted twice; stopped at once"),
            })
            .map(|()| flag)
            .map_err(Refusal::from)
        });
        installed.clone().map_err(Refusal::told)
    }

    /// Ends the process at the first Ctrl-C or polite kill, for work that keeps nothing.
    ///
    /// # Errors
    /// When the operating system refuses the handler, or there is one already.
    pub fn end_on_ctrl_c() -> Result<()> {
        ctrlc::set_handler(|| end("interrupted; nothing was written")).map_err(|e| Refusal::from(e).told())
    }

    /// Requests a stop.
    pub fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether a stop was requested.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

fn end(why: &str) {
    terminal::tell(&format!("error: {why}"));
    std::process::exit(FAILED);
}

/// Why there is no handler.
#[derive(Debug, Clone)]
enum Refusal {
    /// The system has no pipe or no thread for it, for which memory is the usual reason.
    System(String),
    /// There is one already, or there can be none.
    Other(String),
}

impl From<ctrlc::Error> for Refusal {
    fn from(error: ctrlc::Error) -> Self {
        match error {
            ctrlc::Error::System(reason) => Self::System(reason.to_string()),
            other => Self::Other(other.to_string()),
        }
    }
}

impl Refusal {
    fn told(self) -> Error {
        match self {
            Self::System(reason) => {
                Error::Memory(format!("the thread that waits for Ctrl-C cannot be started: {reason}"))
            }
            Self::Other(reason) => Error::Config(format!("Ctrl-C cannot be caught: {reason}")),
        }
    }
}
