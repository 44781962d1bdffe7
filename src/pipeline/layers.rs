//! The choice of single layers: times and importances of segments, and a solver over them. What is measured is kept row by row in
//! the run's folder, so that a run that was stopped goes on where it was.

use std::fmt;

use super::by_clock::Timed;
use super::folder::RunFolder;
use super::latency::{PRUNED_TABLE, TABLE, latency_table, pruned_table};
use super::run::Run;
use super::selection::FILE;
use crate::measure::LatencyTable;
use crate::model::Model;
use crate::shrink::providers::TOLERANCE;
use crate::shrink::select::Solution;
use crate::shrink::{Importance, Judge, LayerMethod, LayerSearch, Selection};
use crate::{Error, Result};

/// Selects layers as the settings say, within their budget, a time.
///
/// # Errors
/// A budget that cannot be kept, a failing device, a folder that cannot be written, or [`Error::Interrupted`].
pub(super) fn choose_layers(
    run: &mut Run<'_>,
    original: &Model,
    folder: &RunFolder,
    method: LayerMethod,
) -> Result<Selection> {
    let config = run.config;
    let surgery = config.linearise();
    let candidates = config.search.scores.candidates(original.graph.blocks.len())?;
    let search = LayerSearch::new(method, original, &candidates, &surgery)?;
    let table = match method {
        LayerMethod::TwoStageDp => latency_table(run, original, folder)?,
        LayerMethod::LayerMerge => pruned_table(run, original, folder)?,
    };
    let times = search.times(&table)?;
    if config.search.match_latency.is_none() {
        search.check_budget(&times, config.budget.time_ms(times.original_ms()).unwrap_or(f64::MAX))?;
    }
    let importance = importance(run, &search, folder)?;
    let within = |ms: f64| {
        let solution = search.within(&times, &importance, &config.search.segments, ms)?;
        Ok(Chosen { selection: search.selection(&solution, &times)?, solution })
    };
    let timed = Timed {
        whole_ms: times.original_ms(),
        least_ms: times.fixed_ms(),
        select: &within,
        time_ms: &|chosen: &Chosen| chosen.solution.time_ms,
        selection: &|chosen: &Chosen| chosen.selection.clone(),
    };
    let (chosen, matched) = timed.within_budget(run, original)?;
    let share = 100.0 * chosen.selection.latency_share.unwrap_or(1.0);
    let by = config.latency.describe(&run.device);
    run.session.reporter.line(&format!("search: {chosen}, {share:.1} % of the time ({by})"));
    Ok(Selection { matched, ..chosen.selection })
}

/// Draws of random selections for each that is asked for.
const DRAWS: usize = 64;

/// Selections by chance that take no more time than a selected one and hardly less: what the same solver makes of the same
/// importances when they are shuffled among the segments.
///
/// # Errors
/// Too few of them, or files of the run that cannot be read.
pub(super) fn random_layers(
    run: &Run<'_>,
    original: &Model,
    folder: &RunFolder,
    (method, selected): (LayerMethod, &Selection),
    count: usize,
) -> Result<Vec<Selection>> {
    let (config, surgery) = (run.config, run.config.linearise());
    let candidates = config.search.scores.candidates(original.graph.blocks.len())?;
    let search = LayerSearch::new(method, original, &candidates, &surgery)?;
    let file = if method == LayerMethod::LayerMerge { PRUNED_TABLE } else { TABLE };
    let times = search.times(&LatencyTable::read(&folder.path(file))?)?;
    let importance = Importance::read(&folder.path(FILE))?;
    // Sums may be taken in another order than the selected one's.
    let budget_ms = selected.latency_share.unwrap_or(1.0) * times.original_ms() * (1.0 + 1e-9);
    let mut found: Vec<Selection> = Vec::new();
    for draw in 0..(DRAWS * count) as u64 {
        run.session.check_interrupt()?;
        let shuffled = importance.shuffled(config.seed.wrapping_add(draw))?;
        let solution = search.within(&times, &shuffled, &config.search.segments, budget_ms)?;
        let random = search.selection(&solution, &times)?;
        let is_new = random.layers != selected.layers && found.iter().all(|other| other.layers != random.layers);
        if is_new && solution.time_ms >= (1.0 - TOLERANCE) * budget_ms {
            found.push(random);
        }
        if found.len() == count {
            return Ok(found);
        }
    }
    Err(Error::Config(format!(
        "{} of {count} random selections of layers found that take as long as the selected one; ask for fewer",
        found.len()
    )))
}

/// What a solver chose, and as a plan.
#[derive(Debug, Clone, PartialEq)]
struct Chosen {
    solution: Solution,
    selection: Selection,
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Solution { activations, boundaries, pruned, .. } = &self.solution;
        let (positions, segments) = (boundaries.last().copied().unwrap_or(0), self.selection.segments.len());
        write!(f, "activations at {} of {positions} positions, {segments} segments merge", activations.len())?;
        match pruned.as_ref().map_or(0, Vec::len) {
            0 => Ok(()),
            pruned => write!(f, ", {pruned} convolutions pruned"),
        }
    }
}

/// The importances, of which those that the folder has are not measured again.
fn importance(run: &mut Run<'_>, search: &LayerSearch<'_>, folder: &RunFolder) -> Result<Importance> {
    let path = folder.path(FILE);
    let mut rows = match folder.has(FILE) {
        true => Importance::read(&path)?.rows().copied().collect(),
        false => Vec::new(),
    };
    let (config, session) = (run.config, &mut run.session);
    let seed = config.search_seed();
    let settings = &config.search.sensitivity;
    let judge = Judge::new(&run.device, &run.data.train, settings, seed, &session.interrupt)?;
    let (reporter, mut begun) = (&mut session.reporter, false);
    let mut done = |done: usize, total: usize| {
        if !std::mem::replace(&mut begun, true) {
            reporter.begin("search", done as u64, total as u64);
        }
        reporter.step(done as u64, "segments");
    };
    let mut keep = |rows: &[_]| folder.write(FILE, &Importance::new(&path, rows.to_vec())?.to_csv());
    let measured = search.measure((&judge, &config.search.train, seed), &mut rows, &mut done, &mut keep);
    reporter.end();
    match measured {
        Err(Error::Interrupted(_)) => return Err(run.session.interrupted()),
        other => other?,
    }
    // As a run that goes on reads it.
    Importance::read(&path)
}
