//! `export`: a model for other programs.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::settings::{refuse_same, sizes};
use super::{Common, print};
use crate::dtype::Dtype;
use crate::io::onnx::{LARGEST_F16, OnnxPrecision, Overflow, write_onnx};
use crate::io::{ModelInfo, check_writable, read_model, write_model};
use crate::model::Model;
use crate::pipeline::{Entry, half_overflows};
use crate::{Error, terminal};

/// The word that stands for all nodes that pass the range of f16.
const AUTO: &str = "auto";
/// Warnings of single nodes at most.
const MAX_WARNINGS: usize = 5;

/// Options of `export`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The model
    model: PathBuf,
    /// The file to write: .onnx, where --precision f16 makes weights and arithmetic half-precision, or .safetensors,
    /// weights and biases as [c_out, c_in, k_h, k_w] and [c_out]
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// With --precision f16, nodes that stay in f32, between casts: their names, or auto, those of which a weight or a
    /// value passes the range of f16
    #[arg(long, value_name = "NODES", value_delimiter = ',')]
    keep_f32: Vec<String>,
    /// With --precision f16, the images whose values are looked at for that [default: noise]: a safetensors file with
    /// `input`, NCHW, or a picture (JPEG, PNG); may be repeated
    #[arg(long, value_name = "FILE")]
    input: Vec<PathBuf>,
}

/// Writes the model, its batch-norms folded.
///
/// # Errors
/// A model that cannot be read, an unknown ending, or weights that the precision cannot hold.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let mut config = common.base_config(Entry::New, None)?;
    // The precision is that of the file, not of a device: nothing is computed on one.
    let precision = std::mem::replace(&mut config.precision, Dtype::F32);
    common.ready(&config)?;
    refuse_same(&args.model, &args.output)?;
    check_writable(&args.output)?;
    if precision != Dtype::F16 && !(args.keep_f32.is_empty() && args.input.is_empty()) {
        return Err(Error::Config("--keep-f32 and --input are for files in f16; add --precision f16".into()).into());
    }
    let (model, info) = read_model(&args.model)?;
    let (mut overflows, mut precision) = (Vec::new(), OnnxPrecision::from(precision));
    match args.output.extension().and_then(|e| e.to_str()) {
        Some("onnx") => {
            if precision.dtype == Dtype::F16 {
                overflows = look(args, &model, &info, config.seed)?;
                precision.in_f32 = kept(&args.keep_f32, &overflows);
                warn(args, &overflows, &precision.in_f32);
            }
            write_onnx(&args.output, &model, &info, &precision)?;
        }
        Some("safetensors") if precision.dtype == Dtype::F32 => {
            let folded = model.folded()?;
            folded.check_finite()?;
            write_model(&args.output, &folded, &info)?;
        }
        Some("safetensors") => {
            return Err(Error::Config("a .safetensors file is written in f32; leave out --precision".into()).into());
        }
        _ => {
            let output = args.output.display();
            return Err(Error::Config(format!("{output} says no format; name it .onnx or .safetensors")).into());
        }
    }
    let bytes = std::fs::metadata(&args.output).map_err(|e| Error::io(&args.output, e))?.len();
    let (params, macs) = sizes(&model)?;
    let OnnxPrecision { dtype, in_f32 } = precision;
    let text = if common.json {
        let value = json!({
            "output": args.output, "precision": dtype, "bytes": bytes, "params": params, "macs": macs,
            "overflows": overflows, "in_f32": in_f32,
        });
        format!("{value:#}\n")
    } else {
        let kept = if in_f32.is_empty() { String::new() } else { format!(", in f32: {}", list(&in_f32)) };
        format!("{}: {:.1} MB{kept}\n", terminal::path(&args.output), bytes as f64 / 1e6)
    };
    print(&format!("the size of {}", args.output.display()), &text)
}

/// What passes the range of f16. A network too large to be looked at is exported all the same, where nobody asked to look.
fn look(args: &Args, model: &Model, info: &ModelInfo, seed: u64) -> Result<Vec<Overflow>> {
    let is_asked = !args.input.is_empty() || args.keep_f32.iter().any(|node| node == AUTO);
    match half_overflows(model, &args.input, info.data.as_ref(), seed) {
        Err(error) if !is_asked => {
            tracing::warn!("whether values pass the range of f16 is not known: {error}");
            Ok(Vec::new())
        }
        other => Ok(other?),
    }
}

/// The nodes that stay in f32.
fn kept(asked: &[String], overflows: &[Overflow]) -> BTreeSet<String> {
    let mut nodes: BTreeSet<String> = asked.iter().cloned().collect();
    if nodes.remove(AUTO) {
        nodes.extend(overflows.iter().map(|overflow| overflow.node.clone()));
    }
    nodes
}

/// Says what will be infinite, and how to avoid that.
fn warn(args: &Args, overflows: &[Overflow], kept: &BTreeSet<String>) {
    let left: Vec<&Overflow> = overflows.iter().filter(|overflow| !kept.contains(&overflow.node)).collect();
    if left.is_empty() {
        return;
    }
    let images = if args.input.is_empty() { "noise" } else { "the given images" };
    for overflow in left.iter().take(MAX_WARNINGS) {
        let on = if overflow.param.is_none() { format!(" on {images}") } else { String::new() };
        tracing::warn!("{overflow}{on}, beyond the largest f16, {LARGEST_F16}");
    }
    let rest = left.len().saturating_sub(MAX_WARNINGS);
    let more = if rest > 0 { format!(" ({rest} more)") } else { String::new() };
    let nodes: BTreeSet<String> = left.iter().map(|overflow| &overflow.node).chain(kept).cloned().collect();
    let some = if nodes.len() > MAX_WARNINGS { String::new() } else { format!(", or --keep-f32 {}", list(&nodes)) };
    tracing::warn!("such values are infinite in the file{more}; keep them in f32 with --keep-f32 {AUTO}{some}");
}

fn list(nodes: &BTreeSet<String>) -> String {
    nodes.iter().map(String::as_str).collect::<Vec<_>>().join(",")
}
