//! DepthShrinker+: dense convolutions are expanded into inverted residuals, trained so, and folded back into convolutions of the
//! same shape (`docs/methods.md` 1.13).
//!
//! Read of it: that the paper (Fu et al., ICML 2022) has a training strategy of this name; its code has none. Decided here: a k×k
//! convolution becomes pointwise, φ, depthwise k×k, φ, pointwise, without biases and batch-norms of their own, so that what it folds
//! into is a convolution as it was; its weights begin as factors of the convolution's.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};
use serde::{Deserialize, Serialize};

use super::factor::{Factors, factor};
use super::mask::Mask;
use super::merge::Merged;
use super::selection::Selection;
use crate::graph::{
    Activation, Bias, Block, BlockId, BlockState, Conv, ConvFamily, Graph, GraphBuilder, Node, NodeId, Op, SegmentEnds,
    SiteId,
};
use crate::model::{Model, Weights};
use crate::shape::Window;
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Largest ratio of hidden channels; 9 is exact for any 3×3 convolution.
const MAX_RATIO: usize = 64;

/// Which convolutions are expanded, and how far.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExpandConfig {
    /// Names of convolutions; all that can be and do not read the image if empty.
    pub convs: Vec<String>,
    /// Hidden channels for each channel that comes in.
    pub ratio: usize,
}

impl Default for ExpandConfig {
    fn default() -> Self {
        Self { convs: Vec::new(), ratio: 6 }
    }
}

impl ExpandConfig {
    /// Refuses values out of range.
    ///
    /// # Errors
    /// Names the key and its range.
    pub fn check(&self) -> Result<()> {
        if (1..=MAX_RATIO).contains(&self.ratio) {
            return Ok(());
        }
        Err(Error::Config(format!("expand.ratio = {}; give 1 to {MAX_RATIO}", self.ratio)))
    }

    /// The convolutions of a graph that are expanded, in network order.
    ///
    /// # Errors
    /// A name of none that can be, or a network that has none.
    pub fn nodes(&self, graph: &Graph) -> Result<Vec<NodeId>> {
        for name in &self.convs {
            let node = graph.nodes.iter().find(|node| node.name == *name);
            let conv = node.and_then(|node| if let Op::Conv(conv) = node.op { Some(conv) } else { None });
            let why = match conv {
                None => "is no convolution of this network",
                Some(conv) if !is_dense(&conv) => "is no dense convolution larger than 1×1",
                Some(conv) if conv.bias == Bias::Map => {
                    "has a bias for each position, which no inverted residual folds into; merge with --padding reorder"
                }
                Some(_) => continue,
            };
            return Err(Error::Config(format!("{name} {why}; known are {}", known(graph))));
        }
        let is_asked = |node: &Node| match self.convs.is_empty() {
            true => is_expandable(node) && node.inputs[0] != NodeId::INPUT,
            false => self.convs.contains(&node.name),
        };
        let nodes: Vec<NodeId> =
            NodeId::enumerate(&graph.nodes).filter(|(_, node)| is_asked(node)).map(|(id, _)| id).collect();
        if nodes.is_empty() {
            let problem = "has no dense convolution larger than 1×1 that could be expanded";
            return Err(Error::Config(format!("{} {problem}; merge blocks first", graph.name)));
        }
        Ok(nodes)
    }
}

fn known(graph: &Graph) -> String {
    let names: Vec<&str> =
        graph.nodes.iter().filter(|node| is_expandable(node)).map(|node| node.name.as_str()).collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

fn is_dense(conv: &Conv) -> bool {
    conv.family() == ConvFamily::Dense && conv.groups == 1 && conv.window.taps() > 1
}

fn is_expandable(node: &Node) -> bool {
    matches!(node.op, Op::Conv(conv) if is_dense(&conv) && conv.bias != Bias::Map)
}

/// One convolution that was expanded.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExpandedConv {
    /// Its name.
    pub name: String,
    /// Channels of its depthwise convolution.
    pub hidden: usize,
    /// How far the weights that its three convolutions begin with fold into are from its own, relative to them in the
    /// Frobenius norm: rounding where there are hidden channels enough.
    pub error: f64,
}

/// A network with expanded convolutions.
#[derive(Debug, Clone, PartialEq)]
pub struct Expanded {
    /// The network, whose blocks are those that still have activations.
    pub model: Model,
    /// What folds the convolutions again.
    pub selection: Selection,
    /// The convolutions, in network order.
    pub convs: Vec<ExpandedConv>,
}

/// Expands convolutions; hidden channels beyond what their factors need begin at random, read with weights of 0.
///
/// # Errors
/// As [`ExpandConfig::nodes`], or a network that would be too large.
pub fn expand(model: &Model, config: &ExpandConfig, seed: u64) -> Result<Expanded> {
    config.check()?;
    let graph = with_active_blocks(&model.graph);
    let chosen = config.nodes(&graph)?;
    let first_site = graph.sites();
    let (mut weights, mut convs, mut segments) = (model.weights.clone(), Vec::new(), Vec::new());
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let new = graph.rewrite(|id, node, out| {
        let (Op::Conv(conv), Some(index)) = (node.op, chosen.iter().position(|chosen| *chosen == id)) else {
            return Ok(out.copy(node));
        };
        let parts = Parts::new(&node.name, conv, config.ratio * conv.c_in, SiteId::new(first_site + index));
        let weight = weights.remove(&format!("{}.weight", node.name)).expect("checked when the model was made");
        if let Some(bias) = weights.remove(&format!("{}.bias", node.name)) {
            weights.insert(format!("{}.bias", parts.names[2]), bias);
        }
        let factors = factor(&weight, conv, parts.hidden);
        convs.push(ExpandedConv { name: node.name.clone(), hidden: parts.hidden, error: factors.error });
        segments.push(SegmentEnds { first: parts.names[0].clone(), last: parts.names[2].clone() });
        parts.insert(factors, &mut weights, &mut random);
        Ok(parts
            .nodes()
            .into_iter()
            .fold(out.value(node.inputs[0]), |input, (name, op)| out.push(Node { name, inputs: vec![input], op })))
    })?;
    for param in new.params()? {
        if let Some(tensor) = weights.get_mut(&param.name).filter(|tensor| tensor.data.len() == param.len()) {
            tensor.shape = param.shape;
        }
    }
    let kept = (0..first_site + chosen.len()).map(|site| site < first_site).collect();
    let selection = Selection { segments, ..Mask::new(kept).into() };
    Ok(Expanded { model: Model::new(new, weights)?, selection, convs })
}

/// The network from before [`expand`] with the weights of a merged one: each convolution has those of what its inverted residual
/// was folded into.
///
/// # Errors
/// A merged network that is not of this one.
pub fn contract(merged: &Merged, original: &Graph, convs: &[ExpandedConv]) -> Result<Model> {
    let refuse = |name: &str| Error::Merge(format!("{name} was not folded back into a convolution as it was"));
    let mut weights = merged.model.weights.clone();
    if merged.segments.len() != convs.len() {
        return Err(refuse(&original.name));
    }
    for (segment, conv) in merged.segments.iter().zip(convs) {
        let node = &merged.model.graph.nodes[segment.conv].name;
        let mut take = |suffix: &str| weights.remove(&format!("{node}.{suffix}")).ok_or_else(|| refuse(&conv.name));
        let (weight, bias) = (take("weight")?, take("bias")?);
        let has_bias = original
            .nodes
            .iter()
            .any(|node| node.name == conv.name && matches!(node.op, Op::Conv(conv) if conv.bias == Bias::Channel));
        weights.insert(format!("{}.weight", conv.name), weight);
        if has_bias {
            weights.insert(format!("{}.bias", conv.name), bias);
        } else if bias.data.iter().any(|value| *value != 0.0) {
            return Err(refuse(&conv.name));
        }
    }
    Model::new(original.clone(), weights)
}

/// The graph with those blocks alone that have activations to be freed: what is merged already is a part of it like any other.
fn with_active_blocks(graph: &Graph) -> Graph {
    let is_active = |block: &BlockId| graph.state(*block) == BlockState::Active;
    let active: Vec<BlockId> = BlockId::all(graph.blocks.len()).filter(is_active).collect();
    let mut new = graph.clone();
    new.blocks = active.iter().map(|block| graph.blocks[*block].clone()).collect::<Vec<Block>>();
    for node in &mut new.nodes {
        if let Op::Activation(Activation { site: Some(site), .. }) = &mut node.op {
            let place = active.iter().position(|block| block.site() == *site);
            let beyond = || active.len() + site.index() - graph.blocks.len();
            *site = SiteId::new(place.unwrap_or_else(beyond));
        }
    }
    new
}

/// What stands in the place of one convolution.
struct Parts {
    names: [String; 3],
    conv: Conv,
    hidden: usize,
    site: SiteId,
}

impl Parts {
    fn new(name: &str, conv: Conv, hidden: usize, site: SiteId) -> Self {
        Self { names: ["expand", "dw", "project"].map(|part| format!("{name}.{part}")), conv, hidden, site }
    }

    fn nodes(&self) -> Vec<(String, Op)> {
        let Self { names: [expand, depthwise, project], conv, hidden, site } = self;
        let pointwise = |c_in, c_out| GraphBuilder::conv(c_in, c_out, Window::square(1, 1, 0), 1);
        let activation = Op::Activation(Activation { site: Some(*site), ..Activation::RELU6 });
        let windowed = GraphBuilder::conv(*hidden, *hidden, conv.window, *hidden);
        vec![
            (expand.clone(), Op::Conv(pointwise(conv.c_in, *hidden))),
            (format!("{expand}.act"), activation),
            (depthwise.clone(), Op::Conv(windowed)),
            (format!("{depthwise}.act"), activation),
            (project.clone(), Op::Conv(Conv { bias: conv.bias, ..pointwise(*hidden, conv.c_out) })),
        ]
    }

    /// Weights `[hidden, c_in]`, `[k_h, k_w, hidden]` and `[c_out, hidden]`.
    fn insert(&self, factors: Factors, weights: &mut Weights, random: &mut ChaCha8Rng) {
        let Self { names: [expand, depthwise, project], conv, hidden, .. } = self;
        let (taps, missing) = (conv.window.taps(), self.hidden - factors.terms.len());
        let mut normal = |fan: usize, count: usize| -> Vec<f64> {
            let normal = Normal::new(0.0, (2.0 / fan as f64).sqrt()).expect("a deviation that is finite");
            normal.sample_iter(&mut *random).take(count).collect()
        };
        let (mut first, mut middle) = (Vec::new(), vec![0.0; taps * hidden]);
        let mut last = vec![0.0; conv.c_out * hidden];
        let extra: Vec<[Vec<f64>; 3]> =
            (0..missing).map(|_| [normal(conv.c_in, conv.c_in), normal(taps, taps), vec![0.0; conv.c_out]]).collect();
        for (m, [of_input, of_taps, of_output]) in factors.terms.into_iter().chain(extra).enumerate() {
            first.extend(of_input);
            of_taps.iter().enumerate().for_each(|(tap, value)| middle[tap * hidden + m] = *value);
            of_output.iter().enumerate().for_each(|(o, value)| last[o * hidden + m] = *value);
        }
        let shapes =
            [vec![*hidden, conv.c_in], vec![conv.window.k_h, conv.window.k_w, *hidden], vec![conv.c_out, *hidden]];
        for ((name, shape), values) in [expand, depthwise, project].into_iter().zip(shapes).zip([first, middle, last]) {
            let data = values.into_iter().map(|value| value as f32).collect();
            weights.insert(format!("{name}.weight"), Tensor { shape, data });
        }
    }
}
