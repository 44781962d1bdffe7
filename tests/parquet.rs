//! Data sets in Parquet shards. `tests/fixtures/make_shards.py` made the files: image i of all is grey 8·i.
#![cfg(feature = "parquet")]

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use depthshrinker::Result;
use depthshrinker::data::{self, Augment, Batch, Data, DataSource, Loader, ResizedCrop};

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

/// Small files that claim much: a class per label up to four billion, a million rows of one picture,
/// a page of two gigabytes.
#[test]
fn shards_that_claim_more_than_they_hold_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fixtures().join("train-00000-of-00002.parquet");
    fs::copy(whole, folder.path().join("validation-0.parquet")).unwrap();
    for (name, parts) in [
        ("label-out-of-range", ["has label", "labels count from 0"]),
        ("repeated-rows", ["claims 1000000 rows in", "replace or remove it"]),
        ("negative-offset", ["row group 0 is not within the file", "replace or remove it"]),
        ("missing-dictionary", ["is damaged", "replace or remove it"]),
        ("page-size", ["row group 0", "Invalid page header"]),
        ("delta-lengths", ["row group 0", "DELTA_LENGTH_BYTE_ARRAY"]),
        ("gzip", ["is compressed with", "Snappy's and none are read"]),
    ] {
        let hostile = fixtures().with_file_name(format!("{name}.parquet"));
        fs::copy(hostile, folder.path().join("train-0.parquet")).unwrap();
        // Pictures are read when they are asked for.
        let outcome = open(folder.path()).and_then(|data| data.train.image(0, &mut vec![0; data.train.shape().size()]));
        refused(outcome, &["train-0.parquet", parts[0], parts[1]]);
    }
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

/// Schemas that the crate `parquet` would recurse into, or reserve room for, without end.
#[test]
fn schemas_that_claim_more_than_they_hold_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fixtures().join("train-00000-of-00002.parquet");
    fs::copy(whole, folder.path().join("validation-0.parquet")).unwrap();
    for (children, problem) in [
        (vec![1; 600_000], "has a bad footer: "),
        (vec![1; 60_000], "60000 elements of a schema"),
        ([vec![1; 1000], vec![0]].concat(), "levels deep"),
        (vec![i32::MAX, 0], "element 0 of 2 of the schema has 2147483647 children"),
        (vec![0], "has no column `image.bytes`"),
    ] {
        fs::write(folder.path().join("train-0.parquet"), footer_alone(&children)).unwrap();
        refused(open(folder.path()), &["train-0.parquet", problem]);
    }
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
