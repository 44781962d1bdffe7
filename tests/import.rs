//! Foreign weights: networks that timm, torchvision and PyTorch wrote give PyTorch's logits, and hostile files are
//! refused in one line. `fixtures/make_import_fixtures.py` made the files.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use depthshrinker::data::Interpolation;
use depthshrinker::device::Device;
use depthshrinker::io::layout::{file_shape, nchw_to_nhwc};
use depthshrinker::io::names::Foreign;
use depthshrinker::io::tensors::{read_tensors, write_tensors};
use depthshrinker::io::torch::{parse_torch, read_torch};
use depthshrinker::networks::{NetworkOptions, Project, build, default_weights};
use depthshrinker::pipeline::{Imported, import, logits};
use depthshrinker::shape::Shape;
use depthshrinker::tensor::Tensor;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

const INPUT: Shape = Shape::new(40, 40, 3);

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/import").join(name)
}

/// The image of the script that made the fixtures, two of them, NCHW.
fn images() -> Vec<f32> {
    let number = |i: u64| (((i * 2_654_435_761) % (1 << 32)) >> 8) as f64 / f64::from(1 << 23) - 1.0;
    (0..2 * INPUT.len() as u64).map(|i| number(i) as f32).collect()
}

/// Imports and runs; whose names the file had, and the largest difference from PyTorch's logits.
fn difference(net: &str, path: &Path, expected: &str) -> (Vec<Project>, f32) {
    // The file knows better how many classes and channels there are.
    let options = NetworkOptions::new(Shape::new(40, 40, 1), 1000);
    let Imported { model, names } = import(net, path, &options).unwrap();
    assert_eq!((model.graph.classes(), model.graph.input_shape()), (7, INPUT));
    let input = nchw_to_nhwc(&images(), INPUT.c, INPUT.pixels());
    let got = logits(&Device::Cpu, &model, &input).unwrap();
    let expected = &read_tensors(&fixture("logits.safetensors")).unwrap().tensors[expected];
    assert_eq!(expected.shape, [2, 7]);
    let difference = got.iter().zip(&expected.data).map(|(a, b)| (a - b).abs());
    (names, difference.fold(0.0, f32::max))
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
        let error = import(net, &path, &NetworkOptions::new(INPUT, 1000)).expect_err("must be refused");
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
    assert!(text.contains("straystra… belongs to no node; and 6 more belong to no node (-v lists all)"), "{text}");
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
        let (_, projects) = foreign.into_model(Path::new(&net), graph).unwrap();
        let expected = match net.split('_').next() {
            Some("tf") => vec![Project::EfficientNetLitePytorch],
            // Their names are the same in both.
            Some("resnet18" | "resnet34" | "resnet50") => vec![Project::Timm, Project::Torchvision],
            _ => vec![Project::Torchvision],
        };
        assert_eq!(projects, expected, "{net}");
    }
}

/// Element i of the tensor of a name, as `make_network_values.py` has it: a hash in [-1, 1) in the range of its kind.
fn value(name: &str, shape: &[usize]) -> Tensor {
    let seed = name.bytes().fold(2_166_136_261u32, |seed, byte| (seed ^ u32::from(byte)).wrapping_mul(16_777_619));
    let element = |i: usize| {
        let mut h = (i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed);
        h ^= h >> 16;
        h = h.wrapping_mul(0x7feb_352d);
        h ^= h >> 15;
        h = h.wrapping_mul(0x846c_a68b);
        h ^= h >> 16;
        let u = f64::from(h) / 2f64.powi(31) - 1.0;
        let scaled = match name {
            "input" => u,
            _ if shape.len() > 1 => u * (6.0 / shape[1..].iter().product::<usize>() as f64).sqrt(),
            _ if name.ends_with("running_var") => 1.0 + 0.5 * u,
            _ if name.ends_with("weight") => 1.0 + 0.25 * u,
            _ => 0.25 * u,
        };
        scaled as f32
    };
    Tensor { shape: shape.to_vec(), data: (0..shape.iter().product()).map(element).collect() }
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
        let (info, name) = import(net, &fixture(file), &options).unwrap().info(net, asked).unwrap();
        let resize = info.data.unwrap().resize.unwrap();
        (name.unwrap(), resize.shorter_side, resize.interpolation)
    };
    let (bilinear, bicubic) = (Interpolation::Bilinear, Interpolation::Bicubic);
    let net = "mobilenetv2-0.1";
    assert_eq!(resize(net, "torchvision-old.pth", None), ("mobilenet_v2".into(), 256, bilinear));
    assert_eq!(resize(net, "timm.pth", None), ("mobilenetv2_100".into(), 256, bicubic));
    let v2 = "mobilenet_v2.IMAGENET1K_V2";
    assert_eq!(resize(net, "timm.pth", Some(v2)), (v2.into(), 232, bilinear));

    let imported = import(net, &path, &NetworkOptions::new(Shape::new(256, 256, 3), 1000)).unwrap();
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
    let (model, projects) = Foreign::new(tensors).into_model(Path::new("vgg"), graph).unwrap();
    assert_eq!(projects, [Project::Torchvision]);
    let weight = &model.weight("pre_logits.fc1.weight");
    assert_eq!(weight.shape, [4, 2, 3, 512]);
    assert_eq!(weight.data.iter().position(|&w| w == 1.0), Some(((o * 2 + y) * 3 + x) * 512 + c));
}

/// Parts of pickles.
const FLOATS: &[u8] = b"ctorch\nFloatStorage\n";
const REBUILD: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n";

fn text(s: &str) -> Vec<u8> {
    [&b"X"[..], &(s.len() as u32).to_le_bytes(), s.as_bytes()].concat()
}

fn int(i: u64) -> Vec<u8> {
    [&b"\x8a\x08"[..], &i.to_le_bytes()].concat()
}

fn ints(sizes: &[u64]) -> Vec<u8> {
    [b"(".to_vec(), sizes.iter().flat_map(|&s| int(s)).collect(), b"t".to_vec()].concat()
}

fn storage(class: &[u8], key: &str, len: u64) -> Vec<u8> {
    [&b"("[..], &text("storage"), class, &text(key), &text("cpu"), &int(len), b"tQ"].concat()
}

fn view(storage: &[u8], offset: u64, shape: &[u64], strides: &[u64]) -> Vec<u8> {
    [REBUILD, b"(", storage, &int(offset), &ints(shape), &ints(strides), b"\x89}tR"].concat()
}

/// A state dict of one tensor `w`.
fn dict_of(value: &[u8]) -> Vec<u8> {
    [&b"\x80\x02}"[..], &text("w"), value, b"s."].concat()
}

fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        zip.start_file(*name, stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// An archive of a state dict of one tensor, over a storage of 16 bytes.
fn zipped(value: &[u8]) -> Vec<u8> {
    archive(&[("a/data.pkl", &dict_of(value)), ("a/data/0", &[0; 16])])
}

fn pickled(pickle: &[u8]) -> Vec<u8> {
    archive(&[("a/data.pkl", pickle)])
}

/// Old form with this object, keys and storages.
fn old(object: &[u8], rest: &[u8]) -> Vec<u8> {
    let magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";
    [&magic[..], b"\x80\x02M\xe9\x03.", b"\x80\x02}.", object, rest].concat()
}

fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = bytes.windows(from.len()).position(|w| w == from).expect("the pattern is there");
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}

/// The archive with the compression method of its entries set to DEFLATE.
fn deflated(mut bytes: Vec<u8>) -> Vec<u8> {
    for (signature, field) in [(b"PK\x03\x04", 8), (b"PK\x01\x02", 10)] {
        let at: Vec<usize> = (0..bytes.len() - 4).filter(|&i| &bytes[i..i + 4] == signature).collect();
        at.into_iter().for_each(|i| bytes[i + field] = 8);
    }
    bytes
}

/// An archive whose three storages are all the bytes of the first.
fn overlapping() -> Vec<u8> {
    let key = |key: &str| [text(key), view(&storage(FLOATS, key, 1024), 0, &[8], &[1])].concat();
    let pickle = [&b"\x80\x02}("[..], &key("0"), &key("1"), &key("2"), b"u."].concat();
    let mut bytes = archive(&[("a/data.pkl", &pickle), ("a/data/0", &[0; 4096]), ("a/data/1", b""), ("a/data/2", b"")]);
    let records: Vec<usize> = (0..bytes.len() - 4).filter(|&i| &bytes[i..i + 4] == b"PK\x01\x02").collect();
    for record in [records[2], records[3]] {
        // Checksum and sizes, and where the entry begins.
        for field in [16..28, 42..46] {
            let first = bytes[records[1]..][field.clone()].to_vec();
            bytes[record..][field].copy_from_slice(&first);
        }
    }
    bytes
}

/// An archive of a state dict of one tensor of this name, over a storage of 16 bytes.
fn named(name: &str, value: &[u8]) -> Vec<u8> {
    let pickle = [&b"\x80\x02}"[..], &text(name), value, b"s."].concat();
    archive(&[("a/data.pkl", &pickle), ("a/data/0", &[0; 16])])
}

/// A pickle that makes a dict of one long list of pairs, `times` times: a file of a few bytes per copy.
fn copied_list(pairs: usize, times: usize) -> Vec<u8> {
    let pair = b"h\x00";
    [
        &b"\x80\x02NN\x86q\x000]("[..],
        &pair.repeat(pairs),
        b"eq\x01ccollections\nOrderedDict\nq\x020",
        &b"h\x02h\x01\x85R0".repeat(times),
        b"}.",
    ]
    .concat()
}

/// A tuple of two of the tuple before, memoised each time: 2^n values by name, n by index.
fn doubled(times: usize) -> Vec<u8> {
    [b"\x80\x02K\x01q\x00".to_vec(), b"0h\x00h\x00\x86q\x00".repeat(times), b".".to_vec()].concat()
}

/// Files that ask for memory or time beyond proportion are refused by the program in a quarter of a gibibyte of address
/// space, and in seconds.
#[cfg(target_os = "linux")]
#[test]
fn hostile_files_take_little_memory() {
    const ADDRESS_SPACE_KB: u64 = 256 << 10;
    let folder = tempfile::tempdir().unwrap();
    let sound = view(&storage(FLOATS, "0", 4), 0, &[2, 2], &[2, 1]);
    let nested = |open: &[u8], times: usize| [b"\x80\x02".to_vec(), open.repeat(times), b".".to_vec()].concat();
    let key = text(&"k".repeat(5 << 20));
    let storage_of_key = [b"(", &text("storage")[..], FLOATS, &key, &text("cpu"), &int(4), b"tq\x00Q0"].concat();
    let repeated_key = [b"\x80\x02", &storage_of_key[..], &b"h\x00Q0".repeat(340_000), b"}."].concat();
    let long_name = {
        let header =
            format!("{{\"{}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}}}", "module.".repeat(2 << 20));
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()
    };
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("copied.pth", pickled(&copied_list(400_000, 100_000)), "steps"),
        ("doubled.pth", pickled(&doubled(100)), "no tensors by name"),
        ("tuples.pth", pickled(&nested(b")\x85", 500_000)), "no tensors by name"),
        ("lists.pth", pickled(&nested(b"]Na", 300_000)), "no tensors by name"),
        (
            "memo.pth",
            pickled(&[b"\x80\x04".to_vec(), b")\x94".repeat(500_000), b".".to_vec()].concat()),
            "no tensors by name",
        ),
        ("key.pth", pickled(&repeated_key), "names a storage by"),
        ("name.pth", named(&"module.".repeat(1 << 20), &sound), "a tensor's name"),
        ("name.safetensors", long_name, "a tensor's name"),
    ];
    for (file, bytes, expected) in cases {
        let (path, out) = (folder.path().join(file), folder.path().join("out"));
        fs::write(&path, &bytes).unwrap();
        let start = Instant::now();
        let run = Command::new("sh")
            .args([
                "-c",
                &format!("ulimit -v {ADDRESS_SPACE_KB} && exec \"$0\" \"$@\""),
                env!("CARGO_BIN_EXE_depthshrinker"),
            ])
            .args(["import", "mobilenetv2-0.1", "--threads", "1", "-o"])
            .args([&out, &path])
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&run.stderr).into_owned();
        assert_eq!(run.status.code(), Some(1), "{file}: {error}");
        assert!(error.contains(expected) && error.lines().count() == 1 && error.len() < 500, "{file}: {error}");
        assert!(start.elapsed() < Duration::from_secs(5), "{file} took {:?}", start.elapsed());
        assert!(!out.exists());
    }
}

/// Checkpoints hold more than weights: averaged ones go first, as timm loads them, and what is no tensor is skipped.
#[test]
fn checkpoints_are_searched_for_their_weights() {
    let tensor = |offset: u64| view(&storage(FLOATS, "0", 4), offset, &[1], &[1]);
    let dict = |offset: u64| [&b"}"[..], &text("w"), &tensor(offset), b"s"].concat();
    let namespace = [
        &b"cargparse\nNamespace\n)\x81}("[..],
        &text("lr"),
        b"G\x3f\xb9\x99\x99\x99\x99\x99\x9a",
        &text("opt"),
        &text("sgd"),
        b"ub",
    ]
    .concat();
    let numbers: Vec<u8> = [0.5f32, 1.5, 2.5, 3.5].iter().flat_map(|x| x.to_le_bytes()).collect();
    let read = |entries: &[(&str, Vec<u8>)]| {
        let entries: Vec<u8> = entries.iter().flat_map(|(key, value)| [text(key), value.clone()].concat()).collect();
        let pickle = [&b"\x80\x02}("[..], &entries, b"u."].concat();
        parse_torch(Path::new("x.pth"), &archive(&[("a/data.pkl", &pickle), ("a/data/0", &numbers)])).unwrap()
    };
    let entries = [("args", namespace), ("state_dict", dict(0)), ("state_dict_ema", dict(1))];
    assert_eq!(read(&entries)["w"].data, [1.5]);
    assert_eq!(read(&entries[..2])["w"].data, [0.5]);
    assert_eq!(read(&[("model", dict(2)), ("model_ema", dict(3))])["w"].data, [3.5]);
    assert_eq!(read(&[("net", dict(2)), ("best", tensor(0))])["w"].data, [2.5]);
}

/// PyTorch of 2017 wrote a tensor as an object of its class that gets its content as attributes.
#[test]
fn tensors_of_2017_are_read() {
    let parts = [storage(FLOATS, "0", 4), int(1), ints(&[3]), ints(&[1])].concat();
    let state = [&b"("[..], &parts, b"tb"].concat();
    let numbers: Vec<u8> = [0.5f32, 1.5, 2.5, 3.5].iter().flat_map(|x| x.to_le_bytes()).collect();
    for class in [&b"ctorch\nFloatTensor\n)\x81"[..], b"ctorch.cuda\nFloatTensor\n)R", b"ctorch\nTensor\n)\x81"] {
        let plain = [class, &state].concat();
        let parameter = [b"ctorch.nn.parameter\nParameter\n(", &plain[..], b"\x88t\x81"].concat();
        let hooked = [b"ctorch._utils\n_rebuild_parameter_with_state\n(", &plain[..], b"\x88}}tR"].concat();
        for value in [plain, parameter, hooked] {
            let bytes = archive(&[("a/data.pkl", &dict_of(&value)), ("a/data/0", &numbers)]);
            let tensors = parse_torch(Path::new("x.pth"), &bytes).unwrap();
            assert_eq!(tensors["w"], Tensor { shape: vec![3], data: vec![1.5, 2.5, 3.5] });
        }
    }
}

#[test]
fn the_parts_make_sound_files() {
    let sound = view(&storage(FLOATS, "0", 4), 0, &[2, 2], &[2, 1]);
    let tensors = parse_torch(Path::new("x.pth"), &zipped(&sound)).unwrap();
    assert_eq!(tensors["w"], Tensor::zeros(&[2, 2]));
    let keys = [b"\x80\x02]".to_vec(), text("0"), b"a.".to_vec(), 4u64.to_le_bytes().to_vec(), vec![0; 16]].concat();
    let tensors = parse_torch(Path::new("x.pth"), &old(&dict_of(&sound), &keys)).unwrap();
    assert_eq!(tensors["w"], Tensor::zeros(&[2, 2]));
}

/// A file's name in the table, the file, and what its error says.
type Hostile = (&'static str, Vec<u8>, &'static str);

/// A tensor of four numbers, from which the hostile files are made.
fn sound_view() -> Vec<u8> {
    view(&storage(FLOATS, "0", 4), 0, &[2, 2], &[2, 1])
}

fn hostile_archives() -> Vec<Hostile> {
    let sound = sound_view();
    let whole = zipped(&sound);
    let mut wrong_sum = whole.clone();
    let at = wrong_sum.windows(16).position(|w| w == [0; 16]).unwrap();
    wrong_sum[at + 3] ^= 1;
    let real = fs::read(fixture("timm.pth")).unwrap();
    vec![
        ("empty", vec![], "no file of PyTorch's"),
        ("text", b"weights".to_vec(), "no file of PyTorch's"),
        ("tar, as the oldest PyTorch wrote", [&b"sys_info\0"[..], &[0; 512]].concat(), "no file of PyTorch's"),
        ("zip cut to its magic", b"PK\x03\x04".to_vec(), "damaged zip"),
        ("zip cut in the middle", real[..real.len() / 2].to_vec(), "damaged zip"),
        ("zip without its last byte", real[..real.len() - 1].to_vec(), "damaged zip"),
        ("entries over one another", overlapping(), "overlap"),
        ("zip of something else", archive(&[("readme", b"hello")]), "without a data.pkl"),
        ("zip without its storage", pickled(&dict_of(&sound)), "data/0"),
        ("damaged storage", wrong_sum, "is damaged"),
        ("compressed entries", deflated(whole.clone()), "compressed"),
        ("big-endian", archive(&[("a/byteorder", b"big"), ("a/data.pkl", &dict_of(&sound))]), "big-endian"),
        ("short storage", archive(&[("a/data.pkl", &dict_of(&sound)), ("a/data/0", &[0; 12])]), "has 12 bytes"),
    ]
}

fn hostile_tensors() -> Vec<Hostile> {
    let own = storage(FLOATS, "0", 4);
    vec![
        ("path in a key", zipped(&view(&storage(FLOATS, "../data.pkl", 4), 0, &[4], &[1])), "cannot be read"),
        ("huge storage", zipped(&view(&storage(FLOATS, "0", 1 << 60), 0, &[4], &[1])), "its pickle says"),
        ("huge shape", zipped(&view(&own, 0, &[1 << 40], &[1])), "more numbers than the file can hold"),
        ("overflowing shape", zipped(&view(&own, 0, &[1 << 40, 1 << 40], &[0, 0])), "more numbers than"),
        ("repeated by stride 0", zipped(&view(&own, 0, &[1 << 20], &[0])), "more numbers than"),
        ("negative shape", zipped(&view(&own, 0, &[u64::MAX], &[1])), "a tensor that is none"),
        ("shape beyond storage", zipped(&view(&own, 0, &[5], &[1])), "beyond its storage"),
        ("offset beyond storage", zipped(&view(&own, 3, &[2], &[1])), "beyond its storage"),
        ("huge offset", zipped(&view(&own, i64::MAX as u64, &[1], &[1])), "beyond its storage"),
        ("huge stride", zipped(&view(&own, 1, &[2], &[i64::MAX as u64])), "beyond its storage"),
        ("nine dimensions", zipped(&view(&own, 0, &[1; 9], &[1; 9])), "a tensor that is none"),
        ("shape and strides of two lengths", zipped(&view(&own, 0, &[2, 2], &[1])), "a tensor that is none"),
        (
            "unknown storage",
            zipped(&view(&storage(b"ctorch\nComplexFloatStorage\n", "0", 4), 0, &[1], &[1])),
            "torch.ComplexFloatStorage",
        ),
        (
            "storage in two ways",
            zipped(&[&own[..], b"0", &view(&storage(FLOATS, "0", 3), 0, &[1], &[1])].concat()),
            "two ways",
        ),
        ("tensor of no storage", zipped(&view(&int(7), 0, &[1], &[1])), "a tensor that is none"),
    ]
}

fn hostile_pickles() -> Vec<Hostile> {
    let sound = sound_view();
    let nested = |open: &[u8], times: usize| [b"\x80\x02".to_vec(), open.repeat(times), b".".to_vec()].concat();
    let call = |function: &str| {
        pickled(&[b"\x80\x02c", function.as_bytes(), &b"\n("[..], &text("touch /tmp/run"), b"tR."].concat())
    };
    let stack_global = [&b"\x80\x04"[..], &text("posix"), &text("system"), b"\x93", &text("id"), b"\x85R."].concat();
    // Memo slot 0 is a dict that holds itself.
    let cyclic = [&b"\x80\x02}q\x00"[..], &text("state_dict"), b"h\x00s."].concat();
    vec![
        ("os.system", call("os\nsystem"), "names os.system"),
        ("builtins.eval", call("builtins\neval"), "names builtins.eval"),
        ("a whole model", call("torchvision.models.resnet\nResNet"), "names torchvision.models.resnet.ResNet"),
        ("a name in two lines", call("torch._utils\n_rebuild\x1b[31m"), "names torch._utils._rebuild"),
        ("posix.system from the stack", pickled(&stack_global), "names posix.system"),
        ("calling a dict", pickled(b"\x80\x02})R."), "calls what is no function"),
        ("INST", pickled(b"\x80\x02(ios\nsystem\n."), "opcode 0x69"),
        ("reading another file's extension", pickled(b"\x80\x02\x82\x01."), "opcode 0x82"),
        ("cyclic", pickled(&cyclic), "no tensors by name"),
        ("list in itself", pickled(b"\x80\x02]q\x00h\x00a."), "no tensors by name"),
        ("deep lists", pickled(&nested(b"]", 1_000_000)), "no tensors by name"),
        ("deep tuples", pickled(&nested(b")\x85", 500_000)), "no tensors by name"),
        ("deep marks", pickled(&nested(b"(", 1_000_000)), "more values than it has made"),
        ("endless", pickled(&nested(b"N0", 4_000_000)), "steps"),
        ("stack underflow", pickled(&nested(b"\x86q\x00h\x00h\x00", 10)), "more values than it has made"),
        ("copied lists", pickled(&copied_list(400_000, 100_000)), "steps"),
        ("long storage key", zipped(&view(&storage(FLOATS, &"k".repeat(5_000_000), 4), 0, &[4], &[1])), "bytes"),
        ("long name of a tensor", named(&"module.".repeat(300), &sound), "a tensor's name"),
        ("an empty tensor's attributes", zipped(b"ctorch\nFloatTensor\n)R}b"), "a tensor that is none"),
        ("attributes of a number", pickled(b"\x80\x02K\x01}b."), "what has none"),
        ("unknown memo", pickled(b"\x80\x02h\x05."), "has not made"),
        ("empty stack", pickled(b"\x80\x02."), "more values than it has made"),
        ("no end", pickled(b"\x80\x02}"), "cut short"),
        ("text longer than the file", pickled(b"\x80\x02X\xff\xff\xff\xff."), "cut short"),
        ("text longer than memory", pickled(b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xff."), "cut short"),
        ("no text", pickled(b"\x80\x02X\x01\0\0\0\xff."), "not UTF-8"),
        ("append to a dict", pickled(b"\x80\x02}Na."), "no list"),
        ("odd items", pickled(b"\x80\x02}(Nu."), "no dict"),
        ("no dict", pickled(b"\x80\x02K\x01."), "no tensors by name"),
    ]
}

/// Files of the form before zip.
fn hostile_old_files() -> Vec<Hostile> {
    let sound = sound_view();
    let keys = |count: u64, bytes: usize| {
        [b"\x80\x02]".to_vec(), text("0"), b"a.".to_vec(), count.to_le_bytes().to_vec(), vec![0; bytes]].concat()
    };
    vec![
        ("old, cut behind the magic", old(b"", b""), "cut short"),
        ("old, other protocol", replaced(&old(b"", b""), b"M\xe9\x03", b"M\xea\x03"), "protocol"),
        ("old, cut within a storage", old(&dict_of(&sound), &keys(4, 15)), "ends within the storage"),
        ("old, without its storage", old(&dict_of(&sound), b"\x80\x02]."), "is missing"),
        ("old, wrong count", old(&dict_of(&sound), &keys(u64::MAX, 16)), "its pickle says 4"),
        ("old, unknown storage", old(b"\x80\x02}.", &keys(4, 16)), "no tensor uses"),
        ("old, os.system", old(b"\x80\x02cos\nsystem\n.", b""), "names os.system"),
    ]
}

#[test]
fn hostile_files_are_refused_in_one_line() {
    let cases = [hostile_archives(), hostile_tensors(), hostile_pickles(), hostile_old_files()].concat();
    for (name, bytes, expected) in cases {
        let start = Instant::now();
        let error = parse_torch(Path::new("hostile.pth"), &bytes).expect_err(name).to_string();
        assert!(error.starts_with("hostile.pth: ") && error.contains(expected), "{name}: {error}");
        assert!(!error.chars().any(char::is_control) && error.len() < 500, "{name}: {error:?}");
        assert!(start.elapsed() < Duration::from_secs(5), "{name} took {:?}", start.elapsed());
    }
}

#[test]
fn any_flipped_or_missing_byte_is_refused_or_harmless() {
    for name in ["forms.pth", "forms-old.pth"] {
        let bytes = fs::read(fixture(name)).unwrap();
        for at in 0..bytes.len() {
            for change in [0x01, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] ^= change;
                if let Err(error) = parse_torch(Path::new(name), &damaged) {
                    assert!(!error.to_string().contains('\n'), "{name}: {error}");
                }
            }
            assert!(parse_torch(Path::new(name), &bytes[..at]).is_err(), "{name} cut to {at} bytes");
        }
    }
}
