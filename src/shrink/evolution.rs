//! A search over masks, or lists of channels, by what networks do with them: the block search of UPDP (Liu et al., "UPDP: A Unified
//! Progressive Depth Pruner for CNN and Vision Transformer", AAAI 2024), and the channel search of MetaPruning (Liu et al., ICCV 2019),
//! whose operators these are: mutations with probability 0.1 and crossovers, one half each.
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

use crate::{Error, Result};

/// Tries for a child that fits before a generation goes on with fewer.
const TRIES: usize = 200;
/// Probability with which a mutation changes a gene.
const MUTATION: f64 = 0.1;

/// One choice for each gene: of a mask 0 or 1 for each block, of a list of channels one for each group.
pub type Genome = Vec<usize>;

/// The size of a search.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvolutionConfig {
    /// Genomes of a generation.
    pub population: usize,
    /// Generations after the first.
    pub generations: usize,
    /// The best so far, of which the next generation is made.
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

/// The genome of the least loss that is found from a first generation: the best make children, half of them by changing genes of
/// one, half by taking each gene from one of two. A child that does not fit, or was judged before, is drawn again. `choices` has how many
/// values each gene can have, from 0; one that can have one alone never changes. `loss` is asked once for each genome; of equal ones the
/// earlier wins. All follows from the seed; `None` of an empty generation.
///
/// # Errors
/// Of `fits` and `loss`.
pub fn evolve(
    config: &EvolutionConfig,
    (choices, seed): (&[usize], u64),
    first: Vec<Genome>,
    fits: &dyn Fn(&Genome) -> Result<bool>,
    loss: &mut dyn FnMut(&Genome) -> Result<f64>,
) -> Result<Option<Genome>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut judged: Vec<(f64, Genome)> = Vec::new();
    let mut seen: BTreeSet<Genome> = BTreeSet::new();
    let mut generation = first;
    for turn in 0..=config.generations {
        for genome in generation.drain(..) {
            if seen.insert(genome.clone()) {
                judged.push((loss(&genome)?, genome));
            }
        }
        judged.sort_by(|a, b| a.0.total_cmp(&b.0));
        let parents: Vec<&Genome> = judged.iter().take(config.parents).map(|(_, genome)| genome).collect();
        if turn == config.generations || parents.is_empty() {
            break;
        }
        let mut drawn = seen.clone();
        for index in 0..config.population {
            for _ in 0..TRIES {
                let child = child(&mut rng, &parents, choices, index % 2 == 0);
                if !drawn.contains(&child) && fits(&child)? {
                    drawn.insert(child.clone());
                    generation.push(child);
                    break;
                }
            }
        }
    }
    Ok(judged.into_iter().next().map(|(_, genome)| genome))
}

fn child(rng: &mut impl Rng, parents: &[&Genome], choices: &[usize], mutates: bool) -> Genome {
    let parent = |rng: &mut _| *parents.choose(rng).expect("a parent");
    let (one, other) = (parent(rng), parent(rng));
    let gene = |(index, &choices): (usize, &usize)| match (choices, mutates) {
        (0 | 1, _) => one[index],
        (_, false) => (if rng.random_bool(0.5) { one } else { other })[index],
        (_, true) if !rng.random_bool(MUTATION) => one[index],
        (2, true) => 1 - one[index],
        (_, true) => {
            let others = rng.random_range(0..choices - 1);
            others + usize::from(others >= one[index])
        }
    };
    choices.iter().enumerate().map(gene).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_that_fits_is_found() {
        // The loss is the number of genes that are not as they should be; their sum is 7 at most.
        let wanted = [1, 1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0];
        for (most, wanted) in [(2, wanted), (4, wanted.map(|gene| gene * 3))] {
            let mut choices = vec![most; 12];
            choices[0] = 1;
            let ones = |i: usize| (0..12).map(move |b| usize::from(b == 0 || (b + i).is_multiple_of(2)));
            let first: Vec<Genome> = (0..8).map(|i| ones(i).collect()).collect();
            let limit = wanted.iter().skip(1).sum::<usize>() + 1;
            let fits = |genome: &Genome| Ok(genome.iter().sum::<usize>() <= limit);
            let run = |seed| {
                let mut asked = Vec::new();
                let found = evolve(
                    &EvolutionConfig { population: 24, generations: 60, parents: 6 },
                    (&choices, seed),
                    first.clone(),
                    &fits,
                    &mut |genome| {
                        assert!(genome[0] == 1 && !asked.contains(genome), "{genome:?}");
                        assert!(genome.iter().all(|gene| *gene < most));
                        asked.push(genome.clone());
                        Ok(genome[1..].iter().zip(&wanted[1..]).map(|(a, b)| a.abs_diff(*b)).sum::<usize>() as f64)
                    },
                )
                .unwrap()
                .unwrap();
                (found, asked)
            };
            let (found, asked) = run(3);
            assert_eq!(found[1..], wanted[1..]);
            assert!(asked.iter().skip(8).all(|genome| fits(genome).unwrap()));
            assert_eq!(run(3), (found, asked));
        }
        let none = evolve(&EvolutionConfig::default(), (&[2; 3], 1), Vec::new(), &|_| Ok(true), &mut |_| Ok(0.0));
        assert_eq!(none.unwrap(), None);
        assert!(EvolutionConfig { parents: 17, ..EvolutionConfig::default() }.check().is_err());
    }
}
