//! Making a network shallow: scores → mask → graph surgery → exact merge.
//!
//! | file | holds |
//! |--|--|
//! | `mask` | [`Mask`], [`Budget`], the hard top-k and nested masks |
//! | `scores` | [`Scores`]: the straight-through gradient, the latency term, the update |
//! | `search` | [`Search`]: stage 1 as a hook of the training loop |
//! | `finetune` | [`Finetune`]: stage 2 likewise, [`Removal`] by slope, [`DistillConfig`] |
//! | `random_masks` | what a learned mask has to beat |
//! | `published_masks` | masks of the papers, by name |
//! | [`surgery`] | activations and padding of freed blocks |
//! | [`padding`] | where the padding of a linear block sits |
//! | [`merge`] | stage 3: every linear block becomes one convolution |

mod finetune;
mod mask;
pub mod merge;
pub mod padding;
mod published_masks;
mod random_masks;
mod scores;
mod search;
pub mod surgery;

pub use finetune::{DistillConfig, Finetune, Order, Removal};
pub use mask::{Budget, Mask, nested, ranking};
pub use published_masks::{published_mask, published_names};
pub use random_masks::{random_mask, random_masks};
pub use scores::{ScoreConfig, Scores, SearchStep, latency_gradient, ste_gradient};
pub use search::{Search, relative_savings};
