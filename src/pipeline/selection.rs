//! What is taken away: blocks by scores that are trained, or without training by what a provider reckons and the time of blocks; or
//! channels.

use std::cell::RefCell;
use std::collections::HashMap;

use super::by_clock::Timed;
use super::folder::RunFolder;
use super::latency::{TABLE, block_times, kept_table, latency_table};
use super::layers::{choose_layers, random_layers};
use super::operators::choose_operators;
use super::run::{Goal, Run, candidates, nested_masks, planned, without_losses};
use super::widths::{choose_widths, narrowed_ms};
use crate::config::Config;
use crate::graph::Positions;
use crate::measure::LatencyTable;
use crate::model::Model;
use crate::shrink::providers::{Asked, BlockCosts, Judge, Provider, TOLERANCE};
use crate::shrink::select::{BlockOptions, Operators};
use crate::shrink::surgery::linearise;
use crate::shrink::{
    EvolutionConfig, Genome, Importance, Mask, Matched, SearchMethod, Selection, evolve, random_mask, random_masks,
    relative_savings,
};
use crate::{Error, Result};

/// What providers found for a run, in its folder.
pub(super) const FILE: &str = "importance.csv";

/// Gets a selection, and the weights that were trained along with it, before anything else can fail.
pub type KeepSelection<'a> = dyn FnMut(&Selection, Option<&Model>) -> Result<()> + 'a;

/// Chooses blocks, or channels, as the settings say, or takes the choice that they name. Methods that train scores also return the
/// weights that were trained along; others leave `latency.csv` and, where they measure, `importance.csv` in the folder.
///
/// # Errors
/// A budget that cannot be kept, a block that could not be merged, a failing device, [`Error::Interrupted`], or of `keep`.
pub fn choose_blocks(
    run: &mut Run<'_>,
    original: &Model,
    folder: &RunFolder,
    keep: &mut KeepSelection<'_>,
) -> Result<(Selection, Option<Model>)> {
    let method = run.config.method();
    if let Some(path) = &run.config.search.plan {
        run.session.reporter.line(&format!("search: {} has the choice of {method}", path.display()));
        let selection = Selection { method: Some(method), ..planned(path, method, &original.graph)? };
        if selection.latency_share.is_none() && run.config.latency.file().is_some() {
            latency_table(run, original, folder)?;
        }
        keep(&selection, None)?;
        return Ok((selection, None));
    }
    run.session.reporter.line(&format!("search: by {method}, for {}", run.config.budget));
    let named = |selection: &Selection| Selection { method: Some(method), ..selection.clone() };
    let keep: &mut KeepSelection<'_> = &mut |selection, model| keep(&named(selection), model);
    if method.trains() {
        let (selection, weights) = trained(run, original, folder, keep)?;
        return Ok((named(&selection), weights));
    }
    let selection = match (method.layers(), method.provider()) {
        (Some(method), _) => choose_layers(run, original, folder, method)?,
        (None, Some(provider)) => without_training(run, original, folder, provider)?,
        (None, None) if method.narrows() => choose_widths(run, original, folder)?,
        (None, None) => choose_operators(run, original, folder)?,
    };
    keep(&selection, None)?;
    Ok((named(&selection), None))
}

/// Learns scores. Within a time, the largest mask of their ranking is taken that keeps it; while it searches, as many blocks are
/// kept as random masks of that time keep.
fn trained(
    run: &mut Run<'_>,
    original: &Model,
    folder: &RunFolder,
    keep: &mut KeepSelection<'_>,
) -> Result<(Selection, Option<Model>)> {
    let config = run.config;
    let (blocks, evolves) = (original.graph.blocks.len(), config.method() == SearchMethod::Updp);
    let times = block_times(run, original, folder)?;
    let keep = &mut |selection: &Selection, model: &Model| keep(selection, Some(model));
    let candidates = config.search.scores.candidates(blocks)?;
    if !config.budget.is_time() {
        let goal = Goal { times: &times, budget: config.budget, mask: &|search| Ok(search.mask()) };
        let (selection, _, model) = run.search(original, goal, keep)?;
        if !evolves {
            return Ok((selection, Some(model)));
        }
        let (size, seed) = (config.budget.kept(&candidates)?, config.search_seed());
        let random = (0..config.search.evolution.population as u64).map(|i| random_mask(&candidates, size, seed, i));
        let evolution = Evolution::new(run, &model, &candidates)?;
        let selection = evolution.best(random.collect(), &|mask| mask.count() == size)?.into();
        keep(&selection, &model)?;
        return Ok((selection, Some(model)));
    }
    let (positions, table) = (original.graph.positions()?, latency_table(run, original, folder)?);
    let options = BlockOptions::with_kept(&positions, &table, None, &kept(&candidates))?;
    let whole_ms = options.time_ms(&Mask::all(blocks));
    let ms = config.budget.time_ms(whole_ms).unwrap_or(whole_ms);
    // Told before hours of training: what no ranking can keep.
    let ms = if config.search.match_latency.is_some() { ms.max(options.least_ms()) } else { ms };
    let mask = |scores: &[f32], ms| Ok(options.ranked(scores, ms)?.kept.expect("a ranking of blocks gives a mask"));
    mask(&vec![0.0; blocks], ms)?;
    let goal = Goal { times: &times, budget: options.expected_size(ms), mask: &|search| mask(&search.ranked(), ms) };
    let (selection, ranked, model) = run.search(original, goal, keep)?;
    if config.search.match_latency.is_none() && !evolves {
        return Ok((selection, Some(model)));
    }
    let (best, matched) = match evolves {
        false => within_time(run, original, &options, &|ms| mask(&ranked, ms))?,
        true => {
            let evolution = Evolution::new(run, &model, &candidates)?;
            within_time(run, original, &options, &|ms| evolution.within(&options, ms))?
        }
    };
    // What ranked the masks of a search that explored to its end says nothing.
    let selection =
        if evolves { Selection { matched, ..best.into() } } else { Selection { keep: best, matched, ..selection } };
    keep(&selection, &model)?;
    Ok((selection, Some(model)))
}

/// The search of UPDP: masks are judged with weights that were trained under all of them.
struct Evolution<'a> {
    judge: Judge<'a>,
    model: &'a Model,
    config: &'a Config,
    candidates: &'a [bool],
    /// Losses of masks that were judged already.
    losses: RefCell<HashMap<Genome, f64>>,
}

impl<'a> Evolution<'a> {
    fn new(run: &'a Run<'_>, model: &'a Model, candidates: &'a [bool]) -> Result<Self> {
        let config = run.config;
        let (settings, seed) = (&config.search.sensitivity, config.search_seed());
        let judge = Judge::new(&run.device, &run.data.train, settings, seed, &run.session.interrupt)?;
        Ok(Self { judge, model, config, candidates, losses: RefCell::default() })
    }

    /// The mask of the least loss that is found within a time, from random ones that take nearly all of it.
    fn within(&self, options: &BlockOptions<'_>, ms: f64) -> Result<Mask> {
        let EvolutionConfig { population, .. } = self.config.search.evolution;
        let (seed, mut first) = (self.config.search_seed(), Vec::new());
        // Near the least time there are few masks.
        for tolerance in [TOLERANCE, 1.0] {
            for count in [population, population.div_ceil(4), 1] {
                if first.is_empty() {
                    first = options.random(ms, tolerance, seed, count).unwrap_or_default();
                }
            }
        }
        if first.is_empty() {
            return options.no_residual(ms).map(|solution| solution.kept.expect("a rule over blocks gives a mask"));
        }
        let first = first.into_iter().filter_map(|solution| solution.kept).collect();
        self.best(first, &|mask| options.time_ms(mask) <= ms)
    }

    fn best(&self, first: Vec<Mask>, fits: &dyn Fn(&Mask) -> bool) -> Result<Mask> {
        let mut loss = |genome: &Genome| {
            if let Some(&known) = self.losses.borrow().get(genome) {
                return Ok(known);
            }
            let loss = self.judge.evaluate(&linearise(self.model, &mask(genome), &self.config.linearise())?)?.loss;
            self.losses.borrow_mut().insert(genome.clone(), loss);
            Ok(loss)
        };
        let choices: Vec<usize> = self.candidates.iter().map(|&candidate| 1 + usize::from(candidate)).collect();
        let genome = |mask: &Mask| mask.kept().iter().map(|&kept| usize::from(kept)).collect();
        let (of, first) = ((&choices[..], self.config.search_seed()), first.iter().map(genome).collect());
        let found = evolve(&self.config.search.evolution, of, first, &|genome| Ok(fits(&mask(genome))), &mut loss)?;
        Ok(mask(&found.expect("a search from masks finds one")))
    }
}

/// The mask that a genome stands for.
fn mask(genome: &Genome) -> Mask {
    Mask::new(genome.iter().map(|gene| *gene == 1).collect())
}

/// The mask that takes the time of the budget: by the table, or where the settings say so by the clock. `select` gives the mask
/// within modelled milliseconds.
fn within_time(
    run: &Run<'_>,
    original: &Model,
    options: &BlockOptions<'_>,
    select: &dyn Fn(f64) -> Result<Mask>,
) -> Result<(Mask, Option<Matched>)> {
    let bypass = run.config.method().bypasses();
    Timed {
        whole_ms: options.time_ms(&Mask::all(options.blocks().len())),
        least_ms: options.least_ms(),
        select,
        time_ms: &|mask| options.time_ms(mask),
        selection: &|mask| Selection { bypass, ..mask.clone().into() },
    }
    .within_budget(run, original)
}

/// Frees the blocks that a provider chooses: within the time where the budget is one, else as many as it says, of which blocks
/// that merging makes slower are left out where the budget can do without them.
fn without_training(
    run: &mut Run<'_>,
    original: &Model,
    folder: &RunFolder,
    provider: &dyn Provider,
) -> Result<Selection> {
    let (config, budget, seed) = (run.config, run.config.budget, run.config.search_seed());
    let blocks = original.graph.blocks.len();
    let candidates = candidates(config, &original.graph)?;
    let positions = original.graph.positions()?;
    let table = latency_table(run, original, folder)?;
    let plain = block_options(config, &positions, &table, None, &candidates)?;
    let costs = costs(run, original, &plain, (provider, &candidates))?;
    let importance = match &costs {
        Some(costs) => Some(costs.importance(&folder.path(FILE), &positions)?),
        None => None,
    };
    if let Some(importance) = importance.as_ref().filter(|_| provider.is_measured()) {
        folder.write(FILE, &importance.to_csv())?;
    }
    let options = block_options(config, &positions, &table, importance.as_ref(), &candidates)?;
    let whole_ms = options.time_ms(&Mask::all(blocks));
    let scores = costs.as_ref().map(BlockCosts::scores).unwrap_or_default();
    let within = |ms| Ok(provider.within(&options, ms, seed)?.kept.expect("a choice of blocks gives a mask"));
    let (mask, matched) = match budget.is_time() {
        true => within_time(run, original, &options, &within)?,
        false => {
            let times: Vec<_> = options.blocks().iter().map(|block| (block.kept_ms, block.merged_ms)).collect();
            let fewer = without_losses(&config.search.scores, budget, &relative_savings(&times))?;
            let candidates = fewer.candidates(blocks)?;
            (provider.of_size(&scores, &candidates, budget.kept(&candidates)?, seed), None)
        }
    };
    let share = 100.0 * options.time_ms(&mask) / whole_ms.max(f64::MIN_POSITIVE);
    run.session.reporter.line(&format!(
        "search: {} of {blocks} blocks keep their activations, {share:.1} % of the time ({}): {mask}",
        mask.count(),
        config.latency.describe(&run.device)
    ));
    let nested = if scores.is_empty() { Vec::new() } else { nested_masks(&scores, &candidates)? };
    Ok(Selection { scores, nested, matched, bypass: provider.bypasses(), ..mask.into() })
}

/// What a provider reckons for the candidates.
///
/// # Errors
/// As the provider, and [`Error::Interrupted`].
pub(super) fn costs(
    run: &mut Run<'_>,
    original: &Model,
    options: &BlockOptions<'_>,
    (provider, candidates): (&dyn Provider, &[bool]),
) -> Result<Option<BlockCosts>> {
    let config = run.config;
    let (session, images) = (&mut run.session, &run.data.train);
    let seed = config.search_seed();
    let judge = Judge::new(&run.device, images, &config.search.sensitivity, seed, &session.interrupt)?;
    let (linearise, train, distill) = (&config.linearise(), &config.search.train, &config.finetune.distill);
    let asked = Asked { judge: &judge, model: original, candidates, linearise, options, train, distill };
    let (reporter, mut begun) = (&mut session.reporter, false);
    let mut done = |done: usize, total: usize| {
        if !std::mem::replace(&mut begun, true) {
            reporter.begin("search", 0, total as u64);
        }
        reporter.step(done as u64, "passes");
    };
    let costs = provider.costs(&asked, &mut done);
    reporter.end();
    match costs {
        Err(Error::Interrupted(_)) => Err(run.session.interrupted()),
        other => other,
    }
}

/// Random selections that take no more time than the selected one and hardly less, each with its number: of operators or of
/// layers where those were chosen, else of blocks that merge, whatever the selected one does with them.
///
/// # Errors
/// Too few of them.
fn random_of_equal_time(
    run: &Run<'_>,
    original: &Model,
    folder: &RunFolder,
    selected: &Selection,
    count: usize,
) -> Result<Vec<(u64, Selection)>> {
    let method = run.config.method();
    if let Some(method) = method.layers() {
        let drawn = random_layers(run, original, folder, (method, selected), count)?;
        return Ok((0..).zip(drawn).collect());
    }
    let graph = &original.graph;
    let (table, ms) = (kept_table(folder)?, selected_ms(run, original, folder, selected)?);
    let positions = graph.positions()?;
    let all = run.config.search.scores.candidates(graph.blocks.len())?;
    let options = BlockOptions::with_kept(&positions, &table, None, &kept(&all))?;
    let seed = run.config.seed;
    let drawn: Vec<Selection> = match method.chooses_operators() {
        true => {
            let operators = options.random_operators(ms, TOLERANCE, seed, count + 1)?;
            operators.iter().map(|operators| operators.selection(graph)).collect()
        }
        false => {
            let solutions = options.random(ms, TOLERANCE, seed, count + 1)?;
            solutions.into_iter().filter_map(|solution| solution.kept).map(Selection::from).collect()
        }
    };
    let is_other = |random: &Selection| (&random.keep, &random.bypassed) != (&selected.keep, &selected.bypassed);
    Ok((0..).zip(drawn.into_iter().filter(is_other)).take(count).collect())
}

/// Time of a selection by the latency table that a run has kept, as a share of that of the whole network; `None` where no table was
/// needed.
///
/// # Errors
/// A table that cannot be read.
pub fn latency_share(run: &Run<'_>, original: &Model, folder: &RunFolder, selected: &Selection) -> Result<Option<f64>> {
    if selected.latency_share.is_some() || !folder.has(TABLE) {
        return Ok(selected.latency_share);
    }
    let whole: Selection = Mask::all(original.graph.blocks.len()).into();
    let whole_ms = selected_ms(run, original, folder, &whole)?;
    Ok(Some(selected_ms(run, original, folder, selected)? / whole_ms.max(f64::MIN_POSITIVE)))
}

/// Milliseconds of a selection by the latency table that a run has kept.
fn selected_ms(run: &Run<'_>, original: &Model, folder: &RunFolder, selected: &Selection) -> Result<f64> {
    let table = kept_table(folder)?;
    if let Some(channels) = &selected.channels {
        return narrowed_ms(run, original, &table, channels);
    }
    let candidates = candidates(run.config, &original.graph)?;
    let positions = original.graph.positions()?;
    let options = block_options(run.config, &positions, &table, None, &candidates)?;
    if let Some(share) = selected.latency_share {
        return Ok(share * options.time_ms(&Mask::all(original.graph.blocks.len())));
    }
    if selected.bypassed.is_empty() {
        return Ok(options.time_ms(&selected.keep));
    }
    Ok(options.operators_ms(&Operators::of(selected, &original.graph)))
}

/// The blocks with their times, freed as the method of the settings frees them.
fn block_options<'a>(
    config: &Config,
    positions: &'a Positions,
    table: &LatencyTable,
    importance: Option<&Importance>,
    candidates: &[bool],
) -> Result<BlockOptions<'a>> {
    let options = BlockOptions::with_kept(positions, table, importance, &kept(candidates))?;
    Ok(if config.method().bypasses() { options.bypassed() } else { options })
}

fn kept(candidates: &[bool]) -> Vec<bool> {
    candidates.iter().map(|candidate| !candidate).collect()
}

/// Random selections that a run compares with the selected one: of equal time where a table decided, else of equal size.
///
/// # Errors
/// Too few of equal time.
pub fn selections_to_compare(
    run: &Run<'_>,
    original: &Model,
    folder: &RunFolder,
    selected: &Selection,
) -> Result<Vec<(u64, Selection)>> {
    let (config, count) = (run.config, run.config.compare_random);
    if count > 0 && config.of_equal_time() {
        return random_of_equal_time(run, original, folder, selected, count);
    }
    let candidates = config.search.scores.candidates(selected.keep.blocks())?;
    let masks = random_masks(&candidates, selected.keep.count(), config.seed, count, &selected.keep);
    Ok(masks.into_iter().map(|(seed, mask)| (seed, mask.into())).collect())
}
