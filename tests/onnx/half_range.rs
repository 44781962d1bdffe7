//! What passes the range of f16 is named, is wrong in a file in f16, and is right where it stays in f32.

use depthshrinker::dtype::Dtype;
use depthshrinker::graph::{Activation, BatchNorm, Bias, Conv, Dropout, GraphBuilder, MaxPool, NodeId, Op};
use depthshrinker::io::layout::nchw_to_nhwc;
use depthshrinker::io::onnx::{HalfRange, LARGEST_F16, OnnxPrecision, Overflow};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::{Shape, Window};
use libtest_mimic::{Failed, Trial};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::oracle::{BATCHES, Evaluator, evaluate};
use crate::{TOLERANCE_F16, engine_logits, error_of, random_model};

/// What becomes of a file all in f16.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Half {
    /// Logits are not finite, or far off.
    Wrong,
    /// Logits are right, since an activation cuts what is infinite.
    Right,
    /// Nothing is written, since a weight is beyond the range.
    Refused,
}

/// A network, the range of its images, and what passes the range of f16: nodes, and parameters by their full names.
struct Row {
    name: &'static str,
    model: fn() -> Result<Model, Failed>,
    images: (f32, f32),
    overflows: &'static [&'static str],
    half: Half,
}

const fn row(name: &'static str, model: fn() -> Result<Model, Failed>, overflows: &'static [&'static str]) -> Row {
    Row { name, model, images: (-2.0, 2.0), overflows, half: Half::Wrong }
}

const ROWS: [Row; 14] = [
    row("conv", || chain(grow, 6e4), &["grow"]),
    // What is large is below 0 everywhere.
    Row { images: (0.5, 2.0), ..row("negative", || chain(sink, 6e4), &["sink"]) },
    // Both terms fit, their sum does not.
    row("sum", || chain(double, 3e4), &["sum"]),
    row("relu", || chain(|b, x| activate(b, x, None, 0.0), 6e4), &["grow", "grow.act"]),
    row("leaky", || chain(|b, x| activate(b, x, None, 0.5), 6e4), &["grow", "grow.act"]),
    Row { half: Half::Right, ..row("cut", || chain(|b, x| activate(b, x, Some(6e4), 0.0), 6e4), &["grow"]) },
    // The file has no operator for these two.
    row("identity", || chain(|b, x| activate(b, x, None, 1.0), 6e4), &["grow", "grow.act"]),
    row("dropout", || chain(drop_out, 6e4), &["grow", "drop"]),
    row("max_pool", || chain(max_pool, 6e4), &["grow", "max_pool"]),
    row("batch_norm", || chain(lone_batch_norm, 6e4), &["norm"]),
    // What comes of it fits, but the file adds the map to sums that do not.
    Row { images: (0.9, 1.1), ..row("bias_map", || chain(bias_map, 6e4), &["grow"]) },
    Row { images: (-2e5, 2e5), ..row("input", || chain(grow, 1e-5), &["input"]) },
    Row { images: (-1e-3, 1e-3), half: Half::Refused, ..row("weight", || chain(grow, 1e6), &["grow.weight"]) },
    row("mobilenet", mobilenet, &["blocks.6.0.conv_pwl"]),
];

const CHANNELS: usize = 4;
const ONE: Window = Window::square(1, 1, 0);

/// The input, what is to be seen, a convolution that brings its values down, and a classifier. What is called `grow`
/// multiplies by ±`factor`, `sink` by −`factor`.
fn chain(middle: fn(&mut GraphBuilder, NodeId) -> NodeId, factor: f32) -> Result<Model, Failed> {
    let mut b = GraphBuilder::new("chain", Shape::new(6, 5, CHANNELS));
    let x = middle(&mut b, NodeId::INPUT);
    let x = b.push("down", Op::Conv(GraphBuilder::conv(CHANNELS, 8, ONE, 1)), &[x]);
    let x = b.push("pool", Op::GlobalAvgPool, &[x]);
    b.linear("classifier", 8, 3, x);
    let mut model = random_model(b.finish()?, 5)?;
    let weights = &mut model.weights;
    let mut set = |name: &str, value: &dyn Fn(usize) -> f32| {
        if let Some(tensor) = weights.get_mut(name) {
            tensor.data.iter_mut().enumerate().for_each(|(i, v)| *v = value(i));
        }
    };
    let is_mapped = model.graph.nodes.iter().any(|n| matches!(n.op, Op::Conv(conv) if conv.bias == Bias::Map));
    let sign = |i: usize| if is_mapped || i.is_multiple_of(2) { 1.0 } else { -1.0 };
    set("down.weight", &|i| [2e-5, -1e-5, 3e-5][i % 3] * 6e4 / factor.clamp(1.0, 6e4));
    set("grow.weight", &|i| factor * sign(i));
    set("grow.bias_map", &|_| -factor);
    set("sink.weight", &|_| -factor);
    set("norm.weight", &|i| factor * sign(i));
    set("norm.running_var", &|_| 1.0);
    Ok(model)
}

fn grow(b: &mut GraphBuilder, x: NodeId) -> NodeId {
    b.push("grow", Op::Conv(GraphBuilder::conv(CHANNELS, CHANNELS, ONE, CHANNELS)), &[x])
}

fn sink(b: &mut GraphBuilder, x: NodeId) -> NodeId {
    b.push("sink", Op::Conv(GraphBuilder::conv(CHANNELS, CHANNELS, ONE, CHANNELS)), &[x])
}

fn bias_map(b: &mut GraphBuilder, x: NodeId) -> NodeId {
    let conv = Conv { bias: Bias::Map, ..GraphBuilder::conv(CHANNELS, CHANNELS, ONE, CHANNELS) };
    b.push("grow", Op::Conv(conv), &[x])
}

fn double(b: &mut GraphBuilder, x: NodeId) -> NodeId {
    let x = grow(b, x);
    b.push("sum", Op::Add, &[x, x])
}

fn activate(b: &mut GraphBuilder, x: NodeId, limit: Option<f32>, slope: f32) -> NodeId {
    let x = grow(b, x);
    b.activation(Activation { limit, slope, site: None }, x)
}

fn drop_out(b: &mut GraphBuilder, x: NodeId) -> NodeId {
    let x = grow(b, x);
    b.push("drop", Op::Dropout(Dropout { p: 0.5 }), &[x])
}

fn max_pool(b: &mut GraphBuilder, x: NodeId) -> NodeId {
    let x = grow(b, x);
    b.push("max_pool", Op::MaxPool(MaxPool { window: Window::square(2, 1, 0) }), &[x])
}

fn lone_batch_norm(b: &mut GraphBuilder, x: NodeId) -> NodeId {
    b.push("norm", Op::BatchNorm(BatchNorm { channels: CHANNELS, eps: 1e-3, momentum: 0.1 }), &[x])
}

/// A real network whose last block gives large values, which the head's weights bring down again.
fn mobilenet() -> Result<Model, Failed> {
    const FACTOR: f32 = 1e5;
    let graph = build("mobilenetv2-0.5", &NetworkOptions::new(Shape::new(64, 64, 3), 5))?;
    let mut model = random_model(graph, 1)?;
    let [gamma, mean] = ["weight", "running_mean"].map(|of| format!("blocks.6.0.bn3.{of}"));
    // Without a mean the folded bias stays small.
    for (name, factor) in [(&*gamma, FACTOR), (&*mean, 0.0), ("conv_head.weight", 1.0 / FACTOR)] {
        model.weights.get_mut(name).ok_or(name)?.data.iter_mut().for_each(|w| *w *= factor);
    }
    Ok(model)
}

/// What is found on images `[n, c, h, w]`.
fn find(model: &Model, images: &[f32]) -> Result<Vec<Overflow>, Failed> {
    let shape = model.graph.input_shape();
    let mut range = HalfRange::new(model)?;
    for image in images.chunks(shape.len()) {
        range.add(&nchw_to_nhwc(image, shape.c, shape.pixels()))?;
    }
    Ok(range.overflows())
}

fn images_of(model: &Model, (low, high): (f32, f32)) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let count = BATCHES.iter().sum::<usize>() * model.graph.input_shape().len();
    (0..count).map(|_| rng.random_range(low..high)).collect()
}

fn run(row: &Row) -> Result<(), Failed> {
    let model = (row.model)()?;
    let images = images_of(&model, row.images);
    let found = find(&model, &images)?;
    let names: Vec<&str> = found.iter().map(|overflow| overflow.param.as_deref().unwrap_or(&overflow.node)).collect();
    assert_eq!(names, row.overflows);
    assert!(found.iter().all(|overflow| overflow.largest > LARGEST_F16), "{found:?}");

    let expected = engine_logits(&model, &images)?;
    let all_half = OnnxPrecision::from(Dtype::F16);
    let half = evaluate(&model, &all_half, &images, Evaluator::Reference);
    let error = half.and_then(|half| error_of(&half.logits, &expected));
    match (row.half, &error) {
        (Half::Wrong, Ok(error)) => assert!(*error > 10.0 * TOLERANCE_F16, "f16 holds it: {error}"),
        (Half::Wrong, Err(error)) => assert!(format!("{error:?}").contains("finite logits"), "{error:?}"),
        (Half::Right, error) => assert!(matches!(error, Ok(e) if *e <= TOLERANCE_F16), "{error:?}"),
        (Half::Refused, error) => {
            let text = format!("{:?}", error.as_ref().err());
            assert!(text.contains(row.overflows[0]) && text.contains("--keep-f32 grow"), "{text}");
        }
    }

    let kept = OnnxPrecision { in_f32: found.iter().map(|overflow| overflow.node.clone()).collect(), ..all_half };
    for by in [Evaluator::Reference, Evaluator::Runtime] {
        let got = evaluate(&model, &kept, &images, by)?;
        let error = error_of(&got.logits, &expected)?;
        eprintln!("{}: {by:?} {error:.1e}", row.name);
        assert!(error <= TOLERANCE_F16, "{by:?}: differs by {error:.1e}");
        assert!(got.initializers[1] > 0, "the rest is in f16");
        assert!(got.operators.iter().any(|operator| operator == "Cast"), "{:?}", got.operators);
    }
    Ok(())
}

/// The numbers that are named are the values': here sums of twice ±30 000 times a pixel.
fn largest_values() -> Result<(), Failed> {
    let model = chain(double, 3e4)?;
    let images = images_of(&model, (-2.0, 2.0));
    let pixel = images.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let [sum] = &find(&model, &images)?[..] else { return Err("the sum alone".into()) };
    assert!((sum.largest / (6e4 * pixel) - 1.0).abs() < 1e-6, "{sum}");
    assert_eq!(sum.to_string(), format!("sum (add) reaches {:.3e}", sum.largest));
    // Images on which nothing is large.
    let dim: Vec<f32> = images.iter().map(|x| x / 2.0).collect();
    assert_eq!(find(&model, &dim)?, []);
    Ok(())
}

/// A value that several nodes read in f32 is cast once, and one that stays in f16 not at all.
fn casts() -> Result<(), Failed> {
    let model = mobilenet()?;
    let images = images_of(&model, (-2.0, 2.0));
    let casts = |names: &[&str]| -> Result<usize, Failed> {
        let in_f32 = names.iter().map(|&name| name.to_owned()).collect();
        let precision = OnnxPrecision { dtype: Dtype::F16, in_f32 };
        let operators = evaluate(&model, &precision, &images, Evaluator::Runtime)?.operators;
        Ok(operators.iter().filter(|operator| *operator == "Cast").count())
    };
    assert_eq!(casts(&[])?, 2, "the input's and the logits'");
    // Into the kept node, and out of its reader.
    assert_eq!(casts(&["blocks.6.0.conv_pwl"])?, 4);
    // The logits come in f32 already; their features are widened.
    assert_eq!(casts(&["classifier"])?, 2);
    // The first convolution reads the image as it is and gives f16.
    assert_eq!(casts(&["input"])?, 2);
    // None between a kept node and its kept reader; one value is widened for the sum, and the next sum reads in f32 too.
    assert_eq!(casts(&["blocks.2.0.conv_pwl", "blocks.2.1.conv_pw", "blocks.2.1.add"])?, 8);
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> =
        ROWS.iter().map(|row| Trial::test(format!("half_range/{}", row.name), move || run(row))).collect();
    trials.push(Trial::test("half_range/largest", largest_values));
    trials.push(Trial::test("half_range/casts", casts));
    trials
}
