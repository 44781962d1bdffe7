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
        let (config, device, session) = (run.config, &run.device, &run.session);
        let seconds = Duration::from_secs_f64(MATCH_SHARE * config.measure.seconds);
        let mut measure = |selected: &S| {
            session.check_interrupt()?;
            let Some(merged) = fully_merged(original, Some(&selection(selected)), config)? else { return Ok(1.0) };
            let networks = [("original", original), ("merged", &merged)];
            // Of pairs that were timed one behind the other: what slows the machine down meets both.
            let share = 1.0 / compare(device, &networks, config.measure.batch, seconds)?.speed_up[1];
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
