//! What a data set holds, in few words: enough for a run that goes on to see that its data are still the same, wherever
//! they lie now.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::dataset::Dataset;
use crate::{Error, Result, terminal};

/// Images whose content is looked at, spread evenly: a set in another place is the same in all of them or in few.
const SAMPLES: usize = 64;
/// The same of pictures in shards.
const SHARD_SAMPLES: usize = 8;
/// Images in files up to which the size of every file counts: more would take longer than they are worth.
const MEASURED: usize = 1 << 16;
/// Hexadecimal digits of a digest that are kept.
const DIGITS: usize = 16;
/// Differences that are told before the rest is only counted.
const MAX_TOLD: usize = 3;

/// What a set holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contents {
    classes: Vec<Class>,
    /// Digest of the order of labels, which decides the order in which images are learnt from.
    labels: String,
    samples: Vec<Sample>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Class {
    name: String,
    images: usize,
    /// Digest of the names and sizes of its files; of nothing where images are in no files of their own.
    files: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sample {
    image: String,
    content: String,
}

impl Contents {
    /// Looks at a set: at its listing as a whole, at the content of some images.
    ///
    /// # Errors
    /// An image that cannot be read.
    pub fn of(data: &Dataset) -> Result<Self> {
        let mut labels = Sha256::new();
        data.labels().iter().for_each(|label| labels.update(label.to_le_bytes()));
        // A picture in a shard costs the reading of its whole row group.
        let in_shards = data.file(0).is_none() && data.resize().is_some();
        let samples = if in_shards { SHARD_SAMPLES } else { SAMPLES }.min(data.len());
        let samples = (0..samples).map(|i| Sample::of(data, i * data.len() / samples)).collect::<Result<_>>()?;
        Ok(Self { classes: Class::of(data)?, labels: digits(labels), samples })
    }

    /// How a set differs from what it was, in words; `part` is what it is called. `None` where it is the same.
    pub fn difference(&self, was: &Self, part: &str) -> Option<String> {
        let mut found = self.class_differences(was);
        if found.is_empty() && self.labels != was.labels {
            found.push("its images are in another order".to_owned());
        }
        if found.is_empty() {
            let pairs = self.samples.iter().zip(&was.samples);
            found.extend(pairs.filter(|(is, was)| is != was).map(|(is, was)| match is.image == was.image {
                true => format!("{} has another content", is.image),
                false => format!("{} is where {} was", is.image, was.image),
            }));
        }
        let rest = found.len().saturating_sub(MAX_TOLD);
        let more = if rest > 0 { format!(", and {rest} more differences") } else { String::new() };
        found.truncate(MAX_TOLD);
        (!found.is_empty()).then(|| format!("{part}: {}{more}", found.join(", ")))
    }

    /// Classes that came, went or changed.
    fn class_differences(&self, was: &Self) -> Vec<String> {
        let by_name = |classes: &[Class]| -> BTreeMap<String, Class> {
            classes.iter().map(|class| (class.name.clone(), class.clone())).collect()
        };
        let (is, old) = (by_name(&self.classes), by_name(&was.classes));
        let quoted = |name: &str| format!("`{}`", terminal::one_line(name));
        let mut found = Vec::new();
        for name in old.keys().filter(|name| !is.contains_key(*name)) {
            found.push(format!("class {} is gone", quoted(name)));
        }
        for name in is.keys().filter(|name| !old.contains_key(*name)) {
            found.push(format!("class {} is new", quoted(name)));
        }
        for (name, is) in &is {
            let Some(old) = old.get(name) else { continue };
            if is.images != old.images {
                found.push(format!("class {} has {} images and had {}", quoted(name), is.images, old.images));
            } else if is.files != old.files {
                found.push(format!("class {} has other files", quoted(name)));
            }
        }
        if found.is_empty() && self.classes != was.classes {
            found.push("its classes are in another order".to_owned());
        }
        found
    }
}

impl Class {
    /// The classes of a set.
    fn of(data: &Dataset) -> Result<Vec<Self>> {
        let mut all: Vec<(usize, Sha256)> = vec![(0, Sha256::new()); data.classes()];
        for (index, &label) in data.labels().iter().enumerate() {
            let (images, digest) = &mut all[label as usize];
            *images += 1;
            let Some(path) = data.file(index) else { continue };
            digest.update(path.file_name().unwrap_or_default().as_encoded_bytes());
            // No file's name has it, so that two names never pass for another pair.
            digest.update([0]);
            if data.len() <= MEASURED {
                let bytes = std::fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
                digest.update(bytes.to_le_bytes());
            }
        }
        let class = |(name, (images, digest)): (&String, (usize, Sha256))| Self {
            name: name.clone(),
            images,
            files: digits(digest),
        };
        Ok(data.class_names().iter().zip(all).map(class).collect())
    }
}

impl Sample {
    fn of(data: &Dataset, index: usize) -> Result<Self> {
        let (mut content, class) = (Sha256::new(), &data.class_names()[data.labels()[index] as usize]);
        data.encoded(index, |bytes| content.update(bytes))?;
        let image = data.file(index).map_or_else(
            || format!("image {index}"),
            |path| terminal::path(&Path::new(class).join(path.file_name().unwrap_or_default())),
        );
        Ok(Self { image, content: digits(content) })
    }
}

fn digits(digest: Sha256) -> String {
    let mut digits = format!("{:x}", digest.finalize());
    digits.truncate(DIGITS);
    digits
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ImageShape;

    fn set(pixels: &[u8], labels: &[u32], names: [&str; 2]) -> Contents {
        let shape = ImageShape { height: 1, width: 1, channels: 1 };
        let data = Dataset::from_memory("dots", shape, 2, pixels.to_vec(), labels.to_vec()).unwrap();
        Contents::of(&data.with_class_names(names).unwrap()).unwrap()
    }

    #[test]
    fn whatever_changes_the_training_is_a_difference() {
        let was = set(&[1, 2, 3, 4], &[0, 0, 1, 1], ["a", "b"]);
        let rows: [(Contents, &[&str]); 7] = [
            (set(&[1, 2, 3], &[0, 0, 1], ["a", "b"]), &["class `b` has 1 images and had 2"]),
            (
                set(&[1, 2, 3, 4], &[0, 1, 1, 1], ["a", "b"]),
                &["`a` has 1 images and had 2", "`b` has 3 images and had 2"],
            ),
            (set(&[1, 2, 3, 4], &[0, 0, 1, 1], ["a", "c"]), &["class `b` is gone", "class `c` is new"]),
            (set(&[1, 2, 3, 4], &[0, 0, 1, 1], ["b", "a"]), &["classes are in another order"]),
            (set(&[1, 3, 2, 4], &[0, 1, 0, 1], ["a", "b"]), &["images are in another order"]),
            (set(&[1, 2, 3, 5], &[0, 0, 1, 1], ["a", "b"]), &["image 3 has another content"]),
            (set(&[2, 3, 4, 5], &[0, 0, 1, 1], ["a", "b"]), &["image 0 has", "image 1 has", "and 1 more"]),
        ];
        for (is, words) in rows {
            let text = is.difference(&was, "train").unwrap();
            assert!(text.starts_with("train: ") && words.iter().all(|word| text.contains(word)), "{text}");
        }
        assert_eq!(was.difference(&was.clone(), "train"), None);
        let json = serde_json::to_string(&was).unwrap();
        assert_eq!(serde_json::from_str::<Contents>(&json).unwrap(), was);
    }
}
