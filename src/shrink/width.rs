//! Choosing numbers of channels: one width multiplier for all, or a list of its own for each network that is tried
//! (`docs/methods.md` 1.12).
//!
//! *Uniform*: what a block gives is scaled by the multiplier, its hidden channels by the ratio that they have to those that come in, and
//! both are rounded as timm rounds; so a MobileNetV2 becomes the MobileNetV2 of another width (Sandler et al., 2018). *Lists*: any
//! multiple that is left between a tenth of a group's channels and all of them, MetaPruning's range (Liu et al., ICCV 2019). The last
//! convolution, behind all blocks, keeps its channels in both, as it does there.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::narrow::{ChannelList, ChannelOrder};
use super::select::too_small;
use crate::graph::{ChannelGroups, Graph};
use crate::networks::round_to_multiple;
use crate::{Error, Result};

/// Channels of which a vector of every backend is full.
const MULTIPLE: usize = 8;
/// Smallest share of its channels that a group keeps.
const LEAST_SHARE: f64 = 0.1;
/// Halvings of an interval of widths or exponents; channels are whole numbers.
const HALVINGS: usize = 24;
/// Exponents up to this are tried: every share that is not 1 is below the least at it.
const MAX_EXPONENT: f64 = 64.0;
/// The share that counts in the place of 1 where a list is scaled, so that it can be.
const NEARLY_ALL: f64 = 0.99;

/// A group whose channels can be fewer.
#[derive(Debug, Clone, PartialEq)]
struct Gene {
    group: usize,
    /// What scaled numbers of channels are multiples of.
    multiple: usize,
    /// Numbers of channels that can stay, rising, the last all of them.
    choices: Vec<usize>,
    /// The group of the block's input, where these are hidden channels, and how many there are for each of those.
    hidden: Option<(usize, f64)>,
}

/// The numbers of channels that a network can have; one index into its choices for each group is a network.
#[derive(Debug, Clone, PartialEq)]
pub struct Widths<'a> {
    graph: &'a Graph,
    groups: ChannelGroups,
    genes: Vec<Gene>,
}

impl<'a> Widths<'a> {
    /// Of a network.
    ///
    /// # Errors
    /// A malformed graph, or one of which no channels can be taken away.
    pub fn new(graph: &'a Graph) -> Result<Self> {
        let groups = ChannelGroups::new(graph)?;
        let last = graph.blocks.last().map(|block| block.nodes.end);
        let is_head = |group: usize| last.is_some_and(|last| groups.groups()[group].values[0] >= last);
        let open = |index: &usize| !groups.groups()[*index].is_fixed && !is_head(*index);
        let gene = |group: usize| {
            let of = |group: usize| groups.groups()[group].channels;
            let hidden = groups.hidden_in(graph, group).map(|block| groups.of(block.input));
            let hidden = hidden.filter(open).map(|input| (input, of(group) as f64 / of(input) as f64));
            let multiple = multiple_of(of(group));
            Gene { group, multiple, choices: choices(of(group), multiple), hidden }
        };
        let genes: Vec<Gene> = (0..groups.groups().len()).filter(open).map(gene).collect();
        if genes.iter().all(|gene| gene.choices.len() == 1) {
            return Err(Error::Config(format!("{} has no channels that could be taken away", graph.name)));
        }
        Ok(Self { graph, groups, genes })
    }

    /// How many choices each group has.
    pub fn choices(&self) -> Vec<usize> {
        self.genes.iter().map(|gene| gene.choices.len()).collect()
    }

    /// Channels that stay, and channels that there are, of all groups that can lose some.
    pub fn total(&self, list: &ChannelList) -> (usize, usize) {
        let all = |gene: &Gene| self.groups.groups()[gene.group].channels;
        let stays = |gene: &Gene| {
            let name = &self.groups.groups()[gene.group].name;
            list.counts.get(name).copied().unwrap_or(all(gene))
        };
        (self.genes.iter().map(stays).sum(), self.genes.iter().map(all).sum())
    }

    /// The list that indices of choices stand for.
    pub fn list(&self, genome: &[usize], by: ChannelOrder) -> ChannelList {
        let counts = self.genes.iter().zip(genome).map(|(gene, &index)| gene.choices[index]);
        self.named(counts, by)
    }

    /// The list of a width multiplier.
    pub fn uniform(&self, width: f64, by: ChannelOrder) -> ChannelList {
        let mut scaled: Vec<usize> = self.groups.groups().iter().map(|group| group.channels).collect();
        let own = scaled.clone();
        // Hidden channels come behind those of the block's input.
        for gene in &self.genes {
            let channels = match gene.hidden {
                Some((input, ratio)) => scaled[input] as f64 * ratio,
                None => own[gene.group] as f64 * width,
            };
            scaled[gene.group] = round_to_multiple(channels, gene.multiple).min(own[gene.group]);
        }
        self.named(self.genes.iter().map(|gene| scaled[gene.group]), by)
    }

    /// The list of the largest width multiplier within a time.
    ///
    /// # Errors
    /// A time that no width keeps, which the message tells, or of `time_ms`.
    pub fn uniform_within(
        &self,
        ms: f64,
        by: ChannelOrder,
        time_ms: &dyn Fn(&ChannelList) -> Result<f64>,
    ) -> Result<ChannelList> {
        let least = time_ms(&self.uniform(LEAST_SHARE, by))?;
        if least > ms {
            return Err(too_small(ms, least));
        }
        let width = largest((LEAST_SHARE, 1.0), |width| Ok(time_ms(&self.uniform(width, by))? <= ms))?;
        Ok(self.uniform(width, by))
    }

    /// The network nearest to a list, whose numbers are rounded up to the next choice.
    pub fn genome(&self, list: &ChannelList) -> Vec<usize> {
        let index = |gene: &Gene| {
            let name = &self.groups.groups()[gene.group].name;
            let count = list.counts.get(name).copied().unwrap_or(usize::MAX);
            gene.choices.iter().position(|choice| *choice >= count).unwrap_or(gene.choices.len() - 1)
        };
        self.genes.iter().map(index).collect()
    }

    /// The least that any list takes.
    ///
    /// # Errors
    /// Of `time_ms`.
    pub fn least_ms(&self, by: ChannelOrder, time_ms: &dyn Fn(&ChannelList) -> Result<f64>) -> Result<f64> {
        time_ms(&self.list(&vec![0; self.genes.len()], by))
    }

    /// Scales shares of channels, one a group, by one exponent until they take no more than a time and hardly less.
    ///
    /// # Errors
    /// A time that no list keeps, which the message tells, or of `time_ms`.
    pub fn within(&self, shares: &[f64], ms: f64, time_ms: &dyn Fn(&ChannelList) -> Result<f64>) -> Result<Vec<usize>> {
        let raised = |exponent: f64| -> Vec<usize> {
            let index = |(gene, share): (&Gene, &f64)| {
                let channels = share.min(NEARLY_ALL).powf(exponent) * self.groups.groups()[gene.group].channels as f64;
                let distance = |index: &usize| (gene.choices[*index] as f64 - channels).abs();
                (0..gene.choices.len()).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0)
            };
            if exponent == 0.0 {
                return self.genes.iter().map(|gene| gene.choices.len() - 1).collect();
            }
            self.genes.iter().zip(shares).map(index).collect()
        };
        let fits = |exponent: f64| Ok(time_ms(&self.list(&raised(exponent), ChannelOrder::default()))? <= ms);
        if !fits(MAX_EXPONENT)? {
            let least = self.least_ms(ChannelOrder::default(), time_ms)?;
            if least > ms {
                return Err(too_small(ms, least));
            }
            return Ok(vec![0; self.genes.len()]);
        }
        let exponent = largest((-MAX_EXPONENT, 0.0), |negative| fits(-negative))?;
        Ok(raised(-exponent))
    }

    /// The share of its channels that each group has in a network.
    pub fn shares(&self, genome: &[usize]) -> Vec<f64> {
        let share = |(gene, &index): (&Gene, &usize)| {
            gene.choices[index] as f64 / self.groups.groups()[gene.group].channels as f64
        };
        self.genes.iter().zip(genome).map(share).collect()
    }

    /// Random networks that take no more than a time and hardly less; all follow from the seed.
    ///
    /// # Errors
    /// As [`within`](Self::within).
    pub fn random(
        &self,
        count: usize,
        seed: u64,
        ms: f64,
        time_ms: &dyn Fn(&ChannelList) -> Result<f64>,
    ) -> Result<Vec<Vec<usize>>> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..count)
            .map(|_| {
                let shares: Vec<f64> = self.genes.iter().map(|_| rng.random_range(LEAST_SHARE..1.0)).collect();
                self.within(&shares, ms, time_ms)
            })
            .collect()
    }

    /// A list of one number for each gene, without those that keep all.
    fn named(&self, counts: impl Iterator<Item = usize>, by: ChannelOrder) -> ChannelList {
        let named = self.genes.iter().zip(counts).filter_map(|(gene, count)| {
            let group = &self.groups.groups()[gene.group];
            (count != group.channels).then(|| (group.name.clone(), count))
        });
        ChannelList { by, counts: named.collect() }
    }

    /// The network whose channels these are.
    pub fn graph(&self) -> &'a Graph {
        self.graph
    }
}

/// What numbers of channels are multiples of: 8, or a quarter where there are so few that no multiple of 8 is smaller.
fn multiple_of(channels: usize) -> usize {
    if channels >= 2 * MULTIPLE { MULTIPLE } else { (channels / 4).max(1) }
}

fn choices(channels: usize, multiple: usize) -> Vec<usize> {
    let least = LEAST_SHARE * channels as f64;
    let smaller = (1..).map(|n| n * multiple).take_while(|n| *n < channels).filter(|n| *n as f64 >= least);
    smaller.chain([channels]).collect()
}

/// The largest number of an interval that fits, to the last halving; its lower end does.
fn largest((mut low, mut high): (f64, f64), mut fits: impl FnMut(f64) -> Result<bool>) -> Result<f64> {
    if fits(high)? {
        return Ok(high);
    }
    for _ in 0..HALVINGS {
        let middle = 0.5 * (low + high);
        if fits(middle)? {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok(low)
}
