//! The ways to choose blocks, by name.

use serde::{Deserialize, Serialize};

use super::mask::Budget;
use super::providers::{
    BlockDrop, Consensus, Entropy, FewSteps, Gradient, InputStatistics, LayerMethod, NnMass, NoResidual, Provider,
    RandomMasks, RemoveBlock, Sensitivity,
};

/// How a search chooses blocks. Names are the same on the command line and in settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum SearchMethod {
    /// Scores are trained together with the weights (after DepthShrinker, ICML 2022)
    Learned,
    /// The same as it was published, for long schedules: raw gradients, the optimizer of the weights (DepthShrinker, ICML 2022)
    #[serde(rename = "depthshrinker")]
    #[value(name = "depthshrinker")]
    DepthShrinker,
    /// Slopes of activations are trained together with the weights, and a penalty λ(1 − α)² pulls them to the identity; those
    /// that come nearest go (LayerCollapse, arXiv 2311.17943)
    LayerCollapse,
    /// The same with the penalty λ|1 − α²| (Layer Folding, BMVC 2022)
    LayerFolding,
    /// One set of weights is trained under random masks; then masks within the budget are searched by the held-out loss, with
    /// batch-norm statistics of their own (after UPDP, AAAI 2024)
    Updp,
    /// A copy of the network is trained for a few steps for each block, without its activations: the fall of the held-out
    /// accuracy, and an exact knapsack (importances of the two-stage dynamic programme, ICML 2023, and LayerMerge, ICML 2024)
    FewSteps,
    /// Activations at any position and merges over blocks: a copy of the network is trained for a few steps for each segment that
    /// can be one convolution, and a dynamic programme over segments decides; needs a budget that is a time (two-stage dynamic
    /// programme, ICML 2023)
    TwoStageDp,
    /// Prunes convolutions and merges the others, likewise (LayerMerge, ICML 2024)
    LayerMerge,
    /// Without training: ranks by three measures of how much what the classifier reads changes when a block alone is freed, added
    /// up, and an exact knapsack (after Layer Pruning with Consensus, arXiv 2411.14345)
    Consensus,
    /// Without training: the rise of the held-out loss when a block alone is freed, and an exact knapsack (ours)
    Sensitivity,
    /// Without training: the magnitude of the loss's derivative by the slope of a block's activations, and an exact knapsack
    /// (after Making Models Shallow Again, CVPR workshops 2023)
    Gradient,
    /// Without training: the entropy of the on-states of a block's activations, and an exact knapsack (EASIER, ECML-PKDD 2024)
    Entropy,
    /// Without training: the share of inputs that a block's activations change, and an exact knapsack (after Importance
    /// Resides in Activations)
    Ira,
    /// Without training: blocks are bypassed, not merged; the rise of the held-out loss when each alone is, and an exact knapsack
    /// (the baseline REMOVE_BLOCK of DepthShrinker's code; which blocks go: ours)
    RemoveBlock,
    /// Blocks are bypassed, not merged: again and again the one that is missed least, with a few steps of training in between
    /// (after Progressive Block Drop, arXiv 2503.16916)
    BlockDrop,
    /// Without images: as much NN-Mass as possible stays, 2·channels for each block, by an exact knapsack (Restructurable
    /// Activation Networks, arXiv 2208.08562)
    NnMass,
    /// Without images: blocks with a residual go first, those that save most before others (ours)
    NoResidual,
    /// A random mask that takes nearly the whole budget: what others have to beat
    Random,
    /// Without training: all blocks stay and all have fewer channels by one multiplier, the largest within a time
    UniformWidth,
    /// Without training: all blocks stay, and the numbers of channels within a time are searched by the held-out loss, with sliced
    /// weights and batch-norm statistics of their own (after MetaPruning, ICCV 2019)
    WidthSearch,
    /// Without training: each block is kept, becomes one convolution or is bypassed, by the rise of the held-out loss when each alone
    /// is changed so, and an exact knapsack within a time (ours)
    Operators,
    /// Without images: each block is kept, becomes one convolution or is bypassed, as much NN-Mass as a time allows, by an exact knapsack
    /// (after Restructurable Activation Networks, arXiv 2208.08562)
    RanOperators,
}

impl SearchMethod {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::Learned,
        Self::DepthShrinker,
        Self::LayerCollapse,
        Self::LayerFolding,
        Self::Updp,
        Self::FewSteps,
        Self::TwoStageDp,
        Self::LayerMerge,
        Self::Consensus,
        Self::Sensitivity,
        Self::Gradient,
        Self::Entropy,
        Self::Ira,
        Self::RemoveBlock,
        Self::BlockDrop,
        Self::NnMass,
        Self::NoResidual,
        Self::Random,
        Self::UniformWidth,
        Self::WidthSearch,
        Self::Operators,
        Self::RanOperators,
    ];

    /// What chooses blocks without training; `None` for methods that train scores or choose something other than
    /// which blocks are freed.
    pub fn provider(self) -> Option<&'static dyn Provider> {
        match self {
            Self::Learned | Self::DepthShrinker | Self::LayerCollapse | Self::LayerFolding | Self::Updp => None,
            Self::UniformWidth | Self::WidthSearch | Self::TwoStageDp | Self::LayerMerge => None,
            Self::Operators | Self::RanOperators => None,
            Self::FewSteps => Some(&FewSteps),
            Self::Consensus => Some(&Consensus),
            Self::Sensitivity => Some(&Sensitivity),
            Self::Gradient => Some(&Gradient),
            Self::Entropy => Some(&Entropy),
            Self::Ira => Some(&InputStatistics),
            Self::RemoveBlock => Some(&RemoveBlock),
            Self::BlockDrop => Some(&BlockDrop),
            Self::NnMass => Some(&NnMass),
            Self::NoResidual => Some(&NoResidual),
            Self::Random => Some(&RandomMasks),
        }
    }
}

impl SearchMethod {
    /// The method where none is named, by the budget alone: within a time `operators`, which may bypass a block, else
    /// `sensitivity`, which frees as many blocks as are asked for. Both measure the network as it is, for seconds, and decide
    /// exactly; scores that are learned need schedules as long as those of the papers (the README compares them).
    pub fn of_budget(budget: Budget) -> Self {
        if budget.is_time() { Self::Operators } else { Self::Sensitivity }
    }

    /// Whether it keeps all blocks and takes channels away.
    pub fn narrows(self) -> bool {
        matches!(self, Self::UniformWidth | Self::WidthSearch)
    }

    /// Whether it chooses an operator for each block rather than whether to free it.
    pub fn chooses_operators(self) -> bool {
        matches!(self, Self::Operators | Self::RanOperators)
    }

    /// The method over single layers that it is; `None` for those that choose whole blocks.
    pub fn layers(self) -> Option<LayerMethod> {
        match self {
            Self::TwoStageDp => Some(LayerMethod::TwoStageDp),
            Self::LayerMerge => Some(LayerMethod::LayerMerge),
            _ => None,
        }
    }

    /// Whether it chooses within a time alone, and not so many blocks.
    pub fn needs_time(self) -> bool {
        self.narrows() || self.chooses_operators() || self.layers().is_some()
    }

    /// Whether it trains weights along with what it chooses by.
    pub fn trains(self) -> bool {
        self.provider().is_none() && !self.needs_time()
    }

    /// Whether it trains anything by `search.train`, if only copies for a few steps.
    pub fn takes_steps(self) -> bool {
        self.trains() || self.layers().is_some() || matches!(self, Self::FewSteps | Self::BlockDrop)
    }

    /// Whether what it frees is bypassed rather than made linear and merged.
    pub fn bypasses(self) -> bool {
        self.provider().is_some_and(Provider::bypasses)
    }
}

impl std::fmt::Display for SearchMethod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}
