//! Latency and importance tables, an empty line between, and the solvers that need nothing else.
#![no_main]

use std::path::Path;

use depthshrinker::measure::LatencyTable;
use depthshrinker::shrink::Importance;
use depthshrinker::shrink::select::{fastest, two_stage_dp};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|tables: &[u8]| {
    let middle = tables.windows(2).position(|pair| pair == b"\n\n").unwrap_or(tables.len());
    let (times, importances) = tables.split_at(middle);
    let importance = Importance::parse(Path::new("i.csv"), importances);
    let Ok(table) = LatencyTable::parse(Path::new("t.csv"), times) else { return };
    let Ok(least) = fastest(&table) else { return };
    let Ok(importance) = importance else { return };
    for budget in [least.time_ms, 2.0 * least.time_ms] {
        if let Ok(solution) = two_stage_dp(&table, &importance, 1.6, budget) {
            assert!(solution.time_ms <= budget);
        }
    }
});
