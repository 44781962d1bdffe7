//! The whole job, stage by stage: train or load → search → finetune → merge → evaluate → measure.
//!
//! | file | holds |
//! |--|--|
//! | `benchmark` | [`Bench`]: what `bench` times |
//! | `by_clock` | the selection that takes the time of the budget, by the table or by the clock |
//! | `compare` | [`Jobs`]: methods × budgets × seeds, a `shrink` each |
//! | `comparison` | [`Comparison`]: what `bench table` times |
//! | `operators` | an operator for each block in the place of whether it is freed |
//! | `published` | [`published_networks`]: its networks with their published figures |
//! | `doubts` | [`Doubts`]: why a run may mean less than it seems to |
//! | `expand` | [`expand_in`]: convolutions that are trained as inverted residuals (DepthShrinker+) |
//! | `folder` | [`RunFolder`]: the files of a run, and when an old run may be touched |
//! | `keeping` | results that are written before anything else can fail |
//! | `run` | [`Run`]: data, device, session and the stages as functions |
//! | `shrink` | [`shrink()`]: all stages in order, resumable at any instant |
//! | `summary` | the numbers of `result.json` |
//! | `import` | [`import()`]: other projects' weights on the networks here |
//! | `latency` | [`block_times`]: what blocks take, and what they take merged |
//! | `selection` | [`choose_blocks`]: which blocks are freed, by any method |
//! | `widths` | numbers of channels in the place of blocks |
//! | `layers` | the choice of single layers |
//! | `table` | [`measure_table`]: the latency table of a network, and how well it predicts |
//! | `images` | images from files of both kinds |
//! | `half_range` | [`half_overflows`]: what passes the range of f16, for `export` |
//! | `tune` | [`tune`]: the fastest configurations of a network's kernels, kept for the engine |
//! | `verify` | [`verify_files`]: merged against unmerged on images from files |
//! | `infer` | [`logits`] and pictures, for `infer` |

mod benchmark;
mod by_clock;
mod compare;
mod comparison;
mod doubts;
mod expand;
mod folder;
mod half_range;
mod images;
mod import;
mod infer;
mod keeping;
mod latency;
mod layers;
mod operators;
mod published;
mod run;
mod runtimes;
mod selection;
mod shrink;
mod summary;
mod table;
mod tune;
mod verify;
mod widths;

pub use benchmark::{Bench, Keep, PeerOptions, fully_merged, network_cases};
pub use compare::{Job, Jobs};
pub use comparison::{Comparison, Contestant, KeepRows, NetworkPair};
pub use doubts::Doubts;
pub use expand::{ExpandAccuracies, ExpandResult, expand_in};
pub use folder::{Entry, RunFolder, RunSpec, Space};
pub use half_range::half_overflows;
pub use import::{Imported, import};
pub use infer::{Top, logits, picture_logits, read_images, top_classes, write_logits};
pub use keeping::KeepModel;
pub use latency::block_times;
pub use published::{published_networks, published_on_v100};
pub use run::{
    Datasets, Finetuning, Goal, Run, check_batches, check_mergeable, check_search, configured_graph, evaluate_model,
};
pub use selection::{KeepSelection, choose_blocks};
pub use shrink::{Stance, shrink, shrink_in};
pub use table::{TableSettings, check_table, measure_table};
pub use tune::{Tuning, tune};
pub use verify::verify_files;
