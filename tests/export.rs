//! `export` in f16 as scripts see it: what passes the range of f16 is named, can be kept in f32, and advice works.

use std::path::Path;
use std::process::{Command, Output};

use depthshrinker::graph::{GraphBuilder, NodeId, Op};
use depthshrinker::io::tensors::write_tensors;
use depthshrinker::io::{DataInfo, ModelInfo, write_model};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::{Shape, Window};
use depthshrinker::tensor::Tensor;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The node whose values are large, and the one that brings them down.
const LARGE: &str = "blocks.6.0.conv_pwl";
const HEAD: &str = "conv_head";

/// A model file, with or without what it takes to feed it pictures. Of images of zeros all values are 0.
fn write(path: &Path, side: usize, is_fed: bool, change: fn(&mut Model)) {
    let shape = Shape::new(side, side, 3);
    let options = NetworkOptions { head_channels: Some(16), ..NetworkOptions::new(shape, 10) };
    let mut model = Model::initialise(build("mobilenetv2-0.1", &options).unwrap(), 1).unwrap();
    change(&mut model);
    let (mean, std) = (vec![0.0; 3], vec![0.25; 3]);
    let data = DataInfo { name: "some".into(), classes: Vec::new(), shape, mean, std, resize: None };
    write_model(path, &model, &ModelInfo { data: is_fed.then_some(data) }).unwrap();
}

fn scale(model: &mut Model, name: &str, factor: f32) {
    model.weights.get_mut(name).unwrap().data.iter_mut().for_each(|w| *w *= factor);
}

fn large_values(model: &mut Model) {
    scale(model, "blocks.6.0.bn3.weight", 6e4);
    scale(model, "blocks.6.0.conv_pwl.weight", 1e3);
    scale(model, "conv_head.weight", 1e-8);
    // The largest of the folded weights lie within the range.
    let weights = &mut model.weights.get_mut("blocks.6.0.conv_pwl.weight").unwrap().data;
    weights.iter_mut().for_each(|w| *w = w.clamp(-1.0, 1.0));
}

fn large_weights(model: &mut Model) {
    scale(model, "conv_head.weight", 1e7);
}

/// Nine values of 256 MiB each for one image.
fn vast() -> Model {
    let mut b = GraphBuilder::new("vast", Shape::new(8192, 8192, 1));
    let conv = Op::Conv(GraphBuilder::conv(1, 1, Window::square(1, 1, 0), 1));
    let x = (0..8).fold(NodeId::INPUT, |x, i| b.push(format!("{i}"), conv, &[x]));
    let x = b.push("pool", Op::GlobalAvgPool, &[x]);
    b.linear("classifier", 1, 10, x);
    Model::initialise(b.finish().unwrap(), 1).unwrap()
}

fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write(&path.join("m.safetensors"), 32, true, large_values);
    write(&path.join("unfed.safetensors"), 32, false, large_values);
    write(&path.join("weights.safetensors"), 32, true, large_weights);
    write(&path.join("plain.safetensors"), 32, true, |_| {});
    write_model(&path.join("vast.safetensors"), &vast(), &ModelInfo::default()).unwrap();
    for (name, value) in [("zeros", 0.0), ("ones", 1.0)] {
        let input = Tensor { shape: vec![20, 3, 32, 32], data: vec![value; 20 * 3 * 32 * 32] };
        let file = path.join(format!("{name}.safetensors"));
        write_tensors(&file, &[("input".to_owned(), input)].into(), &Default::default()).unwrap();
    }
    for (name, value) in [("black", 0), ("white", 255)] {
        image::RgbImage::from_pixel(40, 36, image::Rgb([value; 3])).save(path.join(format!("{name}.png"))).unwrap();
    }
    folder
}

fn export(folder: &TempDir, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_depthshrinker"));
    command.current_dir(folder.path()).args(["export", "--json", "-o", "out.onnx"]).args(args).output().unwrap()
}

/// What a command that succeeds prints on stdout and on stderr.
fn told(folder: &TempDir, args: &[&str]) -> (Value, String) {
    let output = export(folder, args);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{args:?}: {text}");
    (serde_json::from_slice(&output.stdout).unwrap(), text)
}

fn named(told: &Value) -> Vec<&str> {
    let overflows = told["overflows"].as_array().unwrap();
    overflows.iter().map(|o| o["param"].as_str().unwrap_or(o["node"].as_str().unwrap())).collect()
}

#[test]
fn what_passes_the_range_is_named_on_noise_and_on_given_images() {
    let folder = folder();
    let half = ["--precision", "f16"];
    for (model, input, expected) in [
        ("m.safetensors", None, vec![LARGE]),
        ("m.safetensors", Some("ones.safetensors"), vec![LARGE]),
        ("m.safetensors", Some("white.png"), vec![LARGE]),
        ("m.safetensors", Some("zeros.safetensors"), vec![]),
        ("m.safetensors", Some("black.png"), vec![]),
        ("unfed.safetensors", Some("ones.safetensors"), vec![LARGE]),
        ("plain.safetensors", None, vec![]),
    ] {
        let input: Vec<&str> = input.iter().flat_map(|file| ["--input", file]).collect();
        let (value, text) = told(&folder, &[&[model], &half[..], &input].concat());
        assert_eq!(named(&value), expected, "{model} {input:?}");
        assert_eq!(value["in_f32"], json!([]));
        if expected.is_empty() {
            assert!(text.is_empty(), "{text}");
            continue;
        }
        let images = if input.is_empty() { "noise" } else { "the given images" };
        let words = [LARGE, "pointwise 1x1", images, "65504", "--keep-f32 auto", &format!("--keep-f32 {LARGE}")];
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        assert!(value["overflows"][0]["largest"].as_f64().unwrap() > 65504.0);

        let (value, text) = told(&folder, &[&[model, "--keep-f32", "auto"], &half[..], &input].concat());
        assert_eq!((named(&value), &value["in_f32"]), (expected, &json!([LARGE])));
        assert!(text.is_empty(), "{text}");
    }
    // Names of one's own, with those that are found.
    let (value, text) = told(&folder, &["m.safetensors", "--precision", "f16", "--keep-f32", "conv_stem,auto"]);
    assert_eq!((&value["in_f32"], text.as_str()), (&json!([LARGE, "conv_stem"]), ""));
    let (value, text) = told(&folder, &["m.safetensors", "--precision", "f16", "--keep-f32", HEAD]);
    assert_eq!(value["in_f32"], json!([HEAD]));
    assert!(text.contains(&format!("--keep-f32 {LARGE},{HEAD}")), "what was given stays in the advice: {text}");
}

#[test]
fn a_weight_beyond_the_range_is_refused_with_advice_that_works() {
    let folder = folder();
    let half = ["weights.safetensors", "--precision", "f16"];
    let output = export(&folder, &half);
    let text = String::from_utf8(output.stderr).unwrap();
    let last = text.lines().last().unwrap();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(last.starts_with("error: ") && last.contains("conv_head.weight"), "{text}");
    assert!(last.contains("--keep-f32 conv_head") && !folder.path().join("out.onnx").exists(), "{text}");
    for advice in [HEAD, "auto"] {
        let (value, _) = told(&folder, &[&half[..], &["--keep-f32", advice, "--input", "zeros.safetensors"]].concat());
        assert_eq!((named(&value), &value["in_f32"]), (vec!["conv_head.weight"], &json!([HEAD])));
    }
}

#[test]
fn wrong_usage_is_one_line() {
    let folder = folder();
    for (args, code, word) in [
        (&["m.safetensors", "--precision", "f16", "--keep-f32", "bn1"][..], 2, "has no node bn1"),
        (&["m.safetensors", "--keep-f32", "auto"], 2, "add --precision f16"),
        (&["m.safetensors", "--input", "ones.safetensors"], 2, "add --precision f16"),
        (&["m.safetensors", "--precision", "f16", "--input", "none.png"], 1, "none.png"),
        (&["m.safetensors", "--precision", "f16", "--input", "plain.safetensors"], 1, "no tensor `input`"),
        (&["unfed.safetensors", "--precision", "f16", "--input", "white.png"], 2, "give normalised tensors"),
        (&["vast.safetensors", "--precision", "f16", "--keep-f32", "auto"], 2, "more than the limit"),
    ] {
        let output = export(&folder, args);
        let text = String::from_utf8(output.stderr).unwrap();
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!((output.status.code(), lines.len()), (Some(code), 1), "{args:?}: {text}");
        assert!(lines[0].contains(word) && output.stdout.is_empty(), "{args:?}: {text}");
        assert!(!folder.path().join("out.onnx").exists(), "{args:?}");
    }
    // Where nobody asked to look, a network that is too large for it is written with a warning.
    let (value, text) = told(&folder, &["vast.safetensors", "--precision", "f16"]);
    assert_eq!(value["overflows"], json!([]));
    assert!(text.contains("not known") && text.contains("--keep-f32 NODE,NODE"), "{text}");
}
