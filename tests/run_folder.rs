//! A run and its folder: one process at a time, data that were moved or changed meanwhile, disks that are full, and what is
//! refused before it costs anything.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use depthshrinker::config::Config;
use depthshrinker::io::Checkpoint;
use depthshrinker::io::checkpoint::fingerprint;
use image::{Rgb, RgbImage};
use serde_json::Value;
use tempfile::TempDir;

const NETWORK: [&str; 5] = ["--net", "mobilenetv2-0.25", "--head-channels", "64", "-q"];

fn program() -> PathBuf {
    assert_cmd::cargo::cargo_bin("depthshrinker")
}

fn depthshrinker(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.current_dir(dir).args(args).stdin(Stdio::null());
    command
}

fn run(dir: &Path, args: &[&str]) -> Output {
    depthshrinker(dir, args).output().expect("the program starts")
}

fn succeeds(dir: &Path, args: &[&str]) -> String {
    let output = run(dir, args);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{args:?}: {told}");
    told
}

/// Fails with a code and one line that holds all of `words`.
fn fails(dir: &Path, args: &[&str], code: i32, words: &[&str]) {
    let output = run(dir, args);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {told}");
    assert!(told.starts_with("error: ") && told.lines().count() == 1, "{args:?}: {told}");
    assert!(words.iter().all(|word| told.contains(word)), "{args:?}: {words:?} are not in: {told}");
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// All files of a run and when they were written, but for the note of who locks it.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries.filter(|path| !path.ends_with(".lock")).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

/// `<place>/{train,val}/{cat,dog,emu}/*.png`, no two alike.
fn pictures(place: &Path) {
    for (split, count) in [("train", 8), ("val", 4)] {
        for (label, class) in ["cat", "dog", "emu"].iter().enumerate() {
            let folder = place.join(split).join(class);
            fs::create_dir_all(&folder).unwrap();
            for i in 0..count {
                let base = (label * 60 + i * 3 + split.len()) as u8;
                // Of one size, so that two files can change places without a trace in the listing.
                RgbImage::from_fn(40, 40, |x, y| Rgb([base, (x * 5) as u8, (y * 3) as u8 ^ base]))
                    .save(folder.join(format!("{i}.png")))
                    .unwrap();
            }
        }
    }
}

/// Starts a training on pictures with so many epochs and waits until one of them is done.
fn begun(dir: &Path, args: &[&str], out: &str) -> Child {
    let child = depthshrinker(dir, args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while !fs::metadata(dir.join(out).join("metrics.jsonl")).is_ok_and(|m| m.len() > 0) {
        assert!(started.elapsed() < Duration::from_secs(60), "no epoch within a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

#[cfg(unix)]
fn interrupt(mut child: Child) {
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    child.wait().unwrap();
}

/// Training on pictures in a folder, named as given.
fn on_pictures<'a>(data: &'a str, out: &'a str, epochs: &'a str) -> Vec<&'a str> {
    let own = ["train", "--data", data, "--image-size", "32", "--batch", "8", "--epochs", epochs, "--out", out];
    [&own[..], &NETWORK].concat()
}

#[cfg(unix)]
#[test]
fn a_run_goes_on_where_its_data_lie_now_and_to_the_same_bits() {
    let root = folder();
    let dir = root.path();
    pictures(&dir.join("pets"));
    let absolute = dir.join("pets").to_str().unwrap().to_owned();
    let places = [dir.join("moved"), dir.join("moved/pets")].map(|place| place.to_str().unwrap().to_owned());
    let [parent, inside] = &places;
    // What the data are called; where they go; how a resume is told.
    let rows: [(&str, &str, &[&str]); 6] = [
        ("pets", "elsewhere", &["--data-dir", "elsewhere"]),
        ("pets", "elsewhere", &["--data", "elsewhere"]),
        ("pets", "moved/pets", &["--data-dir", parent]),
        ("pets", "moved/pets", &["--data", "pets", "--data-dir", "moved"]),
        (&absolute, "moved/pets", &["--data-dir", inside]),
        (&absolute, "elsewhere", &["--data", "elsewhere"]),
    ];
    for (row, (name, place, flags)) in rows.into_iter().enumerate() {
        let (whole, parts) = (format!("whole{row}"), format!("parts{row}"));
        succeeds(dir, &on_pictures(name, &whole, "30"));
        interrupt(begun(dir, &on_pictures(name, &parts, "30"), &parts));
        fs::create_dir_all(dir.join(place).parent().unwrap()).unwrap();
        fs::rename(dir.join("pets"), dir.join(place)).unwrap();

        let resume = ["train", "--out", &parts, "--resume", "-q"];
        fails(dir, &resume, 2, &["pets is no folder", "--data-dir"]);
        succeeds(dir, &[&resume[..], flags].concat());
        // The new place is known from now on.
        succeeds(dir, &resume);
        let model = |out: &str| fs::read(dir.join(out).join("original.safetensors")).unwrap();
        assert!(model(&whole) == model(&parts), "{flags:?}: other bits");
        fs::rename(dir.join(place), dir.join("pets")).unwrap();
        let _ = fs::remove_dir(dir.join("moved"));
    }
}

/// Big-endian IDX files of 28x28 images whose pixels follow from their labels.
fn idx(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    for (prefix, count) in [("train", 40u32), ("t10k", 20)] {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<u8>>();
        let labels: Vec<u8> = (0..count).map(|i| (i % 10) as u8).collect();
        let pixels = labels.iter().flat_map(|&label| (0..784u32).map(move |p| (p as u8).wrapping_mul(label)));
        let images: Vec<u8> = words(&[0x0803, count, 28, 28]).into_iter().chain(pixels).collect();
        fs::write(folder.join(format!("{prefix}-images-idx3-ubyte")), images).unwrap();
        fs::write(folder.join(format!("{prefix}-labels-idx1-ubyte")), [words(&[0x0801, count]), labels].concat())
            .unwrap();
    }
}

#[test]
fn a_named_set_is_found_in_its_new_place_too() {
    let root = folder();
    let dir = root.path();
    idx(&dir.join("old"));
    let train = ["train", "--data", "mnist", "--data-dir", "old", "--batch", "8", "--epochs", "1", "--out", "r"];
    succeeds(dir, &[&train[..], &NETWORK].concat());
    let model = fs::read(dir.join("r/original.safetensors")).unwrap();
    fs::rename(dir.join("old"), dir.join("new")).unwrap();
    let resume = ["train", "--resume", "--out", "r", "-q"];
    fails(dir, &resume, 1, &["mnist not found", "--data-dir"]);
    for flags in [&["--data-dir", "new"][..], &["--data", "./new"], &[]] {
        succeeds(dir, &[&resume[..], flags].concat());
        assert!(fs::read(dir.join("r/original.safetensors")).unwrap() == model, "{flags:?}: other bits");
    }
    // Another set is another setting, and other images are other images.
    fails(dir, &[&resume[..], &["--data", "fashion-mnist", "--data-dir", "new"]].concat(), 2, &["other settings"]);
    let images = dir.join("new/train-images-idx3-ubyte");
    let mut bytes = fs::read(&images).unwrap();
    bytes[16 + 784 * 5] ^= 1;
    fs::write(&images, bytes).unwrap();
    fails(dir, &resume, 1, &["other images", "train: image 5 has another content", "--force"]);
}

/// What the place of the images was when it was a setting of the run, and its checkpoint said nothing of them.
#[test]
fn a_run_whose_settings_held_the_place_of_its_data_goes_on() {
    let root = folder();
    let dir = root.path();
    idx(&dir.join("old"));
    let train = ["train", "--data", "mnist", "--data-dir", "old", "--batch", "8", "--epochs", "1", "--out", "r"];
    succeeds(dir, &[&train[..], &NETWORK].concat());
    let path = dir.join("r/checkpoint.safetensors");
    let Config { measure, evaluate, .. } = Config::default();
    let config = Config { threads: 0, measure, evaluate, ..Config::read(&dir.join("r/config.toml")).unwrap() };
    assert_eq!(config.data.dir.as_deref(), Some(Path::new("old")));
    let fingerprint = fingerprint(&("train", &config, Vec::<String>::new())).unwrap();
    let saved = Checkpoint { fingerprint, data: Value::Null, ..Checkpoint::read(&path).unwrap() };
    saved.write(&path).unwrap();
    let resume = ["train", "--resume", "--out", "r", "-q"];
    succeeds(dir, &resume);
    fs::rename(dir.join("old"), dir.join("new")).unwrap();
    fails(dir, &[&resume[..], &["--data-dir", "new", "--seed", "5"]].concat(), 2, &["other settings"]);
    succeeds(dir, &[&resume[..], &["--data-dir", "new"]].concat());
    succeeds(dir, &resume);
}

/// What is moved in a folder of pictures, one after the other, and what a resume says of it.
type Change = (&'static [(&'static str, &'static str)], &'static [&'static str]);

const CHANGES: [Change; 9] = [
    (&[("train/cat/3.png", "gone")], &["train: class `cat` has 7 images and had 8"]),
    (&[("val/emu/0.png", "gone")], &["test: class `emu` has 3 images and had 4"]),
    (&[("extra.png", "train/cat/99.png")], &["class `cat` has 9 images and had 8"]),
    (
        &[("train/cat/3.png", "train/dog/x.png")],
        &["class `cat` has 7 images and had 8", "class `dog` has 9 images and had 8"],
    ),
    (
        &[("train/cat/3.png", "aside"), ("train/dog/3.png", "train/cat/3.png"), ("aside", "train/dog/3.png")],
        &["train: ", "`cat`", "`dog`"],
    ),
    (
        &[("train/cat", "train/lynx"), ("val/cat", "val/lynx")],
        &["train: class `cat` is gone", "class `lynx` is new", "test: class `cat` is gone"],
    ),
    (
        &[
            ("train/cat", "aside"),
            ("train/emu", "train/cat"),
            ("aside", "train/emu"),
            ("val/cat", "aside"),
            ("val/emu", "val/cat"),
            ("aside", "val/emu"),
        ],
        &["train: ", "test: "],
    ),
    (&[("train/dog/2.png", "train/dog/two.png")], &["class `dog` has other files"]),
    (&[("train/emu", "gone"), ("val/emu", "gone-val")], &["class `emu` is gone"]),
];

#[test]
fn pictures_that_changed_are_noticed() {
    let root = folder();
    let dir = root.path();
    let pets = dir.join("pets");
    pictures(&pets);
    fs::copy(pets.join("train/cat/0.png"), pets.join("extra.png")).unwrap();
    succeeds(dir, &on_pictures("pets", "r", "1"));
    let (before, resume) = (files(&dir.join("r")), ["train", "--resume", "--out", "r", "-q"]);
    for (moves, words) in CHANGES {
        moves.iter().for_each(|(from, to)| fs::rename(pets.join(from), pets.join(to)).unwrap());
        fails(dir, &resume, 1, &[&["the run in r", "--data-dir", "--force"], words].concat());
        moves.iter().rev().for_each(|(from, to)| fs::rename(pets.join(to), pets.join(from)).unwrap());
        assert!(files(&dir.join("r")) == before, "{words:?}: the run was touched");
        succeeds(dir, &resume);
        assert!(files(&dir.join("r")) == before, "{words:?}: the run has changed");
    }
    // A picture of the same name and size.
    let picture = pets.join("train/dog/4.png");
    let mut bytes = fs::read(&picture).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&picture, bytes).unwrap();
    fails(dir, &resume, 1, &["train: dog/4.png has another content", "--force"]);
}

/// A training that ends long after the test.
fn endless(dir: &Path, out: &str) -> Child {
    let args = ["train", "--train-limit", "128", "--test-limit", "50", "--epochs", "100000", "--out", out];
    begun(dir, &[&args[..], &NETWORK].concat(), out)
}

#[test]
fn a_folder_is_for_one_process_at_a_time() {
    let root = folder();
    let dir = root.path();
    let mut live = endless(dir, "r");
    let holder = format!("process {} on {}", live.id(), gethostname::gethostname().to_string_lossy());
    let words = ["r is in use by", holder.as_str(), "--out"];
    let few = ["--train-limit", "128", "--test-limit", "50", "--out", "r"];
    let config = fs::read(dir.join("r/config.toml")).unwrap();
    let rows: [&[&str]; 6] = [
        &["train"],
        &["train", "--force"],
        &["train", "--force", "--seed", "5"],
        &["train", "--resume"],
        &["shrink", "--force"],
        &["shrink"],
    ];
    for args in rows {
        fails(dir, &[args, &few].concat(), 2, &words);
    }
    assert!(fs::read(dir.join("r/config.toml")).unwrap() == config, "the live run's settings stay");
    assert!(live.try_wait().unwrap().is_none(), "and it goes on");
    // A killed process holds nothing.
    live.kill().unwrap();
    live.wait().unwrap();
    let note = fs::read_to_string(dir.join("r/.lock")).unwrap();
    assert_eq!(note, holder);
    let short = ["train", "--epochs", "1", "--force"];
    succeeds(dir, &[&short[..], &few, &NETWORK].concat());
    succeeds(dir, &["train", "--resume", "--out", "r", "-q"]);
    // Neither does a note that names a process which lives.
    fs::write(dir.join("r/.lock"), format!("process {} on here", std::process::id())).unwrap();
    succeeds(dir, &["train", "--resume", "--out", "r", "-q"]);
    fails(dir, &[&["train"][..], &few].concat(), 2, &["finished run"]);
}

#[test]
fn of_runs_that_start_together_one_runs() {
    let root = folder();
    let dir = root.path();
    for seed in 0..3 {
        let start = |seed: u32| {
            let seed = seed.to_string();
            let args =
                ["train", "--train-limit", "64", "--test-limit", "20", "--batch", "32", "--epochs", "4", "--force"];
            let args = [&args[..], &["--out", "r", "--seed", &seed], &NETWORK].concat();
            depthshrinker(dir, &args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let children: Vec<Child> = (0..3).map(|i| start(10 * seed + i)).collect();
        let ends: Vec<Output> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
        let won: Vec<usize> = (0..3).filter(|&i| ends[i].status.success()).collect();
        let told: Vec<_> = ends.iter().map(|end| String::from_utf8_lossy(&end.stderr)).collect();
        // A late one may find the folder free again.
        assert!(!won.is_empty(), "{told:?}");
        for i in (0..3).filter(|i| !won.contains(i)) {
            assert!(ends[i].status.code() == Some(2) && told[i].contains("r is in use by"), "{told:?}");
        }
        // Whose settings are there has made the weights: going on with them changes nothing.
        let model = fs::read(dir.join("r/original.safetensors")).unwrap();
        succeeds(dir, &["train", "--config", "r/config.toml", "--out", &format!("again{seed}"), "-q"]);
        assert!(fs::read(dir.join(format!("again{seed}/original.safetensors"))).unwrap() == model);
    }
}

/// The program where no file may be larger than so many bytes: a disk on which models fit and checkpoints do not.
#[cfg(unix)]
fn with_small_files(dir: &Path, bytes: u64, args: &[&str]) -> Output {
    // Shells count in blocks of 512 or of 1024 bytes; the one that this counts is what it allows for one.
    let probe = "trap '' XFSZ; ulimit -f 1; head -c 4096 /dev/zero > probe; wc -c < probe";
    let block = Command::new("sh").current_dir(dir).args(["-c", probe]).output().unwrap();
    let block: u64 = String::from_utf8_lossy(&block.stdout).trim().parse().unwrap();
    let limit = "trap '' XFSZ; ulimit -f $1; shift; exec \"$@\"";
    let mut shell = Command::new("sh");
    shell.current_dir(dir).args(["-c", limit, "sh", &(bytes / block).to_string()]).arg(program()).args(args);
    shell.output().unwrap()
}

#[cfg(unix)]
#[test]
fn a_finished_model_is_written_where_its_checkpoint_does_not_fit() {
    let root = folder();
    let dir = root.path();
    let few = ["--train-limit", "64", "--test-limit", "20", "--epochs", "1", "--batch", "32", "-q"];
    let net = ["--net", "mobilenetv2-0.25", "--head-channels", "64"];
    succeeds(dir, &[&["train", "--out", "t"][..], &few, &net].concat());
    let model = fs::metadata(dir.join("t/original.safetensors")).unwrap().len();
    let checkpoint = fs::metadata(dir.join("t/checkpoint.safetensors")).unwrap().len();
    let limit = model * 5 / 4;
    assert!(limit < checkpoint, "a checkpoint of {checkpoint} bytes would fit");
    let list = "1,0,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1";
    let source = "t/original.safetensors";
    let rows: [(&[&str], &[&str], &[&str]); 3] = [
        (&["train"], &net, &["original.safetensors"]),
        (&["search", source, "--method", "learned"], &["--remove", "3"], &["searched.safetensors", "plan.json"]),
        (&["finetune", source], &["--keep-list", list, "--no-final-activation"], &["shrunk.safetensors"]),
    ];
    for (command, own, results) in rows {
        let (small, large) = (format!("small-{}", command[0]), format!("large-{}", command[0]));
        let args = |out: &'static str| [command, own, &few, &["--out", out]].concat();
        let args = |out: &str| args(Box::leak(out.to_owned().into_boxed_str()));
        let output = with_small_files(dir, limit, &args(&small));
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{command:?}: {told}");
        assert!(told.contains("checkpoint.safetensors: cannot be written") && told.lines().count() == 1, "{told}");
        assert!(told.contains("the result is written") && !output.stdout.is_empty(), "{told}");
        assert!(!dir.join(&small).join("checkpoint.safetensors").exists());
        succeeds(dir, &args(&large));
        for file in results {
            let bytes = |out: &str| fs::read(dir.join(out).join(file)).unwrap();
            assert!(bytes(&small) == bytes(&large), "{command:?}: {file} differs");
        }
    }
    // Where not even the model fits, nothing is said to be written, and the way back is told.
    let output = with_small_files(dir, model / 2, &[&["train", "--out", "none"][..], &few, &net].concat());
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.lines().last().unwrap().starts_with("error: none/original.safetensors: cannot be written"), "{told}");
}

/// A record that cannot be written is tried again until the end, and told then; it does not take the result with it.
#[cfg(target_os = "linux")]
#[test]
fn a_finished_model_is_written_where_its_records_are_not() {
    let root = folder();
    let dir = root.path();
    let train = ["train", "--train-limit", "64", "--test-limit", "20", "--epochs", "2", "--batch", "32"];
    succeeds(dir, &[&train[..], &NETWORK, &["--out", "good"]].concat());
    fs::create_dir(dir.join("bad")).unwrap();
    std::os::unix::fs::symlink("/dev/full", dir.join("bad/metrics.jsonl")).unwrap();
    let output = run(dir, &[&train[..], &NETWORK, &["--out", "bad"]].concat());
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), told.lines().count()), (Some(1), 3), "{told}");
    assert_eq!(told.matches("bad/metrics.jsonl: cannot be written").count(), 3, "{told}");
    assert!(told.lines().last().unwrap().starts_with("error: "), "{told}");
    let model = |out: &str| fs::read(dir.join(out).join("original.safetensors")).unwrap();
    assert!(model("good") == model("bad"), "other bits");
}

/// Within a file system of so many kilobytes, where the machine lets anybody make one.
#[cfg(target_os = "linux")]
fn on_small_disk(kilobytes: u64, args: &[&str]) -> Option<Output> {
    let script = format!("mount -t tmpfs -o size={kilobytes}k none \"$1\" && cd \"$1\" && shift && exec \"$@\"");
    let place = folder();
    let able = Command::new("unshare").args(["-rm", "mount", "-t", "tmpfs", "none"]).arg(place.path()).output();
    if !able.is_ok_and(|output| output.status.success()) {
        eprintln!("no file system can be made here, so none is filled");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", &script, "sh"]).arg(place.path()).arg(program()).args(args);
    Some(command.output().unwrap())
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_is_too_small_is_told_at_the_start() {
    let few = ["--train-limit", "64", "--test-limit", "20", "--batch", "32", "--net", "mobilenetv2-0.25"];
    let train = [&["train", "--epochs", "1", "--head-channels", "64"][..], &few].concat();
    let shrink = ["shrink", "--train-epochs", "1", "--finetune-epochs", "1", "--head-channels", "64"];
    let shrink = [&shrink[..], &["--measure-seconds", "0"], &few].concat();
    // The same run, on a disk that holds it and on one that does not.
    for (args, large, small) in [(&train, 40_000, 2_000), (&shrink, 80_000, 4_000)] {
        let Some(output) = on_small_disk(large, args) else { return };
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && !told.contains("MB are free"), "{told}");
        let output = on_small_disk(small, args).unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        let first = told.lines().next().unwrap_or_default();
        assert!(first.contains("MB are free here and the run writes about") && first.contains("--out"), "{told}");
        assert!(matches!(output.status.code(), Some(0 | 1)), "{told}");
    }
}

#[test]
fn what_cannot_be_written_in_the_end_is_refused_in_the_beginning() {
    let root = folder();
    let dir = root.path();
    pictures(&dir.join("pets"));
    succeeds(dir, &on_pictures("pets", "t", "1"));
    fs::create_dir(dir.join("folder")).unwrap();
    let model = "t/original.safetensors";
    let list = "1,0,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1";
    let rows: [&[&str]; 7] = [
        &["train", "--epochs", "100000", "--out", "x"],
        &["search", model, "--data", "pets", "--epochs", "100000", "--batch", "8", "--out", "x"],
        &["finetune", model, "--data", "pets", "--keep-list", list, "--epochs", "100000", "--batch", "8", "--out", "x"],
        &["merge", model, "--keep-list", list],
        &["import", "mobilenetv2-0.25", model],
        &["export", model],
        &["infer", model, "pets/val/cat/0.png"],
    ];
    for args in rows {
        for (target, words) in [("missing/m.onnx", "create the folder first"), ("folder", "this is a folder")] {
            let flag = if args[0] == "infer" { "--output" } else { "-o" };
            fails(dir, &[args, &[flag, target]].concat(), 1, &[target, words]);
        }
    }
    fails(dir, &["search", model, "--data", "pets", "--batch", "8", "--out", "x", "-o", model], 2, &["over itself"]);
    assert!(!dir.join("x").exists() && !dir.join("missing").exists());
    assert_eq!(fs::read_dir(dir.join("folder")).unwrap().count(), 0, "nothing is left of looking");
}

#[cfg(unix)]
#[test]
fn names_that_no_model_holds_are_refused_before_the_first_step() {
    let root = folder();
    let dir = root.path();
    pictures(&dir.join("pets"));
    let shrink = ["shrink", "--data", "pets", "--image-size", "32", "--batch", "8", "--out", "x"];
    for name in ["a\u{1}b", "new\nline", "del\u{7f}", "esc\u{1b}[31m"] {
        let shown = name.replace('\u{1}', "\\u0001").replace('\n', "\\n").replace('\u{7f}', "\\u007f");
        let shown = shown.replace('\u{1b}', "\\u001b");
        let words = [shown.as_str(), "control character", "rename"];
        let both = |from: &str, to: &str| {
            for split in ["train", "val"] {
                let place = dir.join("pets").join(split);
                fs::rename(place.join(from), place.join(to)).unwrap();
            }
        };
        both("cat", name);
        fails(dir, &on_pictures("pets", "x", "100000"), 1, &words);
        fails(dir, &shrink, 1, &words);
        both(name, "cat");
        fs::rename(dir.join("pets"), dir.join(name)).unwrap();
        fails(dir, &on_pictures(name, "x", "100000"), 1, &words);
        fs::rename(dir.join(name), dir.join("pets")).unwrap();
    }
    assert!(!dir.join("x").exists());
}
