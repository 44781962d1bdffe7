//! Networks by name: counts, parameter names and shapes against timm, and published figures.

use depthshrinker::graph::{Graph, Op};
use depthshrinker::io::layout::file_shape;
use depthshrinker::models::{NetworkOptions, build, image_size};
use depthshrinker::shape::Shape;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// A network for the images of its data set, ImageNet.
fn imagenet(name: &str, size: usize) -> Graph {
    build(name, &NetworkOptions::new(Shape::new(size, size, 3), 1000)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// The names and shapes of all tensors of a file, as `make_network_counts.py` digests them.
fn tensors(graph: &Graph) -> String {
    let line = |spec| (file_shape(spec), &spec.name);
    let specs = graph.params().expect("a well-formed graph");
    let mut lines: Vec<String> = specs
        .iter()
        .map(line)
        .map(|(shape, name)| {
            let shape: Vec<String> = shape.iter().map(ToString::to_string).collect();
            format!("{name}: {}", shape.join("x"))
        })
        .collect();
    lines.sort();
    Sha256::digest(lines.join("\n")).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Elements that batch-norm writes for one image.
fn batch_norm_elements(graph: &Graph) -> u64 {
    let shapes = graph.shapes().expect("a well-formed graph");
    let norms = graph.nodes.iter().zip(&shapes).filter(|(node, _)| matches!(node.op, Op::BatchNorm(_)));
    norms.map(|(_, shape)| shape.len() as u64).sum()
}

#[test]
fn counts_names_and_shapes_are_timms() {
    let rows: Vec<Value> =
        serde_json::from_str(include_str!("fixtures/network_counts.json")).expect("a committed fixture");
    for row in &rows {
        let (name, size) = (row["name"].as_str().unwrap(), row["size"].as_u64().unwrap() as usize);
        let graph = imagenet(name, size);
        let cost = graph.cost().unwrap();
        let expected = (row["macs"].as_u64().unwrap(), row["params"].as_u64().unwrap());
        assert_eq!((cost.macs(), cost.params()), expected, "{name} at {size}");
        assert_eq!(tensors(&graph), row["tensors"], "{name}: run tests/fixtures/make_network_counts.py to compare");
        let json = serde_json::to_string(&graph).unwrap();
        assert_eq!(serde_json::from_str::<Graph>(&json).unwrap(), graph);
    }
    for name in ["mobilenetv2_110d", "efficientnet_lite4", "tf_efficientnet_lite2", "mnasnet_140"] {
        let size = rows.iter().find(|row| row["name"] == name).unwrap()["size"].as_u64().unwrap();
        assert_eq!(image_size(name).unwrap() as u64, size, "{name}");
    }
}

#[test]
fn published_counts_are_reproduced() {
    // Multiply-accumulates in millions as the papers round them, at the size a network was published for.
    for (name, published, blocks) in [
        ("mobilenetv2-1.0", 300.0, 17),
        ("mobilenetv2-1.4", 585.0, 17),
        ("mnasnet-1.0", 315.0, 17),
        ("resnet18", 1814.0, 8),
        ("resnet34", 3664.0, 16),
        ("resnet50", 4089.0, 16),
        ("vgg19_bn", 19_632.0, 8),
    ] {
        let graph = imagenet(name, image_size(name).unwrap());
        let macs = graph.cost().unwrap().macs() as f64 / 1e6;
        assert!((macs / published - 1.0).abs() < 0.006, "{name}: {macs} against {published}");
        assert_eq!(graph.blocks.len(), blocks, "{name}");
    }
    // EfficientNet-Lite's counter takes batch-norm and activation as three more operations an element; that the five
    // figures agree tells the published image sizes of N = 3 and 4, which are not timm's.
    for (n, published) in [407.0, 631.0, 899.0, 1440.0, 2640.0].into_iter().enumerate() {
        let name = format!("efficientnet-lite{n}");
        let graph = imagenet(&name, image_size(&name).unwrap());
        let counted = (graph.cost().unwrap().macs() + 3 * batch_norm_elements(&graph)) as f64 / 1e6;
        assert!((counted / published - 1.0).abs() < 0.005, "{name}: {counted} against {published}");
    }
}

#[test]
fn tensorflow_pads_below_and_right() {
    let pads = |name: &str, size: usize| -> Vec<[usize; 4]> {
        let graph = imagenet(name, size);
        let strided = graph.nodes.iter().filter_map(|node| match node.op {
            Op::Conv(conv) if conv.window.stride_h == 2 => Some(conv.window),
            _ => None,
        });
        strided.map(|w| [w.pad.top, w.pad.left, w.pad.bottom, w.pad.right]).collect()
    };
    // 224 is even all the way down; 225 halves to 113, 57, 29, 15.
    assert_eq!(
        pads("tf_efficientnet_lite0", 224),
        [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 2, 2], [0, 0, 1, 1], [1, 1, 2, 2]]
    );
    assert_eq!(pads("tf_efficientnet_lite0", 225), [[1; 4], [1; 4], [2; 4], [1; 4], [2; 4]]);
    assert_eq!(pads("efficientnet_lite0", 224), [[1; 4], [1; 4], [2; 4], [1; 4], [2; 4]]);
    let eps = |name: &str| {
        imagenet(name, 224).nodes.iter().find_map(|n| match n.op {
            Op::BatchNorm(bn) => Some(bn.eps),
            _ => None,
        })
    };
    assert_eq!((eps("tf_efficientnet_lite0"), eps("efficientnet_lite0")), (Some(1e-3), Some(1e-5)));
}

#[test]
fn names_that_are_nothing_are_refused_with_what_is_known() {
    for (name, says) in [
        (
            "resnet-9000",
            vec!["mobilenetv2-<width>", "efficientnet-lite<0..4>", "mnasnet-<width>", "resnet50", "vgg19_bn"],
        ),
        ("resnet101", vec!["resnet34"]),
        ("", vec!["mobilenetv2-<width>"]),
        ("mobilenetv2-wide", vec!["mobilenetv2-0.5"]),
        ("mobilenetv2_-1", vec!["mobilenetv2-0.5"]),
        ("mnasnet-99", vec!["mnasnet-0.5"]),
        ("mnasnet-NaN", vec!["mnasnet-0.5"]),
        ("efficientnet-lite5", vec!["efficientnet-lite4"]),
        ("tf_efficientnet_lite", vec!["efficientnet-lite4"]),
        ("efficientnet_lite00", vec!["efficientnet-lite4"]),
    ] {
        let options = NetworkOptions::new(Shape::new(224, 224, 3), 1000);
        let error = build(name, &options).unwrap_err().to_string();
        assert!(!error.contains('\n') && says.iter().all(|part| error.contains(part)), "{name:?}: {error}");
        assert!(image_size(name).is_err());
    }
    let options = |strides: &[usize], size: usize, classes: usize| NetworkOptions {
        stage_strides: Some(strides.to_vec()),
        ..NetworkOptions::new(Shape::new(size, size, 3), classes)
    };
    for name in ["tf_efficientnet_lite0", "efficientnet-lite1", "mobilenetv2-0.35", "mnasnet_050"] {
        assert!(build(name, &options(&[1, 2], 64, 10)).unwrap_err().to_string().contains("7 stages"));
        assert!(build(name, &options(&[0; 7], 64, 10)).is_err());
        assert!(build(name, &options(&[1; 7], 0, 10)).is_err());
        assert!(build(name, &options(&[1; 7], 64, 0)).is_err());
    }
}
