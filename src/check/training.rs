//! Whole training steps: everything between the images and the updated weights, as it is and as one recorded graph.

use super::{Case, On, Output, numbers};
use crate::Result;
use crate::device::Device;
use crate::dtype::Dtype;
use crate::engine::Fusion;
use crate::graph::{Activation, BatchNorm, Bias, Conv, Graph, GraphBuilder, MaxPool, NodeId, Op, SiteId};
use crate::model::Model;
use crate::networks::{NetworkOptions, build};
use crate::ops::optimizer::{Optimizer, Update};
use crate::shape::{Shape, Window};
use crate::train::{StepBatch, StepImages, StepOptions, StepSettings, TrainStep};

/// Steps of a case: the first as it is, the second recorded, the third replayed.
const STEPS: usize = 3;

pub(super) fn cases() -> Vec<Case> {
    let case = |name: &str, graph: fn() -> Result<Graph>| {
        Case::new(format!("training/{name}"), move |on| training_case(graph()?, on))
    };
    vec![case("mobilenetv2", mobilenet), case("pooled", pooled)]
}

/// The losses and score gradients, and how far those of a recorded run are from them, which is not at all.
fn training_case(graph: Graph, on: &On<'_>) -> Result<Vec<Output>> {
    let run = |recorded| train(on.device, Fusion::OnLoad, graph.clone(), STEPS, recorded);
    let (plain, recorded) = (run(false)?, run(true)?);
    let losses = |trained: &Trained| trained.losses.iter().map(|&loss| loss as f32).collect::<Vec<f32>>();
    let difference = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a - b).collect();
    // Each step adds to what the ones before it rounded.
    let mut outputs = vec![
        Output::float("recorded loss", difference(&losses(&plain), &losses(&recorded)), 0),
        Output::float("recorded scores", difference(&plain.scores.concat(), &recorded.scores.concat()), 0),
        Output::derived("loss", losses(&plain), 2500, 16.0),
    ];
    if on.inputs == Dtype::F32 {
        // Rounding moves a value across an activation's bound on every second set of images, and a score with it by a hundredth of
        // the largest; in 16 bits, and after a few steps, it moves many.
        outputs.push(Output::float("scores", plain.scores[0].clone(), 400_000_000));
    }
    Ok(outputs)
}

const CLASSES: usize = 10;

/// A small MobileNetV2 with every kind of block.
///
/// # Errors
/// None that can be expected.
pub fn mobilenet() -> Result<Graph> {
    let options = NetworkOptions {
        input_stride: Some(1),
        stage_strides: Some(vec![1, 2, 1, 1, 1, 1, 1]),
        head_channels: Some(64),
        ..NetworkOptions::new(Shape::new(12, 10, 1), CLASSES)
    };
    build("mobilenetv2-0.25", &options)
}

/// What ResNet and VGG have beside: max-pools, a biased convolution in front of a batch-norm, a projection, ReLU.
///
/// # Errors
/// None that can be expected.
pub fn pooled() -> Result<Graph> {
    let mut b = GraphBuilder::new("pooled", Shape::new(13, 10, 1));
    let bn = |channels| BatchNorm { channels, eps: 1e-5, momentum: 0.1 };
    let act = Activation { site: Some(SiteId::new(0)), ..Activation::RELU };
    let biased = Conv { bias: Bias::Channel, ..GraphBuilder::conv(1, 8, Window::square(3, 1, 1), 1) };
    let mut x = b.push("stem", Op::Conv(biased), &[NodeId::INPUT]);
    x = b.push("stem_bn", Op::BatchNorm(bn(8)), &[x]);
    x = b.activation(Activation::RELU, x);
    let input = b.push("pool", Op::MaxPool(MaxPool { window: Window::square(3, 2, 1) }), &[x]);
    let first = b.next_node();
    let shortcut = GraphBuilder::conv(8, 12, Window::square(1, 2, 0), 1);
    let shortcut = b.conv_bn(("shortcut", shortcut), ("shortcut_bn", bn(12)), input);
    x = b.conv_bn(("a", GraphBuilder::conv(8, 12, Window::square(3, 2, 1), 1)), ("a_bn", bn(12)), input);
    x = b.activation(act, x);
    x = b.conv_bn(("b", GraphBuilder::conv(12, 12, Window::square(3, 1, 1), 1)), ("b_bn", bn(12)), x);
    x = b.push("add", Op::Add, &[shortcut, x]);
    x = b.activation(Activation::RELU, x);
    b.block("block", input, first);
    x = b.push("second_pool", Op::MaxPool(MaxPool { window: Window::square(2, 2, 0) }), &[x]);
    x = b.push("mean", Op::GlobalAvgPool, &[x]);
    b.linear("classifier", 12, CLASSES, x);
    b.finish()
}

/// What came of some training steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    /// Mean loss of every step.
    pub losses: Vec<f64>,
    /// Score gradients of every step, one per block.
    pub scores: Vec<Vec<f32>>,
}

/// Takes steps on one batch, clipped, as a training run takes them: each step as it is, or recorded and replayed.
///
/// # Errors
/// When the device fails.
pub fn train(device: &Device, fusion: Fusion, graph: Graph, steps: usize, recorded: bool) -> Result<Trained> {
    let model = Model::initialise(graph, 3)?;
    let batch = 8;
    let optimizer = Optimizer::default();
    let options = StepOptions { batch, fusion, optimizer, label_smoothing: 0.1, distillation: None, recorded };
    let mut step = TrainStep::new(std::slice::from_ref(device), &model, &options)?;
    step.collect_score_gradients(true);
    let images = numbers(9, batch * model.graph.input_shape().len());
    let labels: Vec<u32> = (0..batch as u32).map(|i| i * 3 % 10).collect();
    let batch = StepBatch { images: StepImages::Normalised(&images), labels: &labels };
    let (mut losses, mut scores) = (Vec::new(), Vec::new());
    for at in 0..steps {
        let slopes: Vec<f32> = (0..model.graph.sites()).map(|b| f32::from((b + at) % 3 == 0)).collect();
        step.set_slopes(&slopes)?;
        // The learning rate changes too, so that a replay with the first one would show.
        let update = Update { lr: 0.001 + 1e-5 * at as f32, weight_decay: 1e-4, clip_norm: 5.0 };
        let taken = step.run(&batch, StepSettings { seed: 5, step: at as u64, update })?;
        losses.push(taken.loss.loss / taken.images as f64);
        scores.push(step.score_gradients()?);
    }
    Ok(Trained { losses, scores })
}
