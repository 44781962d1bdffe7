//! The command line: what was typed → what to do. One file per subcommand; each prints, none computes.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage (an unknown flag, a bad setting, a run folder that is taken).

mod bench;
mod check;
mod devices;
mod eval;
mod export;
mod finetune;
mod import;
mod infer;
mod kernels;
mod merge;
mod network;
mod plan;
mod search;
mod settings;
mod shrink;
mod train;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::Error;

/// Makes compact CNNs shallow: learns which activations can go, finetunes without them, and folds what became linear
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
    /// Trains a network
    Train(train::Args),
    /// Learns which blocks of a trained network keep their activations
    Search(search::Args),
    /// Retrains a network without the activations of the freed blocks
    Finetune(finetune::Args),
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
    /// Runs the command.
    ///
    /// # Errors
    /// The command's error; [`exit_code`] distinguishes wrong usage from failure.
    pub fn run(&self) -> anyhow::Result<()> {
        let common = &self.common;
        start_logging(common);
        if let Some(threads) = common.threads {
            settings::set_threads(threads)?;
        }
        match &self.command {
            Command::Shrink(args) => shrink::run(args, common),
            Command::Train(args) => train::run(args, common),
            Command::Search(args) => search::run(args, common),
            Command::Finetune(args) => finetune::run(args, common),
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

/// 2 for wrong usage, 1 for everything else.
pub fn exit_code(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref::<Error>() {
        Some(Error::Config(_)) => ExitCode::from(2),
        _ => ExitCode::FAILURE,
    }
}

/// Writes to standard output; a reader that has gone away (`| head`) is not a failure.
fn print(out: &mut impl std::io::Write, text: &str) -> anyhow::Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

fn start_logging(common: &Common) {
    use tracing_subscriber::filter::LevelFilter;
    let level = match (common.quiet, common.verbose) {
        (true, _) => LevelFilter::ERROR,
        (_, true) => LevelFilter::DEBUG,
        _ => LevelFilter::WARN,
    };
    // A second start, as in a test of the library, keeps the first subscriber.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .try_init();
}
