//! `search`: which blocks of a trained network keep their activations.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::settings::{BudgetArgs, DataArgs, MethodArgs, RunArgs, StageArgs, model_file, outputs, set_some};
use super::{Common, print};
use crate::io::{read_model, write_model};
use crate::pipeline::{Datasets, Run, RunSpec, Space, check_batches, check_search, choose_blocks};
use crate::terminal;

const NAME: &str = "search";
const FILE: &str = "plan.json";

/// Options of `search`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The trained model [default: that of the settings]
    model: Option<PathBuf>,
    /// A plan file to write in addition to plan.json in the run's folder. Weights that a method trains along with its scores
    /// go to searched.safetensors in that folder
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    budget: BudgetArgs,
    #[command(flatten)]
    method: MethodArgs,
    #[command(flatten)]
    stage: StageArgs,
    #[command(flatten)]
    data: DataArgs,
}

/// Searches, writes the plan, and prints it.
///
/// # Errors
/// Wrong settings, or whatever stops the search.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let folder = common.folder(NAME);
    let entry = args.run.entry();
    let mut config = common.base_config(entry, Some(&folder))?;
    args.data.apply(&mut config, entry);
    args.budget.apply(&mut config);
    args.method.apply(&mut config);
    args.stage.apply(&mut config.search.train);
    set_some(&mut config.model, &args.model);
    config.search.method = Some(config.method());
    common.ready(&config)?;
    let file = model_file(&config, NAME)?;
    let (model, info) = read_model(file)?;
    let data = Datasets::open(&config, Some((&model, &info)))?;
    check_batches(config.search_stage().map(|(_, stage)| stage), &data)?;
    check_search(&config, &model.graph)?;
    data.doubts(config.search_stage(), &model.graph)?.settle(common.strict)?;
    let spec = RunSpec {
        command: NAME,
        config: &config,
        models: &[file],
        data: &data,
        last: FILE,
        bytes: Space { models: 1, stages: &[&config.search.train] }.bytes(&model.graph)?,
    };
    let paths = outputs(args.output.as_ref(), &folder, FILE, &[file])?;
    let session = common.enter(&folder, &spec, entry)?;
    let mut run = Run::new(&config, &data, session)?;
    let (plan, _) = choose_blocks(&mut run, &model, &folder, &mut |plan, searched| {
        if let Some(searched) = searched {
            write_model(&folder.path("searched.safetensors"), searched, &data.info())?;
        }
        paths.iter().try_for_each(|path| plan.write(path))
    })?;
    let text = if common.json {
        format!("{:#}\n", json!(plan))
    } else {
        let mut text = format!("{}\nby {}\nkeep {}\n", terminal::path(&paths[0]), config.method(), plan.keep);
        if !plan.bypassed.is_empty() {
            text.push_str(&format!("bypass {}\n", plan.bypassed.join(",")));
        }
        if let Some(layers) = &plan.layers {
            let [freed, activated, pruned] = [&layers.freed, &layers.activated, &layers.pruned].map(Vec::len);
            text.push_str(&format!(
                "{freed} activations go, {activated} come, {pruned} convolutions are pruned, {} segments merge\n",
                plan.segments.len()
            ));
        }
        for (block, score) in model.graph.blocks.iter().zip(&plan.scores) {
            text.push_str(&format!("  {:<14} {score:.3}\n", block.name));
        }
        text
    };
    print(&format!("the plan of {}", paths[0].display()), &text)
}
