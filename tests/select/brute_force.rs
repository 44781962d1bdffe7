//! Every solver against going through all selections, on small random cases.

use depthshrinker::graph::{ExtendedSegment, Interval, Positions};
use depthshrinker::measure::{LatencyRow, LatencyTable};
use depthshrinker::shrink::select::{
    Arc, BlockOptions, OptimalTable, States, layer_knapsack, layer_merge, two_stage_dp,
};
use depthshrinker::shrink::{Importance, ImportanceRow, Mask};
use libtest_mimic::Trial;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::networks::{
    importance, latency_table, random_block_importance, random_candidates, random_extended, random_network,
    random_times, rng, sixty_fourths,
};
use crate::trial;

const CASES: u64 = 300;

/// One of all selections: what it is worth and what it takes.
#[derive(Debug, Clone, Copy)]
struct Outcome {
    value: f64,
    time: f64,
}

/// The highest value within a budget, and the least time that has it. Values are equal that agree to seven decimals.
fn best(all: &[Outcome], budget: f64) -> Option<Outcome> {
    let rank = |outcome: &Outcome| ((outcome.value * 1e7).round(), -outcome.time);
    let within = all.iter().filter(|outcome| outcome.time <= budget);
    within.copied().reduce(|a, b| if rank(&b) > rank(&a) { b } else { a })
}

/// A budget near those that matter: what one of all selections takes, or something between the least and the most.
fn budget(rng: &mut ChaCha8Rng, all: &[Outcome]) -> f64 {
    let any = all[rng.random_range(0..all.len())].time;
    if rng.random_range(0..2) == 0 { any } else { (any + sixty_fourths(rng, -20, 20)).max(0.0) }
}

/// A solver's answer is the best of all, or there is none.
fn agrees(case: u64, all: &[Outcome], budget: f64, solved: depthshrinker::Result<(f64, f64)>) {
    match (best(all, budget), solved) {
        (Some(best), Ok((value, time))) => {
            assert!((best.value - value).abs() < 1e-7, "case {case}: {value} of {}", best.value);
            assert_eq!(time, best.time, "case {case}");
        }
        (None, Err(error)) => {
            let least = all.iter().map(|outcome| outcome.time).fold(f64::INFINITY, f64::min);
            let problem = error.to_string();
            assert!(problem.contains(&format!("the fastest takes {least} ms")), "case {case}: {problem}");
        }
        (best, solved) => panic!("case {case}: {best:?} but {solved:?}"),
    }
}

/// All ways to split a segment into rows of the table; the front of every split is a row, too, as the recursion has it.
fn splits(table: &LatencyTable, at: Interval) -> Vec<f64> {
    let mut all = table.time_ms(at).into_iter().collect::<Vec<_>>();
    for middle in at.st + 1..at.end {
        let front = Interval { end: middle, ..at };
        let (Some(back), true) = (table.time_ms(Interval { st: middle, ..at }), table.row(front).is_some()) else {
            continue;
        };
        all.extend(splits(table, front).into_iter().map(|time| time + back));
    }
    all
}

/// All ways to see a segment as a chain without activations between its parts.
fn chains(importance: &Importance, segment: ExtendedSegment) -> Vec<f64> {
    let own = |segment: ExtendedSegment| importance.rows().find(|row| row.segment == segment).map(|row| row.importance);
    let mut all: Vec<f64> = own(segment).into_iter().collect();
    for middle in segment.at.st + 1..segment.at.end {
        let front = ExtendedSegment { at: Interval { end: middle, ..segment.at }, act_end: false, ..segment };
        let back = ExtendedSegment { at: Interval { st: middle, ..segment.at }, act_st: false, ..segment };
        let (Some(back), Some(_)) = (own(back), own(front)) else { continue };
        all.extend(chains(importance, front).into_iter().map(|sum| sum + back));
    }
    all
}

/// All selections from a position on, each segment at its best.
fn all_extended(
    (st, act): (usize, bool),
    depth: usize,
    segments: &[(ExtendedSegment, Outcome)],
    so_far: Outcome,
    all: &mut Vec<Outcome>,
) {
    if st == depth {
        all.push(so_far);
        return;
    }
    for (segment, outcome) in segments.iter().filter(|(segment, _)| (segment.at.st, segment.act_st) == (st, act)) {
        let next = Outcome { value: so_far.value + outcome.value, time: so_far.time + outcome.time };
        all_extended((segment.at.end, segment.act_end), depth, segments, next, all);
    }
}

fn two_stage() {
    for case in 0..CASES {
        let mut rng = rng(case);
        let depth = rng.random_range(1..7);
        let (table, importance) = random_extended(&mut rng, depth);
        let segments: Vec<(ExtendedSegment, Outcome)> = importance
            .rows()
            .map(|row| {
                let time = splits(&table, row.segment.at).into_iter().fold(f64::INFINITY, f64::min);
                let value = chains(&importance, row.segment).into_iter().fold(f64::NEG_INFINITY, f64::max);
                (row.segment, Outcome { value, time })
            })
            .collect();
        let mut all = Vec::new();
        all_extended((0, true), depth, &segments, Outcome { value: 0.0, time: 0.0 }, &mut all);
        let budget = budget(&mut rng, &all);
        let solved = two_stage_dp(&table, &importance, 0.0, budget).map(|solution| {
            let merged = solution.boundaries.windows(2).map(|pair| table.time_ms((pair[0], pair[1]).into()).unwrap());
            assert_eq!(merged.sum::<f64>(), solution.time_ms, "case {case}");
            (solution.objective.unwrap(), solution.time_ms)
        });
        agrees(case, &all, budget, solved);
    }
}

/// α·mean over single convolutions is taken from every importance, and changes the choice.
fn alpha() {
    let mut differ = 0;
    for case in 0..100 {
        let mut rng = rng(1000 + case);
        let (table, given) = random_extended(&mut rng, 6);
        let single: Vec<f64> = given.rows().filter(|row| row.segment.at.len() == 1).map(|row| row.importance).collect();
        let shift = 1.5 * single.iter().sum::<f64>() / single.len() as f64;
        let shifted = given.rows().map(|row| ImportanceRow { importance: row.importance - shift, ..*row }).collect();
        let budget = OptimalTable::new(&table).unwrap().splits().map(|(_, split)| split.time_ms).fold(0.0, f64::max);
        let solve = |importance: &Importance, alpha| two_stage_dp(&table, importance, alpha, 1.5 * budget).unwrap();
        let (own, theirs) = (solve(&given, 1.5), solve(&importance(shifted), 0.0));
        assert_eq!((&own.boundaries, &own.activations), (&theirs.boundaries, &theirs.activations));
        assert!((own.objective.unwrap() - theirs.objective.unwrap()).abs() < 1e-9);
        differ += usize::from(own.boundaries != solve(&given, 0.0).boundaries);
    }
    assert!(differ > 10, "{differ}");
}

fn optimal_merge() {
    for case in 0..CASES {
        let (table, _) = random_extended(&mut rng(case), 7);
        for (at, split) in OptimalTable::new(&table).unwrap().splits() {
            let least = splits(&table, at).into_iter().fold(f64::INFINITY, f64::min);
            let parts = split.breaks.windows(2).map(|pair| table.time_ms((pair[0], pair[1]).into()).unwrap());
            assert_eq!((split.time_ms, parts.sum::<f64>()), (least, least), "case {case}: {at}");
        }
    }
}

/// Of equally fast splits the whole segment stands, then the one whose last part begins earlier.
fn ties() {
    let row = |st, end, time| LatencyRow::new((st, end), time);
    let table = latency_table(vec![
        row(0, 1, 1.0),
        row(1, 2, 1.0),
        row(2, 3, 1.0),
        row(0, 2, 2.0),
        row(1, 3, 1.5),
        row(0, 3, 3.0),
    ]);
    let optimal = OptimalTable::new(&table).unwrap();
    assert_eq!(optimal.split((0, 2).into()).unwrap().breaks, [0, 2]);
    assert_eq!(optimal.split((0, 3).into()).unwrap().breaks, [0, 1, 3]);
    let table = latency_table(vec![
        row(0, 1, 1.0),
        row(1, 2, 1.0),
        row(2, 3, 1.0),
        row(1, 3, 2.0),
        row(0, 2, 2.0),
        row(0, 3, 9.0),
    ]);
    assert_eq!(OptimalTable::new(&table).unwrap().split((0, 3).into()).unwrap().breaks, [0, 1, 3]);
}

/// All paths of LayerMerge's recursion from a position on.
fn all_merges(st: usize, segments: &[(Interval, Outcome)], depth: usize, so_far: Outcome, all: &mut Vec<Outcome>) {
    if st == depth {
        all.push(so_far);
        return;
    }
    for (at, outcome) in segments.iter().filter(|(at, _)| at.st == st) {
        let next = Outcome { value: so_far.value + outcome.value, time: so_far.time + outcome.time };
        all_merges(at.end, segments, depth, next, all);
    }
}

fn layer_merges() {
    for case in 0..CASES {
        let mut rng = rng(case);
        let blocks = rng.random_range(1..4);
        let positions = random_network(&mut rng, blocks).positions().unwrap();
        let (table, importance) = random_candidates(&mut rng, &positions);
        let segments: Vec<(Interval, Outcome)> = importance
            .rows()
            .map(|row| {
                let timed = table.rows_of(row.segment.at).find(|timed| timed.key == row.key).unwrap();
                (row.segment.at, Outcome { value: (row.importance / 100.0).exp(), time: timed.time_ms })
            })
            .collect();
        let mut all = Vec::new();
        all_merges(0, &segments, positions.depth(), Outcome { value: 0.0, time: 0.0 }, &mut all);
        let budget = budget(&mut rng, &all);
        let norms: Vec<f64> = (0..positions.depth()).map(|_| sixty_fourths(&mut rng, 1, 100)).collect();
        let solved = layer_merge(&positions, &table, &importance, Some(&norms), budget).map(|solution| {
            assert_merges(&positions, &solution);
            (solution.objective.unwrap(), solution.time_ms)
        });
        agrees(case, &all, budget, solved);
    }
}

/// What is pruned leaves the kernels that the segments are said to have, and an activation stands where the rule puts
/// it.
fn assert_merges(positions: &Positions, solution: &depthshrinker::shrink::select::Solution) {
    let pruned = solution.pruned.as_ref().unwrap();
    for segment in &solution.merged {
        let convs = (segment.st + 1..=segment.end).zip(positions.convs_in((segment.st, segment.end).into()));
        let kept: Vec<_> = convs.filter(|(position, _)| !pruned.contains(position)).map(|(_, conv)| conv).collect();
        let kernel = 1 + kept.iter().map(|conv| conv.kernel() - 1).sum::<usize>();
        let depthwise = kept.iter().all(|conv| conv.is_depthwise());
        assert_eq!((kernel, depthwise), (segment.kernel, segment.depthwise));
        let had = positions.convs()[segment.end - 1].has_activation();
        let expected = had || segment.end - segment.st > 1;
        assert_eq!(solution.activations.contains(&segment.end), expected);
    }
    assert!(pruned.iter().all(|&position| positions.convs()[position - 1].is_reducible()));
    let ends = solution.merged.iter().map(|segment| segment.end);
    assert!(solution.boundaries.iter().copied().eq(std::iter::once(0).chain(ends)));
}

fn knapsack() {
    for case in 0..CASES {
        let mut rng = rng(case);
        let blocks = rng.random_range(1..9);
        let positions = random_network(&mut rng, blocks).positions().unwrap();
        let (table, importance) = (random_times(&mut rng, &positions), random_block_importance(&mut rng, &positions));
        let single =
            |at: Interval| -> f64 { (at.st..at.end).map(|st| table.time_ms((st, st + 1).into()).unwrap()).sum() };
        // Some blocks stay whatever that costs.
        let kept: Vec<bool> = (0..blocks).map(|_| rng.random_range(0..4) == 0).collect();
        let mut all = Vec::new();
        for mask in (0..1_u32 << blocks).filter(|mask| (0..blocks).all(|b| mask >> b & 1 == 1 || !kept[b])) {
            let mut outcome = Outcome { value: 0.0, time: 0.0 };
            for (index, block) in positions.blocks().iter().enumerate() {
                if mask >> index & 1 == 1 {
                    outcome.time += single(block.at);
                } else {
                    outcome.time += table.time_ms(block.at).unwrap();
                    outcome.value += importance.rows().find(|row| row.segment.at == block.at).unwrap().importance;
                }
            }
            all.push(outcome);
        }
        let budget = budget(&mut rng, &all);
        let options = BlockOptions::with_kept(&positions, &table, Some(&importance), &kept).unwrap();
        let solved = options.knapsack(budget).map(|solution| {
            let merged = solution.boundaries.windows(2).map(|pair| table.time_ms((pair[0], pair[1]).into()).unwrap());
            assert_eq!(merged.sum::<f64>(), solution.time_ms, "case {case}");
            assert_eq!(options.time_ms(solution.kept.as_ref().unwrap()), solution.time_ms);
            (solution.objective.unwrap(), solution.time_ms)
        });
        agrees(case, &all, budget, solved);
        assert_eq!(options.time_ms(&Mask::all(blocks)), single(Interval { st: 0, end: positions.depth() }));
    }
}

fn layers() {
    for case in 0..CASES {
        let mut rng = rng(case);
        let blocks = rng.random_range(1..5);
        let positions = random_network(&mut rng, blocks).positions().unwrap();
        let table = random_times(&mut rng, &positions);
        let row = |end: usize, rng: &mut ChaCha8Rng| ImportanceRow::new((end - 1, end), sixty_fourths(rng, -900, 90));
        let importance = importance((1..=positions.depth()).map(|end| row(end, &mut rng)).collect());
        let reducible: Vec<usize> =
            (1..=positions.depth()).filter(|p| positions.convs()[p - 1].is_reducible()).collect();
        let points: Vec<f64> = importance.rows().map(|row| row.importance).collect();
        let mut all = Vec::new();
        for pruned in 0..1_u32 << reducible.len() {
            let is_pruned = |p: usize| reducible.iter().position(|&r| r == p).is_some_and(|i| pruned >> i & 1 == 1);
            let kept: Vec<usize> = (1..=positions.depth()).filter(|&p| !is_pruned(p)).collect();
            let time = kept.iter().map(|&p| table.time_ms((p - 1, p).into()).unwrap()).sum();
            let values = kept.iter().filter(|p| reducible.contains(p)).map(|&p| (-points[p - 1] / 100.0).exp());
            all.push(Outcome { value: values.sum(), time });
        }
        let budget = budget(&mut rng, &all);
        let solved = layer_knapsack(&positions, &table, &importance, budget).map(|solution| {
            let pruned = solution.pruned.unwrap();
            assert!(pruned.iter().all(|p| reducible.contains(p)));
            (solution.objective.unwrap(), solution.time_ms)
        });
        agrees(case, &all, budget, solved);
    }
}

/// The core alone, on graphs of states that no network has: many arcs of one state, dead ends, several ends.
fn paths() {
    for case in 0..CASES {
        let mut rng = rng(case);
        let states = rng.random_range(2..8);
        let mut into: Vec<Vec<Arc>> = vec![Vec::new(); states];
        for (to, arcs) in into.iter_mut().enumerate().skip(1) {
            for _ in 0..rng.random_range(1..5) {
                let (time, value) = (sixty_fourths(&mut rng, 0, 100), sixty_fourths(&mut rng, -100, 100));
                arcs.push(Arc { from: rng.random_range(0..to), time, value });
            }
        }
        let ends: Vec<usize> =
            (1..states).filter(|&state| state + 1 == states || rng.random_range(0..4) == 0).collect();
        let states = States { start: sixty_fourths(&mut rng, 0, 30), into, ends };
        let mut all = Vec::new();
        for &end in &states.ends {
            backwards(&states, end, Outcome { value: 0.0, time: states.start }, &mut all);
        }
        let budget = budget(&mut rng, &all);
        let least = all.iter().map(|outcome| outcome.time).fold(f64::INFINITY, f64::min);
        assert_eq!(states.fastest().unwrap().time, least, "case {case}");
        match (best(&all, budget), states.best_within(budget)) {
            (Some(best), Some(path)) => assert_eq!((path.value, path.time), (best.value, best.time), "case {case}"),
            (None, None) => {}
            (best, path) => panic!("case {case}: {best:?} but {path:?}"),
        }
        let free = states.best_within(f64::INFINITY).unwrap();
        let highest = all.iter().map(|outcome| outcome.value).fold(f64::NEG_INFINITY, f64::max);
        assert_eq!(free.value, highest, "case {case}");
    }
}

fn backwards(states: &States, state: usize, so_far: Outcome, all: &mut Vec<Outcome>) {
    if state == 0 {
        all.push(so_far);
        return;
    }
    for arc in &states.into[state] {
        let next = Outcome { value: so_far.value + arc.value, time: so_far.time + arc.time };
        backwards(states, arc.from, next, all);
    }
}

pub fn trials() -> Vec<Trial> {
    vec![
        trial("brute force/paths", paths),
        trial("brute force/optimal merge", optimal_merge),
        trial("brute force/optimal merge of ties", ties),
        trial("brute force/two-stage-dp", two_stage),
        trial("brute force/alpha", alpha),
        trial("brute force/layer-merge", layer_merges),
        trial("brute force/knapsack", knapsack),
        trial("brute force/layer-knapsack", layers),
    ]
}
