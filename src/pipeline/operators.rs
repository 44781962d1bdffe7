//! An operator for each block within a time: kept, merged or bypassed (`docs/methods.md` 1.14).

use super::by_clock::Timed;
use super::folder::RunFolder;
use super::latency::latency_table;
use super::run::Run;
use super::selection::costs;
use crate::Result;
use crate::graph::Graph;
use crate::model::Model;
use crate::shrink::providers::{Provider, RemoveBlock, Sensitivity};
use crate::shrink::select::{BlockOptions, OperatorValues, Operators};
use crate::shrink::{Mask, SearchMethod, Selection};

/// By NN-Mass.
fn masses(graph: &Graph) -> Result<Vec<OperatorValues>> {
    let shapes = graph.shapes()?;
    Ok(graph.blocks.iter().map(|block| OperatorValues::mass(shapes[block.output()].c)).collect())
}

/// By the rise of the held-out loss when a block alone is merged, or bypassed, with the other sign.
fn measured(
    run: &mut Run<'_>,
    original: &Model,
    options: &BlockOptions<'_>,
    candidates: &[bool],
) -> Result<Vec<OperatorValues>> {
    let residuals = options.blocks().iter().map(|block| block.has_residual);
    let bypassable: Vec<bool> = candidates.iter().zip(residuals).map(|(candidate, has)| *candidate && has).collect();
    let mut rises = |provider: &dyn Provider, candidates: &[bool]| -> Result<Vec<f64>> {
        let costs = costs(run, original, options, (provider, candidates))?.expect("a provider that measures");
        Ok(costs.costs().iter().map(|cost| cost.unwrap_or_default()).collect())
    };
    let (merged, bypassed) = (rises(&Sensitivity, candidates)?, rises(&RemoveBlock, &bypassable)?);
    let values = |(merged, bypassed): (&f64, &f64)| OperatorValues { kept: 0.0, merged: -merged, bypassed: -bypassed };
    Ok(merged.iter().zip(&bypassed).map(values).collect())
}

/// Chooses operators as the settings say, and leaves `latency.csv` in the folder.
///
/// # Errors
/// A budget that cannot be kept, a table of another network, or a failing device.
pub(super) fn choose_operators(run: &mut Run<'_>, original: &Model, folder: &RunFolder) -> Result<Selection> {
    let graph = &original.graph;
    let (table, positions) = (latency_table(run, original, folder)?, graph.positions()?);
    let candidates = run.config.search.scores.candidates(graph.blocks.len())?;
    let stays: Vec<bool> = candidates.iter().map(|candidate| !candidate).collect();
    let options = BlockOptions::with_kept(&positions, &table, None, &stays)?;
    let values = match run.config.method() {
        SearchMethod::RanOperators => masses(graph)?,
        _ => measured(run, original, &options, &candidates)?,
    };
    let timed = Timed {
        whole_ms: options.time_ms(&Mask::all(graph.blocks.len())),
        least_ms: options.least_operators_ms(),
        select: &|ms| options.operators(&values, ms),
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
