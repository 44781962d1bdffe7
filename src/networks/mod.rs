//! Networks by name, as graphs with timm's parameter names.

mod channel_plan;
mod efficientnet_lite;
mod inverted_residual;
mod layer_merge;
mod mnasnet;
mod mobilenet_v2;
mod preprocessing;
mod resnet;
mod vgg;

pub use channel_plan::{BlockChannels, ChannelPlan, METAPRUNING_GENES, PLAN_BLOCKS};
pub use preprocessing::{default_weights, preprocessing, preprocessing_at};

use crate::graph::Graph;
use crate::shape::Shape;
use crate::{Error, Result};

/// The names that [`build`] knows, for help texts and errors.
pub const KNOWN_NETWORKS: &str = "mobilenetv2-<width>, efficientnet-lite<0..4>, mnasnet-<width>, resnet18, resnet34, \
                                  resnet50, vgg19_bn, metapruning-mbv2-105m, layermerge-mbv2-1.0-13.4, and the names of \
                                  timm, torchvision and Hugging Face such as mobilenetv2_110d, tf_efficientnet_lite0, \
                                  resnet18.tv_in1k, mobilenet_v2, mnasnet1_0, google/mobilenet_v2_1.0_224";

/// torchvision's names of networks that are called otherwise here, and timm's for the same.
const TORCHVISION: [(&str, &str); 5] = [
    ("mobilenet_v2", "mobilenetv2_100"),
    ("mnasnet0_5", "mnasnet_050"),
    ("mnasnet0_75", "mnasnet_075"),
    ("mnasnet1_0", "mnasnet_100"),
    ("mnasnet1_3", "mnasnet_130"),
];

/// The names of Hugging Face's repositories, and ours for the same.
const HUGGING_FACE: [(&str, &str); 7] = [
    ("google/mobilenet_v2_1.4_224", "tf_mobilenetv2_140"),
    ("google/mobilenet_v2_1.0_224", "tf_mobilenetv2_100"),
    ("google/mobilenet_v2_0.75_160", "tf_mobilenetv2_075"),
    ("google/mobilenet_v2_0.35_96", "tf_mobilenetv2_035"),
    ("microsoft/resnet-18", "resnet18"),
    ("microsoft/resnet-34", "resnet34"),
    ("microsoft/resnet-50", "resnet50"),
];

/// Networks of one plan, in which other projects call the parts alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// MobileNetV2.
    MobileNetV2,
    /// EfficientNet-Lite.
    EfficientNetLite,
    /// MNASNet-B1.
    MnasNet,
    /// ResNet.
    ResNet,
    /// VGG.
    Vgg,
    /// MobileNetV2 with the channels that MetaPruning found.
    MetaPruning,
    /// MobileNetV2 as LayerMerge deploys it.
    LayerMerge,
}

/// A project that publishes weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Project {
    /// timm, whose names of parameters are those of the networks here.
    Timm,
    /// torchvision.
    Torchvision,
    /// `tonylins/pytorch-mobilenet-v2`.
    Tonylins,
    /// `d-li14/mobilenetv2.pytorch`.
    DLi14,
    /// EC, `snu-mllab/Efficient-CNN-Depth-Compression`: its networks before anything is removed.
    DepthCompression,
    /// mmpretrain, formerly mmclassification.
    Mmpretrain,
    /// Hugging Face's transformers, whose MobileNetV2 pads as TensorFlow does.
    HuggingFace,
    /// The packages `efficientnet_lite_pytorch`, whose names follow EfficientNet-PyTorch.
    EfficientNetLitePytorch,
}

impl std::fmt::Display for Project {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Timm => "timm",
            Self::Torchvision => "torchvision",
            Self::Tonylins => "tonylins",
            Self::DLi14 => "d-li14",
            Self::DepthCompression => "EC",
            Self::Mmpretrain => "mmpretrain",
            Self::HuggingFace => "Hugging Face",
            Self::EfficientNetLitePytorch => "efficientnet_lite_pytorch",
        })
    }
}

/// A family reads a name: `None` when it is another family's, an error when its own is misspelt.
type Parse = fn(&str) -> Option<Result<Box<dyn Network>>>;

const FAMILIES: [Parse; 7] = [
    mobilenet_v2::parse,
    efficientnet_lite::parse,
    mnasnet::parse,
    resnet::parse,
    vgg::parse,
    channel_plan::parse,
    layer_merge::parse,
];

/// A network that a name stands for.
trait Network {
    /// Its graph, called `name`.
    fn graph(&self, name: &str, options: &NetworkOptions) -> Result<Graph>;
    /// Side in pixels of the images it was published for.
    fn image_size(&self) -> usize;
    /// What it is one of.
    fn family(&self) -> Family;
}

/// What a network is built for, beside its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkOptions {
    /// Image shape.
    pub input: Shape,
    /// Number of classes.
    pub classes: usize,
    /// Stride of the first convolution; `None` is the network's own.
    pub input_stride: Option<usize>,
    /// Stride of each stage's first block; `None` is the network's own.
    pub stage_strides: Option<Vec<usize>>,
    /// Channels of the last convolution; `None` is the network's own.
    pub head_channels: Option<usize>,
}

impl NetworkOptions {
    /// A network's own strides and head for the given image and classes.
    pub fn new(input: Shape, classes: usize) -> Self {
        Self { input, classes, input_stride: None, stage_strides: None, head_channels: None }
    }

    fn check(&self) -> Result<()> {
        if self.classes == 0 {
            return Err(Error::Config("a network needs at least one class".into()));
        }
        Ok(())
    }

    /// The stride of each stage, where a network's own are `own`.
    fn strides(&self, name: &str, own: &[usize]) -> Result<Vec<usize>> {
        match &self.stage_strides {
            Some(strides) if strides.len() != own.len() => {
                let (got, n) = (strides.len(), own.len());
                Err(Error::Config(format!("{name} has {n} stages, stage_strides lists {got}; give {n} numbers")))
            }
            Some(strides) => Ok(strides.clone()),
            None => Ok(own.to_vec()),
        }
    }
}

/// Builds a network by name, [`KNOWN_NETWORKS`].
///
/// # Errors
/// An unknown name, or options that do not fit, such as a number of stage strides other than the stages' or an image
/// smaller than a kernel.
pub fn build(name: &str, options: &NetworkOptions) -> Result<Graph> {
    let network = find(name)?;
    options.check()?;
    network.graph(name, options)
}

/// Side in pixels of the square images that a network was published for, or its weights where the name tells them.
///
/// # Errors
/// An unknown name.
pub fn image_size(name: &str) -> Result<usize> {
    let own = find(name)?.image_size();
    // Only names that tell no weights are also the names of networks.
    let tagged = preprocessing(name).filter(|_| architecture(name) != name);
    Ok(tagged.map_or(own, |known| known.shape.height))
}

/// What a network is one of.
///
/// # Errors
/// An unknown name.
pub fn family(name: &str) -> Result<Family> {
    Ok(find(name)?.family())
}

/// The name of the network that a project means by a name: two of them pad as TensorFlow does and add 1e-3 to a variance,
/// which no shape of their weights tells.
///
/// ```
/// use depthshrinker::networks::{Project, meant_by};
///
/// assert_eq!(meant_by("mobilenetv2-1.0", Project::HuggingFace), "tf_mobilenetv2-1.0");
/// assert_eq!(meant_by("mobilenet_v2", Project::Torchvision), "mobilenet_v2");
/// ```
pub fn meant_by(name: &str, project: Project) -> String {
    let own = architecture(name);
    match (project, family(name)) {
        (Project::HuggingFace, Ok(Family::MobileNetV2))
        | (Project::EfficientNetLitePytorch, Ok(Family::EfficientNetLite))
            if !own.starts_with("tf_") =>
        {
            format!("tf_{}", own.replace("efficientnet-lite", "efficientnet_lite"))
        }
        _ => name.to_owned(),
    }
}

fn find(name: &str) -> Result<Box<dyn Network>> {
    let unknown = || Err(Error::Config(format!("unknown network {name:?}; known are {KNOWN_NETWORKS}")));
    FAMILIES.iter().find_map(|parse| parse(architecture(name))).unwrap_or_else(unknown)
}

/// The name of the network behind a name that also tells its weights (`resnet18.tv_in1k`) or is another project's alone.
fn architecture(name: &str) -> &str {
    if let Some((_, own)) = HUGGING_FACE.iter().find(|(theirs, _)| *theirs == name) {
        return own;
    }
    let network = match name.split_once('.') {
        Some((network, _)) if preprocessing::is_published(name) => network,
        _ => name,
    };
    TORCHVISION.iter().find(|(theirs, _)| *theirs == network).map_or(network, |(_, own)| own)
}

/// The width of `<family>-<width>` or timm's `<family>_<width·100>`; `None` when the name is another family's.
fn width_of(name: &str, family: &str) -> Option<Result<f64>> {
    let width = match name.strip_prefix(family)?.split_at_checked(1)? {
        ("-", width) => width.parse().ok(),
        ("_", percent) => percent.parse::<u32>().ok().map(|p| f64::from(p) / 100.0),
        _ => return None,
    };
    Some(width.filter(|&width: &f64| width > 0.0 && width <= 8.0).ok_or_else(|| {
        Error::Config(format!("{name:?} has no usable width; write for example {family}-0.5 (0 < width <= 8)"))
    }))
}

/// Rounds a scaled channel count to a multiple of 8, never losing more than a tenth, as timm does.
fn round_channels(channels: f64) -> usize {
    round_to_multiple(channels, 8)
}

/// Rounds a scaled channel count to a multiple that is not 0, never losing more than a tenth.
pub fn round_to_multiple(channels: f64, multiple: usize) -> usize {
    let rounded = (((channels + (multiple / 2) as f64) / multiple as f64).floor() as usize).max(1) * multiple;
    if (rounded as f64) < 0.9 * channels { rounded + multiple } else { rounded }
}
