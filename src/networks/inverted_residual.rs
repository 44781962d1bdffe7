//! Networks of inverted residuals (Sandler et al., 2018), the plan that MobileNetV2, EfficientNet-Lite and MNASNet
//! share: a stem, stages of blocks that expand, convolve depthwise and project, a pointwise head, pool and classifier.

use super::{Family, Network, NetworkOptions, round_channels};
use crate::Result;
use crate::graph::{Activation, BatchNorm, Conv, Graph, GraphBuilder, NodeId, Op, SiteId};
use crate::shape::{Padding, Window};

pub(super) const STEM_CHANNELS: usize = 32;
pub(super) const HEAD_CHANNELS: usize = 1280;

/// Blocks of one kind, of which the first may stride.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stage {
    /// Size of the depthwise kernel.
    pub kernel: usize,
    /// Hidden channels per channel that comes in; a block of 1 has no expanding convolution.
    pub expansion: usize,
    /// Channels out, before the width multiplier.
    pub channels: usize,
    /// Number of blocks, before the depth multiplier.
    pub repeats: usize,
    /// Stride of the first block.
    pub stride: usize,
    /// Whether blocks that keep their shape add their input.
    pub skip: bool,
}

/// Which sides of an image a convolution zero-pads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ConvPadding {
    /// All alike, by half a kernel, as PyTorch's networks do.
    Symmetric,
    /// TensorFlow's "same": as few as ⌈size / stride⌉ outputs need, an odd one at the bottom and right.
    Same,
}

/// One network of the family.
#[derive(Debug, Clone)]
pub(super) struct InvertedResiduals {
    /// Multiplies every channel count.
    pub width: f64,
    /// Multiplies every stage's repeats.
    pub depth: f64,
    /// Leaves the channels of the stem and the repeats of the first and last stage unscaled.
    pub fixed_ends: bool,
    /// Whether a width above 1 widens the head; no width below 1 narrows it.
    pub wide_head: bool,
    pub stages: &'static [Stage],
    pub activation: Activation,
    pub batch_norm_eps: f32,
    pub padding: ConvPadding,
    /// Side of the images it was published for.
    pub image_size: usize,
    pub family: Family,
}

impl Network for InvertedResiduals {
    fn graph(&self, name: &str, options: &NetworkOptions) -> Result<Graph> {
        let strides = options.strides(name, &self.stages.iter().map(|s| s.stride).collect::<Vec<_>>())?;
        let scaled = |channels: usize| round_channels(channels as f64 * self.width);
        let stem = if self.fixed_ends { STEM_CHANNELS } else { scaled(STEM_CHANNELS) };
        let (mut blocks, mut c_in) = (Vec::new(), stem);
        for (index, (stage, &stride)) in self.stages.iter().zip(&strides).enumerate() {
            let c_out = scaled(stage.channels);
            for repeat in 0..self.repeats(index) {
                blocks.push(BlockPlan {
                    name: block_name(index, repeat),
                    kernel: stage.kernel,
                    hidden: (stage.expansion != 1).then(|| round_channels((c_in * stage.expansion) as f64)),
                    c_out,
                    stride: if repeat == 0 { stride } else { 1 },
                    skip: stage.skip,
                });
                c_in = c_out;
            }
        }
        let head = if self.wide_head { scaled(HEAD_CHANNELS).max(HEAD_CHANNELS) } else { HEAD_CHANNELS };
        let InvertedResiduals { activation, batch_norm_eps, padding, .. } = *self;
        Plan { stem, blocks, head, activation, batch_norm_eps, padding }.graph(name, options)
    }

    fn image_size(&self) -> usize {
        self.image_size
    }

    fn family(&self) -> Family {
        self.family
    }
}

impl InvertedResiduals {
    fn repeats(&self, stage: usize) -> usize {
        let is_end = stage == 0 || stage == self.stages.len() - 1;
        let depth = if self.fixed_ends && is_end { 1.0 } else { self.depth };
        (self.stages[stage].repeats as f64 * depth).ceil() as usize
    }
}

/// timm's name of a block.
pub(super) fn block_name(stage: usize, repeat: usize) -> String {
    format!("blocks.{stage}.{repeat}")
}

/// A network with all its channels told.
pub(super) struct Plan {
    /// Channels of the first convolution.
    pub stem: usize,
    pub blocks: Vec<BlockPlan>,
    /// Channels of the last convolution, where the options name no others.
    pub head: usize,
    pub activation: Activation,
    pub batch_norm_eps: f32,
    pub padding: ConvPadding,
}

/// One inverted residual: expand, depthwise, project.
pub(super) struct BlockPlan {
    pub name: String,
    /// Size of the depthwise kernel.
    pub kernel: usize,
    /// Channels of the depthwise convolution; `None` is the depthwise-separable block, which has no expanding one.
    pub hidden: Option<usize>,
    pub c_out: usize,
    pub stride: usize,
    /// Whether the block adds its input, where it keeps its shape.
    pub skip: bool,
}

impl Plan {
    pub fn graph(&self, name: &str, options: &NetworkOptions) -> Result<Graph> {
        let mut body = Body {
            b: GraphBuilder::new(name, options.input),
            plan: self,
            h_w: (0, 0),
            is_signal: options.input.h == 1 && options.input.w > 1,
        };
        body.h_w = (options.input.h, options.input.w);
        let stem = body.conv(options.input.c, self.stem, 3, options.input_stride.unwrap_or(2), 1);
        let mut x = body.conv_bn("conv_stem", stem, "bn1", NodeId::INPUT);
        // A site of its own behind those of the blocks.
        x = body.b.activation(Activation { site: Some(SiteId::new(self.blocks.len())), ..self.activation }, x);
        let mut c = self.stem;
        for block in &self.blocks {
            x = body.block(block, x, c);
            c = block.c_out;
        }
        let head = options.head_channels.unwrap_or(self.head);
        let conv = body.conv(c, head, 1, 1, 1);
        x = body.conv_bn("conv_head", conv, "bn2", x);
        x = body.b.activation(self.activation, x);
        x = body.b.push("global_pool", Op::GlobalAvgPool, &[x]);
        body.b.linear("classifier", head, options.classes, x);
        body.b.finish()
    }
}

/// The graph so far, and the height and width that the next convolution reads.
struct Body<'a> {
    b: GraphBuilder,
    plan: &'a Plan,
    h_w: (usize, usize),
    /// Whether images have one row.
    is_signal: bool,
}

impl Body<'_> {
    /// A square convolution of what comes next, padded the network's way. Where that has one row, as signals have, the
    /// convolution is of one dimension: more rows of a window would only see padding.
    fn conv(&mut self, c_in: usize, c_out: usize, k: usize, stride: usize, groups: usize) -> Conv {
        let mut window = Window::square(k, stride, k / 2);
        let (h, w) = self.h_w;
        if self.is_signal {
            let pad = Padding { top: 0, bottom: 0, ..window.pad };
            window = Window { k_h: 1, stride_h: 1, pad, ..window };
        }
        if self.plan.padding == ConvPadding::Same && stride > 0 {
            let total = |size: usize| ((size.div_ceil(stride).max(1) - 1) * stride + k).saturating_sub(size);
            let (rows, cols) = (if self.is_signal { 0 } else { total(h) }, total(w));
            window.pad = Padding { top: rows / 2, left: cols / 2, bottom: rows - rows / 2, right: cols - cols / 2 };
        }
        if stride > 0 {
            self.h_w = window.output(h, w).unwrap_or((0, 0));
        }
        GraphBuilder::conv(c_in, c_out, window, groups)
    }

    fn conv_bn(&mut self, name: &str, conv: Conv, bn: &str, x: NodeId) -> NodeId {
        let norm = BatchNorm { channels: conv.c_out, eps: self.plan.batch_norm_eps, momentum: 0.1 };
        self.b.conv_bn((name, conv), (bn, norm), x)
    }

    /// One inverted residual; the projection of a block without expansion is called `conv_pw` by timm.
    fn block(&mut self, block: &BlockPlan, input: NodeId, c_in: usize) -> NodeId {
        let act = Activation { site: Some(self.b.next_block().site()), ..self.plan.activation };
        let first = self.b.next_node();
        let at = |suffix: &str| format!("{}.{suffix}", block.name);
        let mut x = input;
        let (bn_dw, project, bn_project) =
            if block.hidden.is_none() { ("bn1", "conv_pw", "bn2") } else { ("bn2", "conv_pwl", "bn3") };
        if let Some(hidden) = block.hidden {
            let expand = self.conv(c_in, hidden, 1, 1, 1);
            x = self.conv_bn(&at("conv_pw"), expand, &at("bn1"), x);
            x = self.b.activation(act, x);
        }
        let hidden = block.hidden.unwrap_or(c_in);
        let depthwise = self.conv(hidden, hidden, block.kernel, block.stride, hidden);
        x = self.conv_bn(&at("conv_dw"), depthwise, &at(bn_dw), x);
        x = self.b.activation(act, x);
        let conv = self.conv(hidden, block.c_out, 1, 1, 1);
        x = self.conv_bn(&at(project), conv, &at(bn_project), x);
        if block.skip && block.stride == 1 && c_in == block.c_out {
            x = self.b.push(at("add"), Op::Add, &[input, x]);
        }
        self.b.block(block.name.as_str(), input, first);
        x
    }
}
