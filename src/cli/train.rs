//! `train`: the original network alone.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::settings::{DataArgs, NetworkArgs, RunArgs, StageArgs, outputs, sizes};
use super::{Common, print};
use crate::io::write_model;
use crate::model::Model;
use crate::pipeline::{Datasets, Run, RunSpec, Space, check_batches, configured_graph};
use crate::terminal;

const NAME: &str = "train";
const FILE: &str = "original.safetensors";

/// Options of `train`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// A model file to write in addition to original.safetensors in the run's folder
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    stage: StageArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    network: NetworkArgs,
}

/// Trains, writes the model, and prints its accuracy.
///
/// # Errors
/// Wrong settings, or whatever stops the training.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let folder = common.folder(NAME);
    let entry = args.run.entry();
    let mut config = common.base_config(entry, Some(&folder))?;
    args.data.apply(&mut config, entry);
    args.network.apply(&mut config);
    args.stage.apply(&mut config.train);
    common.ready(&config)?;
    let data = Datasets::open(&config, None)?;
    check_batches([&config.train], &data)?;
    let graph = configured_graph(&config, &data)?;
    data.doubts([(NAME, &config.train)], &graph)?.settle(common.strict)?;
    let spec = RunSpec {
        command: NAME,
        config: &config,
        models: &[],
        data: &data,
        last: FILE,
        bytes: Space { models: 1, stages: &[&config.train] }.bytes(&graph)?,
    };
    let paths = outputs(args.output.as_ref(), &folder, FILE, &[])?;
    let session = common.enter(&folder, &spec, entry)?;
    let mut run = Run::new(&config, &data, session)?;
    let mut keep = |model: &Model| paths.iter().try_for_each(|path| write_model(path, model, &data.info()));
    let model = run.train_original(&mut keep)?;
    let evaluation = run.evaluate(&model)?;
    let path = &paths[0];
    let (params, macs) = sizes(&model)?;
    let text = if common.json {
        let value = json!({
            "model": path, "top1": evaluation.top1, "loss": evaluation.loss, "images": evaluation.images,
            "params": params, "macs": macs,
        });
        format!("{value:#}\n")
    } else {
        format!("{}: top-1 {:.2} % on {} test images\n", terminal::path(path), evaluation.top1, evaluation.images)
    };
    print(&format!("the accuracy of {}", path.display()), &text)
}
