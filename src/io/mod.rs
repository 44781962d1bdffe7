//! Files in and out: models, checkpoints, other projects' weights, ONNX, and writes that never leave half a file behind.

pub mod atomic;
pub mod checkpoint;
pub(crate) mod kind;
pub mod layout;
pub mod lock;
pub mod model;
pub mod names;
pub mod onnx;
pub mod rows;
pub mod tensors;
pub mod torch;

pub use atomic::{check_writable, write_atomic, write_first};
pub use checkpoint::{Checkpoint, Position, Sums};
pub use lock::FolderLock;
pub use model::{DataInfo, ModelInfo, read_model, write_model};
pub use rows::{CsvRow, CsvTable};
