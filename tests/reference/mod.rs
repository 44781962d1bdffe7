//! Seven-loop f64 forward passes: the oracle of every operation. Written for reading, never used outside tests.

pub use depthshrinker::check::numbers;
use depthshrinker::ops::conv::ConvProblem;

pub fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

/// Index of a weight in the layout of the problem's family.
fn weight(p: &ConvProblem, o: usize, kh: usize, kw: usize, c: usize) -> usize {
    use depthshrinker::graph::ConvFamily;
    let c_in = p.input.c / p.groups;
    match p.family() {
        ConvFamily::Depthwise => (kh * p.window.k_w + kw) * p.output.c + o,
        ConvFamily::Pointwise | ConvFamily::Dense => ((o * p.window.k_h + kh) * p.window.k_w + kw) * c_in + c,
    }
}

/// Convolution, NHWC.
pub fn conv(p: &ConvProblem, x: &[f64], w: &[f64]) -> Vec<f64> {
    let (input, output, window) = (p.input, p.output, p.window);
    let (group_in, group_out) = (input.c / p.groups, output.c / p.groups);
    let mut y = vec![0.0; p.n * output.len()];
    for n in 0..p.n {
        for oh in 0..output.h {
            for ow in 0..output.w {
                for o in 0..output.c {
                    let mut sum = 0.0;
                    for kh in 0..window.k_h {
                        for kw in 0..window.k_w {
                            let ih = (oh * window.stride_h + kh) as isize - window.pad.top as isize;
                            let iw = (ow * window.stride_w + kw) as isize - window.pad.left as isize;
                            if ih < 0 || iw < 0 || ih >= input.h as isize || iw >= input.w as isize {
                                continue;
                            }
                            let pixel = (n * input.h + ih as usize) * input.w + iw as usize;
                            for c in 0..group_in {
                                let channel = o / group_out * group_in + c;
                                sum += x[pixel * input.c + channel] * w[weight(p, o, kh, kw, c)];
                            }
                        }
                    }
                    y[((n * output.h + oh) * output.w + ow) * output.c + o] = sum;
                }
            }
        }
    }
    y
}

/// Batch normalisation with batch statistics over `[pixels, c]`.
pub fn batch_norm(y: &[f64], gamma: &[f64], beta: &[f64], eps: f64) -> Vec<f64> {
    let c = gamma.len();
    let pixels = y.len() / c;
    let mut z = vec![0.0; y.len()];
    for i in 0..c {
        let channel = || y.iter().skip(i).step_by(c);
        let mean = channel().sum::<f64>() / pixels as f64;
        let var = channel().map(|v| (v - mean) * (v - mean)).sum::<f64>() / pixels as f64;
        for p in 0..pixels {
            z[p * c + i] = gamma[i] * (y[p * c + i] - mean) / (var + eps).sqrt() + beta[i];
        }
    }
    z
}

/// Clamp to (0, limit) with a slope outside.
pub fn clamp(x: f64, limit: f64, slope: f64) -> f64 {
    if x < 0.0 {
        slope * x
    } else if x > limit {
        limit + slope * (x - limit)
    } else {
        x
    }
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The first element that differs by more than `tolerance` times the largest expected magnitude, described.
pub fn compare(what: &str, got: &[f32], expected: &[f64], tolerance: f64) -> Result<(), String> {
    if got.len() != expected.len() {
        return Err(format!("{what}: {} elements, expected {}", got.len(), expected.len()));
    }
    let scale = expected.iter().fold(1e-3f64, |m, v| m.max(v.abs()));
    let worst = got
        .iter()
        .zip(expected)
        .enumerate()
        .map(|(i, (&g, &e))| (i, if g.is_finite() { (f64::from(g) - e).abs() } else { f64::INFINITY }))
        .fold((0, 0.0), |a, b| if b.1 > a.1 { b } else { a });
    if worst.1 > tolerance * scale {
        let (g, e) = (got[worst.0], expected[worst.0]);
        return Err(format!("{what}: element {} is {g}, expected {e} (scale {scale}, tolerance {tolerance})", worst.0));
    }
    Ok(())
}

/// Checks a gradient against central differences of `loss` along random directions.
pub fn check_gradient(
    what: &str,
    gradient: &[f32],
    at: &[f64],
    loss: impl Fn(&[f64]) -> f64,
    tolerance: f64,
) -> Result<(), String> {
    const STEP: f64 = 1e-6;
    // Every element in one direction or another, and a few alone.
    let singles = [0, gradient.len() / 2, gradient.len() - 1];
    for direction in 0..6 {
        let d: Vec<f64> = match direction {
            0..3 => widen(&numbers(900 + direction, at.len())),
            _ => (0..at.len()).map(|i| f64::from(i == singles[direction as usize - 3])).collect(),
        };
        let moved = |sign: f64| -> Vec<f64> { at.iter().zip(&d).map(|(a, d)| a + sign * STEP * d).collect() };
        let expected = (loss(&moved(1.0)) - loss(&moved(-1.0))) / (2.0 * STEP);
        let got = dot(&widen(gradient), &d);
        let scale = widen(gradient).iter().zip(&d).map(|(g, d)| (g * d) * (g * d)).sum::<f64>().sqrt().max(1e-2);
        if (got - expected).abs() > tolerance * scale.max(expected.abs()) {
            return Err(format!("{what}: along direction {direction} {got}, differences say {expected}"));
        }
    }
    Ok(())
}
