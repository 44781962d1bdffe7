//! How the images of published networks are made. `data/imagenet/make.py` wrote the table from timm and torchvision.

use super::{Family, HUGGING_FACE, Project, TORCHVISION, architecture, family, width_of};
use crate::data::{ImageShape, Interpolation, Normalisation, Preprocessing, Resize};

const TABLE: &str = include_str!("../../data/imagenet/preprocessing.tsv");

/// How images are made for a network's published weights, by timm's name, with or without a tag for the weights
/// (`resnet18`, `resnet18.tv_in1k`), by torchvision's (`mobilenet_v2`, `resnet50.IMAGENET1K_V2`), by that of a repository of
/// Hugging Face (`google/mobilenet_v2_1.0_224`) or by one of our own (`mobilenetv2-1.4`). `None` for a name that is none of them.
///
/// ```
/// use depthshrinker::networks::preprocessing;
///
/// let known = preprocessing("tf_efficientnet_lite1").expect("timm has it");
/// assert_eq!((known.shape.height, known.resize.shorter_side), (240, 272));
/// assert_eq!(known.normalisation.mean, [0.5; 3]);
/// ```
pub fn preprocessing(network: &str) -> Option<Preprocessing> {
    find(network).map(|(known, _)| known)
}

/// As [`preprocessing`], for inputs of another size: the picture is resized so that the cut keeps its share, to a whole
/// number of pixels as timm rounds it.
pub fn preprocessing_at(network: &str, size: usize) -> Option<Preprocessing> {
    let (known, crop) = find(network)?;
    let mut scaled = known.at(size);
    if let Some(crop) = crop {
        scaled.resize.shorter_side = (size as f64 / crop).floor() as usize;
    }
    Some(scaled)
}

/// The name under which [`preprocessing`] knows a project's default weights of a network; of a name that tells its
/// weights, the name itself.
///
/// ```
/// use depthshrinker::networks::{Project, default_weights};
///
/// assert_eq!(default_weights("mobilenetv2-1.0", Project::Torchvision), "mobilenet_v2");
/// assert_eq!(default_weights("resnet18", Project::Torchvision), "resnet18.IMAGENET1K_V1");
/// assert_eq!(default_weights("resnet18.tv_in1k", Project::Timm), "resnet18.tv_in1k");
/// ```
pub fn default_weights(network: &str, project: Project) -> String {
    let name = architecture(network);
    if name != network {
        return network.to_owned();
    }
    match (project, family(name)) {
        (Project::HuggingFace, Ok(Family::MobileNetV2)) => hugging_face_mobilenet(name),
        (Project::HuggingFace, Ok(Family::ResNet)) => name.replace("resnet", "microsoft/resnet-"),
        // These cut 224 of 256 pixels, resized linearly, and normalise, all as torchvision did first.
        (
            Project::Torchvision | Project::Tonylins | Project::DLi14 | Project::DepthCompression | Project::Mmpretrain,
            Ok(Family::MobileNetV2),
        ) => "mobilenet_v2".into(),
        (Project::Torchvision, Ok(Family::MnasNet)) => {
            let width = |name: &str| width_of(name, "mnasnet").and_then(Result::ok);
            TORCHVISION
                .iter()
                .find(|(_, own)| width(own) == width(name))
                .map_or("mnasnet1_0", |(theirs, _)| theirs)
                .into()
        }
        (Project::Torchvision | Project::DepthCompression | Project::Mmpretrain, Ok(Family::ResNet | Family::Vgg)) => {
            format!("{name}.IMAGENET1K_V1")
        }
        (Project::EfficientNetLitePytorch, Ok(Family::EfficientNetLite)) if !name.starts_with("tf_") => {
            format!("tf_{}", published(name))
        }
        _ => published(name),
    }
}

/// The repository of this width, or else of width 1.
fn hugging_face_mobilenet(name: &str) -> String {
    let width = |name: &str| width_of(name.strip_prefix("tf_").unwrap_or(name), "mobilenetv2").and_then(Result::ok);
    let mobilenets = || HUGGING_FACE.iter().filter(|(_, own)| own.starts_with("tf_"));
    let same = mobilenets().find(|(_, own)| width(own) == width(name));
    same.or_else(|| mobilenets().find(|(_, own)| width(own) == Some(1.0))).map_or(name, |(theirs, _)| theirs).to_owned()
}

/// Whether weights are published under exactly this name.
pub(super) fn is_published(name: &str) -> bool {
    rows().any(|(known, _)| known == name)
}

fn rows() -> impl Iterator<Item = (&'static str, &'static str)> {
    TABLE.lines().filter_map(|line| line.split_once('\t'))
}

/// A row, with the share of the resized picture that is cut out where the project says so: timm's `crop_pct`.
fn find(network: &str) -> Option<(Preprocessing, Option<f64>)> {
    let name = published(network);
    rows().find(|(known, _)| *known == name).and_then(|(_, cells)| row(cells.split('\t')))
}

/// The published name behind one of our own: all widths of MobileNetV2 are alike, and of MNASNet. MetaPruning and LayerMerge
/// evaluate on what torchvision cut first.
fn published(name: &str) -> String {
    if is_published(name) || family(name).is_err() {
        return name.to_owned();
    }
    if name.starts_with("tf_mobilenetv2") {
        return hugging_face_mobilenet(name);
    }
    match name.split_once(['-', '_']) {
        Some(("mobilenetv2", _)) => "mobilenetv2_100".to_owned(),
        Some(("mnasnet", _)) => "mnasnet_100".to_owned(),
        Some(("metapruning" | "layermerge", _)) => "mobilenet_v2".to_owned(),
        _ => name.replace("efficientnet-lite", "efficientnet_lite"),
    }
}

fn row<'a>(mut cells: impl Iterator<Item = &'a str>) -> Option<(Preprocessing, Option<f64>)> {
    let side = cells.next()?.parse().ok()?;
    let shorter_side = cells.next()?.parse().ok()?;
    let interpolation = match cells.next()? {
        "bilinear" => Interpolation::Bilinear,
        "bicubic" => Interpolation::Bicubic,
        _ => return None,
    };
    let mut channels = || {
        let values: Vec<f32> = cells.next()?.split(',').map(str::parse).collect::<Result<_, _>>().ok()?;
        if values.len() == 1 { Some(vec![values[0]; 3]) } else { Some(values) }
    };
    let preprocessing = Preprocessing {
        shape: ImageShape { height: side, width: side, channels: 3 },
        resize: Resize { shorter_side, interpolation },
        normalisation: Normalisation { mean: channels()?, std: channels()? },
    };
    let crop = cells.next().map(str::parse).transpose().ok()?;
    Some((preprocessing, crop))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_whole_and_names_are_unique() {
        let names: Vec<&str> = TABLE.lines().map(|line| line.split('\t').next().unwrap()).collect();
        for (i, name) in names.iter().enumerate() {
            assert!(!names[..i].contains(name), "{name} twice");
            let known = preprocessing(name).unwrap_or_else(|| panic!("{name} cannot be read"));
            known.check().unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }

    #[test]
    fn names_of_all_three_kinds_are_known_and_others_are_not() {
        for (name, side, shorter_side, interpolation) in [
            ("mobilenetv2_140", 224, 256, Interpolation::Bicubic),
            ("mobilenetv2-0.35", 224, 256, Interpolation::Bicubic),
            ("mobilenet_v2.IMAGENET1K_V2", 224, 232, Interpolation::Bilinear),
            ("efficientnet-lite4", 380, 412, Interpolation::Bicubic),
            ("tf_efficientnet_lite4", 380, 413, Interpolation::Bilinear),
            ("resnet18", 224, 235, Interpolation::Bicubic),
            ("resnet18.tv_in1k", 224, 256, Interpolation::Bilinear),
            ("vgg19_bn", 224, 256, Interpolation::Bilinear),
            ("google/mobilenet_v2_0.75_160", 160, 192, Interpolation::Bilinear),
            ("tf_mobilenetv2-1.0", 224, 256, Interpolation::Bilinear),
            ("microsoft/resnet-34", 224, 256, Interpolation::Bicubic),
            ("metapruning-mbv2-105m", 224, 256, Interpolation::Bilinear),
            ("layermerge-mbv2-1.0-13.4", 224, 256, Interpolation::Bilinear),
        ] {
            let known = preprocessing(name).unwrap();
            assert_eq!((known.shape.height, known.shape.width), (side, side), "{name}");
            assert_eq!(known.resize, Resize { shorter_side, interpolation }, "{name}");
        }
        for name in ["", "resnet", "resnet18.none", "mobilenetv2", "resnet18\t224"] {
            assert_eq!(preprocessing(name), None, "{name}");
        }
    }
}
