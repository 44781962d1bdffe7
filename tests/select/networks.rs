//! Networks, and random tables for them.

use std::collections::BTreeSet;
use std::path::Path;

use depthshrinker::graph::{Activation, ExtendedSegment, Graph, GraphBuilder, Interval, NodeId, Op, Positions};
use depthshrinker::measure::{LatencyRow, LatencyTable};
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::{Shape, Window};
use depthshrinker::shrink::{Importance, ImportanceRow};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub fn network(name: &str) -> Graph {
    build(name, &NetworkOptions::new(Shape::new(224, 224, 3), 10)).unwrap()
}

pub fn positions(name: &str) -> Positions {
    network(name).positions().unwrap()
}

pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// A multiple of 1/64, so that sums are exact in any order.
pub fn sixty_fourths(rng: &mut ChaCha8Rng, from: i32, to: i32) -> f64 {
    f64::from(rng.random_range(from..to)) / 64.0
}

/// A network of `blocks` small blocks: inverted residuals or two 3×3, with and without a stride, a residual, an
/// activation at the end.
pub fn random_network(rng: &mut ChaCha8Rng, blocks: usize) -> Graph {
    let mut b = GraphBuilder::new("random", Shape::new(64, 64, 4));
    let (mut x, mut c) = (NodeId::INPUT, 4);
    for block in 0..blocks {
        let (input, first) = (x, b.next_node());
        let stride = if rng.random_range(0..4) == 0 { 2 } else { 1 };
        let c_out = if rng.random_range(0..2) == 0 { c } else { 8 - c.min(7) + 4 };
        let act = Activation { site: Some(b.next_block().site()), ..Activation::RELU6 };
        let (one, three) = (Window::square(1, 1, 0), Window::square(3, stride, 1));
        // Kernel, channels out, groups.
        let convs = match rng.random_range(0..3) {
            0 => vec![(three, c, c), (one, c_out, 1)],
            1 => vec![(one, 6, 1), (three, 6, 6), (one, c_out, 1)],
            _ => vec![(three, c, 1), (Window::square(3, 1, 1), c_out, 1)],
        };
        let mut c_in = c;
        for (index, &(window, channels, groups)) in convs.iter().enumerate() {
            let conv = GraphBuilder::conv(c_in, channels, window, groups);
            x = b.push(format!("{block}.{index}"), Op::Conv(conv), &[x]);
            c_in = channels;
            if index + 1 < convs.len() {
                x = b.activation(act, x);
            }
        }
        if stride == 1 && c_out == c && rng.random_range(0..2) == 0 {
            x = b.push(format!("{block}.add"), Op::Add, &[input, x]);
        }
        if rng.random_range(0..3) == 0 {
            x = b.activation(Activation::RELU6, x);
        }
        b.block(block.to_string(), input, first);
        c = c_out;
    }
    x = b.push("pool", Op::GlobalAvgPool, &[x]);
    b.linear("classifier", c, 3, x);
    b.finish().unwrap()
}

pub fn latency_table(rows: Vec<LatencyRow>) -> LatencyTable {
    LatencyTable::new(Path::new("t.csv"), rows).unwrap()
}

pub fn importance(rows: Vec<ImportanceRow>) -> Importance {
    Importance::new(Path::new("i.csv"), rows).unwrap()
}

/// A time for every segment of a network and for every block, in 64ths of a millisecond.
pub fn random_times(rng: &mut ChaCha8Rng, positions: &Positions) -> LatencyTable {
    let segments: BTreeSet<Interval> =
        positions.segments().chain(positions.blocks().iter().map(|block| block.at)).collect();
    latency_table(segments.into_iter().map(|at| LatencyRow::new(at, sixty_fourths(rng, 1, 200))).collect())
}

/// An importance for every block of a network, mostly below 0.
pub fn random_block_importance(rng: &mut ChaCha8Rng, positions: &Positions) -> Importance {
    let blocks = positions.blocks().iter();
    importance(blocks.map(|block| ImportanceRow::new(block.at, sixty_fourths(rng, -200, 20))).collect())
}

/// Times and importances with keys for all candidates of LayerMerge.
pub fn random_candidates(rng: &mut ChaCha8Rng, positions: &Positions) -> (LatencyTable, Importance) {
    let (mut times, mut importances) = (Vec::new(), Vec::new());
    for (at, key) in positions.candidates() {
        times.push(LatencyRow { key: Some(key), ..LatencyRow::new(at, sixty_fourths(rng, 1, 200)) });
        importances.push(ImportanceRow { key: Some(key), ..ImportanceRow::new(at, sixty_fourths(rng, -600, 60)) });
    }
    (latency_table(times), importance(importances))
}

/// Times and extended importances of a network of `depth` convolutions of which only this is known. Every single
/// convolution has a time and an importance; other segments, and variants without activations at their ends, are there
/// by chance.
pub fn random_extended(rng: &mut ChaCha8Rng, depth: usize) -> (LatencyTable, Importance) {
    let varies: Vec<bool> = (0..=depth).map(|position| position > 0 && rng.random_range(0..2) == 0).collect();
    let (mut times, mut importances) = (Vec::new(), Vec::new());
    for st in 0..depth {
        for end in st + 1..=depth {
            if end > st + 1 && rng.random_range(0..10) < 3 {
                continue;
            }
            times.push(LatencyRow::new((st, end), sixty_fourths(rng, 1, 200)));
            for (act_st, act_end) in [(true, true), (true, false), (false, true), (false, false)] {
                let exists = (act_st || varies[st]) && (act_end || varies[end]);
                if exists && (act_st && act_end || rng.random_range(0..10) < 7) {
                    let segment = ExtendedSegment { at: (st, end).into(), act_st, act_end };
                    let points = sixty_fourths(rng, -120, 40);
                    importances.push(ImportanceRow { segment, ..ImportanceRow::new((st, end), points) });
                }
            }
        }
    }
    (latency_table(times), importance(importances))
}

/// Blocks of a depthwise 3×3 and a 1×1 convolution with an activation between, some with a residual.
pub fn plain_network(residuals: &[bool]) -> Graph {
    let mut b = GraphBuilder::new("plain", Shape::new(16, 16, 4));
    let mut x = NodeId::INPUT;
    for (block, &residual) in residuals.iter().enumerate() {
        let (input, first) = (x, b.next_node());
        let act = Activation { site: Some(b.next_block().site()), ..Activation::RELU6 };
        x = b.push(format!("{block}.dw"), Op::Conv(GraphBuilder::conv(4, 4, Window::square(3, 1, 1), 4)), &[x]);
        x = b.activation(act, x);
        x = b.push(format!("{block}.pw"), Op::Conv(GraphBuilder::conv(4, 4, Window::square(1, 1, 0), 1)), &[x]);
        if residual {
            x = b.push(format!("{block}.add"), Op::Add, &[input, x]);
        }
        b.block(block.to_string(), input, first);
    }
    x = b.push("pool", Op::GlobalAvgPool, &[x]);
    b.linear("classifier", 4, 3, x);
    b.finish().unwrap()
}

/// Times of a [`plain_network`]: 2 ms for a convolution, `merged` for a block, 50 for everything else.
pub fn plain_times(positions: &Positions, merged: &[f64]) -> LatencyTable {
    let time = |at: Interval| match at.len() {
        1 => 2.0,
        2 if at.st.is_multiple_of(2) => merged[at.st / 2],
        _ => 50.0,
    };
    latency_table(positions.segments().map(|at| LatencyRow::new(at, time(at))).collect())
}
