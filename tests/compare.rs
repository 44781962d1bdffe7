//! `compare`: the list of jobs, jobs in processes of their own, what is put together, and that nothing is done twice or
//! mixed with other settings.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use assert_cmd::Command;
use depthshrinker::io::{ModelInfo, write_model};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use serde_json::Value;

const SETTINGS: &str = "device = \"cpu\"\n[data]\ntrain_limit = 120\ntest_limit = 40\n\
    [search.sensitivity]\nimages = 40\nrecalibration = 1\nbatch = 40\n[search.train]\nepochs = 1\nbatch = 40\n\
    [finetune.train]\nepochs = 2\nbatch = 40\n[measure]\nseconds = 0\n\
    [compare]\nmethods = [\"entropy\", \"random\"]\nbudgets = [{ latency_fraction = 0.85 }]\nseeds = [4, 7]\nrandom_masks = 2\n\
    recovery_steps = [0, 2, 3, 5, 100]\n";

/// A folder with a network for the embedded images and settings that are done in no time.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let options = NetworkOptions {
        input_stride: Some(1),
        head_channels: Some(16),
        ..NetworkOptions::new(Shape::new(28, 28, 1), 10)
    };
    let model = Model::initialise(build("mobilenetv2-0.1", &options).unwrap(), 2).unwrap();
    write_model(&dir.path().join("m.safetensors"), &model, &ModelInfo::default()).unwrap();
    fs::write(dir.path().join("c.toml"), SETTINGS).unwrap();
    dir
}

fn compare(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("depthshrinker").expect("the binary of this package");
    command.current_dir(dir).env_remove("SLURM_ARRAY_TASK_ID");
    command.args(["compare", "m.safetensors", "--config", "c.toml", "--out", "c"]).args(args);
    command
}

fn json(mut command: Command) -> Value {
    let output = command.arg("--json").assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).expect("one JSON value on stdout")
}

fn fails(mut command: Command, words: &[&str]) {
    let output = command.assert().failure().get_output().clone();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let last = text.lines().last().unwrap_or_default();
    assert!(last.starts_with("error: ") && words.iter().all(|word| last.contains(word)), "{words:?}: {text}");
}

fn names(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|job| job["name"].as_str().unwrap().to_owned()).collect()
}

fn modified(dir: &Path, name: &str) -> SystemTime {
    fs::metadata(dir.join("c").join(name).join("result.json")).unwrap().modified().unwrap()
}

#[test]
fn jobs_are_listed_by_settings_or_flags_alike() {
    let dir = folder();
    let listed = json(compare(dir.path(), &["--list"]));
    let expected = [
        "latency-fraction-0.85-entropy-seed-4",
        "latency-fraction-0.85-entropy-seed-7",
        "latency-fraction-0.85-random-0-seed-4",
        "latency-fraction-0.85-random-0-seed-7",
        "latency-fraction-0.85-random-1-seed-4",
        "latency-fraction-0.85-random-1-seed-7",
    ];
    assert_eq!(names(&listed), expected);
    assert!(listed.as_array().unwrap().iter().enumerate().all(|(i, job)| job["job"] == i && job["finished"] == false));
    let plain = compare(dir.path(), &["--list"]).assert().success().get_output().stdout.clone();
    let lines: Vec<String> = expected.iter().enumerate().map(|(i, name)| format!("{i} {name}\n")).collect();
    assert_eq!(String::from_utf8(plain).unwrap(), lines.concat());
    // Nothing was made, neither by listing nor in a Slurm array.
    let mut in_array = compare(dir.path(), &["--list"]);
    assert_eq!(
        json({
            in_array.env("SLURM_ARRAY_TASK_ID", "3");
            in_array
        }),
        listed
    );
    assert!(!dir.path().join("c").exists());

    let flags = ["--list", "--methods", "gradient", "--latency-fractions", "0.9,0.8", "--seeds", "1"];
    assert_eq!(
        names(&json(compare(dir.path(), &flags))),
        ["latency-fraction-0.9-gradient-seed-1", "latency-fraction-0.8-gradient-seed-1"]
    );
    let all = json(compare(dir.path(), &["--list", "--methods", "sensitivity,random", "--random-masks", "5"]));
    assert_eq!(all.as_array().unwrap().len(), 2 + 5 * 2);
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let dir = folder();
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    for (lines, words) in [
        ("methods = []", ["compare.methods", "one or more"]),
        ("seeds = [1, 2, 1]", ["compare.seeds", "1 twice"]),
        ("budgets = [{ latency_fraction = 1.5 }]", ["latency_fraction 1.5", "below 1"]),
        ("random_masks = 0", ["compare.random_masks = 0", "give 1"]),
        ("recovery_steps = [3, 0, 3]", ["compare.recovery_steps", "3 twice"]),
        ("methods = [\"taylor\"]", ["line 2", "taylor"]),
        ("method = \"random\"", ["line 2", "method"]),
    ] {
        write("bad.toml", &format!("[compare]\n{lines}\n"));
        let mut command = Command::cargo_bin("depthshrinker").unwrap();
        command.current_dir(dir.path()).args(["compare", "m.safetensors", "--config", "bad.toml", "--list"]);
        fails(command, &words);
    }
    let mut without = Command::cargo_bin("depthshrinker").unwrap();
    without.current_dir(dir.path()).args(["compare", "--list"]);
    fails(without, &["compare needs a trained model"]);
    let of_size = SETTINGS.replace("latency_fraction = 0.85", "keep = 9");
    write("size.toml", &of_size);
    let matched = ["compare", "m.safetensors", "--config", "size.toml", "--list", "--match-latency"];
    let mut command = Command::cargo_bin("depthshrinker").unwrap();
    command.current_dir(dir.path()).args(matched);
    fails(command, &["--match-latency", "keep 9", "--latency-fractions"]);
    let mut layers = Command::cargo_bin("depthshrinker").unwrap();
    let of_size = ["compare", "m.safetensors", "--config", "size.toml", "--list", "--methods", "layer-merge"];
    layers.current_dir(dir.path()).args(of_size);
    fails(layers, &["layer-merge needs budgets that are times", "keep 9"]);
    fails(compare(dir.path(), &["--list", "--match-latency=0.9"]), &["search.match_latency = 0.9", "0.5"]);
    fails(compare(dir.path(), &["--job", "6"]), &["there is no job 6", "0 to 5"]);
    let absent = ["--selections", "none", "--job", "0"];
    fails(compare(dir.path(), &absent), &["none/latency-fraction-0.85-entropy-seed-4/plan.json"]);
    let chosen = dir.path().join("s/latency-fraction-0.85-entropy-seed-4");
    fs::create_dir_all(&chosen).unwrap();
    for (plan, words) in [
        ("{\"kept\": [1, 0], \"method\": \"entropy\"}", ["2", "17"]),
        (
            "{\"kept\": [1,1,1,1,0,1,1,1,1,1,1,1,1,1,1,1,1], \"method\": \"gradient\"}",
            ["chosen by gradient, not by entropy", "plan.json"],
        ),
    ] {
        fs::write(chosen.join("plan.json"), plan).unwrap();
        fails(compare(dir.path(), &["--selections", "s", "--job", "0"]), &words);
    }
    fails(compare(dir.path(), &["--merge"]), &["no job in c is finished"]);
    let mut array = compare(dir.path(), &[]);
    array.env("SLURM_ARRAY_TASK_ID", "4x");
    fails(array, &["SLURM_ARRAY_TASK_ID", "4x", "--job"]);
}

/// Jobs in processes of their own, by number and by Slurm's variable; then the rest, of which nothing is done twice.
#[test]
fn jobs_are_done_once_wherever_they_run() {
    let dir = folder();
    let listed = names(&json(compare(dir.path(), &["--list"])));
    let mut in_array = compare(dir.path(), &[]);
    in_array.env("SLURM_ARRAY_TASK_ID", "3");
    let third = json(in_array);
    json(compare(dir.path(), &["--job", "0"]));
    let some = json(compare(dir.path(), &["--merge"]));
    let jobs_of = |found: &Value| -> Vec<u64> {
        found["trials"].as_array().unwrap().iter().map(|trial| trial["job"].as_u64().unwrap()).collect()
    };
    assert_eq!((jobs_of(&some), &some["jobs"]), (vec![0, 3], &Value::from(6)));
    assert_eq!(some["trials"][1]["kept"], third["kept"]);
    assert_eq!(some["methods"][0]["top1_over_random"], Value::Null, "no seed has both");

    // A job that was killed behind its last checkpoint goes on, and ends with the same bits.
    let shrunk = dir.path().join("c").join(&listed[3]).join("shrunk.safetensors");
    let before = fs::read(&shrunk).unwrap();
    for file in ["result.json", "merged.safetensors"] {
        fs::remove_file(shrunk.with_file_name(file)).unwrap();
    }
    let first = modified(dir.path(), &listed[0]);
    let all = json(compare(dir.path(), &[]));
    assert_eq!(jobs_of(&all), [0, 1, 2, 3, 4, 5]);
    assert_eq!((modified(dir.path(), &listed[0]), fs::read(&shrunk).unwrap()), (first, before));
    assert_eq!(json(compare(dir.path(), &["--merge"])), all);
    assert_eq!(json(compare(dir.path(), &["--job", "3"]))["kept"], third["kept"]);

    // A job is a shrink by the settings in its folder.
    let config = format!("c/{}/config.toml", listed[3]);
    let mut alone = Command::cargo_bin("depthshrinker").unwrap();
    alone.current_dir(dir.path()).args(["shrink", "--config", &config, "--out", "alone"]).assert().success();
    assert_eq!(fs::read(dir.path().join("alone/shrunk.safetensors")).unwrap(), fs::read(&shrunk).unwrap());

    what_was_put_together(dir.path(), &all);

    // Of other settings nothing is taken, and nothing is run over it.
    for args in [&["--merge", "--finetune-epochs", "1"][..], &["--job", "0", "--latency", "macs"]] {
        fails(compare(dir.path(), args), &["c/latency-fraction-0.85-entropy-seed-4", "other settings", "--out"]);
    }
    let mut model = depthshrinker::io::read_model(&dir.path().join("m.safetensors")).unwrap().0;
    model.weights.values_mut().next().unwrap().data[0] += 1.0;
    write_model(&dir.path().join("m.safetensors"), &model, &ModelInfo::default()).unwrap();
    fails(compare(dir.path(), &["--merge"]), &["another model"]);
}

/// The summary, from the trials by hand.
fn what_was_put_together(dir: &Path, all: &Value) {
    let trials = all["trials"].as_array().unwrap();
    let top1 = |job: usize| trials[job]["top1"].as_f64().unwrap();
    // Jobs 0 and 1 are entropy's with seeds 4 and 7; 2 and 3 are of one random mask, 4 and 5 of another.
    assert_eq!(trials[2]["kept"], trials[3]["kept"]);
    assert_eq!(trials[4]["kept"], trials[5]["kept"]);
    assert_ne!(trials[2]["kept"], trials[4]["kept"]);
    let pairs: Vec<f64> =
        [(0, 2), (0, 4), (1, 3), (1, 5)].iter().map(|&(own, other)| top1(own) - top1(other)).collect();
    let entropy = &all["methods"][0];
    let difference = &entropy["top1_over_random"];
    let close = |value: &Value, expected: f64| {
        let got = value.as_f64().unwrap();
        assert!((got - expected).abs() < 1e-9 * expected.abs().max(1.0), "{got} and {expected}");
    };
    close(&difference["mean"], pairs.iter().sum::<f64>() / 4.0);
    assert_eq!(difference["better"], pairs.iter().filter(|pair| **pair > 0.0).count());
    assert_eq!(
        (&entropy["method"], &entropy["trials"], &difference["pairs"]),
        (&"entropy".into(), &2.into(), &4.into())
    );
    close(&entropy["top1"]["mean"], (top1(0) + top1(1)) / 2.0);
    close(&entropy["top1"]["deviation"], (top1(0) - top1(1)).abs() / 2f64.sqrt());
    let budget = &all["budgets"][0];
    assert_eq!((&budget["masks"], &budget["seeds"]), (&2.into(), &2.into()));
    for trial in trials {
        let share = trial["latency_share"].as_f64().unwrap();
        assert!(share <= 0.85 && (trial["method"] != "random" || share >= 0.95 * 0.85), "{share}");
        let steps: Vec<u64> =
            trial["recovery"].as_array().unwrap().iter().map(|point| point["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [0, 2, 3, 5, 6], "two epochs of three steps, and what was asked for");
    }
    let last = |job: usize| trials[job]["recovery"][4]["loss"].as_f64().unwrap();
    close(&entropy["recovery"][4]["loss"], (last(0) + last(1)) / 2.0);
    // Before the first step nothing depends on the seed but the mask; what is merged is what the last step left.
    assert_eq!(trials[2]["recovery"][0], trials[3]["recovery"][0]);
    close(&trials[0]["recovery"][4]["top1"], top1(0));
    let kept = |job: usize, block: usize| trials[job]["kept"][block].as_f64().unwrap();
    for block in 0..17 {
        close(&entropy["kept"][block], (kept(0, block) + kept(1, block)) / 2.0);
    }
    // Of two points in time and accuracy one may beat the other; then it alone is on the front.
    let point = |row: &Value| (row["latency_share"]["mean"].as_f64().unwrap(), row["top1"]["mean"].as_f64().unwrap());
    let methods = all["methods"].as_array().unwrap();
    for row in methods {
        let own = point(row);
        let beaten = methods.iter().map(point).any(|other| other.0 <= own.0 && other.1 >= own.1 && other != own);
        assert_eq!(row["on_front"], !beaten);
    }

    let read = |file: &str| fs::read_to_string(dir.join("c").join(file)).unwrap();
    assert_eq!(&serde_json::from_str::<Value>(&read("methods.json")).unwrap(), all);
    let rows = read("methods.csv");
    assert_eq!(rows.lines().count(), 7);
    assert!(rows.lines().next().unwrap().split(',').any(|column| column == "top1"), "{rows}");
    let curves = read("recovery.csv");
    assert_eq!(curves.lines().count(), 1 + 6 * 5);
    assert!(curves.starts_with("budget,job,loss,method,seed,step,top1,mask\n"), "{curves}");
    let page = read("methods.html");
    for drawn in
        ["Accuracy over time", "top-1 % on the test images", "test loss", "block 16: kept in", "class=\"front\""]
    {
        assert!(page.contains(drawn), "{drawn}");
    }
    assert!(page.contains("entropy") && page.contains("6 of 6 jobs are finished") && page.contains("<svg"));
}

/// A job that cannot be done is told and counted, the others are done.
#[test]
fn a_job_that_fails_stops_no_other() {
    let dir = folder();
    // No mask takes so little time.
    let settings = SETTINGS.replace("latency_fraction = 0.85 }", "latency_fraction = 0.01 }, { keep = 12 }");
    fs::write(dir.path().join("c.toml"), settings).unwrap();
    let mut command = compare(dir.path(), &["--methods", "no-residual", "--seeds", "4"]);
    let output = command.assert().failure().get_output().clone();
    let (told, table) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    assert!(told.contains("job 0") && told.contains("or more"), "{told}");
    assert!(told.lines().last().unwrap().contains("1 of 2 jobs failed"), "{told}");
    assert!(table.contains("keep 12") && table.contains("1 of 2 jobs are finished"), "{table}");
}

/// One table is measured for all jobs, and budgets are matched by the clock: within the tolerance, or told how far they are.
#[test]
fn budgets_are_matched_by_the_clock() {
    let dir = folder();
    let args = ["--methods", "no-residual,random", "--random-masks", "1", "--seeds", "4", "--latency", "measured"];
    let matched = [&args[..], &["--match-latency=0.3"]].concat();
    let found = json(compare(dir.path(), &matched));
    let table = fs::read(dir.path().join("c/latency.csv")).unwrap();
    for trial in found["trials"].as_array().unwrap() {
        let number = |key: &str| trial[key].as_f64().unwrap();
        let error = number("measured_share") / 0.85 - 1.0;
        assert!((number("budget_error") - error).abs() < 1e-9, "{trial}");
        assert_eq!(trial["matches"], error.abs() <= 0.3, "{trial}");
        let job = dir.path().join("c").join(format!(
            "latency-fraction-0.85-{}-seed-4",
            if trial["mask"].is_null() { "no-residual".to_owned() } else { "random-0".to_owned() }
        ));
        assert_eq!(fs::read(job.join("latency.csv")).unwrap(), table);
        let plan: Value = serde_json::from_str(&fs::read_to_string(job.join("plan.json")).unwrap()).unwrap();
        assert_eq!(plan["kept"], trial["kept"]);
        assert!((plan["matched"]["target"].as_f64().unwrap() - 0.85).abs() < 1e-12);
        assert_eq!(plan["matched"]["share"], trial["measured_share"]);
    }
    // The same choices, finetuned for longer: nothing is chosen or timed again.
    let longer = ["--selections", "c", "--out", "d", "--finetune-epochs", "4"];
    let mut command = Command::cargo_bin("depthshrinker").unwrap();
    command.current_dir(dir.path()).args(["compare", "m.safetensors", "--config", "c.toml"]);
    command.args(&matched).args(longer);
    let again = json(command);
    assert!(!dir.path().join("d/latency.csv").exists());
    for (before, after) in found["trials"].as_array().unwrap().iter().zip(again["trials"].as_array().unwrap()) {
        let same = ["kept", "measured_share", "latency_share", "budget_error", "mask", "method"];
        assert_eq!(same.map(|key| &before[key]), same.map(|key| &after[key]));
        let steps = |trial: &Value| trial["recovery"].as_array().unwrap().last().unwrap()["step"].clone();
        assert_eq!((steps(before), steps(after)), (6.into(), 12.into()));
        assert_eq!(before["recovery"][0], after["recovery"][0], "what was chosen");
    }
    for row in found["methods"].as_array().unwrap() {
        assert_eq!(row["measured_share"]["deviation"], Value::Null);
        assert!(row["matching"].as_u64().unwrap() <= 1 && row["largest_budget_error"].is_number());
    }
    // What is measured already is not measured again, and jobs of it are known.
    assert_eq!(json(compare(dir.path(), &[&matched[..], &["--merge"]].concat())), found);
    // Nothing comes so near, which is told.
    let far = [&args[..], &["--match-latency=0.0001", "--out", "far"]].concat();
    let mut command = Command::cargo_bin("depthshrinker").unwrap();
    command.current_dir(dir.path()).args(["compare", "m.safetensors", "--config", "c.toml"]).args(&far);
    let output = command.assert().success().get_output().clone();
    let (told, table) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    assert!(told.contains("the nearest of") && table.contains("the farthest of them"), "{told}{table}");
    assert!(told.contains(" done, about ") && table.contains("matched"), "{told}");
}
