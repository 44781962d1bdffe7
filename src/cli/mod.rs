//! The command line: what was typed → what to do. One file per subcommand; each prints, none computes.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage (an unknown flag, a bad setting, a run folder that is taken).

mod bench;
mod bench_table;
mod check;
mod compare;
mod devices;
mod eval;
mod expand;
mod export;
mod finetune;
mod import;
mod infer;
mod kernels;
mod merge;
mod network;
mod plan;
mod search;
mod select;
mod settings;
mod shrink;
mod table;
mod train;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::StyledStr;
use clap::error::ContextValue;
use clap::{Args, Parser, Subcommand};

use crate::{Error, terminal};

/// Exit code of wrong usage.
const WRONG_USAGE: u8 = 2;

/// Makes compact CNNs shallow: finds which activations can go, finetunes without them, and folds what became linear
/// into dense convolutions, exactly
#[derive(Debug, Parser)]
#[command(name = "depthshrinker", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

/// Options of every command.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Common options")]
pub struct Common {
    /// Device to compute on: auto, cpu, cuda, cuda:N or emulator
    #[arg(long, global = true, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Precision of activations on a GPU: f32, f16 or bf16
    #[arg(long, global = true, value_name = "PRECISION")]
    pub precision: Option<String>,
    /// Number of threads [default: all cores]; results do not depend on it
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
    /// Seed of weights, data order, augmentation and search
    #[arg(long, global = true, value_name = "N")]
    pub seed: Option<u64>,
    /// Folder of the run
    #[arg(long, global = true, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Settings as TOML; flags override them
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Fail where there would be a warning that the result may mean nothing: classes that differ from the model's, one class
    /// alone, classes without training images, batch-norm over single values
    #[arg(long, global = true)]
    pub strict: bool,
    /// Print machine-readable output on stdout and logs on stderr
    #[arg(long, global = true)]
    pub json: bool,
    /// Print no progress, only errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Log more details
    #[arg(short, long, global = true, conflicts_with = "quiet")]
    pub verbose: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The whole job: train or load, search, finetune, merge, evaluate, report
    Shrink(shrink::Args),
    /// Compares methods: every method, budget and seed from one model, as jobs that run anywhere
    Compare(compare::Args),
    /// Trains a network
    Train(train::Args),
    /// Finds which blocks of a trained network keep their activations
    Search(search::Args),
    /// Measures the latency of every segment of a network that can be merged, as `select` reads it
    Table(table::Args),
    /// Selects what to merge from tables of times and importances, within a budget in milliseconds
    Select(select::Args),
    /// Retrains a network without the activations of the freed blocks
    Finetune(finetune::Args),
    /// Expands dense convolutions into inverted residuals, trains them, and folds them back (DepthShrinker+)
    Expand(expand::Args),
    /// Folds the freed blocks of a network into one convolution each, exactly
    Merge(merge::Args),
    /// Measures the accuracy of a model on test images
    Eval(eval::Args),
    /// Converts other projects' weights (timm, torchvision; .safetensors, .pth) into a model file
    Import(import::Args),
    /// Exports a model as ONNX, or as plain convolutions in safetensors, with batch-norms folded
    Export(export::Args),
    /// Runs a model on tensors or pictures
    Infer(infer::Args),
    /// Prints the steps, bytes and FLOPs of a network, and its roofline time on known devices
    Plan(plan::Args),
    /// Times layers or whole networks on a device, against its limits and against PyTorch
    Bench(bench::Args),
    /// Compiles the CUDA kernels ahead of time, or reports what they use; needs no GPU
    Kernels(kernels::Args),
    /// Compares every operation on a device with the host
    Check(check::Args),
    /// Lists the devices of this machine
    Devices(devices::Args),
}

impl Cli {
    /// Reads what was typed. Where that is no command, the help, the version or what is wrong with it has been told.
    ///
    /// # Errors
    /// The exit code: 0 after help and version, 1 where they could not be written, 2 for wrong usage.
    pub fn read() -> Result<Self, ExitCode> {
        Self::try_parse().map_err(|told| {
            if told.use_stderr() {
                tell_usage(told);
                return ExitCode::from(WRONG_USAGE);
            }
            let written = told.print().and_then(|()| io::stdout().flush());
            match delivered("the help", written) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&error),
            }
        })
    }

    /// Runs the command.
    ///
    /// # Errors
    /// The command's error, for [`fail`] to tell.
    pub fn run(&self) -> anyhow::Result<()> {
        let common = &self.common;
        start_logging(common);
        crate::ops::simd::check_forced()?;
        if let Some(threads) = common.threads {
            settings::set_threads(threads)?;
        }
        match &self.command {
            Command::Shrink(args) => shrink::run(args, common),
            Command::Compare(args) => compare::run(args, common),
            Command::Train(args) => train::run(args, common),
            Command::Search(args) => search::run(args, common),
            Command::Table(args) => table::run(args, common),
            Command::Select(args) => select::run(args, common),
            Command::Finetune(args) => finetune::run(args, common),
            Command::Expand(args) => expand::run(args, common),
            Command::Merge(args) => merge::run(args, common),
            Command::Eval(args) => eval::run(args, common),
            Command::Import(args) => import::run(args, common),
            Command::Export(args) => export::run(args, common),
            Command::Infer(args) => infer::run(args, common),
            Command::Plan(args) => plan::run(args, common),
            Command::Bench(args) => bench::run(args, common),
            Command::Kernels(args) => kernels::run(args, common),
            Command::Check(args) => check::run(args, common),
            Command::Devices(args) => devices::run(args, common),
        }
    }
}

/// Tells an error in one line. Returns the exit code: 2 for wrong usage, 1 for everything else.
pub fn fail(error: &anyhow::Error) -> ExitCode {
    terminal::tell(&format!("error: {error:#}"));
    match error.downcast_ref::<Error>() {
        Some(Error::Config(_)) => ExitCode::from(WRONG_USAGE),
        _ => ExitCode::FAILURE,
    }
}

/// Tells what is wrong with what was typed, in colour where that is wanted.
fn tell_usage(mut error: clap::Error) {
    let typed = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned());
    if typed.into_iter().all(|arg| terminal::one_line(&arg) == arg) {
        // As in `terminal::tell`: a failure to tell has nobody to be told to.
        let _ = error.print();
        return;
    }
    // What was typed is quoted, and it may be a file name. `clap` drops parts of it when it writes plainly.
    let quoted: Vec<_> = error.context().map(|(kind, value)| (kind, escaped(value))).collect();
    for (kind, value) in quoted {
        error.insert(kind, value);
    }
    terminal::lines(&error.to_string()).lines().for_each(terminal::tell);
}

/// What an error quotes, each on one line.
fn escaped(value: &ContextValue) -> ContextValue {
    let one_line = |text: &String| terminal::one_line(text).into_owned();
    let tip = |text: &StyledStr| StyledStr::from(terminal::one_line(&text.to_string()).into_owned());
    match value {
        ContextValue::String(text) => ContextValue::String(one_line(text)),
        ContextValue::Strings(texts) => ContextValue::Strings(texts.iter().map(one_line).collect()),
        ContextValue::StyledStrs(tips) => ContextValue::StyledStrs(tips.iter().map(tip).collect()),
        other => other.clone(),
    }
}

/// Writes to standard output; a reader that has gone away (`| head`) is not a failure. `what` names the text in the error.
fn print(what: &str, text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    delivered(what, out.write_all(terminal::lines(text).as_bytes()).and_then(|()| out.flush()))
}

/// Explains why `what` did not reach standard output.
fn delivered(what: &str, written: io::Result<()>) -> anyhow::Result<()> {
    match written {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            anyhow::bail!("{what} cannot be written to standard output: {e}; send it elsewhere or free some space")
        }
        _ => Ok(()),
    }
}

fn start_logging(common: &Common) {
    use tracing_subscriber::filter::LevelFilter;
    use tracing_subscriber::fmt::format::debug_fn;
    let level = match (common.quiet, common.verbose) {
        (true, _) => LevelFilter::ERROR,
        (_, true) => LevelFilter::DEBUG,
        _ => LevelFilter::WARN,
    };
    // A second start, as in a test of the library, keeps the first subscriber.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_ansi(terminal::is_coloured())
        // Told on standard error itself, where it failed.
        .log_internal_errors(false)
        .fmt_fields(debug_fn(|out, _, value| write!(out, "{}", terminal::one_line(&format!("{value:?}")))))
        .with_target(false)
        .without_time()
        .try_init();
}
