//! The method where none is named: it follows the budget, is named in whatever a run leaves, and is what naming it gives.

use std::fs;
use std::path::Path;

use depthshrinker::config::Config;
use depthshrinker::pipeline::check_search;
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::{Budget, SearchMethod, Selection};
use libtest_mimic::Trial;

use crate::networks::network;
use crate::providers::{depthshrinker, json};
use crate::sensitivity::folder;
use crate::trial;

/// Budgets as flags and in a file, and what chooses within them.
const ROWS: [(&[&str], &str, &str); 6] = [
    (&[], "", "sensitivity"),
    (&["--keep", "9"], "", "sensitivity"),
    (&["--remove", "3"], "budget = { latency_fraction = 0.9 }", "sensitivity"),
    (&["--latency-fraction", "0.9"], "", "operators"),
    (&["--budget-ms", "1000"], "budget = { keep = 3 }", "operators"),
    (&["--latency-fraction", "0.9"], "[search]\nmethod = \"no-residual\"", "no-residual"),
];

fn rule() {
    let of = SearchMethod::of_budget;
    for count in [Budget::Keep(3), Budget::KeepFraction(0.5), Budget::Remove(2)] {
        assert_eq!(of(count), SearchMethod::Sensitivity);
    }
    for time in [Budget::LatencyFraction(0.5), Budget::LatencyMs(2.0)] {
        assert_eq!(of(time), SearchMethod::Operators);
    }
    // What is named stands, whatever the budget, in a file of an older version, too.
    for (text, method) in [
        ("", SearchMethod::Sensitivity),
        ("budget = { latency_ms = 3.0 }", SearchMethod::Operators),
        ("[search]\nmethod = \"learned\"", SearchMethod::Learned),
        ("budget = { latency_ms = 3.0 }\n[search]\nmethod = \"learned\"", SearchMethod::Learned),
    ] {
        let config = Config::parse(text).unwrap();
        assert_eq!(config.method(), method, "{text:?}");
        assert_eq!(Config::parse(&config.to_toml().unwrap()).unwrap(), config);
    }
}

fn commands() {
    let dir = folder();
    let few = fs::read_to_string(dir.path().join("few.toml")).unwrap();
    let at = |file: &str| dir.path().join(file);
    for (index, (flags, settings, method)) in ROWS.into_iter().enumerate() {
        fs::write(at("c.toml"), format!("{settings}\n{few}")).unwrap();
        let search = |more: &[&str], out: &str| {
            let args = [&["search", "m.safetensors", "--config", "c.toml", "--out", out][..], flags, more].concat();
            let output = depthshrinker(dir.path(), &args).assert().success().get_output().clone();
            let told = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
            (told, fs::read_to_string(at(out).join("plan.json")).unwrap())
        };
        let (out, named) = (format!("o{index}"), format!("n{index}"));
        let ([told, progress], plan) = search(&[], &out);
        assert!(told.contains(&format!("\nby {method}\n")) && progress.contains(&format!("search: by {method}, for ")));
        assert_eq!(Selection::read(&at(&out).join("plan.json")).unwrap().method.unwrap().to_string(), method);
        assert_eq!(Config::read(&at(&out).join("config.toml")).unwrap().search.method.unwrap().to_string(), method);
        // What is found is what the name finds.
        if index % 3 == 0 {
            assert_eq!(search(&["--method", method], &named).1, plan, "{flags:?} {settings}");
        }
    }
    // The whole job, and a plan of an older version.
    let shrink =
        ["shrink", "--model", "m.safetensors", "--config", "few.toml", "--finetune-epochs", "1", "--batch", "40"];
    let result = json(depthshrinker(dir.path(), &[&shrink[..], &["--compare-random", "1"]].concat()));
    assert_eq!((result["method"].as_str(), result["random_masks"].as_array().unwrap().len()), (Some("sensitivity"), 1));
    assert!(fs::read_to_string(at("runs/shrink/report.html")).unwrap().contains("chosen by: sensitivity"));
    assert_eq!(Selection::parse(Path::new("p"), "{\"kept\": [1, 0]}").unwrap().method, None);
}

/// What a network or a setting does not allow is told before anything is trained.
fn refusals() {
    // Every family, both budgets.
    for name in ["mobilenetv2-0.35", "resnet18", "resnet50", "vgg19_bn", "efficientnet-lite0", "mnasnet-1.0"] {
        for budget in [Budget::KeepFraction(0.5), Budget::LatencyFraction(0.8)] {
            let mut config = Config { budget, ..Config::default() };
            config.merge.padding = PaddingMode::Reorder;
            check_search(&config, &network(name)).unwrap();
        }
    }
    let dir = folder();
    fs::write(dir.path().join("s.toml"), "[finetune]\nstart = \"searched\"\n").unwrap();
    let told = |args: &[&str]| {
        let output = depthshrinker(dir.path(), args).assert().failure().get_output().clone();
        String::from_utf8(output.stderr).unwrap()
    };
    for (budget, method) in [("--keep", "sensitivity"), ("--budget-ms", "operators")] {
        let error = told(&["shrink", "--config", "s.toml", budget, "9"]);
        let words = ["finetune.start", &format!("{method} trains none"), "search.method = \"learned\""];
        assert!(words.iter().all(|word| error.contains(word)) && error.lines().count() == 1, "{error}");
    }
    let compare = ["compare", "m.safetensors", "--config", "s.toml", "--list", "--methods"];
    let mut command = assert_cmd::Command::cargo_bin("depthshrinker").unwrap();
    command.current_dir(dir.path()).args(compare).arg("learned").assert().success();
    let mut command = assert_cmd::Command::cargo_bin("depthshrinker").unwrap();
    let output =
        command.current_dir(dir.path()).args(compare).arg("learned,entropy").assert().code(2).get_output().clone();
    assert!(String::from_utf8(output.stderr).unwrap().contains("entropy trains none"));
}

pub fn trials() -> Vec<Trial> {
    vec![trial("defaults/rule", rule), trial("defaults/commands", commands), trial("defaults/refusals", refusals)]
}
