//! What launches do, as counted on the emulator: a table, and `counters.html`.

use super::html::{document, section};
use super::table::{Align, Table, count, escape, significant};
use super::text::{MISSING, cell, percent};
use crate::check::Row;
use crate::device::counters::TouchedBytes;
use crate::measure::{CounterReport, LaunchRecord, StepCounters};

/// A row per launch of each step: what it moves against what it must, and what limits its kernel.
pub fn counter_table(report: &CounterReport) -> Table {
    use Align::{Left, Right};
    let mut header = vec![("step", Left), ("×", Right), ("kernel", Left), ("blocks", Right)];
    header.extend(COLUMNS.map(|name| (name, Right)));
    let mut table = Table::new(&header);
    for step in &report.steps {
        for (at, launch) in step.launches.iter().enumerate() {
            table.row(&row(step, launch, at == 0));
        }
    }
    table
}

const COLUMNS: [&str; 14] = [
    "plan MB",
    "distinct MB",
    "moved MB",
    "sectors %",
    "wavefronts ×",
    "lanes",
    "MMAC",
    "barriers",
    "registers",
    "shared KB",
    "blocks/SM",
    "occupancy %",
    "waves",
    "roofline µs",
];

fn row(step: &StepCounters, launch: &LaunchRecord, first: bool) -> Vec<String> {
    let of_step = |text: String| if first { text } else { String::new() };
    let blocks: u64 = launch.grid.iter().map(|&n| u64::from(n)).product();
    let whole = |value: Option<u32>| value.map_or_else(|| MISSING.to_owned(), |value| value.to_string());
    let mut cells =
        vec![of_step(step.name.clone()), of_step(step.count.to_string()), launch.kernel.clone(), count(blocks)];
    cells.push(of_step(megabytes(step.bytes)));
    let touched = |of: fn(&TouchedBytes) -> u64| launch.touched.as_ref().map(of);
    let touched = [touched(|touched| touched.operands.all()), touched(|touched| touched.workspace.all())];
    cells.extend(touched.map(|bytes| bytes.map_or_else(|| MISSING.to_owned(), megabytes)));
    cells.push(megabytes(launch.moved_bytes));
    cells.extend([percent(launch.sector_efficiency), cell(launch.wavefront_ratio), cell(launch.active_lanes)]);
    cells.push(significant(launch.counters.tensor_macs as f64 / 1e6));
    cells.push(count(launch.counters.barriers));
    cells.push(whole(launch.registers));
    cells.push(cell(launch.shared_bytes.map(|bytes| f64::from(bytes) / 1024.0)));
    cells.push(whole(launch.blocks_per_multiprocessor));
    cells.extend([percent(launch.occupancy), cell(launch.waves)]);
    cells.extend([step.roofline_us, step.projected.map(|time| time.projected_us)].map(|us| of_step(cell(us))));
    cells.push(of_step(step.projected.map_or_else(|| MISSING.to_owned(), |time| time.bound.name().to_owned())));
    cells
}

fn megabytes(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / 1e6)
}

/// A row per case of `check`: what its launches did together.
pub fn case_table(rows: &[Row]) -> Table {
    use Align::{Left, Right};
    let mut header = vec![("case", Left)];
    let columns = ["launches", "distinct kB", "moved kB", "sectors %", "wavefronts ×", "lanes", "kMAC", "barriers"];
    header.extend(columns.map(|name| (name, Right)));
    let mut table = Table::new(&header);
    for row in rows {
        let mut cells = vec![format!("{}/{}", row.precision, row.name)];
        if let Some(case) = &row.counters {
            cells.push(case.launches.to_string());
            cells.extend([case.distinct.all(), case.moved_bytes].map(|bytes| format!("{:.1}", bytes as f64 / 1e3)));
            cells.extend([percent(case.sector_efficiency), cell(case.wavefront_ratio), cell(case.active_lanes)]);
            cells.push(significant(case.counters.tensor_macs as f64 / 1e3));
            cells.push(count(case.counters.barriers));
        }
        table.row(&cells);
    }
    table
}

/// What was counted, and how to read it, line by line.
pub fn counter_notes(report: &CounterReport) -> Vec<String> {
    let pass = if report.training { "training" } else { "inference" };
    let blocks = report.sample.map_or_else(
        || "every block of every launch ran".to_owned(),
        |most| format!("up to {most} blocks of a launch ran and stand for all, so that distinct bytes are not known"),
    );
    let mut notes = vec![format!(
        "{}, {pass}, batch {}, {}, as sm_{} runs it; counted on the host, not measured on a GPU: {blocks}",
        report.network, report.batch, report.precision, report.arch
    )];
    notes.push(
        "plan: each operand of the step once. distinct: bytes of operands that the launch touched; sums: of partial sums. moved: 32-byte sectors between \
         multiprocessors and their common cache. sectors: fewest that hold each request's bytes, of those moved. \
         wavefronts: of shared memory, over those without bank conflicts. lanes: mean of a warp's requests. MMAC: of \
         tensor cores, padding among them."
            .to_owned(),
    );
    let moved: u64 = launches(report).map(|(count, launch)| count * launch.moved_bytes).sum();
    let planned: u64 = report.steps.iter().map(|step| step.count as u64 * step.bytes).sum();
    let distinct: Option<u64> = report.steps.iter().map(|step| Some(step.count as u64 * step.distinct_bytes?)).sum();
    let sums: u64 = report.steps.iter().map(|step| step.count as u64 * step.workspace_bytes.unwrap_or(0)).sum();
    let distinct = distinct.map_or_else(String::new, |bytes| {
        format!(", distinct {} MB, partial sums {} MB", megabytes(bytes), megabytes(sums))
    });
    notes.push(format!("together: plan {} MB{distinct}, moved {} MB", megabytes(planned), megabytes(moved)));
    match (report.device, &report.resources_error) {
        (_, Some(error)) => notes.push(format!("registers and shared memory are not known: {error}")),
        (Some(device), None) => notes.push(format!(
            "waves, roofline, projected: {device}, by its data sheet; projected is what the counts would allow, no measurement"
        )),
        (None, None) => notes.push(format!("no data sheet of an sm_{} is known: no waves, no roofline", report.arch)),
    }
    notes
}

fn launches(report: &CounterReport) -> impl Iterator<Item = (u64, &LaunchRecord)> {
    report.steps.iter().flat_map(|step| step.launches.iter().map(|launch| (step.count as u64, launch)))
}

/// The page: self-contained, without scripts.
pub fn counter_page(report: &CounterReport) -> String {
    let title = format!("What the launches of {} do", report.network);
    let notes: String =
        counter_notes(report).iter().map(|line| format!("<p class=\"muted\">{}</p>\n", escape(line))).collect();
    let table = format!("<div class=\"scroll\">{}</div>", counter_table(report).html());
    document(&title, &format!("<h1>{}</h1>\n{notes}{}", escape(&title), section("Launches", &table)))
}
