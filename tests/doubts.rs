//! What a run can do but cannot mean: a warning, or with `--strict` an error before anything is written.

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use depthshrinker::data::{Preprocessing, imagenet_class_names};
use depthshrinker::graph::{GraphBuilder, Op};
use depthshrinker::io::{DataInfo, ModelInfo, write_model};
use depthshrinker::model::{Model, Weights};
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use depthshrinker::tensor::Tensor;
use image::{Rgb, RgbImage};
use libtest_mimic::{Arguments, Trial};
use serde_json::Value;
use tempfile::TempDir;

const SIDE: usize = 32;

fn depthshrinker(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("depthshrinker").expect("the binary of this package");
    command.current_dir(dir).args(args);
    command
}

/// A colour of its own for each of a thousand classes.
fn colour(class: usize) -> [u8; 3] {
    [class % 10, class / 10 % 10, class / 100].map(|step| 25 * step as u8)
}

fn split(list: &str) -> Vec<String> {
    list.split_terminator('|').map(str::to_owned).collect()
}

/// A network that is always right about pictures of one colour: its logits are nearer to zero the nearer the mean colour is to
/// that of the class. It knows its classes by `names`; of none where these are empty.
fn colour_classifier(path: &Path, classes: usize, names: Vec<String>) {
    let shape = Shape::new(SIDE, SIDE, 3);
    let mut graph = GraphBuilder::new("colours", shape);
    let image = depthshrinker::graph::NodeId::INPUT;
    let pool = graph.push("pool", Op::GlobalAvgPool, &[image]);
    graph.linear("classifier", 3, classes, pool);
    let centres = (0..classes).map(|class| colour(class).map(|value| f32::from(value) / 255.0));
    let weight: Vec<f32> = centres.clone().flat_map(|centre| centre.map(|value| 200.0 * value)).collect();
    let bias: Vec<f32> = centres.map(|centre| -100.0 * centre.iter().map(|value| value * value).sum::<f32>()).collect();
    let weights = Weights::from([
        ("classifier.weight".to_owned(), Tensor::new(vec![classes, 3], weight).unwrap()),
        ("classifier.bias".to_owned(), Tensor::new(vec![classes], bias).unwrap()),
    ]);
    let model = Model::new(graph.finish().unwrap(), weights).unwrap();
    write_model(path, &model, &info(names, 0.0)).unwrap();
}

fn info(classes: Vec<String>, mean: f32) -> ModelInfo {
    let resize = Some(Preprocessing::imagenet(SIDE).resize);
    let shape = Shape::new(SIDE, SIDE, 3);
    let data = DataInfo { name: "theirs".into(), classes, shape, mean: vec![mean; 3], std: vec![1.0; 3], resize };
    ModelInfo { data: Some(data) }
}

/// A folder of pictures: per class its name and its colour's class.
fn pictures(root: &Path, splits: &[&str], classes: &[(String, usize)], count: usize) {
    for folder in splits {
        for (name, class) in classes {
            let folder = root.join(folder).join(name);
            fs::create_dir_all(&folder).unwrap();
            for i in 0..count {
                RgbImage::from_pixel(6, 5, Rgb(colour(*class))).save(folder.join(format!("{i}.png"))).unwrap();
            }
        }
    }
}

/// Runs a command with and without `--strict`: with it there is an error of one line that holds `doubt`, without it a warning,
/// which does not change what the command says; with no doubt both are silent. Returns the output.
fn doubted(dir: &Path, args: &[&str], doubt: &[&str]) -> Value {
    let told = |output: &[u8]| String::from_utf8_lossy(output).into_owned();
    let done = depthshrinker(dir, args).args(["--json"]).assert().success();
    let warned = told(&done.get_output().stderr);
    let warnings = warned.lines().filter(|line| line.contains("WARN")).count();
    assert_eq!(warnings, usize::from(!doubt.is_empty()), "{args:?}: {warned}");
    assert!(doubt.iter().all(|part| warned.contains(part)), "{doubt:?} are not in: {warned}");
    let again: &[&str] = if args[0] == "eval" { &["--json"] } else { &["--json", "--force"] };
    strict_outcome(depthshrinker(dir, &[args, again, &["--strict"]].concat()), doubt);
    let silent = depthshrinker(dir, &[args, again, &["--quiet"]].concat()).assert().success();
    assert!(silent.get_output().stderr.is_empty(), "{}", told(&silent.get_output().stderr));
    serde_json::from_slice(&done.get_output().stdout).expect("one JSON value on stdout")
}

fn strict_outcome(mut command: Command, doubt: &[&str]) {
    let outcome = command.assert();
    if doubt.is_empty() {
        outcome.success();
        return;
    }
    let refused = outcome.code(1);
    let told = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
    assert!(told.starts_with("error: ") && told.lines().count() == 1 && told.contains("--strict"), "{told}");
    assert!(doubt.iter().all(|part| told.contains(part)), "{doubt:?} are not in: {told}");
    assert!(refused.get_output().stdout.is_empty());
}

/// What a model says of a folder of classes that it may know by other names, in another order.
struct Naming {
    name: &'static str,
    /// The model's names.
    model: &'static str,
    /// The folders, in the order of the model's classes: folder k has pictures that the model takes for its class k.
    folders: &'static str,
    /// What is said of it; nothing where nothing is to be doubted. All pictures get the right class in any case.
    doubt: &'static [&'static str],
}

const NUMBERS: &str = "0|1|2|3|4|5|6|7|8|9|10|11";
const WORDS: &str = "nil|one|two|three|four|five|six|seven|eight|nine|ten|eleven";

const NAMINGS: [Naming; 16] = [
    Naming { name: "numbers for names", model: WORDS, folders: NUMBERS, doubt: &[] },
    Naming { name: "numbers for numbers", model: NUMBERS, folders: NUMBERS, doubt: &[] },
    Naming { name: "numbers for no names", model: "", folders: NUMBERS, doubt: &[] },
    Naming { name: "numbers with zeros", model: NUMBERS, folders: "00|01|02|03|04|05|06|07|08|09|10|11", doubt: &[] },
    Naming {
        name: "numbers that were sorted as text",
        model: "0|1|10|11|2|3|4|5|6|7|8|9",
        folders: "0|1|10|11|2|3|4|5|6|7|8|9",
        doubt: &[],
    },
    Naming { name: "names in another order", model: WORDS, folders: WORDS, doubt: &[] },
    Naming { name: "names in other letters", model: "cat|hot dog|emu", folders: "CAT|hot_dog|Emu", doubt: &[] },
    Naming { name: "synonyms", model: "tench, Tinca tinca|goldfish", folders: "tench|goldfish", doubt: &[] },
    Naming { name: "ids for names", model: "tench|goldfish", folders: "n01440764|n01443537", doubt: &[] },
    Naming { name: "ids", model: "n01443537|n01440764", folders: "n01443537|n01440764", doubt: &[] },
    Naming {
        name: "a class that it does not know",
        model: "cat|dog",
        folders: "cat|bird",
        doubt: &["1 of the 2 classes", "`bird`", "in the place of `dog`"],
    },
    Naming {
        name: "one of three",
        model: "dog|cat|emu",
        folders: "dog|cat|ant",
        doubt: &["`ant`, which is in the place of `emu`"],
    },
    Naming {
        name: "no class that it knows",
        model: "cat|dog",
        folders: "ant|bee",
        doubt: &["2 of the 2 classes", "`ant`, `bee`"],
    },
    Naming {
        name: "names for numbers",
        model: "0|1|2",
        folders: "a|b|c",
        doubt: &["3 of the 3 classes", "in the place of `0`, `1`, `2`"],
    },
    Naming { name: "other numbers", model: "0|1|2", folders: "1|2|3", doubt: &["`3`"] },
    Naming { name: "other ids", model: "n01440764|n01443537", folders: "n01440764|n01484850", doubt: &["`n01484850`"] },
];

fn evaluates(row: &Naming) {
    let dir = tempfile::tempdir().unwrap();
    let folders = split(row.folders);
    colour_classifier(&dir.path().join("m.safetensors"), folders.len(), split(row.model));
    let classes: Vec<(String, usize)> = folders.into_iter().enumerate().map(|(class, name)| (name, class)).collect();
    pictures(&dir.path().join("p"), &["val"], &classes, 1);
    let told = doubted(dir.path(), &["eval", "m.safetensors", "--data", "p"], row.doubt);
    assert_eq!(told["top1"], 100.0, "{}", row.name);
}

/// A thousand folders of ImageNet's classes, by number and by name.
fn imagenet_by(name_of: impl Fn(usize) -> String) {
    let dir = tempfile::tempdir().unwrap();
    let names = imagenet_class_names();
    colour_classifier(&dir.path().join("m.safetensors"), names.len(), names.clone());
    let classes: Vec<(String, usize)> = (0..names.len()).map(|class| (name_of(class), class)).collect();
    pictures(&dir.path().join("p"), &["val"], &classes, 1);
    let told = doubted(dir.path(), &["eval", "m.safetensors", "--data", "p"], &[]);
    assert_eq!((&told["top1"], &told["images"]), (&100.0.into(), &1000.into()));
}

/// A folder with pictures of two classes, and models of a MobileNetV2 for them that call the classes so.
fn cat_and_dog(models: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    pictures(&dir.path().join("p"), &["train", "val"], &[("cat".into(), 3), ("dog".into(), 700)], 2);
    let options = NetworkOptions { head_channels: Some(8), ..NetworkOptions::new(Shape::new(SIDE, SIDE, 3), 2) };
    let model = Model::initialise(build("mobilenetv2-0.1", &options).unwrap(), 1).unwrap();
    for (file, names) in models {
        write_model(&dir.path().join(file), &model, &info(split(names), 0.5)).unwrap();
    }
    dir
}

/// Flags of a training of seconds.
const SHORT: [&str; 6] = ["--image-size", "32", "--epochs", "1", "--batch", "2"];
const NET: [&str; 4] = ["--net", "mobilenetv2-0.1", "--head-channels", "8"];

fn one_class_alone() {
    let dir = tempfile::tempdir().unwrap();
    pictures(&dir.path().join("p"), &["train", "val"], &[("cat".into(), 3)], 2);
    let args = [&["train", "--data", "p"][..], &NET, &SHORT].concat();
    let strict = depthshrinker(dir.path(), &[&args[..], &["--strict", "--out", "none"]].concat());
    let doubt = ["p has one class, `cat`", "always right"];
    strict_outcome(strict, &doubt);
    assert!(!dir.path().join("none").exists(), "a refused run left a folder");
    assert_eq!(doubted(dir.path(), &args, &doubt)["top1"], 100.0);
    doubted(dir.path(), &["eval", "runs/train/original.safetensors", "--data", "p"], &doubt);
}

fn images_of_one_class() {
    let dir = cat_and_dog(&[("m.safetensors", "cat|dog")]);
    let args = ["eval", "m.safetensors", "--data", "p", "--test-limit", "1"];
    doubted(dir.path(), &args, &["all test images of p that are used, 1, are of the class `cat`"]);
    let args = [&["train", "--data", "p", "--train-limit", "1"][..], &NET, &SHORT[..4], &["--batch", "1"]].concat();
    doubted(dir.path(), &args, &["all training images of p that are used, 1, are of the class `cat`"]);
}

fn classes_without_training_images() {
    let dir = tempfile::tempdir().unwrap();
    let args = [&["train", "--train-limit", "4", "--test-limit", "20"][..], &NET, &SHORT[2..]].concat();
    doubted(dir.path(), &args, &["6 of the 10 classes of ", "no training images and cannot be learnt", "and 2 more"]);
}

fn batch_norm_over_one_value() {
    let dir = cat_and_dog(&[]);
    let train = [&["train", "--data", "p", "--input-stride", "2"][..], &NET, &SHORT[..4]].concat();
    let doubt = ["train: with batch 1", "batch-norms have one value per channel", "give --batch 2 or more"];
    doubted(dir.path(), &[&train[..], &["--batch", "1"]].concat(), &doubt);
    doubted(dir.path(), &[&train[..], &["--batch", "2", "--out", "two"]].concat(), &[]);
    // Maps of 2x2 have four values.
    let larger = [&["train", "--data", "p", "--out", "larger"][..], &NET, &SHORT[..4], &["--batch", "1"]].concat();
    doubted(dir.path(), &larger, &[]);
    // Every stage of the whole job has its batch.
    let shrink = [
        "shrink",
        "--method",
        "learned",
        "--data",
        "p",
        "--input-stride",
        "2",
        "--image-size",
        "32",
        "--batch",
        "1",
        "--strict",
    ];
    let all = ["train: with batch 1", "search: with batch 1", "finetune: with batch 1"];
    strict_outcome(depthshrinker(dir.path(), &[&shrink[..], &NET].concat()), &all);
}

fn stages_on_other_classes() {
    let dir = cat_and_dog(&[("m.safetensors", "bird|cat"), ("own.safetensors", "dog|cat")]);
    let keep = ["--keep-list", "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0"];
    let doubt = ["1 of the 2 classes of p: `dog`", "in the place of `bird`"];
    let stages: [&[&str]; 3] = [
        &["search", "m.safetensors", "--data", "p"],
        &[&["finetune", "m.safetensors", "--data", "p"][..], &keep].concat(),
        &["shrink", "--model", "m.safetensors", "--data", "p", "--batch", "2"],
    ];
    for stage in stages {
        let batch: &[&str] = if stage[0] == "shrink" { &[] } else { &["--epochs", "1", "--batch", "2"] };
        strict_outcome(depthshrinker(dir.path(), &[stage, batch, &["--strict"]].concat()), &doubt);
    }
    // What comes out knows the class that it learnt.
    let finetune = [stages[1], &["--epochs", "1", "--batch", "2"]].concat();
    doubted(dir.path(), &finetune, &doubt);
    let (_, info) = depthshrinker::io::read_model(&dir.path().join("runs/finetune/shrunk.safetensors")).unwrap();
    assert_eq!(info.data.unwrap().classes, ["dog", "cat"]);
    let again = ["eval", "runs/finetune/shrunk.safetensors", "--data", "p"];
    doubted(dir.path(), &again, &[]);
    doubted(dir.path(), &["eval", "own.safetensors", "--data", "p"], &[]);
}

fn a_teacher_of_other_classes() {
    let files = [("m.safetensors", "cat|dog"), ("swapped.safetensors", "dog|cat"), ("other.safetensors", "cat|emu")];
    let dir = cat_and_dog(&files);
    let keep = ["--keep-list", "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0", "--epochs", "1", "--batch", "2", "--data", "p"];
    let finetune = |teacher| [&["finetune", "m.safetensors", "--teacher", teacher][..], &keep].concat();
    doubted(dir.path(), &finetune("m.safetensors"), &[]);
    let strict = |teacher| depthshrinker(dir.path(), &[&finetune(teacher)[..], &["--strict", "--force"]].concat());
    strict_outcome(strict("swapped.safetensors"), &["the teacher's class 0 is `dog`", "is `cat`"]);
    strict_outcome(strict("other.safetensors"), &["the teacher's class 1 is `emu`", "is `dog`"]);
}

fn main() {
    let trial = |name: &str, test: fn()| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    let mut trials: Vec<Trial> = NAMINGS
        .iter()
        .map(|row| {
            Trial::test(format!("names/{}", row.name), || {
                evaluates(row);
                Ok(())
            })
        })
        .collect();
    trials.extend([
        trial("imagenet/by number", || imagenet_by(|class| class.to_string())),
        trial("imagenet/by name", || imagenet_by(|class| imagenet_class_names()[class].replace('/', " "))),
        trial("one class alone", one_class_alone),
        trial("images of one class", images_of_one_class),
        trial("classes without training images", classes_without_training_images),
        trial("batch-norm over one value", batch_norm_over_one_value),
        trial("stages on other classes", stages_on_other_classes),
        trial("a teacher of other classes", a_teacher_of_other_classes),
    ]);
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
