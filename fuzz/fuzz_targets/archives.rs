//! The files of data sets: CIFAR's records, and IDX, plain or gzip, whose images come before their labels here.
#![no_main]

use std::path::Path;

use depthshrinker::data::{parse_cifar10, parse_idx};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let path = Path::new("x");
    if let Ok((pixels, labels)) = parse_cifar10(path, bytes) {
        assert_eq!(pixels.len(), labels.len() * 3072);
    }
    let Some((&[low, high], rest)) = bytes.split_first_chunk() else { return };
    let (images, labels) = rest.split_at(usize::from(u16::from_le_bytes([low, high])).min(rest.len()));
    if let Ok(split) = parse_idx((path, images), (path, labels), 10) {
        assert_eq!(split.pixels.len(), split.labels.len() * split.shape.height * split.shape.width);
    }
});
