//! What the program's surroundings do to it: streams that cannot be written, terminals, file names that hold commands for
//! them.
#![cfg(unix)]

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

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
