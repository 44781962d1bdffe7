//! Flags that several commands share, and how they go over the configuration.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;

use super::Common;
use crate::Error;
use crate::config::{Config, NetworkConfig};
use crate::io::check_writable;
use crate::measure::LatencySource;
use crate::model::Model;
use crate::networks::KNOWN_NETWORKS;
use crate::pipeline::{Entry, RunFolder, RunSpec, Stance};
use crate::shrink::{Budget, Mask, SearchMethod, Selection, named_mask};
use crate::train::{Session, TrainConfig};

/// How to treat an existing run in the folder.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Resume the interrupted run in the folder with its settings
    #[arg(long, conflicts_with = "force")]
    pub resume: bool,
    /// Replace the run in the folder
    #[arg(long)]
    pub force: bool,
}

/// The data set.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Data")]
pub struct DataArgs {
    /// embedded, fashion-mnist, mnist, cifar10, cifar100, imagenet, a folder of pictures, signals:FOLDER of CSV files, or
    /// parquet:FOLDER of shards
    #[arg(long, value_name = "NAME")]
    pub data: Option<String>,
    /// Folder of the data set
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Side in pixels to which the pictures of a folder are resized
    #[arg(long, value_name = "PIXELS")]
    pub image_size: Option<usize>,
    /// Largest number of training images
    #[arg(long, value_name = "N")]
    pub train_limit: Option<usize>,
    /// Largest number of test images
    #[arg(long, value_name = "N")]
    pub test_limit: Option<usize>,
}

/// The network.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Network")]
pub struct NetworkArgs {
    #[arg(long, value_name = "NET", help = format!("{KNOWN_NETWORKS}; its own strides unless they are given too"))]
    pub net: Option<String>,
    /// Stride of the stem
    #[arg(long, value_name = "N")]
    pub input_stride: Option<usize>,
    /// Stride of each stage, with commas
    #[arg(long, value_name = "N,N,…", value_delimiter = ',')]
    pub stage_strides: Option<Vec<usize>>,
    /// Channels of the last convolution
    #[arg(long, value_name = "N")]
    pub head_channels: Option<usize>,
}

/// How many blocks keep their activations.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Budget")]
#[group(multiple = false)]
pub struct BudgetArgs {
    /// Blocks that keep their activations
    #[arg(long, value_name = "K")]
    pub keep: Option<usize>,
    /// Share of the blocks that keep their activations, rounded down
    #[arg(long, value_name = "SHARE")]
    pub keep_fraction: Option<f64>,
    /// Blocks that lose their activations
    #[arg(long, value_name = "N")]
    pub remove: Option<usize>,
    /// Share of the original's time that the merged network may take, by the latency table
    #[arg(long, value_name = "SHARE")]
    pub latency_fraction: Option<f64>,
    /// Milliseconds that the merged network may take, by the latency table
    #[arg(long, value_name = "MS")]
    pub budget_ms: Option<f64>,
}

/// How blocks are chosen, and what their times are priced by.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Search")]
pub struct MethodArgs {
    /// How blocks are chosen [default: by the budget: sensitivity where it is a number of blocks, operators where it is a time]
    #[arg(long, value_name = "METHOD")]
    pub method: Option<SearchMethod>,
    /// Price blocks by: auto (the roofline of the device, on the CPU of two nominal cores; no clock is read), measured (the
    /// table of the device, kept as latency.csv), macs, bytes, roofline:v100-sxm2 (or another GPU), or a table FILE.csv
    #[arg(long, value_name = "SOURCE")]
    pub latency: Option<LatencySource>,
    #[command(flatten)]
    pub matching: MatchArgs,
}

/// Whether the clock has the last word on a budget.
#[derive(Debug, Clone, Args)]
pub struct MatchArgs {
    /// Move the budget, a time, until the merged network takes the asked share of the original's time as measured, the two in
    /// alternation, to within TOLERANCE of it [0.02]; the nearest is taken, and told, where nothing comes so near
    #[arg(long, value_name = "TOLERANCE", num_args = 0..=1, require_equals = true, default_missing_value = "0.02")]
    pub match_latency: Option<f64>,
}

/// The schedule of one stage.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Training")]
pub struct StageArgs {
    /// Passes over the training images
    #[arg(long, value_name = "N")]
    pub epochs: Option<u64>,
    /// Images per step
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Highest learning rate
    #[arg(long, value_name = "LR")]
    pub lr: Option<f32>,
}

/// Which blocks keep their activations.
#[derive(Debug, Clone, Args)]
#[group(multiple = false)]
pub struct MaskArgs {
    /// One entry per block in network order, with commas: 1 = its activations stay; or a published mask by name, such as
    /// mbv2-1.4-ds-a to -f
    #[arg(long, value_name = "0,1,…|NAME", value_parser = parse_mask)]
    pub keep_list: Option<Mask>,
    /// The plan.json that a search wrote
    #[arg(long, value_name = "FILE")]
    pub plan: Option<PathBuf>,
}

fn parse_mask(text: &str) -> std::result::Result<Mask, String> {
    named_mask(text).map_err(|e| e.to_string())
}

/// Seconds of a measurement.
///
/// # Errors
/// What is no number, or too many.
pub fn parse_seconds(text: &str) -> std::result::Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("expected seconds, got {text:?}"))?;
    if (0.0..=3600.0).contains(&seconds) { Ok(seconds) } else { Err(format!("{seconds} s; give 0 to 3600")) }
}

impl RunArgs {
    /// How to enter the folder.
    pub fn entry(&self) -> Entry {
        match (self.resume, self.force) {
            (true, _) => Entry::Resume,
            (_, true) => Entry::Force,
            _ => Entry::New,
        }
    }
}

impl DataArgs {
    /// Overrides the configuration by the flags. In a run that goes on, another folder is where its images lie now.
    pub fn apply(&self, config: &mut Config, entry: Entry) {
        let mut dir = self.data_dir.clone();
        let moved = self.data.as_deref().and_then(|given| config.data.source().moved(given));
        if let (Entry::Resume, Some(place)) = (entry, moved) {
            dir = Some(dir.unwrap_or_default().join(place));
        } else if let Some(name) = &self.data {
            config.data.name.clone_from(name);
            // A folder given for another set is not this one's.
            config.data.dir = None;
        }
        set_some(&mut config.data.dir, &dir);
        set_some(&mut config.data.image_size, &self.image_size);
        set_some(&mut config.data.train_limit, &self.train_limit);
        set_some(&mut config.data.test_limit, &self.test_limit);
    }
}

impl NetworkArgs {
    /// Overrides the configuration by the flags.
    pub fn apply(&self, config: &mut Config) {
        if let Some(name) = &self.net {
            // Another network comes as it was published.
            config.network = NetworkConfig { name: name.clone(), ..NetworkConfig::default() };
        }
        set_some(&mut config.network.input_stride, &self.input_stride);
        set_some(&mut config.network.stage_strides, &self.stage_strides);
        set_some(&mut config.network.head_channels, &self.head_channels);
    }
}

impl BudgetArgs {
    /// Overrides the configuration by the flags.
    pub fn apply(&self, config: &mut Config) {
        let given = [
            self.keep.map(Budget::Keep),
            self.keep_fraction.map(Budget::KeepFraction),
            self.remove.map(Budget::Remove),
            self.latency_fraction.map(Budget::LatencyFraction),
            self.budget_ms.map(Budget::LatencyMs),
        ];
        if let Some(budget) = given.into_iter().flatten().next() {
            config.budget = budget;
        }
    }
}

impl MethodArgs {
    /// Overrides the configuration by the flags.
    pub fn apply(&self, config: &mut Config) {
        set_some(&mut config.search.method, &self.method);
        set(&mut config.latency, &self.latency);
        self.matching.apply(config);
    }
}

impl MatchArgs {
    /// Overrides the configuration by the flag.
    pub fn apply(&self, config: &mut Config) {
        set_some(&mut config.search.match_latency, &self.match_latency);
    }
}

impl StageArgs {
    /// Overrides a stage's settings by the flags.
    pub fn apply(&self, config: &mut TrainConfig) {
        set(&mut config.epochs, &self.epochs);
        set(&mut config.batch, &self.batch);
        set(&mut config.lr, &self.lr);
    }
}

impl MaskArgs {
    /// The selection that was given, if one was.
    ///
    /// # Errors
    /// A plan that cannot be read.
    pub fn selection(&self) -> Result<Option<Selection>> {
        match (&self.keep_list, &self.plan) {
            (Some(mask), _) => Ok(Some(mask.clone().into())),
            (None, Some(path)) => Ok(Some(Selection::read(path)?)),
            (None, None) => Ok(None),
        }
    }
}

impl Common {
    /// The configuration that the flags of single commands override: `--config`, or that of the run to be resumed, or the
    /// defaults; then the common flags.
    ///
    /// # Errors
    /// A file that cannot be read or names unknown keys.
    pub fn base_config(&self, entry: Entry, folder: Option<&RunFolder>) -> Result<Config> {
        let mut config = match (&self.config, entry, folder) {
            (Some(file), ..) => Config::read(file)?,
            (None, Entry::Resume, Some(folder)) => folder.config()?,
            _ => Config::default(),
        };
        set(&mut config.device, &self.device);
        if let Some(precision) = &self.precision {
            config.precision = precision.parse()?;
        }
        set(&mut config.threads, &self.threads);
        set(&mut config.seed, &self.seed);
        Ok(config)
    }

    /// The folder of the run, `runs/<command>` if none was given.
    pub fn folder(&self, command: &str) -> RunFolder {
        RunFolder::new(self.out.clone().unwrap_or_else(|| Path::new("runs").join(command)))
    }

    /// Checks the finished configuration and starts the threads it asks for.
    ///
    /// # Errors
    /// A value out of range.
    pub fn ready(&self, config: &Config) -> Result<()> {
        config.check()?;
        if self.threads.is_none() {
            set_threads(config.threads)?;
        }
        Ok(())
    }

    /// How doubts and progress are treated.
    pub fn stance(&self) -> Stance {
        Stance { strict: self.strict, quiet: self.quiet }
    }

    /// Enters the run's folder.
    ///
    /// # Errors
    /// As [`RunFolder::enter`].
    pub fn enter(&self, folder: &RunFolder, run: &RunSpec<'_>, entry: Entry) -> Result<Session> {
        Ok(folder.enter(run, entry, self.quiet)?)
    }
}

/// Sizes the pool that all arithmetic runs in; 0 takes all cores.
///
/// # Errors
/// When the operating system refuses the threads.
pub fn set_threads(threads: usize) -> Result<()> {
    const MAX_THREADS: usize = 4096;
    if threads > MAX_THREADS {
        return Err(Error::Config(format!("threads = {threads}; give 0 (all cores) to {MAX_THREADS}")).into());
    }
    match rayon::ThreadPoolBuilder::new().num_threads(threads).build_global() {
        Ok(()) => Ok(()),
        // The pool stands already: within one process it keeps its size.
        Err(_) if threads == 0 => Ok(()),
        Err(e) => Err(Error::Config(format!("{threads} threads cannot be started: {e}")).into()),
    }
}

/// The files that a command writes its result to: the requested one, and always the one in the run's folder. The latter
/// comes last because it marks the run as finished. `models` are those that it reads.
///
/// # Errors
/// A requested file that cannot be written, or a model that would be overwritten: told now, it costs no training.
pub fn outputs(asked: Option<&PathBuf>, folder: &RunFolder, file: &str, models: &[&Path]) -> Result<Vec<PathBuf>> {
    asked.map(|path| check_writable(path)).transpose()?;
    let paths: Vec<PathBuf> = asked.cloned().into_iter().chain([folder.path(file)]).collect();
    for model in models {
        paths.iter().try_for_each(|path| refuse_same(model, path))?;
    }
    Ok(paths)
}

/// The model file that a command starts from.
///
/// # Errors
/// When none was given.
pub fn model_file<'a>(config: &'a Config, command: &str) -> Result<&'a Path> {
    let missing =
        || Error::Config(format!("{command} needs a model to start from; give its file, or `model` in --config"));
    Ok(config.model.as_deref().ok_or_else(missing)?)
}

/// Refuses to write a model over the one it is made from.
///
/// # Errors
/// When both paths are the same file.
pub fn refuse_same(input: &Path, output: &Path) -> Result<()> {
    match (input.canonicalize(), output.canonicalize()) {
        (Ok(a), Ok(b)) if a == b => {
            Err(Error::Config(format!("{} would be written over itself; give another output", input.display())).into())
        }
        _ => Ok(()),
    }
}

/// Sizes of a model, for machine output.
///
/// # Errors
/// A malformed graph.
pub fn sizes(model: &Model) -> Result<(u64, u64)> {
    let cost = model.graph.cost()?;
    Ok((cost.params(), cost.macs()))
}

fn set<T: Clone>(to: &mut T, from: &Option<T>) {
    if let Some(value) = from {
        to.clone_from(value);
    }
}

/// Overrides a setting by its flag if the flag was given.
pub fn set_some<T: Clone>(to: &mut Option<T>, from: &Option<T>) {
    if from.is_some() {
        to.clone_from(from);
    }
}
