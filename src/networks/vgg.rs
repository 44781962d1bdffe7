//! VGG-19 with batch-norm (Simonyan and Zisserman, 2014), under timm's names: the fully connected layers are convolutions
//! `pre_logits.fc1` (7×7) and `pre_logits.fc2` (1×1) in front of the linear layer `head.fc`, the same numbers as
//! torchvision's `classifier.0`, `.3` and `.6`.
//!
//! The blocks of the graph are pairs of neighbouring 3×3 convolutions, none of them across a pool: the activation between
//! the two has the block's mask, the one behind them stays. A freed pair merges into a 5×5 convolution once its padding
//! has moved to the front. Whole stages of four would merge into 9×9, which more than doubles their arithmetic.

use super::{Family, Network, NetworkOptions};
use crate::graph::{Activation, BatchNorm, Bias, Conv, Graph, GraphBuilder, MaxPool, NodeId, Op};
use crate::shape::Window;
use crate::{Error, Result};

/// Channels and convolutions of the stages; each ends in a 2×2 max-pool.
const STAGES: [(usize, usize); 5] = [(64, 2), (128, 2), (256, 4), (512, 4), (512, 4)];
/// Convolutions of a block.
const PAIR: usize = 2;
/// Side of the feature map that the first fully connected layer reads.
const FEATURE_SIZE: usize = 7;
const HIDDEN_CHANNELS: usize = 4096;

struct Vgg19;

/// Reads timm's name; `None` when the name is another.
pub(super) fn parse(name: &str) -> Option<Result<Box<dyn Network>>> {
    (name == "vgg19_bn").then(|| -> Result<Box<dyn Network>> { Ok(Box::new(Vgg19)) })
}

impl Network for Vgg19 {
    /// `input_stride` is that of the first convolution (its own is 1), `stage_strides` are those of the pools, where 1
    /// leaves the pool out, and `head_channels` those of both hidden layers. Images that leave less than 7×7 pixels get
    /// a first hidden layer of that size.
    fn graph(&self, name: &str, options: &NetworkOptions) -> Result<Graph> {
        let strides = options.strides(name, &[2; STAGES.len()])?;
        if strides.iter().any(|stride| !(1..=2).contains(stride)) {
            return Err(Error::Config(format!("{name} pools by 2 or not at all; its stage_strides are 1 or 2")));
        }
        let mut b = GraphBuilder::new(name, options.input);
        let (mut h, mut w) = (options.input.h, options.input.w);
        let (mut x, mut c) = (NodeId::INPUT, options.input.c);
        // The index that torchvision's list of layers gives a layer: activations and pools count too.
        let mut index = 0;
        for (stage, (&(channels, convs), &stride)) in STAGES.iter().zip(&strides).enumerate() {
            for pair in 0..convs / PAIR {
                let first_stride = if stage + pair == 0 { options.input_stride.unwrap_or(1) } else { 1 };
                (h, w) = Window::square(3, first_stride.max(1), 1).output(h, w).unwrap_or((0, 0));
                x = block(&mut b, &mut index, x, (c, channels), first_stride);
                c = channels;
            }
            if stride == 2 {
                let window = Window::square(2, 2, 0);
                x = b.push(format!("features.{index}"), Op::MaxPool(MaxPool { window }), &[x]);
                (h, w) = (h / 2, w / 2);
            }
            index += 1;
        }
        let hidden = options.head_channels.unwrap_or(HIDDEN_CHANNELS);
        let whole = Window { k_h: h.clamp(1, FEATURE_SIZE), k_w: w.clamp(1, FEATURE_SIZE), ..Window::square(1, 1, 0) };
        for (name, c_in, window) in [("pre_logits.fc1", c, whole), ("pre_logits.fc2", hidden, Window::square(1, 1, 0))]
        {
            x = b.push(name, biased(c_in, hidden, window), &[x]);
            x = b.activation(Activation::RELU, x);
        }
        x = b.push("global_pool", Op::GlobalAvgPool, &[x]);
        b.linear("head.fc", hidden, options.classes, x);
        b.finish()
    }

    fn image_size(&self) -> usize {
        224
    }

    fn family(&self) -> Family {
        Family::Vgg
    }
}

/// Two convolutions with batch-norm and ReLU; `index` goes on by the layers they take in torchvision's list.
fn block(
    b: &mut GraphBuilder,
    index: &mut usize,
    input: NodeId,
    (c_in, c_out): (usize, usize),
    stride: usize,
) -> NodeId {
    let site = Some(b.next_block().site());
    let first = b.next_node();
    let name = format!("features.{index}");
    let mut x = input;
    for (c_in, stride, site) in [(c_in, stride, site), (c_out, 1, None)] {
        x = b.push(format!("features.{index}"), biased(c_in, c_out, Window::square(3, stride, 1)), &[x]);
        let norm = BatchNorm { channels: c_out, eps: 1e-5, momentum: 0.1 };
        x = b.push(format!("features.{}", *index + 1), Op::BatchNorm(norm), &[x]);
        x = b.activation(Activation { site, ..Activation::RELU }, x);
        *index += 3;
    }
    b.block(name, input, first);
    x
}

fn biased(c_in: usize, c_out: usize, window: Window) -> Op {
    Op::Conv(Conv { bias: Bias::Channel, ..GraphBuilder::conv(c_in, c_out, window, 1) })
}
