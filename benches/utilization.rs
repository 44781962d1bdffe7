//! What merging gains: each kind of block of MobileNetV2-1.0 at 224×224 as three kernels, as one fused kernel, and merged
//! into one dense convolution, on the host and on a CUDA device where there is one. Printed are the share of the device's
//! FLOP/s that each way uses, and how much more of it, and how much sooner, the merged block is.

mod common;

use std::time::Duration;

use common::{Timed, devices};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use depthshrinker::device::Backend;
use depthshrinker::engine::Fusion;
use depthshrinker::graph::{BlockId, Node, Op, Segment};
use depthshrinker::measure::NetworkCase;
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use depthshrinker::shrink::merge::{MergeOptions, merge};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::surgery::{Linearise, linearise};

/// Images per pass on the host and on a GPU.
const BATCH: (usize, usize) = (16, 128);

/// A block in its three ways.
struct Block {
    name: String,
    cases: [NetworkCase; 3],
}

fn blocks() -> Vec<Block> {
    let options = NetworkOptions::new(Shape::new(224, 224, 3), 1000);
    let graph = build("mobilenetv2-1.0", &options).expect("a known network");
    let model = Model::initialise(graph, 0).expect("the graph is well formed");
    let folded = model.folded().expect("fresh weights fold");
    let padding = PaddingMode::Reorder;
    let surgery = Linearise { final_activation: true, padding };
    let kept = vec![false; model.graph.blocks.len()];
    let linear = linearise(&model, &kept, &surgery).expect("every block can be freed");
    let merged = merge(&linear, &MergeOptions { padding }).expect("every block merges");
    let mut blocks: Vec<Block> = Vec::new();
    for (id, block) in BlockId::enumerate(&folded.graph.blocks) {
        let own = folded.cut(&block.segment().expect("a block without a choice")).expect("a segment");
        let conv = merged.segments[id.index()].conv;
        let reads = |node: &Node| node.inputs == [conv] && matches!(node.op, Op::Activation(_));
        let end = if reads(&merged.model.graph.nodes[conv.next()]) { conv.next() } else { conv };
        let input = merged.model.graph.nodes[conv].inputs[0];
        let dense = merged.model.cut(&Segment { input, nodes: (conv..=end).into() }).expect("a segment");
        let case = |name, model: &Model, fusion| NetworkCase { name, model: model.clone(), fusion, training: false };
        let cases = [
            case("three kernels", &own, Fusion::Epilogue),
            case("fused", &own, Fusion::Block),
            case("merged", &dense, Fusion::Epilogue),
        ];
        let ops = |block: &Block| block.cases[0].model.graph.nodes.iter().map(|node| node.op).collect::<Vec<_>>();
        let block = Block { name: block.name.clone(), cases };
        // Blocks of equal shapes take equal times.
        if blocks.iter().all(|known| ops(known) != ops(&block)) {
            blocks.push(block);
        }
    }
    blocks
}

fn utilization(c: &mut Criterion) {
    let blocks = blocks();
    for (device, limits) in devices() {
        let batch = if device.backend() == Backend::Host { BATCH.0 } else { BATCH.1 };
        for block in &blocks {
            let mut group =
                c.benchmark_group(format!("utilization/{}_{}/{}", device.name(), device.precision(), block.name));
            group.measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_secs(1)).sample_size(10);
            group.throughput(Throughput::Elements(batch as u64));
            let mut used = Vec::new();
            for case in &block.cases {
                let mut timed = Timed::new(&device, case, batch);
                group.bench_function(case.name, |b| timed.run(b));
                used.extend(timed.used(&limits));
            }
            group.finish();
            if let [(before, three), (_, fused), (after, merged)] = used[..] {
                println!(
                    "  {}: {:.1} % of FLOP/s, fused {:.1} %, merged {:.1} %: {:.1} times as much, {:.2} times as fast",
                    block.name,
                    100.0 * three.flop,
                    100.0 * fused.flop,
                    100.0 * merged.flop,
                    merged.flop / three.flop,
                    before / after,
                );
            }
        }
    }
}

criterion_group!(benches, utilization);
criterion_main!(benches);
