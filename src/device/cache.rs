//! Compiled kernels on disk: one file per content key, written whole or not at all.
//!
//! A second, read-only folder (`$DEPTHSHRINKER_KERNELS`) may hold files that were built ahead of time. A cache that
//! cannot be written costs time, never the run.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::{Error, Result};

/// Bytes that the cache may hold; the least recently written files go first.
const CAPACITY: u64 = 1 << 30;

/// A folder of compiled kernels.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
    seed: Option<PathBuf>,
}

impl Cache {
    /// The user's cache: `$DEPTHSHRINKER_CACHE`, else the place the system has for caches.
    pub fn of_user() -> Self {
        let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let folder = set("DEPTHSHRINKER_CACHE").unwrap_or_else(|| {
            let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
            base.unwrap_or_else(std::env::temp_dir).join("depthshrinker")
        });
        Self { folder, seed: set("DEPTHSHRINKER_KERNELS") }
    }

    /// A cache in a folder of one's choice.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), seed: None }
    }

    /// Where it lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The path of an entry that exists.
    pub fn find(&self, name: &str) -> Option<PathBuf> {
        self.seed.iter().chain([&self.folder]).map(|folder| folder.join(name)).find(|path| path.is_file())
    }

    /// The path of an entry, made by `make` into the path it is given if there is none. Others that look for it
    /// meanwhile wait; other entries are not held up.
    ///
    /// # Errors
    /// Whatever `make` fails with. A folder that cannot be written is no error: the entry is then made in a temporary
    /// folder of this process.
    pub fn entry(&self, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        if let Some(path) = self.find(name) {
            return Ok(path);
        }
        let folder = match std::fs::create_dir_all(&self.folder).and_then(|()| tempfile::tempfile_in(&self.folder)) {
            Ok(_) => self.folder.clone(),
            Err(error) => {
                let own = std::env::temp_dir().join(format!("depthshrinker-{}", std::process::id()));
                std::fs::create_dir_all(&own).map_err(|e| Error::io(&own, e))?;
                tracing::warn!("{}: {error}; compiled kernels are not kept", self.folder.display());
                own
            }
        };
        let path = folder.join(name);
        let lock = folder.join(format!("{name}.lock"));
        let held = std::fs::File::create(&lock).and_then(|file| file.lock().map(|()| file));
        if !path.is_file() {
            let part =
                tempfile::Builder::new().prefix(".part").tempdir_in(&folder).map_err(|e| Error::io(&folder, e))?;
            let made = part.path().join(name);
            make(&made)?;
            std::fs::rename(&made, &path).map_err(|e| Error::io(&path, e))?;
            self.shrink(&folder, &path);
        }
        drop(held);
        // Whoever waits holds the file open, and a newcomer finds the entry.
        let _ = std::fs::remove_file(&lock);
        Ok(path)
    }

    /// Removes the oldest entries beyond the capacity, but not the one just made.
    fn shrink(&self, folder: &Path, newest: &Path) {
        let Ok(entries) = std::fs::read_dir(folder) else { return };
        let mut files: Vec<(SystemTime, u64, PathBuf)> = entries
            .flatten()
            .filter_map(|entry| {
                let meta = entry.metadata().ok().filter(std::fs::Metadata::is_file)?;
                Some((meta.modified().ok()?, meta.len(), entry.path()))
            })
            .collect();
        files.sort();
        let mut total: u64 = files.iter().map(|file| file.1).sum();
        for (_, len, path) in files {
            if total <= CAPACITY {
                break;
            }
            if path != newest && std::fs::remove_file(&path).is_ok() {
                total -= len;
            }
        }
    }
}
