//! Stage two of the two-stage dynamic programme (Kim et al., "Efficient Latency-Aware CNN Depth Compression via
//! Two-Stage Dynamic Programming", ICML 2023, section 4): which activations stay, within a budget.
//!
//! With T_opt of stage one and the extended importances of all segments,
//!
//! ```text
//! D[t, j, c] = max over i < j and a of D[t − T_opt[i, j], i, a] + I_ext[i, j, a, c],
//! ```
//!
//! where a and c say whether there is an activation at i and at j. The published solver rounds times down to ticks,
//! which lets its answers exceed the budget by some percent; here times are exact ([`super::pareto`]).

use std::collections::{BTreeMap, BTreeSet};

use super::pareto::{Arc, States};
use super::{OptimalTable, Solution, within};
use crate::Result;
use crate::graph::{ExtendedSegment, Interval};
use crate::measure::LatencyTable;
use crate::shrink::importance::Importance;

/// Importances by segment.
type ByExtended = BTreeMap<ExtendedSegment, f64>;

/// The activations of the highest total importance that take no more than `budget_ms`, and the positions between which
/// the rest is merged.
///
/// `alpha` times the mean importance of single convolutions is taken from every importance first, as the authors do:
/// the mean is negative, so that each segment earns a reward, and a larger `alpha` keeps more segments.
///
/// # Errors
/// Segments without a time or an importance, or a budget below the fastest selection; the message names it.
pub fn two_stage_dp(table: &LatencyTable, importance: &Importance, alpha: f64, budget_ms: f64) -> Result<Solution> {
    let times = OptimalTable::new(table)?;
    importance.check_covers(table)?;
    importance.check_times(table)?;
    // Position p without an activation is state 2p − 1, with one 2p. At position 0 there always is one.
    let state = |position: usize, act: bool| 2 * position + usize::from(act) - 1;
    let mut into: Vec<Vec<Arc>> = vec![Vec::new(); 2 * table.depth() + 1];
    for (ExtendedSegment { at, act_st, act_end }, value) in extended(&normalised(importance, alpha)) {
        if let Some(split) = times.split(at) {
            into[state(at.end, act_end)].push(Arc { from: state(at.st, act_st), time: split.time_ms, value });
        }
    }
    let ends = [false, true].map(|act| state(table.depth(), act)).to_vec();
    let path = within(&States { start: table.fixed_ms(), into, ends }, budget_ms)?;

    let (mut activations, mut boundaries) = (Vec::new(), BTreeSet::from([0]));
    let mut st = 0;
    for &(state, _) in &path.arcs {
        let (end, act) = (state.div_ceil(2), state % 2 == 0);
        boundaries.extend(times.split(Interval { st, end }).into_iter().flat_map(|split| &split.breaks));
        if act {
            activations.push(end);
        }
        st = end;
    }
    let solution = Solution::new(activations, boundaries.into_iter().collect(), path.time);
    Ok(Solution { objective: Some(path.value), ..solution })
}

/// I − α·mean over single convolutions, whatever stands at their ends.
fn normalised(importance: &Importance, alpha: f64) -> ByExtended {
    let single: Vec<f64> =
        importance.rows().filter(|row| row.segment.at.len() == 1).map(|row| row.importance).collect();
    let mean = single.iter().sum::<f64>() / single.len().max(1) as f64;
    importance.rows().map(|row| (row.segment, row.importance - alpha * mean)).collect()
}

/// Algorithm 3, appendix B: I_ext\[i, j, a, c\] = max(I\[i, j, a, c\], max over m of I_ext\[i, m, a, 0\] + I\[m, j, 0,
/// c\]): a segment may be thought of as two with no activation between them, where that promises more.
fn extended(importance: &ByExtended) -> ByExtended {
    let mut extended = ByExtended::new();
    // By st and then by end: the shorter segments of a start come first.
    for (&segment, &own) in importance {
        let Interval { st, end } = segment.at;
        let parts = (st + 1..end).filter_map(|middle| {
            let front = ExtendedSegment { at: Interval { st, end: middle }, act_end: false, ..segment };
            let back = ExtendedSegment { at: Interval { st: middle, end }, act_st: false, ..segment };
            Some(extended.get(&front)? + importance.get(&back)?)
        });
        let best = parts.fold(own, f64::max);
        extended.insert(segment, best);
    }
    extended
}
