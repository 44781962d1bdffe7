//! Layer pruning alone, the baseline that comes with LayerMerge's code (Kim et al. 2024): convolutions
//! are left out and nothing is merged.

use super::pareto::{Arc, States};
use super::{Solution, within};
use crate::Result;
use crate::graph::{Interval, Positions};
use crate::measure::LatencyTable;
use crate::shrink::importance::Importance;

/// Exact 0/1 knapsack over the convolutions whose place the identity can take: those stay for which the sum of
/// exp(−importance / 100) is highest within the budget. An importance here is that of *leaving out* the one convolution
/// of a segment (i − 1, i]. What cannot be left out is charged first.
///
/// # Errors
/// A table of another network or with keys, a reducible convolution without an importance, or a budget that is below
/// the time of what cannot be left out, which the message names.
pub fn layer_knapsack(
    positions: &Positions,
    table: &LatencyTable,
    importance: &Importance,
    budget_ms: f64,
) -> Result<Solution> {
    table.check_columns(false, false)?;
    table.check(positions)?;
    importance.check_times(table)?;
    let mut into = vec![Vec::new()];
    for (from, conv) in positions.convs().iter().enumerate() {
        let at = Interval { st: from, end: from + 1 };
        let time = table.time_ms(at).unwrap_or_default();
        into.push(match conv.is_reducible() {
            false => vec![Arc { from, time, value: 0.0 }],
            true => {
                let value = (-importance.of_segment(at, true)? / 100.0).exp();
                vec![Arc { from, time, value }, Arc { from, time: 0.0, value: 0.0 }]
            }
        });
    }
    let depth = positions.depth();
    let path = within(&States { start: table.fixed_ms(), into, ends: vec![depth] }, budget_ms)?;
    let pruned: Vec<usize> = path.arcs.iter().filter(|(_, arc)| *arc == 1).map(|&(position, _)| position).collect();
    let solution = Solution::new(positions.activations(), (0..=depth).collect(), path.time);
    Ok(Solution { objective: Some(path.value), pruned: Some(pruned), ..solution })
}
