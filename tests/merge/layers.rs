//! Selections of single layers: activations at any position, pruned convolutions, segments within blocks and over them.

use std::collections::BTreeSet;

use depthshrinker::graph::{Activation, Graph, GraphBuilder, Interval, MaxPool, NodeId, Op, Pad, Positions, SiteId};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::{Padding, Shape, Window};
use depthshrinker::shrink::merge::{MergeOptions, Merged, check, merge_selection, verify_random};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{
    Linearise, check_linearise, drop_linear_activations, linearise, prepare_finetune,
};
use depthshrinker::shrink::{LayerChoice, Selection};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::networks::{BN_EPS, Member, bn, conv, one_block};
use crate::reference::{Reference, assert_exact, assert_same, noise, random_model, relative_error};

const REORDER: PaddingMode = PaddingMode::Reorder;
const BORDER_BIAS: PaddingMode = PaddingMode::BorderBias;

fn surgery(padding: PaddingMode) -> Linearise {
    Linearise { final_activation: true, padding }
}

/// A MobileNetV2 that is small enough for seven loops.
fn mobilenet() -> Graph {
    let options = NetworkOptions {
        stage_strides: Some(vec![1, 2, 1, 2, 1, 1, 1]),
        head_channels: Some(16),
        ..NetworkOptions::new(Shape::new(22, 19, 3), 4)
    };
    build("mobilenetv2-0.1", &options).unwrap()
}

/// Residual blocks of two 3×3 convolutions, as ResNet has them, of few channels: c_out and stride of each.
fn resnet(blocks: &[(usize, usize)]) -> Graph {
    let mut b = GraphBuilder::new("resnet", Shape::new(13, 11, 3));
    let mut x = b.push("stem", conv(3, &Member::dense(4, 3, 1, 1)), &[NodeId::INPUT]);
    x = b.activation(Activation::RELU, x);
    let mut c = 4;
    for (block, &(c_out, stride)) in blocks.iter().enumerate() {
        let (input, first) = (x, b.next_node());
        let mut short = input;
        if stride > 1 || c != c_out {
            short = b.push(format!("{block}.short"), conv(c, &Member::dense(c_out, 1, stride, 0)), &[input]);
            short = b.push(format!("{block}.short.bn"), bn(c_out, BN_EPS), &[short]);
        }
        x = b.push(format!("{block}.a"), conv(c, &Member::dense(c_out, 3, stride, 1)), &[x]);
        x = b.push(format!("{block}.a.bn"), bn(c_out, BN_EPS), &[x]);
        x = b.activation(Activation { site: Some(SiteId::new(block)), ..Activation::RELU }, x);
        x = b.push(format!("{block}.b"), conv(c_out, &Member::dense(c_out, 3, 1, 1)), &[x]);
        x = b.push(format!("{block}.b.bn"), bn(c_out, BN_EPS), &[x]);
        x = b.push(format!("{block}.add"), Op::Add, &[short, x]);
        x = b.activation(Activation::RELU, x);
        b.block(block.to_string(), input, first);
        c = c_out;
    }
    x = b.push("pool", Op::GlobalAvgPool, &[x]);
    b.linear("classifier", c, 3, x);
    b.finish().unwrap()
}

/// Pairs of biased 3×3 convolutions with a pool behind each, as VGG has them, of few channels.
fn vgg(channels: &[usize]) -> Graph {
    let mut b = GraphBuilder::new("vgg", Shape::new(16, 13, 3));
    let (mut x, mut c) = (NodeId::INPUT, 3);
    for (block, &c_out) in channels.iter().enumerate() {
        let (input, first) = (x, b.next_node());
        for (part, c_in) in [("a", c), ("b", c_out), ("c", c_out)] {
            let member = Member { bias: true, ..Member::dense(c_out, 3, 1, 1) };
            x = b.push(format!("{block}.{part}"), conv(c_in, &member), &[x]);
            x = b.push(format!("{block}.{part}.bn"), bn(c_out, BN_EPS), &[x]);
            let site = (part == "a").then_some(SiteId::new(block));
            x = b.activation(Activation { site, ..Activation::RELU }, x);
        }
        b.block(block.to_string(), input, first);
        let window = Window::square(2, 2, 0);
        x = b.push(format!("{block}.pool"), Op::MaxPool(MaxPool { window }), &[x]);
        c = c_out;
    }
    x = b.push("pool", Op::GlobalAvgPool, &[x]);
    b.linear("classifier", c, 3, x);
    b.finish().unwrap()
}

/// What a chain of segments selects: each becomes one convolution, of which `pruned` are left out, with an activation behind it
/// or, where it has several convolutions, at random.
fn drawn(positions: &Positions, rng: &mut ChaCha8Rng, prunes: bool) -> (Vec<usize>, Vec<usize>, Vec<usize>) {
    let segments: Vec<Interval> = positions.segments().collect();
    let (mut st, mut boundaries, mut activations, mut pruned) = (0, vec![0], Vec::new(), Vec::new());
    while st < positions.depth() {
        let from: Vec<&Interval> = segments.iter().filter(|at| at.st == st).collect();
        let at = *from[rng.random_range(0..from.len())];
        if positions.convs()[at.end - 1].has_activation() && at.len() == 1 || rng.random_bool(0.5) {
            activations.push(at.end);
        }
        let mut left = at.len();
        for position in at.st + 1..=at.end {
            if prunes && left > 1 && positions.convs()[position - 1].is_reducible() && rng.random_bool(0.4) {
                pruned.push(position);
                left -= 1;
            }
        }
        boundaries.push(at.end);
        st = at.end;
    }
    (activations, boundaries, pruned)
}

/// Whatever is drawn computes the same merged, and finetuning with moving slopes ends in the network that is merged.
fn assert_merges(model: &Model, selection: &Selection, padding: PaddingMode) -> Merged {
    let options = surgery(padding);
    let linear = linearise(model, selection, &options).unwrap();
    let prepared = prepare_finetune(model, selection, &options).unwrap();
    let removed: Vec<bool> = selection.keep.kept().iter().map(|kept| !kept).collect();
    assert_eq!(drop_linear_activations(&prepared, &removed).unwrap(), linear);
    assert_eq!(prepare_finetune(&prepared, selection, &options).unwrap(), prepared);
    assert_eq!(linearise(&linear, selection, &options).unwrap(), linear, "what is done stays as it is");
    let merged = merge_selection(&linear, selection, &MergeOptions { padding }).unwrap();
    assert_eq!(merged.segments.len(), selection.segments.len());
    assert_same(&linear, &merged, padding, 5);
    verify_random(&linear, &merged, 1, 3).unwrap().check(&merged).unwrap();
    assert!(merged.model.graph.nodes.iter().all(|node| !matches!(node.op, Op::Pad(_))), "crops fold");
    // A plan is a file.
    let text = serde_json::to_string(selection).unwrap();
    assert_eq!(Selection::parse("plan.json".as_ref(), &text).unwrap(), *selection);
    // What became of the blocks can be told, whatever was cut.
    let map = merged.map_from(&model.graph, &linear.graph);
    let parts = model.graph.counterparts(&merged.model.graph, &map).unwrap();
    let blocks: Vec<usize> = parts.iter().flat_map(|part| part.blocks.clone()).collect();
    assert!(blocks.is_sorted() && blocks.len() <= model.graph.blocks.len());
    merged
}

#[test]
fn any_layers_merge_exactly() {
    let residual = resnet(&[(4, 1), (4, 1), (6, 2), (6, 1), (6, 1)]);
    for (graph, draws) in [(mobilenet(), 6), (residual, 12), (vgg(&[4, 5]), 4)] {
        let model = random_model(graph, 3);
        let name = &model.graph.name;
        let positions = model.graph.positions().unwrap();
        let mut crops = 0;
        for draw in 0..draws {
            let (activations, boundaries, pruned) =
                drawn(&positions, &mut ChaCha8Rng::seed_from_u64(draw), draw % 2 == 1);
            let choice = LayerChoice { activations: &activations, boundaries: &boundaries, pruned: &pruned };
            let selection = choice.selection(&model.graph, &positions).unwrap();
            let merged = assert_merges(&model, &selection, REORDER);
            let linear = linearise(&model, &selection, &surgery(REORDER)).unwrap();
            crops += linear.graph.nodes.iter().filter(|node| matches!(node.op, Op::Pad(_))).count();
            let (graph, gone) = (&merged.model.graph, &pruned);
            let is_there = |at: usize| {
                graph.nodes.iter().any(|n| n.name == model.graph.nodes[positions.convs()[at - 1].node].name)
            };
            assert!(gone.iter().all(|&at| !is_there(at)));
        }
        assert_eq!(crops > 0, name != "vgg", "{name}: whether segments have shortcuts inside");
    }
}

/// Every segment of a MobileNetV2 alone: with the padding at the front all merge, with a bias map those that pad once.
#[test]
fn every_segment_is_one_convolution() {
    let model = random_model(mobilenet(), 3);
    let (graph, positions) = (&model.graph, model.graph.positions().unwrap());
    let mut exact = [0, 0];
    for at in positions.segments() {
        let outside = |position: &usize| !at.holds_inside(*position);
        let boundaries: Vec<usize> = (0..=positions.depth()).filter(outside).collect();
        let activations: Vec<usize> = positions.activations().into_iter().filter(outside).collect();
        let choice = LayerChoice { activations: &activations, boundaries: &boundaries, pruned: &[] };
        let selection = choice.selection(graph, &positions).unwrap();
        let padded = positions.convs_in(at).iter().filter(|conv| conv.kernel() > 1).count();
        for (count, padding) in exact.iter_mut().zip([REORDER, BORDER_BIAS]) {
            let fits = check_linearise(graph, &selection, &surgery(padding)).is_ok();
            assert_eq!(fits, padding == REORDER || padded <= 1, "{at}");
            *count += usize::from(fits);
            if fits && (at.len() > 6 || at.end % 7 == 0) {
                let linear = linearise(&model, &selection, &surgery(padding)).unwrap();
                let merged = merge_selection(&linear, &selection, &MergeOptions { padding }).unwrap();
                verify_random(&linear, &merged, 1, 3).unwrap().check(&merged).unwrap();
            }
        }
    }
    assert_eq!((exact[0], exact[0] > exact[1]), (positions.segments().count(), true));
}

/// The convolutions, sums and activations of a network whose batch-norms are folded: channels, kernel and stride, groups.
fn structure(graph: &Graph) -> Vec<String> {
    let folded = graph.without_batch_norm().unwrap().0;
    let word = |op: &Op| match op {
        Op::Conv(conv) => {
            let Window { k_h, k_w, stride_h, stride_w, pad } = conv.window;
            format!("{}→{} {k_h}x{k_w}/{stride_h},{stride_w}+{} {}", conv.c_in, conv.c_out, pad.top, conv.groups)
        }
        op => op.to_string(),
    };
    folded.nodes.iter().map(|node| word(&node.op)).collect()
}

/// The solution that LayerMerge's authors show, from their sets of boundaries and pruned convolutions: merged, MobileNetV2 is
/// their network, layer by layer.
#[test]
fn the_published_solution_of_layer_merge() {
    let ends: Vec<usize> = [0, 5, 8, 11, 14].into_iter().chain(17..=35).chain(38..=50).collect();
    let pruned = [1, 7, 13, 37];
    let options = NetworkOptions::new(Shape::new(64, 64, 3), 10);
    let graph = build("mobilenetv2-1.0", &options).unwrap();
    let positions = graph.positions().unwrap();
    let activations: Vec<usize> = ends
        .windows(2)
        .filter(|ends| ends[1] > ends[0] + 1 || positions.convs()[ends[1] - 1].has_activation())
        .map(|ends| ends[1])
        .collect();
    let choice = LayerChoice { activations: &activations, boundaries: &ends, pruned: &pruned };
    let selection = choice.selection(&graph, &positions).unwrap();
    let model = random_model(graph, 1);
    let linear = linearise(&model, &selection, &surgery(REORDER)).unwrap();
    let merged = merge_selection(&linear, &selection, &MergeOptions { padding: REORDER }).unwrap();
    verify_random(&linear, &merged, 1, 3).unwrap().check(&merged).unwrap();
    let published = build("layermerge-mbv2-1.0-13.4", &options).unwrap();
    assert_eq!(structure(&merged.model.graph), structure(&published));
}

/// Activations of a block go one by one, and new ones come behind bottlenecks; the function is that of the network whose
/// other activations are the identity.
#[test]
fn activations_go_one_by_one() {
    let model = random_model(mobilenet(), 3);
    let (graph, positions) = (&model.graph, model.graph.positions().unwrap());
    // Of the second block the activation behind the expansion goes, its bottleneck gets one; nothing merges.
    let activations: Vec<usize> = positions.activations().into_iter().filter(|&p| p != 3).chain([5]).collect();
    let boundaries: Vec<usize> = (0..=positions.depth()).collect();
    let choice = LayerChoice { activations: &activations, boundaries: &boundaries, pruned: &[] };
    let selection = choice.selection(graph, &positions).unwrap();
    assert_eq!((selection.keep.removed(), selection.segments.len()), (vec![1], 0));
    let linear = linearise(&model, &selection, &surgery(BORDER_BIAS)).unwrap();
    let name = |position: usize| graph.nodes[positions.convs()[position - 1].activation.unwrap()].name.clone();
    let now: BTreeSet<&str> = linear.graph.nodes.iter().map(|node| node.name.as_str()).collect();
    assert!(!now.contains(&*name(3)) && now.contains(&*name(4)) && now.contains("blocks.1.0.bn3.act"));
    let merged = merge_selection(&linear, &selection, &MergeOptions { padding: BORDER_BIAS }).unwrap();
    assert_eq!(merged, Merged::unchanged(linear.clone()));

    let mut by_hand = Reference::new(&model);
    let mut hand = graph.clone();
    for node in &mut hand.nodes {
        if node.name == name(3) {
            node.op = Op::Activation(Activation { site: None, slope: 1.0, ..Activation::RELU6 });
        }
    }
    let value = positions.convs()[4].value;
    by_hand.graph = hand
        .rewrite(|id, node, out| {
            let new = out.copy(node);
            let act = depthshrinker::graph::Node {
                name: "new".into(),
                inputs: vec![new],
                op: Op::Activation(Activation::RELU6),
            };
            Ok(if id == value { out.push(act) } else { new })
        })
        .unwrap();
    let image = noise(graph.input_shape().len(), 4);
    let logits = |network: &Reference| network.values(&image).pop().unwrap();
    assert!(relative_error(&logits(&by_hand), &logits(&Reference::new(&linear))) < 1e-12);
    assert!(relative_error(&logits(&Reference::new(&model)), &logits(&Reference::new(&linear))) > 1e-3);
}

/// What a plan says of layers of another network, or of layers that cannot be pruned, is refused in a line.
#[test]
fn wrong_layers_are_refused() {
    let model = random_model(mobilenet(), 3);
    let (graph, positions) = (&model.graph, model.graph.positions().unwrap());
    let all: Vec<usize> = (0..=positions.depth()).collect();
    let select = |boundaries: &[usize], pruned: &[usize]| {
        let choice = LayerChoice { activations: &positions.activations(), boundaries, pruned };
        choice.selection(graph, &positions)
    };
    let problem = |result: depthshrinker::Result<Selection>| result.map(drop).unwrap_err().to_string();
    assert!(problem(select(&all, &[3])).contains("changes the channels or has a stride"));
    let crossing: Vec<usize> = all.iter().copied().filter(|position| *position != 5).collect();
    assert!(problem(select(&crossing, &[])).contains("(4,6] is no segment"));
    let mut selection = select(&all, &[1, 4]).unwrap_err().to_string();
    assert!(selection.contains("stride"), "{selection}");
    let mut plan = select(&all, &[1, 7]).unwrap();
    plan.layers.as_mut().unwrap().pruned.push("blocks.9.9.conv_dw".into());
    selection = linearise(&model, &plan, &surgery(REORDER)).unwrap_err().to_string();
    assert!(selection.contains("no blocks.9.9.conv_dw") && selection.contains("another network"), "{selection}");
}

/// A shortcut that leaves the chain in the middle is cut to the size that the padding at the front leaves.
#[test]
fn shortcuts_from_inside_are_cut() {
    for (stride, project) in [(1, false), (1, true), (2, true)] {
        let shape = Shape::new(9, 8, 4);
        let graph = one_block(shape, 4, |b, input| {
            let act = Activation { site: Some(SiteId::new(0)), ..Activation::RELU };
            let x = b.push("first", conv(4, &Member::dense(4, 3, 1, 1)), &[input]);
            let x = b.activation(act, x);
            let mut short = x;
            if project {
                short = b.push("short", conv(4, &Member::dense(4, 1, stride, 0)), &[x]);
                short = b.push("short.bn", bn(4, BN_EPS), &[short]);
            }
            let y = b.push("second", conv(4, &Member::dense(4, 3, stride, 1)), &[x]);
            let y = b.push("third", conv(4, &Member::dense(4, 3, 1, 1)), &[y]);
            let sum = b.push("add", Op::Add, &[short, y]);
            let last = b.push("last", conv(4, &Member::dense(4, 3, 1, 1)), &[sum]);
            b.push("last.add", Op::Add, &[sum, last]);
        });
        let model = random_model(graph.unwrap(), 1);
        let linear = linearise(&model, &[false], &surgery(REORDER)).unwrap();
        let crops: Vec<&str> =
            linear.graph.nodes.iter().filter(|n| matches!(n.op, Op::Pad(_))).map(|n| n.name.as_str()).collect();
        let expected: &[&str] = if project { &["short.pad0", "last.add.pad0"] } else { &["add.pad0", "last.add.pad0"] };
        assert_eq!(crops, expected, "stride {stride}");
        let (_, segments) = assert_exact(&linear, REORDER, 7);
        let kernel = 3 + 2 + (2 + 2) * stride;
        assert_eq!((segments[0].kernel, segments[0].bias_map), ([kernel; 2], false));
    }
}

/// Cuts and paddings by hand: what a merged convolution cannot be is refused.
#[test]
fn paddings_that_do_not_fold_are_refused() {
    let pad = |top, left, bottom, right| Op::Pad(Pad { top, left, bottom, right });
    let network = |nodes: &[(&str, Op)]| {
        one_block(Shape::new(9, 8, 4), 4, |b: &mut GraphBuilder, mut x: NodeId| {
            for (name, op) in nodes {
                x = b.push(*name, *op, &[x]);
            }
        })
        .unwrap()
    };
    let window = |k, pad| Op::Conv(GraphBuilder::conv(4, 4, Window { pad, ..Window::square(k, 1, 0) }, 1));
    let plain = |k, p| window(k, Padding::all(p));
    let problem = |nodes: &[(&str, Op)], padding| {
        let graph = network(nodes);
        let segment = graph.blocks[0].segment().unwrap();
        check(&graph, &graph.shapes().unwrap(), &segment, padding).map(drop).map_err(|e| e.to_string())
    };
    for (nodes, word) in [
        (&[("c", plain(3, 1)), ("p", pad(1, 0, 0, 0))][..], "pads inside"),
        (&[("c", plain(3, 0)), ("p", pad(-1, 0, 0, 0))], "cuts off more than was padded"),
        (&[("c", plain(1, 0)), ("p", pad(0, 0, -1, 0))], "one convolution would go on"),
        (&[("p", pad(0, 0, -1, 0)), ("c", plain(3, 1))], "where rows or columns were cut off"),
    ] {
        let told = problem(nodes, BORDER_BIAS).unwrap_err();
        assert!(told.contains(word), "{told}");
    }
    for nodes in [
        &[("p", pad(2, 1, 0, 3)), ("c", plain(3, 0))][..],
        &[("c", plain(3, 2)), ("p", pad(-1, -2, 0, 0)), ("d", plain(2, 0)), ("q", pad(0, 0, 0, 0))],
        &[("c", plain(1, 2)), ("p", pad(-1, -1, -2, -1)), ("d", plain(3, 0))],
    ] {
        let graph = network(nodes);
        assert_exact(&random_model(graph, 4), REORDER, 6);
    }
}
