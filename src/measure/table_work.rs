//! What the rows of a latency table are the time of: the steps that inference runs where a segment is one convolution
//! (`docs/methods.md` 2.4).

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use super::latency_table::{LatencyRow, LatencyTable};
use super::roofline::{KernelCost, Roofline};
use crate::Result;
use crate::device::Backend;
use crate::engine::{Fusion, Pass, Plan, PlannedStep, Sequence, Target};
use crate::graph::{
    Activation, Bias, BlockId, Conv, Graph, Interval, MergeKey, Node, NodeId, Op, Positions, Span, read_padding,
};
use crate::ops::step::Values;
use crate::shape::{Padding, Shape};

/// Which rows a table has, and how segments are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableOptions {
    /// A row for each kernel that pruning leaves of a segment, as LayerMerge needs them, in the place of one a segment.
    pub keys: bool,
    /// Merged convolutions whose border needs one have a bias map.
    pub bias_maps: bool,
}

/// A step that is timed once, for all rows whose networks run it.
#[derive(Debug, Clone)]
pub struct Piece {
    /// The first node that it stands for.
    pub name: String,
    /// The step.
    pub steps: Sequence,
    /// What it has in common with all steps of the same time: words, the convolution, sizes of what it reads and writes.
    work: String,
}

/// A row of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowWork {
    /// The segment; (0, 0] and (N, N] are what always runs before the first convolution of the blocks and behind it.
    pub at: Interval,
    /// What it becomes, in a table with keys.
    pub key: Option<MergeKey>,
    /// Indices of the pieces whose times it is the sum of, one behind the other.
    pub pieces: Vec<usize>,
}

/// A step of the network as it is that stands for several convolutions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedWork {
    /// The convolutions.
    pub at: Interval,
    /// Index of the piece.
    pub piece: usize,
}

/// A latency table before it is measured.
///
/// A row holds whatever runs in its segment's place: the convolution with what is fused behind it, the sum of a residual
/// that began before the segment and ends with it, and a projection of such a residual. A single convolution is as in
/// the network; several are one convolution with an activation behind it. What no selection changes, stem, head and
/// pools, is in (0, 0] and (N, N].
#[derive(Debug, Clone)]
pub struct TableWork {
    /// The network's positions.
    pub positions: Positions,
    /// The rows, by segment and key.
    pub rows: Vec<RowWork>,
    /// The distinct pieces.
    pub pieces: Vec<Piece>,
    /// Where the network as it is runs several convolutions as one step: an inverted residual. It takes less than
    /// the rows of its convolutions add up to, and what is measured is divided among them.
    pub shared: Vec<SharedWork>,
}

impl TableWork {
    /// The rows of a network and their steps.
    ///
    /// # Errors
    /// A network without blocks, or a malformed graph.
    pub fn new(graph: &Graph, options: TableOptions, backend: Backend) -> Result<Self> {
        let folded = graph.without_batch_norm()?.0;
        let network = Network { positions: folded.positions()?, shapes: folded.shapes()?, graph: folded, backend };
        let positions = network.positions.clone();
        let mut work = Self { positions, rows: Vec::new(), pieces: Vec::new(), shared: Vec::new() };
        work.as_it_is(&network, options)?;
        work.as_it_runs(&network)?;
        let mut merged: BTreeSet<Interval> = work.positions.segments().collect();
        if !options.keys {
            // Blocks that go on behind their stride are no segments of published tables, but can be freed.
            merged.extend(work.positions.blocks().iter().map(|block| block.at));
        }
        merged.retain(|at| at.len() > 1 && work.positions.segment(*at).is_some());
        for at in merged {
            let spans = match options.keys {
                true => work.positions.merge_spans(at).into_iter().map(|(key, span)| (Some(key), span)).collect(),
                false => vec![(None, network.span(at)?)],
            };
            for (key, span) in spans {
                let steps = network.merged_steps(at, network.merged_conv(at, key, span, options))?;
                work.row(at, key, steps);
            }
        }
        work.rows.sort_by_key(|row| (row.at, row.key));
        Ok(work)
    }

    /// The rows of the network as it is alone: those of single convolutions and of what always runs.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn unmerged(graph: &Graph, backend: Backend) -> Result<Self> {
        let folded = graph.without_batch_norm()?.0;
        let network = Network { positions: folded.positions()?, shapes: folded.shapes()?, graph: folded, backend };
        let positions = network.positions.clone();
        let mut work = Self { positions, rows: Vec::new(), pieces: Vec::new(), shared: Vec::new() };
        work.as_it_is(&network, TableOptions { keys: false, bias_maps: false })?;
        Ok(work)
    }

    /// The rows of single convolutions and of what always runs: the network as it is.
    fn as_it_is(&mut self, network: &Network, options: TableOptions) -> Result<()> {
        let plan = Plan::new(&network.graph, &network.target())?;
        let values = Arc::new(plan.values);
        let depth = self.positions.depth();
        let mut rows: Vec<Vec<TimedStep>> = (0..depth + 2).map(|_| Vec::new()).collect();
        let mut position = 0;
        for step in plan.steps {
            let own = network.positions.convs().iter().position(|conv| step.nodes.contains(&conv.node));
            position = own.map_or(position, |index| index + 1);
            let block = network.graph.block_of(step.nodes[0]);
            let row = match (own, block) {
                (Some(index), _) => index + 1,
                // A projection runs while its block is more than one convolution, and so with the block's last one.
                (None, Some(block)) => network.end_of(block),
                (None, None) if position == 0 => 0,
                (None, None) => depth + 1,
            };
            rows[row].push(TimedStep::new(&network.graph, step, &values));
        }
        for (row, steps) in rows.into_iter().enumerate() {
            let at = Interval { st: row.saturating_sub(1), end: row.min(depth) };
            let key = network
                .positions
                .convs_in(at)
                .first()
                .map(|conv| MergeKey { kernel: conv.kernel(), depthwise: conv.is_depthwise() });
            self.row(at, key.filter(|_| options.keys), steps);
        }
        Ok(())
    }

    /// The steps that stand for several convolutions.
    fn as_it_runs(&mut self, network: &Network) -> Result<()> {
        let plan = Plan::new(&network.graph, &Target::inference(network.backend))?;
        let values = Arc::new(plan.values);
        for step in plan.steps {
            let convs = network.positions.convs().iter().enumerate();
            let own: Vec<usize> =
                convs.filter(|(_, conv)| step.nodes.contains(&conv.node)).map(|(index, _)| index).collect();
            if let [first, .., last] = own[..] {
                let piece = self.piece(TimedStep::new(&network.graph, step, &values));
                self.shared.push(SharedWork { at: Interval { st: first, end: last + 1 }, piece });
            }
        }
        Ok(())
    }

    fn row(&mut self, at: Interval, key: Option<MergeKey>, steps: Vec<TimedStep>) {
        let pieces = steps.into_iter().map(|step| self.piece(step)).collect();
        self.rows.push(RowWork { at, key, pieces });
    }

    /// The index of a piece, which is known already or new.
    fn piece(&mut self, TimedStep(piece): TimedStep) -> usize {
        let known = self.pieces.iter().position(|known| known.work == piece.work);
        known.unwrap_or_else(|| {
            self.pieces.push(piece);
            self.pieces.len() - 1
        })
    }

    /// The table by a roofline, for a batch; no clock is read. `path` is what messages name.
    ///
    /// # Errors
    /// As [`LatencyTable::new`].
    pub fn priced(&self, path: &Path, batch: usize, roofline: &Roofline) -> Result<LatencyTable> {
        let cost = |piece: &Piece| {
            let cost = piece.steps.cost()?;
            Some(KernelCost::new(piece.name.clone(), String::new(), Pass::Forward, Vec::new(), None, cost))
        };
        let seconds = |piece: &Piece| cost(piece).map_or(0.0, |cost| roofline.time(&cost, batch));
        let times: Vec<f64> = self.pieces.iter().map(seconds).collect();
        let row = |row: &RowWork| {
            let time_ms = row.pieces.iter().map(|&piece| 1e3 * times[piece]).sum();
            LatencyRow { key: row.key, ..LatencyRow::new(row.at, time_ms) }
        };
        LatencyTable::new(path, self.rows.iter().map(row).collect())
    }

    /// The rows that add up to the network as it is.
    pub fn original(&self) -> impl Iterator<Item = &RowWork> {
        self.rows.iter().filter(|row| row.at.len() < 2)
    }
}

/// A step of a plan, ready to be timed.
struct TimedStep(Piece);

impl TimedStep {
    fn new(graph: &Graph, planned: PlannedStep, values: &Arc<Values>) -> Self {
        let sizes: Vec<_> = planned.uses.all().map(|id| (values.get(id).extent, values.get(id).store)).collect();
        let work = format!("{} {:?} {sizes:?}", planned.step.describe(), planned.step.convolution());
        let steps = Sequence { values: values.clone(), steps: Arc::new(vec![planned.step]) };
        Self(Piece { name: graph.nodes[planned.nodes[0]].name.clone(), steps, work })
    }
}

/// The network of a table, its batch-norms folded.
struct Network {
    graph: Graph,
    positions: Positions,
    shapes: Vec<Shape>,
    backend: Backend,
}

impl Network {
    /// One step a convolution, so that each has its row.
    fn target(&self) -> Target {
        Target { fusion: Fusion::Epilogue, ..Target::inference(self.backend) }
    }

    /// The position at which a block ends.
    fn end_of(&self, block: BlockId) -> usize {
        let found = self.positions.blocks().iter().find(|known| known.block == block);
        found.map_or(self.positions.depth() + 1, |block| block.at.end)
    }

    fn span(&self, at: Interval) -> Result<Span> {
        self.graph.span(self.positions.segment(at).expect("a segment of these positions"))
    }

    /// The convolution that a segment becomes.
    fn merged_conv(&self, at: Interval, key: Option<MergeKey>, span: Span, options: TableOptions) -> Conv {
        let segment = self.positions.segment(at).expect("a segment of these positions");
        let (input, output) = (self.shapes[segment.input], self.shapes[segment.output()]);
        let convs = self.positions.convs_in(at);
        let depthwise = key.map_or_else(|| convs.iter().all(|conv| conv.is_depthwise()), |key| key.depthwise);
        let groups = if depthwise && input.c == output.c { input.c } else { 1 };
        let has_map = options.bias_maps && self.needs_map(at);
        let bias = if has_map { Bias::Map } else { Bias::Channel };
        Conv { c_in: input.c, c_out: output.c, window: span.window(input, output), groups, bias }
    }

    /// Whether a bias map makes the border of a merged segment exact: a convolution behind the first pads what has a bias,
    /// and only what spans one pixel. A segment that pads more than that has its padding moved to the front, and then
    /// needs none.
    fn needs_map(&self, at: Interval) -> bool {
        let (mut span, mut biased, mut needs) = (Span::IDENTITY, false, false);
        for (index, conv) in self.positions.convs_in(at).iter().enumerate() {
            let input = self.graph.nodes[conv.node].inputs[0];
            let padding = read_padding(conv.conv.window, self.shapes[input], self.shapes[conv.node]);
            let is_padded = padding != Padding::ZERO;
            if is_padded && index > 0 && span.kernel != [1, 1] {
                return false;
            }
            needs |= is_padded && biased;
            biased |= conv.conv.bias != Bias::None;
            span = span.then(conv.conv.window);
        }
        needs
    }

    /// What runs in the place of a segment that is one convolution, the activation behind it included.
    fn merged_steps(&self, at: Interval, conv: Conv) -> Result<Vec<TimedStep>> {
        let segment = self.positions.segment(at).expect("a segment of these positions");
        let users = self.graph.users();
        let mut last = segment.output();
        while let [user] = users[last][..]
            && matches!(self.graph.nodes[user].op, Op::Add | Op::BatchNorm(_))
        {
            last = user;
        }
        let is_activated = self.positions.convs()[at.end - 1].has_activation();
        let (mut merged, mut activation) = (NodeId::INPUT, None);
        let (graph, map) = self.graph.rewrite_with_map(|id, node, out| {
            let mut value = match segment.nodes.contains(&id) {
                true if id == segment.output() => {
                    let inputs = vec![out.value(segment.input)];
                    merged = out.push(Node { name: node.name.clone(), inputs, op: Op::Conv(conv) });
                    merged
                }
                // Nothing outside of the segment reads it, so it may stand for anything.
                true => out.value(segment.input),
                false => out.copy(node),
            };
            if id == last && !is_activated {
                let name = format!("{}.act", node.name);
                value = out.push(Node { name, inputs: vec![value], op: Op::Activation(Activation::RELU6) });
                activation = Some(value);
            }
            Ok(value)
        })?;
        let side = self.side_of(at, &graph, &map);
        let plan = Plan::new(&graph, &self.target())?;
        let values = Arc::new(plan.values);
        let is_of_row = |step: &PlannedStep| {
            let has = |node: NodeId| step.nodes.contains(&node);
            has(merged) || activation.is_some_and(has) || step.nodes.iter().any(|node| side.contains(node))
        };
        Ok(plan.steps.into_iter().filter(is_of_row).map(|step| TimedStep::new(&graph, step, &values)).collect())
    }

    /// The nodes of a projection that still runs beside a segment, in the network with the merged one: its block began
    /// before the segment and ends with it.
    fn side_of(&self, at: Interval, graph: &Graph, map: &[NodeId]) -> BTreeSet<NodeId> {
        let block = self.positions.blocks().iter().find(|block| block.at.end == at.end && block.at.st < at.st);
        let Some(block) = block else { return BTreeSet::new() };
        let segment = self.positions.segment(at).expect("a segment of these positions");
        let nodes = self.graph.blocks[block.block].nodes;
        let chain: BTreeSet<NodeId> = self.positions.convs().iter().map(|conv| conv.node).collect();
        let is_side = |id: &NodeId| {
            let is_conv = matches!(self.graph.nodes[*id].op, Op::Conv(_));
            is_conv && !chain.contains(id) && !segment.nodes.contains(id)
        };
        let side = nodes.iter().filter(is_side).map(|id| map[id]);
        side.filter(|id| matches!(graph.nodes[*id].op, Op::Conv(_))).collect()
    }
}
