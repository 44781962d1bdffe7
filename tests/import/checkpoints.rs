//! Checkpoints as training scripts write them: the weights are found, and what lies beside them is skipped.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use depthshrinker::device::Device;
use depthshrinker::io::layout::nchw_to_nhwc;
use depthshrinker::io::tensors::read_tensors;
use depthshrinker::io::torch::{TorchFile, parse_torch, parse_torch_file, read_torch};
use depthshrinker::networks::NetworkOptions;
use depthshrinker::pipeline::{import, logits};
use depthshrinker::tensor::Tensor;

use super::pickles::{FLOATS, archive, checkpoint, dict, dict_of, int, ints, state_dict, storage, text, view};
use super::{INPUT, fixture, images};

/// Four numbers, the storage of the small files here.
fn numbers() -> Vec<(String, Vec<u8>)> {
    vec![("a/data/0".into(), [0.5f32, 1.5, 2.5, 3.5].iter().flat_map(|x| x.to_le_bytes()).collect())]
}

/// The number at this place of [`numbers`], as a tensor.
fn tensor(offset: u64) -> Vec<u8> {
    view(&storage(FLOATS, "0", 4), offset, &[1], &[1])
}

/// A state dict of that number.
fn weights(offset: u64) -> Vec<u8> {
    dict(&[("conv.weight", tensor(offset))])
}

fn read(value: &[u8]) -> depthshrinker::Result<TorchFile> {
    parse_torch_file(Path::new("x.pth"), &checkpoint(value, &numbers()))
}

/// The pickles of things that are no tensors, by name.
fn beside() -> BTreeMap<String, Vec<u8>> {
    let hexed: BTreeMap<String, String> =
        serde_json::from_str(&fs::read_to_string(fixture("beside.json")).unwrap()).unwrap();
    let byte = |hex: &[u8]| u8::from_str_radix(std::str::from_utf8(hex).unwrap(), 16).unwrap();
    hexed.into_iter().map(|(name, hex)| (name, hex.as_bytes().chunks(2).map(byte).collect())).collect()
}

/// One line that a reader can act on.
fn refusal(value: &[u8], name: &str) -> String {
    let error = read(value).expect_err(name).to_string();
    assert!(
        error.starts_with("x.pth: ") && !error.chars().any(char::is_control) && error.len() < 650,
        "{name}: {error:?}"
    );
    error
}

/// What Python pickled with three protocols lies before and behind the weights, in them, and alone.
#[test]
fn what_is_no_tensor_is_skipped() {
    let objects = beside();
    assert!(objects.len() > 150, "{}", objects.len());
    for (name, object) in objects {
        let skipped = |value: &[u8]| {
            let file = read(value).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(file.tensors.len(), 1, "{name}");
            assert_eq!(file.tensors["conv.weight"].data, [1.5], "{name}");
        };
        skipped(&dict(&[("beside", object.clone()), ("state_dict", weights(1))]));
        skipped(&dict(&[("state_dict", weights(1)), ("beside", object.clone())]));
        skipped(&dict(&[("conv.weight", tensor(1)), ("beside", object.clone())]));
        skipped(&dict(&[("all", dict(&[("beside", object.clone()), ("params", weights(1))]))]));
        let error = refusal(&object, &name);
        assert!(error.contains("holds no tensors by name"), "{name}: {error}");
        refusal(&dict(&[("epoch", int(3)), ("beside", object)]), &name);
    }
}

/// Averaged weights go first, as timm loads them; then what is called like weights; then the only dict of tensors.
#[test]
fn wrappers_are_searched_for_their_weights() {
    let momentum = dict(&[("state", dict(&[("conv.weight", dict(&[("exp_avg", tensor(0))]))]))]);
    /// The file's entries, the keys of the state dict, and its number.
    type Row = (Vec<(&'static str, Vec<u8>)>, &'static str, f32);
    let rows: Vec<Row> = vec![
        (vec![("conv.weight", tensor(0))], "", 0.5),
        (vec![("state_dict", weights(0)), ("state_dict_ema", weights(1))], "state_dict_ema", 1.5),
        (vec![("state_dict", weights(0)), ("epoch", int(1))], "state_dict", 0.5),
        (vec![("model", weights(2)), ("model_ema", weights(3))], "model_ema", 3.5),
        (vec![("net", weights(2)), ("best", tensor(0))], "net", 2.5),
        (vec![("params", weights(0))], "params", 0.5),
        (vec![("params", weights(0)), ("params_ema", weights(1))], "params_ema", 1.5),
        (vec![("student", weights(1)), ("teacher", weights(2))], "student", 1.5),
        (vec![("teacher", weights(2))], "teacher", 2.5),
        (vec![("anything at all", weights(3)), ("loss", b"G\0\0\0\0\0\0\0\0".to_vec())], "anything at all", 3.5),
        (vec![("checkpoint", dict(&[("state_dict", weights(1)), ("step", int(9))]))], "checkpoint.state_dict", 1.5),
        (vec![("a", dict(&[("b", dict(&[("c", dict(&[("d", weights(2))]))]))]))], "a.b.c.d", 2.5),
        (vec![("state_dict", weights(0)), ("old", dict(&[("state_dict", weights(1))]))], "state_dict", 0.5),
        (vec![("optimizer", momentum.clone()), ("mine", weights(1))], "mine", 1.5),
        (vec![("mine", weights(1)), ("statistics", dict(&[("mean", tensor(0))]))], "mine", 1.5),
        // Subclasses of dict, as defaultdict and settings are.
        (
            vec![("state_dict", [b"ctrain\nState\n)\x81(".to_vec(), text("w"), tensor(2), b"u".to_vec()].concat())],
            "state_dict",
            2.5,
        ),
    ];
    for (entries, part, number) in rows {
        let file = read(&dict(&entries)).unwrap_or_else(|e| panic!("{part}: {e}"));
        assert_eq!((file.part.as_str(), file.tensors.len()), (part, 1));
        assert_eq!(file.tensors.values().next().unwrap().data, [number], "{part}");
    }
    // What names no weight is taken where there is nothing else, as long as there is one.
    assert_eq!(read(&dict(&[("net", dict(&[("w", tensor(2))]))])).unwrap().part, "net");
    let error = refusal(&dict(&[("first", weights(0)), ("second", weights(1))]), "two");
    assert!(error.contains("2 sets of tensors by name, first, second; save the one you mean alone: "), "{error}");
    assert!(error.contains("`torch.save(torch.load(FILE)['first'], 'weights.pth')`"), "{error}");
}

/// Where a file holds no weights, the message says what it holds, and how to get weights from it.
#[test]
fn files_without_weights_say_what_they_hold() {
    let object = |class: &str| [format!("c{}\n", class.replace('/', "\n")).as_bytes(), b")\x81}b"].concat();
    let skipped = |class: &[u8], len| view(&storage(class, "0", len), 0, &[1], &[1]);
    let whole = "`torch.save(torch.load(FILE, weights_only=False)";
    let rows: Vec<(&str, Vec<u8>, Vec<String>)> = vec![
        (
            "a whole model",
            object("torchvision.models.resnet/ResNet"),
            vec![
                "an object of torchvision.models.resnet.ResNet".into(),
                format!("{whole}.state_dict(), 'weights.pth')`"),
            ],
        ),
        (
            "a whole model in a dict",
            dict(&[("epoch", int(3)), ("date", object("datetime/datetime")), ("model", object("models.yolo/Detect"))]),
            vec!["epoch (a number), date (an object".into(), format!("{whole}['model'].state_dict(), 'weights.pth')`")],
        ),
        (
            "TorchScript",
            object("__torch__.torchvision.models.mobilenetv2/MobileNetV2"),
            vec!["a TorchScript program".into(), "torch.jit.load(FILE).state_dict()".into()],
        ),
        ("a list", b"](K\x01K\x02e".to_vec(), vec!["a list of 2; save the state dict".into()]),
        ("a tensor", tensor(0), vec!["a tensor of torch.FloatStorage".into()]),
        (
            "integers",
            dict(&[("w.weight", skipped(b"ctorch\nLongStorage\n", 2))]),
            vec!["w.weight (a tensor of torch.LongStorage)".into()],
        ),
        (
            "quantised weights",
            dict(&[("w.weight", skipped(b"ctorch\nQInt8Storage\n", 16))]),
            vec!["w.weight (a tensor of torch.QInt8Storage)".into()],
        ),
        (
            "a newer type",
            dict(&[("w.weight", skipped(b"ctorch\nFloat4Storage\n", 16))]),
            vec!["w.weight (an object of torch.Float4Storage)".into()],
        ),
        (
            "an optimizer",
            dict(&[("state", b"}".to_vec()), ("param_groups", b"]".to_vec())]),
            vec!["state (a dict of 0), param_groups (a list of 0); save the state dict of a model".into()],
        ),
        ("many entries", dict(&["a", "b", "c", "d"].map(|key| (key, int(1)))), vec!["c (a number), …; save".into()]),
        ("nothing", b"N".to_vec(), vec!["holds no tensors by name".into()]),
    ];
    for (name, value, expected) in rows {
        let error = refusal(&value, name);
        assert!(expected.iter().all(|part| error.contains(part)), "{name}: {error}");
    }
}

/// Tensors in forms that PyTorch's safe loader reads: rebuilt by later versions, of subclasses, and with attributes.
#[test]
fn every_way_to_rebuild_a_tensor_is_read() {
    let arguments = |more: &[u8]| {
        [
            b"(".to_vec(),
            storage(FLOATS, "0", 4),
            int(1),
            ints(&[2]),
            ints(&[1]),
            b"\x89}".to_vec(),
            more.to_vec(),
            b"t".to_vec(),
        ]
        .concat()
    };
    let function = |name: &str| format!("ctorch._utils\n{name}\n").into_bytes();
    let called = |name: &str, more: &[u8]| [function(name), arguments(more), b"R".to_vec()].concat();
    let plain = called("_rebuild_tensor_v2", b"");
    let typed = [
        b"ctorch._tensor\n_rebuild_from_type_v2\n(".to_vec(),
        function("_rebuild_tensor_v2"),
        b"ctorch\nTensor\n".to_vec(),
        arguments(b""),
        dict(&[("note", text("mine"))]),
        b"tR".to_vec(),
    ]
    .concat();
    let rows = [
        ("version 2", plain.clone()),
        ("version 3", called("_rebuild_tensor_v3", b"ctorch\nfloat32\nN")),
        (
            "of another device",
            [function("_rebuild_device_tensor_from_cpu_tensor"), b"(".to_vec(), plain.clone(), b"NN\x89tR".to_vec()]
                .concat(),
        ),
        ("with attributes", typed.clone()),
        (
            "a parameter with attributes",
            [function("_rebuild_parameter"), b"(".to_vec(), typed, b"\x88}tR".to_vec()].concat(),
        ),
        ("a buffer", [b"ctorch.nn.parameter\nBuffer\n(".to_vec(), plain, b"t\x81".to_vec()].concat()),
    ];
    for (name, value) in rows {
        let file = read(&dict(&[("w", value)])).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(file.tensors["w"], Tensor { shape: vec![2], data: vec![1.5, 2.5] }, "{name}");
    }
}

/// A history of a million and a half losses is no reason to refuse a file.
#[test]
fn long_histories_are_skipped() {
    let losses = [b"](".to_vec(), b"G\x3f\xb9\x99\x99\x99\x99\x99\x9a".repeat(1_500_000), b"e".to_vec()].concat();
    assert_eq!(read(&dict(&[("losses", losses), ("model", weights(1))])).unwrap().part, "model");
}

/// DepthShrinker's own form: a configuration object, an optimizer and a scheduler beside `model` and `model_ema`. The
/// averaged weights are PyTorch's of the fixture; the others are something else.
#[test]
fn checkpoints_of_depthshrinker_import() {
    let averaged = read_torch(&fixture("timm.pth")).unwrap();
    let mut trained = averaged.clone();
    trained.values_mut().flat_map(|t| &mut t.data).for_each(|x| *x *= 0.5);
    // A search has learned scores besides.
    let scores =
        (1..17).map(|i| (format!("blocks.{i}.0.act.act_fun.slope_param"), Tensor { shape: vec![], data: vec![0.25] }));
    let searched: BTreeMap<String, Tensor> = averaged.clone().into_iter().chain(scores).collect();
    let beside = beside();
    let object = |name: &str| beside[name].clone();
    for (ema, left_out) in [(&averaged, 0), (&searched, 16)] {
        let (model, mut storages) = state_dict(&trained, 0);
        let (model_ema, more) = state_dict(ema, trained.len());
        storages.extend(more);
        storages.push(("a/data/momentum".into(), vec![0; 16]));
        let momentum = dict(&[("momentum_buffer", view(&storage(FLOATS, "momentum", 4), 0, &[4], &[1]))]);
        let by_index = [b"}K\x00".to_vec(), momentum, b"s".to_vec()].concat();
        let optimizer = dict(&[("state", by_index), ("param_groups", b"]".to_vec())]);
        let value = dict(&[
            ("model", model),
            ("optimizer", optimizer),
            ("lr_scheduler", object("MultiStepLR, protocol 2")),
            ("max_accuracy", object("numpy scalar, protocol 2")),
            ("epoch", int(3)),
            ("config", object("CfgNode, protocol 2")),
            ("model_ema", model_ema),
        ]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ckpt.pth");
        fs::write(&path, checkpoint(&value, &storages)).unwrap();
        let imported = import("mobilenetv2-0.1", &path, &NetworkOptions::new(INPUT, 1000), None).unwrap();
        assert_eq!((imported.names.part.as_str(), imported.names.scores), ("model_ema", left_out));
        let input = nchw_to_nhwc(&images(), INPUT.c, INPUT.pixels());
        let got = logits(&Device::Cpu, &imported.model, &input).unwrap();
        let expected = &read_tensors(&fixture("logits.safetensors")).unwrap().tensors["logits"].data;
        let error = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error < 1e-5, "logits differ from PyTorch's by {error:e}");

        let program = Command::new(env!("CARGO_BIN_EXE_depthshrinker"))
            .args(["import", "mobilenetv2-0.1", "--image-size", "40", "-o"])
            .args([&folder.path().join("m.safetensors"), &path])
            .output()
            .unwrap();
        let told = String::from_utf8(program.stdout).unwrap();
        assert!(told.contains("under the names of timm, from \"model_ema\" of the checkpoint"), "{told}");
        assert_eq!(told.contains("16 learned scores of activations are left out"), left_out == 16, "{told}");
    }
}

/// PyTorch of 2017 wrote a tensor as an object of its class that gets its content as attributes.
#[test]
fn tensors_of_2017_are_read() {
    let parts = [storage(FLOATS, "0", 4), int(1), ints(&[3]), ints(&[1])].concat();
    let state = [&b"("[..], &parts, b"tb"].concat();
    let numbers = &numbers()[0].1;
    for class in [&b"ctorch\nFloatTensor\n)\x81"[..], b"ctorch.cuda\nFloatTensor\n)R", b"ctorch\nTensor\n)\x81"] {
        let plain = [class, &state].concat();
        let parameter = [b"ctorch.nn.parameter\nParameter\n(", &plain[..], b"\x88t\x81"].concat();
        let hooked = [b"ctorch._utils\n_rebuild_parameter_with_state\n(", &plain[..], b"\x88}}tR"].concat();
        for value in [plain, parameter, hooked] {
            let bytes = archive(&[("a/data.pkl", &dict_of(&value)), ("a/data/0", numbers)]);
            let tensors = parse_torch(Path::new("x.pth"), &bytes).unwrap();
            assert_eq!(tensors["w"], Tensor { shape: vec![3], data: vec![1.5, 2.5, 3.5] });
        }
    }
}
