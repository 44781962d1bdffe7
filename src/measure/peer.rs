//! The same work elsewhere: a Python process, in PyTorch or an inference runtime, that answers one line of JSON with
//! another.
//!
//! The scripts (`benches/peers`) are part of this program and are written to a temporary folder. A question has a number,
//! which its answer repeats; any other line that the process prints is no answer.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::record::{LayerWork, PeerPeaks, PeerRates};
use crate::device::Device;
use crate::graph::Graph;
use crate::{Error, Result};

/// How long Python may take to load PyTorch or the runtimes.
const START: Duration = Duration::from_secs(120);
/// Time beyond the limit of an answer before the peer counts as dead: it should give up first and report why.
const GRACE: Duration = Duration::from_secs(5);
/// How often a peer that has ended is started again: one question may end it, such as for want of memory.
const RESTARTS: u32 = 3;
/// The number that the line of greeting answers.
const GREETING: u64 = 0;
/// Seconds that the peer measures its own peaks for, and how long it may take for them.
const PEAKS_SECONDS: f64 = 0.2;
const PEAKS_LIMIT: Duration = Duration::from_secs(60);

const SCRIPTS: [(&str, &str); 5] = [
    ("serving.py", include_str!("../../benches/peers/serving.py")),
    ("clock.py", include_str!("../../benches/peers/clock.py")),
    ("layers.py", include_str!("../../benches/peers/layers.py")),
    ("networks.py", include_str!("../../benches/peers/networks.py")),
    ("runtimes.py", include_str!("../../benches/peers/runtimes.py")),
];

/// Which script answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerScript {
    /// Single layers in PyTorch.
    Layers,
    /// Whole networks in PyTorch.
    Networks,
    /// Whole networks in inference runtimes.
    Runtimes,
}

impl PeerScript {
    const fn file(self) -> &'static str {
        match self {
            Self::Layers => "layers.py",
            Self::Networks => "networks.py",
            Self::Runtimes => "runtimes.py",
        }
    }

    /// What there is none of where it does not start, and what the Python that starts it has.
    const fn needs(self) -> (&'static str, &'static str) {
        match self {
            Self::Layers | Self::Networks => ("no peer", "PyTorch"),
            Self::Runtimes => ("no runtimes", "NumPy and ONNX Runtime or another runtime"),
        }
    }
}

/// Asks for the time of a layer. Has all that the peer needs to do the same work.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerQuestion<'a> {
    /// The layer and its pass.
    #[serde(flatten)]
    pub work: &'a LayerWork,
    /// Sets of operands to rotate through.
    pub operand_sets: usize,
    /// Seconds to measure for.
    pub seconds: f64,
}

/// A layer's median times as the peer reports them.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct LayerAnswer {
    /// Of the pass, microseconds.
    pub time_us: f64,
    /// Of the convolution without what follows it, microseconds.
    pub conv_time_us: Option<f64>,
}

/// Asks for the throughput of a network.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NetworkQuestion<'a> {
    /// The network, as model files have it.
    pub graph: &'a Graph,
    /// Images of a batch.
    pub batch: usize,
    /// A training step instead of inference.
    pub training: bool,
    /// Whether the framework's compiler is used: PyTorch's counterpart of fusion.
    pub compile: bool,
    /// Seconds to measure for.
    pub seconds: f64,
}

/// Asks for the throughput of a network's ONNX file in a runtime.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RuntimeQuestion<'a> {
    /// The runtime, by the name that it was found under.
    pub runtime: &'a str,
    /// The file.
    pub file: &'a Path,
    /// Images of a batch.
    pub batch: usize,
    /// Seconds to measure for.
    pub seconds: f64,
}

/// A network's medians as the peer reports them.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct NetworkAnswer {
    /// Throughput.
    pub images_per_s: f64,
    /// Most bytes held at once; only a GPU tells.
    pub memory_bytes: Option<f64>,
}

/// An answer `A`, and what the peer adds in words.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Answer<A> {
    /// The numbers.
    #[serde(flatten)]
    pub values: A,
    /// How the work was done.
    pub note: Option<String>,
}

/// Asks for the peer's own peaks.
#[derive(Debug, Serialize)]
struct PeaksQuestion {
    name: &'static str,
    seconds: f64,
}

/// A question with its number and how long the peer may take.
#[derive(Debug, Serialize)]
struct Numbered<'a, Q> {
    #[serde(flatten)]
    question: &'a Q,
    id: u64,
    /// Seconds.
    limit: f64,
}

/// A peer, which is started again where a question ended it.
#[derive(Debug)]
pub struct Peer {
    python: PathBuf,
    arguments: Vec<String>,
    folder: TempDir,
    process: Option<Process>,
    restarts: u32,
    asked: u64,
}

#[derive(Debug)]
struct Process {
    child: Child,
    questions: ChildStdin,
    lines: Receiver<String>,
}

impl Peer {
    /// Starts a script on the same device with as many threads. Also returns its first line `A`, which says who answers.
    ///
    /// # Errors
    /// No such Python, one that lacks what the script needs, or no such device for it; an emulated device has no peer.
    pub fn start<A: DeserializeOwned>(python: &Path, script: PeerScript, device: &Device) -> Result<(Self, A)> {
        let (none, needs) = script.needs();
        let on = match device {
            Device::Cpu => "cpu".to_owned(),
            Device::Gpu(gpu, _) if gpu.driver().is_emulated() => {
                return Err(Error::Device(format!("{none}: Python reaches no emulated device")));
            }
            Device::Gpu(gpu, _) => format!("cuda:{}", gpu.driver().ordinal()),
        };
        let folder = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
        for (name, text) in SCRIPTS {
            let path = folder.path().join(name);
            fs::write(&path, text).map_err(|e| Error::io(&path, e))?;
        }
        let main = folder.path().join(script.file()).display().to_string();
        let (precision, threads) = (device.precision().to_string(), rayon::current_num_threads().to_string());
        let arguments = [&main, "--serve", "--device", &on, "--precision", &precision, "--threads", &threads]
            .map(str::to_owned)
            .to_vec();
        let python = python.to_owned();
        let mut peer = Self { python, arguments, folder, process: None, restarts: 0, asked: GREETING };
        let about = peer.launch().map_err(|e| {
            let text = e.to_string();
            let text = text.trim_start_matches("device: ");
            Error::Device(format!("{none}: {text}; give --python PATH with {needs} in it"))
        })?;
        Ok((peer, about))
    }

    /// Starts the process and waits for its greeting.
    fn launch<A: DeserializeOwned>(&mut self) -> Result<A> {
        let path = self.log();
        let log = File::create(&path).map_err(|e| Error::io(&path, e))?;
        let mut child = Command::new(&self.python)
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(|e| Error::Device(format!("{} does not run ({e})", self.python.display())))?;
        let questions = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped")).lines();
        let (send, lines) = channel();
        // Ends with the process, whose output it reads.
        std::thread::spawn(move || output.map_while(std::io::Result::ok).try_for_each(|line| send.send(line)));
        self.process = Some(Process { child, questions, lines });
        self.answer(GREETING, START)
    }

    /// Asks for the peer's own peaks.
    pub fn peaks(&mut self) -> PeerPeaks {
        let question = PeaksQuestion { name: "peaks", seconds: PEAKS_SECONDS };
        match self.ask::<_, PeerRates>(&question, PEAKS_LIMIT) {
            Ok(rates) => PeerPeaks::Rates(rates),
            Err(error) => PeerPeaks::Failed { error: error.to_string() },
        }
    }

    /// Asks one question and waits for its answer, which the peer is told to give within `limit`.
    ///
    /// # Errors
    /// What the peer says went wrong, that it ended or took longer, or an answer that lacks what was asked for.
    pub fn ask<Q: Serialize, A: DeserializeOwned>(&mut self, question: &Q, limit: Duration) -> Result<A> {
        if self.process.is_none() {
            if self.restarts == RESTARTS {
                return Err(Error::Device("the peer has ended too often".into()));
            }
            self.restarts += 1;
            self.launch::<IgnoredAny>()?;
        }
        self.asked += 1;
        let line = format!("{}\n", json!(Numbered { question, id: self.asked, limit: limit.as_secs_f64() }));
        let process = self.process.as_mut().expect("started above");
        if process.questions.write_all(line.as_bytes()).and_then(|()| process.questions.flush()).is_err() {
            return Err(self.ended());
        }
        self.answer(self.asked, limit + GRACE)
    }

    fn answer<A: DeserializeOwned>(&mut self, id: u64, limit: Duration) -> Result<A> {
        let start = Instant::now();
        loop {
            let process = self.process.as_ref().expect("asked only while it runs");
            let line = match process.lines.recv_timeout(limit.saturating_sub(start.elapsed())) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    // It would go on with this question before it takes another.
                    self.process = None;
                    return Err(Error::Device(format!("the peer did not answer within {} s", limit.as_secs())));
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.ended()),
            };
            let Ok(answer) = serde_json::from_str::<Value>(&line) else { continue };
            if answer["id"].as_u64() != Some(id) {
                continue;
            }
            if let Some(problem) = answer["error"].as_str() {
                return Err(Error::Device(problem.to_owned()));
            }
            return serde_json::from_value(answer)
                .map_err(|e| Error::Device(format!("the peer's answer cannot be used: {e}")));
        }
    }

    /// That it has ended, with the last that it said.
    fn ended(&mut self) -> Error {
        self.process = None;
        let log = fs::read(self.log()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let last = log.lines().rfind(|line| !line.trim().is_empty()).map(|line| format!(": {}", line.trim()));
        Error::Device(format!("the peer has ended{}", last.unwrap_or_default()))
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log.txt")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
