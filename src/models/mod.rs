//! Networks by name, as graphs with timm's parameter names.

mod mobilenet_v2;

pub use mobilenet_v2::MobileNetV2;

use crate::graph::Graph;
use crate::shape::Shape;
use crate::{Error, Result};

/// What a network is built for, beside its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkOptions {
    /// Image shape.
    pub input: Shape,
    /// Number of classes.
    pub classes: usize,
    /// Stride of the stem; `None` is the network's own (2).
    pub input_stride: Option<usize>,
    /// Stride of each stage's first block; `None` is the network's own.
    pub stage_strides: Option<Vec<usize>>,
    /// Channels of the last convolution; `None` is the network's own.
    pub head_channels: Option<usize>,
}

impl NetworkOptions {
    /// A network's own strides and head for the given image and classes.
    pub fn new(input: Shape, classes: usize) -> Self {
        Self { input, classes, input_stride: None, stage_strides: None, head_channels: None }
    }
}

/// Builds a network by name: `mobilenetv2-<width>` (such as `mobilenetv2-1.4`) or timm's `mobilenetv2_<width·100>`
/// (`mobilenetv2_140`, `mobilenetv2_110d`).
///
/// # Errors
/// An unknown name, or options that do not fit (the message says which).
pub fn build(name: &str, options: &NetworkOptions) -> Result<Graph> {
    if let Some(network) = MobileNetV2::parse(name) {
        return network?.graph(name, options);
    }
    Err(Error::Config(format!(
        "unknown network {name:?}; known are mobilenetv2-<width>, such as mobilenetv2-0.5, and timm's mobilenetv2_035, \
         _050, _075, _100, _110d, _120d, _140"
    )))
}

/// Rounds a scaled channel count to a multiple of 8, never losing more than a tenth, as timm does.
fn round_channels(channels: f64) -> usize {
    let rounded = (((channels + 4.0) / 8.0).floor() as usize * 8).max(8);
    if (rounded as f64) < 0.9 * channels { rounded + 8 } else { rounded }
}
