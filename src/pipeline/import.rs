//! Imports other projects' weights into this project's networks.

use std::path::Path;

use crate::io::names::{Foreign, FreshHead, Names};
use crate::io::{DataInfo, ModelInfo};
use crate::model::Model;
use crate::networks::{self, NetworkOptions, build, default_weights, meant_by};
use crate::{Error, Result};

/// A network with another project's weights.
#[derive(Debug)]
pub struct Imported {
    /// The network.
    pub model: Model,
    /// Whose names the file has.
    pub names: Names,
    /// Whether the classifier is a fresh one.
    pub has_fresh_head: bool,
}

impl Imported {
    /// How images are made for these weights: as for `asked`, a name that [`networks::preprocessing`] knows, or else as for
    /// the weights that `net` names, or else as for the default weights of the project whose names the file has. Also the
    /// name that decided; `None` where nothing is known. A fresh classifier has no names of classes.
    ///
    /// # Errors
    /// An `asked` name that is not known, or one for other image channels than the network's.
    pub fn info(&self, net: &str, asked: Option<&str>) -> Result<(ModelInfo, Option<String>)> {
        let (classes, input) = (self.model.graph.classes(), self.model.graph.input_shape());
        let name = match (asked, self.names.projects.first()) {
            (Some(asked), _) => asked.to_owned(),
            (None, Some(&project)) => default_weights(&meant_by(net, project), project),
            (None, None) => net.to_owned(),
        };
        let mut data = DataInfo::pretrained(&name, input, classes);
        match (asked, &mut data) {
            (Some(asked), None) if networks::preprocessing(asked).is_none() => Err(Error::Config(format!(
                "no preprocessing is published as {asked:?}; give a network of timm, torchvision or Hugging Face, with its \
                 weights where it has several, such as resnet18.tv_in1k or resnet50.IMAGENET1K_V2"
            ))),
            (Some(asked), None) => Err(Error::Config(format!(
                "the preprocessing of {asked} is for pictures of 3 channels, the network takes {}; leave --preprocessing out, \
                 and give infer numbers, --input",
                input.c
            ))),
            (_, data) => {
                if let Some(data) = data.as_mut().filter(|_| self.has_fresh_head) {
                    data.classes.clear();
                }
                let decided = data.is_some().then_some(name);
                Ok((ModelInfo { data: data.take() }, decided))
            }
        }
    }
}

/// The network `options` describes with the weights of another project's file. The numbers of classes and of image
/// channels are those of the file, but for the classes of a fresh `head`. Where the file's project means another network by
/// the name, it is that one.
///
/// # Errors
/// An unknown network; a file that is neither `.safetensors` nor PyTorch's; tensors that do not fit, by name.
pub fn import(net: &str, path: &Path, options: &NetworkOptions, head: Option<FreshHead>) -> Result<Imported> {
    let expected = build(net, options)?;
    let mut foreign = Foreign::read(path)?;
    let (classes, channels) = foreign.classes_and_channels(&expected);
    let mut options = options.clone();
    options.classes = head.map(|head| head.classes).or(classes).unwrap_or(options.classes);
    options.input.c = channels.unwrap_or(options.input.c);
    let project = foreign.names(&expected).projects.first().copied();
    let graph = build(&project.map_or_else(|| net.to_owned(), |project| meant_by(net, project)), &options)?;
    if let Some(head) = head {
        foreign = foreign.with_fresh_head(&graph, head)?;
    }
    let (model, names) = foreign.into_model(path, graph)?;
    Ok(Imported { model, names, has_fresh_head: head.is_some() })
}
