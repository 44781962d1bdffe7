//! Which columns of a shard are its pictures and labels: by what Hugging Face's `datasets` notes in the file, else by the
//! columns' types and names.

use std::fmt;

use parquet::basic::{ConvertedType, LogicalType, Type as Physical};
use parquet::schema::types::ColumnDescriptor;
use serde_json::Value;

use super::parquet_file::ParquetFile;
use crate::Result;

/// Names of the pictures' column, where there are several of its type; the first that is there.
const IMAGES: [&str; 2] = ["image", "img"];
/// The same of the labels'.
const LABELS: [&str; 7] = ["label", "labels", "fine_label", "class", "class_label", "target", "category"];
/// Names of columns that have the type of labels and are none.
const NO_LABELS: [&str; 16] = [
    "id",
    "idx",
    "index",
    "image_id",
    "img_id",
    "file_name",
    "filename",
    "image_path",
    "path",
    "url",
    "width",
    "height",
    "text",
    "caption",
    "md5",
    "sha256",
];
/// The part of a picture's column that holds the file itself; `path` is beside it.
const BYTES: &str = "bytes";
/// Columns that are told before the rest is only counted.
const MAX_TOLD: usize = 8;

/// The columns that a shard's images are made of.
#[derive(Debug)]
pub(super) struct Columns {
    /// The number of the encoded pictures'.
    pub image: usize,
    /// The labels'.
    pub label: LabelColumn,
}

/// The column of the labels.
#[derive(Debug)]
pub(super) struct LabelColumn {
    /// Its number.
    pub number: usize,
    /// Its name.
    pub name: String,
    /// What it holds.
    pub kind: Kind,
    /// The classes' names, where the file tells them.
    pub classes: Option<Vec<String>>,
}

/// What a column holds, as far as pictures and labels go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Integers.
    Integer {
        /// Whether they are below zero where their first bit is set.
        signed: bool,
    },
    /// Truth values, which are 0 and 1.
    Boolean,
    /// Text.
    Words,
    /// Bytes that are no text.
    Binary,
    /// Several values to a row.
    List,
    /// Anything else.
    Other,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Integer { .. } => "integers",
            Self::Boolean => "truth values",
            Self::Words => "text",
            Self::Binary => "bytes",
            Self::List => "lists",
            Self::Other => "other values",
        })
    }
}

impl Kind {
    fn of(column: &ColumnDescriptor) -> Self {
        use ConvertedType as Converted;
        if column.max_rep_level() > 0 {
            return Self::List;
        }
        let (logical, converted) = (column.logical_type_ref(), column.converted_type());
        match (column.physical_type(), logical, converted) {
            (Physical::BOOLEAN, ..) => Self::Boolean,
            (Physical::INT32 | Physical::INT64, Some(LogicalType::Integer(integer)), _) => {
                Self::Integer { signed: integer.is_signed }
            }
            (
                Physical::INT32 | Physical::INT64,
                None,
                Converted::NONE | Converted::INT_8 | Converted::INT_16 | Converted::INT_32 | Converted::INT_64,
            ) => Self::Integer { signed: true },
            (
                Physical::INT32 | Physical::INT64,
                None,
                Converted::UINT_8 | Converted::UINT_16 | Converted::UINT_32 | Converted::UINT_64,
            ) => Self::Integer { signed: false },
            (Physical::BYTE_ARRAY, Some(LogicalType::String | LogicalType::Enum), _)
            | (Physical::BYTE_ARRAY, None, Converted::UTF8 | Converted::ENUM) => Self::Words,
            (Physical::BYTE_ARRAY, None, Converted::NONE) => Self::Binary,
            _ => Self::Other,
        }
    }

    fn is_label(self) -> bool {
        matches!(self, Self::Integer { .. } | Self::Boolean | Self::Words)
    }
}

/// A column by its name: a leaf of the schema.
struct Leaf<'a> {
    number: usize,
    path: &'a [String],
    kind: Kind,
}

impl Leaf<'_> {
    fn name(&self) -> &str {
        self.path.first().map_or("", String::as_str)
    }

    /// Whether it can hold encoded pictures: bytes, alone or as the part of a pair {bytes, path}.
    fn is_picture(&self) -> bool {
        self.kind == Kind::Binary
            && matches!(self.path, [_] | [_, _])
            && self.path.get(1).is_none_or(|part| part == BYTES)
    }

    fn is_label(&self) -> bool {
        // What begins with two underscores is the index of a writer such as pandas.
        self.path.len() == 1 && self.kind.is_label() && !self.name().starts_with("__")
    }
}

/// The columns of a shard's pictures and labels.
///
/// # Errors
/// Names what was looked for, and the columns that are there.
pub(super) fn find(shard: &ParquetFile) -> Result<Columns> {
    let columns = shard.columns().iter().enumerate();
    let leaves: Vec<Leaf<'_>> =
        columns.map(|(number, column)| Leaf { number, path: column.path().parts(), kind: Kind::of(column) }).collect();
    let features = shard.value("huggingface").and_then(features).unwrap_or_default();
    let noted =
        |leaf: &Leaf<'_>, kind: &str| features.get(leaf.name()).and_then(|f| f.get("_type")?.as_str()) == Some(kind);

    let pictures: Vec<&Leaf<'_>> = leaves.iter().filter(|leaf| leaf.is_picture()).collect();
    let image = choice(&pictures, |leaf| noted(leaf, "Image"), &IMAGES).map_err(|names| {
        shard.unusable(&match names.as_slice() {
            [] => format!(
                "has no column `image.bytes`, nor `img.bytes`, `image`, `img` or one other of {{bytes, path}} or bytes with \
                 pictures; {}",
                told(&leaves)
            ),
            several => format!("has pictures in several columns, {}; rename one to `image`", quoted(several)),
        })
    })?;

    let labels: Vec<&Leaf<'_>> = leaves.iter().filter(|leaf| leaf.is_label()).collect();
    let label = choice(&labels, |leaf| noted(leaf, "ClassLabel"), &LABELS).map_err(|names| {
        shard.unusable(&match names.as_slice() {
            [] => format!(
                "has no column `label`, nor `labels`, `fine_label` or one other of integers or text with one label a row; {}",
                told(&leaves)
            ),
            several => format!(
                "has no column `label`, `labels` or `fine_label`, and several that could be it, {}; rename one to `label`",
                quoted(several)
            ),
        })
    })?;
    let classes = match label.kind {
        Kind::Words => None,
        _ => features.get(label.name()).and_then(class_names),
    };
    let label = LabelColumn { number: label.number, name: label.name().to_owned(), kind: label.kind, classes };
    Ok(Columns { image: image.number, label })
}

/// Of the candidates that the file notes to be of a kind, or of all where it notes none, the first by its name, or else the
/// only one; otherwise the names of those that are left.
fn choice<'a, 'b>(
    candidates: &[&'a Leaf<'b>],
    is_noted: impl Fn(&Leaf<'b>) -> bool,
    names: &[&str],
) -> std::result::Result<&'a Leaf<'b>, Vec<String>> {
    let mut left: Vec<&Leaf<'_>> = candidates.iter().copied().filter(|leaf| is_noted(leaf)).collect();
    let is_noted = !left.is_empty();
    if !is_noted {
        left = candidates.to_vec();
    }
    if let Some(named) = names.iter().find_map(|name| left.iter().find(|leaf| leaf.name() == *name)) {
        return Ok(named);
    }
    left.retain(|leaf| is_noted || !NO_LABELS.contains(&leaf.name()));
    match left.as_slice() {
        [only] => Ok(only),
        several => Err(several.iter().map(|leaf| leaf.name().to_owned()).collect()),
    }
}

/// What the file's columns are, for a message.
fn told(leaves: &[Leaf<'_>]) -> String {
    let shown: Vec<String> = leaves
        .iter()
        .take(MAX_TOLD)
        .map(|leaf| format!("`{}` ({})", leaf.path.join(".").escape_debug(), leaf.kind))
        .collect();
    match leaves.len().saturating_sub(MAX_TOLD) {
        0 => format!("it has {}", shown.join(", ")),
        more => format!("it has {} and {more} more", shown.join(", ")),
    }
}

fn quoted(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().take(MAX_TOLD).map(|name| format!("`{}`", name.escape_debug())).collect();
    shown.join(", ")
}

/// The features, by column, of the description that Hugging Face puts into every shard.
fn features(description: &str) -> Option<serde_json::Map<String, Value>> {
    let mut json: Value = serde_json::from_str(description).ok()?;
    match json.pointer_mut("/info/features")?.take() {
        Value::Object(features) => Some(features),
        _ => None,
    }
}

/// The names that a feature gives its labels.
fn class_names(feature: &Value) -> Option<Vec<String>> {
    let names = feature.get("names")?.as_array()?;
    names.iter().map(|name| name.as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parquet::schema::types::{ColumnPath, Type};

    use super::*;

    /// Writers from before logical types note converted ones alone.
    #[test]
    fn older_notes_of_a_columns_type_count() {
        for (physical, converted, expected) in [
            (Physical::INT32, ConvertedType::NONE, Kind::Integer { signed: true }),
            (Physical::INT32, ConvertedType::INT_8, Kind::Integer { signed: true }),
            (Physical::INT64, ConvertedType::INT_64, Kind::Integer { signed: true }),
            (Physical::INT32, ConvertedType::UINT_8, Kind::Integer { signed: false }),
            (Physical::INT64, ConvertedType::UINT_64, Kind::Integer { signed: false }),
            (Physical::INT32, ConvertedType::DATE, Kind::Other),
            (Physical::INT64, ConvertedType::TIMESTAMP_MICROS, Kind::Other),
            (Physical::BYTE_ARRAY, ConvertedType::UTF8, Kind::Words),
            (Physical::BYTE_ARRAY, ConvertedType::ENUM, Kind::Words),
            (Physical::BYTE_ARRAY, ConvertedType::NONE, Kind::Binary),
            (Physical::BYTE_ARRAY, ConvertedType::JSON, Kind::Other),
            (Physical::FLOAT, ConvertedType::NONE, Kind::Other),
        ] {
            let column =
                Type::primitive_type_builder("label", physical).with_converted_type(converted).build().unwrap();
            let column = ColumnDescriptor::new(Arc::new(column), 0, 0, ColumnPath::from("label"));
            assert_eq!(column.logical_type_ref(), None);
            assert_eq!(Kind::of(&column), expected, "{physical} {converted}");
        }
    }
}
