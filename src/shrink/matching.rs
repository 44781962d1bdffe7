//! Matching a budget by the clock: a method's modelled budget is moved until the network that it selects takes the asked share
//! of the original's time, measured (`docs/methods.md` 1.11).

use serde::{Deserialize, Serialize};

use crate::Result;

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

/// How near to its budget a selection is by the clock.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Matched {
    /// The share of the original's time that was asked for.
    pub target: f64,
    /// The share that the merged network took.
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

/// Moves the modelled budget until the measured share is within the tolerance of the target. `select` gives the mask within
/// modelled milliseconds, or another selection, `None` where it has none so small; `time_ms` its modelled time; `measure` its measured
/// share of the original's time, asked once for each. Returns the one whose share is nearest to the target, which is not met where
/// no mask of the method comes so near or the clock is too noisy; `None` where `select` never gave one.
///
/// # Errors
/// Of `select` and `measure`.
pub fn match_share<S: Clone + PartialEq>(
    target: Target,
    select: &mut dyn FnMut(f64) -> Result<Option<S>>,
    time_ms: &dyn Fn(&S) -> f64,
    measure: &mut dyn FnMut(&S) -> Result<f64>,
) -> Result<Option<(S, Matched)>> {
    let Target { share: wanted, tolerance, whole_ms, least_ms } = target;
    let mut trials = Trials { select, measure, measured: Vec::new() };
    // Masks of `low` take too little time or are none, those of `high` too much.
    let (mut low, mut high) = (least_ms, whole_ms);
    let mut budget = (wanted * whole_ms).clamp(low, high);
    for turn in 0..MAX_BUDGETS {
        let mut guess = None;
        match trials.share(budget)? {
            None => low = budget,
            Some((_, share)) if (share / wanted - 1.0).abs() <= tolerance => break,
            Some((mask, share)) => {
                // A budget between the mask's own time and this one selects the same mask again.
                if share > wanted {
                    high = budget.min(time_ms(&mask));
                } else {
                    low = budget;
                }
                guess = Some(budget * wanted / share);
            }
        }
        if high - low <= SAME * whole_ms || trials.is_full() {
            break;
        }
        // Where the table is wrong by a factor the first guess is right; halving ends what it does not.
        let inside = |guess: &f64| turn % 2 == 0 && *guess > low + SAME * whole_ms && *guess < high - SAME * whole_ms;
        budget = guess.filter(inside).unwrap_or(0.5 * (low + high));
    }
    let mut nearest = trials.nearest(wanted);
    let offsets = (1..=NEIGHBOURS).flat_map(|step| [-1.0, 1.0].map(|sign| 1.0 + sign * NEIGHBOUR * f64::from(step)));
    for offset in offsets {
        let Some((mask, share)) = &nearest else { break };
        if (share / wanted - 1.0).abs() <= tolerance || trials.is_full() {
            break;
        }
        trials.share((offset * time_ms(mask) * wanted / share).clamp(least_ms, whole_ms))?;
        nearest = trials.nearest(wanted);
    }
    Ok(nearest.map(|(mask, share)| {
        let modelled = time_ms(&mask) / whole_ms.max(f64::MIN_POSITIVE);
        (mask, Matched { target: wanted, share, tolerance, modelled, networks: trials.measured.len() })
    }))
}

/// Masks and what they were measured to take.
struct Trials<'a, S> {
    select: &'a mut dyn FnMut(f64) -> Result<Option<S>>,
    measure: &'a mut dyn FnMut(&S) -> Result<f64>,
    measured: Vec<(S, f64)>,
}

impl<S: Clone + PartialEq> Trials<'_, S> {
    /// The mask within a budget and its share of the original's time; `None` where there is none.
    fn share(&mut self, budget_ms: f64) -> Result<Option<(S, f64)>> {
        let Some(mask) = (self.select)(budget_ms)? else { return Ok(None) };
        if let Some(known) = self.measured.iter().find(|(known, _)| *known == mask) {
            return Ok(Some(known.clone()));
        }
        let share = (self.measure)(&mask)?;
        self.measured.push((mask.clone(), share));
        Ok(Some((mask, share)))
    }

    fn is_full(&self) -> bool {
        self.measured.len() >= MAX_NETWORKS
    }

    fn nearest(&self, wanted: f64) -> Option<(S, f64)> {
        self.measured.iter().min_by(|a, b| (a.1 - wanted).abs().total_cmp(&(b.1 - wanted).abs())).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shrink::Mask;

    /// Ten blocks of 1 ms that cost nothing once they are freed, in this order; measured times are other than modelled ones.
    fn matched(target: f64, tolerance: f64, clock: &dyn Fn(f64) -> f64) -> (Matched, usize) {
        let ranked = |ms: f64| (ms >= 2.0).then(|| Mask::new((0..10).map(|b| f64::from(b) < ms.floor()).collect()));
        let time = |mask: &Mask| mask.count() as f64;
        let mut asked = Vec::new();
        let target = Target { share: target, tolerance, whole_ms: 10.0, least_ms: 1.0 };
        let (mask, found) = match_share(target, &mut |ms| Ok(ranked(ms)), &time, &mut |mask| {
            assert!(!asked.contains(mask), "a mask is measured once");
            asked.push(mask.clone());
            Ok(clock(mask.count() as f64 / 10.0))
        })
        .unwrap()
        .unwrap();
        assert_eq!((found.share, found.networks), (clock(mask.count() as f64 / 10.0), asked.len()));
        (found, mask.count())
    }

    #[test]
    fn the_clock_decides_and_not_the_table() {
        let exact = |share: f64| share;
        let (found, kept) = matched(0.7, 0.02, &exact);
        assert!(found.is_met() && kept == 7 && found.networks == 1);
        // Freed blocks still take half of their time: 0.5 + 0.5·share.
        let slow = |share: f64| 0.5 + 0.5 * share;
        let (found, kept) = matched(0.75, 0.02, &slow);
        assert!(found.is_met() && kept == 5, "{found:?}");
        let (found, kept) = matched(0.9, 0.02, &slow);
        assert!(found.is_met() && kept == 8, "{found:?}");
        // Noise that follows the mask: it is still found.
        let noisy = |share: f64| slow(share) * (1.0 + 0.01 * (share * 90.0).sin());
        assert!(matched(0.8, 0.02, &noisy).0.is_met());
    }

    #[test]
    fn what_cannot_be_reached_is_the_nearest_and_told() {
        let exact = |share: f64| share;
        let (found, kept) = matched(0.76, 0.02, &exact);
        assert!(!found.is_met() && kept == 8, "{found:?}");
        assert!((found.error() - (0.8 / 0.76 - 1.0)).abs() < 1e-12);
        // Below the least that the method has, and above what a network without freed blocks takes.
        let (found, kept) = matched(0.1, 0.02, &exact);
        assert!(!found.is_met() && kept == 2 && found.error() > 0.9, "{found:?}");
        let (found, _) = matched(0.9, 0.02, &|share| 0.5 * share);
        assert!(!found.is_met() && found.error() < 0.0, "{found:?}");
        let none = Target { share: 0.5, tolerance: 0.02, whole_ms: 10.0, least_ms: 1.0 };
        assert_eq!(match_share::<Mask>(none, &mut |_| Ok(None), &|_| 0.0, &mut |_| Ok(1.0)).unwrap(), None);
    }
}
