//! Training: the one step, the one loop that all stages share, its schedule, its records and its checkpoints.

mod config;
mod evaluate;
mod exchange;
mod feed;
mod hook;
mod interrupt;
mod metrics;
mod observe;
mod recalibrate;
mod replica;
mod reporter;
mod schedule;
mod session;
mod step;
mod teacher;
mod trainer;

pub use config::TrainConfig;
pub use evaluate::{Evaluation, evaluate, evaluate_until};
pub use feed::{StepBatch, StepImages};
pub use hook::{Hook, NoHook, Progress};
pub use interrupt::Interrupt;
pub use metrics::{EpochRecord, EvaluationRecord, HookRecord, Metrics, ScoreRecord};
pub use observe::observe;
pub use recalibrate::recalibrate;
pub use reporter::Reporter;
pub use schedule::Schedule;
pub use session::Session;
pub use step::{StepOptions, StepSettings, TakenStep, TrainStep};
pub use teacher::Distillation;
pub use trainer::{Stage, train};
