//! Random masks: what a learned mask has to beat.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::mask::Mask;

/// A mask that keeps `keep` blocks, those freed drawn uniformly among the candidates; a function of (seed, draw) alone.
/// `keep` comes from [`Budget::kept`](super::Budget::kept), so enough candidates are there.
pub fn random_mask(candidates: &[bool], keep: usize, seed: u64, draw: u64) -> Mask {
    let mut free: Vec<usize> = (0..candidates.len()).filter(|&b| candidates[b]).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(draw);
    free.shuffle(&mut rng);
    let mut kept = vec![true; candidates.len()];
    for &block in free.iter().take(candidates.len().saturating_sub(keep)) {
        kept[block] = false;
    }
    Mask::new(kept)
}

/// `count` different masks of one size, where that many exist; `avoid` is not among them.
pub fn random_masks(candidates: &[bool], keep: usize, seed: u64, count: usize, avoid: &Mask) -> Vec<(u64, Mask)> {
    // Few blocks have few masks: the number of draws is bounded, so that this ends.
    const DRAWS_PER_MASK: usize = 64;
    let mut masks: Vec<(u64, Mask)> = Vec::new();
    for seed in (0..(count * DRAWS_PER_MASK) as u64).map(|i| seed.wrapping_add(i)) {
        if masks.len() == count {
            break;
        }
        let mask = random_mask(candidates, keep, seed, 0);
        if mask != *avoid && masks.iter().all(|(_, m)| *m != mask) {
            masks.push((seed, mask));
        }
    }
    masks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_mask_of_the_asked_size_among_the_candidates() {
        let candidates: Vec<bool> = (0..17).map(|b| b != 3).collect();
        for seed in 0..50 {
            let mask = random_mask(&candidates, 8, seed, 1);
            assert_eq!(mask.count(), 8);
            assert!(mask.kept()[3]);
            assert_eq!(mask, random_mask(&candidates, 8, seed, 1));
        }
    }

    #[test]
    fn masks_differ_and_their_number_is_bounded() {
        let avoid = random_mask(&[true; 17], 8, 0, 0);
        let masks = random_masks(&[true; 17], 8, 0, 3, &avoid);
        assert_eq!(masks.len(), 3);
        assert!(masks.iter().all(|(_, m)| *m != avoid));
        // Two blocks, one kept: two masks exist, one is to be avoided.
        assert_eq!(random_masks(&[true; 2], 1, 7, 5, &random_mask(&[true; 2], 1, 7, 0)).len(), 1);
    }

    #[test]
    fn every_block_gets_its_turn() {
        let mut freed = [0; 17];
        for seed in 0..400 {
            random_mask(&[true; 17], 8, 3, seed).removed().into_iter().for_each(|b| freed[b] += 1);
        }
        // 400 · 9/17 ≈ 212 expected, standard deviation ≈ 10.
        assert!(freed.iter().all(|&n| (160..265).contains(&n)), "{freed:?}");
    }
}
