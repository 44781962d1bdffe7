//! Stage one of the two-stage dynamic programme (Kim et al. 2023, algorithm 1, section 4): the fastest way to merge in
//! a segment.

use std::collections::BTreeMap;

use crate::graph::Interval;
use crate::measure::LatencyTable;
use crate::{Error, Result};

/// A segment merged in parts.
#[derive(Debug, Clone, PartialEq)]
pub struct Split {
    /// Milliseconds of all parts.
    pub time_ms: f64,
    /// The sum of the parts' standard deviations.
    pub stdev_ms: f64,
    /// The positions between which the parts lie, both ends included.
    pub breaks: Vec<usize>,
}

/// The best split of every segment of a latency table, T_opt.
#[derive(Debug, Clone, PartialEq)]
pub struct OptimalTable {
    splits: BTreeMap<Interval, Split>,
    depth: usize,
    fixed_ms: f64,
}

impl OptimalTable {
    /// T_opt\[i, j\] = min(T\[i, j\], min over m of T_opt\[i, m\] + T\[m, j\]): a split has to be strictly faster, and
    /// of equally fast ones the one with the earlier m stands. A table that has breaks already is taken as it is.
    ///
    /// # Errors
    /// A table with keys, or breaks between which the table has no row.
    pub fn new(table: &LatencyTable) -> Result<Self> {
        table.check_columns(false, true)?;
        let mut optimal = Self { splits: BTreeMap::new(), depth: table.depth(), fixed_ms: table.fixed_ms() };
        // By st and then by end: the shorter segments of a start come first.
        for row in table.rows() {
            let split = match &row.breaks {
                Some(breaks) => {
                    let joins = |pair: &[usize]| table.row((pair[0], pair[1]).into()).is_some();
                    if let Some(pair) = breaks.windows(2).find(|pair| !joins(pair)) {
                        let part = Interval { st: pair[0], end: pair[1] };
                        let problem = format!("splits segment {} at {part}, which has no row; measure it", row.at);
                        return Err(Error::file(table.path(), problem));
                    }
                    Split { time_ms: row.time_ms, stdev_ms: row.stdev_ms, breaks: breaks.clone() }
                }
                None => optimal.best_split(table, row.at, row.time_ms, row.stdev_ms),
            };
            optimal.splits.insert(row.at, split);
        }
        Ok(optimal)
    }

    fn best_split(&self, table: &LatencyTable, at: Interval, time_ms: f64, stdev_ms: f64) -> Split {
        let mut best = Split { time_ms, stdev_ms, breaks: vec![at.st, at.end] };
        for middle in at.st + 1..at.end {
            let front = self.splits.get(&Interval { end: middle, ..at });
            let (Some(front), Some(back)) = (front, table.row(Interval { st: middle, ..at })) else { continue };
            if front.time_ms + back.time_ms < best.time_ms {
                let breaks = front.breaks.iter().copied().chain([at.end]).collect();
                let (time_ms, stdev_ms) = (front.time_ms + back.time_ms, front.stdev_ms + back.stdev_ms);
                best = Split { time_ms, stdev_ms, breaks };
            }
        }
        best
    }

    /// The split of a segment.
    pub fn split(&self, at: Interval) -> Option<&Split> {
        self.splits.get(&at)
    }

    /// All splits, by segment.
    pub fn splits(&self) -> impl Iterator<Item = (Interval, &Split)> {
        self.splits.iter().map(|(&at, split)| (at, split))
    }

    /// The last position, N.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Milliseconds that run whatever is selected.
    pub fn fixed_ms(&self) -> f64 {
        self.fixed_ms
    }
}
