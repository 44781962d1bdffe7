//! `bench`: layers and whole networks on a device, against its limits, PyTorch and inference runtimes.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::bench_table::projection;
use super::network::NetArgs;
use super::settings::{MaskArgs, parse_seconds};
use super::{Common, print};
use crate::Error;
use crate::config::Config;
use crate::device::Device;
use crate::device::cache::Cache;
use crate::dtype::Dtype;
use crate::engine::Fusion;
use crate::io::write_atomic;
use crate::measure::{
    Findings, HostRates, LayerPass, Limits, NetworkCase, ProjectedNetwork, Projection, StepTime, TimedLayer, step_times,
};
use crate::ops::config::force;
use crate::pipeline::{Bench, Entry, Keep, PeerOptions, Tuning, fully_merged, network_cases, published_on_v100, tune};
use crate::report::{
    BENCH_SCHEMA, BenchFile, PROJECTION_NOTE, RooflinePlot, csv, host_rates_text, json_text, layer_table, layer_totals,
    limits_text, network_bars, network_bench_table, projected_steps_table, projection_page, projection_table,
    runtime_table, step_time_table, tuned_text,
};
use crate::terminal;
use crate::train::Reporter;

/// Seconds that a peer may take beyond the measurement, for a layer and for a network, which it may compile.
const LAYER_LEEWAY: f64 = 30.0;
const NETWORK_LEEWAY: f64 = 240.0;

/// Share of the measuring time that steps of networks have beside it, and how many of each network are printed.
const STEPS_SHARE: f64 = 0.25;
const SHOWN_STEPS: usize = 10;

/// Options of `bench`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum BenchCommand {
    /// Every distinct convolution layer of a network and of its merged form, forward and backward
    Kernels(KernelBenchArgs),
    /// A whole network: original, folded, fused, merged, and its training step
    Network(NetworkBenchArgs),
    /// Networks side by side, as their authors timed them and as one deploys them, beside what was published of them
    Table(super::bench_table::Args),
}

#[derive(Debug, Clone, clap::Args)]
struct BenchArgs {
    #[command(flatten)]
    net: NetArgs,
    /// Images per pass
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    batch: u32,
    /// Seconds for all measurements together; slow work takes longer, and 0 times each piece of it once
    #[arg(long, default_value_t = 20.0, value_parser = parse_seconds)]
    seconds: f64,
    /// Also time PyTorch on the same work, in turns with this program, after all own measurements; for a network also the
    /// inference runtimes that the Python has: ONNX Runtime and OpenVINO, on CUDA ONNX Runtime and TensorRT
    #[arg(long)]
    peers: bool,
    /// Seconds that a peer may take for one answer beyond the measurement [default: 30 for a layer, 240 for a network]
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    peer_seconds: Option<f64>,
    /// Python interpreter with PyTorch, with inference runtimes, or with both; benches/peers has files of requirements
    #[arg(long, value_name = "PATH", default_value = "python3")]
    python: PathBuf,
    #[command(flatten)]
    mask: MaskArgs,
}

#[derive(Debug, Clone, clap::Args)]
struct KernelBenchArgs {
    #[command(flatten)]
    bench: BenchArgs,
    /// Passes: fwd, dgrad, wgrad, train-fwd, train-bwd (the fused step of training); the CPU has dgrad and wgrad in one
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "fwd,dgrad,wgrad,train-fwd,train-bwd")]
    passes: Vec<String>,
    /// Only layers whose name contains this, or with --tune steps
    #[arg(long, value_name = "NAME")]
    layer: Option<String>,
    /// Launch some kernels with this configuration instead of the chosen one, such as pointwise_forward=64x64-vector; may
    /// be repeated
    #[arg(long, value_name = "KERNELS=CONFIG")]
    kernel_config: Vec<String>,
    /// Instead find the fastest configuration of every kernel that the engine launches for the network, fused, and for its merged
    /// form, in inference and in training; and keep them, for this device, where the engine finds them: beside the cached kernels, or in
    /// the file that $DEPTHSHRINKER_TUNED names. Each must give what the engine's own gives before it is timed
    #[arg(long, conflicts_with_all = ["passes", "kernel_config", "peers", "peer_layers"])]
    tune: bool,
    /// Number of layers to time with PyTorch: those that take most of the time
    #[arg(long, value_name = "N", default_value_t = usize::MAX, hide_default_value = true)]
    peer_layers: usize,
}

#[derive(Debug, Clone, clap::Args)]
struct NetworkBenchArgs {
    #[command(flatten)]
    bench: BenchArgs,
    /// Also project each network to GPUs by their data sheets, in f32 and f16: what the counts of its steps would allow. With
    /// --out step by step as projection.json and projection.html
    #[arg(long, value_name = "GPUS", value_delimiter = ',')]
    project: Vec<String>,
    /// Project only, and time nothing
    #[arg(long, requires = "project")]
    untimed: bool,
}

/// Setup common to both kinds of bench.
struct Setting<'a> {
    args: &'a BenchArgs,
    common: &'a Common,
    config: Config,
    device: Device,
    limits: Limits,
}

/// The results of a bench for people.
struct Shown {
    tables: String,
    plot_file: &'static str,
    /// SVG.
    plot: String,
}

/// Times, prints, and writes files if a folder is given.
///
/// # Errors
/// An unknown network or pass, a device that is not there or fails, or a folder that cannot be written.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    match &args.command {
        BenchCommand::Kernels(args) => kernels(args, common),
        BenchCommand::Network(args) => network(args, common),
        BenchCommand::Table(args) => super::bench_table::run(args, common),
    }
}

impl<'a> Setting<'a> {
    fn new(args: &'a BenchArgs, common: &'a Common) -> Result<Self> {
        let config = common.base_config(Entry::New, None)?;
        common.ready(&config)?;
        let device = config.device()?;
        if let Device::Gpu(gpu, _) = &device
            && gpu.driver().is_emulated()
        {
            tracing::warn!("times of the emulator say nothing about any GPU");
        }
        let limits = Limits::measure(&device, Duration::from_secs_f64(args.seconds))?;
        Ok(Self { args, common, config, device, limits })
    }

    fn budget(&self) -> Duration {
        Duration::from_secs_f64(self.args.seconds)
    }

    fn peer(&self, layers: usize, leeway: f64) -> Option<PeerOptions<'_>> {
        let leeway = Duration::from_secs_f64(self.args.peer_seconds.unwrap_or(leeway));
        self.args.peers.then_some(PeerOptions { python: &self.args.python, layers, leeway })
    }

    fn batch(&self) -> usize {
        self.args.batch as usize
    }

    fn title(&self, what: &str) -> String {
        let (device, precision) = (self.device.name(), self.device.precision());
        format!("{what} of {}, batch {}, on {device} in {precision}", self.args.net.net, self.args.batch)
    }

    /// Runs a bench. Results are written to `<stem>.json` as they arrive, if a folder is given.
    fn bench<R: Serialize>(
        &self,
        stem: &str,
        peer: Option<PeerOptions<'_>>,
        run: impl FnOnce(&Bench<'_>, Keep<'_, R>) -> crate::Result<Findings<R>>,
    ) -> Result<Findings<R>> {
        let (device, limits, budget) = (&self.device, &self.limits, self.budget());
        Ok(run(&Bench { device, limits, budget, peer }, &|found| self.keep(stem, found, false))?)
    }

    fn keep<R: Serialize>(&self, stem: &str, found: &Findings<R>, complete: bool) -> crate::Result<()> {
        let file = BenchFile {
            schema: BENCH_SCHEMA,
            network: &self.args.net.net,
            device: self.device.name(),
            precision: self.device.precision().to_string(),
            batch: self.batch(),
            version: env!("CARGO_PKG_VERSION"),
            complete,
            peaks: self.limits.record(),
            peer: found.peer.as_ref(),
            runtimes: found.runtimes.as_ref(),
            records: &found.records,
        };
        self.write(&format!("{stem}.json"), &json_text(&file))
    }

    /// Prints the results and writes `<stem>.json`, `<stem>.csv` and a plot.
    fn finish<R: Serialize>(&self, stem: &str, found: &Findings<R>, shown: &Shown) -> Result<()> {
        self.keep(stem, found, true)?;
        self.write(&format!("{stem}.csv"), &csv(&found.records))?;
        self.write(shown.plot_file, &shown.plot)?;
        let text = if self.common.json {
            json_text(&found.records)
        } else {
            format!("{}\n{}", shown.tables, limits_text(&self.limits, found.peer.as_ref()))
        };
        print("the times", &text)
    }

    /// Times the steps of the fused cases on the host, writes them to `steps.csv` if a folder is given, and says which take most of
    /// the time that the roofline does not account for.
    fn steps(&self, cases: &[NetworkCase]) -> Result<String> {
        let fused: Vec<_> = cases.iter().filter(|case| case.fusion == Fusion::OnLoad).collect();
        let share = self.budget().mul_f64(STEPS_SHARE) / (fused.len() + 1) as u32;
        let rates = HostRates::measure(&self.limits.peaks, share)?;
        let mut steps = Vec::new();
        for case in fused {
            steps.extend(step_times(case, self.batch(), &rates, share)?);
        }
        self.write("steps.csv", &csv(&steps))?;
        let lost = |step: &StepTime| step.time_us - step.least_us;
        let mut shown: Vec<StepTime> = Vec::new();
        for of_case in steps.chunk_by(|a, b| (a.network, a.training) == (b.network, b.training)) {
            let mut worst = of_case.to_vec();
            worst.sort_by(|a, b| lost(b).total_cmp(&lost(a)));
            worst.truncate(SHOWN_STEPS);
            shown.extend(worst);
        }
        let table = step_time_table(&shown).text();
        Ok(format!("\nsteps that lose most time against the roofline\n\n{table}{}", host_rates_text(&rates)))
    }

    /// Writes a file as a whole, where a folder is given.
    fn write(&self, name: &str, text: &str) -> crate::Result<()> {
        write(self.common, name, text)
    }
}

fn write(common: &Common, name: &str, text: &str) -> crate::Result<()> {
    let Some(folder) = &common.out else { return Ok(()) };
    fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    write_atomic(&folder.join(name), |out| out.write_all(text.as_bytes()))
}

/// Forces each `kernels=configuration` on a GPU.
fn force_configurations(device: &Device, named: &[String]) -> crate::Result<()> {
    for text in named {
        let Device::Gpu(gpu, _) = device else {
            return Err(Error::Config("the CPU has no kernel configurations; leave --kernel-config out".into()));
        };
        let (kernels, config) = text.split_once('=').ok_or_else(|| {
            Error::Config(format!("--kernel-config {text:?}; expected one like pointwise_forward=64x64-vector"))
        })?;
        force(gpu, kernels.parse()?, Some(config))?;
    }
    Ok(())
}

fn kernels(args: &KernelBenchArgs, common: &Common) -> Result<()> {
    if args.tune {
        return tune_kernels(&args.bench, args.layer.as_deref(), common);
    }
    let asked: Vec<LayerPass> = args.passes.iter().map(|pass| pass.trim().parse()).collect::<crate::Result<_>>()?;
    let selection = args.bench.mask.selection()?;
    // Before the device is opened, which takes a while: the network may not exist.
    let model = args.bench.net.model(0)?;
    let setting = Setting::new(&args.bench, common)?;
    force_configurations(&setting.device, &args.kernel_config)?;
    let merged = fully_merged(&model, selection.as_ref(), &setting.config)?;
    let mut networks = vec!["original"];
    networks.extend(merged.is_some().then_some("merged"));
    let graphs: Vec<_> = [Some(&model), merged.as_ref()].into_iter().flatten().map(|m| &m.graph).collect();
    let passes = LayerPass::on(&setting.device, &asked);
    let mut layers = TimedLayer::of_networks(&graphs, setting.batch(), &passes, setting.device.backend())?;
    if let Some(name) = &args.layer {
        layers.retain(|layer| layer.name.contains(name.as_str()));
        if layers.is_empty() {
            let net = &args.bench.net.net;
            return Err(Error::Config(format!(
                "no layer of {net} has {name:?} in its name; leave --layer out to see their names"
            ))
            .into());
        }
    }
    let peer = setting.peer(args.peer_layers, LAYER_LEEWAY);
    let found = setting.bench("kernels", peer, |bench, keep| bench.layers(&layers, &networks, keep))?;
    let title = setting.title("convolution layers");
    let tables = format!(
        "{title}\n\n{}\n{}",
        layer_table(&found.records, &networks).text(),
        layer_totals(&found.records, &networks).text()
    );
    let plot = RooflinePlot::of_layers(title, &found.records, &setting.limits.roofline).svg();
    setting.finish("kernels", &found, &Shown { tables, plot_file: "roofline.svg", plot })
}

fn tune_kernels(args: &BenchArgs, layer: Option<&str>, common: &Common) -> Result<()> {
    let selection = args.mask.selection()?;
    let (model, config) = (args.net.model(0)?, common.base_config(Entry::New, None)?);
    let device = config.device()?;
    let merged = fully_merged(&model, selection.as_ref(), &config)?;
    let cases = network_cases(&model, merged.as_ref())?;
    let (batch, budget) = (args.batch as usize, Duration::from_secs_f64(args.seconds));
    let mut reporter = if common.stance().quiet { Reporter::quiet() } else { Reporter::new() };
    let Tuning { records, path } = tune(&device, &cases, batch, layer, budget, &mut reporter)?;
    write(common, "tuned.json", &json_text(&records))?;
    write(common, "tuned.csv", &csv(&records))?;
    let text = match common.json {
        true => json_text(&records),
        false => format!("{}{}\n", tuned_text(&records), terminal::path(&path)),
    };
    print("what was tuned", &text)
}

fn network(args: &NetworkBenchArgs, common: &Common) -> Result<()> {
    let projections: Vec<Projection> = args.project.iter().map(|gpu| projection(gpu)).collect::<crate::Result<_>>()?;
    let selection = args.bench.mask.selection()?;
    let model = args.bench.net.model(0)?;
    if args.untimed {
        let merged = fully_merged(&model, selection.as_ref(), &common.base_config(Entry::New, None)?)?;
        let cases = network_cases(&model, merged.as_ref())?;
        let all = project(&args.bench, common, &projections, &cases)?;
        let text = if common.json { json_text(&all) } else { projected_text(&args.bench, cases.len(), &all) };
        return print("the projection", &text);
    }
    let setting = Setting::new(&args.bench, common)?;
    let merged = fully_merged(&model, selection.as_ref(), &setting.config)?;
    let batch = setting.batch();
    let peer = setting.peer(0, NETWORK_LEEWAY);
    let mut found =
        setting.bench("network", peer, |bench, keep| bench.networks(&model, merged.as_ref(), batch, keep))?;
    let mut tables = format!("{}\n\n{}", setting.title("passes"), network_bench_table(&found.records).text());
    if !projections.is_empty() {
        let cases = network_cases(&model, merged.as_ref())?;
        let all = project(&args.bench, common, &projections, &cases)?;
        for (at, record) in found.records.iter_mut().enumerate() {
            record.work.projected = all.iter().skip(at).step_by(cases.len()).map(ProjectedNetwork::rate).collect();
        }
        tables += &format!("\n{}", projected_text(&args.bench, cases.len(), &all));
    }
    if let Some(table) = runtime_table(&found.records) {
        tables += &format!("\nruntimes on the exported ONNX file, in turns\n\n{}", table.text());
    }
    if setting.device == Device::Cpu {
        tables += &setting.steps(&network_cases(&model, merged.as_ref())?)?;
    }
    let plot = network_bars(setting.title("images per second"), &found.records);
    setting.finish("network", &found, &Shown { tables, plot_file: "network.svg", plot })
}

/// Projects each case to each GPU in f32 and in f16, and writes `projection.json` and `projection.html`.
fn project(
    args: &BenchArgs,
    common: &Common,
    projections: &[Projection],
    cases: &[NetworkCase],
) -> Result<Vec<ProjectedNetwork>> {
    let (cache, batch) = (Cache::of_user(), args.batch as usize);
    let mask = args.mask.selection()?.map(|selection| selection.keep);
    let mut all = Vec::new();
    for (projection, precision) in projections.iter().flat_map(|p| [Dtype::F32, Dtype::F16].map(|of| (p, of))) {
        let there = projection.sheet.arch == 70 && precision == Dtype::F32;
        for case in cases {
            let published = published_on_v100(&args.net.net, case, mask.as_ref(), batch).filter(|_| there);
            let network = projection.network(case, batch, precision, &cache)?;
            all.push(ProjectedNetwork { published_images_per_s: published, ..network });
        }
    }
    write(common, "projection.json", &json_text(&all))?;
    write(common, "projection.html", &projection_page(&projected_title(args), &all))?;
    Ok(all)
}

fn projected_title(args: &BenchArgs) -> String {
    format!("{}, batch {}: projected, not measured", args.net.net, args.batch)
}

/// Tables of what was projected: of all, and of the steps of the last inference case on the first GPU, which is the merged
/// network where there is one.
fn projected_text(args: &BenchArgs, cases: usize, all: &[ProjectedNetwork]) -> String {
    let shown = all.iter().take(cases).rfind(|network| network.pass == "inference");
    let steps = shown.map_or_else(String::new, |network| {
        let ProjectedNetwork { name, projected_to, precision, .. } = network;
        let table = projected_steps_table(network).text();
        format!("\nsteps of {name}, projected to {projected_to} in {precision}\n\n{table}")
    });
    format!("{}\n\n{}{PROJECTION_NOTE}\n{steps}", projected_title(args), projection_table(all).text())
}
