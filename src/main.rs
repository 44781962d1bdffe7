//! The command line: parse, run, print one line of error, exit.

use std::process::ExitCode;

use clap::Parser;
use depthshrinker::cli::{Cli, exit_code};

fn main() -> ExitCode {
    // clap itself exits with 2 on wrong usage and with 0 after --help and --version.
    let cli = Cli::parse();
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            exit_code(&error)
        }
    }
}
