//! Latency tables: the time of every segment of a network as one convolution, what solvers select by (`docs/methods.md`
//! 2.4).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::graph::{Interval, MergeKey, Positions};
use crate::io::{CsvRow, CsvTable};
use crate::{Error, Result};

/// A segment's time.
#[derive(Debug, Clone, PartialEq)]
pub struct LatencyRow {
    /// The segment. An empty one, (0,0] or (N,N], is what always runs before the first block or behind the last.
    pub at: Interval,
    /// What the segment becomes where some of its convolutions are pruned; `None` where all are merged.
    pub key: Option<MergeKey>,
    /// Milliseconds of a batch.
    pub time_ms: f64,
    /// Their standard deviation over repeats.
    pub stdev_ms: f64,
    /// In a table of optimal splits, the positions that the best split merges between, both ends included.
    pub breaks: Option<Vec<usize>>,
    /// The line of the file, for messages; 0 for a row of no file.
    pub line: u64,
}

impl LatencyRow {
    /// A row of a table of merged segments.
    pub fn new(at: impl Into<Interval>, time_ms: f64) -> Self {
        Self { at: at.into(), key: None, time_ms, stdev_ms: 0.0, breaks: None, line: 0 }
    }

    fn parse(row: CsvRow<'_>, columns: Columns) -> Result<Self> {
        let position = |column| row.value(column, "a position (0, 1, 2, …)");
        let at = Interval { st: position("st")?, end: position("end")? };
        let number = |column| row.value::<f64>(column, "a number of milliseconds");
        let stdev_ms = if columns.stdev { number("stdev")? } else { 0.0 };
        let key = match columns.keys && !at.is_empty() {
            true => Some(MergeKey { kernel: row.value("kernel", "a size")?, depthwise: row.flag("depthwise")? }),
            false => None,
        };
        let positions = || row.text("breaks").split(',').map(|p| p.trim().parse().ok()).collect::<Option<Vec<usize>>>();
        let breaks = match columns.breaks {
            true => Some(positions().ok_or_else(|| row.error("breaks are no positions with commas between"))?),
            false => None,
        };
        Ok(Self { at, key, time_ms: number("time")?, stdev_ms, breaks, line: row.line() })
    }

    /// What the row is about, in messages.
    fn name(&self) -> String {
        let key = self.key.map_or_else(String::new, |key| format!(" with {key}"));
        let line = if self.line > 0 { format!("line {}: ", self.line) } else { String::new() };
        format!("{line}segment {}{key}", self.at)
    }

    fn check(&self) -> std::result::Result<(), String> {
        let is_time = |ms: f64| ms.is_finite() && ms >= 0.0;
        let breaks = self.breaks.as_deref();
        let joins = |breaks: &[usize]| {
            breaks.first() == Some(&self.at.st)
                && breaks.last() == Some(&self.at.end)
                && breaks.is_sorted_by(|a, b| a < b)
        };
        if self.at.st > self.at.end {
            Err("ends before it begins; st and end are positions, st < end".into())
        } else if !is_time(self.time_ms) {
            Err(format!("takes {} ms, which is no time; measure it again", self.time_ms))
        } else if !is_time(self.stdev_ms) {
            Err(format!("has the standard deviation {} ms, which is none; measure it again", self.stdev_ms))
        } else if breaks.is_some_and(|breaks| !joins(breaks)) {
            Err(format!("has breaks that do not rise from {} to {}", self.at.st, self.at.end))
        } else {
            Ok(())
        }
    }
}

/// The columns that a table must have.
const COLUMNS: [&str; 3] = ["st", "end", "time"];

/// Which optional columns a file has.
#[derive(Debug, Clone, Copy)]
struct Columns {
    stdev: bool,
    keys: bool,
    breaks: bool,
}

/// The times of a network's segments, every single convolution among them.
///
/// As CSV it has the columns of the tables that Kim et al. published: `st,end,time` in milliseconds, and perhaps `id`,
/// `stdev`; with `kernel,depthwise` it is a table for LayerMerge, with `breaks` one of optimal splits.
#[derive(Debug, Clone, PartialEq)]
pub struct LatencyTable {
    path: PathBuf,
    rows: BTreeMap<(Interval, Option<MergeKey>), LatencyRow>,
    depth: usize,
    fixed_ms: f64,
}

impl LatencyTable {
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
        let keys = table.has("kernel") || table.has("depthwise");
        let columns = Columns { stdev: table.has("stdev"), keys, breaks: table.has("breaks") };
        let rows = table.rows().map(|row| LatencyRow::parse(row, columns)).collect::<Result<Vec<_>>>()?;
        Self::new(path, rows)
    }

    /// A table of rows in any order; `path` is what messages name.
    ///
    /// # Errors
    /// Names the row that has no usable time, stands twice, or is an empty segment other than (0,0] and (N,N], and the
    /// first single convolution that has no row.
    pub fn new(path: &Path, rows: Vec<LatencyRow>) -> Result<Self> {
        let refuse = |problem: String| Error::file(path, problem);
        let depth = rows.iter().map(|row| row.at.end).max().unwrap_or(0);
        let mut table = Self { path: path.to_owned(), rows: BTreeMap::new(), depth, fixed_ms: 0.0 };
        for row in rows {
            let name = row.name();
            row.check().map_err(|problem| refuse(format!("{name} {problem}")))?;
            if row.at.is_empty() {
                if ![0, depth].contains(&row.at.st) {
                    let problem = format!("{name} holds no convolution; only (0,0] and ({depth},{depth}] may");
                    return Err(refuse(format!("{problem}, what runs before and behind the blocks")));
                }
                table.fixed_ms += row.time_ms;
            }
            if let Some(first) = table.rows.insert((row.at, row.key), row) {
                let line = if first.line > 0 { format!(", first in line {}", first.line) } else { String::new() };
                return Err(refuse(format!("{name} stands twice{line}; remove one of the rows")));
            }
        }
        let is_there = |at: Interval| table.rows_of(at).next().is_some();
        if depth == 0 {
            return Err(refuse("has no segments; a latency table has a row for each".into()));
        }
        let missing = (1..=depth).map(|end| Interval { st: end - 1, end }).find(|&single| !is_there(single));
        match missing {
            Some(single) => Err(refuse(format!("has no row for segment {single}, a single convolution; measure it"))),
            None => Ok(table),
        }
    }

    /// The table as CSV, in the columns that [`read`](Self::read) takes; breaks are left out.
    pub fn to_csv(&self) -> String {
        let keys = self.rows().any(|row| row.key.is_some());
        let mut text =
            String::from(if keys { "id,st,end,kernel,depthwise,time,stdev\n" } else { "id,st,end,time,stdev\n" });
        for (id, row) in self.rows.values().enumerate() {
            let key = match (keys, row.key) {
                (false, _) => String::new(),
                (true, None) => ",,".into(),
                (true, Some(key)) => format!(",{},{}", key.kernel, u8::from(key.depthwise)),
            };
            let Interval { st, end } = row.at;
            text.push_str(&format!("{id},{st},{end}{key},{},{}\n", row.time_ms, row.stdev_ms));
        }
        text
    }

    /// The file it is from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The last position, N.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Milliseconds that run whatever is selected: the rows (0,0] and (N,N].
    pub fn fixed_ms(&self) -> f64 {
        self.fixed_ms
    }

    /// Milliseconds of all convolutions one by one, and of what always runs.
    pub fn original_ms(&self) -> f64 {
        let singles = self.rows().filter(|row| row.at.len() == 1);
        singles.fold(self.fixed_ms, |sum, row| sum + row.time_ms)
    }

    /// The table with those of its segments with convolutions that `keep` wants, and with what always runs.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn filtered(&self, keep: impl Fn(&LatencyRow) -> bool) -> Result<Self> {
        let rows = self.rows.values().filter(|row| row.at.is_empty() || keep(row));
        Self::new(&self.path, rows.cloned().collect())
    }

    /// The rows of segments with convolutions, by segment.
    pub fn rows(&self) -> impl Iterator<Item = &LatencyRow> {
        self.rows.values().filter(|row| !row.at.is_empty())
    }

    /// The row of a segment that is merged whole.
    pub fn row(&self, at: Interval) -> Option<&LatencyRow> {
        self.rows.get(&(at, None))
    }

    /// The rows of a segment, one for each key.
    pub fn rows_of(&self, at: Interval) -> impl Iterator<Item = &LatencyRow> {
        let any = Some(MergeKey { kernel: usize::MAX, depthwise: true });
        self.rows.range((at, None)..=(at, any)).map(|(_, row)| row)
    }

    /// Milliseconds of a segment that is merged whole.
    pub fn time_ms(&self, at: Interval) -> Option<f64> {
        self.row(at).map(|row| row.time_ms)
    }

    /// Refuses a table with keys or with breaks where whole merged segments are needed, and the reverse.
    ///
    /// # Errors
    /// Names the columns that should be there, or should not.
    pub fn check_columns(&self, keys: bool, may_have_breaks: bool) -> Result<()> {
        let Some(row) = self.rows().next() else { return Ok(()) };
        let problem = match (row.key.is_some(), row.breaks.is_some()) {
            (false, _) if keys => "has no columns kernel,depthwise, which this method needs",
            (true, _) if !keys => "has columns kernel,depthwise; this method needs a table of whole merged segments",
            (_, true) if !may_have_breaks => {
                "is a table of optimal splits (it has breaks); give the table of merged segments that it was made from"
            }
            _ => return Ok(()),
        };
        Err(Error::file(&self.path, problem))
    }

    /// Refuses a table that is of another network: it needs a row for every segment of the network, and may have no
    /// others than the network's segments that go on behind a strided block; with keys, exactly the candidates.
    ///
    /// # Errors
    /// Names the row that is missing or too many.
    pub fn check(&self, positions: &Positions) -> Result<()> {
        let (network, depth) = (positions.network(), positions.depth());
        let refuse = |problem: String| Err(Error::file(&self.path, problem));
        if self.depth != depth {
            let problem = format!("ends at position {}, the blocks of {network} at {depth}", self.depth);
            return refuse(format!("is of another network: it {problem}; give a table of {network}"));
        }
        let has_keys = self.rows().any(|row| row.key.is_some());
        let known = |row: &&LatencyRow| match row.key {
            Some(key) => positions.segments().any(|at| at == row.at) && positions.merge_keys(row.at).contains(&key),
            None => positions.segment(row.at).is_some(),
        };
        if let Some(row) = self.rows().find(|row| !known(row)) {
            return refuse(format!("{} is none of {network}; give a table of {network}", row.name()));
        }
        let missing = if has_keys {
            let missing = positions.candidates().find(|&(at, key)| !self.rows.contains_key(&(at, Some(key))));
            missing.map(|(at, key)| format!("{at} with {key}"))
        } else {
            positions.segments().find(|&at| self.row(at).is_none()).map(|at| at.to_string())
        };
        match missing {
            Some(segment) => refuse(format!("has no row for segment {segment} of {network}; measure it")),
            None => Ok(()),
        }
    }
}
