//! Imports other projects' weights into this project's networks.

use std::path::Path;

use crate::io::names::Foreign;
use crate::io::{DataInfo, ModelInfo};
use crate::model::Model;
use crate::networks::{self, NetworkOptions, Project, build, default_weights};
use crate::{Error, Result};

/// A network with another project's weights.
#[derive(Debug)]
pub struct Imported {
    /// The network.
    pub model: Model,
    /// Whose names the file has; more than one project's where they agree, as of ResNet's.
    pub names: Vec<Project>,
}

impl Imported {
    /// How images are made for these weights: as for `asked`, a name that [`networks::preprocessing`] knows, or else as for
    /// the weights that `net` names, or else as for the default weights of the project whose names the file has. Also the
    /// name that decided; `None` where nothing is known.
    ///
    /// # Errors
    /// An `asked` name that is not known, or one for other image channels than the network's.
    pub fn info(&self, net: &str, asked: Option<&str>) -> Result<(ModelInfo, Option<String>)> {
        let (classes, input) = (self.model.graph.classes(), self.model.graph.input_shape());
        let name = match (asked, self.names.first()) {
            (Some(asked), _) => asked.to_owned(),
            (None, Some(&project)) => default_weights(net, project),
            (None, None) => net.to_owned(),
        };
        let data = DataInfo::pretrained(&name, input, classes);
        match (asked, &data) {
            (Some(asked), None) if networks::preprocessing(asked).is_none() => Err(Error::Config(format!(
                "no preprocessing is published as {asked:?}; give a network of timm or torchvision, with its weights where \
                 it has several, such as resnet18.tv_in1k or resnet50.IMAGENET1K_V2"
            ))),
            (Some(asked), None) => Err(Error::Config(format!(
                "the preprocessing of {asked} is for 3 channels, the images have {}",
                input.c
            ))),
            _ => {
                let decided = data.is_some().then_some(name);
                Ok((ModelInfo { data }, decided))
            }
        }
    }
}

/// The network `options` describes with the weights of another project's file. The numbers of classes and of image
/// channels are those of the file.
///
/// # Errors
/// An unknown network; a file that is neither `.safetensors` nor PyTorch's; tensors that do not fit, by name.
pub fn import(net: &str, path: &Path, options: &NetworkOptions) -> Result<Imported> {
    let expected = build(net, options)?;
    let foreign = Foreign::read(path)?;
    let (classes, channels) = foreign.classes_and_channels(&expected);
    let mut options = options.clone();
    options.classes = classes.unwrap_or(options.classes);
    options.input.c = channels.unwrap_or(options.input.c);
    let (model, names) = foreign.into_model(path, build(net, &options)?)?;
    Ok(Imported { model, names })
}
