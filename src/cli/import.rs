//! `import`: weights of timm, torchvision and other projects into a model file.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::settings::{refuse_same, sizes};
use super::{Common, print};
use crate::data::Resize;
use crate::io::names::FreshHead;
use crate::io::{check_writable, write_model};
use crate::networks::{NetworkOptions, image_size};
use crate::pipeline::{Entry, Imported, import};
use crate::shape::Shape;
use crate::terminal;

/// Options of `import`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Network, such as mobilenetv2-1.0, or the name of timm, torchvision or Hugging Face, with its weights where it has
    /// several: mobilenetv2_100, resnet18.tv_in1k, mobilenet_v2, google/mobilenet_v2_1.0_224
    net: String,
    /// Its weights: a .safetensors file, or a .pth, .pt or .bin file of PyTorch, of which only tensors are read. The
    /// names may be those of timm, torchvision, Hugging Face, mmpretrain, EC, tonylins, d-li14 or
    /// efficientnet_lite_pytorch, with anything before all of them
    weights: PathBuf,
    /// Gives the network a fresh classifier of N classes, to be trained on one's own; the file's is left out, or missing
    #[arg(long, value_name = "N")]
    classes: Option<usize>,
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
    let head = args.classes.map(|classes| FreshHead { classes, seed: config.seed });
    let imported = import(&args.net, &args.weights, &options, head)?;
    let (info, decided) = imported.info(&args.net, args.preprocessing.as_deref())?;
    write_model(&args.output, &imported.model, &info)?;
    let resize = info.data.as_ref().and_then(|data| data.resize);
    let text = if common.json {
        let Imported { model, names, has_fresh_head } = &imported;
        let (input, (params, macs)) = (model.graph.input_shape(), sizes(model)?);
        let value = json!({
            "output": args.output, "network": model.graph.name, "names": names.projects_in_words(),
            "prefix": names.prefix, "part": names.part, "scores_left_out": names.scores,
            "classes": model.graph.classes(), "fresh_head": has_fresh_head,
            "input": [input.c, input.h, input.w], "params": params, "macs": macs, "preprocessing": decided,
            "resize": resize,
        });
        format!("{value:#}\n")
    } else {
        format!("{}{}", told(args, &imported)?, pictures(&imported, decided.zip(resize)))
    };
    print(&format!("what {} holds", args.output.display()), &text)
}

/// What was imported, and what was left out or made anew.
fn told(args: &Args, imported: &Imported) -> Result<String> {
    let Imported { model, names, has_fresh_head } = imported;
    let (output, network, projects) = (terminal::path(&args.output), &model.graph.name, names.projects_in_words());
    let ((params, _), input, classes) = (sizes(model)?, model.graph.input_shape(), model.graph.classes());
    let mut text = format!("{output}: {network}, {params} parameters under the names of {projects}");
    if !names.prefix.is_empty() {
        text.push_str(&format!(" behind {:?}", names.prefix));
    }
    if !names.part.is_empty() {
        text.push_str(&format!(", from {:?} of the checkpoint", names.part));
    }
    text.push_str(&format!(", images of {input}, {classes} classes\n"));
    if *has_fresh_head {
        text.push_str(&format!("the classifier is fresh: train it on your {classes} classes before use\n"));
    }
    if names.scores > 0 {
        let scores = names.scores;
        text.push_str(&format!("{scores} learned scores of activations are left out: all activations are kept\n"));
    }
    Ok(text)
}

/// How pictures are made for the network.
fn pictures(imported: &Imported, known: Option<(String, Resize)>) -> String {
    let channels = imported.model.graph.input_shape().c;
    match known {
        Some((name, Resize { shorter_side, interpolation })) => {
            let how = format!("{interpolation:?}").to_lowercase();
            format!("pictures as for {name}, {how} to {shorter_side} pixels (--preprocessing takes others)\n")
        }
        None if channels == 3 => "how pictures are made is not known; give --preprocessing to run it on them\n".into(),
        None => format!(
            "how pictures are made is known for 3 channels only, not for {channels}; give infer numbers, --input\n"
        ),
    }
}
