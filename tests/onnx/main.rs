//! Exported networks pass the ONNX checker and give the engine's logits in ONNX Runtime: original, with activations
//! half gone, and merged; with what passes the range of f16 in f32; and without subnormal numbers. `bench` times them there.

mod bench;
#[path = "../formula/mod.rs"]
mod formula;
mod half_range;
mod oracle;
mod subnormal;

use depthshrinker::device::Device;
use depthshrinker::dtype::Dtype;
use depthshrinker::graph::{
    Activation, AvgPool, BatchNorm, Bias, Conv, Dropout, Graph, GraphBuilder, MaxPool, NodeId, Op, Pad, ParamRole,
};
use depthshrinker::io::ModelInfo;
use depthshrinker::io::layout::nchw_to_nhwc;
use depthshrinker::io::onnx::{OnnxPrecision, to_onnx};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::pipeline::logits;
use depthshrinker::shape::{Padding, Shape, Window};
use depthshrinker::shrink::merge::{MergeOptions, Merged, merge};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::published_mask;
use depthshrinker::shrink::surgery::{Linearise, linearise};
use formula::published;
use libtest_mimic::{Arguments, Failed, Trial};
use oracle::{BATCHES, Evaluator, VARIABLE, evaluate};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

/// Largest difference of logits, relative to the largest of them. f16 keeps 11 bits, and errors of some fifty layers
/// add up.
const TOLERANCE_F32: f32 = 1e-4;
const TOLERANCE_F16: f32 = 2e-2;

/// A network with random weights.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    side: usize,
    head_channels: Option<usize>,
    /// How many random masks are merged.
    merges: u64,
    padding: PaddingMode,
}

/// A network whose blocks keep their padding when they merge.
const fn border_bias(name: &'static str, side: usize, merges: u64) -> Case {
    Case { name, side, head_channels: None, merges, padding: PaddingMode::BorderBias }
}

const CASES: [Case; 8] = [
    border_bias("mobilenetv2-1.0", 64, 4),
    border_bias("mobilenetv2-1.4", 96, 2),
    border_bias("tf_efficientnet_lite0", 75, 2),
    border_bias("mnasnet-0.5", 64, 2),
    border_bias("metapruning-mbv2-105m", 64, 2),
    border_bias("layermerge-mbv2-1.0-13.4", 64, 2),
    Case { padding: PaddingMode::Reorder, ..border_bias("resnet34", 64, 2) },
    Case { padding: PaddingMode::Reorder, head_channels: Some(64), ..border_bias("vgg19_bn", 64, 1) },
];

/// Weights that keep activations of order one, with batch-norms that are not the identity.
fn random_model(graph: Graph, seed: u64) -> Result<Model, Failed> {
    let mut model = Model::initialise(graph, seed)?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for spec in model.graph.params()? {
        let range = match spec.role {
            ParamRole::BnWeight | ParamRole::RunningVar => 0.7..1.3,
            ParamRole::BnBias | ParamRole::RunningMean | ParamRole::LinearBias | ParamRole::ConvBiasMap => -0.4..0.4,
            ParamRole::ConvBias => -0.4..0.4,
            ParamRole::LinearWeight | ParamRole::ConvWeight(_) => continue,
        };
        let tensor = model.weights.get_mut(&spec.name).ok_or("a parameter has a tensor")?;
        tensor.data.iter_mut().for_each(|x| *x = rng.random_range(range.clone()));
    }
    Ok(model)
}

/// Exports, checks, runs on both sides; the largest difference relative to the largest logit, and the operators.
fn difference(model: &Model, precision: Dtype, seed: u64) -> Result<(f32, Vec<String>), Failed> {
    difference_from(model, model, precision, seed)
}

/// As [`difference`], with one network in ONNX Runtime and another one in the engine.
fn difference_from(exported: &Model, model: &Model, precision: Dtype, seed: u64) -> Result<(f32, Vec<String>), Failed> {
    let images = random_images(model, seed);
    let expected = engine_logits(model, &images)?;
    let got = evaluate(exported, &precision.into(), &images, Evaluator::Runtime)?;
    Ok((error_of(&got.logits, &expected)?, got.operators))
}

/// As many images `[n, c, h, w]` as the oracle takes.
fn random_images(model: &Model, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let count = BATCHES.iter().sum::<usize>() * model.graph.input_shape().len();
    (0..count).map(|_| rng.random_range(-2.0..2.0)).collect()
}

/// Logits of images `[n, c, h, w]` in the engine.
fn engine_logits(model: &Model, images: &[f32]) -> Result<Vec<f32>, Failed> {
    let shape = model.graph.input_shape();
    Ok(logits(&Device::Cpu, model, &nchw_to_nhwc(images, shape.c, shape.pixels()))?)
}

/// The largest difference relative to the largest logit expected.
fn error_of(got: &[f32], expected: &[f32]) -> Result<f32, Failed> {
    if got.len() != expected.len() || got.iter().any(|x| !x.is_finite()) {
        let finite = got.iter().filter(|x| x.is_finite()).count();
        return Err(format!("{finite} finite logits of {}, expected {}", got.len(), expected.len()).into());
    }
    let scale = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let error = got.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    Ok(error / scale)
}

/// Both precisions agree; the operators of the f32 graph.
fn agrees(what: &str, model: &Model, seed: u64) -> Result<Vec<String>, Failed> {
    let (single, operators) = difference(model, Dtype::F32, seed)?;
    let (half, _) = difference(model, Dtype::F16, seed)?;
    eprintln!("{what}: f32 {single:.1e}, f16 {half:.1e}");
    if single > TOLERANCE_F32 || half > TOLERANCE_F16 {
        return Err(format!("{what}: differs by {single:.1e} in f32, {half:.1e} in f16").into());
    }
    Ok(operators)
}

fn network(case: &Case) -> Result<(), Failed> {
    let Case { name, side, head_channels, merges, padding } = *case;
    let options = NetworkOptions { head_channels, ..NetworkOptions::new(Shape::new(side, side, 3), 5) };
    let graph = build(name, &options)?;
    let mut model = random_model(graph, 1)?;
    let operators = agrees(name, &model, 0)?;
    if operators.iter().any(|o| o == "BatchNormalization" || o == "Cast") {
        return Err("batch-norms must be folded and f32 needs no cast".into());
    }
    let convs = |operators: &[String]| operators.iter().filter(|o| *o == "Conv").count();
    for seed in 0..merges {
        let mut rng = ChaCha8Rng::seed_from_u64(100 + seed);
        let kept: Vec<bool> = model.graph.blocks.iter().map(|_| rng.random_bool(0.5)).collect();
        let surgery = Linearise { final_activation: true, padding };
        let unmerged = linearise(&model, &kept, &surgery)?;
        agrees(&format!("{name}, {kept:?} linear"), &unmerged, seed)?;
        let Merged { model: merged, segments, .. } = merge(&unmerged, &MergeOptions { padding })?;
        let after = agrees(&format!("{name}, {} of {} blocks merged", segments.len(), kept.len()), &merged, seed)?;
        if convs(&after) >= convs(&operators) {
            return Err("the merged network must have fewer convolutions".into());
        }
    }
    // Activations on their way out: a slope between 0 and 1.
    for node in &mut model.graph.nodes {
        if let Op::Activation(activation) = &mut node.op
            && let Some(site) = activation.site
        {
            activation.slope = [0.0, 0.3, 0.85, 1.0][site.index() % 4];
        }
    }
    agrees(&format!("{name}, slopes"), &model, 7).map(drop)
}

/// The published masks that free the stem's activation: what is merged computes in the engine what the unmerged network
/// computes in ONNX Runtime, with stem and first block in one 7×7 convolution for D.
fn published_with_stem() -> Result<(), Failed> {
    let graph = build("mobilenetv2-1.4", &NetworkOptions::new(Shape::new(96, 96, 3), 5))?;
    let model = random_model(graph, 1)?;
    for (name, kernel) in [("a", 3), ("d", 7), ("e", 3)] {
        let mask = published_mask(&format!("mbv2-1.4-ds-{name}"))?;
        let padding = PaddingMode::Reorder;
        let unmerged = linearise(&model, &mask, &Linearise { final_activation: true, padding })?;
        let merged = merge(&unmerged, &MergeOptions { padding })?;
        assert_eq!(merged.segments[0].kernel, [kernel; 2], "{name}");
        let (error, _) = difference_from(&unmerged, &merged.model, Dtype::F32, 3)?;
        eprintln!("mask {name}: {error:.1e}");
        if error > TOLERANCE_F32 {
            return Err(format!("mask {name}: differs by {error:.1e}").into());
        }
    }
    Ok(())
}

/// Published networks, and what others merge into, exported: ONNX Runtime's logits are PyTorch's. Of masks one a width,
/// which frees the first block.
fn published_networks() -> Result<(), Failed> {
    let is_taken = |row: &Value| row["mask"].as_str().is_some_and(|mask| mask.ends_with("-ec-cr"));
    let masks = published::rows("masks").into_iter().filter(is_taken).collect::<Vec<_>>();
    assert_eq!(masks.len(), 2);
    for row in published::rows("networks").iter().chain(&masks) {
        for case in published::cases(row) {
            let images = formula::images(published::IMAGES, case.side);
            // The oracle runs one image, then two.
            let first = images.len() / published::IMAGES;
            let of_batches = [&images[..first], &images].concat();
            let got = evaluate(&case.model, &Dtype::F32.into(), &of_batches, Evaluator::Runtime)?;
            let logits: Vec<f32> = case.logits.iter().map(|&v| v as f32).collect();
            let error = error_of(&got.logits, &[&logits[..published::CLASSES], &logits].concat())?;
            eprintln!("{}: {error:.1e}", case.what);
            if error > TOLERANCE_F32 {
                return Err(format!("{} differs by {error:.1e}", case.what).into());
            }
        }
    }
    Ok(())
}

/// Everything a graph can hold that the networks above do not.
fn rare_nodes() -> Result<(), Failed> {
    let mut b = GraphBuilder::new("rare", Shape::new(13, 10, 4));
    let bn = |channels| Op::BatchNorm(BatchNorm { channels, eps: 1e-3, momentum: 0.1 });
    let pad = Padding { top: 0, left: 2, bottom: 3, right: 1 };
    let uneven = Window { k_h: 3, k_w: 5, stride_h: 2, stride_w: 1, pad };
    let first = b.push("bn_of_input", bn(4), &[NodeId::INPUT]);
    let dense = b.push("dense", Op::Conv(Conv { bias: Bias::Map, ..GraphBuilder::conv(4, 6, uneven, 2) }), &[first]);
    let x = b.push("bn_of_map", bn(6), &[dense]);
    let relu = b.activation(Activation { limit: None, ..Activation::RELU6 }, x);
    let leaky = b.activation(Activation { limit: None, slope: 0.1, site: None }, dense);
    let sum = b.push("sum", Op::Add, &[relu, leaky]);
    let wide = Conv { bias: Bias::Channel, ..GraphBuilder::conv(6, 12, Window::square(3, 1, 1), 6) };
    let x = b.push("two_per_channel", Op::Conv(wide), &[sum]);
    let odd =
        Window { k_h: 3, k_w: 2, stride_h: 2, stride_w: 1, pad: Padding { top: 2, left: 0, bottom: 1, right: 1 } };
    let x = b.push("max_pool", Op::MaxPool(MaxPool { window: odd }), &[x]);
    let x = b.push("avg_pool", Op::AvgPool(AvgPool { window: odd }), &[x]);
    let x = b.push("pad", Op::Pad(Pad { top: 2, left: -1, bottom: -1, right: 3 }), &[x]);
    let x = b.push("drop", Op::Dropout(Dropout { p: 0.5 }), &[x]);
    let x = b.push("pool", Op::GlobalAvgPool, &[x]);
    b.linear("classifier", 12, 3, x);
    let operators = agrees("rare nodes", &random_model(b.finish()?, 3)?, 0)?;
    if operators.iter().filter(|o| *o == "BatchNormalization").count() == 2 {
        return Ok(());
    }
    Err(format!("both batch-norms stay: {operators:?}").into())
}

fn refusals() -> Result<(), Failed> {
    let graph = build("mobilenetv2-0.1", &NetworkOptions::new(Shape::new(32, 32, 3), 5))?;
    let mut model = random_model(graph, 1)?;
    let refusal = |model: &Model, precision: Dtype| match to_onnx(model, &ModelInfo::default(), &precision.into()) {
        Ok(_) => Err(Failed::from("must be refused")),
        Err(error) => Ok(error.to_string()),
    };
    assert!(refusal(&model, Dtype::Bf16)?.contains("--precision f32 or f16"));
    model.weights.get_mut("classifier.bias").ok_or("it has one")?.data[1] = 1e6;
    let text = refusal(&model, Dtype::F16)?;
    assert!(text.contains("classifier.bias has numbers beyond the range of f16"), "{text}");
    assert!(text.contains("--keep-f32 classifier"), "{text}");
    let in_f32 = |name: &str| OnnxPrecision { dtype: Dtype::F16, in_f32: [name.to_owned()].into() };
    assert!(to_onnx(&model, &ModelInfo::default(), &in_f32("classifier")).is_ok(), "the remedy works");
    let unknown = to_onnx(&model, &ModelInfo::default(), &in_f32("bn1")).map(drop).unwrap_err().to_string();
    assert!(unknown.contains("has no node bn1") && unknown.contains("batch-norm"), "{unknown}");
    assert_eq!(
        to_onnx(&model, &ModelInfo::default(), &Dtype::F32.into())?,
        to_onnx(&model, &ModelInfo::default(), &Dtype::F32.into())?
    );
    Ok(())
}

fn main() {
    let arguments = Arguments::from_args();
    // `tests/run` brings the oracle; a bare `cargo test` may do without.
    let missing = std::env::var_os(VARIABLE).is_none();
    let mut trials =
        vec![Trial::test("refusals", refusals), Trial::test("rare_nodes", rare_nodes).with_ignored_flag(missing)];
    trials.push(Trial::test("published_with_stem", published_with_stem).with_ignored_flag(missing));
    trials.push(Trial::test("published_networks", published_networks).with_ignored_flag(missing));
    trials.push(Trial::test("bench_beside_onnx_runtime", bench::beside_onnx_runtime).with_ignored_flag(missing));
    trials.extend(half_range::trials().into_iter().map(|trial| trial.with_ignored_flag(missing)));
    trials.extend(subnormal::trials().into_iter().map(|trial| trial.with_ignored_flag(missing)));
    for case in CASES {
        trials.push(Trial::test(case.name, move || network(&case)).with_ignored_flag(missing));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
