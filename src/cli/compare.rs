//! `compare`: methods × budgets × seeds from one model, as a list of jobs that any process may take from.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use super::settings::{DataArgs, MatchArgs, set_some};
use super::shrink::Schedule;
use super::{Common, print};
use crate::measure::{LatencySource, mean};
use crate::pipeline::{Entry, Jobs, RunFolder};
use crate::report::{TrialFile, csv, json_text};
use crate::shrink::padding::PaddingMode;
use crate::shrink::{Budget, SearchMethod};
use crate::train::Reporter;
use crate::{Error, terminal};

const NAME: &str = "compare";
/// The variable in which Slurm gives a job of an array its number.
const ARRAY_TASK: &str = "SLURM_ARRAY_TASK_ID";

/// Options of `compare`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The trained model that all jobs start from [default: that of the settings]
    model: Option<PathBuf>,
    /// Print the jobs, each with its number and whether it is finished
    #[arg(long, conflicts_with_all = ["job", "merge"])]
    list: bool,
    /// Run job N of the list alone, or go on with it; one that is finished is not done again [default in a Slurm array: its
    /// SLURM_ARRAY_TASK_ID]
    #[arg(long, value_name = "N", conflicts_with = "merge")]
    job: Option<usize>,
    /// Run nothing; put together what is finished
    #[arg(long)]
    merge: bool,
    /// Methods, with commas [default: all that choose whole blocks]
    #[arg(long, value_name = "METHOD,…", value_delimiter = ',')]
    methods: Option<Vec<SearchMethod>>,
    /// Budgets: shares of the original's time that the merged networks may take by the latency table, with commas [default:
    /// 0.8]; `compare.budgets` in --config takes budgets of all kinds
    #[arg(long, value_name = "SHARE,…", value_delimiter = ',')]
    latency_fractions: Option<Vec<f64>>,
    /// Seeds of choice and finetuning, with commas [default: 0,1,2]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    seeds: Option<Vec<u64>>,
    /// Masks of the method random, each finetuned with every seed [default: 8]
    #[arg(long, value_name = "N")]
    random_masks: Option<u64>,
    /// The folder of a comparison whose jobs have the same names: takes what they chose, by the latency tables there, and only
    /// finetunes and merges, such as for longer
    #[arg(long, value_name = "DIR")]
    selections: Option<PathBuf>,
    /// Steps of finetuning after which accuracy and test loss are taken too, with commas; what finetuning does not reach is left
    /// out [default: 0,30,100,300,1000]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    recovery_steps: Option<Vec<u64>>,
    /// Price blocks by: auto, measured (a table of this device, which the first job measures and all read: latency.csv in
    /// --out), macs, bytes, roofline:v100-sxm2 (or another GPU), or a table FILE.csv that `table` measured
    #[arg(long, value_name = "SOURCE")]
    latency: Option<LatencySource>,
    #[command(flatten)]
    matching: MatchArgs,
    /// How merged borders stay exact: reorder or border-bias
    #[arg(long, value_name = "MODE")]
    padding: Option<PaddingMode>,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    schedule: Schedule,
}

/// Runs jobs, or lists them; then puts together what is finished and prints the table.
///
/// # Errors
/// Wrong settings, jobs that failed, or a result of other settings.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let folder = common.folder(NAME);
    let mut config = common.base_config(Entry::New, None)?;
    args.data.apply(&mut config, Entry::New);
    args.schedule.apply(&mut config);
    args.matching.apply(&mut config);
    set_some(&mut config.model, &args.model);
    config.latency = args.latency.clone().unwrap_or(config.latency);
    config.merge.padding = args.padding.unwrap_or(config.merge.padding);
    let compare = &mut config.compare;
    compare.methods = args.methods.clone().unwrap_or_else(|| compare.methods.clone());
    compare.seeds = args.seeds.clone().unwrap_or_else(|| compare.seeds.clone());
    compare.recovery_steps = args.recovery_steps.clone().unwrap_or_else(|| compare.recovery_steps.clone());
    set_some(&mut compare.selections, &args.selections);
    compare.random_masks = args.random_masks.unwrap_or(compare.random_masks);
    if let Some(shares) = &args.latency_fractions {
        compare.budgets = shares.iter().map(|&share| Budget::LatencyFraction(share)).collect();
    }
    common.ready(&config)?;
    let jobs = Jobs::new(&config, folder.dir())?;
    if args.list {
        return list(&jobs, common);
    }
    match args.job.map_or_else(array_task, |job| Ok(Some(job)))?.filter(|_| !args.merge) {
        Some(index) => one(&jobs, index, common),
        None => {
            let failed = if args.merge { 0 } else { all(&jobs, common)? };
            put_together(&jobs, &folder, common)?;
            anyhow::ensure!(failed == 0, "{failed} of {} jobs failed; what they said stands above", jobs.jobs().len());
            Ok(())
        }
    }
}

/// The job that Slurm asks for.
fn array_task() -> Result<Option<usize>> {
    let Some(text) = std::env::var_os(ARRAY_TASK) else { return Ok(None) };
    let text = text.to_string_lossy();
    let index = text.parse().map_err(|_| {
        Error::Config(format!("{ARRAY_TASK} is {text:?}, which is no number of a job; give --job N, or unset it"))
    })?;
    Ok(Some(index))
}

fn list(jobs: &Jobs, common: &Common) -> Result<()> {
    let mut text = String::new();
    for (index, job) in jobs.jobs().iter().enumerate() {
        text.push_str(&format!("{index} {}{}\n", job.name, if job.is_finished() { " finished" } else { "" }));
    }
    if common.json {
        let entry = |(index, job): (usize, &crate::pipeline::Job)| {
            json!({
                "job": index, "name": job.name.to_string(), "method": job.name.method, "budget": job.name.budget,
                "seed": job.name.seed, "mask": job.name.mask, "finished": job.is_finished(),
                "folder": job.folder().dir(),
            })
        };
        text = json_text(&jobs.jobs().iter().enumerate().map(entry).collect::<Vec<_>>());
    }
    print("the list of jobs", &text)
}

fn one(jobs: &Jobs, index: usize, common: &Common) -> Result<()> {
    let result = jobs.run(index, common.stance())?;
    let job = &jobs.jobs()[index];
    let top1 = result.network(crate::report::NetworkStage::Merged).map_or(f64::NAN, |network| network.top1);
    let text = match common.json {
        true => json_text(&result),
        false => format!("{}: top-1 {top1:.2} %\n", terminal::path(job.folder().dir())),
    };
    print(&format!("the result in {}", job.folder().dir().display()), &text)
}

/// Runs what is not finished, one job after the other. Returns how many failed; an interrupt ends it.
fn all(jobs: &Jobs, common: &Common) -> Result<usize> {
    let reporter = if common.quiet { Reporter::quiet() } else { Reporter::new() };
    let open: Vec<usize> = (0..jobs.jobs().len()).filter(|&index| !jobs.jobs()[index].is_finished()).collect();
    let method = |index: usize| jobs.jobs()[index].name.method.as_str();
    let mut times: Vec<(&str, f64)> = jobs.finished()?.iter().map(|trial| (method(trial.job), trial.seconds)).collect();
    let mut failed = 0;
    for (done, &index) in open.iter().enumerate() {
        let name = &jobs.jobs()[index].name;
        let left = time_left(open[done..].iter().map(|&index| method(index)), &times)
            .map_or_else(String::new, |left| format!(", about {} left", words(left)));
        reporter.line(&format!("compare: job {index}, {name} ({done} of {} done{left})", open.len()));
        let start = Instant::now();
        match jobs.run(index, common.stance()) {
            Ok(_) => times.push((method(index), start.elapsed().as_secs_f64())),
            Err(error @ Error::Interrupted(_)) => return Err(error.into()),
            // The others are worth having without it.
            Err(error) => {
                tracing::error!("job {index}, {name}: {error}");
                failed += 1;
            }
        }
    }
    Ok(failed)
}

/// How long the jobs of some methods will take, by the seconds that finished ones took: of the same method where there are
/// any. `None` where none is finished.
fn time_left<'a>(open: impl Iterator<Item = &'a str>, times: &[(&str, f64)]) -> Option<Duration> {
    let mean_of = |method: Option<&str>| {
        let own = times.iter().filter(|(name, _)| method.is_none_or(|method| method == *name)).map(|(_, s)| *s);
        mean(&own.collect::<Vec<_>>())
    };
    let all = mean_of(None)?;
    Some(Duration::from_secs_f64(open.map(|method| mean_of(Some(method)).unwrap_or(all)).sum()))
}

/// A time in its two largest units.
fn words(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds @ 60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        seconds => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// Writes methods.json, methods.csv, recovery.csv and methods.html, and prints the table.
fn put_together(jobs: &Jobs, folder: &RunFolder, common: &Common) -> Result<()> {
    let trials = jobs.finished()?;
    if trials.is_empty() {
        anyhow::bail!("no job in {} is finished; run some first", folder.dir().display());
    }
    let found = TrialFile::new(jobs.jobs().len(), jobs.recovery_steps(), &trials);
    let text = json_text(&found);
    let files = [
        ("methods.json", text.clone()),
        ("methods.csv", csv(&trials)),
        ("recovery.csv", csv(&found.recovery_rows())),
        ("methods.html", found.page()),
    ];
    for (file, text) in files {
        folder.write(file, &text).with_context(|| format!("{file} cannot be written"))?;
    }
    let page = folder.path("methods.html");
    let mut plain = format!("{}\n", found.table().text());
    for (name, table) in found.recovery_tables() {
        plain.push_str(&format!("{name}\n\n{}\n", table.text()));
    }
    plain.push_str(&format!("{}\n{}\n", found.notes().join("\n"), terminal::path(&page)));
    print(&format!("the table of {}", page.display()), if common.json { &text } else { &plain })
}
