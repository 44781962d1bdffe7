//! Points with names over two axes, as SVG within a page.

use std::fmt::Write as _;

use super::plot::{open, text, ticks};
use super::table::{escape, significant};

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 380.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 90.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 40.0;
/// Width and height that a name takes at least.
const NAME: f64 = 60.0;
const LINE: f64 = 11.0;
/// Share of the axis that is free beyond the outermost points.
const MARGIN: f64 = 0.06;

/// A named point.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Mark {
    /// Its name, beside it.
    pub name: String,
    /// Where it is.
    pub at: (f64, f64),
    /// Class that colours it.
    pub class: &'static str,
}

/// Points over two axes, the horizontal one logarithmic.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scatter<'a> {
    /// What is shown, for those who do not see it.
    pub title: &'a str,
    /// Names of the axes.
    pub labels: (&'a str, &'a str),
    /// The points. One without a positive x or a finite y is left out.
    pub marks: Vec<Mark>,
    /// Points that a line joins, in any order.
    pub front: Vec<(f64, f64)>,
}

impl Scatter<'_> {
    /// The drawing, or a line of text where there is no point.
    pub fn svg(&self) -> String {
        let marks: Vec<&Mark> = self.marks.iter().filter(|m| m.at.0 > 0.0 && m.at.1.is_finite()).collect();
        let range = |of: fn(&Mark) -> f64| {
            let ends = marks
                .iter()
                .map(|mark| of(mark))
                .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
            let span = (ends.1 - ends.0).max(ends.1.abs() * 1e-3).max(1e-9);
            (ends.0 - MARGIN * span, ends.1 + MARGIN * span)
        };
        if marks.is_empty() {
            return format!("<p class=\"muted\">{}: nothing was timed.</p>", escape(self.title));
        }
        let (x, y) = (range(|mark| mark.at.0.ln()), range(|mark| mark.at.1));
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        let at_x = |v: f64| LEFT + (v.ln() - x.0) / (x.1 - x.0) * (right - LEFT);
        let at_y = |v: f64| bottom - (v - y.0) / (y.1 - y.0) * (bottom - TOP);
        let mut svg = open(self.title, WIDTH, HEIGHT);
        for tick in ticks(y.0, y.1, 6) {
            let y = at_y(tick);
            let _ = write!(svg, "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>");
            text(&mut svg, "tick", (LEFT - 6.0, y + 4.0), "end", &significant(tick));
        }
        for tick in logarithmic_ticks(x.0.exp(), x.1.exp()) {
            text(&mut svg, "tick", (at_x(tick), bottom + 16.0), "middle", &significant(tick));
        }
        text(&mut svg, "tick", ((LEFT + right) / 2.0, HEIGHT - 6.0), "middle", self.labels.0);
        text(&mut svg, "tick", (LEFT, TOP - 4.0), "start", self.labels.1);
        self.draw_front(|at| (at_x(at.0), at_y(at.1)), &mut svg);
        let mut places: Vec<(f64, f64)> = Vec::new();
        for mark in marks {
            let (x, y) = (at_x(mark.at.0), at_y(mark.at.1));
            let name_y = free_place(&mut places, (x, y + 4.0));
            let class = mark.class;
            let _ = write!(
                svg,
                "<path class=\"dot {class}\" d=\"{}\"><title>{}</title></path>",
                shape(class, (x, y)),
                escape(&mark.name)
            );
            text(&mut svg, &format!("end-name {class}"), (x + 7.0, name_y), "start", &mark.name);
        }
        svg.push_str("</svg>");
        format!("<div class=\"scroll\">{svg}</div>")
    }

    fn draw_front(&self, place: impl Fn((f64, f64)) -> (f64, f64), svg: &mut String) {
        let mut front: Vec<(f64, f64)> =
            self.front.iter().copied().filter(|at| at.0 > 0.0 && at.1.is_finite()).collect();
        front.sort_by(|a, b| a.0.total_cmp(&b.0));
        let points: Vec<String> = front.into_iter().map(place).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        if points.len() > 1 {
            let _ = write!(svg, "<polyline class=\"front\" points=\"{}\"/>", points.join(" "));
        }
    }
}

/// The outline of a mark: a circle, a square where lines of the class are dashed, a triangle where they are dotted.
fn shape(class: &str, (x, y): (f64, f64)) -> String {
    if class.ends_with("dashed") {
        format!("M{:.1} {:.1}h7v7h-7z", x - 3.5, y - 3.5)
    } else if class.ends_with("dotted") {
        format!("M{x:.1} {:.1}l4.5 8h-9z", y - 5.0)
    } else {
        format!("M{:.1} {y:.1}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z", x - 4.0)
    }
}

/// Where a name can stand that meets none of those at `places`, as near below its own place as may be. A line below another
/// may be less than a line away by rounding, and does not meet it.
fn free_place(places: &mut Vec<(f64, f64)>, (x, mut y): (f64, f64)) -> f64 {
    let meets =
        |&&(other_x, other_y): &&(f64, f64), y: f64| (x - other_x).abs() < NAME && (y - other_y).abs() < LINE - 1e-6;
    while let Some(&(_, other_y)) = places.iter().find(|place| meets(place, y)) {
        y = other_y + LINE;
    }
    places.push((x, y));
    y
}

/// 1, 2 and 5 times the powers of ten within a range.
fn logarithmic_ticks(low: f64, high: f64) -> Vec<f64> {
    let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let ticks = powers.flat_map(|power| [1.0, 2.0, 5.0].map(|step| step * 10f64.powi(power)));
    ticks.filter(|tick| (low..=high).contains(tick)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_what_can_be_drawn() {
        let mark = |name: &str, at| Mark { name: name.into(), at, class: "c-kept" };
        let shapes = ["c-m0", "c-m0 dashed", "c-m0 dotted"].map(|class| shape(class, (5.0, 5.0)));
        assert!(shapes[0] != shapes[1] && shapes[1] != shapes[2] && shapes.iter().all(|shape| shape.ends_with('z')));
        let marks = vec![mark("a<b", (0.5, 70.0)), mark("c", (20.0, 75.0)), mark("never", (0.0, 1.0))];
        let svg = Scatter { title: "t", labels: ("ms", "%"), marks, front: vec![(20.0, 75.0), (0.5, 70.0)] }.svg();
        assert_eq!((svg.matches("<path class=\"dot").count(), svg.matches("<polyline").count()), (2, 1));
        assert!(svg.contains("a&lt;b") && !svg.contains("never") && !svg.contains("NaN"), "{svg}");
        assert!(
            Scatter { title: "t", labels: ("ms", "%"), marks: Vec::new(), front: Vec::new() }
                .svg()
                .contains("nothing was timed")
        );
        let mut places = Vec::new();
        let names = [(0.0, 50.0), (10.0, 52.0), (20.0, 60.0), (200.0, 52.0)].map(|at| free_place(&mut places, at));
        assert_eq!(names, [50.0, 61.0, 72.0, 52.0]);
        // 5.4 + 11 − 5.4 is less than 11.
        let mut places = Vec::new();
        assert_eq!([5.4; 3].map(|y| free_place(&mut places, (0.0, y))), [5.4, 5.4 + LINE, 5.4 + LINE + LINE]);
        assert_eq!(logarithmic_ticks(0.3, 12.0), [0.5, 1.0, 2.0, 5.0, 10.0]);
    }
}
