//! Other projects' weights on the networks here.

use std::path::Path;

use crate::io::names::Foreign;
use crate::io::tensors::read_tensors;
use crate::io::torch::read_torch;
use crate::model::Model;
use crate::models::{NetworkOptions, build};
use crate::{Error, Result};

/// The network `options` describes with the weights of another project's file, and whose names the file has. The
/// numbers of classes and of image channels are those of the file.
///
/// # Errors
/// An unknown network; a file that is neither `.safetensors` nor PyTorch's; tensors that do not fit, by name.
pub fn import(net: &str, path: &Path, options: &NetworkOptions) -> Result<(Model, &'static str)> {
    let expected = build(net, options)?;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let foreign = Foreign::new(match extension.as_str() {
        "safetensors" => read_tensors(path)?.tensors,
        "pth" | "pt" | "bin" | "tar" => read_torch(path)?,
        _ => {
            let problem = "is no file of weights by its name; give a .safetensors, .pth, .pt or .bin file";
            return Err(Error::file(path, problem));
        }
    });
    let (classes, channels) = foreign.classes_and_channels(&expected);
    let mut options = options.clone();
    options.classes = classes.unwrap_or(options.classes);
    options.input.c = channels.unwrap_or(options.input.c);
    foreign.into_model(path, build(net, &options)?)
}
