//! The mask search without a network: the straight-through gradient, the sign of the latency term, projection, and that
//! short searches end with a ranking that the gradients decided.

use depthshrinker::shrink::{
    Budget, Mask, ScoreConfig, Scores, SearchStep, latency_gradient, nested, random_mask, ranking, ste_gradient,
};
use proptest::prelude::*;

const BLOCKS: usize = 17;
const STEPS: u64 = 300;

/// Repeatable numbers in −1..1 without a generator's state.
fn noise(step: u64, block: usize) -> f32 {
    let mut x = step.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (block as u64 + 1).wrapping_mul(0xD1B5_4A32_D192_ED03);
    x = (x ^ (x >> 31)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    ((x >> 40) as f32) / ((1u64 << 23) as f32) - 1.0
}

const KEEP: usize = 8;

fn at(step: u64, total: u64) -> SearchStep {
    SearchStep { seed: 1, epoch: 0, step, total }
}

/// A search whose gradients are a function of the step and of the mask.
fn search(config: &ScoreConfig, savings: &[f32], inner_products: impl Fn(u64, &[bool]) -> Vec<f32>) -> Scores {
    let mut scores = Scores::new(savings.len());
    let candidates = config.candidates(savings.len()).unwrap();
    for step in 0..STEPS {
        let mask = scores.mask(config, &candidates, KEEP, at(step, STEPS));
        let gradients = inner_products(step, mask.kept());
        scores.update(config, &candidates, &mask, (&gradients, savings), at(step, STEPS)).unwrap();
    }
    scores
}

fn without_latency() -> ScoreConfig {
    ScoreConfig { latency_weight: 0.0, ..ScoreConfig::default() }
}

#[test]
fn the_task_gradient_passes_inside_the_unit_interval_only() {
    for score in [0.0, 0.5, 1.0] {
        assert_eq!(ste_gradient(score, 3.0), -3.0, "a keep score falls where removing lowers the loss");
        assert_eq!(latency_gradient(score, 0.5, 4.0), 2.0);
    }
    for score in [-0.1, 1.1] {
        assert_eq!(ste_gradient(score, 3.0), 0.0);
        assert_eq!(latency_gradient(score, 0.5, 4.0), 0.0);
    }
}

#[test]
fn what_the_loss_needs_is_kept_wherever_it_lies() {
    // Importance falls, rises, or alternates along the network; every removal costs something, as it does in practice.
    let importances: [fn(usize) -> f32; 3] = [|b| b as f32, |b| (BLOCKS - b) as f32, |b| ((b * 7) % BLOCKS) as f32];
    for importance in importances {
        for scale in [1e-4, 1.0, 1e4] {
            let gradients = |step: u64, _: &[bool]| {
                (0..BLOCKS).map(|b| scale * (5.0 + importance(b) + 6.0 * noise(step, b))).collect()
            };
            let scores = search(&without_latency(), &[0.0; BLOCKS], gradients);
            let learned = Mask::top_k(scores.values(), &[true; BLOCKS], KEEP);
            let truth: Vec<f32> = (0..BLOCKS).map(importance).collect();
            let best = Mask::top_k(&truth, &[true; BLOCKS], KEEP);
            let wrong = learned.kept().iter().zip(best.kept()).filter(|(a, b)| a != b).count();
            assert!(wrong <= 2, "kept {learned}, best {best}, scale {scale}");
        }
    }
}

#[test]
fn gradients_that_mislead_while_a_block_is_kept_do_not_decide() {
    // As measured on real networks: where activations are off the gradient tells how much they are missed; where they are
    // on it is smaller, of the other sign, and the more so the more important the block is.
    let importance = |b: usize| 1.0 + ((b * 7) % BLOCKS) as f32;
    let gradients = |step: u64, kept: &[bool]| {
        let state = |b: usize| if kept[b] { -0.4 } else { 1.0 };
        (0..BLOCKS).map(|b| importance(b) * (state(b) + noise(step, b))).collect()
    };
    let scores = search(&without_latency(), &[0.0; BLOCKS], gradients);
    let truth: Vec<f32> = (0..BLOCKS).map(importance).collect();
    let best = Mask::top_k(&truth, &[true; BLOCKS], KEEP);
    let learned = Mask::top_k(scores.values(), &[true; BLOCKS], KEEP);
    let wrong = learned.kept().iter().zip(best.kept()).filter(|(a, b)| a != b).count();
    assert!(wrong <= 2, "kept {learned}, best {best}: {:?}", scores.values());
}

#[test]
fn a_search_explores_first_and_follows_its_scores_later() {
    let config = ScoreConfig { explore: 0.5, ..ScoreConfig::default() };
    let scores = Scores::new(BLOCKS);
    let mask = |step| scores.mask(&config, &[true; BLOCKS], KEEP, at(step, 100));
    assert_eq!(mask(3), random_mask(&[true; BLOCKS], KEEP, 1, 3));
    assert_ne!(mask(3), mask(4));
    assert_eq!(mask(50), Mask::top_k(scores.values(), &[true; BLOCKS], KEEP));
}

#[test]
fn a_short_search_does_not_keep_the_first_blocks_by_tie() {
    // Gradients that all push to keep, of nearly one size, would drive every uncentred score to 1.
    let gradients = |step: u64, _: &[bool]| (0..BLOCKS).map(|b| 100.0 + b as f32 * 0.1 + noise(step, b)).collect();
    let scores = search(&without_latency(), &[0.0; BLOCKS], gradients);
    let mut values = scores.values().to_vec();
    values.sort_by(f32::total_cmp);
    assert!(values.windows(2).filter(|pair| pair[0] == pair[1]).count() <= 2, "{values:?}");
    assert!(values[BLOCKS - 1] - values[0] > 0.3, "{values:?}");
    let first = Mask::new((0..BLOCKS).map(|b| b < 8).collect());
    assert_ne!(Mask::top_k(scores.values(), &[true; BLOCKS], KEEP), first);
}

#[test]
fn the_ranking_changes_hands_when_the_gradients_do() {
    let gradients = |step: u64, _: &[bool]| {
        let late = step > STEPS / 4;
        (0..BLOCKS).map(|b| if late { b as f32 } else { (BLOCKS - b) as f32 }).collect()
    };
    let scores = search(&without_latency(), &[0.0; BLOCKS], gradients);
    let kept = Mask::top_k(scores.values(), &[true; BLOCKS], KEEP);
    assert_eq!(kept, Mask::new((0..BLOCKS).map(|b| b >= BLOCKS - 8).collect()), "{:?}", scores.values());
}

#[test]
fn one_outlier_does_not_set_the_scale_for_all() {
    let gradients = |_: u64, _: &[bool]| (0..BLOCKS).map(|b| if b == 3 { 1e6 } else { b as f32 }).collect();
    let scores = search(&without_latency(), &[0.0; BLOCKS], gradients);
    assert!(scores.values()[16] - scores.values()[0] > 0.3, "{:?}", scores.values());
    assert_eq!(ranking(scores.values(), &[true; BLOCKS])[0], 3);
}

#[test]
fn the_latency_term_frees_what_merging_speeds_up_and_keeps_what_it_slows_down() {
    let config = ScoreConfig { latency_weight: 0.5, ..ScoreConfig::default() };
    let mut savings = [0.0; BLOCKS];
    (savings[5], savings[11]) = (2.0, -2.0);
    // Blocks that the task treats alike.
    let scores = search(&config, &savings, |step, _| vec![1.0 + noise(step, 0); BLOCKS]);
    let order = ranking(scores.values(), &[true; BLOCKS]);
    assert_eq!((order[0], order[BLOCKS - 1]), (11, 5), "{:?}", scores.values());
}

#[test]
fn an_overwhelming_latency_term_is_held_by_the_projection_and_can_be_reversed() {
    let config = ScoreConfig { latency_weight: 1000.0, ..ScoreConfig::default() };
    let mut scores = Scores::new(3);
    let mask = Mask::all(3);
    for step in 0..50 {
        scores.update(&config, &[true; 3], &mask, (&[0.0; 3], &[1.0, -1.0, 0.0]), at(step, 100)).unwrap();
        assert!(scores.values().iter().all(|a| (0.0..=1.0).contains(a)));
    }
    assert_eq!(scores.values(), [0.0, 1.0, 0.5]);
    scores.update(&without_latency(), &[true; 3], &mask, (&[1.0, -1.0, 0.0], &[0.0; 3]), at(50, 100)).unwrap();
    assert!(scores.values()[0] > 0.0 && scores.values()[1] < 1.0);
}

#[test]
fn a_gradient_that_is_not_finite_is_an_error() {
    let gradients = (&[0.0, f32::NAN][..], &[0.0; 2][..]);
    let error = Scores::new(2).update(&ScoreConfig::default(), &[true; 2], &Mask::all(2), gradients, at(7, 100));
    assert!(error.unwrap_err().to_string().contains("block 1"));
}

#[test]
fn excluded_blocks_stay_and_are_not_scored() {
    let config = ScoreConfig { exclude: vec![0, 4], ..without_latency() };
    let candidates = config.candidates(BLOCKS).unwrap();
    let scores = search(&config, &[0.0; BLOCKS], |_, _| (0..BLOCKS).map(|b| b as f32 - 50.0).collect());
    assert_eq!((scores.values()[0], scores.values()[4]), (0.5, 0.5));
    let mask = Mask::top_k(scores.values(), &candidates, 3);
    assert_eq!(mask.removed().len(), 14);
    assert!(mask.kept()[0] && mask.kept()[4] && mask.kept()[16]);
    assert!(ScoreConfig { exclude: vec![17], ..without_latency() }.candidates(BLOCKS).is_err());
}

#[test]
fn gumbel_ranking_repeats_by_seed_and_step_and_fades() {
    let config = ScoreConfig { gumbel: 0.1, ..ScoreConfig::default() };
    let scores = Scores::new(BLOCKS);
    let at = |seed, epoch, step| scores.ranked(&config, SearchStep { seed, epoch, step, total: 100 });
    assert_eq!(at(1, 0, 5), at(1, 0, 5));
    assert_ne!(at(1, 0, 5), at(1, 0, 6));
    assert_ne!(at(1, 0, 5), at(2, 0, 5));
    let size = |values: Vec<f32>| values.iter().map(|v| (v - 0.5).abs()).sum::<f32>();
    assert!(size(at(1, 60, 5)) < 0.1 * size(at(1, 0, 5)));
}

#[test]
fn a_state_that_was_saved_goes_on_bit_for_bit() {
    let config = ScoreConfig::default();
    let step = |scores: &mut Scores, step: u64| {
        let gradients: Vec<f32> = (0..BLOCKS).map(|b| noise(step, b)).collect();
        let mask = scores.mask(&config, &[true; BLOCKS], KEEP, at(step, 100));
        scores.update(&config, &[true; BLOCKS], &mask, (&gradients, &[0.3; BLOCKS]), at(step, 100)).unwrap();
    };
    let mut whole = Scores::new(BLOCKS);
    (0..100).for_each(|s| step(&mut whole, s));
    let mut first = Scores::new(BLOCKS);
    (0..37).for_each(|s| step(&mut first, s));
    let mut second: Scores = serde_json::from_str(&serde_json::to_string(&first).unwrap()).unwrap();
    (37..100).for_each(|s| step(&mut second, s));
    assert_eq!(whole, second);
}

proptest! {
    /// Raising what merging a block saves never makes it rank higher among those that stay. The masks are the same for
    /// both, so that nothing but the latency term differs.
    #[test]
    fn a_larger_saving_never_favours_keeping(
        block in 0..BLOCKS,
        more in 0.0f32..4.0,
        weight in 0.0f32..2.0,
        seed in 0u64..1000,
        savings in prop::collection::vec(-2.0f32..2.0, BLOCKS),
    ) {
        let config = ScoreConfig { latency_weight: weight, explore: 1.0, ..ScoreConfig::default() };
        let gradients = |step: u64, _: &[bool]| (0..BLOCKS).map(|b| noise(seed * STEPS + step, b)).collect::<Vec<f32>>();
        let mut raised = savings.clone();
        raised[block] += more;
        let place = |savings: &[f32]| {
            let scores = search(&config, savings, gradients);
            ranking(scores.values(), &[true; BLOCKS]).iter().position(|&b| b == block).unwrap()
        };
        prop_assert!(place(&raised) >= place(&savings));
    }

    /// Masks of several budgets from one ranking are nested and have the asked sizes.
    #[test]
    fn masks_of_one_ranking_are_nested(scores in prop::collection::vec(0.0f32..1.0, BLOCKS)) {
        let budgets: Vec<Budget> = (0..BLOCKS).map(Budget::Keep).collect();
        let masks = nested(&scores, &[true; BLOCKS], &budgets).unwrap();
        for (k, pair) in masks.windows(2).enumerate() {
            prop_assert_eq!(pair[0].count(), k);
            prop_assert!(pair[0].kept().iter().zip(pair[1].kept()).all(|(small, large)| !small || *large));
        }
    }
}
