//! What people read: text that no terminal takes for commands, and lines to standard error that may get lost.
//!
//! File names, class names and messages of other programs may hold anything. A line end among them would pass for a
//! message of this program, an escape sequence would move the cursor or set the window's title.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};
use std::path::Path;

use anstream::{AutoStream, ColorChoice};

/// A text as one line: control characters, line ends included, and characters that turn the direction of writing are
/// escaped as in JSON.
///
/// ```
/// use depthshrinker::terminal::one_line;
///
/// assert_eq!(one_line("a\nb\u{1b}[31m"), "a\\nb\\u001b[31m");
/// assert_eq!(one_line("größer"), "größer");
/// ```
pub fn one_line(text: &str) -> Cow<'_, str> {
    escaped(text, is_unprintable)
}

/// As [`one_line`], but line ends stay.
pub fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c != '\n' && is_unprintable(c))
}

/// A path as one line; what is not UTF-8 in it is shown as replacement characters.
pub fn path(path: &Path) -> String {
    one_line(&path.to_string_lossy()).into_owned()
}

/// The first `limit` characters of a text, with a mark where that is not all: a file may hold a line of megabytes.
pub fn start(text: &str, limit: usize) -> Cow<'_, str> {
    match text.char_indices().nth(limit) {
        Some((end, _)) => Cow::Owned(format!("{}…", &text[..end])),
        None => Cow::Borrowed(text),
    }
}

/// Writes a line to standard error. It is for people alone: where it cannot be written, since its reader has gone or the
/// disk is full, there is nobody to tell and the work goes on.
pub fn tell(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", one_line(line));
}

/// Whether standard error is to be coloured: on a terminal that can, unless `NO_COLOR` is set. The rule is that of the
/// help texts.
pub fn is_coloured() -> bool {
    AutoStream::choice(&io::stderr()) != ColorChoice::Never
}

/// Whether a progress bar can be drawn on standard error: on a terminal that moves its cursor.
pub fn has_bars() -> bool {
    io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

fn escaped(text: &str, escape: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&escape) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            c if !escape(c) => out.push(c),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c => out.push_str(&format!("\\u{:04x}", u32::from(c))),
        }
    }
    Cow::Owned(out)
}

/// Control characters, other line ends, and marks that turn the direction of what follows.
fn is_unprintable(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_a_terminal_obeys_is_escaped_and_the_rest_stays() {
        let rows = [
            ("", ""),
            ("naïve 画像 \\ \"x\"", "naïve 画像 \\ \"x\""),
            ("a\r\nb\tc", "a\\r\\nb\\tc"),
            ("\u{0}\u{7}\u{8}\u{1b}]0;title\u{7}", "\\u0000\\u0007\\u0008\\u001b]0;title\\u0007"),
            ("\u{7f}\u{9b}31m", "\\u007f\\u009b31m"),
            ("gpj.\u{202e}exe\u{2066}", "gpj.\\u202eexe\\u2066"),
            ("\u{2028}\u{2029}", "\\u2028\\u2029"),
        ];
        for (text, expected) in rows {
            assert_eq!(one_line(text), expected, "{text:?}");
        }
        assert_eq!(lines("a\nb\u{1b}\n"), "a\nb\\u001b\n");
        assert_eq!([0, 2, 3].map(|limit| start("aé猫", limit)), ["…", "aé…", "aé猫"]);
        // Inside a string of JSON the escape means what it stands for.
        let json = serde_json::to_string("x\u{7f}\u{85}\n").unwrap();
        assert_eq!(serde_json::from_str::<String>(&lines(&json)).unwrap(), "x\u{7f}\u{85}\n");
    }

    #[cfg(unix)]
    #[test]
    fn a_path_that_is_no_text_is_shown() {
        let name = std::os::unix::ffi::OsStrExt::from_bytes(b"a\xff\x1b.png");
        assert_eq!(path(Path::new::<std::ffi::OsStr>(name)), "a\u{fffd}\\u001b.png");
    }
}
