//! `methods.html`: methods side by side as a page, with what they reach over time, how they recover and what they keep.

use std::fmt::Write as _;

use super::html::{document, section};
use super::plot::{LineChart, Series, open, text};
use super::scatter::{Mark, Scatter};
use super::table::escape;
use super::trials::{MethodSummary, RecoveryPoint, TrialFile};

/// Classes that tell methods apart: eight colours, for lines that are whole, dashed and dotted, and marks that are round, square and
/// triangular. There are more than methods; were there more methods, classes would come again, and the names beside them tell.
const STYLES: [&str; 24] = [
    "c-m0",
    "c-m1",
    "c-m2",
    "c-m3",
    "c-m4",
    "c-m5",
    "c-m6",
    "c-m7",
    "c-m0 dashed",
    "c-m1 dashed",
    "c-m2 dashed",
    "c-m3 dashed",
    "c-m4 dashed",
    "c-m5 dashed",
    "c-m6 dashed",
    "c-m7 dashed",
    "c-m0 dotted",
    "c-m1 dotted",
    "c-m2 dotted",
    "c-m3 dotted",
    "c-m4 dotted",
    "c-m5 dotted",
    "c-m6 dotted",
    "c-m7 dotted",
];
/// Steps up to which the axis of recovery is nearly even; from there on it is logarithmic, so that step 0 has a place.
const EVEN_STEPS: f64 = 10.0;
/// Room for the names of methods, and a block's width and a method's height, in the picture of what was kept.
const NAME: f64 = 130.0;
const CELL: (f64, f64) = (24.0, 20.0);

/// The page: the tables, the notes and the drawings; without scripts.
pub(super) fn page(file: &TrialFile<'_>) -> String {
    let title = "Methods side by side";
    let notes: String = file.notes().iter().map(|note| format!("<p>{}</p>\n", escape(note))).collect();
    let scroll = |table: super::Table| format!("<div class=\"scroll\">{}</div>", table.html());
    let head = format!("<h1>{title}</h1>\n{notes}{}", scroll(file.table()));
    let tables = file.recovery_tables().map(|(name, table)| format!("<p class=\"muted\">{name}</p>{}", scroll(table)));
    let sections = [
        section("Accuracy over time", &accuracy(file)),
        section("Recovery", &format!("{}{}", recovery(file), tables.concat())),
        section("What was kept", &kept(file)),
    ];
    document(title, &format!("{head}\n{}", sections.concat()))
}

/// The budgets, each once.
fn budgets<'a>(file: &'a TrialFile<'_>) -> impl Iterator<Item = &'a str> {
    file.budgets.iter().map(|budget| budget.budget.as_str())
}

/// The class of a method, the same in all drawings of a page.
fn style(file: &TrialFile<'_>, method: &str) -> &'static str {
    let mut known: Vec<&str> = Vec::new();
    for row in &file.methods {
        if !known.contains(&row.method.as_str()) {
            known.push(&row.method);
        }
    }
    STYLES[known.iter().position(|known| *known == method).unwrap_or(0) % STYLES.len()]
}

/// The methods at a budget.
fn methods<'a>(file: &'a TrialFile<'_>, budget: &'a str) -> impl Iterator<Item = &'a MethodSummary> {
    file.methods.iter().filter(move |method| method.budget == budget)
}

fn accuracy(file: &TrialFile<'_>) -> String {
    let at = |row: &MethodSummary| Some((100.0 * row.share()?.mean, row.top1?.mean));
    let mark =
        |row: &MethodSummary| Some(Mark { name: row.method.clone(), at: at(row)?, class: style(file, &row.method) });
    let original = file.trials.first().map(|trial| (100.0, trial.original_top1));
    let mut marks: Vec<Mark> = file.methods.iter().filter_map(mark).collect();
    marks.extend(original.map(|at| Mark { name: "original".into(), at, class: "c-before" }));
    let front = file.methods.iter().filter(|row| row.on_front).filter_map(at).chain(original).collect();
    let measured = file.methods.iter().all(|row| row.measured_share.is_some());
    let x = match measured {
        true => "measured time of the merged network, % of the original's",
        false => "time of the merged network by the latency table, % of the original's",
    };
    let plot = Scatter { title: "Accuracy over time", labels: (x, "top-1 %, mean"), marks, front }.svg();
    format!("<p class=\"muted\">The line joins what nothing else beats in time and accuracy.</p>{plot}")
}

/// Two charts a budget: accuracy and loss over the steps of finetuning.
fn recovery(file: &TrialFile<'_>) -> String {
    let place = |step: u64| (step as f64 / EVEN_STEPS).ln_1p();
    let chart = |budget: &str, what: &str, of: fn(&RecoveryPoint) -> f64| {
        let curve = |row: &MethodSummary| Series {
            name: row.method.clone(),
            class: style(file, &row.method),
            pieces: vec![row.recovery.iter().map(|point| (place(point.step), of(point))).collect()],
        };
        let series: Vec<Series> = methods(file, budget).map(curve).collect();
        let ticks = file.shown_steps().into_iter().map(|step| (place(step), step.to_string())).collect();
        let title = format!("{what}, {budget}");
        let height = (series.len() as f64 * 13.0 + 90.0).max(270.0);
        let chart = LineChart {
            title: &title,
            x_label: "steps of finetuning",
            height,
            series,
            bands: &[],
            names_at_end: true,
            ticks: Some(ticks),
        };
        format!("<p class=\"muted\">{}</p>{}", escape(&title), chart.svg())
    };
    let of_budget = |budget| {
        chart(budget, "top-1 % on the test images", |point| point.top1)
            + &chart(budget, "test loss", |point| point.loss)
    };
    budgets(file).map(of_budget).collect()
}

/// A picture a budget: a column for each block, a row for each method, the stronger the more of its trials kept the block.
fn kept(file: &TrialFile<'_>) -> String {
    let picture = |budget: &str| {
        let rows: Vec<&MethodSummary> = methods(file, budget).filter(|row| !row.kept.is_empty()).collect();
        let blocks = rows.iter().map(|row| row.kept.len()).max().unwrap_or(0);
        let (width, height) = (NAME + CELL.0 * blocks as f64 + 8.0, CELL.1 * (rows.len() + 1) as f64 + 8.0);
        let mut svg = open(&format!("Blocks that were kept, {budget}"), width, height);
        for block in 0..blocks {
            let x = NAME + CELL.0 * (block as f64 + 0.5);
            text(&mut svg, "tick", (x, CELL.1 - 6.0), "middle", &block.to_string());
        }
        for (index, row) in rows.iter().enumerate() {
            let y = CELL.1 * (index + 1) as f64;
            text(&mut svg, "row-name", (NAME - 8.0, y + 14.0), "end", &row.method);
            for (block, share) in row.kept.iter().enumerate() {
                let x = NAME + CELL.0 * block as f64;
                let (w, h) = (CELL.0 - 3.0, CELL.1 - 3.0);
                let percent = 100.0 * share;
                let _ = write!(
                    svg,
                    "<rect class=\"cell c-kept\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w}\" height=\"{h}\" rx=\"2\" \
                     fill-opacity=\"{share:.2}\"><title>block {block}: kept in {percent:.0} %</title></rect>"
                );
            }
        }
        format!("<p class=\"muted\">{}</p><div class=\"scroll\">{svg}</svg></div>", escape(budget))
    };
    budgets(file).map(picture).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shrink::SearchMethod;

    /// Relative luminance of `#rrggbb` (WCAG 2).
    fn luminance(colour: &str) -> f64 {
        let channel = |at: usize| {
            let value = f64::from(u8::from_str_radix(&colour[at..at + 2], 16).unwrap()) / 255.0;
            if value <= 0.04045 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
        };
        0.2126 * channel(1) + 0.7152 * channel(3) + 0.0722 * channel(5)
    }

    /// A variable of the page in one of its two schemes.
    fn variable<'a>(scheme: &'a str, name: &str) -> &'a str {
        let (_, value) = scheme.split_once(&format!("--{name}:")).unwrap();
        value.split([';', '}']).next().unwrap()
    }

    #[test]
    fn methods_differ_and_are_legible_in_both_schemes() {
        assert!(STYLES.len() >= SearchMethod::ALL.len());
        assert!((1..STYLES.len()).all(|at| !STYLES[..at].contains(&STYLES[at])));
        let css = include_str!("page.css");
        let (light, dark) = css.split_once("@media (prefers-color-scheme:dark)").unwrap();
        for scheme in [light, dark] {
            let mut seen = Vec::new();
            // A card is `#fff` or in six digits.
            let card = if variable(scheme, "card") == "#fff" { "#ffffff" } else { variable(scheme, "card") };
            for number in 0..8 {
                let colour = variable(scheme, &format!("m{number}"));
                let (a, b) = (luminance(colour) + 0.05, luminance(card) + 0.05);
                assert!((a / b).max(b / a) >= 4.5, "{colour} on {card}");
                assert!(css.contains(&format!(".c-m{number}{{--c:var(--m{number})}}")) && !seen.contains(&colour));
                seen.push(colour);
            }
        }
    }
}
