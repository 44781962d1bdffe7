//! Importances of segments, as the two-stage dynamic programme (Kim et al., ICML 2023) and LayerMerge (Kim et al., ICML 2024)
//! measure them: a copy of the network in which one segment is one convolution is trained for a few steps, and its accuracy on a
//! held-out part of the training set, less that of the network as it is, is the segment's importance in percentage points
//! (`docs/methods.md` 2.6).

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Done, Judge, check_active_blocks};
use crate::graph::{ExtendedSegment, Graph, Interval, MergeKey, Positions};
use crate::measure::LatencyTable;
use crate::model::{Model, Weights};
use crate::shrink::importance::{Importance, ImportanceRow};
use crate::shrink::layers::{LayerChoice, norms};
use crate::shrink::select::{Solution, check_reachable, kept_convs, layer_merge_among, two_stage_dp};
use crate::shrink::selection::Selection;
use crate::shrink::surgery::{Linearise, check_linearise, linearise};
use crate::train::TrainConfig;
use crate::{Error, Result};

/// A method that selects single layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerMethod {
    /// The two-stage dynamic programme.
    TwoStageDp,
    /// LayerMerge.
    LayerMerge,
}

impl LayerMethod {
    /// Refuses a network of which no layers can be selected, before anything is trained.
    ///
    /// # Errors
    /// One whose blocks have lost activations, or without blocks.
    pub fn check_network(self, graph: &Graph) -> Result<()> {
        check_active_blocks(graph)?;
        graph.positions().map(drop)
    }
}

/// How importances of segments decide.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SegmentConfig {
    /// α of [`two_stage_dp`]: so many times the mean importance of single convolutions is taken from all.
    pub alpha: f64,
}

impl Default for SegmentConfig {
    fn default() -> Self {
        Self { alpha: 1.6 }
    }
}

impl SegmentConfig {
    /// Refuses values out of range.
    ///
    /// # Errors
    /// Names the key and its range.
    pub fn check(&self) -> Result<()> {
        if self.alpha.is_finite() && self.alpha >= 0.0 {
            return Ok(());
        }
        Err(Error::Config(format!("search.segments.alpha = {}; give a number from 0 on", self.alpha)))
    }
}

/// The network of one importance: one segment, with some of its convolutions pruned, and all else as it was.
#[derive(Debug, Clone, PartialEq)]
pub struct SegmentTrial {
    /// The segment and the activations at its ends.
    pub segment: ExtendedSegment,
    /// What it becomes, for LayerMerge.
    pub key: Option<MergeKey>,
    /// The selection that makes it.
    pub selection: Selection,
}

/// Layers of a network that a method selects among.
#[derive(Debug)]
pub struct LayerSearch<'a> {
    method: LayerMethod,
    model: &'a Model,
    positions: Positions,
    norms: Vec<f64>,
    trials: Vec<SegmentTrial>,
    surgery: &'a Linearise,
}

impl<'a> LayerSearch<'a> {
    /// Finds the segments that are exactly one convolution with the padding of `surgery`. Those of several convolutions with
    /// a block that is not a candidate are left out.
    ///
    /// # Errors
    /// A network whose blocks have lost activations, or without blocks.
    pub fn new(method: LayerMethod, model: &'a Model, candidates: &[bool], surgery: &'a Linearise) -> Result<Self> {
        method.check_network(&model.graph)?;
        let positions = model.graph.positions()?;
        let norms = norms(model, &positions);
        let mut search = Self { method, model, positions, norms, trials: Vec::new(), surgery };
        let stays = |at: Interval| {
            let blocks = search.positions.convs_in(at).iter().map(|conv| conv.block);
            at.len() > 1 && blocks.into_iter().any(|block| candidates.get(block.index()) == Some(&false))
        };
        for (segment, key) in search.wanted() {
            if stays(segment.at) {
                continue;
            }
            let selection = search.alone(segment, key)?;
            if check_linearise(&model.graph, &selection, surgery).is_ok() {
                search.trials.push(SegmentTrial { segment, key, selection });
            }
        }
        Ok(search)
    }

    /// The network's positions.
    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// What is measured, in the order of the method's tables.
    pub fn trials(&self) -> &[SegmentTrial] {
        &self.trials
    }

    /// All segments that the method asks the importance of.
    fn wanted(&self) -> Vec<(ExtendedSegment, Option<MergeKey>)> {
        match self.method {
            LayerMethod::TwoStageDp => {
                self.positions.extended_segments().into_iter().map(|segment| (segment, None)).collect()
            }
            LayerMethod::LayerMerge => {
                let of = |(at, key)| (ExtendedSegment { at, act_st: true, act_end: true }, Some(key));
                self.positions.candidates().map(of).collect()
            }
        }
    }

    /// The selection of a segment alone. LayerMerge has an activation behind it if there was one, or if it has several
    /// convolutions.
    fn alone(&self, segment: ExtendedSegment, key: Option<MergeKey>) -> Result<Selection> {
        let ExtendedSegment { at, act_st, act_end } = segment;
        let positions = &self.positions;
        let is_outside = |position: &usize| !at.holds_inside(*position);
        let mut activations: Vec<usize> = positions.activations().into_iter().filter(is_outside).collect();
        let mut pruned = Vec::new();
        let mut ends = vec![(at.st, act_st && key.is_none()), (at.end, act_end && (key.is_none() || at.len() > 1))];
        ends.retain(|&(position, activated)| position > 0 && activated);
        activations.extend(ends.into_iter().map(|(position, _)| position));
        if let Some(key) = key {
            let kept = kept_convs(positions, at, key, Some(&self.norms)).unwrap_or_default();
            pruned.extend((at.st + 1..=at.end).filter(|position| !kept.contains(position)));
        }
        let boundaries: Vec<usize> = (0..=positions.depth()).filter(is_outside).collect();
        let choice = LayerChoice { activations: &activations, boundaries: &boundaries, pruned: &pruned };
        choice.selection(&self.model.graph, positions)
    }

    /// Measures the importances that `known` lacks, which gets each as soon as it is there; `keep` may write it to a file. A
    /// single convolution is drawn afresh by `seed`, its batch-norm with it, as the authors do: else it would cost nothing.
    ///
    /// # Errors
    /// Images that do not fit the network, a failing device, [`Error::Interrupted`], or of `keep`.
    pub fn measure(
        &self,
        (judge, train, seed): (&Judge<'_>, &TrainConfig, u64),
        known: &mut Vec<ImportanceRow>,
        done: Done<'_>,
        keep: &mut dyn FnMut(&[ImportanceRow]) -> Result<()>,
    ) -> Result<()> {
        let is_known =
            |trial: &&SegmentTrial| known.iter().any(|row| (row.segment, row.key) == (trial.segment, trial.key));
        let missing: Vec<&SegmentTrial> = self.trials.iter().filter(|trial| !is_known(trial)).collect();
        let total = self.trials.len() + 1;
        done(total - missing.len() - 1, total);
        if missing.is_empty() {
            return Ok(());
        }
        let whole = judge.evaluate(self.model)?.top1;
        let fresh = Model::initialise(self.model.graph.clone(), seed)?.weights;
        for (index, trial) in missing.iter().enumerate() {
            done(total - missing.len() + index, total);
            let mut model = linearise(self.model, &trial.selection, self.surgery)?;
            if trial.segment.at.len() == 1 {
                self.redraw(trial.segment.at, &fresh, &mut model);
            }
            let importance = judge.evaluate(&judge.trained(&model, train)?)?.top1 - whole;
            known.push(ImportanceRow { segment: trial.segment, key: trial.key, importance, line: 0 });
            keep(known)?;
        }
        done(total, total);
        Ok(())
    }

    /// Gives the convolutions of a segment and their batch-norms fresh weights.
    fn redraw(&self, at: Interval, fresh: &Weights, model: &mut Model) {
        let graph: &Graph = &self.model.graph;
        for conv in self.positions.convs_in(at) {
            let own = &graph.nodes[conv.node].name;
            let norm = graph.nodes.iter().filter(|node| node.inputs == [conv.node]).map(|node| &node.name);
            for name in std::iter::once(own).chain(norm) {
                let prefix = format!("{name}.");
                let of_node = fresh.iter().filter(|(param, _)| param.starts_with(&prefix));
                for (param, tensor) in of_node.map(|(param, tensor)| (param.clone(), tensor.clone())) {
                    if let Some(known) = model.weights.get_mut(&param) {
                        known.data = tensor.data;
                    }
                }
            }
        }
    }

    /// The importances as a table; `path` is what messages name.
    ///
    /// # Errors
    /// As [`Importance::new`].
    pub fn importance(&self, path: &Path, rows: &[ImportanceRow]) -> Result<Importance> {
        Importance::new(path, rows.to_vec())
    }

    /// The times of what can be selected, of a table of the network.
    ///
    /// # Errors
    /// A table of another network, or without the columns that the method needs, or with others.
    pub fn times(&self, table: &LatencyTable) -> Result<LatencyTable> {
        table.check_columns(self.method == LayerMethod::LayerMerge, false)?;
        table.check(&self.positions)?;
        let is_measured =
            |at: Interval, key| self.trials.iter().any(|trial| (trial.segment.at, trial.key) == (at, key));
        table.filtered(|row| is_measured(row.at, row.key))
    }

    /// Refuses a budget that cannot be kept, before anything is measured.
    ///
    /// # Errors
    /// Names the least that is possible.
    pub fn check_budget(&self, times: &LatencyTable, budget_ms: f64) -> Result<()> {
        check_reachable(times, budget_ms)
    }

    /// What the method selects within a budget; `times` are those of [`times`](Self::times).
    ///
    /// # Errors
    /// A budget that cannot be kept.
    pub fn within(
        &self,
        times: &LatencyTable,
        importance: &Importance,
        config: &SegmentConfig,
        budget_ms: f64,
    ) -> Result<Solution> {
        match self.method {
            LayerMethod::TwoStageDp => two_stage_dp(times, importance, config.alpha, budget_ms),
            LayerMethod::LayerMerge => {
                layer_merge_among(&self.positions, times, importance, Some(&self.norms), budget_ms)
            }
        }
    }

    /// A solution as a selection, checked to be exact, with its share of the time of all convolutions one by one.
    ///
    /// # Errors
    /// One that cannot be merged.
    pub fn selection(&self, solution: &Solution, times: &LatencyTable) -> Result<Selection> {
        let Solution { activations, boundaries, pruned, time_ms, .. } = solution;
        let pruned = pruned.as_deref().unwrap_or_default();
        let graph = &self.model.graph;
        let selection = LayerChoice { activations, boundaries, pruned }.selection(graph, &self.positions)?;
        check_linearise(graph, &selection, self.surgery)?;
        let latency_share = Some(time_ms / times.original_ms().max(f64::MIN_POSITIVE));
        Ok(Selection { latency_share, ..selection })
    }
}
