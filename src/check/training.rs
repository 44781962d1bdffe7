//! Whole training steps: everything between the images and the updated weights, as it is and as one recorded graph.

use super::{Case, On, Output, numbers};
use crate::Result;
use crate::device::{Device, Recording, View};
use crate::dtype::Dtype;
use crate::engine::{Engine, EngineOptions, Fusion};
use crate::graph::{Activation, BatchNorm, Bias, Conv, Graph, GraphBuilder, MaxPool, Op};
use crate::model::Model;
use crate::networks::{NetworkOptions, build};
use crate::ops::loss::{Gradient, LossRecord, cross_entropy};
use crate::ops::optimizer::{Optimizer, OptimizerState, Span, Update};
use crate::shape::{Shape, Window};

/// Steps of a case: the first as it is, the second recorded, and more that are replayed.
const STEPS: usize = 4;

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
        // In 16 bits, and after a few steps, they depend on which activations rounding has moved across a bound.
        outputs.push(Output::float("scores", plain.scores[0].clone(), 100_000));
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
    let act = Activation { mask: Some(0), ..Activation::RELU };
    let biased = Conv { bias: Bias::Channel, ..GraphBuilder::conv(1, 8, Window::square(3, 1, 1), 1) };
    let mut x = b.push("stem", Op::Conv(biased), &[0]);
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
    let n = 8;
    let options = EngineOptions { batch: n, fusion, training: true, taps: Vec::new() };
    let mut engine = Engine::new(device, &model, &options)?;
    let params = engine.params().to_vec();
    let ranges = engine.trainable_ranges().to_vec();
    let spans = ranges.into_iter().map(|(p, range)| Span { range, decayed: params[p].role.is_decayed() }).collect();
    let len = engine.trainable().0.len();
    let mut state = OptimizerState::new(device, Optimizer::default(), spans, len)?;
    let mut d_logits = device.activations(n * CLASSES)?;
    let images = numbers(9, n * model.graph.input_shape().len());
    let labels: Vec<u32> = (0..n as u32).map(|i| i * 3 % 10).collect();
    let (mut losses, mut scores, mut recording) = (Vec::new(), Vec::new(), Recording::default());
    let mut record = LossRecord::new(device, n, CLASSES)?;
    for step in 0..steps {
        let slopes: Vec<f32> = (0..model.graph.blocks.len()).map(|b| f32::from((b + step) % 3 == 0)).collect();
        engine.set_slopes(&slopes)?;
        engine.collect_score_gradients(true);
        engine.set_loss_scale(state.loss_scale());
        engine.set_step(5, step as u64)?;
        engine.set_images(View::Host(&images))?;
        record.begin(&labels)?;
        // The learning rate changes too, so that a replay with the first one would show.
        state.begin(Update { lr: 0.001 + 1e-5 * step as f32, weight_decay: 1e-4, clip_norm: 5.0 })?;
        let mut pass = || {
            let logits = engine.run()?.view(0..n * CLASSES);
            let to = d_logits.view_mut(0..n * CLASSES);
            let gradient = Gradient { to, scale: state.loss_scale_at() };
            cross_entropy(&mut record, logits, 0.1, Some(gradient))?;
            engine.backward(&d_logits)?;
            let (weights, gradients, copy) = engine.for_update();
            state.update(weights, gradients, copy)
        };
        if recorded {
            // SAFETY: everything the pass uses lives as long as the recording.
            unsafe { recording.run(device, pass)? };
        } else {
            pass()?;
        }
        losses.push(record.sum()?.loss / n as f64);
        scores.push(engine.score_gradients()?);
        state.finish()?;
    }
    Ok(Trained { losses, scores })
}
