//! Masks: which blocks keep their activations, how many may, and how scores decide it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::graph::{Graph, Op};
use crate::{Error, Result};

/// One flag per block in network order: whether its activations stay. A mask that also frees a site of no block, such as
/// the stem's activation, goes on with an entry for each of those. Written `1,0,1,…`, in files as a list of 0s and 1s.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct Mask(Vec<bool>);

impl Mask {
    /// A mask from its flags.
    pub fn new(kept: Vec<bool>) -> Self {
        Self(kept)
    }

    /// All activations stay.
    pub fn all(blocks: usize) -> Self {
        Self(vec![true; blocks])
    }

    /// The `keep` blocks with the highest keep scores among the candidates, and every block that is no candidate.
    /// The order is stable: of equal scores the lower block index is kept first.
    ///
    /// `keep` counts all kept blocks, those that are no candidates included.
    pub fn top_k(scores: &[f32], candidates: &[bool], keep: usize) -> Self {
        let fixed = candidates.iter().filter(|c| !**c).count();
        let mut kept: Vec<bool> = candidates.iter().map(|c| !c).collect();
        for block in ranking(scores, candidates).into_iter().take(keep.saturating_sub(fixed)) {
            kept[block] = true;
        }
        Self(kept)
    }

    /// One flag per block.
    pub fn kept(&self) -> &[bool] {
        &self.0
    }

    /// Number of entries: blocks, and further sites where it names them.
    pub fn blocks(&self) -> usize {
        self.0.len()
    }

    /// How many blocks keep their activations.
    pub fn count(&self) -> usize {
        self.0.iter().filter(|k| **k).count()
    }

    /// The blocks whose activations go, shallow first.
    pub fn removed(&self) -> Vec<usize> {
        (0..self.0.len()).filter(|&b| !self.0[b]).collect()
    }

    /// Slopes of the masked activations: 0 where they stay, `removed` where they go.
    pub fn slopes(&self, removed: f32) -> Vec<f32> {
        self.0.iter().map(|&kept| if kept { 0.0 } else { removed }).collect()
    }

    /// 1 for kept, 0 for removed, as `result.json` and `--keep-list` have it.
    pub fn bits(&self) -> Vec<u8> {
        self.0.iter().map(|&kept| u8::from(kept)).collect()
    }

    /// A mask from [`bits`](Self::bits).
    ///
    /// # Errors
    /// A number that is neither 0 nor 1.
    pub fn from_bits(bits: &[u8]) -> Result<Self> {
        bits.iter()
            .map(|&bit| match bit {
                0 => Ok(false),
                1 => Ok(true),
                other => Err(Error::Config(format!("a keep list has one 0 or 1 per block, not {other}"))),
            })
            .collect::<Result<_>>()
            .map(Self)
    }

    /// The mask with exactly one entry for each of `sites`: sites it says nothing of stay, those behind the last are gone.
    pub fn over(&self, sites: usize) -> Self {
        let mut kept = self.0.clone();
        kept.resize(sites, true);
        Self(kept)
    }

    /// Refuses a mask for a network with another number of blocks.
    ///
    /// # Errors
    /// When there are fewer entries than blocks, or more than sites.
    pub fn check(&self, graph: &Graph) -> Result<()> {
        let (got, blocks) = (self.0.len(), graph.blocks.len());
        if fits(&self.0, graph) {
            return Ok(());
        }
        let problem = format!("the keep list has {got} entries, the network {blocks} blocks");
        Err(Error::Config(if got > blocks && !self.0[blocks..].contains(&true) {
            format!(
                "{problem} and no activation beside them that could be freed; give one 0 or 1 per block, or, if an older \
                 version wrote the model, make or import it again"
            )
        } else {
            format!("{problem}; give one 0 or 1 per block")
        }))
    }
}

impl TryFrom<Vec<u8>> for Mask {
    type Error = String;

    fn try_from(bits: Vec<u8>) -> std::result::Result<Self, String> {
        Self::from_bits(&bits).map_err(|e| match e {
            // Whoever reads the file says that it is about settings.
            Error::Config(problem) => problem,
            other => other.to_string(),
        })
    }
}

impl From<Mask> for Vec<u8> {
    fn from(mask: Mask) -> Self {
        mask.bits()
    }
}

impl fmt::Display for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, &kept) in self.0.iter().enumerate() {
            write!(f, "{}{}", if i == 0 { "" } else { "," }, u8::from(kept))?;
        }
        Ok(())
    }
}

impl FromStr for Mask {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bits = text.split(',').map(|entry| match entry.trim() {
            "0" => Ok(false),
            "1" => Ok(true),
            other => Err(Error::Config(format!("a keep list is 0s and 1s with commas, such as 1,0,1; got {other:?}"))),
        });
        bits.collect::<Result<_>>().map(Self)
    }
}

/// Whether flags are one per block, or one per site. Sites behind the last one may be listed as freed where they are gone
/// already; a network that never had them has an activation in front of its blocks that belongs to none.
pub(super) fn fits(kept: &[bool], graph: &Graph) -> bool {
    let (blocks, sites) = (graph.blocks.len(), graph.sites());
    let front = graph.blocks.first().map_or(0, |block| block.nodes.start.index());
    let has_activation = || graph.nodes[..front].iter().any(|node| matches!(node.op, Op::Activation(_)));
    let all_freed = |rest: &[bool]| rest.iter().all(|kept| !kept);
    kept.len() >= blocks && (kept.len() <= sites || (all_freed(&kept[sites..]) && !has_activation()))
}

/// The candidates from the highest keep score to the lowest; of equal scores the lower block index comes first.
pub fn ranking(scores: &[f32], candidates: &[bool]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).filter(|&b| candidates[b]).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order
}

/// How many blocks keep their activations.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// This many stay.
    Keep(usize),
    /// This share of all blocks stays, rounded down (`docs/methods.md` 1.2: ⌊ρ·n⌋).
    KeepFraction(f64),
    /// This many go.
    Remove(usize),
    /// The merged network takes this share of the original's time at most, by the latency table.
    LatencyFraction(f64),
    /// It takes so many milliseconds at most, by the latency table.
    LatencyMs(f64),
}

impl Budget {
    /// Milliseconds that the merged network may take, given those of the original; `None` for a number of blocks.
    pub fn time_ms(self, original_ms: f64) -> Option<f64> {
        match self {
            Self::LatencyFraction(share) => Some(share * original_ms),
            Self::LatencyMs(ms) => Some(ms),
            Self::Keep(_) | Self::KeepFraction(_) | Self::Remove(_) => None,
        }
    }

    /// Whether it is a time.
    pub fn is_time(self) -> bool {
        self.time_ms(1.0).is_some()
    }

    /// Refuses a time that is none.
    ///
    /// # Errors
    /// Names the budget and its range.
    pub fn check_time(self) -> Result<()> {
        let problem = match self {
            Self::LatencyFraction(share) if !(share > 0.0 && share < 1.0) => "give a share above 0 and below 1",
            Self::LatencyMs(ms) if !(ms > 0.0 && ms.is_finite()) => "give milliseconds above 0",
            _ => return Ok(()),
        };
        Err(Error::Config(format!("impossible budget: {self}; {problem}")))
    }

    /// The number of blocks kept out of `candidates.len()`, of which only the candidates may be freed.
    ///
    /// # Errors
    /// A budget that keeps more blocks than there are, frees none, or would need a block freed that is no candidate.
    pub fn kept(self, candidates: &[bool]) -> Result<usize> {
        let blocks = candidates.len();
        let free = candidates.iter().filter(|c| **c).count();
        let keep = match self {
            Self::Keep(keep) => Some(keep),
            // A hair is added so that 0.7 of 10 is 7, though 0.7 is not a binary number.
            Self::KeepFraction(share) if (0.0..=1.0).contains(&share) => {
                Some((share * blocks as f64 + 1e-9).floor() as usize)
            }
            Self::KeepFraction(_) => None,
            Self::Remove(remove) => blocks.checked_sub(remove),
            Self::LatencyFraction(_) | Self::LatencyMs(_) => {
                return Err(Error::Config(format!(
                    "the budget {self} is a time, not a number of blocks; give --keep, --keep-fraction or --remove"
                )));
            }
        };
        match keep {
            Some(keep) if keep < blocks && blocks - keep <= free => Ok(keep),
            _ => Err(Error::Config(format!(
                "impossible budget: {self} of {blocks} blocks, of which {free} can be freed; keep {} to {}",
                blocks - free,
                blocks.saturating_sub(1)
            ))),
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keep(n) => write!(f, "keep {n}"),
            Self::KeepFraction(share) => write!(f, "keep_fraction {share}"),
            Self::Remove(n) => write!(f, "remove {n}"),
            Self::LatencyFraction(share) => write!(f, "latency_fraction {share}"),
            Self::LatencyMs(ms) => write!(f, "latency_ms {ms}"),
        }
    }
}

/// Masks for several budgets from one ranking; each is contained in every larger one.
///
/// # Errors
/// As [`Budget::kept`].
pub fn nested(scores: &[f32], candidates: &[bool], budgets: &[Budget]) -> Result<Vec<Mask>> {
    budgets.iter().map(|budget| Ok(Mask::top_k(scores, candidates, budget.kept(candidates)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_equal_scores_the_lower_index_stays() {
        let mask = Mask::top_k(&[0.5; 5], &[true; 5], 2);
        assert_eq!(mask.to_string(), "1,1,0,0,0");
        let mask = Mask::top_k(&[0.1, 0.9, 0.5, 0.9, 0.5], &[true; 5], 3);
        assert_eq!(mask.to_string(), "0,1,1,1,0");
    }

    #[test]
    fn a_block_that_is_no_candidate_stays_and_counts() {
        let mask = Mask::top_k(&[0.0, 0.2, 0.9, 0.4], &[false, true, true, true], 2);
        assert_eq!(mask.to_string(), "1,0,1,0");
    }

    #[test]
    fn nested_masks_contain_each_other() {
        let scores = [0.3, 0.1, 0.8, 0.5, 0.5];
        let masks =
            nested(&scores, &[true; 5], &[Budget::Keep(1), Budget::KeepFraction(0.6), Budget::Remove(1)]).unwrap();
        assert_eq!(masks.iter().map(Mask::count).collect::<Vec<_>>(), [1, 3, 4]);
        for pair in masks.windows(2) {
            assert!(pair[0].kept().iter().zip(pair[1].kept()).all(|(small, large)| !small || *large));
        }
    }

    #[test]
    fn impossible_budgets_are_refused() {
        let all = [true; 17];
        assert_eq!(Budget::KeepFraction(0.5).kept(&all).unwrap(), 8);
        assert_eq!(Budget::KeepFraction(0.7).kept(&[true; 10]).unwrap(), 7);
        assert_eq!(Budget::Remove(9).kept(&all).unwrap(), 8);
        assert_eq!(Budget::Keep(0).kept(&all).unwrap(), 0);
        for budget in [
            Budget::Keep(17),
            Budget::Keep(18),
            Budget::Remove(0),
            Budget::Remove(18),
            Budget::KeepFraction(-0.1),
            Budget::KeepFraction(1.0),
            Budget::KeepFraction(f64::NAN),
        ] {
            assert!(matches!(budget.kept(&all), Err(Error::Config(_))), "{budget}");
        }
        let mut excluded = all;
        excluded[0] = false;
        assert!(Budget::Keep(0).kept(&excluded).is_err());
        assert_eq!(Budget::Keep(1).kept(&excluded).unwrap(), 1);
    }

    #[test]
    fn a_mask_reads_what_it_prints() {
        let mask: Mask = "1,0, 1".parse().unwrap();
        assert_eq!(mask.to_string().parse::<Mask>().unwrap(), mask);
        assert_eq!(Mask::from_bits(&mask.bits()).unwrap(), mask);
        assert_eq!(mask.slopes(1.0), [0.0, 1.0, 0.0]);
        assert_eq!(mask.removed(), [1]);
        assert!("1,2".parse::<Mask>().is_err() && "".parse::<Mask>().is_err() && Mask::from_bits(&[2]).is_err());
        assert_eq!([mask.over(5), mask.over(2)].map(|m| m.to_string()), ["1,0,1,1,1", "1,0"]);
    }
}
