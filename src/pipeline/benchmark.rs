//! `bench`: layers and whole networks, timed against the device's limits and against a peer in turn.

use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::device::Device;
use crate::engine::Fusion;
use crate::graph::BlockState;
use crate::measure::{
    Layer, LayerBench, NetworkCase, Peaks, Peer, PeerScript, Roofline, Summary, measure_peaks, peak_memory,
    sample_networks,
};
use crate::model::Model;
use crate::shrink::Mask;
use crate::shrink::merge::{MergeOptions, merge};
use crate::shrink::surgery::linearise;
use crate::{Error, Result};

/// Share of the measuring time for the device's peaks.
const PEAKS_SHARE: f64 = 0.05;
/// Time for them at least: everything is judged by them.
const MIN_PEAKS: Duration = Duration::from_millis(300);
/// How often what is compared takes turns with its peer.
const TURNS: u32 = 2;
/// How much longer than it measures a peer may take to answer: it tries algorithms and compiles first.
const PEER_LEEWAY: Duration = Duration::from_secs(30);
/// The same for whole networks, which it may compile.
const NETWORK_PEER_LEEWAY: Duration = Duration::from_secs(240);

/// What a device can do, against which times are judged.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Measured with this program's own copy and matrix product.
    pub peaks: Peaks,
    /// The entry of the table of known devices, where there is one.
    pub published: Option<(&'static str, Roofline)>,
    /// Bandwidth as measured; rates as published where they are, else as measured.
    pub roofline: Roofline,
}

impl Limits {
    /// Measures a device's.
    ///
    /// # Errors
    /// When the device fails.
    pub fn measure(device: &Device, budget: Duration) -> Result<Self> {
        let peaks = measure_peaks(device, budget.mul_f64(PEAKS_SHARE).max(MIN_PEAKS))?;
        let precision = device.precision();
        let published = Roofline::published(&device.name(), precision);
        let measured = Roofline::measured(&peaks, precision);
        let roofline = match published {
            Some((_, rates)) => Roofline { bandwidth: measured.bandwidth, ..rates },
            None => measured,
        };
        Ok(Self { peaks, published, roofline })
    }

    /// The limits in a few lines.
    pub fn text(&self) -> String {
        let rate = |rate: f64, unit: &str| match rate {
            r if r >= 1e12 => format!("{:.2} T{unit}/s", r / 1e12),
            r => format!("{:.1} G{unit}/s", r / 1e9),
        };
        let line = |name: &str, measured: f64, published: Option<f64>, unit: &str| {
            let published = published.map_or_else(|| "not known".into(), |p| rate(p, unit));
            format!("  {name:<16} measured {}, published {published}\n", rate(measured, unit))
        };
        let published = self.published.map(|(_, roofline)| roofline);
        let entry = self.published.map_or(String::new(), |(name, _)| format!(" (published: {name})"));
        let by = if published.is_some() { "published rates" } else { "measured rates" };
        format!(
            "peaks{entry}; rates are measured with this program's own matrix product, a lower bound; utilization is of the \
             measured bandwidth and the {by}\n{}{}{}",
            line("copy", self.peaks.copy_bytes_per_s, published.map(|p| p.bandwidth), "B"),
            line("matrix product", self.peaks.gemm_flops_per_s, published.map(|p| p.matrix_flops), "FLOP"),
            line("f32 product", self.peaks.vector_flops_per_s, published.map(|p| p.vector_flops), "FLOP"),
        )
    }

    /// The limits for machine output.
    pub fn json(&self) -> Value {
        let published = self.published.map(|(name, r)| {
            json!({ "name": name, "copy_bytes_per_s": r.bandwidth, "gemm_flops_per_s": r.matrix_flops,
                    "vector_flops_per_s": r.vector_flops })
        });
        json!({ "measured": self.peaks, "published": published })
    }
}

/// The network with every block merged that can be, or those that `mask` frees, with the settings of a shrink run.
/// `None` where no block is.
///
/// # Errors
/// A mask that does not fit, or a block in it that cannot be merged.
pub fn fully_merged(model: &Model, mask: Option<&Mask>, config: &Config) -> Result<Option<Model>> {
    let surgery = config.linearise();
    let blocks = model.graph.blocks.len();
    let kept = match mask {
        Some(mask) => {
            mask.check(blocks)?;
            mask.kept().to_vec()
        }
        None => {
            let alone = |block: usize| (0..blocks).map(|b| b != block).collect::<Vec<bool>>();
            (0..blocks).map(|block| linearise(model, &alone(block), &surgery).is_err()).collect()
        }
    };
    let linear = linearise(model, &kept, &surgery)?;
    if linear.graph.blocks.iter().all(|block| block.state == BlockState::Active) {
        return Ok(None);
    }
    Ok(Some(merge(&linear, &MergeOptions { padding: surgery.padding })?.0))
}

/// Starts the peer where one is asked for; otherwise, or where it does not start, why there is none. One line says so,
/// and the rest goes on.
fn start_peer(python: Option<&Path>, script: PeerScript, device: &Device) -> (Option<Peer>, Option<String>) {
    match python.map(|python| Peer::start(python, script, device)) {
        None => (None, None),
        Some(Ok(peer)) => (Some(peer), None),
        Some(Err(error)) => {
            tracing::warn!("{error}");
            (None, Some(error.to_string()))
        }
    }
}

/// Times layers of the `networks` they were found in, in about `budget`. Gives one record a layer, and what is known of
/// the peer.
///
/// # Errors
/// When the device fails.
pub fn bench_layers(
    device: &Device,
    (layers, networks): (&[Layer], &[&str]),
    limits: &Limits,
    budget: Duration,
    python: Option<&Path>,
) -> Result<(Vec<Map<String, Value>>, Value)> {
    let bench = LayerBench::new(device)?;
    let (mut peer, why_not) = start_peer(python, PeerScript::Layers, device);
    let mut about = peer.as_ref().map_or(Value::Null, |peer| peer.about.clone());
    if let Some(peer) = &mut peer
        && let Ok(peaks) = peer.ask(&json!({ "name": "peaks", "seconds": 0.2 }), PEER_LEEWAY)
    {
        about["peaks"] = peaks;
    }
    let sides = if peer.is_some() { 2 } else { 1 };
    let turn = budget / (layers.len().max(1) as u32 * TURNS * sides);
    let mut records = Vec::with_capacity(layers.len());
    for layer in layers {
        let mut record = layer_record(layer, networks, device);
        let mut launches = bench.launches(layer)?;
        let (mut own, mut answers) = (Vec::new(), Vec::new());
        for _ in 0..if peer.is_some() { TURNS } else { 1 } {
            own.extend(launches.sample(turn * if peer.is_some() { 1 } else { TURNS })?);
            if let Some(peer) = &mut peer {
                record.insert("seconds".into(), json!(turn.as_secs_f64()));
                answers.push(peer.ask(&Value::Object(record.clone()), PEER_LEEWAY + turn));
                record.remove("seconds");
            }
        }
        let summary = Summary::of(&own).ok_or_else(|| Error::Device(format!("{}: no time", layer.name)))?;
        add_time(&mut record, layer, &summary, limits);
        add_answers(&mut record, answers, &["time_us", "conv_time_us"]);
        add_absence(&mut record, why_not.as_deref(), "peer_time_us");
        records.push(record);
        drop(launches);
        release_idle(device);
    }
    Ok((records, about))
}

/// Leaves the memory of a GPU to the peer, and to layers of other sizes.
fn release_idle(device: &Device) {
    if let Device::Gpu(gpu, _) = device {
        gpu.release_idle();
    }
}

/// Everything a peer needs to do the same work.
fn layer_record(layer: &Layer, networks: &[&str], device: &Device) -> Map<String, Value> {
    let p = layer.problem;
    let pad = p.window.pad;
    let counts: Map<String, Value> =
        networks.iter().zip(&layer.counts).map(|(name, count)| ((*name).to_owned(), json!(count))).collect();
    // A bias map is no operand of PyTorch's convolutions; the peer adds a bias per channel.
    let value = json!({
        "name": layer.name, "pass": layer.pass.name(), "family": layer.family(), "shape": layer.shape(),
        "count": counts, "device": device.name(), "precision": device.precision().to_string(),
        "n": p.n, "h": p.input.h, "w": p.input.w, "c_in": p.input.c, "c_out": p.output.c,
        "kernel": [p.window.k_h, p.window.k_w], "stride": [p.window.stride_h, p.window.stride_w],
        "padding": [pad.top, pad.left, pad.bottom, pad.right], "groups": p.groups,
        "bias": layer.tail.bias != crate::graph::Bias::None, "residual": layer.tail.residual,
        "activation": layer.tail.act.is_some(), "activation_limit": layer.tail.act.and_then(|act| act.limit),
        "reads_image": layer.reads_image,
    });
    match value {
        Value::Object(record) => record,
        _ => unreachable!("an object was written"),
    }
}

fn add_time(record: &mut Map<String, Value>, layer: &Layer, summary: &Summary, limits: &Limits) {
    let roofline = &limits.roofline;
    let (n, e) = (layer.problem.n, roofline.element_bytes);
    let used = roofline.utilization(std::slice::from_ref(&layer.cost), n, summary.median);
    let mut put = |key: &str, value: Value| record.insert(key.to_owned(), value);
    put("time_us", json!(summary.median * 1e6));
    put("iqr_us", json!(summary.iqr * 1e6));
    put("samples", json!(summary.count));
    put("flops", json!(layer.flops()));
    put("bytes", json!(layer.bytes(e)));
    put("flops_per_byte", json!(layer.flops() as f64 / layer.bytes(e) as f64));
    put("flop_utilization", json!(used.flop));
    put("byte_utilization", json!(used.byte));
    put("roofline_fraction", json!(used.roofline));
    put("roofline_us", json!(roofline.time(&layer.cost, n) * 1e6));
}

/// What the peer said in its turns: the median of each key as `peer_<key>`, or why there is none.
fn add_answers(record: &mut Map<String, Value>, answers: Vec<Result<Value>>, keys: &[&str]) {
    if answers.is_empty() {
        return;
    }
    for key in keys {
        let values: Vec<f64> = answers.iter().flatten().filter_map(|answer| answer[*key].as_f64()).collect();
        let value = Summary::of(&values).map(|summary| summary.median);
        if value.is_some() || *key == keys[0] {
            record.insert(format!("peer_{key}"), json!(value));
        }
    }
    if let Some(error) = answers.into_iter().find_map(Result::err) {
        record.insert("peer_error".into(), json!(error.to_string()));
    }
}

/// Times a network as it is (one step a node), folded, fused and merged, and its training step, in about `budget`.
///
/// # Errors
/// When the device fails.
pub fn bench_networks(
    device: &Device,
    (model, merged): (&Model, Option<&Model>),
    batch: usize,
    limits: &Limits,
    (budget, python): (Duration, Option<&Path>),
) -> Result<(Vec<Map<String, Value>>, Value)> {
    let (mut peer, why_not) = start_peer(python, PeerScript::Networks, device);
    let about = peer.as_ref().map_or(Value::Null, |peer| peer.about.clone());
    let mut records = Vec::new();
    let cases = network_cases(model, merged)?;
    // Training takes so much more memory and time that the two kinds are not mixed.
    for cases in cases.chunk_by(|a, b| a.training == b.training) {
        records.extend(bench_group(device, cases, batch, limits, (budget / 2, peer.as_mut()))?);
    }
    for record in &mut records {
        add_absence(record, why_not.as_deref(), "peer_images_per_s");
        let rate = record.get("peer_images_per_s").map(Value::as_f64);
        if let Some(rate) = rate {
            record.insert("peer_time_us".into(), json!(rate.map(|rate| batch as f64 / rate * 1e6)));
        }
    }
    Ok((records, about))
}

/// Says why a record has no peer though one was asked for.
fn add_absence(record: &mut Map<String, Value>, why_not: Option<&str>, key: &str) {
    if let Some(why_not) = why_not {
        record.insert(key.to_owned(), Value::Null);
        record.insert("peer_error".into(), json!(why_not));
    }
}

/// The ways a network is run: inference as it is (one step a node), folded, fused and merged, then training steps.
///
/// # Errors
/// As [`Model::folded`].
pub fn network_cases(model: &Model, merged: Option<&Model>) -> Result<Vec<NetworkCase>> {
    let folded = model.folded()?;
    let case = |name, model: &Model, fusion, training| NetworkCase { name, model: model.clone(), fusion, training };
    let mut cases = vec![
        case("original", model, Fusion::Reference, false),
        case("folded", &folded, Fusion::Reference, false),
        case("fused", model, Fusion::Fused, false),
    ];
    cases.extend(merged.map(|merged| case("merged", merged, Fusion::Fused, false)));
    cases.extend([case("original", model, Fusion::Reference, true), case("fused", model, Fusion::Fused, true)]);
    Ok(cases)
}

/// Times cases in alternation with each other, and in turns with the peer.
fn bench_group(
    device: &Device,
    cases: &[NetworkCase],
    batch: usize,
    limits: &Limits,
    (budget, mut peer): (Duration, Option<&mut Peer>),
) -> Result<Vec<Map<String, Value>>> {
    let memory = cases.iter().map(|case| peak_memory(device, case, batch)).collect::<Result<Vec<_>>>()?;
    let turns = if peer.is_some() { TURNS } else { 1 };
    let own_turn = budget / (turns * if peer.is_some() { 2 } else { 1 });
    let peer_turn = budget / (2 * turns * cases.len() as u32);
    let mut own: Vec<Vec<f64>> = vec![Vec::new(); cases.len()];
    let mut answers: Vec<Vec<Result<Value>>> = cases.iter().map(|_| Vec::new()).collect();
    for _ in 0..turns {
        for (all, new) in own.iter_mut().zip(sample_networks(device, cases, batch, own_turn)?) {
            all.extend(new);
        }
        release_idle(device);
        if let Some(peer) = &mut peer {
            for (case, answers) in cases.iter().zip(&mut answers) {
                // PyTorch's counterpart of fusion is its compiler.
                let compile = case.fusion == Fusion::Fused;
                let graph = match (case.training, case.fusion) {
                    (false, Fusion::Fused) => case.model.folded()?.graph,
                    _ => case.model.graph.clone(),
                };
                let question = json!({ "graph": graph, "batch": batch, "training": case.training,
                                       "compile": compile, "seconds": peer_turn.as_secs_f64() });
                answers.push(peer.ask(&question, NETWORK_PEER_LEEWAY + peer_turn));
            }
        }
    }
    let mut records = Vec::new();
    for (((case, seconds), answers), memory) in cases.iter().zip(own).zip(answers).zip(memory) {
        let summary = Summary::of(&seconds).ok_or_else(|| Error::Device(format!("{}: no time", case.name)))?;
        let mut record = network_record(device, case, batch, &summary, limits)?;
        record.insert("memory_bytes".into(), json!(memory));
        add_answers(&mut record, answers, &["images_per_s", "memory_bytes"]);
        records.push(record);
    }
    Ok(records)
}

fn network_record(
    device: &Device,
    case: &NetworkCase,
    batch: usize,
    summary: &Summary,
    limits: &Limits,
) -> Result<Map<String, Value>> {
    let costs = case.costs()?;
    let used = limits.roofline.utilization(&costs, batch, summary.median);
    let sum = |of: &dyn Fn(&crate::measure::KernelCost) -> u64| costs.iter().map(of).sum::<u64>();
    let value = json!({
        "name": case.name, "pass": if case.training { "training" } else { "inference" },
        "network": case.model.graph.name, "device": device.name(), "precision": device.precision().to_string(),
        "batch": batch, "images_per_s": batch as f64 / summary.median, "time_us": summary.median * 1e6,
        "iqr_us": summary.iqr * 1e6, "samples": summary.count,
        "flops": sum(&|k| k.flops * batch as u64), "bytes": sum(&|k| k.bytes(batch, limits.roofline.element_bytes)),
        "flop_utilization": used.flop, "byte_utilization": used.byte, "roofline_fraction": used.roofline,
    });
    match value {
        Value::Object(record) => Ok(record),
        _ => unreachable!("an object was written"),
    }
}
