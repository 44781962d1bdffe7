//! A cut of Fashion-MNIST inside the binary, so that every command runs at once and offline: the first 1 000 training
//! and 200 test images of every class. `data/make_cut.py` made it; `data/fashion-mnist-cut/LICENSE` is its licence.

use std::path::Path;

use super::dataset::Data;
use super::{fashion_mnist, idx};
use crate::Result;

const TRAIN_IMAGES: &[u8] = include_bytes!("../../data/fashion-mnist-cut/train-images.gz");
const TRAIN_LABELS: &[u8] = include_bytes!("../../data/fashion-mnist-cut/train-labels.gz");
const TEST_IMAGES: &[u8] = include_bytes!("../../data/fashion-mnist-cut/test-images.gz");
const TEST_LABELS: &[u8] = include_bytes!("../../data/fashion-mnist-cut/test-labels.gz");

/// 10 000 training and 2 000 test images of 28x28x1 in 10 balanced classes.
pub(super) fn open() -> Result<Data> {
    let train_name = Path::new("embedded training images");
    let test_name = Path::new("embedded test images");
    let classes = fashion_mnist::CLASSES.len();
    let train = idx::parse_idx((train_name, TRAIN_IMAGES), (train_name, TRAIN_LABELS), classes)?;
    let test = idx::parse_idx((test_name, TEST_IMAGES), (test_name, TEST_LABELS), classes)?;
    // The constants of the full set, so that a network trained on the cut sees the full set on the same scale.
    fashion_mnist::data("embedded", train, test, &fashion_mnist::CLASSES, fashion_mnist::normalisation())
}
