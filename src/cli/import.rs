//! `import`: timm's, torchvision's and other PyTorch weights into a model file.

use std::io::stdout;
use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::settings::{refuse_same, sizes};
use super::{Common, print};
use crate::io::{DataInfo, ModelInfo, write_model};
use crate::models::{NetworkOptions, image_size};
use crate::pipeline::{Entry, import};
use crate::shape::Shape;

/// Options of `import`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Network, such as mobilenetv2-1.0 or timm's mobilenetv2_100
    net: String,
    /// Its weights: a .safetensors file, or a .pth, .pt or .bin file of PyTorch, of which only tensors are read. The
    /// names may be timm's, torchvision's or those of efficientnet_lite_pytorch
    weights: PathBuf,
    /// Side of the images the network will see; the one it was published for if not given
    #[arg(long, value_name = "PIXELS")]
    image_size: Option<usize>,
    /// The model file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// Reads the weights, checks that they fit, and writes the model.
///
/// # Errors
/// An unknown network, or weights that do not fit it; the message names the tensors.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let config = common.base_config(Entry::New, None)?;
    common.ready(&config)?;
    refuse_same(&args.weights, &args.output)?;
    // Classes and channels are those of the file.
    let side = args.image_size.map_or_else(|| image_size(&args.net), Ok)?;
    let options = NetworkOptions::new(Shape::new(side, side, 3), 1000);
    let (model, names) = import(&args.net, &args.weights, &options)?;
    let (classes, input) = (model.graph.classes(), model.graph.input_shape());
    let info = ModelInfo { data: DataInfo::pretrained(&args.net, input, classes) };
    write_model(&args.output, &model, &info)?;
    let (params, macs) = sizes(&model)?;
    let text = if common.json {
        let value = json!({
            "output": args.output, "names": names, "classes": classes, "input": [input.c, input.h, input.w],
            "params": params, "macs": macs,
        });
        format!("{value:#}\n")
    } else {
        let output = args.output.display();
        format!("{output}: {params} parameters under {names}'s names, images of {input}, {classes} classes\n")
    };
    print(&mut stdout().lock(), &text)
}
