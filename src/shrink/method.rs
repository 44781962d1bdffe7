//! The ways to choose blocks, by name.

use serde::{Deserialize, Serialize};

use super::providers::{Entropy, Gradient, InputStatistics, NoResidual, Provider, RandomMasks, Sensitivity};

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
    /// Without images: blocks with a residual go first, those that save most before others (ours)
    NoResidual,
    /// A random mask that takes nearly the whole budget: what others have to beat
    Random,
}

impl SearchMethod {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Learned,
        Self::DepthShrinker,
        Self::Sensitivity,
        Self::Gradient,
        Self::Entropy,
        Self::Ira,
        Self::NoResidual,
        Self::Random,
    ];

    /// What chooses without training; `None` for methods that train scores.
    pub fn provider(self) -> Option<&'static dyn Provider> {
        match self {
            Self::Learned | Self::DepthShrinker => None,
            Self::Sensitivity => Some(&Sensitivity),
            Self::Gradient => Some(&Gradient),
            Self::Entropy => Some(&Entropy),
            Self::Ira => Some(&InputStatistics),
            Self::NoResidual => Some(&NoResidual),
            Self::Random => Some(&RandomMasks),
        }
    }
}

impl std::fmt::Display for SearchMethod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}
