//! `shrink`: the whole job.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::settings::{BudgetArgs, DataArgs, MethodArgs, NetworkArgs, RunArgs, set_some};
use super::{Common, print};
use crate::config::Config;
use crate::pipeline::{Entry, RunFolder, shrink_in};
use crate::report::{RunResult, network_table};
use crate::shrink::padding::PaddingMode;
use crate::{Error, terminal};

/// The command's name in folders.
const NAME: &str = "shrink";

/// Options of `shrink`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Start from this trained model instead of training one
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Take the choice in this plan.json, which a search by the same method wrote, instead of choosing again
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Also finetune N random selections and compare: as many blocks that merge, or within a time, and where blocks are
    /// bypassed, what takes as long. Where operators are chosen, operators at random; where single layers are, what the same
    /// solver makes of importances that are shuffled
    #[arg(long, value_name = "N")]
    compare_random: Option<usize>,
    /// How merged borders stay exact: reorder moves the padding to the front of a block, border-bias keeps the trained
    /// function and adds a bias per position
    #[arg(long, value_name = "MODE")]
    padding: Option<PaddingMode>,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    budget: BudgetArgs,
    #[command(flatten)]
    method: MethodArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    schedule: Schedule,
}

/// Schedules of the three training stages.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Training")]
pub(super) struct Schedule {
    /// Epochs of training the original
    #[arg(long, value_name = "N")]
    train_epochs: Option<u64>,
    /// Epochs of the mask search, where the method trains scores or slopes
    #[arg(long, value_name = "N")]
    search_epochs: Option<u64>,
    /// Epochs of finetuning
    #[arg(long, value_name = "N")]
    finetune_epochs: Option<u64>,
    /// Images per step, in all stages
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Seconds of the measurement at the end
    #[arg(long, value_name = "SECONDS")]
    measure_seconds: Option<f64>,
}

/// Runs the job and prints its table.
///
/// # Errors
/// Wrong settings, or whatever stops the job.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let folder = common.folder(NAME);
    let entry = args.run.entry();
    let mut config = common.base_config(entry, Some(&folder))?;
    args.apply(&mut config, entry);
    config.search.method = Some(config.method());
    common.ready(&config)?;
    refuse_choices(&config)?;
    if args.schedule.search_epochs.is_some() && !config.method().takes_steps() {
        tracing::warn!("--search-epochs changes nothing: --method {} trains nothing to choose by", config.method());
    }
    let result = shrink_in(&folder, &config, entry, common.stance())?;
    let text = if common.json { format!("{:#}\n", json!(result)) } else { closing(&result, &folder, &config) };
    print(&format!("the table of {}", folder.path("report.html").display()), &text)
}

impl Args {
    fn apply(&self, config: &mut Config, entry: Entry) {
        self.budget.apply(config);
        self.method.apply(config);
        self.data.apply(config, entry);
        self.network.apply(config);
        set_some(&mut config.model, &self.model);
        set_some(&mut config.search.plan, &self.plan);
        config.merge.padding = self.padding.unwrap_or(config.merge.padding);
        config.compare_random = self.compare_random.unwrap_or(config.compare_random);
        self.schedule.apply(config);
    }
}

impl Schedule {
    /// Overrides the configuration by the flags.
    pub(super) fn apply(&self, config: &mut Config) {
        config.measure.seconds = self.measure_seconds.unwrap_or(config.measure.seconds);
        let stages = [
            (&mut config.train, self.train_epochs),
            (&mut config.search.train, self.search_epochs),
            (&mut config.finetune.train, self.finetune_epochs),
        ];
        for (train, epochs) in stages {
            train.epochs = epochs.unwrap_or(train.epochs);
            train.batch = self.batch.unwrap_or(train.batch);
        }
    }
}

/// Rejects settings of `finetune` that `shrink` determines itself: ignoring them would finetune another network than the
/// user asked for.
fn refuse_choices(config: &Config) -> Result<()> {
    let chosen = [("kept", config.finetune.kept.is_some()), ("teacher", config.finetune.teacher.is_some())];
    match chosen.iter().find(|(_, given)| *given) {
        Some((key, _)) => Err(Error::Config(format!(
            "finetune.{key} is for the command finetune; shrink searches for the mask and teaches with the original: \
             leave it out"
        ))
        .into()),
        None => Ok(()),
    }
}

/// The summary printed at the end.
fn closing(result: &RunResult, folder: &RunFolder, config: &Config) -> String {
    let mut text = format!("\n{}\n", network_table(result).text());
    let [merged, bypassed] = result.freed();
    text.push_str(&format!("{merged} of {} blocks merged", result.kept.len()));
    if bypassed > 0 {
        text.push_str(&format!(", {bypassed} bypassed"));
    }
    text.push_str(&format!(", chosen by {}", config.method()));
    if let Some(merge) = &result.merge {
        text.push_str(&format!(", error {:.1e} of the logits' scale", merge.max_rel_error));
    }
    if let Some([left, of]) = result.channels_left() {
        text.push_str(&format!(", {left} of {of} channels left where they became fewer"));
    }
    text.push_str(&format!("; the original is timed folded and fused, batch {}\n", result.networks[0].batch));
    if !result.random_masks.is_empty() {
        let top1: Vec<f64> = result.random_masks.iter().map(|trial| trial.top1).collect();
        let mean = top1.iter().sum::<f64>() / top1.len() as f64;
        let (low, high) = top1.iter().fold((f64::MAX, f64::MIN), |(l, h), &t| (l.min(t), h.max(t)));
        let measure = if config.of_equal_time() { "time" } else { "size" };
        let selected = result.learned_masks.first().map_or(f64::NAN, |trial| trial.top1);
        text.push_str(&format!(
            "selected {selected:.2} %, {} at random of the same {measure} {mean:.2} % ({low:.2} to {high:.2})\n",
            top1.len()
        ));
    }
    text.push_str(&format!("{}\n", terminal::path(&folder.path("report.html"))));
    text
}
