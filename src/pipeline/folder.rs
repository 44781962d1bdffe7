//! The folder of a run: its files, and when an old run in it may be touched.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use super::run::Datasets;
use crate::config::Config;
use crate::data::Contents;
use crate::graph::Graph;
use crate::io::checkpoint::{file_fingerprint, fingerprint};
use crate::io::{Checkpoint, FolderLock, write_atomic};
use crate::train::{Reporter, Session, TrainConfig};
use crate::{Error, Result};

/// The settings of the run; where it is, there is one.
const CONFIG: &str = "config.toml";
/// Where the run can go on, and in the end what it was started with.
const CHECKPOINT: &str = "checkpoint.safetensors";
/// Everything a run may leave in its folder; nothing else there is ever touched.
const FILES: [&str; 15] = [
    CONFIG,
    "metrics.jsonl",
    CHECKPOINT,
    "original.safetensors",
    "searched.safetensors",
    "expanded.safetensors",
    "latency.csv",
    "latency-pruned.csv",
    "importance.csv",
    "plan.json",
    "shrunk.safetensors",
    "merged.safetensors",
    "merged.onnx",
    "result.json",
    "report.html",
];

/// How to treat an existing run in the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Refuse.
    New,
    /// Remove its files and start anew.
    Force,
    /// Resume it.
    Resume,
}

/// Description of a run for its folder.
#[derive(Debug, Clone, Copy)]
pub struct RunSpec<'a> {
    /// The command.
    pub command: &'a str,
    /// Its settings.
    pub config: &'a Config,
    /// The model files that it reads.
    pub models: &'a [&'a Path],
    /// Its images.
    pub data: &'a Datasets,
    /// The file of the folder that it ends by writing.
    pub last: &'a str,
    /// What it writes, in bytes ([`Space`]).
    pub bytes: u64,
}

/// What a run writes.
#[derive(Debug, Clone, Copy)]
pub struct Space<'a> {
    /// Files of the size of a model.
    pub models: u64,
    /// The stages, which keep checkpoints.
    pub stages: &'a [&'a TrainConfig],
}

impl Space<'_> {
    /// Bytes that the files of a run on this network take together. A checkpoint is there twice while it is replaced.
    ///
    /// # Errors
    /// A malformed graph.
    pub fn bytes(&self, graph: &Graph) -> Result<u64> {
        let model: usize = graph.params()?.iter().map(|param| param.len() * size_of::<f32>()).sum();
        let buffers = self.stages.iter().map(|stage| stage.optimizer.buffers() as u64).max().unwrap_or(0);
        Ok(model as u64 * (self.models + 2 * (1 + buffers)))
    }
}

/// The folder of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
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

    /// Whether there is a run, finished or not.
    pub fn has_run(&self) -> bool {
        self.has(CONFIG)
    }

    /// The configuration that the run in the folder was started with.
    ///
    /// # Errors
    /// A folder without a run, or a file that cannot be read.
    pub fn config(&self) -> Result<Config> {
        if !self.has(CONFIG) {
            return Err(self.no_run());
        }
        Config::read(&self.path(CONFIG))
    }

    /// Enters the folder for a run: makes and locks it, writes `config.toml` and opens the session. A run that was
    /// interrupted before its first checkpoint is resumed by starting over.
    ///
    /// # Errors
    /// [`Error::Config`] when a run is there that may not be touched, is in use by another process or was made with other
    /// settings, or when there is none to go on with; [`Error::Data`] when the images are not those it was started with; or
    /// what the operating system says of the folder.
    pub fn enter(&self, run: &RunSpec<'_>, entry: Entry, quiet: bool) -> Result<Session> {
        if let Err(refused) = self.check_entry(run, entry) {
            // While the run there is live, what the refusal advises could not be done either.
            FolderLock::check_free(&self.dir)?;
            return Err(refused);
        }
        // An image that cannot be read is told before anything is made or removed.
        let contents = run.data.contents()?;
        std::fs::create_dir_all(&self.dir).map_err(|e| Error::io(&self.dir, e))?;
        let lock = FolderLock::acquire(&self.dir)?;
        // Another process may have begun or ended a run here before the lock was had.
        self.check_entry(run, entry)?;
        if entry == Entry::Force {
            self.clear()?;
        }
        self.check_space(run.bytes);
        let settings = run.fingerprint(None)?;
        let (checkpoint, metrics) = (self.path(CHECKPOINT), self.path("metrics.jsonl"));
        let mut session = if checkpoint.is_file() {
            let mut saved = Checkpoint::read(&checkpoint)?;
            self.check_settings(run, &mut saved, &settings)?;
            self.check_data(&contents, &saved.data)?;
            self.note_place(run.config)?;
            Session::resume(saved, &checkpoint, &metrics, settings)?
        } else {
            let echo = run.config.to_toml()?;
            // What a run of other settings has measured before its first checkpoint says nothing of this one.
            if self.has(CONFIG) && self.has_other_settings(run, &settings)? {
                self.spare(run.models)?;
                self.clear()?;
            }
            write_atomic(&self.path(CONFIG), |out| out.write_all(echo.as_bytes()))?;
            Session::start(&checkpoint, &metrics, settings)?
        };
        session.data = json!(contents);
        session.lock = Some(lock);
        if quiet {
            session.reporter = Reporter::quiet();
        }
        Ok(session)
    }

    /// Refuses to enter a folder whose run is not to be touched so, and leaves nothing behind then.
    fn check_entry(&self, run: &RunSpec<'_>, entry: Entry) -> Result<()> {
        let dir = self.dir.display();
        let refused = match entry {
            Entry::New if self.has(run.last) => {
                format!("{dir} holds a finished run; give another --out, or --force to replace it")
            }
            Entry::New if self.has(CONFIG) => {
                format!("{dir} holds an unfinished run; --resume goes on with it, --force replaces it")
            }
            Entry::Resume if !self.has(CONFIG) => return Err(self.no_run()),
            Entry::Force => return self.spare(run.models),
            Entry::New | Entry::Resume => return Ok(()),
        };
        Err(Error::Config(refused))
    }

    /// Warns where the run, which writes so many bytes in all, will not fit on the disk.
    fn check_space(&self, bytes: u64) {
        // Where the system does not say, there is nothing to compare.
        let Ok(free) = fs4::available_space(&self.dir) else { return };
        // What a part of the run before this one has written is replaced.
        let there = FILES.iter().filter_map(|file| self.path(file).metadata().ok()).map(|meta| meta.len()).sum();
        let bytes = bytes.saturating_sub(there);
        if free < bytes {
            let (free, bytes) = (free as f64 / 1e6, bytes as f64 / 1e6);
            tracing::warn!(
                "{}: {free:.1} MB are free here and the run writes about {bytes:.1} MB; free some space, or give an --out \
                 on another disk",
                self.dir.display()
            );
        }
    }

    /// Refuses to go on with other settings, which are `now`, than those of the checkpoint. In one that was written when the
    /// place of the images was a setting, that place is taken from `config.toml`, and it is left out from now on.
    fn check_settings(&self, run: &RunSpec<'_>, saved: &mut Checkpoint, now: &str) -> Result<()> {
        let Err(refused) = saved.check_fingerprint(now) else { return Ok(()) };
        let before = run.fingerprint(self.config()?.data.dir)?;
        saved.check_fingerprint(&before).map_err(|_| self.other_settings(refused))?;
        now.clone_into(&mut saved.fingerprint);
        saved.write(&self.path(CHECKPOINT))
    }

    /// Whether the run here was started with other settings than those of a fingerprint, by its `config.toml`.
    fn has_other_settings(&self, run: &RunSpec<'_>, settings: &str) -> Result<bool> {
        let old = RunSpec { config: &self.config()?, ..*run };
        Ok(old.fingerprint(None)? != settings)
    }

    /// Refuses to go on with other images than the run was started with.
    fn check_data(&self, is: &[Contents; 2], was: &Value) -> Result<()> {
        if was.is_null() {
            return Ok(());
        }
        let was = <[Contents; 2]>::deserialize(was)
            .map_err(|e| Error::file(self.path(CHECKPOINT), format!("what it says of its data: {e}")))?;
        let parts = is.iter().zip(&was).zip(["train", "test"]);
        let differences: Vec<String> = parts.filter_map(|((is, was), part)| is.difference(was, part)).collect();
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::Data(format!(
            "the run in {} was started with other images ({}); put them back, give the place of the old ones with \
             --data-dir, or start again with --force",
            self.dir.display(),
            differences.join("; ")
        )))
    }

    /// Writes the place of the data into `config.toml` where it has changed: the next resume is to find them there.
    fn note_place(&self, config: &Config) -> Result<()> {
        let mut own = self.config()?;
        if own.data.dir == config.data.dir {
            return Ok(());
        }
        own.data.dir.clone_from(&config.data.dir);
        self.write(CONFIG, &own.to_toml()?)
    }

    /// Whether the run in the folder has these settings and model files ([`settings_fingerprint`]).
    ///
    /// # Errors
    /// A checkpoint that cannot be read.
    pub(super) fn has_settings(&self, settings: &str) -> Result<bool> {
        Ok(Checkpoint::read(&self.path(CHECKPOINT))?.check_fingerprint(settings).is_ok())
    }

    /// Writes a text file of the run atomically.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        write_atomic(&self.path(file), |out| out.write_all(text.as_bytes()))
    }

    /// Refuses to remove with an old run what the new one starts from.
    fn spare(&self, models: &[&Path]) -> Result<()> {
        let old: Vec<PathBuf> = FILES.iter().filter_map(|file| self.path(file).canonicalize().ok()).collect();
        match models.iter().find(|model| model.canonicalize().is_ok_and(|model| old.contains(&model))) {
            Some(model) => Err(Error::Config(format!(
                "--force would remove {} with the run it is of; give another --out",
                model.display()
            ))),
            None => Ok(()),
        }
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

    /// Starting anew instead would be hours of the wrong work for a slip in `--out`.
    fn no_run(&self) -> Error {
        Error::Config(format!(
            "{} holds no run to go on with; give the --out of one, or leave out --resume to start one",
            self.dir.display()
        ))
    }

    fn other_settings(&self, error: Error) -> Error {
        match error {
            Error::Config(_) => Error::Config(format!(
                "the run in {0} was started with other settings or other model files; --resume takes them from \
                 {0}/config.toml, so leave out what differs, or give another --out or --force",
                self.dir.display()
            )),
            other => other,
        }
    }
}

impl RunSpec<'_> {
    /// What decides the weights that a run ends with. Threads, measurement and the batch of evaluations may change from one
    /// part of a run to the next: an evaluation that ran out of memory must be able to go on with fewer images. Model files
    /// and images are what they hold, wherever they lie: `data_dir` is `None` but for checkpoints that say where.
    fn fingerprint(&self, data_dir: Option<PathBuf>) -> Result<String> {
        let models: Vec<String> = self.models.iter().map(|path| file_fingerprint(path)).collect::<Result<_>>()?;
        settings_fingerprint(self.command, self.config, &models, data_dir)
    }
}

/// As [`RunSpec::fingerprint`], of model files that were read already.
pub(super) fn settings_fingerprint(
    command: &str,
    config: &Config,
    models: &[String],
    data_dir: Option<PathBuf>,
) -> Result<String> {
    let mut config = config.clone();
    let Config { measure, evaluate, .. } = Config::default();
    (config.threads, config.measure, config.evaluate) = (0, measure, evaluate);
    (config.model, config.finetune.teacher, config.data.dir) = (None, None, data_dir);
    fingerprint(&(command, config, models))
}
