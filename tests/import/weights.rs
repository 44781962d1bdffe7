//! Whole networks: logits, names and shapes, and what is said of weights that do not fit.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use depthshrinker::data::Interpolation;
use depthshrinker::device::Device;
use depthshrinker::io::layout::{file_shape, nchw_to_nhwc};
use depthshrinker::io::names::Foreign;
use depthshrinker::io::tensors::{read_tensors, write_tensors};
use depthshrinker::io::torch::read_torch;
use depthshrinker::networks::{NetworkOptions, Project, build, default_weights};
use depthshrinker::pipeline::{Imported, import, logits};
use depthshrinker::shape::Shape;
use depthshrinker::tensor::Tensor;

use super::{INPUT, fixture, images, value};

/// Imports and runs; whose names the file had, and the largest difference from PyTorch's logits.
fn difference(net: &str, path: &Path, expected: &str) -> (Vec<Project>, f32) {
    // The file knows better how many classes and channels there are.
    let options = NetworkOptions::new(Shape::new(40, 40, 1), 1000);
    let Imported { model, names, .. } = import(net, path, &options, None).unwrap();
    assert_eq!((model.graph.classes(), model.graph.input_shape()), (7, INPUT));
    let input = nchw_to_nhwc(&images(), INPUT.c, INPUT.pixels());
    let got = logits(&Device::Cpu, &model, &input).unwrap();
    let expected = &read_tensors(&fixture("logits.safetensors")).unwrap().tensors[expected];
    assert_eq!(expected.shape, [2, 7]);
    let difference = got.iter().zip(&expected.data).map(|(a, b)| (a - b).abs());
    (names.projects, difference.fold(0.0, f32::max))
}

#[test]
fn imported_networks_give_the_logits_of_pytorch() {
    for (file, names, expected) in [
        ("timm.pth", Project::Timm, "logits"),
        ("torchvision-old.pth", Project::Torchvision, "logits"),
        ("torchvision.safetensors", Project::Torchvision, "logits_half"),
    ] {
        let (found, error) = difference("mobilenetv2-0.1", &fixture(file), expected);
        assert_eq!(found, [names], "{file}");
        assert!(error < 1e-5, "{file}: logits differ by {error:e}");
    }
    let (_, other) = difference("mobilenetv2-0.1", &fixture("timm.pth"), "logits_half");
    assert!(other > 1e-5, "the test cannot tell weights in half precision from others");
}

#[test]
fn every_element_type_and_stride_is_read() {
    let arange = |range: std::ops::Range<usize>| range.map(|i| i as f32).collect::<Vec<_>>();
    let nested = |n: [usize; 3], at: fn(usize, usize, usize) -> usize| {
        let [a, b, c] = n;
        let index = (0..a).flat_map(move |i| (0..b).flat_map(move |j| (0..c).map(move |k| at(i, j, k) as f32)));
        index.collect::<Vec<_>>()
    };
    let cases: Vec<(&str, Vec<usize>, Vec<f32>)> = vec![
        ("plain", vec![2, 3, 4], arange(0..24)),
        ("transposed", vec![6, 4], nested([1, 6, 4], |_, i, j| j * 6 + i)),
        ("permuted", vec![4, 2, 3], nested([4, 2, 3], |i, j, k| j * 12 + k * 4 + i)),
        ("every_other", vec![12], (0..12).map(|i| (2 * i + 1) as f32).collect()),
        ("shared_a", vec![10], arange(0..10)),
        ("shared_b", vec![19], arange(5..24)),
        ("expanded", vec![2, 3], vec![1.5, 1.5, 1.5, -2.5, -2.5, -2.5]),
        ("parameter", vec![2], vec![0.25, -0.5]),
        ("scalar", vec![], vec![3.5]),
        ("empty", vec![0, 4], vec![]),
        ("channels_last", vec![1, 2, 3, 4], arange(0..24)),
        ("half", vec![4], vec![1.0, -0.333_251_95, 5.960_464_5e-8, 65504.0]),
        ("bfloat16", vec![3], vec![1.0, -3.0, f32::from_bits(0x714a_0000)]),
        ("double", vec![3], vec![1.0, 0.1, -0.0]),
    ];
    for file in ["forms.pth", "forms-old.pth"] {
        let tensors = read_torch(&fixture(file)).unwrap();
        assert_eq!(tensors.len(), cases.len(), "{file}: integers are left out");
        for (name, shape, data) in &cases {
            assert_eq!((&tensors[*name].shape, &tensors[*name].data), (shape, data), "{file}: {name}");
        }
    }
}

#[test]
fn weights_that_do_not_fit_are_listed_by_their_own_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let refusal = |net: &str, change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let mut tensors = read_torch(&fixture("torchvision-old.pth")).unwrap();
        change(&mut tensors);
        write_tensors(&path, &tensors, &Default::default()).unwrap();
        let error = import(net, &path, &NetworkOptions::new(INPUT, 1000), None).expect_err("must be refused");
        let text = error.to_string();
        assert!(!text.contains('\n') && text.len() < 1000, "{text}");
        text
    };
    let name = "module.features.3.conv.1.0.weight";
    let text = refusal("mobilenetv2-0.1", &|t| drop(t.remove(name)));
    assert!(text.contains("features.3.conv.1.0.weight is missing"), "{text}");
    let text = refusal("mobilenetv2-0.1", &|t| t.get_mut(name).unwrap().shape = vec![9, 48]);
    assert!(text.contains("features.3.conv.1.0.weight has shape [9, 48], expected [48, 1, 3, 3]"), "{text}");
    let text = refusal("mobilenetv2-0.1", &|t| drop(t.insert("module.stray".into(), Tensor::zeros(&[2]))));
    assert!(text.contains("stray belongs to no node"), "{text}");
    let text = refusal("mobilenetv2-0.1", &|t| t.get_mut(name).unwrap().data[0] = f32::NAN);
    assert!(text.contains("not finite"), "{text}");
    let text = refusal("mobilenetv2-1.0", &|_| ());
    assert!(text.contains("features.0.0.weight has shape [8, 3, 3, 3], expected [32, 3, 3, 3]"), "{text}");
    assert!(text.contains("more do not fit"), "{text}");
    // A few of each kind, however many there are of another, and however long their names.
    let text = refusal("mobilenetv2-0.1", &|t| {
        t.retain(|name, _| !name.contains("features.5"));
        t.insert("module.features.18.1.running_var".into(), Tensor::full(&[1280], -1e-3));
        (0..9).for_each(|i| drop(t.insert(format!("module.{i}{}", "stray".repeat(150)), Tensor::zeros(&[2]))));
    });
    assert!(text.contains("is missing; and 12 more are missing"), "{text}");
    assert!(text.contains("features.18.1.running_var holds variances below 0"), "{text}");
    assert!(text.contains("strayst… belongs to no node; and 6 more belong to no node (-v lists all)"), "{text}");
    let text = refusal("nonet", &|_| ());
    assert!(text.contains("unknown network"), "{text}");
}

/// One line says a few faults, -v says all of them.
#[test]
fn all_faults_are_listed_where_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let mut tensors = read_torch(&fixture("torchvision-old.pth")).unwrap();
    tensors.retain(|name, _| !name.contains("running_mean"));
    write_tensors(&path, &tensors, &Default::default()).unwrap();
    let lines = |more: &[&str]| {
        let program = Command::new(env!("CARGO_BIN_EXE_depthshrinker"))
            .args(["import", "mobilenetv2-0.1"])
            .args([&path, Path::new("-o"), &folder.path().join("out")])
            .args(more)
            .output()
            .unwrap();
        assert_eq!(program.status.code(), Some(1));
        String::from_utf8(program.stderr).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(matches!(&lines(&[])[..], [line] if line.contains("and 49 more are missing (-v lists all)")));
    let all = lines(&["-v"]);
    assert_eq!(all.iter().filter(|line| line.ends_with("running_mean is missing")).count(), 52, "{all:?}");
}

/// Every tensor of whole networks is found under the names of torchvision and of efficientnet_lite_pytorch.
#[test]
fn names_and_shapes_of_other_projects_fit() {
    let text = fs::read_to_string(fixture("names.json")).unwrap();
    let networks: BTreeMap<String, BTreeMap<String, Vec<usize>>> = serde_json::from_str(&text).unwrap();
    assert_eq!(networks.len(), 14);
    for (net, tensors) in networks {
        let zeros = tensors.iter().map(|(name, shape)| (name.clone(), Tensor::zeros(shape)));
        let foreign = Foreign::new(zeros.collect());
        // The file for VGG has fewer hidden channels than the published network.
        let head_channels = (net == "vgg19_bn").then_some(64);
        let options = NetworkOptions { head_channels, ..NetworkOptions::new(Shape::new(224, 224, 3), 1000) };
        let graph = build(&net, &options).unwrap();
        assert_eq!(foreign.classes_and_channels(&graph), (Some(1000), Some(3)), "{net}");
        let projects = foreign.into_model(Path::new(&net), graph).unwrap().1.projects;
        let expected = match net.split('_').next() {
            Some("tf") => vec![Project::EfficientNetLitePytorch],
            // Their names are the same in both.
            Some("resnet18" | "resnet34" | "resnet50") => vec![Project::Timm, Project::Torchvision],
            _ => vec![Project::Torchvision],
        };
        assert_eq!(projects, expected, "{net}");
    }
}

/// Every network that torchvision has too, with torchvision's names, computes what it computes there.
#[test]
fn networks_of_torchvision_give_its_logits() {
    const EVERY: usize = 37;
    let read = |name: &str| fs::read_to_string(fixture(name)).unwrap();
    let networks: BTreeMap<String, BTreeMap<String, Vec<usize>>> = serde_json::from_str(&read("names.json")).unwrap();
    let rows: Vec<serde_json::Value> = serde_json::from_str(&read("torchvision_logits.json")).unwrap();
    assert_eq!(rows.len(), 9);
    for row in rows {
        let (net, size) = (row["name"].as_str().unwrap(), row["size"].as_u64().unwrap() as usize);
        let tensors = networks[net].iter().map(|(name, shape)| (name.clone(), value(name, shape)));
        let head_channels = (net == "vgg19_bn").then_some(64);
        let options = NetworkOptions { head_channels, ..NetworkOptions::new(Shape::new(size, size, 3), 1000) };
        let foreign = Foreign::new(tensors.collect());
        let (model, _) = foreign.into_model(Path::new(net), build(net, &options).unwrap()).unwrap();
        let image = nchw_to_nhwc(&value("input", &[3, size, size]).data, 3, size * size);
        let got = logits(&Device::Cpu, &model, &image).unwrap();
        let expected: Vec<f64> = serde_json::from_value(row["logits"].clone()).unwrap();
        let differences = got.iter().step_by(EVERY).zip(&expected).map(|(g, e)| (f64::from(*g) - e).abs());
        let worst = differences.fold(0.0, f64::max) / row["scale"].as_f64().unwrap();
        assert_eq!(expected.len(), 1000usize.div_ceil(EVERY));
        assert!(worst < 1e-4, "{net}: logits differ by {worst:.1e} of their scale");
    }
}

/// Which weights a file holds decides how pictures are made: by the name that was asked for, else by the project.
#[test]
fn preprocessing_follows_the_weights() {
    let path = fixture("torchvision-old.pth");
    let resize = |net: &str, file: &str, asked: Option<&str>| {
        let options = NetworkOptions::new(Shape::new(224, 224, 3), 1000);
        let (info, name) = import(net, &fixture(file), &options, None).unwrap().info(net, asked).unwrap();
        let resize = info.data.unwrap().resize.unwrap();
        (name.unwrap(), resize.shorter_side, resize.interpolation)
    };
    let (bilinear, bicubic) = (Interpolation::Bilinear, Interpolation::Bicubic);
    let net = "mobilenetv2-0.1";
    assert_eq!(resize(net, "torchvision-old.pth", None), ("mobilenet_v2".into(), 256, bilinear));
    assert_eq!(resize(net, "timm.pth", None), ("mobilenetv2_100".into(), 256, bicubic));
    let v2 = "mobilenet_v2.IMAGENET1K_V2";
    assert_eq!(resize(net, "timm.pth", Some(v2)), (v2.into(), 232, bilinear));

    let imported = import(net, &path, &NetworkOptions::new(Shape::new(256, 256, 3), 1000), None).unwrap();
    let side = |asked: &str| imported.info(net, Some(asked)).unwrap().0.data.unwrap().resize.unwrap().shorter_side;
    // timm's crop_pct of 0.95 gives 235 at 224 pixels and 269 at 256.
    assert_eq!((side("resnet18"), side("resnet18.tv_in1k"), side("resnet50.IMAGENET1K_V2")), (269, 292, 265));
    let text = imported.info(net, Some("resnet18.none")).unwrap_err().to_string();
    assert!(text.contains("no preprocessing is published as \"resnet18.none\""), "{text}");
    for (net, project, expected) in [
        ("resnet18", Project::Timm, "resnet18"),
        ("resnet50", Project::Torchvision, "resnet50.IMAGENET1K_V1"),
        ("resnet50.IMAGENET1K_V2", Project::Timm, "resnet50.IMAGENET1K_V2"),
        ("mnasnet-1.3", Project::Torchvision, "mnasnet1_3"),
        ("mnasnet_075", Project::Torchvision, "mnasnet0_75"),
        ("mnasnet-0.9", Project::Torchvision, "mnasnet1_0"),
        ("efficientnet-lite0", Project::EfficientNetLitePytorch, "tf_efficientnet_lite0"),
        ("tf_efficientnet_lite2", Project::EfficientNetLitePytorch, "tf_efficientnet_lite2"),
        ("mobilenetv2_140.ra_in1k", Project::Timm, "mobilenetv2_140.ra_in1k"),
    ] {
        assert_eq!(default_weights(net, project), expected);
    }
}

/// Linear layers on a flattened image become convolutions with the same numbers in the same order.
#[test]
fn the_hidden_layers_of_vgg_are_convolutions() {
    let options = NetworkOptions { head_channels: Some(4), ..NetworkOptions::new(Shape::new(64, 96, 3), 5) };
    let graph = build("vgg19_bn", &options).unwrap();
    let mut tensors: BTreeMap<String, Tensor> =
        graph.params().unwrap().iter().map(|p| (p.name.clone(), Tensor::zeros(&file_shape(p)))).collect();
    for (own, theirs) in
        [("pre_logits.fc1", "classifier.0"), ("pre_logits.fc2", "classifier.3"), ("head.fc", "classifier.6")]
    {
        for part in ["weight", "bias"] {
            let tensor = tensors.remove(&format!("{own}.{part}")).unwrap();
            let flat =
                |shape: Vec<usize>| if shape.len() == 4 { vec![shape[0], shape[1..].iter().product()] } else { shape };
            tensors.insert(format!("{theirs}.{part}"), Tensor { shape: flat(tensor.shape), ..tensor });
        }
    }
    // Channel 7 at row 1, column 2 of the 2x3 pixels that are left.
    let (o, c, y, x) = (3, 7, 1, 2);
    tensors.get_mut("classifier.0.weight").unwrap().data[o * 512 * 6 + c * 6 + y * 3 + x] = 1.0;
    let (model, names) = Foreign::new(tensors).into_model(Path::new("vgg"), graph).unwrap();
    assert_eq!(names.projects, [Project::Torchvision]);
    let weight = &model.weight("pre_logits.fc1.weight");
    assert_eq!(weight.shape, [4, 2, 3, 512]);
    assert_eq!(weight.data.iter().position(|&w| w == 1.0), Some(((o * 2 + y) * 3 + x) * 512 + c));
}
