//! Weights and images that a formula gives, here as in `fixtures/make_network_values.py`, so that no file holds them.

mod hash;
pub mod published;

use depthshrinker::graph::{Graph, ParamRole};
use depthshrinker::io::layout::{file_shape, from_file};
use depthshrinker::model::{Model, Weights};
use depthshrinker::tensor::Tensor;
pub use hash::hashed;

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
