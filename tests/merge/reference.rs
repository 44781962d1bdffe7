//! A second opinion on what a graph computes: seven loops per convolution, f64, no code of the engine.

use std::collections::BTreeMap;

use depthshrinker::graph::{AvgPool, Conv, ConvFamily, Graph, MaxPool, NodeId, Op, Pad};
use depthshrinker::model::Model;
use depthshrinker::shape::{Shape, Window};
use depthshrinker::shrink::linear_segments;
use depthshrinker::shrink::merge::{Folded, MergeOptions, Merged, MergedSegment, fold, merge_segments};
use depthshrinker::shrink::padding::PaddingMode;
use proptest::test_runner::{Config as ProptestConfig, RngSeed};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal, Uniform};

/// A network with its weights in f64.
pub struct Reference {
    pub graph: Graph,
    pub weights: BTreeMap<String, Vec<f64>>,
    /// Slope of the switchable activations, per site.
    pub slopes: Vec<f64>,
}

impl Reference {
    pub fn new(model: &Model) -> Self {
        let wide = |data: &[f32]| data.iter().map(|&v| f64::from(v)).collect();
        Self {
            graph: model.graph.clone(),
            weights: model.weights.iter().map(|(k, t)| (k.clone(), wide(&t.data))).collect(),
            slopes: vec![0.0; model.graph.sites()],
        }
    }

    /// Puts the weights of a folded segment in, in f64.
    pub fn set_folded(&mut self, segment: &str, folded: &Folded) {
        let name = format!("{segment}.conv");
        self.weights.insert(format!("{name}.weight"), folded.weight.clone());
        let (suffix, _) = folded.conv.bias_param(folded.output).unwrap();
        self.weights.insert(format!("{name}.{suffix}"), folded.bias.clone());
    }

    /// Every value of one image, HWC.
    pub fn values(&self, image: &[f64]) -> Vec<Vec<f64>> {
        let shapes = self.graph.shapes().unwrap();
        let mut values: Vec<Vec<f64>> = Vec::new();
        for (id, node) in NodeId::enumerate(&self.graph.nodes) {
            let x = node.inputs.first().map_or(image, |&i| values[i].as_slice());
            let weight = |suffix: &str| self.weights.get(&format!("{}.{suffix}", node.name));
            let channels = shapes[id].c;
            let value = match node.op {
                Op::Input { .. } => image.to_vec(),
                Op::Conv(conv) => {
                    let mut y = convolve(&conv, x, shapes[node.inputs[0]], shapes[id], weight("weight").unwrap());
                    for (i, y) in y.iter_mut().enumerate() {
                        *y +=
                            weight("bias").map_or(0.0, |b| b[i % channels]) + weight("bias_map").map_or(0.0, |b| b[i]);
                    }
                    y
                }
                Op::BatchNorm(bn) => {
                    let of = |suffix: &str, i: usize| weight(suffix).unwrap()[i % channels];
                    let normal = |i: usize, x: f64| {
                        (x - of("running_mean", i)) / (of("running_var", i) + f64::from(bn.eps)).sqrt()
                            * of("weight", i)
                            + of("bias", i)
                    };
                    x.iter().enumerate().map(|(i, &x)| normal(i, x)).collect()
                }
                Op::Activation(act) => {
                    let slope = act.site.map_or(f64::from(act.slope), |m| self.slopes[m]);
                    let limit = act.limit.map_or(f64::INFINITY, f64::from);
                    x.iter().map(|&x| x.clamp(0.0, limit) * (1.0 - slope) + x * slope).collect()
                }
                Op::Add => x.iter().zip(&values[node.inputs[1]]).map(|(a, b)| a + b).collect(),
                Op::GlobalAvgPool => {
                    let pixels = x.len() / channels;
                    (0..channels).map(|c| x.iter().skip(c).step_by(channels).sum::<f64>() / pixels as f64).collect()
                }
                Op::MaxPool(MaxPool { window }) => {
                    let largest = |held: &[f64]| held.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    pool(window, x, shapes[node.inputs[0]], shapes[id], largest)
                }
                Op::AvgPool(AvgPool { window }) => {
                    let mean = |held: &[f64]| held.iter().sum::<f64>() / held.len() as f64;
                    pool(window, x, shapes[node.inputs[0]], shapes[id], mean)
                }
                Op::Pad(pad) => padded(pad, x, shapes[node.inputs[0]], shapes[id]),
                Op::Linear(linear) => {
                    let (w, b) = (weight("weight").unwrap(), weight("bias").unwrap());
                    let dot = |o: usize| w[o * linear.c_in..].iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
                    (0..linear.c_out).map(|o| dot(o) + b[o]).collect()
                }
                Op::Dropout { .. } => x.to_vec(),
            };
            assert_eq!(value.len(), shapes[id].len(), "{}", node.name);
            values.push(value);
        }
        values
    }
}

/// Pixel by pixel: what lies there before, or 0.
fn padded(Pad { top, left, .. }: Pad, x: &[f64], input: Shape, output: Shape) -> Vec<f64> {
    let at = |i: usize| {
        let row = (i / output.c / output.w).checked_add_signed(-top).filter(|&row| row < input.h)?;
        let col = (i / output.c % output.w).checked_add_signed(-left).filter(|&col| col < input.w)?;
        Some(x[(row * input.w + col) * input.c + i % output.c])
    };
    (0..output.len()).map(|i| at(i).unwrap_or(0.0)).collect()
}

/// What `of` makes of the pixels that each window holds, channel by channel.
fn pool(window: Window, x: &[f64], input: Shape, output: Shape, of: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let at = |i: usize, tap: usize| {
        let (pixel, c) = (i / output.c, i % output.c);
        let row = pixel / output.w * window.stride_h + tap / window.k_w;
        let col = pixel % output.w * window.stride_w + tap % window.k_w;
        let (row, col) = (row.checked_sub(window.pad.top)?, col.checked_sub(window.pad.left)?);
        (row < input.h && col < input.w).then(|| x[(row * input.w + col) * output.c + c])
    };
    let held = |i| (0..window.taps()).filter_map(|tap| at(i, tap)).collect::<Vec<f64>>();
    (0..output.len()).map(|i| of(&held(i))).collect()
}

/// Cross-correlation, loop by loop.
fn convolve(conv: &Conv, x: &[f64], input: Shape, output: Shape, w: &[f64]) -> Vec<f64> {
    let (window, group_in, group_out) = (conv.window, conv.c_in / conv.groups, conv.c_out / conv.groups);
    let mut y = vec![0.0; output.len()];
    for row in 0..output.h {
        for col in 0..output.w {
            for o in 0..conv.c_out {
                for v in 0..window.k_h {
                    for u in 0..window.k_w {
                        let r = (row * window.stride_h + v) as isize - window.pad.top as isize;
                        let c = (col * window.stride_w + u) as isize - window.pad.left as isize;
                        if r < 0 || c < 0 || r >= input.h as isize || c >= input.w as isize {
                            continue;
                        }
                        for m in 0..group_in {
                            let w = match conv.family() {
                                ConvFamily::Depthwise => w[(v * window.k_w + u) * conv.c_in + o],
                                _ => w[((o * window.k_h + v) * window.k_w + u) * group_in + m],
                            };
                            let channel = o / group_out * group_in + m;
                            let pixel = r as usize * input.w + c as usize;
                            y[(row * output.w + col) * conv.c_out + o] += w * x[pixel * conv.c_in + channel];
                        }
                    }
                }
            }
        }
    }
    y
}

/// Normal noise.
pub fn noise(len: usize, seed: u64) -> Vec<f64> {
    StandardNormal.sample_iter(ChaCha8Rng::seed_from_u64(seed)).take(len).collect()
}

/// A model whose weights, biases and statistics are all random and far from 0 and 1, its convolutions scaled so that
/// values neither die nor explode.
pub fn random_model(graph: Graph, seed: u64) -> Model {
    let mut model = Model::initialise(graph, seed).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed + 1);
    let positive = Uniform::new(0.5f32, 1.5).unwrap();
    let params = model.graph.params().unwrap();
    for param in params {
        let tensor = model.weights.get_mut(&param.name).unwrap();
        let is_statistic =
            param.name.ends_with("running_var") || (param.shape.len() == 1 && param.name.ends_with("weight"));
        for v in &mut tensor.data {
            if is_statistic {
                *v = positive.sample(&mut rng);
            } else if param.shape.len() == 1 {
                *v = StandardNormal.sample(&mut rng);
            }
        }
    }
    model
}

/// Merges and checks, on one image, that blocks and logits are those of the unmerged model: to `1e-10` with the
/// merged weights in f64, to `1e-5` with the weights as they are stored (behind many merged blocks, whose roundings
/// add up, to 1e-4).
pub fn assert_exact(model: &Model, padding: PaddingMode, seed: u64) -> (Model, Vec<MergedSegment>) {
    let mut segments = linear_segments(&model.graph, &[], padding).unwrap();
    if segments.is_empty() {
        // One convolution without batch-norm is merged as it is, but must come through all the same.
        segments = model.graph.blocks.iter().filter_map(|block| block.segment()).collect();
    }
    let merged = merge_segments(model, &segments, &MergeOptions { padding }).unwrap();
    assert_same(model, &merged, padding, seed);
    (merged.model, merged.segments)
}

/// What [`assert_exact`] asks of a merged network.
pub fn assert_same(model: &Model, merged: &Merged, padding: PaddingMode, seed: u64) {
    let image = noise(model.graph.input_shape().len(), seed);
    let expected = Reference::new(model).values(&image);
    let stored = Reference::new(&merged.model);
    let mut wide = Reference::new(&merged.model);
    for segment in &merged.segments {
        wide.set_folded(&segment.name, &fold(model, &segment.segment, padding).unwrap());
    }
    let stored_tolerance = if merged.segments.len() > 1 { 1e-4 } else { 1e-5 };
    for (network, tolerance) in [(&wide, 1e-10), (&stored, stored_tolerance)] {
        let got = network.values(&image);
        for (id, now) in NodeId::enumerate(&merged.map).filter_map(|(id, now)| Some((id, (*now)?))) {
            let (error, name) = (relative_error(&expected[id], &got[now]), &model.graph.nodes[id].name);
            assert!(error <= tolerance, "{name} of {}: error {error:.1e} above {tolerance:.0e}", model.graph.name);
        }
    }
}

/// Largest difference over the largest expected value.
pub fn relative_error(expected: &[f64], got: &[f64]) -> f64 {
    assert_eq!(expected.len(), got.len());
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let scale = largest(&mut expected.iter().map(|v| v.abs()));
    let difference = largest(
        &mut expected.iter().zip(got).map(|(a, b)| if (a - b).is_nan() { f64::INFINITY } else { (a - b).abs() }),
    );
    if difference == 0.0 { 0.0 } else { difference / scale }
}

/// Property tests that draw the same cases on every run and leave no files behind.
pub fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, rng_seed: RngSeed::Fixed(0), ..ProptestConfig::default() }
}
