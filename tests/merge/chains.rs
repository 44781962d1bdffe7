//! General chains: any kernels, strides, groups and paddings.

use depthshrinker::graph::{BatchNorm, Bias, Op};
use depthshrinker::model::Model;
use depthshrinker::shape::{Padding, Shape, Window};
use depthshrinker::shrink::merge::fold;
use depthshrinker::shrink::padding::{PaddingMode, Reordering};
use proptest::prelude::*;

use crate::networks::{self, BN_EPS, Member, chain, one_block, push_chain};
use crate::reference::{assert_exact, cases, random_model};

/// What a member is drawn as, before its channels are known.
type Drawn = (usize, (usize, usize), (usize, usize), (usize, usize, usize, usize), bool, bool);

fn drawn() -> impl Strategy<Value = Drawn> {
    let kernel = || prop::sample::select(vec![1usize, 1, 3, 3, 5]);
    let pad = || 0usize..3;
    (
        0usize..4,
        (kernel(), kernel()),
        (1usize..3, 1usize..3),
        (pad(), pad(), pad(), pad()),
        any::<bool>(),
        any::<bool>(),
    )
}

/// Channels that follow the kind: 0 dense, 1 two groups, 2 and 3 depthwise.
fn members(mut c: usize, drawn: &[Drawn]) -> Vec<Member> {
    let member = |&(kind, (k_h, k_w), (stride_h, stride_w), pad, bias, bn): &Drawn| {
        let (c_out, groups) = match kind {
            0 => (3 + (k_h + stride_w) % 3, 1),
            1 if c.is_multiple_of(2) => (6, 2),
            1 => (4, 1),
            _ => (c, c),
        };
        c = c_out;
        let pad = Padding { top: pad.0, left: pad.1, bottom: pad.2, right: pad.3 };
        Member { c_out, groups, window: Window { k_h, k_w, stride_h, stride_w, pad }, bias, bn }
    };
    drawn.iter().map(member).collect()
}

/// Moves the padding of block 0 to the front, keeping the weights.
fn reorder(model: &Model) -> Model {
    let segment = model.graph.blocks[0].segment().unwrap();
    let graph = Reordering::of_all(&model.graph, &[segment]).unwrap().applied(&model.graph).unwrap();
    let mut weights = model.weights.clone();
    for param in graph.params().unwrap() {
        weights.get_mut(&param.name).unwrap().shape = param.shape;
    }
    Model::new(graph, weights).unwrap()
}

proptest! {
    #![proptest_config(cases(96))]

    /// R1 on any chain: the output keeps its size and the merge is exact with a plain bias.
    #[test]
    fn any_chain_merges_after_reordering(
        drawn in prop::collection::vec(drawn(), 1..5),
        (h, w, c) in (5usize..14, 5usize..14, 2usize..5),
        residual: bool,
        seed in 0u64..1000,
    ) {
        let members = members(c, &drawn);
        // A residual asks for a shape-preserving chain of stride 1; most draws are none.
        let residual = residual && members.iter().all(|m| (m.window.stride_h, m.window.stride_w) == (1, 1));
        let graph = match chain(Shape::new(h, w, c), &members, residual) {
            Ok(graph) => graph,
            Err(_) => chain(Shape::new(h, w, c), &members, false).unwrap_or_else(|_| {
                chain(Shape::new(h + 70, w + 71, c), &members, false).unwrap()
            }),
        };
        let model = random_model(graph, seed);
        let moved = reorder(&model);
        let block = |m: &Model| m.graph.shapes().unwrap()[m.graph.blocks[0].output()];
        prop_assert_eq!(block(&model), block(&moved));
        let (merged, segments) = assert_exact(&moved, PaddingMode::Reorder, seed + 7);
        prop_assert_eq!(block(&model), block(&merged));
        prop_assert!(!segments[0].bias_map);
        let kernel = |axis: fn(&Window) -> (usize, usize)| {
            let mut stride = 1;
            members.iter().fold(1, |kernel, m| {
                let (k, s) = axis(&m.window);
                let grown = kernel + (k - 1) * stride;
                stride *= s;
                grown
            })
        };
        prop_assert_eq!(segments[0].kernel, [kernel(|w| (w.k_h, w.stride_h)), kernel(|w| (w.k_w, w.stride_w))]);
        let depthwise = members.iter().all(|m| (m.groups, m.c_out) == (c, c));
        let folded = fold(&moved, &moved.graph.blocks[0].segment().unwrap(), PaddingMode::Reorder).unwrap();
        prop_assert_eq!(folded.conv.groups, if depthwise { c } else { 1 });
    }

    /// R3 on a chain whose one padded convolution has only 1×1 convolutions before it, and none padded behind it.
    #[test]
    fn border_bias_is_exact(
        before in prop::collection::vec(drawn(), 0..3),
        padded in drawn(),
        after in prop::collection::vec(drawn(), 0..3),
        (h, w, c) in (5usize..14, 5usize..14, 2usize..5),
        seed in 0u64..1000,
    ) {
        let mut drawn = before;
        drawn.iter_mut().for_each(|d| (d.1, d.2, d.3) = ((1, 1), (1, 1), (0, 0, 0, 0)));
        drawn.push(padded);
        drawn.extend(after.into_iter().map(|d| Drawn::from((d.0, d.1, d.2, (0, 0, 0, 0), d.4, d.5))));
        let members = members(c, &drawn);
        let graph = chain(Shape::new(h, w, c), &members, false)
            .unwrap_or_else(|_| chain(Shape::new(h + 70, w + 71, c), &members, false).unwrap());
        assert_exact(&random_model(graph, seed), PaddingMode::BorderBias, seed + 7);
    }
}

#[test]
fn strided_3x3_and_3x3_make_7x7() {
    let members = [Member::dense(4, 3, 2, 1), Member::dense(5, 3, 1, 1)];
    for (h, w) in [(9, 10), (11, 12), (13, 9)] {
        let model = reorder(&random_model(chain(Shape::new(h, w, 3), &members, false).unwrap(), 5));
        let (merged, segments) = assert_exact(&model, PaddingMode::Reorder, 6);
        assert_eq!((segments[0].kernel, segments[0].stride), ([7, 7], [2, 2]));
        let Op::Conv(conv) = merged.graph.nodes[1].op else { panic!("the block is one convolution") };
        assert_eq!((conv.window.pad.top, conv.window.pad.left), (3, 3));
    }
}

#[test]
fn depthwise_members_stay_depthwise() {
    let members = [Member::depthwise(6, 3, 1, 2), Member::depthwise(6, 5, 2, 1), Member::depthwise(6, 1, 1, 0)];
    let model = reorder(&random_model(chain(Shape::new(13, 12, 6), &members, false).unwrap(), 1));
    let (merged, _) = assert_exact(&model, PaddingMode::Reorder, 2);
    assert_eq!(merged.weight("block.conv.weight").shape, [7, 7, 6]);
    let residual = [Member::depthwise(6, 3, 1, 1)];
    let model = random_model(chain(Shape::new(7, 8, 6), &residual, true).unwrap(), 1);
    let (merged, _) = assert_exact(&model, PaddingMode::BorderBias, 2);
    assert_eq!(merged.weight("block.conv.weight").shape, [3, 3, 6]);
}

#[test]
fn a_chain_of_1x1_becomes_pointwise() {
    let members = [Member::dense(7, 1, 1, 0), Member::dense(4, 1, 1, 0)];
    let model = random_model(chain(Shape::new(5, 6, 4), &members, true).unwrap(), 3);
    for padding in [PaddingMode::Reorder, PaddingMode::BorderBias] {
        let (merged, segments) = assert_exact(&model, padding, 4);
        assert_eq!(merged.weight("block.conv.weight").shape, [4, 4]);
        assert_eq!((segments[0].macs_before, segments[0].macs_after), (30 * (28 + 28), 30 * 16));
        assert_eq!((segments[0].params_before, segments[0].params_after), (28 + 14 + 28 + 8, 16 + 4));
    }
}

/// A projection shortcut: its 1×1 weights land on the tap at P.
#[test]
fn a_strided_projection_folds() {
    let graph = one_block(Shape::new(9, 11, 3), 5, |b, input| {
        let x = push_chain(b, input, 3, &[Member::dense(4, 3, 2, 1), Member::dense(5, 1, 1, 0)]);
        let skip = b.push("skip", networks::conv(3, &Member::dense(5, 1, 2, 0)), &[input]);
        let skip = b.push("skip.bn", networks::bn(5, BN_EPS), &[skip]);
        b.push("add", Op::Add, &[x, skip]);
    });
    let (_, segments) = assert_exact(&random_model(graph.unwrap(), 8), PaddingMode::Reorder, 9);
    assert_eq!((segments[0].kernel, segments[0].stride), ([3, 3], [2, 2]));
}

/// A skip that starts and ends inside the block.
#[test]
fn a_skip_inside_the_block_folds() {
    let graph = one_block(Shape::new(9, 11, 3), 6, |b, input| {
        let x = push_chain(b, input, 3, &[Member::dense(4, 1, 1, 0)]);
        let y = b.push("inner", networks::conv(4, &Member::depthwise(4, 3, 1, 1)), &[x]);
        let y = b.push("inner.bn", networks::bn(4, BN_EPS), &[y]);
        let y = b.push("inner.add", Op::Add, &[x, y]);
        b.push("last", networks::conv(4, &Member::dense(6, 3, 2, 0)), &[y]);
    });
    let (_, segments) = assert_exact(&random_model(graph.unwrap(), 8), PaddingMode::BorderBias, 9);
    assert!(segments[0].bias_map);
    assert_eq!((segments[0].kernel, segments[0].stride), ([5, 5], [2, 2]));
}

/// Batch-norm in front of a padded convolution biases its input, so the border needs the map.
#[test]
fn a_leading_batch_norm_folds() {
    let graph = one_block(Shape::new(6, 5, 3), 4, |b, input| {
        let x = b.push("first.bn", networks::bn(3, BN_EPS), &[input]);
        push_chain(b, x, 3, &[Member::dense(4, 3, 1, 1)]);
    });
    let (_, segments) = assert_exact(&random_model(graph.unwrap(), 8), PaddingMode::BorderBias, 9);
    assert!(segments[0].bias_map);
}

/// Each batch-norm folds with its own ε: variances around 1e-3 make 1e-3 and 1e-5 differ grossly.
#[test]
fn every_batch_norm_keeps_its_eps() {
    let mut graph = chain(Shape::new(6, 7, 3), &[Member::dense(4, 3, 1, 1), Member::dense(4, 1, 1, 0)], false).unwrap();
    for node in &mut graph.nodes {
        if let (Op::BatchNorm(BatchNorm { eps, .. }), true) = (&mut node.op, node.name == "0.bn") {
            *eps = 1e-3;
        }
    }
    let mut model = random_model(graph, 2);
    for name in ["0.bn.running_var", "1.bn.running_var"] {
        model.weights.get_mut(name).unwrap().data.iter_mut().for_each(|v| *v *= 1e-3);
    }
    assert_exact(&model, PaddingMode::BorderBias, 3);
}

#[test]
fn folding_has_the_same_bits_for_any_number_of_threads() {
    let members = [Member::dense(9, 1, 1, 0), Member::dense(11, 3, 2, 1), Member::dense(10, 3, 1, 0)];
    let model = random_model(chain(Shape::new(13, 14, 8), &members, false).unwrap(), 1);
    let fold = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| fold(&model, &model.graph.blocks[0].segment().unwrap(), PaddingMode::BorderBias).unwrap())
    };
    let one = fold(1);
    assert_eq!(one, fold(3));
    assert_eq!(one.conv.bias, Bias::Map);
}
