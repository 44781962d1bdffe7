//! The selection that takes the time of a budget: by the table, or where the settings say so by the clock.

use std::fmt::Display;
use std::time::Duration;

use super::benchmark::fully_merged;
use super::run::Run;
use crate::measure::compare;
use crate::model::Model;
use crate::shrink::{Matched, Selection, Target, match_share};
use crate::{Error, Result};

/// Part of the measuring time that each network gets which is tried to match a budget.
const MATCH_SHARE: f64 = 0.25;
/// How much longer the original may take than in the fastest measurement of it, as a factor: beyond, something else uses the machine,
/// which does not slow both networks down alike, and it is measured again.
const CALM: f64 = 1.1;
/// Measurements for one that is calm; of as many that are not, the one with the fastest original counts.
const ATTEMPTS: usize = 4;

/// What selects within a time, and what that is.
pub(super) struct Timed<'a, S> {
    /// Milliseconds of the network as it is by the table.
    pub whole_ms: f64,
    /// Milliseconds by the table below which nothing is.
    pub least_ms: f64,
    /// What is selected within modelled milliseconds; a configuration error where nothing is so fast.
    pub select: &'a dyn Fn(f64) -> Result<S>,
    /// What it takes by the table.
    pub time_ms: &'a dyn Fn(&S) -> f64,
    /// What it makes of the network.
    pub selection: &'a dyn Fn(&S) -> Selection,
}

impl<S: Clone + PartialEq + Display> Timed<'_, S> {
    /// The budget of a run in milliseconds.
    pub fn budget_ms(&self, run: &Run<'_>) -> f64 {
        run.config.budget.time_ms(self.whole_ms).unwrap_or(self.whole_ms)
    }

    /// What takes the time of the budget.
    pub fn within_budget(&self, run: &Run<'_>, original: &Model) -> Result<(S, Option<Matched>)> {
        let Self { whole_ms, least_ms, select, time_ms, selection } = *self;
        let ms = self.budget_ms(run);
        let Some(tolerance) = run.config.search.match_latency else { return Ok((select(ms)?, None)) };
        let target = Target { share: ms / whole_ms.max(f64::MIN_POSITIVE), tolerance, whole_ms, least_ms };
        let some = |ms: f64| match select(ms) {
            // Nothing takes so little time.
            Err(Error::Config(_)) => Ok(None),
            other => other.map(Some),
        };
        let (config, session) = (run.config, &run.session);
        let mut clock = Clock { run, original, fastest_ms: f64::INFINITY };
        let mut measure = |selected: &S| {
            session.check_interrupt()?;
            let Some(merged) = fully_merged(original, Some(&selection(selected)), config)? else { return Ok(1.0) };
            let share = clock.share(&merged)?;
            let percent = 100.0 * share;
            session.reporter.line(&format!("search: {percent:.1} % of the original's time measured: {selected}"));
            Ok(share)
        };
        let found = match_share(target, &mut |ms| some(ms), time_ms, &mut measure)?;
        let Some((selected, matched)) = found else { return Ok((select(ms)?, None)) };
        if !matched.is_met() {
            tracing::warn!(
                "search: {:.1} % of the original's time were asked for; the nearest of {} networks that were measured takes \
                 {:.1} %",
                100.0 * matched.target,
                matched.networks,
                100.0 * matched.share
            );
        }
        Ok((selected, Some(matched)))
    }
}

/// Times networks beside the one they come from.
struct Clock<'a> {
    run: &'a Run<'a>,
    original: &'a Model,
    /// The least time of the original so far.
    fastest_ms: f64,
}

impl Clock<'_> {
    /// Time of a network as a share of the original's.
    fn share(&mut self, merged: &Model) -> Result<f64> {
        let measure = &self.run.config.measure;
        let seconds = Duration::from_secs_f64(MATCH_SHARE * measure.seconds);
        let networks = [("original", self.original), ("merged", merged)];
        let (mut least_ms, mut share) = (f64::INFINITY, 1.0);
        for _ in 0..ATTEMPTS {
            let compared = compare(&self.run.device, &networks, measure.batch, seconds)?;
            let original_ms = compared.networks[0].1.median_ms;
            if original_ms < least_ms {
                // Of pairs that were timed one behind the other.
                (least_ms, share) = (original_ms, 1.0 / compared.speed_up[1]);
            }
            self.fastest_ms = self.fastest_ms.min(least_ms);
            if least_ms <= CALM * self.fastest_ms {
                break;
            }
        }
        Ok(share)
    }
}
