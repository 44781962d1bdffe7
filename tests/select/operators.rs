//! An operator for each block: against all choices by brute force, and through the whole job.

use std::path::Path;

use assert_cmd::Command;
use depthshrinker::io::read_model;
use depthshrinker::measure::LatencyTable;
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::select::{BlockOptions, Operator, OperatorValues, Operators};
use depthshrinker::shrink::surgery::{Linearise, linearise};
use depthshrinker::shrink::{Importance, Mask, Selection};
use libtest_mimic::Trial;

use crate::networks::{plain_network, plain_times};
use crate::providers::{depthshrinker, json, logits};
use crate::sensitivity::folder;
use crate::trial;

/// The methods that choose operators.
pub const METHODS: [&str; 2] = ["operators", "ran-operators"];

/// The choice of the highest value within a time is that of all choices.
fn operators() {
    let residuals = [true, false, true, true, false];
    let graph = plain_network(&residuals);
    let positions = graph.positions().unwrap();
    let table = plain_times(&positions, &[1.0, 2.5, 3.0, 0.5, 4.5]);
    let options = BlockOptions::with_kept(&positions, &table, None, &[false, false, false, false, true]).unwrap();
    let masses = [4, 6, 5, 7, 3].map(OperatorValues::mass);
    // A bypass that costs less than the merge, more, or even helps.
    let rises = [(0.5, 0.3), (0.9, 0.0), (0.2, 0.7), (0.4, -0.1), (0.0, 0.0)];
    let rises = rises.map(|(m, b)| OperatorValues { kept: 0.0, merged: -m, bypassed: -b });
    let forms = [Operator::Kept, Operator::Merged, Operator::Bypassed];
    let all: Vec<Operators> = (0..3usize.pow(5))
        .map(|code| Operators::new((0..5).map(|block| forms[code / 3usize.pow(block) % 3]).collect()))
        .filter(|of| of.operators()[4] == Operator::Kept)
        .filter(|of| of.operators().iter().zip(residuals).all(|(of, has)| has || *of != Operator::Bypassed))
        .collect();
    assert_eq!(all.len(), 3 * 2 * 3 * 3);
    let value = |values: &[OperatorValues; 5], operators: &Operators| -> f64 {
        let of = |(of, values): (&Operator, &OperatorValues)| match of {
            Operator::Kept => values.kept,
            Operator::Merged => values.merged,
            Operator::Bypassed => values.bypassed,
        };
        operators.operators().iter().zip(values).map(of).sum()
    };
    let least = all.iter().map(|of| options.operators_ms(of)).fold(f64::INFINITY, f64::min);
    assert!((options.least_operators_ms() - least).abs() < 1e-12);
    let whole = options.time_ms(&Mask::all(5));
    let budgets = [1.0, 0.9, 0.7, 0.5, 0.4].map(|share| share * whole).into_iter().chain([least]);
    for (budget, values) in budgets.flat_map(|budget| [(budget, masses), (budget, rises)]) {
        let found = options.operators(&values, budget).unwrap();
        assert!(options.operators_ms(&found) <= budget, "{found}");
        let fits = all.iter().filter(|of| options.operators_ms(of) <= budget);
        let best = fits.map(|of| value(&values, of)).fold(f64::NEG_INFINITY, f64::max);
        let got = value(&values, &found);
        assert!((got - best).abs() < 1e-7, "{found}: {got} and {best}");
        let selection = found.selection(&graph);
        assert_eq!(Operators::of(&selection, &graph), found);
        assert_eq!(serde_json::from_value::<Selection>(serde_json::to_value(&selection).unwrap()).unwrap(), selection);
    }
    random_ones(&options, (whole, least));
    assert!(options.operators(&masses, 0.99 * least).unwrap_err().to_string().contains("the fastest takes"));
    let mixed: Operators = all.iter().find(|of| of.to_string() == "bmkmk").unwrap().clone();
    assert_eq!(mixed.selection(&graph).bypassed, ["0"]);
    assert_eq!(mixed.selection(&graph).keep.to_string(), "0,0,1,0,1");
}

/// Different choices that take nearly a whole time and give no block what makes it slower.
fn random_ones(options: &BlockOptions<'_>, (whole, least): (f64, f64)) {
    let draw = |seed| options.random_operators(0.7 * whole, 0.2, seed, 8).unwrap();
    let drawn = draw(3);
    assert!(drawn == draw(3) && drawn != draw(4) && drawn.len() == 8);
    let mut forms = [0; 3];
    for (index, operators) in drawn.iter().enumerate() {
        let share = options.operators_ms(operators) / (0.7 * whole);
        assert!((0.8..=1.0).contains(&share) && !drawn[..index].contains(operators), "{operators}: {share}");
        for (block, operator) in options.blocks().iter().zip(operators.operators()) {
            assert!(!block.stays || *operator == Operator::Kept, "{operators}");
            assert!(block.has_residual || *operator != Operator::Bypassed, "{operators}");
            assert!(block.saving_ms() > 0.0 || *operator != Operator::Merged, "{operators}");
            forms[*operator as usize] += 1;
        }
    }
    assert!(forms.iter().all(|count| *count > 0), "{forms:?}");
    let errors =
        [(0.99 * least, 1), (0.7 * whole, 10_000)].map(|(ms, count)| options.random_operators(ms, 0.2, 3, count));
    let [fast, many] = errors.map(|error| error.unwrap_err().to_string());
    assert!(fast.contains("the fastest takes") && many.contains("of 10000 random selections"), "{fast} {many}");
}

/// Some blocks merge, others are bypassed, others stay.
fn whole_job() {
    let dir = folder();
    let args =
        ["shrink", "--model", "m.safetensors", "--config", "few.toml", "--method", "ran-operators", "--out", "o"];
    let more = ["--latency-fraction", "0.3", "--finetune-epochs", "1", "--batch", "40", "--compare-random", "1"];
    let result = json(depthshrinker(dir.path(), &[&args[..], &more].concat()));
    // Merges alone take no so little time.
    assert_eq!(result["random_masks"].as_array().unwrap().len(), 1);
    let at = dir.path().join("o");
    let plan = Selection::read(&at.join("plan.json")).unwrap();
    let read = |path: &Path| read_model(path).unwrap().0;
    let (original, shrunk) = (read(&dir.path().join("m.safetensors")), read(&at.join("shrunk.safetensors")));
    let merged = read(&at.join("merged.safetensors"));
    let of = Operators::of(&plan, &original.graph);
    let count = |form: Operator| of.operators().iter().filter(|of| **of == form).count();
    assert!(count(Operator::Bypassed) > 0 && count(Operator::Merged) > 0 && count(Operator::Kept) > 0, "{of}");
    assert_eq!(result["merge"]["segments"], count(Operator::Merged));
    assert_eq!(result["bypassed"].as_array().unwrap().len(), count(Operator::Bypassed));
    assert_eq!(result["method"], "ran-operators");
    for ((block, graph), form) in merged.graph.blocks.iter().zip(&shrunk.graph.blocks).zip(of.operators()) {
        let (is, was) = (block.nodes.iter().count(), graph.nodes.iter().count());
        match form {
            Operator::Kept => assert_eq!(is, was),
            Operator::Merged => assert!(is < was),
            Operator::Bypassed => assert_eq!((is, was), (0, 0)),
        }
    }
    let share = result["latency_share"].as_f64().unwrap();
    assert!(share <= 0.3 && share > 0.25, "{share}");
    let noise: Vec<f32> = (0..4 * 28 * 28).map(|i| ((i * 7919 % 1013) as f32 / 500.0) - 1.0).collect();
    let (a, b) = (logits(&shrunk, &noise), logits(&merged, &noise));
    let scale = a.iter().fold(0.0f32, |most, v| most.max(v.abs()));
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 2e-5 * scale));

    // The plan alone gives the same, twice applied the same again.
    let mut merge = Command::cargo_bin("depthshrinker").unwrap();
    merge.current_dir(dir.path()).args([
        "merge",
        "o/shrunk.safetensors",
        "--plan",
        "o/plan.json",
        "-o",
        "n.safetensors",
    ]);
    merge.assert().success();
    assert_eq!(read(&dir.path().join("n.safetensors")), merged);
    let finetune = ["finetune", "m.safetensors", "--config", "few.toml", "--plan", "o/plan.json", "--out", "f"];
    json(depthshrinker(dir.path(), &[&finetune[..], &["--epochs", "1", "--batch", "40"]].concat()));
    assert_eq!(read(&dir.path().join("f/shrunk.safetensors")), shrunk);
    let kept = Selection { bypassed: vec!["blocks.0.0".into(), "nothing".into()], ..plan };
    let surgery = Linearise { final_activation: true, padding: PaddingMode::BorderBias };
    let error = linearise(&original, &kept, &surgery).unwrap_err().to_string();
    assert!(error.contains("to be bypassed"), "{error}");
    for method in METHODS {
        let mut sized = depthshrinker(dir.path(), &["search", "m.safetensors", "--method", method, "--keep", "9"]);
        let told = sized.assert().failure().get_output().stderr.clone();
        assert!(String::from_utf8_lossy(&told).contains("needs a budget that is a time"));
    }
}

/// By measured losses: the time is kept, and no block is better off merged instead of kept, or kept instead of merged, by what
/// `sensitivity` measures of the same images.
fn measured() {
    let dir = folder();
    let search = |method: &str| {
        let args = ["search", "m.safetensors", "--config", "few.toml", "--latency-fraction", "0.5", "--method", method];
        json(depthshrinker(dir.path(), &[&args[..], &["--out", method]].concat()));
        Selection::read(&dir.path().join(method).join("plan.json")).unwrap()
    };
    let (mixed, merging, bypassing) = (search("operators"), search("sensitivity"), search("remove-block"));
    assert!(!merging.bypass && bypassing.bypass && !mixed.bypass);
    let graph = read_model(&dir.path().join("m.safetensors")).unwrap().0.graph;
    let positions = graph.positions().unwrap();
    let table = LatencyTable::read(&dir.path().join("operators/latency.csv")).unwrap();
    let importance = Importance::read(&dir.path().join("sensitivity/importance.csv")).unwrap();
    let options = BlockOptions::new(&positions, &table, Some(&importance)).unwrap();
    let of = Operators::of(&mixed, &graph);
    let count = |form: Operator| of.operators().iter().filter(|of| **of == form).count();
    assert!(count(Operator::Kept) > 0 && count(Operator::Merged) + count(Operator::Bypassed) > 0, "{of}");
    // What a shortcut takes is nothing, so with bypasses as many blocks or more can stay as with merges alone.
    assert!(mixed.keep.count() >= merging.keep.count().min(bypassing.keep.count()), "{of}");
    let (time, budget) = (options.operators_ms(&of), 0.5 * options.time_ms(&Mask::all(graph.blocks.len())));
    assert!(time <= budget, "{of}: {time} of {budget} ms");
    for (index, (block, operator)) in options.blocks().iter().zip(of.operators()).enumerate() {
        match operator {
            Operator::Kept if block.saving_ms() >= 0.0 => assert!(block.importance <= 1e-6, "{of}: block {index}"),
            Operator::Merged if time + block.saving_ms() <= budget => {
                assert!(block.importance >= -1e-6, "{of}: block {index}");
            }
            _ => {}
        }
    }
}

pub fn trials() -> Vec<Trial> {
    vec![
        trial("operators/brute force", operators),
        trial("operators/whole job", whole_job),
        trial("operators/measured", measured),
    ]
}
