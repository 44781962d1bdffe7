//! Opening what is to be read: pictures, weights and data sets lie in regular files, settings may come through a pipe.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use crate::{Error, Result};

/// Largest text that is read: settings and plans have kilobytes.
const MAX_TEXT: u64 = 16 << 20;

/// Opens a regular file, or a link to one. Everything else is refused before it is opened: a named pipe without a writer
/// would never open, and a device may never end.
///
/// # Errors
/// What the operating system says, or what the path is instead.
pub fn open(path: &Path) -> Result<File> {
    let kind = fs::metadata(path).map_err(|e| Error::io(path, e))?.file_type();
    if !kind.is_file() {
        return Err(Error::file(path, format!("is {}, not a regular file; leave it out or replace it", name(kind))));
    }
    File::open(path).map_err(|e| Error::io(path, e))
}

/// Reads a text of moderate size, from a file or through a pipe.
///
/// # Errors
/// What the operating system says, or a text beyond 16 MiB.
pub fn read_text(path: &Path) -> Result<String> {
    let mut text = String::new();
    let read = |text: &mut String| File::open(path)?.take(MAX_TEXT + 1).read_to_string(text);
    read(&mut text).map_err(|e| Error::io(path, e))?;
    if text.len() as u64 > MAX_TEXT {
        return Err(Error::file(path, format!("is longer than {} MiB, so it holds no settings", MAX_TEXT >> 20)));
    }
    Ok(text)
}

/// What a path is that is no regular file, with its article.
fn name(kind: fs::FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return "a named pipe";
        } else if kind.is_socket() {
            return "a socket";
        } else if kind.is_char_device() || kind.is_block_device() {
            return "a device";
        }
    }
    if kind.is_dir() { "a folder" } else { "something else" }
}
