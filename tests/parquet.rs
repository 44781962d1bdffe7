//! Data sets in Parquet shards. `tests/fixtures/make_shards.py` made `shards`: image i of all is grey 8·i;
//! `tests/fixtures/make_layouts.py` made the rest, with pyarrow's reading of it.
#![cfg(feature = "parquet")]

#[cfg(target_os = "linux")]
mod limited;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use depthshrinker::Result;
use depthshrinker::data::{self, Augment, Batch, Data, DataSource, Dataset, Loader, ResizedCrop};
use depthshrinker::io::{ModelInfo, write_model};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/shards")
}

fn open(folder: &Path) -> Result<Data> {
    data::open(&DataSource { name: format!("parquet:{}", folder.display()), dir: None, image_size: Some(16) })
}

fn refused<T: std::fmt::Debug>(result: Result<T>, parts: &[&str]) {
    let message = result.unwrap_err().to_string();
    assert!(!message.contains('\n'), "more than one line: {message}");
    assert!(parts.iter().all(|part| message.contains(part)), "{parts:?} are not in: {message}");
}

#[test]
fn every_row_of_every_shard_is_an_image() {
    let data = open(&fixtures()).unwrap();
    assert_eq!((data.train.len(), data.test.len()), (16, 6));
    assert_eq!(data.train.class_names(), ["cat", "dog", "emu"]);
    for (set, first) in [(&data.train, 0), (&data.test, 16)] {
        for index in 0..set.len() {
            let mut pixels = vec![0; set.shape().size()];
            set.image(index, &mut pixels).unwrap();
            assert!(pixels.iter().all(|v| usize::from(*v) == (first + index) * 8), "image {index}");
            assert_eq!(set.labels()[index] as usize, (first + index) % 3);
        }
    }
    // A Hugging Face download has them in `data`.
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("data")).unwrap();
    for entry in fs::read_dir(fixtures()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, root.path().join("data").join(path.file_name().unwrap())).unwrap();
    }
    assert_eq!(open(root.path()).unwrap().train.labels(), data.train.labels());
}

/// A row: the name of its class, and the colour of its picture.
type Row = (String, [u8; 3]);

/// All rows of a set. Its pictures are of one colour each, which stays whatever size they are brought to.
fn rows(set: &Dataset) -> Result<Vec<Row>> {
    let mut pixels = vec![0; set.shape().size()];
    let row = |(index, label): (usize, &u32)| {
        set.image(index, &mut pixels)?;
        let colour = [pixels[0], pixels[1], pixels[2]];
        assert!(pixels.chunks_exact(3).all(|pixel| pixel == colour), "image {index} is not of one colour");
        Ok((set.class_names()[*label as usize].clone(), colour))
    };
    set.labels().iter().enumerate().map(row).collect()
}

/// Columns, types, codecs and files as they are on Hugging Face.
#[test]
fn every_layout_is_read_as_pyarrow_reads_it() {
    let told = fs::read(fixtures().with_file_name("layouts.json")).unwrap();
    let layouts: BTreeMap<String, BTreeMap<String, Vec<Row>>> = serde_json::from_slice(&told).unwrap();
    assert!(layouts.len() >= 30, "{} layouts", layouts.len());
    let mut wrong = Vec::new();
    for (name, expected) in layouts {
        let folder = fixtures().with_file_name("layouts").join(&name);
        match open(&folder).and_then(|data| Ok((rows(&data.train)?, rows(&data.test)?))) {
            Ok((train, test)) if (&train, &test) == (&expected["train"], &expected["test"]) => {}
            other => wrong.push(format!("{name}: {other:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The order of labels: the file's names, or else numbers by number and text by text.
#[test]
fn classes_are_in_the_order_of_their_labels() {
    for (layout, classes) in [
        ("snappy", &["cat", "dog", "emu"][..]),
        ("cifar100", &["cat", "dog", "emu"]),
        ("uint8", &["0", "1", "2"]),
        ("bool", &["0", "1"]),
        ("words", &["cat", "dog", "emu"]),
        ("words-numbers", &["2", "9", "10"]),
        ("words-unicode", &["Cat, felis", "été", "猫"]),
        ("words-new-in-test", &["cat", "dog", "emu"]),
    ] {
        let data = open(&fixtures().with_file_name("layouts").join(layout)).unwrap();
        assert_eq!(data.train.class_names(), classes, "{layout}");
        assert_eq!(data.test.class_names(), classes, "{layout}");
    }
}

/// An evaluation needs no training shards; training needs test shards, and says which names it looked for.
#[test]
fn splits_that_are_not_there_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let put = |from: &str, to: &str| {
        let to = folder.path().join(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(fixtures().with_file_name("layouts").join(from), to).unwrap();
    };
    let source = DataSource { name: format!("parquet:{}", folder.path().display()), dir: None, image_size: Some(16) };
    refused(data::open_test(&source), &["holds no .parquet files", "train-*.parquet", "validation-*.parquet"]);
    put("snappy/data/test-00000-of-00001.parquet", "plain_text/test/0000.parquet");
    assert_eq!(data::open_test(&source).unwrap().len(), 3);
    refused(data::open(&source), &["plain_text/test/0000.parquet", "no training split", "train-*.parquet"]);
    fs::remove_dir_all(folder.path().join("plain_text")).unwrap();
    put("snappy/data/train-00000-of-00001.parquet", "0000.parquet");
    for outcome in [data::open(&source).map(|data| data.test), data::open_test(&source)] {
        refused(outcome, &["one shard, 0000.parquet,", "no test split", "validation-*.parquet", "test_split"]);
    }
    put("words/data/test-00000-of-00001.parquet", "test.parquet");
    put("snappy/data/train-00000-of-00001.parquet", "train.parquet");
    refused(data::open(&source), &["test.parquet", "has text in column `label`", "train.parquet has numbers"]);
}

/// Shards that are sound but cannot be used: what was looked for, and what to do.
#[test]
fn shards_without_pictures_or_labels_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (train, test) = (folder.path().join("train-0.parquet"), folder.path().join("test-0.parquet"));
    for (name, parts) in [
        ("brotli", &["has column `label` compressed with BROTLI", "write it again with Snappy, gzip, zstd"][..]),
        ("lz4", &["compressed with LZ4", "write it again with Snappy, gzip, zstd"]),
        ("no-image", &["has no column `image.bytes`", "`img.bytes`", "it has `label` (integers)"]),
        ("no-label", &["has no column `label`", "`fine_label`", "`text` (text)", "`tags.list.element` (lists)"]),
        ("two-labels", &["several that could be it, `colour`, `shape`", "rename one to `label`"]),
        ("list-label", &["has no column `label`", "one label a row", "`label.list.element` (lists)"]),
        ("float-label", &["has no column `label`", "`label` (other values)"]),
        ("null-label", &["column `label`: row 5 has no value"]),
        ("negative-label", &["has label -1; labels count from 0 (-1 means unknown)"]),
        ("path-alone", &["column `image.bytes`: row 2 has no value", "not its path alone"]),
        ("control-word", &["the label \"d\\u{1b}og\"", "without control characters"]),
        ("control-name", &["names a class \"d\\nog\"", "control characters"]),
        ("other-names", &["calls class 0 `dog`", "calls it `cat`"]),
        ("bomb-gzip", &["more than 8388608 bytes"]),
        ("bomb-zstd", &["more than 8388608 bytes"]),
    ] {
        fs::copy(fixtures().with_file_name("refused").join(format!("{name}.parquet")), &test).unwrap();
        if name == "other-names" {
            fs::copy(fixtures().with_file_name("layouts/snappy/data/train-00000-of-00001.parquet"), &train).unwrap();
        }
        let source =
            DataSource { name: format!("parquet:{}", folder.path().display()), dir: None, image_size: Some(16) };
        // Pictures are read when they are asked for.
        let outcome = data::open_test(&source).and_then(|data| rows(&data));
        let _ = fs::remove_file(&train);
        refused(outcome, &[&["test-0.parquet"][..], parts].concat());
    }
}

#[test]
fn epochs_are_shuffled_whole_and_resume_alike() {
    let train = Arc::new(open(&fixtures()).unwrap().train);
    let augment = Augment { resized_crop: Some(ResizedCrop::default()), flip: true, ..Augment::none() };
    let loader = Loader::train(Arc::clone(&train), 4, augment, 5).unwrap();
    let batches = |epoch, first| loader.epoch(epoch, first).collect::<Result<Vec<Batch>>>().unwrap();
    let order = |epoch| batches(epoch, 0).iter().flat_map(|batch| batch.indices.clone()).collect::<Vec<_>>();
    assert_eq!(order(0).iter().collect::<HashSet<_>>().len(), 16);
    assert!(order(0) != order(1) && order(0) != (0..16).collect::<Vec<_>>());
    assert!(batches(3, 0)[2..] == batches(3, 2));
    let some = Arc::new(train.subset(&[15, 3, 7, 8]).unwrap());
    let kept = Loader::eval(some, 4).unwrap().epoch(0, 0).next().unwrap().unwrap();
    assert_eq!(kept.labels, [0, 0, 1, 2]);
}

#[test]
fn shards_that_cannot_be_used_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    refused(open(folder.path()), &["train-*.parquet"]);
    let whole = fs::read(fixtures().join("train-00000-of-00002.parquet")).unwrap();
    fs::write(path("train-0.parquet"), &whole).unwrap();
    refused(open(folder.path()), &["validation-*.parquet"]);
    fs::write(path("validation-0.parquet"), &whole).unwrap();
    open(folder.path()).unwrap();
    for content in [b"".as_slice(), b"PAR1", &whole[..whole.len() - 9], &whole[9..]] {
        fs::write(path("train-0.parquet"), content).unwrap();
        refused(open(folder.path()), &["train-0.parquet", "replace or remove it"]);
    }
}

/// Small files that claim much, and what is said of them: a class per label up to four billion, a million rows of one
/// picture, a page of two gigabytes.
const HOSTILE: [(&str, [&str; 2]); 6] = [
    ("label-out-of-range", ["has label", "labels count from 0"]),
    ("repeated-rows", ["claims 1000000 rows in", "replace or remove it"]),
    ("negative-offset", ["row group 0 is not within the file", "replace or remove it"]),
    ("missing-dictionary", ["is damaged", "replace or remove it"]),
    ("page-size", ["row group 0", "Invalid page header"]),
    ("delta-lengths", ["row group 0", "DELTA_LENGTH_BYTE_ARRAY"]),
];

#[test]
fn shards_that_claim_more_than_they_hold_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fixtures().join("train-00000-of-00002.parquet");
    fs::copy(whole, folder.path().join("validation-0.parquet")).unwrap();
    for (name, parts) in HOSTILE {
        let hostile = fixtures().with_file_name(format!("{name}.parquet"));
        fs::copy(hostile, folder.path().join("train-0.parquet")).unwrap();
        // Pictures are read when they are asked for.
        let outcome = open(folder.path()).and_then(|data| data.train.image(0, &mut vec![0; data.train.shape().size()]));
        refused(outcome, &["train-0.parquet", parts[0], parts[1]]);
    }
}

/// The program refuses all of these, schemas and bombs too, in a quarter of a gibibyte of address space, and in seconds.
#[cfg(target_os = "linux")]
#[test]
fn hostile_shards_take_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    for classes in [1, 3] {
        let options = NetworkOptions::new(Shape::new(32, 32, 3), classes);
        let model = Model::initialise(build("mobilenetv2-0.1", &options).unwrap(), 1).unwrap();
        let path = folder.path().join(format!("of-{classes}.safetensors"));
        write_model(&path, &model, &ModelInfo::default()).unwrap();
    }
    let file = |name: String| fs::read(fixtures().with_file_name(name)).unwrap();
    let claims = HOSTILE.iter().map(|(name, parts)| (file(format!("{name}.parquet")), parts[0]));
    let bombs =
        ["gzip", "zstd"].map(|codec| (file(format!("refused/bomb-{codec}.parquet")), "more than 8388608 bytes"));
    let schemas = schemas().into_iter().map(|(children, problem)| (footer_alone(&children), problem));
    let wrong: Vec<String> = claims
        .chain(bombs)
        .chain(schemas)
        .filter_map(|(bytes, problem)| {
            fs::write(folder.path().join("test-0.parquet"), bytes).unwrap();
            // The bombs have rows of one class, and are read when a picture is asked for.
            let model = if problem.starts_with("more than") { "of-1.safetensors" } else { "of-3.safetensors" };
            let eval = ["eval", model, "--data", "parquet:.", "--image-size", "32"];
            limited::refuses(folder.path(), &eval, &["test-0.parquet", problem]).err()
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What the reading crate asserts is the one line that the program prints, too.
#[test]
fn a_damaged_shard_is_one_line_on_stderr() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["train-0.parquet", "validation-0.parquet"] {
        fs::copy(fixtures().with_file_name("missing-dictionary.parquet"), folder.path().join(name)).unwrap();
    }
    let mut shrink = assert_cmd::Command::cargo_bin("depthshrinker").unwrap();
    shrink.current_dir(folder.path()).args(["shrink", "--net", "mobilenetv2-0.25", "--data"]);
    let failed = shrink.arg(format!("parquet:{}", folder.path().display())).assert().code(1);
    let stderr = String::from_utf8_lossy(&failed.get_output().stderr);
    assert!(stderr.starts_with("error: ") && stderr.lines().count() == 1, "{stderr}");
    assert!(stderr.contains("train-0.parquet: is damaged; replace or remove it"), "{stderr}");
}

/// A file of nothing but a footer whose schema has these elements, each a group by its number of children.
fn footer_alone(children: &[i32]) -> Vec<u8> {
    fn varint(out: &mut Vec<u8>, mut value: u64) {
        while value >= 0x80 {
            out.push(value as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
    }
    // Thrift's compact protocol: (difference of field numbers, type) in a byte each, then the value.
    let mut footer = vec![0x15, 2, 0x19, 0xfc];
    varint(&mut footer, children.len() as u64);
    for children in children {
        footer.extend([0x48, 1, b'g', 0x15]);
        varint(&mut footer, *children as u64 * 2);
        footer.push(0);
    }
    footer.extend([0x16, 0, 0x19, 0x0c, 0]);
    let length = (footer.len() as u32).to_le_bytes();
    [b"PAR1", &footer[..], &length, b"PAR1"].concat()
}

/// Schemas that the crate `parquet` would recurse into, or reserve room for, without end, and what is said of them.
fn schemas() -> Vec<(Vec<i32>, &'static str)> {
    vec![
        (vec![1; 600_000], "has a bad footer: "),
        (vec![1; 60_000], "60000 elements of a schema"),
        ([vec![1; 1000], vec![0]].concat(), "levels deep"),
        (vec![i32::MAX, 0], "element 0 of 2 of the schema has 2147483647 children"),
        (vec![0], "has no column `image.bytes`"),
    ]
}

#[test]
fn schemas_that_claim_more_than_they_hold_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fixtures().join("train-00000-of-00002.parquet");
    fs::copy(whole, folder.path().join("validation-0.parquet")).unwrap();
    for (children, problem) in schemas() {
        fs::write(folder.path().join("train-0.parquet"), footer_alone(&children)).unwrap();
        refused(open(folder.path()), &["train-0.parquet", problem]);
    }
}

#[cfg(unix)]
fn interrupt_after_an_epoch(command: &mut Command, metrics: &Path) {
    let mut begun = command.spawn().unwrap();
    while !fs::metadata(metrics).is_ok_and(|meta| meta.len() > 0) {
        assert!(begun.try_wait().unwrap().is_none(), "no epoch was recorded");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-INT", &begun.id().to_string()]).status().unwrap().success());
    assert_eq!(begun.wait().unwrap().code(), Some(1));
}

/// A run on shards that is interrupted goes on where they lie now, and notices what has changed in them since.
#[cfg(unix)]
#[test]
fn a_run_on_moved_shards_goes_on_and_notices_changes() {
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name);
    let program = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_depthshrinker"));
        command.current_dir(&root).args(args).args(["--out", "parts", "-q"]);
        command
    };
    fs::create_dir(path("old")).unwrap();
    for entry in fs::read_dir(fixtures()).unwrap() {
        let from = entry.unwrap().path();
        fs::copy(&from, path("old").join(from.file_name().unwrap())).unwrap();
    }
    let train =
        ["train", "--net", "mobilenetv2-0.25", "--head-channels", "32", "--data", "parquet:old", "--image-size", "32"];
    let train = [&train[..], &["--batch", "8", "--epochs", "40"]].concat();
    assert!(program(&train).status().unwrap().success());
    fs::rename(path("parts"), path("whole")).unwrap();
    interrupt_after_an_epoch(&mut program(&train), &path("parts/metrics.jsonl"));
    fs::create_dir(path("disk")).unwrap();
    fs::rename(path("old"), path("disk/new")).unwrap();

    let fails = |flags: &[&str], words: &[&str]| {
        let output = program(&[&["train", "--resume"], flags].concat()).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && told.lines().count() == 1, "{flags:?}: {told}");
        assert!(words.iter().all(|word| told.contains(word)), "{words:?} are not in: {told}");
    };
    let goes_on = |flags: &[&str]| {
        assert!(program(&[&["train", "--resume"], flags].concat()).status().unwrap().success(), "{flags:?}");
        let model = |out: &str| fs::read(path(out).join("original.safetensors")).unwrap();
        assert!(model("parts") == model("whole"), "{flags:?}: other bits");
    };
    fails(&[], &["old", "--data-dir"]);
    for flags in [&["--data-dir", "disk/new"][..], &[], &["--data", "parquet:disk/new"]] {
        goes_on(flags);
    }

    // Shards that changed places, one that is gone, and one in which a byte of a picture is another.
    let [first, second, test] = ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"]
        .map(|name| path(&format!("disk/new/{name}.parquet")));
    let bytes = [&first, &second, &test].map(|shard| fs::read(shard).unwrap());
    let mut other = bytes[2].clone();
    let at = other.windows(4).position(|window| window == b"IDAT").expect("a picture that is not packed again");
    other[at + 6] ^= 1;
    for (shard, content, words) in [
        (&first, Some(&bytes[1]), "train: class `cat` has"),
        (&second, None, "train: class `cat` has"),
        (&test, Some(&other), "test: image 0 has another content"),
    ] {
        let was = fs::read(shard).unwrap();
        content.map_or_else(|| fs::remove_file(shard), |content| fs::write(shard, content)).unwrap();
        fails(&[], &["the run in parts", "other images", words, "--force"]);
        fs::write(shard, was).unwrap();
    }
    fs::write(&first, &bytes[1]).unwrap();
    fs::write(&second, &bytes[0]).unwrap();
    fails(&[], &["train: its images are in another order"]);
    fs::write(&first, &bytes[0]).unwrap();
    fs::write(&second, &bytes[1]).unwrap();
    goes_on(&[]);
}

/// Whatever a byte of a shard is changed to, there is an error in one line or a picture, never a panic.
#[test]
fn damaged_shards_do_not_panic() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fs::read(fixtures().join("train-00001-of-00002.parquet")).unwrap();
    fs::write(folder.path().join("validation-0.parquet"), &whole).unwrap();
    for at in (0..whole.len()).step_by(7) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x55;
        fs::write(folder.path().join("train-0.parquet"), damaged).unwrap();
        let outcome = open(folder.path()).and_then(|data| {
            let mut pixels = vec![0; data.train.shape().size()];
            (0..data.train.len()).try_for_each(|index| data.train.image(index, &mut pixels))
        });
        if let Err(error) = outcome {
            assert!(!error.to_string().contains('\n'), "byte {at}: {error}");
        }
    }
}
