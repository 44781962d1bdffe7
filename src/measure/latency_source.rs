//! What times blocks are priced by: a machine's roofline, the clock, or a table.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::roofline::{DATA_SHEETS, DataSheet, Roofline};
use crate::device::Device;
use crate::dtype::Dtype;
use crate::{Error, Result};

/// Two nominal cores whose caches hold a micro-batch: the same on every machine, so that a search repeats; only the ratios
/// matter.
const TWO_CORES: Roofline = Roofline { bandwidth: 40e9, matrix_flops: 100e9, vector_flops: 40e9, element_bytes: 4 };

/// Where the times of blocks come from. Written `auto`, `measured`, `macs`, `bytes`, `roofline:v100-sxm2`, or the name of
/// a CSV file.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum LatencySource {
    /// The roofline of what computes: of the GPU by its data sheet, on the CPU of two nominal cores. A GPU without a data
    /// sheet is measured. No clock is read otherwise, so that results repeat bit for bit.
    #[default]
    Auto,
    /// A table that is measured on the device.
    Measured,
    /// Multiply-accumulates alone.
    Macs,
    /// Bytes alone that are read and written.
    Bytes,
    /// The roofline of a GPU by its data sheet.
    Roofline(DataSheet),
    /// A table in a file.
    Table(PathBuf),
}

impl LatencySource {
    /// The machine whose roofline prices blocks; `None` where a table does.
    pub fn roofline(&self, device: &Device) -> Option<Roofline> {
        let bytes = device.precision().bytes() as u64;
        let only =
            |bandwidth, flops| Roofline { bandwidth, matrix_flops: flops, vector_flops: flops, element_bytes: bytes };
        match (self, device) {
            (Self::Auto, Device::Gpu(gpu, precision)) if !gpu.driver().is_emulated() => {
                DataSheet::of(&device.name()).map(|sheet| sheet.roofline(*precision))
            }
            (Self::Auto, _) => Some(TWO_CORES),
            (Self::Macs, _) => Some(only(f64::INFINITY, 2e12)),
            (Self::Bytes, _) => Some(only(1e12, f64::INFINITY)),
            (Self::Roofline(sheet), Device::Cpu) => Some(sheet.roofline(Dtype::F16)),
            (Self::Roofline(sheet), Device::Gpu(_, precision)) => Some(sheet.roofline(*precision)),
            (Self::Measured | Self::Table(_), _) => None,
        }
    }

    /// The machine by whose roofline rows of a table are scaled, where a network has fewer channels than the table's: that which
    /// prices blocks, else that of what computes.
    pub fn scaling(&self, device: &Device) -> Roofline {
        self.roofline(device).or_else(|| Self::Auto.roofline(device)).unwrap_or(TWO_CORES)
    }

    /// The table in a file that is asked for.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::Table(path) => Some(path),
            _ => None,
        }
    }

    /// What it is on a device, in words.
    pub fn describe(&self, device: &Device) -> String {
        match (self, device) {
            (Self::Auto, Device::Gpu(gpu, precision)) if !gpu.driver().is_emulated() => {
                match DataSheet::of(&device.name()) {
                    Some(sheet) => format!("roofline of {} in {precision}", sheet.name),
                    None => format!("measured on {} in {precision}", device.name()),
                }
            }
            (Self::Auto, _) => "roofline of two nominal cores".into(),
            (Self::Measured, _) => format!("measured on {} in {}", device.name(), device.precision()),
            (Self::Macs, _) => "multiply-accumulates".into(),
            (Self::Bytes, _) => "bytes read and written".into(),
            (Self::Roofline(sheet), Device::Cpu) => format!("roofline of {} in f16", sheet.name),
            (Self::Roofline(sheet), _) => format!("roofline of {} in {}", sheet.name, device.precision()),
            (Self::Table(path), _) => path.display().to_string(),
        }
    }
}

fn key(sheet: &DataSheet) -> String {
    sheet.name.to_ascii_lowercase().replace(' ', "-")
}

impl fmt::Display for LatencySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Measured => f.write_str("measured"),
            Self::Macs => f.write_str("macs"),
            Self::Bytes => f.write_str("bytes"),
            Self::Roofline(sheet) => write!(f, "roofline:{}", key(sheet)),
            Self::Table(path) => write!(f, "{}", path.display()),
        }
    }
}

impl FromStr for LatencySource {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let known = || DATA_SHEETS.iter().map(key).collect::<Vec<_>>().join(", ");
        match (text, text.strip_prefix("roofline:")) {
            ("auto", _) => Ok(Self::Auto),
            ("measured", _) => Ok(Self::Measured),
            ("macs", _) => Ok(Self::Macs),
            ("bytes", _) => Ok(Self::Bytes),
            (_, Some(name)) => {
                let found = DATA_SHEETS.iter().find(|sheet| key(sheet) == name.to_ascii_lowercase());
                found.copied().map(Self::Roofline).ok_or_else(|| {
                    Error::Config(format!("no data sheet of {name:?} is known; give one of {}", known()))
                })
            }
            _ if text.ends_with(".csv") => Ok(Self::Table(text.into())),
            _ => Err(Error::Config(format!(
                "unknown latency {text:?}; give auto, measured, macs, bytes, roofline: and one of {}, or a file.csv",
                known()
            ))),
        }
    }
}

impl TryFrom<String> for LatencySource {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse().map_err(|e| match e {
            Error::Config(problem) => problem,
            other => other.to_string(),
        })
    }
}

impl From<LatencySource> for String {
    fn from(source: LatencySource) -> Self {
        source.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_prints() {
        for text in ["auto", "measured", "macs", "bytes", "roofline:v100-sxm2", "roofline:h100-sxm", "a b/t.csv"] {
            assert_eq!(text.parse::<LatencySource>().unwrap().to_string(), text);
        }
        for (text, words) in [("roofline:tpu", "v100-sxm2"), ("table", "measured"), ("", "auto")] {
            let error = text.parse::<LatencySource>().unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn the_cpu_is_priced_without_a_clock_unless_asked() {
        let roofline = |text: &str| text.parse::<LatencySource>().unwrap().roofline(&Device::Cpu);
        assert_eq!(roofline("auto"), Some(TWO_CORES));
        assert_eq!((roofline("measured"), roofline("t.csv")), (None, None));
        assert_eq!(roofline("roofline:v100-sxm2").unwrap().matrix_flops, 125e12);
        assert!(roofline("macs").unwrap().bandwidth.is_infinite());
        assert!(roofline("bytes").unwrap().vector_flops.is_infinite());
    }
}
