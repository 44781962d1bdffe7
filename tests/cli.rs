//! The command line as scripts see it: exit codes, one-line errors, machine output, the files of a run, and a run that is
//! killed and resumed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::time::{Duration, Instant};

use assert_cmd::Command;
use predicates::prelude::*;
use serde_json::Value;
use tempfile::TempDir;

/// A shrink run of seconds, with a search that trains.
const TINY: [&str; 16] = [
    "shrink",
    "--method",
    "learned",
    "--net",
    "mobilenetv2-0.25",
    "--head-channels",
    "64",
    "--train-limit",
    "256",
    "--test-limit",
    "100",
    "--train-epochs",
    "1",
    "--finetune-epochs",
    "1",
    "--measure-seconds=0",
];

fn depthshrinker(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("depthshrinker").expect("the binary of this package");
    command.current_dir(dir).args(args);
    command
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// Runs to success and parses standard output as one JSON value.
fn json(dir: &Path, args: &[&str]) -> Value {
    let output = depthshrinker(dir, args).arg("--json").assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).expect("one JSON value on stdout")
}

/// Fails with a code and one line that holds all of `words`.
fn fails(dir: &Path, args: &[&str], code: i32, words: &[&str]) {
    let assert = depthshrinker(dir, args).assert().code(code).stdout(predicate::str::is_empty());
    let text = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
    assert!(text.starts_with("error: ") && text.lines().count() == 1, "{args:?}: {text}");
    assert!(words.iter().all(|word| text.contains(word)), "{args:?}: {text}");
}

/// A tiny trained model, made once per call.
fn trained(dir: &Path) -> PathBuf {
    let args = [
        "train",
        "--net",
        "mobilenetv2-0.25",
        "--head-channels",
        "64",
        "--train-limit",
        "128",
        "--test-limit",
        "50",
        "--epochs",
        "1",
        "-q",
    ];
    depthshrinker(dir, &args).assert().success();
    dir.join("runs/train/original.safetensors")
}

#[test]
fn help_names_every_command() {
    let dir = folder();
    let mut all = predicate::str::contains("Common options").boxed();
    let commands = [
        "shrink", "train", "search", "finetune", "expand", "merge", "eval", "import", "export", "infer", "plan",
        "bench", "devices",
    ];
    for command in commands {
        all = all.and(predicate::str::contains(command)).boxed();
        depthshrinker(dir.path(), &[command, "--help"]).assert().success();
    }
    depthshrinker(dir.path(), &["--help"]).assert().success().stdout(all);
    depthshrinker(dir.path(), &["--version"]).assert().success().stdout(predicate::str::contains("depthshrinker"));
}

#[test]
fn wrong_usage_exits_with_2() {
    let dir = folder();
    for args in [
        &["shrnk"][..],
        &["shrink", "--kep", "3"],
        &["shrink", "--keep", "3", "--remove", "4"],
        &["shrink", "--resume", "--force"],
        &["merge", "a.safetensors"],
        &["merge", "a.safetensors", "-o", "b", "--padding", "no"],
        &["finetune", "a.safetensors", "--keep-list", "1,2"],
        &["devices", "--threads", "many"],
    ] {
        depthshrinker(dir.path(), args).assert().code(2).stdout(predicate::str::is_empty());
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "wrong usage leaves nothing behind");
}

#[test]
fn bad_settings_are_named_in_one_line() {
    let dir = folder();
    let path = dir.path();
    fails(path, &["shrink", "--keep", "99"], 2, &["budget", "keep 99", "17 blocks"]);
    fails(path, &["shrink", "--keep-fraction", "1.5"], 2, &["keep_fraction 1.5"]);
    fails(path, &["shrink", "--remove", "0"], 2, &["remove 0"]);
    fails(path, &["shrink", "--train-epochs", "0"], 2, &["train", "epochs"]);
    fails(path, &["shrink", "--batch", "0"], 2, &["batch"]);
    fails(path, &["shrink", "--net", "resnet-9000"], 2, &["resnet-9000", "mobilenetv2-"]);
    // Its blocks merge only with their padding at the front, which is told before anything is trained.
    fails(path, &["shrink", "--net", "resnet18"], 1, &["layer1.0", "--padding reorder"]);
    fails(path, &["shrink", "--precision", "f8"], 2, &["f8", "f32"]);
    fails(path, &["shrink", "--device", "tpu"], 2, &["tpu"]);
    fails(path, &["shrink", "--device", "cuda:99"], 1, &["cuda"]);
    fails(path, &["shrink", "--device", "cpu", "--precision", "f16"], 2, &["f32"]);
    fails(path, &["shrink", "--threads", "99999"], 2, &["threads"]);
    let forced = depthshrinker(path, &["devices"]).env("DEPTHSHRINKER_SIMD", "mmx").assert().code(2);
    let told = String::from_utf8_lossy(&forced.get_output().stderr).into_owned();
    assert!(told.lines().count() == 1 && told.contains("DEPTHSHRINKER_SIMD=mmx") && told.contains("scalar"), "{told}");
    fs::write(path.join("bad.toml"), "seed = 1\n[search.scores]\nlearning_rate = 3\n").unwrap();
    fails(path, &["shrink", "--config", "bad.toml"], 2, &["bad.toml", "line 3", "learning_rate"]);
    fails(path, &["shrink", "--config", "missing.toml"], 1, &["missing.toml"]);
    assert!(!path.join("runs").exists(), "nothing was started");
    // What would change nothing is told, also where the run ends for another reason.
    for (method, told) in [("sensitivity", true), ("learned", false)] {
        let args = ["shrink", "--search-epochs", "9", "--method", method, "--model", "missing.safetensors"];
        let output = depthshrinker(path, &args).assert().failure().get_output().stderr.clone();
        let text = String::from_utf8_lossy(&output);
        assert_eq!(text.contains("--search-epochs changes nothing"), told, "{text}");
    }
}

#[test]
fn a_missing_or_damaged_model_fails_in_one_line() {
    let dir = folder();
    fs::write(dir.path().join("bad.safetensors"), b"\xff\xff\xff\xff\xff\xff\xff\x7f{}").unwrap();
    for command in ["eval", "search", "infer"] {
        fails(
            dir.path(),
            &[command, "missing.safetensors", if command == "infer" { "x.png" } else { "-q" }],
            1,
            &["missing"],
        );
    }
    fails(dir.path(), &["eval", "bad.safetensors"], 1, &["bad.safetensors"]);
}

#[test]
fn plan_and_devices_print_json() {
    let dir = folder();
    let plan = json(dir.path(), &["plan", "mobilenetv2-1.0", "--batch", "1"]);
    let steps = plan["steps"].as_array().unwrap().len() as u64;
    // A step is one kernel when batch-norm is folded; the logits are copied to where they can be read.
    assert_eq!(plan["launches"].as_u64(), Some(steps + 1), "{plan}");
    let step = json(dir.path(), &["plan", "mobilenetv2-1.0", "--batch", "2", "--training", "--precision", "f16"]);
    let count = |kernel: &str| -> u64 {
        let kernels = step["kernels"].as_object().unwrap();
        kernels.iter().filter(|(name, _)| name.starts_with(kernel)).map(|(_, count)| count.as_u64().unwrap()).sum()
    };
    // 52 batch-norms, whose sums a convolution takes: of the result, and of the gradient where it forms its input on load.
    // What several nodes, an addition or the pool read is stored: behind 15 projections, and at the head. Pointwise layers of few
    // weights, up to the projections of the 14x14 maps, have both gradients at once.
    for (kernel, expected) in [
        ("batch_norm_statistics<", 0),
        ("batch_norm_normalise", 16),
        ("batch_norm_backward_sums", 16),
        ("batch_norm_backward_finish", 52),
        ("batch_norm_backward_apply", 1),
        ("dense_direct_bn_forward", 1),
        ("depthwise_bn_forward", 17),
        ("depthwise_bn_backward", 17),
        ("pointwise_bn_forward", 34),
        ("pointwise_bn_backward", 23),
        ("pointwise_bn_dgrad", 11),
        ("pointwise_bn_wgrad", 11),
        ("cross_entropy", 1),
    ] {
        assert_eq!(count(kernel), expected, "{kernel}");
    }
    assert!(plan["flops"].as_u64().is_some_and(|f| f >= 2 * 300_774_272), "{plan}");
    assert!(plan["roofline_ms"].as_object().is_some_and(|r| !r.is_empty()));
    assert!(json(dir.path(), &["devices"])["cpu"].is_object());
}

#[test]
fn a_tiny_run_leaves_a_complete_folder() {
    let dir = folder();
    let result = json(dir.path(), &[&TINY[..], &["--keep", "8", "--compare-random", "1", "--seed", "3"]].concat());
    let run = dir.path().join("runs/shrink");
    for file in [
        "config.toml",
        "metrics.jsonl",
        "checkpoint.safetensors",
        "original.safetensors",
        "shrunk.safetensors",
        "merged.safetensors",
        "merged.onnx",
        "plan.json",
        "result.json",
        "report.html",
    ] {
        assert!(run.join(file).is_file(), "{file} is missing");
    }
    assert_eq!(result, serde_json::from_slice::<Value>(&fs::read(run.join("result.json")).unwrap()).unwrap());
    assert_eq!((result["schema"].as_u64(), result["seed"].as_u64()), (Some(1), Some(3)));
    assert_eq!(result["data"]["train"], 256);
    let kept: Vec<u64> = result["kept"].as_array().unwrap().iter().map(|k| k.as_u64().unwrap()).collect();
    assert_eq!((kept.len(), kept.iter().sum::<u64>()), (17, 8));
    let names: Vec<&str> = result["networks"].as_array().unwrap().iter().map(|n| n["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["original", "unmerged", "merged"]);
    assert_eq!(result["networks"][1]["top1"], result["networks"][2]["top1"], "merged as accurate as unmerged");
    assert_eq!(result["merge"]["segments"], 9);
    assert!(result["merge"]["max_rel_error"].as_f64().unwrap() <= 1e-4);
    assert!(result["networks"][2]["latency_ms"]["median"].as_f64().unwrap() > 0.0);
    assert_eq!(result["random_masks"].as_array().unwrap().len(), 1);
    let stages: Vec<&str> = result["stages"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(stages, ["train", "search", "finetune", "random 1", "merge", "evaluate", "measure"]);

    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let records: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(records.iter().any(|r| r["stage"] == "search" && r["scores"].as_array().is_some_and(|s| s.len() == 17)));
    assert!(fs::read_to_string(run.join("report.html")).unwrap().contains("</html>"));

    // A finished run is not touched without being asked to.
    fails(dir.path(), &TINY, 2, &["finished run", "--force"]);
    // The echo reproduces the run, bit for bit.
    let echo = ["shrink", "--config", "runs/shrink/config.toml", "--out", "again", "-q", "--threads", "1"];
    depthshrinker(dir.path(), &echo).assert().success();
    same_files(&run, &dir.path().join("again"));
}

/// All models of two runs are the same, byte for byte.
fn same_files(a: &Path, b: &Path) {
    for file in ["original.safetensors", "shrunk.safetensors", "merged.safetensors", "merged.onnx", "plan.json"] {
        assert!(fs::read(a.join(file)).unwrap() == fs::read(b.join(file)).unwrap(), "{file} differs");
    }
}

#[test]
fn a_killed_run_resumes_to_the_same_bits() {
    let dir = folder();
    let path = dir.path();
    let whole = Instant::now();
    depthshrinker(path, &[&TINY[..], &["--out", "whole", "-q"]].concat()).assert().success();
    let whole = whole.elapsed();
    // Stopped again and again, wherever it stands, before a part is let run to its end. An interrupt saves in the middle
    // of a stage; a kill loses what came after the last checkpoint. There is nothing to resume before the settings are
    // written.
    let start = [&TINY[..], &["--out", "parts", "-q"]].concat();
    let part = [&start[..], &["--resume"]].concat();
    for i in 0..8u32 {
        let begun = path.join("parts/config.toml").is_file();
        let mut child = Process::new(assert_cmd::cargo::cargo_bin("depthshrinker"))
            .args(if begun { &part } else { &start })
            .current_dir(path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(whole.mul_f64(0.1 + 0.03 * f64::from(i)));
        if i % 2 == 0 {
            interrupt(&child);
            std::thread::sleep(whole.mul_f64(0.05));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    fails(path, &[&TINY[..], &["--out", "parts"]].concat(), 2, &["parts holds"]);
    depthshrinker(path, &part).assert().success();
    same_files(&path.join("whole"), &path.join("parts"));
    fails(path, &[&part[..], &["--seed", "9"]].concat(), 2, &["other settings"]);
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_saves_and_says_how_to_go_on() {
    let dir = folder();
    let path = dir.path();
    // More epochs than anybody waits for: it is interrupted in its first stage for certain.
    let args =
        ["train", "--net", "mobilenetv2-0.25", "--train-limit", "128", "--test-limit", "50", "--epochs", "100000"];
    let child = Process::new(assert_cmd::cargo::cargo_bin("depthshrinker"))
        .args(args)
        .current_dir(path)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while !fs::metadata(path.join("runs/train/metrics.jsonl")).is_ok_and(|m| m.len() > 0) {
        assert!(started.elapsed() < Duration::from_secs(60), "no epoch within a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    let last = text.lines().last().unwrap_or_default();
    assert!(last.starts_with("error: interrupted") && last.contains("--resume"), "{text}");
    assert!(path.join("runs/train/checkpoint.safetensors").is_file());
    assert!(!path.join("runs/train/original.safetensors").exists());
}

/// Between stages nothing looks at the first signal for a while: a second one at once is the same wish, as `timeout` sends
/// two, a later one stops at once.
#[cfg(unix)]
#[test]
fn measuring_is_interrupted_too() {
    let run = |out: &str, pause: Duration| {
        let dir = folder();
        let path = dir.path();
        let child = Process::new(assert_cmd::cargo::cargo_bin("depthshrinker"))
            .args([&TINY[..TINY.len() - 1], &["--measure-seconds=20", "--out", out]].concat())
            .current_dir(path)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let started = Instant::now();
        while !path.join(out).join("merged.onnx").is_file() {
            assert!(started.elapsed() < Duration::from_secs(120), "no merged network within two minutes");
            std::thread::sleep(Duration::from_millis(20));
        }
        interrupt(&child);
        std::thread::sleep(pause);
        interrupt(&child);
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(!path.join(out).join("result.json").exists());
        // Nothing is lost.
        depthshrinker(path, &["shrink", "--out", out, "--resume", "--measure-seconds=0", "-q"]).assert().success();
        text.lines().last().unwrap_or_default().to_owned()
    };
    let last = run("same", Duration::from_millis(50));
    assert!(last.starts_with("error: interrupted; ") && last.contains("--resume"), "{last}");
    let last = run("twice", Duration::from_millis(1200));
    assert!(last.starts_with("error: interrupted"), "{last}");
}

#[cfg(unix)]
fn interrupt(child: &Child) {
    assert!(Process::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
}

#[cfg(not(unix))]
fn interrupt(_: &Child) {}

#[test]
fn the_stages_alone_make_the_whole() {
    let dir = folder();
    let path = dir.path();
    let model = trained(path);
    let model = model.to_str().unwrap();
    let few = ["--train-limit", "128", "--test-limit", "50"];

    let plan =
        json(path, &[&["search", model, "--method", "learned", "--remove", "9", "--epochs", "1"], &few[..]].concat());
    assert_eq!(plan["kept"].as_array().unwrap().iter().filter(|k| **k == 0).count(), 9);
    assert_eq!(plan["scores"].as_array().unwrap().len(), 17);
    assert!(path.join("runs/search/searched.safetensors").is_file());

    let finetune = ["finetune", model, "--plan", "runs/search/plan.json", "--epochs", "1"];
    let shrunk = json(path, &[&finetune[..], &few].concat());
    assert_eq!(shrunk["kept"], plan["kept"]);
    fails(path, &["finetune", model, "--out", "x"], 2, &["--keep-list"]);
    fails(path, &["finetune", "--keep-list", "1,0", "--out", "x"], 2, &["model"]);
    fails(path, &["search", "--out", "x"], 2, &["model"]);
    assert!(!path.join("x").exists());

    let merge = ["merge", "runs/finetune/shrunk.safetensors", "-o", "merged.safetensors"];
    let merged = json(path, &merge);
    assert_eq!(merged["segments"], 9);
    assert!(merged["max_rel_error"].as_f64().unwrap() <= 1e-4 && merged["max_abs_error"].is_number());

    let eval = |file: &str| json(path, &["eval", file, "--test-limit", "50"]);
    let (shrunk, merged) = (eval("runs/finetune/shrunk.safetensors"), eval("merged.safetensors"));
    assert_eq!(shrunk["top1"], merged["top1"]);
    assert!(merged["params"].as_u64().unwrap() > 0 && merged["images"] == 50);
}

#[test]
fn a_finetuning_is_its_settings_its_mask_and_its_files() {
    let dir = folder();
    let path = dir.path();
    let model = trained(path);
    let model = model.to_str().unwrap();
    let teacher = path.join("teacher.safetensors");
    fs::copy(model, &teacher).unwrap();
    let list = "1,1,1,1,1,0,1,1,1,1,1,1,1,1,1,1,1";
    let few = ["--train-limit", "128", "--test-limit", "50", "--epochs", "1", "--teacher", "teacher.safetensors"];
    let first = json(path, &[&["finetune", model, "--keep-list", list][..], &few].concat());
    let bytes = |file: &str| fs::read(path.join(file)).unwrap();
    let shrunk = bytes("runs/finetune/shrunk.safetensors");

    // Another mask is another run, even of one that has ended.
    let other = list.replace("1,0,1", "0,1,1");
    fails(path, &["finetune", model, "--keep-list", &other, "--resume"], 2, &["other settings", "--out"]);
    fails(path, &["finetune", "--teacher", model, "--resume", "--lr", "0.5"], 2, &["other settings"]);
    // No flag needs to be given again, and the same file in another place is the same.
    fs::copy(model, path.join("copy.safetensors")).unwrap();
    assert_eq!(json(path, &["finetune", "--resume"]), first);
    assert_eq!(json(path, &["finetune", "copy.safetensors", "--resume"])["kept"], first["kept"]);
    assert!(bytes("runs/finetune/shrunk.safetensors") == shrunk);
    let again = json(path, &["finetune", "--config", "runs/finetune/config.toml", "--out", "again"]);
    assert_eq!((&again["kept"], &again["top1"]), (&first["kept"], &first["top1"]));
    assert!(bytes("again/shrunk.safetensors") == shrunk);

    // Other weights under the same names.
    let retrain = ["train", "--net", "mobilenetv2-0.25", "--head-channels", "64", "--epochs", "1", "--seed", "7", "-q"];
    let retrain = [&retrain[..], &["--train-limit", "128", "--test-limit", "50", "--out", "seven"]].concat();
    depthshrinker(path, &retrain).assert().success();
    fs::copy(path.join("seven/original.safetensors"), &teacher).unwrap();
    fails(path, &["finetune", "--resume"], 2, &["other model files"]);
    fs::copy(model, &teacher).unwrap();
    fs::copy(path.join("seven/original.safetensors"), model).unwrap();
    fails(path, &["finetune", "--resume"], 2, &["other model files"]);
    assert!(bytes("runs/finetune/shrunk.safetensors") == shrunk);

    // The model would go with the old run.
    fails(path, &["finetune", model, "--keep-list", list, "--out", "runs/train", "--force"], 2, &["would remove"]);
    assert!(path.join("runs/train/original.safetensors").is_file());
    // What shrink would have to ignore.
    fails(path, &["shrink", "--config", "runs/finetune/config.toml", "--out", "x"], 2, &["finetune.kept"]);
}

#[test]
fn there_must_be_a_run_to_go_on_with() {
    let dir = folder();
    for command in ["train", "shrink"] {
        fails(dir.path(), &[command, "--out", "mistyped", "--resume"], 2, &["mistyped holds no run", "--out"]);
    }
    fails(dir.path(), &["finetune", "m", "--keep-list", "1,0", "--resume"], 2, &["runs/finetune holds no run"]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn only_stages_that_run_are_checked_and_a_result_elsewhere_ends_a_run_too() {
    let dir = folder();
    let path = dir.path();
    // The batches of search and finetuning, 64, are larger than the set.
    let train = ["train", "--net", "mobilenetv2-0.25", "--train-limit", "32", "--test-limit", "20", "--batch", "16"];
    let train = [&train[..], &["--epochs", "1", "--out", "r", "-o", "m.safetensors"]].concat();
    json(path, &train);
    fails(path, &train, 2, &["r holds a finished run"]);
    assert!(fs::read(path.join("m.safetensors")).unwrap() == fs::read(path.join("r/original.safetensors")).unwrap());
    let few = ["--train-limit", "32", "--test-limit", "20", "--epochs", "1"];
    let learned = ["search", "m.safetensors", "--method", "learned"];
    fails(path, &[&learned[..], &few].concat(), 2, &["batch 64 is larger than the 32"]);
    let search = [&learned[..], &["--batch", "32", "-o", "p.json"], &few].concat();
    json(path, &search);
    fails(path, &search, 2, &["runs/search holds a finished run"]);
    let shrink = ["shrink", "--model", "m.safetensors", "--train-limit", "32", "--test-limit", "20"];
    fails(path, &shrink, 2, &["batch 64 is larger than the 32"]);
}

#[test]
fn the_batch_of_an_evaluation_changes_its_rounding_alone() {
    let dir = folder();
    let path = dir.path();
    let model = trained(path);
    let eval = |batch: usize| {
        fs::write(path.join("e.toml"), format!("[evaluate]\nbatch = {batch}\n")).unwrap();
        json(path, &["eval", model.to_str().unwrap(), "--test-limit", "50", "--config", "e.toml"])
    };
    let (small, large) = (eval(7), eval(250));
    assert_eq!((&small["top1"], &small["images"]), (&large["top1"], &large["images"]));
    let loss = |told: &Value| told["loss"].as_f64().unwrap();
    assert!((loss(&small) - loss(&large)).abs() < 1e-6, "{small} {large}");
}

#[test]
fn what_the_system_says_is_told_once() {
    let dir = folder();
    let assert = depthshrinker(dir.path(), &["eval", "missing.safetensors"]).assert().code(1);
    let expected = "error: missing.safetensors: No such file or directory (os error 2)\n";
    #[cfg(unix)]
    assert_eq!(String::from_utf8_lossy(&assert.get_output().stderr), expected);
}

#[test]
fn merge_takes_a_keep_list_and_refuses_what_is_wrong() {
    let dir = folder();
    let path = dir.path();
    let model = trained(path);
    let model = model.to_str().unwrap();
    let list = "1,0,1,0,1,0,1,0,1,0,1,0,1,0,1,0,1";
    for padding in ["reorder", "border-bias"] {
        let args =
            ["merge", model, "--keep-list", list, "--padding", padding, "--no-final-activation", "-o", "m.safetensors"];
        assert_eq!(json(path, &args)["segments"], 8);
    }
    let published = json(path, &["merge", model, "--keep-list", "mbv2-1.4-ds-a", "-o", "a.safetensors"]);
    assert_eq!(published["segments"], 6);
    let unknown = depthshrinker(path, &["merge", model, "--keep-list", "ds-z", "-o", "m2"]).assert().code(2);
    let told = String::from_utf8_lossy(&unknown.get_output().stderr).into_owned();
    assert!(told.contains("\"ds-z\"") && told.contains("mbv2-1.4-ds-f"), "{told}");
    fails(path, &["merge", model, "--keep-list", "1,0", "-o", "m2"], 2, &["2 entries", "17 blocks"]);
    fails(path, &["merge", model, "-o", "m2"], 2, &["--keep-list"]);
    fails(path, &["merge", model, "--keep-list", list, "-o", model], 2, &["over itself"]);
    fails(path, &["merge", "m.safetensors", "--keep-list", list, "-o", "m2"], 1, &["merged already"]);
    assert!(!path.join("m2").exists());
}

#[test]
fn infer_reads_tensors_and_pictures() {
    let dir = folder();
    let path = dir.path();
    let model = trained(path);
    let model = model.to_str().unwrap();
    write_input(&path.join("x.safetensors"), 3, 28);
    depthshrinker(path, &["infer", model, "--input", "x.safetensors", "--output", "y.safetensors"]).assert().success();
    let bytes = fs::read(path.join("y.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.tensor("logits").unwrap().shape(), [3, 10]);

    write_input(&path.join("wide.safetensors"), 1, 32);
    fails(path, &["infer", model, "--input", "wide.safetensors"], 1, &["[1, 1, 32, 32]", "[n, 1, 28, 28]"]);
    fails(path, &["infer", model], 2, &["--input"]);

    let picture = image::GrayImage::from_fn(40, 30, |x, y| image::Luma([(x * y % 256) as u8]));
    picture.save(path.join("a.png")).unwrap();
    let told = json(path, &["infer", model, "a.png"]);
    assert_eq!(told[0]["top"].as_array().unwrap().len(), 5);
    assert!(told[0]["top"][0]["label"].as_str().is_some_and(|label| !label.is_empty()));
    depthshrinker(path, &["infer", model, "a.png"]).assert().success().stdout(predicate::str::contains("%"));
    fs::write(path.join("b.png"), b"no picture").unwrap();
    fails(path, &["infer", model, "b.png"], 1, &["b.png"]);
}

#[test]
fn foreign_weights_come_in_and_go_out() {
    let dir = folder();
    let path = dir.path();
    let weights = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/import/torchvision-old.pth");
    let import = ["import", "mobilenetv2-0.1", weights, "-o", "m.safetensors", "--image-size", "64"];
    let told = json(path, &import);
    assert_eq!((told["names"].as_str(), told["classes"].as_u64()), (Some("torchvision"), Some(7)));
    assert_eq!(told["input"], serde_json::json!([3, 64, 64]));
    fails(
        path,
        &["import", "mobilenetv2-0.2", weights, "-o", "n.safetensors"],
        1,
        &["expected [16, 48, 1, 1]", "features.7."],
    );
    fails(path, &["import", "nonet", weights, "-o", "n.safetensors"], 2, &["unknown network"]);
    fs::write(path.join("w.npz"), "x").unwrap();
    fails(
        path,
        &["import", "mobilenetv2-0.1", "w.npz", "-o", "n.safetensors"],
        1,
        &["w.npz", "give a .pth", ".safetensors"],
    );
    assert!(!path.join("n.safetensors").exists());

    for (output, precision) in [("folded.safetensors", "f32"), ("m.onnx", "f32"), ("half.onnx", "f16")] {
        json(path, &["export", "m.safetensors", "-o", output, "--precision", precision]);
    }
    let size = |name: &str| fs::metadata(path.join(name)).unwrap().len() as f64;
    assert!((1.8..2.0).contains(&(size("m.onnx") / size("half.onnx"))));
    let bytes = fs::read(path.join("folded.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.tensor("conv_stem.weight").unwrap().shape(), [8, 3, 3, 3]);
    assert_eq!(tensors.tensor("conv_stem.bias").unwrap().shape(), [8]);
    assert!(tensors.tensor("bn1.weight").is_err());
    fails(path, &["export", "m.safetensors", "-o", "m.tflite"], 2, &[".onnx or .safetensors"]);
    fails(path, &["export", "m.safetensors", "-o", "n.onnx", "--precision", "bf16"], 2, &["f32 or f16"]);
    fails(path, &["export", "m.safetensors", "-o", "n.safetensors", "--precision", "f16"], 2, &["f32"]);
    fails(path, &["export", "m.safetensors", "-o", "m.safetensors"], 2, &["over itself"]);
}

/// `input` of n grey images of one size, NCHW.
fn write_input(path: &Path, n: usize, side: usize) {
    let data: Vec<u8> = (0..n * side * side).flat_map(|i| ((i % 17) as f32 / 8.0 - 1.0).to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![n, 1, side, side], &data).unwrap();
    safetensors::serialize_to_file([("input", view)], None, path).unwrap();
}

/// Every stage on CUDA kernels without a GPU: a run too short to learn anything, in f16 with loss scaling.
#[test]
fn the_whole_job_runs_on_the_emulator() {
    let dir = folder();
    let config = r#"
device = "emulator"
precision = "f16"
budget = { keep_fraction = 0.5 }
data = { name = "embedded", train_limit = 48, test_limit = 16 }
train = { epochs = 1, batch = 16 }
search = { method = "learned", train = { epochs = 1, batch = 16 } }
finetune = { train = { epochs = 1, batch = 16 } }
measure = { batch = 4, seconds = 0.2 }

[network]
name = "mobilenetv2-0.25"
input_stride = 2
stage_strides = [1, 2, 1, 1, 1, 2, 1]
head_channels = 64
"#;
    fs::write(dir.path().join("tiny.toml"), config).unwrap();
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    let mut command = depthshrinker(dir.path(), &["shrink", "--config", "tiny.toml", "--out", "run", "--json"]);
    let output = command.env("DEPTHSHRINKER_CACHE", cache).assert().success().get_output().stdout.clone();
    let result: Value = serde_json::from_slice(&output).expect("one JSON value on stdout");
    assert_eq!(result["device"], "emulator of sm_80");
    assert_eq!(result["precision"], "f16");
    assert_eq!(result["networks"].as_array().unwrap().len(), 3);
    assert!(result["merge"]["segments"].as_u64().unwrap() > 0);
    assert!(result["merge"]["max_rel_error"].as_f64().unwrap() <= 1e-4);
}
