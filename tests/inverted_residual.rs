//! The fused inverted residual on the host: against the three convolutions it is made of, and in equal bits for any
//! number of threads and any split of the batch.

use depthshrinker::check::{BLOCKS, BlockData, BlockRow};
use depthshrinker::device::{View, ViewMut};
use depthshrinker::dtype::Dtype;
use depthshrinker::ops::activation::Clamp;
use depthshrinker::ops::config::KernelTarget;
use depthshrinker::ops::conv::{self, ConvProblem};
use depthshrinker::ops::epilogue::{BiasOperand, Epilogue};
use depthshrinker::ops::inverted_residual::{FoldedConv, InvertedResidualOperands, InvertedResidualProblem, forward};
use depthshrinker::ops::step::Backend;
use depthshrinker::shape::{Padding, Shape, Window};

/// Rows whose images are cut into several bands, beside those of the table; of the last one some lie in the padding alone.
const LARGE: [BlockRow; 4] = [
    large((75, 50, 24), 144, 24, 3, 1),
    large((71, 66, 16), 80, 27, 5, 2),
    BlockRow { hidden: None, ..large((90, 64, 48), 0, 8, 3, 1) },
    BlockRow { window: (3, 1, [40; 4]), ..large((9, 8, 16), 24, 8, 3, 1) },
];

const fn large(input: (usize, usize, usize), hidden: usize, c_out: usize, k: usize, stride: usize) -> BlockRow {
    let shortcut = input.2 == c_out;
    BlockRow { n: 2, input, hidden: Some(hidden), c_out, window: (k, stride, [k / 2; 4]), shortcut, last: Some(1.0) }
}

fn rows() -> impl Iterator<Item = &'static BlockRow> {
    BLOCKS.iter().chain(&LARGE)
}

/// The result for images `first` up to those of the problem.
fn fused(row: &BlockRow, p: &InvertedResidualProblem, data: &BlockData, first: usize) -> Vec<f32> {
    let clamps = row.activations();
    let conv = |i: usize| FoldedConv { w: View::Host(&data.w[i]), b: View::Host(&data.b[i]), clamp: clamps[i] };
    let x = View::Host(&data.x[first * p.input.len()..][..p.n * p.input.len()]);
    let operands = InvertedResidualOperands {
        x,
        expand: row.hidden.map(|_| conv(0)),
        depthwise: conv(1),
        project: conv(2),
        residual: row.shortcut.then_some(x),
    };
    let mut y = vec![f32::NAN; p.n * p.output.len()];
    forward(p, operands, ViewMut::Host(&mut y));
    y
}

/// One convolution of the block on its own.
fn unfused(p: &ConvProblem, x: &[f32], (w, b): (&[f32], &[f32]), clamp: Clamp, residual: Option<&[f32]>) -> Vec<f32> {
    let mut y = vec![f32::NAN; p.n * p.output.len()];
    let epilogue = Epilogue {
        bias: BiasOperand::Channel(View::Host(b)),
        residual: residual.map(View::Host),
        act: Some(clamp.into()),
    };
    conv::forward(p, View::Host(x), View::Host(w), &epilogue, ViewMut::Host(&mut y));
    y
}

#[test]
fn it_gives_what_its_three_convolutions_give() {
    for row in rows() {
        let p = row.problem();
        let data = BlockData::new(&p);
        let clamps = row.activations();
        let params = |i: usize| (&data.w[i][..], &data.b[i][..]);
        let expanded = match p.expand() {
            Some(conv) => unfused(&conv, &data.x, params(0), clamps[0], None),
            None => data.x.clone(),
        };
        let filtered = unfused(&p.depthwise(), &expanded, params(1), clamps[1], None);
        let residual = row.shortcut.then_some(&data.x[..]);
        let expected = unfused(&p.project(), &filtered, params(2), clamps[2], residual);
        let got = fused(row, &p, &data, 0);
        let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let worst = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
        assert!(got.iter().all(|v| v.is_finite()), "{}: {got:?}", row.name());
        assert!(worst <= 2e-6 * scale, "{}: differs by {worst} where values are up to {scale}", row.name());
    }
}

#[test]
fn bits_depend_neither_on_threads_nor_on_the_split_of_a_batch() {
    for row in rows() {
        let row = BlockRow { n: 3, ..*row };
        let p = row.problem();
        let data = BlockData::new(&p);
        let on = |threads: usize, split: &[usize]| -> Vec<u32> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a small pool");
            let starts = split.iter().scan(0, |sum, n| {
                *sum += n;
                Some(*sum - n)
            });
            let run = |(first, &n): (usize, &usize)| {
                let part = InvertedResidualProblem { n, ..p };
                pool.install(|| fused(&row, &part, &data, first))
            };
            starts.zip(split).flat_map(run).map(f32::to_bits).collect()
        };
        let expected = on(1, &[3]);
        for (threads, split) in [(2, &[3][..]), (2, &[1, 1, 1]), (3, &[1, 2]), (1, &[2, 1])] {
            assert!(on(threads, split) == expected, "{}: {threads} threads, {split:?}", row.name());
        }
    }
}

#[test]
fn its_cost_is_that_of_its_convolutions_without_what_they_move_between_them() {
    let window = Window { pad: Padding::all(1), ..Window::square(3, 2, 0) };
    let p = InvertedResidualProblem::new(2, Shape::new(7, 5, 4), Some(24), 6, window).expect("fits");
    assert_eq!(p.output, Shape::new(4, 3, 6));
    assert_eq!(p.macs(), 2 * (35 * 4 * 24 + 12 * 9 * 24 + 12 * 24 * 6));
    assert_eq!(p.flops(), 2 * p.macs());
    assert_eq!(p.min_elements(), 2 * (35 * 4 + 12 * 6) + 4 * 24 + 9 * 24 + 24 * 6);
    let on = KernelTarget { dtype: Dtype::F32, arch: 70 };
    assert!(p.has_step(Backend::Cuda) && p.pays(Backend::Cuda, on));
    let wide = InvertedResidualProblem { hidden: 384, ..p };
    assert!(!wide.pays(Backend::Cuda, on) && wide.pays(Backend::Host, on));
    // In bands, which are of vectors of 16 bits.
    let vectors = InvertedResidualProblem { input: Shape::new(7, 5, 8), output: Shape::new(4, 3, 8), ..wide };
    assert!(!vectors.pays(Backend::Cuda, on) && vectors.pays(Backend::Cuda, KernelTarget { dtype: Dtype::F16, ..on }));
    let uneven = Window { stride_w: 1, ..window };
    assert!(!InvertedResidualProblem { window: uneven, ..p }.has_step(Backend::Cuda));
}

#[test]
#[should_panic(expected = "of another size")]
fn a_bias_of_another_size_is_refused() {
    let row = &BLOCKS[0];
    let p = row.problem();
    let mut data = BlockData::new(&p);
    data.b[1].pop();
    fused(row, &p, &data, 0);
}
