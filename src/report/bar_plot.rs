//! Rates as horizontal bars, each with a peer's beside it, as an SVG file that stands alone.

use std::fmt::Write as _;

use super::plot::{open, text};
use super::table::count;
use crate::measure::NetworkRecord;

const WIDTH: f64 = 760.0;
/// Room for the names, and for the numbers behind the longest bar.
const LEFT: f64 = 150.0;
const RIGHT: f64 = 80.0;
const TOP: f64 = 44.0;
const BAR: f64 = 14.0;
const GAP: f64 = 12.0;
const STYLE: &str = "<style>svg{background:#fff;font:12px sans-serif}text{fill:#333}\
    .own{fill:#2471a3}.peer{fill:#b9c4cc}</style>";

/// Images per second of whole networks as an SVG file that stands alone: a bar for each, and beside it the peer's.
pub fn network_bars(title: String, records: &[NetworkRecord]) -> String {
    let bars = records.iter().map(|record| Bars {
        name: format!("{} {}", record.work.name, record.work.pass),
        own: record.timing().map(|own| own.images_per_s),
        peer: record.peer_timing().and_then(|timing| timing.peer.peer_images_per_s),
    });
    BarPlot { title, bars: bars.collect() }.svg()
}

/// One thing and its rates; what was not measured has no bar.
#[derive(Debug, Clone, PartialEq)]
struct Bars {
    name: String,
    own: Option<f64>,
    peer: Option<f64>,
}

/// Bars on one scale.
#[derive(Debug, Clone, PartialEq)]
struct BarPlot {
    title: String,
    bars: Vec<Bars>,
}

impl BarPlot {
    fn svg(&self) -> String {
        let rates = |bars: &Bars| [("own", bars.own), ("peer", bars.peer)];
        let usable = |rate: Option<f64>| rate.filter(|v| v.is_finite() && *v > 0.0);
        let all = || self.bars.iter().flat_map(rates).filter_map(|(class, rate)| Some((class, usable(rate)?)));
        let most = all().map(|(_, rate)| rate).fold(f64::MIN_POSITIVE, f64::max);
        let has_peer = all().any(|(class, _)| class == "peer");
        let row = if has_peer { 2.0 * BAR } else { BAR } + GAP;
        let mut svg = open(&self.title, WIDTH, TOP + row * self.bars.len() as f64);
        svg.push_str(STYLE);
        text(&mut svg, "title", (8.0, 16.0), "start", &self.title);
        for (i, (class, name)) in [("own", "depthshrinker"), ("peer", "peer")].into_iter().enumerate() {
            if class == "own" || has_peer {
                let x = LEFT + 120.0 * i as f64;
                let _ = write!(svg, "<rect class=\"key {class}\" x=\"{x}\" y=\"24\" width=\"10\" height=\"10\"/>");
                text(&mut svg, "tick", (x + 15.0, 33.0), "start", name);
            }
        }
        for (i, bars) in self.bars.iter().enumerate() {
            let top = TOP + row * i as f64;
            text(&mut svg, "tick", (LEFT - 8.0, top + BAR - 3.0), "end", &bars.name);
            for (j, (class, rate)) in rates(bars).into_iter().enumerate() {
                let Some(rate) = usable(rate) else { continue };
                let (y, width) = (top + BAR * j as f64, rate / most * (WIDTH - LEFT - RIGHT));
                let _ = write!(
                    svg,
                    "<rect class=\"bar {class}\" x=\"{LEFT}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{:.1}\"/>",
                    BAR - 1.0
                );
                text(&mut svg, "tick", (LEFT + width + 5.0, y + BAR - 3.0), "start", &count(rate.round() as u64));
            }
        }
        svg.push_str("</svg>\n");
        svg
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_a_bar_for_every_rate_there_is() {
        let bars = |name: &str, own, peer| Bars { name: name.into(), own, peer };
        let plot = BarPlot {
            title: "a < b".into(),
            bars: vec![bars("x", Some(1000.0), Some(500.0)), bars("y", None, Some(f64::NAN))],
        };
        let svg = plot.svg();
        assert_eq!((svg.matches("class=\"bar own").count(), svg.matches("class=\"bar peer").count()), (1, 1));
        assert!(svg.contains("a &lt; b") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
