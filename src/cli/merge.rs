//! `merge`: graph surgery and the exact merge of a trained model.

use std::io::stdout;
use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::settings::{MaskArgs, refuse_same};
use super::{Common, print};
use crate::Error;
use crate::graph::BlockState;
use crate::io::{read_model, write_model};
use crate::pipeline::{Entry, verify_files};
use crate::shrink::merge::{MergeOptions, TOLERANCE, merge, verify_random};
use crate::shrink::padding::PaddingMode;
use crate::shrink::surgery::linearise;

/// Images of noise on which the merged network is checked.
const VERIFY_IMAGES: usize = 32;

/// Options of `merge`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The model; without --keep-list and --plan what is linear in it already is merged
    model: PathBuf,
    #[command(flatten)]
    mask: MaskArgs,
    /// How borders are made exact: reorder moves the padding to the front of a block, border-bias keeps the trained
    /// function and adds a bias per position. The configuration's if not given, which has border-bias of itself
    #[arg(long, value_name = "MODE")]
    padding: Option<PaddingMode>,
    /// No ReLU6 behind the freed blocks, whatever the configuration says
    #[arg(long)]
    no_final_activation: bool,
    /// Also check on these images: a safetensors file with `input`, NCHW, or a picture (JPEG, PNG); may be repeated
    #[arg(long, value_name = "FILE")]
    input: Vec<PathBuf>,
    /// The model file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// Merges, checks merged against unmerged, writes the model, and prints how exact it is.
///
/// # Errors
/// Blocks that cannot be merged exactly, a network too large to check, or an error above the tolerance; nothing is
/// written then.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let mut config = common.base_config(Entry::New, None)?;
    if let Some(padding) = args.padding {
        config.merge.padding = padding;
    }
    config.finetune.final_activation &= !args.no_final_activation;
    common.ready(&config)?;
    refuse_same(&args.model, &args.output)?;
    let (model, info) = read_model(&args.model)?;
    let unmerged = match args.mask.mask()? {
        Some(mask) => {
            mask.check(model.graph.blocks.len())?;
            linearise(&model, mask.kept(), &config.linearise())?
        }
        None if model.graph.blocks.iter().any(|b| b.state == BlockState::Linear) => model,
        None => {
            let problem =
                "nothing in this model is linear; say which blocks keep their activations with --keep-list or --plan";
            return Err(Error::Config(problem.into()).into());
        }
    };
    let (merged, segments) = merge(&unmerged, &MergeOptions { padding: config.merge.padding })?;
    let mut error = verify_random(&unmerged, &merged, VERIFY_IMAGES, config.seed)?;
    if let Some(given) = verify_files(&unmerged, &merged, &args.input, info.data.as_ref())? {
        error = error.worse(given);
    }
    error.check(&merged.graph)?;
    write_model(&args.output, &merged, &info)?;
    let worst = error.worst_block.map(|worst| (&*merged.graph.blocks[worst.block].name, worst));
    let text = if common.json {
        let value = json!({
            "segments": segments.len(), "max_abs_error": error.max_abs_error, "max_rel_error": error.max_rel_error,
            "worst_block": worst.map(|(name, worst)| json!({
                "name": name, "max_abs_error": worst.max_abs_error, "max_rel_error": worst.max_rel_error,
            })),
            "blocks": segments,
        });
        format!("{value:#}\n")
    } else {
        let mut text = String::new();
        for s in &segments {
            let bias = if s.bias_map { ", bias map" } else { "" };
            text.push_str(&format!(
                "  {:<14} {}x{} stride {}{bias}, {} → {} MACs, {} → {} parameters\n",
                s.name,
                s.kernel[0],
                s.kernel[1],
                s.stride[0],
                s.macs_before,
                s.macs_after,
                s.params_before,
                s.params_after
            ));
        }
        let block = worst.map_or_else(String::new, |(name, worst)| {
            format!(", {:.1e} of the output's behind {name}, the worst block", worst.max_rel_error)
        });
        format!(
            "{text}{}: {} blocks merged, error {:.1e} of the logits' scale{block} (limit {TOLERANCE:.0e})\n",
            args.output.display(),
            segments.len(),
            error.max_rel_error
        )
    };
    print(&mut stdout().lock(), &text)
}
