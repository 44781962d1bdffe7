//! No method exceeds a budget, whatever the table; a budget that cannot be kept is refused, with the least that can.

use depthshrinker::graph::Positions;
use depthshrinker::measure::{LatencyRow, LatencyTable};
use depthshrinker::shrink::Importance;
use depthshrinker::shrink::select::{Inputs, Knobs, Method, Solution, fastest, select};
use libtest_mimic::Trial;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::networks::{
    importance, latency_table, random_block_importance, random_candidates, random_extended, random_network,
    random_times, rng,
};
use crate::trial;

const TABLES: u64 = 1000;

/// A random case of a method: tables, and the network where it needs one. Every other table has times of any size,
/// whose sums are rounded.
struct Case {
    positions: Option<Positions>,
    table: LatencyTable,
    importance: Option<Importance>,
}

fn case(method: Method, rng: &mut ChaCha8Rng) -> Case {
    let mut case = match method {
        Method::TwoStageDp | Method::Fastest => {
            let depth = rng.random_range(1..9);
            let (table, importance) = random_extended(rng, depth);
            Case { positions: None, table, importance: Some(importance) }
        }
        _ => {
            let blocks = rng.random_range(1..6);
            let positions = random_network(rng, blocks).positions().unwrap();
            let (table, importance) = match method {
                Method::LayerMerge => random_candidates(rng, &positions),
                Method::LayerKnapsack => {
                    let table = random_times(rng, &positions);
                    let rows = table.rows().filter(|row| row.at.len() == 1);
                    let rows = rows.map(|row| depthshrinker::shrink::ImportanceRow::new(row.at, -row.time_ms));
                    let importance = importance(rows.collect());
                    (table, importance)
                }
                _ => (random_times(rng, &positions), random_block_importance(rng, &positions)),
            };
            Case { positions: Some(positions), table, importance: Some(importance) }
        }
    };
    let mut rows: Vec<LatencyRow> = case.table.rows().cloned().collect();
    if rng.random_range(0..2) == 0 {
        for row in &mut rows {
            row.time_ms *= rng.random::<f64>();
        }
    }
    if rng.random_range(0..2) == 0 {
        rows.push(LatencyRow::new((0, 0), rng.random::<f64>()));
        rows.push(LatencyRow::new((case.table.depth(), case.table.depth()), rng.random::<f64>()));
    }
    case.table = latency_table(rows);
    case
}

fn run(method: Method, case: &Case, budget_ms: f64, seed: u64) -> depthshrinker::Result<Solution> {
    let inputs = Inputs {
        table: &case.table,
        importance: case.importance.as_ref(),
        positions: case.positions.as_ref(),
        norms: None,
    };
    // Random masks of any time up to the budget: that they come near it is tested elsewhere.
    select(method, &inputs, &Knobs { budget_ms, alpha: 1.2, latency_weight: 0.3, tolerance: 1.0, seed })
}

/// The sum of what a solution is made of.
fn time_of(table: &LatencyTable, solution: &Solution) -> f64 {
    let pruned = solution.pruned.clone().unwrap_or_default();
    let parts = solution.boundaries.windows(2).filter(|pair| !(pair[0] + 1 == pair[1] && pruned.contains(&pair[1])));
    let time = |pair: &[usize]| {
        let merged = solution.merged.iter().find(|segment| segment.end == pair[1]);
        let mut rows = table.rows_of((pair[0], pair[1]).into());
        rows.find(|row| row.key == merged.map(|segment| segment.key())).unwrap().time_ms
    };
    table.fixed_ms() + parts.map(time).sum::<f64>()
}

/// The budget that a refusal names.
fn named(problem: &str) -> f64 {
    let (_, rest) = problem.split_once("give --budget-ms ").unwrap();
    rest.split(' ').next().unwrap().parse().unwrap()
}

fn never_exceeded(method: Method) {
    let (mut kept, mut refused) = (0, 0);
    for seed in 0..TABLES {
        let mut rng = rng(seed);
        let case = case(method, &mut rng);
        let sum: f64 = case.table.rows().filter(|row| row.at.len() == 1).map(|row| row.time_ms).sum();
        let budget = sum * rng.random::<f64>() + case.table.fixed_ms();
        match run(method, &case, budget, seed) {
            Ok(solution) => {
                kept += 1;
                assert!(solution.time_ms <= budget, "{seed}: {} of {budget}", solution.time_ms);
                let time = time_of(&case.table, &solution);
                assert!((time - solution.time_ms).abs() < 1e-9, "{seed}: {time}, not {}", solution.time_ms);
                // Exactly what was taken is enough.
                let again = run(method, &case, solution.time_ms, seed).unwrap();
                assert!(again.time_ms <= solution.time_ms);
                if method != Method::Random {
                    assert_eq!(again, solution, "{seed}");
                }
            }
            Err(error) => {
                refused += 1;
                let problem = error.to_string();
                assert_eq!(problem.lines().count(), 1);
                let least = named(&problem);
                assert!(least > budget, "{seed}: {problem}");
                let solution = run(method, &case, least, seed).unwrap();
                assert!(solution.time_ms <= least && solution.time_ms > least - 2e-6, "{seed}: {problem}");
                if matches!(method, Method::TwoStageDp | Method::Fastest) {
                    assert!((fastest(&case.table).unwrap().time_ms - solution.time_ms).abs() < 1e-9);
                }
            }
        }
    }
    assert!(kept > 100 && refused > 50, "{kept} kept, {refused} refused: the budgets test nothing");
}

fn no_budgets() {
    for method in Method::ALL {
        for budget in [f64::NAN, f64::INFINITY, -1.0] {
            let problem = run(method, &case(method, &mut rng(1)), budget, 1).unwrap_err().to_string();
            assert!(problem.contains("is no time") && problem.lines().count() == 1, "{problem}");
        }
    }
}

pub fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = Method::ALL
        .into_iter()
        .map(|method| trial(format!("budgets/{}", method.name()), move || never_exceeded(method)))
        .collect();
    trials.push(trial("budgets/that are none", no_budgets));
    trials
}
