//! `bench`: layers and whole networks, timed against the device's limits and then in turns with peers.

use std::path::Path;
use std::time::Duration;

use super::runtimes::has_runtimes;
use crate::config::Config;
use crate::device::Device;
use crate::engine::Fusion;
use crate::measure::{
    Answer, BenchRecord, Findings, LayerAnswer, LayerBench, LayerPeer, LayerQuestion, LayerRecord, LayerTiming,
    LayerWork, Limits, Measured, NetworkAnswer, NetworkCase, NetworkPeer, NetworkQuestion, NetworkRecord,
    NetworkTiming, NetworkWork, Peer, PeerAbout, PeerScript, PeerTiming, Summary, TimedLayer, Timing, Used,
    peak_memory, sample_networks,
};
use crate::model::Model;
use crate::shrink::merge::{MergeOptions, merge_selection};
use crate::shrink::surgery::{Linearise, linearise};
use crate::shrink::{Mask, Selection};
use crate::{Error, Result};

/// Turns that this program and its peer take for one comparison.
const TURNS: u32 = 2;

/// The network with every block merged that can be, or what `selection` frees merged or bypassed and what it takes away gone, with the settings of a shrink run.
/// `None` where no block is.
///
/// # Errors
/// A selection that does not fit, or a block in it that cannot be merged.
pub fn fully_merged(model: &Model, selection: Option<&Selection>, config: &Config) -> Result<Option<Model>> {
    let surgery = config.linearise();
    let surgery = Linearise { padding: selection.and_then(|s| s.padding).unwrap_or(surgery.padding), ..surgery };
    let selection = match selection {
        Some(selection) => {
            selection.keep.check(&model.graph)?;
            selection.clone()
        }
        None => Mask::new(unmergeable_blocks(model, &surgery)).into(),
    };
    let linear = linearise(model, &selection, &surgery)?;
    let merged = merge_selection(&linear, &selection, &MergeOptions { padding: surgery.padding })?;
    let bypasses = selection.bypass || !selection.bypassed.is_empty();
    let changes = bypasses || selection.channels.is_some() || !merged.segments.is_empty();
    Ok(changes.then_some(merged.model))
}

/// For each block whether it cannot be merged, even alone.
pub(super) fn unmergeable_blocks(model: &Model, surgery: &Linearise) -> Vec<bool> {
    let blocks = model.graph.blocks.len();
    let alone = |block: usize| (0..blocks).map(|b| b != block).collect::<Vec<bool>>();
    (0..blocks).map(|block| linearise(model, &alone(block), surgery).is_err()).collect()
}

/// The peer of a bench.
#[derive(Debug, Clone, Copy)]
pub struct PeerOptions<'a> {
    /// The Python interpreter with PyTorch and inference runtimes.
    pub python: &'a Path,
    /// Number of layers that the peer times: those that take most of the networks' time.
    pub layers: usize,
    /// Longest time for an answer beyond the measurement itself: the peer first tries algorithms and compiles.
    pub leeway: Duration,
}

/// Called with all records so far whenever there is a new one, so that an interrupted run keeps its results.
pub type Keep<'a, R> = &'a dyn Fn(&Findings<R>) -> Result<()>;

/// A bench of one device.
#[derive(Debug, Clone, Copy)]
pub struct Bench<'a> {
    /// The device.
    pub device: &'a Device,
    /// Its limits.
    pub limits: &'a Limits,
    /// Time to measure for, everything together.
    pub budget: Duration,
    /// The peer, if requested. It starts after all own measurements, so that it does not disturb them.
    pub peer: Option<PeerOptions<'a>>,
}

impl Bench<'_> {
    /// Times the distinct layers of `networks`. Every layer gets a record, also one that cannot be timed.
    ///
    /// # Errors
    /// When no layer can be timed, or what was found cannot be kept.
    pub fn layers(
        &self,
        layers: &[TimedLayer],
        networks: &[&str],
        keep: Keep<'_, LayerRecord>,
    ) -> Result<Findings<LayerRecord>> {
        let bench = LayerBench::new(self.device)?;
        let mut found = Findings { records: Vec::with_capacity(layers.len()), peer: None, runtimes: None };
        let share = self.own_budget() / layers.len().max(1) as u32;
        for layer in layers {
            let outcome = bench.configurations(layer);
            let (config, outcome) = match outcome {
                Ok(config) => (config, self.time_layer(&bench, layer, share)),
                Err(error) => (None, Err(error)),
            };
            let work = LayerWork::new(layer, networks, self.device, config);
            let own = measured(outcome, work.name.as_str(), work.pass);
            self.device.release_idle();
            found.records.push(LayerRecord { work, own, peer: None, runtimes: Vec::new() });
            keep(&found)?;
        }
        require_any(&found.records)?;
        let Some(options) = self.peer else { return Ok(found) };
        let Some(mut peer) = self.start_peer(options, PeerScript::Layers, &mut found, keep)? else { return Ok(found) };
        let asked = slowest_layers(&found.records, options.layers);
        let turn = self.own_budget() / (2 * TURNS * asked.len().max(1) as u32);
        for (index, operand_sets) in asked {
            let (layer, record) = (&layers[index], &mut found.records[index]);
            let question = LayerQuestion { work: &record.work, operand_sets, seconds: turn.as_secs_f64() };
            let own = || bench.launches(layer)?.sample(turn);
            let turns = Turns::take(own, || peer.ask(&question, turn + options.leeway));
            record.peer = Some(Measured::Timed(turns.timing(|answers: &[LayerAnswer]| LayerPeer {
                peer_time_us: median(answers.iter().map(|a| a.time_us)),
                peer_conv_time_us: median(answers.iter().filter_map(|a| a.conv_time_us)),
            })));
            self.device.release_idle();
            keep(&found)?;
        }
        Ok(found)
    }

    fn time_layer(&self, bench: &LayerBench, layer: &TimedLayer, budget: Duration) -> Result<LayerTiming> {
        let mut launches = bench.launches(layer)?;
        Ok(LayerTiming::new(layer, &summary(&launches.sample(budget)?)?, launches.sets(), self.limits))
    }

    /// Times a network unfused (one step per node), folded, fused and merged, and its training step. Every case gets a
    /// record, also one that cannot be timed.
    ///
    /// # Errors
    /// When no case can be timed, or what was found cannot be kept.
    pub fn networks(
        &self,
        model: &Model,
        merged: Option<&Model>,
        batch: usize,
        keep: Keep<'_, NetworkRecord>,
    ) -> Result<Findings<NetworkRecord>> {
        let cases = network_cases(model, merged)?;
        let mut found = Findings { records: Vec::with_capacity(cases.len()), peer: None, runtimes: None };
        // Inference in alternation; training takes so much more memory that only one is held at a time.
        let groups: Vec<_> = cases.chunk_by(|a, b| !a.training && !b.training).collect();
        let share = self.own_budget() / groups.len() as u32;
        for group in groups {
            for (case, seconds) in group.iter().zip(sample_networks(self.device, group, batch, share)) {
                let work = NetworkWork::new(case, batch, self.device, self.limits)?;
                let timing = seconds.and_then(|seconds| self.case_timing(case, batch, &seconds));
                let own = measured(timing, work.name, work.pass);
                found.records.push(NetworkRecord { work, own, peer: None, runtimes: Vec::new() });
            }
            self.device.release_idle();
            keep(&found)?;
        }
        require_any(&found.records)?;
        self.networks_in_turns(&cases, batch, &mut found, keep)?;
        Ok(found)
    }

    fn case_timing(&self, case: &NetworkCase, batch: usize, seconds: &[f64]) -> Result<NetworkTiming> {
        self.device.release_idle();
        let seconds = summary(seconds)?;
        Ok(NetworkTiming {
            images_per_s: batch as f64 / seconds.median,
            timing: Timing::of_seconds(&seconds),
            used: Used::of(self.limits, &case.costs(self.device.backend())?, batch, seconds.median),
            memory_bytes: peak_memory(self.device, case, batch)?,
        })
    }

    /// Times every case in turns with the peer, and those that have runtimes with each of these, if peers are requested.
    fn networks_in_turns(
        &self,
        cases: &[NetworkCase],
        batch: usize,
        found: &mut Findings<NetworkRecord>,
        keep: Keep<'_, NetworkRecord>,
    ) -> Result<()> {
        let Some(options) = self.peer else { return Ok(()) };
        let peer = self.start_peer(options, PeerScript::Networks, found, keep)?;
        let runtimes = self.find_runtimes(options);
        let with_runtimes = cases.iter().filter(|case| has_runtimes(case)).count();
        let comparisons = peer.as_ref().map_or(0, |_| cases.len()) + with_runtimes * runtimes.runtimes.len();
        found.runtimes = Some(runtimes);
        let turn = self.own_budget() / (2 * TURNS * comparisons.max(1) as u32);
        // Ends before the runtimes begin, so that they find its memory free.
        if let Some(peer) = peer {
            self.peer_in_turns((peer, turn, options.leeway), cases, batch, found, keep)?;
        }
        self.runtimes_in_turns((options, turn), cases, batch, found, keep)?;
        keep(found)
    }

    /// Times every case in turns with a peer: a turn takes so long, and an answer that much longer at most.
    fn peer_in_turns(
        &self,
        (mut peer, turn, leeway): (Peer, Duration, Duration),
        cases: &[NetworkCase],
        batch: usize,
        found: &mut Findings<NetworkRecord>,
        keep: Keep<'_, NetworkRecord>,
    ) -> Result<()> {
        for (index, case) in cases.iter().enumerate() {
            // PyTorch's counterpart of fusion is its compiler.
            let compile = case.fusion == Fusion::OnLoad;
            let graph = match (case.training, case.fusion) {
                (false, Fusion::OnLoad) => &case.model.folded()?.graph,
                _ => &case.model.graph,
            };
            let (training, seconds) = (case.training, turn.as_secs_f64());
            let question = NetworkQuestion { graph, batch, training, compile, seconds };
            let turns = Turns::take(|| self.sample_case(case, batch, turn), || peer.ask(&question, turn + leeway));
            found.records[index].peer =
                Some(Measured::Timed(turns.timing(|answers: &[NetworkAnswer]| network_peer(batch, answers))));
            keep(found)?;
        }
        Ok(())
    }

    /// Seconds of every pass of one case within a turn.
    pub(super) fn sample_case(&self, case: &NetworkCase, batch: usize, turn: Duration) -> Result<Vec<f64>> {
        let samples = sample_networks(self.device, std::slice::from_ref(case), batch, turn).remove(0);
        self.device.release_idle();
        samples
    }

    /// Time for what this program measures alone: half of it where a peer takes its turns.
    fn own_budget(&self) -> Duration {
        if self.peer.is_some() { self.budget / 2 } else { self.budget }
    }

    /// Starts the peer, and asks for its peaks. Where it does not start one line says so, every record has the reason, and
    /// there is none.
    fn start_peer<W, T, P>(
        &self,
        options: PeerOptions<'_>,
        script: PeerScript,
        found: &mut Findings<BenchRecord<W, T, P>>,
        keep: Keep<'_, BenchRecord<W, T, P>>,
    ) -> Result<Option<Peer>> {
        match Peer::start::<PeerAbout>(options.python, script, self.device) {
            Ok((mut peer, mut about)) => {
                about.peaks = Some(peer.peaks());
                found.peer = Some(about);
                Ok(Some(peer))
            }
            Err(error) => {
                tracing::warn!("{error}");
                for record in &mut found.records {
                    record.peer = Some(Measured::Failed(error.to_string()));
                }
                keep(found)?;
                Ok(None)
            }
        }
    }
}

/// Turns a result into a record's outcome. Failures are also reported at once.
fn measured<T>(outcome: Result<T>, name: &str, pass: &str) -> Measured<T> {
    match outcome {
        Ok(value) => Measured::Timed(value),
        Err(error) => {
            tracing::warn!("{name} {pass}: {error}");
            Measured::Failed(error.to_string())
        }
    }
}

fn summary(seconds: &[f64]) -> Result<Summary> {
    Summary::of(seconds).ok_or_else(|| Error::Device("no time was measured".into()))
}

/// A peer's answers on a network, summed up.
pub(super) fn network_peer(batch: usize, answers: &[NetworkAnswer]) -> NetworkPeer {
    let rate = median(answers.iter().map(|a| a.images_per_s));
    NetworkPeer {
        peer_images_per_s: rate,
        peer_memory_bytes: median(answers.iter().filter_map(|a| a.memory_bytes)),
        peer_time_us: rate.map(|rate| batch as f64 / rate * 1e6),
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    Summary::of(&values.collect::<Vec<f64>>()).map(|summary| summary.median)
}

/// Own samples in seconds and a peer's answers, or their errors.
pub(super) struct Turns<A> {
    own: Vec<Result<Vec<f64>>>,
    answers: Vec<Result<Answer<A>>>,
}

impl<A> Turns<A> {
    pub(super) fn take(mut own: impl FnMut() -> Result<Vec<f64>>, mut peer: impl FnMut() -> Result<Answer<A>>) -> Self {
        let (own, answers) = (0..TURNS).map(|_| (own(), peer())).unzip();
        Self { own, answers }
    }

    /// The times for a record; `peer` sums up the answers there are.
    pub(super) fn timing<P>(self, peer: impl FnOnce(&[A]) -> P) -> PeerTiming<P> {
        let seconds = self.own.iter().flatten().flatten().copied();
        let turn_time_us = median(seconds).map(|s| s * 1e6);
        let (mut values, mut note, mut error) = (Vec::new(), None, None);
        for answer in self.answers {
            match answer {
                Ok(answer) => {
                    values.push(answer.values);
                    note = note.or(answer.note);
                }
                Err(problem) => error = error.or(Some(problem)),
            }
        }
        let error = error.or(self.own.into_iter().find_map(Result::err)).map(|error| error.to_string());
        PeerTiming { turn_time_us, peer: peer(&values), note, error }
    }
}

/// Index and sets of operands of the layers that take most of the networks' time, at most so many, the slowest first.
fn slowest_layers(records: &[LayerRecord], most: usize) -> Vec<(usize, usize)> {
    let total = |record: &LayerRecord, own: &LayerTiming| {
        own.timing.time_us * record.work.count.values().map(|&count| count as f64).sum::<f64>()
    };
    let timed = |(index, record): (usize, &LayerRecord)| {
        let own = record.timing()?;
        Some(((index, own.operand_sets), total(record, own)))
    };
    let mut timed: Vec<_> = records.iter().enumerate().filter_map(timed).collect();
    timed.sort_by(|a, b| b.1.total_cmp(&a.1));
    timed.into_iter().take(most).map(|(layer, _)| layer).collect()
}

/// Fails where nothing could be timed.
fn require_any<W, T, P>(records: &[BenchRecord<W, T, P>]) -> Result<()> {
    match records.iter().map(|record| record.own.error()).collect::<Option<Vec<_>>>().as_deref() {
        Some([first, ..]) => {
            Err(Error::Device(format!("nothing could be timed: {}", first.trim_start_matches("device: "))))
        }
        _ => Ok(()),
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
