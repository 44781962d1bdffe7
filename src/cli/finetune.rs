//! `finetune`: a network without the activations of its freed blocks.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::json;

use super::settings::{DataArgs, MaskArgs, RunArgs, StageArgs, model_file, outputs, set_some};
use super::{Common, print};
use crate::io::{read_model, write_model};
use crate::model::Model;
use crate::pipeline::{Datasets, Doubts, Finetuning, Run, RunSpec, Space, check_batches};
use crate::shrink::padding::PaddingMode;
use crate::{Error, terminal};

const NAME: &str = "finetune";
const FILE: &str = "shrunk.safetensors";

/// Options of `finetune`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The model to start from [default: that of the settings]
    model: Option<PathBuf>,
    /// The teacher [default: MODEL itself]
    #[arg(long, value_name = "FILE")]
    teacher: Option<PathBuf>,
    /// A model file to write in addition to shrunk.safetensors in the run's folder
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// How merged borders stay exact: reorder or border-bias
    #[arg(long, value_name = "MODE")]
    padding: Option<PaddingMode>,
    /// Do not add a ReLU6 after the freed blocks
    #[arg(long)]
    no_final_activation: bool,
    #[command(flatten)]
    mask: MaskArgs,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    stage: StageArgs,
    #[command(flatten)]
    data: DataArgs,
}

/// Finetunes, writes the model (not merged yet), and prints its accuracy.
///
/// # Errors
/// Wrong settings, or whatever stops the training.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let folder = common.folder(NAME);
    let entry = args.run.entry();
    let mut config = common.base_config(entry, Some(&folder))?;
    args.data.apply(&mut config, entry);
    args.stage.apply(&mut config.finetune.train);
    set_some(&mut config.model, &args.model);
    if let Some(selection) = args.mask.selection()? {
        config.merge.padding = selection.padding.unwrap_or(config.merge.padding);
        config.finetune.select(selection);
    }
    set_some(&mut config.finetune.teacher, &args.teacher);
    config.merge.padding = args.padding.unwrap_or(config.merge.padding);
    config.finetune.final_activation &= !args.no_final_activation;
    common.ready(&config)?;
    let mask = config.finetune.kept.as_ref().ok_or_else(|| {
        Error::Config("finetune needs to know which blocks keep their activations; give --keep-list or --plan".into())
    })?;
    let file = model_file(&config, NAME)?;
    let models: Vec<&Path> = [file].into_iter().chain(config.finetune.teacher.as_deref()).collect();
    let (model, info) = read_model(file)?;
    mask.check(&model.graph)?;
    let (teacher, taught) = match &config.finetune.teacher {
        Some(path) => {
            let (teacher, info) = read_model(path)?;
            (teacher, info.data.map(|data| data.classes))
        }
        None => (model.clone(), None),
    };
    let data = Datasets::open(&config, Some((&model, &info)))?;
    check_batches([&config.finetune.train], &data)?;
    let taught = taught.map_or_else(Doubts::default, |names| Doubts::of_teacher(data.train.class_names(), &names));
    data.doubts([(NAME, &config.finetune.train)], &model.graph)?.and(taught).settle(common.strict)?;
    let paths = outputs(args.output.as_ref(), &folder, FILE, &models)?;
    let spec = RunSpec {
        command: NAME,
        config: &config,
        models: &models,
        data: &data,
        last: FILE,
        bytes: Space { models: 1, stages: &[&config.finetune.train] }.bytes(&model.graph)?,
    };
    let session = common.enter(&folder, &spec, entry)?;
    let mut run = Run::new(&config, &data, session)?;
    let selection = config.finetune.selection(mask);
    let mut keep = |model: &Model| paths.iter().try_for_each(|path| write_model(path, model, &data.info()));
    let finetuning = Finetuning { name: NAME, seed: 0, start: &model, original: &teacher, selection: &selection };
    let shrunk = run.finetune(finetuning, Some(&mut keep))?;
    let evaluation = run.evaluate(&shrunk)?;
    let path = &paths[0];
    let text = if common.json {
        let value = json!({
            "model": path, "kept": mask.bits(), "top1": evaluation.top1, "loss": evaluation.loss,
            "images": evaluation.images,
        });
        format!("{value:#}\n")
    } else {
        format!("{}: top-1 {:.2} % on {} test images\n", terminal::path(path), evaluation.top1, evaluation.images)
    };
    print(&format!("the accuracy of {}", path.display()), &text)
}
