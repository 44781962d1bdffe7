//! `kernels`: compiles the CUDA kernels ahead of time, or prints the assembler's report on them. Needs no GPU.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::Result;
use rayon::prelude::*;
use serde_json::json;

use super::network::NetArgs;
use super::{Common, print};
use crate::device::cache::Cache;
use crate::device::compiler::{ARCHITECTURES, Compiled, compile, supported, without_machine_code};
use crate::device::nvrtc::Target;
use crate::device::source::Unit;
use crate::dtype::Dtype;
use crate::io::write_atomic;
use crate::measure::{CounterSetting, count_network};
use crate::networks::image_size;
use crate::report::{Align, Table, counter_notes, counter_page, counter_table, json_text};
use crate::{Error, terminal};

/// Options of `kernels`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Command {
    /// Compiles all kernels into the cache, or into --out DIR to be brought along in DEPTHSHRINKER_KERNELS
    Build(Which),
    /// Registers, shared memory, stack and spills of every kernel; or with --counters what a network's launches do
    Report(ReportArgs),
}

#[derive(Debug, Clone, clap::Args)]
struct Which {
    /// Architectures, as sm_70,sm_90
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_arch)]
    arch: Vec<u32>,
    /// A network the kernels are for. Kernels take shapes at run time, so every network is served by the same ones
    #[arg(value_name = "NET")]
    net: Option<String>,
}

#[derive(Debug, Clone, clap::Args)]
struct ReportArgs {
    #[command(flatten)]
    which: Which,
    /// Run the launches of NET's plan on the emulator and count what they do: sectors, bank conflicts, barriers, tensor-core
    /// operations, beside what the plan says they must move. With --out also as counters.json and counters.html
    #[arg(long, requires = "net")]
    counters: bool,
    /// Images per pass
    #[arg(long, default_value_t = 128, requires = "counters", value_parser = clap::value_parser!(u32).range(1..=65535))]
    batch: u32,
    /// Height and width of the image; if not given those the network was published for
    #[arg(long, requires = "counters", value_parser = clap::value_parser!(u32).range(1..=8192))]
    size: Option<u32>,
    /// A training step instead of inference
    #[arg(long, requires = "counters")]
    training: bool,
    /// Blocks of a launch that run, and stand for all; 0 runs all, which the bytes that a launch touches need
    #[arg(long, default_value_t = 32, requires = "counters")]
    blocks: u64,
}

fn parse_arch(text: &str) -> std::result::Result<u32, String> {
    let number = text.trim().trim_start_matches("sm_").parse().map_err(|_| format!("expected sm_70, got {text:?}"))?;
    if number < 70 { Err(format!("sm_{number} is too old; sm_70 is the oldest")) } else { Ok(number) }
}

/// Compiles, and prints what was made or what it takes.
///
/// # Errors
/// No compiler, a kernel that does not compile, or a folder that cannot be written.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let which = match &args.command {
        Command::Report(args) if args.counters => return counters(args, common),
        Command::Report(args) => &args.which,
        Command::Build(which) => which,
    };
    if let Some(net) = &which.net {
        image_size(net)?;
    }
    let cache = common.out.as_ref().map_or_else(Cache::of_user, Cache::at);
    let architectures = if which.arch.is_empty() { ARCHITECTURES.to_vec() } else { which.arch.clone() };
    let units = Unit::all()?;
    let supported = |arch: u32| units.iter().filter(move |unit| supported(unit.dtype(), arch));
    let work: Vec<(u32, Unit)> =
        architectures.iter().flat_map(|&arch| supported(arch).map(move |&unit| (arch, unit))).collect();
    let start = Instant::now();
    let compiled: Vec<(u32, Unit, Compiled)> = work
        .into_par_iter()
        .map(|(arch, unit)| compile(unit, arch, &cache).map(|compiled| (arch, unit, compiled)))
        .collect::<crate::Result<_>>()?;
    let seconds = start.elapsed().as_secs_f64();
    if matches!(args.command, Command::Build(_)) && compiled.iter().any(|c| !c.2.kept) {
        let folder = cache.folder().display();
        return Err(Error::Device(format!("{folder} cannot be written to or is full; choose another --out")).into());
    }
    let text = match args.command {
        Command::Build(_) => built(&compiled, &cache, seconds, common.json),
        Command::Report(_) => resources(&compiled, common.json),
    };
    print("the list of kernels", &text)
}

/// Counts what the launches of a network's plan do.
fn counters(args: &ReportArgs, common: &Common) -> Result<()> {
    let arch = match args.which.arch[..] {
        [] => 80,
        [arch] => arch,
        _ => return Err(Error::Config("--counters takes one architecture, such as --arch sm_70".into()).into()),
    };
    let net = args.which.net.as_deref().unwrap_or_default();
    let precision = common.precision.as_deref().map_or(Ok(Dtype::F16), str::parse::<Dtype>)?;
    let model = NetArgs::of(net, args.size).model(common.seed.unwrap_or(0))?;
    let (batch, sample) = (args.batch as usize, Some(args.blocks).filter(|&blocks| blocks > 0));
    let report = count_network(&model, CounterSetting { batch, training: args.training, precision, arch, sample })?;
    if let Some(folder) = &common.out {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        for (name, text) in [("counters.json", json_text(&report)), ("counters.html", counter_page(&report))] {
            write_atomic(&folder.join(name), |out| out.write_all(text.as_bytes()))?;
        }
    }
    let text = match common.json {
        true => json_text(&report),
        false => format!("{}\n{}\n", counter_table(&report).text(), counter_notes(&report).join("\n")),
    };
    print("the counts", &text)
}

fn built(compiled: &[(u32, Unit, Compiled)], cache: &Cache, seconds: f64, as_json: bool) -> String {
    let kernels: usize = compiled.iter().map(|c| c.2.kernels.len()).sum();
    let bytes: usize = compiled.iter().map(|c| c.2.image.len()).sum();
    if as_json {
        let targets: BTreeSet<String> = compiled.iter().map(|c| c.2.target.to_string()).collect();
        let value = json!({ "folder": cache.folder(), "files": compiled.len(), "kernels": kernels, "bytes": bytes, "targets": targets, "seconds": seconds });
        return format!("{value:#}\n");
    }
    let ptx = compiled.iter().filter(|c| matches!(c.2.target, Target::Ptx(_)));
    let doubts: BTreeSet<String> = ptx.map(|(arch, _, c)| without_machine_code(*arch, c.target) + "\n").collect();
    format!(
        "{kernels} kernels in {} files, {:.1} MB, in {} ({seconds:.1} s)\n{}",
        compiled.len(),
        bytes as f64 / 1e6,
        terminal::path(cache.folder()),
        String::from_iter(doubts)
    )
}

fn resources(compiled: &[(u32, Unit, Compiled)], as_json: bool) -> String {
    let rows = compiled.iter().flat_map(|(arch, _, c)| c.kernels.iter().map(move |kernel| (arch, c.target, kernel)));
    if as_json {
        let rows: Vec<_> = rows
            .map(|(arch, target, k)| {
                json!({ "arch": arch, "target": target.to_string(), "kernel": k.instance, "registers": k.registers, "shared": k.shared, "stack": k.stack, "spills": k.spills })
            })
            .collect();
        return format!("{:#}\n", json!(rows));
    }
    let right = |name| (name, Align::Right);
    let mut table = Table::new(&[
        ("kernel", Align::Left),
        right("arch"),
        right("registers"),
        right("shared bytes"),
        right("stack bytes"),
        right("spilled bytes"),
    ]);
    for (_, target, k) in rows {
        let numbers = [k.registers, k.shared, k.stack, k.spills].map(|n| n.to_string());
        let [registers, shared, stack, spills] = numbers;
        table.row(&[k.instance.clone(), target.to_string(), registers, shared, stack, spills]);
    }
    table.text()
}
