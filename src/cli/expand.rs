//! `expand`: DepthShrinker+, dense convolutions trained as inverted residuals and folded back.

use std::path::PathBuf;

use anyhow::Result;

use super::settings::{DataArgs, RunArgs, StageArgs, set_some};
use super::{Common, print};
use crate::pipeline::expand_in;
use crate::report::json_text;
use crate::terminal;

const NAME: &str = "expand";

/// Options of `expand`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The model, of which dense convolutions are expanded [default: that of the settings]
    model: Option<PathBuf>,
    /// Convolutions by name, with commas [default: all dense ones larger than 1×1 that do not read the image]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    convs: Option<Vec<String>>,
    /// Hidden channels for each channel that comes in [default: 6]; with as many as a kernel has taps the start is exact
    #[arg(long, value_name = "N")]
    ratio: Option<usize>,
    /// The teacher [default: MODEL itself]
    #[arg(long, value_name = "FILE")]
    teacher: Option<PathBuf>,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    stage: StageArgs,
    #[command(flatten)]
    data: DataArgs,
}

/// Expands, trains, removes the activations, trains again, folds back, and prints the accuracies. Both stages are trained by the
/// settings of `finetune.train`.
///
/// # Errors
/// Wrong settings, or whatever stops the job.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let folder = common.folder(NAME);
    let entry = args.run.entry();
    let mut config = common.base_config(entry, Some(&folder))?;
    args.data.apply(&mut config, entry);
    args.stage.apply(&mut config.finetune.train);
    set_some(&mut config.model, &args.model);
    set_some(&mut config.finetune.teacher, &args.teacher);
    config.expand.convs = args.convs.clone().unwrap_or(config.expand.convs);
    config.expand.ratio = args.ratio.unwrap_or(config.expand.ratio);
    common.ready(&config)?;
    let result = expand_in(&folder, &config, entry, common.stance())?;
    let path = folder.path("merged.safetensors");
    let text = match common.json {
        true => json_text(&result),
        false => {
            let mut text = String::new();
            for conv in &result.convs {
                let name = terminal::one_line(&conv.name);
                text.push_str(&format!("{name}: {} hidden channels, started within {:.1e}\n", conv.hidden, conv.error));
            }
            let top1 = result.top1;
            text.push_str(&format!(
                "top-1: original {:.2} %, expanded {:.2} %, folded back {:.2} %\n{}\n",
                top1.original,
                top1.expanded,
                top1.merged,
                terminal::path(&path)
            ));
            text
        }
    };
    print(&format!("the accuracies of {}", path.display()), &text)
}
