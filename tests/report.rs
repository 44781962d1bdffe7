//! The report's files as scripts and readers rely on them, and the roofline against independently made tables.

use std::time::Duration;

use depthshrinker::device::Backend;
use depthshrinker::device::Device;
use depthshrinker::dtype::Dtype;
use depthshrinker::engine::{Plan, Target};
use depthshrinker::graph::{Activation, Bias, Conv, Emitter, Graph, Node, NodeId, Op};
use depthshrinker::measure::{
    Change, KernelCost, Roofline, Summary, Utilization, block_costs, block_latencies, compare, kernel_costs,
    measure_peaks, network_latency, network_time, paired, plan_costs, utilization,
};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::ops::step::ComputeUnit;
use depthshrinker::report::{
    BlockResult, DataResult, LatencyResult, MachineResult, MaskTrial, MergeResult, MetricsLine, NetworkResult,
    NetworkStage, Page, RunResult, SCHEMA, StageTime, network_table,
};
use depthshrinker::shape::{Shape, Window};
use depthshrinker::shrink::SearchMethod;
use serde_json::{Value, json};

const BATCH: usize = 128;

fn imagenet(width: &str) -> Graph {
    build(&format!("mobilenetv2-{width}"), &NetworkOptions::new(Shape::new(224, 224, 3), 1000)).unwrap()
}

/// The limits that the tables below were made with: a data sheet's for the V100, a real copy's and matrix product's for
/// the H100.
const V100_F16: Roofline = Roofline { bandwidth: 900e9, matrix_flops: 112e12, vector_flops: 15.7e12, element_bytes: 2 };
const H100_BF16: Roofline = Roofline { bandwidth: 3.0e12, matrix_flops: 800e12, vector_flops: 67e12, element_bytes: 2 };

#[track_caller]
fn close(got: f64, expected: f64, tolerance: f64) {
    assert!((got - expected).abs() <= tolerance, "expected {expected} ± {tolerance}, got {got}");
}

/// Microseconds per block (three kernels, merged), width 1.0, batch 128: first block of a shape, V100 f16, H100 bf16.
/// Made from the formulas of the roofline by a separate program.
const BLOCKS: [(usize, [f64; 2], [f64; 2]); 12] = [
    (1, [400.0, 171.0], [120.0, 51.4]),
    (2, [935.0, 79.0], [280.0, 23.6]),
    (3, [578.0, 43.0], [173.0, 12.8]),
    (4, [350.0, 29.0], [105.0, 8.6]),
    (5, [193.0, 17.0], [58.0, 4.3]),
    (7, [118.0, 11.0], [35.0, 3.2]),
    (8, [96.0, 17.0], [29.0, 2.3]),
    (11, [95.0, 25.0], [28.0, 3.5]),
    (12, [145.0, 37.0], [43.0, 5.2]),
    (14, [88.0, 15.0], [26.0, 2.4]),
    (15, [62.0, 26.0], [18.0, 3.6]),
    (17, [78.0, 52.0], [18.0, 7.2]),
];

#[test]
fn block_rooflines_match_the_table() {
    let graph = imagenet("1.0");
    for (roofline, column) in [(V100_F16, 0), (H100_BF16, 1)] {
        let costs = block_costs(&graph, BATCH, &roofline).unwrap();
        assert_eq!(costs.len(), 17);
        for (block, v100, h100) in BLOCKS {
            let [before, after] = [v100, h100][column];
            let cost = &costs[block - 1];
            close(cost.before * 1e6, before, 0.55);
            close(cost.after * 1e6, after, if column == 0 { 0.55 } else { 0.06 });
            assert!(cost.saving() > 0.0, "{}", cost.name);
        }
    }
}

#[test]
fn network_rooflines_match_the_table() {
    for (width, roofline, folded, merged) in [
        ("1.0", V100_F16, 3.95, 1.09),
        ("1.0", H100_BF16, 1.17, 0.275),
        ("1.4", V100_F16, 5.74, 1.77),
        ("1.4", H100_BF16, 1.68, 0.42),
    ] {
        let graph = imagenet(width);
        let now = network_time(&graph, BATCH, &roofline).unwrap() * 1e3;
        close(now, folded, 0.006);
        let costs = block_costs(&graph, BATCH, &roofline).unwrap();
        // All but the first block, which is a depthwise and a pointwise convolution and gains nothing.
        let saved: f64 = costs[1..].iter().map(|c| c.saving() * 1e3).sum();
        close(now - saved, merged, 0.006);
    }
}

#[test]
fn kernels_cover_every_node_once_and_count_what_the_graph_counts() {
    let graph = imagenet("1.0");
    let kernels = kernel_costs(&graph).unwrap();
    // 52 convolutions, pool and classifier: nothing is left beside them.
    assert_eq!(kernels.len(), 54);
    let folded = graph.without_batch_norm().unwrap().0;
    let mut nodes: Vec<NodeId> = kernels.iter().flat_map(|k| k.nodes.clone()).collect();
    nodes.sort_unstable();
    assert_eq!(nodes, NodeId::all(folded.nodes.len()).skip(1).collect::<Vec<_>>());
    let pool = |k: &&KernelCost| k.name != "global_pool";
    let macs: u64 = kernels.iter().filter(pool).map(|k| k.flops / 2).sum();
    assert_eq!(macs, 300_774_272);
    let with_add = kernels.iter().filter(|k| k.name.ends_with("add") && k.nodes.len() == 2).count();
    assert_eq!(with_add, 10);
    // The structure is the one the weights are folded into.
    let small = example().2;
    let model = Model::initialise(small.clone(), 1).unwrap().folded().unwrap();
    assert_eq!(small.without_batch_norm().unwrap().0, model.graph);
}

#[test]
fn a_training_step_moves_what_the_table_says() {
    // Gigabytes of a 128-image step in two-byte elements, raw results alone stored; both gradients in one pass over dy, but for
    // dense convolutions and pointwise ones of many weights on a GPU. The table adds the optimizer's 22 bytes a parameter.
    for (width, backend, gigabytes) in [
        ("1.0", Backend::Host, 10.94),
        ("1.0", Backend::Cuda, 11.57),
        ("1.4", Backend::Host, 15.7),
        ("1.4", Backend::Cuda, 16.93),
    ] {
        let graph = imagenet(width);
        let plan = Plan::new(&graph, &Target::training(backend)).unwrap();
        let costs = plan_costs(&graph, &plan);
        let bytes: u64 = costs.iter().map(|k| k.bytes(BATCH, 2)).sum();
        let optimizer = 22 * graph.cost().unwrap().params();
        close((bytes + optimizer) as f64 / 1e9, gigabytes, 0.3);
        let flops: u64 = costs.iter().filter(|k| k.unit == ComputeUnit::Matrix).map(|k| k.flops).sum();
        assert!(flops > 5 * graph.cost().unwrap().macs());
    }
}

#[test]
fn utilization_is_one_at_the_limit() {
    let graph = imagenet("1.0");
    let roofline = V100_F16;
    let limit = network_time(&graph, BATCH, &roofline).unwrap();
    let u = utilization(&graph, BATCH, limit, &roofline).unwrap();
    close(u.roofline, 1.0, 1e-12);
    let half = utilization(&graph, BATCH, 2.0 * limit, &roofline).unwrap();
    close(half.byte, u.byte / 2.0, 1e-12);
    close(u.flop, 2.0 * 300_774_272.0 * 128.0 / limit / 112e12, 1e-4);
    assert!(u.byte > 0.9 && u.byte <= 1.0, "{u:?}");
}

#[test]
fn statistics_are_order_statistics() {
    let s = Summary::of(&[5.0, 1.0, 3.0, 2.0, 4.0]).unwrap();
    assert_eq!((s.count, s.min, s.p25, s.median, s.p75, s.iqr), (5, 1.0, 2.0, 3.0, 4.0, 2.0));
    assert_eq!(Summary::of(&[1.0, 2.0]).unwrap().median, 1.5);
    assert!(Summary::of(&[]).is_none());
    assert!(Summary::of(&[1.0, f64::NAN]).is_none());
}

#[test]
fn a_pair_is_timed_in_turns() {
    let order = std::cell::RefCell::new(String::new());
    let spin = |name: char, micros: u64| {
        order.borrow_mut().push(name);
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_micros(micros) {}
        Ok(())
    };
    let ratio = paired(|| spin('a', 2000), || spin('b', 500), 9).unwrap();
    assert!(ratio > 1.5, "{ratio}");
    assert_eq!(*order.borrow(), "ab".repeat(11));
}

#[test]
fn networks_and_blocks_are_timed_through_the_engine() {
    let (result, _, before, after) = example();
    let model = Model::initialise(before, 1).unwrap();
    let changed = Model::initialise(after, 1).unwrap();
    let budget = Duration::from_millis(200);
    let both = compare(&Device::Cpu, &[("original", &model), ("merged", &changed)], 4, budget).unwrap();
    assert_eq!(both.networks.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>(), ["original", "merged"]);
    assert_eq!(both.speed_up[0], 1.0);
    // How much is not said here: the machine may have other work.
    assert!(both.speed_up[1] > 0.0 && both.speed_up[1].is_finite(), "{both:?}");
    let (_, latency) = &both.networks[0];
    close(latency.images_per_s * latency.median_ms, 4e3, 1e-6);
    let change = Change { before: &model, after: &changed, map: &map(&model.graph, &changed.graph) };
    let blocks = block_latencies(&Device::Cpu, change, 4, budget).unwrap();
    assert_eq!(blocks.len(), 17);
    let sum_ms: f64 = blocks.iter().map(|b| b.before_us).sum::<f64>() / 1e3;
    assert!(sum_ms > 0.0 && sum_ms.is_finite(), "{sum_ms} {latency:?}");
    for (index, block) in blocks.iter().enumerate() {
        assert_eq!(block.before_us == block.after_us, result.kept[index] == 1, "{block:?}");
    }
    let error = network_latency(&Device::Cpu, &model, 0, budget).unwrap_err().to_string();
    assert!(error.contains("batch"), "{error}");
}

#[test]
fn peaks_are_those_of_a_computer() {
    let peaks = measure_peaks(&Device::Cpu, Duration::from_millis(200)).unwrap();
    assert!((0.5e9..5e12).contains(&peaks.copy_bytes_per_s), "{peaks:?}");
    assert!((0.5e9..1e14).contains(&peaks.gemm_flops_per_s), "{peaks:?}");
    let roofline = Roofline::measured(&peaks, Dtype::F32);
    assert_eq!((roofline.element_bytes, roofline.matrix_flops), (4, peaks.gemm_flops_per_s));
}

/// A network of such a run.
fn network(name: NetworkStage, top1: f64, (params, macs): (u64, u64), ms: f64) -> NetworkResult {
    NetworkResult {
        name,
        top1,
        loss: Some(0.4),
        params,
        macs,
        batch: 128,
        latency_ms: LatencyResult { median: ms, iqr: ms * 0.03 },
        images_per_s: 128e3 / ms,
        utilization: Utilization { flop: 0.31, byte: 0.62, roofline: 0.71 },
    }
}

/// A run that was never made, with every part of the report present.
fn example() -> (RunResult, Vec<MetricsLine>, Graph, Graph) {
    let options = NetworkOptions {
        input_stride: Some(1),
        stage_strides: Some(vec![1, 2, 2, 2, 1, 1, 1]),
        ..NetworkOptions::new(Shape::new(28, 28, 1), 10)
    };
    let before = build("mobilenetv2-0.5", &options).unwrap();
    let kept: Vec<u8> = vec![1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0, 0, 1, 1, 0];
    let after = merged(&before, &kept);
    let blocks = before.blocks.iter().zip(&kept).enumerate().map(|(i, (b, &k))| {
        let before_us = 420.0 / (1.0 + i as f64 * 0.4);
        BlockResult {
            name: b.name.clone(),
            kept: k,
            before_us,
            after_us: if k == 1 { before_us } else { before_us * 0.45 },
        }
    });
    let trial = |seed, top1| MaskTrial { seed, kept: kept.clone(), top1 };
    let result = RunResult {
        matched: None,
        method: Some(SearchMethod::Learned),
        bypassed: vec!["blocks.1.1".into()],
        channels: Default::default(),
        latency_share: Some(0.8),
        schema: SCHEMA,
        device: "cpu".into(),
        precision: "f32".into(),
        seed: 7,
        network: Some("mobilenetv2-0.5".into()),
        machine: Some(MachineResult { cpu: "Some <CPU> & Co".into(), threads: 2 }),
        data: DataResult { name: "fashion-mnist-small".into(), train: 10_000, test: 2_000 },
        networks: vec![
            network(NetworkStage::Original, 89.2, (700_010, 21_345_678), 88.0),
            network(NetworkStage::Unmerged, 88.6, (700_010, 21_345_678), 84.0),
            network(NetworkStage::Merged, 88.6, (912_345, 19_222_111), 58.0),
        ],
        ratio: Some(1.52),
        latency: Some("roofline of two nominal cores".into()),
        kept: kept.clone(),
        merge: Some(MergeResult { segments: 8, max_abs_error: 3.1e-6, max_rel_error: 4.2e-7 }),
        blocks: blocks.collect(),
        learned_masks: vec![trial(0, 88.6), trial(1, 88.2), trial(2, 88.9)],
        random_masks: vec![trial(0, 87.1), trial(1, 88.0), trial(2, 86.4)],
        stages: [
            ("train", 101.0),
            ("search", 34.0),
            ("finetune", 61.0),
            ("merge", 0.8),
            ("evaluate", 2.9),
            ("measure", 8.0),
        ]
        .map(|(name, seconds)| StageTime { name: name.into(), seconds })
        .to_vec(),
    };
    (result, example_metrics(&kept), before, after)
}

/// The structure of a merged network: one dense convolution and an activation in place of each block not kept.
fn merged(graph: &Graph, kept: &[u8]) -> Graph {
    let shapes = graph.shapes().unwrap();
    let emit = |id: NodeId, node: &Node, out: &mut Emitter| {
        let Some(index) = graph.blocks.iter().position(|b| b.nodes.contains(&id)).filter(|&b| kept[b] == 0) else {
            return Ok(out.copy(node));
        };
        let block = &graph.blocks[index];
        if id != block.nodes.start {
            return Ok(out.value(block.nodes.start));
        }
        let (x, y) = (shapes[block.input], shapes[block.output()]);
        let window = Window::square(3, x.h.div_ceil(y.h), 1);
        let conv = Conv { c_in: x.c, c_out: y.c, window, groups: 1, bias: Bias::Channel };
        let inputs = vec![out.value(block.input)];
        let conv = out.push(Node { name: format!("{}.merged", block.name), inputs, op: Op::Conv(conv) });
        let op = Op::Activation(Activation::RELU6);
        Ok(out.push(Node { name: format!("{}.act", block.name), inputs: vec![conv], op }))
    };
    graph.rewrite(emit).unwrap()
}

/// Where the values of `before` are in a network of [`merged`].
fn map(before: &Graph, after: &Graph) -> Vec<Option<NodeId>> {
    let mut map = before.map_by_name(after);
    for (was, is) in before.blocks.iter().zip(&after.blocks) {
        map[was.output()] = Some(is.output());
    }
    map
}

fn example_metrics(kept: &[u8]) -> Vec<MetricsLine> {
    let mut metrics = Vec::new();
    for (stage, epochs, best) in [("train", 8, 89.2), ("search", 3, 86.0), ("finetune", 5, 88.6)] {
        for epoch in 0..epochs {
            let rest = (-(f64::from(epoch)) / 2.0).exp();
            metrics.push(json!({
                "stage": stage, "epoch": epoch, "step": (epoch + 1) * 78, "lr": 0.1,
                "train_loss": 0.5 + 1.4 * rest, "train_top1": best + 1.5 - 25.0 * rest,
                "test_loss": 0.55 + 1.2 * rest, "test_top1": best - 20.0 * rest, "images_per_s": 800.0, "seconds": 12.0,
            }));
        }
    }
    for step in (0..234).step_by(6) {
        let t = f64::from(step) / 234.0;
        let score = |(i, &k): (usize, &u8)| {
            let wobble = 0.03 * (f64::from(step) * 0.21 + i as f64).sin();
            0.5 + (f64::from(k) - 0.5) * t * (0.35 + 0.035 * i as f64) + wobble
        };
        let scores: Vec<f64> = kept.iter().enumerate().map(score).collect();
        metrics.push(json!({"stage": "search", "step": step, "scores": scores}));
    }
    let lines: Vec<String> = metrics.iter().map(Value::to_string).collect();
    MetricsLine::read_all(&lines.join("\n"))
}

#[test]
fn result_json_has_the_fields_scripts_read() {
    let (result, ..) = example();
    let value = serde_json::to_value(&result).unwrap();
    assert_eq!(value["schema"], 1);
    assert_eq!(value["device"], "cpu");
    assert_eq!(value["precision"], "f32");
    assert_eq!(value["seed"], 7);
    assert_eq!(value["data"], json!({"name": "fashion-mnist-small", "train": 10000, "test": 2000}));
    let names: Vec<&Value> = value["networks"].as_array().unwrap().iter().map(|n| &n["name"]).collect();
    assert_eq!(names, ["original", "unmerged", "merged"]);
    let merged = &value["networks"][2];
    for field in ["top1", "params", "macs", "batch", "images_per_s"] {
        assert!(merged[field].is_number(), "{field}");
    }
    assert_eq!(merged["latency_ms"]["median"], 58.0);
    assert!(merged["latency_ms"]["iqr"].is_number());
    assert_eq!(merged["utilization"], json!({"flop": 0.31, "byte": 0.62, "roofline": 0.71}));
    assert_eq!(value["kept"][1], 0);
    assert_eq!(value["merge"], json!({"segments": 8, "max_abs_error": 3.1e-6, "max_rel_error": 4.2e-7}));
    assert_eq!(value["stages"][0], json!({"name": "train", "seconds": 101.0}));
    assert_eq!(value["ratio"], 1.52);
    assert_eq!(value["blocks"][0], json!({"name": "blocks.0.0", "kept": 1, "before_us": 420.0, "after_us": 420.0}));
    assert_eq!(value["machine"]["threads"], 2);
    assert_eq!(value["random_masks"][2]["top1"], 86.4);
    let again: RunResult = serde_json::from_str(&serde_json::to_string_pretty(&result).unwrap()).unwrap();
    assert_eq!(again, result);
}

#[test]
fn a_plan_as_json_has_the_fields_scripts_read() {
    let args = ["plan", "mobilenetv2-0.25", "--image", "32", "24", "--input-stride", "1", "--batch", "2", "--json"];
    let mut command = assert_cmd::Command::cargo_bin("depthshrinker").expect("the binary of this package");
    let output = command.args(args).assert().success().get_output().stdout.clone();
    let plan: Value = serde_json::from_slice(&output).expect("one JSON object on stdout");
    let keys = |value: &Value| value.as_object().expect("an object").keys().cloned().collect::<Vec<String>>().join(" ");
    let fields = "batch bytes element_bytes flops kernels launches network roofline_ms steps training";
    assert_eq!(keys(&plan), fields);
    let head = ["network", "batch", "training", "element_bytes", "bytes", "flops"].map(|key| plan[key].clone());
    let expected = [json!("mobilenetv2-0.25"), json!(2), json!(false), json!(4), json!(6_581_792), json!(14_659_840)];
    assert_eq!(head, expected);
    assert_eq!(
        plan["steps"][0],
        json!({"name": "bn1.act", "kind": "conv 3x3 + activation", "pass": "forward", "nodes": 2, "block": null,
               "bytes": 68_480, "flops": 663_552})
    );
    assert_eq!(plan["steps"][1]["block"], "blocks.0.0");
    let launches = plan["kernels"].as_object().unwrap().values().filter_map(Value::as_u64).sum::<u64>();
    assert_eq!(plan["launches"], launches);
    assert_eq!(plan["roofline_ms"].as_object().unwrap().len(), 16, "eight devices in two precisions");
    close(plan["roofline_ms"]["H100 SXM f16"].as_f64().unwrap(), 0.0009861349253731345, 1e-15);
}

#[test]
fn optional_parts_of_result_json_may_be_missing() {
    let text = r#"{"schema":1,"device":"cpu","precision":"f32","seed":0,"data":{"name":"x","train":1,"test":1},
        "networks":[],"kept":[1],"stages":[]}"#;
    let result: RunResult = serde_json::from_str(text).unwrap();
    let value = serde_json::to_value(&result).unwrap();
    for absent in
        ["network", "machine", "ratio", "method", "bypassed", "merge", "blocks", "learned_masks", "random_masks"]
    {
        assert!(value.get(absent).is_none(), "{absent}");
    }
}

#[test]
fn tables_align_and_give_the_paired_ratio() {
    let (result, ..) = example();
    let table = network_table(&result);
    let text = table.text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 5);
    assert!(lines[0].starts_with("network"));
    assert!(lines[2].starts_with("original") && lines[2].ends_with("1.00"), "{text}");
    assert!(lines[4].starts_with("merged") && lines[4].ends_with("1.52"), "{text}");
    assert!(lines[2..].iter().all(|l| l.chars().count() == lines[1].chars().count()), "{text}");
    let markdown = table.markdown();
    assert!(
        markdown.lines().all(|l| l.starts_with("| ") && l.ends_with(" |") && l.matches('|').count() == 9),
        "{markdown}"
    );
    assert!(markdown.lines().nth(1).unwrap().contains("-: |"), "{markdown}");
}

#[test]
fn the_page_is_whole_self_contained_and_escaped() {
    let (mut result, metrics, before, after) = example();
    result.data.name = "<script>alert('x')</script>".into();
    let config = "seed = 7 # <b>&\n";
    let page =
        Page { result: &result, metrics: &metrics, before: &before, after: &after, map: &map(&before, &after), config };
    let html = page.html().unwrap();
    if let Some(dir) = std::env::var_os("DEPTHSHRINKER_KEEP_REPORT") {
        page.write(dir.as_ref()).unwrap();
    }
    let without_namespaces = html.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for external in ["http:", "https:", "//", "<script", "<link", "<img", "@import", "url(", "src=", "href="] {
        assert!(!without_namespaces.contains(external), "the page must not hold {external}");
    }
    assert!(html.contains("&lt;script&gt;alert(&#39;x&#39;)") && html.contains("Some &lt;CPU&gt; &amp; Co"));
    assert!(html.contains("# &lt;b&gt;&amp;"));
    for part in [
        "1.52×",
        "88.60 %",
        "-0.60",
        "8 of 17",
        "<b>1 of 17</b><span>blocks bypassed",
        "chosen by: learned",
        "Original, unmerged, merged",
        "Accuracy and loss",
        "Scores over the search",
        "The network",
        "Latency of each block",
        "Selected against random masks",
        "learned 88.57 ± 0.35 %",
        "random 87.17 ± 0.80 %",
        "Time of each stage",
        "How to read this",
        "config.toml",
        "prefers-color-scheme:dark",
        "name=\"viewport\"",
        ">finetune<",
        ">test top-1 %<",
    ] {
        assert!(html.contains(part), "the page lacks {part}");
    }
    assert!(!html.contains("NaN") && !html.contains(">inf"));
    // One line per block, coloured by whether it was kept.
    assert_eq!(html.matches("<path class=\"curve c-kept\"").count(), 9);
    assert_eq!(html.matches("<path class=\"curve c-merged\"").count(), 8);
    assert_eq!(html.matches("<svg").count(), html.matches("</svg>").count());
    assert_eq!(html.matches("<svg").count(), 5);
    for tag in ["div", "section", "table", "p", "span"] {
        assert_eq!(html.matches(&format!("</{tag}>")).count(), opened(&html, tag), "{tag}");
    }
}

fn opened(html: &str, tag: &str) -> usize {
    html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count()
}

#[test]
fn a_bare_run_makes_a_page_too() {
    let (result, _, before, _) = example();
    let result = RunResult {
        matched: None,
        method: None,
        bypassed: Vec::new(),
        channels: Default::default(),
        latency_share: None,
        networks: Vec::new(),
        ratio: None,
        merge: None,
        machine: None,
        blocks: Vec::new(),
        learned_masks: Vec::new(),
        random_masks: Vec::new(),
        stages: Vec::new(),
        ..result
    };
    let metrics = MetricsLine::read_all(
        "{\"stage\": \"train\"}\n{\"odd\": 1}\n3\n{\"stage\": \"train\", \"train_loss\": null}\n",
    );
    let (dir, same) = (tempfile::tempdir().unwrap(), before.map_by_name(&before));
    Page { result: &result, metrics: &metrics, before: &before, after: &before, map: &same, config: "" }
        .write(dir.path())
        .unwrap();
    let html = std::fs::read_to_string(dir.path().join("report.html")).unwrap();
    assert!(html.contains("nothing recorded") && html.ends_with("</html>\n"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays behind");
    let gone = dir.path().join("gone");
    let page = Page { result: &result, metrics: &[], before: &before, after: &before, map: &same, config: "" };
    let error = page.write(&gone).unwrap_err().to_string();
    assert!(error.contains("report.html"), "{error}");
}
