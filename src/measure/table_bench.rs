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
use crate::model::Model;

/// How often everything is timed, one piece after the other: what slows the machine down for a while meets one of them.
const SWEEPS: usize = 3;
/// Fewest samples of a piece in a sweep, beside the run that warms it up.
const MIN_SAMPLES: usize = 2;
/// Most samples of a piece in a sweep.
const MAX_SAMPLES: usize = 500;
/// Share of the time that the whole network gets, with which the table is compared.
const NETWORK_SHARE: f64 = 0.1;

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

/// A measured table.
#[derive(Debug, Clone, PartialEq)]
pub struct MeasuredTable {
    /// The table.
    pub table: LatencyTable,
    /// The whole network.
    pub network: Milliseconds,
    /// What the table says of it: the sum of its single convolutions and of what always runs, in milliseconds.
    pub sum_ms: f64,
}

impl MeasuredTable {
    /// How much more than the whole network its rows add up to, as a share of it.
    pub fn relative_error(&self) -> f64 {
        self.sum_ms / self.network.median.max(f64::MIN_POSITIVE) - 1.0
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
        let share = |part: f64| self.budget.mul_f64(part / SWEEPS as f64);
        let of_piece = share((1.0 - NETWORK_SHARE) / work.pieces.len().max(1) as f64);
        let mut samples: Vec<Vec<f64>> = vec![Vec::new(); work.pieces.len()];
        let (mut network, mut done) = (Vec::new(), 0);
        for _ in 0..SWEEPS {
            let mut whole = NetworkRun::inference(self.device, model, self.batch)?;
            sample(&mut whole.launches()?, share(NETWORK_SHARE), &mut network)?;
            let at_once = whole.images_at_once();
            drop(whole);
            for (piece, samples) in work.pieces.iter().zip(&mut samples) {
                progress(TableProgress { done, total })?;
                sample(&mut bench.passes(&piece.steps, self.batch, at_once)?, of_piece, samples)?;
                self.device.release_idle();
                done += 1;
            }
        }
        progress(TableProgress { done, total })?;
        let times: Vec<Milliseconds> = samples.iter().map(|samples| Milliseconds::of(samples)).collect();
        let rows: Vec<LatencyRow> = work.rows.iter().map(|row| timed(row, &times)).collect();
        let time = |row: &RowWork| row.pieces.iter().map(|&piece| times[piece].median).sum::<f64>();
        let sum_ms = work.original().map(time).sum();
        Ok(MeasuredTable { table: LatencyTable::new(path, rows)?, network: Milliseconds::of(&network), sum_ms })
    }
}

/// A row with the times of its pieces.
fn timed(row: &RowWork, times: &[Milliseconds]) -> LatencyRow {
    let pieces = || row.pieces.iter().map(|&piece| times[piece]);
    let stdev_ms = pieces().map(|ms| ms.stdev * ms.stdev).sum::<f64>().sqrt();
    let time_ms: f64 = pieces().map(|ms| ms.median).sum();
    // To the nanosecond, beyond which there is nothing but digits.
    let rounded = |ms: f64| (ms * 1e6).round() / 1e6;
    LatencyRow { key: row.key, stdev_ms: rounded(stdev_ms), ..LatencyRow::new(row.at, rounded(time_ms)) }
}

/// Adds samples for about `budget`, the first run not counted.
fn sample(launches: &mut Launches<'_>, budget: Duration, samples: &mut Vec<f64>) -> Result<()> {
    let start = Instant::now();
    launches.seconds()?;
    for count in 0..MAX_SAMPLES {
        if count >= MIN_SAMPLES && start.elapsed() >= budget {
            break;
        }
        samples.push(launches.seconds()?);
    }
    Ok(())
}
