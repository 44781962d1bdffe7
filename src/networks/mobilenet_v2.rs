//! MobileNetV2 (Sandler et al., 2018) of any width, with timm's depth-scaled variants.

use super::inverted_residual::{ConvPadding, InvertedResiduals, Stage};
use super::{Family, Network, width_of};
use crate::Result;
use crate::graph::Activation;

/// Table 2 of the paper.
pub(super) const STAGES: [Stage; 7] = [
    stage(1, 16, 1, 1),
    stage(6, 24, 2, 2),
    stage(6, 32, 3, 2),
    stage(6, 64, 4, 2),
    stage(6, 96, 3, 1),
    stage(6, 160, 3, 2),
    stage(6, 320, 1, 1),
];

const fn stage(expansion: usize, channels: usize, repeats: usize, stride: usize) -> Stage {
    Stage { kernel: 3, expansion, channels, repeats, stride, skip: true }
}

/// Reads `mobilenetv2-<width>` and timm's names; `None` when the name is another family's. With `tf_` before it, as timm
/// calls such networks, it pads as TensorFlow does and adds 1e-3 to a variance, as Hugging Face's weights need.
pub(super) fn parse(name: &str) -> Option<Result<Box<dyn Network>>> {
    let (plain, padding) = match name.strip_prefix("tf_") {
        Some(plain) => (plain, ConvPadding::Same),
        None => (name, ConvPadding::Symmetric),
    };
    // timm's 110d and 120d: their depth grows too, their ends do not.
    let scaled = match plain {
        "mobilenetv2_110d" => Ok((1.1, 1.2, true)),
        "mobilenetv2_120d" => Ok((1.2, 1.4, true)),
        _ => width_of(plain, "mobilenetv2")?.map(|width| (width, 1.0, false)),
    };
    Some(scaled.map(|(width, depth, fixed_ends)| -> Box<dyn Network> {
        Box::new(InvertedResiduals {
            width,
            depth,
            fixed_ends,
            wide_head: !fixed_ends,
            stages: &STAGES,
            activation: Activation::RELU6,
            batch_norm_eps: if padding == ConvPadding::Same { 1e-3 } else { 1e-5 },
            padding,
            image_size: 224,
            family: Family::MobileNetV2,
        })
    }))
}
