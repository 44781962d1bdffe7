//! The engine: the fused plan against the reference plan, and both against PyTorch.

#[allow(dead_code, reason = "this test needs the comparisons, not the operations")]
mod reference;

use depthshrinker::config::Config;
use depthshrinker::device::{Device, View, ViewMut};
use depthshrinker::engine::{Engine, EngineOptions, Fusion, Plan, Target};
use depthshrinker::graph::{ConvFamily, NodeId, Op, ParamRole};
use depthshrinker::io::layout;
use depthshrinker::io::tensors::{TensorFile, read_tensors};
use depthshrinker::model::{Model, Weights};
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::ops::conv::{self, ConvGradient, ConvInput, ConvProblem, GradientsOut};
use depthshrinker::ops::epilogue::{BiasOperand, Epilogue};
use depthshrinker::ops::step::Backend;
use depthshrinker::pipeline::fully_merged;
use depthshrinker::shape::{Padding, Shape, Window};
use depthshrinker::shrink::LayerChoice;
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, prepare_finetune};
use depthshrinker::tensor::Tensor;
use reference::{compare, numbers, widen};

const CLASSES: usize = 10;

/// The network of `tests/fixtures/make_fixtures.py`.
fn tiny_graph() -> depthshrinker::graph::Graph {
    let options = NetworkOptions {
        input_stride: Some(1),
        stage_strides: Some(vec![1, 2, 2, 2, 1, 2, 1]),
        head_channels: Some(64),
        ..NetworkOptions::new(Shape::new(20, 28, 1), CLASSES)
    };
    build("mobilenetv2-0.25", &options).expect("the fixture's network")
}

fn engine(model: &Model, batch: usize, fusion: Fusion, training: bool) -> Engine {
    let options = EngineOptions { batch, fusion, training, taps: Vec::new() };
    Engine::new(&Device::Cpu, model, &options).expect("the network can be planned")
}

/// Softmax cross-entropy with label smoothing: mean loss, and the gradient of the logits.
fn cross_entropy(logits: &[f32], labels: &[usize], smoothing: f64) -> (f64, Vec<f32>) {
    let n = labels.len() as f64;
    let (mut loss, mut gradient) = (0.0, Vec::new());
    for (row, &label) in logits.chunks_exact(CLASSES).zip(labels) {
        let row = widen(row);
        let max = row.iter().fold(f64::MIN, |a, b| a.max(*b));
        let sum: f64 = row.iter().map(|v| (v - max).exp()).sum();
        for (class, v) in row.iter().enumerate() {
            let target = smoothing / CLASSES as f64 + if class == label { 1.0 - smoothing } else { 0.0 };
            let log_p = v - max - sum.ln();
            loss -= target * log_p / n;
            gradient.push(((log_p.exp() - target) / n) as f32);
        }
    }
    (loss, gradient)
}

fn logits(engine: &mut Engine, images: &[f32], n: usize) -> Vec<f32> {
    let mut out = vec![0.0; n * CLASSES];
    engine.forward(images).expect("a batch that fits").read(&mut out).expect("host memory");
    out
}

/// One plain SGD step on one batch; returns the loss.
fn step(engine: &mut Engine, images: &[f32], labels: &[usize], lr: f32) -> f64 {
    let (loss, gradient) = cross_entropy(&logits(engine, images, labels.len()), labels, 0.1);
    engine.backward(&Device::Cpu.upload(&gradient).expect("host memory")).expect("a training engine");
    let (values, gradients) = engine.trainable();
    let len = values.len();
    let (values, gradients) = (values.view_mut(0..len).host(), gradients.view(0..len).host());
    values.iter_mut().zip(gradients.iter()).for_each(|(v, g)| *v -= lr * g);
    loss
}

#[test]
fn the_fused_plan_trains_as_the_reference_plan_does() {
    let model = Model::initialise(tiny_graph(), 3).expect("a well-formed graph");
    trains_alike(&model, 8, 50);
    // Values so large that they are written past the caches.
    trains_alike(&model, 32, 6);
}

/// The same where segments go over blocks, their padding at the front and the shortcuts within cut to size.
#[test]
fn shortcuts_that_are_cut_train_alike() {
    let model = Model::initialise(tiny_graph(), 3).expect("a well-formed graph");
    let positions = model.graph.positions().expect("a network with blocks");
    let mut boundaries = vec![0];
    while let Some(&st) = boundaries.last().filter(|st| **st < positions.depth()) {
        let longest = positions.segments().filter(|at| at.st == st && at.len() <= 6).map(|at| at.end).max();
        boundaries.push(longest.expect("single convolutions are segments"));
    }
    let choice = LayerChoice { activations: &boundaries[1..], boundaries: &boundaries, pruned: &[] };
    let selection = choice.selection(&model.graph, &positions).expect("segments");
    let surgery = Linearise { final_activation: true, padding: PaddingMode::Reorder };
    let prepared = prepare_finetune(&model, &selection, &surgery).expect("exact segments");
    let cuts = prepared.graph.nodes.iter().filter(|node| matches!(node.op, Op::Pad(_))).count();
    assert!(cuts >= 5, "{cuts} shortcuts");
    trains_alike(&prepared, 8, 15);
}

fn trains_alike(model: &Model, n: usize, steps: u64) {
    let len = model.graph.input_shape().len();
    let mut engines = [Fusion::PerNode, Fusion::OnLoad].map(|fusion| engine(model, n, fusion, true));
    assert!(engines[1].plan().steps.len() * 2 < engines[0].plan().steps.len(), "the fused plan fuses");
    assert!(engines[1].planned_bytes() < engines[0].planned_bytes(), "and needs less memory");
    let mut alike = 0;
    for at in 0..steps {
        let images = numbers(at, n * len);
        let labels: Vec<usize> = (0..n).map(|i| (i * 3 + at as usize) % CLASSES).collect();
        // Some blocks without their activations, changing from step to step, as in the search.
        let slopes: Vec<f32> = (0..model.graph.sites()).map(|b| f32::from((b as u64 + at).is_multiple_of(3))).collect();
        let [reference, fused] = engines.each_mut().map(|engine| {
            engine.set_slopes(&slopes).expect("one slope per site");
            engine.collect_score_gradients(true);
            let loss = step(engine, &images, &labels, 0.02);
            (loss, engine.score_gradients().expect("host memory"))
        });
        assert!((reference.0 - fused.0).abs() <= 1e-4, "step {at}: losses {} and {}", reference.0, fused.0);
        compare(&format!("step {at}: score gradients"), &fused.1, &widen(&reference.1), 0.1).unwrap();
        alike += usize::from(compare("score gradients", &fused.1, &widen(&reference.1), 1e-3).is_ok());
        assert!(reference.1.iter().any(|s| *s != 0.0));
        // A small batch multiplies the last digits of weights by ten thousand: each step starts from the same ones.
        let [reference, fused] = engines.each_mut().map(|engine| engine.trainable());
        let len = reference.0.len();
        fused.0.view_mut(0..len).host().copy_from_slice(reference.0.view(0..len).host());
    }
    // In others a value lies so close to a bound of its activation that rounding takes it to the other side; weights that
    // differ by 1e-7 do the same to the reference plan.
    assert!(2 * alike > steps as usize, "{alike} of {steps} steps have the same score gradients");
}

#[test]
fn inference_folds_fuses_and_splits_without_changing_the_answer() {
    let mut model = Model::initialise(tiny_graph(), 5).expect("a well-formed graph");
    // Statistics that differ from the identity, so that folding has something to do.
    for (name, tensor) in &mut model.weights {
        if name.contains(".running_") || name.contains(".bn") || name.starts_with("bn") {
            let seed = name.bytes().map(u64::from).sum();
            let noise = numbers(seed, tensor.data.len());
            tensor.data.iter_mut().zip(noise).for_each(|(v, n)| *v = *v * (1.0 + 0.3 * n) + 0.1 * n.abs());
        }
    }
    let (n, len) = (37, model.graph.input_shape().len());
    let images = numbers(9, n * len);
    let reference = logits(&mut engine(&model, n, Fusion::PerNode, false), &images, n);
    let mut fused = engine(&model, 64, Fusion::OnLoad, false);
    let together = logits(&mut fused, &images, n);
    compare("logits", &together, &widen(&reference), 1e-5).unwrap();
    // New weights replace the old ones, folded again.
    let other = Model::initialise(tiny_graph(), 6).expect("a well-formed graph");
    fused.load(&other.weights).expect("weights of the same network");
    let expected = logits(&mut engine(&other, n, Fusion::PerNode, false), &images, n);
    compare("logits after loading", &logits(&mut fused, &images, n), &widen(&expected), 1e-5).unwrap();
}

/// Merged blocks, with a bias map each, and a ResNet, whose second convolutions have a residual.
#[test]
fn convolutions_in_tiles_answer_as_their_sums_do() {
    let network = |name: &str, side: usize, tiled: usize| {
        let options =
            NetworkOptions { input_stride: Some(1), ..NetworkOptions::new(Shape::new(side, side, 3), CLASSES) };
        (Model::initialise(build(name, &options).expect("a known network"), 8).expect("a well-formed graph"), tiled)
    };
    let (unmerged, tiled) = network("mobilenetv2-0.5", 32, 4);
    let merged = fully_merged(&unmerged, None, &Config::default()).expect("a merge").expect("merged blocks");
    let resnet = network("resnet18", 32, 7);
    for (model, tiled) in [(merged, tiled), resnet] {
        let folded = model.folded().expect("batch-norms behind convolutions");
        for (target, expected) in [
            (Target::inference(Backend::Host), tiled),
            (Target { fusion: Fusion::PerNode, ..Target::inference(Backend::Host) }, 0),
            (Target::inference(Backend::Cuda), 0),
        ] {
            let plan = Plan::new(&folded.graph, &target).expect("the network can be planned");
            let in_tiles = plan.steps.iter().filter(|step| step.step.describe().contains(" as F("));
            assert_eq!(in_tiles.count(), expected, "{target:?}");
        }
        let (n, len) = (5, model.graph.input_shape().len());
        let images = numbers(9, n * len);
        let expected = logits(&mut engine(&model, n, Fusion::PerNode, false), &images, n);
        let mut fused = engine(&model, n, Fusion::OnLoad, false);
        let together = logits(&mut fused, &images, n);
        compare("logits", &together, &widen(&expected), 1e-5).unwrap();
        for (image, together) in images.chunks_exact(len).zip(together.chunks_exact(CLASSES)) {
            assert_eq!(logits(&mut fused, image, 1), together, "an image alone has the same bits");
        }
    }
}

#[test]
fn wrong_batches_are_refused() {
    let model = Model::initialise(tiny_graph(), 1).expect("a well-formed graph");
    let len = model.graph.input_shape().len();
    let mut training = engine(&model, 4, Fusion::OnLoad, true);
    assert!(training.forward(&vec![0.0; 3 * len]).is_err(), "batch statistics need the whole batch");
    assert!(training.forward(&vec![0.0; 4 * len - 1]).is_err());
    assert!(training.set_slopes(&[0.0]).is_err());
    assert!(training.tap(NodeId::new(3)).is_err());
    let mut inference = engine(&model, 4, Fusion::OnLoad, false);
    assert!(inference.forward(&vec![0.0; 5 * len]).is_err());
    assert!(inference.backward(&Device::Cpu.zeros(40).unwrap()).is_err());
    assert!(inference.load(&Weights::new()).is_err());
}

/// The pixels of a tensor `[n, c, h, w]` in the engine's order.
fn nhwc(tensor: &Tensor) -> Vec<f32> {
    layout::nchw_to_nhwc(&tensor.data, tensor.shape[1], tensor.shape[2] * tensor.shape[3])
}

/// A tensor of a fixture.
fn fixture(tensors: &Weights, name: &str) -> Tensor {
    tensors.get(name).unwrap_or_else(|| panic!("the fixture has {name}")).clone()
}

#[test]
fn pytorch_agrees_on_logits_loss_every_gradient_and_running_statistics() {
    let path = std::path::Path::new("tests/fixtures/mobilenet_v2_tiny.safetensors");
    let tensors = read_tensors(path).expect("the fixture").tensors;
    let graph = tiny_graph();
    let params = graph.params().expect("a well-formed graph");
    let file = |prefix: &str, name: &str| fixture(&tensors, &format!("{prefix}/{name}"));
    let weights: Weights = params
        .iter()
        .map(|spec| {
            let data = layout::from_file(spec, file("weights", &spec.name).data);
            (spec.name.clone(), Tensor::new(spec.shape.clone(), data).expect("as many numbers"))
        })
        .collect();
    let model = Model::new(graph, weights).expect("PyTorch's weights fit by name and shape");
    let input = fixture(&tensors, "input");
    let n = input.shape[0];
    let images = nhwc(&input);

    for fusion in [Fusion::PerNode, Fusion::OnLoad] {
        let eval = logits(&mut engine(&model, n, fusion, false), &images, n);
        compare("logits_eval", &eval, &widen(&fixture(&tensors, "logits_eval").data), 1e-5).unwrap();

        let mut training = engine(&model, n, fusion, true);
        let train = logits(&mut training, &images, n);
        let expected = fixture(&tensors, "logits_train");
        compare("logits_train", &train, &widen(&expected.data), 1e-5).unwrap();
        // The labels are integers, which the reader leaves out; they are those whose loss and gradient PyTorch gave.
        let labels = labels();
        let (loss, gradient) = cross_entropy(&train, &labels, 0.1);
        let expected = f64::from(fixture(&tensors, "loss").data[0]);
        assert!((loss - expected).abs() < 1e-5, "{fusion:?}: loss {loss}, PyTorch {expected}");

        training.backward(&Device::Cpu.upload(&gradient).unwrap()).expect("a training engine");
        let ranges = training.trainable_ranges().to_vec();
        let specs = training.params().to_vec();
        let (_, gradients) = training.trainable();
        let gradients = gradients.view(0..gradients.len()).host();
        // Gradients that are zero but for rounding are compared against the scale of all gradients.
        let largest = gradients.iter().fold(0.0f32, |m, g| m.max(g.abs()));
        for (id, range) in ranges {
            let spec = &specs[id];
            let expected = layout::from_file(spec, file("grads", &spec.name).data);
            let scale = expected.iter().fold(1e-3 * largest, |m, g| m.max(g.abs()));
            for (i, (g, e)) in gradients[range].iter().zip(&expected).enumerate() {
                assert!((g - e).abs() <= 1e-3 * scale, "{fusion:?}: {} [{i}] is {g}, PyTorch has {e}", spec.name);
            }
        }
        let after = training.weights().expect("host memory");
        for spec in specs.iter().filter(|s| !s.role.is_trained()) {
            compare(&spec.name, &after[&spec.name].data, &widen(&file("running", &spec.name).data), 1e-5).unwrap();
        }
    }
}

/// The fixture's labels, read from the raw file since they are 64-bit integers.
fn labels() -> Vec<usize> {
    let bytes = std::fs::read("tests/fixtures/mobilenet_v2_tiny.safetensors").expect("the fixture");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let labels = file.tensor("labels").expect("the fixture has labels");
    labels.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("eight bytes")) as usize).collect()
}

#[test]
fn pytorch_agrees_on_every_convolution_and_its_gradients() {
    let path = std::path::Path::new("tests/fixtures/convs.safetensors");
    let TensorFile { tensors, metadata } = read_tensors(path).expect("the fixture");
    let description: serde_json::Value =
        serde_json::from_str(metadata.get("description").expect("a description")).expect("JSON");
    let cases = description["cases"].as_object().expect("cases by name");
    assert!(cases.len() >= 14);
    for (name, case) in cases {
        let number = |key: &str| case[key].as_u64().expect(key) as usize;
        let (n, c_in, c_out, groups) = (number("n"), number("c_in"), number("c_out"), number("groups"));
        let pad = Padding {
            top: number("pad_top"),
            left: number("pad_left"),
            bottom: number("pad_bottom"),
            right: number("pad_right"),
        };
        let (k_h, k_w) = (number("k_h"), number("k_w"));
        let window = Window { k_h, k_w, stride_h: number("stride_h"), stride_w: number("stride_w"), pad };
        let conv =
            depthshrinker::graph::Conv { c_in, c_out, window, groups, bias: depthshrinker::graph::Bias::Channel };
        let input = Shape::new(number("h"), number("w"), c_in);
        let p = ConvProblem::new(&conv, input, n).expect("PyTorch ran it");
        let nhwc = |key: &str| nhwc(&fixture(&tensors, &format!("{name}/{key}")));
        let spec = depthshrinker::graph::ParamSpec {
            name: name.clone(),
            node: NodeId::INPUT,
            role: ParamRole::ConvWeight(conv.family()),
            shape: match conv.family() {
                ConvFamily::Depthwise => vec![k_h, k_w, c_in],
                ConvFamily::Pointwise => vec![c_out, c_in],
                ConvFamily::Dense => vec![c_out, k_h, k_w, c_in / groups],
            },
        };
        let weight = |key: &str| layout::from_file(&spec, fixture(&tensors, &format!("{name}/{key}")).data);
        let (x, w, dy) = (nhwc("x"), weight("w"), nhwc("dy"));
        let b = fixture(&tensors, &format!("{name}/b")).data;
        let mut y = vec![f32::NAN; dy.len()];
        let epilogue = Epilogue { bias: BiasOperand::Channel(View::Host(&b)), ..Epilogue::default() };
        conv::forward(&p, View::Host(&x), View::Host(&w), &epilogue, ViewMut::Host(&mut y));
        compare(&format!("{name} y"), &y, &widen(&nhwc("y")), 1e-5).unwrap();
        let (mut dx, mut dw, mut db) = (vec![f32::NAN; x.len()], vec![f32::NAN; w.len()], vec![f32::NAN; b.len()]);
        let out = GradientsOut {
            dx: Some((ViewMut::Host(&mut dx), false)),
            dw: ViewMut::Host(&mut dw),
            db: Some(ViewMut::Host(&mut db)),
            sums: None,
        };
        let (input, dy) = (ConvInput::Stored(View::Host(&x)), ConvGradient::Stored(View::Host(&dy)));
        conv::backward(&p, input, View::Host(&w), dy, out);
        compare(&format!("{name} dx"), &dx, &widen(&nhwc("dx")), 1e-5).unwrap();
        compare(&format!("{name} dw"), &dw, &widen(&weight("dw")), 1e-5).unwrap();
        compare(&format!("{name} db"), &db, &widen(&fixture(&tensors, &format!("{name}/db")).data), 1e-5).unwrap();
    }
}
