//! `bench` as scripts see it, and its formulas against numbers computed by hand.

mod gpu_script;
mod table;

use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::time::Duration;

use assert_cmd::Command;
use depthshrinker::device::cache::Cache;
use depthshrinker::device::emulator::{Emulator, EmulatorOptions};
use depthshrinker::device::gpu::Gpu;
use depthshrinker::device::{Backend, Device};
use depthshrinker::dtype::Dtype;
use depthshrinker::graph::{ConvFamily, Graph};
use depthshrinker::measure::{DataSheet, Findings, LayerPass, LayerRecord, Limits, TimedLayer, peak_memory};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::ops::step::ComputeUnit;
use depthshrinker::pipeline::{Bench, network_cases};
use depthshrinker::shape::Shape;
use serde_json::{Value, json};
use tempfile::TempDir;

fn bench(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("depthshrinker").expect("the binary of this package");
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    command.current_dir(dir).arg("bench").args(args).env("DEPTHSHRINKER_CACHE", cache);
    command
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// Runs to success and parses standard output as a list of records.
fn records(dir: &Path, args: &[&str]) -> Vec<Value> {
    let output = bench(dir, args).arg("--json").assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).expect("one JSON list on stdout")
}

const TINY: [&str; 10] =
    ["mobilenetv2-0.25", "--image", "32", "24", "--input-stride", "1", "--batch", "2", "--seconds", "0"];

/// Keys of a layer's record, timed or not.
const LAYER_KEYS: &str = "activation activation_limit bias c_in c_out config count device family groups h kernel n name \
    padding pass precision reads_image residual shape stride w";
/// Keys that its time adds.
const LAYER_TIME_KEYS: &str = "byte_utilization bytes flop_utilization flop_utilization_of flops flops_per_byte iqr_us \
    operand_sets roofline_fraction roofline_us samples time_us warm_up";
/// Keys of a network's record that was timed.
const NETWORK_KEYS: &str = "batch byte_utilization bytes device flop_utilization flop_utilization_of flops images_per_s \
    iqr_us memory_bytes name network pass precision roofline_fraction samples time_us warm_up";

fn keys(record: &Value) -> Vec<&str> {
    record.as_object().expect("an object").keys().map(String::as_str).collect()
}

fn sorted<'a>(lists: &[&'a str]) -> Vec<&'a str> {
    let mut keys: Vec<&str> = lists.iter().flat_map(|list| list.split_whitespace()).collect();
    keys.sort_unstable();
    keys
}

/// Utilizations of a time that was taken. How high they are says nothing here: the peaks are measured for a moment only,
/// on a machine that may have other work.
fn check_utilization(record: &Value) {
    for key in ["flop_utilization", "byte_utilization", "roofline_fraction"] {
        let value = record[key].as_f64().unwrap_or(f64::NAN);
        assert!(value > 0.0 && value.is_finite(), "{key} is {value}: {record}");
    }
}

#[test]
fn layers_cost_what_a_hand_computes() {
    let options = NetworkOptions::new(Shape::new(224, 224, 3), 1000);
    let graph = build("mobilenetv2-1.0", &options).unwrap();
    let passes = [LayerPass::ALL.as_slice(), &[LayerPass::BothGradients]].concat();
    let of = |backend| TimedLayer::of_networks(&[&graph], 128, &passes, backend).unwrap();
    let (layers, host) = (of(Backend::Cuda), of(Backend::Host));
    let among = |layers: &[TimedLayer], name: &str, pass| {
        layers.iter().find(|l| l.name == name && l.pass == pass).expect(name).clone()
    };
    let find = |name: &str, pass| among(&layers, name, pass);
    let gigaflops = |layer: &TimedLayer| (layer.flops() as f64 / 1e7).round() / 100.0;
    let megabytes = |layer: &TimedLayer| (layer.bytes(2) as f64 / 1e5).round() / 10.0;
    // Table (a) of the kernel notes at 16 bits: expand of the second block, its depthwise, a projection with residual.
    for (name, flops, bytes) in [
        ("conv_stem", 2.77, 141.3),
        ("blocks.0.0.conv_dw", 0.92, 205.5),
        ("blocks.1.0.conv_pw", 4.93, 359.7),
        ("blocks.1.0.conv_dw", 0.69, 385.4),
        ("blocks.1.1.conv_pwl", 2.77, 154.1),
        ("conv_head", 5.14, 20.9),
    ] {
        let layer = find(name, LayerPass::Forward);
        assert_eq!((gigaflops(&layer), megabytes(&layer)), (flops, bytes), "{name}");
    }
    // blocks.1.0.conv_pw, batch 128: x = 112·112·16 = 200704, y = 112·112·96 = 1204224 an image, w = 1536, and pairs of 96
    // channels' numbers: statistics, running ones, γ and β, their gradients.
    let (n, x, y, w, pair) = (128, 200_704, 1_204_224, 1_536, 192);
    let macs = 112 * 112 * w;
    for (layers, pass, flops, elements) in [
        (&layers, LayerPass::Forward, 2 * macs, n * (x + y) + w + 96),
        (&layers, LayerPass::InputGradient, 2 * macs, n * (x + y) + w),
        (&layers, LayerPass::WeightGradient, 2 * macs, n * (x + y) + w),
        (&host, LayerPass::BothGradients, 4 * macs, n * (2 * x + y) + 2 * w),
        // Convolution with statistics x, y; normalisation y, z.
        (&layers, LayerPass::StepForward, 2 * macs, n * (x + 3 * y) + w + 5 * pair),
        (&host, LayerPass::StepForward, 2 * macs, n * (x + 3 * y) + w + 5 * pair),
        // Sums y, dz; then dy formed from y, dz, for both gradients at once.
        (&layers, LayerPass::StepBackward, 4 * macs, n * (2 * x + 4 * y) + 2 * w + 9 * pair),
        (&host, LayerPass::StepBackward, 4 * macs, n * (2 * x + 4 * y) + 2 * w + 7 * pair),
    ] {
        let layer = among(layers, "blocks.1.0.conv_pw", pass);
        assert_eq!((layer.flops(), layer.bytes(4)), (n * flops, 4 * elements), "{pass}");
        assert_eq!(layer.cost.unit, ComputeUnit::Matrix);
    }
    // With many weights a GPU forms dy for each gradient; here dx is added to that of the shortcut.
    let (x, y, w, pair) = (14 * 14 * 96, 14 * 14 * 576, 96 * 576, 2 * 576);
    let many = find("blocks.4.1.conv_pw", LayerPass::StepBackward);
    assert_eq!(many.bytes(4), 4 * (n * (3 * x + 6 * y) + 2 * w + 13 * pair));
    // A residual is read forward; backward it is read under an activation only, its gradient is written.
    let (x, y) = (56 * 56 * 144, 56 * 56 * 24);
    let step = find("blocks.1.1.conv_pwl", LayerPass::StepForward);
    assert_eq!(step.bytes(4), 4 * (128 * (x + 4 * y) + 144 * 24 + 5 * 48));
    // The image needs no gradient.
    assert!(!layers.iter().any(|l| l.name == "conv_stem" && l.pass == LayerPass::InputGradient));
    let stem = find("conv_stem", LayerPass::StepBackward);
    assert_eq!(stem.flops(), 128 * 2 * 112 * 112 * 27 * 32);
    // Every convolution of the network is in the list, as often as it occurs.
    let count = |pass| layers.iter().filter(|l| l.pass == pass).map(|l| l.counts[0]).sum::<usize>();
    assert_eq!((count(LayerPass::Forward), count(LayerPass::InputGradient)), (52, 51));
    let dw = find("blocks.1.0.conv_dw", LayerPass::Forward);
    assert_eq!((dw.problem.family(), dw.cost.unit), (ConvFamily::Depthwise, ComputeUnit::Vector));
}

#[test]
fn a_gpu_is_known_by_the_words_of_its_name() {
    let of = |name: &str| DataSheet::of(name).map(|sheet| sheet.name);
    for (name, entry) in [
        ("NVIDIA H100 80GB HBM3", Some("H100 SXM")),
        ("NVIDIA H100 PCIe", Some("H100 PCIe")),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", Some("H200 SXM")),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("Tesla V100-SXM2-16GB", Some("V100 SXM2")),
        ("Tesla V100-PCIE-16GB", Some("V100 PCIe")),
        ("Tesla V100S-PCIE-32GB", None),
        ("NVIDIA A100-SXM4-40GB", Some("A100 40GB")),
        ("NVIDIA A100-PCIE-40GB", Some("A100 40GB")),
        ("NVIDIA A100-SXM4-80GB", Some("A100 SXM 80GB")),
        ("NVIDIA A100 80GB PCIe", Some("A100 PCIe 80GB")),
        ("cpu", None),
    ] {
        assert_eq!(of(name), entry, "{name}");
    }
    let h100 = DataSheet::of("NVIDIA H100 80GB HBM3").unwrap();
    let (half, single) = (h100.roofline(Dtype::Bf16), h100.roofline(Dtype::F32));
    assert_eq!((half.bandwidth, half.matrix_flops, half.element_bytes), (3.35e12, 989.4e12, 2));
    assert_eq!((single.matrix_flops, single.vector_flops, single.element_bytes), (66.9e12, 66.9e12, 4));
}

#[test]
fn the_host_has_both_gradients_in_one() {
    let on = LayerPass::on(&Device::Cpu, &[LayerPass::Forward, LayerPass::InputGradient]);
    assert_eq!(on, [LayerPass::Forward, LayerPass::BothGradients]);
}

#[test]
fn kernels_are_timed_on_the_host_and_written() {
    let dir = folder();
    let args = [&["kernels"][..], &TINY, &["--out", "out"]].concat();
    let records = records(dir.path(), &args);
    let passes: Vec<&str> = records.iter().map(|r| r["pass"].as_str().unwrap()).collect();
    for pass in ["fwd", "dgrad+wgrad", "wgrad", "train-fwd", "train-bwd"] {
        assert!(passes.contains(&pass), "{pass} is missing");
    }
    for record in &records {
        assert!(record["name"].is_string() && record["time_us"].as_f64().unwrap() > 0.0, "{record}");
        assert_eq!(keys(record), sorted(&[LAYER_KEYS, LAYER_TIME_KEYS]), "nobody asked for a peer: {record}");
        check_utilization(record);
    }
    // All blocks merge: what is left of the original is the stem and the head.
    let merged: u64 =
        records.iter().filter(|r| r["pass"] == "fwd").map(|r| r["count"]["merged"].as_u64().unwrap()).sum();
    assert_eq!(merged, 19);
    let file: Value = serde_json::from_slice(&fs::read(dir.path().join("out/kernels.json")).unwrap()).unwrap();
    assert_eq!(file["layers"].as_array().unwrap().len(), records.len());
    assert!(file["peaks"]["measured"]["copy_bytes_per_s"].as_f64().unwrap() > 0.0);
    assert_eq!((&file["complete"], &file["peaks"]["flop_utilization_of"]), (&true.into(), &"measured".into()));
    let csv = fs::read_to_string(dir.path().join("out/kernels.csv")).unwrap();
    assert_eq!(csv.lines().count(), records.len() + 1);
    let columns: Vec<&str> = csv.lines().next().unwrap().split(',').collect();
    assert_eq!(columns[..4], ["name", "pass", "activation", "activation_limit"]);
    assert_eq!(sorted(&columns), sorted(&[LAYER_KEYS, LAYER_TIME_KEYS]));
    let svg = fs::read_to_string(dir.path().join("out/roofline.svg")).unwrap();
    assert_eq!(svg.matches("class=\"own").count(), records.len());
}

/// A layer's record as scripts read it: what does not depend on the clock, value for value.
#[test]
fn a_layer_is_described_as_a_peer_needs_it() {
    let dir = folder();
    let args =
        [&["kernels"][..], &TINY, &["--layer", "conv_stem", "--passes", "fwd,train-bwd", "--out", "out"]].concat();
    let records = records(dir.path(), &args);
    assert_eq!(records.len(), 2);
    let expected = json!({
        "name": "conv_stem", "pass": "fwd", "family": "dense", "shape": "32x24x3 → 32x24x8 3x3 s1",
        "count": {"merged": 1, "original": 1}, "device": "cpu", "precision": "f32", "config": null, "n": 2, "h": 32,
        "w": 24, "c_in": 3, "c_out": 8, "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1, 1, 1], "groups": 1,
        "bias": true, "residual": false, "activation": true, "activation_limit": 6.0, "reads_image": true,
        "flops": 663_552, "bytes": 68_480, "flops_per_byte": 9.689719626168225, "operand_sets": 64, "samples": 1,
        "warm_up": 2, "flop_utilization_of": "measured",
    });
    for (key, value) in expected.as_object().unwrap() {
        // How many sets there are depends on the machine's caches.
        assert!(records[0][key] == *value || key == "operand_sets", "{key}: {} for {value}", records[0][key]);
    }
    let backward = ["pass", "bias", "flops"].map(|key| records[1][key].clone());
    assert_eq!(backward, [json!("train-bwd"), json!(false), json!(663_552)]);
    let file: Value = serde_json::from_slice(&fs::read(dir.path().join("out/kernels.json")).unwrap()).unwrap();
    assert_eq!(keys(&file), sorted(&["batch complete device layers network peaks peer precision schema version"]));
    assert_eq!(file["layers"], json!(records));
    let head = ["schema", "network", "batch", "precision", "peer"].map(|key| file[key].clone());
    assert_eq!(head, [json!(1), json!("mobilenetv2-0.25"), json!(2), json!("f32"), Value::Null]);
    assert_eq!(keys(&file["peaks"]), ["byte_utilization_of", "flop_utilization_of", "measured", "published"]);
    let measured = ["copy_bytes_per_s", "gemm_flops_per_s", "vector_flops_per_s"];
    assert_eq!((keys(&file["peaks"]["measured"]), &file["peaks"]["published"]), (measured.to_vec(), &Value::Null));
}

#[test]
fn networks_are_timed_on_the_host() {
    let dir = folder();
    let args = [&["network"][..], &TINY, &["--out", "out"]].concat();
    let records = records(dir.path(), &args);
    let names: Vec<(&str, &str)> =
        records.iter().map(|r| (r["name"].as_str().unwrap(), r["pass"].as_str().unwrap())).collect();
    let inference = ["original", "folded", "fused", "merged"].map(|name| (name, "inference"));
    assert_eq!(names, [&inference[..], &[("original", "training"), ("fused", "training")]].concat());
    for record in &records {
        assert!(record["images_per_s"].as_f64().unwrap() > 0.0, "{record}");
        assert!(record["memory_bytes"].as_u64().unwrap() > 10_000, "{record}");
        assert_eq!(keys(record), sorted(&[NETWORK_KEYS]));
        check_utilization(record);
    }
    // One step a node stores what fused steps keep in cache.
    let memory = |i: usize| records[i]["memory_bytes"].as_u64().unwrap();
    assert!(memory(5) < memory(4), "a fused training step takes less memory: {} and {}", memory(5), memory(4));
    assert!(fs::read_to_string(dir.path().join("out/network.csv")).unwrap().lines().count() == 7);
    let svg = fs::read_to_string(dir.path().join("out/network.svg")).unwrap();
    assert_eq!(svg.matches("class=\"bar own").count(), 6);
}

#[test]
fn a_few_layers_run_on_the_emulator_which_says_that_its_times_say_nothing() {
    let dir = folder();
    let args =
        [&["kernels"][..], &TINY, &["--layer", "blocks.6.0", "--device", "emulator", "--precision", "f16", "--json"]]
            .concat();
    let assert = bench(dir.path(), &args).assert().success();
    let output = assert.get_output();
    assert!(String::from_utf8_lossy(&output.stderr).contains("times of the emulator say nothing"));
    let records: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert!(records.iter().any(|r| r["pass"] == "dgrad" && r["precision"] == "f16"));
    assert!(records.iter().all(|r| r["time_us"].as_f64().unwrap() > 0.0));
}

/// Every record on a GPU names the configurations that it timed, and one that is asked for is taken.
#[test]
fn kernel_configurations_are_named_and_can_be_forced() {
    let dir = folder();
    let layer =
        ["--layer", "blocks.6.0.conv_pw", "--passes", "fwd,train-bwd", "--device", "emulator", "--precision", "f16"];
    let of = |forced: &[&str]| -> Vec<String> {
        let args = [&["kernels"][..], &TINY, &layer, forced].concat();
        records(dir.path(), &args).iter().map(|r| r["config"].as_str().unwrap_or_default().to_owned()).collect()
    };
    let chosen = of(&[]);
    assert!(!chosen.is_empty() && chosen[0].starts_with("pointwise_forward=64x64-vector"), "{chosen:?}");
    let of_step = ["batch_norm_backward=", "pointwise_backward="];
    assert!(chosen.iter().any(|config| of_step.iter().all(|kernels| config.contains(kernels))), "{chosen:?}");
    let forced = of(&["--kernel-config", "pointwise_forward=64x64-scalar"]);
    assert_eq!(forced[0], "pointwise_forward=64x64-scalar");
    assert_eq!(forced[1..], chosen[1..]);
}

/// What a tuner found is kept with its times, and from then on taken by every launch of the problem; a file of other kernels or of
/// another device is refused.
#[test]
fn tuned_configurations_are_kept_and_taken() {
    let dir = folder();
    let tuned = dir.path().join("tuned.json");
    let device = ["--device", "emulator", "--precision", "f16", "--layer", "blocks.6.0"];
    let run = |more: &[&str]| {
        let mut command = bench(dir.path(), &[&["kernels"][..], &TINY, &device, more, &["--json"]].concat());
        command.env("DEPTHSHRINKER_TUNED", &tuned);
        command
    };
    let list = |more: &[&str]| -> Vec<Value> {
        serde_json::from_slice(&run(more).assert().success().get_output().stdout).expect("one JSON list")
    };
    let found = list(&["--tune"]);
    let kernels: Vec<&str> = found.iter().map(|record| record["kernels"].as_str().unwrap()).collect();
    for name in ["inverted_residual", "dense_forward", "pointwise_forward", "depthwise_backward"] {
        assert!(kernels.contains(&name), "{name} is not in {kernels:?}");
    }
    for record in &found {
        let [time, chosen] = ["time_us", "chosen_time_us"].map(|key| record[key].as_f64().unwrap());
        assert_eq!(record["failed"], json!([]), "{record}");
        assert!(record["timed"].as_u64().unwrap() > 1 && time > 0.0, "{record}");
        assert_eq!(time < chosen, record["config"] != record["chosen"], "only what is faster is taken: {record}");
    }
    // The file has the same, and what it says is taken: also what the engine would not choose.
    let mut file: Value = serde_json::from_str(&fs::read_to_string(&tuned).unwrap()).unwrap();
    let rows = file["configurations"].as_array_mut().unwrap();
    assert_eq!(rows.len(), found.len());
    rows.iter_mut()
        .filter(|row| row["kernels"] == "pointwise_forward")
        .for_each(|row| row["config"] = json!("64x64-scalar"));
    fs::write(&tuned, file.to_string()).unwrap();
    let timed = list(&["--passes", "train-fwd"]);
    let configs: Vec<&str> = timed.iter().filter_map(|record| record["config"].as_str()).collect();
    assert!(configs.iter().any(|config| config.contains("pointwise_forward=64x64-scalar")), "{configs:?}");
    for (key, value, words) in [
        ("kernels", json!("0"), "other kernels"),
        ("device", json!("Tesla V100-SXM2-16GB"), "is of Tesla V100"),
        ("schema", json!(0), "the format 0"),
        ("rows", json!([]), "is no file of tuned configurations"),
    ] {
        let mut other = file.clone();
        other[key] = value;
        fs::write(&tuned, other.to_string()).unwrap();
        let assert = run(&["--passes", "fwd"]).assert().code(1);
        let text = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
        assert!(text.lines().count() == 1 && text.contains("tuned.json") && text.contains(words), "{text}");
    }
    // Where nothing is named, an emulator is not tuned.
    run(&["--tune"]).env("DEPTHSHRINKER_TUNED", "none").assert().code(2);
}

fn emulator(memory: u64) -> Device {
    let options = EmulatorOptions { memory, ..EmulatorOptions::default() };
    let cache = Cache::at(Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels"));
    let driver = Emulator::new(options, cache).expect("a C++ compiler");
    Device::on(Gpu::new(Box::new(driver)), Dtype::F32).expect("kernels compile")
}

fn tiny() -> Graph {
    let options = NetworkOptions { input_stride: Some(1), ..NetworkOptions::new(Shape::new(16, 12, 3), 10) };
    build("mobilenetv2-0.25", &options).unwrap()
}

#[test]
fn layers_without_memory_are_told_and_the_others_are_timed() {
    let graph = tiny();
    // Room for the noise that operands are filled from and for small layers.
    let device = emulator((8 << 20) + (256 << 10));
    let layers = TimedLayer::of_networks(&[&graph], 2, &[LayerPass::Forward], Backend::Cuda).unwrap();
    let limits = Limits::measure(&Device::Cpu, Duration::ZERO).unwrap();
    let kept = RefCell::new(Vec::new());
    let keep = |found: &Findings<LayerRecord>| {
        kept.borrow_mut().push(found.records.len());
        Ok(())
    };
    let bench = Bench { device: &device, limits: &limits, budget: Duration::ZERO, peer: None };
    let records = bench.layers(&layers, &["tiny"], &keep).unwrap().records;
    assert_eq!(*kept.borrow(), (1..=layers.len()).collect::<Vec<_>>(), "kept after every layer");
    let (timed, failed): (Vec<&LayerRecord>, Vec<&LayerRecord>) = records.iter().partition(|r| r.timing().is_some());
    assert!(!failed.is_empty() && !timed.is_empty(), "{} failed, {} timed", failed.len(), timed.len());
    assert!(timed.iter().all(|r| r.timing().unwrap().timing.time_us > 0.0 && json!(r).get("error").is_none()));
    for record in failed {
        assert!(record.own.error().unwrap().contains("allocate"), "{record:?}");
        let record = json!(record);
        let told = (record["time_us"].is_null(), record["error"].is_string(), record.get("iqr_us").is_none());
        assert_eq!(told, (true, true, true), "{record}");
        assert_eq!(keys(&record), sorted(&[LAYER_KEYS, "error time_us"]), "nothing but the layer and why");
    }
    // Where nothing has room there is nothing to tell.
    let device = emulator((8 << 20) + (1 << 10));
    let bench = Bench { device: &device, ..bench };
    assert!(bench.layers(&layers, &["tiny"], &keep).unwrap_err().to_string().contains("nothing could be timed"));
}

#[test]
fn memory_of_a_network_is_the_same_whatever_ran_before() {
    let model = Model::initialise(tiny(), 0).unwrap();
    let cases = network_cases(&model, None).unwrap();
    let inference: Vec<_> = cases.iter().filter(|case| !case.training).collect();
    let bytes = |device: &Device, index: usize| peak_memory(device, inference[index], 2).unwrap();
    let device = emulator(u64::MAX);
    let [first, second] = [0, 2].map(|i| bytes(&device, i));
    let other = emulator(u64::MAX);
    assert_eq!([2, 0].map(|i| bytes(&other, i)), [second, first]);
    assert!(first > second, "one step a node keeps more: {first} and {second}");
}

#[test]
fn a_keep_list_leaves_its_blocks_unmerged() {
    let dir = folder();
    let list = "1,0,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1";
    let args = [&["kernels"][..], &TINY, &["--passes", "fwd", "--keep-list", list]].concat();
    let records = records(dir.path(), &args);
    let merged: u64 = records.iter().map(|r| r["count"]["merged"].as_u64().unwrap()).sum();
    assert_eq!(merged, 50, "one block of three convolutions became one");
}

#[test]
fn wrong_usage_is_told_in_one_line() {
    let dir = folder();
    for (args, code, words) in [
        (&["kernels", "resnet-9000"][..], 2, &["resnet-9000"][..]),
        (&["kernels", "mobilenetv2-0.25", "--passes", "up"], 2, &["up", "fwd", "train-bwd"]),
        (&["kernels", "mobilenetv2-0.25", "--layer", "none", "--seconds", "0"], 2, &["none"]),
        (&["kernels", "mobilenetv2-0.25", "--seconds", "0", "--kernel-config", "x=y"], 2, &["CPU", "--kernel-config"]),
        (&["network", "missing.safetensors"], 1, &["missing.safetensors"]),
        (&["network", "mobilenetv2-0.25", "--device", "cuda:99"], 1, &["cuda"]),
    ] {
        let assert = bench(dir.path(), args).assert().code(code);
        let text = String::from_utf8_lossy(&assert.get_output().stderr).into_owned();
        assert!(text.lines().count() == 1 && words.iter().all(|word| text.contains(word)), "{args:?}: {text}");
    }
}

#[test]
fn without_pytorch_one_line_says_so_and_the_rest_goes_on() {
    let dir = folder();
    let args = [&["kernels"][..], &TINY, &["--layer", "conv_stem", "--peers", "--python", "./no-python", "--json"]];
    let assert = bench(dir.path(), &args.concat()).assert().success();
    let output = assert.get_output();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(text.lines().filter(|line| line.contains("no peer") && line.contains("--python")).count(), 1, "{text}");
    let records: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert!(!records.is_empty());
    assert!(records.iter().all(|r| r["peer_time_us"].is_null() && r["peer_error"].is_string()), "{records:?}");
    let all = sorted(&[LAYER_KEYS, LAYER_TIME_KEYS, "peer_error peer_time_us"]);
    assert!(records.iter().all(|r| keys(r) == all), "{records:?}");
}

/// A peer that knows one answer to everything, through the protocol that PyTorch's scripts speak.
#[cfg(unix)]
#[test]
fn a_peer_is_asked_in_turns_and_its_failures_are_told() {
    let dir = folder();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peer.sh");
    let log = dir.path().join("asked");
    let ask = |answer: &str, kind: &[&str]| {
        let _ = fs::remove_file(&log);
        let args = [kind, &TINY, &["--json", "--peers", "--python"]].concat();
        let mut command = bench(dir.path(), &args);
        command.arg(&script).env("PEER_ANSWER", answer).env("PEER_LOG", &log);
        let output = command.assert().success().get_output().stdout.clone();
        let records: Vec<Value> = serde_json::from_slice(&output).expect("one JSON list on stdout");
        let questions = fs::read_to_string(&log).unwrap();
        (records, questions.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>())
    };
    let layer = ["kernels", "--layer", "conv_stem", "--passes", "fwd"];
    let (records, questions) = ask(r#"{"time_us": 5.5"#, &layer);
    assert_eq!((records.len(), &records[0]["peer_time_us"]), (1, &Value::from(5.5)));
    let asked: Vec<&str> = questions.iter().map(|q| q["name"].as_str().unwrap()).collect();
    assert_eq!(asked, ["peaks", "conv_stem", "conv_stem"], "twice, in turns");
    assert_eq!((&questions[1]["kernel"], &questions[1]["c_in"]), (&Value::from(vec![3, 3]), &Value::from(3)));
    // Both rotate through as many operands, and what is compared was measured in turns.
    assert_eq!(questions[1]["operand_sets"], records[0]["operand_sets"]);
    assert!(questions[1]["limit"].as_f64().unwrap() > 0.0 && records[0]["turn_time_us"].as_f64().unwrap() > 0.0);
    assert_eq!(keys(&records[0]), sorted(&[LAYER_KEYS, LAYER_TIME_KEYS, "peer_time_us turn_time_us"]));
    assert_eq!(keys(&questions[1]), sorted(&[LAYER_KEYS, "operand_sets seconds id limit"]));

    // The convolution alone, where the peer times that too; an answer that lacks what was asked for is no answer.
    let (records, _) = ask(r#"{"time_us": 5.5, "conv_time_us": 4, "iqr_us": 1"#, &layer);
    assert_eq!((&records[0]["peer_conv_time_us"], records[0].get("peer_note")), (&json!(4.0), None));
    let (records, _) = ask(r#"{"note": "slowly""#, &layer);
    assert!(records[0]["peer_time_us"].is_null() && records[0]["peer_error"].as_str().unwrap().contains("time_us"));

    let (records, _) = ask(r#"{"error": "out of order""#, &layer);
    assert!(records[0]["peer_time_us"].is_null(), "{records:?}");
    assert!(records[0]["peer_error"].as_str().unwrap().contains("out of order"));

    let (records, _) = ask("", &layer);
    assert!(records[0]["peer_error"].as_str().unwrap().contains("ended"), "{records:?}");

    // Of all layers only those that take most of the time.
    let few = ["kernels", "--passes", "fwd", "--peer-layers", "2"];
    let (records, questions) = ask(r#"{"time_us": 5.5"#, &few);
    let total = |r: &&Value| {
        let counts = r["count"].as_object().unwrap().values().filter_map(Value::as_f64).sum::<f64>();
        counts * r["time_us"].as_f64().unwrap()
    };
    let (with, without): (Vec<&Value>, Vec<&Value>) = records.iter().partition(|r| r.get("peer_time_us").is_some());
    assert_eq!((with.len(), questions.len()), (2, 5));
    let least = with.iter().map(total).fold(f64::INFINITY, f64::min);
    assert!(without.iter().map(total).all(|time| time <= least), "{records:?}");

    let (records, questions) = ask(r#"{"images_per_s": 250.0, "note": "slowly""#, &["network"]);
    assert!(records.iter().all(|r| r["peer_images_per_s"] == 250.0 && r["peer_time_us"] == 8000.0), "{records:?}");
    assert!(records.iter().all(|r| r["peer_note"] == "slowly"), "{records:?}");
    let all = sorted(&[NETWORK_KEYS, "peer_images_per_s peer_note peer_time_us turn_time_us"]);
    assert!(records.iter().all(|r| keys(r) == all), "{records:?}");
    assert_eq!(keys(&questions[1]), sorted(&["batch compile graph id limit seconds training"]));
    let compiled = |q: &&Value| q["compile"] == true;
    assert_eq!((questions.len(), questions.iter().filter(compiled).count()), (13, 6), "peaks, then six ways twice");
    assert!(questions[1]["graph"]["nodes"].as_array().is_some_and(|nodes| nodes.len() > 100));
}

/// A bench of a tiny network beside the runtimes of `tests/fixtures/runtimes.sh`.
#[cfg(unix)]
struct RuntimeBench {
    records: Vec<Value>,
    /// `network.json`.
    file: Value,
    questions: Vec<Value>,
    stderr: String,
}

#[cfg(unix)]
impl RuntimeBench {
    fn of(greeting: &Value, more: &[&str]) -> Self {
        let dir = folder();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/runtimes.sh");
        let log = dir.path().join("asked");
        let args = [&["network"][..], &TINY, more, &["--out", "out", "--json", "--peers", "--python"]].concat();
        let greeting = if greeting.is_null() { String::new() } else { greeting.to_string() };
        let mut command = bench(dir.path(), &args);
        command.arg(script).env("RUNTIMES", greeting.trim_end_matches('}')).env("RUNTIMES_LOG", &log);
        let output = command.assert().success().get_output().clone();
        let questions = fs::read_to_string(log).unwrap_or_default();
        Self {
            records: serde_json::from_slice(&output.stdout).expect("one JSON list on stdout"),
            file: serde_json::from_slice(&fs::read(dir.path().join("out/network.json")).unwrap()).unwrap(),
            questions: questions.lines().map(|line| serde_json::from_str(line).expect(line)).collect(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The records that have runtimes, by name, with their rows.
    fn rows(&self) -> Vec<(&str, &Vec<Value>)> {
        let rows = |record: &'_ Value| record.get("runtimes").is_some();
        let with = self.records.iter().filter(|record| rows(record));
        with.map(|record| (record["name"].as_str().unwrap(), record["runtimes"].as_array().unwrap())).collect()
    }
}

/// Runtimes get the two networks that are fused for inference, in turns; one that fails, ends, says nothing or answers something
/// else has its reason in its row and leaves the others alone. So does PyTorch, which is not there.
#[cfg(unix)]
#[test]
fn runtimes_are_asked_in_turns_and_each_has_a_row() {
    let all_kept = ["--keep-list", "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1"];
    for (names, more, networks, errors) in [
        (
            &["dying", "failing", "wrong", "good"][..],
            &[][..],
            &["fused", "merged"][..],
            &["falls over", "order", "images_per_s", ""][..],
        ),
        (&["silent", "good"], &[&all_kept[..], &["--peer-seconds", "0"]].concat(), &["fused"], &["did not answer", ""]),
    ] {
        let found: Vec<Value> = names.iter().map(|name| json!({"runtime": name, "version": "1.5"})).collect();
        let greeting = json!({"threads": 2, "runtimes": found});
        let ran = RuntimeBench::of(&greeting, more);
        assert!(ran.records.iter().all(|r| r["images_per_s"].as_f64().unwrap() > 0.0 && r["peer_error"].is_string()));
        let rows = ran.rows();
        assert_eq!(rows.iter().map(|(network, _)| *network).collect::<Vec<_>>(), networks);
        for (row, error, name) in
            rows.iter().flat_map(|(_, rows)| rows.iter().zip(errors).zip(names)).map(|((r, e), n)| (r, e, n))
        {
            assert_eq!((&row["runtime"], &row["version"]), (&json!(name), &json!("1.5")));
            assert!(row["turn_time_us"].as_f64().unwrap() > 0.0, "{row}");
            let times = ["peer_images_per_s", "peer_time_us"].map(|key| row[key].as_f64());
            let reason = row["peer_error"].as_str().unwrap_or_default();
            let (expected, key) =
                if error.is_empty() { ([Some(250.0), Some(8000.0)], "peer_note") } else { ([None; 2], "peer_error") };
            assert!(times == expected && reason.contains(error), "{row}");
            let all = ["peer_images_per_s peer_time_us runtime turn_time_us version", key];
            assert!(keys(row) == sorted(&all) || *name == "wrong", "{row}");
        }
        assert!(ran.records.iter().all(|r| r["pass"] == "inference" || r.get("runtimes").is_none()));
        assert_eq!((&ran.file["runtimes"]["runtimes"], &ran.file["runtimes"]["threads"]), (&json!(found), &json!(2)));
        for name in names {
            let asked: Vec<&Value> = ran.questions.iter().filter(|q| q["runtime"] == *name).collect();
            assert_eq!(asked.len(), 2 * networks.len(), "{name}: twice for each network");
            assert_eq!(keys(asked[0]), sorted(&["batch bytes file id limit runtime seconds"]));
            assert!(asked.iter().all(|q| q["batch"] == 2 && q["bytes"].as_u64().unwrap() > 100_000), "{asked:?}");
        }
        assert!(!ran.stderr.contains("not timed"), "nothing is missing: {}", ran.stderr);
    }
}

/// What is not installed is told once, by name, and no error; no more is a Python that does not start.
#[cfg(unix)]
#[test]
fn runtimes_that_are_not_there_are_named_once() {
    let missing = json!([{"runtime": "a", "reason": "No module named 'a'"}, {"runtime": "b", "reason": "too old"}]);
    for (greeting, told, key) in [
        (json!({"missing": missing}), "not timed: a (No module named 'a'), b (too old)", "missing"),
        (json!({"runtimes": [{"runtime": "good", "version": "2"}], "missing": missing}), "b (too old)", "missing"),
        (Value::Null, "no runtimes: the peer has ended: no Python here", "error"),
    ] {
        let ran = RuntimeBench::of(&greeting, &[]);
        assert_eq!(ran.stderr.lines().filter(|line| line.contains(told)).count(), 1, "{}", ran.stderr);
        assert_eq!(ran.stderr.matches("no peer").count(), 1, "{}", ran.stderr);
        assert!(ran.file["runtimes"].get(key).is_some_and(|v| !v.is_null()), "{}", ran.file["runtimes"]);
        let expected = greeting["runtimes"].as_array().map_or(0, |_| 2);
        assert_eq!(ran.rows().len(), expected);
    }
}

/// People see a row for each runtime, with its reason where it has no rate.
#[cfg(unix)]
#[test]
fn runtimes_have_a_table() {
    let dir = folder();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/runtimes.sh");
    let mut command = bench(dir.path(), &[&["network"][..], &TINY, &["--peers", "--python"]].concat());
    let names = json!([{"runtime": "good", "version": "1.5"}, {"runtime": "failing", "version": "0.1"}]);
    let greeting = format!("{{\"runtimes\": {names}");
    let output = command.arg(script).env("RUNTIMES", greeting).env("RUNTIMES_LOG", "asked").assert().success();
    let text = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    for (network, name, version, rate, time, how) in [
        ("fused", "good", "1.5", "250", "8.00", "well"),
        ("fused", "failing", "0.1", "–", "–", "device: out of order"),
        ("merged", "good", "1.5", "250", "8.00", "well"),
        ("merged", "failing", "0.1", "–", "–", "device: out of order"),
    ] {
        let row = rows.iter().find(|row| row.starts_with(&[network, name])).expect(name);
        assert_eq!((&row[2..5], &*row[6..].join(" ")), (&[version, rate, time][..], how), "{text}");
    }
}
