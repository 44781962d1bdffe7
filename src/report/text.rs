//! Records as tables: what commands print, and what Markdown and the HTML page show.

use super::result::RunResult;
use super::table::{Align, Table, count, significant};
use crate::engine::Pass;
use crate::measure::{
    HostRates, LayerRecord, LayerTiming, Limits, NetworkRecord, PeerAbout, PeerPeaks, PlanRecord, RuntimeRecord,
    StepTime,
};

/// The table every run ends with: original, unmerged and merged with accuracy, size and speed.
pub fn network_table(result: &RunResult) -> Table {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("network", Left),
        ("top-1 %", Right),
        ("params", Right),
        ("MACs/image", Right),
        ("ms/batch", Right),
        ("± IQR", Right),
        ("images/s", Right),
        ("×", Right),
    ]);
    for n in &result.networks {
        let speed_up = result.speed_up(n.name).map_or_else(|| "–".to_owned(), |r| format!("{r:.2}"));
        table.row(&[
            n.name.to_string(),
            format!("{:.2}", n.top1),
            count(n.params),
            count(n.macs),
            significant(n.latency_ms.median),
            significant(n.latency_ms.iqr),
            count(n.images_per_s.round().max(0.0) as u64),
            speed_up,
        ]);
    }
    table
}

/// A cell for what was not measured.
pub(super) const MISSING: &str = "–";

pub(super) fn cell(value: Option<f64>) -> String {
    value.map_or_else(|| MISSING.to_owned(), significant)
}

fn whole(value: Option<f64>) -> String {
    value.map_or_else(|| MISSING.to_owned(), |v| count(v.round().max(0.0) as u64))
}

pub(super) fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| MISSING.to_owned(), |v| format!("{:.1}", 100.0 * v))
}

/// How many times as long the peer takes, of times that were measured in turns.
fn peer_ratio(peer_us: Option<f64>, own_us: Option<f64>) -> Option<f64> {
    Some(peer_us? / own_us?)
}

fn peer_us(record: &LayerRecord) -> Option<f64> {
    record.peer_timing()?.peer.peer_time_us
}

/// Layers in the order given; `networks` are those whose counts are shown.
pub fn layer_table(records: &[LayerRecord], networks: &[&str]) -> Table {
    use Align::{Left, Right};
    let peers = records.iter().any(|record| peer_us(record).is_some());
    let mut header = vec![("layer", Left), ("pass", Left), ("shape", Left)];
    header.extend(networks.iter().map(|name| (*name, Right)));
    header.extend(["µs", "± IQR", "MB", "GFLOP", "FLOP %", "byte %", "roofline %"].map(|name| (name, Right)));
    if peers {
        header.extend([("peer µs", Right), ("peer / own", Right)]);
    }
    let mut table = Table::new(&header);
    for record in records {
        let (work, own) = (&record.work, record.timing());
        let of = |value: fn(&LayerTiming) -> f64| own.map(value);
        let mut cells = vec![work.name.clone(), work.pass.to_owned(), work.shape.clone()];
        cells.extend(networks.iter().map(|name| format!("{}×", work.count.get(*name).unwrap_or(&0))));
        cells.extend([of(|t| t.timing.time_us), of(|t| t.timing.iqr_us)].map(cell));
        cells.extend([of(|t| t.bytes as f64 / 1e6), of(|t| t.flops as f64 / 1e9)].map(cell));
        cells.extend([of(|t| t.used.flop_utilization), of(|t| t.used.byte_utilization)].map(percent));
        cells.push(percent(of(|t| t.used.roofline_fraction)));
        if peers {
            let (peer, turn) = (peer_us(record), record.peer_timing().and_then(|p| p.turn_time_us));
            cells.extend([cell(peer), cell(peer_ratio(peer, turn))]);
        }
        table.row(&cells);
    }
    table
}

/// The layers of each network together, pass by pass: Σ count · time. A peer's total stands only where it timed all.
pub fn layer_totals(records: &[LayerRecord], networks: &[&str]) -> Table {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("network", Left),
        ("pass", Left),
        ("layers", Right),
        ("µs", Right),
        ("roofline %", Right),
        ("peer µs", Right),
    ]);
    let mut passes: Vec<&str> = Vec::new();
    for record in records {
        if !passes.contains(&record.work.pass) {
            passes.push(record.work.pass);
        }
    }
    for network in networks {
        let count = |record: &LayerRecord| record.work.count.get(*network).copied().unwrap_or(0);
        for pass in &passes {
            let of_pass = records.iter().filter(|record| record.work.pass == *pass);
            let own: Vec<(usize, &LayerRecord)> = of_pass.map(|r| (count(r), r)).filter(|(n, _)| *n > 0).collect();
            if own.is_empty() {
                continue;
            }
            let total = |of: &dyn Fn(&LayerRecord) -> Option<f64>| {
                own.iter().map(|(n, record)| Some(*n as f64 * of(record)?)).sum::<Option<f64>>()
            };
            let time = total(&|record| record.timing().map(|t| t.timing.time_us));
            let limit = total(&|record| record.timing().map(|t| t.roofline_us));
            table.row(&[
                (*network).to_owned(),
                (*pass).to_owned(),
                own.iter().map(|(n, _)| n).sum::<usize>().to_string(),
                cell(time),
                percent(limit.zip(time).map(|(limit, time)| limit / time)),
                cell(total(&peer_us)),
            ]);
        }
    }
    table
}

/// Whole networks.
pub fn network_bench_table(records: &[NetworkRecord]) -> Table {
    use Align::{Left, Right};
    let right = |name| (name, Right);
    let peer_rate = |record: &NetworkRecord| record.peer_timing()?.peer.peer_images_per_s;
    let peers = records.iter().any(|record| peer_rate(record).is_some());
    let mut header = vec![("network", Left), ("pass", Left)];
    header.extend(["images/s", "ms/batch", "± IQR", "FLOP %", "byte %", "roofline %", "peak MB"].map(right));
    if peers {
        header.extend(["peer images/s", "own / peer"].map(right));
    }
    let mut table = Table::new(&header);
    for record in records {
        let own = record.timing();
        let mut cells =
            vec![record.work.name.to_owned(), record.work.pass.to_owned(), whole(own.map(|t| t.images_per_s))];
        cells.extend(
            [own.map(|t| t.timing.time_us), own.map(|t| t.timing.iqr_us)].map(|us| cell(us.map(|us| us / 1e3))),
        );
        cells.extend([own.map(|t| t.used.flop_utilization), own.map(|t| t.used.byte_utilization)].map(percent));
        cells.push(percent(own.map(|t| t.used.roofline_fraction)));
        cells.push(cell(own.map(|t| t.memory_bytes as f64 / 1e6)));
        if peers {
            let peer = record.peer_timing();
            let ratio = peer_ratio(peer.and_then(|p| p.peer.peer_time_us), peer.and_then(|p| p.turn_time_us));
            cells.extend([whole(peer_rate(record)), cell(ratio)]);
        }
        table.row(&cells);
    }
    table
}

/// Inference runtimes beside the networks that they were timed on, and how each ran or why not; `None` where there are none.
pub fn runtime_table(records: &[NetworkRecord]) -> Option<Table> {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("network", Left),
        ("runtime", Left),
        ("version", Left),
        ("images/s", Right),
        ("ms/batch", Right),
        ("own / runtime", Right),
        ("how", Left),
    ]);
    let rows = records.iter().flat_map(|record| record.runtimes.iter().map(move |row| (record.work.name, row)));
    for (network, RuntimeRecord { about, timing }) in rows {
        let peer = &timing.peer;
        let how = timing.error.as_ref().or(timing.note.as_ref());
        table.row(&[
            network.to_owned(),
            about.runtime.clone(),
            about.version.clone(),
            whole(peer.peer_images_per_s),
            cell(peer.peer_time_us.map(|us| us / 1e3)),
            cell(peer_ratio(peer.peer_time_us, timing.turn_time_us)),
            how.cloned().unwrap_or_default(),
        ]);
    }
    records.iter().any(|record| !record.runtimes.is_empty()).then_some(table)
}

/// Steps of networks on the host, each with the share of the machine's roofline that it reaches.
pub fn step_time_table(steps: &[StepTime]) -> Table {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("network", Left),
        ("step", Left),
        ("computes", Left),
        ("µs", Right),
        ("share %", Right),
        ("GFLOP/s", Right),
        ("GB/s", Right),
        ("bound", Left),
        ("roofline %", Right),
    ]);
    for step in steps {
        let per_ns = |amount: u64| significant(amount as f64 / step.time_us / 1e3);
        let kind = if step.pass == Pass::Backward { format!("{}, backward", step.kind) } else { step.kind.clone() };
        table.row(&[
            step.network.to_owned(),
            step.step.clone(),
            kind,
            significant(step.time_us),
            percent(Some(step.share)),
            per_ns(step.flops),
            per_ns(step.bytes),
            if step.is_bound_by_arithmetic { "FLOP" } else { "memory" }.into(),
            percent(Some(step.roofline_fraction)),
        ]);
    }
    table
}

/// What the host's caches can do, in a line.
pub fn host_rates_text(rates: &HostRates) -> String {
    let HostRates { core_bytes, core_bytes_per_s, shared_bytes, shared_bytes_per_s, .. } = *rates;
    let mebibytes = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    format!(
        "caches: {:.1} GB/s within the {:.1} MiB of the cores' own, {:.1} GB/s within {:.1} MiB\n",
        core_bytes_per_s / 1e9,
        mebibytes(core_bytes),
        shared_bytes_per_s / 1e9,
        mebibytes(shared_bytes)
    )
}

/// The limits in a few lines, beside those that a peer measured in the same run.
pub fn limits_text(limits: &Limits, peer: Option<&PeerAbout>) -> String {
    let rate = |rate: f64, unit: &str| match rate {
        r if r >= 1e12 => format!("{:.2} T{unit}/s", r / 1e12),
        r => format!("{:.1} G{unit}/s", r / 1e9),
    };
    let record = limits.record();
    let (measured, published) = (record.measured, record.published);
    let peer = match peer.and_then(|about| about.peaks.as_ref()) {
        Some(PeerPeaks::Rates(rates)) => Some(rates),
        Some(PeerPeaks::Failed { .. }) | None => None,
    };
    let line = |name: &str, measured: f64, peer: Option<f64>, published: Option<f64>, unit: &str| {
        let peer = peer.map_or_else(String::new, |p| format!(", the peer's {}", rate(p, unit)));
        let published = published.map_or_else(|| "not known".into(), |p| rate(p, unit));
        format!("  {name:<16} measured {}{peer}, published {published}\n", rate(measured, unit))
    };
    let sheet = published.map_or_else(String::new, |sheet| format!(" (published: {})", sheet.name));
    let copy = [peer.map(|p| p.copy_bytes_per_s), published.map(|p| p.copy_bytes_per_s)];
    let matrix = [peer.map(|p| p.gemm_flops_per_s), published.map(|p| p.gemm_flops_per_s)];
    let vector = [None, published.map(|p| p.vector_flops_per_s)];
    format!(
        "peaks{sheet}; measured with this program's own copy and matrix product, lower bounds; byte utilization is of the \
         measured copy, FLOP utilization of the {} rates\n{}{}{}",
        limits.flop_peak().name(),
        line("copy", measured.copy_bytes_per_s, copy[0], copy[1], "B"),
        line("matrix product", measured.gemm_flops_per_s, matrix[0], matrix[1], "FLOP"),
        line("f32 product", measured.vector_flops_per_s, vector[0], vector[1], "FLOP"),
    )
}

/// A plan: its steps, its sums, and its roofline time on known devices.
pub fn plan_text(plan: &PlanRecord) -> String {
    use Align::{Left, Right};
    let mut steps = Table::new(&[
        ("step", Left),
        ("computes", Left),
        ("pass", Left),
        ("MB", Right),
        ("GFLOP", Right),
        ("FLOP/byte", Right),
    ]);
    for step in &plan.steps {
        let (bytes, flops) = (step.bytes as f64, step.flops as f64);
        let pass = if step.pass == Pass::Forward { "forward" } else { "backward" };
        steps.row(&[
            step.name.clone(),
            step.kind.clone(),
            pass.to_owned(),
            format!("{:.2}", bytes / 1e6),
            format!("{:.3}", flops / 1e9),
            format!("{:.1}", flops / bytes.max(1.0)),
        ]);
    }
    let mut devices = Table::new(&[("device (nominal)", Left), ("ms", Right), ("images/s", Right)]);
    for device in &plan.roofline {
        let (ms, images) = (device.ms, plan.batch as f64 / device.ms * 1e3);
        devices.row(&[device.device.clone(), format!("{ms:.3}"), format!("{images:.0}")]);
    }
    format!(
        "{}\n{}, batch {}: {} steps, {:.1} MB at {} bytes an element, {:.2} GFLOP; {} kernel launches on a GPU\n\n\
         roofline time:\n{}",
        steps.text(),
        plan.network,
        plan.batch,
        plan.steps.len(),
        plan.bytes as f64 / 1e6,
        plan.element_bytes,
        plan.flops as f64 / 1e9,
        plan.launches,
        devices.text()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{LayerPeer, LayerWork, Measured, PeakSource, PeerTiming, Timing, Used};

    fn work(pass: &'static str, count: usize) -> LayerWork {
        LayerWork {
            name: "a".into(),
            pass,
            family: "dense",
            shape: "s".into(),
            count: [("n".to_owned(), count)].into(),
            device: "cpu".into(),
            precision: "f32".into(),
            config: None,
            n: 1,
            h: 1,
            w: 1,
            c_in: 1,
            c_out: 1,
            kernel: [1, 1],
            stride: [1, 1],
            padding: [0; 4],
            groups: 1,
            bias: false,
            residual: false,
            activation: false,
            activation_limit: None,
            reads_image: false,
        }
    }

    /// A layer at half of its roofline, which occurs `count` times in the network `n`.
    fn layer(time_us: f64, count: usize) -> LayerRecord {
        let used = Used {
            flop_utilization: 0.25,
            flop_utilization_of: PeakSource::Measured,
            byte_utilization: 0.5,
            roofline_fraction: 0.5,
        };
        let own = LayerTiming {
            timing: Timing { time_us, iqr_us: 0.5, samples: 5, warm_up: 2 },
            operand_sets: 2,
            flops: 4_000_000_000,
            bytes: 2_000_000,
            flops_per_byte: 2000.0,
            used,
            roofline_us: time_us / 2.0,
        };
        LayerRecord { work: work("fwd", count), own: Measured::Timed(own), peer: None, runtimes: Vec::new() }
    }

    fn rows(table: &Table) -> Vec<String> {
        let words = |row: &str| row.split_whitespace().collect::<Vec<_>>().join(" ");
        table.text().lines().skip(2).map(words).collect()
    }

    #[test]
    fn totals_weigh_each_layer_by_its_count() {
        let table = layer_totals(&[layer(10.0, 3), layer(5.0, 2), layer(7.0, 0)], &["n"]);
        assert_eq!(rows(&table), ["n fwd 5 40.0 50.0 –"]);
    }

    #[test]
    fn a_layer_without_a_time_has_a_row_and_no_total() {
        let failed = LayerRecord { own: Measured::Failed("no memory".into()), ..layer(1.0, 1) };
        let records = [layer(10.0, 3), failed];
        assert_eq!(
            rows(&layer_table(&records, &["n"])),
            ["a fwd s 3× 10.0 0.500 2.00 4.00 25.0 50.0 50.0", "a fwd s 1× – – – – – – –"]
        );
        assert_eq!(rows(&layer_totals(&records, &["n"])), ["n fwd 4 – – –"]);
    }

    #[test]
    fn a_peer_is_compared_with_the_times_of_its_own_turns() {
        let peer = LayerPeer { peer_time_us: Some(30.0), peer_conv_time_us: None };
        let turns = PeerTiming { turn_time_us: Some(15.0), peer, note: None, error: None };
        let record = LayerRecord { peer: Some(Measured::Timed(turns)), ..layer(10.0, 2) };
        let table = rows(&layer_table(std::slice::from_ref(&record), &["n"]));
        assert!(table[0].ends_with(" 30.0 2.00"), "{table:?}");
        assert_eq!(rows(&layer_totals(&[record], &["n"])), ["n fwd 2 20.0 50.0 60.0"]);
    }
}
