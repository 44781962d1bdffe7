//! Whole networks on the host, and on a CUDA device where there is one: inference at every level of fusion and merged,
//! and training steps. Throughput is in images per second; after each time its utilization is printed. On the host also a
//! network with dead channels, which takes as long with subnormal numbers as with zeros.

mod common;

use std::time::Duration;

use common::{Timed, devices};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use depthshrinker::config::Config;
use depthshrinker::device::Device;
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::pipeline::{fully_merged, network_cases};
use depthshrinker::shape::Shape;

/// The quick start's network, and the standard one on the images it was made for.
const NETWORKS: [(&str, usize, usize, usize); 2] = [("mobilenetv2-0.5", 28, 1, 128), ("mobilenetv2-1.0", 224, 3, 16)];
const CLASSES: usize = 10;

fn model(name: &str, side: usize, channels: usize) -> Model {
    let mut options = NetworkOptions::new(Shape::new(side, side, channels), CLASSES);
    if side < 64 {
        options.input_stride = Some(1);
    }
    Model::initialise(build(name, &options).expect("a known network"), 0).expect("the graph is well formed")
}

fn networks(c: &mut Criterion) {
    for (device, limits) in devices() {
        for (name, side, channels, batch) in NETWORKS {
            let model = model(name, side, channels);
            let merged = fully_merged(&model, None, &Config::default()).expect("blocks merge");
            let title = format!("{}_{}/{name}_{side}x{side}", device.name(), device.precision());
            let mut group = c.benchmark_group(title);
            group.measurement_time(Duration::from_secs(4)).sample_size(10);
            group.throughput(Throughput::Elements(batch as u64));
            for case in network_cases(&model, merged.as_ref()).expect("the graph is well formed") {
                let mut timed = Timed::new(&device, &case, batch);
                let pass = if case.training { "train" } else { "infer" };
                group.bench_function(format!("{pass}/{}", case.name), |b| timed.run(b));
                if let Some((_, used)) = timed.used(&limits) {
                    let percent = [used.flop, used.byte, used.roofline].map(|share| 100.0 * share);
                    println!("  FLOP {:.1} %, byte {:.1} %, roofline {:.1} %", percent[0], percent[1], percent[2]);
                }
            }
            group.finish();
        }
    }
}

/// Shifts of dead channels: 0, and one that is subnormal like all that comes of it.
const DEAD_SHIFTS: [(&str, f32); 2] = [("zero", 0.0), ("subnormal", 3e-41)];

/// Three of four channels of every batch-norm as pruning and sparse training leave them.
fn kill_channels(model: &mut Model, shift: f32) {
    for (name, tensor) in &mut model.weights {
        // The names of batch-norms' parameters; a convolution has no bias here, and the classifier lives.
        let dead = match name.rsplit('.').next() {
            _ if name.starts_with("classifier") || name.contains("conv") => continue,
            Some("weight" | "running_mean") => 0.0,
            Some("running_var") => 1e-38,
            _ => shift,
        };
        tensor.data.iter_mut().enumerate().filter(|(channel, _)| channel % 4 != 0).for_each(|(_, v)| *v = dead);
    }
}

fn dead_channels(c: &mut Criterion) {
    const BATCH: usize = 128;
    let mut group = c.benchmark_group("cpu_f32/mobilenetv2-1.0_96x96, dead channels");
    group.measurement_time(Duration::from_secs(4)).sample_size(10);
    group.throughput(Throughput::Elements(BATCH as u64));
    for (name, shift) in DEAD_SHIFTS {
        let mut model = model("mobilenetv2-1.0", 96, 3);
        kill_channels(&mut model, shift);
        let merged = fully_merged(&model, None, &Config::default()).expect("blocks merge");
        let cases = network_cases(&model, merged.as_ref()).expect("the graph is well formed");
        for case in cases.iter().filter(|case| !case.training) {
            let mut timed = Timed::new(&Device::Cpu, case, BATCH);
            group.bench_function(format!("{name}/{}", case.name), |b| timed.run(b));
        }
    }
    group.finish();
}

criterion_group!(benches, networks, dead_channels);
criterion_main!(benches);
