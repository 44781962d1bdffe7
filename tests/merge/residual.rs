//! Blocks of ResNet and VGG: shortcuts with a projection, chains of several padded convolutions; and whole networks.

use depthshrinker::graph::{Activation, Graph, Op, SiteId};
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use depthshrinker::shrink::merge::{MergeOptions, Merged, merge, verify_random};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, linearise};
use proptest::prelude::*;

use crate::networks::{BN_EPS, Member, bn, conv, one_block};
use crate::reference::{assert_exact, cases, random_model};

const REORDER: Linearise = Linearise { final_activation: true, padding: PaddingMode::Reorder };
const BORDER_BIAS: Linearise = Linearise { final_activation: true, padding: PaddingMode::BorderBias };

/// An active residual block of the given convolutions, with a projection where the shape changes; `late` puts the
/// projection behind the chain instead of in front of it.
fn residual(input: Shape, members: &[Member], late: bool) -> Graph {
    let c_out = members[members.len() - 1].c_out;
    let stride = members.iter().map(|m| m.window.stride_h).product();
    one_block(input, c_out, |b, input_id| {
        let project = |b: &mut depthshrinker::graph::GraphBuilder| {
            if stride == 1 && input.c == c_out {
                return input_id;
            }
            let x = b.push("projection", conv(input.c, &Member::dense(c_out, 1, stride, 0)), &[input_id]);
            b.push("projection.bn", bn(c_out, BN_EPS), &[x])
        };
        let early = if late { None } else { Some(project(b)) };
        let (mut x, mut c) = (input_id, input.c);
        for (i, member) in members.iter().enumerate() {
            x = b.push(format!("conv{i}"), conv(c, member), &[x]);
            c = member.c_out;
            x = b.push(format!("bn{i}"), bn(c, BN_EPS), &[x]);
            if i + 1 < members.len() {
                x = b.activation(Activation { site: Some(SiteId::new(0)), ..Activation::RELU }, x);
            }
        }
        let shortcut = early.unwrap_or_else(|| project(b));
        let sum = b.push("add", Op::Add, &[shortcut, x]);
        b.activation(Activation::RELU, sum);
    })
    .unwrap()
}

proptest! {
    #![proptest_config(cases(48))]

    /// 3×3 ∘ 3×3 with its padding at the front: a 5×5 kernel, 7×7 where the first convolution strides.
    #[test]
    fn basic_blocks_merge(
        (h, w) in (5usize..12, 5usize..12),
        (c, c_out) in (2usize..6, 2usize..6),
        stride in 1usize..3,
        (late, same, seed) in (any::<bool>(), any::<bool>(), 0u64..1000),
    ) {
        let c_out = if same { c } else { c_out };
        let members = [Member::dense(c_out, 3, stride, 1), Member::dense(c_out, 3, 1, 1)];
        let model = random_model(residual(Shape::new(h, w, c), &members, late), seed);
        let linear = linearise(&model, &[false], &REORDER).unwrap();
        let size = |graph: &Graph| graph.shapes().unwrap()[graph.blocks[0].output()];
        prop_assert_eq!(size(&linear.graph), size(&model.graph));
        let (merged, segments) = assert_exact(&linear, PaddingMode::Reorder, seed + 1);
        let k = 3 + 2 * stride;
        prop_assert_eq!((segments[0].kernel, segments[0].stride), ([k, k], [stride, stride]));
        prop_assert!(!segments[0].bias_map);
        prop_assert_eq!(merged.graph.blocks[0].nodes.len(), 2);
    }

    /// 1×1 ∘ 3×3 ∘ 1×1 merges in either mode.
    #[test]
    fn bottlenecks_merge(
        (h, w) in (5usize..12, 5usize..12),
        (c, hidden, c_out) in (2usize..6, 2usize..5, 2usize..8),
        stride in 1usize..3,
        (late, same, seed) in (any::<bool>(), any::<bool>(), 0u64..1000),
    ) {
        let c_out = if same { c } else { c_out };
        let members =
            [Member::dense(hidden, 1, 1, 0), Member::dense(hidden, 3, stride, 1), Member::dense(c_out, 1, 1, 0)];
        let model = random_model(residual(Shape::new(h, w, c), &members, late), seed);
        for options in [REORDER, BORDER_BIAS] {
            let linear = linearise(&model, &[false], &options).unwrap();
            let (_, segments) = assert_exact(&linear, options.padding, seed + 1);
            prop_assert_eq!((segments[0].kernel, segments[0].stride), ([3, 3], [stride, stride]));
            prop_assert_eq!(segments[0].bias_map, options.padding == PaddingMode::BorderBias);
        }
    }
}

/// A second zero-padded 3×3 needs its padding moved: no bias makes up for data that the merged kernel would see.
#[test]
fn a_basic_block_is_refused_without_reordering() {
    for (c_out, stride) in [(4, 1), (6, 2)] {
        let members = [Member::dense(c_out, 3, stride, 1), Member::dense(c_out, 3, 1, 1)];
        let model = random_model(residual(Shape::new(8, 8, 4), &members, false), 1);
        let message = linearise(&model, &[false], &BORDER_BIAS).unwrap_err().to_string();
        for part in ["block block", "conv1", "zero-pads", "3x3", "--padding reorder"] {
            assert!(message.contains(part), "{message}");
        }
    }
}

/// Whole networks, some of their blocks freed, in the engine.
#[test]
fn other_networks_merge() {
    for (name, freed, kernels, head) in [
        ("resnet18", vec![0, 2, 3], vec![5, 7, 5], None),
        ("resnet50", vec![0, 3, 4], vec![3, 3, 3], None),
        ("vgg19_bn", vec![0, 1], vec![5, 5], Some(16)),
        ("tf_efficientnet_lite0", vec![0, 1, 3, 4], vec![3, 3, 5, 5], None),
        ("mnasnet_050", vec![0, 1, 2, 4], vec![3, 3, 3, 5], None),
    ] {
        let options = NetworkOptions { head_channels: head, ..NetworkOptions::new(Shape::new(40, 36, 3), 5) };
        let model = random_model(build(name, &options).unwrap(), 1);
        let kept: Vec<bool> = (0..model.graph.blocks.len()).map(|b| !freed.contains(&b)).collect();
        let linear = linearise(&model, &kept, &REORDER).unwrap();
        let merged = merge(&linear, &MergeOptions { padding: PaddingMode::Reorder }).unwrap();
        let Merged { segments, model: network, .. } = &merged;
        assert_eq!(segments.iter().map(|s| s.kernel[0]).collect::<Vec<_>>(), kernels, "{name}");
        assert_eq!(network.graph.kept(), kept);
        let error = verify_random(&linear, &merged, 2, 5).unwrap();
        error.check(&merged).unwrap();
        assert!(error.max_rel_error <= 1e-4, "{name}: {error:?}");
        let text = verify_random(&model, &merged, 2, 5).unwrap_err().to_string();
        assert!(text.contains("another one"), "{name} is another network before freeing: {text}");
    }
}
