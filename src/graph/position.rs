//! Positions: the convolutions on the way through a network's blocks, numbered, and the segments between them. This is
//! how latency and importance tables name segments, and what the dynamic programmes over them decide (`docs/methods.md`
//! 2.4).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::node::Graph;
use super::op::Op;
use super::segment::{Segment, Span};
use crate::index::{BlockId, NodeId};
use crate::ops::conv::{Conv, ConvFamily};
use crate::{Error, Result};

/// A segment by positions: the convolutions `st + 1` to `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Interval {
    /// The position whose value it reads; 0 is what the first block reads.
    pub st: usize,
    /// The position whose value it gives.
    pub end: usize,
}

impl Interval {
    /// How many convolutions lie in it.
    pub fn len(&self) -> usize {
        self.end.saturating_sub(self.st)
    }

    /// Whether no convolution lies in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a position lies between the ends.
    pub fn holds_inside(&self, position: usize) -> bool {
        self.st < position && position < self.end
    }
}

impl From<(usize, usize)> for Interval {
    fn from((st, end): (usize, usize)) -> Self {
        Self { st, end }
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({},{}]", self.st, self.end)
    }
}

/// A convolution on the way through the blocks, at its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainConv {
    /// Its node.
    pub node: NodeId,
    /// The block that holds it.
    pub block: BlockId,
    /// What it computes.
    pub conv: Conv,
    /// The value at its position: behind the batch-norm and the sums that alone read it.
    pub value: NodeId,
    /// The activation that alone reads that value; a linear bottleneck has none.
    pub activation: Option<NodeId>,
}

impl ChainConv {
    /// Whether there is an activation at its position.
    pub fn has_activation(&self) -> bool {
        self.activation.is_some()
    }

    /// Side of its kernel, the longer one.
    pub fn kernel(&self) -> usize {
        self.conv.window.k_h.max(self.conv.window.k_w)
    }

    /// Whether it moves by more than a pixel.
    pub fn is_strided(&self) -> bool {
        self.conv.window.stride_h.max(self.conv.window.stride_w) > 1
    }

    /// Whether the identity can take its place: as many channels come out as go in, and no pixel is lost.
    pub fn is_reducible(&self) -> bool {
        self.conv.c_in == self.conv.c_out && !self.is_strided()
    }

    /// Whether each channel has a filter of its own.
    pub fn is_depthwise(&self) -> bool {
        self.conv.family() == ConvFamily::Depthwise
    }
}

/// What a segment becomes when some of its convolutions are pruned and the rest merged (LayerMerge, Kim et al. 2024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MergeKey {
    /// Side of the merged kernel, 1 + Σ (k − 1) over the convolutions that stay.
    pub kernel: usize,
    /// Whether only depthwise convolutions stay.
    pub depthwise: bool,
}

impl fmt::Display for MergeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel {}, depthwise {}", self.kernel, u8::from(self.depthwise))
    }
}

/// A segment with what stands at its ends while its importance is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExtendedSegment {
    /// The segment.
    pub at: Interval,
    /// Whether an activation stands at `at.st`.
    pub act_st: bool,
    /// Whether an activation stands at `at.end`.
    pub act_end: bool,
}

impl fmt::Display for ExtendedSegment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with act_st {}, act_end {}", self.at, u8::from(self.act_st), u8::from(self.act_end))
    }
}

/// A block by positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockInterval {
    /// The block.
    pub block: BlockId,
    /// Its convolutions.
    pub at: Interval,
    /// Whether its input is added to its output as it is. A projection is no such skip.
    pub has_residual: bool,
}

/// The positions of a network: convolution i of [`convs`](Self::convs), counted from 1, lies between positions i − 1
/// and i. Stem, head and the convolutions of projections have none.
///
/// # Examples
/// The 50 convolutions in the 17 blocks of a MobileNetV2, and the segments that the published tables list.
/// ```
/// use depthshrinker::graph::Interval;
/// use depthshrinker::networks::{NetworkOptions, build};
/// use depthshrinker::shape::Shape;
///
/// let graph = build("mobilenetv2-1.0", &NetworkOptions::new(Shape::new(224, 224, 3), 1000))?;
/// let positions = graph.positions()?;
/// assert_eq!((positions.depth(), positions.segments().count()), (50, 171));
/// // The first two blocks are one segment; nothing goes on behind the stride that ends there.
/// assert!(positions.segments().any(|at| at == Interval { st: 0, end: 5 }));
/// assert!(positions.segments().all(|at| !at.holds_inside(5)));
/// # Ok::<(), depthshrinker::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Positions {
    network: String,
    convs: Vec<ChainConv>,
    blocks: Vec<BlockInterval>,
    breaks: BTreeSet<usize>,
    segments: BTreeMap<Interval, Segment>,
    /// Those whose one convolution would be too large to be built.
    oversized: BTreeSet<Interval>,
}

impl Graph {
    /// Numbers the convolutions of the blocks.
    ///
    /// # Errors
    /// A network without blocks, or as [`Graph::shapes`].
    pub fn positions(&self) -> Result<Positions> {
        let shapes = self.shapes()?;
        let (mut convs, mut blocks) = (Vec::new(), Vec::new());
        let users = self.users();
        for (block, segment) in BlockId::enumerate(&self.blocks).filter_map(|(id, b)| Some((id, b.segment()?))) {
            let st = convs.len();
            for node in self.main_chain(&segment) {
                if let Op::Conv(conv) = self.nodes[node].op {
                    let (value, activation) = self.value_behind(node, &users);
                    convs.push(ChainConv { node, block, conv, value, activation });
                }
            }
            let adds_input = |id: NodeId| {
                let node = &self.nodes[id];
                matches!(node.op, Op::Add) && node.inputs.contains(&segment.input)
            };
            let has_residual = segment.nodes.iter().any(adds_input);
            blocks.push(BlockInterval { block, at: Interval { st, end: convs.len() }, has_residual });
        }
        if convs.is_empty() {
            return Err(Error::Graph(format!("{} has no convolutions in blocks, so it has no segments", self.name)));
        }
        let breaks = breaks(&convs);
        let segments = self.segments_by_position(&convs);
        let is_oversized = |(at, segment): &(&Interval, &Segment)| {
            let (c_in, c_out) = (shapes[segment.input].c, shapes[segment.output()].c);
            let is_depthwise = convs[at.st..at.end].iter().all(ChainConv::is_depthwise);
            let channels = if is_depthwise { c_out } else { c_in.saturating_mul(c_out) };
            !self.span(segment).is_ok_and(|span| span.is_sane(channels))
        };
        let oversized = segments.iter().filter(is_oversized).map(|(at, _)| *at).collect();
        Ok(Positions { network: self.name.clone(), convs, blocks, breaks, segments, oversized })
    }

    /// The value of a convolution behind batch-norms and sums, and the activation that reads it.
    fn value_behind(&self, conv: NodeId, users: &[Vec<NodeId>]) -> (NodeId, Option<NodeId>) {
        let mut value = conv;
        while let [user] = users[value][..] {
            match self.nodes[user].op {
                Op::Activation(_) => return (value, Some(user)),
                Op::BatchNorm(_) | Op::Add | Op::Pad(_) => value = user,
                _ => break,
            }
        }
        (value, None)
    }

    /// The segments of [`Graph::segments`] that hold convolutions of the chain and no others but those of projections.
    /// Two that hold the same ones differ by a projection; the one with it stands.
    fn segments_by_position(&self, convs: &[ChainConv]) -> BTreeMap<Interval, Segment> {
        let mut found: BTreeMap<Interval, Segment> = BTreeMap::new();
        for segment in self.segments() {
            let st = convs.partition_point(|c| c.node < segment.nodes.start);
            let end = convs.partition_point(|c| c.node < segment.nodes.end);
            let is_outside = |id: NodeId| matches!(self.nodes[id].op, Op::Conv(_)) && self.block_of(id).is_none();
            if st == end || segment.nodes.iter().any(is_outside) {
                continue;
            }
            let longest = found.entry(Interval { st, end }).or_insert_with(|| segment.clone());
            if segment.nodes.len() > longest.nodes.len() {
                *longest = segment;
            }
        }
        found
    }
}

/// Behind a strided convolution a segment goes on through the 1×1 convolutions of the same block, and ends there: so
/// the merged kernel is 1 + Σ (k − 1).
fn breaks(convs: &[ChainConv]) -> BTreeSet<usize> {
    let strided = convs.iter().enumerate().filter(|(_, c)| c.is_strided());
    let end = |(i, strided): (usize, &ChainConv)| {
        let goes_on = |c: &&ChainConv| c.block == strided.block && c.kernel() == 1 && !c.is_strided();
        i + 1 + convs[i + 1..].iter().take_while(goes_on).count()
    };
    strided.map(end).collect()
}

impl Positions {
    /// The network's name.
    pub fn network(&self) -> &str {
        &self.network
    }

    /// The last position, N: the number of convolutions.
    pub fn depth(&self) -> usize {
        self.convs.len()
    }

    /// The convolutions in order; the one at position i is entry i − 1.
    pub fn convs(&self) -> &[ChainConv] {
        &self.convs
    }

    /// The convolutions of a segment.
    pub fn convs_in(&self, at: Interval) -> &[ChainConv] {
        &self.convs[at.st..at.end]
    }

    /// The blocks in order; one that a merge emptied is left out.
    pub fn blocks(&self) -> &[BlockInterval] {
        &self.blocks
    }

    /// The segments that tables list, by `st` and then by `end`: those that would be one convolution, each without a
    /// position inside at which a strided block ends, and none of which the convolution would be too large to be built
    /// (2²⁶ weights).
    pub fn segments(&self) -> impl Iterator<Item = Interval> {
        let goes_on = |at: &Interval| self.breaks.iter().any(|&at_break| at.holds_inside(at_break));
        self.segments.keys().copied().filter(move |at| !self.oversized.contains(at) && !goes_on(at))
    }

    /// The nodes of a segment, also of one that goes on behind a strided block or is too large; `None` where these positions
    /// bound none.
    pub fn segment(&self, at: Interval) -> Option<&Segment> {
        self.segments.get(&at)
    }

    /// The positions behind which there is an activation, from 1 on.
    pub fn activations(&self) -> Vec<usize> {
        (1..=self.depth()).filter(|&position| self.convs[position - 1].has_activation()).collect()
    }

    /// Whether an activation may be present or absent at a position while the importance of a segment that ends there
    /// is measured: at linear bottlenecks, the ends of blocks that have none of their own.
    pub fn may_vary(&self, position: usize) -> bool {
        position > 0
            && !self.convs[position - 1].has_activation()
            && self.blocks.iter().any(|block| block.at.end == position)
    }

    /// The extended segments of which a two-stage dynamic programme needs the importance (algorithm 3 of Kim et al.
    /// 2023, appendix B): where a segment begins at a linear bottleneck, that end varies, else where it ends at one;
    /// one that begins at position 0 has both activations. In the order of [`segments`](Self::segments), the activation
    /// present first.
    pub fn extended_segments(&self) -> Vec<ExtendedSegment> {
        self.extended(|at| match at.st {
            0 => (false, false),
            st if self.may_vary(st) => (true, false),
            _ => (false, self.may_vary(at.end)),
        })
    }

    /// As [`extended_segments`](Self::extended_segments), both ends varied independently.
    pub fn all_extended_segments(&self) -> Vec<ExtendedSegment> {
        self.extended(|at| (self.may_vary(at.st), self.may_vary(at.end)))
    }

    fn extended(&self, varies: impl Fn(Interval) -> (bool, bool)) -> Vec<ExtendedSegment> {
        let present = |varies: bool| if varies { &[true, false][..] } else { &[true][..] };
        let mut extended = Vec::new();
        for at in self.segments() {
            let (st, end) = varies(at);
            for &act_st in present(st) {
                extended.extend(present(end).iter().map(|&act_end| ExtendedSegment { at, act_st, act_end }));
            }
        }
        extended
    }

    /// What a segment can become when any of its reducible convolutions are pruned, but not all its convolutions
    /// (LayerMerge), by kernel.
    pub fn merge_keys(&self, at: Interval) -> BTreeSet<MergeKey> {
        self.merge_spans(at).into_keys().collect()
    }

    /// As [`merge_keys`](Self::merge_keys), with the window of each: that of the first set of convolutions that gives
    /// the key, where several do.
    pub fn merge_spans(&self, at: Interval) -> BTreeMap<MergeKey, Span> {
        let mut keys: BTreeMap<Option<MergeKey>, Span> = BTreeMap::from([(None, Span::IDENTITY)]);
        for conv in self.convs_in(at) {
            let with = |(key, span): (&Option<MergeKey>, &Span)| {
                let before = key.unwrap_or(MergeKey { kernel: 1, depthwise: true });
                let key = MergeKey {
                    kernel: before.kernel + conv.kernel() - 1,
                    depthwise: before.depthwise && conv.is_depthwise(),
                };
                (Some(key), span.then(conv.conv.window))
            };
            let kept: BTreeMap<Option<MergeKey>, Span> = keys.iter().map(with).collect();
            let pruned = if conv.is_reducible() { keys } else { BTreeMap::new() };
            keys = kept.into_iter().chain(pruned).collect();
        }
        keys.into_iter().filter_map(|(key, span)| Some((key?, span))).collect()
    }

    /// What all segments can become: the candidates of LayerMerge's tables.
    pub fn candidates(&self) -> impl Iterator<Item = (Interval, MergeKey)> {
        self.segments().flat_map(|at| self.merge_keys(at).into_iter().map(move |key| (at, key)))
    }
}
