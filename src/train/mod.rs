//! Training: the one loop that all stages share, its schedule, its records and its checkpoints.

mod config;
mod evaluate;
mod feed;
mod hook;
mod interrupt;
mod metrics;
mod reporter;
mod schedule;
mod session;
mod teacher;
mod trainer;

pub use config::TrainConfig;
pub use evaluate::{Evaluation, evaluate, evaluate_until};
pub use hook::{Hook, NoHook, Progress};
pub use interrupt::Interrupt;
pub use metrics::Metrics;
pub use reporter::Reporter;
pub use schedule::Schedule;
pub use session::Session;
pub use trainer::{Distillation, Stage, train};
