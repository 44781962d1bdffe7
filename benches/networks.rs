//! Whole networks on the host, and on a CUDA device where there is one: inference at every level of fusion and merged,
//! and training steps. Throughput is in images per second; after each time its utilization is printed. A GPU is timed by
//! its own clock.

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use depthshrinker::config::Config;
use depthshrinker::device::Device;
use depthshrinker::device::cuda::Cuda;
use depthshrinker::dtype::Dtype;
use depthshrinker::measure::{Limits, NetworkRun};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::pipeline::{fully_merged, network_cases};
use depthshrinker::report::limits_text;
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
    let mut devices = vec![Device::Cpu];
    if Cuda::count() > 0 {
        for precision in [Dtype::F32, Dtype::F16] {
            match Device::open("cuda", precision) {
                Ok(device) => devices.push(device),
                Err(error) => eprintln!("cuda in {precision}: {error}"),
            }
        }
    }
    for device in devices {
        let limits = Limits::measure(&device, Duration::from_secs(4)).expect("the device works");
        print!("{} in {}: {}", device.name(), device.precision(), limits_text(&limits, None));
        for (name, side, channels, batch) in NETWORKS {
            let model = model(name, side, channels);
            let merged = fully_merged(&model, None, &Config::default()).expect("blocks merge");
            let title = format!("{}_{}/{name}_{side}x{side}", device.name(), device.precision());
            let mut group = c.benchmark_group(title);
            group.measurement_time(Duration::from_secs(4)).sample_size(10);
            group.throughput(Throughput::Elements(batch as u64));
            for case in network_cases(&model, merged.as_ref()).expect("the graph is well formed") {
                let costs = case.costs(device.backend()).expect("the graph is well formed");
                let mut run = NetworkRun::new(&device, &case, batch).expect("it can be planned");
                let mut launches = run.launches().expect("the device works");
                let (mut time, mut count) = (Duration::ZERO, 0u64);
                let pass = if case.training { "train" } else { "infer" };
                group.bench_function(format!("{pass}/{}", case.name), |b| {
                    b.iter_custom(|iterations| {
                        let took = launches.total(iterations).expect("the device works");
                        (time, count) = (time + took, count + iterations);
                        took
                    });
                });
                if count > 0 {
                    let used = limits.roofline.utilization(&costs, batch, time.as_secs_f64() / count as f64);
                    let percent = [used.flop, used.byte, used.roofline].map(|share| 100.0 * share);
                    println!("  FLOP {:.1} %, byte {:.1} %, roofline {:.1} %", percent[0], percent[1], percent[2]);
                }
            }
            group.finish();
        }
    }
}

criterion_group!(benches, networks);
criterion_main!(benches);
