//! Convolutions of every family, forward and backward: layers of MobileNetV2 blocks against the dense convolutions that
//! the blocks merge into, on the host and on every CUDA device's first, in its precisions. Layers and clock are those of
//! `depthshrinker bench kernels`; after each time its utilization is printed.

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use depthshrinker::config::Config;
use depthshrinker::device::Device;
use depthshrinker::device::cuda::Cuda;
use depthshrinker::dtype::Dtype;
use depthshrinker::measure::{LayerBench, LayerPass, Limits, TimedLayer};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::pipeline::fully_merged;
use depthshrinker::report::limits_text;
use depthshrinker::shape::Shape;

const BATCH: usize = 64;
/// Blocks with stride 2, with a residual, and with many channels on few pixels.
const BLOCKS: [&str; 3] = ["blocks.1.0.", "blocks.2.1.", "blocks.5.1."];

/// The host, and where there is a GPU that in the precisions it has; why not in others is printed.
fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    if Cuda::count() > 0 {
        for precision in Dtype::ALL {
            match Device::open("cuda", precision) {
                Ok(device) => devices.push(device),
                Err(error) => eprintln!("cuda in {precision}: {error}"),
            }
        }
    }
    devices
}

fn layers(device: &Device) -> Vec<TimedLayer> {
    let options = NetworkOptions { input_stride: Some(1), ..NetworkOptions::new(Shape::new(28, 28, 1), 10) };
    let graph = build("mobilenetv2-0.5", &options).expect("a known network");
    let model = Model::initialise(graph, 0).expect("the graph is well formed");
    let merged = fully_merged(&model, None, &Config::default()).expect("blocks merge").expect("there are blocks");
    let passes = LayerPass::on(device, &LayerPass::ALL);
    let mut layers =
        TimedLayer::of_networks(&[&model.graph, &merged.graph], BATCH, &passes, device.backend()).expect("well formed");
    layers.retain(|layer| BLOCKS.iter().any(|block| layer.name.starts_with(block)));
    layers
}

fn convolutions(c: &mut Criterion) {
    for device in devices() {
        let limits = Limits::measure(&device, Duration::from_secs(4)).expect("the device works");
        print!("{} in {}: {}", device.name(), device.precision(), limits_text(&limits, None));
        let bench = LayerBench::new(&device).expect("the device has memory");
        let mut group = c.benchmark_group(format!("{}_{}", device.name(), device.precision()));
        group.measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300)).sample_size(20);
        for layer in layers(&device) {
            let mut launches = bench.launches(&layer).expect("the device works");
            let (mut time, mut count) = (Duration::ZERO, 0);
            group.throughput(Throughput::Elements(layer.flops()));
            group.bench_function(format!("{}/{}", layer.name, layer.pass), |b| {
                b.iter_custom(|iterations| {
                    let took = launches.total(iterations).expect("the device works");
                    (time, count) = (time + took, count + iterations);
                    took
                });
            });
            if count > 0 {
                let seconds = time.as_secs_f64() / count as f64;
                let used = limits.roofline.utilization(std::slice::from_ref(&layer.cost), BATCH, seconds);
                let percent = [used.flop, used.byte, used.roofline].map(|share| 100.0 * share);
                println!("  FLOP {:.1} %, byte {:.1} %, roofline {:.1} %", percent[0], percent[1], percent[2]);
            }
        }
        group.finish();
    }
}

criterion_group!(benches, convolutions);
criterion_main!(benches);
