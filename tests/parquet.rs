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

/// Small files that claim much: a class per label up to four billion, a million rows of one picture.
#[test]
fn shards_that_claim_more_than_they_hold_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let hostile = |name: &str| fixtures().parent().unwrap().join(name);
    let whole = fixtures().join("train-00000-of-00002.parquet");
    fs::copy(whole, folder.path().join("validation-0.parquet")).unwrap();
    fs::copy(hostile("label-out-of-range.parquet"), folder.path().join("train-0.parquet")).unwrap();
    refused(open(folder.path()), &["train-0.parquet", "has label", "labels count from 0"]);
    fs::copy(hostile("repeated-rows.parquet"), folder.path().join("train-0.parquet")).unwrap();
    refused(open(folder.path()), &["train-0.parquet", "claims 1000000 rows in"]);
    fs::copy(hostile("negative-offset.parquet"), folder.path().join("train-0.parquet")).unwrap();
    refused(open(folder.path()), &["train-0.parquet", "columns at no place"]);
    fs::copy(hostile("missing-dictionary.parquet"), folder.path().join("train-0.parquet")).unwrap();
    refused(open(folder.path()), &["train-0.parquet", "is damaged; replace or remove it"]);
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
