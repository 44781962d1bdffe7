//! Stage 3: every linear segment becomes one convolution, exactly (`docs/methods.md` 1.4).
//!
//! Each value of a segment is an affine map of its input. Its linear part is a [`Kernel`], its constant part a
//! [`Response`] to zeros; both are composed in f64 along the nodes and cast to f32 once at the end.

mod border;
mod chain;
mod compose;
mod fold;
mod product;
mod truth;
mod verify;

pub use border::Response;
pub use chain::{Chain, check};
pub use compose::{Kernel, Layer, Taps};
pub use fold::{Folded, fold};
pub use verify::{MergeError, SegmentError, Verifier, verify, verify_random};

use serde::{Deserialize, Serialize};

use crate::dtype::flush_subnormal;
use crate::graph::{Bias, BlockId, Graph, Node, NodeId, Op, Segment};
use crate::model::Model;
use crate::shrink::padding::PaddingMode;
use crate::shrink::selection::{Selection, linear_segments};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Numbers of all merged weights of a network together at most, 1 GiB in f32.
const MAX_WEIGHTS: usize = 1 << 28;
/// Numbers of all its bias maps together at most, 128 MiB in f32. Small weights can claim any image; MobileNetV2 has
/// 10 million at 1 024 pixels.
const MAX_MAPS: usize = 1 << 25;

/// How to merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeOptions {
    /// How borders are made exact. [`PaddingMode::Reorder`] accepts only segments whose padding is at the front
    /// already, so that a merged network never carries a bias map; [`PaddingMode::BorderBias`] accepts those too.
    pub padding: PaddingMode,
}

/// A merged network and where it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// The network, with one convolution in the place of each segment.
    pub model: Model,
    /// For every node of the unmerged network the node that computes the same value; `None` where a merged convolution
    /// leaves the value out.
    pub map: Vec<Option<NodeId>>,
    /// The segments in network order.
    pub segments: Vec<MergedSegment>,
}

impl Merged {
    /// A network of which nothing was merged.
    pub fn unchanged(model: Model) -> Self {
        let map = NodeId::all(model.graph.nodes.len()).map(Some).collect();
        Self { model, map, segments: Vec::new() }
    }

    /// For every node of `original`, from which surgery made the unmerged network, the node that stands for its value; for an
    /// activation that surgery removed, what stands for the value that it read.
    pub fn map_from(&self, original: &Graph, unmerged: &Graph) -> Vec<Option<NodeId>> {
        let mut map: Vec<Option<NodeId>> = Vec::with_capacity(original.nodes.len());
        for (node, id) in original.nodes.iter().zip(original.map_by_name(unmerged)) {
            map.push(match (id, node.op) {
                (Some(id), _) => self.map[id],
                (None, Op::Activation(_)) => map[node.inputs[0].index()],
                (None, _) => None,
            });
        }
        map
    }
}

/// What one segment became.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MergedSegment {
    /// The nodes of the unmerged network, a final activation that stays included.
    #[serde(skip)]
    pub segment: Segment,
    /// The value of the unmerged network that the merged convolution computes.
    #[serde(skip)]
    pub output: NodeId,
    /// The merged convolution in the merged network.
    #[serde(skip)]
    pub conv: NodeId,
    /// Indices of the blocks that it holds nodes of.
    pub blocks: Vec<BlockId>,
    /// Name of the block, or of the segment as [`Graph::segment_name`] gives it.
    pub name: String,
    /// Kernel height and width of the merged convolution.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride of the merged convolution.
    pub stride: [usize; 2],
    /// Multiply-accumulates per image before.
    pub macs_before: u64,
    /// Multiply-accumulates per image after.
    pub macs_after: u64,
    /// Trained parameters before.
    pub params_before: u64,
    /// Trained parameters after, a bias map counted in full.
    pub params_after: u64,
    /// Whether the bias differs at the border.
    pub bias_map: bool,
}

/// Merges what is linear: the segments of [`linear_segments`]. Without any the model comes back as it is.
///
/// # Examples
/// A block without its activations becomes one convolution, and the network computes the same.
/// ```
/// use depthshrinker::model::Model;
/// use depthshrinker::networks::{NetworkOptions, build};
/// use depthshrinker::shape::Shape;
/// use depthshrinker::shrink::Mask;
/// use depthshrinker::shrink::merge::{MergeOptions, merge, verify_random};
/// use depthshrinker::shrink::padding::PaddingMode;
/// use depthshrinker::shrink::surgery::{Linearise, linearise};
///
/// let graph = build("mobilenetv2-0.1", &NetworkOptions::new(Shape::new(32, 32, 3), 5))?;
/// let model = Model::initialise(graph, 7)?;
/// let mask: Mask = "1,1,0,1,1,1,1,1,1,1,1,1,1,1,1,1,1".parse()?;
/// let padding = PaddingMode::BorderBias;
/// let unmerged = linearise(&model, &mask, &Linearise { final_activation: true, padding })?;
///
/// let merged = merge(&unmerged, &MergeOptions { padding })?;
/// let [block] = &merged.segments[..] else { panic!("one block was freed") };
/// assert_eq!((block.name.as_str(), block.kernel), ("blocks.1.1", [3, 3]));
/// verify_random(&unmerged, &merged, 2, 0)?.check(&merged)?;
/// # Ok::<(), depthshrinker::Error>(())
/// ```
///
/// # Errors
/// As [`merge_segments`].
pub fn merge(model: &Model, options: &MergeOptions) -> Result<Merged> {
    merge_segments(model, &linear_segments(&model.graph, &[], options.padding)?, options)
}

/// As [`merge`], of a model that was linearised for `selection`, with the segments it names.
///
/// # Errors
/// As [`merge_segments`], and names that bound no segment.
pub fn merge_selection(model: &Model, selection: &Selection, options: &MergeOptions) -> Result<Merged> {
    let segments = selection.merging(&model.graph, options.padding)?;
    merge_segments(model, &segments, options)
}

/// Replaces segments, which lie in network order and do not overlap, each by one convolution `<segment>.conv`, followed by
/// its final activation where it has one. All else stays as it is.
///
/// # Errors
/// [`Error::Merge`] naming the segment and the node where a merge would not be exact, or where weights are not finite.
pub fn merge_segments(model: &Model, segments: &[Segment], options: &MergeOptions) -> Result<Merged> {
    let graph = &model.graph;
    check_size(graph, segments, options.padding)?;
    let mut folded = Vec::with_capacity(segments.len());
    let mut weights = model.weights.clone();
    let params = graph.params()?;
    for segment in segments {
        let result = fold(model, segment, options.padding)?;
        for param in params.iter().filter(|p| segment.nodes.contains(&p.node)) {
            weights.remove(&param.name);
        }
        let name = conv_name(graph, segment);
        let (suffix, bias_shape) = result.conv.bias_param(result.output).expect("a folded segment has a bias");
        let (weight, bias) = (format!("{name}.weight"), format!("{name}.{suffix}"));
        let weight_values = tensor(&weight, result.conv.weight_shape(), &result.weight)?;
        let bias_values = tensor(&bias, bias_shape, &result.bias)?;
        weights.extend([(weight, weight_values), (bias, bias_values)]);
        // What is left of it from here on is its structure.
        folded.push((segment, Folded { weight: Vec::new(), bias: Vec::new(), ..result }));
    }
    let (graph, map) = replace(graph, &folded)?;
    let merged = Merged { model: Model::new(graph, weights)?, map, segments: Vec::new() };
    Ok(Merged { segments: describe(&model.graph, &merged, &folded)?, ..merged })
}

/// Refuses segments that overlap or cannot be merged, and merged networks beyond all reason, before anything is folded.
fn check_size(graph: &Graph, segments: &[Segment], padding: PaddingMode) -> Result<()> {
    let shapes = graph.shapes()?;
    let (mut weights, mut maps, mut end) = (0, 0, NodeId::INPUT);
    for segment in segments {
        if segment.nodes.start < end {
            let what = graph.describe_segment(segment);
            return Err(Error::Merge(format!("{what} overlaps the one before it; give segments in network order")));
        }
        end = segment.nodes.end;
        let (of_weights, of_map) = check(graph, &shapes, segment, padding)?.params(&shapes, segment, padding);
        (weights, maps) = (weights + of_weights, maps + of_map);
    }
    if weights > MAX_WEIGHTS {
        return Err(Error::Merge(format!("the merged blocks would have {weights} weights, more than {MAX_WEIGHTS}")));
    }
    if maps > MAX_MAPS {
        let image = shapes[NodeId::INPUT];
        return Err(Error::Merge(format!(
            "for images of {image} the bias maps of the merged blocks would have {maps} numbers, more than {MAX_MAPS}; \
             finetune and merge with --padding reorder, or take smaller images"
        )));
    }
    Ok(())
}

fn conv_name(graph: &Graph, segment: &Segment) -> String {
    format!("{}.conv", graph.segment_name(segment))
}

/// One tensor of a merged convolution in f32, with 0 in place of subnormal numbers.
fn tensor(name: &str, shape: Vec<usize>, values: &[f64]) -> Result<Tensor> {
    let data: Vec<f32> = values.iter().map(|&v| flush_subnormal(v as f32)).collect();
    if data.iter().all(|v| v.is_finite()) {
        return Tensor::new(shape, data);
    }
    Err(Error::Merge(format!("{name} would not be finite in f32; the unmerged block's weights are unusable")))
}

/// The graph with one convolution in the place of each folded segment, and its map.
fn replace(graph: &Graph, folded: &[(&Segment, Folded)]) -> Result<(Graph, Vec<Option<NodeId>>)> {
    let (new, map) = graph.rewrite_with_map(|id, node, out| {
        let Some((segment, folded)) = folded.iter().find(|(segment, _)| segment.nodes.contains(&id)) else {
            return Ok(out.copy(node));
        };
        let input = out.value(segment.input);
        if id == folded.chain.output {
            let op = Op::Conv(folded.conv);
            return Ok(out.push(Node { name: conv_name(graph, segment), inputs: vec![input], op }));
        }
        // Nothing outside the segment reads its inner values, so they may stand for anything.
        Ok(if folded.chain.final_activation == Some(id) { out.copy(node) } else { input })
    })?;
    let is_inner =
        |id: NodeId| folded.iter().any(|(segment, folded)| segment.nodes.start <= id && id < folded.chain.output);
    Ok((new, NodeId::enumerate(map).map(|(id, new)| (!is_inner(id)).then_some(new)).collect()))
}

fn describe(old: &Graph, merged: &Merged, folded: &[(&Segment, Folded)]) -> Result<Vec<MergedSegment>> {
    let (before, after) = (old.cost()?, merged.model.graph.cost()?);
    let segment = |(segment, folded): &(&Segment, Folded)| {
        let conv = merged.map[folded.chain.output].expect("the value that the merged convolution computes");
        let (was, is) = (before.of(segment), after.nodes[conv]);
        MergedSegment {
            segment: (*segment).clone(),
            output: folded.chain.output,
            conv,
            blocks: old.blocks_in(segment),
            name: old.segment_name(segment),
            kernel: folded.chain.span.kernel,
            stride: folded.chain.span.stride,
            macs_before: was.macs,
            macs_after: is.macs,
            params_before: was.params,
            params_after: is.params,
            bias_map: folded.conv.bias == Bias::Map,
        }
    };
    Ok(folded.iter().map(segment).collect())
}
