//! The search without training: one-block sensitivities, a latency table, and an exact knapsack.

use super::folder::RunFolder;
use super::latency::{kept_table, latency_table};
use super::run::{Run, nested_masks, without_losses};
use crate::config::SearchMethod;
use crate::model::Model;
use crate::shrink::select::BlockOptions;
use crate::shrink::{Judge, Mask, Selection, Sensitivities, random_masks, relative_savings};
use crate::{Error, Result};

/// The sensitivities of a run in its folder.
const FILE: &str = "importance.csv";
/// How much less time than the selected mask a random one may take, as a share.
const TOLERANCE: f64 = 0.05;

/// Frees the blocks whose sensitivities have the smallest sum within the budget: by an exact knapsack where the budget is a
/// time, else those of the smallest ones, as many as it says. Leaves `importance.csv` and `latency.csv` in the folder.
///
/// # Errors
/// A budget that cannot be kept, a block that could not be merged, a failing device, or [`Error::Interrupted`].
pub fn select_by_sensitivity(run: &mut Run<'_>, original: &Model, folder: &RunFolder) -> Result<Selection> {
    let (config, budget) = (run.config, run.config.budget);
    let blocks = original.graph.blocks.len();
    let candidates = config.search.scores.candidates(blocks)?;
    let positions = original.graph.positions()?;
    let table = latency_table(run, original, folder)?;
    let measured = measure(run, original, &candidates)?;
    let importance = measured.importance(&folder.path(FILE), &positions)?;
    folder.write(FILE, &importance.to_csv())?;
    let options = BlockOptions::with_kept(&positions, &table, Some(&importance), &kept(&candidates))?;
    let whole_ms = options.time_ms(&Mask::all(blocks));
    let scores = measured.scores();
    let mask = match budget.time_ms(whole_ms) {
        Some(ms) => options.knapsack(ms)?.kept.expect("a knapsack over blocks gives a mask"),
        None => {
            let times: Vec<_> = options.blocks().iter().map(|block| (block.kept_ms, block.merged_ms)).collect();
            let fewer = without_losses(&config.search.scores, budget, &relative_savings(&times))?;
            let candidates = fewer.candidates(blocks)?;
            Mask::top_k(&scores, &candidates, budget.kept(&candidates)?)
        }
    };
    let share = 100.0 * options.time_ms(&mask) / whole_ms.max(f64::MIN_POSITIVE);
    run.session.reporter.line(&format!(
        "search: {} of {blocks} blocks keep their activations, {share:.1} % of the time ({}): {mask}",
        mask.count(),
        config.latency.describe(&run.device)
    ));
    let nested = nested_masks(&scores, &candidates)?;
    Ok(Selection { scores, nested, ..mask.into() })
}

fn measure(run: &mut Run<'_>, original: &Model, candidates: &[bool]) -> Result<Sensitivities> {
    let config = run.config;
    let total = 1 + candidates.iter().filter(|candidate| **candidate).count() as u64;
    let (session, images) = (&mut run.session, &run.data.train);
    session.reporter.begin("search", 0, total);
    let judge = Judge::new(&run.device, images, &config.search.sensitivity, config.seed, &session.interrupt)?;
    let reporter = &mut session.reporter;
    let mut progress = |done: usize| reporter.step(done as u64, "networks judged");
    let measured = Sensitivities::measure(&judge, original, candidates, &config.linearise(), &mut progress);
    reporter.end();
    match measured {
        Err(Error::Interrupted(_)) => Err(run.session.interrupted()),
        other => other,
    }
}

/// Random masks that take no more time than a selected one and hardly less, each with its number.
///
/// # Errors
/// Too few of them.
pub fn random_of_equal_time(
    run: &Run<'_>,
    original: &Model,
    folder: &RunFolder,
    selected: &Mask,
    count: usize,
) -> Result<Vec<(u64, Mask)>> {
    let blocks = original.graph.blocks.len();
    let candidates = run.config.search.scores.candidates(blocks)?;
    let positions = original.graph.positions()?;
    let options = BlockOptions::with_kept(&positions, &kept_table(folder)?, None, &kept(&candidates))?;
    let solutions = options.random(options.time_ms(selected), TOLERANCE, run.config.seed, count + 1)?;
    let masks = solutions.into_iter().filter_map(|solution| solution.kept).filter(|mask| mask != selected);
    Ok((0..).zip(masks).take(count).collect())
}

fn kept(candidates: &[bool]) -> Vec<bool> {
    candidates.iter().map(|candidate| !candidate).collect()
}

/// Random masks that a run compares with the selected one: of equal time where a table decided, else of equal size.
///
/// # Errors
/// As [`random_of_equal_time`].
pub fn masks_to_compare(
    run: &Run<'_>,
    original: &Model,
    folder: &RunFolder,
    selected: &Mask,
) -> Result<Vec<(u64, Mask)>> {
    let (config, count) = (run.config, run.config.compare_random);
    if count > 0 && config.search.method == SearchMethod::Sensitivity {
        return random_of_equal_time(run, original, folder, selected, count);
    }
    let candidates = config.search.scores.candidates(selected.blocks())?;
    Ok(random_masks(&candidates, selected.count(), config.seed, count, selected))
}
