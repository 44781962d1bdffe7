//! The masks that were published, and the operations that were counted for them.

use depthshrinker::graph::{Bias, Graph, Op};
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use depthshrinker::shrink::merge::{MergeOptions, merge};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, linearise};
use depthshrinker::shrink::{counted_operations, published_mask, published_names, simulated_merge};

use crate::reference::random_model;

#[test]
fn published_operations_are_reproduced() {
    let options = NetworkOptions::new(Shape::new(224, 224, 3), 1000);
    let graph = build("mobilenetv2-1.4", &options).unwrap();
    assert_eq!(counted_operations(&graph).unwrap() / 1_000_000, 630);
    // In millions and rounded down, as published, where nothing is really merged.
    for (mask, published) in [("a", 519), ("b", 502), ("c", 492), ("d", 484), ("e", 474), ("f", 415)] {
        let mask = published_mask(&format!("mbv2-1.4-ds-{mask}")).unwrap();
        let simulated = simulated_merge(&graph, mask.kept()).unwrap();
        assert_eq!(counted_operations(&simulated).unwrap() / 1_000_000, published, "{mask}");
    }
    // Really merged, the first block takes more: 608, 590 and 522 million for the masks that free it.
    let model = random_model(graph, 1);
    let options = Linearise { final_activation: true, padding: PaddingMode::Reorder };
    for (mask, millions) in [("b", 608.0), ("d", 590.0), ("f", 522.0)] {
        let mask = published_mask(&format!("mbv2-1.4-ds-{mask}")).unwrap();
        let linear = linearise(&model, &mask.kept()[..17], &options).unwrap();
        let merged = merge(&linear, &MergeOptions { padding: PaddingMode::Reorder }).unwrap().model.graph;
        assert_eq!((counted_operations(&merged).unwrap() as f64 / 1e6).round(), millions, "{mask}");
    }
}

#[test]
fn simulated_merges_keep_what_the_repository_keeps() {
    let options = NetworkOptions::new(Shape::new(64, 64, 3), 10);
    let graph = build("mobilenetv2-0.5", &options).unwrap();
    let simulated = simulated_merge(&graph, &[false; 18]).unwrap();
    let count = |graph: &Graph, is: fn(&Op) -> bool| graph.nodes.iter().filter(|node| is(&node.op)).count();
    let is_act: fn(&Op) -> bool = |op| matches!(op, Op::Activation(_));
    let is_norm: fn(&Op) -> bool = |op| matches!(op, Op::BatchNorm(_));
    let is_conv: fn(&Op) -> bool = |op| matches!(op, Op::Conv(_));
    // The head's activation alone stays; stem, first block and head keep their batch-norms; no sum is left.
    assert_eq!((count(&simulated, is_act), count(&simulated, is_norm), count(&simulated, is_conv)), (1, 4, 20));
    assert_eq!(count(&simulated, |op| matches!(op, Op::Add)), 0);
    assert_eq!(simulated.shapes().unwrap().last(), graph.shapes().unwrap().last());
    for node in simulated.nodes.iter().filter(|node| simulated.blocks[1..].iter().any(|b| b.name == node.name)) {
        let Op::Conv(conv) = node.op else { panic!("{node:?}") };
        assert_eq!((conv.groups, conv.window.k_h, conv.bias), (1, 3, Bias::None), "{}", node.name);
    }
    let kept = simulated_merge(&graph, &[true; 17]).unwrap();
    assert_eq!(kept, graph);
    let resnet = build("resnet18", &options).unwrap();
    let problem = simulated_merge(&resnet, &vec![false; resnet.blocks.len()]).unwrap_err().to_string();
    assert!(problem.contains("is no inverted residual"), "{problem}");
    assert!(simulated_merge(&graph, &[false; 3]).is_err());
}

#[test]
fn published_masks_have_names() {
    let counts: Vec<usize> = published_names().map(|name| published_mask(name).unwrap().count()).collect();
    assert_eq!(counts, [11, 8, 8, 6, 6, 0, 11, 8, 6, 11, 8, 6, 12, 12, 9, 7, 12, 9, 7, 12, 9, 7]);
    let stem = published_names().filter(|name| published_mask(name).unwrap().blocks() == 18);
    assert_eq!(stem.collect::<Vec<_>>(), ["mbv2-1.4-ds-a", "mbv2-1.4-ds-d", "mbv2-1.4-ds-e"]);
    assert_eq!(published_mask("mbv2-1.4-ds-b").unwrap().blocks(), 17);
    assert_eq!(published_mask("mbv2-1.4-ds-a").unwrap().to_string(), "1,0,0,1,1,0,1,0,1,0,1,1,0,1,1,1,1,0");
    let message = published_mask("mbv2-1.4-ds-g").unwrap_err().to_string();
    assert!(message.contains("mbv2-1.4-ds-f") && message.contains("mbv2-1.0-ec-cr-aug"), "{message}");
}
