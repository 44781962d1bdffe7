//! The masks that were published, and the operations that were counted for them.

use depthshrinker::graph::{Graph, NodeId, Op};
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use depthshrinker::shrink::merge::{MergeOptions, merge};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, linearise};
use depthshrinker::shrink::{published_mask, published_names};

use crate::reference::random_model;

/// Multiply-accumulates, five operations for each element that a batch-norm of an unmerged part writes, and one for each
/// that the pool at the end reads: DepthShrinker's counter (`docs/methods.md` 1.5).
fn operations(graph: &Graph) -> u64 {
    let shapes = graph.shapes().unwrap();
    let elements = graph.nodes.iter().map(|node| match node.op {
        Op::BatchNorm(_) => 5 * shapes[node.inputs[0]].len() as u64,
        Op::GlobalAvgPool => shapes[node.inputs[0]].len() as u64,
        _ => 0,
    });
    graph.cost().unwrap().macs() + elements.sum::<u64>()
}

#[test]
fn published_operations_are_reproduced() {
    let graph = build("mobilenetv2-1.4", &NetworkOptions::new(Shape::new(224, 224, 3), 1000)).unwrap();
    assert_eq!(operations(&graph) / 1_000_000, 630);
    let model = random_model(graph, 1);
    let options = Linearise { final_activation: true, padding: PaddingMode::Reorder };
    let merged = |kept: &[bool]| {
        let linear = linearise(&model, kept, &options).unwrap();
        merge(&linear, &MergeOptions { padding: PaddingMode::Reorder }).unwrap().model.graph
    };
    // What each block takes as it is and merged.
    let (before, after) = (model.graph.clone(), merged(&[false; 17]));
    let of_blocks = |graph: &Graph| -> Vec<i64> {
        let (shapes, cost) = (graph.shapes().unwrap(), graph.cost().unwrap());
        let of = |id: NodeId| match graph.nodes[id].op {
            Op::BatchNorm(_) => 5 * shapes[id].len() as u64,
            _ => cost.nodes[id].macs,
        };
        graph.blocks.iter().map(|b| b.nodes.iter().map(of).sum::<u64>() as i64).collect()
    };
    let (before_of, after_of) = (of_blocks(&before), of_blocks(&after));
    let count = |kept: &[bool]| {
        let saved: i64 = (0..17).filter(|&b| !kept[b]).map(|b| before_of[b] - after_of[b]).sum();
        (operations(&before) as i64 - saved) as u64
    };
    // In millions and rounded down, as published, where the first block is never merged.
    for (mask, published) in [("a", 519), ("b", 502), ("c", 492), ("d", 484), ("e", 474), ("f", 415)] {
        let mask = published_mask(&format!("mbv2-1.4-ds-{mask}")).unwrap();
        let unmerged_first: Vec<bool> = (0..17).map(|b| b == 0 || mask.kept()[b]).collect();
        assert_eq!(count(&unmerged_first) / 1_000_000, published, "{mask}");
    }
    // Merged, the first block takes more: 608, 590 and 522 million for the masks that free it.
    for (mask, millions) in [("b", 608.0), ("d", 590.0), ("f", 522.0)] {
        let mask = published_mask(&format!("mbv2-1.4-ds-{mask}")).unwrap();
        assert_eq!((count(mask.kept()) as f64 / 1e6).round(), millions, "{mask}");
    }
    // The sums over blocks are what a network has that was merged in one go.
    let kept = published_mask("mbv2-1.4-ds-d").unwrap();
    assert_eq!(operations(&merged(&kept.kept()[..17])), count(kept.kept()));
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
