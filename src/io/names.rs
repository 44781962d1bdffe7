//! What other projects call the parameters of the networks here, whose names are timm's.
//!
//! A scheme lists for each node with parameters the name that the other project gives it, per family of networks. Which
//! scheme a file follows is seen from its names.

use std::collections::BTreeMap;
use std::path::Path;

use super::model::read_weights;
use super::tensors::{parse_tensors, read_bounded};
use super::torch::parse_torch;
use crate::graph::{Graph, Node, Op, ParamRole, ParamSpec};
use crate::model::Model;
use crate::networks::{Family, Project, family};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// What training scripts put before every name.
const WRAPPERS: [&str; 2] = ["module.", "_orig_mod."];

/// What to do about weights that do not fit.
const REMEDY: &str = "give the network these weights are of, or weights of this network";

/// Node names here → there.
type Names = BTreeMap<String, String>;

/// A way to name a network's parameters.
struct Scheme {
    /// Whose names they are.
    project: Project,
    /// The names it gives to the nodes of a network; `None` where the project has no such network.
    names: fn(&Graph, Family) -> Option<Names>,
}

const SCHEMES: [Scheme; 3] = [
    Scheme { project: Project::Timm, names: |graph, _| Some(named(graph, |name| name.to_owned())) },
    Scheme { project: Project::Torchvision, names: torchvision },
    Scheme { project: Project::EfficientNetLitePytorch, names: efficientnet_lite_pytorch },
];

/// The weights of another project's file.
#[derive(Debug)]
pub struct Foreign {
    /// Tensors by the other project's names, in the layout of files.
    tensors: BTreeMap<String, Tensor>,
}

impl Foreign {
    /// Reads a `.safetensors` file or one of PyTorch's; its content says which.
    ///
    /// # Errors
    /// A file that is neither, in one line.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = read_bounded(path)?;
        // The header of a safetensors file is a JSON object behind its length.
        let is_safetensors = bytes.get(size_of::<u64>()) == Some(&b'{');
        Ok(Self::new(if is_safetensors { parse_tensors(path, &bytes)?.tensors } else { parse_torch(path, &bytes)? }))
    }

    /// The tensors of a file, what wraps all names taken off.
    pub fn new(mut tensors: BTreeMap<String, Tensor>) -> Self {
        tensors.retain(|name, _| !name.ends_with("num_batches_tracked"));
        // Where the names begin behind their wrappers.
        let mut start = 0;
        while let Some(wrapper) =
            WRAPPERS.iter().find(|w| !tensors.is_empty() && tensors.keys().all(|k| k[start..].starts_with(*w)))
        {
            start += wrapper.len();
        }
        if start > 0 {
            tensors = tensors.into_iter().map(|(name, tensor)| (name[start..].to_owned(), tensor)).collect();
        }
        Self { tensors }
    }

    /// The number of classes and of image channels, as the classifier's and the stem's weights have them; `None` where
    /// those are not found. `graph` is the network for any number of either.
    pub fn classes_and_channels(&self, graph: &Graph) -> (Option<usize>, Option<usize>) {
        let (_, names) = self.schemes(graph);
        let size = |node: Option<&Node>, dim: usize| {
            let weight = self.tensors.get(&format!("{}.weight", names.get(&node?.name)?))?;
            weight.shape.get(dim).copied()
        };
        let stem = graph.nodes.iter().find(|n| matches!(n.op, Op::Conv(_)));
        (size(graph.nodes.last(), 0), size(stem, 1))
    }

    /// The network with these weights, and whose names the file has: more than one project's where they agree.
    ///
    /// # Errors
    /// Tensors that are missing, superfluous, misshapen or not finite, by the file's own names; `path` is the file.
    pub fn into_model(mut self, path: &Path, graph: Graph) -> Result<(Model, Vec<Project>)> {
        let (projects, names) = self.schemes(&graph);
        let name = |spec: &ParamSpec| {
            let own = &graph.nodes[spec.node].name;
            let theirs = names.get(own).unwrap_or(own);
            format!("{theirs}{}", &spec.name[own.len()..])
        };
        for spec in graph.params()? {
            if let Some(tensor) = self.tensors.get_mut(&name(&spec)) {
                unflatten(tensor, &spec, &graph);
            }
        }
        let weights = read_weights(path, &graph, &mut self.tensors, name, REMEDY)?;
        let model = Model::new(graph, weights).map_err(|e| Error::file(path, e.to_string()))?;
        Ok((model, projects))
    }

    /// The names under which most nodes' weights are found in the file, and the projects that use them.
    fn schemes(&self, graph: &Graph) -> (Vec<Project>, Names) {
        let family = family(&graph.name).ok();
        let mut best = (0, Vec::new(), Names::new());
        for scheme in &SCHEMES {
            // A network of no known name has only the names it came with.
            let names = match family {
                Some(family) => (scheme.names)(graph, family),
                None => (scheme.project == Project::Timm).then(|| named(graph, |name| name.to_owned())),
            };
            let Some(names) = names else { continue };
            let found = names.values().filter(|n| self.tensors.contains_key(&format!("{n}.weight"))).count();
            if best.1.is_empty() || found > best.0 {
                best = (found, vec![scheme.project], names);
            } else if names == best.2 {
                best.1.push(scheme.project);
            }
        }
        (best.1, best.2)
    }
}

/// A convolution as wide as its image is elsewhere a linear layer on the flattened image: the same numbers in the same
/// order, `[c_out, c_in·h·w]`.
fn unflatten(tensor: &mut Tensor, spec: &ParamSpec, graph: &Graph) {
    if let (ParamRole::ConvWeight(_), Op::Conv(conv), &[rows, columns]) =
        (spec.role, graph.nodes[spec.node].op, tensor.shape.as_slice())
        && rows == conv.c_out
        && conv.groups == 1
        && columns == conv.c_in * conv.window.taps()
    {
        tensor.shape = vec![conv.c_out, conv.c_in, conv.window.k_h, conv.window.k_w];
    }
}

/// Names that depend on nothing but timm's.
fn named(graph: &Graph, name: impl Fn(&str) -> String) -> Names {
    let nodes = graph.nodes.iter().filter(|n| has_params(n));
    nodes.map(|n| (n.name.clone(), name(&n.name))).collect()
}

/// timm's names, some of them changed.
fn renamed(graph: &Graph, changes: &[(&str, &str)]) -> Names {
    named(graph, |name| {
        let theirs = changes.iter().find(|(own, _)| *own == name).map_or(name, |(_, theirs)| theirs);
        theirs.to_owned()
    })
}

fn has_params(node: &Node) -> bool {
    matches!(node.op, Op::Conv(_) | Op::BatchNorm(_) | Op::Linear(_))
}

/// Names of the nodes with parameters in each block, in order.
fn blocks(graph: &Graph) -> impl Iterator<Item = Vec<&str>> {
    graph.blocks.iter().map(|block| {
        let nodes = graph.nodes[block.nodes].iter().filter(|n| has_params(n));
        nodes.map(|n| n.name.as_str()).collect()
    })
}

/// torchvision: MobileNetV2 and MNASNet count their layers through, VGG has linear layers where timm has convolutions,
/// ResNet is named as in timm.
fn torchvision(graph: &Graph, family: Family) -> Option<Names> {
    match family {
        Family::MobileNetV2 => Some(torchvision_mobilenet(graph)),
        Family::MnasNet => torchvision_mnasnet(graph),
        Family::ResNet => Some(named(graph, |name| name.to_owned())),
        Family::Vgg => Some(renamed(
            graph,
            &[("pre_logits.fc1", "classifier.0"), ("pre_logits.fc2", "classifier.3"), ("head.fc", "classifier.6")],
        )),
        Family::EfficientNetLite => None,
    }
}

fn torchvision_mobilenet(graph: &Graph) -> Names {
    let mut names =
        renamed(graph, &[("conv_stem", "features.0.0"), ("bn1", "features.0.1"), ("classifier", "classifier.1")]);
    for (index, nodes) in blocks(graph).enumerate() {
        let block = format!("features.{}.conv", index + 1);
        // Pairs of a convolution and its batch-norm; all pairs but the last lie one level deeper, with an activation.
        let last = (nodes.len() / 2).saturating_sub(1);
        for (at, own) in nodes.into_iter().enumerate() {
            let (pair, member) = (at / 2, at % 2);
            let theirs =
                if pair < last { format!("{block}.{pair}.{member}") } else { format!("{block}.{}", pair + member) };
            names.insert(own.to_owned(), theirs);
        }
    }
    let head = graph.blocks.len() + 1;
    names.insert("conv_head".into(), format!("features.{head}.0"));
    names.insert("bn2".into(), format!("features.{head}.1"));
    names
}

/// Layers 0 to 7 are the stem and the first block, without a level of their own; then a layer per stage, which counts its
/// blocks, and in each of those convolution, batch-norm and activation are counted through; the head comes last.
fn torchvision_mnasnet(graph: &Graph) -> Option<Names> {
    /// Layers that a convolution with batch-norm and activation takes.
    const STEP: usize = 3;
    /// The layer of the first stage of blocks.
    const FIRST_STAGE: usize = 8;
    let mut names = renamed(graph, &[("conv_stem", "layers.0"), ("bn1", "layers.1"), ("classifier", "classifier.1")]);
    let mut head = FIRST_STAGE;
    for (block, nodes) in graph.blocks.iter().zip(blocks(graph)) {
        let (stage, repeat) = block.name.strip_prefix("blocks.")?.split_once('.')?;
        let stage = usize::from(stage.parse::<u16>().ok()?);
        head = FIRST_STAGE + stage;
        for (at, own) in nodes.into_iter().enumerate() {
            let layer = at / 2 * STEP + at % 2;
            let theirs = match stage {
                0 => format!("layers.{}", STEP + layer),
                _ => format!("layers.{}.{repeat}.layers.{layer}", head - 1),
            };
            names.insert(own.to_owned(), theirs);
        }
    }
    names.insert("conv_head".into(), format!("layers.{head}"));
    names.insert("bn2".into(), format!("layers.{}", head + 1));
    Some(names)
}

/// The EfficientNet-Lite packages `efficientnet_lite_pytorch`, whose names follow EfficientNet-PyTorch.
fn efficientnet_lite_pytorch(graph: &Graph, family: Family) -> Option<Names> {
    const EXPANDING: [&str; 6] = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"];
    const ENDS: [(&str, &str); 5] = [
        ("conv_stem", "_conv_stem"),
        ("bn1", "_bn0"),
        ("conv_head", "_conv_head"),
        ("bn2", "_bn1"),
        ("classifier", "_fc"),
    ];
    if family != Family::EfficientNetLite {
        return None;
    }
    let mut names = renamed(graph, &ENDS);
    for (index, nodes) in blocks(graph).enumerate() {
        // A block that does not expand begins with its depthwise convolution.
        let skipped = EXPANDING.len().saturating_sub(nodes.len());
        for (own, part) in nodes.into_iter().zip(&EXPANDING[skipped..]) {
            names.insert(own.to_owned(), format!("_blocks.{index}.{part}"));
        }
    }
    Some(names)
}
