//! Line and bar charts as inline SVG. Colours come from classes of the page, so one drawing serves light and dark.

use std::fmt::Write as _;

use super::table::{escape, significant};

/// Width of every chart in its own units, about CSS pixels.
const WIDTH: f64 = 720.0;
/// Room for the names of the vertical ticks.
const LEFT: f64 = 52.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 40.0;
/// Least distance between two names at the end of lines.
const LABEL_STEP: f64 = 13.0;
/// Up to this many points each one is marked, unless many lines share the chart.
const MARKED_POINTS: usize = 40;

/// One curve, which may be interrupted.
#[derive(Debug, Clone)]
pub(super) struct Series {
    /// Name in the legend or at the end of the line.
    pub name: String,
    /// Class that colours it.
    pub class: &'static str,
    /// Unbroken pieces, each sorted by x.
    pub pieces: Vec<Vec<(f64, f64)>>,
}

impl Series {
    fn points(&self) -> impl Iterator<Item = (f64, f64)> + '_ {
        self.pieces.iter().flatten().copied().filter(|(x, y)| x.is_finite() && y.is_finite())
    }
}

/// A named stretch of the x axis.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Band {
    /// Name above it.
    pub name: String,
    /// Where it starts.
    pub from: f64,
    /// Where it ends.
    pub to: f64,
}

/// Curves over one axis.
#[derive(Debug, Clone)]
pub(super) struct LineChart<'a> {
    /// What the chart shows, for those who do not see it.
    pub title: &'a str,
    /// Name of the x axis.
    pub x_label: &'a str,
    /// Height in units.
    pub height: f64,
    /// The curves.
    pub series: Vec<Series>,
    /// Stretches of the x axis.
    pub bands: &'a [Band],
    /// Whether names stand at the ends of the lines instead of in a legend.
    pub names_at_end: bool,
    /// Places of the horizontal ticks and their names; round numbers where there are none.
    pub ticks: Option<Vec<(f64, String)>>,
}

/// From data to drawing.
struct Frame {
    x: (f64, f64),
    y: (f64, f64),
    right: f64,
    bottom: f64,
}

impl Frame {
    fn x(&self, x: f64) -> f64 {
        LEFT + (x - self.x.0) / (self.x.1 - self.x.0) * (self.right - LEFT)
    }

    fn y(&self, y: f64) -> f64 {
        self.bottom - (y - self.y.0) / (self.y.1 - self.y.0) * (self.bottom - TOP)
    }
}

impl LineChart<'_> {
    /// The chart, or a line of text where there is nothing to draw.
    pub fn svg(&self) -> String {
        let Some(frame) = self.frame() else {
            return format!("<p class=\"muted\">{}: nothing recorded.</p>", escape(self.title));
        };
        let mut svg = open(self.title, WIDTH, self.height);
        self.draw_bands(&frame, &mut svg);
        self.draw_axes(&frame, &mut svg);
        for series in &self.series {
            draw_series(series, &frame, !self.names_at_end, &mut svg);
        }
        if self.names_at_end {
            self.draw_end_names(&frame, &mut svg);
        }
        svg.push_str("</svg>");
        let legend = if self.names_at_end { String::new() } else { self.legend() };
        format!("{legend}<div class=\"scroll\">{svg}</div>")
    }

    fn frame(&self) -> Option<Frame> {
        let range = |values: &mut dyn Iterator<Item = f64>| {
            values.fold(None, |range: Option<(f64, f64)>, v| match range {
                Some((low, high)) => Some((low.min(v), high.max(v))),
                None => Some((v, v)),
            })
        };
        let points = || self.series.iter().flat_map(Series::points);
        let ends = self.bands.iter().flat_map(|b| [b.from, b.to]);
        let x = range(&mut points().map(|p| p.0).chain(ends))?;
        let y = range(&mut points().map(|p| p.1))?;
        let widen = |(low, high): (f64, f64), share: f64| {
            let span = if high > low { high - low } else { high.abs().max(1.0) };
            (low - share * span, high + share * span)
        };
        let x = if x.1 > x.0 { x } else { widen(x, 0.5) };
        let longest = self.series.iter().map(|series| series.name.chars().count()).max().unwrap_or(0);
        // Names of blocks are short.
        let right = WIDTH - if self.names_at_end { (7.0 * longest as f64 + 14.0).max(52.0) } else { 12.0 };
        Some(Frame { x, y: widen(y, 0.05), right, bottom: self.height - BOTTOM })
    }

    fn draw_bands(&self, frame: &Frame, svg: &mut String) {
        for (i, band) in self.bands.iter().enumerate() {
            let (from, to) = (frame.x(band.from), frame.x(band.to));
            let parity = if i % 2 == 0 { "band" } else { "band odd" };
            let (w, h) = ((to - from).max(0.0), frame.bottom - TOP);
            let _ =
                write!(svg, "<rect class=\"{parity}\" x=\"{from:.1}\" y=\"{TOP}\" width=\"{w:.1}\" height=\"{h}\"/>");
            text(svg, "band-name", ((from + to) / 2.0, TOP - 9.0), "middle", &band.name);
        }
    }

    fn draw_axes(&self, frame: &Frame, svg: &mut String) {
        for tick in ticks(frame.y.0, frame.y.1, 5) {
            let y = frame.y(tick);
            let right = frame.right;
            let _ = write!(svg, "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>");
            text(svg, "tick", (LEFT - 7.0, y + 4.0), "end", &tick_name(tick));
        }
        let round = || ticks(frame.x.0, frame.x.1, 8).into_iter().map(|tick| (tick, tick_name(tick))).collect();
        for (place, name) in self.ticks.clone().unwrap_or_else(round) {
            text(svg, "tick", (frame.x(place), frame.bottom + 16.0), "middle", &name);
        }
        text(svg, "tick", ((LEFT + frame.right) / 2.0, self.height - 5.0), "middle", self.x_label);
    }

    /// Names beside the last points, pushed apart where they would cover each other.
    fn draw_end_names(&self, frame: &Frame, svg: &mut String) {
        let mut ends: Vec<(f64, &Series)> =
            self.series.iter().filter_map(|s| Some((frame.y(s.points().last()?.1), s))).collect();
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut places: Vec<f64> = ends.iter().map(|e| e.0).collect();
        for i in 1..places.len() {
            places[i] = places[i].max(places[i - 1] + LABEL_STEP);
        }
        // What was pushed past the bottom goes back up, as far as it needs to.
        let mut limit = frame.bottom;
        for place in places.iter_mut().rev() {
            *place = place.min(limit);
            limit = *place - LABEL_STEP;
        }
        for ((end, series), place) in ends.iter().zip(places) {
            let (x1, x2) = (frame.right, frame.right + 9.0);
            let class = series.class;
            let _ =
                write!(svg, "<line class=\"lead {class}\" x1=\"{x1}\" y1=\"{end:.1}\" x2=\"{x2}\" y2=\"{place:.1}\"/>");
            let class = format!("end-name {class}");
            text(svg, &class, (frame.right + 12.0, place + 4.0), "start", &series.name);
        }
    }

    fn legend(&self) -> String {
        legend(self.series.iter().filter(|s| s.points().next().is_some()).map(|s| (s.class, s.name.as_str())))
    }
}

fn draw_series(series: &Series, frame: &Frame, markable: bool, svg: &mut String) {
    let marked = markable && series.points().count() <= MARKED_POINTS;
    let class = series.class;
    for piece in &series.pieces {
        let mut path = String::new();
        for (x, y) in piece.iter().filter(|(x, y)| x.is_finite() && y.is_finite()) {
            let _ = write!(path, "{}{:.1} {:.1}", if path.is_empty() { "M" } else { "L" }, frame.x(*x), frame.y(*y));
            if marked {
                let _ = write!(
                    svg,
                    "<circle class=\"dot {class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.6\"/>",
                    frame.x(*x),
                    frame.y(*y)
                );
            }
        }
        if !path.is_empty() {
            let _ = write!(
                svg,
                "<path class=\"curve {class}\" d=\"{path}\"><title>{}</title></path>",
                escape(&series.name)
            );
        }
    }
}

/// One row of a bar chart.
#[derive(Debug, Clone)]
pub(super) struct BarRow<'a> {
    /// Name of the row.
    pub name: &'a str,
    /// Class that colours the name.
    pub class: &'static str,
    /// A value and the class of its bar, top to bottom.
    pub bars: [(f64, &'static str); 2],
}

/// Horizontal bars, two a row; `unit` stands behind every value.
pub(super) fn bar_chart(title: &str, unit: &str, rows: &[BarRow<'_>]) -> String {
    const ROW: f64 = 34.0;
    const BAR: f64 = 12.0;
    const NAME: f64 = 96.0;
    let largest = rows.iter().flat_map(|r| r.bars).map(|b| b.0).filter(|v| v.is_finite()).fold(0.0, f64::max);
    if largest <= 0.0 {
        return format!("<p class=\"muted\">{}: nothing recorded.</p>", escape(title));
    }
    let height = ROW * rows.len() as f64 + 8.0;
    let mut svg = open(title, WIDTH, height);
    for (i, row) in rows.iter().enumerate() {
        let top = ROW * i as f64 + 6.0;
        text(&mut svg, &format!("row-name {}", row.class), (NAME - 8.0, top + BAR + 4.0), "end", row.name);
        for (j, (value, class)) in row.bars.iter().enumerate() {
            let width = (value / largest * (WIDTH - NAME - 76.0)).max(1.0);
            let y = top + j as f64 * (BAR + 1.0);
            let _ = write!(
                svg,
                "<rect class=\"bar {class}\" x=\"{NAME}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\" rx=\"2\"/>"
            );
            let value = format!("{} {unit}", significant(*value));
            text(&mut svg, "tick", (NAME + width + 6.0, y + BAR - 1.5), "start", &value);
        }
    }
    svg.push_str("</svg>");
    format!("<div class=\"scroll\">{svg}</div>")
}

/// A legend: class and name of each entry.
pub(super) fn legend<'a>(entries: impl Iterator<Item = (&'static str, &'a str)>) -> String {
    let entries: String =
        entries.map(|(class, name)| format!("<span><i class=\"{class}\"></i>{}</span>", escape(name))).collect();
    format!("<p class=\"legend\">{entries}</p>")
}

/// Opens an SVG that scales with the page and says what it shows.
pub(super) fn open(title: &str, width: f64, height: f64) -> String {
    let title = escape(title);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{title}\">"
    )
}

/// Appends a line of text.
pub(super) fn text(svg: &mut String, class: &str, (x, y): (f64, f64), anchor: &str, content: &str) {
    let content = escape(content);
    let _ = write!(svg, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{content}</text>");
}

/// About `count` round numbers within a range.
pub(super) fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let rough = (high - low) / count as f64;
    let magnitude = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].iter().map(|m| m * magnitude).find(|s| *s >= rough).unwrap_or(rough);
    if !(step.is_finite() && step > 0.0) {
        return Vec::new();
    }
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

fn tick_name(value: f64) -> String {
    let rounded = (value * 1e6).round() / 1e6;
    // Negative zero would print its sign.
    format!("{}", if rounded == 0.0 { 0.0 } else { rounded })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 1.0, 5), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(ticks(62.0, 91.0, 5), [70.0, 80.0, 90.0]);
        assert!(ticks(1.0, 1.0, 5).is_empty());
    }

    #[test]
    fn numbers_that_are_not_finite_leave_no_trace_in_the_drawing() {
        let series = vec![Series {
            name: "loss".into(),
            class: "c-train",
            pieces: vec![vec![(0.0, 2.0), (1.0, f64::NAN), (2.0, f64::INFINITY), (3.0, 1.0)]],
        }];
        let chart = LineChart {
            title: "t",
            x_label: "step",
            height: 200.0,
            series,
            bands: &[],
            names_at_end: false,
            ticks: None,
        };
        let svg = chart.svg();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 2);
    }
}
