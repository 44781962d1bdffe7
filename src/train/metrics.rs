//! `metrics.jsonl`: one JSON object per epoch and line.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{Error, Result};

/// Appends lines to a metrics file, or nowhere.
#[derive(Debug, Default)]
pub struct Metrics {
    file: Option<(PathBuf, File)>,
    len: u64,
}

impl Metrics {
    /// Keeps nothing.
    pub fn nowhere() -> Self {
        Self::default()
    }

    /// Starts a new file.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn create(path: &Path) -> Result<Self> {
        let mut metrics = Self::append_to(path)?;
        metrics.truncate(0)?;
        Ok(metrics)
    }

    /// Goes on with a file.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn append_to(path: &Path) -> Result<Self> {
        let open = || {
            let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
            let len = file.seek(SeekFrom::End(0))?;
            Ok((file, len))
        };
        let (file, len) = open().map_err(|e| Error::io(path, e))?;
        Ok(Self { file: Some((path.to_owned(), file)), len })
    }

    /// Bytes written so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing has been written.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets everything behind `len` bytes; a shorter file stays as it is.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn truncate(&mut self, len: u64) -> Result<()> {
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        if len < self.len {
            file.set_len(len).and_then(|()| file.seek(SeekFrom::Start(len))).map_err(|e| Error::io(&path, e))?;
            self.len = len;
        }
        Ok(())
    }

    /// Appends a line.
    ///
    /// # Errors
    /// When it cannot be written; no part of it is left then.
    pub fn append(&mut self, record: &Map<String, Value>) -> Result<()> {
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        let mut line = serde_json::to_string(record).map_err(|e| Error::file(&path, e.to_string()))?;
        line.push('\n');
        if let Err(e) = file.write_all(line.as_bytes()) {
            // What was written of the line must not be taken for a line.
            let _ = file.set_len(self.len);
            return Err(Error::file(path, format!("cannot be written: {e}; free some space and go on with --resume")));
        }
        self.len += line.len() as u64;
        Ok(())
    }

    /// Waits until all lines are on disk.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn sync(&mut self) -> Result<()> {
        match &mut self.file {
            Some((path, file)) => file.sync_data().map_err(|e| Error::io(path, e)),
            None => Ok(()),
        }
    }
}
