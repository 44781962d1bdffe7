//! A lock on a folder that one process at a time holds. The operating system releases it with the process, however that
//! ends, so a lock that was left behind binds nobody.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use crate::{Error, Result, terminal};

/// The locked file. It stays in the folder: removing it would let one process lock the old file and another a new one.
const FILE: &str = ".lock";
/// Most bytes that are read of who holds a lock.
const MAX_HOLDER: u64 = 300;

/// How often and how long a lock is waited for.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(20);

/// A folder that this process has for itself, until it is dropped.
#[derive(Debug)]
pub struct FolderLock {
    /// Unlocked when it is closed. `None` on a file system without locks.
    _file: Option<File>,
}

impl FolderLock {
    /// Locks a folder that exists, and notes there who did.
    ///
    /// # Errors
    /// [`Error::Config`] that names the process that holds it, or what the operating system says.
    pub fn acquire(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let io = |e| Error::io(&path, e);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(io)?;
        match patiently(&file) {
            Ok(()) => {
                let holder = format!("process {} on {}", std::process::id(), host());
                // Who holds it is told for convenience; the lock holds on a full disk, too.
                if let Err(error) = file.set_len(0).and_then(|()| file.write_all(holder.as_bytes())) {
                    tracing::debug!("{}: {error}", path.display());
                }
                Ok(Self { _file: Some(file) })
            }
            Err(TryLockError::WouldBlock) => Err(in_use(folder, &mut file)),
            Err(TryLockError::Error(error)) => {
                tracing::warn!(
                    "{}: {error}; files cannot be locked here, so make sure that no other process uses this folder",
                    folder.display()
                );
                Ok(Self { _file: None })
            }
        }
    }

    /// Refuses a folder that a live process holds. Leaves nothing behind in one that none does.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire) where it is held.
    pub fn check_free(folder: &Path) -> Result<()> {
        // Without the file, or where it cannot be read, nobody is known to hold it.
        let Ok(mut file) = File::open(folder.join(FILE)) else { return Ok(()) };
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => Err(in_use(folder, &mut file)),
            _ => Ok(()),
        }
    }
}

/// Tries for a moment: whoever only looks whether a folder is free holds its lock as long as that takes.
fn patiently(file: &File) -> std::result::Result<(), TryLockError> {
    for _ in 0..TRIES {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
            outcome => return outcome,
        }
    }
    file.try_lock()
}

fn in_use(folder: &Path, file: &mut File) -> Error {
    let mut holder = String::new();
    // It may not have written its name yet; some systems lock reading, too.
    let read = file.take(MAX_HOLDER).read_to_string(&mut holder);
    if read.is_err() || holder.is_empty() {
        holder = "another process".to_owned();
    }
    Error::Config(format!(
        "{} is in use by {}; wait until it ends or stop it, or give another --out",
        folder.display(),
        terminal::one_line(&holder)
    ))
}

fn host() -> String {
    gethostname::gethostname().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holds_it_at_a_time_and_is_named() {
        let folder = tempfile::tempdir().unwrap();
        FolderLock::check_free(folder.path()).unwrap();
        assert!(!folder.path().join(FILE).exists(), "a look leaves nothing behind");
        let held = FolderLock::acquire(folder.path()).unwrap();
        for refused in [FolderLock::acquire(folder.path()).map(drop), FolderLock::check_free(folder.path())] {
            let text = refused.unwrap_err().to_string();
            let own = format!("in use by process {} on {}", std::process::id(), host());
            assert!(text.contains(&own) && text.contains("--out"), "{text}");
        }
        drop(held);
        FolderLock::check_free(folder.path()).unwrap();
        // What a dead process wrote binds nobody, and a longer text does not outlive a shorter one.
        std::fs::write(folder.path().join(FILE), "process 1 on a machine with a long name ".repeat(3)).unwrap();
        let held = FolderLock::acquire(folder.path()).unwrap();
        let text = std::fs::read_to_string(folder.path().join(FILE)).unwrap();
        assert_eq!(text, format!("process {} on {}", std::process::id(), host()));
        drop(held);
    }
}
