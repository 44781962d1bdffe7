//! Writing a file so that a reader, a full disk or a kill at any instant finds the old content or the new, never a part.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Bytes buffered before each write to the operating system.
const BUFFER_BYTES: usize = 1 << 20;
/// Ending of the temporary files.
const TEMPORARY_SUFFIX: &str = ".tmp";

/// Writes a file as a whole: `write` fills a temporary file in the same folder, which is synced and renamed over `path`.
///
/// A symbolic link is followed, so what it points to is replaced. A path that is no regular file (a pipe, a device) is
/// written directly, since it has no old content to protect.
///
/// # Errors
/// When `write` fails or the operating system refuses; then the file that was there before is untouched and the
/// temporary one is gone.
pub fn write_atomic(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let outcome = match fs::metadata(&target) {
        Ok(meta) if meta.is_dir() => Err(io::Error::other("this is a folder")),
        Ok(meta) if !meta.is_file() => File::create(&target).and_then(|file| fill(file, write).map(drop)),
        _ => replace(&target, write),
    };
    outcome.map_err(|e| Error::file(path, explain(&e, path)))
}

/// As [`write_atomic`], but leaves a file that is there, or that another process puts there meanwhile, as it is: whoever is
/// first is read by all.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_first(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let put = || {
        let mut file = temporary(path)?;
        write(file.as_file_mut())?;
        file.as_file().sync_all()?;
        match file.persist_noclobber(path) {
            Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map(drop).map_err(|e| e.error),
        }
    };
    put().map_err(|e| Error::file(path, explain(&e, path)))
}

/// Refuses a path that [`write_atomic`] could not write, as far as that can be told before there is anything to write.
///
/// # Errors
/// As [`write_atomic`].
pub fn check_writable(path: &Path) -> Result<()> {
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let outcome = match fs::metadata(&target) {
        Ok(meta) if meta.is_dir() => Err(io::Error::other("this is a folder")),
        // A pipe or a device has no temporary file beside it, and opening it could wait for a reader.
        Ok(meta) if !meta.is_file() => Ok(()),
        _ => temporary(&target).map(drop),
    };
    outcome.map_err(|e| Error::file(path, explain(&e, path)))
}

/// Removes what earlier writes to `path` left in its folder when their process was killed in the middle. Call it only
/// while nobody else writes to `path`.
pub fn remove_leftovers(path: &Path) {
    let prefix = temporary_prefix(path);
    let Ok(entries) = fs::read_dir(folder_of(path)) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(&prefix) && name.ends_with(TEMPORARY_SUFFIX) {
            // A leftover that cannot be removed costs disk space and nothing else.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// A temporary file beside `target`, which is gone when it is dropped.
fn temporary(target: &Path) -> io::Result<tempfile::NamedTempFile> {
    let prefix = temporary_prefix(target);
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(TEMPORARY_SUFFIX);
    // A temporary file is private by default; a result is as readable as any other new file.
    #[cfg(unix)]
    let all = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    #[cfg(unix)]
    builder.permissions(all);
    builder.tempfile_in(folder_of(target))
}

fn replace(target: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let (file, temporary) = temporary(target)?.into_parts();
    let file = fill(file, write)?;
    file.sync_all()?;
    drop(file);
    temporary.persist(target).map_err(|e| e.error)?;
    // The rename itself lasts only once the folder is on disk. Not every file system can sync a folder.
    if let Ok(folder) = File::open(folder_of(target)) {
        let _ = folder.sync_all();
    }
    Ok(())
}

fn fill(file: File, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<File> {
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, file);
    write(&mut out)?;
    out.into_inner().map_err(io::IntoInnerError::into_error)
}

fn temporary_prefix(path: &Path) -> String {
    format!(".{}.", path.file_name().unwrap_or_default().to_string_lossy())
}

fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// What happened and what to do, in one line.
fn explain(error: &io::Error, path: &Path) -> String {
    let remedy = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "free some space or write to another disk",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => "write to a folder that is yours",
        io::ErrorKind::NotFound => "create the folder first",
        _ => "write to another place",
    };
    let old = if path.is_file() { "; the file that was there is untouched" } else { "" };
    format!("cannot be written: {error}; {remedy}{old}")
}
