//! The network that a command is about: a name with options, or a model file.

use std::path::Path;

use anyhow::Result;

use crate::io::read_model;
use crate::model::Model;
use crate::networks::{KNOWN_NETWORKS, NetworkOptions, build, image_size};
use crate::shape::Shape;

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
    /// The network with its weights; fresh ones where it is only named.
    ///
    /// # Errors
    /// An unknown network, an unreadable model, or options that do not fit.
    pub fn model(&self, seed: u64) -> Result<Model> {
        Ok(match self.read()? {
            Some(model) => model,
            None => Model::initialise(build(&self.net, &self.options()?)?, seed)?,
        })
    }

    fn read(&self) -> Result<Option<Model>> {
        let path = Path::new(&self.net);
        match path.extension() {
            Some(extension) if extension == "safetensors" => Ok(Some(read_model(path)?.0)),
            _ => Ok(None),
        }
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
