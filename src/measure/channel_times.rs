//! What a network takes once it has fewer channels, by the latency table of the network with all of them.

use std::path::Path;

use super::latency_table::LatencyTable;
use super::roofline::Roofline;
use super::table_work::TableWork;
use crate::device::Backend;
use crate::graph::{Graph, Interval};
use crate::{Error, Result};

/// Images per pass that rooflines are taken for.
const BATCH: usize = 128;

/// Scales the rows of a table, each by the share of its roofline that is left of it: a table that is itself a roofline's gives the
/// roofline of the narrower network, and one that was measured keeps what each layer of the device takes over its roofline.
#[derive(Debug, Clone)]
pub struct ChannelTimes {
    roofline: Roofline,
    backend: Backend,
    /// Segments of one convolution and those that always run, with their milliseconds by table and roofline.
    rows: Vec<(Interval, f64, f64)>,
}

impl ChannelTimes {
    /// From the table of a network.
    ///
    /// # Errors
    /// A table of another network, or a malformed graph.
    pub fn new(graph: &Graph, table: &LatencyTable, roofline: Roofline, backend: Backend) -> Result<Self> {
        let whole = priced(graph, &roofline, backend)?;
        let depth = table.depth();
        let alone = (0..depth).map(|st| Interval { st, end: st + 1 });
        let fixed = [0, depth].map(|at| Interval { st: at, end: at });
        let row = |at: Interval| Some((at, table.time_ms(at)?, whole.time_ms(at).unwrap_or(0.0)));
        let rows = fixed.into_iter().chain(alone).filter_map(row).collect();
        Ok(Self { roofline, backend, rows })
    }

    /// Milliseconds of a network that differs from the table's by its numbers of channels alone.
    ///
    /// # Errors
    /// A network of another depth, or a malformed graph.
    pub fn time_ms(&self, graph: &Graph) -> Result<f64> {
        let own = priced(graph, &self.roofline, self.backend)?;
        self.rows.iter().try_fold(0.0, |sum, &(at, table_ms, roofline_ms)| {
            let missing = || Error::Config(format!("{} has no segment {at} of its latency table", graph.name));
            let ms = match roofline_ms {
                // What costs nothing by the roofline costs what the table says.
                0.0 => table_ms,
                whole => table_ms * own.time_ms(at).ok_or_else(missing)? / whole,
            };
            Ok(sum + ms)
        })
    }
}

/// The rows of the network as it is by a roofline.
fn priced(graph: &Graph, roofline: &Roofline, backend: Backend) -> Result<LatencyTable> {
    TableWork::unmerged(graph, backend)?.priced(Path::new("roofline"), BATCH, roofline)
}
