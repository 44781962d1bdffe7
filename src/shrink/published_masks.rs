//! Masks that others have published for MobileNetV2, by name, for comparison on equal terms.
//!
//! `ds` are DepthShrinker's models A to F (their configurations `mbv2-140-A` to `-F`), `ec` the patterns that "Efficient CNN
//! Depth Compression" (Kim et al., 2023) compares with, `r` presumably searched again with their own pipeline and
//! `aug` with their augmentation (`docs/methods.md` 1.7). Their code puts a ReLU6 behind a freed first block, too, which
//! surgery does not. DepthShrinker's lists have an entry for the stem and one for the
//! head besides; A, D and E also drop the stem's activation, which is the site behind those of the blocks, and all keep
//! the head's.

use super::mask::Mask;
use crate::{Error, Result};

/// Blocks of a MobileNetV2.
const BLOCKS: usize = 17;

/// Name and kept blocks.
const MASKS: [(&str, &[usize]); 22] = [
    ("mbv2-1.4-ds-a", &[0, 3, 4, 6, 8, 10, 11, 13, 14, 15, 16]),
    ("mbv2-1.4-ds-b", &[3, 4, 10, 11, 13, 14, 15, 16]),
    ("mbv2-1.4-ds-c", &[0, 3, 10, 11, 13, 14, 15, 16]),
    ("mbv2-1.4-ds-d", &[3, 4, 13, 14, 15, 16]),
    ("mbv2-1.4-ds-e", &[0, 3, 13, 14, 15, 16]),
    ("mbv2-1.4-ds-f", &[]),
    ("mbv2-1.4-ec-ar", &[5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16]),
    ("mbv2-1.4-ec-br", &[4, 10, 11, 12, 13, 14, 15, 16]),
    ("mbv2-1.4-ec-cr", &[8, 9, 10, 11, 12, 16]),
    ("mbv2-1.4-ec-ar-aug", &[0, 3, 5, 7, 8, 9, 12, 13, 14, 15, 16]),
    ("mbv2-1.4-ec-br-aug", &[5, 7, 8, 9, 12, 14, 15, 16]),
    ("mbv2-1.4-ec-cr-aug", &[9, 11, 12, 14, 15, 16]),
    ("mbv2-1.0-ec-a", &[2, 4, 5, 6, 9, 10, 11, 12, 13, 14, 15, 16]),
    ("mbv2-1.0-ec-b", &[0, 4, 5, 6, 9, 10, 11, 12, 13, 14, 15, 16]),
    ("mbv2-1.0-ec-c", &[0, 3, 4, 6, 10, 13, 14, 15, 16]),
    ("mbv2-1.0-ec-d", &[0, 3, 10, 11, 13, 15, 16]),
    ("mbv2-1.0-ec-ar", &[4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]),
    ("mbv2-1.0-ec-br", &[4, 7, 8, 9, 12, 13, 14, 15, 16]),
    ("mbv2-1.0-ec-cr", &[8, 10, 12, 13, 14, 15, 16]),
    ("mbv2-1.0-ec-ar-aug", &[0, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]),
    ("mbv2-1.0-ec-br-aug", &[5, 7, 8, 9, 12, 13, 14, 15, 16]),
    ("mbv2-1.0-ec-cr-aug", &[6, 7, 9, 13, 14, 15, 16]),
];

/// The names of all published masks.
pub fn published_names() -> impl Iterator<Item = &'static str> {
    MASKS.iter().map(|(name, _)| *name)
}

/// Masks that free the stem's activation, too.
const FREE_STEM: [&str; 3] = ["mbv2-1.4-ds-a", "mbv2-1.4-ds-d", "mbv2-1.4-ds-e"];

/// A published mask by name: one entry per block of MobileNetV2, and one for the stem where that is freed.
///
/// # Errors
/// A name that is none of [`published_names`], which the message lists.
pub fn published_mask(name: &str) -> Result<Mask> {
    match MASKS.iter().find(|(known, _)| *known == name) {
        Some((name, kept)) => {
            let stem = FREE_STEM.contains(name).then_some(false);
            Ok(Mask::new((0..BLOCKS).map(|block| kept.contains(&block)).chain(stem).collect()))
        }
        None => {
            let known = published_names().collect::<Vec<_>>().join(", ");
            Err(Error::Config(format!(
                "no mask is published as {name:?}; give 0s and 1s with commas, or one of {known}"
            )))
        }
    }
}

/// A mask as people give it: a published one by name, or 0s and 1s with commas.
///
/// # Errors
/// A name that is not published, or a list that is none.
pub fn named_mask(text: &str) -> Result<Mask> {
    let is_name = text.contains(|c: char| c.is_ascii_alphabetic());
    if is_name { published_mask(text) } else { text.parse() }
}
