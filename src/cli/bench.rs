//! `bench`: layers and whole networks on a device, against its limits and against PyTorch.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use super::network::NetArgs;
use super::settings::MaskArgs;
use super::{Common, print};
use crate::Error;
use crate::config::Config;
use crate::device::Device;
use crate::io::write_atomic;
use crate::measure::{Layer, LayerPass};
use crate::pipeline::{Bench, Entry, Limits, PeerOptions, Record, fully_merged};
use crate::report::{Point, RooflinePlot, csv, layer_table, layer_totals, network_bars, network_bench_table};

/// How long a peer may take for a layer beyond what it measures, and for a network, which it may compile.
const LAYER_LEEWAY: f64 = 30.0;
const NETWORK_LEEWAY: f64 = 240.0;

/// Options of `bench`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, clap::Subcommand)]
enum Command {
    /// Every distinct convolution layer of a network and of what it merges into, forward and backward
    Kernels(KernelArgs),
    /// A whole network: original, folded, fused, merged, and its training step
    Network(NetworkArgs),
}

#[derive(Debug, Clone, clap::Args)]
struct BenchArgs {
    #[command(flatten)]
    net: NetArgs,
    /// Images per pass
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    batch: u32,
    /// Seconds to measure for, everything together; what is slow takes longer
    #[arg(long, default_value_t = 20.0, value_parser = parse_seconds)]
    seconds: f64,
    /// Also time PyTorch on the same work, in turns, once everything has been timed without it
    #[arg(long)]
    peers: bool,
    /// Longest that it may take for one answer beyond what it measures [default: 30 for a layer, 240 for a network]
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    peer_seconds: Option<f64>,
    /// The Python that has PyTorch
    #[arg(long, value_name = "PATH", default_value = "python3")]
    python: PathBuf,
    #[command(flatten)]
    mask: MaskArgs,
}

#[derive(Debug, Clone, clap::Args)]
struct KernelArgs {
    #[command(flatten)]
    bench: BenchArgs,
    /// Passes: fwd, dgrad, wgrad, train-fwd, train-bwd (the fused step of training); the CPU has dgrad and wgrad in one
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "fwd,dgrad,wgrad,train-fwd,train-bwd")]
    passes: Vec<String>,
    /// Only layers whose name contains this
    #[arg(long, value_name = "NAME")]
    layer: Option<String>,
    /// Ask PyTorch only for so many layers: those that take most of the time
    #[arg(long, value_name = "N", default_value_t = usize::MAX, hide_default_value = true)]
    peer_layers: usize,
}

#[derive(Debug, Clone, clap::Args)]
struct NetworkArgs {
    #[command(flatten)]
    bench: BenchArgs,
}

fn parse_seconds(text: &str) -> std::result::Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("expected seconds, got {text:?}"))?;
    if (0.0..=3600.0).contains(&seconds) { Ok(seconds) } else { Err(format!("{seconds} s; give 0 to 3600")) }
}

/// What both kinds begin with.
struct Setting<'a> {
    args: &'a BenchArgs,
    common: &'a Common,
    config: Config,
    device: Device,
    limits: Limits,
}

/// Times, prints, and writes files where a folder is given.
///
/// # Errors
/// An unknown network or pass, a device that is not there or fails, or a folder that cannot be written.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    match &args.command {
        Command::Kernels(args) => kernels(args, common),
        Command::Network(args) => network(&args.bench, common),
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

    /// Runs a bench, whose records are kept in `<stem>.json` as they come, where a folder is given.
    fn bench<T>(
        &self,
        stem: &str,
        peer: Option<PeerOptions<'_>>,
        run: impl FnOnce(&Bench<'_>) -> crate::Result<T>,
    ) -> Result<T> {
        let keep = |records: &[Record], peer: &Value| self.keep(stem, records, peer, false);
        let (device, limits, budget) = (&self.device, &self.limits, self.budget());
        Ok(run(&Bench { device, limits, budget, peer, keep: &keep })?)
    }

    fn keep(&self, stem: &str, records: &[Record], peer: &Value, complete: bool) -> crate::Result<()> {
        let all = json!({
            "schema": 1, "network": self.args.net.net, "device": self.device.name(),
            "precision": self.device.precision().to_string(), "batch": self.args.batch,
            "version": env!("CARGO_PKG_VERSION"), "complete": complete, "peaks": self.limits.json(), "peer": peer,
            "layers": records,
        });
        self.write(&format!("{stem}.json"), &format!("{all:#}\n"))
    }

    /// Prints the records and writes `<stem>.json`, `<stem>.csv` and a plot.
    fn finish(&self, stem: &str, records: &[Record], peer: &Value, (tables, plot): (&str, (&str, &str))) -> Result<()> {
        self.keep(stem, records, peer, true)?;
        self.write(&format!("{stem}.csv"), &csv(records))?;
        self.write(plot.0, plot.1)?;
        let text = if self.common.json {
            format!("{:#}\n", json!(records))
        } else {
            format!("{tables}\n{}", self.limits.text(peer))
        };
        print(&mut std::io::stdout().lock(), &text)
    }

    /// Writes a file as a whole, where a folder is given.
    fn write(&self, name: &str, text: &str) -> crate::Result<()> {
        let Some(folder) = &self.common.out else { return Ok(()) };
        fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        write_atomic(&folder.join(name), |out| out.write_all(text.as_bytes()))
    }
}

fn kernels(args: &KernelArgs, common: &Common) -> Result<()> {
    let asked: Vec<LayerPass> = args.passes.iter().map(|pass| pass.trim().parse()).collect::<crate::Result<_>>()?;
    let mask = args.bench.mask.mask()?;
    // Before the device is opened, which takes a while: the network may not exist.
    let model = args.bench.net.model(0)?;
    let setting = Setting::new(&args.bench, common)?;
    let merged = fully_merged(&model, mask.as_ref(), &setting.config)?;
    let mut networks = vec!["original"];
    networks.extend(merged.is_some().then_some("merged"));
    let graphs: Vec<_> = [Some(&model), merged.as_ref()].into_iter().flatten().map(|m| &m.graph).collect();
    let passes = LayerPass::on(&setting.device, &asked);
    let mut layers = Layer::of_networks(&graphs, setting.batch(), &passes, setting.device.backend())?;
    if let Some(name) = &args.layer {
        layers.retain(|layer| layer.name.contains(name.as_str()));
        if layers.is_empty() {
            return Err(Error::Config(format!("no layer of {} has {name:?} in its name", args.bench.net.net)).into());
        }
    }
    let peer = setting.peer(args.peer_layers, LAYER_LEEWAY);
    let (records, peer) = setting.bench("kernels", peer, |bench| bench.layers(&layers, &networks))?;
    let tables = format!(
        "{}\n\n{}\n{}",
        setting.title("convolution layers"),
        layer_table(&records, &networks).text(),
        layer_totals(&records, &networks).text()
    );
    let svg = plot(&setting, &records).svg();
    setting.finish("kernels", &records, &peer, (&tables, ("roofline.svg", &svg)))
}

fn plot(setting: &Setting<'_>, records: &[Record]) -> RooflinePlot {
    let point = |record: &Record| {
        let number = |key: &str| record.get(key)?.as_f64();
        let word = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
        let seconds = number("time_us")? * 1e-6;
        Some(Point {
            name: format!("{} {}: {}, {seconds:.2e} s", word("name"), word("pass"), word("shape")),
            family: word("family"),
            intensity: number("flops_per_byte")?,
            rate: number("flops")? / seconds,
        })
    };
    let roofline = &setting.limits.roofline;
    let peaks = match roofline.matrix_flops == roofline.vector_flops {
        true => vec![("peak", roofline.matrix_flops)],
        false => vec![("matrix units", roofline.matrix_flops), ("vector units", roofline.vector_flops)],
    };
    RooflinePlot {
        title: setting.title("convolution layers"),
        bandwidth: roofline.bandwidth,
        peaks,
        points: records.iter().filter_map(point).collect(),
    }
}

fn network(args: &BenchArgs, common: &Common) -> Result<()> {
    let mask = args.mask.mask()?;
    let model = args.net.model(0)?;
    let setting = Setting::new(args, common)?;
    let merged = fully_merged(&model, mask.as_ref(), &setting.config)?;
    let (networks, batch) = ((&model, merged.as_ref()), setting.batch());
    let peer = setting.peer(0, NETWORK_LEEWAY);
    let (records, peer) = setting.bench("network", peer, |bench| bench.networks(networks, batch))?;
    let tables = format!("{}\n\n{}", setting.title("passes"), network_bench_table(&records).text());
    let svg = network_bars(&setting.title("images per second"), &records);
    setting.finish("network", &records, &peer, (&tables, ("network.svg", &svg)))
}
