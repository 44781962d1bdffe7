//! Latency tables that are measured here: what is timed for each row is what a network that selects the row runs, and
//! what `table` writes `select` reads.

use std::collections::BTreeMap;
use std::path::Path;

use assert_cmd::Command;
use depthshrinker::config::Config;
use depthshrinker::engine::{Fusion, Plan, Target};
use depthshrinker::graph::{BlockId, Graph, Interval};
use depthshrinker::measure::{LatencyRow, LatencyTable, RowWork, TableOptions, TableWork};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::ops::step::{Backend, Step, Values};
use depthshrinker::pipeline::fully_merged;
use depthshrinker::shape::Shape;
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::{Mask, Selection};
use libtest_mimic::Trial;
use rand::RngExt;
use serde_json::Value;

use crate::networks::{network, random_network, rng};
use crate::trial;

const NETWORKS: [&str; 6] =
    ["mobilenetv2-1.0", "efficientnet-lite0", "mnasnet-1.0", "resnet34", "resnet50", "vgg19_bn"];

fn work(graph: &Graph, keys: bool, bias_maps: bool) -> TableWork {
    TableWork::new(graph, TableOptions { keys, bias_maps }, Backend::Host).unwrap()
}

/// What decides how long a step takes, its activation left out, which costs nothing: words, the convolution, sizes.
fn signature(step: &dyn Step, values: &Values) -> String {
    let mut sizes: Vec<usize> = step.uses().all().map(|id| values.get(id).len(3)).collect();
    sizes.sort_unstable();
    format!("{} {:?} {sizes:?}", step.describe().replace(" + activation", ""), step.convolution())
}

fn count(signatures: impl Iterator<Item = String>) -> BTreeMap<String, usize> {
    signatures.fold(BTreeMap::new(), |mut counts, signature| {
        *counts.entry(signature).or_default() += 1;
        counts
    })
}

fn of_rows<'a>(work: &TableWork, rows: impl Iterator<Item = &'a RowWork>) -> BTreeMap<String, usize> {
    let pieces = rows.flat_map(|row| &row.pieces).map(|&piece| &work.pieces[piece].steps);
    count(pieces.flat_map(|steps| steps.steps.iter().map(|step| signature(step.as_ref(), &steps.values))))
}

fn of_network(graph: &Graph) -> BTreeMap<String, usize> {
    let folded = graph.without_batch_norm().unwrap().0;
    let plan = Plan::new(&folded, &Target { fusion: Fusion::Epilogue, ..Target::inference(Backend::Host) }).unwrap();
    count(plan.steps.iter().map(|step| signature(step.step.as_ref(), &plan.values)))
}

/// Every segment and every candidate of LayerMerge has a row, and the reader takes them for the network's.
fn rows(name: &'static str) {
    let graph = network(name);
    let positions = graph.positions().unwrap();
    for keys in [false, true] {
        let work = work(&graph, keys, true);
        assert_eq!(work.positions.segments().collect::<Vec<_>>(), positions.segments().collect::<Vec<_>>());
        let rows = work.rows.iter().map(|row| LatencyRow { key: row.key, ..LatencyRow::new(row.at, 1.0) }).collect();
        let table = LatencyTable::new(Path::new("t.csv"), rows).unwrap();
        table.check(&positions).unwrap();
        assert_eq!(
            LatencyTable::parse(Path::new("t.csv"), table.to_csv().as_bytes()).unwrap().to_csv(),
            table.to_csv()
        );
        assert_eq!(table.fixed_ms(), 2.0);
        assert!(work.pieces.len() < work.rows.len(), "equal segments are timed once");
    }
}

/// The rows of single convolutions, and of what always runs, are the steps of the network, each once.
fn original(name: &'static str) {
    let graph = network(name);
    for keys in [false, true] {
        let work = work(&graph, keys, false);
        assert_eq!(of_rows(&work, work.original()), of_network(&graph));
    }
}

/// A model whose biases are not 0, so that what it merges into needs its bias maps.
fn model(graph: Graph) -> Model {
    let model = Model::initialise(graph, 3).unwrap();
    let (mut weights, mut rng) = (model.weights, rng(7));
    for (name, tensor) in &mut weights {
        if name.ends_with(".bias") || name.ends_with(".running_mean") {
            tensor.data.fill_with(|| rng.random::<f32>() + 0.1);
        }
    }
    Model::new(model.graph, weights).unwrap()
}

/// The rows of a mask, a block's convolutions where it stays and its segment where it goes, are the steps of the network
/// that is merged by the mask.
fn selections(name: &'static str, padding: PaddingMode) {
    let options = NetworkOptions::new(Shape::new(32, 32, 3), 10);
    check_selections(&model(build(name, &options).unwrap()), padding, 2);
}

fn random_selections() {
    let mut rng = rng(5);
    for _ in 0..40 {
        let blocks = rng.random_range(1..5);
        let model = model(random_network(&mut rng, blocks));
        check_selections(&model, PaddingMode::BorderBias, 3);
        check_selections(&model, PaddingMode::Reorder, 3);
    }
}

fn check_selections(model: &Model, padding: PaddingMode, count: usize) {
    let mut config = Config::default();
    config.merge.padding = padding;
    let work = work(&model.graph, false, padding == PaddingMode::BorderBias);
    let row = |at: Interval| work.rows.iter().find(|row| row.at == at).unwrap();
    let (mut rng, mut merged_any) = (rng(11), false);
    for _ in 0..count {
        let kept: Vec<bool> = (0..model.graph.blocks.len()).map(|_| rng.random_range(0..2) == 0).collect();
        let selection: Selection = Mask::new(kept.clone()).into();
        // Some pairs of 3×3 merge with one padding alone.
        let Ok(Some(merged)) = fully_merged(model, Some(&selection), &config) else { continue };
        merged_any = true;
        let depth = work.positions.depth();
        let always = [0, depth].map(|position| row(Interval { st: position, end: position }));
        let of_block = |block: BlockId| {
            let at = work.positions.blocks()[block.index()].at;
            let singles = (at.st..at.end).map(|st| row(Interval { st, end: st + 1 }));
            if kept[block.index()] { singles.collect::<Vec<_>>() } else { vec![row(at)] }
        };
        let rows = always.into_iter().chain(BlockId::all(kept.len()).flat_map(of_block));
        assert_eq!(of_rows(&work, rows), of_network(&merged.graph), "{kept:?}");
    }
    assert!(merged_any || padding == PaddingMode::BorderBias, "no selection merged");
}

/// On the host, every block of MobileNetV2 is one step, whose time its rows share; on a GPU those of at most 192 hidden channels.
fn shared() {
    let graph = network("mobilenetv2-1.0");
    let of = |backend| TableWork::new(&graph, TableOptions { keys: false, bias_maps: false }, backend).unwrap();
    let (host, gpu) = (of(Backend::Host), of(Backend::Cuda));
    let blocks: Vec<Interval> = host.positions.blocks().iter().map(|block| block.at).collect();
    assert_eq!(host.shared.iter().map(|shared| shared.at).collect::<Vec<_>>(), blocks);
    assert_eq!(gpu.shared.iter().map(|shared| shared.at).collect::<Vec<_>>(), blocks[..7]);
    for (of, shared) in [&host, &gpu].into_iter().flat_map(|of| of.shared.iter().map(move |shared| (of, shared))) {
        let words = of.pieces[shared.piece].steps.steps[0].describe();
        assert!(words.contains("inverted_residual"), "{words}");
    }
}

/// A residual that begins before a segment and ends with it is summed in the segment's row; one within is folded.
fn residuals() {
    let work = work(&network("mobilenetv2-1.0"), false, false);
    let residual = |at: Interval| {
        let block = work.positions.blocks().iter().find(|block| block.at.end == at.end);
        block.is_some_and(|block| block.has_residual && block.at.st < at.st)
    };
    for row in work.rows.iter().filter(|row| !row.at.is_empty()) {
        let words: Vec<String> = row.pieces.iter().map(|&p| work.pieces[p].steps.steps[0].describe()).collect();
        assert_eq!(words.len(), 1, "{}: {words:?}", row.at);
        assert_eq!(words[0].contains("residual"), residual(row.at), "{}: {words:?}", row.at);
        let ends_activated = row.at.len() > 1 || work.positions.convs()[row.at.st].has_activation();
        assert_eq!(words[0].contains("activation"), ends_activated, "{}: {words:?}", row.at);
    }
}

/// A projection runs while its block is more than one convolution.
fn projections() {
    let work = work(&network("resnet34"), false, false);
    let pieces = |st, end| work.rows.iter().find(|row| row.at == Interval { st, end }).unwrap().pieces.len();
    let projected = work.positions.blocks().iter().find(|block| !block.has_residual).unwrap().at;
    assert_eq!([pieces(projected.st, projected.st + 1), pieces(projected.st + 1, projected.end)], [1, 2]);
    assert_eq!(pieces(projected.st, projected.end), 1);
}

fn depthshrinker(dir: &Path, args: &[&str]) -> Value {
    let mut command = Command::cargo_bin("depthshrinker").expect("the binary of this package");
    let output = command.current_dir(dir).args(args).arg("--json").assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).expect("one JSON value on stdout")
}

const TINY: [&str; 8] = ["mobilenetv2-0.1", "--size", "16", "--classes", "3", "--batch", "3", "--seconds"];

/// The command writes tables that `select` reads, of whole segments and with keys.
fn command(device: &'static str) {
    let dir = tempfile::tempdir().unwrap();
    let table = [&["table"], &TINY[..], &["0", "--device", device, "-o", "t.csv"]].concat();
    let value = depthshrinker(dir.path(), &table);
    let segments = network(TINY[0]).positions().unwrap().segments().count();
    assert_eq!((&value["segments"], &value["batch"]), (&segments.into(), &3.into()), "{value}");
    let number = |key: &str| value[key].as_f64().unwrap_or_else(|| panic!("{key} of {value}"));
    assert!(number("network_ms") > number("fixed_ms") && number("fixed_ms") > 0.0 && number("sum_ms") > 0.0);
    let told = number("sum_ms") / number("network_ms") - 1.0;
    assert!((number("relative_error") - told).abs() < 1e-9);
    let fastest = depthshrinker(dir.path(), &["select", "--method", "fastest", "-t", "t.csv", "--network", TINY[0]]);
    assert!(fastest["time_ms"].as_f64().unwrap() <= number("network_ms") * 1.001);
    let text = std::fs::read_to_string(dir.path().join("t.csv")).unwrap();
    assert_eq!(text.lines().next(), Some("id,st,end,time,stdev"));
    assert_eq!(text.lines().count(), 1 + segments + 2);
}

fn pruned() {
    let dir = tempfile::tempdir().unwrap();
    depthshrinker(dir.path(), &[&["table"], &TINY[..], &["0", "-o", "tk.csv", "--pruned"]].concat());
    let table = LatencyTable::read(&dir.path().join("tk.csv")).unwrap();
    let positions = network(TINY[0]).positions().unwrap();
    table.check(&positions).unwrap();
    assert_eq!(table.rows().count(), positions.candidates().count());
}

/// With --check, merged networks are timed and compared with their rows.
fn check() {
    let dir = tempfile::tempdir().unwrap();
    let value = depthshrinker(dir.path(), &[&["table"], &TINY[..], &["0", "-o", "t.csv", "--check", "3"]].concat());
    let selections = value["selections"].as_array().unwrap();
    assert_eq!(selections.len(), 3);
    for selection in selections {
        let number = |key: &str| selection[key].as_f64().unwrap();
        assert!(number("original_ms") > 0.0 && number("predicted_ms") > 0.0 && number("measured_ms") > 0.0);
        assert_eq!(selection["kept"].as_array().unwrap().len(), 17);
    }
    assert!(value["median_absolute_relative_error"].as_f64().is_some());
}

fn wrong_usage() {
    let dir = tempfile::tempdir().unwrap();
    let fails = |args: &[&str], code: i32, words: &str| {
        let mut command = Command::cargo_bin("depthshrinker").unwrap();
        let output = command.current_dir(dir.path()).args(args).assert().code(code).get_output().clone();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains(words), "{args:?}: {text}");
    };
    fails(&["table", "lenet", "-o", "t.csv"], 2, "unknown network \"lenet\"");
    fails(&["table", TINY[0]], 2, "--output");
    fails(&["table", TINY[0], "-o", "none/t.csv"], 1, "none/t.csv");
    fails(&["table", TINY[0], "-o", "t.csv", "--pruned", "--check", "2"], 2, "--pruned");
    assert!(!dir.path().join("t.csv").exists());
}

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("measured/residuals", residuals),
        trial("measured/shared", shared),
        trial("measured/projections", projections),
        trial("measured/random networks", random_selections),
        trial("measured/command on the host", || command("cpu")),
        trial("measured/command on the emulator", || command("emulator")),
        trial("measured/pruned", pruned),
        trial("measured/check", check),
        trial("measured/wrong usage", wrong_usage),
    ];
    for name in NETWORKS {
        trials.push(trial(format!("measured/rows of {name}"), move || rows(name)));
        trials.push(trial(format!("measured/{name} as it is"), move || original(name)));
        // Merging a ResNet-50 takes too long.
        let paddings = [PaddingMode::Reorder, PaddingMode::BorderBias].into_iter().filter(|_| name != "resnet50");
        for padding in paddings {
            let test = move || selections(name, padding);
            trials.push(trial(format!("measured/{name} merged with {padding}"), test));
        }
    }
    trials
}
