//! Tables in CSV files whose columns have names. Every complaint names the file and the line.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use csv::{ReaderBuilder, StringRecord, Trim};

use crate::{Error, Result};

/// Largest file that is read as a table, in bytes; the largest published one has 10 thousand.
const MAX_BYTES: u64 = 64 << 20;

/// A CSV file with a header.
#[derive(Debug, Clone)]
pub struct CsvTable {
    path: PathBuf,
    header: StringRecord,
    records: Vec<StringRecord>,
}

/// One row of a [`CsvTable`].
#[derive(Debug, Clone, Copy)]
pub struct CsvRow<'a> {
    table: &'a CsvTable,
    record: &'a StringRecord,
}

impl CsvTable {
    /// Reads a file that has at least the columns `required`, in any order. Spaces around fields do not count.
    ///
    /// # Errors
    /// A file that cannot be read, that is no CSV of equally many fields in every line, or that lacks a column; the
    /// message then lists those that are needed.
    pub fn read(path: &Path, required: &[&str]) -> Result<Self> {
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(Error::file(path, format!("is larger than {} MiB, no table of this kind", MAX_BYTES >> 20)));
        }
        Self::parse(path, &bytes, required)
    }

    /// As [`read`](Self::read), from the content of the file; `path` is what messages name.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(path: &Path, bytes: &[u8], required: &[&str]) -> Result<Self> {
        let refuse = |e: csv::Error| {
            let line = e.position().map_or_else(String::new, |at| format!("line {}: ", at.line()));
            let problem = match e.kind() {
                csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                    format!("has {len} fields, the header {expected_len}")
                }
                csv::ErrorKind::Utf8 { .. } => "is no text (UTF-8)".to_owned(),
                _ => format!("is no CSV ({e})"),
            };
            Error::file(path, format!("{line}{problem}"))
        };
        let mut reader = ReaderBuilder::new().trim(Trim::All).from_reader(bytes);
        let header = reader.headers().map_err(refuse)?.clone();
        if let Some(column) = required.iter().find(|column| !header.iter().any(|name| name == **column)) {
            let all = required.join(",");
            return Err(Error::file(path, format!("has no column {column:?}; its header must name {all}")));
        }
        let records = reader.records().collect::<csv::Result<Vec<_>>>().map_err(refuse)?;
        Ok(Self { path: path.to_owned(), header, records })
    }

    /// Whether there is such a column.
    pub fn has(&self, column: &str) -> bool {
        self.index(column).is_some()
    }

    /// The rows in order.
    pub fn rows(&self) -> impl Iterator<Item = CsvRow<'_>> {
        self.records.iter().map(|record| CsvRow { table: self, record })
    }

    fn index(&self, column: &str) -> Option<usize> {
        self.header.iter().position(|name| name == column)
    }
}

impl<'a> CsvRow<'a> {
    /// The line of the file that the row begins in, counted from 1.
    pub fn line(&self) -> u64 {
        self.record.position().map_or(0, csv::Position::line)
    }

    /// The text of a column; empty where there is no such column.
    pub fn text(&self, column: &str) -> &'a str {
        self.table.index(column).and_then(|index| self.record.get(index)).unwrap_or_default()
    }

    /// The value of a column.
    ///
    /// # Errors
    /// A text that is none; `what` names what is expected.
    pub fn value<T: FromStr>(&self, column: &str, what: &str) -> Result<T> {
        let text = self.text(column);
        text.parse().map_err(|_| self.error(format!("{column} is {text:?}, not {what}")))
    }

    /// A flag, 1 or 0; `True` and `False`, as Python writes them, count too.
    ///
    /// # Errors
    /// A text that is neither.
    pub fn flag(&self, column: &str) -> Result<bool> {
        match self.text(column) {
            "1" | "True" | "true" => Ok(true),
            "0" | "False" | "false" => Ok(false),
            other => Err(self.error(format!("{column} is {other:?}, not 0 or 1"))),
        }
    }

    /// What is wrong with this row.
    pub fn error(&self, problem: impl std::fmt::Display) -> Error {
        Error::file(&self.table.path, format!("line {}: {problem}", self.line()))
    }
}
