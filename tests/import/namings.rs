//! Other projects' names: every row of the table gives PyTorch's logits, behind any prefix, and a network can get a fresh
//! classifier. The fixture lists layers as the projects' own modules have them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use depthshrinker::device::Device;
use depthshrinker::io::layout::nchw_to_nhwc;
use depthshrinker::io::names::{Foreign, FreshHead, Names};
use depthshrinker::io::read_model;
use depthshrinker::io::tensors::write_tensors;
use depthshrinker::io::torch::read_torch;
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, Project, build, default_weights, meant_by};
use depthshrinker::pipeline::{import, logits};
use depthshrinker::shape::Shape;
use depthshrinker::tensor::Tensor;
use serde::Deserialize;

use super::{INPUT, fixture, value};

/// Of the logits every so many are in the fixtures.
const EVERY: usize = 37;
/// Largest difference from PyTorch's logits, of their scale.
const TOLERANCE: f64 = 1e-4;

type Tensors = BTreeMap<String, Tensor>;

#[derive(Deserialize)]
struct Fixture {
    namings: Vec<Naming>,
    tensorflow: Vec<Logits>,
}

#[derive(Deserialize)]
struct Naming {
    project: String,
    net: String,
    /// torchvision's name and the project's.
    layers: Vec<(String, String)>,
}

#[derive(Clone, Deserialize)]
struct Logits {
    #[serde(default)]
    name: String,
    size: usize,
    scale: f64,
    logits: Vec<f64>,
}

fn parsed<T: serde::de::DeserializeOwned>(name: &str) -> T {
    serde_json::from_str(&fs::read_to_string(fixture(name)).unwrap()).unwrap()
}

/// A network's weights by the project's names: those that a formula gives to torchvision's.
fn tensors_of(naming: &Naming, shapes: &BTreeMap<String, Vec<usize>>) -> Tensors {
    let mut tensors = Tensors::new();
    for (torchvision, theirs) in &naming.layers {
        for (name, shape) in shapes {
            let part = name.strip_prefix(torchvision.as_str());
            if let Some(part) = part.filter(|part| part.starts_with('.') && part.matches('.').count() == 1) {
                tensors.insert(format!("{theirs}{part}"), value(name, shape));
            }
        }
    }
    tensors
}

/// The model of these tensors at some image size, and what is told of their names.
fn model(net: &str, size: usize, tensors: Tensors) -> (Model, Names) {
    let head_channels = (net == "vgg19_bn").then_some(64);
    let options = NetworkOptions { head_channels, ..NetworkOptions::new(Shape::new(size, size, 3), 1000) };
    let foreign = Foreign::new(tensors);
    let plain = build(net, &options).unwrap();
    let names = foreign.names(&plain);
    let (classes, channels) = foreign.classes_and_channels(&plain);
    assert_eq!((classes, channels), (Some(1000), Some(3)), "{net}: {names:?}");
    let graph = build(&meant_by(net, names.projects[0]), &options).unwrap();
    foreign.into_model(Path::new(net), graph).unwrap()
}

/// The largest difference from these logits, of their scale.
fn difference(model: &Model, expected: &Logits) -> f64 {
    let size = expected.size;
    let image = nchw_to_nhwc(&value("input", &[3, size, size]).data, 3, size * size);
    let got = logits(&Device::Cpu, model, &image).unwrap();
    assert_eq!(expected.logits.len(), 1000usize.div_ceil(EVERY));
    let differences = got.iter().step_by(EVERY).zip(&expected.logits).map(|(g, e)| (f64::from(*g) - e).abs());
    differences.fold(0.0, f64::max) / expected.scale
}

#[test]
fn every_naming_gives_the_logits_of_pytorch() {
    let Fixture { namings, tensorflow } = parsed("namings.json");
    let shapes: BTreeMap<String, BTreeMap<String, Vec<usize>>> = parsed("names.json");
    let pytorch: Vec<Logits> = parsed("torchvision_logits.json");
    assert_eq!(namings.len(), 15);
    for naming in &namings {
        let (project, net) = (&naming.project, naming.net.as_str());
        let tensors = tensors_of(naming, &shapes[net]);
        let expected = match (project.as_str(), net) {
            ("Hugging Face", "mobilenetv2_100") => tensorflow.clone(),
            _ => pytorch.iter().filter(|row| row.name == net).cloned().collect(),
        };
        assert!(!expected.is_empty(), "{net}");
        for expected in &expected {
            let (model, names) = model(net, expected.size, tensors.clone());
            assert_eq!(&names.projects_in_words(), project, "{net}");
            let worst = difference(&model, expected);
            assert!(worst < TOLERANCE, "{project}, {net}: logits differ by {worst:.1e} of their scale");
        }
    }
}

/// Padding and ε tell the network of TensorFlow from PyTorch's, and no shape does.
#[test]
fn the_logits_tell_padding_apart() {
    let Fixture { namings, tensorflow } = parsed("namings.json");
    let shapes: BTreeMap<String, BTreeMap<String, Vec<usize>>> = parsed("names.json");
    let timm = namings.iter().find(|naming| naming.project == "timm").unwrap();
    for expected in &tensorflow {
        let (model, _) = model("mobilenetv2_100", expected.size, tensors_of(timm, &shapes["mobilenetv2_100"]));
        assert!(difference(&model, expected) > 100.0 * TOLERANCE, "{} pixels", expected.size);
    }
}

#[test]
fn a_project_may_mean_another_network_by_a_name() {
    for (net, project, meant, weights) in [
        ("mobilenetv2-1.0", Project::HuggingFace, "tf_mobilenetv2-1.0", "google/mobilenet_v2_1.0_224"),
        ("mobilenet_v2", Project::HuggingFace, "tf_mobilenetv2_100", "google/mobilenet_v2_1.0_224"),
        ("mobilenetv2_140.ra_in1k", Project::HuggingFace, "tf_mobilenetv2_140", "google/mobilenet_v2_1.4_224"),
        ("tf_mobilenetv2-0.75", Project::HuggingFace, "tf_mobilenetv2-0.75", "google/mobilenet_v2_0.75_160"),
        ("tf_mobilenetv2-0.5", Project::HuggingFace, "tf_mobilenetv2-0.5", "google/mobilenet_v2_1.0_224"),
        (
            "google/mobilenet_v2_0.35_96",
            Project::HuggingFace,
            "google/mobilenet_v2_0.35_96",
            "google/mobilenet_v2_0.35_96",
        ),
        ("efficientnet-lite0", Project::EfficientNetLitePytorch, "tf_efficientnet_lite0", "tf_efficientnet_lite0"),
        ("efficientnet_lite1", Project::EfficientNetLitePytorch, "tf_efficientnet_lite1", "tf_efficientnet_lite1"),
        ("efficientnet_lite1", Project::Timm, "efficientnet_lite1", "efficientnet_lite1"),
        ("mobilenetv2-1.4", Project::Tonylins, "mobilenetv2-1.4", "mobilenet_v2"),
        ("mobilenetv2-1.4", Project::DLi14, "mobilenetv2-1.4", "mobilenet_v2"),
        ("mobilenetv2-1.0", Project::Mmpretrain, "mobilenetv2-1.0", "mobilenet_v2"),
        ("mobilenetv2-1.0", Project::DepthCompression, "mobilenetv2-1.0", "mobilenet_v2"),
        ("resnet34", Project::Mmpretrain, "resnet34", "resnet34.IMAGENET1K_V1"),
        ("resnet50", Project::HuggingFace, "resnet50", "microsoft/resnet-50"),
        ("vgg19_bn", Project::DepthCompression, "vgg19_bn", "vgg19_bn.IMAGENET1K_V1"),
    ] {
        assert_eq!(meant_by(net, project), meant);
        assert_eq!(default_weights(meant, project), weights, "{net} of {project}");
    }
}

/// The fixture's weights under torchvision's names.
fn plain() -> Tensors {
    let tensors = read_torch(&fixture("torchvision-old.pth")).unwrap();
    tensors.into_iter().map(|(name, tensor)| (name.strip_prefix("module.").unwrap().to_owned(), tensor)).collect()
}

/// The tensors with `body` before every name but the classifier's, which becomes `classifier`.
fn renamed(tensors: &Tensors, body: &str, classifier: &str) -> Tensors {
    let name = |name: &str| match name.strip_prefix("classifier.1") {
        Some(part) => format!("{classifier}{part}"),
        None => format!("{body}{name}"),
    };
    tensors.iter().map(|(own, tensor)| (name(own), tensor.clone())).collect()
}

fn narrow(tensors: Tensors) -> depthshrinker::Result<(Model, Names)> {
    let graph = build("mobilenetv2-0.1", &NetworkOptions::new(INPUT, 7)).unwrap();
    Foreign::new(tensors).into_model(Path::new("w.pth"), graph)
}

#[test]
fn prefixes_and_other_classifiers_are_found() {
    let (expected, _) = narrow(plain()).unwrap();
    for (body, classifier) in [
        ("", "classifier.1"),
        ("model.", "model.classifier.1"),
        ("module.", "module.classifier.1"),
        ("_orig_mod.module.", "_orig_mod.module.classifier.1"),
        ("backbone.", "backbone.classifier.1"),
        ("backbone.", "classifier.1"),
        ("backbone.", "head.fc"),
        ("0.", "1"),
        ("net.encoder.", "net.head.2"),
        ("", "classifier"),
        ("", "fc"),
        ("model.", "model.classifier.1.linear"),
    ] {
        let (model, names) =
            narrow(renamed(&plain(), body, classifier)).unwrap_or_else(|e| panic!("{body} {classifier}: {e}"));
        assert_eq!(model.weights, expected.weights, "{body} {classifier}");
        assert_eq!((names.projects, names.prefix.as_str()), (vec![Project::Torchvision], body));
    }
}

/// The fixture's weights with something wrong about their names, by what it is.
fn misfits() -> [(&'static str, Tensors); 7] {
    let changed = |change: &dyn Fn(&str) -> String| -> Tensors {
        plain().into_iter().map(|(name, tensor)| (change(&name), tensor)).collect()
    };
    let layer = |name: &str, c_out: usize, c_in: usize| {
        [(format!("{name}.weight"), Tensor::zeros(&[c_out, c_in])), (format!("{name}.bias"), Tensor::zeros(&[c_out]))]
    };
    let body = |prefix: &str| renamed(&plain(), prefix, &format!("{prefix}classifier.1"));
    let without: Tensors = plain().into_iter().filter(|(name, _)| !name.starts_with("classifier")).collect();
    let heads = [layer("a", 7, 1280), layer("b", 7, 1280)].concat();
    [
        ("another project's", changed(&|name| name.replace(".conv.", ".block."))),
        ("one name", changed(&|name| name.replace("features.4.conv.2", "features.4.conv.project"))),
        ("nothing alike", changed(&|name| format!("x{name}y"))),
        ("one layer more", plain().into_iter().chain(layer("extra", 2, 2)).collect()),
        ("two networks", body("student.").into_iter().chain(body("teacher.")).collect()),
        ("two classifiers", without.clone().into_iter().chain(heads).collect()),
        ("no classifier", without),
    ]
}

#[test]
fn names_that_do_not_fit_are_held_against_the_nearest() {
    let known =
        "known are those of timm, torchvision, tonylins, d-li14, EC, mmpretrain, Hugging Face; give the network";
    let expected: [&[&str]; 7] = [
        &["nearest to the file's are those of torchvision", "differ in features.1.conv.0.0.weight", known],
        &[
            "features.4.conv.2.weight is missing",
            "differ in features.4.conv.2.weight: the file has features.4.conv.project.weight; give the network",
        ],
        &["those of timm", "conv_stem.weight", known],
        &["extra.weight belongs to no node; the file holds more than"],
        &["teacher.features.0.0.weight belongs to no node", "the file holds more than this network"],
        &["classifier.1.weight is missing", "a.weight belongs to no node"],
        &["classifier.1.weight is missing", "the file has no classifier; --classes N gives the network a fresh one"],
    ];
    for ((name, tensors), expected) in misfits().into_iter().zip(expected) {
        let error = narrow(tensors).expect_err(name).to_string();
        assert!(!error.contains('\n') && error.len() < 1000, "{name}: {error}");
        assert!(expected.iter().all(|part| error.contains(part)), "{name}: {error}");
    }
    // Families have namings of their own.
    let graph = build("resnet18", &NetworkOptions::new(INPUT, 7)).unwrap();
    let error = Foreign::new(plain()).into_model(Path::new("w.pth"), graph).unwrap_err().to_string();
    assert!(error.contains("known are those of timm, torchvision, mmpretrain, Hugging Face"), "{error}");
}

struct Program {
    folder: tempfile::TempDir,
}

impl Program {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Imports a narrow MobileNetV2; its output.
    fn import(&self, tensors: &Tensors, arguments: &[&str]) -> String {
        write_tensors(&self.path("w.safetensors"), tensors, &BTreeMap::new()).unwrap();
        let run = Command::new(env!("CARGO_BIN_EXE_depthshrinker"))
            .args(["import", "mobilenetv2-0.1", "--image-size", "40", "-o"])
            .args([self.path("m.safetensors"), self.path("w.safetensors")])
            .args(arguments)
            .output()
            .unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        String::from_utf8(run.stdout).unwrap()
    }
}

/// Pretrained weights on one's own classes: with the file's classifier, one of another name, or none at all.
#[test]
fn a_fresh_classifier_takes_the_place_of_the_file_s() {
    let program = Program { folder: tempfile::tempdir().unwrap() };
    let (expected, _) = narrow(plain()).unwrap();
    let without: Tensors = plain().into_iter().filter(|(name, _)| !name.starts_with("classifier")).collect();
    for tensors in [plain(), renamed(&plain(), "backbone.", "head.fc"), without] {
        let heads = ["0", "1"].map(|seed| {
            let told = program.import(&tensors, &["--classes", "5", "--seed", seed]);
            assert!(
                told.contains("images of 40x40x3, 5 classes\nthe classifier is fresh: train it on your 5 classes"),
                "{told}"
            );
            let (mut model, info) = read_model(&program.path("m.safetensors")).unwrap();
            assert_eq!((model.graph.classes(), info.data.unwrap().classes.len()), (5, 0));
            let head = ["weight", "bias"].map(|part| model.weights.remove(&format!("classifier.{part}")).unwrap());
            for (name, tensor) in &model.weights {
                assert_eq!(tensor, &expected.weights[name], "{name}");
            }
            head
        });
        let [weight, bias] = &heads[0];
        assert_eq!((weight.shape.as_slice(), bias.data.as_slice()), ([5, 1280].as_slice(), [0.0; 5].as_slice()));
        let deviation = (weight.data.iter().map(|w| w * w).sum::<f32>() / weight.data.len() as f32).sqrt();
        assert!((deviation - 0.01).abs() < 0.001, "{deviation}");
        assert_ne!(heads[0], heads[1], "the seed must decide");
    }
    let json: serde_json::Value =
        serde_json::from_str(&program.import(&plain(), &["--classes", "1000", "--json"])).unwrap();
    assert_eq!((&json["fresh_head"], &json["classes"]), (&true.into(), &1000.into()));
    let (_, info) = read_model(&program.path("m.safetensors")).unwrap();
    assert!(info.data.unwrap().classes.is_empty(), "a fresh classifier knows nothing of ImageNet");
    let json: serde_json::Value = serde_json::from_str(&program.import(&plain(), &["--json"])).unwrap();
    assert_eq!((&json["fresh_head"], &json["classes"], &json["prefix"]), (&false.into(), &7.into(), &"".into()));
}

/// A wider classifier than one expects is no reason to guess: what is left over is told.
#[test]
fn a_fresh_classifier_replaces_one_layer_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let mut tensors = renamed(&plain(), "", "fc.3");
    tensors.insert("fc.0.weight".into(), Tensor::zeros(&[1280, 1280]));
    tensors.insert("fc.0.bias".into(), Tensor::zeros(&[1280]));
    write_tensors(&path, &tensors, &BTreeMap::new()).unwrap();
    let head = FreshHead { classes: 3, seed: 0 };
    let error = import("mobilenetv2-0.1", &path, &NetworkOptions::new(INPUT, 7), Some(head)).unwrap_err().to_string();
    assert!(error.contains("fc.0.bias belongs to no node"), "{error}");
}

/// TensorFlow counts a background class before ImageNet's.
#[test]
fn hugging_faces_1001_classes_have_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let Fixture { namings, .. } = parsed("namings.json");
    let shapes: BTreeMap<String, BTreeMap<String, Vec<usize>>> = parsed("names.json");
    let naming = namings.iter().find(|n| n.project == "Hugging Face" && n.net == "mobilenetv2_100").unwrap();
    let mut tensors = tensors_of(naming, &shapes["mobilenetv2_100"]);
    tensors.insert("classifier.weight".into(), Tensor::zeros(&[1001, 1280]));
    tensors.insert("classifier.bias".into(), Tensor::zeros(&[1001]));
    write_tensors(&path, &tensors, &BTreeMap::new()).unwrap();
    for net in ["mobilenetv2-1.0", "mobilenet_v2", "google/mobilenet_v2_1.0_224"] {
        let imported = import(net, &path, &NetworkOptions::new(Shape::new(96, 96, 3), 1000), None).unwrap();
        let (info, decided) = imported.info(net, None).unwrap();
        let data = info.data.unwrap();
        assert_eq!(decided.as_deref(), Some("google/mobilenet_v2_1.0_224"), "{net}");
        assert_eq!((data.classes[0].as_str(), data.classes[1].as_str()), ("background", "tench"), "{net}");
        assert_eq!((data.classes.len(), data.mean, data.std), (1001, vec![0.5; 3], vec![0.5; 3]), "{net}");
    }
}
