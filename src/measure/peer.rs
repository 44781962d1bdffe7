//! The same work in PyTorch: a Python process that answers one line of JSON with another.
//!
//! The scripts (`benches/peers`) are part of this program and are written to a temporary folder. A question has a number,
//! which its answer repeats; any other line that the process prints is no answer.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::device::Device;
use crate::{Error, Result};

/// How long Python may take to load PyTorch.
const START: Duration = Duration::from_secs(120);
/// How much longer than its limit an answer is waited for: the peer gives up on its own first, and tells so.
const GRACE: Duration = Duration::from_secs(5);
/// How often a peer that has ended is started again: one question may end it, such as for want of memory.
const RESTARTS: u32 = 3;
/// The number that the line of greeting answers.
const GREETING: u64 = 0;

const SCRIPTS: [(&str, &str); 3] = [
    ("clock.py", include_str!("../../benches/peers/clock.py")),
    ("layers.py", include_str!("../../benches/peers/layers.py")),
    ("networks.py", include_str!("../../benches/peers/networks.py")),
];

/// Which script answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerScript {
    /// Single layers.
    Layers,
    /// Whole networks.
    Networks,
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
    /// What it is: framework, versions, device.
    pub about: Value,
}

#[derive(Debug)]
struct Process {
    child: Child,
    questions: ChildStdin,
    lines: Receiver<String>,
}

impl Peer {
    /// Starts a script on the same device, with as many threads.
    ///
    /// # Errors
    /// No such Python, no PyTorch in it, or no such device for it; an emulated device has no peer.
    pub fn start(python: &Path, script: PeerScript, device: &Device) -> Result<Self> {
        let on = match device {
            Device::Cpu => "cpu".to_owned(),
            Device::Gpu(gpu, _) if gpu.driver().is_emulated() => {
                return Err(Error::Device("no peer: PyTorch runs on no emulated device".into()));
            }
            Device::Gpu(gpu, _) => format!("cuda:{}", gpu.driver().ordinal()),
        };
        let folder = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
        for (name, text) in SCRIPTS {
            let path = folder.path().join(name);
            fs::write(&path, text).map_err(|e| Error::io(&path, e))?;
        }
        let main = match script {
            PeerScript::Layers => "layers.py",
            PeerScript::Networks => "networks.py",
        };
        let main = folder.path().join(main).display().to_string();
        let (precision, threads) = (device.precision().to_string(), rayon::current_num_threads().to_string());
        let arguments = [&main, "--serve", "--device", &on, "--precision", &precision, "--threads", &threads]
            .map(str::to_owned)
            .to_vec();
        let python = python.to_owned();
        let mut peer =
            Self { python, arguments, folder, process: None, restarts: 0, asked: GREETING, about: Value::Null };
        peer.about = peer.launch().map_err(|e| {
            let text = e.to_string();
            let text = text.trim_start_matches("device: ");
            Error::Device(format!("no peer: {text}; give --python PATH with PyTorch in it"))
        })?;
        Ok(peer)
    }

    /// Starts the process and waits for its greeting.
    fn launch(&mut self) -> Result<Value> {
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

    /// Asks one question and waits for its answer, which the peer is told to give within `limit`.
    ///
    /// # Errors
    /// What the peer says went wrong, or that it ended or took longer.
    pub fn ask(&mut self, question: &Map<String, Value>, limit: Duration) -> Result<Value> {
        if self.process.is_none() {
            if self.restarts == RESTARTS {
                return Err(Error::Device("the peer has ended too often".into()));
            }
            self.restarts += 1;
            self.launch()?;
        }
        self.asked += 1;
        let mut question = question.clone();
        question.insert("id".into(), json!(self.asked));
        question.insert("limit".into(), json!(limit.as_secs_f64()));
        let line = format!("{}\n", Value::Object(question));
        let process = self.process.as_mut().expect("started above");
        if process.questions.write_all(line.as_bytes()).and_then(|()| process.questions.flush()).is_err() {
            return Err(self.ended());
        }
        self.answer(self.asked, limit + GRACE)
    }

    fn answer(&mut self, id: u64, limit: Duration) -> Result<Value> {
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
            let Ok(Value::Object(mut answer)) = serde_json::from_str(&line) else { continue };
            if answer.remove("id").and_then(|own| own.as_u64()) != Some(id) {
                continue;
            }
            return match answer.get("error").and_then(Value::as_str) {
                Some(problem) => Err(Error::Device(problem.to_owned())),
                None => Ok(Value::Object(answer)),
            };
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
