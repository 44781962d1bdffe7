//! What the program's surroundings do to it: streams that cannot be written, terminals, file names that hold commands for
//! them, pictures that are pipes, signals, and too little memory.
#![cfg(unix)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use depthshrinker::io::{ModelInfo, write_model};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use image::{Rgb, RgbImage};
use tempfile::TempDir;

/// A run of a second.
const TRAIN: [&str; 12] = [
    "train",
    "--net",
    "mobilenetv2-0.25",
    "--head-channels",
    "64",
    "--train-limit",
    "64",
    "--test-limit",
    "20",
    "--batch=32",
    "--epochs",
    "1",
];
/// Longer than any command here takes; what hangs is ended by it.
const LIMIT: Duration = Duration::from_secs(120);

fn program() -> PathBuf {
    assert_cmd::cargo::cargo_bin("depthshrinker")
}

/// The program in a folder, without what the surroundings say about colours.
fn depthshrinker(dir: &Path, args: &[&str]) -> Command {
    plain(Command::new(program()), dir, args)
}

fn plain(mut command: Command, dir: &Path, args: &[&str]) -> Command {
    command.current_dir(dir).args(args).stdin(Stdio::null());
    for variable in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "CI", "RUST_BACKTRACE"] {
        command.env_remove(variable);
    }
    command.env("TERM", "xterm");
    command
}

/// The outcome of a command, which must end by itself.
fn run(mut command: Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let id = child.id().to_string();
    let (done, ended) = std::sync::mpsc::channel();
    let guard = std::thread::spawn(move || {
        if ended.recv_timeout(LIMIT).is_err() {
            let _ = Command::new("kill").args(["-KILL", &id]).status();
        }
    });
    let output = child.wait_with_output().expect("the program ends");
    done.send(()).expect("the guard waits");
    guard.join().expect("the guard ends");
    assert!(output.status.code().is_some(), "{command:?} was ended: {}", text(&output.stderr));
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// One line of error that holds all of `words`.
fn assert_error(output: &Output, code: i32, words: &[&str]) {
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{told}");
    assert!(told.starts_with("error: ") && told.lines().count() == 1, "{told}");
    assert!(words.iter().all(|word| told.contains(word)), "{words:?} are not in: {told}");
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// A model file with fresh weights for RGB images, of two classes.
fn fresh_model(path: &Path, net: &str, side: usize) {
    let graph = build(net, &NetworkOptions::new(Shape::new(side, side, 3), 2)).unwrap();
    write_model(path, &Model::initialise(graph, 1).unwrap(), &ModelInfo { data: None }).unwrap();
}

/// `pictures/{train,val}/{dark,light}/*.png` and a model `m.safetensors` that takes them.
fn pictures() -> TempDir {
    let root = folder();
    for (split, count) in [("train", 8), ("val", 3)] {
        for (class, base) in [("dark", 20), ("light", 190)] {
            let folder = root.path().join("pictures").join(split).join(class);
            fs::create_dir_all(&folder).unwrap();
            for i in 0..count {
                RgbImage::from_pixel(40 + i, 40, Rgb([base, base + i as u8, base]))
                    .save(folder.join(format!("{i}.png")))
                    .unwrap();
            }
        }
    }
    fresh_model(&root.path().join("m.safetensors"), "mobilenetv2-0.25", 32);
    root
}

/// A pipe that nobody reads any more.
fn broken_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

fn full() -> Stdio {
    File::options().write(true).open("/dev/full").expect("/dev/full").into()
}

/// Makes a stream, since each can be used once.
type NewStream = fn() -> Stdio;

/// A terminal: the side that a person sits at, and the one that the program writes to.
fn terminal() -> (File, File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&person).unwrap();
    unlockpt(&person).unwrap();
    let name = ptsname(&person, Vec::new()).unwrap().into_string().unwrap();
    (File::from(person), File::options().read(true).write(true).open(name).unwrap())
}

/// All that a program writes to a terminal, and its exit code.
fn on_terminal(mut command: Command, which: Which) -> (String, Option<i32>) {
    let (mut person, terminal) = terminal();
    let other = Stdio::null();
    match which {
        Which::Stdout => command.stdout(terminal).stderr(other),
        Which::Stderr => command.stderr(terminal).stdout(other),
    };
    let mut child = command.spawn().unwrap();
    // The command holds the terminal open, too.
    drop(command);
    let (mut seen, mut part) = (Vec::new(), [0; 4096]);
    // Reading fails once nobody can write any more.
    while let Ok(n @ 1..) = person.read(&mut part) {
        seen.extend_from_slice(&part[..n]);
    }
    (text(&seen), child.wait().unwrap().code())
}

#[derive(Clone, Copy)]
enum Which {
    Stdout,
    Stderr,
}

#[test]
fn what_cannot_be_written_to_stderr_ends_nothing() {
    let streams: [(&str, NewStream); 3] = [
        ("a full disk", full),
        ("a pipe that nobody reads", broken_pipe),
        ("a terminal that was closed", || terminal().1.into()),
    ];
    let rows: [(&[&str], i32); 6] = [
        (&TRAIN, 0),
        // With a warning.
        (&["bench", "network", "mobilenetv2-0.25", "--size", "32", "--batch", "1", "--seconds", "0"], 0),
        (&["eval", "missing.safetensors"], 1),
        (&["shrink", "--keep", "99"], 2),
        (&["shrnk"], 2),
        (&["merge", "m.safetensors"], 2),
    ];
    for (name, stream) in streams {
        let dir = folder();
        for (args, code) in rows {
            let output = depthshrinker(dir.path(), args).stderr(stream()).stdout(Stdio::piped()).spawn().unwrap();
            let output = output.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(code), "{args:?} with stderr on {name}");
            assert_eq!(output.stdout.is_empty(), code != 0, "{args:?} with stderr on {name}");
        }
        assert!(dir.path().join("runs/train/original.safetensors").is_file(), "{name}");
    }
}

#[test]
fn what_cannot_be_written_to_stdout_is_named() {
    let dir = folder();
    fresh_model(&dir.path().join("m.safetensors"), "mobilenetv2-0.25", 32);
    let rows: [(&[&str], &str); 9] = [
        (&TRAIN, "the accuracy of runs/train/original.safetensors cannot be written to standard output"),
        (&["devices"], "the list of devices"),
        (&["devices", "--json"], "the list of devices"),
        (&["plan", "mobilenetv2-0.25", "--batch", "1"], "the plan"),
        (&["check", "--list"], "the names of the cases"),
        (&["export", "m.safetensors", "-o", "m.onnx"], "the size of m.onnx"),
        (&["--help"], "the help"),
        (&["train", "--help"], "the help"),
        (&["--version"], "the help"),
    ];
    for (args, what) in rows {
        let quiet = [args, &["-q"]].concat();
        let args = if args[0] == "train" && args.len() > 2 { &quiet } else { args };
        let onto = |stdout: Stdio| {
            let child = depthshrinker(dir.path(), args).stdout(stdout).stderr(Stdio::piped()).spawn().unwrap();
            child.wait_with_output().unwrap()
        };
        assert_error(&onto(full()), 1, &[what, "No space left"]);
        if args.contains(&"-q") {
            // The run is there, and another into the same folder would be refused.
            fs::remove_dir_all(dir.path().join("runs")).expect("the work was done before");
        }
        let closed = onto(broken_pipe());
        assert_eq!((closed.status.code(), text(&closed.stderr)), (Some(0), String::new()), "{args:?}");
    }
    for file in ["runs/train/original.safetensors", "m.onnx"] {
        assert!(dir.path().join(file).is_file(), "{file}");
    }
}

#[test]
fn colours_are_for_terminals_that_want_them() {
    let root = pictures();
    fs::write(root.path().join("pictures/val/dark/notes.txt"), "x").unwrap();
    let warned = ["eval", "m.safetensors", "--data", "pictures"];
    // What the surroundings say, and whether colours follow.
    let rows: [(&[(&str, &str)], bool); 6] = [
        (&[], true),
        (&[("NO_COLOR", "1")], false),
        (&[("TERM", "dumb")], false),
        (&[("NO_COLOR", "1"), ("TERM", "dumb")], false),
        (&[("CLICOLOR", "0")], false),
        // An empty one is not set: https://no-color.org.
        (&[("NO_COLOR", "")], true),
    ];
    for (variables, coloured) in rows {
        let set = |args: &[&str]| {
            let mut command = depthshrinker(root.path(), args);
            command.envs(variables.iter().copied());
            command
        };
        let (seen, code) = on_terminal(set(&warned), Which::Stderr);
        assert!(seen.contains("WARN") && seen.contains("notes.txt"), "{seen}");
        assert_eq!((seen.contains('\u{1b}'), code), (coloured, Some(0)), "{variables:?}: {seen:?}");
        let (seen, code) = on_terminal(set(&["--help"]), Which::Stdout);
        assert_eq!((seen.contains('\u{1b}'), code), (coloured, Some(0)), "{variables:?}: {seen:?}");
        let (seen, code) = on_terminal(set(&["shrnk"]), Which::Stderr);
        assert_eq!((seen.contains('\u{1b}'), code), (coloured, Some(2)), "{variables:?}: {seen:?}");
        // Each stream for itself: the warning goes into a file here, whatever standard output is.
        let output = run(set(&warned));
        assert!(text(&output.stderr).contains("WARN") && !output.stderr.contains(&0x1b), "{}", text(&output.stderr));
    }
}

#[test]
fn bars_are_for_terminals_that_move_their_cursor() {
    for (variables, bars) in [(("TERM", "xterm"), true), (("NO_COLOR", "1"), true), (("TERM", "dumb"), false)] {
        let dir = folder();
        let mut command = depthshrinker(dir.path(), &TRAIN);
        command.env(variables.0, variables.1);
        let (seen, code) = on_terminal(command, Which::Stderr);
        assert!(seen.contains("train epoch 1/1"), "{seen:?}");
        // A terminal itself puts a carriage return before a line end.
        let drawn = seen.replace("\r\n", "\n").contains(['\r', '\u{1b}']);
        assert_eq!((drawn, code), (bars, Some(0)), "{variables:?}: {seen:?}");
    }
}

/// A name that clears the screen, sets the title, forges a line and turns what follows around.
const WILD: &str = "a\u{1b}[2J\u{1b}]0;title\u{7}\nerror: forged\u{9b}31m\u{202e}";
const SHOWN: &str = "a\\u001b[2J\\u001b]0;title\\u0007\\nerror: forged\\u009b31m\\u202e";

#[test]
fn names_reach_a_terminal_escaped() {
    let root = pictures();
    let dir = root.path();
    let wild = |ending: &str| format!("{WILD}{ending}");
    fs::write(dir.join("pictures/val/dark").join(wild(".txt")), "x").unwrap();
    fs::copy(dir.join("pictures/val/dark/0.png"), dir.join(wild(".png"))).unwrap();
    fs::copy(dir.join("m.safetensors"), dir.join(wild(".safetensors"))).unwrap();
    // A model that knows how pictures are made.
    let train = [&TRAIN[..5], &["--data", "pictures", "--image-size", "32", "--batch=8", "--epochs=1"]].concat();
    assert!(run(depthshrinker(dir, &train)).status.success());
    let (model, png) = ("runs/train/original.safetensors", wild(".png"));
    let (missing, out, tensors) = (wild("?"), wild(".onnx"), wild(".safetensors"));
    let rows: [(&[&str], i32); 12] = [
        (&["eval", &missing], 1),
        (&["eval", model, "--data", "pictures"], 0),
        (&["infer", model, &png], 0),
        (&["infer", model, &tensors], 1),
        (&["export", &tensors, "-o", &out], 0),
        (&["export", model, "-o", WILD], 2),
        (&["eval", model, WILD], 2),
        (&["eval", model, &format!("--{WILD}")], 2),
        (&["train", &format!("--epochs={WILD}")], 2),
        (&[WILD], 2),
        (&["eval", model, "--data", WILD], 2),
        (&[&TRAIN[..], &["--out", WILD]].concat(), 0),
    ];
    for (args, code) in rows {
        let output = run(depthshrinker(dir, args));
        let told = text(&output.stdout) + &text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {told}");
        assert!(told.contains(SHOWN), "{args:?}: {told}");
        let wild = told.chars().find(|&c| (c.is_control() && c != '\n') || c == '\u{202e}');
        assert!(wild.is_none() && !told.lines().any(|line| line.starts_with("error: forged")), "{args:?}: {told:?}");
    }
    // Scripts get the name itself.
    let output = run(depthshrinker(dir, &["infer", model, &png, "--json"]));
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told[0]["image"], png);
    assert!(!text(&output.stdout).contains(['\u{1b}', '\u{9b}']));
}

fn pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn pictures_that_are_no_files_are_left_out_or_refused_before_they_are_opened() {
    let root = pictures();
    let dir = root.path();
    let train = [&TRAIN[..5], &["--data", "pictures", "--image-size", "32", "--batch=8", "--epochs=1"]].concat();
    assert!(run(depthshrinker(dir, &train)).status.success());
    let model = "runs/train/original.safetensors";
    let eval = ["eval", model, "--data", "pictures", "--json"];
    let images =
        |output: &Output| serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()["images"].clone();
    assert_eq!(images(&run(depthshrinker(dir, &eval))), 6);

    pipe(&dir.join("pictures/val/dark/pipe.png"));
    let _socket = UnixListener::bind(dir.join("pictures/val/light/socket.jpg")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", dir.join("pictures/val/light/zero.jpeg")).unwrap();
    std::os::unix::fs::symlink("pipe.png", dir.join("pictures/val/dark/link.png")).unwrap();
    let output = run(depthshrinker(dir, &eval));
    assert_eq!(images(&output), 6);
    let told = text(&output.stderr);
    assert!(told.contains("4 of 10 entries are left out") && told.contains("link.png"), "{told}");

    // A link to a picture is one; a link that leads nowhere is named.
    std::os::unix::fs::symlink("0.png", dir.join("pictures/val/dark/9.png")).unwrap();
    assert_eq!(images(&run(depthshrinker(dir, &eval))), 7);
    std::os::unix::fs::symlink("gone.png", dir.join("pictures/val/dark/8.png")).unwrap();
    assert!(text(&run(depthshrinker(dir, &eval)).stderr).contains("8.png: No such file"));

    pipe(&dir.join("p"));
    pipe(&dir.join("p.pth"));
    let _socket = UnixListener::bind(dir.join("s")).unwrap();
    fs::create_dir(dir.join("cifar")).unwrap();
    let cifar = vec![0; 3073 * 4];
    fs::write(dir.join("cifar/data_batch_1.bin"), &cifar).unwrap();
    pipe(&dir.join("cifar/data_batch_2.bin"));
    let rows: [(&[&str], &str); 10] = [
        (&["infer", model, "p"], "p: is a named pipe"),
        (&["infer", model, "s"], "s: is a socket"),
        (&["infer", model, "/dev/zero"], "/dev/zero: is a device"),
        (&["infer", model, "pictures"], "pictures: is a folder"),
        (&["infer", model, "--input", "p"], "p: is a named pipe"),
        (
            &["merge", model, "--keep-list", "1,0,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1", "-o", "x", "--input", "p"],
            "named pipe",
        ),
        (&["eval", "p"], "p: is a named pipe"),
        (&["import", "mobilenetv2-0.25", "p.pth", "-o", "x"], "p.pth: is a named pipe"),
        (&["search", "/dev/zero", "--out", "x"], "/dev/zero: is a device"),
        (
            &["train", "--data", "cifar10", "--data-dir", "cifar", "--out", "x", "-q"],
            "data_batch_2.bin: is a named pipe",
        ),
    ];
    for (args, words) in rows {
        assert_error(&run(depthshrinker(dir, args)), 1, &[words, "not a regular file"]);
    }
    assert!(!dir.join("x").exists());
}

/// Settings may come from another program (`--config <(…)`), but not without end.
#[test]
fn settings_come_through_pipes_and_have_an_end() {
    let dir = folder();
    let mut child = depthshrinker(dir.path(), &["shrink", "--config", "/dev/stdin", "--keep", "99"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"[network]\nname = \"mobilenetv2-0.25\"\n").unwrap();
    assert_error(&child.wait_with_output().unwrap(), 2, &["keep 99", "17 blocks"]);
    for args in
        [&["shrink", "--config", "/dev/zero"][..], &["bench", "network", "mobilenetv2-0.25", "--plan", "/dev/zero"]]
    {
        assert_error(&run(depthshrinker(dir.path(), args)), 1, &["/dev/zero: is longer than 16 MiB"]);
    }
}

/// Waits until a process catches the signal 15, and a moment more for its work to begin.
fn await_handler(process: u32) {
    let caught = || {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"))?.trim();
        Some(u64::from_str_radix(mask, 16).ok()? >> 14 & 1 == 1)
    };
    let begun = Instant::now();
    // Where the system does not say what is caught, time has to do.
    while caught() == Some(false) && begun.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(if cfg!(target_os = "linux") { 300 } else { 5000 }));
}

/// An evaluation keeps nothing, so it has nothing to do before it ends.
#[test]
fn an_evaluation_ends_at_the_first_signal() {
    let root = folder();
    let net = build("resnet50", &NetworkOptions::new(Shape::new(28, 28, 1), 10)).unwrap();
    let path = root.path().join("slow.safetensors");
    write_model(&path, &Model::initialise(net, 1).unwrap(), &ModelInfo { data: None }).unwrap();
    for signal in ["-TERM", "-INT"] {
        let child = depthshrinker(root.path(), &["eval", "slow.safetensors", "--threads", "1"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        await_handler(child.id());
        let sent = Instant::now();
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        assert_error(&child.wait_with_output().unwrap(), 1, &["interrupted; nothing was written"]);
        assert!(sent.elapsed() < Duration::from_millis(500), "{:?}", sent.elapsed());
    }
}

/// The program with so many MiB of address space.
fn limited(dir: &Path, mib: u64, args: &[&str]) -> Output {
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -v $1; shift; exec \"$@\"", "sh", &(mib << 10).to_string()]).arg(program());
    run(plain(shell, dir, args))
}

/// A file of zeros behind a start, which takes no room on the disk.
fn sparse(path: &Path, start: &[u8], len: u64) {
    let mut file = File::create(path).unwrap();
    file.write_all(start).unwrap();
    file.set_len(len).unwrap();
}

#[test]
fn too_little_memory_is_one_line() {
    let root = pictures();
    let dir = root.path();
    let train = [&TRAIN[..5], &["--data", "pictures", "--image-size", "32", "--batch=8", "--epochs=1"]].concat();
    assert!(run(depthshrinker(dir, &train)).status.success());
    let model = "runs/train/original.safetensors";
    sparse(&dir.join("large.safetensors"), &[], 3 << 30);
    sparse(&dir.join("large.pth"), b"PK\x03\x04", 3 << 30);
    fs::create_dir(dir.join("cifar")).unwrap();
    sparse(&dir.join("cifar/data_batch_1.bin"), &[], 3073 * 300_000);
    fs::create_dir(dir.join("mnist")).unwrap();
    let header =
        |magic: u32, sizes: &[u32]| [&[magic][..], sizes].concat().iter().flat_map(|n| n.to_be_bytes()).collect();
    let (images, labels): (Vec<u8>, Vec<u8>) = (header(0x0803, &[1 << 20, 28, 28]), header(0x0801, &[1 << 20]));
    sparse(&dir.join("mnist/train-images-idx3-ubyte"), &images, 16 + 784 * (1 << 20));
    sparse(&dir.join("mnist/train-labels-idx1-ubyte"), &labels, 8 + (1 << 20));
    image::GrayImage::new(16_000, 16_000).save(dir.join("large.png")).unwrap();
    progressive(&dir.join("large.jpg"));
    fs::write(dir.join("batch.toml"), "[evaluate]\nbatch = 65536\n[data]\nname = \"embedded\"\n").unwrap();
    let grey = build("mobilenetv2-1.0", &NetworkOptions::new(Shape::new(28, 28, 1), 10)).unwrap();
    write_model(&dir.join("grey.safetensors"), &Model::initialise(grey, 1).unwrap(), &ModelInfo { data: None })
        .unwrap();

    let wide =
        ["train", "--force", "--net", "mobilenetv2-1.0", "--head-channels", "200000", "--out", "x", "-q", "--batch=8"];
    // What is told at one of the limits at least; at each of them it is one line, if it is an error at all.
    let rows: [(&[&str], &str); 9] = [
        (&["eval", "large.safetensors"], "a file of weights would take 3221.2 MB"),
        (&["import", "mobilenetv2-0.25", "large.pth", "-o", "x.safetensors"], "a file of weights would take 3221.2 MB"),
        (
            &["train", "--data", "cifar10", "--data-dir", "cifar", "--out", "x", "-q"],
            "cifar/data_batch_1.bin does not fit",
        ),
        (&["train", "--data", "mnist", "--data-dir", "mnist", "--out", "x", "-q"], "images-idx3-ubyte does not fit"),
        (&["infer", model, "large.png"], "the pixels of a picture would take 256.0 MB"),
        // Inside of the decoder, which has no error for it.
        (&["infer", model, "large.jpg"], "bytes more cannot be had"),
        (&["eval", "grey.safetensors", "--config", "batch.toml"], "out of memory"),
        (
            &["bench", "network", "mobilenetv2-1.0", "--batch", "4096", "--seconds", "0", "--threads", "2"],
            "bytes more cannot be had",
        ),
        (&wide, "fresh weights would take 256.0 MB"),
    ];
    for (args, words) in rows {
        let mut named = false;
        for mib in [40, 64, 90, 128, 180, 256, 330, 700] {
            let output = limited(dir, mib, args);
            let told = text(&output.stderr);
            if output.status.success() {
                continue;
            }
            assert_eq!((output.status.code(), told.lines().count()), (Some(1), 1), "{args:?} in {mib} MiB: {told}");
            let is_memory = ["error: out of memory: ", "cannot be started: ", "Cannot allocate"];
            assert!(is_memory.iter().any(|words| told.contains(words)), "{args:?} in {mib} MiB: {told}");
            named |= told.contains(words);
        }
        assert!(named, "{args:?}: no limit was told as {words}");
    }
}

/// A progressive JPEG that claims 6000x6000 pixels: those take 108 MB, and the coefficients that a decoder collects first
/// twice as much.
fn progressive(path: &Path) {
    let mut bytes = fs::read("tests/fixtures/pictures/progressive.jpg").unwrap();
    let frame = bytes.windows(2).position(|marker| marker == [0xff, 0xc2]).expect("a progressive frame");
    let side = 6000u16.to_be_bytes();
    bytes[frame + 5..frame + 9].copy_from_slice(&[side, side].concat());
    fs::write(path, bytes).unwrap();
}
