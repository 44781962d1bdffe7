//! Convolutions of every family, forward and both gradients: the layers of a MobileNetV2 block against the one dense
//! convolution it merges into. Throughput is in multiply-accumulates ("elements") per second.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use depthshrinker::device::{View, ViewMut};
use depthshrinker::graph::{Bias, Conv};
use depthshrinker::ops::conv::{self, ConvBias, ConvProblem};
use depthshrinker::shape::{Shape, Window};

const BATCH: usize = 64;

/// Name, (size, c_in), c_out, kernel, stride, groups.
type Layer = (&'static str, (usize, usize), usize, usize, usize, usize);

/// The parts of inverted residuals of MobileNetV2-0.5 on 28×28 images, and what each block merges into.
const LAYERS: &[Layer] = &[
    ("block1/expand", (28, 8), 48, 1, 1, 1),
    ("block1/depthwise", (28, 48), 48, 3, 2, 48),
    ("block1/project", (14, 48), 16, 1, 1, 1),
    ("block1/merged", (28, 8), 16, 3, 2, 1),
    ("block2/expand", (14, 16), 96, 1, 1, 1),
    ("block2/depthwise", (14, 96), 96, 3, 1, 96),
    ("block2/project", (14, 96), 16, 1, 1, 1),
    ("block2/merged", (14, 16), 16, 3, 1, 1),
    ("block8/expand", (4, 32), 192, 1, 1, 1),
    ("block8/depthwise", (4, 192), 192, 3, 1, 192),
    ("block8/project", (4, 192), 32, 1, 1, 1),
    ("block8/merged", (4, 32), 32, 3, 1, 1),
];

fn convolutions(c: &mut Criterion) {
    for &(name, (size, c_in), c_out, k, stride, groups) in LAYERS {
        let conv = Conv { c_in, c_out, window: Window::square(k, stride, k / 2), groups, bias: Bias::None };
        let p = ConvProblem::new(&conv, Shape::new(size, size, c_in), BATCH).expect("every layer fits its input");
        let numbers = |len: usize| (0..len).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect::<Vec<f32>>();
        let (x, w, dy) = (numbers(BATCH * p.input.len()), numbers(p.weight_len()), numbers(BATCH * p.output.len()));
        let (mut y, mut dx, mut dw) = (dy.clone(), x.clone(), w.clone());

        let mut group = c.benchmark_group(name);
        group.measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300)).sample_size(20);
        group.throughput(Throughput::Elements(p.macs()));
        group.bench_function(BenchmarkId::from_parameter("forward"), |b| {
            b.iter(|| {
                let operands = (View::Host(black_box(&x)), View::Host(&w));
                conv::forward(&p, operands, ConvBias::None, None, None, ViewMut::Host(&mut y));
            });
        });
        // Both gradients are one walk: twice the multiply-accumulates.
        group.throughput(Throughput::Elements(2 * p.macs()));
        group.bench_function(BenchmarkId::from_parameter("backward"), |b| {
            b.iter(|| {
                let read = (View::Host(black_box(&x[..])), View::Host(&w[..]), View::Host(&dy[..]));
                conv::backward(&p, read, Some((ViewMut::Host(&mut dx), false)), ViewMut::Host(&mut dw), None);
            });
        });
        group.finish();
    }
}

criterion_group!(benches, convolutions);
criterion_main!(benches);
