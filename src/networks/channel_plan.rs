//! MobileNetV2 with the channels of every layer given, as searches for channels find them: the plan, and the networks of
//! MetaPruning (Liu et al., 2019) whose channels are published.

use super::inverted_residual::{BlockPlan, ConvPadding, HEAD_CHANNELS, Plan, STEM_CHANNELS, block_name};
use super::mobilenet_v2::STAGES;
use super::{Family, Network, NetworkOptions};
use crate::graph::{Activation, Graph};
use crate::{Error, Result};

/// Inverted residuals of a MobileNetV2.
pub const PLAN_BLOCKS: usize = 17;

/// Indices of an encoding of MetaPruning: behind the stem, behind each block and inside each block.
pub const METAPRUNING_GENES: usize = 1 + 2 * PLAN_BLOCKS;
/// The index that keeps all channels.
const METAPRUNING_MAX_INDEX: usize = 30;
/// Channels behind the stem and each block that MetaPruning starts from.
const METAPRUNING_BASE: [usize; PLAN_BLOCKS + 1] =
    [44, 22, 33, 33, 44, 44, 44, 88, 88, 88, 88, 132, 132, 132, 224, 224, 224, 448];

/// The encodings that are published, by the multiply-accumulates of their network in millions. It is one: what
/// `liuzechun/MetaPruning` evaluates. Those of the rows of 303, 140 and 43 million in its README, and of the networks in
/// DepthShrinker's table, are not in the repository (`docs/methods.md` 2.5).
const METAPRUNING: [(&str, [usize; METAPRUNING_GENES]); 1] = [(
    "mbv2-105m",
    [
        14, 12, 11, 11, 8, 8, 8, 7, 7, 7, 7, 8, 8, 8, 14, 14, 14, 8, // behind
        6, 5, 2, 15, 7, 17, 14, 5, 11, 12, 12, 11, 6, 16, 14, 13, 14, // inside
    ],
)];

/// Channels inside and behind one inverted residual.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockChannels {
    /// Channels between expansion and projection; `None` leaves the expansion out, and the depthwise convolution has the
    /// channels that come in.
    pub hidden: Option<usize>,
    /// Channels that leave the block. It adds its input where that has as many, and the stride is 1.
    pub out: usize,
}

/// The channels of a MobileNetV2, whose kernels, strides and ReLU6 stay as they are: stages of 1, 2, 3, 4, 3, 3 and 1 blocks.
///
/// # Examples
/// The published MobileNetV2 with half of the hidden channels of its last block.
/// ```
/// use depthshrinker::networks::{ChannelPlan, NetworkOptions, build};
/// use depthshrinker::shape::Shape;
///
/// let options = NetworkOptions::new(Shape::new(224, 224, 3), 1000);
/// let mut plan = ChannelPlan::mobilenet_v2();
/// assert_eq!(plan.graph("mobilenetv2-1.0", &options)?, build("mobilenetv2-1.0", &options)?);
///
/// plan.blocks[16].hidden = Some(480);
/// let saved = 49 * 480 * (160 + 9 + 320);
/// assert_eq!(plan.graph("narrow", &options)?.cost()?.macs(), 300_774_272 - saved);
/// # Ok::<(), depthshrinker::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelPlan {
    /// Channels of the first convolution.
    pub stem: usize,
    /// Channels of the blocks, in order.
    pub blocks: [BlockChannels; PLAN_BLOCKS],
    /// Channels of the last convolution, where the options name no others.
    pub head: usize,
}

impl ChannelPlan {
    /// The channels of MobileNetV2-1.0 (Sandler et al., 2018, table 2).
    pub fn mobilenet_v2() -> Self {
        let mut blocks = [BlockChannels { hidden: None, out: STEM_CHANNELS }; PLAN_BLOCKS];
        let mut c_in = STEM_CHANNELS;
        for (block, (stage, _)) in blocks.iter_mut().zip(positions()) {
            let hidden = (STAGES[stage].expansion != 1).then_some(c_in * STAGES[stage].expansion);
            c_in = STAGES[stage].channels;
            *block = BlockChannels { hidden, out: c_in };
        }
        Self { stem: STEM_CHANNELS, blocks, head: HEAD_CHANNELS }
    }

    /// The network that MetaPruning's encoding stands for, as its search prints it: 18 indices for the channels behind stem
    /// and blocks, then 17 for the hidden ones of the blocks. Index i keeps the share 0.10 + 0.03·i of the channels of
    /// MobileNetV2 of width 1.375, hidden ones six times those that come in, rounded down. The first block has an
    /// expansion, too, to the stem's channels.
    ///
    /// # Errors
    /// An index beyond 30, which is the share 1.
    pub fn metapruning(encoding: &[usize; METAPRUNING_GENES]) -> Result<Self> {
        if let Some(index) = encoding.iter().find(|index| **index > METAPRUNING_MAX_INDEX) {
            return Err(Error::Config(format!(
                "an encoding of MetaPruning has indices from 0 to {METAPRUNING_MAX_INDEX}, not {index}"
            )));
        }
        let share = |channels: usize, index: usize| channels * (10 + 3 * index) / 100;
        let (outputs, hidden) = encoding.split_at(PLAN_BLOCKS + 1);
        let block = |i: usize| {
            let widest = METAPRUNING_BASE[i] * if i == 0 { 1 } else { 6 };
            let hidden = Some(share(widest, hidden[i]));
            BlockChannels { hidden, out: share(METAPRUNING_BASE[i + 1], outputs[i + 1]) }
        };
        Ok(Self {
            stem: share(METAPRUNING_BASE[0], outputs[0]),
            blocks: std::array::from_fn(block),
            head: HEAD_CHANNELS,
        })
    }

    /// The network, under timm's names of parameters, called `name`. Its `stage_strides` are those of MobileNetV2's seven
    /// stages.
    ///
    /// # Errors
    /// A layer without channels, or options that do not fit, as [`build`](super::build).
    pub fn graph(&self, name: &str, options: &NetworkOptions) -> Result<Graph> {
        options.check()?;
        let strides = options.strides(name, &STAGES.map(|stage| stage.stride))?;
        let block = |(channels, (stage, repeat)): (&BlockChannels, (usize, usize))| BlockPlan {
            name: block_name(stage, repeat),
            kernel: STAGES[stage].kernel,
            hidden: channels.hidden,
            c_out: channels.out,
            stride: if repeat == 0 { strides[stage] } else { 1 },
            skip: STAGES[stage].skip,
        };
        let plan = Plan {
            stem: self.stem,
            blocks: self.blocks.iter().zip(positions()).map(block).collect(),
            head: self.head,
            activation: Activation::RELU6,
            batch_norm_eps: 1e-5,
            padding: ConvPadding::Symmetric,
        };
        plan.graph(name, options)
    }
}

/// Where each block stands: stage, and number in the stage.
fn positions() -> impl Iterator<Item = (usize, usize)> {
    STAGES.iter().enumerate().flat_map(|(stage, of)| (0..of.repeats).map(move |repeat| (stage, repeat)))
}

/// A network of MetaPruning.
struct Published(ChannelPlan);

/// Reads `metapruning-mbv2-<MMAC>m`; `None` when the name is another family's.
pub(super) fn parse(name: &str) -> Option<Result<Box<dyn Network>>> {
    let size = name.strip_prefix("metapruning-")?;
    let found = METAPRUNING.iter().find(|(known, _)| *known == size);
    let known = || METAPRUNING.iter().map(|(known, _)| format!("metapruning-{known}")).collect::<Vec<_>>().join(", ");
    let unknown = || Error::Config(format!("no channels are published for {name:?}; they are for {}", known()));
    let plan = found.ok_or_else(unknown).and_then(|(_, encoding)| ChannelPlan::metapruning(encoding));
    Some(plan.map(|plan| -> Box<dyn Network> { Box::new(Published(plan)) }))
}

impl Network for Published {
    fn graph(&self, name: &str, options: &NetworkOptions) -> Result<Graph> {
        self.0.graph(name, options)
    }

    fn image_size(&self) -> usize {
        224
    }

    fn family(&self) -> Family {
        Family::MetaPruning
    }
}
