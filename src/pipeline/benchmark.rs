//! `bench`: layers and whole networks, timed against the device's limits and then in turns with a peer.

use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::device::Device;
use crate::dtype::Dtype;
use crate::engine::Fusion;
use crate::graph::BlockState;
use crate::measure::{
    DataSheet, Layer, LayerBench, NetworkCase, Peaks, Peer, PeerScript, Roofline, Summary, WARM_UP, measure_peaks,
    peak_memory, sample_networks,
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
/// How long a peer may take for its own peaks.
const PEER_PEAKS: Duration = Duration::from_secs(60);

/// One timed thing, as machine output has it.
pub type Record = Map<String, Value>;

/// What a device can do, against which times are judged.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Measured with this program's own copy and matrix product.
    pub peaks: Peaks,
    /// The device's data sheet, where it is known.
    pub published: Option<&'static DataSheet>,
    /// Bandwidth as measured; rates of the data sheet where it is known, else as measured.
    pub roofline: Roofline,
    precision: Dtype,
}

impl Limits {
    /// Measures a device's.
    ///
    /// # Errors
    /// When the device fails.
    pub fn measure(device: &Device, budget: Duration) -> Result<Self> {
        let peaks = measure_peaks(device, budget.mul_f64(PEAKS_SHARE).max(MIN_PEAKS))?;
        let precision = device.precision();
        let published = DataSheet::of(&device.name());
        let measured = Roofline::measured(&peaks, precision);
        let roofline = match published {
            Some(sheet) => Roofline { bandwidth: measured.bandwidth, ..sheet.roofline(precision) },
            None => measured,
        };
        Ok(Self { peaks, published, roofline, precision })
    }

    /// What FLOP utilization is a share of.
    fn flop_peak(&self) -> &'static str {
        if self.published.is_some() { "published" } else { "measured" }
    }

    /// The limits in a few lines, beside those that a peer measured in the same run.
    pub fn text(&self, peer: &Value) -> String {
        let rate = |rate: f64, unit: &str| match rate {
            r if r >= 1e12 => format!("{:.2} T{unit}/s", r / 1e12),
            r => format!("{:.1} G{unit}/s", r / 1e9),
        };
        let published = self.published.map(|sheet| sheet.roofline(self.precision));
        let line = |name: &str, measured: f64, peer_key: &str, published: Option<f64>, unit: &str| {
            let peer = peer["peaks"][peer_key]
                .as_f64()
                .map_or_else(String::new, |p| format!(", the peer's {}", rate(p, unit)));
            let published = published.map_or_else(|| "not known".into(), |p| rate(p, unit));
            format!("  {name:<16} measured {}{peer}, published {published}\n", rate(measured, unit))
        };
        let sheet = self.published.map_or(String::new(), |sheet| format!(" (published: {})", sheet.name));
        format!(
            "peaks{sheet}; measured with this program's own copy and matrix product, lower bounds; byte utilization is of \
             the measured copy, FLOP utilization of the {} rates\n{}{}{}",
            self.flop_peak(),
            line("copy", self.peaks.copy_bytes_per_s, "copy_bytes_per_s", published.map(|p| p.bandwidth), "B"),
            line(
                "matrix product",
                self.peaks.gemm_flops_per_s,
                "gemm_flops_per_s",
                published.map(|p| p.matrix_flops),
                "FLOP"
            ),
            line("f32 product", self.peaks.vector_flops_per_s, "", published.map(|p| p.vector_flops), "FLOP"),
        )
    }

    /// The limits for machine output.
    pub fn json(&self) -> Value {
        let published = self.published.map(|sheet| {
            let r = sheet.roofline(self.precision);
            json!({ "name": sheet.name, "copy_bytes_per_s": r.bandwidth, "gemm_flops_per_s": r.matrix_flops,
                    "vector_flops_per_s": r.vector_flops })
        });
        json!({ "measured": self.peaks, "published": published, "flop_utilization_of": self.flop_peak(),
                "byte_utilization_of": "measured" })
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

/// The peer of a bench.
#[derive(Debug, Clone, Copy)]
pub struct PeerOptions<'a> {
    /// The Python that has it.
    pub python: &'a Path,
    /// Layers that it is asked for: those that take most of the networks' time.
    pub layers: usize,
    /// How long it may take for an answer beyond what it measures: it tries algorithms and compiles first.
    pub leeway: Duration,
}

/// A bench of one device.
pub struct Bench<'a> {
    /// The device.
    pub device: &'a Device,
    /// Its limits.
    pub limits: &'a Limits,
    /// Time to measure for, everything together.
    pub budget: Duration,
    /// The peer, where one is asked for. It begins when all own times are there, so that it costs none of them.
    pub peer: Option<PeerOptions<'a>>,
    /// Takes the records so far and what is known of the peer, whenever there is more: a run that is interrupted leaves
    /// what it found.
    #[allow(clippy::type_complexity)]
    pub keep: &'a dyn Fn(&[Record], &Value) -> Result<()>,
}

impl Bench<'_> {
    /// Times layers of the `networks` they were found in. A layer that cannot be timed has its record with an `error`.
    /// Gives a record a layer, and what is known of the peer.
    ///
    /// # Errors
    /// When no layer can be timed, or the records cannot be kept.
    pub fn layers(&self, layers: &[Layer], networks: &[&str]) -> Result<(Vec<Record>, Value)> {
        let bench = LayerBench::new(self.device)?;
        let mut records: Vec<Record> = Vec::with_capacity(layers.len());
        let share = self.own_budget() / layers.len().max(1) as u32;
        for layer in layers {
            let mut record = layer_record(layer, networks, self.device);
            match self.time_layer(&bench, layer, share) {
                Ok((summary, sets)) => add_time(&mut record, layer, (&summary, sets), self.limits),
                Err(error) => add_error(&mut record, "time_us", &error),
            }
            release_idle(self.device);
            records.push(record);
            (self.keep)(&records, &Value::Null)?;
        }
        require_any(&records)?;
        let Some(options) = self.peer else { return Ok((records, Value::Null)) };
        let Some((mut peer, about)) = self.start_peer(options, PeerScript::Layers, &mut records, "peer_time_us")?
        else {
            return Ok((records, Value::Null));
        };
        let asked = most_time(&records, options.layers);
        let turn = self.own_budget() / (2 * TURNS * asked.len().max(1) as u32);
        for index in asked {
            let (layer, record) = (&layers[index], &mut records[index]);
            let mut question = record.clone();
            question.insert("seconds".into(), json!(turn.as_secs_f64()));
            let own = || self.sample_layer(&bench, layer, turn);
            let turns = take_turns(own, || peer.ask(&question, turn + options.leeway));
            add_turns(record, turns, &["time_us", "conv_time_us"]);
            release_idle(self.device);
            (self.keep)(&records, &about)?;
        }
        Ok((records, about))
    }

    fn time_layer(&self, bench: &LayerBench, layer: &Layer, budget: Duration) -> Result<(Summary, usize)> {
        let mut launches = bench.launches(layer)?;
        Ok((summary(&launches.sample(budget)?)?, launches.sets()))
    }

    fn sample_layer(&self, bench: &LayerBench, layer: &Layer, budget: Duration) -> Result<Vec<f64>> {
        bench.launches(layer)?.sample(budget)
    }

    /// Times a network as it is (one step a node), folded, fused and merged, and its training step. A case that cannot
    /// be timed has its record with an `error`. Gives a record a case, and what is known of the peer.
    ///
    /// # Errors
    /// When no case can be timed, or the records cannot be kept.
    pub fn networks(&self, (model, merged): (&Model, Option<&Model>), batch: usize) -> Result<(Vec<Record>, Value)> {
        let cases = network_cases(model, merged)?;
        let mut records = Vec::with_capacity(cases.len());
        // Inference in alternation; training takes so much more memory that only one is held at a time.
        let groups: Vec<_> = cases.chunk_by(|a, b| !a.training && !b.training).collect();
        let share = self.own_budget() / groups.len() as u32;
        for group in groups {
            for (case, seconds) in group.iter().zip(sample_networks(self.device, group, batch, share)) {
                let mut record = self.case_record(case, batch)?;
                let timed = seconds.and_then(|seconds| {
                    release_idle(self.device);
                    Ok((summary(&seconds)?, peak_memory(self.device, case, batch)?))
                });
                match timed {
                    Ok((summary, memory)) => self.add_case_time(&mut record, case, batch, (&summary, memory))?,
                    Err(error) => add_error(&mut record, "images_per_s", &error),
                }
                records.push(record);
            }
            release_idle(self.device);
            (self.keep)(&records, &Value::Null)?;
        }
        require_any(&records)?;
        let Some(options) = self.peer else { return Ok((records, Value::Null)) };
        let script = PeerScript::Networks;
        let Some((mut peer, about)) = self.start_peer(options, script, &mut records, "peer_images_per_s")? else {
            return Ok((records, Value::Null));
        };
        let turn = self.own_budget() / (2 * TURNS * cases.len() as u32);
        for (index, case) in cases.iter().enumerate() {
            // PyTorch's counterpart of fusion is its compiler.
            let compile = case.fusion == Fusion::OnLoad;
            let graph = match (case.training, case.fusion) {
                (false, Fusion::OnLoad) => case.model.folded()?.graph,
                _ => case.model.graph.clone(),
            };
            let question = json!({ "graph": graph, "batch": batch, "training": case.training, "compile": compile,
                                   "seconds": turn.as_secs_f64() });
            let Value::Object(question) = question else { unreachable!("an object was written") };
            let own = || {
                let samples = sample_networks(self.device, std::slice::from_ref(case), batch, turn).remove(0);
                release_idle(self.device);
                samples
            };
            let turns = take_turns(own, || peer.ask(&question, turn + options.leeway));
            let record = &mut records[index];
            add_turns(record, turns, &["images_per_s", "memory_bytes"]);
            let rate = record["peer_images_per_s"].as_f64();
            record.insert("peer_time_us".into(), json!(rate.map(|rate| batch as f64 / rate * 1e6)));
            (self.keep)(&records, &about)?;
        }
        Ok((records, about))
    }

    /// Time for what this program measures alone: half of it where a peer takes its turns.
    fn own_budget(&self) -> Duration {
        if self.peer.is_some() { self.budget / 2 } else { self.budget }
    }

    /// Starts the peer, and asks for its peaks. Where it does not start one line says so, every record has the reason, and
    /// there is none.
    fn start_peer(
        &self,
        options: PeerOptions<'_>,
        script: PeerScript,
        records: &mut [Record],
        key: &str,
    ) -> Result<Option<(Peer, Value)>> {
        let mut peer = match Peer::start(options.python, script, self.device) {
            Ok(peer) => peer,
            Err(error) => {
                tracing::warn!("{error}");
                for record in records.iter_mut() {
                    record.insert(key.to_owned(), Value::Null);
                    record.insert("peer_error".into(), json!(error.to_string()));
                }
                (self.keep)(records, &Value::Null)?;
                return Ok(None);
            }
        };
        let mut about = peer.about.clone();
        let Value::Object(question) = json!({ "name": "peaks", "seconds": 0.2 }) else { unreachable!() };
        about["peaks"] = peer.ask(&question, PEER_PEAKS).unwrap_or_else(|e| json!({ "error": e.to_string() }));
        Ok(Some((peer, about)))
    }

    fn case_record(&self, case: &NetworkCase, batch: usize) -> Result<Record> {
        let (costs, element) = (case.costs(self.device.backend())?, self.limits.roofline.element_bytes);
        let sum = |of: &dyn Fn(&crate::measure::KernelCost) -> u64| costs.iter().map(of).sum::<u64>();
        let value = json!({
            "name": case.name, "pass": if case.training { "training" } else { "inference" },
            "network": case.model.graph.name, "device": self.device.name(),
            "precision": self.device.precision().to_string(), "batch": batch,
            "flops": sum(&|k| k.flops * batch as u64), "bytes": sum(&|k| k.bytes(batch, element)),
        });
        Ok(object(value))
    }

    fn add_case_time(
        &self,
        record: &mut Record,
        case: &NetworkCase,
        batch: usize,
        (summary, memory): (&Summary, u64),
    ) -> Result<()> {
        let used = self.limits.roofline.utilization(&case.costs(self.device.backend())?, batch, summary.median);
        record.extend(object(json!({
            "images_per_s": batch as f64 / summary.median, "time_us": summary.median * 1e6,
            "iqr_us": summary.iqr * 1e6, "samples": summary.count, "warm_up": WARM_UP,
            "flop_utilization": used.flop, "flop_utilization_of": self.limits.flop_peak(),
            "byte_utilization": used.byte, "roofline_fraction": used.roofline, "memory_bytes": memory,
        })));
        Ok(())
    }
}

fn object(value: Value) -> Record {
    match value {
        Value::Object(record) => record,
        _ => unreachable!("an object was written"),
    }
}

fn summary(seconds: &[f64]) -> Result<Summary> {
    Summary::of(seconds).ok_or_else(|| Error::Device("no time was measured".into()))
}

/// Leaves the memory of a GPU to the peer, and to work of other sizes.
fn release_idle(device: &Device) {
    if let Device::Gpu(gpu, _) = device {
        gpu.release_idle();
    }
}

/// What became of own samples and of a peer's answers.
type Turns = (Vec<Result<Vec<f64>>>, Vec<Result<Value>>);

fn take_turns(mut own: impl FnMut() -> Result<Vec<f64>>, mut peer: impl FnMut() -> Result<Value>) -> Turns {
    (0..TURNS).map(|_| (own(), peer())).unzip()
}

/// The layers that take most of the networks' time, at most so many, the slowest first.
fn most_time(records: &[Record], most: usize) -> Vec<usize> {
    let total = |record: &Record| {
        let counts = record["count"].as_object().map_or(0.0, |c| c.values().filter_map(Value::as_f64).sum::<f64>());
        Some(record["time_us"].as_f64()? * counts)
    };
    let mut timed: Vec<(usize, f64)> =
        records.iter().enumerate().filter_map(|(i, record)| Some((i, total(record)?))).collect();
    timed.sort_by(|a, b| b.1.total_cmp(&a.1));
    timed.into_iter().take(most).map(|(i, _)| i).collect()
}

/// Everything a peer needs to do the same work.
fn layer_record(layer: &Layer, networks: &[&str], device: &Device) -> Record {
    let p = layer.problem;
    let pad = p.window.pad;
    let counts: Map<String, Value> =
        networks.iter().zip(&layer.counts).map(|(name, count)| ((*name).to_owned(), json!(count))).collect();
    // A bias map is no operand of PyTorch's convolutions; the peer adds a bias per channel.
    object(json!({
        "name": layer.name, "pass": layer.pass.name(), "family": layer.family(), "shape": layer.shape(),
        "count": counts, "device": device.name(), "precision": device.precision().to_string(),
        "n": p.n, "h": p.input.h, "w": p.input.w, "c_in": p.input.c, "c_out": p.output.c,
        "kernel": [p.window.k_h, p.window.k_w], "stride": [p.window.stride_h, p.window.stride_w],
        "padding": [pad.top, pad.left, pad.bottom, pad.right], "groups": p.groups,
        "bias": layer.epilogue.bias.operand().is_some(), "residual": layer.epilogue.residual.is_some(),
        "activation": layer.epilogue.act.is_some(), "activation_limit": layer.epilogue.act.and_then(|act| act.limit),
        "reads_image": layer.reads_image,
    }))
}

fn add_time(record: &mut Record, layer: &Layer, (summary, sets): (&Summary, usize), limits: &Limits) {
    let roofline = &limits.roofline;
    let (n, e) = (layer.problem.n, roofline.element_bytes);
    let used = roofline.utilization(std::slice::from_ref(&layer.cost), n, summary.median);
    record.extend(object(json!({
        "time_us": summary.median * 1e6, "iqr_us": summary.iqr * 1e6, "samples": summary.count, "warm_up": WARM_UP,
        "operand_sets": sets, "flops": layer.flops(), "bytes": layer.bytes(e),
        "flops_per_byte": layer.flops() as f64 / layer.bytes(e) as f64,
        "flop_utilization": used.flop, "flop_utilization_of": limits.flop_peak(), "byte_utilization": used.byte,
        "roofline_fraction": used.roofline, "roofline_us": roofline.time(&layer.cost, n) * 1e6,
    })));
}

/// Says why a record has no time.
fn add_error(record: &mut Record, key: &str, error: &Error) {
    let word = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
    tracing::warn!("{} {}: {error}", word("name"), word("pass"));
    record.insert(key.to_owned(), Value::Null);
    record.insert("error".into(), json!(error.to_string()));
}

/// Fails where nothing could be timed.
fn require_any(records: &[Record]) -> Result<()> {
    match records.iter().map(|record| record.get("error")).collect::<Option<Vec<_>>>() {
        Some(errors) if !errors.is_empty() => {
            let first = errors[0].as_str().unwrap_or_default();
            Err(Error::Device(format!("nothing could be timed: {}", first.trim_start_matches("device: "))))
        }
        _ => Ok(()),
    }
}

/// What was measured in turns: own time as `turn_time_us`, the median of each key of the answers as `peer_<key>`, or why
/// there is none.
fn add_turns(record: &mut Record, (own, answers): Turns, keys: &[&str]) {
    let median = |values: &[f64]| Summary::of(values).map(|summary| summary.median);
    let seconds: Vec<f64> = own.iter().flatten().flatten().copied().collect();
    record.insert("turn_time_us".into(), json!(median(&seconds).map(|s| s * 1e6)));
    for key in keys {
        let values: Vec<f64> = answers.iter().flatten().filter_map(|answer| answer[*key].as_f64()).collect();
        let value = median(&values);
        if value.is_some() || *key == keys[0] {
            record.insert(format!("peer_{key}"), json!(value));
        }
    }
    if let Some(note) = answers.iter().flatten().find_map(|answer| answer["note"].as_str()) {
        record.insert("peer_note".into(), json!(note));
    }
    if let Some(error) = answers.into_iter().find_map(Result::err).or(own.into_iter().find_map(Result::err)) {
        record.insert("peer_error".into(), json!(error.to_string()));
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
        case("original", model, Fusion::PerNode, false),
        case("folded", &folded, Fusion::PerNode, false),
        case("fused", model, Fusion::OnLoad, false),
    ];
    cases.extend(merged.map(|merged| case("merged", merged, Fusion::OnLoad, false)));
    cases.extend([case("original", model, Fusion::PerNode, true), case("fused", model, Fusion::OnLoad, true)]);
    Ok(cases)
}
