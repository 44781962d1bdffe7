//! `table`: the latency table of a network on a device, and how near to it the times of whole selections are.

use std::path::Path;
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::benchmark::{fully_merged, unmergeable_blocks};
use crate::config::Config;
use crate::device::Device;
use crate::measure::{
    LatencyTable, MeasuredTable, MergedNetwork, TableBench, TableOptions, TableProgress, TableWork, compare,
};
use crate::model::Model;
use crate::report::SelectionTime;
use crate::shrink::padding::PaddingMode;
use crate::shrink::select::BlockOptions;
use crate::shrink::{Mask, Selection};
use crate::train::Reporter;
use crate::{Error, Result};

/// Lines that tell how far a measurement is, where there is no bar.
const LINES: u64 = 5;

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct TableSettings {
    /// Images per pass.
    pub batch: usize,
    /// Time for everything together.
    pub budget: Duration,
    /// A row for each kernel that pruning leaves, for LayerMerge.
    pub keys: bool,
    /// How merged borders are made exact.
    pub padding: PaddingMode,
}

/// Measures the latency table of a network; `path` is what messages about the table name.
///
/// # Errors
/// A network without blocks, or a device that fails or is out of memory.
pub fn measure_table(
    path: &Path,
    model: &Model,
    device: &Device,
    (settings, config): (&TableSettings, &Config),
    reporter: &mut Reporter,
) -> Result<MeasuredTable> {
    let &TableSettings { batch, budget, keys, padding } = settings;
    let options = TableOptions { keys, bias_maps: padding == PaddingMode::BorderBias };
    let work = TableWork::new(&model.graph, options, device.backend())?;
    reporter.line_without_bar(&format!("table: {} rows, {} distinct pieces", work.rows.len(), work.pieces.len()));
    let start = Instant::now();
    let mut told = 0;
    reporter.begin("table", 0, 1);
    let mut progress = |TableProgress { done, total }: TableProgress| {
        if done == 0 {
            reporter.begin("table", 0, total);
        }
        reporter.step(done, "");
        if done * LINES / total.max(1) > told && done < total {
            told = done * LINES / total;
            let seconds = start.elapsed().as_secs_f64();
            let left = seconds * (total - done) as f64 / done as f64;
            reporter.line_without_bar(&format!("table: {done} of {total}, {seconds:.0} s, about {left:.0} s left"));
        }
        Ok(())
    };
    let merged = if keys { None } else { merged_network(model, config)? };
    let measured =
        TableBench { device, batch, budget, merged: merged.as_ref() }.measure(path, model, &work, &mut progress);
    reporter.end();
    measured
}

/// The network with every block merged that can be; `None` where none can.
fn merged_network(model: &Model, config: &Config) -> Result<Option<MergedNetwork>> {
    let positions = model.graph.positions()?;
    let stays = unmergeable_blocks(model, &config.linearise());
    let blocks = positions.blocks().iter().filter(|block| stays.get(block.block.index()) == Some(&false));
    let merged = blocks.map(|block| block.at).collect();
    Ok(fully_merged(model, None, config)?.map(|model| MergedNetwork { model, merged }))
}

/// Merges random selections of whole blocks, times the merged networks in alternation with the original, and compares the share of
/// its time that each takes with what a table says of it.
/// Each selection frees every block with one probability, which is uniform over \[0, 1\). The selections are a function of
/// the seed.
///
/// # Errors
/// A table of another network, a network without blocks that merge, or a device that fails.
pub fn check_table(
    table: &LatencyTable,
    model: &Model,
    device: &Device,
    config: &Config,
    (count, settings): (usize, &TableSettings),
) -> Result<Vec<SelectionTime>> {
    let positions = model.graph.positions()?;
    let options = BlockOptions::new(&positions, table, None)?;
    let stays = unmergeable_blocks(model, &config.linearise());
    if !stays.contains(&false) {
        let problem = "has no block that merges; give another --padding";
        return Err(Error::Config(format!("{} {problem}", model.graph.name)));
    }
    let whole_ms = options.time_ms(&Mask::all(stays.len()));
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
    let share = settings.budget / count.max(1) as u32;
    let mut times: Vec<SelectionTime> = Vec::new();
    while times.len() < count {
        let probability = rng.random::<f64>();
        let kept = stays.iter().map(|&stays| rng.random::<f64>() >= probability || stays).collect();
        let mask = Mask::new(kept);
        let selection: Selection = mask.clone().into();
        let Some(merged) = fully_merged(model, Some(&selection), config)? else { continue };
        let pair = [("original", model), ("merged", &merged)];
        let timed = compare(device, &pair, settings.batch, share)?.networks;
        let [original_ms, measured_ms] = [&timed[0], &timed[1]].map(|(_, latency)| latency.median_ms);
        let predicted_ms = original_ms * options.time_ms(&mask) / whole_ms.max(f64::MIN_POSITIVE);
        times.push(SelectionTime { kept: mask, original_ms, predicted_ms, measured_ms });
        device.release_idle();
    }
    Ok(times)
}
