//! Networks side by side: tables for the terminal, and `table.html`.

use super::html::{document, image, section};
use super::plot::legend;
use super::scatter::{Mark, Scatter};
use super::table::{Align, Table, count, escape, significant};
use super::text::{MISSING, cell, percent};
use crate::measure::{ComparisonRecord, ComparisonTiming, Form};

/// The network over which speed-ups are formed, and the two whose ratio is the headline of DepthShrinker's paper.
const BASE: &str = "mobilenetv2-1.4";
const FASTEST: &str = "ds-f";
const RIVALS: [&str; 2] = ["metapruning-0.35", "uniform-0.35"];

/// Every row: what was timed, how fast it ran, and what was published and projected of it.
pub fn comparison_table(records: &[ComparisonRecord]) -> Table {
    use Align::{Left, Right};
    let projected = records.iter().any(|record| record.work.projected_images_per_s.is_some());
    let mut header = vec![("network", Left), ("form", Left), ("precision", Left), ("batch", Right)];
    header.extend(["images/s", "ms", "FLOP %", "byte %", "roofline %", "MB", "MMAC"].map(|name| (name, Right)));
    header.extend(projected.then_some(("projected", Right)));
    header.push(("", Left));
    let mut table = Table::new(&header);
    for record in records {
        let (work, own) = (&record.work, record.own.value());
        let of = |value: fn(&ComparisonTiming) -> f64| own.map(value);
        let mut cells = vec![work.name.clone(), work.form.name().to_owned(), work.precision.clone()];
        cells.extend([work.batch.to_string(), rate(record.images_per_s()), cell(of(|t| t.time_us * 1e-3))]);
        cells.extend([of(|t| t.used.flop_utilization), of(|t| t.used.byte_utilization)].map(percent));
        cells.push(percent(of(|t| t.used.roofline_fraction)));
        cells.extend([cell(of(|t| t.memory_bytes as f64 / 1e6)), cell(work.macs.map(|macs| macs as f64 / 1e6))]);
        cells.extend(projected.then(|| rate(work.projected_images_per_s)));
        cells.push(record.own.error().unwrap_or_default().to_owned());
        table.row(&cells);
    }
    table
}

/// A row per network: accuracy, operations and images per second as published, and beside them the same form on this
/// device, its deployed form in `f32` at the largest batch, and what was published as it is projected.
pub fn published_table(records: &[ComparisonRecord]) -> Table {
    use Align::{Left, Right};
    let mut header = vec![("network", Left)];
    header.extend(["top-1 %*", "MFLOPs*", "MFLOPs", "V100*", "2080 Ti*", "TX2*"].map(|name| (name, Right)));
    let projected = records.iter().any(|record| record.work.projected_as_published.is_some());
    header.extend(projected.then_some(("projected", Right)));
    header.extend(["here", "deployed", "× of V100*", "× here", "× deployed"].map(|name| (name, Right)));
    let mut table = Table::new(&header);
    let base = Network::of(records, BASE);
    for name in names(records) {
        let network = Network::of(records, name);
        let Some(first) = network.rows.first() else { continue };
        let (work, published) = (&first.work, first.work.published);
        let over = |of: &dyn Fn(&Network<'_>) -> Option<f64>| ratio(of(&network), of(&base));
        let whole = |value: Option<f64>| value.map_or_else(|| MISSING.to_owned(), |v| format!("{:.0}", v.floor()));
        let top1 = published.top1.map_or_else(|| MISSING.to_owned(), |top1| format!("{top1:.2}"));
        let mut cells = vec![name.to_owned(), top1, whole(published.mflops), whole(work.counted_mflops)];
        cells.extend([published.v100, published.rtx2080ti, published.tx2].map(rate));
        cells.extend(projected.then(|| rate(work.projected_as_published)));
        cells.extend([network.as_published(), network.deployed()].map(rate));
        cells.extend([over(&|n| n.v100()), over(&|n| n.as_published()), over(&|n| n.deployed())].map(times));
        table.row(&cells);
    }
    table
}

/// The paper's headline, the fastest of its networks against those of equal accuracy, formed on this device in the same
/// way: a line for each rival.
pub fn headlines(records: &[ComparisonRecord]) -> Vec<String> {
    let fastest = Network::of(records, FASTEST);
    let line = |rival: &str| {
        let rival = Network::of(records, rival);
        let published = ratio(fastest.v100(), rival.v100())?;
        let name = &rival.rows.first()?.work.name;
        let here = match ratio(fastest.as_published(), rival.as_published()) {
            Some(ratio) => format!("here {ratio:.2}× as published, {}× deployed", deployed_ratio(&fastest, &rival)),
            None => format!("here not: {}", reason(&rival).unwrap_or("it was not timed")),
        };
        Some(format!("{FASTEST} against {name}: {published:.2}× published on a V100; {here}"))
    };
    RIVALS.iter().filter_map(|rival| line(rival)).collect()
}

fn deployed_ratio(of: &Network<'_>, over: &Network<'_>) -> String {
    ratio(of.deployed(), over.deployed()).map_or_else(|| MISSING.to_owned(), |ratio| format!("{ratio:.2}"))
}

fn reason<'a>(network: &Network<'a>) -> Option<&'a str> {
    network.rows.iter().find_map(|record| record.own.error())
}

/// The rows of one network.
struct Network<'a> {
    rows: Vec<&'a ComparisonRecord>,
}

impl<'a> Network<'a> {
    fn of(records: &'a [ComparisonRecord], name: &str) -> Self {
        Self { rows: records.iter().filter(|record| record.work.name == name).collect() }
    }

    fn v100(&self) -> Option<f64> {
        self.rows.first()?.work.published.v100
    }

    fn as_published(&self) -> Option<f64> {
        self.rows.iter().find(|record| record.work.form == Form::AsPublished)?.images_per_s()
    }

    /// Images per second in f32, at the largest batch.
    fn deployed(&self) -> Option<f64> {
        self.deployed_row()?.images_per_s()
    }

    fn deployed_row(&self) -> Option<&'a ComparisonRecord> {
        let deployed = |record: &&&ComparisonRecord| {
            record.work.form == Form::Deployed && record.work.precision == "f32" && record.own.value().is_some()
        };
        self.rows.iter().filter(deployed).max_by_key(|record| record.work.batch).copied()
    }
}

fn names(records: &[ComparisonRecord]) -> Vec<&str> {
    let mut names: Vec<&str> = records.iter().map(|record| record.work.name.as_str()).collect();
    names.dedup();
    names
}

fn rate(images_per_s: Option<f64>) -> String {
    images_per_s.map_or_else(
        || MISSING.to_owned(),
        |rate| if rate >= 100.0 { count(rate.round() as u64) } else { significant(rate) },
    )
}

fn ratio(of: Option<f64>, over: Option<f64>) -> Option<f64> {
    Some(of? / over?)
}

fn times(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| MISSING.to_owned(), |ratio| format!("{ratio:.2}"))
}

/// What `table.html` shows.
#[derive(Debug, Clone, Copy)]
pub struct ComparisonPage<'a> {
    /// What was compared, and where.
    pub title: &'a str,
    /// The rows.
    pub records: &'a [ComparisonRecord],
    /// Captions and drawings of rooflines.
    pub rooflines: &'a [(String, String)],
    /// What rows are projected to.
    pub projected_to: Option<&'a str>,
}

impl ComparisonPage<'_> {
    /// The page: self-contained, without scripts.
    pub fn html(&self) -> String {
        let lines: String = headlines(self.records).iter().map(|line| format!("<p>{}</p>\n", escape(line))).collect();
        let head = format!("<h1>{}</h1>\n{lines}", escape(self.title));
        let scroll = |table: Table| format!("<div class=\"scroll\">{}</div>", table.html());
        let rooflines: String = self
            .rooflines
            .iter()
            .map(|(caption, svg)| format!("<p class=\"muted\">{}</p>{}", escape(caption), image(caption, svg)))
            .collect();
        let note = self.projected_to.map_or_else(String::new, |device| {
            format!(
                "<p class=\"muted\">“projected” is no measurement: images/s that the counts of the steps would allow on \
                 a {}.</p>",
                escape(device)
            )
        });
        let sections = [
            section("Published and here", &format!("{STARRED}{}", scroll(published_table(self.records)))),
            section("Accuracy and time", &self.accuracy()),
            section("Layers under the roofline, before and after", &rooflines),
            section("All rows", &format!("{note}{}", scroll(comparison_table(self.records)))),
        ];
        document(self.title, &format!("{head}{}", sections.concat()))
    }

    fn accuracy(&self) -> String {
        let mark = |name: &str| {
            let network = Network::of(self.records, name);
            let row = network.deployed_row()?;
            let ms = row.own.value()?.time_us * 1e-3 / row.work.batch as f64;
            let class = if row.work.selection.is_some() { "c-merged" } else { "c-kept" };
            Some(Mark { name: name.to_owned(), at: (ms, row.work.published.top1?), class })
        };
        let marks: Vec<Mark> = names(self.records).into_iter().filter_map(mark).collect();
        let labels = ("ms per image here, deployed, f32", "top-1 % on ImageNet, as published");
        let entries = [("c-kept", "built by name"), ("c-merged", "merged here")].into_iter();
        format!(
            "{}{}",
            legend(entries),
            Scatter { title: "Accuracy over time", labels, marks, front: Vec::new() }.svg()
        )
    }
}

const STARRED: &str = "<p class=\"muted\">Columns with a star are published figures: accuracies on ImageNet, \
million operations by the source's own counting, and images/s in f32 on a Tesla V100, an RTX 2080 Ti and a Jetson TX2. \
MFLOPs without a star are the same counting done here. “here” times a network as the paper did, “deployed” with \
batch-norm folded, steps fused and the weights really merged; × is images/s over those of mobilenetv2-1.4.</p>";
