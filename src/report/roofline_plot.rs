//! A roofline: rate against FLOP per byte, both on logarithmic axes, as an SVG file that stands alone.

use std::fmt::Write as _;

use super::plot::{open, text};
use super::table::{escape, significant};
use crate::measure::{LayerRecord, Roofline};

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 460.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 42.0;
const BOTTOM: f64 = 44.0;
const STYLE: &str = "<style>svg{background:#fff;font:12px sans-serif}text{fill:#333}.grid{stroke:#e3e3e3}\
    .roof{fill:none;stroke:#555;stroke-width:1.5}.own{fill-opacity:.75}\
    .depthwise{fill:#c0392b}.pointwise{fill:#2471a3}.dense{fill:#1e8449}</style>";

/// One layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// What it is, shown under the pointer.
    pub name: String,
    /// `depthwise`, `pointwise` or `dense`.
    pub family: String,
    /// FLOP per byte.
    pub intensity: f64,
    /// FLOP per second.
    pub rate: f64,
}

/// Points under a roof.
#[derive(Debug, Clone, PartialEq)]
pub struct RooflinePlot {
    /// What is shown.
    pub title: String,
    /// Bytes per second.
    pub bandwidth: f64,
    /// Peaks of the units with their names, FLOP per second.
    pub peaks: Vec<(&'static str, f64)>,
    /// The layers.
    pub points: Vec<Point>,
}

impl RooflinePlot {
    /// The layers that were timed, under the roof of their device.
    pub fn of_layers(title: String, records: &[LayerRecord], roofline: &Roofline) -> Self {
        let point = |record: &LayerRecord| {
            let (work, own) = (&record.work, record.timing()?);
            let seconds = own.timing.time_us * 1e-6;
            Some(Point {
                name: format!("{} {}: {}, {seconds:.2e} s", work.name, work.pass, work.shape),
                family: work.family.to_owned(),
                intensity: own.flops_per_byte,
                rate: own.flops as f64 / seconds,
            })
        };
        let peaks = match roofline.matrix_flops == roofline.vector_flops {
            true => vec![("peak", roofline.matrix_flops)],
            false => vec![("matrix units", roofline.matrix_flops), ("vector units", roofline.vector_flops)],
        };
        Self { title, bandwidth: roofline.bandwidth, peaks, points: records.iter().filter_map(point).collect() }
    }

    /// The drawing; points that are not finite and above 0 are left out.
    pub fn svg(&self) -> String {
        let usable = |v: f64| v.is_finite() && v > 0.0;
        let points: Vec<&Point> = self.points.iter().filter(|p| usable(p.intensity) && usable(p.rate)).collect();
        let ridge = self.peaks.iter().map(|(_, peak)| peak / self.bandwidth).fold(1.0, f64::max);
        let top = self.peaks.iter().map(|p| p.1).fold(1.0, f64::max);
        let x = decades(points.iter().map(|p| p.intensity).chain([ridge * 2.0]));
        let y = decades(points.iter().map(|p| p.rate).chain([top]));
        let at_x = |v: f64| LEFT + (v.log10() - x.0) / (x.1 - x.0) * (WIDTH - LEFT - RIGHT);
        let at_y = |v: f64| HEIGHT - BOTTOM - (v.log10() - y.0) / (y.1 - y.0) * (HEIGHT - TOP - BOTTOM);
        let mut svg = open(&self.title, WIDTH, HEIGHT);
        svg.push_str(STYLE);
        text(&mut svg, "title", (LEFT, 16.0), "start", &self.title);
        for decade in x.0 as i32..=x.1 as i32 {
            let (v, bottom) = (10f64.powi(decade), HEIGHT - BOTTOM);
            let at = at_x(v);
            let _ = write!(svg, "<line class=\"grid\" x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{bottom}\"/>");
            text(&mut svg, "tick", (at, bottom + 16.0), "middle", &significant(v));
        }
        for decade in y.0 as i32..=y.1 as i32 {
            let at = at_y(10f64.powi(decade));
            let right = WIDTH - RIGHT;
            let _ = write!(svg, "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{right}\" y2=\"{at:.1}\"/>");
            text(
                &mut svg,
                "tick",
                (LEFT - 6.0, at + 4.0),
                "end",
                &format!("{} GF/s", significant(10f64.powi(decade - 9))),
            );
        }
        text(&mut svg, "tick", (WIDTH / 2.0, HEIGHT - 8.0), "middle", "FLOP per byte");
        for (name, peak) in &self.peaks {
            // From the left edge or where the slope enters the picture, up to the peak, then level.
            let start = 10f64.powf(x.0).max(10f64.powf(y.0) / self.bandwidth);
            let ridge = (peak / self.bandwidth).max(start);
            let corner = [(start, start * self.bandwidth), (ridge, *peak), (10f64.powf(x.1), *peak)];
            let line: Vec<String> = corner.iter().map(|(a, b)| format!("{:.1},{:.1}", at_x(*a), at_y(*b))).collect();
            let _ = write!(svg, "<polyline class=\"roof\" points=\"{}\"/>", line.join(" "));
            text(&mut svg, "tick", (WIDTH - RIGHT, at_y(*peak) - 5.0), "end", name);
        }
        for point in &points {
            let _ = write!(
                svg,
                "<circle class=\"own {}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\"><title>{}</title></circle>",
                escape(&point.family),
                at_x(point.intensity),
                at_y(point.rate),
                escape(&point.name)
            );
        }
        for (i, family) in ["depthwise", "pointwise", "dense"].into_iter().enumerate() {
            let at = LEFT + 110.0 * i as f64;
            let _ = write!(svg, "<circle class=\"{family}\" cx=\"{:.1}\" cy=\"28\" r=\"4\"/>", at + 5.0);
            text(&mut svg, "tick", (at + 14.0, 32.0), "start", family);
        }
        svg.push_str("</svg>\n");
        svg
    }
}

/// The whole decades that hold all values.
fn decades(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    let (low, high) = (low.log10().floor(), high.log10().ceil());
    if low.is_finite() && high > low { (low, high) } else { (0.0, 1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_points_and_both_roofs_and_no_number_that_is_none() {
        let point = |intensity, rate| Point { name: "a < b".into(), family: "dense".into(), intensity, rate };
        let plot = RooflinePlot {
            title: "t".into(),
            bandwidth: 1e12,
            peaks: vec![("matrix", 1e14), ("vector", 2e13)],
            points: vec![point(4.5, 2e12), point(f64::NAN, 1.0), point(1.0, 0.0), point(100.0, 9e13)],
        };
        let svg = plot.svg();
        assert_eq!(svg.matches("class=\"own").count(), 2);
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("a &lt; b") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
