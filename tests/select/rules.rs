//! What each method chooses where that can be said by hand.

use depthshrinker::graph::Interval;
use depthshrinker::measure::LatencyRow;
use depthshrinker::shrink::select::{BlockOptions, layer_merge};
use depthshrinker::shrink::{ImportanceRow, Mask};
use libtest_mimic::Trial;

use crate::networks::{
    importance, latency_table, network, plain_network, plain_times, random_block_importance, random_network,
    random_times, rng,
};
use crate::trial;

/// The solution that LayerMerge's authors show for MobileNetV2-1.0 (O5): segments, kernels, pruned convolutions,
/// activations and the residual sums that are left.
fn published_layer_merge() {
    let graph = network("mobilenetv2-1.0");
    let positions = graph.positions().unwrap();
    // Ends, kernel, channels and stride of what is merged.
    let merged = [
        ((0, 5), 3, (32, 24), 2),
        ((5, 8), 1, (24, 24), 1),
        ((8, 11), 3, (24, 32), 2),
        ((11, 14), 1, (32, 32), 1),
        ((14, 17), 3, (32, 32), 1),
        ((35, 38), 1, (96, 96), 1),
    ];
    let is_shown = |at: Interval, kernel: usize, depthwise: bool| {
        let whole = merged.iter().any(|&(ends, k, _, _)| Interval::from(ends) == at && k == kernel && !depthwise);
        let alone = at.len() == 1 && ((17..35).contains(&at.st) || at.st >= 38);
        whole || alone
    };
    let (mut times, mut importances) = (Vec::new(), Vec::new());
    for (at, key) in positions.candidates() {
        times.push(LatencyRow { key: Some(key), ..LatencyRow::new(at, 0.1) });
        let points = if is_shown(at, key.kernel, key.depthwise) { 10.0 } else { -1000.0 };
        importances.push(ImportanceRow { key: Some(key), ..ImportanceRow::new(at, points) });
    }
    let (table, importance) = (latency_table(times), importance(importances));
    let solution = layer_merge(&positions, &table, &importance, None, 13.4).unwrap();

    let ends: Vec<usize> = [0, 5, 8, 11, 14].into_iter().chain(17..=35).chain(38..=50).collect();
    assert_eq!(solution.boundaries, ends);
    assert_eq!(solution.pruned, Some(vec![1, 7, 13, 37]));
    for (ends, kernel, channels, stride) in merged {
        let at = Interval::from(ends);
        let segment = solution.merged.iter().find(|segment| segment.end == at.end).unwrap();
        assert_eq!((segment.st, segment.kernel, segment.depthwise), (at.st, kernel, false));
        let convs = positions.convs_in(at);
        assert_eq!((convs[0].conv.c_in, convs[convs.len() - 1].conv.c_out), channels);
        assert_eq!(graph.span(positions.segment(at).unwrap()).unwrap().stride, [stride, stride]);
        assert!(solution.activations.contains(&at.end));
    }
    // 20 and the other bottlenecks that are left have none.
    let bottlenecks = [20, 23, 26, 29, 32, 35, 41, 44, 47, 50];
    assert!(
        ends[5..]
            .iter()
            .all(|end| *end == 17 || *end == 38 || solution.activations.contains(end) != bottlenecks.contains(end))
    );
    let residuals = positions.blocks().iter().filter(|block| block.has_residual).map(|block| block.at);
    let left = residuals.filter(|at| solution.boundaries.iter().any(|&end| at.holds_inside(end)));
    assert_eq!(
        left.map(|at| (at.st, at.end)).collect::<Vec<_>>(),
        [(20, 23), (23, 26), (26, 29), (32, 35), (41, 44), (44, 47)]
    );
    assert!((solution.time_ms - 0.1 * solution.merged.len() as f64).abs() < 1e-12);
}

fn mask_of(
    options: &BlockOptions<'_>,
    solve: impl Fn(&BlockOptions<'_>) -> depthshrinker::shrink::select::Solution,
) -> String {
    solve(options).kept.unwrap().to_string()
}

fn no_residual() {
    let positions = plain_network(&[false, true, true, false]).positions().unwrap();
    let table = plain_times(&positions, &[1.0, 3.0, 2.0, 0.5]);
    let options = BlockOptions::new(&positions, &table, None).unwrap();
    for (budget, mask, time) in [
        (16.0, "1,1,1,1", 16.0),
        (15.99, "1,1,0,1", 14.0),
        (14.0, "1,1,0,1", 14.0),
        (13.5, "1,0,0,1", 13.0),
        (12.99, "1,0,0,0", 9.5),
        (9.0, "0,0,0,0", 6.5),
        (6.5, "0,0,0,0", 6.5),
    ] {
        let solution = options.no_residual(budget).unwrap();
        assert_eq!((solution.kept.unwrap().to_string().as_str(), solution.time_ms), (mask, time));
        assert_eq!(solution.objective, None);
    }
    let problem = options.no_residual(6.4).unwrap_err().to_string();
    assert!(problem.contains("the fastest takes 6.5 ms; give --budget-ms 6.5 or more"), "{problem}");
}

/// With a latency term the block that saves more goes before one that costs as much accuracy; the sign is the authors'
/// stated one, not that of their code.
fn top_k() {
    let positions = plain_network(&[true; 4]).positions().unwrap();
    let points = [-3.0, -1.0, -1.0, -2.0];
    let rows = positions.blocks().iter().zip(points).map(|(block, points)| ImportanceRow::new(block.at, points));
    let importance = importance(rows.collect());
    let merged = |third: f64| [1.0, third, 3.0, 3.5];
    let choose = |second: f64, weight: f64, budget: f64| {
        let table = plain_times(&positions, &merged(second));
        let options = BlockOptions::new(&positions, &table, Some(&importance)).unwrap();
        mask_of(&options, |options| options.top_k(weight, budget).unwrap())
    };
    assert_eq!(choose(3.5, 0.0, 15.9), "1,1,0,1", "of equal scores the earlier block is kept");
    assert_eq!(choose(3.5, 1.0, 15.9), "1,1,0,1", "1 ms is saved, the other saves 0.5");
    assert_eq!(choose(2.5, 1.0, 15.9), "1,0,1,1", "1.5 ms is saved, the other saves 1");
    assert_eq!(choose(3.5, 0.0, 14.5), "1,0,0,1");
    assert_eq!(choose(3.5, 0.0, 14.4), "1,0,0,0");
    assert_eq!(choose(3.5, 10.0, 15.9), "0,1,1,1", "3 ms are worth more than anything");
    // A block that becomes slower is never freed, whatever its importance.
    assert_eq!(choose(4.5, 0.0, 15.0), "1,1,0,1");
    let table = plain_times(&positions, &merged(4.5));
    let options = BlockOptions::new(&positions, &table, Some(&importance)).unwrap();
    let problem = options.top_k(0.0, 11.0).unwrap_err().to_string();
    assert!(problem.contains("the fastest takes 11.5 ms"), "{problem}");
}

/// Top-k keeps as many blocks as it can of its own ranking; the knapsack is never worse.
fn nested_and_not_better_than_the_knapsack() {
    let mut better = 0;
    for seed in 0..200 {
        let mut rng = rng(seed);
        let positions = random_network(&mut rng, 7).positions().unwrap();
        let (table, importance) = (random_times(&mut rng, &positions), random_block_importance(&mut rng, &positions));
        let options = BlockOptions::new(&positions, &table, Some(&importance)).unwrap();
        let candidates = options.candidates();
        let scores: Vec<f32> = options.blocks().iter().map(|block| -block.importance as f32).collect();
        let budget = 0.8 * options.time_ms(&Mask::all(7));
        let (Ok(ranked), Ok(best)) = (options.top_k(0.0, budget), options.knapsack(budget)) else { continue };
        let mask = ranked.kept.unwrap();
        assert_eq!(mask, Mask::top_k(&scores, &candidates, mask.count()));
        let wider = Mask::top_k(&scores, &candidates, mask.count() + 1);
        assert!(mask.count() == 7 || options.time_ms(&wider) > budget, "seed {seed}");
        assert!(best.objective >= ranked.objective, "seed {seed}");
        better += usize::from(best.objective > ranked.objective);
    }
    assert!(better > 50, "{better}");
}

/// One importance of a block is taken whatever stands at its ends; of several that of the block alone, with an
/// activation behind it.
fn importances_of_blocks() {
    let positions = plain_network(&[false, true]).positions().unwrap();
    let table = plain_times(&positions, &[1.0, 1.0]);
    let row = |ends: (usize, usize), act_st, act_end, points| {
        let segment = depthshrinker::graph::ExtendedSegment { at: ends.into(), act_st, act_end };
        ImportanceRow { segment, ..ImportanceRow::new(ends, points) }
    };
    let rows = vec![row((0, 2), true, false, -1.0), row((2, 4), true, true, -2.0), row((2, 4), false, true, -3.0)];
    let both = importance(rows.clone());
    let options = BlockOptions::new(&positions, &table, Some(&both)).unwrap();
    assert_eq!(options.blocks().iter().map(|block| block.importance).collect::<Vec<_>>(), [-1.0, -3.0]);
    let one = importance(rows[..1].to_vec());
    let problem = BlockOptions::new(&positions, &table, Some(&one)).unwrap_err().to_string();
    assert!(problem.contains("no importance for segment (2,4] with act_st 0, act_end 1"), "{problem}");
}

fn random_masks() {
    let positions = plain_network(&[true; 12]).positions().unwrap();
    let mut merged = [1.0; 12];
    (merged[3], merged[5]) = (4.0, 2.5);
    let options_table = plain_times(&positions, &merged);
    let options = BlockOptions::new(&positions, &options_table, None).unwrap();
    let masks = options.random(36.0, 0.05, 7, 40).unwrap();
    assert_eq!(masks, options.random(36.0, 0.05, 7, 40).unwrap());
    assert_ne!(masks, options.random(36.0, 0.05, 8, 40).unwrap());
    let mut kept = [0; 12];
    for (index, solution) in masks.iter().enumerate() {
        assert!(solution.time_ms <= 36.0 && solution.time_ms >= 0.95 * 36.0);
        assert!(masks[..index].iter().all(|other| other.kept != solution.kept));
        for (kept, &bit) in kept.iter_mut().zip(solution.kept.as_ref().unwrap().kept()) {
            *kept += usize::from(bit);
        }
    }
    // Block 3 saves nothing and is never freed; the others have their turn.
    let other = |block: &usize| *block != 3;
    assert_eq!(kept[3], 40);
    assert!((0..12).filter(other).all(|block| (8..40).contains(&kept[block])), "{kept:?}");
    let problem = options.random(36.2, 0.0, 7, 1).unwrap_err().to_string();
    assert!(problem.contains("0 of 1 random selections found that take 100 to 100 % of 36.2 ms"), "{problem}");
}

pub fn trials() -> Vec<Trial> {
    vec![
        trial("rules/the published layer-merge", published_layer_merge),
        trial("rules/no-residual", no_residual),
        trial("rules/top-k", top_k),
        trial("rules/top-k against the knapsack", nested_and_not_better_than_the_knapsack),
        trial("rules/importances of blocks", importances_of_blocks),
        trial("rules/random masks", random_masks),
    ]
}
