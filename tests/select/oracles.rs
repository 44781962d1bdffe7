//! The tables that Kim et al. published with their two-stage dynamic programme, MIT licence: they are read from where
//! they lie and are not part of this repository. `DEPTHSHRINKER_ORACLES` names the folder that holds `mbv2_1.0` and the
//! others; else it is `../shared/oracles`. Without it these tests are ignored.

use std::path::{Path, PathBuf};
use std::time::Instant;

use depthshrinker::graph::{ExtendedSegment, Positions};
use depthshrinker::measure::LatencyTable;
use depthshrinker::shrink::select::{OptimalTable, Solution, fastest, two_stage_dp};
use depthshrinker::shrink::{Importance, ImportanceRow};
use libtest_mimic::Trial;

use crate::networks::{importance, positions};
use crate::trial;

const VARIABLE: &str = "DEPTHSHRINKER_ORACLES";

struct Published {
    folder: &'static str,
    times: &'static str,
    optimal: &'static str,
    network: &'static str,
    /// How many segments are best split.
    splits: usize,
    /// The sum of all single convolutions, milliseconds to 6 decimals.
    single_ms: f64,
    /// The least that a budget can be, and how.
    least_ms: f64,
    least: &'static [usize],
    /// Budgets for the synthetic importances.
    budgets: [f64; 3],
}

const PUBLISHED: [Published; 3] = [
    Published {
        folder: "mbv2_1.0",
        times: "time_fish_gpu1_1228.csv",
        optimal: "opt_time_fish_gpu1_1228.csv",
        network: "mobilenetv2-1.0",
        splits: 60,
        single_ms: 33.670116,
        least_ms: 6.466603,
        least: &[0, 1, 5, 11, 20, 41, 50],
        budgets: [25.0, 20.0, 18.0],
    },
    Published {
        folder: "mbv2_1.4",
        times: "time_fish_gpu1_0103.csv",
        optimal: "opt_time_fish_gpu1_0103.csv",
        network: "mobilenetv2-1.4",
        splits: 78,
        single_ms: 43.200611,
        least_ms: 10.278369,
        least: &[0, 1, 5, 11, 17, 20, 41, 50],
        budgets: [27.0, 23.0, 20.0],
    },
    Published {
        folder: "vgg19_no_trt",
        times: "time_fish_gpu1_0317.csv",
        optimal: "opt_time_fish_gpu1_0317.csv",
        network: "vgg19_bn",
        splits: 11,
        single_ms: 193.084266,
        least_ms: 155.990500,
        least: &[0, 2, 3, 4, 6, 8, 10, 12, 13, 15, 16],
        budgets: [190.0, 170.0, 160.0],
    },
];

/// Where the tables are: `None` where nothing says so and they are not beside the repository.
fn folder() -> Option<PathBuf> {
    if let Some(given) = std::env::var_os(VARIABLE) {
        return Some(given.into());
    }
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/oracles");
    beside.is_dir().then_some(beside)
}

fn read(folder: &Path, published: &Published, file: &str) -> LatencyTable {
    LatencyTable::read(&folder.join(published.folder).join(file)).unwrap()
}

/// The rows are exactly the network's segments in their order (O2), and T_opt is the published one (O1).
fn optimal_splits(folder: &Path, published: &Published) {
    let table = read(folder, published, published.times);
    let positions = positions(published.network);
    table.check(&positions).unwrap();
    let text = std::fs::read_to_string(folder.join(published.folder).join(published.times)).unwrap();
    let ends = text.lines().skip(1).map(|line| {
        let mut fields = line.split(',').skip(1).map(|field| field.parse::<usize>().unwrap());
        (fields.next().unwrap(), fields.next().unwrap())
    });
    assert!(ends.eq(positions.segments().map(|at| (at.st, at.end))));

    let solved = OptimalTable::new(&table).unwrap();
    let theirs = OptimalTable::new(&read(folder, published, published.optimal)).unwrap();
    assert_eq!(solved.splits().count(), theirs.splits().count());
    for ((at, own), (same, their)) in solved.splits().zip(theirs.splits()) {
        assert_eq!((at, &own.breaks), (same, &their.breaks));
        assert!((own.time_ms - their.time_ms).abs() <= 1e-12, "{at}");
        assert!((own.stdev_ms - their.stdev_ms).abs() <= 1e-14, "{at}");
    }
    assert_eq!(solved.splits().filter(|(_, split)| split.breaks.len() > 2).count(), published.splits);
}

/// Sums, the fastest selection, and that no budget goes below it (O3).
fn sums_and_least(folder: &Path, published: &Published) {
    let table = read(folder, published, published.times);
    let single: f64 = table.rows().filter(|row| row.at.len() == 1).map(|row| row.time_ms).sum();
    assert!((single - published.single_ms).abs() < 5e-7, "{single}");
    for table in [&table, &read(folder, published, published.optimal)] {
        let least = fastest(table).unwrap();
        assert!((least.time_ms - published.least_ms).abs() < 5e-7, "{}", least.time_ms);
        assert_eq!(least.boundaries, published.least);
    }
    let importance = synthetic(&positions(published.network));
    let problem = two_stage_dp(&table, &importance, 0.0, published.least_ms - 1e-3).unwrap_err().to_string();
    let named = format!("{:.5}", published.least_ms);
    assert!(problem.contains(&named[..named.len() - 1]) && problem.lines().count() == 1, "{problem}");
    let solution = two_stage_dp(&table, &importance, 0.0, published.least_ms + 1e-6).unwrap();
    assert_eq!(solution.boundaries, published.least);
}

/// The importances of O7: 0.30 − 0.02·(convolutions − 1)², less 0.01 where an activation is put at a block's end.
fn synthetic(positions: &Positions) -> Importance {
    let is_end = |position: usize| positions.blocks().iter().any(|block| block.at.end == position);
    let row = |segment: ExtendedSegment| {
        let inner = (segment.at.len() - 1) as f64;
        let at_end = if is_end(segment.at.end) && segment.act_end { 0.01 } else { 0.0 };
        let importance = 0.30 - 0.02 * inner * inner - at_end;
        ImportanceRow { segment, ..ImportanceRow::new(segment.at, importance) }
    };
    importance(positions.extended_segments().into_iter().map(row).collect())
}

/// The published solver with times in ticks, rounded by `round`: the objective and the time of its answer by the table.
fn in_ticks(
    times: &OptimalTable,
    importance: &Importance,
    budget_ms: f64,
    ticks_per_ms: f64,
    round: fn(f64) -> f64,
) -> Option<(f64, f64)> {
    let budget = (budget_ms * ticks_per_ms) as usize;
    let extended = extended(importance);
    // By ticks, position and activation: the objective and the time of the best so far.
    let mut best = vec![vec![[None::<(f64, f64)>; 2]; times.depth() + 1]; budget + 1];
    for row in &mut best {
        row[0][1] = Some((0.0, 0.0));
    }
    for end in 1..=times.depth() {
        for ticks in 0..=budget {
            for (segment, value) in extended.iter().filter(|(segment, _)| segment.at.end == end) {
                let time = times.split(segment.at).unwrap().time_ms;
                let Some(before) = ticks.checked_sub(round(time * ticks_per_ms) as usize) else { continue };
                let Some((sum, ms)) = best[before][segment.at.st][usize::from(segment.act_st)] else { continue };
                let (sum, ms) = (sum + value, ms + time);
                let kept = &mut best[ticks][end][usize::from(segment.act_end)];
                if kept.is_none_or(|(known, known_ms)| sum > known + 1e-9 || (sum > known - 1e-9 && ms < known_ms)) {
                    *kept = Some((sum, ms));
                }
            }
        }
    }
    best[budget][times.depth()].into_iter().flatten().max_by(|a, b| a.0.total_cmp(&b.0))
}

/// Importances extended, written again.
fn extended(importance: &Importance) -> Vec<(ExtendedSegment, f64)> {
    let own: Vec<(ExtendedSegment, f64)> = importance.rows().map(|row| (row.segment, row.importance)).collect();
    let find = |list: &[(ExtendedSegment, f64)], wanted: ExtendedSegment| {
        list.iter().find(|(segment, _)| *segment == wanted).map(|(_, value)| *value)
    };
    let mut extended: Vec<(ExtendedSegment, f64)> = Vec::new();
    for &(segment, value) in &own {
        let mut best = value;
        for middle in segment.at.st + 1..segment.at.end {
            let front = ExtendedSegment { at: (segment.at.st, middle).into(), act_end: false, ..segment };
            let back = ExtendedSegment { at: (middle, segment.at.end).into(), act_st: false, ..segment };
            if let (Some(front), Some(back)) = (find(&extended, front), find(&own, back)) {
                best = best.max(front + back);
            }
        }
        extended.push((segment, best));
    }
    extended
}

/// What a solution takes by the table, its merged convolutions one by one.
fn time_of(table: &LatencyTable, solution: &Solution) -> f64 {
    solution.boundaries.windows(2).map(|pair| table.time_ms((pair[0], pair[1]).into()).unwrap()).sum()
}

/// With the importances of O7: the exact answer keeps the budget, lies between those of ticks rounded up and down, and
/// is found within a moment; ticks rounded down, as published, exceed the budget.
fn synthetic_importances(folder: &Path, published: &Published) {
    let table = read(folder, published, published.times);
    let importance = synthetic(&positions(published.network));
    let times = OptimalTable::new(&table).unwrap();
    for budget in published.budgets {
        let start = Instant::now();
        let solution = two_stage_dp(&table, &importance, 0.0, budget).unwrap();
        println!("{} within {budget} ms: {:.2} ms to solve", published.network, start.elapsed().as_secs_f64() * 1e3);
        assert!(solution.time_ms <= budget);
        assert!((solution.time_ms - time_of(&table, &solution)).abs() < 1e-9);
        assert!(solution.activations.iter().all(|position| solution.boundaries.contains(position)));
        let objective = solution.objective.unwrap();
        let (above, _) = in_ticks(&times, &importance, budget, 200.0, f64::floor).unwrap();
        let (below, _) = in_ticks(&times, &importance, budget, 200.0, f64::ceil).unwrap();
        assert!(below - 1e-9 <= objective && objective <= above + 1e-9, "{below} {objective} {above}");
        let (_, published_ms) = in_ticks(&times, &importance, budget, 20.0, f64::floor).unwrap();
        if published.folder == "mbv2_1.0" && budget == 25.0 {
            assert!((published_ms - 26.17).abs() < 0.005, "{published_ms}");
        }
    }
}

type Check = fn(&Path, &Published);

pub fn trials() -> Vec<Trial> {
    let folder = folder();
    let checks: [(&str, Check); 3] = [
        ("optimal splits", optimal_splits),
        ("sums and least", sums_and_least),
        ("synthetic importances", synthetic_importances),
    ];
    let rows = PUBLISHED.iter().flat_map(|published| checks.map(|(name, check)| (published, name, check)));
    rows.map(|(published, name, check)| match folder.clone() {
        Some(folder) => trial(format!("oracles/{}/{name}", published.folder), move || check(&folder, published)),
        None => {
            let name = format!("oracles/{}/{name} (no tables: {VARIABLE} or ../shared/oracles)", published.folder);
            Trial::test(name, || Ok(())).with_ignored_flag(true)
        }
    })
    .collect()
}
