//! The limits of a device against which times are judged.

use std::time::Duration;

use super::peaks::{Peaks, measure_peaks};
use super::record::{LimitsRecord, PeakSource, PublishedRecord};
use super::roofline::{DataSheet, Roofline};
use crate::Result;
use crate::device::Device;
use crate::dtype::Dtype;

/// Share of the measuring time for the device's peaks.
const PEAKS_SHARE: f64 = 0.05;
/// Time for them at least: everything is judged by them.
const MIN_PEAKS: Duration = Duration::from_millis(300);

/// The limits of one device in its precision.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Measured with this program's own copy and matrix product.
    pub peaks: Peaks,
    /// The device's data sheet, where it is known.
    pub published: Option<&'static DataSheet>,
    /// Bandwidth as measured; rates of the data sheet where it is known, else as measured.
    pub roofline: Roofline,
    precision: Dtype,
}

impl Limits {
    /// Measures a device's limits in a small share of `budget`, though not below the time that a peak needs.
    ///
    /// # Errors
    /// When the device fails.
    pub fn measure(device: &Device, budget: Duration) -> Result<Self> {
        let peaks = measure_peaks(device, budget.mul_f64(PEAKS_SHARE).max(MIN_PEAKS))?;
        let precision = device.precision();
        let published = DataSheet::of(&device.name());
        let measured = Roofline::measured(&peaks, precision);
        let roofline = match published {
            Some(sheet) => Roofline { bandwidth: measured.bandwidth, ..sheet.roofline(precision) },
            None => measured,
        };
        Ok(Self { peaks, published, roofline, precision })
    }

    /// What FLOP utilization is a share of.
    pub fn flop_peak(&self) -> PeakSource {
        if self.published.is_some() { PeakSource::Published } else { PeakSource::Measured }
    }

    /// The limits as `kernels.json` and `network.json` have them.
    pub fn record(&self) -> LimitsRecord {
        let published = self.published.map(|sheet| {
            let roofline = sheet.roofline(self.precision);
            PublishedRecord {
                name: sheet.name,
                copy_bytes_per_s: roofline.bandwidth,
                gemm_flops_per_s: roofline.matrix_flops,
                vector_flops_per_s: roofline.vector_flops,
            }
        });
        LimitsRecord {
            measured: self.peaks,
            published,
            flop_utilization_of: self.flop_peak(),
            byte_utilization_of: PeakSource::Measured,
        }
    }
}
