//! `devices`: what this machine and this build can compute on.

use anyhow::Result;
use serde_json::json;

use super::{Common, print};
use crate::device::cache::Cache;
use crate::device::compiler::without_machine_code;
use crate::device::cuda::{Cuda, Properties};
use crate::device::nvrtc::{Nvrtc, Target};
use crate::measure::Machine;
use crate::terminal;

/// Options of `devices`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {}

/// Prints the devices, each whether or not it can be used.
///
/// # Errors
/// When standard output cannot be written.
pub fn run(_args: &Args, common: &Common) -> Result<()> {
    let machine = Machine::here();
    let driver = Cuda::driver_version();
    let gpus: Vec<crate::Result<Properties>> = (0..Cuda::count()).map(Cuda::properties).collect();
    let nvrtc = Nvrtc::find();
    let compiler = nvrtc.as_ref().map(|nvrtc| nvrtc.version());
    // What kernels for a GPU are compiled to.
    let target = |gpu: &Properties| nvrtc.as_ref().ok().and_then(|nvrtc| nvrtc.target(gpu.arch).ok());
    let cache = Cache::of_user();
    let text = if common.json {
        let version = |(major, minor): &(i32, i32)| format!("{major}.{minor}");
        let gpu = |gpu: &crate::Result<Properties>| match gpu {
            Ok(p) => json!({ "name": p.name, "arch": p.arch, "multiprocessors": p.multiprocessors,
                             "memory_bytes": p.memory_bytes, "kernels": target(p).map(|target| target.to_string()) }),
            Err(error) => json!({ "error": error.to_string() }),
        };
        let value = json!({
            "cpu": machine, "driver": driver.as_ref().ok().map(version), "gpus": gpus.iter().map(gpu).collect::<Vec<_>>(),
            "nvrtc": compiler.as_ref().ok().map(version), "kernel_cache": cache.folder(),
        });
        format!("{value:#}\n")
    } else {
        let mut text = describe(&machine);
        match &driver {
            Ok((major, minor)) => text.push_str(&format!("driver     CUDA {major}.{minor}\n")),
            Err(error) => text.push_str(&format!("driver     none: {}\n", reason(error))),
        }
        if driver.is_ok() && gpus.is_empty() {
            text.push_str("gpu        none\n");
        }
        for (ordinal, gpu) in gpus.iter().enumerate() {
            text.push_str(&match gpu {
                Ok(properties) => {
                    let Properties { name, arch, multiprocessors, memory_bytes, .. } = properties;
                    let ptx = target(properties).filter(|target| matches!(target, Target::Ptx(_)));
                    let doubt =
                        ptx.map_or_else(String::new, |target| format!("  {}\n", without_machine_code(*arch, target)));
                    format!(
                        "cuda:{ordinal}     {name}, sm_{arch}, {multiprocessors} multiprocessors, {:.1} GiB\n{doubt}",
                        gib(*memory_bytes)
                    )
                }
                Err(error) => format!("cuda:{ordinal}     {}\n", reason(error)),
            });
        }
        match compiler {
            Ok((major, minor)) => text.push_str(&format!("nvrtc      {major}.{minor}\n")),
            Err(error) => text.push_str(&format!("nvrtc      none: {}\n", reason(error))),
        }
        text.push_str(&format!("kernels    cached in {}\n", terminal::path(cache.folder())));
        text
    };
    print("the list of devices", &text)
}

fn describe(machine: &Machine) -> String {
    let features = if machine.features.is_empty() { "none known".to_owned() } else { machine.features.join(" ") };
    let memory = machine.memory_bytes.map_or_else(|| "unknown".to_owned(), |b| format!("{:.1} GiB", gib(b)));
    let cache =
        |c: &crate::measure::CacheLevel| format!("L{} {} {} KiB", c.level, c.kind.to_lowercase(), c.bytes >> 10);
    let caches: Vec<String> = machine.caches.iter().map(cache).collect();
    let caches = if caches.is_empty() { "unknown".to_owned() } else { caches.join(", ") };
    format!(
        "cpu        {} ({})\n  features {features}\n  cores    {}, {} threads in use\n  caches   {caches}\n  memory   {memory}\n",
        machine.cpu, machine.architecture, machine.cores, machine.threads
    )
}

/// An error under a heading that says already what it is about.
fn reason(error: &crate::Error) -> String {
    error.to_string().trim_start_matches("device: ").to_owned()
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
