//! Records and what a run found, in every format: a file a format.
//!
//! | file | format |
//! |--|--|
//! | `text` | tables and lines for the terminal, from [`Table`] |
//! | `table` | a [`Table`] as plain text, Markdown and HTML |
//! | `csv` | [`csv()`] of any records |
//! | `json` | [`json_text`], and the files of a bench |
//! | `roofline_plot`, `bar_plot` | SVG files of a bench that stand alone |
//! | `plot`, `curves`, `scatter`, `network_drawing` | SVG within an HTML page |
//! | `comparison` | networks side by side: tables, and [`ComparisonPage`] |
//! | `counters` | what launches do, as counted on the emulator: a table and a page |
//! | `html` | [`Page`]: one self-contained page about a run |
//! | `projection` | networks as they are projected to a GPU: tables and a page |
//! | `result` | [`RunResult`]: the numbers of a run |
//! | `trials`, `trial_page` | [`TrialFile`]: methods side by side, and their page |
//! | `tuned` | [`tuned_text`]: configurations that a tuner found |
//! | `solution` | [`solution_table`]: what a solver selected; [`selection_times`] |

mod bar_plot;
mod comparison;
mod counters;
mod csv;
mod curves;
mod html;
mod json;
mod network_drawing;
mod plot;
mod projection;
mod result;
mod roofline_plot;
mod scatter;
mod solution;
mod table;
mod text;
mod trial_page;
mod trials;
mod tuned;

pub use bar_plot::network_bars;
pub use comparison::{ComparisonPage, comparison_table, headlines, published_table};
pub use counters::{case_table, counter_notes, counter_page, counter_table};
pub use csv::csv;
pub use curves::MetricsLine;
pub use html::Page;
pub use json::{BENCH_SCHEMA, BenchFile, ComparisonFile, json_text};
pub use projection::{PROJECTION_NOTE, projected_steps_table, projection_page, projection_table};
pub use result::{
    BlockResult, DataResult, LatencyResult, MachineResult, MaskTrial, MergeResult, NetworkResult, NetworkStage,
    RunResult, SCHEMA, StageTime,
};
pub use roofline_plot::{Point, RooflinePlot};
pub use solution::{SelectionTime, selection_times, solution_table};
pub use table::{Align, Table};
pub use text::{
    host_rates_text, layer_table, layer_totals, limits_text, network_bench_table, network_table, plan_text,
    runtime_table, step_time_table,
};
pub use trials::{
    BudgetSummary, MethodSummary, RecoveryPoint, RecoveryRow, Spread, TRIAL_SCHEMA, Trial, TrialFile, TrialName,
};
pub use tuned::tuned_text;
