//! Importance tables: what it does to the accuracy to make a segment one convolution, or to leave a convolution out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::graph::{ExtendedSegment, Interval, MergeKey, Positions};
use crate::io::{CsvRow, CsvTable};
use crate::measure::LatencyTable;
use crate::{Error, Result};

/// The columns that a table must have.
const COLUMNS: [&str; 3] = ["st", "end", "importance"];

/// The importance of a segment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ImportanceRow {
    /// The segment and the activations at its ends.
    pub segment: ExtendedSegment,
    /// What the segment becomes where some of its convolutions are pruned; `None` where all are merged.
    pub key: Option<MergeKey>,
    /// The change of the accuracy on held-out images, in percentage points; below 0 where it falls.
    pub importance: f64,
    /// The line of the file, for messages; 0 for a row of no file.
    pub line: u64,
}

impl ImportanceRow {
    /// A row for a segment with activations at both ends.
    pub fn new(at: impl Into<Interval>, importance: f64) -> Self {
        let segment = ExtendedSegment { at: at.into(), act_st: true, act_end: true };
        Self { segment, key: None, importance, line: 0 }
    }

    fn parse(row: CsvRow<'_>, acts: bool, keys: bool) -> Result<Self> {
        let position = |column| row.value(column, "a position (0, 1, 2, …)");
        let at = Interval { st: position("st")?, end: position("end")? };
        let act = |column| if acts { row.flag(column) } else { Ok(true) };
        let segment = ExtendedSegment { at, act_st: act("act_st")?, act_end: act("act_end")? };
        let key = match keys {
            true => Some(MergeKey { kernel: row.value("kernel", "a size")?, depthwise: row.flag("depthwise")? }),
            false => None,
        };
        let importance = row.value("importance", "a number of percentage points")?;
        Ok(Self { segment, key, importance, line: row.line() })
    }

    /// What the row is about, in messages.
    fn name(&self) -> String {
        let line = if self.line > 0 { format!("line {}: ", self.line) } else { String::new() };
        match self.key {
            Some(key) => format!("{line}segment {} with {key}", self.segment.at),
            None => format!("{line}segment {}", self.segment),
        }
    }
}

/// The importances of a network's segments, unextended and as they were measured.
///
/// As CSV it has the columns `st,end,importance`. With `act_st,act_end` a segment has a row for each state of its ends
/// (1, with an activation, where these columns are missing), with `kernel,depthwise` one for each set of pruned
/// convolutions.
#[derive(Debug, Clone, PartialEq)]
pub struct Importance {
    path: PathBuf,
    rows: BTreeMap<(ExtendedSegment, Option<MergeKey>), ImportanceRow>,
}

impl Importance {
    /// Reads a table.
    ///
    /// # Errors
    /// A file that is none, or as [`new`](Self::new), with the line.
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_csv(path, &CsvTable::read(path, &COLUMNS)?)
    }

    /// As [`read`](Self::read), from the content of the file; `path` is what messages name.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        Self::from_csv(path, &CsvTable::parse(path, bytes, &COLUMNS)?)
    }

    fn from_csv(path: &Path, table: &CsvTable) -> Result<Self> {
        let acts = table.has("act_st") || table.has("act_end");
        let keys = table.has("kernel") || table.has("depthwise");
        let rows = table.rows().map(|row| ImportanceRow::parse(row, acts, keys)).collect::<Result<Vec<_>>>()?;
        Self::new(path, rows)
    }

    /// A table of rows in any order; `path` is what messages name.
    ///
    /// # Errors
    /// Names the row that is not finite, stands twice, holds no convolution, or varies what stands at position 0.
    pub fn new(path: &Path, rows: Vec<ImportanceRow>) -> Result<Self> {
        let mut table = Self { path: path.to_owned(), rows: BTreeMap::new() };
        for row in rows {
            let name = row.name();
            let refuse = |problem: String| Err(Error::file(path, format!("{name} {problem}")));
            if row.segment.at.is_empty() {
                return refuse("holds no convolution; st and end are positions, st < end".into());
            }
            if row.segment.at.st == 0 && !row.segment.act_st {
                return refuse("cannot be: position 0 stays as it is; give it act_st 1, or remove the row".into());
            }
            if !row.importance.is_finite() {
                return refuse(format!("has the importance {}, which is no number; measure it again", row.importance));
            }
            if let Some(first) = table.rows.insert((row.segment, row.key), row) {
                let line = if first.line > 0 { format!(", first in line {}", first.line) } else { String::new() };
                return refuse(format!("stands twice{line}; remove one of the rows"));
            }
        }
        Ok(table)
    }

    /// The table as CSV, in the columns that [`read`](Self::read) takes.
    pub fn to_csv(&self) -> String {
        let acts = self.rows().any(|row| !row.segment.act_st || !row.segment.act_end);
        let keys = self.rows().any(|row| row.key.is_some());
        let mut header = vec!["st", "end"];
        header.extend(if acts { &["act_st", "act_end"][..] } else { &[] });
        header.extend(if keys { &["kernel", "depthwise"][..] } else { &[] });
        header.push("importance");
        let mut text = format!("{}\n", header.join(","));
        for ImportanceRow { segment: ExtendedSegment { at, act_st, act_end }, key, importance, .. } in self.rows() {
            text.push_str(&format!("{},{}", at.st, at.end));
            if acts {
                text.push_str(&format!(",{},{}", u8::from(*act_st), u8::from(*act_end)));
            }
            if let Some(key) = key {
                text.push_str(&format!(",{},{}", key.kernel, u8::from(key.depthwise)));
            }
            text.push_str(&format!(",{importance}\n"));
        }
        text
    }

    /// The same values, each with the row of another: a function of the seed.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn shuffled(&self, seed: u64) -> Result<Self> {
        let mut values: Vec<f64> = self.rows().map(|row| row.importance).collect();
        values.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let rows = self.rows().zip(values).map(|(row, importance)| ImportanceRow { importance, ..*row });
        Self::new(&self.path, rows.collect())
    }

    /// The file it is from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The rows, by segment.
    pub fn rows(&self) -> impl Iterator<Item = &ImportanceRow> {
        self.rows.values()
    }

    /// The importance of a segment with some of its convolutions pruned.
    pub fn keyed(&self, at: Interval, key: MergeKey) -> Option<f64> {
        let segment = ExtendedSegment { at, act_st: true, act_end: true };
        self.rows.get(&(segment, Some(key))).map(|row| row.importance)
    }

    /// The importance of a segment that is made linear in the network as it was: the row of that segment where there is
    /// one alone, else the one whose front is as it was (`act_st`) and whose end has an activation.
    ///
    /// # Errors
    /// Names the segment that has no such row.
    pub fn of_segment(&self, at: Interval, act_st: bool) -> Result<f64> {
        let mut rows = self.rows.values().filter(|row| row.segment.at == at && row.key.is_none());
        let wanted = ExtendedSegment { at, act_st, act_end: true };
        let row = match (rows.next(), rows.next()) {
            (Some(only), None) => Some(only),
            _ => self.rows.get(&(wanted, None)),
        };
        row.map(|row| row.importance).ok_or_else(|| self.missing(wanted))
    }

    /// The error for a segment without a row.
    pub(super) fn missing(&self, what: impl std::fmt::Display) -> Error {
        Error::file(&self.path, format!("has no importance for segment {what}; measure it and add a row"))
    }

    /// Refuses rows that are of segments without a time.
    ///
    /// # Errors
    /// Names the first of them, and both files.
    pub fn check_times(&self, table: &LatencyTable) -> Result<()> {
        let has_time = |row: &ImportanceRow| match row.key {
            Some(key) => table.rows_of(row.segment.at).any(|timed| timed.key == Some(key)),
            None => table.row(row.segment.at).is_some(),
        };
        match self.rows.values().find(|row| !has_time(row)) {
            None => Ok(()),
            Some(row) => {
                let times = table.path().display();
                let problem = format!("{} has no time in {times}; measure it there, or remove this row", row.name());
                Err(Error::file(&self.path, problem))
            }
        }
    }

    /// Refuses a table that does not tell the importance of every timed segment, with some activations at its ends, or
    /// has rows for LayerMerge.
    ///
    /// # Errors
    /// Names the segment without an importance, or the columns that do not belong there.
    pub fn check_covers(&self, table: &LatencyTable) -> Result<()> {
        if self.rows.values().any(|row| row.key.is_some()) {
            let problem = "has columns kernel,depthwise; this method needs the importances of whole segments";
            return Err(Error::file(&self.path, problem));
        }
        let covered: BTreeSet<Interval> = self.rows.values().map(|row| row.segment.at).collect();
        match table.rows().find(|row| !covered.contains(&row.at)) {
            Some(row) => Err(self.missing(row.at)),
            None => Ok(()),
        }
    }

    /// Refuses a table whose activations are not those of a network's extended segments: all that the two-stage dynamic
    /// programme asks for must be there, and no others than ends of linear bottlenecks may vary.
    ///
    /// # Errors
    /// Names the row that is missing or cannot be.
    pub fn check_extended(&self, positions: &Positions) -> Result<()> {
        let may = |position: usize, act: bool| act || positions.may_vary(position);
        let fits = |row: &&ImportanceRow| {
            let ExtendedSegment { at, act_st, act_end } = row.segment;
            at.end <= positions.depth() && may(at.st, act_st) && may(at.end, act_end)
        };
        if let Some(row) = self.rows.values().find(|row| !fits(row)) {
            let problem =
                format!("{}: only the ends of linear bottlenecks of {} vary", row.name(), positions.network());
            return Err(Error::file(&self.path, format!("{problem}; remove this row")));
        }
        let has = |segment: &ExtendedSegment| self.rows.contains_key(&(*segment, None));
        match positions.extended_segments().iter().find(|segment| !has(segment)) {
            None => Ok(()),
            Some(missing) => Err(self.missing(missing)),
        }
    }
}
