//! Networks as they are projected to a GPU: tables, and `projection.html`. None of it is measured, and all of it says so.

use super::html::{document, section};
use super::table::{Align, Table, count, escape, significant};
use super::text::{MISSING, cell, percent};
use crate::engine::Pass;
use crate::measure::ProjectedNetwork;

/// What stands beside every projection.
pub const PROJECTION_NOTE: &str = "projected: no measurement, but what the counts of the steps would allow by the data sheet: \
the longest of bytes, tensor cores and fused multiply-adds at 85 % of its rates, with the blocks of the busiest \
multiprocessor, and 3 µs for any launch. published: DepthShrinker's table, f32, batch 128, PyTorch's kernels";

/// A row per network: images per second that its counts would allow, beside what was published.
pub fn projection_table(networks: &[ProjectedNetwork]) -> Table {
    use Align::{Left, Right};
    let mut header = vec![("projected to", Left), ("precision", Left), ("network", Left), ("pass", Left)];
    header.extend(["images/s, projected", "ms", "launches", "published"].map(|name| (name, Right)));
    let mut table = Table::new(&header);
    for network in networks {
        let launches: usize = network.steps.iter().map(|step| step.count * step.launches).sum();
        table.row(&[
            network.projected_to.to_owned(),
            network.precision.to_string(),
            network.name.clone(),
            network.pass.to_owned(),
            count(network.projected_images_per_s.round() as u64),
            significant(network.projected_us * 1e-3),
            launches.to_string(),
            network.published_images_per_s.map_or_else(|| MISSING.to_owned(), |rate| count(rate.round() as u64)),
        ]);
    }
    table
}

/// A row per step of a network: what each resource would take, and which takes longest.
pub fn projected_steps_table(network: &ProjectedNetwork) -> Table {
    use Align::{Left, Right};
    let mut header = vec![("step", Left), ("×", Right), ("computes", Left), ("pass", Left)];
    let columns = ["projected µs", "memory µs", "tensor µs", "fma µs", "blocks", "occupancy %", "waves", "imbalance"];
    header.extend(columns.map(|name| (name, Right)));
    header.push(("bound", Left));
    let mut table = Table::new(&header);
    for step in &network.steps {
        let (time, pass) = (step.time, if step.pass == Pass::Forward { "forward" } else { "backward" });
        let mut cells = vec![step.name.clone(), step.count.to_string(), step.kind.clone(), pass.to_owned()];
        cells.extend([time.projected_us, time.memory_us, time.tensor_us, time.fma_us].map(significant));
        cells.extend([count(step.blocks), percent(step.occupancy), cell(step.waves), significant(time.imbalance)]);
        cells.push(time.bound.name().to_owned());
        table.row(&cells);
    }
    table
}

/// The page: self-contained, without scripts.
pub fn projection_page(title: &str, networks: &[ProjectedNetwork]) -> String {
    let scroll = |table: Table| format!("<div class=\"scroll\">{}</div>", table.html());
    let note = format!("<p class=\"muted\">{}</p>\n", escape(PROJECTION_NOTE));
    let steps: String = networks
        .iter()
        .map(|network| {
            let ProjectedNetwork { name, pass, precision, projected_to, .. } = network;
            section(
                &format!("{name}, {pass}, projected to {projected_to} in {precision}"),
                &scroll(projected_steps_table(network)),
            )
        })
        .collect();
    let all = section("Networks", &scroll(projection_table(networks)));
    document(title, &format!("<h1>{}</h1>\n{note}{all}{steps}", escape(title)))
}
