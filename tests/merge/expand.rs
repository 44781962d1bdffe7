//! DepthShrinker+: what convolutions are expanded into folds back into them, and the command takes a network through all of it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use depthshrinker::graph::{Activation, Bias, BlockId, BlockState, Conv, Graph, GraphBuilder, NodeId, Op};
use depthshrinker::io::{ModelInfo, read_model, write_model};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::{Padding, Shape, Window};
use depthshrinker::shrink::merge::{MergeOptions, Merged, merge, merge_selection, verify_random};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, linearise};
use depthshrinker::shrink::{ExpandConfig, Expanded, Selection, contract, expand};
use depthshrinker::tensor::Tensor;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use crate::networks::tiny_mobilenet;
use crate::reference::{Reference, noise, random_model, relative_error};

const PADDING: PaddingMode = PaddingMode::BorderBias;

fn options(ratio: usize) -> ExpandConfig {
    ExpandConfig { convs: Vec::new(), ratio }
}

/// The expanded network without its activations, and merged.
fn folded(expanded: &Expanded, padding: PaddingMode) -> (Model, Merged) {
    let surgery = Linearise { final_activation: true, padding };
    let linear = linearise(&expanded.model, &expanded.selection, &surgery).unwrap();
    let merged = merge_selection(&linear, &expanded.selection, &MergeOptions { padding }).unwrap();
    verify_random(&linear, &merged, 2, 1).unwrap().check(&merged).unwrap();
    (linear, merged)
}

fn logits(model: &Model) -> Vec<f64> {
    let values = Reference::new(model).values(&noise(model.graph.input_shape().len(), 5));
    values.into_iter().next_back().unwrap()
}

/// A network whose freed blocks were merged, so that it has dense convolutions, with a bias each.
fn merged_mobilenet() -> Model {
    let model = random_model(tiny_mobilenet(), 3);
    let kept: Vec<bool> = (0..17).map(|block| block % 3 != 1).collect();
    let padding = PaddingMode::Reorder;
    let linear = linearise(&model, &kept, &Linearise { final_activation: true, padding }).unwrap();
    merge(&linear, &MergeOptions { padding }).unwrap().model
}

fn resnet() -> Model {
    random_model(build("resnet18", &NetworkOptions::new(Shape::new(16, 12, 3), 4)).unwrap(), 4)
}

/// With hidden channels enough, expansion and fold are the identity: the same graph, the same weights to rounding.
#[test]
fn what_is_expanded_folds_back_into_itself() {
    for (model, padding, count) in [
        (merged_mobilenet(), PaddingMode::BorderBias, 6),
        (merged_mobilenet(), PaddingMode::Reorder, 6),
        (narrow_resnet(), PaddingMode::BorderBias, 4),
    ] {
        let expanded = expand(&model, &options(9), 7).unwrap();
        assert_eq!((expanded.convs.len(), expanded.selection.segments.len()), (count, count));
        for conv in &expanded.convs {
            assert!(conv.error < 1e-12, "{conv:?}");
        }
        assert!(expanded.model.graph.cost().unwrap().macs() > model.graph.cost().unwrap().macs());
        let (linear, merged) = folded(&expanded, padding);
        let back = contract(&merged, &model.graph, &expanded.convs).unwrap();
        assert_eq!(back.graph, model.graph);
        for (name, tensor) in &model.weights {
            let wide = |tensor: &Tensor| tensor.data.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
            let error = relative_error(&wide(tensor), &wide(&back.weights[name]));
            assert!(error < 5e-7, "{name}: {error:.1e}");
        }
        let expected = logits(&model);
        for network in [&linear, &merged.model, &back] {
            let error = relative_error(&expected, &logits(network));
            assert!(error < 2e-5, "{}: {error:.1e}", model.graph.name);
        }
        assert_eq!(expand(&model, &options(9), 7).unwrap(), expanded);
        assert_ne!(expand(&model, &options(12), 8).unwrap().model, expand(&model, &options(12), 7).unwrap().model);
    }
}

/// A residual block with a projection and one without, as ResNet has them, few channels wide.
fn narrow_resnet() -> Model {
    let mut b = GraphBuilder::new("narrow", Shape::new(9, 7, 3));
    let dense = |c_in, c_out, stride| GraphBuilder::conv(c_in, c_out, Window::square(3, stride, 1), 1);
    let bn = |channels| depthshrinker::graph::BatchNorm { channels, eps: 1e-5, momentum: 0.1 };
    let mut x = b.conv_bn(("stem", dense(3, 6, 1)), ("stem.bn", bn(6)), NodeId::INPUT);
    for (block, c_in, c_out, stride) in [("a", 6, 6, 1), ("b", 6, 8, 2)] {
        let (input, first, act) =
            (x, b.next_node(), Activation { site: Some(b.next_block().site()), ..Activation::RELU });
        let at = |part: &str| format!("{block}.{part}");
        let shortcut = match stride {
            1 => input,
            _ => {
                let projection = GraphBuilder::conv(c_in, c_out, Window::square(1, stride, 0), 1);
                b.conv_bn((&at("down"), projection), (&at("down.bn"), bn(c_out)), input)
            }
        };
        x = b.conv_bn((&at("1"), dense(c_in, c_out, stride)), (&at("1.bn"), bn(c_out)), input);
        x = b.activation(act, x);
        x = b.conv_bn((&at("2"), dense(c_out, c_out, 1)), (&at("2.bn"), bn(c_out)), x);
        x = b.push(at("add"), Op::Add, &[shortcut, x]);
        b.block(block, input, first);
    }
    let x = b.push("pool", Op::GlobalAvgPool, &[x]);
    b.linear("fc", 8, 3, x);
    random_model(b.finish().unwrap(), 6)
}

/// Blocks with activations stay what they are, merged ones are blocks no longer, and every convolution has a site of its own.
#[test]
fn blocks_and_sites() {
    let model = merged_mobilenet();
    let active: Vec<BlockId> =
        BlockId::all(17).filter(|&block| model.graph.state(block) == BlockState::Active).collect();
    let expanded = expand(&model, &options(6), 1).unwrap();
    let graph = &expanded.model.graph;
    assert_eq!(graph.blocks.len(), active.len());
    assert!(graph.kept().iter().all(|kept| *kept));
    for (block, old) in graph.blocks.iter().zip(active) {
        assert_eq!(block.name, model.graph.blocks[old].name);
    }
    // The stem has a site, too.
    assert_eq!(graph.sites(), graph.blocks.len() + 1 + expanded.convs.len());
    let kept = expanded.selection.keep.kept();
    assert_eq!(kept.len(), graph.sites());
    assert!(kept.iter().enumerate().all(|(site, kept)| *kept == (site <= graph.blocks.len())));
    // With all of them in place it computes something else.
    assert!(relative_error(&logits(&model), &logits(&expanded.model)) > 1e-3);
}

/// The weight that three convolutions fold into, by its sum.
fn product(expanded: &Expanded, name: &str, conv: Conv) -> Vec<f64> {
    let weight = |part: &str| &expanded.model.weights[&format!("{name}.{part}.weight")];
    let (first, middle, last) = (weight("expand"), weight("dw"), weight("project"));
    let (hidden, taps) = (first.shape[0], conv.window.taps());
    let at = |tensor: &Tensor, index: usize| f64::from(tensor.data[index]);
    let mut values = Vec::new();
    for o in 0..conv.c_out {
        for v in 0..taps {
            for c in 0..conv.c_in {
                let term =
                    |m: usize| at(last, o * hidden + m) * at(middle, v * hidden + m) * at(first, m * conv.c_in + c);
                values.push((0..hidden).map(term).sum());
            }
        }
    }
    values
}

/// One dense convolution with given weights between an image and a classifier.
fn single(conv: Conv, weight: Vec<f32>) -> Model {
    let mut b = GraphBuilder::new("single", Shape::new(8, 9, conv.c_in));
    let x = b.push("conv", Op::Conv(conv), &[NodeId::INPUT]);
    let x = b.activation(Activation::RELU, x);
    let x = b.push("pool", Op::GlobalAvgPool, &[x]);
    b.linear("fc", conv.c_out, 3, x);
    let mut model = Model::initialise(b.finish().unwrap(), 1).unwrap();
    model.weights.get_mut("conv.weight").unwrap().data = weight;
    model
}

/// The start is exact where the ratio reaches the rank: by input channels, by output channels, and of kernels of low rank; else it is
/// the distance that is told, which no change of one factor makes smaller.
#[test]
fn the_start_is_as_near_as_the_rank_allows() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let pad = Padding { top: 2, left: 0, bottom: 1, right: 1 };
    for (c_in, c_out, window, ratio, is_exact) in [
        (4, 7, Window::square(3, 1, 1), 7, true),
        (4, 7, Window::square(3, 1, 1), 6, false),
        (4, 2, Window::square(3, 2, 1), 2, true),
        (8, 3, Window::square(3, 1, 1), 3, true),
        (8, 4, Window::square(5, 1, 2), 4, true),
        (2, 9, Window { pad, k_w: 2, ..Window::square(3, 1, 0) }, 6, true),
        (2, 9, Window { pad, k_w: 2, ..Window::square(3, 1, 0) }, 5, false),
        (3, 5, Window::square(3, 1, 1), 20, true),
    ] {
        let conv = GraphBuilder::conv(c_in, c_out, window, 1);
        let count = c_in * c_out * window.taps();
        let weight: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
        let model = single(conv, weight.clone());
        let config = ExpandConfig { convs: vec!["conv".into()], ratio };
        let expanded = expand(&model, &config, 3).unwrap();
        let got = product(&expanded, "conv", conv);
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let own = norm(&mut weight.iter().map(|v| f64::from(*v)));
        let distance = norm(&mut weight.iter().zip(&got).map(|(a, b)| f64::from(*a) - b)) / own;
        let told = expanded.convs[0].error;
        assert_eq!(is_exact, distance < 1e-6, "{c_in} {c_out} {ratio}: {distance}");
        assert!((distance - told).abs() < 1e-6, "{distance} and {told}");
        let (_, merged) = folded(&expanded, PADDING);
        let back = contract(&merged, &model.graph, &expanded.convs).unwrap();
        let merged: Vec<f64> = back.weights["conv.weight"].data.iter().map(|v| f64::from(*v)).collect();
        assert!(relative_error(&got, &merged) < 1e-6);
    }
    // Two products make this kernel, whatever its size.
    let (c_in, c_out, taps) = (6, 6, 9);
    let mut vector = |length: usize| -> Vec<f32> { (0..length).map(|_| rng.random_range(-1.0..1.0)).collect() };
    let (p, d, q) = (vector(c_out * 2), vector(taps * 2), vector(2));
    let mut weight = Vec::new();
    for o in 0..c_out {
        for v in 0..taps {
            for c in 0..c_in {
                // Each input channel reads with one of two patterns.
                weight.push(p[o * 2 + c % 2] * d[v * 2 + c % 2] * q[c % 2]);
            }
        }
    }
    let conv = GraphBuilder::conv(c_in, c_out, Window::square(3, 1, 1), 1);
    let config = ExpandConfig { convs: vec!["conv".into()], ratio: 1 };
    assert!(expand(&single(conv, weight), &config, 3).unwrap().convs[0].error < 1e-6);
}

#[test]
fn what_cannot_be_expanded_is_named() {
    let model = resnet();
    let refused = |names: &[&str], ratio| {
        let config = ExpandConfig { convs: names.iter().map(|name| (*name).to_owned()).collect(), ratio };
        expand(&model, &config, 1).unwrap_err().to_string()
    };
    assert!(refused(&["layer1.0.conv3"], 6).contains("layer1.0.conv3 is no convolution"));
    assert!(refused(&["layer2.0.downsample.0"], 6).contains("no dense convolution larger than 1×1; known are conv1"));
    assert!(refused(&[], 0).contains("expand.ratio = 0"));
    let mobilenet = random_model(tiny_mobilenet(), 1);
    let error = expand(&mobilenet, &options(6), 1).unwrap_err().to_string();
    assert!(error.contains("merge blocks first"), "{error}");
    // The stem is expanded where it is named.
    let stem = ExpandConfig { convs: vec!["conv_stem".into()], ratio: 6 };
    assert_eq!(expand(&mobilenet, &stem, 1).unwrap().convs[0].hidden, 12);
    // A convolution with a bias for each position.
    let kept: Vec<bool> = (0..17).map(|block| block != 2).collect();
    let linear = linearise(&mobilenet, &kept, &Linearise { final_activation: true, padding: PADDING }).unwrap();
    let mapped = merge(&linear, &MergeOptions { padding: PADDING }).unwrap().model;
    let has_map = |graph: &Graph| graph.nodes.iter().any(|n| matches!(n.op, Op::Conv(conv) if conv.bias == Bias::Map));
    assert!(has_map(&mapped.graph));
    let config = ExpandConfig { convs: vec!["blocks.1.1.conv".into()], ratio: 6 };
    assert!(expand(&mapped, &config, 1).unwrap_err().to_string().contains("merge with --padding reorder"));
}

fn depthshrinker(folder: &Path, args: &[&str]) -> Output {
    let limits = ["--train-limit", "96", "--test-limit", "32", "--device", "cpu"];
    Command::new(env!("CARGO_BIN_EXE_depthshrinker")).current_dir(folder).args(args).args(limits).output().unwrap()
}

/// The whole job: what comes out has the graph that went in, other weights, and what the expanded network became; a seed gives the
/// same bits, also where the run is taken up again behind a stage.
#[test]
fn the_command_trains_and_folds_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let network = NetworkOptions { input_stride: Some(1), ..NetworkOptions::new(Shape::new(28, 28, 1), 10) };
    let network = NetworkOptions { head_channels: Some(16), ..network };
    let model = Model::initialise(build("mobilenetv2-0.1", &network).unwrap(), 2).unwrap();
    let kept: Vec<bool> = (0..17).map(|block| ![3, 8].contains(&block)).collect();
    let padding = PaddingMode::Reorder;
    let linear = linearise(&model, &kept, &Linearise { final_activation: true, padding }).unwrap();
    let merged = merge(&linear, &MergeOptions { padding }).unwrap().model;
    write_model(&path.join("m.safetensors"), &merged, &ModelInfo::default()).unwrap();
    write_model(&path.join("t.safetensors"), &model, &ModelInfo::default()).unwrap();
    let run = |out: &str, more: &[&str]| -> Value {
        let args =
            ["expand", "m.safetensors", "--teacher", "t.safetensors", "--epochs", "1", "--batch", "48", "--json"];
        let output = depthshrinker(path, &[&args[..], &["--out", out], more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let result = run("a", &[]);
    let names: Vec<&str> = result["convs"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(names.len(), 2);
    assert!(names.iter().all(|name| merged.graph.nodes.iter().any(|node| node.name == **name)), "{names:?}");
    assert_eq!((&result["convs"][0]["hidden"], &result["merge"]["segments"]), (&48.into(), &2.into()));
    let stages: Vec<&str> = result["stages"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(stages, ["expand", "finetune", "merge"]);
    let read = |file: &str| read_model(&path.join("a").join(file)).unwrap().0;
    let (wide, shrunk, back) = (read("expanded.safetensors"), read("shrunk.safetensors"), read("merged.safetensors"));
    assert_eq!(back.graph, merged.graph);
    assert!(back.weights != merged.weights && wide.graph.nodes.len() == shrunk.graph.nodes.len() + 4);
    assert!(relative_error(&logits(&shrunk), &logits(&back)) < 2e-5);
    assert_eq!(Selection::read(&path.join("a/plan.json")).unwrap().segments.len(), 2);

    run("b", &[]);
    let bytes = |out: &str| fs::read(path.join(out).join("merged.safetensors")).unwrap();
    assert_eq!(bytes("a"), bytes("b"));
    fs::remove_file(path.join("b/result.json")).unwrap();
    run("b", &["--resume"]);
    assert_eq!(bytes("a"), bytes("b"));
}
