//! `export`: a model for other programs.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::settings::{refuse_same, sizes};
use super::{Common, print};
use crate::dtype::Dtype;
use crate::io::onnx::write_onnx;
use crate::io::{check_writable, read_model, write_model};
use crate::pipeline::Entry;
use crate::{Error, terminal};

/// Options of `export`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The model
    model: PathBuf,
    /// The file to write: .onnx, where --precision f16 makes weights and arithmetic half-precision, or .safetensors,
    /// weights and biases as [c_out, c_in, k_h, k_w] and [c_out]
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
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
    let (model, info) = read_model(&args.model)?;
    match (args.output.extension().and_then(|e| e.to_str()), precision) {
        (Some("onnx"), precision) => write_onnx(&args.output, &model, &info, precision)?,
        (Some("safetensors"), Dtype::F32) => {
            let folded = model.folded()?;
            folded.check_finite()?;
            write_model(&args.output, &folded, &info)?;
        }
        (Some("safetensors"), _) => {
            return Err(Error::Config("a .safetensors file is written in f32; leave out --precision".into()).into());
        }
        _ => {
            let output = args.output.display();
            return Err(Error::Config(format!("{output} says no format; name it .onnx or .safetensors")).into());
        }
    }
    let bytes = std::fs::metadata(&args.output).map_err(|e| Error::io(&args.output, e))?.len();
    let (params, macs) = sizes(&model)?;
    let text = if common.json {
        let value = json!({
            "output": args.output, "precision": precision, "bytes": bytes, "params": params, "macs": macs,
        });
        format!("{value:#}\n")
    } else {
        format!("{}: {:.1} MB\n", terminal::path(&args.output), bytes as f64 / 1e6)
    };
    print(&format!("the size of {}", args.output.display()), &text)
}
