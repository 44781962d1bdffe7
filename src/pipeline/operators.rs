//! An operator for each block within a time: kept, merged or bypassed (`docs/methods.md` 1.14).

use super::by_clock::Timed;
use super::folder::RunFolder;
use super::latency::latency_table;
use super::run::Run;
use crate::Result;
use crate::model::Model;
use crate::shrink::select::{BlockOptions, Operators};
use crate::shrink::{Mask, Selection};

/// Chooses operators as the settings say, and leaves `latency.csv` in the folder.
///
/// # Errors
/// A budget that cannot be kept, a table of another network, or a failing device.
pub(super) fn choose_operators(run: &mut Run<'_>, original: &Model, folder: &RunFolder) -> Result<Selection> {
    let graph = &original.graph;
    let (table, positions, shapes) = (latency_table(run, original, folder)?, graph.positions()?, graph.shapes()?);
    let candidates = run.config.search.scores.candidates(graph.blocks.len())?;
    let stays: Vec<bool> = candidates.iter().map(|candidate| !candidate).collect();
    let options = BlockOptions::with_kept(&positions, &table, None, &stays)?;
    let masses: Vec<f64> = graph.blocks.iter().map(|block| 2.0 * shapes[block.output()].c as f64).collect();
    let timed = Timed {
        whole_ms: options.time_ms(&Mask::all(graph.blocks.len())),
        least_ms: options.least_operators_ms(),
        select: &|ms| options.operators(&masses, ms),
        time_ms: &|operators: &Operators| options.operators_ms(operators),
        selection: &|operators| operators.selection(graph),
    };
    let (operators, matched) = timed.within_budget(run, original)?;
    let share = 100.0 * options.operators_ms(&operators) / timed.whole_ms.max(f64::MIN_POSITIVE);
    let by = run.config.latency.describe(&run.device);
    run.session
        .reporter
        .line(&format!("search: {operators} (kept, merged, bypassed), {share:.1} % of the time ({by})"));
    Ok(Selection { matched, ..operators.selection(graph) })
}
