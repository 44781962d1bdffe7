//! A merge that would not be exact is refused, with a reason that names block, node and remedy.

use depthshrinker::graph::{Activation, AvgPool, Bias, Graph, Op, SiteId};
use depthshrinker::shape::{Padding, Shape, Window};
use depthshrinker::shrink::merge::{Kernel, MergeOptions, Merged, fold, merge, merge_segments};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, drop_linear_activations, linearise};

use crate::networks::{Member, chain, inverted_residual, one_block, push_chain, tiny_mobilenet};
use crate::reference::random_model;

/// What is said of merging the blocks of a graph, whatever their state.
fn refusal(graph: Graph, padding: PaddingMode) -> String {
    let segments: Vec<_> = graph.blocks.iter().filter_map(|block| block.segment()).collect();
    merge_segments(&random_model(graph, 1), &segments, &MergeOptions { padding }).unwrap_err().to_string()
}

fn assert_mentions(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{message:?} does not mention {word:?}");
    }
    assert_eq!(message.lines().count(), 1);
}

#[test]
fn an_activation_inside_is_refused() {
    let graph = one_block(Shape::new(6, 7, 3), 4, |b, input| {
        let x = b.push("first", crate::networks::conv(3, &Member::dense(4, 1, 1, 0)), &[input]);
        let x = b.activation(Activation::RELU6, x);
        push_chain(b, x, 4, &[Member::dense(4, 3, 1, 1)]);
    });
    let message = refusal(graph.unwrap(), PaddingMode::BorderBias);
    assert_mentions(&message, &["merge refused", "block block", "first.act", "activation inside"]);
}

#[test]
fn a_pool_inside_is_refused() {
    let graph = one_block(Shape::new(6, 7, 3), 4, |b, input| {
        let x = push_chain(b, input, 3, &[Member::dense(4, 1, 1, 0)]);
        b.push("mean", Op::AvgPool(AvgPool { window: Window::square(2, 2, 0) }), &[x]);
    });
    let message = refusal(graph.unwrap(), PaddingMode::BorderBias);
    assert_mentions(&message, &["block block", "mean", "neither convolution, batch-norm nor sum"]);
}

#[test]
fn a_masked_activation_at_the_end_is_refused() {
    let graph = one_block(Shape::new(6, 7, 3), 4, |b, input| {
        let x = push_chain(b, input, 3, &[Member::dense(4, 1, 1, 0)]);
        b.activation(Activation { site: Some(SiteId::new(0)), ..Activation::RELU6 }, x);
    });
    assert_mentions(&refusal(graph.unwrap(), PaddingMode::BorderBias), &["0.bn.act", "activation inside"]);
}

#[test]
fn two_padded_convolutions_are_refused() {
    let members = [Member::dense(4, 3, 1, 1), Member::dense(4, 3, 1, 1)];
    let graph = chain(Shape::new(6, 7, 3), &members, false).unwrap();
    let message = refusal(graph.clone(), PaddingMode::BorderBias);
    assert_mentions(&message, &["block block", "1 zero-pads", "3x3", "--padding reorder"]);
    assert_mentions(&refusal(graph, PaddingMode::Reorder), &["1 pads behind", "--padding reorder"]);
}

#[test]
fn reorder_wants_the_padding_at_the_front() {
    let graph = inverted_residual(Shape::new(7, 8, 4), 9, 4, 3, 1, Padding::all(1));
    let model = random_model(graph, 1);
    let options = Linearise { final_activation: true, padding: PaddingMode::BorderBias };
    let linear = linearise(&model, &[false], &options).unwrap();
    let message = merge(&linear, &MergeOptions { padding: PaddingMode::Reorder }).unwrap_err().to_string();
    assert_mentions(&message, &["block block", "depthwise pads", "--padding reorder", "--padding border-bias"]);
}

/// On a 1×1 image a strided chain keeps its size, so only the stride tells that the skip does not fit.
#[test]
fn a_skip_over_a_stride_is_refused() {
    let graph = chain(Shape::new(1, 1, 4), &[Member::dense(4, 3, 2, 1)], true).unwrap();
    assert_mentions(&refusal(graph, PaddingMode::BorderBias), &["block block", "add", "stride"]);
    assert!(Kernel::identity(3).plus(&Kernel::identity(4)).is_none(), "c_in must be c_out");
}

/// A segment that crosses the end of a residual, or half of one, is no block at all.
#[test]
fn half_a_residual_is_refused() {
    let mut graph = inverted_residual(Shape::new(7, 8, 4), 9, 4, 3, 1, Padding::all(1));
    let block = &mut graph.blocks[0];
    (block.nodes.start, block.input) = (block.nodes.start.next().next(), block.input.next().next());
    assert!(graph.shapes().unwrap_err().to_string().contains("second entry or exit"));
}

#[test]
fn a_block_without_convolution_and_one_merged_already_are_refused() {
    let graph = one_block(Shape::new(6, 7, 4), 4, |b, input| {
        b.push("bn", crate::networks::bn(4, 1e-5), &[input]);
    });
    assert_mentions(&refusal(graph.unwrap(), PaddingMode::BorderBias), &["holds no convolution"]);
    let mut graph = chain(Shape::new(6, 7, 4), &[Member::dense(4, 3, 1, 1)], false).unwrap();
    if let Op::Conv(conv) = &mut graph.nodes[1].op {
        conv.bias = Bias::Map;
    }
    assert_mentions(&refusal(graph, PaddingMode::BorderBias), &["0 has a bias per position"]);
}

#[test]
fn a_hostile_chain_is_refused_before_anything_is_allocated() {
    let wide = Window { pad: Padding::all(1023), ..Window::square(1024, 1024, 0) };
    let member = Member { window: wide, ..Member::depthwise(2, 1, 1, 0) };
    let graph = chain(Shape::new(2, 2, 2), &[member; 8], false).unwrap();
    assert_mentions(&refusal(graph, PaddingMode::BorderBias), &["block block", "1"]);
}

#[test]
fn weights_that_are_not_finite_are_refused() {
    let mut model = random_model(chain(Shape::new(6, 7, 3), &[Member::dense(4, 3, 1, 1)], false).unwrap(), 1);
    model.weights.get_mut("0.bn.running_var").unwrap().data[2] = -1.0;
    let message = merge(&model, &MergeOptions { padding: PaddingMode::BorderBias }).unwrap_err().to_string();
    assert_mentions(&message, &["block.conv.weight", "finite"]);
}

#[test]
fn masks_that_do_not_fit_are_refused() {
    let model = random_model(tiny_mobilenet(), 1);
    let options = Linearise { final_activation: true, padding: PaddingMode::BorderBias };
    let message = linearise(&model, &[true; 16], &options).unwrap_err().to_string();
    assert_mentions(&message, &["16 entries", "17 blocks"]);
    assert!(drop_linear_activations(&model, &[true; 19]).is_err());

    let mut kept = [true; 17];
    kept[3] = false;
    let linear = linearise(&model, &kept, &options).unwrap();
    assert_eq!(linearise(&linear, &kept, &options).unwrap(), linear);
    assert_mentions(&linearise(&linear, &[true; 17], &options).unwrap_err().to_string(), &["blocks.2.0", "keep"]);
    let block = model.graph.blocks[3].segment().unwrap();
    let message = fold(&model, &block, PaddingMode::BorderBias).unwrap_err().to_string();
    assert_mentions(&message, &["block blocks.2.0", "activation inside"]);

    let Merged { model: merged, .. } = merge(&linear, &MergeOptions { padding: PaddingMode::BorderBias }).unwrap();
    assert_mentions(&linearise(&merged, &kept, &options).unwrap_err().to_string(), &["blocks.2.0", "merged already"]);
}
