//! What the blocks of a network take, as they are and merged, by the source that a run names.

use std::path::Path;
use std::time::Duration;

use super::folder::RunFolder;
use super::run::Run;
use super::table::{TableSettings, measure_table};
use crate::Result;
use crate::config::Config;
use crate::device::Device;
use crate::measure::{LatencyTable, TableOptions, TableWork, block_costs};
use crate::model::Model;
use crate::shrink::padding::PaddingMode;
use crate::shrink::select::BlockOptions;
use crate::train::Reporter;

/// Images per pass that rooflines price blocks for.
const COST_BATCH: usize = 128;
/// The table of a run in its folder.
pub(super) const TABLE: &str = "latency.csv";
/// Its table for LayerMerge.
pub(super) const PRUNED_TABLE: &str = "latency-pruned.csv";

/// What each block takes as it is and merged, in one unit.
///
/// # Errors
/// As [`latency_table`].
pub fn block_times(run: &mut Run<'_>, model: &Model, folder: &RunFolder) -> Result<Vec<(f64, f64)>> {
    if let Some(roofline) = run.config.latency.roofline(&run.device) {
        let costs = block_costs(&model.graph, COST_BATCH, &roofline)?;
        return Ok(costs.iter().map(|cost| (cost.before, cost.after)).collect());
    }
    let table = latency_table(run, model, folder)?;
    let positions = model.graph.positions()?;
    let options = BlockOptions::new(&positions, &table, None)?;
    Ok(options.blocks().iter().map(|block| (block.kept_ms, block.merged_ms)).collect())
}

/// The latency table of a run: priced, measured or read, and kept in its folder as `latency.csv`. A run that goes on takes
/// the one that is there, so that a clock does not decide twice.
///
/// # Errors
/// A table that cannot be read or is of another network, a device that fails, or a folder that cannot be written.
pub fn latency_table(run: &mut Run<'_>, model: &Model, folder: &RunFolder) -> Result<LatencyTable> {
    table_of(run, model, folder, false)
}

/// The same with a row for each kernel that pruning leaves of a segment, as LayerMerge needs it: `latency-pruned.csv`.
///
/// # Errors
/// As [`latency_table`].
pub(super) fn pruned_table(run: &mut Run<'_>, model: &Model, folder: &RunFolder) -> Result<LatencyTable> {
    table_of(run, model, folder, true)
}

fn table_of(run: &mut Run<'_>, model: &Model, folder: &RunFolder, keys: bool) -> Result<LatencyTable> {
    let file = if keys { PRUNED_TABLE } else { TABLE };
    if folder.has(file) {
        return LatencyTable::read(&folder.path(file));
    }
    let path = folder.path(file);
    let table = match (run.config.latency.file(), run.config.latency.roofline(&run.device)) {
        (Some(file), _) => LatencyTable::read(file)?,
        (None, Some(roofline)) => {
            let bias_maps = run.config.merge.padding == PaddingMode::BorderBias;
            let options = TableOptions { keys, bias_maps };
            let work = TableWork::new(&model.graph, options, run.device.backend())?;
            work.priced(&path, COST_BATCH, &roofline)?
        }
        (None, None) => measured(run.config, (model, keys), &run.device, &mut run.session.reporter, &path)?,
    };
    table.check(&model.graph.positions()?)?;
    folder.write(file, &table.to_csv())?;
    // As a run that goes on reads it.
    LatencyTable::read(&path)
}

/// The latency table that a run has kept in its folder.
///
/// # Errors
/// A table that is not there or cannot be read.
pub fn kept_table(folder: &RunFolder) -> Result<LatencyTable> {
    LatencyTable::read(&folder.path(TABLE))
}

/// A table that is measured on a device by the settings of a run, with keys for LayerMerge; `path` is what messages name.
///
/// # Errors
/// As [`measure_table`].
pub(super) fn measured(
    config: &Config,
    (model, keys): (&Model, bool),
    device: &Device,
    reporter: &mut Reporter,
    path: &Path,
) -> Result<LatencyTable> {
    let settings = TableSettings {
        batch: config.measure.batch,
        budget: Duration::from_secs_f64(config.measure.seconds),
        keys,
        padding: config.merge.padding,
    };
    let (name, precision) = (device.name(), device.precision());
    reporter.line(&format!("latency: measured on {name} in {precision}, batch {}", settings.batch));
    Ok(measure_table(path, model, device, (&settings, config), reporter)?.table)
}
