//! Making a network shallow: scores → mask → graph surgery → exact merge.
//!
//! | file | holds |
//! |--|--|
//! | `mask` | [`Mask`], [`Budget`], the hard top-k and nested masks |
//! | `scores` | [`Scores`]: the straight-through gradient, the latency term, the update |
//! | `published_scores` | [`PublishedScores`]: the same as DepthShrinker published it |
//! | `evolution` | [`evolve`]: masks and lists of channels by what networks do with them (UPDP, MetaPruning) |
//! | `slopes` | [`Slopes`]: activations whose slopes are learned (LayerCollapse, Layer Folding) |
//! | `search` | [`Search`]: stage 1 as a hook of the training loop |
//! | `expand` | [`expand()`]: dense convolutions as inverted residuals, and back ([`contract`]); `factor` is what they begin with |
//! | `finetune` | [`Finetune`]: stage 2 likewise, [`Removal`] by slope, [`DistillConfig`] |
//! | `simulated_merge` | what DepthShrinker's repository times in place of a merged network |
//! | `random_masks` | what a learned mask has to beat |
//! | `published_masks` | masks of the papers, by name |
//! | [`select`] | solvers over tables of times and importances, within a budget in milliseconds |
//! | `importance` | [`Importance`]: what a segment costs in accuracy |
//! | [`providers`] | what freeing each block alone is reckoned to cost, without training |
//! | `method` | [`SearchMethod`]: all ways to choose blocks, by name |
//! | `matching` | [`match_share`]: a budget matched by the clock |
//! | `narrow` | [`narrow()`]: networks of fewer channels, their weights sliced |
//! | `width` | [`Widths`]: the numbers of channels that a network can have, and those within a time |
//! | `selection` | [`Selection`]: what is decided, the content of `plan.json`, and [`linear_segments`] |
//! | `layers` | [`Layers`]: what a selection says of single layers |
//! | [`surgery`] | activations and padding of freed blocks |
//! | [`padding`] | where the padding of a linear segment sits |
//! | [`merge`] | stage 3: every linear segment becomes one convolution |

mod evolution;
mod expand;
mod factor;
mod finetune;
mod importance;
mod layers;
mod mask;
mod matching;
pub mod merge;
mod method;
mod narrow;
pub mod padding;
pub mod providers;
mod published_masks;
mod published_scores;
mod random_masks;
mod scores;
mod search;
pub mod select;
mod selection;
mod simulated_merge;
mod slopes;
pub mod surgery;
mod width;

pub use evolution::{EvolutionConfig, Genome, evolve};
pub use expand::{ExpandConfig, Expanded, ExpandedConv, contract, expand};
pub use finetune::{DistillConfig, Finetune, Order, Removal};
pub use importance::{Importance, ImportanceRow};
pub use layers::{LayerChoice, Layers, norms};
pub use mask::{Budget, Mask, nested, ranking};
pub use matching::{Matched, Target, match_share};
pub use method::SearchMethod;
pub use narrow::{ChannelList, ChannelOrder, narrow, narrow_graph};
pub use providers::{Judge, LayerMethod, LayerSearch, SegmentConfig, Sensitivities, SensitivityConfig};
pub use published_masks::{named_mask, published_mask, published_names};
pub use published_scores::{Published, PublishedConfig, PublishedScores, WeightStep};
pub use random_masks::{random_mask, random_masks};
pub use scores::{ScoreConfig, Scores, SearchStep, latency_gradient, ste_gradient};
pub use search::{Rule, Search, relative_savings};
pub use selection::{NestedMask, Selection, linear_segments};
pub use simulated_merge::{counted_operations, simulated_merge};
pub use slopes::{SlopeConfig, SlopeRule, Slopes};
pub use width::Widths;
