//! The folder of a run: its files, and when an old run in it may be touched.

use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::io::checkpoint::fingerprint;
use crate::io::write_atomic;
use crate::train::{Reporter, Session};
use crate::{Error, Result};

/// Everything a run may leave in its folder; nothing else there is ever touched.
const FILES: [&str; 11] = [
    "config.toml",
    "metrics.jsonl",
    "checkpoint.safetensors",
    "original.safetensors",
    "searched.safetensors",
    "plan.json",
    "shrunk.safetensors",
    "merged.safetensors",
    "merged.onnx",
    "result.json",
    "report.html",
];

/// What to do about a run that is in the folder already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Refuse.
    New,
    /// Remove its files and start anew.
    Force,
    /// Go on with it.
    Resume,
}

/// The folder of a run.
#[derive(Debug, Clone)]
pub struct RunFolder {
    dir: PathBuf,
}

impl RunFolder {
    /// The folder `dir`, whether or not it exists.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The folder itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A file of the run.
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    /// Whether the run has written a file.
    pub fn has(&self, file: &str) -> bool {
        self.path(file).is_file()
    }

    /// The configuration that the run in the folder was started with, if there is one.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn config(&self) -> Result<Option<Config>> {
        let path = self.path("config.toml");
        if path.is_file() { Config::read(&path).map(Some) } else { Ok(None) }
    }

    /// Enters the folder for a run of `command`, which ends by writing `last`: makes the folder, writes `config.toml` and
    /// opens the session. A run that was interrupted before its first checkpoint is resumed by starting over.
    ///
    /// # Errors
    /// [`Error::Config`] when a run is there that may not be touched or was made with other settings, or what the
    /// operating system says of the folder.
    pub fn enter(&self, command: &str, config: &Config, entry: Entry, last: &str, quiet: bool) -> Result<Session> {
        let dir = self.dir.display();
        match entry {
            Entry::New if self.has(last) => {
                return Err(Error::Config(format!(
                    "{dir} holds a finished run; give another --out, or --force to replace it"
                )));
            }
            Entry::New if self.has("config.toml") => {
                return Err(Error::Config(format!(
                    "{dir} holds an unfinished run; --resume goes on with it, --force replaces it"
                )));
            }
            Entry::Force => self.clear()?,
            Entry::New | Entry::Resume => {}
        }
        std::fs::create_dir_all(&self.dir).map_err(|e| Error::io(&self.dir, e))?;
        let settings = fingerprint(&(command, decisive(config)))?;
        let (checkpoint, metrics) = (self.path("checkpoint.safetensors"), self.path("metrics.jsonl"));
        let mut session = if checkpoint.is_file() {
            Session::resume(&checkpoint, &metrics, settings).map_err(|e| self.other_settings(e))?
        } else {
            let echo = config.to_toml()?;
            write_atomic(&self.path("config.toml"), |out| out.write_all(echo.as_bytes()))?;
            Session::start(&checkpoint, &metrics, settings)?
        };
        if quiet {
            session.reporter = Reporter::quiet();
        }
        Ok(session)
    }

    /// Writes a text file of the run atomically.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        write_atomic(&self.path(file), |out| out.write_all(text.as_bytes()))
    }

    fn clear(&self) -> Result<()> {
        for file in FILES {
            let path = self.path(file);
            match std::fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&path, e)),
                _ => {}
            }
        }
        Ok(())
    }

    fn other_settings(&self, error: Error) -> Error {
        match error {
            Error::Config(_) => Error::Config(format!(
                "the run in {0} was started with other settings; --resume takes them from {0}/config.toml, so leave out \
                 what differs, or give another --out or --force",
                self.dir.display()
            )),
            other => other,
        }
    }
}

/// The settings that decide the weights a run ends with. Threads, measurement and the batch of evaluations may change from one
/// part of a run to the next: an evaluation that ran out of memory must be able to go on with fewer images.
fn decisive(config: &Config) -> Config {
    let Config { measure, evaluate, .. } = Config::default();
    Config { threads: 0, measure, evaluate, ..config.clone() }
}
