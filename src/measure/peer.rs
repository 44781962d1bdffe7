//! The same work in PyTorch: a Python process that answers one line of JSON with another.
//!
//! The scripts (`benches/peers`) are part of this program and are written to a temporary folder.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::device::Device;
use crate::{Error, Result};

/// How long Python may take to load PyTorch.
const START: Duration = Duration::from_secs(120);

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

/// A running peer.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    questions: ChildStdin,
    answers: Receiver<String>,
    /// What it is: framework, versions, device.
    pub about: Value,
    _folder: TempDir,
}

impl Peer {
    /// Starts a script on the same kind of device, with as many threads.
    ///
    /// # Errors
    /// No such Python, no PyTorch in it, or no such device for it; an emulated device has no peer.
    pub fn start(python: &Path, script: PeerScript, device: &Device) -> Result<Self> {
        let failed = |what: String| Error::Device(format!("no peer: {what}; give --python PATH with PyTorch in it"));
        let on = match device {
            Device::Cpu => "cpu",
            Device::Gpu(gpu, _) if gpu.driver().is_emulated() => {
                return Err(Error::Device("no peer: PyTorch runs on no emulated device".into()));
            }
            Device::Gpu(..) => "cuda",
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
        let mut child = Command::new(python)
            .arg(folder.path().join(main))
            .args(["--serve", "--device", on, "--precision", &device.precision().to_string()])
            .args(["--threads", &rayon::current_num_threads().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| failed(format!("{} does not run ({e})", python.display())))?;
        let questions = child.stdin.take().expect("piped");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let (send, answers) = channel();
        // Ends with the process, whose output it reads.
        std::thread::spawn(move || lines.map_while(std::io::Result::ok).try_for_each(|line| send.send(line)));
        let mut peer = Self { child, questions, answers, about: Value::Null, _folder: folder };
        peer.about = peer.answer(START).map_err(|e| failed(e.to_string()))?;
        Ok(peer)
    }

    /// Asks one question and waits for its answer.
    ///
    /// # Errors
    /// What the peer says went wrong, or that it ended or took longer than `limit`: it then answers no more.
    pub fn ask(&mut self, question: &Value, limit: Duration) -> Result<Value> {
        let gone = |e| Error::Device(format!("the peer has ended ({e})"));
        writeln!(self.questions, "{question}").and_then(|()| self.questions.flush()).map_err(gone)?;
        self.answer(limit)
    }

    fn answer(&mut self, limit: Duration) -> Result<Value> {
        let line = self.answers.recv_timeout(limit).map_err(|e| match e {
            RecvTimeoutError::Timeout => {
                // A late answer would be taken for the next question's.
                let _ = self.child.kill();
                Error::Device(format!("the peer did not answer within {} s", limit.as_secs()))
            }
            RecvTimeoutError::Disconnected => Error::Device("the peer has ended".into()),
        })?;
        let answer: Value = serde_json::from_str(&line).unwrap_or_else(|_| json!({ "error": line }));
        match answer.get("error").and_then(Value::as_str) {
            Some(problem) => Err(Error::Device(problem.to_owned())),
            None => Ok(answer),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
