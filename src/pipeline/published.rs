//! The networks of DepthShrinker's table and of those that compared with it, and the figures that were published of them
//! (`docs/methods.md` 1.5 and 2.5). Accuracies are on ImageNet, throughputs f32.

use super::comparison::Contestant;
use crate::measure::{NetworkCase, Published};
use crate::shrink::{Mask, named_mask};

/// The rows of `bench table --preset published`, in the order of DepthShrinker's table, then those of others.
pub fn published_networks() -> Vec<Contestant> {
    let depthshrinker = DEPTHSHRINKER.iter().map(|&(name, network, selection, figures)| {
        let [top1, mflops, v100, rtx2080ti, tx2] = figures.map(Some);
        let published = Published { top1, mflops, v100, rtx2080ti, tx2 };
        Contestant { published, ..contestant(name, network, selection) }
    });
    let others = OTHERS.iter().map(|&(name, network, selection, top1)| {
        let published = Published { top1, ..Published::default() };
        Contestant { published, ..contestant(name, Some(network), selection) }
    });
    depthshrinker.chain(others).collect()
}

/// Images per second on a V100 that were published of a case of `bench network`: of the network as it is, or merged by a
/// published mask. They are of 128 images of 224 pixels.
pub fn published_on_v100(network: &str, case: &NetworkCase, mask: Option<&Mask>, batch: usize) -> Option<f64> {
    let input = case.model.graph.input_shape();
    if (batch, input.h, input.w) != (128, 224, 224) || case.training {
        return None;
    }
    let is_meant = |selection: Option<&str>| match (case.name, selection) {
        ("original", None) => true,
        ("merged", Some(name)) => mask.is_some_and(|mask| named_mask(name).is_ok_and(|named| named == *mask)),
        _ => false,
    };
    let of = |(_, known, selection, [_, _, v100, ..]): &Row| {
        (*known == Some(network) && is_meant(*selection)).then_some(*v100)
    };
    DEPTHSHRINKER.iter().find_map(of)
}

fn contestant(name: &str, network: Option<&str>, selection: Option<&str>) -> Contestant {
    let missing = match network {
        Some(_) => None,
        None => Some("its numbers of channels were never published".to_owned()),
    };
    Contestant {
        name: name.to_owned(),
        network: network.map(str::to_owned),
        selection: selection.map(str::to_owned),
        missing,
        published: Published::default(),
    }
}

/// Name, network, mask, and top-1, million operations, and images per second on a V100, an RTX 2080 Ti and a TX2. Of the
/// three accuracies of its own models the first, which comes without self-distillation.
type Row = (&'static str, Option<&'static str>, Option<&'static str>, [f64; 5]);

/// DepthShrinker's table (`images/results.png` of its repository). Its MetaPruning points are no network that MetaPruning's
/// repository has.
const DEPTHSHRINKER: [Row; 12] = [
    ("mobilenetv2-1.4", Some("mobilenetv2-1.4"), None, [75.30, 630.0, 2127.0, 1617.0, 73.0]),
    ("metapruning-1.0", None, None, [73.20, 332.0, 3159.0, 2527.0, 115.0]),
    ("ds-a", Some("mobilenetv2-1.4"), Some("mbv2-1.4-ds-a"), [74.65, 519.0, 3827.0, 2881.0, 134.0]),
    ("ds-b", Some("mobilenetv2-1.4"), Some("mbv2-1.4-ds-b"), [73.67, 502.0, 4778.0, 3356.0, 163.0]),
    ("ds-c", Some("mobilenetv2-1.4"), Some("mbv2-1.4-ds-c"), [73.38, 492.0, 4597.0, 3537.0, 159.0]),
    ("uniform-0.65", Some("mobilenetv2-0.65"), None, [67.20, 182.0, 4004.0, 3147.0, 161.0]),
    ("metapruning-0.65", None, None, [71.70, 160.0, 4336.0, 3691.0, 179.0]),
    ("ds-d", Some("mobilenetv2-1.4"), Some("mbv2-1.4-ds-d"), [72.51, 484.0, 5560.0, 3926.0, 184.0]),
    ("ds-e", Some("mobilenetv2-1.4"), Some("mbv2-1.4-ds-e"), [72.20, 474.0, 5317.0, 4175.0, 179.0]),
    ("uniform-0.35", Some("mobilenetv2-0.35"), None, [54.60, 68.0, 6266.0, 5607.0, 263.0]),
    ("metapruning-0.35", None, None, [64.50, 52.0, 7044.0, 6938.0, 377.0]),
    ("ds-f", Some("mobilenetv2-1.4"), Some("mbv2-1.4-ds-f"), [67.56, 415.0, 10804.0, 7687.0, 344.0]),
];

/// Networks of which others have published no throughput in images per second: name, network, mask, top-1.
const OTHERS: [(&str, &str, Option<&str>, Option<f64>); 20] = [
    ("mobilenetv2-1.0", "mobilenetv2-1.0", None, Some(72.89)),
    ("efficientnet-lite0", "efficientnet-lite0", None, None),
    ("metapruning-105m", "metapruning-mbv2-105m", None, None),
    ("layermerge-13.4", "layermerge-mbv2-1.0-13.4", None, Some(70.99)),
    ("ec-a", "mobilenetv2-1.0", Some("mbv2-1.0-ec-a"), None),
    ("ec-b", "mobilenetv2-1.0", Some("mbv2-1.0-ec-b"), None),
    ("ec-c", "mobilenetv2-1.0", Some("mbv2-1.0-ec-c"), None),
    ("ec-d", "mobilenetv2-1.0", Some("mbv2-1.0-ec-d"), None),
    ("ec-ar", "mobilenetv2-1.0", Some("mbv2-1.0-ec-ar"), None),
    ("ec-br", "mobilenetv2-1.0", Some("mbv2-1.0-ec-br"), None),
    ("ec-cr", "mobilenetv2-1.0", Some("mbv2-1.0-ec-cr"), None),
    ("ec-ar-aug", "mobilenetv2-1.0", Some("mbv2-1.0-ec-ar-aug"), None),
    ("ec-br-aug", "mobilenetv2-1.0", Some("mbv2-1.0-ec-br-aug"), None),
    ("ec-cr-aug", "mobilenetv2-1.0", Some("mbv2-1.0-ec-cr-aug"), None),
    ("ec-1.4-ar", "mobilenetv2-1.4", Some("mbv2-1.4-ec-ar"), None),
    ("ec-1.4-br", "mobilenetv2-1.4", Some("mbv2-1.4-ec-br"), None),
    ("ec-1.4-cr", "mobilenetv2-1.4", Some("mbv2-1.4-ec-cr"), None),
    ("ec-1.4-ar-aug", "mobilenetv2-1.4", Some("mbv2-1.4-ec-ar-aug"), None),
    ("ec-1.4-br-aug", "mobilenetv2-1.4", Some("mbv2-1.4-ec-br-aug"), None),
    ("ec-1.4-cr-aug", "mobilenetv2-1.4", Some("mbv2-1.4-ec-cr-aug"), None),
];
