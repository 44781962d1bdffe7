//! Networks by name: counts, parameter names and shapes, logits and gradients against timm, and published figures.

mod formula;

use std::collections::BTreeSet;
use std::path::Path;

use depthshrinker::config::Config;
use depthshrinker::device::Backend;
use depthshrinker::device::Device;
use depthshrinker::engine::{Engine, EngineOptions, Fusion, Plan, Target};
use depthshrinker::graph::{ChainConv, Graph, Interval, Op};
use depthshrinker::io::layout::{file_shape, nchw_to_nhwc, to_file};
use depthshrinker::measure::{Roofline, block_costs};
use depthshrinker::model::Model;
use depthshrinker::networks::{BlockChannels, ChannelPlan, METAPRUNING_GENES, NetworkOptions, build, image_size};
use depthshrinker::shape::Shape;
use depthshrinker::shrink::published_names;
use formula::hashed;
use formula::published::{self, Case};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Classes of the networks whose values are compared.
const CLASSES: usize = 10;

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

/// Names that tell weights, and torchvision's, stand for the networks of those weights.
#[test]
fn names_of_weights_are_names_of_networks() {
    let as_built = |name: &str, size: usize| Graph { name: String::new(), ..imagenet(name, size) };
    for (name, network, size) in [
        ("mobilenetv2_140.ra_in1k", "mobilenetv2-1.4", 224),
        ("resnet18.tv_in1k", "resnet18", 224),
        ("resnet50.IMAGENET1K_V2", "resnet50", 224),
        ("resnet50.a1h_in1k", "resnet50", 176),
        ("mobilenet_v2", "mobilenetv2-1.0", 224),
        ("mobilenet_v2.IMAGENET1K_V1", "mobilenetv2-1.0", 224),
        ("mnasnet0_75", "mnasnet-0.75", 224),
        ("mnasnet1_3.IMAGENET1K_V1", "mnasnet-1.3", 224),
        ("tf_efficientnet_lite3.in1k", "tf_efficientnet_lite3", 300),
    ] {
        assert_eq!(as_built(name, size), as_built(network, size), "{name}");
        assert_eq!(image_size(name).unwrap(), size, "{name}");
    }
    for name in ["resnet18.none", "mobilenet_v3", "mnasnet0_9", "resnet18d.ra2_in1k", "mobilenet_v2.IMAGENET1K_V3"] {
        assert!(image_size(name).unwrap_err().to_string().contains("unknown network"), "{name}");
    }
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
        ("metapruning-mbv2-140m", vec!["metapruning-mbv2-105m"]),
        ("layermerge-mbv2-1.4-18.0", vec!["layermerge-mbv2-1.0-13.4"]),
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
    for name in [
        "tf_efficientnet_lite0",
        "efficientnet-lite1",
        "mobilenetv2-0.35",
        "mnasnet_050",
        "metapruning-mbv2-105m",
        "layermerge-mbv2-1.0-13.4",
    ] {
        assert!(build(name, &options(&[1, 2], 64, 10)).unwrap_err().to_string().contains("7 stages"));
        assert!(build(name, &options(&[0; 7], 64, 10)).is_err());
        assert!(build(name, &options(&[1; 7], 0, 10)).is_err());
        assert!(build(name, &options(&[1; 7], 64, 0)).is_err());
    }
}

/// Everything between two convolutions joins the one before it, whatever the network; what is left are pools and the
/// classifier. On the host inverted residuals are one step each.
#[test]
fn plans_fuse_residuals_and_activations() {
    // A GPU takes those blocks as one step whose window is 3x3, with at most 192 hidden channels; the host takes all.
    for (name, steps, in_blocks) in [
        ("mobilenetv2-1.0", 52 + 2 - 1 - 6 * 2, 1 + 17 + 1 + 2),
        ("efficientnet-lite0", 49 + 2 - 1 - 2 * 2, 1 + 16 + 1 + 2),
        ("mnasnet-1.0", 52 + 2 - 1 - 3 * 2, 1 + 17 + 1 + 2),
        ("resnet18", 20 + 3, 20 + 3),
        ("resnet50", 53 + 3, 53 + 3),
        ("vgg19_bn", 18 + 7, 18 + 7),
    ] {
        let graph = imagenet(name, 224);
        let graph = graph.without_batch_norm().unwrap().0;
        for (backend, steps) in [(Backend::Host, in_blocks), (Backend::Cuda, steps)] {
            let plan = Plan::new(&graph, &Target::inference(backend)).unwrap();
            assert_eq!(plan.steps.len(), steps, "{name}");
            let alone = plan.steps.iter().find(|s| ["add", "activation"].contains(&s.step.describe().as_str()));
            assert!(alone.is_none(), "{name}: {alone:?}");
        }
    }
}

/// What merging a block would cost follows the chain of its convolutions, not its projection.
#[test]
fn blocks_with_projections_have_their_merged_cost() {
    // So slow at arithmetic that nothing else counts, and a FLOP a second.
    let roofline = Roofline { bandwidth: 1e30, matrix_flops: 1.0, vector_flops: 1.0, element_bytes: 4 };
    let costs = block_costs(&imagenet("resnet18", 224), 1, &roofline).unwrap();
    let dense = |k: f64, c_in: f64, c_out: f64, size: f64| 2.0 * k * k * c_in * c_out * size * size;
    assert_eq!(costs[0].after, dense(5.0, 64.0, 64.0, 56.0));
    assert_eq!(costs[2].after, dense(7.0, 64.0, 128.0, 28.0));
    assert_eq!(costs[2].before, dense(3.0, 64.0 + 128.0, 128.0, 28.0) + dense(1.0, 64.0, 128.0, 28.0));
}

/// The network of a fixture's row with the weights of the formula.
fn filled(row: &Value) -> Model {
    let (name, size) = (row["name"].as_str().unwrap(), row["size"].as_u64().unwrap() as usize);
    let head_channels = name.starts_with("vgg").then_some(64);
    let options = NetworkOptions { head_channels, ..NetworkOptions::new(Shape::new(size, size, 3), CLASSES) };
    formula::filled(build(name, &options).unwrap())
}

/// Images `[n, h, w, 3]` of the formula.
fn images(n: usize, size: u64) -> Vec<f32> {
    let side = size as usize;
    nchw_to_nhwc(&formula::images(n, side), 3, side * side)
}

fn engine(model: &Model, batch: usize, fusion: Fusion, training: bool) -> Engine {
    Engine::new(&Device::Cpu, model, &EngineOptions { batch, fusion, training, taps: Vec::new() }).unwrap()
}

fn run(engine: &mut Engine, images: &[f32], n: usize) -> Vec<f64> {
    let mut logits = vec![0.0; n * CLASSES];
    engine.forward(images).unwrap().read(&mut logits).unwrap();
    logits.into_iter().map(f64::from).collect()
}

fn values() -> Value {
    serde_json::from_str(include_str!("fixtures/network_values.json")).expect("a committed fixture")
}

#[test]
fn logits_are_pytorchs() {
    for row in values()["logits"].as_array().unwrap() {
        let model = filled(row);
        let images = images(2, row["size"].as_u64().unwrap());
        let expected: Vec<f64> = row["logits"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        let scale = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        for fusion in [Fusion::OnLoad, Fusion::PerNode] {
            let got = run(&mut engine(&model, 2, fusion, false), &images, 2);
            let worst = got.iter().zip(&expected).map(|(g, e)| (g - e).abs()).fold(0.0, f64::max) / scale;
            assert!(worst <= 1e-4, "{} {fusion:?}: logits differ by {worst:.1e} of their scale", row["name"]);
        }
    }
}

/// The convolutions of a network, as the fixture lists them.
fn convs(graph: &Graph) -> Value {
    let shape = |op: &Op| match op {
        Op::Conv(c) => Some(json!([c.c_in, c.c_out, c.window.k_h, c.window.stride_h, c.groups])),
        _ => None,
    };
    graph.nodes.iter().filter_map(|node| shape(&node.op)).collect()
}

#[test]
fn published_networks_and_masks_give_pytorchs_logits() {
    let mut masks = BTreeSet::new();
    for row in published::rows("networks").iter().chain(&published::rows("masks")) {
        for Case { what, side, model, logits } in published::cases(row) {
            if let Some(mask) = row["mask"].as_str() {
                masks.insert(mask.to_owned());
                let cost = model.graph.cost().unwrap();
                assert_eq!(
                    (json!(cost.macs()), json!(cost.params())),
                    (row["macs"].clone(), row["params"].clone()),
                    "{what}"
                );
                assert_eq!(convs(&model.graph), row["convs"], "{what}");
            }
            let images = images(published::IMAGES, side as u64);
            let scale = logits.iter().fold(0.0f64, |m, v| m.max(v.abs()));
            for fusion in [Fusion::OnLoad, Fusion::PerNode] {
                let got = run(&mut engine(&model, published::IMAGES, fusion, false), &images, published::IMAGES);
                let worst = got.iter().zip(&logits).map(|(g, e)| (g - e).abs()).fold(0.0, f64::max) / scale;
                eprintln!("{what} {fusion:?}: {worst:.1e}");
                assert!(worst <= 1e-4, "{what} {fusion:?}: logits differ by {worst:.1e} of their scale");
            }
        }
    }
    assert!(
        published_names().filter(|name| name.contains("-ec-")).all(|name| masks.contains(name)),
        "a mask without a row"
    );
}

#[test]
fn published_networks_have_their_published_counts() {
    for row in published::rows("networks") {
        let name = row["name"].as_str().unwrap();
        let cost = imagenet(name, image_size(name).unwrap()).cost().unwrap();
        assert_eq!((json!(cost.macs()), json!(cost.params())), (row["macs"].clone(), row["params"].clone()), "{name}");
    }
    // In millions, as the paper's table gives the network that the repository evaluates.
    let cost = imagenet("metapruning-mbv2-105m", 224).cost().unwrap();
    assert_eq!((cost.macs(), (cost.macs() as f64 / 1e6).round()), (104_870_557, 105.0));
    // What MetaPruning's own counter printed of an encoding (its issue 35): it takes an operation for each element that goes
    // into a batch-norm and into the pool and for each bias of the classifier. Two places behind the point tell every channel.
    let printed = [
        18, 23, 18, 18, 28, 28, 28, 27, 27, 27, 27, 2, 2, 2, 12, 12, 12, 15, 4, 12, 25, 23, 20, 14, 24, 8, 19, 26, 2,
        10, 24, 16, 6, 26, 10,
    ];
    let options = NetworkOptions::new(Shape::new(224, 224, 3), 1000);
    let graph = ChannelPlan::metapruning(&printed).unwrap().graph("printed", &options).unwrap();
    let counted = graph.cost().unwrap().macs() + batch_norm_elements(&graph) + 1280 * 49 + 1000;
    assert_eq!((counted as f64 / 1e4).round() / 100.0, 207.98);
}

/// The network that LayerMerge deploys is what its solution makes of MobileNetV2: each run of convolutions between two
/// positions that keep their activation, without the pruned ones, is one convolution; a sum is left where a block is.
#[test]
fn layer_merges_network_follows_from_its_solution() {
    let activations: Vec<usize> = [0, 5, 8, 11, 14].into_iter().chain(17..=35).chain(38..=50).collect();
    let original = imagenet("mobilenetv2-1.0", 224);
    let positions = original.positions().unwrap();
    let merged = activations.windows(2).map(|ends| {
        let at = Interval { st: ends[0], end: ends[1] };
        let stays = |(i, _): &(usize, &ChainConv)| ![1, 7, 13, 37].contains(&(at.st + i + 1));
        let convs: Vec<&ChainConv> = positions.convs_in(at).iter().enumerate().filter(stays).map(|(_, c)| c).collect();
        let (first, last) = (convs[0].conv, convs[convs.len() - 1].conv);
        let kernel = 1 + convs.iter().map(|c| c.kernel() - 1).sum::<usize>();
        let stride: usize = convs.iter().map(|c| c.conv.window.stride_h).product();
        let groups = if convs.iter().all(|c| c.is_depthwise()) { first.c_in } else { 1 };
        json!([first.c_in, last.c_out, kernel, stride, groups])
    });
    let ends = [json!([3, 32, 3, 2, 1]), json!([320, 1280, 1, 1, 1])];
    let [stem, head] = ends;
    let expected: Value = std::iter::once(stem).chain(merged).chain([head]).collect();
    let graph = imagenet("layermerge-mbv2-1.0-13.4", 224);
    assert_eq!(convs(&graph), expected);
    let sums: Vec<&str> = graph.nodes.iter().filter(|n| n.op == Op::Add).map(|n| n.name.as_str()).collect();
    let blocks = ["3.1", "3.2", "3.3", "4.1", "5.1", "5.2"].map(|block| format!("blocks.{block}.add"));
    assert_eq!(sums, blocks);
    assert!(graph.nodes.iter().all(|n| !matches!(n.op, Op::BatchNorm(_))), "batch-norms are in the biases");
    // Where stages stride otherwise, so do the convolutions that stand for them.
    let strides = Some(vec![2, 1, 1, 2, 1, 2, 1]);
    let options = NetworkOptions { stage_strides: strides, ..NetworkOptions::new(Shape::new(64, 64, 3), CLASSES) };
    let strided = convs(&build("layermerge-mbv2-1.0-13.4", &options).unwrap());
    assert_eq!((&strided[1], &strided[3]), (&json!([32, 24, 3, 2, 1]), &json!([24, 32, 3, 1, 1])));
}

#[test]
fn channel_plans_follow_their_list() {
    let options = NetworkOptions::new(Shape::new(65, 64, 3), CLASSES);
    let mut plan = ChannelPlan::mobilenet_v2();
    plan.stem = 20;
    plan.blocks[0] = BlockChannels { hidden: Some(7), out: 20 };
    plan.blocks[1] = BlockChannels { hidden: None, out: 11 };
    plan.head = 33;
    let graph = plan.graph("mine", &options).unwrap();
    let found = convs(&graph);
    // The second block has no expansion, and the first adds its input now that it has as many channels.
    let first =
        [[3, 20, 3, 2, 1], [20, 7, 1, 1, 1], [7, 7, 3, 1, 7], [7, 20, 1, 1, 1], [20, 20, 3, 2, 20], [20, 11, 1, 1, 1]];
    assert_eq!(found.as_array().unwrap()[..6], first.map(|conv| json!(conv)));
    assert_eq!(found.as_array().unwrap().last(), Some(&json!([320, 33, 1, 1, 1])));
    assert!(graph.nodes.iter().any(|node| node.name == "blocks.0.0.add"));
    assert_eq!((graph.name.as_str(), graph.blocks.len(), graph.sites()), ("mine", 17, 18));

    let refused = |plan: &ChannelPlan, options: &NetworkOptions| plan.graph("mine", options).unwrap_err().to_string();
    plan.blocks[4].out = 0;
    assert!(refused(&plan, &options).contains("blocks.2.1.conv_pwl"));
    plan.blocks[4].out = usize::MAX;
    assert!(refused(&plan, &options).contains("unreasonably large"));
    let plan = ChannelPlan::mobilenet_v2();
    assert!(refused(&plan, &NetworkOptions { classes: 0, ..options.clone() }).contains("at least one class"));
    assert!(refused(&plan, &NetworkOptions { stage_strides: Some(vec![1]), ..options }).contains("7 stages"));
    let error = ChannelPlan::metapruning(&[31; METAPRUNING_GENES]).unwrap_err().to_string();
    assert!(error.contains("from 0 to 30"), "{error}");
    // All channels are the widest network's.
    let widest = ChannelPlan::metapruning(&[30; METAPRUNING_GENES]).unwrap();
    assert_eq!((widest.stem, widest.blocks[0], widest.blocks[16].hidden), (44, block(44, 22), Some(1344)));
}

fn block(hidden: usize, out: usize) -> BlockChannels {
    BlockChannels { hidden: Some(hidden), out }
}

/// Loss and every gradient of a training step. A gradient is told by its product with a fixed tensor, in units of its norm.
/// PyTorch's own f32 is up to 6e-3 off where roundings carry a value over the kink of an activation.
#[test]
fn training_steps_are_pytorchs() {
    const BATCH: usize = 8;
    for row in values()["training"].as_array().unwrap() {
        let model = filled(row);
        let images = images(BATCH, row["size"].as_u64().unwrap());
        for fusion in [Fusion::OnLoad, Fusion::PerNode] {
            let mut engine = engine(&model, BATCH, fusion, true);
            let logits = run(&mut engine, &images, BATCH);
            let (mut loss, mut gradient) = (0.0, Vec::new());
            for (label, row) in logits.chunks(CLASSES).enumerate() {
                let sum: f64 = row.iter().map(|v| v.exp()).sum();
                loss += (sum.ln() - row[label]) / BATCH as f64;
                let target = |class: usize| f64::from(u8::from(class == label));
                gradient.extend((0..CLASSES).map(|c| ((row[c].exp() / sum - target(c)) / BATCH as f64) as f32));
            }
            let expected = row["loss"].as_f64().unwrap();
            assert!((loss / expected - 1.0).abs() < 1e-5, "{} {fusion:?}: loss {loss}, {expected}", row["name"]);
            engine.backward(&Device::Cpu.upload(&gradient).unwrap()).unwrap();
            let norm = |name: &str| row["gradients"][name][0].as_f64().unwrap();
            let gradients = row["gradients"].as_object().unwrap();
            let largest = gradients.keys().map(|name| norm(name)).fold(0.0, f64::max);
            for (id, range) in engine.trainable_ranges().to_vec() {
                let spec = engine.params()[id].clone();
                let got = to_file(&spec, engine.trainable().1.view(range).host());
                let direction = hashed(&format!("d {}", spec.name), got.len());
                let product: f64 = got.iter().zip(&direction).map(|(g, d)| f64::from(*g) * d).sum();
                let expected = gradients[&spec.name][1].as_f64().unwrap();
                // A bias in front of a batch-norm has no gradient but roundings.
                let error = (product - expected).abs() / norm(&spec.name).max(1e-3 * largest);
                assert!(error < 2e-2, "{} {fusion:?} {}: {product}, expected {expected}", row["name"], spec.name);
            }
        }
    }
}

/// Every recipe reads, passes its checks and names a network that can be built for its images.
#[test]
fn recipes_read_and_build() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let mut seen = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let config = Config::read(&path).unwrap_or_else(|e| panic!("{e}"));
        config.check().unwrap_or_else(|e| panic!("{name}: {e}"));
        let (input, classes) = match config.data.image_size {
            Some(size) => (Shape::new(size, size, 3), 1000),
            None if config.data.name.starts_with("signals:") => (Shape::new(1, 187, 1), 5),
            None => (Shape::new(28, 28, 1), 10),
        };
        let graph = config.network.graph(input, classes).unwrap_or_else(|e| panic!("{name}: {e}"));
        if !config.budget.is_time() {
            config.budget.kept(&vec![true; graph.blocks.len()]).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        if config.data.name == "imagenet" {
            assert_eq!(graph, imagenet(&name, image_size(&name).unwrap()), "{name} is the network it is called after");
        }
        seen.push(name);
    }
    for name in [
        "arrhythmia-1d",
        "pathology-patches",
        "driver-distraction",
        "fashion-mnist",
        "mobilenetv2-1.0",
        "mobilenetv2-1.4",
        "efficientnet-lite0",
    ] {
        assert!(seen.iter().any(|n| n == name), "{name}");
    }
}
