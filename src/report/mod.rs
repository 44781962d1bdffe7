//! What a run found, as JSON, as text tables and as one self-contained HTML page.

mod bar_plot;
mod bench;
mod curves;
mod html;
mod network_drawing;
mod plot;
mod result;
mod roofline_plot;
mod table;

pub use bench::{csv, layer_table, layer_totals, network_bars, network_bench_table};
pub use html::Page;
pub use result::{
    BlockResult, DataResult, LatencyResult, MachineResult, MaskTrial, MergeResult, NetworkResult, NetworkStage,
    RunResult, SCHEMA, StageTime,
};
pub use roofline_plot::{Point, RooflinePlot};
pub use table::{Align, Table, network_table};
