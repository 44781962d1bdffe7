//! Recipes for uses that are not published: synthetic signals and pictures of their kind, through the whole job with few images.

use std::f64::consts::PI;
use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use depthshrinker::data::{DataSource, Dataset, open};
use depthshrinker::graph::Op;
use depthshrinker::io::read_model;
use image::{Rgb, RgbImage};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

/// Samples of a beat, as the MIT-BIH files have them.
const SAMPLES: usize = 187;

fn recipe(name: &str) -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("recipes").join(format!("{name}.toml")).display().to_string()
}

fn shrink(dir: &Path, args: &[&str]) -> Value {
    let mut command = Command::cargo_bin("depthshrinker").expect("the binary of this package");
    command.current_dir(dir).arg("shrink").args(args).args(["--device", "cpu", "--measure-seconds", "0.2", "--json"]);
    let output = command.assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).expect("one JSON value on stdout")
}

/// One beat: a P wave, the QRS complex and a T wave as bumps; class 1 has a wide complex and no P wave, class 2 comes early and is
/// upside down behind.
fn beat(rng: &mut impl Rng, class: usize) -> Vec<f64> {
    let (start, gain) = (rng.random_range(-6.0..6.0), rng.random_range(0.5..2.0));
    let bumps: &[(f64, f64, f64)] = match class {
        0 => &[(40.0, 6.0, 0.15), (72.0, 2.5, 1.0), (79.0, 2.5, -0.3), (118.0, 11.0, 0.3)],
        1 => &[(76.0, 9.0, 0.9), (92.0, 9.0, -0.4), (130.0, 12.0, 0.2)],
        _ => &[(28.0, 6.0, 0.15), (56.0, 2.5, 1.0), (63.0, 2.5, -0.3), (104.0, 11.0, -0.35)],
    };
    let value = |at: usize| {
        let bump = |(centre, width, height): &(f64, f64, f64)| {
            height * (-((at as f64 - centre - start) / width).powi(2) / 2.0).exp()
        };
        bumps.iter().map(bump).sum::<f64>() + 0.05 * (2.0 * PI * at as f64 / SAMPLES as f64).sin()
    };
    (0..SAMPLES).map(|at| gain * (value(at) + rng.random_range(-0.03..0.03)) + 0.3).collect()
}

/// Files as the MIT-BIH beats come: classes are written as numbers with a point.
fn write_beats(folder: &Path, name: &str, count: usize, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut text = String::new();
    for index in 0..count {
        let values: Vec<String> = beat(&mut rng, index % 3).iter().map(|value| format!("{value:.6e}")).collect();
        text.push_str(&format!("{},{:.3e}\n", values.join(","), (index % 3) as f64));
    }
    fs::write(folder.join(name), text).unwrap();
}

fn beats(train: usize, test: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("beats")).unwrap();
    write_beats(&dir.path().join("beats"), "mitbih_train.csv", train, 1);
    write_beats(&dir.path().join("beats"), "mitbih_test.csv", test, 2);
    dir
}

/// The network learns beats, in one dimension from end to end, and merges to convolutions of one dimension.
#[test]
fn arrhythmia_in_one_dimension() {
    let dir = beats(384, 96);
    let config = recipe("arrhythmia-1d");
    let data = ["--config", &config, "--data", "signals:beats", "--out", "o", "--batch", "32"];
    let epochs = ["--train-epochs", "5", "--search-epochs", "1", "--finetune-epochs", "2"];
    let result = shrink(dir.path(), &[&data[..], &epochs].concat());
    let top1 = |network: usize| result["networks"][network]["top1"].as_f64().unwrap();
    assert!(top1(0) > 80.0 && top1(2) > 80.0, "{} and {} of three classes", top1(0), top1(2));
    assert!(result["latency_share"].as_f64().unwrap() <= 0.7);
    assert!(result["merge"]["segments"].as_u64().unwrap() > 0);
    let merged = read_model(&dir.path().join("o/merged.safetensors")).unwrap().0;
    let shape = merged.graph.input_shape();
    assert_eq!((shape.h, shape.w, shape.c), (1, SAMPLES, 1));
    let mut wide = 0;
    for node in &merged.graph.nodes {
        if let Op::Conv(conv) = node.op {
            let window = conv.window;
            assert_eq!((window.k_h, window.stride_h, window.pad.top, window.pad.bottom), (1, 1, 0, 0), "{}", node.name);
            wide += usize::from(node.name.ends_with(".conv") && window.k_w == 3 && conv.groups == 1);
        }
    }
    assert_eq!(wide as u64, result["merge"]["segments"].as_u64().unwrap());
    // `eval` finds the same files by the model's normalisation.
    let mut eval = Command::cargo_bin("depthshrinker").unwrap();
    eval.current_dir(dir.path()).args(["eval", "o/merged.safetensors", "--data", "signals:beats", "--json"]);
    let told: Value = serde_json::from_slice(&eval.assert().success().get_output().stdout).unwrap();
    assert_eq!(told["top1"], result["networks"][2]["top1"]);
}

/// Each signal fills its own range, whatever its gain and offset; what is no signal is refused with its line.
#[test]
fn signals_are_read_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let source = |name: &str| DataSource { name: format!("signals:{}", at(name).display()), ..DataSource::default() };
    let write = |folder: &str, train: &str, test: &str| {
        fs::create_dir_all(at(folder)).unwrap();
        fs::write(at(folder).join("train.csv"), train).unwrap();
        fs::write(at(folder).join("a_test_set.CSV"), test).unwrap();
    };
    write("good", "0,1,0.5,2\n-3,-1, -2 ,0\n\n5,5,5,1.0\n", "1e3,2e3,1.25e3,2\r\n");
    let data = open(&source("good")).unwrap();
    assert_eq!((data.train.len(), data.test.len(), data.train.classes()), (3, 1, 3));
    let shape = data.train.shape();
    assert_eq!((shape.height, shape.width, shape.channels), (1, 3, 1));
    assert_eq!(data.train.labels(), [2, 0, 1]);
    let levels = |set: &Dataset, index: usize| {
        let mut levels = [0; 3];
        set.image(index, &mut levels).unwrap();
        levels
    };
    assert_eq!(levels(&data.train, 0), [0, 255, 128]);
    assert_eq!(levels(&data.train, 1), [0, 255, 128]);
    assert_eq!(levels(&data.train, 2), [0, 0, 0]);
    assert_eq!(levels(&data.test, 0), [0, 255, 64]);

    let line = "1,2,3,0\n";
    for (folder, train, test, words) in [
        ("short", "1,2,3,0\n1,2,0\n", line, "line 2: has other than 3 samples"),
        ("long", "1,2,3,0\n1,2,3,4,5,0\n", line, "line 2: has other than 3 samples"),
        ("word", "1,2,x,0\n", line, "line 1: \"x\" is no finite number"),
        ("nan", "1,2,3,0\n\n1,nan,3,0\n", line, "line 3: \"nan\" is no finite number"),
        ("class", "1,2,3,0.5\n", line, "ends in 0.5, which is no class"),
        ("negative", "1,2,3,-1\n", line, "ends in -1, which is no class"),
        ("large", "1,2,3,1e9\n", line, "which is no class from 0 to 4095"),
        ("empty", "", line, "its first line has 0 samples"),
        ("one", "1,0\n", line, "its first line has 1 samples"),
        ("lengths", line, "1,2,3,4,0\n", "its signals have 4 samples"),
        ("unknown", line, "1,2,3,0\n1,2,3,1\n", "line 2 is of class 1"),
    ] {
        write(folder, train, test);
        let error = open(&source(folder)).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(folder) && !error.contains('\n'), "{folder}: {error}");
    }
    fs::write(at("binary"), [0xff, 0xfe, 0x00]).unwrap();
    fs::create_dir(at("none")).unwrap();
    for (folder, words) in [("none", "no file *train*.csv"), ("nowhere", "nowhere"), ("binary", "binary")] {
        assert!(open(&source(folder)).unwrap_err().to_string().contains(words), "{folder}");
    }
    fs::write(at("good").join("train-2.csv"), line).unwrap();
    assert!(open(&source("good")).unwrap_err().to_string().contains("has both"));
    fs::remove_file(at("good").join("train-2.csv")).unwrap();
    fs::write(at("good").join("train.csv"), [0xff, 0xfe, b'\n']).unwrap();
    assert!(open(&source("good")).unwrap_err().to_string().contains("is no text"));
}

/// Pictures of two classes in train/ and test/.
fn pictures(folder: &Path, classes: [&str; 2], draw: impl Fn(&mut ChaCha8Rng, usize) -> RgbImage) {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for (part, count) in [("train", 24), ("test", 8)] {
        for (index, class) in classes.iter().enumerate() {
            let place = folder.join(part).join(class);
            fs::create_dir_all(&place).unwrap();
            for number in 0..count {
                draw(&mut rng, index).save(place.join(format!("{number}.png"))).unwrap();
            }
        }
    }
}

/// Tissue: pink ground with dark nuclei, many and crowded where there is a tumour.
fn tissue(rng: &mut ChaCha8Rng, class: usize) -> RgbImage {
    let nuclei: Vec<(i32, i32, i32)> = (0..if class == 0 { 4 } else { 18 })
        .map(|_| (rng.random_range(0..48), rng.random_range(0..48), rng.random_range(2..5)))
        .collect();
    RgbImage::from_fn(48, 48, |x, y| {
        let inside = |(cx, cy, r): &(i32, i32, i32)| (x as i32 - cx).pow(2) + (y as i32 - cy).pow(2) <= r * r;
        if nuclei.iter().any(inside) { Rgb([90, 50, 130]) } else { Rgb([225, 160, 190]) }
    })
}

/// A driver: a head, and a telephone beside it or none.
fn driver(rng: &mut ChaCha8Rng, class: usize) -> RgbImage {
    let (cx, cy) = (rng.random_range(20..28), rng.random_range(16..22));
    RgbImage::from_fn(64, 48, |x, y| {
        let (x, y) = (x as i32, y as i32);
        if class == 1 && (x - cx - 11).abs() < 3 && (y - cy).abs() < 7 {
            return Rgb([15, 15, 20]);
        }
        if (x - cx).pow(2) + (y - cy).pow(2) < 64 { Rgb([200, 160, 130]) } else { Rgb([80, 90, 110]) }
    })
}

/// Both recipes for pictures run as they are but for sizes: the classes are those of the folders, and blocks are merged within the
/// time.
#[test]
fn pictures_of_tissue_and_of_drivers() {
    let dir = tempfile::tempdir().unwrap();
    let settings = "[search.sensitivity]\nimages = 16\nrecalibration = 1\nbatch = 16\n";
    for (name, classes, size, draw) in [
        ("pathology-patches", ["normal", "tumour"], 32, tissue as fn(&mut ChaCha8Rng, usize) -> RgbImage),
        ("driver-distraction", ["safe", "telephone"], 32, driver),
    ] {
        pictures(&dir.path().join(name), classes, draw);
        let config = fs::read_to_string(recipe(name)).unwrap();
        fs::write(dir.path().join("c.toml"), format!("{config}\n{settings}")).unwrap();
        let data =
            ["--config", "c.toml", "--data", name, "--image-size", &size.to_string(), "--out", &format!("o-{name}")]
                .map(str::to_owned);
        let data: Vec<&str> = data.iter().map(String::as_str).collect();
        let few = ["--net", "mobilenetv2-0.35", "--batch", "16", "--train-epochs", "1", "--finetune-epochs", "1"];
        let result = shrink(dir.path(), &[&data[..], &few].concat());
        assert_eq!(result["data"]["train"], 48, "{name}");
        assert!(result["latency_share"].as_f64().unwrap() <= 0.6 && result["merge"]["segments"].as_u64() > Some(0));
        let info = read_model(&dir.path().join(format!("o-{name}/merged.safetensors"))).unwrap().1;
        assert_eq!(info.data.unwrap().classes, classes, "{name}");
    }
}
