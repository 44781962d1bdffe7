//! The command as scripts see it: JSON, exit codes, one line for what is wrong, the plan file.

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use depthshrinker::graph::Positions;
use depthshrinker::io::{ModelInfo, write_model};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use depthshrinker::shrink::Selection;
use depthshrinker::shrink::select::Method;
use libtest_mimic::Trial;
use serde_json::Value;
use tempfile::TempDir;

use crate::networks::positions;
use crate::trial;

const NETWORK: &str = "mobilenetv2-1.0";

/// A time that no two segments share, less for a segment than for its parts.
fn time(st: usize, end: usize) -> f64 {
    0.2 + 0.3 * ((end - st) as f64).sqrt() + 0.001 * st as f64
}

/// Tables of a MobileNetV2 in a folder: `t.csv` and `i.csv`, with keys `tk.csv` and `ik.csv`.
fn folder(positions: &Positions) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut times = "id,st,end,time,stdev\n".to_owned();
    for (id, at) in positions.segments().enumerate() {
        times.push_str(&format!("{id},{},{},{},0.01\n", at.st, at.end, time(at.st, at.end)));
    }
    let mut importances = "st,end,act_st,act_end,importance\n".to_owned();
    for segment in positions.extended_segments() {
        let (at, act_st, act_end) = (segment.at, u8::from(segment.act_st), u8::from(segment.act_end));
        let points = -0.1 * at.len() as f64 - 0.01 * at.st as f64;
        importances.push_str(&format!("{},{},{act_st},{act_end},{points}\n", at.st, at.end));
    }
    let (mut keyed, mut keyed_importances) =
        ("st,end,kernel,depthwise,time\n".to_owned(), "st,end,kernel,depthwise,importance\n".to_owned());
    for (at, key) in positions.candidates() {
        let row = format!("{},{},{},{}", at.st, at.end, key.kernel, u8::from(key.depthwise));
        keyed.push_str(&format!("{row},{}\n", 0.1 * key.kernel as f64 + time(at.st, at.end)));
        // Of the two depthwise convolutions of this one either can go.
        let preferred = (at.st, at.end, key.kernel) == (11, 17, 3);
        let points = if preferred { 300.0 } else { key.kernel as f64 - at.len() as f64 };
        keyed_importances.push_str(&format!("{row},{points}\n"));
    }
    for (name, text) in [("t", times), ("i", importances), ("tk", keyed), ("ik", keyed_importances)] {
        fs::write(dir.path().join(format!("{name}.csv")), text).unwrap();
    }
    dir
}

fn depthshrinker(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("depthshrinker").expect("the binary of this package");
    command.current_dir(dir).arg("select").args(args);
    command
}

fn json(dir: &Path, args: &[&str]) -> Value {
    let output = depthshrinker(dir, args).arg("--json").assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).expect("one JSON value on stdout")
}

fn fails(dir: &Path, args: &[&str], code: i32, words: &[&str]) {
    let output = depthshrinker(dir, args).assert().code(code).get_output().clone();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.stdout.is_empty());
    assert!(text.starts_with("error: ") && text.lines().count() == 1, "{args:?}: {text}");
    assert!(words.iter().all(|word| text.contains(word)), "{args:?}: {text}");
}

fn positions_of(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|p| p.as_u64().unwrap() as usize).collect()
}

/// The flags that give a method its tables.
fn tables(method: Method) -> Vec<&'static str> {
    match method {
        Method::LayerMerge => vec!["-t", "tk.csv", "-i", "ik.csv", "--network", NETWORK],
        Method::TwoStageDp => vec!["-t", "t.csv", "-i", "i.csv"],
        Method::Fastest => vec!["-t", "t.csv"],
        Method::NoResidual | Method::Random => vec!["-t", "t.csv", "--network", NETWORK],
        _ => vec!["-t", "t.csv", "--importance", "i.csv", "--network", NETWORK],
    }
}

/// Every method by name: the JSON has its keys and keeps the budget, and the table for people ends with the same
/// numbers.
fn every_method() {
    let positions = positions(NETWORK);
    let dir = folder(&positions);
    for method in Method::ALL {
        let args = [vec!["--method", method.name(), "--budget-ms", "24.5"], tables(method)].concat();
        let value = json(dir.path(), &args);
        let name = method.name();
        assert_eq!((&value["method"], &value["budget_ms"]), (&name.into(), &24.5.into()));
        assert!(value["time_ms"].as_f64().unwrap() <= 24.5);
        assert_eq!(value["objective"].is_null(), !method.needs_importance(), "{value}");
        let (activations, boundaries) = (positions_of(&value["activations"]), positions_of(&value["boundaries"]));
        assert_eq!((boundaries[0], boundaries[boundaries.len() - 1]), (0, 50));
        assert!(activations.iter().all(|position| boundaries.contains(position)), "{name}");
        assert_eq!(value.get("merged").is_some(), method == Method::LayerMerge);
        let by_block = matches!(method, Method::Knapsack | Method::TopK | Method::NoResidual | Method::Random);
        assert_eq!(value.get("kept").map(|kept| kept.as_array().unwrap().len()), by_block.then_some(17));
        if by_block {
            let freed = value["kept"].as_array().unwrap().iter().filter(|kept| **kept == 0).count();
            assert!(freed > 0 && boundaries.len() < 51, "{name}");
        }

        let output = depthshrinker(dir.path(), &args).assert().success().get_output().stdout.clone();
        let text = String::from_utf8(output).unwrap();
        assert!(text.contains(&format!("\n{name}: {:.6} of 24.5 ms", value["time_ms"].as_f64().unwrap())), "{text}");
        let list = activations.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        assert!(text.contains(&format!("activations  {list}\n")), "{text}");
        let named = args.contains(&NETWORK);
        assert_eq!(text.contains("blocks.5.0"), named, "{text}");
    }
}

/// With --network the two-stage dynamic programme answers the same and checks more.
fn the_network_only_checks() {
    let dir = folder(&positions(NETWORK));
    let args = ["--method", "two-stage-dp", "-t", "t.csv", "-i", "i.csv", "--budget-ms", "20"];
    assert_eq!(json(dir.path(), &args), json(dir.path(), &[&args[..], &["--network", NETWORK]].concat()));
    let of_another = [&args[..], &["--network", "vgg19_bn"]].concat();
    fails(dir.path(), &of_another, 1, &["t.csv: is of another network", "the blocks of vgg19_bn at 16"]);
    let least = json(dir.path(), &["--method", "fastest", "-t", "t.csv"]);
    assert!(least["budget_ms"].is_null());
    let least = least["time_ms"].as_f64().unwrap();
    fails(dir.path(), &[&args[..6], &["--budget-ms", "1"]].concat(), 2, &[&format!("{least:.4}")[..5], "or more"]);
    let exactly = least.to_string();
    let solution = json(dir.path(), &[&args[..6], &["--budget-ms", &exactly]].concat());
    assert_eq!(solution["time_ms"].as_f64(), Some(least));
    // α is published as 1.6; without it fewer segments stay.
    let stays = |alpha: &str| {
        let value = json(dir.path(), &[&args[..6], &["--budget-ms", "24", "--alpha", alpha]].concat());
        value["boundaries"].as_array().unwrap().len()
    };
    assert!(stays("0") < stays("1.6"));
}

fn wrong_usage() {
    let dir = folder(&positions(NETWORK));
    let knapsack = ["--method", "knapsack", "-t", "t.csv"];
    let with = |more: &[&'static str]| [&knapsack[..], more].concat();
    fails(dir.path(), &knapsack, 2, &["--method knapsack needs --budget-ms"]);
    fails(dir.path(), &with(&["--budget-ms", "20"]), 2, &["needs --importance"]);
    fails(dir.path(), &with(&["--budget-ms", "20", "-i", "i.csv"]), 2, &["needs --network"]);
    fails(dir.path(), &with(&["--budget-ms", "NaN", "-i", "i.csv", "--network", NETWORK]), 2, &["NaN is no time"]);
    fails(dir.path(), &with(&["--budget-ms", "20", "--alpha", "inf"]), 2, &["--alpha inf is out of range"]);
    fails(dir.path(), &with(&["--budget-ms", "20", "-i", "none.csv"]), 1, &["none.csv"]);
    fails(dir.path(), &with(&["--budget-ms", "20", "--network", "lenet"]), 2, &["unknown network \"lenet\""]);
    let plan = ["--method", "two-stage-dp", "-t", "t.csv", "-i", "i.csv", "--budget-ms", "20", "-o", "plan.json"];
    fails(dir.path(), &plan, 2, &["two-stage-dp", "leave out --output"]);
    assert!(!dir.path().join("plan.json").exists());
    fs::write(dir.path().join("bad.csv"), "st,end,time\n0,1,-3\n").unwrap();
    fails(dir.path(), &["--method", "fastest", "-t", "bad.csv"], 1, &["bad.csv: line 2: segment (0,1] takes -3 ms"]);
}

/// The plan file is the mask, and `merge` takes it for the network.
fn plan_files() {
    let dir = folder(&positions(NETWORK));
    let options = NetworkOptions { head_channels: Some(16), ..NetworkOptions::new(Shape::new(32, 32, 3), 5) };
    let model = Model::initialise(build("mobilenetv2-0.5", &options).unwrap(), 1).unwrap();
    write_model(&dir.path().join("m.safetensors"), &model, &ModelInfo::default()).unwrap();
    let args = ["--method", "no-residual", "-t", "t.csv", "--network", "m.safetensors", "--budget-ms", "24"];
    let value = json(dir.path(), &[&args[..], &["-o", "plan.json"]].concat());
    let plan = Selection::read(&dir.path().join("plan.json")).unwrap();
    assert_eq!(serde_json::to_value(&plan.keep).unwrap(), value["kept"]);
    let mut merge = Command::cargo_bin("depthshrinker").unwrap();
    merge.current_dir(dir.path()).args([
        "merge",
        "m.safetensors",
        "--plan",
        "plan.json",
        "-o",
        "merged.safetensors",
        "--json",
    ]);
    let merged: Value = serde_json::from_slice(&merge.assert().success().get_output().stdout).unwrap();
    let freed = value["kept"].as_array().unwrap().iter().filter(|kept| **kept == 0).count();
    assert_eq!(merged["segments"], freed);

    // Single layers, with the padding at the front, and with convolutions that the weights say are pruned.
    for (method, tables) in [("two-stage-dp", ["t.csv", "i.csv"]), ("layer-merge", ["tk.csv", "ik.csv"])] {
        let args = ["--method", method, "-t", tables[0], "-i", tables[1], "--network", "m.safetensors"];
        let value = json(dir.path(), &[&args[..], &["--budget-ms", "16", "-o", "layers.json"]].concat());
        let plan = Selection::read(&dir.path().join("layers.json")).unwrap();
        let mut merge = Command::cargo_bin("depthshrinker").unwrap();
        merge.current_dir(dir.path()).args(["merge", "m.safetensors", "--plan", "layers.json", "--padding", "reorder"]);
        merge.args(["-o", "merged.safetensors", "--json"]);
        let merged: Value = serde_json::from_slice(&merge.assert().success().get_output().stdout).unwrap();
        assert!(!plan.segments.is_empty() && merged["segments"] == plan.segments.len(), "{method}");
        let pruned = value["pruned"].as_array().map_or(0, Vec::len);
        assert_eq!((plan.layers.unwrap().pruned.len(), pruned > 0), (pruned, method == "layer-merge"));
    }
}

/// Where weights have to decide what is pruned, a name is not enough and a model file is.
fn pruning_by_weights() {
    let dir = folder(&positions(NETWORK));
    let options = NetworkOptions { head_channels: Some(16), ..NetworkOptions::new(Shape::new(32, 32, 3), 5) };
    let model = Model::initialise(build("mobilenetv2-1.0", &options).unwrap(), 1).unwrap();
    write_model(&dir.path().join("m.safetensors"), &model, &ModelInfo::default()).unwrap();
    let of = |network: &'static str| {
        ["--method", "layer-merge", "-t", "tk.csv", "-i", "ik.csv", "--budget-ms", "12", "--network", network]
    };
    let (named, file) = (json(dir.path(), &of(NETWORK)), json(dir.path(), &of("m.safetensors")));
    assert_eq!(named["merged"], file["merged"]);
    assert!(named.get("pruned").is_none(), "{named}");
    assert!(!positions_of(&file["pruned"]).is_empty(), "{file}");
    let text = depthshrinker(dir.path(), &of(NETWORK)).assert().success().get_output().stdout.clone();
    assert!(String::from_utf8(text).unwrap().contains("give a model file as --network"));
}

fn help() {
    let dir = tempfile::tempdir().unwrap();
    let output = depthshrinker(dir.path(), &["--help"]).assert().success().get_output().stdout.clone();
    let text = String::from_utf8(output).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    for method in Method::ALL {
        assert!(text.contains(&format!("- {}: {}", method.name(), method.about())), "{}", method.name());
    }
    assert!(["ICML 2022", "ICML 2023", "ICML 2024"].iter().all(|paper| text.contains(paper)));
}

pub fn trials() -> Vec<Trial> {
    vec![
        trial("command/every method", every_method),
        trial("command/with and without the network", the_network_only_checks),
        trial("command/wrong usage", wrong_usage),
        trial("command/plan files", plan_files),
        trial("command/pruning by weights", pruning_by_weights),
        trial("command/help", help),
    ]
}
