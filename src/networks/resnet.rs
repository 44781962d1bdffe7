//! ResNet-18, -34 and -50 (He et al., 2015), the last with its stride on the 3×3 convolution, under the parameter names
//! that timm and torchvision share.
//!
//! A residual block is a block of the graph: its mask switches the activations inside it, while the ReLU behind the sum is
//! its final activation and always stays. Freed, a basic block is 3×3 ∘ 3×3, which merges once its padding has moved to the
//! front; a bottleneck is 1×1 ∘ 3×3 ∘ 1×1. A projection shortcut is folded with it.

use super::{Family, Network, NetworkOptions};
use crate::graph::{Activation, BatchNorm, Graph, GraphBuilder, MaxPool, NodeId, Op};
use crate::shape::Window;
use crate::{Error, Result};

const STEM_CHANNELS: usize = 64;
const STAGE_CHANNELS: [usize; 4] = [64, 128, 256, 512];
const STAGE_STRIDES: [usize; 4] = [1, 2, 2, 2];
/// Channels out per inner channel of a bottleneck.
const BOTTLENECK_EXPANSION: usize = 4;

struct ResNet {
    repeats: [usize; 4],
    bottleneck: bool,
}

/// Reads timm's names; `None` when the name is none of them.
pub(super) fn parse(name: &str) -> Option<Result<Box<dyn Network>>> {
    let (repeats, bottleneck) = match name {
        "resnet18" => ([2, 2, 2, 2], false),
        "resnet34" => ([3, 4, 6, 3], false),
        "resnet50" => ([3, 4, 6, 3], true),
        _ => return None,
    };
    Some(Ok(Box::new(ResNet { repeats, bottleneck })))
}

impl Network for ResNet {
    fn graph(&self, name: &str, options: &NetworkOptions) -> Result<Graph> {
        let strides = options.strides(name, &STAGE_STRIDES)?;
        if options.head_channels.is_some() {
            return Err(Error::Config(format!("{name} has no convolution behind its stages; leave head_channels out")));
        }
        let mut b = GraphBuilder::new(name, options.input);
        let stem = Window::square(7, options.input_stride.unwrap_or(2), 3);
        let mut x = conv_bn(&mut b, ("conv1", "bn1"), (options.input.c, STEM_CHANNELS), stem, NodeId::INPUT);
        x = b.activation(Activation::RELU, x);
        x = b.push("maxpool", Op::MaxPool(MaxPool { window: Window::square(3, 2, 1) }), &[x]);
        let mut c = STEM_CHANNELS;
        for (stage, (&channels, &stride)) in STAGE_CHANNELS.iter().zip(&strides).enumerate() {
            for repeat in 0..self.repeats[stage] {
                let stride = if repeat == 0 { stride } else { 1 };
                (x, c) = self.block(&mut b, &format!("layer{}.{repeat}", stage + 1), (x, c), channels, stride);
            }
        }
        x = b.push("global_pool", Op::GlobalAvgPool, &[x]);
        b.linear("fc", c, options.classes, x);
        b.finish()
    }

    fn image_size(&self) -> usize {
        224
    }

    fn family(&self) -> Family {
        Family::ResNet
    }
}

impl ResNet {
    /// One residual block; gives its output and the channels of that.
    fn block(
        &self,
        b: &mut GraphBuilder,
        name: &str,
        (input, c_in): (NodeId, usize),
        channels: usize,
        stride: usize,
    ) -> (NodeId, usize) {
        let act = Activation { site: Some(b.next_block().site()), ..Activation::RELU };
        let first = b.next_node();
        let at = |suffix: &str| format!("{name}.{suffix}");
        let c_out = if self.bottleneck { channels * BOTTLENECK_EXPANSION } else { channels };
        // The projection comes first, so that the sum joins the convolution that ends the block in one step.
        let mut shortcut = input;
        if stride != 1 || c_in != c_out {
            let names = (&*at("downsample.0"), &*at("downsample.1"));
            shortcut = conv_bn(b, names, (c_in, c_out), Window::square(1, stride, 0), input);
        }
        let (pointwise, spatial) = (Window::square(1, 1, 0), Window::square(3, stride, 1));
        let windows: &[Window] =
            if self.bottleneck { &[pointwise, spatial, pointwise] } else { &[spatial, Window::square(3, 1, 1)] };
        let (mut x, mut c) = (input, c_in);
        for (index, &window) in windows.iter().enumerate() {
            let is_last = index + 1 == windows.len();
            let width = if is_last { c_out } else { channels };
            let names = (at(&format!("conv{}", index + 1)), at(&format!("bn{}", index + 1)));
            x = conv_bn(b, (&names.0, &names.1), (c, width), window, x);
            c = width;
            if !is_last {
                x = b.activation(act, x);
            }
        }
        x = b.push(at("add"), Op::Add, &[shortcut, x]);
        x = b.activation(Activation::RELU, x);
        b.block(name, input, first);
        (x, c_out)
    }
}

fn conv_bn(
    b: &mut GraphBuilder,
    (conv, bn): (&str, &str),
    (c_in, c_out): (usize, usize),
    window: Window,
    x: NodeId,
) -> NodeId {
    let norm = BatchNorm { channels: c_out, eps: 1e-5, momentum: 0.1 };
    b.conv_bn((conv, GraphBuilder::conv(c_in, c_out, window, 1)), (bn, norm), x)
}
