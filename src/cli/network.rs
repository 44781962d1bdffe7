//! The network that a command is about: a name with options, or a model file.

use std::path::Path;

use anyhow::Result;

use crate::graph::{Graph, Positions};
use crate::io::read_model;
use crate::model::Model;
use crate::networks::{KNOWN_NETWORKS, NetworkOptions, build, image_size};
use crate::shape::Shape;
use crate::shrink::norms;

/// A network as it was published, or changed by options.
#[derive(Debug, Clone, clap::Args)]
pub struct NetArgs {
    #[arg(help = format!("{KNOWN_NETWORKS}; or a model file (.safetensors), whose image and classes are its own"))]
    pub net: String,
    /// Height and width of the image, where they differ
    #[arg(long, value_names = ["H", "W"], num_args = 2, conflicts_with = "size",
          value_parser = clap::value_parser!(u32).range(1..=8192))]
    pub image: Option<Vec<u32>>,
    /// Height and width of the image; if not given those the network was published for
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=8192))]
    pub size: Option<u32>,
    /// Channels of the image
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub channels: u32,
    /// Number of classes
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub classes: u32,
    /// Stride of the stem instead of the network's own
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub input_stride: Option<u32>,
    /// Stride of each stage, comma-separated, instead of the network's own
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=16))]
    pub stage_strides: Option<Vec<u32>>,
    /// Channels of the last convolution instead of the network's own
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    pub head_channels: Option<u32>,
}

impl NetArgs {
    /// A network by name or as a model file, with images of a size, or of that which it was published for.
    pub fn of(net: &str, size: Option<u32>) -> Self {
        let (image, input_stride, stage_strides, head_channels) = Default::default();
        let net = net.to_owned();
        Self { net, image, size, channels: 3, classes: 1000, input_stride, stage_strides, head_channels }
    }

    /// The network with its weights; fresh ones where it is only named.
    ///
    /// # Errors
    /// An unknown network, an unreadable model, or options that do not fit.
    pub fn model(&self, seed: u64) -> Result<Model> {
        Ok(match model_file(&self.net)? {
            Some(model) => model,
            None => Model::initialise(build(&self.net, &self.options()?)?, seed)?,
        })
    }

    fn options(&self) -> Result<NetworkOptions> {
        let (h, w) = match (self.image.as_deref(), self.size) {
            (Some(&[h, w]), _) => (h as usize, w as usize),
            (_, Some(size)) => (size as usize, size as usize),
            (_, None) => {
                let size = image_size(&self.net)?;
                (size, size)
            }
        };
        let input = Shape::new(h, w, self.channels as usize);
        Ok(NetworkOptions {
            input_stride: self.input_stride.map(|s| s as usize),
            stage_strides: self.stage_strides.as_ref().map(|s| s.iter().map(|&s| s as usize).collect()),
            head_channels: self.head_channels.map(|c| c as usize),
            ..NetworkOptions::new(input, self.classes as usize)
        })
    }
}

/// A network for which there are no options beside its name.
#[derive(Debug, Clone)]
pub enum NamedNetwork {
    /// As it was published, without weights.
    Published(Graph),
    /// A model file.
    File(Model),
}

impl NamedNetwork {
    /// The published network of a name, or a model file (.safetensors).
    ///
    /// # Errors
    /// An unknown network or an unreadable model.
    pub fn read(net: &str) -> Result<Self> {
        if let Some(model) = model_file(net)? {
            return Ok(Self::File(model));
        }
        let size = image_size(net)?;
        Ok(Self::Published(build(net, &NetworkOptions::new(Shape::new(size, size, 3), 1000))?))
    }

    /// The network.
    pub fn graph(&self) -> &Graph {
        match self {
            Self::Published(graph) => graph,
            Self::File(model) => &model.graph,
        }
    }

    /// The sums of the magnitudes of each convolution's weights, by position; `None` where there are no weights.
    pub fn norms(&self, positions: &Positions) -> Option<Vec<f64>> {
        let Self::File(model) = self else { return None };
        Some(norms(model, positions))
    }
}

/// The model, where a network is named by its file.
fn model_file(net: &str) -> Result<Option<Model>> {
    let path = Path::new(net);
    match path.extension() {
        Some(extension) if extension == "safetensors" => Ok(Some(read_model(path)?.0)),
        _ => Ok(None),
    }
}
