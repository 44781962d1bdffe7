//! Inverted-residual blocks and whole networks.

use depthshrinker::graph::{BlockId, BlockState};
use depthshrinker::shape::{Padding, Shape};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, linearise};
use proptest::prelude::*;

use crate::networks::{inverted_residual, tiny_mobilenet};
use crate::reference::{assert_exact, cases, random_model};

fn modes() -> impl Strategy<Value = PaddingMode> {
    prop::sample::select(vec![PaddingMode::Reorder, PaddingMode::BorderBias])
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn inverted_residuals_merge(
        (h, w) in (5usize..14, 5usize..14),
        (c, hidden, c_out) in (2usize..7, 3usize..20, 2usize..7),
        k in prop::sample::select(vec![3usize, 5, 7]),
        stride in 1usize..3,
        same: bool,
        asymmetric: bool,
        (padding, final_activation, seed) in (modes(), any::<bool>(), 0u64..1000),
    ) {
        let p = k / 2;
        let pad = if asymmetric { Padding { top: p - 1, left: p, bottom: p, right: p + 1 } } else { Padding::all(p) };
        prop_assume!(h + pad.top + pad.bottom >= k && w + pad.left + pad.right >= k);
        let c_out = if same { c } else { c_out };
        let graph = inverted_residual(Shape::new(h, w, c), hidden, c_out, k, stride, pad);
        let linear = linearise(&random_model(graph, seed), &[false], &Linearise { final_activation, padding }).unwrap();
        let (merged, segments) = assert_exact(&linear, padding, seed + 1);
        prop_assert_eq!(segments[0].bias_map, padding == PaddingMode::BorderBias);
        prop_assert_eq!((segments[0].kernel, segments[0].stride), ([k, k], [stride, stride]));
        prop_assert_eq!(merged.graph.blocks[0].nodes.len(), 1 + usize::from(final_activation));
    }
}

proptest! {
    #![proptest_config(cases(6))]

    #[test]
    fn any_subset_of_mobilenet_merges(
        kept in prop::collection::vec(any::<bool>(), 17),
        (padding, final_activation, seed) in (modes(), any::<bool>(), 0u64..1000),
    ) {
        let model = random_model(tiny_mobilenet(), seed);
        let linear = linearise(&model, &kept, &Linearise { final_activation, padding }).unwrap();
        let (merged, segments) = assert_exact(&linear, padding, seed + 1);
        prop_assert_eq!(segments.len(), kept.iter().filter(|k| !**k).count());
        prop_assert_eq!(merged.graph.kept(), kept.clone());
        for (block, kept) in kept.into_iter().enumerate() {
            prop_assert_eq!(merged.graph.state(BlockId::new(block)), if kept { BlockState::Active } else { BlockState::Merged });
        }
    }
}

/// The depthwise-separable block has nothing biased before its padding, so a plain bias is exact in either mode.
#[test]
fn the_depthwise_separable_block_needs_no_map() {
    let mut kept = vec![true; 17];
    kept[0] = false;
    for padding in [PaddingMode::Reorder, PaddingMode::BorderBias] {
        let model = random_model(tiny_mobilenet(), 4);
        let linear = linearise(&model, &kept, &Linearise { final_activation: true, padding }).unwrap();
        let (_, segments) = assert_exact(&linear, padding, 5);
        assert!(!segments[0].bias_map);
        assert_eq!((&segments[0].blocks[..], segments[0].name.as_str()), (&[BlockId::new(0)][..], "blocks.0.0"));
    }
}
