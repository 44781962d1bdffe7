//! Methods of single layers: importances of segments against networks made by hand, what may be selected among, and runs that
//! were stopped.

use std::fs;
use std::path::Path;

use depthshrinker::device::Device;
use depthshrinker::graph::{NodeId, Positions, SegmentEnds};
use depthshrinker::measure::{LatencyRow, LatencyTable, RowWork, TableOptions, TableWork};
use depthshrinker::model::Model;
use depthshrinker::ops::step::Backend;
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::providers::SegmentTrial;
use depthshrinker::shrink::surgery::{Linearise, check_linearise, linearise};
use depthshrinker::shrink::{
    Importance, ImportanceRow, Judge, LayerMethod, LayerSearch, Layers, Mask, SegmentConfig, Selection,
    SensitivityConfig, norms,
};
use depthshrinker::train::{Interrupt, TrainConfig};
use libtest_mimic::Trial;

use crate::providers::{depthshrinker, folder_for_layers, json};
use crate::sensitivity::{images, model};
use crate::trial;

const REORDER: Linearise = Linearise { final_activation: true, padding: PaddingMode::Reorder };
const BORDER_BIAS: Linearise = Linearise { final_activation: true, padding: PaddingMode::BorderBias };

const CONFIG: SensitivityConfig = SensitivityConfig { images: 40, recalibration: 0, batch: 16, steps: 2 };
/// Seed of fresh weights.
const SEED: u64 = 9;
/// The last two blocks.
const OVER_BLOCKS: (usize, usize) = (44, 50);

fn row(trial: &SegmentTrial, importance: f64) -> ImportanceRow {
    ImportanceRow { segment: trial.segment, key: trial.key, importance, line: 0 }
}

/// One flag per block: whether it may be freed.
fn candidates(model: &Model, of: &[usize]) -> Vec<bool> {
    (0..model.graph.blocks.len()).map(|block| of.contains(&block)).collect()
}

/// With the padding at the front every segment is measured that the papers list; with a bias map those that are exact; and of
/// blocks that stay single convolutions alone.
fn candidates_of_methods() {
    let model = model();
    let positions = model.graph.positions().unwrap();
    let all = vec![true; model.graph.blocks.len()];
    let count = |method, candidates: &[bool], surgery| LayerSearch::new(method, &model, candidates, surgery).unwrap();
    let whole = count(LayerMethod::TwoStageDp, &all, &REORDER);
    assert_eq!(whole.trials().len(), positions.extended_segments().len());
    let merge = count(LayerMethod::LayerMerge, &all, &REORDER);
    assert_eq!(merge.trials().len(), positions.candidates().count());
    for method in [LayerMethod::TwoStageDp, LayerMethod::LayerMerge] {
        let exact = count(method, &all, &BORDER_BIAS);
        assert!(exact.trials().len() < merge.trials().len().min(whole.trials().len()));
        for trial in exact.trials() {
            check_linearise(&model.graph, &trial.selection, &BORDER_BIAS).unwrap();
        }
        let late = count(method, &candidates(&model, &[15, 16]), &REORDER);
        let of = |at: usize| positions.convs()[at - 1].block.index();
        assert!(late.trials().iter().all(|trial| trial.segment.at.len() == 1 || of(trial.segment.at.st + 1) >= 15));
        assert!(
            late.trials().iter().any(|trial| of(trial.segment.at.end) > of(trial.segment.at.st + 1)),
            "over blocks"
        );
    }
    let freed = linearise(&model, &Mask::new(candidates(&model, &[0, 1, 2])), &BORDER_BIAS).unwrap();
    let error = LayerSearch::new(LayerMethod::TwoStageDp, &freed, &all, &REORDER).unwrap_err().to_string();
    assert!(error.contains("lost its activations"), "{error}");
}

/// The network of a row, made by hand: linear over the last two blocks, or with one convolution drawn afresh.
fn made_by_hand(model: &Model, positions: &Positions, row: &ImportanceRow) -> Model {
    let name = |node: NodeId| model.graph.nodes[node].name.clone();
    let conv = |at: usize| name(positions.convs()[at - 1].node);
    if row.segment.at.len() == 1 {
        let fresh = Model::initialise(model.graph.clone(), SEED).unwrap();
        let mut made = model.clone();
        let node = positions.convs()[row.segment.at.st].node;
        for prefix in [node, node.next()].map(|node| format!("{}.", name(node))) {
            made.weights.extend(fresh.weights.clone().into_iter().filter(|(param, _)| param.starts_with(&prefix)));
        }
        assert_ne!(made.weights, model.weights);
        return made;
    }
    assert_eq!(row.segment.at, OVER_BLOCKS.into());
    let value = |at: usize| name(positions.convs()[at - 1].value);
    let freed = (45..50).filter_map(|at| positions.convs()[at - 1].activation.map(name)).collect();
    let mut layers = Layers { freed, activated: vec![value(50)], pruned: Vec::new() };
    match row.key {
        None => layers.activated.extend(row.segment.act_st.then(|| value(44))),
        Some(key) => {
            // Of both depthwise convolutions the one of smaller weights goes where the kernel is 3, both where it is 1.
            let (sums, mut depthwise) = (norms(model, positions), [46, 49]);
            depthwise.sort_by(|&a: &usize, &b| sums[a - 1].total_cmp(&sums[b - 1]));
            layers.pruned = depthwise[..(5 - key.kernel) / 2].iter().map(|&at| conv(at)).collect();
        }
    }
    let last = name(positions.segment(row.segment.at).unwrap().output());
    let keep = Mask::new(candidates(model, &(0..15).collect::<Vec<_>>()));
    let segments = vec![SegmentEnds { first: conv(45), last }];
    let selection = Selection { segments, layers: Some(layers), ..keep.into() };
    linearise(model, &selection, &REORDER).unwrap()
}

/// An importance is what a network made by hand loses: linear over two blocks, with an activation at its front or not; with the
/// smallest depthwise convolutions pruned; and drawn afresh where nothing is made linear. Rows that are known are not measured.
fn importances() {
    let (model, set, interrupt) = (model(), images(80), Interrupt::new());
    let judge = Judge::new(&Device::Cpu, &set, &CONFIG, 3, &interrupt).unwrap();
    let train = TrainConfig { batch: 16, ..TrainConfig::default() };
    let whole = judge.evaluate(&model).unwrap().top1;
    for method in [LayerMethod::TwoStageDp, LayerMethod::LayerMerge] {
        let search = LayerSearch::new(method, &model, &candidates(&model, &[15, 16]), &REORDER).unwrap();
        // All but two segments are given.
        let is_given = |trial: &&SegmentTrial| ![OVER_BLOCKS.into(), (3, 4).into()].contains(&trial.segment.at);
        let mut rows: Vec<ImportanceRow> =
            search.trials().iter().filter(is_given).map(|trial| row(trial, -1.25)).collect();
        let (before, total) = (rows.len(), search.trials().len());
        let (mut kept, mut last) = (Vec::new(), (0, 0));
        let mut keep = |rows: &[ImportanceRow]| {
            kept.push(rows.len());
            Ok(())
        };
        search.measure((&judge, &train, SEED), &mut rows, &mut |done, total| last = (done, total), &mut keep).unwrap();
        assert_eq!((last, kept), ((total + 1, total + 1), (before + 1..=total).collect()));
        assert!(rows[..before].iter().all(|row| row.importance == -1.25) && before < total);
        for row in &rows[before..] {
            let trained = judge.trained(&made_by_hand(&model, search.positions(), row), &train).unwrap();
            assert_eq!(row.importance, judge.evaluate(&trained).unwrap().top1 - whole, "{row:?}");
        }
        interrupted(&search, &train);
    }
}

fn interrupted(search: &LayerSearch<'_>, train: &TrainConfig) {
    let (set, interrupt) = (images(80), Interrupt::new());
    let judge = Judge::new(&Device::Cpu, &set, &CONFIG, 3, &interrupt).unwrap();
    interrupt.set();
    let stopped = search.measure((&judge, train, SEED), &mut Vec::new(), &mut |_, _| {}, &mut |_| Ok(()));
    assert!(matches!(stopped, Err(depthshrinker::Error::Interrupted(_))));
}

/// What is selected within a budget is exact and takes no more; where single convolutions alone are measured nothing merges.
fn budgets() {
    let model = model();
    let options = |keys| TableOptions { keys, bias_maps: false };
    for (method, keys) in [(LayerMethod::TwoStageDp, false), (LayerMethod::LayerMerge, true)] {
        let search = LayerSearch::new(method, &model, &[true; 17], &REORDER).unwrap();
        let work = TableWork::new(&model.graph, options(keys), Backend::Host).unwrap();
        // Every piece of work takes a millisecond.
        let time = |row: &RowWork| LatencyRow { key: row.key, ..LatencyRow::new(row.at, 1.0) };
        let table = LatencyTable::new(Path::new("t.csv"), work.rows.iter().map(time).collect()).unwrap();
        let times = search.times(&table).unwrap();
        assert_eq!(times.original_ms(), 52.0);
        // Longer segments cost more, and without an activation at an end more still.
        let rows = search.trials().iter().map(|trial| row(trial, -0.01 * (trial.segment.at.len() as f64).powi(2)));
        let importance = Importance::new(Path::new("i.csv"), rows.collect()).unwrap();
        for budget in [50.0, 40.0, 20.0] {
            let solution = search.within(&times, &importance, &SegmentConfig::default(), budget).unwrap();
            let selection = search.selection(&solution, &times).unwrap();
            assert!(solution.time_ms <= budget && solution.time_ms > budget - 3.0, "{}", solution.time_ms);
            assert_eq!(selection.latency_share, Some(solution.time_ms / 52.0));
            let layers = selection.layers.unwrap();
            assert!(!selection.segments.is_empty() || !layers.pruned.is_empty(), "{layers:?}");
        }
        // What cannot be is told from times alone, by what it would be told from importances.
        let early = search.check_budget(&times, 1.0).unwrap_err().to_string();
        let late = search.within(&times, &importance, &SegmentConfig::default(), 1.0).unwrap_err().to_string();
        assert!(early.contains("nothing takes 1 ms or less") && early == late, "{early} {late}");
        search.check_budget(&times, 50.0).unwrap();
        let other = LatencyTable::parse(Path::new("o.csv"), b"st,end,time\n0,1,1\n").unwrap();
        assert!(search.times(&other).is_err());
    }
}

/// What a selection of layers is compared with is what the solver makes of the same importances in other places, at equal time.
fn random_ones() {
    let dir = folder_for_layers();
    for method in ["two-stage-dp", "layer-merge"] {
        let args =
            ["shrink", "--model", "small.safetensors", "--config", "early.toml", "--method", method, "--out", method];
        let more = ["--latency-fraction", "0.95", "--finetune-epochs", "1", "--batch", "40", "--compare-random", "1"];
        let result = json(depthshrinker(dir.path(), &[&args[..], &more].concat()));
        assert_eq!(result["random_masks"].as_array().unwrap().len(), 1, "{method}");
        let stages = result["stages"].as_array().unwrap();
        assert!(stages.iter().any(|stage| stage["name"] == "random 1"), "{method}");
        let importance = Importance::read(&dir.path().join(method).join("importance.csv")).unwrap();
        let shuffled = importance.shuffled(1).unwrap();
        assert!(shuffled == importance.shuffled(1).unwrap() && shuffled != importance);
        let sorted = |of: &Importance| {
            let mut values: Vec<f64> = of.rows().map(|row| row.importance).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        assert_eq!(sorted(&shuffled), sorted(&importance));
        let of = |table: &Importance| table.rows().map(|row| (row.segment, row.key)).collect::<Vec<_>>();
        assert_eq!(of(&shuffled), of(&importance));
    }
}

/// A run that was killed while it measured goes on with the rows that are there, and ends with the same plan; other settings
/// measure anew.
fn goes_on() {
    let dir = folder_for_layers();
    let args = |more: &[&'static str]| {
        let common =
            ["search", "small.safetensors", "--method", "layer-merge", "--latency-fraction", "0.9", "--batch", "40"];
        [&common[..], &["--config", "early.toml", "--out", "a"], more].concat()
    };
    let plan = json(depthshrinker(dir.path(), &args(&[])));
    let at = |file: &str| dir.path().join("a").join(file);
    let whole = fs::read_to_string(at("importance.csv")).unwrap();
    assert!(at("latency-pruned.csv").is_file() && whole.starts_with("st,end,kernel,depthwise,importance\n"));
    // As if it had been killed after some rows, of which one says that it was not measured twice.
    let mut lines: Vec<&str> = whole.lines().collect();
    lines.truncate(lines.len() - 3);
    let marked = lines[1].rsplit_once(',').map(|(front, _)| format!("{front},-77")).unwrap();
    lines[1] = &marked;
    let leave = |text: &str| {
        fs::remove_file(at("plan.json")).unwrap();
        fs::write(at("importance.csv"), text).unwrap();
    };
    leave(&format!("{}\n", lines.join("\n")));
    json(depthshrinker(dir.path(), &["search", "--resume", "--out", "a"]));
    let again = fs::read_to_string(at("importance.csv")).unwrap();
    assert_eq!(again.lines().filter(|line| *line == marked).count(), 1);
    assert_eq!(again.lines().skip(2).collect::<Vec<_>>(), whole.lines().skip(2).collect::<Vec<_>>());
    leave(&again);
    let resumed = json(depthshrinker(dir.path(), &args(&["--resume", "--seed", "1"])));
    assert!(!fs::read_to_string(at("importance.csv")).unwrap().contains(&marked));
    assert!(plan["layers"].is_object() && resumed["layers"].is_object());
}

pub fn trials() -> Vec<Trial> {
    vec![
        trial("layers/candidates", candidates_of_methods),
        trial("layers/importances", importances),
        trial("layers/budgets", budgets),
        trial("layers/random ones", random_ones),
        trial("layers/goes on", goes_on),
    ]
}
