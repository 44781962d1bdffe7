//! The 1 000 classes of ImageNet (ILSVRC 2012). `data/imagenet/make.py` wrote the list; `data/imagenet/LICENSE` says where
//! the names come from.

const NAMES: &str = include_str!("../../data/imagenet/classes.txt");

/// Classes of ImageNet.
pub const IMAGENET_CLASSES: usize = 1000;

/// Names of ImageNet's classes, by label.
pub fn imagenet_class_names() -> Vec<String> {
    NAMES.lines().map(str::to_owned).collect()
}
