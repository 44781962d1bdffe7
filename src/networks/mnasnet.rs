//! MNASNet-B1 (Tan et al., 2019) of any width: inverted residuals found by search, with ReLU and without squeeze.

use super::inverted_residual::{ConvPadding, InvertedResiduals, Stage};
use super::{Family, Network, width_of};
use crate::Result;
use crate::graph::Activation;

/// Figure 7 of the paper without its squeeze-and-excitation, which is B1.
const STAGES: [Stage; 7] = [
    Stage { skip: false, ..stage(3, 1, 16, 1, 1) },
    stage(3, 3, 24, 3, 2),
    stage(5, 3, 40, 3, 2),
    stage(5, 6, 80, 3, 2),
    stage(3, 6, 96, 2, 1),
    stage(5, 6, 192, 4, 2),
    Stage { skip: false, ..stage(3, 6, 320, 1, 1) },
];

const fn stage(kernel: usize, expansion: usize, channels: usize, repeats: usize, stride: usize) -> Stage {
    Stage { kernel, expansion, channels, repeats, stride, skip: true }
}

/// Reads `mnasnet-<width>` and timm's names; `None` when the name is another family's.
pub(super) fn parse(name: &str) -> Option<Result<Box<dyn Network>>> {
    Some(width_of(name, "mnasnet")?.map(|width| -> Box<dyn Network> {
        Box::new(InvertedResiduals {
            width,
            depth: 1.0,
            fixed_ends: false,
            wide_head: false,
            stages: &STAGES,
            activation: Activation::RELU,
            batch_norm_eps: 1e-5,
            padding: ConvPadding::Symmetric,
            image_size: 224,
            family: Family::MnasNet,
        })
    }))
}
