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

const BATCH: usize = 128;
const CLASSES: usize = 10;

fn network(c: &mut Criterion) {
    let input = Shape::new(28, 28, 1);
    let options = NetworkOptions { input_stride: Some(1), ..NetworkOptions::new(input, CLASSES) };
    let graph = build("mobilenetv2-0.5", &options).expect("a known network");
    let model = Model::initialise(graph, 0).expect("the graph is well formed");
    let images: Vec<f32> = (0..BATCH * input.len()).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
    let gradient: Vec<f32> = (0..BATCH * CLASSES).map(|i| ((i * 31) % 17) as f32 / 1e3).collect();
    let gradient = Device::Cpu.upload(&gradient).expect("a small buffer");

    let mut group = c.benchmark_group("mobilenetv2-0.5_28x28");
    group.measurement_time(Duration::from_secs(4)).sample_size(10).throughput(Throughput::Elements(BATCH as u64));
    for fusion in [Fusion::Reference, Fusion::Fused] {
        let engine = |training| {
            let options = EngineOptions { batch: BATCH, fusion, training, taps: Vec::new() };
            Engine::new(&Device::Cpu, &model, &options).expect("the network can be planned")
        };
        let mut training = engine(true);
        group.bench_function(format!("train/{fusion:?}"), |b| {
            b.iter(|| {
                training.forward(black_box(&images)).expect("a whole batch");
                training.backward(&gradient, &[]).expect("a forward pass before");
            });
        });
        let mut inference = engine(false);
        group.bench_function(format!("infer/{fusion:?}"), |b| {
            b.iter(|| {
                inference.forward(black_box(&images)).expect("a whole batch");
            });
        });
    }
    group.finish();
}

criterion_group!(benches, network);
criterion_main!(benches);
