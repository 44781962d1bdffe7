//! Other projects' weights on the networks here.

use std::path::Path;

use crate::Result;
use crate::io::names::Foreign;
use crate::model::Model;
use crate::models::{NetworkOptions, build};

/// The network `options` describes with the weights of another project's file, and whose names the file has. The
/// numbers of classes and of image channels are those of the file.
///
/// # Errors
/// An unknown network; a file that is neither `.safetensors` nor PyTorch's; tensors that do not fit, by name.
pub fn import(net: &str, path: &Path, options: &NetworkOptions) -> Result<(Model, &'static str)> {
    let expected = build(net, options)?;
    let foreign = Foreign::read(path)?;
    let (classes, channels) = foreign.classes_and_channels(&expected);
    let mut options = options.clone();
    options.classes = classes.unwrap_or(options.classes);
    options.input.c = channels.unwrap_or(options.input.c);
    foreign.into_model(path, build(net, &options)?)
}
