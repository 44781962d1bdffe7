//! What `bench` prints: tables of layers and networks, and the same records as CSV.

use serde_json::{Map, Value};

use super::bar_plot::{BarPlot, Bars};
use super::table::{Align, Table, count, significant};

/// One timed thing.
type Record = Map<String, Value>;

fn number(record: &Record, key: &str) -> Option<f64> {
    record.get(key).and_then(Value::as_f64)
}

fn word(record: &Record, key: &str) -> String {
    record.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn cell(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), significant)
}

fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |v| format!("{:.1}", 100.0 * v))
}

/// How many times as long the peer takes, of times that were measured in turns.
fn peer_ratio(record: &Record) -> Option<f64> {
    Some(number(record, "peer_time_us")? / number(record, "turn_time_us")?)
}

/// Layers in the order given; `networks` are those whose counts are shown.
pub fn layer_table(records: &[Record], networks: &[&str]) -> Table {
    use Align::{Left, Right};
    let peers = records.iter().any(|r| number(r, "peer_time_us").is_some());
    let mut header = vec![("layer", Left), ("pass", Left), ("shape", Left)];
    header.extend(networks.iter().map(|name| (*name, Right)));
    header.extend(["µs", "± IQR", "MB", "GFLOP", "FLOP %", "byte %", "roofline %"].map(|name| (name, Right)));
    if peers {
        header.extend([("peer µs", Right), ("peer / own", Right)]);
    }
    let mut table = Table::new(&header);
    for record in records {
        let mut cells = vec![word(record, "name"), word(record, "pass"), word(record, "shape")];
        cells.extend(networks.iter().map(|name| format!("{}×", record["count"][*name])));
        cells.extend(["time_us", "iqr_us"].map(|key| cell(number(record, key))));
        cells.push(cell(number(record, "bytes").map(|b| b / 1e6)));
        cells.push(cell(number(record, "flops").map(|f| f / 1e9)));
        cells.extend(
            ["flop_utilization", "byte_utilization", "roofline_fraction"].map(|key| percent(number(record, key))),
        );
        if peers {
            cells.extend([cell(number(record, "peer_time_us")), cell(peer_ratio(record))]);
        }
        table.row(&cells);
    }
    table
}

/// The layers of each network together, pass by pass: Σ count · time. A peer's total stands only where it timed all.
pub fn layer_totals(records: &[Record], networks: &[&str]) -> Table {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("network", Left),
        ("pass", Left),
        ("layers", Right),
        ("µs", Right),
        ("roofline %", Right),
        ("peer µs", Right),
    ]);
    let mut passes: Vec<String> = Vec::new();
    for pass in records.iter().map(|r| word(r, "pass")) {
        if !passes.contains(&pass) {
            passes.push(pass);
        }
    }
    for network in networks {
        for pass in &passes {
            let own: Vec<(f64, &Record)> = records
                .iter()
                .filter(|r| word(r, "pass") == *pass)
                .filter_map(|r| Some((r["count"][*network].as_f64().filter(|n| *n > 0.0)?, r)))
                .collect();
            if own.is_empty() {
                continue;
            }
            let total = |key: &str| own.iter().map(|(n, r)| Some(n * number(r, key)?)).sum::<Option<f64>>();
            let (time, limit) = (total("time_us"), total("roofline_us"));
            table.row(&[
                (*network).to_owned(),
                pass.clone(),
                format!("{:.0}", own.iter().map(|(n, _)| n).sum::<f64>()),
                cell(time),
                percent(limit.zip(time).map(|(limit, time)| limit / time)),
                cell(total("peer_time_us")),
            ]);
        }
    }
    table
}

/// Whole networks.
pub fn network_bench_table(records: &[Record]) -> Table {
    use Align::{Left, Right};
    let right = |name| (name, Right);
    let peers = records.iter().any(|r| number(r, "peer_images_per_s").is_some());
    let mut header = vec![("network", Left), ("pass", Left)];
    header.extend(["images/s", "ms/batch", "± IQR", "FLOP %", "byte %", "roofline %", "peak MB"].map(right));
    if peers {
        header.extend(["peer images/s", "own / peer"].map(right));
    }
    let mut table = Table::new(&header);
    let rate = |rate: Option<f64>| rate.map_or_else(|| "–".to_owned(), |r| count(r.round().max(0.0) as u64));
    for record in records {
        let (own, peer) = (number(record, "images_per_s"), number(record, "peer_images_per_s"));
        let mut cells = vec![word(record, "name"), word(record, "pass"), rate(own)];
        cells.extend(["time_us", "iqr_us"].map(|key| cell(number(record, key).map(|us| us / 1e3))));
        cells.extend(
            ["flop_utilization", "byte_utilization", "roofline_fraction"].map(|key| percent(number(record, key))),
        );
        cells.push(cell(number(record, "memory_bytes").map(|b| b / 1e6)));
        if peers {
            cells.extend([rate(peer), cell(peer_ratio(record))]);
        }
        table.row(&cells);
    }
    table
}

/// Images per second of whole networks as an SVG file that stands alone: a bar for each, and beside it the peer's.
pub fn network_bars(title: &str, records: &[Record]) -> String {
    let bars = records.iter().map(|record| Bars {
        name: format!("{} {}", word(record, "name"), word(record, "pass")),
        own: number(record, "images_per_s"),
        peer: number(record, "peer_images_per_s"),
    });
    BarPlot { title: title.to_owned(), bars: bars.collect() }.svg()
}

/// Records as CSV: name and pass, then a column for every other key that any of them has, lists and objects as JSON in
/// quotes.
pub fn csv(records: &[Record]) -> String {
    let mut keys = vec!["name", "pass"];
    for key in records.iter().flat_map(Map::keys) {
        if !keys.contains(&key.as_str()) {
            keys.push(key);
        }
    }
    let field = |value: Option<&Value>| {
        let text = match value {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        };
        if text.contains([',', '"', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
    };
    let mut out = format!("{}\n", keys.join(","));
    for record in records {
        let fields: Vec<String> = keys.iter().map(|key| field(record.get(*key))).collect();
        out.push_str(&fields.join(","));
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(value: Value) -> Record {
        value.as_object().expect("an object").clone()
    }

    #[test]
    fn csv_quotes_what_would_break_a_row() {
        let records =
            [record(json!({"name": "x,\"y\"", "b": [1, 2]})), record(json!({"b": 3.5, "c": null, "pass": "fwd"}))];
        assert_eq!(csv(&records), "name,pass,b,c\n\"x,\"\"y\"\"\",,\"[1,2]\",\n,fwd,3.5,\n");
    }

    #[test]
    fn totals_weigh_each_layer_by_its_count() {
        let layer = |time: f64, count: u64| {
            record(json!({"pass": "fwd", "count": {"n": count}, "time_us": time, "roofline_us": time / 2.0}))
        };
        let text = layer_totals(&[layer(10.0, 3), layer(5.0, 2), layer(7.0, 0)], &["n"]).text();
        let row: Vec<&str> = text.lines().nth(2).expect("one row").split_whitespace().collect();
        assert_eq!(row, ["n", "fwd", "5", "40.0", "50.0", "–"]);
    }
}
