//! Networks of fewer channels, with weights that are slices of the trained ones (`docs/methods.md` 1.12).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::graph::{
    BatchNorm, ChannelGroup, ChannelGroups, Conv, ConvFamily, Graph, Linear, NodeId, Op, ParamRole, ParamSpec,
};
use crate::model::{Model, Weights};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// By what channels stay: those of the highest sum over the layers that share them, each layer by its mean so that all count alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChannelOrder {
    /// The magnitudes of batch-norm's γ (Network Slimming, Liu et al., ICCV 2017); of channels without batch-norm as `l1`.
    #[default]
    BnGamma,
    /// The sums of the magnitudes of the filters that give them (Li et al., ICLR 2017).
    L1,
}

/// How many channels stay of each group that loses some, by the name of the first convolution that gives them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelList {
    /// Which ones.
    #[serde(default)]
    pub by: ChannelOrder,
    /// How many.
    pub counts: BTreeMap<String, usize>,
}

impl ChannelList {
    /// The list that makes of `graph` a network with the channels of `other`, which has convolutions of the same names.
    ///
    /// # Errors
    /// A malformed graph.
    pub fn between(graph: &Graph, other: &Graph, by: ChannelOrder) -> Result<Self> {
        let (groups, shapes, map) = (ChannelGroups::new(graph)?, other.shapes()?, graph.map_by_name(other));
        let count = |group: &ChannelGroup| {
            let there = map[group.values[0]].map(|node| shapes[node].c)?;
            (there != group.channels).then(|| (group.name.clone(), there))
        };
        Ok(Self { by, counts: groups.groups().iter().filter_map(count).collect() })
    }

    /// For each group of a graph how many channels stay.
    fn resolve(&self, graph: &Graph, groups: &ChannelGroups) -> Result<Vec<usize>> {
        let mut counts: Vec<usize> = groups.groups().iter().map(|group| group.channels).collect();
        for (name, &count) in &self.counts {
            let group = groups.find(&graph.name, name)?;
            let most = groups.groups()[group].channels;
            if !(1..=most).contains(&count) {
                return Err(Error::Graph(format!("{name} in {} has {most} channels, not {count} to keep", graph.name)));
            }
            counts[group] = count;
        }
        Ok(counts)
    }
}

/// The graph of [`narrow`]; no node changes its place.
///
/// # Errors
/// As [`narrow`].
pub fn narrow_graph(graph: &Graph, list: &ChannelList) -> Result<Graph> {
    let groups = ChannelGroups::new(graph)?;
    let counts = list.resolve(graph, &groups)?;
    graph.rewrite(|id, node, out| {
        let new = out.copy(node);
        let own = counts[groups.of(id)];
        let read = || counts[groups.of(node.inputs[0])];
        let op = match node.op {
            Op::Conv(conv) if conv.family() == ConvFamily::Depthwise => {
                Op::Conv(Conv { c_in: own, c_out: own, groups: own, ..conv })
            }
            Op::Conv(conv) => Op::Conv(Conv { c_in: read(), c_out: own, ..conv }),
            Op::BatchNorm(norm) => Op::BatchNorm(BatchNorm { channels: own, ..norm }),
            // What is read pixel by pixel keeps its channels.
            Op::Linear(linear) if groups.groups()[groups.of(node.inputs[0])].is_fixed => Op::Linear(linear),
            Op::Linear(linear) => Op::Linear(Linear { c_in: read(), ..linear }),
            other => other,
        };
        Ok(out.set_op(new, op))
    })
}

/// The network with the channels of a list: of each group those of the highest score stay, in their order, of equal ones the
/// first; all weights are those of the network. A group that has as many already stays as it is.
///
/// # Errors
/// Names that begin no channels, channels that are fixed, or fewer channels than are to stay.
pub fn narrow(model: &Model, list: &ChannelList) -> Result<Model> {
    let graph = &model.graph;
    let groups = ChannelGroups::new(graph)?;
    let counts = list.resolve(graph, &groups)?;
    let new = narrow_graph(graph, list)?;
    let scores = scores(model, &groups, list.by)?;
    let stays = |(scores, &count): (&Vec<f64>, &usize)| {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(count);
        order.sort_unstable();
        order
    };
    let kept: Vec<Vec<usize>> = scores.iter().zip(&counts).map(stays).collect();
    let shapes: BTreeMap<String, Vec<usize>> = new.params()?.into_iter().map(|p| (p.name, p.shape)).collect();
    let mut weights = Weights::new();
    for param in graph.params()? {
        let mut tensor = model.weight(&param.name).clone();
        for (axis, node) in channel_axes(graph, &param) {
            let channels = &kept[groups.of(node)];
            if channels.len() < scores[groups.of(node)].len() {
                tensor = gather(&tensor, axis, channels);
            }
        }
        if let Some(shape) = shapes.get(&param.name) {
            // One channel that is left of a depthwise convolution makes it dense, with the same numbers.
            tensor.shape.clone_from(shape);
        }
        weights.insert(param.name, tensor);
    }
    Model::new(new, weights)
}

/// The axes of a parameter that are channels, each with the node whose value has them.
fn channel_axes(graph: &Graph, param: &ParamSpec) -> Vec<(usize, NodeId)> {
    let (own, read) = (param.node, graph.nodes[param.node].inputs[0]);
    match param.role {
        ParamRole::ConvWeight(ConvFamily::Depthwise) | ParamRole::ConvBiasMap => vec![(2, own)],
        ParamRole::ConvWeight(ConvFamily::Pointwise) => vec![(0, own), (1, read)],
        ParamRole::ConvWeight(ConvFamily::Dense) => vec![(0, own), (3, read)],
        ParamRole::LinearWeight => vec![(1, read)],
        ParamRole::LinearBias => Vec::new(),
        _ => vec![(0, own)],
    }
}

/// The entries of an axis that stay.
fn gather(tensor: &Tensor, axis: usize, kept: &[usize]) -> Tensor {
    let inner: usize = tensor.shape[axis + 1..].iter().product();
    let mut shape = tensor.shape.clone();
    let row = inner * std::mem::replace(&mut shape[axis], kept.len());
    let rows = tensor.data.chunks_exact(row);
    let data = rows.flat_map(|row| kept.iter().flat_map(move |&at| &row[at * inner..(at + 1) * inner])).copied();
    Tensor { data: data.collect(), shape }
}

/// The score of every channel of every group.
fn scores(model: &Model, groups: &ChannelGroups, by: ChannelOrder) -> Result<Vec<Vec<f64>>> {
    let of = |by: ChannelOrder| {
        let mut scores: Vec<Vec<f64>> = groups.groups().iter().map(|group| vec![0.0; group.channels]).collect();
        let mut counted = vec![false; scores.len()];
        for param in model.graph.params()? {
            let axis = match (by, param.role) {
                (ChannelOrder::BnGamma, ParamRole::BnWeight) => 0,
                (ChannelOrder::L1, ParamRole::ConvWeight(ConvFamily::Depthwise)) => 2,
                (ChannelOrder::L1, ParamRole::ConvWeight(_)) => 0,
                _ => continue,
            };
            let group = groups.of(param.node);
            let sums = magnitudes(model.weight(&param.name), axis);
            let mean = (sums.iter().sum::<f64>() / sums.len() as f64).max(f64::MIN_POSITIVE);
            scores[group].iter_mut().zip(sums).for_each(|(score, sum)| *score += sum / mean);
            counted[group] = true;
        }
        Ok::<_, Error>((scores, counted))
    };
    let (own, counted) = of(by)?;
    if by == ChannelOrder::L1 || !counted.contains(&false) {
        return Ok(own);
    }
    let others = of(ChannelOrder::L1)?.0;
    let chosen = own.into_iter().zip(others).zip(counted);
    Ok(chosen.map(|((own, other), counted)| if counted { own } else { other }).collect())
}

/// The sums of magnitudes along all axes but one.
fn magnitudes(tensor: &Tensor, axis: usize) -> Vec<f64> {
    let inner: usize = tensor.shape[axis + 1..].iter().product();
    let channels = tensor.shape[axis];
    let mut sums = vec![0.0; channels];
    for (at, value) in tensor.data.iter().enumerate() {
        sums[at / inner % channels] += f64::from(value.abs());
    }
    sums
}
