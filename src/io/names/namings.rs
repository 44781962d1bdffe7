//! What other projects call the layers of the networks here, as a table.
//!
//! A row has our name of a layer, which is timm's, and theirs. In braces are numbers: on the left those that our name has
//! there, on the right the same again, or more or less by a constant. These are known besides:
//!
//! | number | counts |
//! |--|--|
//! | `block` | the blocks before the layer's |
//! | `blocks` | all blocks |
//! | `module` | of VGG, the convolutions and pools before the layer |
//!
//! Our names of VGG's convolutions and batch-norms count activations too; here they are `features.{stage}.{layer}.conv` and
//! `….bn`. The first row whose left side fits a layer names it, and a layer that no row fits is called alike. What a file puts
//! before all names, such as `backbone.`, is no part of them.

use crate::graph::{Graph, Node, Op};
use crate::index::{BlockId, NodeId};
use crate::networks::{Family, Project};

/// How a project names the networks of a family.
pub(super) struct Naming {
    /// Whose names they are.
    pub project: Project,
    /// The networks; `None` is all of them.
    pub family: Option<Family>,
    /// Our names and theirs.
    rows: &'static [Row],
}

/// A layer by our name and theirs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layer {
    pub own: String,
    pub theirs: String,
}

type Row = (&'static str, &'static str);
/// A number's name and what it is.
type Number<'a> = (&'a str, usize);

/// In the order in which they are tried.
pub(super) const NAMINGS: [Naming; 15] = [
    Naming { project: Project::Timm, family: None, rows: &[] },
    naming(Project::Torchvision, Family::MobileNetV2, &TORCHVISION_MOBILENET),
    naming(Project::Tonylins, Family::MobileNetV2, &TONYLINS),
    naming(Project::DLi14, Family::MobileNetV2, &D_LI14),
    naming(Project::DepthCompression, Family::MobileNetV2, &DEPTH_COMPRESSION_MOBILENET),
    naming(Project::Mmpretrain, Family::MobileNetV2, &MMPRETRAIN_MOBILENET),
    naming(Project::HuggingFace, Family::MobileNetV2, &HUGGING_FACE_MOBILENET),
    naming(Project::Torchvision, Family::MnasNet, &TORCHVISION_MNASNET),
    naming(Project::EfficientNetLitePytorch, Family::EfficientNetLite, &EFFICIENTNET_LITE_PYTORCH),
    naming(Project::Torchvision, Family::ResNet, &[]),
    naming(Project::Mmpretrain, Family::ResNet, &[("fc", "head.fc")]),
    naming(Project::HuggingFace, Family::ResNet, &HUGGING_FACE_RESNET),
    naming(Project::Torchvision, Family::Vgg, &TORCHVISION_VGG),
    naming(Project::Mmpretrain, Family::Vgg, &MMPRETRAIN_VGG),
    naming(Project::DepthCompression, Family::Vgg, &DEPTH_COMPRESSION_VGG),
];

const fn naming(project: Project, family: Family, rows: &'static [Row]) -> Naming {
    Naming { project, family: Some(family), rows }
}

/// All pairs of convolution and batch-norm but a block's last lie one level deeper, with an activation.
const TORCHVISION_MOBILENET: [Row; 15] = [
    ("conv_stem", "features.0.0"),
    ("bn1", "features.0.1"),
    ("blocks.0.{repeat}.conv_dw", "features.{block+1}.conv.0.0"),
    ("blocks.0.{repeat}.bn1", "features.{block+1}.conv.0.1"),
    ("blocks.0.{repeat}.conv_pw", "features.{block+1}.conv.1"),
    ("blocks.0.{repeat}.bn2", "features.{block+1}.conv.2"),
    ("blocks.{stage}.{repeat}.conv_pw", "features.{block+1}.conv.0.0"),
    ("blocks.{stage}.{repeat}.bn1", "features.{block+1}.conv.0.1"),
    ("blocks.{stage}.{repeat}.conv_dw", "features.{block+1}.conv.1.0"),
    ("blocks.{stage}.{repeat}.bn2", "features.{block+1}.conv.1.1"),
    ("blocks.{stage}.{repeat}.conv_pwl", "features.{block+1}.conv.2"),
    ("blocks.{stage}.{repeat}.bn3", "features.{block+1}.conv.3"),
    ("conv_head", "features.{blocks+1}.0"),
    ("bn2", "features.{blocks+1}.1"),
    ("classifier", "classifier.1"),
];

/// Convolution, batch-norm and activation are counted through in each block.
const TONYLINS: [Row; 14] = [
    ("conv_stem", "features.0.0"),
    ("bn1", "features.0.1"),
    ("blocks.0.{repeat}.conv_dw", "features.{block+1}.conv.0"),
    ("blocks.0.{repeat}.bn1", "features.{block+1}.conv.1"),
    ("blocks.0.{repeat}.conv_pw", "features.{block+1}.conv.3"),
    ("blocks.0.{repeat}.bn2", "features.{block+1}.conv.4"),
    ("blocks.{stage}.{repeat}.conv_pw", "features.{block+1}.conv.0"),
    ("blocks.{stage}.{repeat}.bn1", "features.{block+1}.conv.1"),
    ("blocks.{stage}.{repeat}.conv_dw", "features.{block+1}.conv.3"),
    ("blocks.{stage}.{repeat}.bn2", "features.{block+1}.conv.4"),
    ("blocks.{stage}.{repeat}.conv_pwl", "features.{block+1}.conv.6"),
    ("blocks.{stage}.{repeat}.bn3", "features.{block+1}.conv.7"),
    ("conv_head", "features.{blocks+1}.0"),
    ("bn2", "features.{blocks+1}.1"),
];

/// As tonylins, but for the head.
const D_LI14: [Row; 14] = {
    let mut rows = TONYLINS;
    rows[12] = ("conv_head", "conv.0");
    rows[13] = ("bn2", "conv.1");
    rows
};

const DEPTH_COMPRESSION_MOBILENET: [Row; 15] = [
    ("conv_stem", "features.0.0"),
    ("bn1", "features.0.1"),
    ("blocks.0.{repeat}.conv_dw", "features.{block+1}.conv.conv1"),
    ("blocks.0.{repeat}.bn1", "features.{block+1}.conv.bn1"),
    ("blocks.0.{repeat}.conv_pw", "features.{block+1}.conv.conv2"),
    ("blocks.0.{repeat}.bn2", "features.{block+1}.conv.bn2"),
    ("blocks.{stage}.{repeat}.conv_pw", "features.{block+1}.conv.conv1"),
    ("blocks.{stage}.{repeat}.bn1", "features.{block+1}.conv.bn1"),
    ("blocks.{stage}.{repeat}.conv_dw", "features.{block+1}.conv.conv2"),
    ("blocks.{stage}.{repeat}.bn2", "features.{block+1}.conv.bn2"),
    ("blocks.{stage}.{repeat}.conv_pwl", "features.{block+1}.conv.conv3"),
    ("blocks.{stage}.{repeat}.bn3", "features.{block+1}.conv.bn3"),
    ("conv_head", "features.{blocks+1}.0"),
    ("bn2", "features.{blocks+1}.1"),
    ("classifier", "classifier.1"),
];

const MMPRETRAIN_MOBILENET: [Row; 15] = [
    ("conv_stem", "conv1.conv"),
    ("bn1", "conv1.bn"),
    ("blocks.0.{repeat}.conv_dw", "layer1.{repeat}.conv.0.conv"),
    ("blocks.0.{repeat}.bn1", "layer1.{repeat}.conv.0.bn"),
    ("blocks.0.{repeat}.conv_pw", "layer1.{repeat}.conv.1.conv"),
    ("blocks.0.{repeat}.bn2", "layer1.{repeat}.conv.1.bn"),
    ("blocks.{stage}.{repeat}.conv_pw", "layer{stage+1}.{repeat}.conv.0.conv"),
    ("blocks.{stage}.{repeat}.bn1", "layer{stage+1}.{repeat}.conv.0.bn"),
    ("blocks.{stage}.{repeat}.conv_dw", "layer{stage+1}.{repeat}.conv.1.conv"),
    ("blocks.{stage}.{repeat}.bn2", "layer{stage+1}.{repeat}.conv.1.bn"),
    ("blocks.{stage}.{repeat}.conv_pwl", "layer{stage+1}.{repeat}.conv.2.conv"),
    ("blocks.{stage}.{repeat}.bn3", "layer{stage+1}.{repeat}.conv.2.bn"),
    ("conv_head", "conv2.conv"),
    ("bn2", "conv2.bn"),
    ("classifier", "head.fc"),
];

/// The first block is part of the stem.
const HUGGING_FACE_MOBILENET: [Row; 14] = [
    ("conv_stem", "conv_stem.first_conv.convolution"),
    ("bn1", "conv_stem.first_conv.normalization"),
    ("blocks.0.{repeat}.conv_dw", "conv_stem.conv_3x3.convolution"),
    ("blocks.0.{repeat}.bn1", "conv_stem.conv_3x3.normalization"),
    ("blocks.0.{repeat}.conv_pw", "conv_stem.reduce_1x1.convolution"),
    ("blocks.0.{repeat}.bn2", "conv_stem.reduce_1x1.normalization"),
    ("blocks.{stage}.{repeat}.conv_pw", "layer.{block-1}.expand_1x1.convolution"),
    ("blocks.{stage}.{repeat}.bn1", "layer.{block-1}.expand_1x1.normalization"),
    ("blocks.{stage}.{repeat}.conv_dw", "layer.{block-1}.conv_3x3.convolution"),
    ("blocks.{stage}.{repeat}.bn2", "layer.{block-1}.conv_3x3.normalization"),
    ("blocks.{stage}.{repeat}.conv_pwl", "layer.{block-1}.reduce_1x1.convolution"),
    ("blocks.{stage}.{repeat}.bn3", "layer.{block-1}.reduce_1x1.normalization"),
    ("conv_head", "conv_1x1.convolution"),
    ("bn2", "conv_1x1.normalization"),
];

/// Layers are counted through; stem and first block have no level of their own.
const TORCHVISION_MNASNET: [Row; 15] = [
    ("conv_stem", "layers.0"),
    ("bn1", "layers.1"),
    ("blocks.0.{repeat}.conv_dw", "layers.3"),
    ("blocks.0.{repeat}.bn1", "layers.4"),
    ("blocks.0.{repeat}.conv_pw", "layers.6"),
    ("blocks.0.{repeat}.bn2", "layers.7"),
    ("blocks.{stage}.{repeat}.conv_pw", "layers.{stage+7}.{repeat}.layers.0"),
    ("blocks.{stage}.{repeat}.bn1", "layers.{stage+7}.{repeat}.layers.1"),
    ("blocks.{stage}.{repeat}.conv_dw", "layers.{stage+7}.{repeat}.layers.3"),
    ("blocks.{stage}.{repeat}.bn2", "layers.{stage+7}.{repeat}.layers.4"),
    ("blocks.{stage}.{repeat}.conv_pwl", "layers.{stage+7}.{repeat}.layers.6"),
    ("blocks.{stage}.{repeat}.bn3", "layers.{stage+7}.{repeat}.layers.7"),
    ("conv_head", "layers.14"),
    ("bn2", "layers.15"),
    ("classifier", "classifier.1"),
];

const EFFICIENTNET_LITE_PYTORCH: [Row; 15] = [
    ("conv_stem", "_conv_stem"),
    ("bn1", "_bn0"),
    ("blocks.0.{repeat}.conv_dw", "_blocks.{block}._depthwise_conv"),
    ("blocks.0.{repeat}.bn1", "_blocks.{block}._bn1"),
    ("blocks.0.{repeat}.conv_pw", "_blocks.{block}._project_conv"),
    ("blocks.0.{repeat}.bn2", "_blocks.{block}._bn2"),
    ("blocks.{stage}.{repeat}.conv_pw", "_blocks.{block}._expand_conv"),
    ("blocks.{stage}.{repeat}.bn1", "_blocks.{block}._bn0"),
    ("blocks.{stage}.{repeat}.conv_dw", "_blocks.{block}._depthwise_conv"),
    ("blocks.{stage}.{repeat}.bn2", "_blocks.{block}._bn1"),
    ("blocks.{stage}.{repeat}.conv_pwl", "_blocks.{block}._project_conv"),
    ("blocks.{stage}.{repeat}.bn3", "_blocks.{block}._bn2"),
    ("conv_head", "_conv_head"),
    ("bn2", "_bn1"),
    ("classifier", "_fc"),
];

const HUGGING_FACE_RESNET: [Row; 7] = [
    ("conv1", "embedder.embedder.convolution"),
    ("bn1", "embedder.embedder.normalization"),
    ("layer{stage}.{repeat}.conv{n}", "encoder.stages.{stage-1}.layers.{repeat}.layer.{n-1}.convolution"),
    ("layer{stage}.{repeat}.bn{n}", "encoder.stages.{stage-1}.layers.{repeat}.layer.{n-1}.normalization"),
    ("layer{stage}.{repeat}.downsample.0", "encoder.stages.{stage-1}.layers.{repeat}.shortcut.convolution"),
    ("layer{stage}.{repeat}.downsample.1", "encoder.stages.{stage-1}.layers.{repeat}.shortcut.normalization"),
    ("fc", "classifier.1"),
];

const TORCHVISION_VGG: [Row; 3] =
    [("pre_logits.fc1", "classifier.0"), ("pre_logits.fc2", "classifier.3"), ("head.fc", "classifier.6")];

const MMPRETRAIN_VGG: [Row; 5] = [
    ("features.{stage}.{layer}.conv", "features.{module}.conv"),
    ("features.{stage}.{layer}.bn", "features.{module}.bn"),
    ("pre_logits.fc1", "classifier.0"),
    ("pre_logits.fc2", "classifier.3"),
    ("head.fc", "classifier.6"),
];

const DEPTH_COMPRESSION_VGG: [Row; 5] = [
    ("features.{stage}.{layer}.conv", "features.{stage}.conv.conv{layer+1}"),
    ("features.{stage}.{layer}.bn", "features.{stage}.conv.bn{layer+1}"),
    ("pre_logits.fc1", "classifier.0"),
    ("pre_logits.fc2", "classifier.3"),
    ("head.fc", "classifier.6"),
];

impl Naming {
    /// The layers with parameters of a network, in its order, the classifier last.
    pub fn layers(&self, graph: &Graph) -> Vec<Layer> {
        let mut vgg = VggCount::default();
        let nodes = NodeId::enumerate(&graph.nodes).filter(|(_, node)| has_params(node));
        let layers = nodes.map(|(id, node)| {
            let block = graph.block_of(id).map_or(0, BlockId::index);
            let mut numbers = vec![("block", block), ("blocks", graph.blocks.len())];
            let counted = if self.family == Some(Family::Vgg) { vgg.name(node, &mut numbers) } else { None };
            let name = counted.as_deref().unwrap_or(&node.name);
            let theirs = self.rows.iter().find_map(|(own, theirs)| {
                let found = match_numbers(own, name)?;
                Some(fill(theirs, &[numbers.as_slice(), found.as_slice()].concat()))
            });
            Layer { own: node.name.clone(), theirs: theirs.unwrap_or_else(|| node.name.clone()) }
        });
        layers.collect()
    }
}

fn has_params(node: &Node) -> bool {
    matches!(node.op, Op::Conv(_) | Op::BatchNorm(_) | Op::Linear(_))
}

/// Where in VGG's stages a layer lies. Our names count convolution, batch-norm and activation, and a pool after each stage.
#[derive(Debug, Default)]
struct VggCount {
    /// The index that the next convolution of the stage would have; `None` before the first.
    next: Option<usize>,
    stage: usize,
    layer: usize,
    convs: usize,
}

impl VggCount {
    /// The name of a layer of the features by stage and layer; the layers come in order.
    fn name(&mut self, node: &Node, numbers: &mut Vec<Number<'_>>) -> Option<String> {
        const STEP: usize = 3;
        let index: usize = node.name.strip_prefix("features.")?.parse().ok()?;
        let kind = if matches!(node.op, Op::Conv(_)) { "conv" } else { "bn" };
        if kind == "conv" {
            match self.next {
                Some(next) if next == index => self.layer += 1,
                Some(_) => (self.stage, self.layer) = (self.stage + 1, 0),
                None => {}
            }
            self.next = Some(index + STEP);
            self.convs += 1;
        }
        numbers.push(("module", self.convs.saturating_sub(1) + self.stage));
        Some(format!("features.{}.{}.{kind}", self.stage, self.layer))
    }
}

/// The numbers of a name that a pattern fits.
fn match_numbers<'p>(pattern: &'p str, name: &str) -> Option<Vec<Number<'p>>> {
    if pattern.split('.').count() != name.split('.').count() {
        return None;
    }
    let mut numbers = Vec::new();
    for (pattern, name) in pattern.split('.').zip(name.split('.')) {
        match pattern.split_once('{') {
            Some((start, number)) => {
                let value = name.strip_prefix(start)?.parse().ok()?;
                numbers.push((number.strip_suffix('}')?, value));
            }
            None if pattern == name => {}
            None => return None,
        }
    }
    Some(numbers)
}

/// A name from its pattern.
fn fill(pattern: &str, numbers: &[Number<'_>]) -> String {
    let mut out = String::new();
    let mut rest = pattern;
    while let Some((text, behind)) = rest.split_once('{') {
        let (number, behind) = behind.split_once('}').unwrap_or((behind, ""));
        let (name, change) = match number.find(['+', '-']) {
            Some(at) => (&number[..at], number[at..].parse().unwrap_or(0)),
            None => (number, 0isize),
        };
        let value = numbers.iter().rev().find(|(known, _)| *known == name).map_or(0, |(_, value)| *value);
        out.push_str(text);
        out.push_str(&value.saturating_add_signed(change).to_string());
        rest = behind;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_whole() {
        for naming in &NAMINGS {
            for (own, theirs) in naming.rows {
                let mut known = vec!["block", "blocks", "module"];
                known.extend(own.split('{').skip(1).map(|part| part.split('}').next().unwrap()));
                for part in theirs.split('{').skip(1) {
                    let (number, _) = part.split_once('}').unwrap_or_else(|| panic!("{theirs} is not closed"));
                    let at = number.find(['+', '-']).unwrap_or(number.len());
                    assert!(known.contains(&&number[..at]), "{own} has no {number} for {theirs}");
                    assert!(at == number.len() || number[at..].parse::<isize>().is_ok(), "{theirs}: {number}");
                }
            }
        }
    }
}
