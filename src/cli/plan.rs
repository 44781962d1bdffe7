//! `plan`: the steps, launches, bytes and FLOPs a network would run, and its roofline time on known devices.

use anyhow::Result;

use super::network::NetArgs;
use super::{Common, print};
use crate::dtype::Dtype;
use crate::engine::{Fusion, Plan, Target};
use crate::measure::{DRY_RUN_ARCH, NetworkCase, PlanRecord, PlanSize, launch_counts, plan_costs};
use crate::ops::config::KernelTarget;
use crate::report::{json_text, plan_text};

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
    let graph = if args.training || args.reference { graph } else { graph.without_batch_norm()?.0 };
    // The steps whose kernels are counted, a GPU's.
    let target = Target::gpu(KernelTarget { dtype: precision, arch: DRY_RUN_ARCH }, fusion, args.training);
    let costs = plan_costs(&graph, &Plan::new(&graph, &target)?);
    let (batch, training, element_bytes) = (args.batch as usize, args.training, precision.bytes() as u64);
    let planned = PlanRecord::new(&graph, &costs, launches, PlanSize { batch, training, element_bytes });
    let text = if common.json { json_text(&planned) } else { plan_text(&planned) };
    print("the plan", &text)
}
