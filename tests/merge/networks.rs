//! Small networks to merge.

use depthshrinker::graph::{Activation, BatchNorm, Bias, Conv, Graph, GraphBuilder, NodeId, Op, SiteId};
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::{Padding, Shape, Window};

pub const BN_EPS: f32 = 1e-5;

/// One convolution of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Member {
    pub c_out: usize,
    pub groups: usize,
    pub window: Window,
    pub bias: bool,
    pub bn: bool,
}

impl Member {
    /// A dense convolution with batch-norm.
    pub fn dense(c_out: usize, k: usize, stride: usize, pad: usize) -> Self {
        Self { c_out, groups: 1, window: Window::square(k, stride, pad), bias: false, bn: true }
    }

    /// A depthwise convolution with batch-norm.
    pub fn depthwise(c: usize, k: usize, stride: usize, pad: usize) -> Self {
        Self { groups: c, ..Self::dense(c, k, stride, pad) }
    }
}

pub fn bn(channels: usize, eps: f32) -> Op {
    Op::BatchNorm(BatchNorm { channels, eps, momentum: 0.1 })
}

pub fn conv(c_in: usize, member: &Member) -> Op {
    let bias = if member.bias { Bias::Channel } else { Bias::None };
    Op::Conv(Conv { c_in, c_out: member.c_out, window: member.window, groups: member.groups, bias })
}

/// A network of one linear block that `body` builds from its input's id, behind it pool and classifier.
pub fn one_block(
    input: Shape,
    c_out: usize,
    body: impl FnOnce(&mut GraphBuilder, NodeId),
) -> depthshrinker::Result<Graph> {
    let mut b = GraphBuilder::new("one-block", input);
    body(&mut b, NodeId::INPUT);
    b.block("block", NodeId::INPUT, NodeId::INPUT.next());
    let last = NodeId::new(b.next_node().index() - 1);
    let x = b.push("pool", Op::GlobalAvgPool, &[last]);
    b.linear("classifier", c_out, 3, x);
    b.finish()
}

/// Appends the members of a chain, `0`, `0.bn`, `1`, … and returns the last value.
pub fn push_chain(b: &mut GraphBuilder, mut x: NodeId, mut c: usize, members: &[Member]) -> NodeId {
    for (i, member) in members.iter().enumerate() {
        x = b.push(format!("{i}"), conv(c, member), &[x]);
        c = member.c_out;
        if member.bn {
            x = b.push(format!("{i}.bn"), bn(c, BN_EPS), &[x]);
        }
    }
    x
}

/// A network of one linear block that is a chain, perhaps with a residual over the whole.
pub fn chain(input: Shape, members: &[Member], residual: bool) -> depthshrinker::Result<Graph> {
    let c_out = members.last().map_or(input.c, |m| m.c_out);
    one_block(input, c_out, |b, input_id| {
        let x = push_chain(b, input_id, input.c, members);
        if residual {
            b.push("add", Op::Add, &[input_id, x]);
        }
    })
}

/// An active inverted-residual block: expand, depthwise k×k, project, masked ReLU6 in between.
pub fn inverted_residual(input: Shape, hidden: usize, c_out: usize, k: usize, stride: usize, pad: Padding) -> Graph {
    one_block(input, c_out, |b, input_id| {
        let act = Activation { site: Some(SiteId::new(0)), ..Activation::RELU6 };
        let window = Window { pad, ..Window::square(k, stride, 0) };
        let depthwise = Member { window, ..Member::depthwise(hidden, k, stride, 0) };
        let mut x = input_id;
        for (name, c, member) in [
            ("expand", input.c, Member::dense(hidden, 1, 1, 0)),
            ("depthwise", hidden, depthwise),
            ("project", hidden, Member::dense(c_out, 1, 1, 0)),
        ] {
            x = b.push(name, conv(c, &member), &[x]);
            x = b.push(format!("{name}.bn"), bn(member.c_out, BN_EPS), &[x]);
            if name != "project" {
                x = b.activation(act, x);
            }
        }
        let same = window.output(input.h, input.w) == Some((input.h, input.w));
        if same && input.c == c_out {
            b.push("add", Op::Add, &[input_id, x]);
        }
    })
    .unwrap()
}

/// A MobileNetV2 that is small enough for seven loops.
pub fn tiny_mobilenet() -> Graph {
    let options = NetworkOptions {
        input_stride: Some(1),
        stage_strides: Some(vec![1, 2, 1, 2, 1, 1, 1]),
        head_channels: Some(16),
        ..NetworkOptions::new(Shape::new(11, 9, 2), 4)
    };
    build("mobilenetv2-0.1", &options).unwrap()
}
