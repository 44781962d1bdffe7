//! Configurations that a tuner found.

use super::table::{Align, Table};
use crate::measure::TunedRecord;

/// A table of what is faster than what the engine chooses, and a line about all.
pub fn tuned_text(records: &[TunedRecord]) -> String {
    let right = Align::Right;
    let mut table = Table::new(&[
        ("step", Align::Left),
        ("kernels", Align::Left),
        ("chosen", Align::Left),
        ("µs", right),
        ("fastest", Align::Left),
        ("µs", right),
        ("×", right),
        ("timed", right),
    ]);
    let faster = || records.iter().filter(|record| record.tuned.config != record.tuned.chosen);
    for TunedRecord { step, tuned, timed, .. } in faster() {
        let gain = tuned.chosen_time_us / tuned.time_us.max(f64::MIN_POSITIVE);
        table.row(&[
            step.clone(),
            tuned.kernels.clone(),
            tuned.chosen.clone(),
            format!("{:.1}", tuned.chosen_time_us),
            tuned.config.clone(),
            format!("{:.1}", tuned.time_us),
            format!("{gain:.2}"),
            timed.to_string(),
        ]);
    }
    let failed: usize = records.iter().map(|record| record.failed.len()).sum();
    format!(
        "{}\n{} of {} choices have a faster configuration than the engine's; {failed} configurations failed\n",
        table.text(),
        faster().count(),
        records.len()
    )
}
