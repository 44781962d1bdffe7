//! The numbers of a finished run: sizes, accuracies, latencies measured in alternation, and how exact the merge was.

use std::collections::BTreeMap;
use std::time::Duration;

use super::run::Run;
use crate::Result;
use crate::graph::{ChannelGroups, Graph, NodeId};
use crate::measure::{Change, Machine, Roofline, block_latencies, compare, measure_peaks, utilization};
use crate::model::Model;
use crate::report::{
    BlockResult, DataResult, LatencyResult, MachineResult, MaskTrial, MergeResult, NetworkResult, NetworkStage,
    RunResult, SCHEMA, StageTime,
};
use crate::shrink::merge::MergeError;
use crate::shrink::{Mask, Matched};
use crate::train::Evaluation;

/// Shares of the measuring time: the networks in alternation, their blocks alone, the machine's peaks.
const NETWORKS_SHARE: f64 = 0.5;
const BLOCKS_SHARE: f64 = 0.3;
const PEAKS_SHARE: f64 = 0.2;

/// The networks of a run with their accuracies.
#[derive(Debug)]
pub(super) struct Networks<'a> {
    pub original: (&'a Model, Evaluation),
    pub unmerged: (&'a Model, Evaluation),
    pub merged: (&'a Model, Evaluation),
}

/// The remaining inputs of the result.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    pub mask: Mask,
    /// Names of the blocks of which only the shortcut is left.
    pub bypassed: Vec<String>,
    /// Per node of the original network, the node of the merged network with the same value.
    pub map: &'a [Option<NodeId>],
    /// Time of the merged network by the latency table, as a share of the original's.
    pub latency_share: Option<f64>,
    /// How near the budget is by the clock.
    pub matched: Option<Matched>,
    /// Number of merged segments.
    pub segments: usize,
    pub error: MergeError,
    pub learned: Vec<MaskTrial>,
    pub random: Vec<MaskTrial>,
    pub stages: Vec<StageTime>,
}

fn merge_result(segments: usize, error: MergeError) -> MergeResult {
    MergeResult { segments, max_abs_error: error.max_abs_error, max_rel_error: error.max_rel_error }
}

/// Measures the networks and collects the result.
///
/// # Errors
/// A failing device, a malformed graph, or [`Error::Interrupted`](crate::Error::Interrupted).
pub(super) fn summarise(run: &Run<'_>, networks: &Networks<'_>, facts: Facts<'_>) -> Result<RunResult> {
    let (config, machine) = (run.config, Machine::here());
    let budget = |share: f64| Duration::from_secs_f64(config.measure.seconds * share);
    let (original, unmerged, merged) = (networks.original.0, networks.unmerged.0, networks.merged.0);
    let stages = [
        (NetworkStage::Original, networks.original),
        (NetworkStage::Unmerged, networks.unmerged),
        (NetworkStage::Merged, networks.merged),
    ];
    let mut result = RunResult {
        schema: SCHEMA,
        device: run.device.name(),
        precision: run.device.precision().to_string(),
        seed: config.seed,
        network: Some(original.graph.name.clone()),
        machine: Some(MachineResult { cpu: machine.cpu, threads: machine.threads }),
        data: DataResult {
            name: run.data.train.name().to_owned(),
            train: run.data.train.len(),
            test: run.data.test.len(),
        },
        networks: stages
            .iter()
            .map(|(name, (model, evaluation))| sizes(*name, model, evaluation))
            .collect::<Result<_>>()?,
        ratio: None,
        // One entry per block, whatever else the mask frees.
        kept: facts.mask.bits()[..original.graph.blocks.len()].to_vec(),
        method: Some(config.method()),
        bypassed: facts.bypassed,
        channels: fewer_channels(&original.graph, &unmerged.graph)?,
        latency: Some(config.latency.describe(&run.device)),
        latency_share: facts.latency_share,
        matched: facts.matched,
        merge: Some(merge_result(facts.segments, facts.error)),
        blocks: Vec::new(),
        learned_masks: facts.learned,
        random_masks: facts.random,
        stages: facts.stages,
    };
    let batch = config.measure.batch;
    let names = stages.map(|(name, (model, _))| (name.to_string(), model));
    let named: Vec<(&str, &Model)> = names.iter().map(|(name, model)| (name.as_str(), *model)).collect();
    run.session.check_interrupt()?;
    let comparison = compare(&run.device, &named, batch, budget(NETWORKS_SHARE))?;
    result.set_latencies(&comparison);
    run.session.check_interrupt()?;
    let roofline = Roofline::measured(&measure_peaks(&run.device, budget(PEAKS_SHARE))?, run.device.precision());
    for (network, model) in result.networks.iter_mut().zip([original, unmerged, merged]) {
        network.utilization = utilization(&model.graph, batch, network.latency_ms.median * 1e-3, &roofline)?;
    }
    run.session.check_interrupt()?;
    let change = Change { before: original, after: merged, map: facts.map };
    let blocks = block_latencies(&run.device, change, batch, budget(BLOCKS_SHARE))?;
    let kept = |blocks: std::ops::Range<usize>| u8::from(facts.mask.kept()[blocks].iter().all(|kept| *kept));
    result.blocks = blocks
        .into_iter()
        .map(|b| BlockResult { name: b.name, kept: kept(b.blocks), before_us: b.before_us, after_us: b.after_us })
        .collect();
    Ok(result)
}

/// Channels that are left, and that there were, of the groups of which some are gone.
fn fewer_channels(original: &Graph, unmerged: &Graph) -> Result<BTreeMap<String, [usize; 2]>> {
    let (groups, shapes, map) = (ChannelGroups::new(original)?, unmerged.shapes()?, original.map_by_name(unmerged));
    let fewer = groups.groups().iter().filter_map(|group| {
        let left = map[group.values[0]].map(|node| shapes[node].c)?;
        (left < group.channels).then(|| (group.name.clone(), [left, group.channels]))
    });
    Ok(fewer.collect())
}

fn sizes(name: NetworkStage, model: &Model, evaluation: &Evaluation) -> Result<NetworkResult> {
    // Inference folds batch-norm; parameters are counted as the field does, with it.
    let cost = model.graph.cost()?;
    Ok(NetworkResult {
        name,
        top1: evaluation.top1,
        loss: Some(evaluation.loss),
        params: cost.params(),
        macs: cost.macs(),
        batch: 0,
        latency_ms: LatencyResult::default(),
        images_per_s: 0.0,
        utilization: Default::default(),
    })
}
