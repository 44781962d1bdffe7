//! Ways to choose blocks: every one by name through the whole job, and each provider's costs against an evaluation that
//! shares nothing with it.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use assert_cmd::Command;
use clap::ValueEnum;
use depthshrinker::data::{Augment, Loader};
use depthshrinker::device::Device;
use depthshrinker::engine::{Engine, EngineOptions, Fusion};
use depthshrinker::graph::{Graph, NodeId, Op, SiteId};
use depthshrinker::io::{ModelInfo, read_model, write_model};
use depthshrinker::measure::{LatencyRow, LatencyTable};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::providers::{
    ActivationInputs, Asked, BlockCosts, BlockDrop, Features, FewSteps, InputCounts, Judge, Measures, NnMass, Provider,
    RemoveBlock, SensitivityConfig, clamped_shares, entropies, rank_sums, slope_gradients,
};
use depthshrinker::shrink::select::BlockOptions;
use depthshrinker::shrink::surgery::{Linearise, bypass, linearise};
use depthshrinker::shrink::{DistillConfig, Mask, SearchMethod, Selection};
use depthshrinker::train::{Interrupt, TrainConfig};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::networks::{plain_network, plain_times};
use crate::sensitivity::{folder, images, model};
use crate::trial;

/// What every way to choose blocks is known by, and whether it leaves `importance.csv` and ranks blocks.
const METHODS: [(&str, bool, bool); 18] = [
    ("learned", false, true),
    ("depthshrinker", false, true),
    ("layer-collapse", false, true),
    ("layer-folding", false, true),
    ("updp", false, false),
    ("few-steps", true, true),
    ("two-stage-dp", true, false),
    ("layer-merge", true, false),
    ("consensus", true, true),
    ("sensitivity", true, true),
    ("gradient", true, true),
    ("entropy", true, true),
    ("ira", true, true),
    ("remove-block", false, true),
    ("block-drop", false, true),
    ("nn-mass", false, true),
    ("no-residual", false, true),
    ("random", false, false),
];

/// A folder for methods of single layers, which train for each of many segments: a network that sees images at half their size,
/// and settings under which only its first blocks can be freed, with the padding at the front.
pub fn folder_for_layers() -> tempfile::TempDir {
    let dir = folder();
    let options = NetworkOptions { head_channels: Some(16), ..NetworkOptions::new(Shape::new(28, 28, 1), 10) };
    let model = Model::initialise(build("mobilenetv2-0.1", &options).unwrap(), 2).unwrap();
    write_model(&dir.path().join("small.safetensors"), &model, &ModelInfo::default()).unwrap();
    let few = fs::read_to_string(dir.path().join("few.toml")).unwrap().replace("steps = 2", "steps = 1");
    let exclude: Vec<usize> = (3..17).collect();
    let early = format!("{few}[search.scores]\nexclude = {exclude:?}\n[merge]\npadding = \"reorder\"\n");
    fs::write(dir.path().join("early.toml"), early).unwrap();
    dir
}

pub fn depthshrinker(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("depthshrinker").expect("the binary of this package");
    command.current_dir(dir).args(args).args(["--train-limit", "120", "--test-limit", "40", "--device", "cpu"]);
    command
}

pub fn json(mut command: Command) -> Value {
    let output = command.arg("--json").assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).expect("one JSON value on stdout")
}

pub fn logits(model: &Model, images: &[f32]) -> Vec<f32> {
    let batch = images.len() / model.graph.input_shape().len();
    let options = EngineOptions { batch, fusion: Fusion::PerNode, training: false, taps: Vec::new() };
    let mut engine = Engine::new(&Device::Cpu, model, &options).unwrap();
    let out = engine.forward(images).unwrap();
    let mut values = vec![0.0; out.len()];
    out.read(&mut values).unwrap();
    values
}

/// Methods of single layers, which choose no blocks.
fn of_layers(name: &str) -> bool {
    ["two-stage-dp", "layer-merge"].contains(&name)
}

/// Selection, finetuning, merge: the merged network gives what the unmerged one gives, and the plan keeps the budget.
fn whole_job() {
    let dir = folder_for_layers();
    let noise: Vec<f32> = (0..8 * 28 * 28).map(|i| ((i * 7919 % 1013) as f32 / 500.0) - 1.0).collect();
    for (name, measures, ranks) in METHODS {
        let (start, config) =
            if of_layers(name) { ("small.safetensors", "early.toml") } else { ("m.safetensors", "few.toml") };
        let args = [
            &["shrink", "--model", start, "--config", config, "--method", name, "--out", name][..],
            &["--latency-fraction", "0.85", "--search-epochs", "2", "--finetune-epochs", "1", "--batch", "40"],
        ];
        let result = json(depthshrinker(dir.path(), &args.concat()));
        let at = dir.path().join(name);
        let [unmerged, merged] =
            ["shrunk.safetensors", "merged.safetensors"].map(|file| read_model(&at.join(file)).unwrap().0);
        let freed = result["kept"].as_array().unwrap().iter().filter(|kept| **kept == 0).count();
        let original = read_model(&dir.path().join(start)).unwrap().0;
        let bypasses = ["remove-block", "block-drop"].contains(&name);
        // What is bypassed is gone before the merge, which finds nothing to do.
        let before = if bypasses { &original } else { &unmerged };
        assert!(freed > 0 && merged.graph.nodes.len() < before.graph.nodes.len(), "{name}");
        assert_eq!((unmerged.graph == merged.graph, result["merge"]["segments"] == 0), (bypasses, bypasses), "{name}");
        let (a, b) = (logits(&unmerged, &noise), logits(&merged, &noise));
        let scale = a.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        let error = a.iter().zip(&b).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(error <= 2e-5 * scale, "{name}: {error} of {scale}");

        let plan = Selection::read(&at.join("plan.json")).unwrap();
        assert_eq!(serde_json::to_value(&plan.keep).unwrap(), result["kept"], "{name}");
        assert_eq!((!plan.scores.is_empty(), at.join("importance.csv").is_file()), (ranks, measures), "{name}");
        let positions = original.graph.positions().unwrap();
        let of_blocks = || {
            let table = LatencyTable::read(&at.join("latency.csv")).unwrap();
            let options = BlockOptions::new(&positions, &table, None).unwrap();
            let options = if bypasses { options.bypassed() } else { options };
            options.time_ms(&plan.keep) / options.time_ms(&Mask::all(positions.blocks().len()))
        };
        assert_eq!((plan.layers.is_some(), plan.latency_share.is_some()), (of_layers(name), of_layers(name)), "{name}");
        let share = plan.latency_share.unwrap_or_else(of_blocks);
        assert_eq!(result["latency_share"], share, "{name}");
        assert!(share <= 0.85 * (1.0 + 1e-12), "{name}: {share}");
        let config = fs::read_to_string(at.join("config.toml")).unwrap();
        assert!(config.contains(&format!("method = \"{name}\"")), "{name}");
    }
}

/// A number of blocks instead of a time, and a seed of the choice alone.
fn sizes_and_seeds() {
    let dir = folder();
    let search = |name: &str, seeds: &[&str], out: &str| {
        let args = ["search", "m.safetensors", "--method", name, "--remove", "6", "--epochs", "1", "--batch", "40"];
        let plan = json(depthshrinker(dir.path(), &[&args[..], seeds, &["--out", out]].concat()));
        assert_eq!(plan["kept"].as_array().unwrap().iter().filter(|kept| **kept == 0).count(), 6, "{name}");
        plan["kept"].clone()
    };
    for (name, ..) in METHODS {
        if of_layers(name) {
            let args = ["search", "m.safetensors", "--method", name, "--remove", "6"];
            let refused = depthshrinker(dir.path(), &args).assert().failure().get_output().stderr.clone();
            let text = String::from_utf8(refused).unwrap();
            assert!(text.contains(name) && text.contains("needs a budget that is a time"), "{text}");
            continue;
        }
        search(name, &["--config", "few.toml"], name);
    }
    fs::write(dir.path().join("seed.toml"), "[search]\nseed = 5\n").unwrap();
    let of = |seed, config, out| search("random", &["--seed", seed, "--config", config], out);
    let masks = [of("5", "few.toml", "a"), of("1", "seed.toml", "b"), of("1", "few.toml", "c")];
    assert_eq!(masks[0], masks[1]);
    assert_ne!(masks[0], masks[2]);
}

/// Names are the same in settings and on the command line, and in the order of this file; behind them those that take channels.
fn names() {
    let names = METHODS.iter().map(|(name, ..)| *name).chain(crate::widths::METHODS).chain(crate::operators::METHODS);
    assert_eq!(names.clone().count(), SearchMethod::ALL.len());
    for (method, name) in SearchMethod::ALL.into_iter().zip(names) {
        assert_eq!(method.to_string(), name);
        assert_eq!(method.to_possible_value().unwrap().get_name(), name);
        assert_eq!(serde_json::to_value(method).unwrap(), name);
    }
    assert_eq!(SearchMethod::value_variants(), SearchMethod::ALL);
}

fn counts(site: usize, below: &[u64], above: &[u64], values: u64) -> InputCounts {
    let (node, site) = (NodeId::new(1), SiteId::new(site));
    InputCounts { node, site, below: below.to_vec(), above: above.to_vec(), values }
}

/// By hand: entropies of a half, a quarter, none and all; shares of what lies outside of the bounds.
fn by_hand() {
    let inputs = ActivationInputs::new(vec![
        counts(0, &[4, 0], &[0, 0], 8),
        counts(0, &[2, 8], &[0, 0], 8),
        counts(1, &[2, 1], &[1, 4], 8),
    ]);
    let quarter = 2.0 - 0.75 * 3f64.log2();
    let eighth = 3.0 - 0.875 * 7f64.log2();
    let close = |costs: BlockCosts, expected: [f64; 2]| {
        for (cost, expected) in costs.costs().iter().zip(expected) {
            assert!((cost.unwrap() - expected).abs() < 1e-12, "{cost:?} and {expected}");
        }
    };
    close(entropies(&inputs, &[true, true]), [0.5 * (0.5 + 0.5 * quarter), 0.5 * (quarter + eighth)]);
    close(clamped_shares(&inputs, &[true, true]), [0.5 * (4.0 / 16.0 + 10.0 / 16.0), 8.0 / 16.0]);
    let without = entropies(&inputs, &[false, true]);
    assert_eq!((without.costs()[0], without.scores()), (None, vec![1.0, 1.0]));
    // Costs below 0 are the first to go; the largest is 1.
    let costs = BlockCosts::new(vec![Some(-1.0), Some(2.0), None, Some(1.0)]);
    assert_eq!(costs.scores(), [0.0, 1.0, 1.0, 0.5]);
}

const CONFIG: SensitivityConfig = SensitivityConfig { images: 40, recalibration: 0, batch: 16, steps: 3 };

/// The images that are set apart, normalised.
fn held_out() -> Vec<f32> {
    let set = images(80);
    let held_out = Arc::new(set.subset(&set.shuffled(3, 0)[..40]).unwrap());
    Loader::eval(held_out, 40).unwrap().epoch(0, 0).next().unwrap().unwrap().images
}

/// Counts are those of the values that the network gives if it ends before the activation, for any batch.
fn counted_inputs() {
    let (model, set, interrupt) = (model(), images(80), Interrupt::new());
    let of_batch = |batch| {
        let config = SensitivityConfig { batch, ..CONFIG };
        let judge = Judge::new(&Device::Cpu, &set, &config, 3, &interrupt).unwrap();
        let mut passes = (0, 0);
        let inputs = judge.activation_inputs(&model, &mut |done, total| passes = (done, total)).unwrap();
        assert_eq!(passes, (40usize.div_ceil(batch), 40usize.div_ceil(batch)));
        inputs
    };
    let inputs = of_batch(16);
    assert_eq!(inputs, of_batch(40));
    let sites = model.graph.nodes.iter().filter(|node| node.site().is_some()).count();
    assert_eq!(inputs.activations().len(), sites);
    for counts in inputs.activations().iter().step_by(5) {
        let read = model.graph.nodes[counts.node].inputs[0];
        let nodes = model.graph.nodes[..=read.index()].to_vec();
        let cut = Graph { nodes, blocks: Vec::new(), ..model.graph.clone() };
        let names = cut.params().unwrap().into_iter().map(|param| param.name);
        let weights = names.map(|name| (name.clone(), model.weights[&name].clone())).collect();
        let values = logits(&Model::new(cut, weights).unwrap(), &held_out());
        let channels = counts.below.len();
        let Op::Activation(activation) = model.graph.nodes[counts.node].op else { panic!("an activation") };
        for channel in 0..channels {
            let of_channel = || values.iter().skip(channel).step_by(channels);
            assert_eq!(counts.below[channel], of_channel().filter(|x| **x < 0.0).count() as u64);
            let limit = activation.limit.unwrap();
            assert_eq!(counts.above[channel], of_channel().filter(|x| **x > limit).count() as u64);
        }
        assert_eq!(counts.values as usize, values.len() / channels);
        assert!(counts.below.iter().sum::<u64>() > 0);
    }
}

/// The mean loss of one batch under slopes, with the batch's statistics.
fn loss(engine: &mut Engine, slopes: &[f32], images: &[f32], labels: &[u32]) -> f64 {
    engine.set_slopes(slopes).unwrap();
    let out = engine.forward(images).unwrap();
    let mut logits = vec![0.0f32; out.len()];
    out.read(&mut logits).unwrap();
    let classes = logits.len() / labels.len();
    let of_image = |(row, &label): (&[f32], &u32)| {
        let sum: f64 = row.iter().map(|&v| f64::from(v).exp()).sum();
        sum.ln() - f64::from(row[label as usize])
    };
    logits.chunks_exact(classes).zip(labels).map(of_image).sum::<f64>() / labels.len() as f64
}

/// Gradients by the slope are differences of the loss, mean over whole batches, and leave the weights alone.
fn finite_differences() {
    let (model, set, interrupt) = (model(), images(80), Interrupt::new());
    let judge = Judge::new(&Device::Cpu, &set, &CONFIG, 3, &interrupt).unwrap();
    let gradients = slope_gradients(&judge, &model, &mut |_, _| {}).unwrap();
    assert_eq!(gradients, slope_gradients(&judge, &model, &mut |_, _| {}).unwrap());

    let held_out = Arc::new(set.subset(&set.shuffled(3, 0)[..40]).unwrap());
    let batches: Vec<_> =
        Loader::train(held_out, 16, Augment::none(), 3).unwrap().epoch(0, 0).map(Result::unwrap).collect();
    assert_eq!(batches.len(), 2);
    let options = EngineOptions { batch: 16, fusion: Fusion::PerNode, training: true, taps: Vec::new() };
    let mut engine = Engine::new(&Device::Cpu, &model, &options).unwrap();
    let sites = model.graph.sites();
    let mut mean = |site: usize, slope: f32| {
        let slopes: Vec<f32> = (0..sites).map(|s| if s == site { slope } else { 0.0 }).collect();
        batches.iter().map(|batch| loss(&mut engine, &slopes, &batch.images, &batch.labels)).sum::<f64>() / 2.0
    };
    for (site, &gradient) in gradients.iter().enumerate() {
        // A network with fresh weights bends so soon that only a short step tells its slope.
        let step = 3e-5;
        let difference = (mean(site, step) - mean(site, -step)) / (2.0 * f64::from(step));
        let error = (difference - gradient).abs();
        assert!(error < 0.08 * gradient.abs() + 0.004, "{site}: {difference} and {gradient}");
    }
}

/// Two images with two features: what each measure is by hand, and that equal features are 0 from one another.
fn similarities() {
    let features = |values: [[f32; 2]; 3]| Features::new(&values.map(|image| image.to_vec()));
    let own = features([[0.0, 1.0], [1.0, 3.0], [2.0, 2.0]]);
    let other = features([[2.0, 1.0], [0.0, 2.0], [1.0, 6.0]]);
    let found = own.measures(&other);
    // Centred: (−1, −1), (0, 1), (1, 0) and (1, −2), (−1, −1), (0, 3).
    let (x, y) = ([[-1.0, -1.0], [0.0, 1.0], [1.0, 0.0]], [[1.0, -2.0], [-1.0, -1.0], [0.0, 3.0f64]]);
    let pair = |a: [f64; 2], b: [f64; 2]| a[0] * b[0] + a[1] * b[1];
    let (mut both, mut of_x, mut of_y) = (0.0, 0.0, 0.0);
    for i in 0..3 {
        for j in 0..3 {
            let (k, l) = (pair(x[i], x[j]), pair(y[i], y[j]));
            (both, of_x, of_y) = (both + k * l, of_x + k * k, of_y + l * l);
        }
    }
    let close = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-9, "{got} and {expected}");
    close(found.cka, 1.0 - both / (of_x * of_y).sqrt());
    // Sorted: 0, 1, 2 both times, and 1, 2, 3 beside 1, 2, 6.
    close(found.wasserstein, 0.5 * 1.0);
    let inner: f64 = (0..3).map(|i| pair(x[i], y[i])).sum();
    close(found.angle, (inner / (4.0f64 * 16.0).sqrt()).acos());
    let none = own.measures(&own);
    assert!(none.cka.abs() < 1e-12 && none.wasserstein == 0.0 && none.angle < 1e-7, "{none:?}");
    let of = |cka, wasserstein, angle| Measures { cka, wasserstein, angle };
    assert_eq!(rank_sums(&[of(0.1, 5.0, 0.3), of(0.4, 5.0, 0.2), of(0.2, 1.0, 0.3)]), [2.0, 3.0, 2.0]);
}

/// Features are what the classifier reads: with its weights they give the logits. A short training leaves the network itself
/// alone, repeats, and is what the cost of a block is taken after.
fn features_and_few_steps() {
    let (model, set, interrupt) = (model(), images(120), Interrupt::new());
    let judge = Judge::new(&Device::Cpu, &set, &CONFIG, 3, &interrupt).unwrap();
    let features = judge.features(&model, 10).unwrap();
    assert_eq!(features.len(), 10);
    let held_out = Arc::new(set.subset(&set.shuffled(3, 0)[..10]).unwrap());
    let pixels = Loader::eval(held_out, 10).unwrap().epoch(0, 0).next().unwrap().unwrap().images;
    let expected = logits(&model, &pixels);
    let last = &model.graph.nodes[model.graph.output()].name;
    let tensor = |name: &str| &model.weights[&format!("{last}.{name}")].data;
    let classes = model.graph.classes();
    for (image, features) in features.iter().enumerate() {
        for class in 0..classes {
            let row = &tensor("weight")[class * features.len()..(class + 1) * features.len()];
            let logit = row.iter().zip(features).map(|(w, x)| w * x).sum::<f32>() + tensor("bias")[class];
            assert!((logit - expected[image * classes + class]).abs() < 1e-4);
        }
    }

    let train = TrainConfig { batch: 16, lr: 0.05, augment: Augment::none(), ..TrainConfig::default() };
    let positions = model.graph.positions().unwrap();
    let table = plain_times_of(&model);
    let options = BlockOptions::new(&positions, &table, None).unwrap();
    let surgery = Linearise { final_activation: true, padding: PaddingMode::BorderBias };
    let mut candidates = vec![false; 17];
    (candidates[2], candidates[9]) = (true, true);
    let asked = Asked {
        judge: &judge,
        model: &model,
        candidates: &candidates,
        linearise: &surgery,
        options: &options,
        train: &train,
        distill: &DistillConfig::default(),
    };
    let mut passes = Vec::new();
    let costs = FewSteps.costs(&asked, &mut |done, total| passes.push((done, total))).unwrap().unwrap();
    assert_eq!(passes, [(0, 3), (1, 3), (2, 3), (3, 3)]);
    let whole = judge.evaluate(&model).unwrap().top1;
    for (block, &candidate) in candidates.iter().enumerate() {
        let cost = candidate.then(|| {
            let kept: Vec<bool> = (0..17).map(|b| b != block).collect();
            let freed = linearise(&model, &kept, &surgery).unwrap();
            let trained = judge.trained(&freed, &train).unwrap();
            assert_ne!(trained.weights, freed.weights);
            whole - judge.evaluate(&trained).unwrap().top1
        });
        assert_eq!(costs.costs()[block], cost, "{block}");
    }
    let mass = NnMass.costs(&asked, &mut |_, _| {}).unwrap().unwrap();
    let shapes = model.graph.shapes().unwrap();
    let channels = |block: usize| shapes[model.graph.blocks[block].output()].c as f64;
    assert_eq!((mass.costs()[2], mass.costs()[9]), (Some(2.0 * channels(2)), Some(2.0 * channels(9))));
}

/// A table of a network in which every convolution takes 1 ms.
fn plain_times_of(model: &Model) -> LatencyTable {
    let positions = model.graph.positions().unwrap();
    let mut segments: Vec<_> = positions.segments().collect();
    segments.extend(positions.blocks().iter().map(|block| block.at));
    segments.sort();
    segments.dedup();
    let rows = segments.into_iter().map(|at| LatencyRow::new(at, 1.0)).collect();
    LatencyTable::new(Path::new("t.csv"), rows).unwrap()
}

/// With a threshold blocks go whose slope has reached it, whatever the budget; the order of slopes is that of the scores.
fn thresholds() {
    let dir = folder();
    let few = fs::read_to_string(dir.path().join("few.toml")).unwrap();
    let write = |name: &str, lines: &str| {
        fs::write(dir.path().join(name), format!("{few}\n[search.slopes]\nweight = 50.0\n{lines}\n")).unwrap();
    };
    write("plain.toml", "");
    write("threshold.toml", "threshold = 0.15");
    let plan = |config: &str| {
        let args =
            ["search", "m.safetensors", "--method", "layer-collapse", "--remove", "2", "--epochs", "3", "--batch"];
        json(depthshrinker(dir.path(), &[&args[..], &["40", "--config", config, "--out", &config[..4]]].concat()))
    };
    let (plain, beyond) = (plan("plain.toml"), plan("threshold.toml"));
    assert_eq!(plain["scores"], beyond["scores"]);
    for (block, score) in plain["scores"].as_array().unwrap().iter().enumerate() {
        let (score, kept) = (score.as_f64().unwrap(), |plan: &Value| plan["kept"][block].as_u64().unwrap() == 1);
        assert_eq!(kept(&beyond), kept(&plain) && score > 0.85, "block {block}: {score}");
    }
    assert!(beyond["kept"] != plain["kept"], "{}", plain["scores"]);
}

/// Without a block the network computes what it does where the block's output is its input; a block that changes the shape
/// cannot go. The first to be dropped is the one of the least loss.
fn bypassed_blocks() {
    let (model, set, interrupt) = (model(), images(120), Interrupt::new());
    let graph = &model.graph;
    let positions = graph.positions().unwrap();
    let residual: Vec<usize> = (0..17).filter(|&block| positions.blocks()[block].has_residual).collect();
    let other = (0..17).find(|block| !residual.contains(block)).expect("a block that changes the shape");
    let kept = |gone: &[usize]| (0..17).map(|block| !gone.contains(&block)).collect::<Vec<bool>>();
    let refused = bypass(&model, &kept(&[other])).unwrap_err().to_string();
    assert!(refused.contains("no shortcut") && refused.contains(&graph.blocks[other].name), "{refused}");

    // A block whose last batch-norm gives nothing adds nothing: the network without it is the same.
    let block = &graph.blocks[residual[3]];
    let last = graph.nodes[block.nodes].iter().rev().find(|node| matches!(node.op, Op::BatchNorm(_))).unwrap();
    let mut weights = model.weights.clone();
    for name in ["weight", "bias"] {
        weights.get_mut(&format!("{}.{name}", last.name)).unwrap().data.fill(0.0);
    }
    let silent = Model::new(graph.clone(), weights).unwrap();
    let gone = bypass(&silent, &kept(&residual[3..4])).unwrap();
    assert_eq!(gone.graph.nodes.len(), graph.nodes.len() - block.nodes.len());
    let pixels = held_out();
    let (a, b) = (logits(&silent, &pixels), logits(&gone, &pixels));
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-6));
    assert_eq!(bypass(&gone, &kept(&residual[3..4])).unwrap(), gone);

    let judge = Judge::new(&Device::Cpu, &set, &CONFIG, 3, &interrupt).unwrap();
    let candidates: Vec<bool> = (0..17).map(|block| residual[..2].contains(&block)).collect();
    let table = plain_times_of(&model);
    let options = BlockOptions::new(&positions, &table, None).unwrap().bypassed();
    let surgery = Linearise { final_activation: true, padding: PaddingMode::BorderBias };
    let (train, distill) = (TrainConfig::default(), DistillConfig::default());
    let asked = Asked {
        judge: &judge,
        model: &model,
        candidates: &candidates,
        linearise: &surgery,
        options: &options,
        train: &train,
        distill: &distill,
    };
    let loss = |gone: &[usize]| judge.evaluate(&bypass(&model, &kept(gone)).unwrap()).unwrap().loss;
    let [a, b] = [residual[0], residual[1]];
    let removed = RemoveBlock.costs(&asked, &mut |_, _| {}).unwrap().unwrap();
    assert_eq!(removed.costs()[a], Some(loss(&[a]) - judge.evaluate(&model).unwrap().loss));
    let dropped = BlockDrop.costs(&asked, &mut |_, _| {}).unwrap().unwrap();
    let order = if loss(&[a]) <= loss(&[b]) { (1.0, 2.0) } else { (2.0, 1.0) };
    assert_eq!((dropped.costs()[a], dropped.costs()[b]), (Some(order.0), Some(order.1)));
    // Freed blocks take no time, and only those with a shortcut can be freed.
    for (block, option) in options.blocks().iter().enumerate() {
        assert_eq!(option.stays, !residual.contains(&block));
        assert_eq!(option.merged_ms, if option.stays { option.kept_ms } else { 0.0 });
    }
}

/// The size that a trained search keeps for a time, and the ranking that it is read by.
fn times_of_rankings() {
    let positions = plain_network(&[true; 4]).positions().unwrap();
    // Kept blocks take 4 ms each here, what always runs none.
    let table = plain_times(&positions, &[1.0, 2.0, 3.0, 4.0]);
    let options = BlockOptions::new(&positions, &table, None).unwrap();
    let whole = options.time_ms(&Mask::all(4));
    let size = |missing: f64| options.expected_size(whole - missing).to_string();
    let mean = options.blocks()[..3].iter().map(|block| block.saving_ms()).sum::<f64>() / 3.0;
    assert_eq!(options.candidates(), [true, true, true, options.blocks()[3].saving_ms() > 0.0]);
    let free = options.candidates().iter().filter(|c| **c).count();
    let of_all = options.blocks().iter().map(|b| b.saving_ms()).filter(|s| *s > 0.0).sum::<f64>() / free as f64;
    assert!(mean >= of_all);
    assert_eq!(size(0.0), "remove 1");
    assert_eq!(size(1.5 * of_all), "remove 2");
    assert_eq!(size(100.0 * of_all), format!("remove {free}"));
    let kept = |budget: f64| options.ranked(&[0.1, 0.9, 0.5, 0.7], budget).unwrap().kept.unwrap().to_string();
    let first = options.blocks()[0].saving_ms();
    assert_eq!(kept(whole), "1,1,1,1");
    assert_eq!(kept(whole - first), "0,1,1,1");
    assert_eq!(kept(whole - first - 1e-6), "0,1,0,1");
}

pub fn trials() -> Vec<Trial> {
    vec![
        trial("providers/names", names),
        trial("providers/whole job", whole_job),
        trial("providers/sizes and seeds", sizes_and_seeds),
        trial("providers/by hand", by_hand),
        trial("providers/counted inputs", counted_inputs),
        trial("providers/finite differences", finite_differences),
        trial("providers/similarities", similarities),
        trial("providers/features and few steps", features_and_few_steps),
        trial("providers/bypassed blocks", bypassed_blocks),
        trial("providers/thresholds", thresholds),
        trial("providers/times of rankings", times_of_rankings),
    ]
}
