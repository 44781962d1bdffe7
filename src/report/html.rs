//! `report.html`: one self-contained page about a run, readable in light and dark and on a phone, without scripts.

use std::path::Path;

use super::curves::{Curves, MetricsLine};
use super::network_drawing::{network_drawing, short_name};
use super::plot::{BarRow, LineChart, Series, bar_chart, legend};
use super::result::{BlockResult, MaskTrial, NetworkStage, RunResult};
use super::table::{Align, Table, count, escape, significant};
use super::text::network_table;
use crate::Result;
use crate::graph::{Graph, NodeId};
use crate::io::write_atomic;
use crate::shrink::SearchMethod;

const STYLE: &str = include_str!("page.css");

/// Everything the page shows.
#[derive(Debug, Clone, Copy)]
pub struct Page<'a> {
    /// The run's numbers.
    pub result: &'a RunResult,
    /// The lines of `metrics.jsonl`.
    pub metrics: &'a [MetricsLine],
    /// The original network.
    pub before: &'a Graph,
    /// The network as it is now, with its blocks' states.
    pub after: &'a Graph,
    /// For every node of `before` the node of `after` that stands for its value.
    pub map: &'a [Option<NodeId>],
    /// The complete configuration as TOML; may be empty.
    pub config: &'a str,
}

impl Page<'_> {
    /// Writes `report.html` into a folder, whole or not at all.
    ///
    /// # Errors
    /// A malformed graph, or what the operating system says of the folder.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join("report.html");
        let html = self.html()?;
        write_atomic(&path, |file| file.write_all(html.as_bytes()))
    }

    /// The page.
    ///
    /// # Errors
    /// A malformed graph.
    pub fn html(&self) -> Result<String> {
        let curves = Curves::new(self.metrics);
        let title = format!("{} on {}", self.network_name(), self.result.data.name);
        let sections = [
            self.headline(&title),
            section("Original, unmerged, merged", &self.networks()),
            section("Accuracy and loss", &training(&curves)),
            section("Scores over the search", &self.scores(&curves)),
            section("The network", &self.network()?),
            section("Latency of each block", &self.blocks()),
            section("Selected against random masks", &self.masks()),
            section("Time of each stage", &self.stages()),
            section("How to read this", HOW_TO_READ),
            section("Configuration", &self.configuration()),
        ];
        Ok(document(&title, &sections.concat()))
    }

    fn network_name(&self) -> &str {
        self.result.network.as_deref().unwrap_or(&self.before.name)
    }

    fn kept(&self) -> Vec<bool> {
        self.result.kept.iter().map(|&k| k != 0).collect()
    }

    fn headline(&self, title: &str) -> String {
        let r = self.result;
        let machine = r.machine.as_ref().map_or_else(String::new, |m| format!(" · {} · {} threads", m.cpu, m.threads));
        let (train, test) = (count(r.data.train as u64), count(r.data.test as u64));
        let method = r.method.map_or_else(String::new, |method| format!(" · chosen by: {method}"));
        let latency = r.latency.as_ref().map_or_else(String::new, |by| format!(" · blocks priced by: {by}"));
        let about = format!(
            "{train} training and {test} test images · {} {}{machine} · seed {}{method}{latency}",
            r.device, r.precision, r.seed
        );
        let mut cards = String::new();
        let mut card = |value: String, what: &str| {
            cards.push_str(&format!("<div><b>{}</b><span>{}</span></div>", escape(&value), escape(what)));
        };
        let last = r.network(NetworkStage::Merged).or_else(|| r.network(NetworkStage::Unmerged));
        if let Some(ratio) = r.speed_up(NetworkStage::Merged) {
            card(format!("{ratio:.2}×"), "images/s, merged over folded and fused original");
        }
        if let Some(last) = last {
            card(format!("{:.2} %", last.top1), &format!("top-1, {}", last.name));
            if let Some(original) = r.network(NetworkStage::Original) {
                let points = last.top1 - original.top1;
                card(format!("{points:+.2}"), "points of top-1 against the original");
            }
        }
        let removed = r.kept.iter().filter(|&&k| k == 0).count();
        card(format!("{removed} of {}", r.kept.len()), "blocks without activations");
        if !r.bypassed.is_empty() {
            card(format!("{} of {}", r.bypassed.len(), r.kept.len()), "blocks bypassed");
        }
        if let Some([left, of]) = r.channels_left() {
            card(format!("{left} of {of}"), "channels left where they became fewer");
        }
        if let Some(merge) = &r.merge {
            card(format!("{:.1e}", merge.max_rel_error), "merge error, relative to the logits' scale");
        }
        format!(
            "<h1>{}</h1>\n<p class=\"muted\">{}</p>\n<div class=\"cards\">{cards}</div>\n",
            escape(title),
            escape(&about)
        )
    }

    fn networks(&self) -> String {
        let mut machine = Table::new(&[
            ("network", Align::Left),
            ("FLOP utilization", Align::Right),
            ("byte utilization", Align::Right),
            ("roofline fraction", Align::Right),
        ]);
        for n in &self.result.networks {
            let percent = |share: f64| format!("{:.1} %", share * 100.0);
            let u = n.utilization;
            machine.row(&[n.name.to_string(), percent(u.flop), percent(u.byte), percent(u.roofline)]);
        }
        let batch = self.result.networks.first().map_or(0, |n| n.batch);
        format!(
            "<div class=\"scroll\">{}</div><p class=\"muted\">Latency of one pass of {batch} images, median and \
             interquartile range, measured in alternation; × is images/s over the original's.</p>\
             <div class=\"scroll\">{}</div>",
            network_table(self.result).html(),
            machine.html()
        )
    }

    fn scores(&self, curves: &Curves<'_>) -> String {
        let names: Vec<&str> = self.before.blocks.iter().map(|b| short_name(&b.name)).collect();
        let series = curves.scores(&names, &self.kept());
        let Some(band) = curves.score_band() else { return String::new() };
        let bands = [band];
        let height = (series.len() as f64 * 14.0 + 90.0).max(300.0);
        let chart = LineChart {
            title: "Scores",
            x_label: "step",
            height,
            series,
            bands: &bands,
            names_at_end: true,
            ticks: None,
        };
        let entries = [("c-kept", "activations kept"), ("c-merged", "activations removed")];
        format!("{}{}", legend(entries.into_iter()), chart.svg())
    }

    fn network(&self) -> Result<String> {
        let drawing = network_drawing(self.before, self.after, self.map, &self.kept())?;
        Ok(format!(
            "<p class=\"muted\">One row per block, top to bottom as the image passes. A dot is an activation, a line \
             above the boxes the residual; dw is depthwise, a→b are channels, /2 is the stride.</p>{drawing}"
        ))
    }

    fn blocks(&self) -> String {
        if self.result.blocks.is_empty() {
            return String::new();
        }
        fn row(block: &BlockResult) -> BarRow<'_> {
            let class = if block.kept != 0 { "c-kept" } else { "c-merged" };
            let bars = [(block.before_us, "c-before"), (block.after_us, class)];
            BarRow { name: short_name(&block.name), class, bars }
        }
        let rows: Vec<BarRow<'_>> = self.result.blocks.iter().map(row).collect();
        let entries = [("c-before", "original, fused"), ("c-kept", "now, kept"), ("c-merged", "now, merged")];
        format!("{}{}", legend(entries.into_iter()), bar_chart("Latency of each block", "µs", &rows))
    }

    fn masks(&self) -> String {
        let r = self.result;
        if r.learned_masks.is_empty() && r.random_masks.is_empty() {
            return String::new();
        }
        // Results of older versions do not name the method: then scores were learned.
        let selected = r.method.unwrap_or(SearchMethod::Learned).to_string();
        let mut rows = String::new();
        for (name, trials) in [(selected.as_str(), &r.learned_masks), ("random", &r.random_masks)] {
            for trial in trials {
                rows.push_str(&format!(
                    "<tr><td>{name}</td><td class=\"num\">{}</td><td>{}</td><td class=\"num\">{:.2}</td></tr>",
                    trial.seed,
                    mask(&trial.kept),
                    trial.top1
                ));
            }
        }
        let spread = |name: &str, trials: &[MaskTrial]| {
            mean_and_spread(trials).map(|(mean, std)| format!("{name} {mean:.2} ± {std:.2} %"))
        };
        let summary: Vec<String> =
            [spread(&selected, &r.learned_masks), spread("random", &r.random_masks)].into_iter().flatten().collect();
        format!(
            "<p>Mean and standard deviation over seeds, after the same finetuning: {}.</p><div class=\"scroll\"><table>\
             <thead><tr><th>mask</th><th class=\"num\">seed</th><th>blocks kept</th><th class=\"num\">top-1 %</th></tr>\
             </thead><tbody>{rows}</tbody></table></div>",
            escape(&summary.join("; "))
        )
    }

    fn stages(&self) -> String {
        let mut table = Table::new(&[("stage", Align::Left), ("seconds", Align::Right)]);
        for stage in &self.result.stages {
            table.row(&[stage.name.clone(), significant(stage.seconds)]);
        }
        let total: f64 = self.result.stages.iter().map(|s| s.seconds).sum();
        table.row(&["all".to_owned(), significant(total)]);
        format!("<div class=\"scroll\">{}</div>", table.html())
    }

    fn configuration(&self) -> String {
        if self.config.trim().is_empty() {
            return String::new();
        }
        format!("<details><summary>config.toml</summary><pre>{}</pre></details>", escape(self.config))
    }
}

const HOW_TO_READ: &str = "<dl>\
<dt>original, unmerged, merged</dt><dd>The trained network; the same after its search and finetuning, with the removed \
activations gone but every convolution still there; and that network with each freed block folded into one dense \
convolution. Unmerged and merged compute the same function, so their accuracy differs by rounding only.</dd>\
<dt>images/s and ×</dt><dd>All networks run with batch-norm folded into the convolutions and activations fused, so × shows what \
merging gains beyond that. Networks are measured in turns within one run, so that a slow moment of the machine meets all.</dd>\
<dt>FLOP, byte, roofline</dt><dd>Operations, or least bytes, per second over the peaks measured in the same run (matrix products, \
large copy); and the least possible time over the measured one. Bytes and roofline can pass 100 % where activations stay in \
caches, which are faster than the memory the copy was measured on.</dd>\
<dt>scores</dt><dd>Where a search trains them, one learned number per block: the blocks with the highest scores keep their activations. Lines that separate \
early and stay apart are a clear choice; lines that cross until the end are a close one.</dd>\
<dt>latency of each block</dt><dd>Each block timed alone. The sum differs from the whole network's time, which also has a stem and a \
head and finds its data in other caches.</dd>\
<dt>loss</dt><dd>Comparable within a stage only: finetuning adds the teacher's part to the loss.</dd></dl>";

/// A whole page around its content.
pub(super) fn document(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n<title>{}</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        escape(title)
    )
}

/// A drawing with styles of its own, which must not reach the page: an image in a data URL.
pub(super) fn image(title: &str, svg: &str) -> String {
    let encoded: String = svg
        .bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b' ' | b'-' | b'.' | b'/' | b':' | b'=' | b',' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect();
    format!("<img alt=\"{}\" style=\"width:100%\" src=\"data:image/svg+xml,{encoded}\">", escape(title))
}

/// A part of a page under its heading; nothing where it is empty.
pub(super) fn section(title: &str, body: &str) -> String {
    if body.is_empty() { String::new() } else { format!("<section>\n<h2>{}</h2>\n{body}\n</section>\n", escape(title)) }
}

fn training(curves: &Curves<'_>) -> String {
    let chart = |title, x_label, series: Vec<Series>| {
        LineChart { title, x_label, height: 270.0, series, bands: &curves.bands, names_at_end: false, ticks: None }
            .svg()
    };
    let accuracy = vec![
        curves.series(|line| line.train_top1, "train top-1 %", "c-train"),
        curves.series(|line| line.test_top1, "test top-1 %", "c-test"),
    ];
    let loss = vec![
        curves.series(|line| line.train_loss, "train loss", "c-train"),
        curves.series(|line| line.test_loss, "test loss", "c-test"),
    ];
    format!("{}\n{}", chart("Accuracy", "", accuracy), chart("Loss", "step", loss))
}

/// A mask as a strip, one mark per block.
fn mask(kept: &[u8]) -> String {
    let marks: String =
        kept.iter().map(|&k| format!("<i class=\"{}\"></i>", if k != 0 { "c-kept" } else { "c-merged" })).collect();
    let digits: Vec<String> = kept.iter().map(u8::to_string).collect();
    format!("<span class=\"mask\" role=\"img\" aria-label=\"{}\">{marks}</span>", digits.join(","))
}

/// Mean and sample standard deviation of the accuracies.
fn mean_and_spread(trials: &[MaskTrial]) -> Option<(f64, f64)> {
    let n = trials.len() as f64;
    if trials.is_empty() {
        return None;
    }
    let mean = trials.iter().map(|t| t.top1).sum::<f64>() / n;
    let squares: f64 = trials.iter().map(|t| (t.top1 - mean).powi(2)).sum();
    Some((mean, if trials.len() > 1 { (squares / (n - 1.0)).sqrt() } else { 0.0 }))
}
