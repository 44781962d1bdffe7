//! `import`: timm's, torchvision's and other PyTorch weights into a model file.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::settings::{refuse_same, sizes};
use super::{Common, print};
use crate::data::Resize;
use crate::io::{check_writable, write_model};
use crate::networks::{NetworkOptions, image_size};
use crate::pipeline::{Entry, Imported, import};
use crate::shape::Shape;
use crate::terminal;

/// Options of `import`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Network, such as mobilenetv2-1.0, or timm's or torchvision's name, with its weights where it has several:
    /// mobilenetv2_100, resnet18.tv_in1k, mobilenet_v2
    net: String,
    /// Its weights: a .safetensors file, or a .pth, .pt or .bin file of PyTorch, of which only tensors are read. The
    /// names may be timm's, torchvision's or those of efficientnet_lite_pytorch
    weights: PathBuf,
    /// Side of the images the network will see; the one it was published for if not given
    #[arg(long, value_name = "PIXELS")]
    image_size: Option<usize>,
    /// Whose preprocessing the images get: a network as above, with its weights where it has several. If not given, that
    /// of the weights that NET names, or of the default weights of the project whose names the file has
    #[arg(long, value_name = "NAME")]
    preprocessing: Option<String>,
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
    check_writable(&args.output)?;
    // Classes and channels are those of the file.
    let side = args.image_size.map_or_else(|| image_size(&args.net), Ok)?;
    let options = NetworkOptions::new(Shape::new(side, side, 3), 1000);
    let imported = import(&args.net, &args.weights, &options)?;
    let (info, decided) = imported.info(&args.net, args.preprocessing.as_deref())?;
    let Imported { model, names } = imported;
    write_model(&args.output, &model, &info)?;
    let (classes, input) = (model.graph.classes(), model.graph.input_shape());
    let (params, macs) = sizes(&model)?;
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let resize = info.data.as_ref().and_then(|data| data.resize);
    let text = if common.json {
        let value = json!({
            "output": args.output, "names": names.join(" or "), "classes": classes,
            "input": [input.c, input.h, input.w], "params": params, "macs": macs, "preprocessing": decided,
            "resize": resize,
        });
        format!("{value:#}\n")
    } else {
        let (output, names) = (terminal::path(&args.output), names.join(" or "));
        let pictures = match (decided, resize) {
            (Some(name), Some(Resize { shorter_side, interpolation })) => {
                let how = format!("{interpolation:?}").to_lowercase();
                format!("pictures as for {name}, {how} to {shorter_side} pixels (--preprocessing takes others)")
            }
            _ => "how pictures are made is not known; give --preprocessing to run it on them".to_owned(),
        };
        format!(
            "{output}: {params} parameters under the names of {names}, images of {input}, {classes} classes\n{pictures}\n"
        )
    };
    print(&format!("what {} holds", args.output.display()), &text)
}
