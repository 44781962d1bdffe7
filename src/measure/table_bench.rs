//! Measuring a latency table on a device, and how far its sums lie from whole networks.

use std::path::Path;
use std::time::{Duration, Instant};

use super::latency_table::{LatencyRow, LatencyTable};
use super::launches::Launches;
use super::layer_run::LayerBench;
use super::network_run::NetworkRun;
use super::table_work::{RowWork, TableWork};
use super::timer::median;
use crate::Result;
use crate::device::Device;
use crate::graph::Interval;
use crate::model::Model;

/// How often everything is timed, one piece after the other: what slows the machine down for a while meets one of them.
const SWEEPS: usize = 3;
/// Fewest samples of a piece in a sweep, beside the run that warms it up.
const MIN_SAMPLES: usize = 2;
/// Most samples of a piece in a sweep.
const MAX_SAMPLES: usize = 500;
/// Part of the time that the whole network gets, which is timed again and again between the pieces.
const NETWORK_SHARE: f64 = 0.2;
/// Passes of the network whose median is what the machine does at a moment.
const PASSES: usize = 3;

/// How far a measurement has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableProgress {
    /// Pieces timed, each once a sweep.
    pub done: u64,
    /// All of them.
    pub total: u64,
}

/// A series of times, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Milliseconds {
    /// Their median.
    pub median: f64,
    /// Their standard deviation.
    pub stdev: f64,
}

impl Milliseconds {
    fn of(seconds: &[f64]) -> Self {
        let mean = seconds.iter().sum::<f64>() / seconds.len().max(1) as f64;
        let squares: f64 = seconds.iter().map(|s| (s - mean) * (s - mean)).sum();
        let stdev = (squares / seconds.len().saturating_sub(1).max(1) as f64).sqrt();
        Self { median: median(seconds) * 1e3, stdev: stdev * 1e3 }
    }
}

/// A network in which blocks are merged, by which the rows of merged segments are set.
#[derive(Debug, Clone)]
pub struct MergedNetwork {
    /// The network.
    pub model: Model,
    /// The blocks that are one convolution in it.
    pub merged: Vec<Interval>,
}

/// A measured table.
#[derive(Debug, Clone, PartialEq)]
pub struct MeasuredTable {
    /// The table.
    pub table: LatencyTable,
    /// The whole network.
    pub network: Milliseconds,
    /// What its pieces add up to that were timed one by one, in milliseconds, before the rows were set by whole networks.
    pub sum_ms: f64,
}

impl MeasuredTable {
    /// How much more than the whole network its pieces add up to, as a share of it.
    pub fn relative_error(&self) -> f64 {
        self.sum_ms / self.network.median.max(f64::MIN_POSITIVE) - 1.0
    }
}

/// Whole networks, timed again and again: what the machine does at a moment, by which the times of pieces around it are
/// corrected.
struct Pace<'a> {
    /// The network as it is, and perhaps merged.
    networks: Vec<Launches<'a>>,
    /// Medians of some passes of the first one, seconds.
    moments: Vec<f64>,
    /// All passes of each.
    passes: Vec<Vec<f64>>,
    took: Duration,
    since: Instant,
}

impl<'a> Pace<'a> {
    fn new(networks: Vec<Launches<'a>>) -> Self {
        let passes = vec![Vec::new(); networks.len()];
        Self { networks, moments: Vec::new(), passes, took: Duration::ZERO, since: Instant::now() }
    }

    /// Times the networks in turns, where the last time is long enough ago for their share. Returns the moment that begins.
    fn keep(&mut self) -> Result<usize> {
        let share = self.took.mul_f64((1.0 - NETWORK_SHARE) / NETWORK_SHARE);
        if self.moments.is_empty() || self.since.elapsed() >= share {
            let start = Instant::now();
            for _ in 0..PASSES {
                for (network, passes) in self.networks.iter_mut().zip(&mut self.passes) {
                    passes.push(network.seconds()?);
                }
            }
            self.took = start.elapsed();
            self.since = Instant::now();
            let own = &self.passes[0];
            self.moments.push(median(&own[own.len() - PASSES..]));
        }
        Ok(self.moments.len() - 1)
    }

    /// By how much a time between a moment and the next is longer than at the median of all moments.
    fn slowness(&self, moment: usize) -> f64 {
        let next = self.moments.get(moment + 1).unwrap_or(&self.moments[moment]);
        0.5 * (self.moments[moment] + next) / median(&self.moments).max(f64::MIN_POSITIVE)
    }
}

/// Measures tables on one device.
pub struct TableBench<'a> {
    /// The device.
    pub device: &'a Device,
    /// Images per pass.
    pub batch: usize,
    /// Time for everything together; slow pieces take longer.
    pub budget: Duration,
    /// The network with its blocks merged, where the rows of merged segments are to be set by it.
    pub merged: Option<&'a MergedNetwork>,
}

impl TableBench<'_> {
    /// Times every piece of a table's work, and the network that it is of. `path` is what messages about the table name;
    /// `progress` is called before each piece and may end the measurement.
    ///
    /// # Errors
    /// When the device is out of memory or fails, or what `progress` returns.
    pub fn measure(
        &self,
        path: &Path,
        model: &Model,
        work: &TableWork,
        progress: &mut dyn FnMut(TableProgress) -> Result<()>,
    ) -> Result<MeasuredTable> {
        let bench = LayerBench::new(self.device)?;
        let total = (SWEEPS * work.pieces.len()) as u64;
        let share = (1.0 - NETWORK_SHARE) / (SWEEPS * work.pieces.len().max(1)) as f64;
        let of_piece = self.budget.mul_f64(share);
        // Of every piece, samples with the moment that they were taken in.
        let mut samples: Vec<Vec<(usize, f64)>> = vec![Vec::new(); work.pieces.len()];
        let models = [model].into_iter().chain(self.merged.map(|merged| &merged.model));
        let inference = |model| NetworkRun::inference(self.device, model, self.batch);
        let mut runs = models.map(inference).collect::<Result<Vec<_>>>()?;
        let at_once = runs[0].images_at_once();
        let mut pace = Pace::new(runs.iter_mut().map(NetworkRun::launches).collect::<Result<_>>()?);
        let mut done = 0;
        for _ in 0..SWEEPS {
            for (piece, samples) in work.pieces.iter().zip(&mut samples) {
                progress(TableProgress { done, total })?;
                let moment = pace.keep()?;
                let seconds = sample(&mut bench.passes(&piece.steps, self.batch, at_once)?, of_piece)?;
                samples.extend(seconds.into_iter().map(|seconds| (moment, seconds)));
                self.device.release_idle();
                done += 1;
            }
        }
        pace.keep()?;
        progress(TableProgress { done, total })?;
        let steady = |samples: &Vec<(usize, f64)>| {
            let seconds = samples.iter().map(|&(moment, seconds)| seconds / pace.slowness(moment));
            Milliseconds::of(&seconds.collect::<Vec<f64>>())
        };
        let times: Vec<Milliseconds> = samples.iter().map(steady).collect();
        let rows: Vec<LatencyRow> = work.rows.iter().map(|row| timed(row, work, &times)).collect();
        let is_original = |row: &&LatencyRow| row.at.len() < 2;
        let sum_ms = rows.iter().filter(is_original).map(|row| row.time_ms).sum();
        let network = Milliseconds::of(&pace.passes[0]);
        let whole = self.merged.zip(pace.passes.get(1)).map(|(of, passes)| (of, Milliseconds::of(passes).median));
        let rows = set_by_networks(rows, (network.median, sum_ms), whole);
        Ok(MeasuredTable { table: LatencyTable::new(path, rows)?, network, sum_ms })
    }
}

/// Rows that add up to whole networks. Steps that are timed one by one lack what they cost one another: caches, waiting for the
/// slowest thread, other programs. So the rows of the network as it is are multiplied by its time over their sum; those of
/// merged segments by a factor of their own, with which the blocks of the merged network add up to what it takes, where there is one that
/// takes more than what is left of the original in it.
fn set_by_networks(
    mut rows: Vec<LatencyRow>,
    (network_ms, sum_ms): (f64, f64),
    merged: Option<(&MergedNetwork, f64)>,
) -> Vec<LatencyRow> {
    let alone = network_ms / sum_ms.max(f64::MIN_POSITIVE);
    let factor = |(of, whole_ms): (&MergedNetwork, f64)| {
        let inside = |row: &&LatencyRow| {
            row.at.len() == 1 && of.merged.iter().any(|at| at.st <= row.at.st && row.at.end <= at.end)
        };
        let sum = |rows: &mut dyn Iterator<Item = &LatencyRow>| rows.map(|row| row.time_ms).sum::<f64>();
        let gone = sum(&mut rows.iter().filter(inside));
        let blocks = sum(&mut rows.iter().filter(|row| of.merged.contains(&row.at)));
        (whole_ms - alone * (sum_ms - gone)) / blocks.max(f64::MIN_POSITIVE)
    };
    let segments = merged.map(factor).filter(|factor| *factor > 0.0).unwrap_or(alone);
    for row in &mut rows {
        let factor = if row.at.len() < 2 { alone } else { segments };
        (row.time_ms, row.stdev_ms) = (rounded(row.time_ms * factor), rounded(row.stdev_ms * factor));
    }
    rows
}

/// To the nanosecond, beyond which there is nothing but digits.
fn rounded(ms: f64) -> f64 {
    (ms * 1e6).round() / 1e6
}

/// What a row is multiplied by where the network as it is runs its convolution within a step for several: what that step takes over
/// what their rows add up to.
fn shared(row: &RowWork, work: &TableWork, times: &[Milliseconds]) -> f64 {
    let holds = |at: Interval| row.at.len() == 1 && at.st <= row.at.st && row.at.end <= at.end;
    let Some(shared) = work.shared.iter().find(|shared| holds(shared.at)) else { return 1.0 };
    let is_within =
        |other: &&RowWork| other.at.len() == 1 && shared.at.st <= other.at.st && other.at.end <= shared.at.end;
    let alone = work.rows.iter().filter(is_within).flat_map(|row| &row.pieces).map(|&piece| times[piece].median);
    times[shared.piece].median / alone.sum::<f64>().max(f64::MIN_POSITIVE)
}

/// A row with the times of its pieces.
fn timed(row: &RowWork, work: &TableWork, times: &[Milliseconds]) -> LatencyRow {
    let part = shared(row, work, times);
    let pieces = || row.pieces.iter().map(|&piece| times[piece]);
    let stdev_ms = part * pieces().map(|ms| ms.stdev * ms.stdev).sum::<f64>().sqrt();
    let time_ms = part * pieces().map(|ms| ms.median).sum::<f64>();
    LatencyRow { key: row.key, stdev_ms, ..LatencyRow::new(row.at, time_ms) }
}

/// Samples for about `budget`, the first run not counted.
fn sample(launches: &mut Launches<'_>, budget: Duration) -> Result<Vec<f64>> {
    let (start, mut samples) = (Instant::now(), Vec::new());
    launches.seconds()?;
    for count in 0..MAX_SAMPLES {
        if count >= MIN_SAMPLES && start.elapsed() >= budget {
            break;
        }
        samples.push(launches.seconds()?);
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::networks::{NetworkOptions, build};
    use crate::shape::Shape;

    #[test]
    fn rows_add_up_to_the_networks_that_were_timed() {
        let row = |st, end, ms| LatencyRow::new((st, end), ms);
        let rows =
            || vec![row(0, 0, 1.0), row(0, 1, 2.0), row(1, 2, 3.0), row(2, 3, 4.0), row(3, 3, 0.0), row(1, 3, 5.0)];
        let graph = build("mobilenetv2-0.1", &NetworkOptions::new(Shape::new(32, 32, 1), 3)).unwrap();
        let merged = MergedNetwork { model: Model::initialise(graph, 1).unwrap(), merged: vec![(1, 3).into()] };
        let times = |rows: Vec<LatencyRow>| rows.into_iter().map(|row| row.time_ms).collect::<Vec<_>>();
        // The network takes 20 where its rows add up to 10, and 9 merged: 2·(1 + 2) are left for what is not in the block.
        assert_eq!(times(set_by_networks(rows(), (20.0, 10.0), Some((&merged, 9.0)))), [2.0, 4.0, 6.0, 8.0, 0.0, 3.0]);
        assert_eq!(times(set_by_networks(rows(), (20.0, 10.0), None)), [2.0, 4.0, 6.0, 8.0, 0.0, 10.0]);
        // A merged network that takes less than what is left of the original says nothing.
        assert_eq!(times(set_by_networks(rows(), (20.0, 10.0), Some((&merged, 5.0))))[5], 10.0);
    }
}
