//! `select`: runs a solver alone, on tables of times and importances.

use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;
use clap::builder::PossibleValue;
use serde_json::json;

use super::network::NamedNetwork;
use super::{Common, print};
use crate::graph::{Graph, Positions};
use crate::measure::LatencyTable;
use crate::report::{json_text, solution_table};
use crate::shrink::select::{Inputs, Knobs, Method, Solution, select};
use crate::shrink::{Importance, LayerChoice, Selection};
use crate::{Error, Result as LibraryResult};

/// Options of `select`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// How to select
    #[arg(long, value_name = "METHOD")]
    method: Method,
    /// Latency table, CSV: st,end,time in ms (and stdev); with kernel,depthwise for layer-merge. Segment (st, end]
    /// holds the convolutions st + 1 to end of those in blocks, numbered from 1; (0, 0] and (N, N], if given, is what
    /// always runs before and behind them. Every single convolution needs a row, and every segment of --network
    #[arg(short, long, value_name = "FILE")]
    table: PathBuf,
    /// Importance table, CSV: st,end,act_st,act_end,importance, the change of held-out accuracy in percentage points
    /// when the segment is made linear, with (1) or without (0) activations at its ends; with kernel,depthwise for
    /// layer-merge. For layer-knapsack the change when convolution end is left out
    #[arg(short, long, value_name = "FILE")]
    importance: Option<PathBuf>,
    /// Milliseconds that the selection may take by the table
    #[arg(long, value_name = "MS")]
    budget_ms: Option<f64>,
    /// The network of the table, by name or as a model file; two-stage-dp and fastest can do without, and then check
    /// less. Only from a model file layer-merge knows which of several convolutions goes
    #[arg(long, value_name = "NET")]
    network: Option<String>,
    /// two-stage-dp: this many times the mean importance of single convolutions is taken from every importance;
    /// published are 1.6, 1.2 and 1.4 for MobileNetV2-1.0, MobileNetV2-1.4 and VGG19
    #[arg(long, value_name = "ALPHA", default_value_t = 1.6)]
    alpha: f64,
    /// top-k: percentage points of importance that a saved millisecond is worth
    #[arg(long, value_name = "WEIGHT", default_value_t = 0.0)]
    latency_weight: f64,
    /// random: how much less than the budget a mask may take, as a share of it
    #[arg(long, value_name = "SHARE", default_value_t = 0.02)]
    tolerance: f64,
    /// Write what is selected as a plan file for `finetune --plan` and `merge --plan`; needs --network but for methods that free
    /// whole blocks, and of layer-merge a model file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl ValueEnum for Method {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let needs = match (self.needs_importance(), self.needs_network()) {
            (true, true) => "; needs --importance and --network",
            (true, false) => "; needs --importance",
            (false, true) => "; needs --network",
            (false, false) => "",
        };
        Some(PossibleValue::new(self.name()).help(format!("{}{needs}", self.about())))
    }
}

/// Reads the tables, selects, and prints what stays.
///
/// # Errors
/// A table that is not usable or is of another network, or a budget below the fastest selection.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let knobs = args.knobs(common)?;
    let table = LatencyTable::read(&args.table)?;
    let importance = args.importance.as_deref().map(Importance::read).transpose()?;
    let network = args.network.as_deref().map(NamedNetwork::read).transpose()?;
    let positions = network.as_ref().map(|network| network.graph().positions()).transpose()?;
    let norms = network.as_ref().zip(positions.as_ref()).and_then(|(network, positions)| network.norms(positions));
    let inputs = Inputs {
        table: &table,
        importance: importance.as_ref(),
        positions: positions.as_ref(),
        norms: norms.as_deref(),
    };
    let solution = select(args.method, &inputs, &knobs)?;
    if let Some(path) = &args.output {
        let named = network.as_ref().zip(positions.as_ref()).map(|(network, positions)| (network.graph(), positions));
        plan(args.method, &solution, named)?.write(path)?;
    }
    let text = if common.json {
        let mut value = json!(solution);
        value["method"] = json!(args.method.name());
        value["budget_ms"] = json!(args.budget_ms);
        json_text(&value)
    } else {
        let named = network.as_ref().zip(positions.as_ref()).map(|(network, positions)| (network.graph(), positions));
        format!("{}{}", solution_table(&solution, &table, named)?.text(), summary(args, &solution))
    };
    print("what was selected", &text)
}

/// What was selected as a plan.
fn plan(method: Method, solution: &Solution, named: Option<(&Graph, &Positions)>) -> LibraryResult<Selection> {
    if let Some(mask) = &solution.kept {
        return Ok(mask.clone().into());
    }
    let prunes = matches!(method, Method::LayerMerge | Method::LayerKnapsack);
    let (name, needs) = (method.name(), if prunes { "a model file as --network" } else { "--network" });
    let lacks = || Error::Config(format!("--method {name} needs {needs} for a plan; give it, or leave out --output"));
    let (graph, positions) = named.ok_or_else(lacks)?;
    let pruned = match (&solution.pruned, prunes) {
        (Some(pruned), _) => &pruned[..],
        (None, false) => &[],
        (None, true) => return Err(lacks()),
    };
    let Solution { activations, boundaries, .. } = solution;
    LayerChoice { activations, boundaries, pruned }.selection(graph, positions)
}

impl Args {
    fn knobs(&self, common: &Common) -> Result<Knobs> {
        let budget_ms = match (self.method, self.budget_ms) {
            (_, Some(budget)) => budget,
            (Method::Fastest, None) => f64::MAX,
            (method, None) => {
                return Err(Error::Config(format!("--method {} needs --budget-ms", method.name())).into());
            }
        };
        for (flag, value) in
            [("--alpha", self.alpha), ("--latency-weight", self.latency_weight), ("--tolerance", self.tolerance)]
        {
            if !value.is_finite() || value < 0.0 {
                return Err(Error::Config(format!("{flag} {value} is out of range; give a number from 0 on")).into());
            }
        }
        let Self { alpha, latency_weight, tolerance, .. } = *self;
        Ok(Knobs { budget_ms, alpha, latency_weight, tolerance, seed: common.seed.unwrap_or(0) })
    }
}

fn summary(args: &Args, solution: &Solution) -> String {
    let list = |positions: &[usize]| positions.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let budget = args.budget_ms.map_or_else(String::new, |budget| format!(" of {budget}"));
    let objective = solution.objective.map_or_else(String::new, |objective| format!(", objective {objective:.6}"));
    let mut text = format!("{}: {:.6}{budget} ms{objective}\n", args.method.name(), solution.time_ms);
    text.push_str(&format!("activations  {}\n", list(&solution.activations)));
    text.push_str(&format!("boundaries   {}\n", list(&solution.boundaries)));
    if let Some(mask) = &solution.kept {
        text.push_str(&format!("keep list    {mask}\n"));
    }
    match &solution.pruned {
        Some(pruned) => text.push_str(&format!("pruned       {}\n", list(pruned))),
        None if args.method == Method::LayerMerge => {
            text.push_str("pruned       depends on the weights: give a model file as --network\n");
        }
        None => {}
    }
    text
}
