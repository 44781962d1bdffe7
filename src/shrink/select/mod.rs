//! Solvers: from the times and importances of segments to what stays within a budget, in milliseconds, that is never
//! exceeded.
//!
//! | file | holds |
//! |--|--|
//! | `pareto` | the best path within a budget through a graph of states: what the exact solvers share |
//! | `optimal_merge` | [`OptimalTable`]: stage one of the two-stage dynamic programme, T_opt |
//! | `two_stage_dp` | [`two_stage_dp()`]: its stage two |
//! | `layer_merge` | [`layer_merge()`]: pruning and merging together |
//! | `layer_knapsack` | [`layer_knapsack()`]: pruning alone |
//! | `blocks` | [`BlockOptions`]: whole blocks, by knapsack, rank, rule or chance |
//! | `operators` | [`Operators`]: kept, merged or bypassed, block by block |
//!
//! Convolutions, positions and segments are those of [`Positions`].

mod blocks;
mod layer_knapsack;
mod layer_merge;
mod operators;
mod optimal_merge;
mod pareto;
mod two_stage_dp;

use serde::Serialize;

pub use blocks::{BlockOption, BlockOptions};
pub use layer_knapsack::layer_knapsack;
pub use layer_merge::{kept_convs, layer_merge, layer_merge_among};
pub use operators::{Operator, OperatorValues, Operators};
pub use optimal_merge::{OptimalTable, Split};
pub use pareto::{Arc, Path, States};
pub use two_stage_dp::two_stage_dp;

use super::importance::Importance;
use super::mask::Mask;
use crate::graph::{MergeKey, Positions};
use crate::measure::LatencyTable;
use crate::{Error, Result};

/// A way to select.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// [`BlockOptions::knapsack`].
    Knapsack,
    /// [`BlockOptions::top_k`].
    TopK,
    /// [`BlockOptions::no_residual`].
    NoResidual,
    /// [`BlockOptions::random`].
    Random,
    /// [`two_stage_dp()`].
    TwoStageDp,
    /// [`layer_merge()`].
    LayerMerge,
    /// [`layer_knapsack()`].
    LayerKnapsack,
    /// [`fastest`].
    Fastest,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Knapsack,
        Self::TopK,
        Self::NoResidual,
        Self::Random,
        Self::TwoStageDp,
        Self::LayerMerge,
        Self::LayerKnapsack,
        Self::Fastest,
    ];

    /// The name that `--method` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Knapsack => "knapsack",
            Self::TopK => "top-k",
            Self::NoResidual => "no-residual",
            Self::Random => "random",
            Self::TwoStageDp => "two-stage-dp",
            Self::LayerMerge => "layer-merge",
            Self::LayerKnapsack => "layer-knapsack",
            Self::Fastest => "fastest",
        }
    }

    /// What it does, and from which paper.
    pub fn about(self) -> &'static str {
        match self {
            Self::Knapsack => {
                "frees the blocks with the highest sum of importances, each measured alone; an exact knapsack over \
                 whole blocks (ours)"
            }
            Self::TopK => {
                "keeps the blocks of the highest importances, less a latency term, as many as the budget allows \
                 (DepthShrinker, ICML 2022)"
            }
            Self::NoResidual => {
                "frees blocks with a residual first, those that save most before others; no importances (ours)"
            }
            Self::Random => {
                "frees random blocks so that nearly all of the budget is used: what others have to beat (ours)"
            }
            Self::TwoStageDp => {
                "activations at any position and merges over blocks, by dynamic programming over segments (Kim et al., \
                 \"Efficient Latency-Aware CNN Depth Compression via Two-Stage Dynamic Programming\", ICML 2023)"
            }
            Self::LayerMerge => {
                "prunes convolutions and merges the others, by dynamic programming over segments and merged kernels \
                 (Kim et al., \"LayerMerge\", ICML 2024)"
            }
            Self::LayerKnapsack => {
                "prunes convolutions and merges nothing, by an exact knapsack (a baseline of LayerMerge, ICML 2024)"
            }
            Self::Fastest => {
                "the fastest way to merge the whole network, whatever it costs: the least that a budget can be"
            }
        }
    }

    /// Whether it reads importances. [`Self::NoResidual`] and [`Self::Random`] report their sum where they are given.
    pub fn needs_importance(self) -> bool {
        !matches!(self, Self::NoResidual | Self::Random | Self::Fastest)
    }

    /// Whether it needs to know the network, not only its table.
    pub fn needs_network(self) -> bool {
        !matches!(self, Self::TwoStageDp | Self::Fastest)
    }
}

/// A segment of a [`layer_merge()`] and what it becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MergedSegment {
    /// The position whose value it reads.
    pub st: usize,
    /// The position whose value it gives.
    pub end: usize,
    /// Side of the merged kernel.
    pub kernel: usize,
    /// Whether it is depthwise.
    pub depthwise: bool,
}

impl MergedSegment {
    /// What it becomes.
    pub fn key(&self) -> MergeKey {
        MergeKey { kernel: self.kernel, depthwise: self.depthwise }
    }
}

/// What a method selects. Its fields are the keys of `select --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Solution {
    /// The positions, from 1 on, behind which there is an activation. Methods that free whole blocks list those that
    /// stay; what finetuning adds behind a freed block is not among them.
    pub activations: Vec<usize>,
    /// The positions between which convolutions become one, both ends of the network included.
    pub boundaries: Vec<usize>,
    /// What the method maximised, in its own unit; `None` for one that looks at times alone.
    pub objective: Option<f64>,
    /// Milliseconds by the table.
    pub time_ms: f64,
    /// For methods that free whole blocks, one entry per block: 1 where it keeps its activations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<Mask>,
    /// For `layer-merge`, the segments with their kernels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub merged: Vec<MergedSegment>,
    /// For methods that prune, the positions of the convolutions that go; `None` where weights would have to decide.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pruned: Option<Vec<usize>>,
}

impl Solution {
    fn new(activations: Vec<usize>, boundaries: Vec<usize>, time_ms: f64) -> Self {
        Self { activations, boundaries, objective: None, time_ms, kept: None, merged: Vec::new(), pruned: None }
    }
}

/// What methods select by.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Times of the network's segments.
    pub table: &'a LatencyTable,
    /// Importances.
    pub importance: Option<&'a Importance>,
    /// The network's positions.
    pub positions: Option<&'a Positions>,
    /// Sums of the magnitudes of the weights, by position.
    pub norms: Option<&'a [f64]>,
}

/// Numbers that methods take beside the tables.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Knobs {
    /// Milliseconds that a selection may take.
    pub budget_ms: f64,
    /// α of [`two_stage_dp()`].
    pub alpha: f64,
    /// Percentage points per millisecond, for [`Method::TopK`].
    pub latency_weight: f64,
    /// How much less than the budget a random mask may take, as a share of it.
    pub tolerance: f64,
    /// Seed of random masks.
    pub seed: u64,
}

/// Runs a method.
///
/// # Errors
/// Inputs that are missing or do not fit one another, or a budget that cannot be kept.
pub fn select(method: Method, inputs: &Inputs<'_>, knobs: &Knobs) -> Result<Solution> {
    let missing = |what: &str| Error::Config(format!("--method {} needs {what}", method.name()));
    let Knobs { budget_ms, .. } = *knobs;
    let importance = || inputs.importance.ok_or_else(|| missing("--importance"));
    let positions = || inputs.positions.ok_or_else(|| missing("--network, whose blocks and channels it asks for"));
    let blocks = |importance| BlockOptions::new(positions()?, inputs.table, importance);
    match method {
        Method::Knapsack => blocks(Some(importance()?))?.knapsack(budget_ms),
        Method::TopK => blocks(Some(importance()?))?.top_k(knobs.latency_weight, budget_ms),
        Method::NoResidual => blocks(inputs.importance)?.no_residual(budget_ms),
        Method::Random => {
            let mut masks = blocks(inputs.importance)?.random(budget_ms, knobs.tolerance, knobs.seed, 1)?;
            Ok(masks.remove(0))
        }
        Method::TwoStageDp => {
            if let Some(positions) = inputs.positions {
                inputs.table.check_columns(false, true)?;
                inputs.table.check(positions)?;
                importance()?.check_covers(inputs.table)?;
                importance()?.check_times(inputs.table)?;
                importance()?.check_extended(positions)?;
            }
            two_stage_dp(inputs.table, importance()?, knobs.alpha, budget_ms)
        }
        Method::LayerMerge => layer_merge(positions()?, inputs.table, importance()?, inputs.norms, budget_ms),
        Method::LayerKnapsack => layer_knapsack(positions()?, inputs.table, importance()?, budget_ms),
        Method::Fastest => {
            check_budget(budget_ms)?;
            inputs.positions.map_or(Ok(()), |positions| inputs.table.check(positions))?;
            let solution = fastest(inputs.table)?;
            if solution.time_ms > budget_ms { Err(too_small(budget_ms, solution.time_ms)) } else { Ok(solution) }
        }
    }
}

/// The fastest way to merge everything between position 0 and the last: what no budget can go below. There is an
/// activation behind each merged convolution, as there was when it was timed.
///
/// # Errors
/// A table with keys.
pub fn fastest(table: &LatencyTable) -> Result<Solution> {
    let optimal = OptimalTable::new(table)?;
    let mut into = vec![Vec::new(); table.depth() + 1];
    for (at, split) in optimal.splits() {
        into[at.end].push(Arc { from: at.st, time: split.time_ms, value: 0.0 });
    }
    let states = States { start: table.fixed_ms(), into, ends: vec![table.depth()] };
    let path = states.fastest().ok_or_else(no_way)?;
    let mut boundaries = vec![0];
    for &(end, arc) in &path.arcs {
        let at = (states.into[end][arc].from, end).into();
        boundaries.extend(optimal.split(at).into_iter().flat_map(|split| &split.breaks[1..]));
    }
    Ok(Solution::new(boundaries[1..].to_vec(), boundaries, path.time))
}

/// Refuses a budget below the least that any way through the rows of a table takes, whatever they become.
///
/// # Errors
/// One that is no time, or too small; the message names the least.
pub fn check_reachable(table: &LatencyTable, budget_ms: f64) -> Result<()> {
    check_budget(budget_ms)?;
    let mut into = vec![Vec::new(); table.depth() + 1];
    for row in table.rows() {
        into[row.at.end].push(Arc { from: row.at.st, time: row.time_ms, value: 0.0 });
    }
    let states = States { start: table.fixed_ms(), into, ends: vec![table.depth()] };
    let least = states.fastest().ok_or_else(no_way)?.time;
    if least > budget_ms { Err(too_small(budget_ms, least)) } else { Ok(()) }
}

/// The best path within a budget.
///
/// # Errors
/// A budget that is no time, or less than the fastest path takes; the message names that.
fn within(states: &States, budget_ms: f64) -> Result<Path> {
    check_budget(budget_ms)?;
    let fastest = states.fastest().ok_or_else(no_way)?;
    states.best_within(budget_ms).ok_or_else(|| too_small(budget_ms, fastest.time))
}

fn check_budget(budget_ms: f64) -> Result<()> {
    if budget_ms.is_finite() && budget_ms >= 0.0 {
        return Ok(());
    }
    Err(Error::Config(format!("--budget-ms {budget_ms} is no time; give milliseconds")))
}

/// The error for a budget below the least that a method can do.
pub(super) fn too_small(budget_ms: f64, least_ms: f64) -> Error {
    // Rounded up, so that the budget which the message names is one that can be kept.
    let mut named = (least_ms * 1e6).ceil() / 1e6;
    if named < least_ms {
        named += 1e-6;
    }
    Error::Config(format!(
        "nothing takes {budget_ms} ms or less: the fastest takes {named} ms; give --budget-ms {named} or more"
    ))
}

/// The error for importances that do not lead through the network.
fn no_way() -> Error {
    Error::Config(
        "no chain of segments leads from the first position to the last; add the rows of single convolutions".into(),
    )
}
