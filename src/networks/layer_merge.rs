//! What LayerMerge (Kim et al., 2024) deploys: MobileNetV2 after pruning and merging, its convolutions with biases and
//! without batch-norm. Only structure is published here; weights come from training or a file.
//!
//! The inverted residuals that are left whole are the blocks of the graph, under the names they have in MobileNetV2; a
//! merged convolution is called as a merge calls it, after the blocks it stands for.

use super::inverted_residual::{HEAD_CHANNELS, STEM_CHANNELS, block_name};
use super::mobilenet_v2::STAGES;
use super::{Family, Network, NetworkOptions};
use crate::graph::{Activation, Bias, Conv, Graph, GraphBuilder, NodeId, Op, SiteId};
use crate::shape::Window;
use crate::{Error, Result};

/// Hidden channels per channel that comes in, of all blocks that are left.
const EXPANSION: usize = 6;

/// A part of the network between stem and head.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// One convolution with ReLU6 that stands for blocks, the first and the last by stage and number in it. It strides as
    /// their stages do.
    Merged { first: (usize, usize), last: (usize, usize), kernel: usize },
    /// An inverted residual, by stage and number in it.
    Block(usize, usize),
}

use Part::{Block, Merged};

/// The solutions that are published, by width and time budget in milliseconds of their tables. It is one, the demonstration
/// of `snu-mllab/LayerMerge`: activations stay at positions 0, 5, 8, 11, 14, 17 to 35 and 38 to 50, the depthwise
/// convolutions 1, 7, 13 and 37 are pruned, so that their blocks merge into 1×1, but for the first, which is 3×3 by the next.
const SOLUTIONS: [(&str, [Part; 16]); 1] = [(
    "mbv2-1.0-13.4",
    [
        Merged { first: (0, 0), last: (1, 0), kernel: 3 },
        Merged { first: (1, 1), last: (1, 1), kernel: 1 },
        Merged { first: (2, 0), last: (2, 0), kernel: 3 },
        Merged { first: (2, 1), last: (2, 1), kernel: 1 },
        Merged { first: (2, 2), last: (2, 2), kernel: 3 },
        Block(3, 0),
        Block(3, 1),
        Block(3, 2),
        Block(3, 3),
        Block(4, 0),
        Block(4, 1),
        Merged { first: (4, 2), last: (4, 2), kernel: 1 },
        Block(5, 0),
        Block(5, 1),
        Block(5, 2),
        Block(6, 0),
    ],
)];

struct Deployed {
    parts: &'static [Part],
}

/// Reads `layermerge-mbv2-<width>-<milliseconds>`; `None` when the name is another family's.
pub(super) fn parse(name: &str) -> Option<Result<Box<dyn Network>>> {
    let solution = name.strip_prefix("layermerge-")?;
    let Some((_, parts)) = SOLUTIONS.iter().find(|(known, _)| *known == solution) else {
        let known: Vec<String> = SOLUTIONS.iter().map(|(known, _)| format!("layermerge-{known}")).collect();
        return Some(Err(Error::Config(format!(
            "no solution is published for {name:?}; they are {}",
            known.join(", ")
        ))));
    };
    Some(Ok(Box::new(Deployed { parts })))
}

impl Network for Deployed {
    /// `stage_strides` are those of MobileNetV2; a convolution that stands for several stages strides by all of theirs.
    fn graph(&self, name: &str, options: &NetworkOptions) -> Result<Graph> {
        let strides = options.strides(name, &STAGES.map(|stage| stage.stride))?;
        let mut b = GraphBuilder::new(name, options.input);
        let stem = conv(options.input.c, STEM_CHANNELS, Window::square(3, options.input_stride.unwrap_or(2), 1), 1);
        let mut x = b.push("conv_stem", stem, &[NodeId::INPUT]);
        let blocks = self.parts.iter().filter(|part| matches!(part, Block(..))).count();
        x = b.activation(Activation { site: Some(SiteId::new(blocks)), ..Activation::RELU6 }, x);
        let mut c = STEM_CHANNELS;
        for part in self.parts {
            x = match *part {
                Merged { first, last, kernel } => {
                    let starts = (first.0..=last.0).filter(|&stage| stage > first.0 || first.1 == 0);
                    let stride = starts.map(|stage| strides[stage]).fold(1, usize::saturating_mul);
                    let window = Window::square(kernel, stride, kernel / 2);
                    let names = [first, last].map(|(stage, repeat)| block_name(stage, repeat));
                    let name = if first == last { names[0].clone() } else { names.join("+") };
                    let merged = b.push(format!("{name}.conv"), conv(c, STAGES[last.0].channels, window, 1), &[x]);
                    c = STAGES[last.0].channels;
                    b.activation(Activation::RELU6, merged)
                }
                Block(stage, repeat) => {
                    let stride = if repeat == 0 { strides[stage] } else { 1 };
                    let (c_in, c_out) = (c, STAGES[stage].channels);
                    c = c_out;
                    inverted_residual(&mut b, &block_name(stage, repeat), x, [c_in, c_out], stride)
                }
            };
        }
        let head = options.head_channels.unwrap_or(HEAD_CHANNELS);
        x = b.push("conv_head", conv(c, head, Window::square(1, 1, 0), 1), &[x]);
        x = b.activation(Activation::RELU6, x);
        x = b.push("global_pool", Op::GlobalAvgPool, &[x]);
        b.linear("classifier", head, options.classes, x);
        b.finish()
    }

    fn image_size(&self) -> usize {
        224
    }

    fn family(&self) -> Family {
        Family::LayerMerge
    }
}

/// An inverted residual as the merge leaves it: each convolution has its batch-norm in its bias.
fn inverted_residual(
    b: &mut GraphBuilder,
    name: &str,
    input: NodeId,
    [c_in, c_out]: [usize; 2],
    stride: usize,
) -> NodeId {
    let act = Activation { site: Some(b.next_block().site()), ..Activation::RELU6 };
    let (first, hidden) = (b.next_node(), c_in * EXPANSION);
    let pointwise = Window::square(1, 1, 0);
    let mut x = b.push(format!("{name}.conv_pw"), conv(c_in, hidden, pointwise, 1), &[input]);
    x = b.activation(act, x);
    let depthwise = conv(hidden, hidden, Window::square(3, stride, 1), hidden);
    x = b.push(format!("{name}.conv_dw"), depthwise, &[x]);
    x = b.activation(act, x);
    x = b.push(format!("{name}.conv_pwl"), conv(hidden, c_out, pointwise, 1), &[x]);
    if stride == 1 && c_in == c_out {
        x = b.push(format!("{name}.add"), Op::Add, &[input, x]);
    }
    b.block(name, input, first);
    x
}

fn conv(c_in: usize, c_out: usize, window: Window, groups: usize) -> Op {
    Op::Conv(Conv { bias: Bias::Channel, ..GraphBuilder::conv(c_in, c_out, window, groups) })
}
