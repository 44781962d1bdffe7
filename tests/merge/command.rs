//! The command: what it takes from flags and files, and what it does with a model that asks for more than there is.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use depthshrinker::graph::{Bias, BlockId, BlockState, Conv, Graph, GraphBuilder, NodeId, Op};
use depthshrinker::io::tensors::{read_tensors, write_tensors};
use depthshrinker::io::{DataInfo, ModelInfo, read_model, write_model};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::{Shape, Window};
use depthshrinker::tensor::Tensor;
use serde_json::Value;

use crate::reference::{noise, random_model};

const HALF: &str = "1,0,1,0,1,0,1,0,1,0,1,0,1,0,1,0,1";

fn depthshrinker(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_depthshrinker")).current_dir(folder).args(args).output().unwrap()
}

fn json(folder: &Path, args: &[&str]) -> Value {
    let output = depthshrinker(folder, &[args, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refusal(output: &Output, code: i32) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(code) && text.starts_with("error: "), "{:?}: {text}", output.status);
    assert!(text.lines().count() == 1 && text.len() < 500, "{text}");
    text
}

/// A model file, with or without what it takes to feed it pictures.
fn model(path: &Path, is_fed: bool) -> Graph {
    let graph = build("mobilenetv2-0.1", &NetworkOptions::new(Shape::new(40, 32, 3), 10)).unwrap();
    let model = random_model(graph, 1);
    let shape = model.graph.input_shape();
    let data = DataInfo {
        name: "some".into(),
        classes: Vec::new(),
        shape,
        mean: vec![0.5; shape.c],
        std: vec![0.25; shape.c],
        resize: None,
    };
    write_model(path, &model, &ModelInfo { data: is_fed.then_some(data) }).unwrap();
    model.graph
}

#[test]
fn the_configuration_counts_and_flags_go_over_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    model(&path.join("m.safetensors"), false);
    let config = "[merge]\npadding = \"reorder\"\n[finetune]\nfinal_activation = false\n";
    fs::write(path.join("c.toml"), config).unwrap();
    let run = |more: &[&str]| {
        let args = ["merge", "m.safetensors", "--keep-list", HALF, "-o", "out.safetensors"];
        let blocks = json(path, &[&args, more].concat())["blocks"].clone();
        let merged = read_model(&path.join("out.safetensors")).unwrap().0.graph;
        let behind = |b: &&depthshrinker::graph::Block| matches!(merged.nodes[b.output()].op, Op::Activation(_));
        let is_merged = |(index, _): &(BlockId, _)| merged.state(*index) == BlockState::Merged;
        let merged_blocks = BlockId::enumerate(&merged.blocks).filter(is_merged).map(|(_, b)| b);
        let activations = merged_blocks.filter(behind).count();
        (blocks.as_array().unwrap().iter().any(|b| b["bias_map"] == true), activations > 0)
    };
    assert_eq!(run(&[]), (true, true));
    assert_eq!(run(&["--config", "c.toml"]), (false, false));
    assert_eq!(run(&["--config", "c.toml", "--padding", "border-bias"]), (true, false));
    assert_eq!(run(&["--padding", "reorder", "--no-final-activation"]), (false, false));
}

#[test]
fn features_and_logits_are_checked_on_given_images_and_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let graph = model(&path.join("m.safetensors"), true);
    model(&path.join("unfed.safetensors"), false);
    let Shape { h, w, c } = graph.input_shape();
    let data = noise(2 * c * h * w, 7).into_iter().map(|v| v as f32).collect();
    let input = Tensor { shape: vec![2, c, h, w], data };
    write_tensors(&path.join("x.safetensors"), &[("input".to_owned(), input)].into(), &Default::default()).unwrap();
    let picture = image::RgbImage::from_fn(50, 40, |x, y| image::Rgb([x as u8 * 5, y as u8 * 6, (x * y % 256) as u8]));
    picture.save(path.join("a.png")).unwrap();
    picture.save(path.join("b.jpg")).unwrap();
    let inputs = ["--input", "x.safetensors", "--input", "a.png", "--input", "b.jpg"];
    let merge = |model| ["merge", model, "--keep-list", HALF, "-o", "out.safetensors"];
    let told = json(path, &[&merge("m.safetensors")[..], &inputs].concat());
    let small = |value: &Value| value.as_f64().is_some_and(|v| v <= 1e-4);
    assert!(told["segments"] == 8 && small(&told["max_rel_error"]) && told["max_abs_error"].is_number(), "{told}");
    let worst = &told["worst_block"];
    assert!(graph.blocks.iter().any(|b| worst["name"] == b.name.as_str()), "{told}");
    assert!(small(&worst["max_rel_error"]) && worst["max_abs_error"].as_f64().unwrap() > 0.0, "{told}");
    assert!(worst["of_bound"].as_f64().is_some_and(|share| share > 0.0 && share < 1.0), "{told}");

    let refused = depthshrinker(path, &[&merge("unfed.safetensors")[..], &inputs].concat());
    assert!(refusal(&refused, 2).contains("does not say how pictures are normalised"));
    let refused = depthshrinker(path, &[&merge("m.safetensors")[..], &["--input", "missing.png"]].concat());
    assert!(refusal(&refused, 1).contains("missing.png"));
}

/// `count` linear blocks on an image of one channel: two convolutions each, of which the first or the second is padded.
fn chain(shape: Shape, count: usize, pads_first: bool) -> Graph {
    let conv = |k: usize| {
        let conv = GraphBuilder::conv(1, 1, Window::square(k, 1, k / 2), 1);
        Op::Conv(Conv { bias: Bias::Channel, ..conv })
    };
    let mut b = GraphBuilder::new("chain", shape);
    let mut x = NodeId::INPUT;
    for block in 0..count {
        let (input, first) = (x, b.next_node());
        for (at, k) in [(0, if pads_first { 3 } else { 1 }), (1, if pads_first { 1 } else { 3 })] {
            x = b.push(format!("{block}.{at}"), conv(k), &[x]);
        }
        b.block(block.to_string(), input, first);
    }
    x = b.push("pool", Op::GlobalAvgPool, &[x]);
    b.linear("classifier", 1, 2, x);
    b.finish().unwrap()
}

/// A kilobyte can claim any image. What it would take is told instead of taken, in little address space.
#[cfg(target_os = "linux")]
#[test]
fn claimed_images_take_no_memory() {
    const ADDRESS_SPACE_KB: u64 = 512 << 10;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let refused = |args: &[&str]| {
        let output = Command::new("sh")
            .args(["-c", &format!("ulimit -v {ADDRESS_SPACE_KB} && exec \"$0\" \"$@\"")])
            .arg(env!("CARGO_BIN_EXE_depthshrinker"))
            .args(["merge", "m.safetensors", "--threads", "1", "-o", "out.safetensors"])
            .args(args)
            .current_dir(path)
            .output();
        refusal(&output.unwrap(), 1)
    };
    let write = |graph: Graph| {
        let model = Model::initialise(graph, 1).unwrap();
        write_model(&path.join("m.safetensors"), &model, &ModelInfo::default()).unwrap();
    };
    let image = Shape::new(8000, 8000, 1);

    write(chain(Shape::new(16, 16, 1), 1, true));
    let mut file = read_tensors(&path.join("m.safetensors")).unwrap();
    let graph = file.metadata.get_mut("depthshrinker.graph").unwrap();
    *graph = graph.replace("\"h\":16", "\"h\":16384").replace("\"w\":16", "\"w\":16384");
    write_tensors(&path.join("m.safetensors"), &file.tensors, &file.metadata).unwrap();
    assert!(refused(&[]).contains("unusable shape 16384x16384x1"));

    write(chain(image, 1, false));
    assert!(refused(&[]).contains("bias maps of the merged blocks would have 64000000 numbers"));

    write(chain(image, 4, true));
    assert!(refused(&["--padding", "reorder"]).contains("checking it takes"));
    assert!(!path.join("out.safetensors").exists());

    // The same of a sane size goes through in the same space.
    write(chain(Shape::new(500, 500, 1), 4, true));
    json(path, &["merge", "m.safetensors", "--padding", "reorder", "-o", "out.safetensors"]);
}

/// A file from before the stem had a site: states in it count for nothing, and masks that free the stem are refused.
#[test]
fn older_files_load_and_have_no_site_for_the_stem() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let file = path.join("m.safetensors");
    let graph = model(&file, false);
    let mut tensors = read_tensors(&file).unwrap();
    let text = tensors.metadata.get_mut("depthshrinker.graph").unwrap();
    assert!(text.contains("\"mask\":17") && text.contains("\"state\":\"active\""), "{text}");
    *text = text.replace("\"mask\":17", "\"mask\":null").replace("\"state\":\"active\"", "\"state\":\"linear\"");
    write_tensors(&file, &tensors.tensors, &tensors.metadata).unwrap();
    let old = read_model(&file).unwrap().0.graph;
    assert_eq!((old.sites(), graph.sites(), old.kept()), (17, 18, vec![true; 17]));
    let refused =
        depthshrinker(path, &["merge", "m.safetensors", "--keep-list", "mbv2-1.4-ds-d", "-o", "out.safetensors"]);
    assert!(refusal(&refused, 2).contains("make or import it again"));
    let told = json(path, &["merge", "m.safetensors", "--keep-list", "mbv2-1.4-ds-b", "-o", "out.safetensors"]);
    assert_eq!(told["segments"], 9);
}

/// A plan decides the segments and their padding; a flag goes over the padding.
#[test]
fn a_plan_with_segments_is_merged_as_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let options = NetworkOptions::new(Shape::new(40, 32, 3), 10);
    let network = random_model(build("mobilenetv2-0.35", &options).unwrap(), 1);
    write_model(&path.join("m.safetensors"), &network, &ModelInfo::default()).unwrap();
    let kept = "[0,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0]";
    let plan = |padding: &str| {
        format!(
            "{{\"kept\": {kept}, \"segments\": [{{\"first\": \"conv_stem\", \"last\": \"blocks.0.0.bn2\"}}]{padding}}}"
        )
    };
    let merge = ["merge", "m.safetensors", "--plan", "plan.json", "-o", "out.safetensors"];
    fs::write(path.join("plan.json"), plan(", \"padding\": \"reorder\"")).unwrap();
    let told = json(path, &merge);
    assert_eq!(told["blocks"][0]["name"], "conv_stem+blocks.0.0");
    assert_eq!((&told["segments"], &told["blocks"][0]["kernel"]), (&Value::from(1), &Value::from(vec![7, 7])));
    let refused = depthshrinker(path, &[&merge[..], &["--padding", "border-bias"]].concat());
    assert!(refusal(&refused, 1).contains("segment conv_stem+blocks.0.0: blocks.0.0.conv_dw zero-pads"));
    fs::write(path.join("plan.json"), plan("").replace("bn2", "bn7")).unwrap();
    assert!(refusal(&depthshrinker(path, &merge), 1).contains("blocks.0.0.bn7"));
}

/// A network that ends in features can be kept in a file, but classifies nothing.
#[test]
fn a_cut_is_refused_where_images_are_classified() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    model(&path.join("m.safetensors"), false);
    let whole = read_model(&path.join("m.safetensors")).unwrap().0;
    let cut = whole.cut(&whole.graph.blocks[1].segment().unwrap()).unwrap();
    write_model(&path.join("cut.safetensors"), &cut, &ModelInfo::default()).unwrap();
    assert_eq!(read_model(&path.join("cut.safetensors")).unwrap().0, cut);
    for args in [
        &["infer", "cut.safetensors", "--input", "x.safetensors"][..],
        &["eval", "cut.safetensors"],
        &["export", "cut.safetensors", "-o", "cut.onnx"],
    ] {
        let text = refusal(&depthshrinker(path, args), 1);
        assert!(text.contains("classifies nothing"), "{args:?}: {text}");
    }
}
