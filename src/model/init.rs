//! Fresh weights.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal};

use super::{Model, Weights};
use crate::graph::{ConvFamily, Graph, Op, ParamRole};
use crate::tensor::Tensor;
use crate::{Result, memory};

/// Standard deviation of a fresh classifier.
const LINEAR_STD: f32 = 0.01;

impl Model {
    /// Fresh weights for a graph: convolutions normal with variance 2 / fan-out (He et al., 2015), batch-norm the
    /// identity, classifier normal with σ = 0.01. The same seed gives the same bits on every machine.
    ///
    /// # Errors
    /// As [`Graph::shapes`].
    pub fn initialise(graph: Graph, seed: u64) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut weights = Weights::new();
        for param in graph.params()? {
            let tensor = match param.role {
                ParamRole::ConvWeight(family) => {
                    let Op::Conv(conv) = graph.nodes[param.node].op else { unreachable!("the role says so") };
                    let fan_out = match family {
                        ConvFamily::Depthwise => conv.window.taps(),
                        _ => conv.window.taps() * conv.c_out / conv.groups,
                    };
                    normal(&param.shape, (2.0 / fan_out as f32).sqrt(), &mut rng)?
                }
                ParamRole::LinearWeight => normal(&param.shape, LINEAR_STD, &mut rng)?,
                ParamRole::BnWeight | ParamRole::RunningVar => Tensor::full(&param.shape, 1.0),
                _ => Tensor::zeros(&param.shape),
            };
            weights.insert(param.name, tensor);
        }
        Self::new(graph, weights)
    }
}

fn normal(shape: &[usize], std: f32, rng: &mut ChaCha8Rng) -> Result<Tensor> {
    let normal = Normal::new(0.0f32, std).expect("a standard deviation that is finite and not negative");
    let len = shape.iter().product();
    let mut data = memory::room(len, "fresh weights")?;
    data.extend(normal.sample_iter(rng).take(len));
    Ok(Tensor { shape: shape.to_vec(), data })
}
