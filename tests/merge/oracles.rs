//! Facts about the merged convolution that hold however it was computed.

use depthshrinker::graph::Bias;
use depthshrinker::model::Model;
use depthshrinker::shape::{Padding, Shape};
use depthshrinker::shrink::merge::{Folded, MergeOptions, Merged, fold, merge};
use depthshrinker::shrink::padding::PaddingMode;

use crate::networks::{Member, chain, inverted_residual};
use crate::reference::{Reference, noise, random_model, relative_error};

fn linear_block(k: usize, stride: usize, size: usize) -> Model {
    let shape = Shape::new(size, size, 4);
    let mut graph = inverted_residual(shape, 9, 4, k, stride, Padding::all(k / 2));
    for node in &mut graph.nodes {
        if let depthshrinker::graph::Op::Activation(act) = &mut node.op {
            (act.slope, act.site) = (1.0, None);
        }
    }
    // The identity activations go by hand: this test asks nothing of the surgery.
    let graph = graph
        .rewrite(|_, node, out| match node.op {
            depthshrinker::graph::Op::Activation(_) => Ok(out.value(node.inputs[0])),
            _ => Ok(out.copy(node)),
        })
        .unwrap();
    random_model(graph, 11)
}

fn folded_block(model: &Model, padding: PaddingMode) -> depthshrinker::Result<Folded> {
    fold(model, &model.graph.blocks[0].segment().unwrap(), padding)
}

/// A merge that keeps the interior's bias everywhere is wrong on the border pixels and nowhere else.
#[test]
fn a_naive_merge_is_wrong_exactly_at_the_border() {
    for (stride, wrong, of) in [(1, 24, 49), (2, 12, 16)] {
        let model = linear_block(3, stride, 7);
        let options = MergeOptions { padding: PaddingMode::BorderBias };
        let Merged { model: merged, .. } = merge(&model, &options).unwrap();
        let folded = folded_block(&model, PaddingMode::BorderBias).unwrap();
        let size = folded.output.h;
        let center = (size / 2 * size + size / 2) * 4;
        let mut naive = Reference::new(&merged);
        naive.set_folded("block", &folded);
        let interior = folded.bias[center..center + 4].to_vec();
        naive.weights.insert("block.conv.bias_map".into(), interior.repeat(folded.output.h * folded.output.w));
        let image = noise(model.graph.input_shape().len(), 1);
        let expected = Reference::new(&model).values(&image).swap_remove(model.graph.blocks[0].output().index());
        let got = naive.values(&image).swap_remove(merged.graph.blocks[0].output().index());
        let pixels = expected.chunks(4).zip(got.chunks(4));
        let differ = pixels.clone().filter(|(a, b)| relative_error(a, b) > 1e-9).count();
        assert_eq!((differ, pixels.count()), (wrong, of), "stride {stride}");
    }
}

/// R3 and R4, a constant channel that carries the bias through the zero padding, are the same function.
#[test]
fn the_bias_map_is_the_response_to_zero() {
    for (k, stride) in [(3, 1), (3, 2), (5, 1), (5, 2)] {
        let model = linear_block(k, stride, 9);
        let folded = folded_block(&model, PaddingMode::BorderBias).unwrap();
        assert_eq!(folded.conv.bias, Bias::Map);
        let zeros = vec![0.0; model.graph.input_shape().len()];
        let response = Reference::new(&model).values(&zeros).swap_remove(model.graph.blocks[0].output().index());
        assert!(relative_error(&response, &folded.bias) < 1e-13);
    }
}

/// The merged kernel is the Jacobian at an interior pixel, the merged bias the interior response to zero.
#[test]
fn the_kernel_is_the_impulse_response() {
    let chains: [&[Member]; 4] = [
        &[Member::dense(4, 3, 1, 0), Member::dense(3, 3, 1, 0)],
        &[Member::dense(4, 3, 2, 0), Member::depthwise(4, 3, 1, 0), Member::dense(2, 1, 1, 0)],
        &[Member::depthwise(2, 3, 2, 0), Member::depthwise(2, 3, 2, 0), Member::dense(3, 1, 1, 0)],
        &[Member { groups: 2, ..Member::dense(4, 3, 1, 0) }, Member::dense(2, 5, 2, 0)],
    ];
    for members in chains {
        let shape = Shape::new(21, 19, 2);
        let model = random_model(chain(shape, members, false).unwrap(), 21);
        let folded = folded_block(&model, PaddingMode::Reorder).unwrap();
        let (window, c_out) = (folded.conv.window, folded.conv.c_out);
        let reference = Reference::new(&model);
        let output = model.graph.blocks[0].output();
        let rest = reference.values(&vec![0.0; shape.len()]).swap_remove(output.index());
        let (row, col) = (folded.output.h / 2, folded.output.w / 2);
        let at = |y: &[f64]| y[(row * folded.output.w + col) * c_out..][..c_out].to_vec();
        assert!(relative_error(&at(&rest), &folded.bias) < 1e-12);
        for tap in 0..window.taps() {
            for c in 0..shape.c {
                let (v, u) = (tap / window.k_w, tap % window.k_w);
                let mut impulse = vec![0.0; shape.len()];
                let pixel = (row * window.stride_h + v) * shape.w + col * window.stride_w + u;
                impulse[pixel * shape.c + c] = 1.0;
                let response = reference.values(&impulse).swap_remove(output.index());
                for (o, (with, without)) in at(&response).iter().zip(at(&rest)).enumerate() {
                    let weight = folded.weight[(o * window.taps() + tap) * shape.c + c];
                    assert!((with - without - weight).abs() < 1e-11, "tap {v},{u} of {members:?}");
                }
            }
        }
    }
}
