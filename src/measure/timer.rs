//! Repeated timing in strict alternation, and the robust statistics drawn from it.

use std::time::{Duration, Instant};

use crate::Result;

/// Rounds that are run and not counted: they fault pages in and fill caches.
pub const WARM_UP: usize = 2;
/// Fewest counted rounds, even when the budget is spent: a median of less says nothing.
const MIN_ROUNDS: usize = 5;
/// The same where there is no budget at all: who gives no time wants to see that everything runs.
const ROUNDS_WITHOUT_TIME: usize = 1;
/// Most counted rounds: beyond, the median no longer moves.
const MAX_ROUNDS: usize = 2000;

/// One thing to be timed by the host's clock.
pub type Workload<'a> = Box<dyn FnMut() -> Result<()> + 'a>;

/// One thing that is timed by a clock of its own: seconds of one run.
pub(super) type Timed<'a> = Box<dyn FnMut() -> Result<f64> + 'a>;

/// Order statistics of one series of samples, in the samples' own unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// Number of samples.
    pub count: usize,
    /// Smallest sample.
    pub min: f64,
    /// First quartile.
    pub p25: f64,
    /// Median.
    pub median: f64,
    /// Third quartile.
    pub p75: f64,
    /// Interquartile range, `p75 − p25`.
    pub iqr: f64,
}

impl Summary {
    /// Statistics of `samples`; `None` when there are none or one is not a number.
    pub fn of(samples: &[f64]) -> Option<Self> {
        if samples.is_empty() || samples.iter().any(|s| s.is_nan()) {
            return None;
        }
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (p25, median, p75) = (quantile(&sorted, 0.25), quantile(&sorted, 0.5), quantile(&sorted, 0.75));
        Some(Self { count: sorted.len(), min: sorted[0], p25, median, p75, iqr: p75 - p25 })
    }
}

/// The quantile `q` of sorted samples, interpolated between neighbours.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let position = q * (sorted.len() - 1) as f64;
    let (below, share) = (position.floor() as usize, position.fract());
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + share * (sorted[above] - sorted[below])
}

/// The median of `samples`, or 0 when there are none.
pub fn median(samples: &[f64]) -> f64 {
    Summary::of(samples).map_or(0.0, |s| s.median)
}

/// Times every workload once a round, in the given order (A B C A B C …), so that drift of the machine meets all of
/// them alike. Stops after the first round that ends past `budget` (warm-up included), but counts at least 5 rounds, or
/// one where the budget is zero. Returns the seconds of each workload, one entry a round: entries of one index are neighbours in time.
///
/// # Errors
/// What a workload returns.
pub fn alternate(workloads: &mut [Workload<'_>], budget: Duration) -> Result<Vec<Vec<f64>>> {
    let on_host = |workload: &mut Workload<'_>| {
        let before = Instant::now();
        workload()?;
        Ok(before.elapsed().as_secs_f64())
    };
    let mut timed: Vec<Timed<'_>> =
        workloads.iter_mut().map(|workload| Box::new(move || on_host(workload)) as Timed<'_>).collect();
    interleave(&mut timed, budget).into_iter().collect()
}

/// How often to time what should be timed `fewest` times, given time for it.
pub(super) fn fewest_rounds(budget: Duration, fewest: usize) -> usize {
    if budget.is_zero() { ROUNDS_WITHOUT_TIME } else { fewest }
}

/// [`alternate`] for clocks other than the host's. What fails is left out from then on, and the rest goes on.
pub(super) fn interleave(timed: &mut [Timed<'_>], budget: Duration) -> Vec<Result<Vec<f64>>> {
    let start = Instant::now();
    let fewest = fewest_rounds(budget, MIN_ROUNDS);
    let mut outcomes: Vec<Result<Vec<f64>>> = timed.iter().map(|_| Ok(Vec::new())).collect();
    for round in 0..WARM_UP + MAX_ROUNDS {
        if round >= WARM_UP + fewest && start.elapsed() >= budget {
            break;
        }
        for (timed, outcome) in timed.iter_mut().zip(&mut outcomes) {
            let Ok(samples) = outcome else { continue };
            match timed() {
                Ok(seconds) if round >= WARM_UP => samples.push(seconds),
                Ok(_) => {}
                Err(error) => *outcome = Err(error),
            }
        }
    }
    outcomes
}

/// Times one workload: seconds of every counted run. See [`alternate`].
///
/// # Errors
/// What the workload returns.
pub fn sample(workload: impl FnMut() -> Result<()>, budget: Duration) -> Result<Vec<f64>> {
    let mut samples = alternate(&mut [Box::new(workload)], budget)?;
    Ok(samples.remove(0))
}

/// Runs `a` and `b` in alternation for `repeats` rounds after a warm-up and returns the median of time(a) / time(b):
/// above 1, `b` is the faster. Each ratio is of neighbours in time, so slow drift cancels.
///
/// # Errors
/// What a workload returns.
pub fn paired(mut a: impl FnMut() -> Result<()>, mut b: impl FnMut() -> Result<()>, repeats: usize) -> Result<f64> {
    for _ in 0..WARM_UP {
        a()?;
        b()?;
    }
    let mut ratios = Vec::with_capacity(repeats);
    for _ in 0..repeats.max(1) {
        let start = Instant::now();
        a()?;
        let middle = Instant::now();
        b()?;
        let (of_a, of_b) = (middle - start, middle.elapsed());
        ratios.push(of_a.as_secs_f64() / of_b.as_secs_f64().max(f64::MIN_POSITIVE));
    }
    Ok(median(&ratios))
}
