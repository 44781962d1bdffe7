//! Numbers of channels within a time: one width multiplier, or a list that is searched (`docs/methods.md` 1.12).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;

use super::by_clock::Timed;
use super::folder::RunFolder;
use super::latency::latency_table;
use super::run::Run;
use crate::measure::{ChannelTimes, LatencyTable};
use crate::model::Model;
use crate::shrink::providers::{Judge, TOLERANCE};
use crate::shrink::{
    ChannelList, EvolutionConfig, Genome, SearchMethod, Selection, Widths, evolve, narrow, narrow_graph,
};
use crate::{Error, Result};

/// Chooses numbers of channels as the settings say, and leaves `latency.csv` in the folder.
///
/// # Errors
/// A budget that is no time or cannot be kept, a failing device, or [`Error::Interrupted`].
pub(super) fn choose_widths(run: &mut Run<'_>, original: &Model, folder: &RunFolder) -> Result<Selection> {
    let table = latency_table(run, original, folder)?;
    let search = WidthChoice::new(run, original, &table)?;
    let time_ms = |list: &ChannelList| search.time_ms(list);
    let (whole_ms, by) = (time_ms(&ChannelList::default())?, run.config.search.channel_order);
    let least_ms = search.widths.least_ms(by, &time_ms)?;
    let ms = run.config.budget.time_ms(whole_ms).unwrap_or(whole_ms);
    let searched = match run.config.method() {
        SearchMethod::WidthSearch => Some(search.evolved(ms.max(least_ms))?),
        _ => None,
    };
    let select = |budget_ms: f64| {
        let list = match &searched {
            None => search.widths.uniform_within(budget_ms, by, &time_ms)?,
            // The clock asks for other times than the table's: what was found is scaled as a whole.
            Some(found) if budget_ms != ms => {
                let genome = search.widths.within(&search.widths.shares(found), budget_ms, &time_ms)?;
                search.widths.list(&genome, by)
            }
            Some(found) if ms >= least_ms => search.widths.list(found, by),
            Some(_) => search.widths.uniform_within(budget_ms, by, &time_ms)?,
        };
        let (stays, of) = search.widths.total(&list);
        Ok(Chosen { ms: time_ms(&list)?, stays, of, list })
    };
    let timed = Timed {
        whole_ms,
        least_ms,
        select: &select,
        time_ms: &|chosen: &Chosen| chosen.ms,
        selection: &|chosen| Selection::of_channels(original.graph.blocks.len(), chosen.list.clone()),
    };
    let (chosen, matched) = timed.within_budget(run, original)?;
    run.session.reporter.line(&format!(
        "search: {chosen}, {:.1} % of the time ({})",
        100.0 * chosen.ms / whole_ms.max(f64::MIN_POSITIVE),
        run.config.latency.describe(&run.device)
    ));
    Ok(Selection { matched, ..(timed.selection)(&chosen) })
}

/// Milliseconds of a network with fewer channels by the latency table of the whole one.
///
/// # Errors
/// A table of another network, or a list that does not fit.
pub(super) fn narrowed_ms(
    run: &Run<'_>,
    original: &Model,
    table: &LatencyTable,
    channels: &ChannelList,
) -> Result<f64> {
    times(run, original, table)?.time_ms(&narrow_graph(&original.graph, channels)?)
}

fn times(run: &Run<'_>, original: &Model, table: &LatencyTable) -> Result<ChannelTimes> {
    table.check_columns(false, false)?;
    table.check(&original.graph.positions()?)?;
    ChannelTimes::new(&original.graph, table, run.config.latency.scaling(&run.device), run.device.backend())
}

/// Numbers of channels and what they take.
#[derive(Debug, Clone, PartialEq)]
struct Chosen {
    list: ChannelList,
    ms: f64,
    stays: usize,
    of: usize,
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} channels stay", self.stays, self.of)
    }
}

/// A choice among the channels of one network.
struct WidthChoice<'a> {
    run: &'a Run<'a>,
    original: &'a Model,
    widths: Widths<'a>,
    times: ChannelTimes,
    /// Times that were asked for already.
    known: RefCell<BTreeMap<BTreeMap<String, usize>, f64>>,
}

impl<'a> WidthChoice<'a> {
    fn new(run: &'a Run<'a>, original: &'a Model, table: &LatencyTable) -> Result<Self> {
        let (widths, times) = (Widths::new(&original.graph)?, times(run, original, table)?);
        Ok(Self { run, original, widths, times, known: RefCell::default() })
    }

    fn time_ms(&self, list: &ChannelList) -> Result<f64> {
        if let Some(&known) = self.known.borrow().get(&list.counts) {
            return Ok(known);
        }
        let ms = self.times.time_ms(&narrow_graph(&self.original.graph, list)?)?;
        self.known.borrow_mut().insert(list.counts.clone(), ms);
        Ok(ms)
    }

    /// The list of the least held-out loss that is found within a time, from the uniform width and random lists that take nearly all
    /// of it. Each is judged with slices of the trained weights, batch-norm statistics renewed.
    fn evolved(&self, ms: f64) -> Result<Genome> {
        let config = self.run.config;
        let (seed, by) = (config.search_seed(), config.search.channel_order);
        let (session, images) = (&self.run.session, &self.run.data.train);
        let judge = Judge::new(&self.run.device, images, &config.search.sensitivity, seed, &session.interrupt)?;
        let EvolutionConfig { population, .. } = config.search.evolution;
        let time_ms = |list: &ChannelList| self.time_ms(list);
        let mut first = self.widths.random(population.saturating_sub(1).max(1), seed, ms, &time_ms)?;
        let fits = |genome: &Genome| Ok(((1.0 - TOLERANCE) * ms..=ms).contains(&self.takes(genome)?));
        match self.widths.uniform_within(ms, by, &time_ms).map(|uniform| self.widths.genome(&uniform)) {
            Ok(uniform) if fits(&uniform)? => first.insert(0, uniform),
            // Few channels have few widths, which may take much less; and lists go below the least width.
            Ok(_) | Err(Error::Config(_)) => {}
            Err(other) => return Err(other),
        }
        let mut loss = |genome: &Genome| {
            let list = self.widths.list(genome, by);
            Ok(judge.evaluate(&narrow(self.original, &list)?)?.loss)
        };
        let choices = self.widths.choices();
        let found = evolve(&config.search.evolution, (&choices, seed), first, &fits, &mut loss)?;
        found.ok_or_else(|| Error::Config("no list of channels takes the time of the budget; give a larger one".into()))
    }

    fn takes(&self, genome: &Genome) -> Result<f64> {
        self.time_ms(&self.widths.list(genome, self.run.config.search.channel_order))
    }
}
