//! Networks by name: counts, parameter names and shapes, logits and gradients against timm, and published figures.

use std::path::Path;

use depthshrinker::config::Config;
use depthshrinker::device::Backend;
use depthshrinker::device::Device;
use depthshrinker::engine::{Engine, EngineOptions, Fusion, Plan, Target};
use depthshrinker::graph::{Graph, Op, ParamRole};
use depthshrinker::io::layout::{file_shape, from_file, nchw_to_nhwc, to_file};
use depthshrinker::measure::{Roofline, block_costs};
use depthshrinker::model::{Model, Weights};
use depthshrinker::networks::{NetworkOptions, build, image_size};
use depthshrinker::shape::Shape;
use depthshrinker::tensor::Tensor;
use serde_json::Value;
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

/// Everything between two convolutions joins the one before it, whatever the network; what is left are pools and the
/// classifier.
#[test]
fn plans_fuse_residuals_and_activations() {
    for (name, steps) in [
        ("mobilenetv2-1.0", 52 + 2),
        ("efficientnet-lite0", 49 + 2),
        ("mnasnet-1.0", 52 + 2),
        ("resnet18", 20 + 3),
        ("resnet50", 53 + 3),
        ("vgg19_bn", 18 + 7),
    ] {
        let graph = imagenet(name, 224);
        let graph = graph.without_batch_norm().unwrap().0;
        for backend in [Backend::Host, Backend::Cuda] {
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

/// Element i of the tensor of a name, as `make_network_values.py` has it: a hash in [-1, 1).
fn hashed(name: &str, len: usize) -> Vec<f64> {
    let seed = name.bytes().fold(2_166_136_261u32, |seed, byte| (seed ^ u32::from(byte)).wrapping_mul(16_777_619));
    let element = |i: usize| {
        let mut h = (i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed);
        h ^= h >> 16;
        h = h.wrapping_mul(0x7feb_352d);
        h ^= h >> 15;
        h = h.wrapping_mul(0x846c_a68b);
        h ^= h >> 16;
        f64::from(h) / 2f64.powi(31) - 1.0
    };
    (0..len).map(element).collect()
}

/// The network of a fixture's row with the weights of the formula.
fn filled(row: &Value) -> Model {
    let (name, size) = (row["name"].as_str().unwrap(), row["size"].as_u64().unwrap() as usize);
    let head_channels = name.starts_with("vgg").then_some(64);
    let options = NetworkOptions { head_channels, ..NetworkOptions::new(Shape::new(size, size, 3), CLASSES) };
    let graph = build(name, &options).unwrap();
    let mut weights = Weights::new();
    for spec in graph.params().unwrap() {
        let shape = file_shape(&spec);
        let scale = |u: f64| match spec.role {
            _ if shape.len() > 1 => u * (6.0 / shape[1..].iter().product::<usize>() as f64).sqrt(),
            ParamRole::RunningVar => 1.0 + 0.5 * u,
            ParamRole::BnWeight => 1.0 + 0.25 * u,
            _ => 0.25 * u,
        };
        let data = hashed(&spec.name, spec.len()).into_iter().map(|u| scale(u) as f32).collect();
        weights.insert(spec.name.clone(), Tensor { shape: spec.shape.clone(), data: from_file(&spec, data) });
    }
    Model::new(graph, weights).unwrap()
}

/// Images `[n, h, w, 3]` of the formula.
fn images(n: usize, size: u64) -> Vec<f32> {
    let pixels = (size * size) as usize;
    let nchw: Vec<f32> = hashed("input", n * 3 * pixels).into_iter().map(|u| u as f32).collect();
    nchw_to_nhwc(&nchw, 3, pixels)
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
            None => (Shape::new(28, 28, 1), 10),
        };
        let graph = config.network.graph(input, classes).unwrap_or_else(|e| panic!("{name}: {e}"));
        config.budget.kept(&vec![true; graph.blocks.len()]).unwrap_or_else(|e| panic!("{name}: {e}"));
        if name != "fashion-mnist" {
            assert_eq!(graph, imagenet(&name, image_size(&name).unwrap()), "{name} is the network it is called after");
        }
        seen.push(name);
    }
    for name in ["fashion-mnist", "mobilenetv2-1.0", "mobilenetv2-1.4", "efficientnet-lite0"] {
        assert!(seen.iter().any(|n| n == name), "{name}");
    }
}
