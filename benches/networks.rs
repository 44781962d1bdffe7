//! A whole network: training step and inference, reference plan and fused plan. Throughput is in images per second;
//! `benches/peers` does the same network in PyTorch.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use depthshrinker::device::Device;
use depthshrinker::engine::{Engine, EngineOptions, Fusion};
use depthshrinker::model::Model;
use depthshrinker::models::{NetworkOptions, build};
use depthshrinker::shape::Shape;

/// The quick start's network, and the standard one on the images it was made for.
const NETWORKS: [(&str, usize, usize, usize); 2] = [("mobilenetv2-0.5", 28, 1, 128), ("mobilenetv2-1.0", 224, 3, 16)];
const CLASSES: usize = 10;

fn network(c: &mut Criterion) {
    for (name, side, channels, batch) in NETWORKS {
        let input = Shape::new(side, side, channels);
        let mut options = NetworkOptions::new(input, CLASSES);
        if side < 64 {
            options.input_stride = Some(1);
        }
        let graph = build(name, &options).expect("a known network");
        let model = Model::initialise(graph, 0).expect("the graph is well formed");
        let images: Vec<f32> = (0..batch * input.len()).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
        let gradient: Vec<f32> = (0..batch * CLASSES).map(|i| ((i * 31) % 17) as f32 / 1e3).collect();
        let gradient = Device::Cpu.upload(&gradient).expect("a small buffer");

        let mut group = c.benchmark_group(format!("{name}_{side}x{side}"));
        group.measurement_time(Duration::from_secs(4)).sample_size(10).throughput(Throughput::Elements(batch as u64));
        for fusion in [Fusion::Reference, Fusion::Fused] {
            let engine = |training| {
                let options = EngineOptions { batch, fusion, training, taps: Vec::new() };
                Engine::new(&Device::Cpu, &model, &options).expect("the network can be planned")
            };
            group.bench_function(format!("train/{fusion:?}"), |b| {
                let mut training = engine(true);
                b.iter(|| {
                    training.forward(black_box(&images)).expect("a whole batch");
                    training.backward(&gradient).expect("a forward pass before");
                });
            });
            group.bench_function(format!("infer/{fusion:?}"), |b| {
                let mut inference = engine(false);
                b.iter(|| {
                    inference.forward(black_box(&images)).expect("a whole batch");
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, network);
criterion_main!(benches);
