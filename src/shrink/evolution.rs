//! A search over masks by what networks do under them: the block search of UPDP (Liu et al., "UPDP: A Unified Progressive Depth
//! Pruner for CNN and Vision Transformer", AAAI 2024).
//!
//! UPDP has four phases: a supernet whose blocks are each replaced or not at random while it is trained; a search for the blocks to
//! replace, with the supernet's weights; training of what was found, while a gate λ goes from 1 to 0 between old and new block; the merge.
//! Read of it: that, since its abstract and introduction alone could be read and there is no code. Decided here: the supernet is the mask search
//! that explores to its end (`shrink/scores.rs`), one set of weights for both states; the search is evolutionary, judges by the held-out loss
//! with renewed batch-norm statistics, and keeps the budget; the gate is that of each activation, y = λ·φ(x) + (1 − λ)·x, which is
//! `finetune.removal = "linear"`, and no more the method's than any other's.

use std::collections::BTreeSet;

use rand::seq::IndexedRandom;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::mask::Mask;
use crate::{Error, Result};

/// Tries for a child that fits before a generation goes on with fewer.
const TRIES: usize = 200;
/// Probability with which a mutation changes a block.
const MUTATION: f64 = 0.1;

/// The size of a search.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvolutionConfig {
    /// Masks of a generation.
    pub population: usize,
    /// Generations after the first.
    pub generations: usize,
    /// Masks of a generation, the best so far, of which the next is made.
    pub parents: usize,
}

impl Default for EvolutionConfig {
    fn default() -> Self {
        Self { population: 16, generations: 4, parents: 4 }
    }
}

impl EvolutionConfig {
    /// Refuses values out of range.
    ///
    /// # Errors
    /// Names the key and its range.
    pub fn check(&self) -> Result<()> {
        let rules = [
            ("population", self.population, 1, 1 << 16),
            ("generations", self.generations, 0, 1 << 16),
            ("parents", self.parents, 1, self.population.max(1)),
        ];
        match rules.iter().find(|(_, got, low, high)| !(low..=high).contains(&got)) {
            Some((key, got, low, high)) => {
                Err(Error::Config(format!("search.evolution.{key} = {got}; give {low} to {high}")))
            }
            None => Ok(()),
        }
    }
}

/// The mask of the least loss that is found from a first generation: the best make children, half of them by changing blocks of
/// one, half by taking each block from one of two. A child that does not fit, or was judged before, is drawn again. `loss` is asked once for
/// each mask; of equal ones the earlier wins. All follows from the seed; `None` of an empty generation.
///
/// # Errors
/// Of `loss`.
pub fn evolve(
    config: &EvolutionConfig,
    (candidates, seed): (&[bool], u64),
    first: Vec<Mask>,
    fits: &dyn Fn(&Mask) -> bool,
    loss: &mut dyn FnMut(&Mask) -> Result<f64>,
) -> Result<Option<Mask>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut judged: Vec<(f64, Mask)> = Vec::new();
    let mut seen: BTreeSet<Vec<u8>> = BTreeSet::new();
    let mut generation = first;
    for turn in 0..=config.generations {
        for mask in generation.drain(..) {
            if seen.insert(mask.bits()) {
                judged.push((loss(&mask)?, mask));
            }
        }
        judged.sort_by(|a, b| a.0.total_cmp(&b.0));
        let parents: Vec<&Mask> = judged.iter().take(config.parents).map(|(_, mask)| mask).collect();
        if turn == config.generations || parents.is_empty() {
            break;
        }
        let mut drawn = seen.clone();
        for index in 0..config.population {
            let child = (0..TRIES)
                .map(|_| child(&mut rng, &parents, candidates, index % 2 == 0))
                .find(|child| fits(child) && !drawn.contains(&child.bits()));
            if let Some(child) = child {
                drawn.insert(child.bits());
                generation.push(child);
            }
        }
    }
    Ok(judged.into_iter().next().map(|(_, mask)| mask))
}

fn child(rng: &mut impl Rng, parents: &[&Mask], candidates: &[bool], mutates: bool) -> Mask {
    let parent = |rng: &mut _| *parents.choose(rng).expect("a parent");
    let (one, other) = (parent(rng), parent(rng));
    let block = |(index, &candidate): (usize, &bool)| match (candidate, mutates) {
        (false, _) => true,
        (true, true) => one.kept()[index] != rng.random_bool(MUTATION),
        (true, false) => if rng.random_bool(0.5) { one } else { other }.kept()[index],
    };
    Mask::new(candidates.iter().enumerate().map(block).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_mask_that_fits_is_found() {
        // The loss is the number of blocks that are not as they should be; seven of twelve are kept.
        let wanted = [1u8, 1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0];
        let mut candidates = vec![true; 12];
        candidates[0] = false;
        let first: Vec<Mask> =
            (0..8).map(|i| Mask::new((0..12).map(|b| b == 0 || (b + i) % 2 == 0).collect())).collect();
        let fits = |mask: &Mask| mask.count() <= 7;
        let run = |seed| {
            let mut asked = Vec::new();
            let found = evolve(
                &EvolutionConfig { population: 24, generations: 20, parents: 6 },
                (&candidates, seed),
                first.clone(),
                &fits,
                &mut |mask| {
                    assert!(mask.kept()[0] && !asked.contains(mask), "{mask}");
                    asked.push(mask.clone());
                    Ok(mask.bits().iter().zip(wanted).filter(|(a, b)| **a != *b).count() as f64)
                },
            )
            .unwrap()
            .unwrap();
            (found, asked)
        };
        let (found, asked) = run(3);
        assert_eq!(found.bits(), wanted);
        assert!(asked.iter().skip(8).all(fits));
        assert_eq!(run(3), (found, asked));
        let none = evolve(&EvolutionConfig::default(), (&candidates, 1), Vec::new(), &fits, &mut |_| Ok(0.0));
        assert_eq!(none.unwrap(), None);
        assert!(EvolutionConfig { parents: 17, ..EvolutionConfig::default() }.check().is_err());
    }
}
