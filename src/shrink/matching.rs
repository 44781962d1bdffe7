//! Matching a budget by the clock: a method's modelled budget is moved until the network that it selects takes the asked share
//! of the original's time, measured (`docs/methods.md` 1.11).

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::measure::median;

/// Networks that are measured at most.
const MAX_NETWORKS: usize = 10;
/// Budgets that are tried at most; most of them select a mask that is known.
const MAX_BUDGETS: usize = 40;
/// Budgets nearer to one another than this share of the whole time are one.
const SAME: f64 = 5e-4;
/// Budgets to either side that are tried in the end, and the share of the budget between them: their masks may take other times than
/// the table says.
const NEIGHBOURS: u32 = 10;
const NEIGHBOUR: f64 = 5e-3;
/// Measurements of the mask that is taken.
pub const CONFIRMATIONS: usize = 5;

/// How near to its budget a selection is by the clock.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Matched {
    /// The share of the original's time that was asked for.
    pub target: f64,
    /// The share that the merged network took, the median of [`CONFIRMATIONS`] measurements.
    pub share: f64,
    /// How far from the target it may be, as a share of the target.
    pub tolerance: f64,
    /// The share that the selection takes by the latency table.
    pub modelled: f64,
    /// Different networks that were measured to find it.
    pub networks: usize,
}

impl Matched {
    /// How much more than the target was taken, as a share of it; below 0 where it was less.
    pub fn error(&self) -> f64 {
        self.share / self.target - 1.0
    }

    /// Whether the target is reached within the tolerance.
    pub fn is_met(&self) -> bool {
        self.error().abs() <= self.tolerance
    }
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Target {
    /// The share of the original's time.
    pub share: f64,
    /// How far from it the measured share may be, as a share of it.
    pub tolerance: f64,
    /// Milliseconds of the original by the latency table.
    pub whole_ms: f64,
    /// Milliseconds by the table below which no selection is.
    pub least_ms: f64,
}

/// Moves the modelled budget to the greatest whose selection takes the target's share by the clock, within the tolerance. `select`
/// gives the mask within modelled milliseconds, or another selection, `None` where it has none so small; `time_ms` its modelled
/// time; `measure` its measured share of the original's time. What is returned was measured [`CONFIRMATIONS`] times, and its share is
/// the median of them: one that was near by the luck of a single measurement is dropped for the next. Where no mask of the method
/// comes within the tolerance the nearest is returned, which is not met; `None` where `select` never gave one.
///
/// # Errors
/// Of `select` and `measure`.
pub fn match_share<S: Clone + PartialEq>(
    target: Target,
    select: &mut dyn FnMut(f64) -> Result<Option<S>>,
    time_ms: &dyn Fn(&S) -> f64,
    measure: &mut dyn FnMut(&S) -> Result<f64>,
) -> Result<Option<(S, Matched)>> {
    let mut trials = Trials { target, select, time_ms, measure, measured: Vec::new() };
    trials.narrow()?;
    let mut known = 0;
    while known < trials.measured.len() {
        known = trials.measured.len();
        trials.look_around()?;
        trials.confirm_best()?;
    }
    let Some(best) = trials.best() else { return Ok(None) };
    let Trial { selected, modelled_ms, .. } = &trials.measured[best];
    let Target { share: wanted, tolerance, whole_ms, .. } = target;
    let matched = Matched {
        target: wanted,
        share: trials.measured[best].share(),
        tolerance,
        modelled: modelled_ms / whole_ms.max(f64::MIN_POSITIVE),
        networks: trials.measured.len(),
    };
    Ok(Some((selected.clone(), matched)))
}

/// A mask, its time by the table, and the shares of the original's time that were measured of it.
struct Trial<S> {
    selected: S,
    modelled_ms: f64,
    shares: Vec<f64>,
}

impl<S> Trial<S> {
    /// The median of what was measured: now and then something else slows the machine down, and not both networks alike.
    fn share(&self) -> f64 {
        median(&self.shares)
    }
}

/// Masks and what they were measured to take.
struct Trials<'a, S> {
    target: Target,
    select: &'a mut dyn FnMut(f64) -> Result<Option<S>>,
    time_ms: &'a dyn Fn(&S) -> f64,
    measure: &'a mut dyn FnMut(&S) -> Result<f64>,
    measured: Vec<Trial<S>>,
}

impl<S: Clone + PartialEq> Trials<'_, S> {
    /// Halves the interval of budgets between those whose mask takes no more than may be, and those whose mask takes more.
    fn narrow(&mut self) -> Result<()> {
        let Target { share, tolerance, whole_ms, least_ms } = self.target;
        let most = share * (1.0 + tolerance);
        let (mut low, mut high) = (least_ms, whole_ms);
        let mut budget = (share * whole_ms).clamp(low, high);
        for turn in 0..MAX_BUDGETS {
            let mut guess = None;
            match self.at(budget)? {
                None => low = budget,
                Some(trial) => {
                    // A budget between the mask's own time and this one selects the same mask again.
                    if trial.share() > most {
                        high = budget.min(trial.modelled_ms);
                    } else {
                        low = budget;
                    }
                    guess = Some(budget * most / trial.share());
                }
            }
            if high - low <= SAME * whole_ms || self.is_full() {
                break;
            }
            // Where the table is wrong by a factor the first guess is right; halving ends what it does not.
            let inside =
                |guess: &f64| turn % 2 == 0 && *guess > low + SAME * whole_ms && *guess < high - SAME * whole_ms;
            budget = guess.filter(inside).unwrap_or(0.5 * (low + high));
        }
        Ok(())
    }

    /// Tries budgets beside that of the nearest mask until one is within the tolerance.
    fn look_around(&mut self) -> Result<()> {
        let Target { share: wanted, whole_ms, least_ms, .. } = self.target;
        for offset in (1..=NEIGHBOURS).flat_map(|step| [-1.0, 1.0].map(|sign| 1.0 + sign * NEIGHBOUR * f64::from(step)))
        {
            let Some(best) = self.best() else { break };
            let nearest = &self.measured[best];
            if self.is_within(nearest) || self.is_full() {
                break;
            }
            let budget = offset * nearest.modelled_ms * wanted / nearest.share();
            self.at(budget.clamp(least_ms, whole_ms))?;
        }
        Ok(())
    }

    /// Measures the best mask again, until one that was measured often enough is still the best.
    fn confirm_best(&mut self) -> Result<()> {
        while let Some(best) = self.best() {
            let trial = &mut self.measured[best];
            if trial.shares.len() >= CONFIRMATIONS {
                break;
            }
            trial.shares.push((self.measure)(&trial.selected)?);
        }
        Ok(())
    }

    /// The mask within a budget, measured; `None` where there is none.
    fn at(&mut self, budget_ms: f64) -> Result<Option<&Trial<S>>> {
        let Some(selected) = (self.select)(budget_ms)? else { return Ok(None) };
        if let Some(known) = self.measured.iter().position(|known| known.selected == selected) {
            return Ok(Some(&self.measured[known]));
        }
        let (modelled_ms, shares) = ((self.time_ms)(&selected), vec![(self.measure)(&selected)?]);
        self.measured.push(Trial { selected, modelled_ms, shares });
        Ok(self.measured.last())
    }

    fn is_full(&self) -> bool {
        self.measured.len() >= MAX_NETWORKS
    }

    fn is_within(&self, trial: &Trial<S>) -> bool {
        (trial.share() / self.target.share - 1.0).abs() <= self.target.tolerance
    }

    /// The greatest by the table of the masks within the tolerance, since a method takes away least for the greatest budget; the
    /// nearest where none is.
    fn best(&self) -> Option<usize> {
        let distance = |trial: &Trial<S>| (trial.share() - self.target.share).abs();
        let all = || 0..self.measured.len();
        let within = all().filter(|&i| self.is_within(&self.measured[i]));
        let greatest = within.max_by(|&a, &b| self.measured[a].modelled_ms.total_cmp(&self.measured[b].modelled_ms));
        greatest.or_else(|| all().min_by(|&a, &b| distance(&self.measured[a]).total_cmp(&distance(&self.measured[b]))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shrink::Mask;

    /// Ten blocks of 1 ms that cost nothing once they are freed, in this order; `clock` has the measured share by the modelled one
    /// and how often it was asked for.
    fn matched(target: f64, tolerance: f64, clock: &dyn Fn(f64, usize) -> f64) -> (Matched, usize) {
        let ranked = |ms: f64| (ms >= 2.0).then(|| Mask::new((0..10).map(|b| f64::from(b) < ms.floor()).collect()));
        let time = |mask: &Mask| mask.count() as f64;
        let mut asked = [0; 11];
        let target = Target { share: target, tolerance, whole_ms: 10.0, least_ms: 1.0 };
        let (mask, found) = match_share(target, &mut |ms| Ok(ranked(ms)), &time, &mut |mask| {
            let asked = &mut asked[mask.count()];
            *asked += 1;
            assert!(*asked <= CONFIRMATIONS, "a mask is measured no more often than has to be");
            Ok(clock(mask.count() as f64 / 10.0, *asked))
        })
        .unwrap()
        .unwrap();
        let all: Vec<f64> = (1..=CONFIRMATIONS).map(|time| clock(found.modelled, time)).collect();
        assert!(found.share == median(&all) && asked[mask.count()] == CONFIRMATIONS);
        assert_eq!(found.networks, asked.iter().filter(|&&times| times > 0).count());
        (found, mask.count())
    }

    #[test]
    fn the_clock_decides_and_not_the_table() {
        let (found, kept) = matched(0.7, 0.02, &|share, _| share);
        assert!(found.is_met() && kept == 7);
        // Freed blocks still take half of their time: 0.5 + 0.5·share.
        let slow = |share: f64| 0.5 + 0.5 * share;
        let (found, kept) = matched(0.75, 0.02, &|share, _| slow(share));
        assert!(found.is_met() && kept == 5, "{found:?}");
        let (found, kept) = matched(0.9, 0.02, &|share, _| slow(share));
        assert!(found.is_met() && kept == 8, "{found:?}");
        // Noise that follows the mask: it is still found.
        let noisy = |share: f64| slow(share) * (1.0 + 0.01 * (share * 90.0).sin());
        assert!(matched(0.8, 0.02, &|share, _| noisy(share)).0.is_met());
    }

    #[test]
    fn the_greatest_within_the_tolerance_is_taken() {
        // Four to nine kept blocks take 0.59 to 0.64 of the time: all are within 5 % of 0.615.
        let flat = |share: f64, _: usize| 0.55 + 0.1 * share;
        let (found, kept) = matched(0.615, 0.05, &flat);
        assert!(found.is_met() && kept == 9, "{found:?}");
    }

    #[test]
    fn one_lucky_measurement_is_no_match() {
        // Eight blocks take 0.83 of the time, and were seen once at 0.734.
        let lucky = |share: f64, time: usize| match (share, time) {
            (s, 1) if (s - 0.8).abs() < 1e-9 => 0.734,
            (s, _) if (s - 0.8).abs() < 1e-9 => 0.83,
            (s, _) => s + 0.02,
        };
        let (found, kept) = matched(0.72, 0.02, &lucky);
        assert!(found.is_met() && kept == 7 && found.networks > 1, "{found:?}");
    }

    #[test]
    fn what_cannot_be_reached_is_the_nearest_and_told() {
        let (found, kept) = matched(0.76, 0.02, &|share, _| share);
        assert!(!found.is_met() && kept == 8, "{found:?}");
        assert!((found.error() - (0.8 / 0.76 - 1.0)).abs() < 1e-12);
        // Below the least that the method has, and above what a network without freed blocks takes.
        let (found, kept) = matched(0.1, 0.02, &|share, _| share);
        assert!(!found.is_met() && kept == 2 && found.error() > 0.9, "{found:?}");
        let (found, _) = matched(0.9, 0.02, &|share, _| 0.5 * share);
        assert!(!found.is_met() && found.error() < 0.0, "{found:?}");
        let none = Target { share: 0.5, tolerance: 0.02, whole_ms: 10.0, least_ms: 1.0 };
        assert_eq!(match_share::<Mask>(none, &mut |_| Ok(None), &|_| 0.0, &mut |_| Ok(1.0)).unwrap(), None);
    }
}
