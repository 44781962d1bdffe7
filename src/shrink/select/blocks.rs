//! Methods that free whole blocks: each block keeps its activations or becomes one convolution, as DepthShrinker has
//! it.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::pareto::{Arc, States};
use super::{Solution, check_budget, too_small, within};
use crate::graph::{BlockId, Interval, Positions};
use crate::measure::LatencyTable;
use crate::shrink::importance::Importance;
use crate::shrink::mask::{Budget, Mask, ranking};
use crate::{Error, Result};

/// What freeing a block changes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockOption {
    /// The block's convolutions.
    pub at: Interval,
    /// Milliseconds while it keeps its activations: those of its convolutions one by one.
    pub kept_ms: f64,
    /// Milliseconds as one convolution.
    pub merged_ms: f64,
    /// Whether its input is added to its output.
    pub has_residual: bool,
    /// What freeing it does to the accuracy, in percentage points; 0 where no importances are given.
    pub importance: f64,
    /// Whether it stays, whatever that costs; it is then not merged.
    pub stays: bool,
}

impl BlockOption {
    /// Milliseconds that freeing the block saves; not above 0 where the merged convolution is the slower one.
    pub fn saving_ms(&self) -> f64 {
        self.kept_ms - self.merged_ms
    }
}

/// The blocks of a network with the times of both states, from which methods choose masks.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockOptions<'a> {
    positions: &'a Positions,
    blocks: Vec<BlockOption>,
    fixed_ms: f64,
    has_importance: bool,
}

impl<'a> BlockOptions<'a> {
    /// Takes times and, where given, importances of the blocks from tables. An importance is that of the block alone
    /// made linear ([`Importance::of_segment`]).
    ///
    /// # Errors
    /// A table of another network or with keys, a block without an importance, or a network with merged blocks.
    pub fn new(positions: &'a Positions, table: &LatencyTable, importance: Option<&Importance>) -> Result<Self> {
        Self::with_kept(positions, table, importance, &[])
    }

    /// As [`new`](Self::new), but blocks for which `kept` has a `true` stay, and need neither an importance nor a time as
    /// one convolution.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_kept(
        positions: &'a Positions,
        table: &LatencyTable,
        importance: Option<&Importance>,
        kept: &[bool],
    ) -> Result<Self> {
        table.check_columns(false, false)?;
        table.check(positions)?;
        if let Some(importance) = importance {
            importance.check_times(table)?;
        }
        let time = |at: Interval| table.time_ms(at).ok_or_else(|| no_time(table, at));
        let is_activated = |position: usize| position == 0 || positions.convs()[position - 1].has_activation();
        let mut blocks = Vec::new();
        for (id, block) in BlockId::enumerate(positions.blocks()) {
            if block.block != id {
                let problem = "has merged blocks, whose activations nothing brings back; select for the unmerged model";
                return Err(Error::Config(format!("{} {problem}", positions.network())));
            }
            let at = block.at;
            let alone = (at.st..at.end).map(|st| time(Interval { st, end: st + 1 })).collect::<Result<Vec<_>>>()?;
            let (kept_ms, stays) = (alone.iter().sum(), kept.get(id.index()) == Some(&true));
            let importance = importance.filter(|_| !stays);
            blocks.push(BlockOption {
                at,
                kept_ms,
                merged_ms: if stays { kept_ms } else { time(at)? },
                has_residual: block.has_residual,
                importance: importance.map_or(Ok(0.0), |table| table.of_segment(at, is_activated(at.st)))?,
                stays,
            });
        }
        let (fixed_ms, has_importance) = (table.fixed_ms(), importance.is_some());
        Ok(Self { positions, blocks, fixed_ms, has_importance })
    }

    /// The same where a freed block is bypassed and takes no time; blocks without a shortcut from input to output stay.
    #[must_use]
    pub fn bypassed(mut self) -> Self {
        for block in &mut self.blocks {
            block.stays |= !block.has_residual;
            block.merged_ms = if block.stays { block.kept_ms } else { 0.0 };
        }
        self
    }

    /// The blocks in order.
    pub fn blocks(&self) -> &[BlockOption] {
        &self.blocks
    }

    /// Milliseconds of what always runs.
    pub fn fixed_ms(&self) -> f64 {
        self.fixed_ms
    }

    /// Milliseconds under a mask with one entry per block, what always runs included.
    pub fn time_ms(&self, mask: &Mask) -> f64 {
        let state = |(block, &kept): (&BlockOption, &bool)| if kept { block.kept_ms } else { block.merged_ms };
        self.blocks.iter().zip(mask.kept()).map(state).fold(self.fixed_ms, |sum, ms| sum + ms)
    }

    /// Milliseconds below which no mask is.
    pub fn least_ms(&self) -> f64 {
        self.time_ms(&Mask::new(self.candidates().iter().map(|candidate| !candidate).collect()))
    }

    /// The blocks that become faster when they are freed. Methods that rank blocks free no others: it would cost
    /// accuracy and time.
    pub fn candidates(&self) -> Vec<bool> {
        self.blocks.iter().map(|block| !block.stays && block.saving_ms() > 0.0).collect()
    }

    /// Exact 0/1 knapsack: of all masks within the budget the one whose freed blocks have the highest sum of
    /// importances.
    ///
    /// # Errors
    /// A budget below the fastest mask, which the message names.
    pub fn knapsack(&self, budget_ms: f64) -> Result<Solution> {
        let both = |(from, block): (usize, &BlockOption)| {
            let kept = Arc { from, time: block.kept_ms, value: 0.0 };
            let merged = Arc { from, time: block.merged_ms, value: block.importance };
            if block.stays { vec![kept] } else { vec![kept, merged] }
        };
        let into = std::iter::once(Vec::new()).chain(self.blocks.iter().enumerate().map(both)).collect();
        let states = States { start: self.fixed_ms, into, ends: vec![self.blocks.len()] };
        let path = within(&states, budget_ms)?;
        Ok(self.solution(Mask::new(path.arcs.iter().map(|&(_, arc)| arc == 0).collect())))
    }

    /// DepthShrinker's choice: the k blocks of the highest keep score stay, k as large as the budget allows. The keep
    /// score of a block is what freeing it costs, less `latency_weight` percentage points for each millisecond that it
    /// saves (the latency term of `docs/methods.md` 1.2, with the sign that the authors state). Of equal scores the
    /// earlier block is kept.
    ///
    /// # Errors
    /// A budget below that of the mask that frees every block which becomes faster; the message names it.
    pub fn top_k(&self, latency_weight: f64, budget_ms: f64) -> Result<Solution> {
        let score = |block: &BlockOption| (-block.importance - latency_weight * block.saving_ms()) as f32;
        self.ranked(&self.blocks.iter().map(score).collect::<Vec<_>>(), budget_ms)
    }

    /// The rule that needs no measurement of accuracy: blocks with a residual go first, those that save most before
    /// others, until the budget is kept; then, likewise, blocks without.
    ///
    /// # Errors
    /// As [`top_k`](Self::top_k).
    pub fn no_residual(&self, budget_ms: f64) -> Result<Solution> {
        self.ranked(&self.residual_ranks().into_iter().map(|rank| rank as f32).collect::<Vec<_>>(), budget_ms)
    }

    /// The order of [`no_residual`](Self::no_residual), one number per block: those of the lowest are freed first. Blocks
    /// with a residual are at 0 to 1, those without at 2 to 3, by what they save as shares of the largest saving; a block that
    /// becomes slower is above its kind.
    pub fn residual_ranks(&self) -> Vec<f64> {
        let longest = self.blocks.iter().map(BlockOption::saving_ms).fold(f64::MIN_POSITIVE, f64::max);
        let rank = |block: &BlockOption| {
            let kind = if block.has_residual { 1.0 } else { 3.0 };
            kind - block.saving_ms() / longest
        };
        self.blocks.iter().map(rank).collect()
    }

    /// The largest of the nested masks of a ranking by keep scores that keeps the budget. Of equal scores the earlier block is
    /// kept.
    ///
    /// # Errors
    /// As [`top_k`](Self::top_k).
    pub fn ranked(&self, scores: &[f32], budget_ms: f64) -> Result<Solution> {
        check_budget(budget_ms)?;
        let mut kept = vec![true; self.blocks.len()];
        let mut order = ranking(scores, &self.candidates());
        loop {
            let mask = Mask::new(kept.clone());
            let time_ms = self.time_ms(&mask);
            if time_ms <= budget_ms {
                return Ok(self.solution(mask));
            }
            let Some(least) = order.pop() else { return Err(too_small(budget_ms, time_ms)) };
            kept[least] = false;
        }
    }

    /// As many blocks as masks of this time keep on average, where the freed ones are drawn among those that become faster: one
    /// at least is freed.
    pub fn expected_size(&self, budget_ms: f64) -> Budget {
        let savings = self.blocks.iter().map(BlockOption::saving_ms).zip(self.candidates());
        let savings: Vec<f64> = savings.filter(|(_, candidate)| *candidate).map(|(saving, _)| saving).collect();
        let mean = savings.iter().sum::<f64>() / savings.len().max(1) as f64;
        let missing = self.time_ms(&Mask::all(self.blocks.len())) - budget_ms;
        let freed = if mean > 0.0 { (missing / mean).ceil() } else { 1.0 };
        Budget::Remove((freed.max(1.0) as usize).min(savings.len().max(1)))
    }

    /// `count` different masks that take no more than the budget and no less than `1 − tolerance` of it: what a method
    /// has to beat at equal latency. Each draw frees every candidate with one probability, which is uniform over \[0,
    /// 1\); draws that take too long or too little are thrown away. The masks are a function of the seed.
    ///
    /// # Errors
    /// A budget below the fastest mask, or where fewer masks are found.
    pub fn random(&self, budget_ms: f64, tolerance: f64, seed: u64, count: usize) -> Result<Vec<Solution>> {
        let candidates = self.candidates();
        let drawn = Drawn { budget_ms, tolerance, seed, least_ms: self.least_ms() };
        let masks = drawn.of(count, |rng| random_mask(rng, &candidates), |mask| self.time_ms(mask))?;
        Ok(masks.into_iter().map(|mask| self.solution(mask)).collect())
    }

    /// A mask as a selection: freed blocks merge whole, everything else stays as it is.
    fn solution(&self, mask: Mask) -> Solution {
        let freed: Vec<&BlockOption> =
            self.blocks.iter().zip(mask.kept()).filter(|(_, kept)| !**kept).map(|(block, _)| block).collect();
        let stays = |position: &usize| !freed.iter().any(|block| block.at.holds_inside(*position));
        let activations = self.positions.activations().into_iter().filter(stays).collect();
        let boundaries = (0..=self.positions.depth()).filter(stays).collect();
        let objective = self.has_importance.then(|| freed.iter().map(|block| block.importance).sum());
        let solution = Solution::new(activations, boundaries, self.time_ms(&mask));
        Solution { objective, kept: Some(mask), ..solution }
    }
}

fn random_mask(rng: &mut impl Rng, candidates: &[bool]) -> Mask {
    let share = rng.random::<f64>();
    Mask::new(candidates.iter().map(|&candidate| !candidate || rng.random::<f64>() >= share).collect())
}

/// What is drawn at random within a time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Drawn {
    pub budget_ms: f64,
    /// How much less than the budget it may take, as a share of it.
    pub tolerance: f64,
    pub seed: u64,
    /// Milliseconds below which nothing is.
    pub least_ms: f64,
}

impl Drawn {
    /// So many different ones of those that `draw` gives and that take about the budget.
    pub fn of<T: PartialEq>(
        self,
        count: usize,
        draw: impl Fn(&mut ChaCha8Rng) -> T,
        time_ms: impl Fn(&T) -> f64,
    ) -> Result<Vec<T>> {
        const DRAWS: usize = 1 << 20;
        let Self { budget_ms, tolerance, seed, least_ms } = self;
        check_budget(budget_ms)?;
        if least_ms > budget_ms {
            return Err(too_small(budget_ms, least_ms));
        }
        let (mut rng, mut found) = (ChaCha8Rng::seed_from_u64(seed), Vec::<T>::new());
        for _ in 0..DRAWS {
            if found.len() == count {
                break;
            }
            let drawn = draw(&mut rng);
            let ms = time_ms(&drawn);
            if ms <= budget_ms && ms >= (1.0 - tolerance) * budget_ms && !found.contains(&drawn) {
                found.push(drawn);
            }
        }
        if found.len() == count {
            return Ok(found);
        }
        let (found, least) = (found.len(), 100.0 * (1.0 - tolerance));
        Err(Error::Config(format!(
            "{found} of {count} random selections found that take {least} to 100 % of {budget_ms} ms; ask for fewer, raise \
             the tolerance or change the budget"
        )))
    }
}

fn no_time(table: &LatencyTable, at: Interval) -> Error {
    Error::file(table.path(), format!("has no row for segment {at}; measure it"))
}
