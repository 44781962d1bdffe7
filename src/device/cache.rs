//! Compiled kernels on disk: one file per content key, written whole or not at all.
//!
//! A second, read-only folder (`$DEPTHSHRINKER_KERNELS`) may hold files that were built ahead of time. A cache that
//! cannot be written costs time, never the run.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use tempfile::TempDir;

use crate::{Error, Result};

/// Bytes that the cache may hold; the least recently written files go first.
const CAPACITY: u64 = 1 << 30;

/// A folder of compiled kernels.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
    seed: Option<PathBuf>,
}

/// A file of the cache, or a temporary one where the cache cannot keep it.
#[derive(Debug)]
pub struct CacheEntry {
    path: PathBuf,
    temporary: Option<TempDir>,
}

impl CacheEntry {
    /// Where it lies, as long as `self` lives.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the cache keeps it.
    pub fn is_kept(&self) -> bool {
        self.temporary.is_none()
    }
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

    /// The same with a read-only folder of files that were brought along.
    pub fn with_seed(self, folder: impl Into<PathBuf>) -> Self {
        Self { seed: Some(folder.into()), ..self }
    }

    /// Where it lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder of files that were brought along.
    pub fn seed(&self) -> Option<&Path> {
        self.seed.as_deref()
    }

    /// The path of an entry that was brought along.
    pub fn brought(&self, name: &str) -> Option<PathBuf> {
        self.seed.iter().map(|folder| folder.join(name)).find(|path| path.is_file())
    }

    /// The path of an entry that exists.
    pub fn find(&self, name: &str) -> Option<PathBuf> {
        self.seed.iter().chain([&self.folder]).map(|folder| folder.join(name)).find(|path| path.is_file())
    }

    /// An entry, made by `make` at the path it is given if there is none. Others that look for it meanwhile wait; other
    /// entries are not held up.
    ///
    /// # Errors
    /// Whatever `make` fails with. A folder that cannot be written to, or is full, is no error: the entry is then made in
    /// a temporary folder, and goes when it is dropped.
    pub fn entry(&self, name: &str, make: impl Fn(&Path) -> Result<()>) -> Result<CacheEntry> {
        if let Some(path) = self.find(name) {
            return Ok(CacheEntry { path, temporary: None });
        }
        let kept = std::fs::create_dir_all(&self.folder)
            .map_err(|e| Error::io(&self.folder, e))
            .and_then(|()| self.make(name, &make));
        kept.or_else(|error| {
            let temporary = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
            let path = temporary.path().join(name);
            // If the kernel itself cannot be made, this fails for the same reason and reports it.
            make(&path)?;
            tracing::warn!("{error}; compiled kernels are not kept");
            Ok(CacheEntry { path, temporary: Some(temporary) })
        })
    }

    /// Makes an entry beside its place and moves it there.
    fn make(&self, name: &str, make: impl Fn(&Path) -> Result<()>) -> Result<CacheEntry> {
        let folder = &self.folder;
        let path = folder.join(name);
        let lock = folder.join(format!("{name}.lock"));
        let held = std::fs::File::create(&lock).and_then(|file| file.lock().map(|()| file));
        if !path.is_file() {
            let part = tempfile::Builder::new().prefix(".part").tempdir_in(folder).map_err(|e| Error::io(folder, e))?;
            let made = part.path().join(name);
            make(&made)?;
            // On disk before it has its name, so that a power failure leaves no half a file under it.
            std::fs::File::open(&made).and_then(|file| file.sync_all()).map_err(|e| Error::io(&made, e))?;
            std::fs::rename(&made, &path).map_err(|e| Error::io(&path, e))?;
            self.shrink(&path);
        }
        drop(held);
        // Whoever waits holds the file open, and a newcomer finds the entry.
        let _ = std::fs::remove_file(&lock);
        Ok(CacheEntry { path, temporary: None })
    }

    /// Removes the oldest entries beyond the capacity, but not the one just made.
    fn shrink(&self, newest: &Path) {
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return };
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

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path) -> Result<()> {
        std::fs::write(path, "made").map_err(|e| Error::io(path, e))
    }

    #[test]
    fn an_entry_is_made_once_and_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("new/cache"));
        let entry = cache.entry("a", write).unwrap();
        assert!(entry.is_kept() && cache.find("a").as_deref() == Some(entry.path()));
        let again = cache.entry("a", |_| panic!("made a second time")).unwrap();
        assert_eq!(std::fs::read_to_string(again.path()).unwrap(), "made");
        assert_eq!(std::fs::read_dir(cache.folder()).unwrap().count(), 1, "locks and parts are gone");
    }

    #[test]
    fn a_folder_that_cannot_be_written_costs_nothing_but_time() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        let entry = Cache::at(file.join("cache")).entry("a", write).unwrap();
        assert!(!entry.is_kept() && entry.path().is_file());
        let path = entry.path().to_owned();
        drop(entry);
        assert!(!path.exists(), "temporary files go");
    }

    #[test]
    fn a_full_folder_costs_nothing_but_time() {
        let folder = tempfile::tempdir().unwrap();
        let full = |path: &Path| {
            if path.starts_with(folder.path()) {
                std::fs::write(path, "hal").unwrap();
                return Err(Error::io(path, std::io::ErrorKind::StorageFull.into()));
            }
            write(path)
        };
        let cache = Cache::at(folder.path());
        let entry = cache.entry("a", full).unwrap();
        assert_eq!((entry.is_kept(), std::fs::read_to_string(entry.path()).unwrap().as_str()), (false, "made"));
        assert!(cache.find("a").is_none(), "half an entry is none");
    }

    #[test]
    fn what_cannot_be_made_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let refuse = |_: &Path| Err(Error::Device("cannot compile a.cu".into()));
        let error = Cache::at(folder.path()).entry("a", refuse).unwrap_err().to_string();
        assert_eq!(error, "device: cannot compile a.cu");
    }
}
