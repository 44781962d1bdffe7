//! What a run found, as JSON, as text tables and as one self-contained HTML page.

mod curves;
mod html;
mod network_drawing;
mod plot;
mod result;
mod table;

pub use html::Page;
pub use result::{
    BlockResult, DataResult, LatencyResult, MachineResult, MaskTrial, MergeResult, NetworkResult, NetworkStage,
    RunResult, SCHEMA, StageTime,
};
pub use table::{Align, Table, network_table};
