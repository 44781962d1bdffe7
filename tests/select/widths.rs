//! Fewer channels: published networks as oracles, what slices compute, lists within a time, and both methods through the whole
//! job.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use assert_cmd::Command;
use depthshrinker::device::Backend;
use depthshrinker::graph::{ChannelGroups, ConvFamily, Graph, ParamRole};
use depthshrinker::io::read_model;
use depthshrinker::measure::{ChannelTimes, LatencyRow, LatencyTable, Roofline, TableOptions, TableWork};
use depthshrinker::model::Model;
use depthshrinker::networks::{ChannelPlan, METAPRUNING_GENES, NetworkOptions, build};
use depthshrinker::shape::Shape;
use depthshrinker::shrink::{ChannelList, ChannelOrder, Mask, Selection, Widths, narrow, narrow_graph};
use libtest_mimic::Trial;
use rand::RngExt;
use rand::seq::SliceRandom;

use crate::networks::rng;
use crate::providers::{depthshrinker, json, logits};
use crate::sensitivity::folder;
use crate::trial;

pub const METHODS: [&str; 2] = ["uniform-width", "width-search"];
const BY: ChannelOrder = ChannelOrder::BnGamma;

fn imagenet(name: &str) -> Graph {
    build(name, &NetworkOptions::new(Shape::new(224, 224, 3), 1000)).unwrap()
}

fn named(name: &str, graph: &Graph) -> Graph {
    Graph { name: name.into(), ..graph.clone() }
}

/// A width multiplier makes timm's network of that width, whose multiply-accumulates its own counter gives.
fn widths_are_timms() {
    for (wide, name, width, macs) in [
        ("mobilenetv2_100", "mobilenetv2_075", 0.75, 209_069_792),
        ("mobilenetv2_100", "mobilenetv2_050", 0.5, 97_131_840),
        ("mobilenetv2_100", "mobilenetv2_035", 0.35, 59_285_808),
        ("mnasnet_100", "mnasnet_075", 0.75, 215_493_104),
        ("mnasnet_100", "mnasnet_050", 0.5, 104_455_968),
        ("mobilenetv2_100", "mobilenetv2_100", 1.0, 300_774_272),
    ] {
        let wide = imagenet(wide);
        let list = Widths::new(&wide).unwrap().uniform(width, BY);
        let narrowed = narrow_graph(&wide, &list).unwrap();
        assert_eq!(named(name, &narrowed), imagenet(name), "{name}");
        assert_eq!(narrowed.cost().unwrap().macs(), macs, "{name}");
        assert_eq!(ChannelList::between(&wide, &imagenet(name), BY).unwrap(), list);
        // What is left already is left.
        assert_eq!(narrow_graph(&narrowed, &list).unwrap(), narrowed);
    }
}

/// The encoding that MetaPruning's repository evaluates, taken out of the network that it searches in: 104.9 million
/// multiply-accumulates, and no number of channels a multiple of 8.
fn metapruning() {
    let options = NetworkOptions::new(Shape::new(224, 224, 3), 1000);
    let widest = ChannelPlan::metapruning(&[30; METAPRUNING_GENES]).unwrap().graph("widest", &options).unwrap();
    let published = imagenet("metapruning-mbv2-105m");
    let list = ChannelList::between(&widest, &published, BY).unwrap();
    let narrowed = narrow_graph(&widest, &list).unwrap();
    assert_eq!(named("metapruning-mbv2-105m", &narrowed), published);
    assert_eq!((narrowed.cost().unwrap().macs() as f64 / 1e5).round(), 1049.0);
    assert!(list.counts.values().filter(|count| *count % 8 != 0).count() > 20);
}

/// Multiplies entries of one axis of a parameter.
fn scale(model: &mut Model, name: &str, axis: usize, at: &[usize], by: f32) {
    let tensor = model.weights.get_mut(name).unwrap();
    let inner: usize = tensor.shape[axis + 1..].iter().product();
    let length = tensor.shape[axis];
    for (index, value) in tensor.data.iter_mut().enumerate() {
        if at.contains(&(index / inner % length)) {
            *value *= by;
        }
    }
}

/// A network of which some channels are read with weights of 0 alone, and count least, is itself without them.
fn slices_compute_the_same() {
    for (name, by) in [
        ("mobilenetv2-0.35", ChannelOrder::BnGamma),
        ("mobilenetv2-0.35", ChannelOrder::L1),
        ("efficientnet-lite0", ChannelOrder::L1),
        ("resnet18", ChannelOrder::BnGamma),
        ("vgg19_bn", ChannelOrder::BnGamma),
    ] {
        let input = Shape::new(32, 40, 3);
        let head_channels = (name != "resnet18").then_some(24);
        let options = NetworkOptions { head_channels, ..NetworkOptions::new(input, 5) };
        let mut rng = rng(11);
        let mut model = Model::initialise(build(name, &options).unwrap(), 3).unwrap();
        for (name, tensor) in &mut model.weights {
            if name.contains("running_var") {
                tensor.data.iter_mut().for_each(|v| *v = rng.random_range(0.5..1.5));
            } else if name.contains("bn") || name.contains("downsample.1") {
                tensor.data.iter_mut().for_each(|v| *v += rng.random_range(-0.2..0.2));
            }
        }
        let graph = model.graph.clone();
        let (groups, params) = (ChannelGroups::new(&graph).unwrap(), graph.params().unwrap());
        let mut counts = BTreeMap::new();
        for (index, group) in groups.groups().iter().enumerate().filter(|(_, group)| !group.is_fixed) {
            let mut gone: Vec<usize> = (0..group.channels).collect();
            gone.shuffle(&mut rng);
            gone.truncate(rng.random_range(0..group.channels));
            counts.insert(group.name.clone(), group.channels - gone.len());
            for param in &params {
                let reads = graph.nodes[param.node].inputs.first().map(|node| groups.of(*node)) == Some(index);
                let gives = groups.of(param.node) == index;
                match param.role {
                    ParamRole::ConvWeight(ConvFamily::Depthwise) if gives => {
                        scale(&mut model, &param.name, 2, &gone, 1e-3);
                    }
                    ParamRole::ConvWeight(family) => {
                        let axis = if family == ConvFamily::Dense { 3 } else { 1 };
                        if reads && family != ConvFamily::Depthwise {
                            scale(&mut model, &param.name, axis, &gone, 0.0);
                        }
                        if gives {
                            scale(&mut model, &param.name, 0, &gone, 1e-3);
                        }
                    }
                    ParamRole::LinearWeight if reads => scale(&mut model, &param.name, 1, &gone, 0.0),
                    ParamRole::BnWeight if gives => scale(&mut model, &param.name, 0, &gone, 1e-3),
                    _ => {}
                }
            }
        }
        assert!(counts.len() > 8, "{name}");
        let narrowed = narrow(&model, &ChannelList { by, counts: counts.clone() }).unwrap();
        assert!(narrowed.graph.cost().unwrap().params() < graph.cost().unwrap().params());
        let images: Vec<f32> = (0..2 * input.len()).map(|_| rng.random_range(-1.0..1.0)).collect();
        let (all, fewer) = (logits(&model, &images), logits(&narrowed, &images));
        let largest = all.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        let error = all.iter().zip(&fewer).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(largest > 0.0 && error <= 2e-5 * largest, "{name}: {error} of {largest}");
        // All follows from the model and the list.
        assert_eq!(narrow(&model, &ChannelList { by, counts }).unwrap(), narrowed);
    }
}

/// Lists that do not fit are refused by name.
fn refusals() {
    let graph = imagenet("mobilenetv2-0.35");
    let refused = |name: &str, count: usize| {
        let list = ChannelList { by: BY, counts: [(name.to_owned(), count)].into() };
        narrow_graph(&graph, &list).unwrap_err().to_string()
    };
    assert!(refused("conv_stem", 0).contains("conv_stem in mobilenetv2-0.35 has 16 channels, not 0"));
    assert!(refused("conv_stem", 17).contains("not 17"));
    assert!(refused("conv_sten", 8).contains("no channels that begin with conv_sten"));
    assert!(refused("classifier", 8).contains("cannot be changed"));
}

const ROOFLINE: Roofline = Roofline { bandwidth: 40e9, matrix_flops: 100e9, vector_flops: 40e9, element_bytes: 4 };

/// A roofline's table gives the roofline of the narrower network, and one with times of its own their share that is left.
fn times_follow_the_table() {
    let wide = imagenet("mobilenetv2-1.0");
    let priced = |graph: &Graph| {
        let options = TableOptions { keys: false, bias_maps: false };
        TableWork::new(graph, options, Backend::Host).unwrap().priced(Path::new("t"), 128, &ROOFLINE).unwrap()
    };
    let (table, widths) = (priced(&wide), Widths::new(&wide).unwrap());
    let times = ChannelTimes::new(&wide, &table, ROOFLINE, Backend::Host).unwrap();
    // As if a device took twice as long for every other row, and knew nothing that always runs.
    let slow = |row: &LatencyRow| LatencyRow::new(row.at, row.time_ms * (1.0 + (row.at.end % 2) as f64));
    let slower = LatencyTable::new(Path::new("t"), table.rows().map(slow).collect()).unwrap();
    let on_device = ChannelTimes::new(&wide, &slower, ROOFLINE, Backend::Host).unwrap();
    let close = |got: f64, expected: f64| assert!((got / expected - 1.0).abs() < 1e-12, "{got} and {expected}");
    let mut before = f64::INFINITY;
    for width in [1.0, 0.8, 0.5, 0.2] {
        let narrowed = narrow_graph(&wide, &widths.uniform(width, BY)).unwrap();
        let own = priced(&narrowed);
        let alone = || own.rows().filter(|row| row.at.len() == 1);
        let got = times.time_ms(&narrowed).unwrap();
        close(got, own.fixed_ms() + alone().map(|row| row.time_ms).sum::<f64>());
        close(on_device.time_ms(&narrowed).unwrap(), alone().map(|row| slow(row).time_ms).sum());
        assert!(got < before, "{width}");
        before = got;
    }
    let of_other = times.time_ms(&imagenet("resnet18"));
    assert!(of_other.is_err_and(|e| e.to_string().contains("has no segment")));
}

/// Uniform widths and random lists keep a time and take nearly all of it; numbers are multiples of 8; the seed decides.
fn lists_within_a_time() {
    let graph = imagenet("mobilenetv2-1.0");
    let widths = Widths::new(&graph).unwrap();
    let macs = |list: &ChannelList| Ok(narrow_graph(&graph, list)?.cost()?.macs() as f64);
    let whole = macs(&ChannelList::default()).unwrap();
    for share in [0.9, 0.5, 0.2] {
        let uniform = widths.uniform_within(share * whole, BY, &macs).unwrap();
        let taken = macs(&uniform).unwrap() / whole;
        assert!(taken <= share && taken > 0.85 * share, "{share}: {taken}");
        assert_eq!(widths.list(&widths.genome(&uniform), BY), uniform);
        let random = |seed| widths.random(4, seed, share * whole, &macs).unwrap();
        let found = random(5);
        assert_eq!((random(5) == found, random(6) == found), (true, false));
        for genome in found {
            let list = widths.list(&genome, BY);
            let taken = macs(&list).unwrap() / whole;
            assert!(taken <= share && taken > 0.97 * share, "{share}: {taken}");
            assert!(list.counts.values().all(|count| count % 8 == 0 && *count > 0));
            assert!(!list.counts.contains_key("conv_head") && !list.counts.contains_key("classifier"));
            // Scaled as a whole, what was found keeps other times.
            let scaled = widths.within(&widths.shares(&genome), 0.8 * share * whole, &macs).unwrap();
            let taken = macs(&widths.list(&scaled, BY)).unwrap() / whole;
            assert!(taken <= 0.8 * share && taken > 0.7 * share, "{share}: {taken}");
        }
    }
    let error = widths.uniform_within(0.01 * whole, BY, &macs).unwrap_err().to_string();
    assert!(error.contains("the fastest takes"), "{error}");
    // Whatever the network, halves and quarters of it are narrower, and convolutions behind the blocks keep their channels.
    for (name, behind) in
        [("resnet18", ""), ("resnet50", ""), ("efficientnet-lite0", "conv_head"), ("vgg19_bn", "pre_logits")]
    {
        let graph = imagenet(name);
        let widths = Widths::new(&graph).unwrap();
        let macs = |width: f64| {
            let list = widths.uniform(width, BY);
            assert!(behind.is_empty() || list.counts.keys().all(|group| !group.starts_with(behind)), "{name}");
            narrow_graph(&graph, &list).unwrap().cost().unwrap().macs() as f64
        };
        assert!(macs(0.5) < 0.4 * macs(1.0) && macs(0.25) < 0.5 * macs(0.5), "{name}: {} of {}", macs(0.5), macs(1.0));
    }
    // Where no multiple of 8 is smaller, quarters are taken.
    let tiny = imagenet("mobilenetv2-0.1");
    let of_tiny = Widths::new(&tiny).unwrap().uniform(0.5, BY);
    assert_eq!(of_tiny.counts["conv_stem"], 4);
}

/// Choice, finetuning, files: the network keeps the budget and all its blocks, and equal seeds give equal bits.
fn whole_job() {
    let dir = folder();
    let original = read_model(&dir.path().join("m.safetensors")).unwrap().0;
    for name in METHODS {
        let shrink = |seed: &str, out: &str| {
            let args = [
                &["shrink", "--model", "m.safetensors", "--config", "few.toml", "--method", name, "--out", out][..],
                &["--latency-fraction", "0.7", "--finetune-epochs", "1", "--batch", "40", "--seed", seed],
            ];
            json(depthshrinker(dir.path(), &args.concat()))
        };
        let result = shrink("3", name);
        let at = dir.path().join(name);
        let plan = Selection::read(&at.join("plan.json")).unwrap();
        let list = plan.channels.as_ref().expect("channels");
        assert_eq!((plan.keep.clone(), plan.matched), (Mask::all(17), None));
        let [shrunk, merged] =
            ["shrunk.safetensors", "merged.safetensors"].map(|file| read_model(&at.join(file)).unwrap().0);
        assert_eq!((&shrunk, &merged.graph), (&merged, &narrow_graph(&original.graph, list).unwrap()), "{name}");
        assert!(merged.weights != narrow(&original, list).unwrap().weights, "{name}: nothing was trained");
        let share = result["latency_share"].as_f64().unwrap();
        assert!(share <= 0.7 && share > if name == "uniform-width" { 0.4 } else { 0.6 }, "{name}: {share}");
        assert_eq!(result["merge"]["segments"], 0);
        for (group, counts) in result["channels"].as_object().unwrap() {
            assert_eq!(counts[0], list.counts[group], "{name}");
        }
        assert_eq!(result["channels"].as_object().unwrap().len(), list.counts.len());
        assert!(at.join("merged.onnx").is_file() && at.join("latency.csv").is_file());
        assert!(fs::read_to_string(at.join("report.html")).unwrap().contains("channels left where"));

        shrink("3", "again");
        for file in ["plan.json", "shrunk.safetensors"] {
            assert_eq!(
                fs::read(at.join(file)).unwrap(),
                fs::read(dir.path().join("again").join(file)).unwrap(),
                "{name}"
            );
        }
        fs::remove_dir_all(dir.path().join("again")).unwrap();
        plan_alone(dir.path(), name, &shrunk);
    }
    let [uniform, searched] = METHODS.map(|name| fs::read(dir.path().join(name).join("plan.json")).unwrap());
    assert_ne!(uniform, searched);
}

/// The plan alone finetunes to the same network, and merges to the network of its slices.
fn plan_alone(dir: &Path, name: &str, shrunk: &Model) {
    let plan = format!("{name}/plan.json");
    let args = ["finetune", "m.safetensors", "--config", "few.toml", "--plan", &plan, "--out", "f", "--force"];
    let schedule = ["--epochs", "1", "--batch", "40", "--seed", "3"];
    json(depthshrinker(dir, &[&args[..], &schedule].concat()));
    assert_eq!(read_model(&dir.join("f/shrunk.safetensors")).unwrap().0, *shrunk, "{name}");
    let mut merge = Command::cargo_bin("depthshrinker").unwrap();
    merge.current_dir(dir).args(["merge", "m.safetensors", "--plan", &plan, "-o", "n.safetensors"]).assert().success();
    assert_eq!(read_model(&dir.join("n.safetensors")).unwrap().0.graph, shrunk.graph, "{name}");
}

/// By the clock, and what is refused.
fn by_the_clock() {
    let dir = folder();
    let search = ["search", "m.safetensors", "--config", "few.toml", "--out", "s", "--force"];
    for name in METHODS {
        let more = ["--method", name, "--latency-fraction", "0.8", "--match-latency=0.3", "--latency", "macs"];
        let plan = json(depthshrinker(dir.path(), &[&search[..], &more].concat()));
        let matched = &plan["matched"];
        assert!((matched["target"].as_f64().unwrap() - 0.8).abs() < 1e-9);
        // Which network the clock chooses is the machine's to say; the whole one is the only one known to take all.
        let counts = plan["channels"]["counts"].as_object().unwrap_or_else(|| panic!("{name}: {plan}"));
        let share = matched["share"].as_f64().unwrap();
        assert!(share > 0.0 && (!counts.is_empty() || share == 1.0), "{name}: {plan}");
        for (budget, words) in
            [(["--remove", "3"], "needs a budget that is a time"), (["--budget-ms", "1e-9"], "the fastest takes")]
        {
            let mut command = depthshrinker(dir.path(), &[&search[..], &["--method", name], &budget].concat());
            let told = command.assert().failure().get_output().stderr.clone();
            assert!(String::from_utf8_lossy(&told).contains(words), "{name}: {}", String::from_utf8_lossy(&told));
        }
    }
    let l1 = "[search]\nmethod = \"uniform-width\"\nchannel_order = \"l1\"\n[budget]\nlatency_fraction = 0.8\n";
    fs::write(dir.path().join("l1.toml"), l1).unwrap();
    let plan =
        json(depthshrinker(dir.path(), &["search", "m.safetensors", "--config", "l1.toml", "--out", "s", "--force"]));
    assert_eq!(plan["channels"]["by"], "l1");
}

pub fn trials() -> Vec<Trial> {
    vec![
        trial("widths/timm", widths_are_timms),
        trial("widths/metapruning", metapruning),
        trial("widths/slices", slices_compute_the_same),
        trial("widths/refusals", refusals),
        trial("widths/times", times_follow_the_table),
        trial("widths/within a time", lists_within_a_time),
        trial("widths/whole job", whole_job),
        trial("widths/by the clock", by_the_clock),
    ]
}
