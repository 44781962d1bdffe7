//! `plan`: the steps, launches, bytes and FLOPs a network would run, and its roofline time on named devices.

use anyhow::Result;
use serde_json::json;

use super::Common;
use super::devices::print;
use super::network::NetArgs;
use crate::dtype::Dtype;
use crate::engine::{Fusion, Plan};
use crate::graph::Graph;
use crate::measure::{KernelCost, NAMED_DEVICES, Pass, plan_costs, without_batch_norm};
use crate::report::{Align, Table};

/// Options of `plan`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    net: NetArgs,
    /// Images per pass
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub batch: u32,
    /// Plan a training step instead of inference
    #[arg(long)]
    pub training: bool,
    /// One step per node instead of fused steps
    #[arg(long)]
    pub reference: bool,
}

/// Prints the plan.
///
/// # Errors
/// An unknown network, an unreadable model, options that do not fit it, or standard output that cannot be written.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let graph = args.net.graph()?;
    // Inference runs with batch-norm folded, as every engine does.
    let graph = if args.training || args.reference { graph } else { without_batch_norm(&graph)? };
    let fusion = if args.reference { Fusion::Reference } else { Fusion::Fused };
    let plan = Plan::new(&graph, fusion, args.training, false, &[])?;
    let costs = plan_costs(&graph, &plan)?;
    // Bytes of an element in the table; the named devices count with their own.
    let precision = common.precision.as_deref().map_or(Ok(Dtype::F32), str::parse::<Dtype>)?;
    let element_bytes = precision.bytes() as u64;
    let text = match common.json {
        true => as_json(&graph, args, element_bytes, &costs),
        false => as_text(&graph, args, element_bytes, &costs),
    };
    print(&mut std::io::stdout().lock(), &text)
}

/// Bytes and FLOP of all steps, and milliseconds on every named device.
fn totals(costs: &[KernelCost], batch: usize, element_bytes: u64) -> (u64, u64, Vec<(&'static str, f64)>) {
    let bytes = costs.iter().map(|k| k.bytes(batch, element_bytes)).sum();
    let flops = costs.iter().map(|k| k.flops * batch as u64).sum();
    let time = |device: &crate::measure::Roofline| costs.iter().map(|k| device.time(k, batch)).sum::<f64>() * 1e3;
    (bytes, flops, NAMED_DEVICES.iter().map(|(name, device)| (*name, time(device))).collect())
}

fn as_json(graph: &Graph, args: &Args, element_bytes: u64, costs: &[KernelCost]) -> String {
    let batch = args.batch as usize;
    let (bytes, flops, times) = totals(costs, batch, element_bytes);
    let step = |k: &KernelCost| {
        json!({
            "name": k.name, "kind": k.kind, "pass": k.pass, "nodes": k.nodes.len(),
            "block": k.block.map(|b| graph.blocks[b].name.as_str()),
            "bytes": k.bytes(batch, element_bytes), "flops": k.flops * batch as u64,
        })
    };
    let roofline: serde_json::Map<String, serde_json::Value> =
        times.into_iter().map(|(name, ms)| (name.to_owned(), json!(ms))).collect();
    let value = json!({
        "network": graph.name, "batch": batch, "training": args.training, "element_bytes": element_bytes,
        "steps": costs.iter().map(step).collect::<Vec<_>>(), "launches": costs.len(),
        "bytes": bytes, "flops": flops, "roofline_ms": roofline,
    });
    format!("{value:#}\n")
}

fn as_text(graph: &Graph, args: &Args, element_bytes: u64, costs: &[KernelCost]) -> String {
    let batch = args.batch as usize;
    let mut steps = Table::new(&[
        ("step", Align::Left),
        ("computes", Align::Left),
        ("pass", Align::Left),
        ("MB", Align::Right),
        ("GFLOP", Align::Right),
        ("FLOP/byte", Align::Right),
    ]);
    for k in costs {
        let (bytes, flops) = (k.bytes(batch, element_bytes) as f64, k.flops as f64 * batch as f64);
        let pass = if k.pass == Pass::Forward { "forward" } else { "backward" };
        steps.row(&[
            k.name.clone(),
            k.kind.clone(),
            pass.to_owned(),
            format!("{:.2}", bytes / 1e6),
            format!("{:.3}", flops / 1e9),
            format!("{:.1}", flops / bytes.max(1.0)),
        ]);
    }
    let (bytes, flops, times) = totals(costs, batch, element_bytes);
    let mut devices =
        Table::new(&[("device (nominal)", Align::Left), ("ms", Align::Right), ("images/s", Align::Right)]);
    for (name, ms) in times {
        devices.row(&[name.to_owned(), format!("{ms:.3}"), format!("{:.0}", batch as f64 / ms * 1e3)]);
    }
    format!(
        "{}\n{}, batch {batch}: {} launches, {:.1} MB at {element_bytes} bytes an element, {:.2} GFLOP\n\nroofline time:\n{}",
        steps.text(),
        graph.name,
        costs.len(),
        bytes as f64 / 1e6,
        flops as f64 / 1e9,
        devices.text()
    )
}
