//! The command line: parse, run, print one line of error, exit.

use std::process::ExitCode;

use depthshrinker::cli::{Cli, fail};
use depthshrinker::memory::EndingAllocator;

#[global_allocator]
static ALLOCATOR: EndingAllocator = EndingAllocator;

fn main() -> ExitCode {
    let cli = match Cli::read() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}
