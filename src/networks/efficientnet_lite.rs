//! EfficientNet-Lite (Liu, 2020): EfficientNet without squeeze-and-excitation and with ReLU6, scaled in width, depth and
//! image size together, its stem, head, first and last stage left as they are.
//!
//! timm has each size twice, with the same parameters: `efficientnet_lite<N>` pads as PyTorch does and adds 1e-5 to a
//! variance, `tf_efficientnet_lite<N>` pads as TensorFlow does and adds 1e-3, as the published weights need. Our own
//! name `efficientnet-lite<N>` is the former, at the published image size.

use super::inverted_residual::{ConvPadding, InvertedResiduals, Stage};
use super::{Family, Network};
use crate::graph::Activation;
use crate::{Error, Result};

/// Those of EfficientNet-B0.
const STAGES: [Stage; 7] = [
    stage(3, 1, 16, 1, 1),
    stage(3, 6, 24, 2, 2),
    stage(5, 6, 40, 2, 2),
    stage(3, 6, 80, 3, 2),
    stage(5, 6, 112, 3, 1),
    stage(5, 6, 192, 4, 2),
    stage(3, 6, 320, 1, 1),
];
/// Width, depth, published image size and timm's by N. timm gives sizes 3 and 4 the images of EfficientNet-B3 and B4.
const SCALES: [(f64, f64, usize, usize); 5] =
    [(1.0, 1.0, 224, 224), (1.0, 1.1, 240, 240), (1.1, 1.2, 260, 260), (1.2, 1.4, 280, 300), (1.4, 1.8, 300, 380)];

const fn stage(kernel: usize, expansion: usize, channels: usize, repeats: usize, stride: usize) -> Stage {
    Stage { kernel, expansion, channels, repeats, stride, skip: true }
}

/// Reads `efficientnet-lite<N>` and timm's names; `None` when the name is another family's.
pub(super) fn parse(name: &str) -> Option<Result<Box<dyn Network>>> {
    let (size, is_timm, padding) = if let Some(size) = name.strip_prefix("efficientnet-lite") {
        (size, false, ConvPadding::Symmetric)
    } else if let Some(size) = name.strip_prefix("tf_efficientnet_lite") {
        (size, true, ConvPadding::Same)
    } else {
        (name.strip_prefix("efficientnet_lite")?, true, ConvPadding::Symmetric)
    };
    let scale = (0..SCALES.len()).find(|n| n.to_string() == size).map(|n| SCALES[n]);
    let Some((width, depth, published_size, timm_size)) = scale else {
        return Some(Err(Error::Config(format!(
            "{name:?} has no size; efficientnet-lite0 to efficientnet-lite4 exist"
        ))));
    };
    Some(Ok(Box::new(InvertedResiduals {
        width,
        depth,
        fixed_ends: true,
        wide_head: false,
        stages: &STAGES,
        activation: Activation::RELU6,
        batch_norm_eps: if padding == ConvPadding::Same { 1e-3 } else { 1e-5 },
        padding,
        image_size: if is_timm { timm_size } else { published_size },
        family: Family::EfficientNetLite,
    })))
}
