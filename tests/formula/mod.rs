//! Weights and images that a formula gives, here as in `fixtures/make_network_values.py`, so that no file holds them.

pub mod published;

use depthshrinker::graph::{Graph, ParamRole};
use depthshrinker::io::layout::{file_shape, from_file};
use depthshrinker::model::{Model, Weights};
use depthshrinker::tensor::Tensor;

/// Element i of the tensor of a name: a hash in [-1, 1).
pub fn hashed(name: &str, len: usize) -> Vec<f64> {
    let seed = name.bytes().fold(2_166_136_261u32, |seed, byte| (seed ^ u32::from(byte)).wrapping_mul(16_777_619));
    let element = |i: usize| {
        let mut h = (i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed);
        h ^= h >> 16;
        h = h.wrapping_mul(0x7feb_352d);
        h ^= h >> 15;
        h = h.wrapping_mul(0x846c_a68b);
        h ^= h >> 16;
        f64::from(h) / 2f64.powi(31) - 1.0
    };
    (0..len).map(element).collect()
}

/// The network with the weights of the formula.
pub fn filled(graph: Graph) -> Model {
    let mut weights = Weights::new();
    for spec in graph.params().unwrap() {
        let shape = file_shape(&spec);
        let scale = |u: f64| match spec.role {
            _ if shape.len() > 1 => u * (6.0 / shape[1..].iter().product::<usize>() as f64).sqrt(),
            ParamRole::RunningVar => 1.0 + 0.5 * u,
            ParamRole::BnWeight => 1.0 + 0.25 * u,
            _ => 0.25 * u,
        };
        let data = hashed(&spec.name, spec.len()).into_iter().map(|u| scale(u) as f32).collect();
        weights.insert(spec.name.clone(), Tensor { shape: spec.shape.clone(), data: from_file(&spec, data) });
    }
    Model::new(graph, weights).unwrap()
}

/// Images `[n, 3, side, side]` of the formula.
pub fn images(n: usize, side: usize) -> Vec<f32> {
    hashed("input", n * 3 * side * side).into_iter().map(|u| u as f32).collect()
}
