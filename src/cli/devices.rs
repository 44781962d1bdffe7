//! `devices`: what this machine and this build can compute on.

use anyhow::Result;
use serde_json::json;

use super::Common;
use crate::measure::Machine;

/// Why the list of GPUs is empty.
const NO_GPU: &str = "no CUDA backend in this build";

/// Options of `devices`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {}

/// Prints the devices.
///
/// # Errors
/// When standard output cannot be written.
pub fn run(_args: &Args, common: &Common) -> Result<()> {
    let machine = Machine::here();
    let mut out = std::io::stdout().lock();
    if common.json {
        let kernel_cache: Option<&str> = None;
        let value = json!({ "cpu": machine, "gpus": [], "gpu_note": NO_GPU, "kernel_cache": kernel_cache });
        return print(&mut out, &format!("{value:#}\n"));
    }
    print(&mut out, &describe(&machine))
}

fn describe(machine: &Machine) -> String {
    let features = if machine.features.is_empty() { "none known".to_owned() } else { machine.features.join(" ") };
    let memory = machine.memory_bytes.map_or_else(|| "unknown".to_owned(), |b| format!("{:.1} GiB", gib(b)));
    let cache = |c: &crate::measure::Cache| format!("L{} {} {} KiB", c.level, c.kind.to_lowercase(), c.bytes >> 10);
    let caches: Vec<String> = machine.caches.iter().map(cache).collect();
    let caches = if caches.is_empty() { "unknown".to_owned() } else { caches.join(", ") };
    format!(
        "cpu        {} ({})\n  features {features}\n  cores    {}, {} threads in use\n  caches   {caches}\n  memory   {memory}\n\
         gpu        none: {NO_GPU}\nkernels    no cache: {NO_GPU}\n",
        machine.cpu, machine.architecture, machine.cores, machine.threads
    )
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Writes to standard output; a reader that has gone away (`| head`) is not a failure.
pub(super) fn print(out: &mut impl std::io::Write, text: &str) -> Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}
