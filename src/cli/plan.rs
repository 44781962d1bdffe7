//! `plan`: the steps, launches, bytes and FLOPs a network would run, and its roofline time on known devices.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::json;

use super::network::NetArgs;
use super::{Common, print};
use crate::device::Backend;
use crate::dtype::Dtype;
use crate::engine::{Fusion, Pass, Plan, Target};
use crate::graph::Graph;
use crate::measure::{DATA_SHEETS, KernelCost, NetworkCase, Roofline, launch_counts, plan_costs, without_batch_norm};
use crate::report::{Align, Table};

/// Options of `plan`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    net: NetArgs,
    /// Images per pass
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65535))]
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
    let model = args.net.model(common.seed.unwrap_or(0))?;
    let fusion = if args.reference { Fusion::PerNode } else { Fusion::OnLoad };
    // Bytes of an element in the table; the known devices count with their own.
    let precision = common.precision.as_deref().map_or(Ok(Dtype::F32), str::parse::<Dtype>)?;
    let case = NetworkCase { name: "plan", model, fusion, training: args.training };
    let launches = launch_counts(&case, args.batch as usize, precision)?;
    // Inference runs with batch-norm folded, as every engine does.
    let graph = case.model.graph;
    let graph = if args.training || args.reference { graph } else { without_batch_norm(&graph)? };
    // The steps whose kernels are counted, a GPU's.
    let target = Target { backend: Backend::Cuda, fusion, training: args.training, taps: Vec::new() };
    let costs = plan_costs(&graph, &Plan::new(&graph, &target)?);
    let planned =
        Planned { graph: &graph, args, element_bytes: precision.bytes() as u64, costs: &costs, launches: &launches };
    let text = if common.json { planned.json() } else { planned.text() };
    print(&mut std::io::stdout().lock(), &text)
}

/// A plan and what it costs.
struct Planned<'a> {
    graph: &'a Graph,
    args: &'a Args,
    element_bytes: u64,
    /// One entry per step.
    costs: &'a [KernelCost],
    /// How often a GPU launches each kernel.
    launches: &'a BTreeMap<String, u64>,
}

impl Planned<'_> {
    fn batch(&self) -> usize {
        self.args.batch as usize
    }

    fn bytes(&self) -> u64 {
        self.costs.iter().map(|k| k.bytes(self.batch(), self.element_bytes)).sum()
    }

    fn flops(&self) -> u64 {
        self.costs.iter().map(|k| k.flops * self.batch() as u64).sum()
    }

    fn launches(&self) -> u64 {
        self.launches.values().sum()
    }

    /// Milliseconds by the data sheet of every known device.
    fn roofline_ms(&self) -> impl Iterator<Item = (String, f64)> {
        let time = |device: Roofline| self.costs.iter().map(|k| device.time(k, self.batch())).sum::<f64>() * 1e3;
        let sheets = DATA_SHEETS.iter().flat_map(|sheet| [Dtype::F16, Dtype::F32].map(|precision| (sheet, precision)));
        sheets.map(move |(sheet, precision)| (format!("{} {precision}", sheet.name), time(sheet.roofline(precision))))
    }

    fn json(&self) -> String {
        let (graph, batch) = (self.graph, self.batch());
        let step = |k: &KernelCost| {
            json!({
                "name": k.name, "kind": k.kind, "pass": k.pass, "nodes": k.nodes.len(),
                "block": k.block.map(|b| graph.blocks[b].name.as_str()),
                "bytes": k.bytes(batch, self.element_bytes), "flops": k.flops * batch as u64,
            })
        };
        let roofline: serde_json::Map<String, serde_json::Value> =
            self.roofline_ms().map(|(name, ms)| (name, json!(ms))).collect();
        let value = json!({
            "network": graph.name, "batch": batch, "training": self.args.training, "element_bytes": self.element_bytes,
            "steps": self.costs.iter().map(step).collect::<Vec<_>>(), "launches": self.launches(),
            "kernels": self.launches, "bytes": self.bytes(), "flops": self.flops(), "roofline_ms": roofline,
        });
        format!("{value:#}\n")
    }

    fn text(&self) -> String {
        let batch = self.batch();
        let mut steps = Table::new(&[
            ("step", Align::Left),
            ("computes", Align::Left),
            ("pass", Align::Left),
            ("MB", Align::Right),
            ("GFLOP", Align::Right),
            ("FLOP/byte", Align::Right),
        ]);
        for k in self.costs {
            let (bytes, flops) = (k.bytes(batch, self.element_bytes) as f64, k.flops as f64 * batch as f64);
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
        let mut devices =
            Table::new(&[("device (nominal)", Align::Left), ("ms", Align::Right), ("images/s", Align::Right)]);
        for (name, ms) in self.roofline_ms() {
            devices.row(&[name, format!("{ms:.3}"), format!("{:.0}", batch as f64 / ms * 1e3)]);
        }
        format!(
            "{}\n{}, batch {batch}: {} steps, {:.1} MB at {} bytes an element, {:.2} GFLOP; {} kernel launches on a GPU\n\n\
             roofline time:\n{}",
            steps.text(),
            self.graph.name,
            self.costs.len(),
            self.bytes() as f64 / 1e6,
            self.element_bytes,
            self.flops() as f64 / 1e9,
            self.launches(),
            devices.text()
        )
    }
}
