//! Exported networks pass the ONNX checker and give the engine's logits in ONNX Runtime: original, with activations
//! half gone, and merged. The oracle is one Python process, `oracles/onnx_server.py`.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;

use depthshrinker::device::Device;
use depthshrinker::dtype::Dtype;
use depthshrinker::graph::{
    Activation, AvgPool, BatchNorm, Bias, Conv, Dropout, Graph, GraphBuilder, MaxPool, NodeId, Op, ParamRole,
};
use depthshrinker::io::ModelInfo;
use depthshrinker::io::layout::nchw_to_nhwc;
use depthshrinker::io::onnx::{to_onnx, write_onnx};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::pipeline::logits;
use depthshrinker::shape::{Padding, Shape, Window};
use depthshrinker::shrink::merge::{MergeOptions, Merged, merge};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::published_mask;
use depthshrinker::shrink::surgery::{Linearise, linearise};
use libtest_mimic::{Arguments, Failed, Trial};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// A Python with `onnx` and `onnxruntime`, which `tests/run` sets up.
const VARIABLE: &str = "DEPTHSHRINKER_ONNX_PYTHON";
/// Largest difference of logits, relative to the largest of them. f16 keeps 11 bits, and errors of some fifty layers
/// add up.
const TOLERANCE_F32: f32 = 1e-4;
const TOLERANCE_F16: f32 = 2e-2;
/// Images of the batches that one model is run on.
const BATCHES: [usize; 2] = [1, 2];

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

const CASES: [Case; 6] = [
    border_bias("mobilenetv2-1.0", 64, 4),
    border_bias("mobilenetv2-1.4", 96, 2),
    border_bias("tf_efficientnet_lite0", 75, 2),
    border_bias("mnasnet-0.5", 64, 2),
    Case { padding: PaddingMode::Reorder, ..border_bias("resnet34", 64, 2) },
    Case { padding: PaddingMode::Reorder, head_channels: Some(64), ..border_bias("vgg19_bn", 64, 1) },
];

struct Oracle {
    _process: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

static ORACLE: Mutex<Option<Oracle>> = Mutex::new(None);

impl Oracle {
    fn start() -> Result<Self, Failed> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracles/onnx_server.py");
        let python = std::env::var_os(VARIABLE).ok_or(VARIABLE)?;
        let mut process = Command::new(python).arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (requests, answers) = (process.stdin.take(), process.stdout.take());
        let answers = BufReader::new(answers.ok_or("no stdout")?);
        Ok(Self { _process: process, requests: requests.ok_or("no stdin")?, answers })
    }

    fn ask(&mut self, request: &Value) -> Result<Value, Failed> {
        writeln!(self.requests, "{request}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let answer: Value = serde_json::from_str(&line)?;
        match answer["error"].as_str() {
            Some(error) => Err(error.into()),
            None => Ok(answer),
        }
    }
}

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
    let folder = tempfile::tempdir()?;
    let (path, input) = (folder.path().join("m.onnx"), folder.path().join("x.bin"));
    write_onnx(&path, exported, &ModelInfo::default(), precision)?;
    let shape = model.graph.input_shape();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let count = BATCHES.iter().sum::<usize>() * shape.len();
    let images: Vec<f32> = (0..count).map(|_| rng.random_range(-2.0..2.0)).collect();
    std::fs::write(&input, bytemuck::cast_slice::<f32, u8>(&images))?;
    let expected = logits(&Device::Cpu, model, &nchw_to_nhwc(&images, shape.c, shape.pixels()))?;

    let shapes = BATCHES.map(|n| [n, shape.c, shape.h, shape.w]);
    let mut oracle = ORACLE.lock().map_err(|_| "the oracle's lock is poisoned")?;
    if oracle.is_none() {
        *oracle = Some(Oracle::start()?);
    }
    let request = json!({ "model": path, "input": input, "shapes": shapes });
    let answer = oracle.as_mut().ok_or("started above")?.ask(&request)?;
    let batches: Vec<Vec<f32>> = serde_json::from_value(answer["logits"].clone())?;
    let got = batches.concat();
    if got.len() != expected.len() || got.iter().any(|x| !x.is_finite()) {
        return Err(format!("{} logits, expected {}", got.len(), expected.len()).into());
    }
    let scale = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let error = got.iter().zip(&expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    Ok((error / scale, serde_json::from_value(answer["operators"].clone())?))
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
    let refusal = |model: &Model, precision| match to_onnx(model, &ModelInfo::default(), precision) {
        Ok(_) => Err(Failed::from("must be refused")),
        Err(error) => Ok(error.to_string()),
    };
    assert!(refusal(&model, Dtype::Bf16)?.contains("--precision f32 or f16"));
    model.weights.get_mut("classifier.bias").ok_or("it has one")?.data[1] = 1e6;
    let text = refusal(&model, Dtype::F16)?;
    assert!(text.contains("classifier.bias has numbers beyond the range of f16"), "{text}");
    assert_eq!(
        to_onnx(&model, &ModelInfo::default(), Dtype::F32)?,
        to_onnx(&model, &ModelInfo::default(), Dtype::F32)?
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
    for case in CASES {
        trials.push(Trial::test(case.name, move || network(&case)).with_ignored_flag(missing));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
