//! `benches/gpu`, the script for GPU hosts, without a GPU.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::Value;
use tempfile::TempDir;

use super::folder;

/// The script for GPU hosts with a binary, in a folder where it writes to `out`.
fn script(dir: &TempDir, binary: &Path, options: &[&str]) -> Command {
    let mut command = Command::new("python3");
    command.current_dir(dir.path()).arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/gpu"));
    command.args(["out", "--quick", "--bin"]).arg(binary).args(options);
    command
}

/// What it found.
fn result(dir: &TempDir) -> Value {
    let text = fs::read_to_string(dir.path().join("out/result.json")).expect("the script writes it");
    serde_json::from_str(&text).expect("JSON")
}

/// The script for GPU hosts, its logic without a GPU.
#[test]
fn the_script_for_gpu_hosts_reports_every_part() {
    let dir = folder();
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    let run = |only: &str, device: &str| {
        script(&dir, &assert_cmd::cargo::cargo_bin("depthshrinker"), &["--device", device, "--only", only])
            .env("DEPTHSHRINKER_CACHE", &cache)
            .env_remove("OUT")
            .assert()
    };
    let outcomes = || -> Vec<(String, String)> {
        let result = result(&dir);
        let word = |row: &Value, key: &str| row[key].as_str().expect("a word").to_owned();
        let rows = result["parts"].as_array().expect("a list").iter();
        rows.map(|row| (word(row, "part"), word(row, "outcome"))).collect()
    };
    run("devices,compile,check,same,bench kernels,bench table,tuned,memcheck", "emulator").success();
    let expected = [
        ("environment", "ok"),
        ("devices", "ok"),
        ("compile", "ok"),
        ("check f32", "ok"),
        ("check f16", "ok"),
        ("bench kernels mobilenetv2-0.25 f16", "ok"),
        ("bench kernels mobilenetv2-0.25 f32", "ok"),
        ("bench table", "ok"),
        ("tuned network mobilenetv2-0.25 f16", "ok"),
        ("same bits twice", "ok"),
        ("compute-sanitizer memcheck", "missing"),
        ("compute-sanitizer racecheck", "missing"),
    ];
    assert_eq!(outcomes(), expected.map(|(part, outcome)| (part.to_owned(), outcome.to_owned())));
    let table = fs::read_to_string(dir.path().join("out/result.md")).unwrap();
    assert!(table.contains("| check f16 | ok |") && table.contains("| mobilenetv2-0.25 | f16 | original | dgrad |"));
    assert!(table.contains("| tuned / own |") && table.contains("| mobilenetv2-0.25 | f16 | merged | inference | – |"));
    assert!(dir.path().join("out/tuned-mobilenetv2-0.25-f16.json").is_file());
    assert!(dir.path().join("out/roofline-mobilenetv2-0.25-f16.svg").is_file());
    // Without a GPU the checks fail, the rest is told all the same, and the exit code says so.
    run("devices,check", "cuda:98").code(1);
    assert_eq!(outcomes().iter().filter(|(_, outcome)| outcome == "failed").count(), 3);
    run("devices", "emulator").code(1);
}

/// A program of a folder, from the text of a script.
#[cfg(unix)]
fn program(dir: &TempDir, name: &str, text: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.path().join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A GPU whose kernels are wrong, and one that a kernel takes away: what is known by then is told.
#[cfg(unix)]
#[test]
fn the_script_for_gpu_hosts_keeps_what_failing_parts_found() {
    let dir = folder();
    // `check` differs in f32; in f16 it loses the device wherever the dense family runs. `bench` hangs after two records.
    let text = r#"#!/bin/sh
case "$*" in
*"check --list"*) echo '["conv/dense/a/forward", "conv/dense/a/add", "conv_bn/a", "pool/a", "pool/b"]' ;;
*"check conv/dense/ "*) echo '{"device": "d", "cases": 1, "failed": 1, "results": [
        {"name": "conv/dense/a/forward", "difference": "the device is lost"}]}'; exit 1 ;;
*"check "*"/ "*f16*) echo '{"device": "d", "cases": 3, "failed": 0, "results": [{"name": "a", "difference": null}]}' ;;
*"check "*f16*) echo '{"device": "d", "cases": 2, "failed": 2, "results": [
        {"name": "conv/dense/a/forward", "difference": "the device is lost"},
        {"name": "pool/a", "difference": "not run: conv/dense/a/forward lost the device"}]}'; exit 1 ;;
*"check "*) echo '{"device": "d", "cases": 2, "failed": 1, "results": [{"name": "pool/x", "difference": "y: 1 for 2"}]}'
    echo "error: 1 of 2 cases differ" >&2; exit 1 ;;
*"bench kernels"*)
    while [ "$1" != --out ]; do shift; done; mkdir -p "$2"
    layer='"pass": "fwd", "precision": "f16", "shape": "s", "count": {"original": 1}, "roofline_us": 1'
    echo "{\"precision\": \"f16\", \"layers\": [{\"name\": \"a\", $layer, \"time_us\": 2.0}, {\"name\": \"b\", $layer}]}" \
        >"$2/kernels.json"
    sleep 60 ;;
esac
"#;
    let binary = program(&dir, "depthshrinker", text);
    let parts = ["--only", "check f,kernels mobilenetv2-0.25 f16", "--minutes", "0.2"];
    script(&dir, &binary, &["--device", "emulator", "--python", "no-python"]).args(parts).assert().code(1);
    let result = result(&dir);
    let (parts, found) = (result["parts"].as_array().unwrap(), &result["results"]);
    let note =
        |name: &str| parts.iter().find(|row| row["part"] == name).expect(name)["note"].as_str().unwrap().to_owned();
    assert_eq!(found["check f32"]["different"]["pool/x"], "y: 1 for 2");
    assert!(note("check f32").contains("pool/x"));
    let families = found["check f16"]["families"].as_object().unwrap();
    assert!(families["conv/dense/"]["different"]["conv/dense/a/forward"].as_str().unwrap().contains("lost"));
    assert_eq!((families.len(), &families["pool/"]["failed"]), (3, &0.into()), "{families:?}");
    assert!(note("check f16").contains("conv/dense") && !note("check f16").contains("pool"));
    let part = "bench kernels mobilenetv2-0.25 f16";
    assert!(parts.iter().any(|row| row["part"] == part && row["outcome"] == "timed out"), "{parts:?}");
    assert_eq!(found[part]["layers"].as_array().map(Vec::len), Some(2));
    let table = fs::read_to_string(dir.path().join("out/result.md")).unwrap();
    assert!(
        table.contains("| check f32 | pool/x | y: 1 for 2 |")
            && table.contains("| check f16 | conv/dense/a/forward | the device is lost |"),
        "{table}"
    );
    assert!(table.contains("| mobilenetv2-0.25 | f16 | original | fwd | – | – |"), "{table}");
}

/// Counters of a profiler beside the emulator's, of the launches of a case, whatever else is printed among them.
#[cfg(unix)]
#[test]
fn the_script_for_gpu_hosts_compares_counters() {
    let dir = folder();
    let binary = program(
        &dir,
        "depthshrinker",
        r#"#!/bin/sh
case "$*" in
"devices --json") echo '{"nvrtc": null, "gpus": [{"name": "a GPU", "arch": 70}]}' ;;
"check --list --json") echo '["conv/pointwise/n2_9x7x16/a", "conv/pointwise/n2_9x7x16/ab", "optimizer/sgd/a"]' ;;
*"optimizer/sgd/a --counters"*) echo "error: no compiler" >&2; exit 1 ;;
*"--counters --device emulator"*) echo '{"results": [{"name": "conv/pointwise/n2_9x7x16/ab", "counters": {
    "loads": {"sectors": 100, "requests": 25}, "stores": {"sectors": 40, "requests": 10},
    "shared_loads": {"wavefronts": 8}, "shared_stores": {"wavefronts": 4}}}]}' ;;
esac
"#,
    );
    // A V100 has no copies past the registers, and one of the metrics is not there.
    program(
        &dir,
        "ncu",
        r#"#!/bin/sh
case "$*" in *ldgsts*) echo "error: no such metric" >&2; exit 1 ;; esac
cat <<END
==PROF== Connected to process 1
==PROF== Profiling "a" - 0: 0%....100% - 1 pass
{"results": []}
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","a(int, int)","","l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum","sector","90"
"0","1","a(int, int)","","l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum","","n/a"
"1","1","b","","l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum","sector","20"
"1","1","b","","smsp__inst_executed.sum","inst","1,234"
==PROF== Disconnected from process 1
END
"#,
    );
    let path = std::env::join_paths(
        std::iter::once(dir.path().to_path_buf()).chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    );
    let options = ["--device", "cuda", "--only", "devices,counters", "--python", "no-python"];
    script(&dir, &binary, &options).env("PATH", path.unwrap()).assert().code(1);
    let result = result(&dir);
    let part = result["parts"].as_array().unwrap().iter().find(|row| row["part"] == "counters f16").expect("a row");
    let note = "2 cases, counts within 10.0 % of the emulator's; nothing of the emulator: error: no compiler";
    assert_eq!((part["outcome"].as_str(), part["note"].as_str()), (Some("ok"), Some(note)));
    let table = fs::read_to_string(dir.path().join("out/result.md")).unwrap();
    for row in [
        "| conv/pointwise/n2_9x7x16/ab | 2 | global load sectors | 110 | 100 | 1.100 |",
        "| conv/pointwise/n2_9x7x16/ab | 2 | instructions | 1234 | – | – |",
        "| optimizer/sgd/a | 2 | global load sectors | 110 | – | – |",
    ] {
        assert!(table.contains(row), "{table}");
    }
    assert!(!table.contains("shared load"), "{table}");
}
