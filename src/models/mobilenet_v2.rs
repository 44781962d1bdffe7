//! MobileNetV2 (Sandler et al., 2018) of any width, with timm's depth-scaled variants.

use super::{NetworkOptions, round_channels};
use crate::graph::{Activation, BatchNorm, Graph, GraphBuilder, NodeId, Op};
use crate::shape::Window;
use crate::{Error, Result};

/// Expansion, channels, repeats and stride of the seven stages (table 2 of the paper).
const STAGES: [(usize, usize, usize, usize); 7] =
    [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)];
const STEM_CHANNELS: f64 = 32.0;
const HEAD_CHANNELS: f64 = 1280.0;
const BATCH_NORM_EPS: f32 = 1e-5;
const BATCH_NORM_MOMENTUM: f32 = 0.1;

/// Width and depth of a MobileNetV2.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MobileNetV2 {
    /// Multiplies every channel count.
    pub width: f64,
    /// Multiplies every stage's repeats.
    pub depth: f64,
    /// Leaves stem, head, first and last stage unscaled, as timm's `110d` and `120d` do.
    pub fixed_ends: bool,
}

impl MobileNetV2 {
    /// Reads a name; `None` when it is another family's.
    pub fn parse(name: &str) -> Option<Result<Self>> {
        let plain = |width| Self { width, depth: 1.0, fixed_ends: false };
        let network = match name {
            "mobilenetv2_110d" => Some(Self { width: 1.1, depth: 1.2, fixed_ends: true }),
            "mobilenetv2_120d" => Some(Self { width: 1.2, depth: 1.4, fixed_ends: true }),
            _ => match (name.strip_prefix("mobilenetv2-"), name.strip_prefix("mobilenetv2_")) {
                (Some(width), _) => width.parse().ok().map(plain),
                (_, Some(percent)) => percent.parse::<u32>().ok().map(|p| plain(f64::from(p) / 100.0)),
                _ => return None,
            },
        };
        Some(network.filter(|n| n.width > 0.0 && n.width <= 8.0).ok_or_else(|| {
            Error::Config(format!("{name:?} has no usable width; write for example mobilenetv2-0.5 (0 < width <= 8)"))
        }))
    }

    /// The graph of this network.
    ///
    /// # Errors
    /// Options that do not fit, such as a number of stage strides other than seven or an image smaller than a kernel.
    pub fn graph(&self, name: &str, options: &NetworkOptions) -> Result<Graph> {
        let strides = match &options.stage_strides {
            Some(strides) if strides.len() != STAGES.len() => {
                let got = strides.len();
                return Err(Error::Config(format!("{name} has 7 stages, stage_strides lists {got}; give 7 numbers")));
            }
            Some(strides) => strides.clone(),
            None => STAGES.iter().map(|s| s.3).collect(),
        };
        if options.classes == 0 {
            return Err(Error::Config("a network needs at least one class".into()));
        }
        let scaled = |channels: f64| round_channels(channels * self.width);
        let ends = |channels: f64| if self.fixed_ends { channels as usize } else { scaled(channels) };

        let mut b = GraphBuilder::new(name, options.input);
        let mut c = ends(STEM_CHANNELS);
        let stem = GraphBuilder::conv(options.input.c, c, Window::square(3, options.input_stride.unwrap_or(2), 1), 1);
        let mut x = b.conv_bn(("conv_stem", stem), ("bn1", bn(c)), 0);
        x = b.activation(Activation::RELU6, x);
        for (stage, (&(expansion, channels, repeats, _), &stride)) in STAGES.iter().zip(&strides).enumerate() {
            let is_end = stage == 0 || stage == STAGES.len() - 1;
            let depth = if self.fixed_ends && is_end { 1.0 } else { self.depth };
            let c_out = scaled(channels as f64);
            for repeat in 0..(repeats as f64 * depth).ceil() as usize {
                let stride = if repeat == 0 { stride } else { 1 };
                x = block(&mut b, &format!("blocks.{stage}.{repeat}"), x, c, c_out, expansion, stride);
                c = c_out;
            }
        }
        let head = options.head_channels.unwrap_or_else(|| ends(HEAD_CHANNELS).max(HEAD_CHANNELS as usize));
        x = b.conv_bn(("conv_head", GraphBuilder::conv(c, head, Window::square(1, 1, 0), 1)), ("bn2", bn(head)), x);
        x = b.activation(Activation::RELU6, x);
        x = b.push("global_pool", Op::GlobalAvgPool, &[x]);
        b.linear("classifier", head, options.classes, x);
        b.finish()
    }
}

fn bn(channels: usize) -> BatchNorm {
    BatchNorm { channels, eps: BATCH_NORM_EPS, momentum: BATCH_NORM_MOMENTUM }
}

/// One inverted residual: expand, depthwise, project; without expansion it is the depthwise-separable block, whose
/// projection timm calls `conv_pw`.
fn block(
    b: &mut GraphBuilder,
    name: &str,
    input: NodeId,
    c_in: usize,
    c_out: usize,
    expansion: usize,
    stride: usize,
) -> NodeId {
    let act = Activation { mask: Some(b.next_block()), ..Activation::RELU6 };
    let first = b.next_node();
    let at = |suffix: &str| format!("{name}.{suffix}");
    let pointwise = Window::square(1, 1, 0);
    let mut x = input;
    let mut hidden = c_in;
    let (bn_dw, project, bn_project) =
        if expansion == 1 { ("bn1", "conv_pw", "bn2") } else { ("bn2", "conv_pwl", "bn3") };
    if expansion != 1 {
        hidden = round_channels((c_in * expansion) as f64);
        let expand = GraphBuilder::conv(c_in, hidden, pointwise, 1);
        x = b.conv_bn((&at("conv_pw"), expand), (&at("bn1"), bn(hidden)), x);
        x = b.activation(act, x);
    }
    let depthwise = GraphBuilder::conv(hidden, hidden, Window::square(3, stride, 1), hidden);
    x = b.conv_bn((&at("conv_dw"), depthwise), (&at(bn_dw), bn(hidden)), x);
    x = b.activation(act, x);
    let conv = GraphBuilder::conv(hidden, c_out, pointwise, 1);
    x = b.conv_bn((&at(project), conv), (&at(bn_project), bn(c_out)), x);
    if stride == 1 && c_in == c_out {
        x = b.push(at("add"), Op::Add, &[input, x]);
    }
    b.block(name, input, first);
    x
}
