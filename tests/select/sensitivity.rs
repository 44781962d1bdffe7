//! The search without training: batch-norm statistics, the rise of the loss block by block, and what the commands make
//! of them.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use assert_cmd::Command;
use depthshrinker::data::{Augment, Dataset, ImageShape, Loader};
use depthshrinker::device::Device;
use depthshrinker::engine::{Engine, EngineOptions, Fusion};
use depthshrinker::graph::{Graph, NodeId, Op};
use depthshrinker::io::{ModelInfo, write_model};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, linearise};
use depthshrinker::shrink::{Importance, Judge, Selection, Sensitivities, SensitivityConfig};
use depthshrinker::train::{Interrupt, evaluate, recalibrate};
use libtest_mimic::Trial;
use rand::RngExt;
use serde_json::Value;

use crate::networks::rng;
use crate::trial;

const SIDE: usize = 16;
const CLASSES: usize = 4;

pub fn images(count: usize) -> Dataset {
    let mut rng = rng(9);
    let shape = ImageShape { height: SIDE, width: SIDE, channels: 1 };
    let pixels = (0..count * SIDE * SIDE).map(|_| rng.random_range(0..=255)).collect();
    let labels = (0..count).map(|i| (i % CLASSES) as u32).collect();
    Dataset::from_memory("noise", shape, CLASSES, pixels, labels).unwrap()
}

pub fn model() -> Model {
    let options = NetworkOptions {
        input_stride: Some(1),
        head_channels: Some(16),
        ..NetworkOptions::new(Shape::new(SIDE, SIDE, 1), CLASSES)
    };
    Model::initialise(build("mobilenetv2-0.1", &options).unwrap(), 2).unwrap()
}

/// The same network with statistics that say nothing.
fn with_foreign_statistics(model: &Model) -> Model {
    let mut weights = model.weights.clone();
    for (name, tensor) in &mut weights {
        let value = if name.ends_with("running_mean") { 0.7 } else { 3.0 };
        if name.contains("running_") {
            tensor.data.fill(value);
        }
    }
    Model::new(model.graph.clone(), weights).unwrap()
}

/// The moments of the first convolution's result are taken over all batches, those of before are forgotten, and nothing
/// else changes.
fn statistics() {
    let (model, set) = (model(), Arc::new(images(60)));
    let loader = Loader::train(set.clone(), 20, Augment::none(), 5).unwrap();
    let renew = |model: &Model| recalibrate(&Device::Cpu, model, &loader, 3, &Interrupt::new()).unwrap();
    let renewed = renew(&model);
    assert_eq!(renew(&with_foreign_statistics(&model)).weights, renewed.weights);
    let is_statistic = |name: &str| name.contains("running_");
    assert!(model.weights.iter().all(|(name, w)| is_statistic(name) || renewed.weights[name] == *w));
    let changed = model.weights.iter().filter(|(name, w)| is_statistic(name) && renewed.weights[*name] != **w);
    assert_eq!(changed.count(), model.weights.keys().filter(|name| is_statistic(name)).count());

    let stem = model.graph.nodes.iter().position(|node| matches!(node.op, Op::Conv(_))).unwrap();
    let stem_only = Graph { nodes: model.graph.nodes[..=stem].to_vec(), blocks: Vec::new(), ..model.graph.clone() };
    let weight = format!("{}.weight", model.graph.nodes[NodeId::new(stem)].name);
    let weights = [(weight.clone(), model.weights[&weight].clone())].into();
    let cut = Model::new(stem_only, weights).unwrap();
    let options = EngineOptions { batch: 60, fusion: Fusion::PerNode, training: false, taps: Vec::new() };
    let mut engine = Engine::new(&Device::Cpu, &cut, &options).unwrap();
    let batch = Loader::eval(set, 60).unwrap().epoch(0, 0).next().unwrap().unwrap();
    let out = engine.forward(&batch.images).unwrap();
    let mut values = vec![0.0f32; out.len()];
    out.read(&mut values).unwrap();
    let channels = cut.graph.output_shape().c;
    let norm = model.graph.nodes.iter().find(|node| matches!(node.op, Op::BatchNorm(_))).unwrap();
    for channel in 0..channels {
        let of_channel: Vec<f64> = values.iter().skip(channel).step_by(channels).map(|&v| f64::from(v)).collect();
        let mean = of_channel.iter().sum::<f64>() / of_channel.len() as f64;
        let var = of_channel.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / of_channel.len() as f64;
        let got = |role: &str| f64::from(renewed.weights[&format!("{}.{role}", norm.name)].data[channel]);
        assert!((got("running_mean") - mean).abs() < 1e-5 * (1.0 + mean.abs()), "{channel}");
        assert!((got("running_var") - var).abs() < 1e-3 * var, "{channel}: {} and {var}", got("running_var"));
    }
}

fn statistics_need_images() {
    let loader = Loader::train(Arc::new(images(20)), 20, Augment::none(), 5).unwrap();
    let error = recalibrate(&Device::Cpu, &model(), &loader, 0, &Interrupt::new()).unwrap_err().to_string();
    assert!(error.contains("need a batch"), "{error}");
}

/// Without recalibration a rise is the difference of two evaluations on the images set apart, which the seed decides.
fn rises() {
    let (model, set, interrupt) = (model(), images(80), Interrupt::new());
    let config = SensitivityConfig { images: 40, recalibration: 0, batch: 16, steps: 3 };
    let options = Linearise { final_activation: true, padding: PaddingMode::BorderBias };
    let blocks = model.graph.blocks.len();
    let candidates: Vec<bool> = (0..blocks).map(|b| b != 2).collect();
    let measure = |seed| {
        let judge = Judge::new(&Device::Cpu, &set, &config, seed, &interrupt).unwrap();
        let mut judged = Vec::new();
        let found =
            Sensitivities::measure(&judge, &model, &candidates, &options, &mut |n, total| judged.push((n, total)))
                .unwrap();
        assert_eq!(judged, (0..=blocks).map(|n| (n, blocks)).collect::<Vec<_>>());
        found
    };
    let found = measure(3);
    assert_eq!(found, measure(3));
    assert_ne!(found.original, measure(4).original);
    let held_out = set.subset(&set.shuffled(3, 0)[..40]).unwrap();
    let loader = Loader::eval(Arc::new(held_out), 16).unwrap();
    let loss = |model: &Model| {
        let options = EngineOptions { batch: 16, fusion: Fusion::OnLoad, training: false, taps: Vec::new() };
        evaluate(&mut Engine::new(&Device::Cpu, model, &options).unwrap(), &loader).unwrap().loss
    };
    let rises = found.rises();
    for block in [0, 5, blocks - 1] {
        let kept: Vec<bool> = (0..blocks).map(|b| b != block).collect();
        let freed = linearise(&model, &kept, &options).unwrap();
        assert_eq!(rises[block], loss(&freed) - loss(&model));
    }
    assert_eq!((found.freed[2], rises[2], found.scores()[2]), (None, 0.0, 1.0));
    assert!(found.scores().iter().all(|score| (0.0..=1.0).contains(score)));

    let positions = model.graph.positions().unwrap();
    let importance = found.importance(Path::new("i.csv"), &positions).unwrap();
    let read = Importance::parse(Path::new("i.csv"), importance.to_csv().as_bytes()).unwrap();
    assert_eq!(read.to_csv(), importance.to_csv());
    assert_eq!(read.rows().count(), blocks - 1);
    assert_eq!(read.of_segment(positions.blocks()[5].at, false).unwrap(), -rises[5]);
}

/// With recalibration, statistics that a network came with say nothing.
fn recalibrated_rises() {
    let (model, set, interrupt) = (model(), images(80), Interrupt::new());
    let config = SensitivityConfig { images: 40, recalibration: 2, batch: 20, steps: 3 };
    let options = Linearise { final_activation: true, padding: PaddingMode::Reorder };
    let candidates: Vec<bool> = (0..model.graph.blocks.len()).map(|b| b == 4).collect();
    let measure = |model: &Model| {
        let judge = Judge::new(&Device::Cpu, &set, &config, 1, &interrupt).unwrap();
        Sensitivities::measure(&judge, model, &candidates, &options, &mut |_, _| {}).unwrap()
    };
    assert_eq!(measure(&model), measure(&with_foreign_statistics(&model)));
}

fn refusals() {
    let (model, interrupt) = (model(), Interrupt::new());
    let config = SensitivityConfig::default();
    let error = Judge::new(&Device::Cpu, &images(1), &config, 0, &interrupt).unwrap_err().to_string();
    assert!(error.contains("1 images"), "{error}");
    for (config, key) in [
        (SensitivityConfig { images: 0, ..config.clone() }, "images"),
        (SensitivityConfig { batch: 0, ..config.clone() }, "batch"),
        (SensitivityConfig { steps: 0, ..config.clone() }, "steps"),
        (SensitivityConfig { recalibration: 1 << 30, ..config.clone() }, "recalibration"),
    ] {
        assert!(config.check().unwrap_err().to_string().contains(key));
    }
    let set = images(20);
    let judge = Judge::new(&Device::Cpu, &set, &config, 0, &interrupt).unwrap();
    let options = Linearise { final_activation: true, padding: PaddingMode::BorderBias };
    let kept: Vec<bool> = (0..17).map(|b| b != 3).collect();
    let freed = linearise(&model, &kept, &options).unwrap();
    let error = Sensitivities::measure(&judge, &freed, &[true; 17], &options, &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("blocks.2.0") && error.contains("lost its activations"), "{error}");
    interrupt.set();
    let stopped = Sensitivities::measure(&judge, &model, &[true; 17], &options, &mut |_, _| {});
    assert!(matches!(stopped, Err(depthshrinker::Error::Interrupted(_))));
}

fn depthshrinker(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("depthshrinker").expect("the binary of this package");
    command.current_dir(dir).args(args).args(["--train-limit", "120", "--test-limit", "40", "--device", "cpu"]);
    command
}

fn json(mut command: Command) -> Value {
    let output = command.arg("--json").assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).expect("one JSON value on stdout")
}

fn fails(dir: &Path, args: &[&str], words: &[&str]) {
    let output = depthshrinker(dir, args).assert().failure().get_output().clone();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let last = text.lines().last().unwrap_or_default();
    assert!(last.starts_with("error: ") && words.iter().all(|word| last.contains(word)), "{args:?}: {text}");
}

/// A network for the embedded images in a folder, and a settings file that judges on few of them.
pub fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let options = NetworkOptions {
        input_stride: Some(1),
        head_channels: Some(16),
        ..NetworkOptions::new(Shape::new(28, 28, 1), 10)
    };
    let model = Model::initialise(build("mobilenetv2-0.1", &options).unwrap(), 2).unwrap();
    write_model(&dir.path().join("m.safetensors"), &model, &ModelInfo::default()).unwrap();
    fs::write(
        dir.path().join("few.toml"),
        "[search.sensitivity]\nimages = 40\nrecalibration = 1\nbatch = 40\nsteps = 2\n[search.evolution]\npopulation = 4\ngenerations = 1\nparents = 2\n[measure]\nseconds = 0\n",
    )
    .unwrap();
    dir
}

const SEARCH: [&str; 6] = ["search", "m.safetensors", "--config", "few.toml", "--method", "sensitivity"];

/// The files that the search leaves give the same mask to the solver alone, and the same seed the same files.
fn search_command() {
    let dir = folder();
    let files = ["plan.json", "importance.csv", "latency.csv"];
    let read = |run: &str| files.map(|file| fs::read_to_string(dir.path().join(run).join(file)).unwrap());
    let budget = ["--latency-fraction", "0.8"];
    let plan = json(depthshrinker(dir.path(), &[&SEARCH[..], &budget, &["--out", "a"]].concat()));
    json(depthshrinker(dir.path(), &[&SEARCH[..], &budget, &["--out", "b", "--threads", "1"]].concat()));
    assert_eq!(read("a"), read("b"));
    assert!(!dir.path().join("a/searched.safetensors").exists());
    let kept = Selection::read(&dir.path().join("a/plan.json")).unwrap().keep;
    assert_eq!(serde_json::to_value(&kept).unwrap(), plan["kept"]);

    let mut select = Command::cargo_bin("depthshrinker").unwrap();
    select.current_dir(dir.path()).args(["select", "--method", "knapsack", "-t", "a/latency.csv", "-i"]);
    select.args(["a/importance.csv", "--network", "m.safetensors", "--budget-ms"]);
    let table = depthshrinker::measure::LatencyTable::read(&dir.path().join("a/latency.csv")).unwrap();
    let singles = table.rows().filter(|row| row.at.len() == 1).map(|row| row.time_ms);
    let budget_ms = 0.8 * singles.fold(table.fixed_ms(), |sum, ms| sum + ms);
    select.arg((budget_ms * (1.0 + 1e-12)).to_string());
    let solved = json(select);
    assert_eq!(solved["kept"], plan["kept"]);
    assert!(solved["time_ms"].as_f64().unwrap() <= budget_ms);

    // A number of blocks: those whose loss rises least go.
    let plan = json(depthshrinker(dir.path(), &[&SEARCH[..], &["--remove", "5", "--out", "c"]].concat()));
    assert_eq!(plan["kept"].as_array().unwrap().iter().filter(|kept| **kept == 0).count(), 5);
}

/// Every source of times prices blocks, and what it is stands in the folder.
fn sources() {
    let dir = folder();
    let budget = ["--latency-fraction", "0.9"];
    for (source, out) in [("macs", "m"), ("bytes", "b"), ("roofline:v100-sxm2", "r"), ("auto", "a"), ("measured", "t")]
    {
        // Under a clock that is disturbed nothing may be fast enough for a budget that is a time.
        let budget = if source == "measured" { ["--remove", "3"] } else { budget };
        let args = [&SEARCH[..], &budget, &["--latency", source, "--out", out]].concat();
        depthshrinker(dir.path(), &args).assert().success();
        assert!(dir.path().join(out).join("latency.csv").is_file(), "{source}");
        let config = fs::read_to_string(dir.path().join(out).join("config.toml")).unwrap();
        assert!(config.contains(&format!("latency = \"{source}\"")), "{config}");
    }
    let args = [&SEARCH[..], &budget, &["--latency", "m/latency.csv", "--out", "f"]].concat();
    let own = json(depthshrinker(dir.path(), &args));
    assert_eq!(
        own["kept"],
        serde_json::to_value(Selection::read(&dir.path().join("m/plan.json")).unwrap().keep).unwrap()
    );
    // The learned search takes tables too.
    let learned = ["search", "m.safetensors", "--method", "learned", "--epochs", "1", "--batch", "40", "--keep", "12"];
    let plan = json(depthshrinker(dir.path(), &[&learned[..], &["--latency", "m/latency.csv", "--out", "l"]].concat()));
    assert_eq!(plan["kept"].as_array().unwrap().iter().filter(|kept| **kept == 1).count(), 12);

    fs::write(dir.path().join("bad.csv"), "st,end,time\n0,1,-3\n").unwrap();
    fs::write(dir.path().join("short.csv"), "st,end,time\n0,1,3\n").unwrap();
    let with = |source: &'static str, out: &'static str| {
        [&SEARCH[..], &["--latency-fraction", "0.9", "--latency", source, "--out", out]].concat()
    };
    fails(dir.path(), &with("bad.csv", "x1"), &["bad.csv: line 2", "-3 ms"]);
    fails(dir.path(), &with("short.csv", "x2"), &["short.csv: is of another network"]);
    fails(dir.path(), &with("none.csv", "x3"), &["none.csv"]);
    fails(dir.path(), &[&SEARCH[..], &["--latency-fraction", "0.01", "--out", "x4"]].concat(), &["or more"]);
    fails(
        dir.path(),
        &[&SEARCH[..], &["--latency-fraction", "1.5", "--out", "x5"]].concat(),
        &["latency_fraction 1.5"],
    );
    // Told before anything is trained.
    let learned = [&SEARCH[..4], &["--method", "learned", "--latency-fraction", "0.01", "--out", "x6"]].concat();
    fails(dir.path(), &learned, &["or more"]);
    assert!(!fs::read_to_string(dir.path().join("x6/metrics.jsonl")).is_ok_and(|metrics| metrics.contains("search")));
}

/// The whole job, with random masks of equal time, and again after it was done.
fn shrink_command() {
    let dir = folder();
    let args = [
        "shrink",
        "--model",
        "m.safetensors",
        "--config",
        "few.toml",
        "--method",
        "sensitivity",
        "--latency-fraction",
        "0.85",
        "--finetune-epochs",
        "1",
        "--batch",
        "40",
        "--measure-seconds",
        "0",
        "--compare-random",
        "2",
    ];
    let result = json(depthshrinker(dir.path(), &args));
    assert_eq!(result["latency"], "roofline of two nominal cores");
    let kept = result["kept"].clone();
    assert_eq!(result["random_masks"].as_array().unwrap().len(), 2);
    assert!(result["random_masks"].as_array().unwrap().iter().all(|trial| trial["kept"] != kept));
    let stages: Vec<&str> = result["stages"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert!(stages.starts_with(&["load", "search", "finetune"]), "{stages:?}");
    let page = fs::read_to_string(dir.path().join("runs/shrink/report.html")).unwrap();
    assert!(page.contains("blocks priced by: roofline of two nominal cores"));
    for file in ["importance.csv", "latency.csv", "plan.json", "merged.safetensors"] {
        assert!(dir.path().join("runs/shrink").join(file).is_file(), "{file}");
    }
    fs::write(dir.path().join("searched.toml"), "[search]\nmethod = \"entropy\"\n[finetune]\nstart = \"searched\"\n")
        .unwrap();
    fails(dir.path(), &["shrink", "--config", "searched.toml", "--out", "s"], &["finetune.start", "learned"]);
}

pub fn trials() -> Vec<Trial> {
    vec![
        trial("sensitivity/statistics", statistics),
        trial("sensitivity/statistics need images", statistics_need_images),
        trial("sensitivity/rises", rises),
        trial("sensitivity/recalibrated rises", recalibrated_rises),
        trial("sensitivity/refusals", refusals),
        trial("sensitivity/search", search_command),
        trial("sensitivity/sources", sources),
        trial("sensitivity/shrink", shrink_command),
    ]
}
