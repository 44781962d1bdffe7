//! The commands on a folder of pictures, with every augmentation of ImageNet training.

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use depthshrinker::io::{read_model, write_model};
use image::{Rgb, RgbImage};
use predicates::prelude::*;
use serde_json::Value;

const CONFIG: &str = r#"
[network]
name = "mobilenetv2-0.25"
head_channels = 64
[train]
epochs = 1
batch = 8
[train.augment]
flip = true
erase = 0.5
erase_mode = "pixel"
color_jitter = 0.4
resized_crop = {}
rand_augment = {}
[search]
method = "learned"
[search.train]
epochs = 1
batch = 8
[search.train.augment]
resized_crop = { scale = [0.5, 1.0] }
[finetune.train]
epochs = 1
batch = 8
[finetune.train.augment]
rand_augment = { magnitude = 9, layers = 3 }
[measure]
seconds = 0.0
"#;

fn depthshrinker(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("depthshrinker").expect("the binary of this package");
    command.current_dir(dir).args(args);
    command
}

fn json(dir: &Path, args: &[&str]) -> Value {
    let output = depthshrinker(dir, args).arg("--json").assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).expect("one JSON value on stdout")
}

/// A folder with a configuration and `pictures/{train,val}/{dark,light}/*.jpg`, no two of one size.
fn prepared() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (split, count) in [("train", 12), ("val", 4)] {
        for (class, base) in [("dark", 20), ("light", 190)] {
            let folder = root.path().join("pictures").join(split).join(class);
            fs::create_dir_all(&folder).unwrap();
            for i in 0..count {
                let picture = RgbImage::from_fn(50 + i * 3, 70 - i * 2, |x, y| {
                    Rgb([base + (x % 16) as u8, base + (y % 32) as u8, base])
                });
                picture.save(folder.join(format!("{i}.jpg"))).unwrap();
            }
        }
    }
    fs::write(root.path().join("c.toml"), CONFIG).unwrap();
    root
}

#[test]
fn the_whole_job_runs_and_does_not_depend_on_threads() {
    let root = prepared();
    let dir = root.path();
    let shrink = |out: &str, threads: &str| {
        let args = ["shrink", "--config", "c.toml", "--data", "pictures", "--image-size", "40", "--out", out, "-q"];
        depthshrinker(dir, &args).args(["--threads", threads]).assert().success();
        fs::read(dir.join(out).join("merged.safetensors")).unwrap()
    };
    assert!(shrink("one", "1") == shrink("three", "3"), "one thread and three give different networks");

    let echo = fs::read_to_string(dir.join("one/config.toml")).unwrap();
    for key in ["[train.augment.resized_crop]", "[finetune.train.augment.rand_augment]", "erase_mode = \"pixel\""] {
        assert!(echo.contains(key), "{key} is not in: {echo}");
    }
    // No --image-size: the model knows its own.
    let merged = "one/merged.safetensors";
    let told = json(dir, &["eval", merged, "--data", "pictures"]);
    assert_eq!(told["images"], 8);
    let result: Value = serde_json::from_str(&fs::read_to_string(dir.join("one/result.json")).unwrap()).unwrap();
    let networks = result["networks"].as_array().unwrap();
    let own = networks.iter().find(|network| network["name"] == "merged").unwrap();
    assert_eq!(told["top1"], own["top1"], "eval and the run see different images");
    let told = json(dir, &["infer", merged, "pictures/val/dark/0.jpg", "pictures/val/light/1.jpg"]);
    assert_eq!(told[1]["top"].as_array().unwrap().len(), 2);
    assert!(told[0]["top"][0]["label"] == "dark" || told[0]["top"][0]["label"] == "light");
}

#[test]
fn the_stages_alone_take_a_folder_too() {
    let root = prepared();
    let dir = root.path();
    let stage = |args: &[&str]| {
        let config = ["--config", "c.toml", "--data", "pictures", "-q"];
        depthshrinker(dir, args).args(config).assert().success();
    };
    stage(&["train", "--image-size", "40"]);
    let model = "runs/train/original.safetensors";
    stage(&["search", model]);
    stage(&["finetune", model, "--plan", "runs/search/plan.json"]);
    assert_eq!(json(dir, &["eval", "runs/finetune/shrunk.safetensors", "--data", "pictures"])["images"], 8);
}

/// Names of classes stay with a model whose data only has ids, and are right after every stage.
#[test]
fn a_model_keeps_the_names_of_its_classes() {
    let root = prepared();
    let dir = root.path();
    let shrunk = "runs/finetune/shrunk.safetensors";
    let stage = |args: &[&str]| {
        let config = ["--config", "c.toml", "--data", "pictures", "-q"];
        depthshrinker(dir, args).args(config).assert().success();
    };
    stage(&["train", "--image-size", "40"]);
    let (model, mut info) = read_model(&dir.join("runs/train/original.safetensors")).unwrap();
    info.data.as_mut().unwrap().classes = vec!["a dark one".into(), "a light one".into()];
    write_model(&dir.join("named.safetensors"), &model, &info).unwrap();
    let keep = ["--keep-list", "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,0"];
    stage(&[&["finetune", "named.safetensors"][..], &keep].concat());
    depthshrinker(dir, &["merge", shrunk, "-o", "merged.safetensors"]).assert().success();
    let told = json(dir, &["infer", "merged.safetensors", "pictures/val/dark/0.jpg"]);
    let label = told[0]["top"][0]["label"].as_str().unwrap().to_owned();
    assert!(label == "a dark one" || label == "a light one", "{label}");
}

/// ImageNet's validation images are often all that is there.
#[test]
fn an_evaluation_needs_no_training_images() {
    let root = prepared();
    let dir = root.path();
    let args = ["train", "--config", "c.toml", "--data", "pictures", "--image-size", "40", "-q"];
    depthshrinker(dir, &args).assert().success();
    let eval = ["eval", "runs/train/original.safetensors", "--data", "pictures"];
    let before = json(dir, &eval);
    fs::rename(dir.join("pictures/train/dark"), dir.join("pictures/train/darker")).unwrap();
    depthshrinker(dir, &eval).assert().code(1).stderr(predicate::str::contains("`darker` is missing"));
    fs::remove_dir_all(dir.join("pictures/train")).unwrap();
    assert_eq!(json(dir, &eval), before);
    let none = ["train", "--config", "c.toml", "--data", "pictures", "--out", "again"];
    depthshrinker(dir, &none).assert().code(1).stderr(predicate::str::contains("has no folder `train`"));
}

#[test]
fn a_picture_that_cannot_be_read_stops_the_training_and_is_named() {
    let root = prepared();
    let bad = root.path().join("pictures/train/light/3.jpg");
    let whole = fs::read(&bad).unwrap();
    fs::write(&bad, &whole[..whole.len() / 2]).unwrap();
    let args = ["train", "--config", "c.toml", "--data", "pictures", "--image-size", "40", "-q"];
    depthshrinker(root.path(), &args)
        .assert()
        .code(1)
        .stderr(predicate::str::contains("light/3.jpg").and(predicate::str::contains("cut short")));
}

#[test]
fn what_is_no_picture_is_left_out_with_a_word_once_per_set() {
    let root = prepared();
    let dir = root.path();
    let light = dir.join("pictures/train/light");
    fs::create_dir(light.join("folder.png")).unwrap();
    for i in 0..3 {
        fs::write(light.join(format!("{i}.webp")), "webp").unwrap();
        fs::write(dir.join(format!("pictures/train/dark/{i}.txt")), "notes").unwrap();
    }
    fs::write(light.join(".hidden"), "").unwrap();
    let train = ["train", "--config", "c.toml", "--data", "pictures", "--image-size", "40"];
    let done = depthshrinker(dir, &train).assert().success();
    let told = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
    let warnings: Vec<&str> = told.lines().filter(|line| line.contains("left out")).collect();
    assert_eq!(warnings.len(), 1, "{told}");
    assert!(warnings[0].contains("pictures/train: 7 of 31 entries are left out"), "{told}");

    for entry in fs::read_dir(&light).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "jpg") {
            fs::remove_file(path).unwrap();
        }
    }
    depthshrinker(dir, &train).arg("--force").assert().code(1).stderr(
        predicate::str::contains("light: has no .jpg, .jpeg or .png files (but ")
            .and(predicate::str::contains("0.webp").or(predicate::str::contains("folder.png"))),
    );
}

#[test]
fn imagenet_is_where_the_data_dir_says() {
    let root = prepared();
    let dir = root.path();
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/mobilenetv2-1.0.toml");
    let shrink = ["shrink", "--config", recipe.to_str().unwrap(), "-q"];
    depthshrinker(dir, &shrink).env_remove("DEPTHSHRINKER_DATA").assert().code(1).stderr(
        predicate::str::starts_with("error: data: imagenet not found").and(predicate::str::contains("--data-dir")),
    );
    fs::write(dir.join("named.toml"), CONFIG.to_owned() + "[data]\nname = \"imagenet\"\nimage_size = 40\n").unwrap();
    for place in ["pictures", "."] {
        if place == "." {
            fs::rename(dir.join("pictures"), dir.join("imagenet")).unwrap();
        }
        depthshrinker(dir, &["train", "--config", "named.toml", "--data-dir", place, "--force", "-q"])
            .assert()
            .success();
    }
}
