//! `merge`: graph surgery and the exact merge of a trained model.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::settings::{MaskArgs, refuse_same};
use super::{Common, print};
use crate::io::{check_writable, read_model, write_model};
use crate::model::Model;
use crate::pipeline::{Entry, verify_files};
use crate::shrink::merge::{MergeError, MergeOptions, Merged, merge, merge_selection, verify_random};
use crate::shrink::padding::PaddingMode;
use crate::shrink::surgery::linearise;
use crate::{Error, terminal};

/// Number of noise images on which the merged network is checked.
const VERIFY_IMAGES: usize = 32;

/// Options of `merge`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The model; without --keep-list or --plan, the parts that are already linear are merged
    model: PathBuf,
    #[command(flatten)]
    mask: MaskArgs,
    /// How merged borders stay exact: reorder moves the padding to the front of a block, border-bias keeps the trained
    /// function and adds a bias per position. If not given, the configuration decides; its default is border-bias
    #[arg(long, value_name = "MODE")]
    padding: Option<PaddingMode>,
    /// Do not add a ReLU6 after the freed blocks, even if the configuration asks for it
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
/// Blocks that cannot be merged exactly, a network too large to check, or a merged convolution that is not its segment;
/// nothing is written then.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let mut config = common.base_config(Entry::New, None)?;
    let given = args.mask.selection()?;
    let padding = args.padding.or(given.as_ref().and_then(|selection| selection.padding));
    config.merge.padding = padding.unwrap_or(config.merge.padding);
    config.finetune.final_activation &= !args.no_final_activation;
    common.ready(&config)?;
    refuse_same(&args.model, &args.output)?;
    check_writable(&args.output)?;
    let (model, info) = read_model(&args.model)?;
    let options = MergeOptions { padding: config.merge.padding };
    let (unmerged, merged) = match given {
        Some(selection) => {
            selection.keep.check(&model.graph)?;
            let unmerged = linearise(&model, &selection, &config.linearise())?;
            let merged = merge_selection(&unmerged, &selection, &options)?;
            (unmerged, merged)
        }
        None => {
            let merged = merge_linear(&model, &options)?;
            (model, merged)
        }
    };
    let mut error = verify_random(&unmerged, &merged, VERIFY_IMAGES, config.seed)?;
    if let Some(given) = verify_files(&unmerged, &merged, &args.input, info.data.as_ref())? {
        error = error.worse(given);
    }
    error.check(&merged)?;
    write_model(&args.output, &merged.model, &info)?;
    let text = if common.json { json_text(&merged, &error) } else { plain_text(args, &merged, &error) };
    print(&format!("how exact {} is", args.output.display()), &text)
}

/// Merges what is linear already, and refuses a model without any such block.
fn merge_linear(model: &Model, options: &MergeOptions) -> Result<Merged> {
    let merged = merge(model, options)?;
    if merged.segments.is_empty() {
        let problem =
            "nothing in this model is linear; say which blocks keep their activations with --keep-list or --plan";
        return Err(Error::Config(problem.into()).into());
    }
    Ok(merged)
}

fn json_text(merged: &Merged, error: &MergeError) -> String {
    let value = json!({
        "segments": merged.segments.len(), "max_abs_error": error.max_abs_error, "max_rel_error": error.max_rel_error,
        "worst_block": error.worst_segment.map(|worst| json!({
            "name": merged.segments[worst.segment].name, "max_abs_error": worst.max_abs_error,
            "max_rel_error": worst.max_rel_error, "of_bound": worst.of_bound,
        })),
        "blocks": merged.segments,
    });
    format!("{value:#}\n")
}

fn plain_text(args: &Args, merged: &Merged, error: &MergeError) -> String {
    let mut text = String::new();
    for s in &merged.segments {
        let bias = if s.bias_map { ", bias map" } else { "" };
        text.push_str(&format!(
            "  {:<14} {}x{} stride {}{bias}, {} → {} MACs, {} → {} parameters\n",
            s.name, s.kernel[0], s.kernel[1], s.stride[0], s.macs_before, s.macs_after, s.params_before, s.params_after
        ));
    }
    let worst = error.worst_segment.map_or_else(String::new, |worst| {
        let name = &merged.segments[worst.segment].name;
        format!("; {name}, the worst, is at {:.2} of what rounding its weights allows", worst.of_bound)
    });
    format!(
        "{text}{}: {} segments merged, error {:.1e} of the logits' scale{worst}\n",
        terminal::path(&args.output),
        merged.segments.len(),
        error.max_rel_error
    )
}
