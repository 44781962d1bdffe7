//! The operation table: one list of cases, each run in several modes against the seven-loop f64 reference.
//!
//! `forward` and `gradient` compare with the reference and its finite differences, `add` checks accumulation,
//! `threads` demands the same bits from one thread and from three; `tiles` are convolutions by Winograd's algorithm.

mod reference;

use std::process::Command;

use depthshrinker::check::{CONVOLUTIONS, ConvRow, NORMS, NormRow, problem};
use depthshrinker::device::{Device, View, ViewMut};
use depthshrinker::graph::{Bias, Conv};
use depthshrinker::ops::activation::{self, Act, Clamp};
use depthshrinker::ops::batch_norm::{BatchNormProblem, Normalised, StatisticsOut, SumsOut};
use depthshrinker::ops::conv::winograd::{self, WinogradProblem};
use depthshrinker::ops::conv::{ConvGradient, ConvInput, ConvProblem, GradientsOut};
use depthshrinker::ops::dropout::DropoutStream;
use depthshrinker::ops::epilogue::{BiasOperand, Epilogue};
use depthshrinker::ops::linear::LinearProblem;
use depthshrinker::ops::pad::{self, PadProblem};
use depthshrinker::ops::pool::{self, PoolProblem};
use depthshrinker::ops::{add, batch_norm, conv, dropout, linear};
use depthshrinker::shape::{Lines, Padding, Shape, Window};
use libtest_mimic::{Arguments, Failed, Trial};
use reference::{check_gradient, clamp, compare, dot, numbers, widen};

fn conv_name(p: &ConvProblem) -> String {
    let Window { k_h, k_w, stride_h, pad, .. } = p.window;
    let family = format!("{:?}", p.family()).to_lowercase();
    let pad = format!("{}{}{}{}", pad.top, pad.left, pad.bottom, pad.right);
    format!("{family}/n{}_{}_to_{}_k{k_h}x{k_w}_s{stride_h}_p{pad}_g{}", p.n, p.input, p.output.c, p.groups)
}

/// Depthwise problems that the host cuts in other ways than those of the table: into rows of an image and groups of images, with
/// strides and padding larger than the kernel, and where results do not fit into caches.
const HOST_CUTS: &[ConvRow] = &[
    (2, (5, 49, 16), 16, (3, 3), (2, 2), [1; 4], 16),
    (2, (4, 60, 16), 16, (5, 5), (1, 1), [2; 4], 16),
    (32, (9, 9, 8), 8, (15, 15), (1, 1), [7; 4], 8),
    (64, (2, 2, 8), 8, (3, 3), (1, 1), [11; 4], 8),
    (2, (40, 41, 48), 48, (3, 3), (1, 1), [1; 4], 48),
    (2, (40, 41, 48), 48, (3, 3), (2, 2), [1; 4], 48),
    (2, (9, 8, 8), 8, (2, 1), (3, 2), [0; 4], 8),
    (2, (1, 1, 8), 8, (3, 3), (1, 1), [1; 4], 8),
    (2, (2, 3, 8), 8, (3, 3), (1, 1), [4; 4], 8),
    // So large that results are written past the caches, in whole vectors and in parts of them.
    (4, (64, 64, 64), 64, (3, 3), (1, 1), [1; 4], 64),
    (3, (50, 102, 72), 72, (3, 3), (1, 1), [1; 4], 72),
    (2, (80, 82, 80), 80, (3, 3), (2, 2), [1; 4], 80),
];

/// Convolutions in tiles: kernels 3 and 5, both sizes of tiles, whole ones and parts of them, borders of all kinds, part of a last
/// vector, more tiles than a task takes, more weights than a cache keeps.
const IN_TILES: &[ConvRow] = &[
    (1, (16, 16, 16), 16, (3, 3), (1, 1), [1; 4], 1),
    (3, (14, 14, 24), 40, (3, 3), (1, 1), [1; 4], 1),
    (2, (17, 19, 40), 24, (3, 3), (1, 1), [0, 1, 2, 3], 1),
    (2, (19, 17, 100), 33, (3, 3), (1, 1), [0; 4], 1),
    (1, (4, 61, 17), 19, (3, 3), (1, 1), [5, 7, 1, 0], 1),
    (1, (13, 14, 112), 104, (3, 3), (1, 1), [1; 4], 1),
    (1, (9, 11, 24), 32, (5, 5), (1, 1), [2; 4], 1),
    (3, (12, 12, 40), 30, (5, 5), (1, 1), [0; 4], 1),
    (2, (10, 9, 20), 48, (5, 5), (1, 1), [4, 0, 1, 3], 1),
    // In small tiles.
    (3, (7, 7, 48), 64, (3, 3), (1, 1), [1; 4], 1),
    (2, (9, 8, 50), 35, (3, 3), (1, 1), [0, 1, 2, 0], 1),
    (1, (7, 7, 160), 161, (3, 3), (1, 1), [1; 4], 1),
];

/// Relative tolerance of an f32 sum of `k` products.
fn tolerance(k: usize) -> f64 {
    3e-7 * (k as f64).sqrt() + 1e-6
}

/// Operands of a convolution.
struct ConvData {
    x: Vec<f32>,
    w: Vec<f32>,
    dy: Vec<f32>,
}

fn conv_data(p: &ConvProblem) -> ConvData {
    ConvData { x: numbers(1, p.n * p.input.len()), w: numbers(2, p.weight_len()), dy: numbers(3, p.n * p.output.len()) }
}

/// dx and dw; dx starts from `seed` where it is to be added to.
fn conv_gradients(p: &ConvProblem, d: &ConvData, seed: Option<f32>) -> (Vec<f32>, Vec<f32>) {
    let mut dx = vec![seed.unwrap_or(f32::NAN); d.x.len()];
    let mut dw = vec![f32::NAN; d.w.len()];
    let out = GradientsOut {
        dx: Some((ViewMut::Host(&mut dx), seed.is_some())),
        dw: ViewMut::Host(&mut dw),
        db: None,
        sums: None,
    };
    let dy = ConvGradient::Stored(View::Host(&d.dy));
    conv::backward(p, ConvInput::Stored(View::Host(&d.x)), View::Host(&d.w), dy, out);
    (dx, dw)
}

fn conv_forward(p: &ConvProblem, d: &ConvData) -> Vec<f32> {
    let mut y = vec![f32::NAN; d.dy.len()];
    conv::forward(p, View::Host(&d.x), View::Host(&d.w), &Epilogue::default(), ViewMut::Host(&mut y));
    y
}

/// What a mode asks of a convolution.
type ConvMode = fn(&ConvProblem, &ConvData) -> Result<(), String>;

fn conv_trial(kind: &str, p: ConvProblem, mode: &str, run: ConvMode) -> Trial {
    let name = format!("{kind}/{}/{mode}", conv_name(&p));
    Trial::test(name, move || run(&p, &conv_data(&p)).map_err(Failed::from))
}

fn conv_trials(p: ConvProblem) -> Vec<Trial> {
    let trial = |mode: &str, run: ConvMode| conv_trial("conv", p, mode, run);
    vec![
        trial("forward", |p, d| {
            let expected = reference::conv(p, &widen(&d.x), &widen(&d.w));
            compare("y", &conv_forward(p, d), &expected, tolerance(p.weight_len() / p.output.c))
        }),
        trial("finish", |p, d| {
            // Bias map, residual and activation on each piece, against the same by hand.
            let (map, residual) = (numbers(4, p.output.len()), numbers(5, d.dy.len()));
            let mut y = vec![f32::NAN; d.dy.len()];
            let epilogue = Epilogue {
                bias: BiasOperand::Map(View::Host(&map)),
                residual: Some(View::Host(&residual)),
                act: Some(Act::new(Some(1.5), 0.25)),
            };
            conv::forward(p, View::Host(&d.x), View::Host(&d.w), &epilogue, ViewMut::Host(&mut y));
            let expected: Vec<f64> = reference::conv(p, &widen(&d.x), &widen(&d.w))
                .iter()
                .enumerate()
                .map(|(i, v)| clamp(v + f64::from(map[i % map.len()]) + f64::from(residual[i]), 1.5, 0.25))
                .collect();
            compare("y", &y, &expected, tolerance(p.weight_len() / p.output.c))
        }),
        trial("gradient", |p, d| {
            let (dx, dw) = conv_gradients(p, d, None);
            let (x, w, dy) = (widen(&d.x), widen(&d.w), widen(&d.dy));
            check_gradient("dx", &dx, &x, |x| dot(&dy, &reference::conv(p, x, &w)), 1e-4)?;
            check_gradient("dw", &dw, &w, |w| dot(&dy, &reference::conv(p, &x, w)), 1e-4)
        }),
        trial("add", |p, d| {
            let (dx, _) = conv_gradients(p, d, None);
            let (added, _) = conv_gradients(p, d, Some(0.5));
            let expected: Vec<f64> = dx.iter().map(|v| f64::from(*v) + 0.5).collect();
            compare("dx", &added, &expected, 1e-5)
        }),
        trial("threads", |p, d| {
            same_bits(|| {
                let (dx, dw) = conv_gradients(p, d, None);
                [conv_forward(p, d), dx, dw].concat()
            })
        }),
    ]
}

/// A convolution in tiles, from its weights as they are.
fn forward_in_tiles(p: &ConvProblem, d: &ConvData, epilogue: &Epilogue<View<'_>, Act<'_>>) -> Vec<f32> {
    let problem = WinogradProblem::new(*p).expect("a convolution that is computed in tiles");
    let mut y = vec![f32::NAN; p.n * p.output.len()];
    winograd::forward(&problem, View::Host(&d.x), View::Host(&d.w), epilogue, ViewMut::Host(&mut y));
    y
}

fn tiles_trials(p: ConvProblem) -> Vec<Trial> {
    let trial = |mode: &str, run: ConvMode| conv_trial("tiles", p, mode, run);
    vec![
        trial("forward", |p, d| {
            let expected = reference::conv(p, &widen(&d.x), &widen(&d.w));
            // Errors are about twice those of a sum.
            let tolerance = 2.0 * tolerance(p.weight_len() / p.output.c);
            compare("y", &forward_in_tiles(p, d, &Epilogue::default()), &expected, tolerance)
        }),
        trial("finish", |p, d| {
            let len = d.dy.len();
            for (bias, act) in [
                (numbers(4, p.output.len()), Act::new(Some(1.5), 0.25)),
                (numbers(6, p.output.c), Act::new(Some(1.5), 0.0)),
            ] {
                let residual = numbers(5, len);
                let operand = match bias.len() == p.output.c {
                    true => BiasOperand::Channel(View::Host(&bias)),
                    false => BiasOperand::Map(View::Host(&bias)),
                };
                let epilogue = Epilogue { bias: operand, residual: Some(View::Host(&residual)), act: Some(act) };
                let y = forward_in_tiles(p, d, &epilogue);
                let sums = forward_in_tiles(p, d, &Epilogue::default());
                let expected = (0..len).map(|i| {
                    let sum = f64::from(sums[i]) + f64::from(bias[i % bias.len()]) + f64::from(residual[i]);
                    clamp(sum, 1.5, f64::from(act.clamp.slope))
                });
                compare("y", &y, &expected.collect::<Vec<f64>>(), 1e-6)?;
            }
            Ok(())
        }),
        // Nor do weights that are packed ahead, or images alone, change a bit.
        trial("threads", |p, d| {
            let problem = WinogradProblem::new(*p).expect("a convolution that is computed in tiles");
            let mut packed = vec![f32::NAN; problem.packed_elements()];
            problem.pack(&d.w, &mut packed);
            let epilogue = Epilogue::default();
            let all = forward_in_tiles(p, d, &epilogue);
            for (x, expected) in d.x.chunks(p.input.len()).zip(all.chunks(p.output.len())) {
                let one = WinogradProblem::new(p.batch(1)).expect("the same for one image");
                let mut y = vec![f32::NAN; expected.len()];
                let w = View::Packed(&d.w, &packed);
                winograd::forward(&one, View::Host(x), w, &epilogue, ViewMut::Host(&mut y));
                assert_eq!(y, expected);
            }
            same_bits(|| forward_in_tiles(p, d, &Epilogue::default()))
        }),
    ]
}

/// Runs on one thread, on three, and on three again, and demands the same bits.
fn same_bits(run: impl Fn() -> Vec<f32> + Sync) -> Result<(), String> {
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a small pool");
        pool.install(|| run().into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let one = on(1);
    for other in [on(3), on(3)] {
        if let Some(i) = (0..one.len()).find(|&i| one[i] != other[i]) {
            return Err(format!("element {i} differs between one thread and three"));
        }
    }
    Ok(())
}

/// A batch-norm with its inputs and outputs.
struct Norm {
    p: BatchNormProblem,
    y: Vec<f32>,
    dz: Vec<f32>,
    residual: Option<Vec<f32>>,
    gamma: Vec<f32>,
    beta: Vec<f32>,
    clamp: Option<Clamp>,
}

struct NormGradients {
    z: Vec<f32>,
    dy: Vec<f32>,
    d_gamma: Vec<f32>,
    d_beta: Vec<f32>,
    d_residual: Vec<f32>,
    dw: Vec<f32>,
    score: f64,
    running: [Vec<f32>; 2],
}

impl Norm {
    fn new(row: &NormRow) -> Self {
        let &(lines, w, c, residual, act) = row;
        let len = lines * w * c;
        // A mean far from zero, where naive variances lose their digits.
        let y = numbers(11, len).iter().enumerate().map(|(i, v)| v + (i % c % 5) as f32 * 3.0).collect();
        Self {
            p: BatchNormProblem { shape: Lines { lines, w, c }, eps: 1e-5, momentum: 0.1 },
            y,
            dz: numbers(12, len),
            residual: residual.then(|| numbers(13, len)),
            gamma: numbers(14, c).iter().map(|v| 1.0 + 0.3 * v).collect(),
            beta: numbers(15, c),
            clamp: act.map(|(limit, slope)| Clamp::new(Some(limit), slope)),
        }
    }

    fn reference(&self, y: &[f64], gamma: &[f64], beta: &[f64], residual: Option<&[f64]>) -> Vec<f64> {
        let mut z = reference::batch_norm(y, gamma, beta, f64::from(self.p.eps));
        if let Some(residual) = residual {
            z.iter_mut().zip(residual).for_each(|(z, r)| *z += r);
        }
        if let Some(c) = self.clamp {
            z.iter_mut().for_each(|z| *z = clamp(*z, f64::from(c.limit), f64::from(c.slope)));
        }
        z
    }

    /// What is normalised, with what follows.
    fn normalised<'a>(&'a self, y: &'a [f32], statistics: &'a [f32]) -> Normalised<'a> {
        Normalised {
            y: View::Host(y),
            gamma: View::Host(&self.gamma),
            beta: View::Host(&self.beta),
            statistics: View::Host(statistics),
            residual: self.residual.as_deref().map(View::Host),
            act: self.clamp.map(Act::from),
        }
    }

    /// As it is fused in training: the batch-norm behind an identity-like pointwise convolution, so that dw is seen too.
    fn run(&self) -> NormGradients {
        let p = &self.p;
        let (Lines { lines, w, c }, len) = (p.shape, self.y.len());
        let window = Window::square(1, 1, 0);
        let conv = Conv { c_in: c, c_out: c, window, groups: 1, bias: Bias::None };
        let conv = ConvProblem::new(&conv, Shape::new(lines, w, c), 1).expect("fits");
        let mut identity = vec![0.0; c * c];
        (0..c).for_each(|i| identity[i * c + i] = 1.0);
        let mut running = [vec![0.5; c], vec![2.0; c]];
        let (mut saved, mut raw, mut z) = (vec![f32::NAN; 2 * c], vec![f32::NAN; len], vec![f32::NAN; len]);
        let [mean, var] = &mut running;
        let out =
            StatisticsOut { statistics: ViewMut::Host(&mut saved), running: [ViewMut::Host(mean), ViewMut::Host(var)] };
        let x = ConvInput::Stored(View::Host(&self.y));
        conv::forward_with_statistics(&conv, x, View::Host(&identity), ViewMut::Host(&mut raw), p, out);
        let of = self.normalised(&raw, &saved);
        batch_norm::normalise(p, &of, ViewMut::Host(&mut z));
        let nan = |n: usize| vec![f32::NAN; n];
        let (mut dy, mut dw, mut d_gamma, mut d_beta) = (nan(len), nan(c * c), nan(c), nan(c));
        let mut d_residual = nan(self.residual.as_ref().map_or(0, Vec::len));
        let (mut score, mut sums) = ([0.0], vec![f64::NAN; 2 * c]);
        let out = SumsOut {
            sums: ViewMut::HostSums(&mut sums),
            d_gamma: ViewMut::Host(&mut d_gamma),
            d_beta: ViewMut::Host(&mut d_beta),
            score: Some(ViewMut::Host(&mut score)),
        };
        let into = self.residual.is_some().then_some((ViewMut::Host(&mut d_residual[..]), false));
        batch_norm::gradient_sums(p, &of, View::Host(&self.dz), into, out);
        let gradient = ConvGradient::Formed { problem: *p, of, dz: View::Host(&self.dz), sums: View::HostSums(&sums) };
        let out = GradientsOut {
            dx: Some((ViewMut::Host(&mut dy), false)),
            dw: ViewMut::Host(&mut dw),
            db: None,
            sums: None,
        };
        conv::backward(&conv, x, View::Host(&identity), gradient, out);
        let score = f64::from(score[0]);
        NormGradients { z, dy, d_gamma, d_beta, d_residual, dw, score, running }
    }
}

fn norm_forward_case(norm: &Norm) -> Result<(), String> {
    let residual = norm.residual.as_deref().map(widen);
    let expected = norm.reference(&widen(&norm.y), &widen(&norm.gamma), &widen(&norm.beta), residual.as_deref());
    let got = norm.run();
    compare("z", &got.z, &expected, 1e-5)?;
    // Running statistics: a tenth of the batch's mean and unbiased variance.
    let c = norm.p.shape.c;
    let pixels = norm.y.len() / c;
    let column = |i: usize| norm.y.iter().skip(i).step_by(c).map(|&v| f64::from(v));
    let mean: Vec<f64> = (0..c).map(|i| column(i).sum::<f64>() / pixels as f64).collect();
    let var = |i: usize| column(i).map(|v| (v - mean[i]).powi(2)).sum::<f64>() / (pixels - 1) as f64;
    let running_mean: Vec<f64> = mean.iter().map(|m| 0.9 * 0.5 + 0.1 * m).collect();
    let running_var: Vec<f64> = (0..c).map(|i| 0.9 * 2.0 + 0.1 * var(i)).collect();
    compare("running mean", &got.running[0], &running_mean, 1e-6)?;
    compare("running variance", &got.running[1], &running_var, 1e-5)
}

fn norm_gradient_case(norm: &Norm) -> Result<(), String> {
    let got = norm.run();
    let (y, gamma, beta) = (widen(&norm.y), widen(&norm.gamma), widen(&norm.beta));
    let residual = norm.residual.as_deref().map(widen);
    let r = residual.as_deref();
    let dz = widen(&norm.dz);
    check_gradient("dy", &got.dy, &y, |y| dot(&dz, &norm.reference(y, &gamma, &beta, r)), 2e-3)?;
    check_gradient("dγ", &got.d_gamma, &gamma, |g| dot(&dz, &norm.reference(&y, g, &beta, r)), 2e-3)?;
    check_gradient("dβ", &got.d_beta, &beta, |b| dot(&dz, &norm.reference(&y, &gamma, b, r)), 2e-3)?;
    if let Some(residual) = &residual {
        let loss = |r: &[f64]| dot(&dz, &norm.reference(&y, &gamma, &beta, Some(r)));
        check_gradient("dr", &got.d_residual, residual, loss, 2e-3)?;
    }
    // dw of the identity convolution is Σ dy·xᵀ over the pixels.
    let c = norm.p.shape.c;
    let expected: Vec<f64> = (0..c * c)
        .map(|i| (0..y.len() / c).map(|p| f64::from(got.dy[p * c + i / c]) * y[p * c + i % c]).sum())
        .collect();
    compare("dw", &got.dw, &expected, 1e-4)
}

fn norm_score_case(norm: &Norm) -> Result<(), String> {
    // ⟨dz, v − φ(v)⟩ with φ the activation without slope.
    let got = norm.run();
    let residual = norm.residual.as_deref().map(widen);
    let plain = Norm { clamp: None, ..Norm::new_like(norm) };
    let v = plain.reference(&widen(&norm.y), &widen(&norm.gamma), &widen(&norm.beta), residual.as_deref());
    let limit = norm.clamp.map(|c| f64::from(c.limit));
    let terms =
        v.iter().zip(&norm.dz).map(|(v, dz)| limit.map_or(0.0, |limit| f64::from(*dz) * (v - clamp(*v, limit, 0.0))));
    let expected: f64 = terms.clone().sum();
    let scale = terms.map(f64::abs).sum::<f64>().max(1.0);
    if (got.score - expected).abs() > 1e-5 * scale {
        return Err(format!("score gradient {}, expected {expected}", got.score));
    }
    Ok(())
}

fn norm_trials(row: &'static NormRow) -> Vec<Trial> {
    let name = format!("{}x{}x{}_residual_{}_{:?}", row.0, row.1, row.2, row.3, row.4);
    let trial = |mode: &str, run: fn(&Norm) -> Result<(), String>| {
        Trial::test(format!("conv_bn/{name}/{mode}"), move || run(&Norm::new(row)).map_err(Failed::from))
    };
    vec![
        trial("forward", norm_forward_case),
        trial("gradient", norm_gradient_case),
        trial("score", norm_score_case),
        trial("unfused", unfused),
        trial("threads", |norm| {
            same_bits(|| {
                let g = norm.run();
                [g.z, g.dy, g.d_gamma, g.d_beta, g.d_residual, g.dw, vec![g.score as f32]].concat()
            })
        }),
    ]
}

impl Norm {
    fn new_like(other: &Self) -> Self {
        Self {
            p: other.p,
            y: other.y.clone(),
            dz: other.dz.clone(),
            residual: other.residual.clone(),
            gamma: other.gamma.clone(),
            beta: other.beta.clone(),
            clamp: other.clamp,
        }
    }
}

/// Batch-norm, addition and activation as separate operations give what the fused step gives.
fn unfused(norm: &Norm) -> Result<(), String> {
    let fused = norm.run();
    let (p, len) = (&norm.p, norm.y.len());
    let c = p.shape.c;
    let nan = || vec![f32::NAN; len];
    let (mut z, mut saved) = (nan(), vec![0.0; 2 * c]);
    let (mut mean, mut var) = (vec![0.5; c], vec![2.0; c]);
    let running = [ViewMut::Host(&mut mean[..]), ViewMut::Host(&mut var[..])];
    let out = StatisticsOut { statistics: ViewMut::Host(&mut saved), running };
    batch_norm::statistics(p, View::Host(&norm.y), out);
    let of = Normalised { residual: None, act: None, ..norm.normalised(&norm.y, &saved) };
    batch_norm::normalise(p, &of, ViewMut::Host(&mut z));
    if let Some(residual) = &norm.residual {
        let mut sum = nan();
        add::forward(View::Host(&z), View::Host(residual), ViewMut::Host(&mut sum));
        z = sum;
    }
    let mut dv = norm.dz.clone();
    let before = z.clone();
    let mut score = [0.0];
    if let Some(clamp) = norm.clamp {
        let mut y = nan();
        activation::forward(clamp.into(), p.shape, View::Host(&before), ViewMut::Host(&mut y));
        z = y;
        let inputs = activation::ActivationInputs { x: View::Host(&before), dy: View::Host(&norm.dz) };
        let into = Some(ViewMut::Host(&mut score[..]));
        activation::backward(clamp.into(), p.shape, inputs, ViewMut::Host(&mut dv), false, into);
    }
    // Added to ones, to see accumulation.
    let (mut dy, mut d_gamma, mut d_beta) = (vec![1.0; len], vec![0.0; c], vec![0.0; c]);
    let mut sums = vec![f64::NAN; 2 * c];
    let out = SumsOut {
        sums: ViewMut::HostSums(&mut sums),
        d_gamma: ViewMut::Host(&mut d_gamma),
        d_beta: ViewMut::Host(&mut d_beta),
        score: None,
    };
    batch_norm::gradient_sums(p, &of, View::Host(&dv), None, out);
    batch_norm::gradient(p, &of, View::Host(&dv), View::HostSums(&sums), ViewMut::Host(&mut dy), true);
    let plus_one: Vec<f64> = fused.dy.iter().map(|v| f64::from(*v) + 1.0).collect();
    compare("z", &z, &widen(&fused.z), 1e-6)?;
    compare("dy", &dy, &plus_one, 1e-5)?;
    compare("dγ", &d_gamma, &widen(&fused.d_gamma), 1e-5)?;
    compare("dβ", &d_beta, &widen(&fused.d_beta), 1e-5)?;
    let score = f64::from(score[0]);
    if (score - fused.score).abs() > 1e-4 * score.abs().max(1.0) {
        return Err(format!("score {score} against {}", fused.score));
    }
    Ok(())
}

fn global_pool_case() -> Result<(), String> {
    let (n, pixels, c) = (3, 20, 24);
    let input = Shape::new(4, 5, c);
    let (x, dy) = (numbers(1, n * pixels * c), numbers(2, n * c));
    let mut y = vec![f32::NAN; n * c];
    pool::global::forward(input, View::Host(&x), ViewMut::Host(&mut y));
    let mean = |i: usize| {
        let (n, c_index) = (i / c, i % c);
        (0..pixels).map(|p| f64::from(x[(n * pixels + p) * c + c_index])).sum::<f64>() / pixels as f64
    };
    compare("y", &y, &(0..n * c).map(mean).collect::<Vec<_>>(), 1e-6)?;
    let mut dx = vec![2.0; x.len()];
    pool::global::backward(input, View::Host(&dy), ViewMut::Host(&mut dx), true);
    let expected: Vec<f64> =
        (0..x.len()).map(|i| 2.0 + f64::from(dy[i / (pixels * c) * c + i % c]) / pixels as f64).collect();
    compare("dx", &dx, &expected, 1e-6)
}

fn max_pool_of_not_a_number() -> Result<(), String> {
    let (input, output) = (Shape::new(2, 2, 1), Shape::new(1, 1, 1));
    let p = PoolProblem { n: 1, input, output, window: Window::square(2, 2, 0) };
    let mut y = [0.0f32];
    pool::max::forward(&p, View::Host(&[1.0, f32::NAN, 3.0, f32::NEG_INFINITY]), ViewMut::Host(&mut y));
    if y[0].is_nan() { Ok(()) } else { Err(format!("{y:?}")) }
}

fn max_pool_of_infinitely_small() -> Result<(), String> {
    let (input, output) = (Shape::new(2, 2, 1), Shape::new(1, 1, 1));
    let p = PoolProblem { n: 1, input, output, window: Window::square(2, 2, 0) };
    let (x, mut dx) = ([f32::NEG_INFINITY; 4], [f32::NAN; 4]);
    pool::max::backward(&p, View::Host(&x), View::Host(&[2.0]), ViewMut::Host(&mut dx), false);
    if dx == [2.0, 0.0, 0.0, 0.0] { Ok(()) } else { Err(format!("{dx:?}")) }
}

fn dropout_case() -> Result<(), String> {
    let x = vec![1.0f32; 100_000];
    let run = |step| {
        let mut y = vec![f32::NAN; x.len()];
        let mut stream = DropoutStream::new(&Device::Cpu).expect("host memory");
        stream.set(7, step).expect("a host");
        dropout::apply(0.2, &stream, View::Host(&x), ViewMut::Host(&mut y), false);
        y
    };
    let (a, b) = (run(3), run(4));
    let dropped = a.iter().filter(|&&v| v == 0.0).count() as f64 / x.len() as f64;
    let scaled = a.iter().all(|&v| v == 0.0 || (v - 1.25).abs() < 1e-6);
    if a != run(3) || a == b || !scaled || (dropped - 0.2).abs() > 0.01 {
        return Err(format!("dropped {dropped}, scaled {scaled}, repeats {}", a == run(3)));
    }
    Ok(())
}

fn activation_of_not_a_number() -> Result<(), String> {
    let relu6 = Act::new(Some(6.0), 0.0);
    let x = [f32::NAN, -1.0, 3.0, 7.0, f32::INFINITY, f32::NEG_INFINITY];
    let mut y = [0.0f32; 6];
    activation::forward(relu6, Lines { lines: 1, w: 6, c: 1 }, View::Host(&x), ViewMut::Host(&mut y));
    if y[0].is_nan() && y[1..] == [0.0, 3.0, 6.0, 6.0, 0.0] { Ok(()) } else { Err(format!("{y:?}")) }
}

fn small_trials() -> Vec<Trial> {
    let trial =
        |name: &str, run: fn() -> Result<(), String>| Trial::test(name.to_owned(), move || run().map_err(Failed::from));
    vec![
        trial("linear/7x33_to_10", || linear_case(LinearProblem { n: 7, c_in: 33, c_out: 10 })),
        trial("linear/130x64_to_3", || linear_case(LinearProblem { n: 130, c_in: 64, c_out: 3 })),
        trial("pool/3x20x24", global_pool_case),
        trial("max_pool/3x3_stride_2", || max_pool_case((3, Shape::new(9, 12, 6)), Window::square(3, 2, 1))),
        trial("max_pool/2x2_stride_2", || max_pool_case((2, Shape::new(7, 8, 17)), Window::square(2, 2, 0))),
        trial("max_pool/3x3_stride_1", || max_pool_case((1, Shape::new(5, 4, 3)), Window::square(3, 1, 1))),
        trial("max_pool/5x2_asymmetric", || {
            let pad = Padding { top: 4, left: 0, bottom: 1, right: 1 };
            max_pool_case((2, Shape::new(11, 6, 8)), Window { k_h: 5, k_w: 2, stride_h: 3, stride_w: 3, pad })
        }),
        trial("avg_pool/3x3_stride_2", || avg_pool_case((3, Shape::new(9, 12, 6)), Window::square(3, 2, 1))),
        trial("avg_pool/2x2_stride_2", || avg_pool_case((2, Shape::new(7, 8, 17)), Window::square(2, 2, 0))),
        trial("avg_pool/3x3_stride_1", || avg_pool_case((1, Shape::new(5, 4, 3)), Window::square(3, 1, 1))),
        trial("avg_pool/5x2_asymmetric", || {
            let pad = Padding { top: 4, left: 0, bottom: 1, right: 1 };
            avg_pool_case((2, Shape::new(11, 6, 8)), Window { k_h: 5, k_w: 2, stride_h: 3, stride_w: 3, pad })
        }),
        trial("pad/zeros_around", || pad_case((2, Shape::new(7, 5, 6)), [1, 2, 0, 1])),
        trial("pad/cut_off", || pad_case((3, Shape::new(9, 8, 3)), [-1, -2, -3, 0])),
        trial("pad/both", || pad_case((1, Shape::new(5, 9, 17)), [2, -1, -2, 3])),
        trial("max_pool/not_a_number_wins", max_pool_of_not_a_number),
        trial("max_pool/infinitely_small_has_a_winner", max_pool_of_infinitely_small),
        trial("dropout/keeps_its_share_and_repeats", dropout_case),
        trial("activation/not_a_number_stays_and_nothing_becomes_one", activation_of_not_a_number),
        trial("buffer/round_trip", || {
            let mut buffer = Device::Cpu.upload(&[1.0, 2.0, 3.0]).map_err(|e| e.to_string())?;
            buffer.write(&[5.0]).map_err(|e| e.to_string())?;
            let data = buffer.view(0..3).host();
            if data[..] == [5.0, 2.0, 3.0] { Ok(()) } else { Err(format!("{data:?}")) }
        }),
    ]
}

/// The mean over all pixels.
/// The elements of x that the window of an element of y holds, in row-major order.
fn held(p: &PoolProblem, i: usize) -> Vec<usize> {
    let (input, output, window) = (p.input, p.output, p.window);
    let (image, rest) = (i / output.len(), i % output.len());
    let (row, col, c) = (rest / output.c / output.w, rest / output.c % output.w, rest % output.c);
    let inside = |v: usize| {
        let row = (row * window.stride_h + v / window.k_w).checked_sub(window.pad.top).filter(|&r| r < input.h)?;
        let col = (col * window.stride_w + v % window.k_w).checked_sub(window.pad.left).filter(|&c| c < input.w)?;
        Some(image * input.len() + (row * input.w + col) * input.c + c)
    };
    (0..window.taps()).filter_map(inside).collect()
}

/// Every pixel on its own: amounts above, left, below and right. The gradient goes back where the pixel came from.
fn pad_case((n, input): (usize, Shape), [top, left, bottom, right]: [isize; 4]) -> Result<(), String> {
    let size = |size: usize, before: isize, after: isize| (size as isize + before + after) as usize;
    let output = Shape::new(size(input.h, top, bottom), size(input.w, left, right), input.c);
    let p = PadProblem { n, input, output, top, left };
    let (x, dy) = (numbers(1, n * input.len()), numbers(2, n * output.len()));
    let (mut expected, mut gradient) = (vec![0.0f64; dy.len()], vec![0.0f64; x.len()]);
    for (i, dy) in dy.iter().enumerate() {
        let (image, rest) = (i / output.len(), i % output.len());
        let row = (rest / output.c / output.w) as isize - top;
        let col = (rest / output.c % output.w) as isize - left;
        if (0..input.h as isize).contains(&row) && (0..input.w as isize).contains(&col) {
            let at = ((image * input.h + row as usize) * input.w + col as usize) * input.c + rest % output.c;
            expected[i] = f64::from(x[at]);
            gradient[at] = f64::from(*dy);
        }
    }
    let (mut y, mut dx, mut added) = (vec![f32::NAN; dy.len()], vec![f32::NAN; x.len()], vec![2.0; x.len()]);
    pad::forward(&p, View::Host(&x), ViewMut::Host(&mut y), false);
    pad::forward(&p.transposed(), View::Host(&dy), ViewMut::Host(&mut dx), false);
    pad::forward(&p.transposed(), View::Host(&dy), ViewMut::Host(&mut added), true);
    compare("y", &y, &expected, 0.0)?;
    compare("dx", &dx, &gradient, 0.0)?;
    compare("dx, added", &added, &gradient.iter().map(|v| v + 2.0).collect::<Vec<_>>(), 1e-6)
}

/// The mean of every window on its own; what lies in the padding does not count.
fn avg_pool_case((n, input): (usize, Shape), window: Window) -> Result<(), String> {
    let (h, w) = window.output(input.h, input.w).expect("a row of the table fits");
    let p = PoolProblem { n, input, output: Shape::new(h, w, input.c), window };
    let (x, dy) = (numbers(1, n * input.len()), numbers(2, n * p.output.len()));
    let (mut expected, mut gradient) = (Vec::new(), vec![0.0f64; x.len()]);
    for (i, dy) in dy.iter().enumerate() {
        let places = held(&p, i);
        expected.push(places.iter().map(|&at| f64::from(x[at])).sum::<f64>() / places.len() as f64);
        places.iter().for_each(|&at| gradient[at] += f64::from(*dy) / places.len() as f64);
    }
    let mut y = vec![f32::NAN; dy.len()];
    pool::average::forward(&p, View::Host(&x), ViewMut::Host(&mut y));
    compare("y", &y, &expected, 1e-6)?;
    let (mut dx, mut added) = (vec![f32::NAN; x.len()], vec![2.0; x.len()]);
    pool::average::backward(&p, View::Host(&dy), ViewMut::Host(&mut dx), false);
    pool::average::backward(&p, View::Host(&dy), ViewMut::Host(&mut added), true);
    compare("dx", &dx, &gradient, 1e-6)?;
    compare("dx, added", &added, &gradient.iter().map(|v| v + 2.0).collect::<Vec<_>>(), 1e-6)
}

/// Every window looked at on its own; the values are few, so that ties are common.
fn max_pool_case((n, input): (usize, Shape), window: Window) -> Result<(), String> {
    let (h, w) = window.output(input.h, input.w).expect("a row of the table fits");
    let output = Shape::new(h, w, input.c);
    let p = PoolProblem { n, input, output, window };
    let x: Vec<f32> = numbers(1, n * input.len()).iter().map(|v| (v * 3.0).round()).collect();
    let dy = numbers(2, n * output.len());
    let (mut expected, mut gradient) = (Vec::new(), vec![0.0f64; x.len()]);
    for (i, dy) in dy.iter().enumerate() {
        let places = held(&p, i);
        let largest = places.iter().map(|&at| f64::from(x[at])).fold(f64::NEG_INFINITY, f64::max);
        let first = places.iter().find(|&&at| f64::from(x[at]) == largest).expect("a window holds a pixel");
        expected.push(largest);
        gradient[*first] += f64::from(*dy);
    }
    let mut y = vec![f32::NAN; dy.len()];
    pool::max::forward(&p, View::Host(&x), ViewMut::Host(&mut y));
    compare("y", &y, &expected, 0.0)?;
    let (mut dx, mut added) = (vec![f32::NAN; x.len()], vec![2.0; x.len()]);
    let (x, dy) = (View::Host(&x), View::Host(&dy));
    pool::max::backward(&p, x, dy, ViewMut::Host(&mut dx), false);
    pool::max::backward(&p, x, dy, ViewMut::Host(&mut added), true);
    compare("dx", &dx, &gradient, 1e-6)?;
    compare("dx, added", &added, &gradient.iter().map(|v| v + 2.0).collect::<Vec<_>>(), 1e-6)
}

fn linear_case(p: LinearProblem) -> Result<(), String> {
    let (x, w) = (numbers(1, p.n * p.c_in), numbers(2, p.c_out * p.c_in));
    let (b, dy) = (numbers(3, p.c_out), numbers(4, p.n * p.c_out));
    let mut y = vec![f32::NAN; dy.len()];
    linear::forward(p, View::Host(&x), View::Host(&w), View::Host(&b), ViewMut::Host(&mut y));
    let forward = |x: &[f64], w: &[f64], b: &[f64]| -> Vec<f64> {
        (0..p.n * p.c_out)
            .map(|i| b[i % p.c_out] + dot(&x[i / p.c_out * p.c_in..][..p.c_in], &w[i % p.c_out * p.c_in..][..p.c_in]))
            .collect()
    };
    let (x64, w64, b64, dy64) = (widen(&x), widen(&w), widen(&b), widen(&dy));
    compare("y", &y, &forward(&x64, &w64, &b64), tolerance(p.c_in))?;
    let (mut dx, mut dw, mut db) = (vec![f32::NAN; x.len()], vec![f32::NAN; w.len()], vec![f32::NAN; b.len()]);
    let inputs = linear::LinearInputs { x: View::Host(&x), w: View::Host(&w), dy: View::Host(&dy) };
    let out = linear::LinearGradientsOut {
        dx: Some((ViewMut::Host(&mut dx), false)),
        dw: ViewMut::Host(&mut dw),
        db: ViewMut::Host(&mut db),
    };
    linear::backward(p, inputs, out);
    check_gradient("dx", &dx, &x64, |x| dot(&dy64, &forward(x, &w64, &b64)), 1e-4)?;
    check_gradient("dw", &dw, &w64, |w| dot(&dy64, &forward(&x64, w, &b64)), 1e-4)?;
    check_gradient("db", &db, &b64, |b| dot(&dy64, &forward(&x64, &w64, b)), 1e-4)
}

/// The rows of a filter with narrower vector instructions than the widest, in a process of its own.
fn forced_trials() -> Vec<Trial> {
    let is_there = |name: &str| match name {
        #[cfg(target_arch = "x86_64")]
        "avx2" => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
        #[cfg(target_arch = "x86_64")]
        "avx512" => {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512cd")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
        }
        name => name == "scalar",
    };
    let names = ["avx512", "avx2", "scalar"].into_iter().filter(|name| is_there(name));
    let trial = |name: &'static str| Trial::test(format!("simd/{name}"), move || with_simd(name).map_err(Failed::from));
    names.map(trial).collect()
}

fn with_simd(name: &str) -> Result<(), String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    // Rows whose reference takes little time; among them are all kernels.
    for (rows, least) in
        [("/forward", 40), ("conv/depthwise", 70), ("conv/pointwise/n3_5x12", 5), ("conv/pointwise/n2_9x7", 5)]
    {
        let child = Command::new(&program).arg(rows).env("DEPTHSHRINKER_SIMD", name).output();
        let child = child.map_err(|error| error.to_string())?;
        let told = String::from_utf8_lossy(&child.stdout).into_owned();
        let passed = told.lines().filter(|line| line.ends_with("... ok")).count();
        if !child.status.success() || passed < least {
            return Err(format!("{passed} of at least {least} rows {rows} passed; {told}"));
        }
    }
    Ok(())
}

fn main() {
    let arguments = Arguments::from_args();
    let mut trials: Vec<Trial> =
        CONVOLUTIONS.iter().chain(HOST_CUTS).flat_map(|row| conv_trials(problem(row))).collect();
    trials.extend(IN_TILES.iter().flat_map(|row| tiles_trials(problem(row))));
    trials.extend(NORMS.iter().flat_map(norm_trials));
    trials.extend(small_trials());
    if std::env::var_os("DEPTHSHRINKER_SIMD").is_none() {
        trials.extend(forced_trials());
    }
    libtest_mimic::run(&arguments, trials).exit();
}
