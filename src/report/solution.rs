//! What a solver selected, as a table, and the times of selections.

use serde::Serialize;

use super::table::{Align, Table, significant};
use crate::graph::{Graph, Interval, Positions};
use crate::measure::LatencyTable;
use crate::shrink::Mask;
use crate::shrink::select::Solution;
use crate::{Error, Result};

/// One line for each convolution that is there in the end: the segment it is made of, by positions and, where the
/// network is known, by name; kernel and stride; milliseconds by the table; and whether an activation follows.
/// Convolutions that are left out with nothing merged have no line.
///
/// # Errors
/// A graph of which these are not the positions.
pub fn solution_table(
    solution: &Solution,
    times: &LatencyTable,
    network: Option<(&Graph, &Positions)>,
) -> Result<Table> {
    use Align::{Left, Right};
    let mut table =
        Table::new(&[("segment", Right), ("is", Left), ("kernel", Left), ("ms", Right), ("activation", Left)]);
    for pair in solution.boundaries.windows(2) {
        let at = Interval { st: pair[0], end: pair[1] };
        let merged = solution.merged.iter().find(|segment| (segment.st, segment.end) == (at.st, at.end));
        let is_pruned = |position: &usize| solution.pruned.as_ref().is_some_and(|pruned| pruned.contains(position));
        if (at.st + 1..=at.end).all(|position| is_pruned(&position)) {
            continue;
        }
        let (mut name, mut kernel) = (String::new(), String::new());
        if let Some((graph, positions)) = network {
            let segment = positions.segment(at).ok_or_else(|| {
                Error::Graph(format!("{} has no segment {at}; these are another network's positions", graph.name))
            })?;
            let span = graph.span(segment)?;
            let side = merged.map_or(span.kernel, |segment| [segment.kernel; 2]);
            let stride = if span.stride == [1, 1] { String::new() } else { format!(" stride {}", span.stride[0]) };
            (name, kernel) = (graph.segment_name(segment), format!("{}x{}{stride}", side[0], side[1]));
        } else if let Some(segment) = merged {
            kernel = format!("{0}x{0}", segment.kernel);
        }
        let row = times.rows_of(at).find(|row| row.key == merged.map(|segment| segment.key()));
        let has_activation = solution.activations.contains(&at.end);
        table.row(&[
            at.to_string(),
            name,
            kernel,
            row.map_or_else(String::new, |row| significant(row.time_ms)),
            if has_activation { "yes" } else { "" }.to_owned(),
        ]);
    }
    Ok(table)
}

/// A selection's time by the table and by the clock.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SelectionTime {
    /// Which blocks keep their activations; the others are merged.
    pub kept: Mask,
    /// The original, timed in alternation with the merged network, in milliseconds.
    pub original_ms: f64,
    /// What the merged network takes by the table: its share of the original there, in milliseconds of the original here.
    pub predicted_ms: f64,
    /// The merged network, in milliseconds.
    pub measured_ms: f64,
}

impl SelectionTime {
    /// How much more is predicted than measured, as a share of what is measured.
    pub fn relative_error(&self) -> f64 {
        self.predicted_ms / self.measured_ms.max(f64::MIN_POSITIVE) - 1.0
    }
}

/// One line for each selection: its mask, both times, and how far they are apart.
pub fn selection_times(times: &[SelectionTime]) -> Table {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("kept", Left),
        ("original ms", Right),
        ("predicted ms", Right),
        ("measured ms", Right),
        ("difference %", Right),
    ]);
    for time in times {
        table.row(&[
            time.kept.to_string(),
            significant(time.original_ms),
            significant(time.predicted_ms),
            significant(time.measured_ms),
            format!("{:+.1}", 100.0 * time.relative_error()),
        ]);
    }
    table
}
