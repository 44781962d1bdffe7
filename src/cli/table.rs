//! `table`: measures the latency table of a network on a device.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::network::NetArgs;
use super::settings::parse_seconds;
use super::{Common, print};
use crate::device::Device;
use crate::io::{check_writable, write_atomic};
use crate::measure::{MeasuredTable, median};
use crate::pipeline::{Entry, TableSettings, check_table, measure_table};
use crate::report::{SelectionTime, json_text, selection_times};
use crate::shrink::padding::PaddingMode;
use crate::terminal;
use crate::train::Reporter;

/// Options of `table`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    net: NetArgs,
    /// The table to write, CSV: st,end,time,stdev in ms, a row for each segment that can become one convolution; (0, 0]
    /// and (N, N] are what always runs before the blocks and behind them
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Images per pass
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    batch: u32,
    /// Seconds for everything together; each piece of work is timed six times at least, so slow ones take longer
    #[arg(long, default_value_t = 60.0, value_parser = parse_seconds)]
    seconds: f64,
    /// A row for each kernel that pruning convolutions leaves of a segment (columns kernel,depthwise), for layer-merge
    #[arg(long)]
    pruned: bool,
    /// How merged borders stay exact: with border-bias, merged convolutions have a bias per position [default: that of
    /// the settings]
    #[arg(long, value_name = "MODE")]
    padding: Option<PaddingMode>,
    /// Also merge N random selections of blocks, time the merged networks, and print how far the table is from them
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true, conflicts_with = "pruned")]
    check: usize,
}

/// Measures, writes the table, and prints what it says of the whole network.
///
/// # Errors
/// An unknown network or one without blocks, a device that is not there or fails, or a file that cannot be written.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    check_writable(&args.output)?;
    let model = args.net.model(common.seed.unwrap_or(0))?;
    let mut config = common.base_config(Entry::New, None)?;
    config.merge.padding = args.padding.unwrap_or(config.merge.padding);
    common.ready(&config)?;
    let device = config.device()?;
    if let Device::Gpu(gpu, _) = &device
        && gpu.driver().is_emulated()
    {
        tracing::warn!("times of the emulator say nothing about any GPU");
    }
    let settings = TableSettings {
        batch: args.batch as usize,
        budget: Duration::from_secs_f64(args.seconds),
        keys: args.pruned,
        padding: config.merge.padding,
    };
    let mut reporter = if common.quiet { Reporter::quiet() } else { Reporter::new() };
    let measured = measure_table(&args.output, &model, &device, (&settings, &config), &mut reporter)?;
    let csv = measured.table.to_csv();
    write_atomic(&args.output, |out| out.write_all(csv.as_bytes()))?;
    let checked = match args.check {
        0 => Vec::new(),
        count => check_table(&measured.table, &model, &device, &config, (count, &settings))?,
    };
    let text = if common.json {
        json_text(&value(args, &device, &measured, &checked))
    } else {
        summary(args, &device, &measured, &checked)
    };
    print(&format!("what {} holds", args.output.display()), &text)
}

fn value(args: &Args, device: &Device, measured: &MeasuredTable, checked: &[SelectionTime]) -> serde_json::Value {
    let mut value = json!({
        "table": args.output,
        "network": args.net.net,
        "device": device.name(),
        "precision": device.precision().to_string(),
        "batch": args.batch,
        "segments": measured.table.rows().count(),
        "fixed_ms": measured.table.fixed_ms(),
        "sum_ms": measured.sum_ms,
        "network_ms": measured.network.median,
        "network_stdev_ms": measured.network.stdev,
        "relative_error": measured.relative_error(),
    });
    if !checked.is_empty() {
        value["selections"] = json!(checked);
        value["median_absolute_relative_error"] = json!(median_error(checked));
    }
    value
}

fn median_error(checked: &[SelectionTime]) -> f64 {
    median(&checked.iter().map(|time| time.relative_error().abs()).collect::<Vec<_>>())
}

fn summary(args: &Args, device: &Device, measured: &MeasuredTable, checked: &[SelectionTime]) -> String {
    let (table, network) = (&measured.table, &measured.network);
    let mut text = format!(
        "{}: {} segments of {}, batch {}, on {} in {}\n",
        terminal::path(&args.output),
        table.rows().count(),
        args.net.net,
        args.batch,
        device.name(),
        device.precision()
    );
    text.push_str(&format!(
        "the whole network takes {:.3} ms (standard deviation {:.3}), its steps one by one add up to {:.3} ms: {:+.1} %\n",
        network.median,
        network.stdev,
        measured.sum_ms,
        100.0 * measured.relative_error()
    ));
    if !checked.is_empty() {
        let (times, error) = (selection_times(checked).text(), 100.0 * median_error(checked));
        text.push_str(&format!("\n{times}the table is {error:.1} % from the merged networks (median)\n"));
    }
    text
}
