//! Where the inputs of activations lie, channel by channel: what EASIER and input statistics are made of.

use std::collections::HashMap;

use rayon::prelude::*;

use crate::graph::{Graph, NodeId, Op, SiteId};
use crate::{Error, Result};

/// Values that are counted as one piece of work, so that threads share a batch.
const PIECE: usize = 1 << 16;

/// How often the input of one activation lies where, by channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputCounts {
    /// The activation's node.
    pub node: NodeId,
    /// Its site.
    pub site: SiteId,
    /// Values below 0, one count per channel.
    pub below: Vec<u64>,
    /// Values above the activation's bound, one count per channel; none where it has no bound.
    pub above: Vec<u64>,
    /// All values of one channel: images times pixels.
    pub values: u64,
}

impl InputCounts {
    /// Adds values `[n, h, w, c]` of the activation with this bound.
    ///
    /// # Errors
    /// A value that is not finite.
    fn add(&mut self, values: &[f32], limit: Option<f32>) -> Result<()> {
        let (channels, limit) = (self.below.len(), limit.unwrap_or(f32::INFINITY));
        let piece = (PIECE / channels).max(1) * channels;
        let count = |values: &[f32]| {
            let mut counts = vec![(0u64, 0u64); channels];
            for pixel in values.chunks_exact(channels) {
                for (count, &x) in counts.iter_mut().zip(pixel) {
                    count.0 += u64::from(x < 0.0);
                    count.1 += u64::from(x > limit);
                }
            }
            (counts, values.iter().all(|x| x.is_finite()))
        };
        // Sums of whole numbers are the same in any order.
        let pieces: Vec<_> = values.par_chunks(piece).map(count).collect();
        for (counts, is_finite) in pieces {
            if !is_finite {
                return Err(Error::NotFinite(format!(
                    "the input of the activation {} is not finite; train the network again with a lower --lr",
                    self.node
                )));
            }
            for (channel, (below, above)) in counts.into_iter().enumerate() {
                self.below[channel] += below;
                self.above[channel] += above;
            }
        }
        self.values += (values.len() / channels) as u64;
        Ok(())
    }
}

/// The inputs of all activations that can be switched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ActivationInputs(Vec<InputCounts>);

impl ActivationInputs {
    /// From counts, one entry per activation in network order.
    pub fn new(counts: Vec<InputCounts>) -> Self {
        Self(counts)
    }

    /// None counted yet.
    ///
    /// # Errors
    /// A malformed graph.
    pub(super) fn none_of(graph: &Graph) -> Result<Self> {
        let shapes = graph.shapes()?;
        let counts = NodeId::enumerate(&graph.nodes).filter_map(|(node, entry)| {
            let channels = shapes[node].c;
            let (below, above) = (vec![0; channels], vec![0; channels]);
            entry.site().map(|site| InputCounts { node, site, below, above, values: 0 })
        });
        Ok(Self(counts.collect()))
    }

    /// The values that activations read, each once.
    pub(super) fn read_nodes(&self, graph: &Graph) -> Vec<NodeId> {
        let mut nodes: Vec<NodeId> = self.0.iter().map(|counts| graph.nodes[counts.node].inputs[0]).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    /// Adds values `[n, h, w, c]` of a node to the activations that read it.
    ///
    /// # Errors
    /// A value that is not finite.
    pub(super) fn add(&mut self, graph: &Graph, node: NodeId, values: &[f32]) -> Result<()> {
        for counts in self.0.iter_mut().filter(|counts| graph.nodes[counts.node].inputs[0] == node) {
            let Op::Activation(activation) = graph.nodes[counts.node].op else { continue };
            counts.add(values, activation.limit)?;
        }
        Ok(())
    }

    /// The counts, one entry per activation in network order.
    pub fn activations(&self) -> &[InputCounts] {
        &self.0
    }

    /// A number of each activation, as the mean over the activations of a site.
    pub(super) fn by_site(&self, of: impl Fn(&InputCounts) -> f64) -> impl Fn(SiteId) -> f64 {
        let mut sums: HashMap<SiteId, (f64, u32)> = HashMap::new();
        for counts in &self.0 {
            let (sum, count) = sums.entry(counts.site).or_default();
            (*sum, *count) = (*sum + of(counts), *count + 1);
        }
        move |site| sums.get(&site).map_or(0.0, |(sum, count)| sum / f64::from(*count))
    }
}
