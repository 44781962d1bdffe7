//! Model files and checkpoints: exact round trips, and one clear line for every damaged or hostile file.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use depthshrinker::Error;
use depthshrinker::data::{Interpolation, Resize};
use depthshrinker::graph::{Bias, Conv, GraphBuilder, NodeId, Op, ParamRole};
use depthshrinker::io::atomic::remove_leftovers;
use depthshrinker::io::tensors::{read_tensors, write_tensors};
use depthshrinker::io::{Checkpoint, DataInfo, ModelInfo, Position, Sums, read_model, write_atomic, write_model};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::{Shape, Window};
use depthshrinker::tensor::Tensor;
use serde_json::json;

fn mobilenet() -> Model {
    let options = NetworkOptions { head_channels: Some(16), ..NetworkOptions::new(Shape::new(20, 28, 1), 10) };
    let mut model = Model::initialise(build("mobilenetv2-0.1", &options).unwrap(), 3).unwrap();
    // Every element its own value, so that no mix-up of positions goes unseen.
    let mut next = 0.0;
    for tensor in model.weights.values_mut() {
        for x in &mut tensor.data {
            next += 1.0;
            *x = next;
        }
    }
    model
}

/// A network with every layout a file knows: dense, depthwise, pointwise, bias, bias map, linear.
fn merged_like() -> Model {
    let mut b = GraphBuilder::new("merged", Shape::new(5, 7, 2));
    let dense = Conv { bias: Bias::Map, ..GraphBuilder::conv(2, 4, Window::square(3, 2, 1), 1) };
    let mut x = b.push("dense", Op::Conv(dense), &[NodeId::INPUT]);
    let depthwise = Conv { bias: Bias::Channel, ..GraphBuilder::conv(4, 4, Window::square(3, 1, 1), 4) };
    x = b.push("depthwise", Op::Conv(depthwise), &[x]);
    x = b.push("pointwise", Op::Conv(GraphBuilder::conv(4, 6, Window::square(1, 1, 0), 1)), &[x]);
    x = b.push("pool", Op::GlobalAvgPool, &[x]);
    b.linear("classifier", 6, 3, x);
    Model::initialise(b.finish().unwrap(), 1).unwrap()
}

fn info() -> ModelInfo {
    let classes = (0..10).map(|i| format!("class {i}")).collect();
    let (mean, std) = (vec![0.286_040_6], vec![0.353_024_24]);
    let resize = Some(Resize { shorter_side: 23, interpolation: Interpolation::Bilinear });
    ModelInfo { data: Some(DataInfo { name: "some".into(), classes, shape: Shape::new(20, 28, 1), mean, std, resize }) }
}

fn written(folder: &Path) -> PathBuf {
    let path = folder.join("model.safetensors");
    write_model(&path, &mobilenet(), &info()).unwrap();
    path
}

/// The error of reading a file, which must be one line that names the file.
fn refusal(path: &Path) -> String {
    let text = read_model(path).expect_err("must be refused").to_string();
    assert!(!text.contains('\n') && text.contains(&path.display().to_string()), "{text}");
    text
}

#[test]
fn models_survive_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = written(folder.path());
    assert_eq!(read_model(&path).unwrap(), (mobilenet(), info()));
    let again = folder.path().join("again.safetensors");
    write_model(&again, &mobilenet(), &info()).unwrap();
    assert!(fs::read(&path).unwrap() == fs::read(&again).unwrap(), "the same model must give the same bytes");
    let plain = ModelInfo::default();
    write_model(&path, &merged_like(), &plain).unwrap();
    assert_eq!(read_model(&path).unwrap(), (merged_like(), plain));
}

#[test]
fn files_have_the_ecosystem_s_layout() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let model = merged_like();
    write_model(&path, &model, &ModelInfo::default()).unwrap();
    let file = read_tensors(&path).unwrap();
    let shape = |name: &str| file.tensors[name].shape.clone();
    assert_eq!(shape("dense.weight"), [4, 2, 3, 3]);
    assert_eq!(shape("dense.bias_map"), [4, 3, 4]);
    assert_eq!(shape("depthwise.weight"), [4, 1, 3, 3]);
    assert_eq!(shape("pointwise.weight"), [6, 4, 1, 1]);
    assert_eq!(shape("classifier.weight"), [3, 6]);
    // [o, c, y, x] in the file is [o, y, x, c] in the engine; depthwise [c, 0, y, x] is [y, x, c].
    let (o, c, y, x) = (3, 1, 2, 0);
    let dense = (&model.weight("dense.weight").data, &file.tensors["dense.weight"].data);
    assert_eq!(dense.0[((o * 3 + y) * 3 + x) * 2 + c], dense.1[((o * 2 + c) * 3 + y) * 3 + x]);
    let depthwise = (&model.weight("depthwise.weight").data, &file.tensors["depthwise.weight"].data);
    assert_eq!(depthwise.0[(y * 3 + x) * 4 + o], depthwise.1[(o * 3 + y) * 3 + x]);
}

#[test]
fn half_precision_weights_are_widened() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    write_model(&path, &merged_like(), &ModelInfo::default()).unwrap();
    let bytes = fs::read(&path).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let narrow = |view: safetensors::tensor::TensorView<'_>| -> Vec<u8> {
        view.data().chunks_exact(4).flat_map(|b| [b[2], b[3]]).collect()
    };
    let narrowed: Vec<_> = file.iter().map(|(name, view)| (name, view.shape().to_vec(), narrow(view))).collect();
    let views = narrowed.iter().map(|(name, shape, data)| {
        (*name, safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.clone(), data).unwrap())
    });
    let half = safetensors::serialize(views, header.metadata().clone()).unwrap();
    fs::write(&path, half).unwrap();
    let (read, _) = read_model(&path).unwrap();
    for (name, tensor) in &merged_like().weights {
        for (a, b) in tensor.data.iter().zip(&read.weight(name).data) {
            assert_eq!(f32::from_bits(a.to_bits() & 0xffff_0000), *b, "{name}");
        }
    }
}

/// Doubles are rounded as a `.pth` file's are; what is no float is left out.
#[test]
fn every_element_type_of_a_file_is_read_or_left_out() {
    use safetensors::Dtype::{BOOL, F64, I8, I16, I32, I64, U8, U16, U32, U64};
    use safetensors::tensor::TensorView;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.safetensors");
    let doubles: Vec<u8> = [1.0, 0.1, -1e-300f64].iter().flat_map(|x| x.to_le_bytes()).collect();
    let zeros = [0; 24];
    let integers = [(BOOL, 24), (U8, 24), (I8, 24), (I16, 12), (U16, 12), (I32, 6), (U32, 6), (I64, 3), (U64, 3)];
    let mut views = vec![("double".to_owned(), TensorView::new(F64, vec![3], &doubles).unwrap())];
    views.extend(integers.map(|(dtype, n)| (format!("{dtype:?}"), TensorView::new(dtype, vec![n], &zeros).unwrap())));
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    let read = read_tensors(&path).unwrap().tensors;
    assert_eq!(
        read.into_iter().collect::<Vec<_>>(),
        [("double".into(), Tensor { shape: vec![3], data: vec![1.0, 0.1, -0.0] })]
    );
    let view = TensorView::new(safetensors::Dtype::F8_E4M3, vec![24], &zeros).unwrap();
    fs::write(&path, safetensors::serialize([("x".repeat(200), view)], None).unwrap()).unwrap();
    let text = read_tensors(&path).unwrap_err().to_string();
    assert!(text.contains("xxx… has type") && text.len() < 300, "{text}");
}

#[test]
fn damaged_files_are_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = written(folder.path());
    let whole = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for end in [0, 3, 8, 9, 100, 8 + header - 1, 8 + header, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..end]).unwrap();
        refusal(&path);
    }
    fs::write(&path, [&whole[..], b"tail"].concat()).unwrap();
    refusal(&path);
    for claim in [0, 1, u64::MAX, u64::MAX - 7, 1 << 40, whole.len() as u64 - 8] {
        fs::write(&path, [&claim.to_le_bytes(), &whole[8..]].concat()).unwrap();
        refusal(&path);
    }
    fs::write(&path, [&(1u64 << 20).to_le_bytes()[..], &vec![b'['; 1 << 20]].concat()).unwrap();
    refusal(&path);
    // A flipped byte is either harmless to the structure (a weight) or refused; it never ends in a panic.
    let header = (0..8 + header).step_by(37);
    let weights = (0..whole.len()).step_by(whole.len() / 50);
    for at in header.chain(weights) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x15;
        fs::write(&path, bytes).unwrap();
        if let Err(e) = read_model(&path) {
            assert!(!e.to_string().contains('\n'));
        }
    }
    assert!(refusal(&folder.path().join("absent")).contains("No such file") || cfg!(windows));
    assert!(refusal(folder.path()).contains("not a regular file") || cfg!(windows));
}

/// Rewrites a model file with changed tensors or metadata.
fn tampered(path: &Path, change: impl Fn(&mut BTreeMap<String, Tensor>, &mut BTreeMap<String, String>)) -> String {
    write_model(path, &mobilenet(), &info()).unwrap();
    let mut file = read_tensors(path).unwrap();
    change(&mut file.tensors, &mut file.metadata);
    write_tensors(path, &file.tensors, &file.metadata).unwrap();
    refusal(path)
}

#[test]
fn contradictions_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let text = tampered(&path, |tensors, _| drop(tensors.remove("conv_stem.weight")));
    assert!(text.contains("conv_stem.weight is missing"), "{text}");
    let text = tampered(&path, |tensors, _| drop(tensors.insert("stray".into(), Tensor::zeros(&[2]))));
    assert!(text.contains("stray belongs to no node"), "{text}");
    let text = tampered(&path, |tensors, _| {
        let tensor = tensors.get_mut("conv_stem.weight").unwrap();
        tensor.shape = vec![tensor.data.len()];
    });
    assert!(text.contains("conv_stem.weight has shape") && text.contains("expected [8, 1, 3, 3]"), "{text}");
    let text = tampered(&path, |tensors, _| tensors.get_mut("bn1.bias").unwrap().data[1] = f32::NAN);
    assert!(text.contains("bn1.bias holds numbers that are not finite"), "{text}");
    let text = tampered(&path, |tensors, _| tensors.get_mut("bn1.running_var").unwrap().data[1] = -0.5);
    assert!(text.contains("bn1.running_var holds variances below 0"), "{text}");
    let text = tampered(&path, |_, metadata| drop(metadata.remove("depthshrinker.graph")));
    assert!(text.contains("import"), "{text}");
    let text = tampered(&path, |_, metadata| drop(metadata.insert("depthshrinker.format".into(), "99".into())));
    assert!(text.contains("99"), "{text}");
    let text = tampered(&path, |_, metadata| drop(metadata.insert("depthshrinker.data".into(), "{}".into())));
    assert!(text.contains("depthshrinker.data is damaged"), "{text}");
}

/// Finite weights can still overflow: in a fold, or on the way to the logits. Neither is written or printed as a result.
#[test]
fn numbers_that_are_not_finite_are_no_result() {
    let folder = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_depthshrinker")).current_dir(folder.path()).args(args).output();
        let output = output.unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && text.lines().count() == 1, "{args:?}: {:?}: {text}", output.status);
        text
    };
    let mut model = mobilenet();
    model.weights.get_mut("bn1.weight").unwrap().data[0] = 3e38;
    model.weights.get_mut("bn1.running_var").unwrap().data[0] = 0.0;
    write_model(&folder.path().join("m.safetensors"), &model, &info()).unwrap();
    for file in ["out.onnx", "out.safetensors"] {
        assert!(run(&["export", "m.safetensors", "-o", file]).contains("conv_stem."));
        assert!(!folder.path().join(file).exists());
    }
    let mut model = mobilenet();
    model.weights.get_mut("classifier.bias").unwrap().data.fill(3e38);
    model.weights.get_mut("classifier.weight").unwrap().data.fill(3e38);
    write_model(&folder.path().join("m.safetensors"), &model, &info()).unwrap();
    let input = Tensor::full(&[1, 1, 20, 28], 1.0);
    let x = folder.path().join("x.safetensors");
    write_tensors(&x, &[("input".to_owned(), input)].into(), &Default::default()).unwrap();
    assert!(run(&["infer", "m.safetensors", "--input", "x.safetensors"]).contains("a logit is"));
}

/// An export's precision is the file's: it needs no device that computes in it.
#[test]
fn exports_in_half_precision_need_no_device() {
    let folder = tempfile::tempdir().unwrap();
    let mut model = mobilenet();
    model.weights.values_mut().for_each(|tensor| tensor.data.iter_mut().for_each(|x| *x = 0.5));
    write_model(&folder.path().join("m.safetensors"), &model, &info()).unwrap();
    let args = ["export", "m.safetensors", "-o", "m.onnx", "--precision", "f16", "--device", "cpu", "--json"];
    let output =
        Command::new(env!("CARGO_BIN_EXE_depthshrinker")).current_dir(folder.path()).args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["precision"], "f16");
}

#[test]
fn hostile_graphs_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let graph = serde_json::to_string(&mobilenet().graph).unwrap();
    let huge = "18446744073709551615";
    let hostile = [
        String::new(),
        "null".into(),
        "[".repeat(100_000),
        json!({"name": "n", "nodes": [], "blocks": []}).to_string(),
        graph.replacen("\"c_out\":8", &format!("\"c_out\":{huge}"), 1),
        graph.replacen("\"h\":20", &format!("\"h\":{huge}"), 1),
        graph.replacen("\"stride_h\":2", "\"stride_h\":0", 1),
        graph.replacen("\"groups\":1", "\"groups\":0", 1),
        graph.replacen("\"top\":1", &format!("\"top\":{huge}"), 1),
        graph.replacen("\"inputs\":[0]", "\"inputs\":[7]", 1),
        graph.replacen("\"inputs\":[0]", "\"inputs\":[]", 1),
        graph.replacen("\"op\":\"conv\"", "\"op\":\"shell\"", 1),
        graph.replacen("\"eps\":", "\"eps\":-", 1),
        graph.replacen("\"start\":", "\"start\":9", 1),
        graph.replacen("\"h\":20", "\"h\":40000", 1),
        graph.replacen("\"conv_stem\"", &format!("\"{}\"", "stem".repeat(200)), 1),
        graph.replacen("\"conv_stem\"", "\"conv\\nstem\"", 1),
    ];
    for (i, json) in hostile.iter().enumerate() {
        assert_ne!(json, &graph, "case {i} changes nothing");
        tampered(&path, |_, metadata| drop(metadata.insert("depthshrinker.graph".into(), json.clone())));
    }
}

#[test]
fn data_that_does_not_fit_its_network_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = written(folder.path());
    let before = fs::read(&path).unwrap();
    let changes: [fn(&mut DataInfo); 6] = [
        |data| data.shape.c = 3,
        |data| data.mean.push(0.0),
        |data| data.std[0] = 0.0,
        |data| drop(data.classes.pop()),
        |data| data.name.push('\n'),
        |data| data.resize.as_mut().unwrap().shorter_side = 19,
    ];
    for change in changes {
        let mut info = info();
        change(info.data.as_mut().unwrap());
        assert!(matches!(write_model(&path, &mobilenet(), &info), Err(Error::Data(_))));
    }
    assert!(fs::read(&path).unwrap() == before);
}

#[test]
fn a_file_that_says_nothing_of_resizing_still_reads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old.safetensors");
    let mut old = info();
    old.data.as_mut().unwrap().resize = None;
    write_model(&path, &mobilenet(), &old).unwrap();
    assert!(!String::from_utf8_lossy(&fs::read(&path).unwrap()).contains("resize"), "not as older programs wrote it");
    let (_, read) = read_model(&path).unwrap();
    assert_eq!(read, old);
    assert_eq!(read.data.unwrap().preprocessing().resize.shorter_side, 20);
}

#[test]
fn a_failed_write_leaves_the_old_file_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.bin");
    fs::write(&path, "old").unwrap();
    let full = || std::io::Error::from(std::io::ErrorKind::StorageFull);
    let error = write_atomic(&path, |out| {
        out.write_all(&[1; 3 << 20])?;
        Err(full())
    });
    let text = error.unwrap_err().to_string();
    assert!(text.contains("free some space") && text.contains("untouched"), "{text}");
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file was left");
    write_atomic(&path, |out| out.write_all(b"new")).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");

    let text = write_atomic(&folder.path().join("no/such/out"), |_| Ok(())).unwrap_err().to_string();
    assert!(text.contains("create the folder first"), "{text}");
    assert!(write_atomic(folder.path(), |_| Ok(())).is_err(), "a folder must not be replaced");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_device_is_an_error_and_stays_a_device() {
    use std::os::unix::fs::FileTypeExt;
    let full = Path::new("/dev/full");
    if !full.exists() {
        return;
    }
    let text = write_model(full, &mobilenet(), &info()).unwrap_err().to_string();
    assert!(text.contains("free some space"), "{text}");
    assert!(fs::metadata(full).unwrap().file_type().is_char_device());
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_permissions_are_those_of_any_new_file() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let (real, link, plain) = (folder.path().join("real"), folder.path().join("link"), folder.path().join("plain"));
    fs::write(&plain, "").unwrap();
    fs::write(&real, "old").unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    write_atomic(&link, |out| out.write_all(b"new")).unwrap();
    assert_eq!(fs::read(&real).unwrap(), b"new");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&real), mode(&plain));
}

#[test]
fn leftovers_of_killed_writes_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.bin");
    for name in ["out.bin", ".out.bin.aX3k.tmp", ".other.bin.aX3k.tmp", "out.bin.tmp"] {
        fs::write(folder.path().join(name), "").unwrap();
    }
    remove_leftovers(&path);
    let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, [".other.bin.aX3k.tmp", "out.bin", "out.bin.tmp"]);
}

fn checkpoint() -> Checkpoint {
    let model = mobilenet();
    let trained = model.graph.params().unwrap().iter().filter(|p| p.role.is_trained()).map(|p| p.len()).sum();
    // Values that a careless text form would round.
    let awkward: Vec<f32> = (0..trained).map(|i| f32::from_bits(0x0000_0001 + i as u32 * 7919)).collect();
    Checkpoint {
        model,
        optimizer: vec![awkward, vec![-0.0; trained]],
        optimizer_steps: 77,
        position: Position { stage: "search".into(), epoch: 3, step_in_epoch: 5, step: 77, finished: false },
        sums: Sums { loss: 0.1 + 0.2, correct: 11, images: 640 },
        metrics_bytes: 4096,
        hook: json!({"scores": [0.1f32, f32::MIN_POSITIVE, 1.0 / 3.0], "kept": [1, 0]}),
        job: json!({"done": ["train"]}),
        fingerprint: "abc".into(),
        data: json!({"train": 3}),
    }
}

#[test]
fn checkpoints_survive_files_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let saved = checkpoint();
    saved.write(&path).unwrap();
    let read = Checkpoint::read(&path).unwrap();
    assert_eq!(read, saved);
    let bits = |c: &Checkpoint| c.optimizer.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&read), bits(&saved), "the sign of zero and subnormal numbers count");
    assert!(read.check_fingerprint("abc").is_ok());
    assert!(matches!(read.check_fingerprint("abd"), Err(Error::Config(_))));
}

#[test]
fn damaged_checkpoints_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    write_model(&path, &mobilenet(), &info()).unwrap();
    let text = Checkpoint::read(&path).unwrap_err().to_string();
    assert!(text.contains("no checkpoint") && text.contains("--force"), "{text}");
    checkpoint().write(&path).unwrap();
    let whole = fs::read(&path).unwrap();
    for at in (0..whole.len()).step_by(whole.len() / 60) {
        fs::write(&path, &whole[..at]).unwrap();
        assert!(Checkpoint::read(&path).is_err());
    }
    checkpoint().write(&path).unwrap();
    let mut file = read_tensors(&path).unwrap();
    file.tensors.remove("optimizer:1");
    write_tensors(&path, &file.tensors, &file.metadata).unwrap();
    let text = Checkpoint::read(&path).unwrap_err().to_string();
    assert!(text.contains("optimizer state 1 is missing"), "{text}");
    assert!(file.tensors.keys().any(|name| name == "conv_stem.weight"));
}

#[test]
fn roles_without_a_layout_of_their_own_stay_as_they_are() {
    use depthshrinker::io::layout::{file_shape, from_file, nchw_to_nhwc, nhwc_to_nchw, to_file};
    for spec in merged_like().graph.params().unwrap() {
        let data: Vec<f32> = (0..spec.len()).map(|i| i as f32).collect();
        let file = to_file(&spec, &data);
        assert_eq!(from_file(&spec, file.clone()), data, "{}", spec.name);
        assert_eq!(file_shape(&spec).iter().product::<usize>(), spec.len());
        if matches!(spec.role, ParamRole::ConvBias | ParamRole::LinearWeight | ParamRole::LinearBias) {
            assert_eq!((file, file_shape(&spec)), (data, spec.shape));
        }
    }
    let nchw = [0.0, 1.0, 2.0, 10.0, 11.0, 12.0];
    assert_eq!(nchw_to_nhwc(&nchw, 2, 3), [0.0, 10.0, 1.0, 11.0, 2.0, 12.0]);
    assert_eq!(nhwc_to_nchw(&nchw_to_nhwc(&nchw, 2, 3), 2, 3), nchw);
}
