//! Verification tells rounding from error: whatever is exact passes, whatever is planted is found, in every family.

use depthshrinker::graph::Op;
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use depthshrinker::shrink::merge::{MergeOptions, Merged, merge, verify_random};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, linearise};
use rayon::prelude::*;

/// A network of every family, how it merges, and the channels of its head.
const FAMILIES: [(&str, PaddingMode, Option<usize>); 5] = [
    ("mobilenetv2-1.0", PaddingMode::BorderBias, None),
    ("tf_efficientnet_lite0", PaddingMode::BorderBias, None),
    ("mnasnet-1.0", PaddingMode::BorderBias, None),
    ("resnet18", PaddingMode::Reorder, None),
    ("vgg19_bn", PaddingMode::Reorder, Some(16)),
];

/// A freshly initialised network, as timm initialises it, with every block freed, and merged.
fn all_freed(name: &str, padding: PaddingMode, head_channels: Option<usize>, seed: u64) -> (Model, Merged) {
    all_freed_at(Shape::new(40, 36, 3), name, padding, head_channels, seed)
}

fn all_freed_at(
    input: Shape,
    name: &str,
    padding: PaddingMode,
    head_channels: Option<usize>,
    seed: u64,
) -> (Model, Merged) {
    let options = NetworkOptions { head_channels, ..NetworkOptions::new(input, 10) };
    let model = Model::initialise(build(name, &options).unwrap(), seed).unwrap();
    let kept = vec![false; model.graph.blocks.len()];
    let linear = linearise(&model, &kept, &Linearise { final_activation: true, padding }).unwrap();
    let merged = merge(&linear, &MergeOptions { padding }).unwrap();
    assert_eq!(merged.segments.len(), kept.len());
    (linear, merged)
}

#[test]
fn exact_merges_pass_and_planted_errors_do_not() {
    FAMILIES.into_par_iter().for_each(|(name, padding, head)| {
        let (linear, merged) = all_freed(name, padding, head, 1);
        let error = verify_random(&linear, &merged, 1, 3).unwrap();
        error.check(&merged).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(error.worst_segment.unwrap().of_bound > 0.0, "{name}: weights are rounded");
        // In the middle of the network, where activations have died and scales have drifted.
        let at = merged.segments.len() / 2;
        for plant in [wrong_tap, wrong_bias, wrong_border] {
            let mut wrong = merged.clone();
            let what = plant(&mut wrong, at);
            let error = verify_random(&linear, &wrong, 1, 3).unwrap();
            let text = error.check(&wrong).expect_err(&format!("{name}: {what}")).to_string();
            assert!(text.contains(&merged.segments[at].name), "{name}, {what}: {text}");
        }
    });
}

fn weights<'m>(merged: &'m mut Merged, at: usize, suffixes: &[&str]) -> &'m mut Vec<f32> {
    let node = merged.model.graph.nodes[merged.segments[at].conv].name.clone();
    let name = suffixes.iter().map(|suffix| format!("{node}.{suffix}"));
    let name = name.into_iter().find(|name| merged.model.weights.contains_key(name)).unwrap();
    &mut merged.model.weights.get_mut(&name).unwrap().data
}

/// One tap is wrong by a hundredth of the largest.
fn wrong_tap(merged: &mut Merged, at: usize) -> &'static str {
    let weight = weights(merged, at, &["weight"]);
    let largest = weight.iter().fold(0.0f32, |m, w| m.max(w.abs()));
    let tap = weight.len() / 2;
    weight[tap] += 0.01 * largest;
    "tap"
}

/// One channel's bias, at one pixel where there is a map, is wrong by a hundredth of a weight.
fn wrong_bias(merged: &mut Merged, at: usize) -> &'static str {
    let largest = weights(merged, at, &["weight"]).iter().fold(0.0f32, |m, w| m.max(w.abs()));
    let bias = weights(merged, at, &["bias", "bias_map"]);
    let pixel = bias.len() / 2;
    bias[pixel] += 0.01 * largest;
    "bias"
}

/// The padding lies on the other side.
fn wrong_border(merged: &mut Merged, at: usize) -> &'static str {
    let conv = merged.segments[at].conv;
    let Op::Conv(conv) = &mut merged.model.graph.nodes[conv].op else { panic!("a convolution") };
    let pad = &mut conv.window.pad;
    (pad.top, pad.bottom) = (pad.top - 1, pad.bottom + 1);
    "border"
}

/// A fresh network of the published size, whose f32 rounding adds up over its layers, is exact all the same.
#[test]
fn a_deep_random_network_passes() {
    let (linear, merged) = all_freed_at(Shape::new(224, 224, 3), "mobilenetv2-1.0", PaddingMode::Reorder, None, 0);
    let error = verify_random(&linear, &merged, 2, 0).unwrap();
    error.check(&merged).unwrap();
    assert_eq!(error, verify_random(&linear, &merged, 2, 0).unwrap());
}

/// Badly conditioned weights: variances so small that the chain cancels to a millionth of its terms.
#[test]
fn conditioning_is_no_error() {
    let (mut linear, _) = all_freed("mobilenetv2-0.1", PaddingMode::BorderBias, Some(16), 4);
    for (name, tensor) in &mut linear.weights {
        if name.ends_with("running_var") {
            tensor.data.iter_mut().enumerate().for_each(|(i, v)| *v = if i % 3 == 0 { 1e-9 } else { 1e6 });
        }
        if name.ends_with("running_mean") {
            tensor.data.iter_mut().enumerate().for_each(|(i, v)| *v = 100.0 + i as f32);
        }
    }
    let merged = merge(&linear, &MergeOptions { padding: PaddingMode::BorderBias }).unwrap();
    verify_random(&linear, &merged, 2, 1).unwrap().check(&merged).unwrap();
}

/// What lies outside of the merged segments is compared bit for bit.
#[test]
fn another_network_around_the_segments_is_refused() {
    let (linear, merged) = all_freed("mobilenetv2-0.1", PaddingMode::BorderBias, Some(16), 4);
    let mut other = merged.clone();
    other.model.weights.get_mut("conv_head.weight").unwrap().data[3] += 1e-6;
    let text = verify_random(&linear, &other, 1, 1).unwrap_err().to_string();
    assert!(text.contains("another one at conv_head.weight"), "{text}");
    let mut other = merged;
    let last = other.segments.last().unwrap().conv;
    other.model.graph.nodes[last.next().next()].inputs[0] = last;
    let text = verify_random(&linear, &other, 1, 1).unwrap_err().to_string();
    assert!(text.contains("another one at conv_head"), "{text}");
}
