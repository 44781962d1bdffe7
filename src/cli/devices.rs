//! `devices`: what this machine and this build can compute on.

use anyhow::Result;
use serde_json::json;

use super::Common;
use crate::device::cache::Cache;
use crate::device::cuda::Cuda;
use crate::device::driver::Driver;
use crate::device::nvrtc::Nvrtc;
use crate::measure::Machine;

/// Options of `devices`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {}

/// Prints the devices.
///
/// # Errors
/// When standard output cannot be written.
pub fn run(_args: &Args, common: &Common) -> Result<()> {
    let machine = Machine::here();
    let gpus: Vec<Cuda> =
        (0..Cuda::count()).map(|ordinal| Cuda::new(ordinal, Cache::of_user())).collect::<crate::Result<_>>()?;
    let compiler = Nvrtc::find();
    let mut out = std::io::stdout().lock();
    if common.json {
        let gpu = |gpu: &Cuda| {
            let memory = gpu.memory().map(|(_, total)| total);
            json!({ "name": gpu.name(), "arch": gpu.arch(), "multiprocessors": gpu.multiprocessors(), "memory_bytes": memory })
        };
        let gpus: Vec<_> = gpus.iter().map(gpu).collect();
        let nvrtc = compiler.as_ref().ok().map(|nvrtc| format!("{}.{}", nvrtc.version().0, nvrtc.version().1));
        let cache = Cache::of_user();
        let value = json!({ "cpu": machine, "gpus": gpus, "nvrtc": nvrtc, "kernel_cache": cache.folder() });
        return print(&mut out, &format!("{value:#}\n"));
    }
    let mut text = describe(&machine);
    if gpus.is_empty() {
        text.push_str("gpu        none\n");
    }
    for (ordinal, gpu) in gpus.iter().enumerate() {
        let memory = gpu.memory().map_or(0.0, |(_, total)| gib(total));
        let (name, arch, count) = (gpu.name(), gpu.arch(), gpu.multiprocessors());
        text.push_str(&format!("cuda:{ordinal}     {name}, sm_{arch}, {count} multiprocessors, {memory:.1} GiB\n"));
    }
    match compiler {
        Ok(nvrtc) => text.push_str(&format!("nvrtc      {}.{}\n", nvrtc.version().0, nvrtc.version().1)),
        Err(error) => text.push_str(&format!("nvrtc      none: {error}\n")),
    }
    text.push_str(&format!("kernels    cached in {}\n", Cache::of_user().folder().display()));
    print(&mut out, &text)
}

fn describe(machine: &Machine) -> String {
    let features = if machine.features.is_empty() { "none known".to_owned() } else { machine.features.join(" ") };
    let memory = machine.memory_bytes.map_or_else(|| "unknown".to_owned(), |b| format!("{:.1} GiB", gib(b)));
    let cache = |c: &crate::measure::Cache| format!("L{} {} {} KiB", c.level, c.kind.to_lowercase(), c.bytes >> 10);
    let caches: Vec<String> = machine.caches.iter().map(cache).collect();
    let caches = if caches.is_empty() { "unknown".to_owned() } else { caches.join(", ") };
    format!(
        "cpu        {} ({})\n  features {features}\n  cores    {}, {} threads in use\n  caches   {caches}\n  memory   {memory}\n",
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
