//! Tables that cannot be used: one line each, which names the row and says what to do.

use std::path::Path;

use depthshrinker::graph::Positions;
use depthshrinker::measure::LatencyTable;
use depthshrinker::shrink::Importance;
use depthshrinker::shrink::select::{Inputs, Knobs, Method, select};
use libtest_mimic::Trial;

use crate::networks::plain_network;
use crate::trial;

/// Two blocks of two convolutions, the second with a residual: what every row below changes.
fn positions() -> Positions {
    plain_network(&[false, true]).positions().unwrap()
}

const TIMES: &str = "id,st,end,time,stdev
0,0,1,1.5,0.1
1,0,2,2.5,0.1
2,0,4,6.5,0.1
3,1,2,1.25,0.1
4,2,3,1.5,0.1
5,2,4,2.75,0.1
6,3,4,1.0,0.1
7,1,4,4.0,0.1
";
const IMPORTANCES: &str = "st,end,act_st,act_end,importance
0,1,1,1,-0.5
0,2,1,1,-0.5
0,4,1,1,-0.5
1,2,1,1,-0.5
1,2,1,0,-0.5
1,4,1,1,-0.5
1,4,1,0,-0.5
2,3,1,1,-0.5
2,3,0,1,-0.5
2,4,1,1,-0.5
2,4,0,1,-0.5
3,4,1,1,-0.5
3,4,1,0,-0.5
";

/// Which of the two tables a row changes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Of {
    Times,
    Importances,
}

use Of::{Importances, Times};

/// A text of a table that takes the place of another, and what the message says.
struct Bad {
    name: &'static str,
    of: Of,
    replace: &'static str,
    with: &'static str,
    words: &'static [&'static str],
}

const fn bad(
    name: &'static str,
    of: Of,
    replace: &'static str,
    with: &'static str,
    words: &'static [&'static str],
) -> Bad {
    Bad { name, of, replace, with, words }
}

const BAD: [Bad; 37] = [
    bad("no times", Times, TIMES, "", &["has no column \"st\"", "st,end,time"]),
    bad("only a header", Times, TIMES, "st,end,time\n", &["has no segments"]),
    bad("another table", Times, "time", "ms", &["has no column \"time\""]),
    bad("a word for a time", Times, "1.25", "fast", &["line 5: time is \"fast\", not a number of milliseconds"]),
    bad("no time", Times, "1.25", "", &["line 5: time is \"\""]),
    bad("not a number", Times, "1.25", "NaN", &["line 5: segment (1,2] takes NaN ms", "measure it again"]),
    bad("infinite", Times, "1.25", "inf", &["line 5: segment (1,2] takes inf ms", "measure it again"]),
    bad("negative", Times, "1.25", "-1.25", &["line 5: segment (1,2] takes -1.25 ms", "measure it again"]),
    bad("negative deviation", Times, "1.25,0.1", "1.25,-0.1", &["line 5: segment (1,2]", "deviation -0.1 ms"]),
    bad("negative position", Times, "3,1,2", "3,-1,2", &["line 5: st is \"-1\", not a position"]),
    bad("half a position", Times, "3,1,2", "3,1,2.0", &["line 5: end is \"2.0\", not a position"]),
    bad("backwards", Times, "3,1,2", "3,2,1", &["line 5: segment (2,1] ends before it begins"]),
    bad("empty inside", Times, "7,1,4", "7,2,2", &["line 9: segment (2,2] holds no convolution", "(4,4]"]),
    bad("twice", Times, "7,1,4", "7,1,2", &["line 9: segment (1,2] stands twice, first in line 5", "remove one"]),
    bad("no single", Times, "3,1,2,1.25,0.1\n", "", &["no row for segment (1,2], a single convolution", "measure it"]),
    bad("no segment", Times, "1,0,2,2.5,0.1\n", "", &["no row for segment (0,2] of plain", "measure it"]),
    bad("a field less", Times, "1.25,0.1", "1.25", &["line 5: has 4 fields, the header 5"]),
    bad(
        "half a residual",
        Times,
        "7,1,4",
        "7,1,3",
        &["line 9: segment (1,3] is none of plain", "give a table of plain"],
    ),
    bad(
        "another network",
        Times,
        "7,1,4",
        "7,4,5",
        &["another network: it ends at position 5, the blocks of plain at 4", "give a table of plain"],
    ),
    bad("no kind", Times, TIMES, "st,end,time,kernel\n0,1,1,3\n", &["line 2: depthwise is \"\", not 0 or 1"]),
    bad("no breaks", Times, TIMES, "st,end,time,breaks\n0,1,1,x\n", &["line 2: breaks are no positions"]),
    bad("wrong breaks", Times, TIMES, "st,end,time,breaks\n0,1,1,\"0,2\"\n", &["line 2: segment (0,1] has breaks"]),
    bad(
        "breaks without rows",
        Times,
        TIMES,
        "st,end,time,breaks\n0,1,1,\"0,1\"\n1,2,1,\"1,2\"\n2,3,1,\"2,3\"\n3,4,1,\"3,4\"\n0,2,1,\"0,1,2\"\n1,4,1,\"1,4\"\n\
         2,4,1,\"2,4\"\n0,4,1,\"0,3,4\"\n",
        &["splits segment (0,4] at (0,3], which has no row", "measure it"],
    ),
    bad("no importances", Importances, IMPORTANCES, "", &["has no column \"st\"", "st,end,importance"]),
    bad("a word for an importance", Importances, "2,3,0,1,-0.5", "2,3,0,1,high", &["line 10: importance is \"high\""]),
    bad("importance not a number", Importances, "2,3,0,1,-0.5", "2,3,0,1,nan", &["line 10: segment (2,3]", "NaN"]),
    bad("infinite importance", Importances, "2,3,0,1,-0.5", "2,3,0,1,-inf", &["line 10: segment (2,3]", "-inf"]),
    bad("neither on nor off", Importances, "2,3,0,1", "2,3,2,1", &["line 10: act_st is \"2\", not 0 or 1"]),
    bad(
        "importance twice",
        Importances,
        "2,3,0,1",
        "2,3,1,1",
        &["line 10: segment (2,3]", "first in line 9", "remove"],
    ),
    bad(
        "importance of nothing",
        Importances,
        "2,3,0,1",
        "3,3,0,1",
        &["line 10: segment (3,3]", "holds no convolution"],
    ),
    bad("front of the network", Importances, "0,2,1,1", "0,2,0,1", &["line 3: segment (0,2]", "position 0 stays"]),
    bad("importance without a row", Importances, "2,3,0,1", "1,3,1,1", &["line 10: segment (1,3]", "no time in t.csv"]),
    bad(
        "a row without importance",
        Importances,
        "2,4,1,1,-0.5\n2,4,0,1,-0.5\n",
        "",
        &["no importance for segment (2,4]"],
    ),
    bad(
        "a variant less",
        Importances,
        "2,4,0,1,-0.5\n",
        "",
        &["no importance for segment (2,4] with act_st 0, act_end 1"],
    ),
    bad("no bottleneck", Importances, "3,4,1,0", "3,4,0,0", &["segment (3,4] with act_st 0", "linear bottlenecks"]),
    bad(
        "keys for whole segments",
        Importances,
        IMPORTANCES,
        "st,end,kernel,depthwise,importance\n0,1,3,1,-0.5\n",
        &["kernel"],
    ),
    bad("a field more", Importances, "2,3,0,1,-0.5", "2,3,0,1,-0.5,1", &["line 10: has 6 fields, the header 5"]),
];

fn solve(times: &[u8], importances: &[u8]) -> depthshrinker::Result<()> {
    let positions = positions();
    let table = LatencyTable::parse(Path::new("t.csv"), times)?;
    let importance = Importance::parse(Path::new("i.csv"), importances)?;
    let inputs = Inputs { table: &table, importance: Some(&importance), positions: Some(&positions), norms: None };
    let knobs = Knobs { budget_ms: 5.0, alpha: 1.6, latency_weight: 0.0, tolerance: 0.02, seed: 0 };
    select(Method::TwoStageDp, &inputs, &knobs).map(|_| ())
}

fn refuses(bad: &Bad) {
    let change = |of: Of, text: &str| {
        if bad.of != of {
            return text.to_owned();
        }
        assert!(text.contains(bad.replace), "nothing is changed");
        text.replacen(bad.replace, bad.with, 1)
    };
    let (times, importances) = (change(Times, TIMES), change(Importances, IMPORTANCES));
    let problem = solve(times.as_bytes(), importances.as_bytes()).unwrap_err().to_string();
    let file = if bad.of == Times { "t.csv: " } else { "i.csv: " };
    assert!(problem.starts_with(file) && problem.lines().count() == 1, "{problem}");
    assert!(bad.words.iter().all(|word| problem.contains(word)), "{:?} are not in: {problem}", bad.words);
}

fn sound_tables_are_taken() {
    solve(TIMES.as_bytes(), IMPORTANCES.as_bytes()).unwrap();
    // Spaces, other orders of rows and columns, and a segment's every variant.
    let spaced = TIMES.replace(',', " , ");
    let all = IMPORTANCES.replace("3,4,1,1", "3,4,1,1 ") + "0,2,1,0,-0.25\n2,4,1,0,-1\n2,4,0,0,-1\n";
    solve(spaced.as_bytes(), all.as_bytes()).unwrap();
    let reversed: Vec<&str> = TIMES.lines().skip(1).collect();
    let reversed = format!("id,st,end,time,stdev\n{}\n", reversed.into_iter().rev().collect::<Vec<_>>().join("\n"));
    assert_eq!(
        LatencyTable::parse(Path::new("a"), reversed.as_bytes()).unwrap().rows().map(|row| row.at).collect::<Vec<_>>(),
        LatencyTable::parse(Path::new("a"), TIMES.as_bytes()).unwrap().rows().map(|row| row.at).collect::<Vec<_>>(),
    );
    // What always runs.
    let table = LatencyTable::parse(Path::new("a"), format!("{TIMES}8,0,0,3,0\n9,4,4,0.5,0\n").as_bytes()).unwrap();
    assert_eq!((table.fixed_ms(), table.rows().count()), (3.5, 8));
}

fn no_text() {
    let problem = solve(b"st,end,time\n0,1,\xff\n", IMPORTANCES.as_bytes()).unwrap_err().to_string();
    assert!(problem.contains("line 2: is no text") && problem.lines().count() == 1, "{problem}");
}

/// A table that fits another method.
fn columns_of_another_method() {
    let positions = positions();
    let mut keyed = "st,end,time,kernel,depthwise\n".to_owned();
    for (at, key) in positions.candidates() {
        keyed.push_str(&format!("{},{},1,{},{}\n", at.st, at.end, key.kernel, key.depthwise));
    }
    let breaks = "st,end,time,breaks\n0,1,1,\"0,1\"\n1,2,1,\"1,2\"\n2,3,1,\"2,3\"\n3,4,1,\"3,4\"\n";
    let importance = Importance::parse(Path::new("i.csv"), IMPORTANCES.as_bytes()).unwrap();
    let knobs = Knobs { budget_ms: 5.0, alpha: 1.6, latency_weight: 0.0, tolerance: 0.02, seed: 0 };
    for method in Method::ALL {
        let problem = |times: &str| {
            let table = LatencyTable::parse(Path::new("t.csv"), times.as_bytes()).unwrap();
            let inputs =
                Inputs { table: &table, importance: Some(&importance), positions: Some(&positions), norms: None };
            select(method, &inputs, &knobs).map_or_else(|error| error.to_string(), |_| String::new())
        };
        if method == Method::LayerMerge {
            assert!(problem(TIMES).contains("has no columns kernel,depthwise"));
            assert!(problem(&keyed).contains("no time in t.csv"), "{}", problem(&keyed));
            let short = keyed.replacen("0,2,1,3,false\n", "", 1);
            assert_ne!(short, keyed);
            assert!(
                problem(&short).contains("no row for segment (0,2] with kernel 3, depthwise 0"),
                "{}",
                problem(&short)
            );
            let other = keyed.replacen("0,2,1,3,false\n", "0,2,1,5,false\n", 1);
            assert!(problem(&other).contains("segment (0,2] with kernel 5, depthwise 0 is none of plain"));
        } else {
            assert!(problem(&keyed).contains("has columns kernel,depthwise"), "{}", problem(&keyed));
        }
        if !matches!(method, Method::TwoStageDp | Method::Fastest | Method::LayerMerge) {
            assert!(problem(breaks).contains("table of optimal splits"), "{}", problem(breaks));
        }
        // Without what a method needs.
        let table = LatencyTable::parse(Path::new("t.csv"), TIMES.as_bytes()).unwrap();
        let nothing = Inputs { table: &table, importance: None, positions: None, norms: None };
        match select(method, &nothing, &Knobs { budget_ms: 100.0, ..knobs }) {
            Ok(_) => assert!(!method.needs_importance() && !method.needs_network()),
            Err(error) => {
                let (problem, name) = (error.to_string(), method.name());
                assert!(problem.contains(&format!("--method {name} needs --")), "{problem}");
                assert!(method.needs_importance() || method.needs_network());
            }
        }
    }
}

pub fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> =
        BAD.iter().map(|bad| trial(format!("tables/{}", bad.name), move || refuses(bad))).collect();
    trials.extend([
        trial("tables/that are sound", sound_tables_are_taken),
        trial("tables/of bytes", no_text),
        trial("tables/of another method", columns_of_another_method),
    ]);
    trials
}
