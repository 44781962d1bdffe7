//! A model: a graph and the weights that fit it.

mod fold;
mod init;

use std::collections::BTreeMap;

use crate::graph::{Graph, Segment};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Weights by full parameter name, in the engine's layout.
pub type Weights = BTreeMap<String, Tensor>;

/// A graph with exactly the weights it needs.
///
/// # Examples
/// ```
/// use depthshrinker::model::Model;
/// use depthshrinker::networks::{NetworkOptions, build};
/// use depthshrinker::shape::Shape;
///
/// let graph = build("mobilenetv2-0.1", &NetworkOptions::new(Shape::new(32, 32, 3), 5))?;
/// let model = Model::initialise(graph, 7)?;
/// assert_eq!(model.weight("classifier.weight").shape[0], 5);
///
/// // Batch-norm folds into the convolution before it, for inference.
/// let folded = model.folded()?;
/// assert!(folded.weights.len() < model.weights.len());
///
/// // A graph refuses weights that are not its own.
/// let problem = Model::new(model.graph.clone(), folded.weights).unwrap_err().to_string();
/// assert!(problem.contains("bn1.weight is missing"), "{problem}");
/// # Ok::<(), depthshrinker::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// The network.
    pub graph: Graph,
    /// One tensor per entry of [`Graph::params`].
    pub weights: Weights,
}

impl Model {
    /// Puts a graph and weights together.
    ///
    /// # Errors
    /// Lists every missing, superfluous or misshapen tensor by name.
    pub fn new(graph: Graph, weights: Weights) -> Result<Self> {
        let params = graph.params()?;
        let mut faults = Vec::new();
        for param in &params {
            match weights.get(&param.name) {
                None => faults.push(format!("{} is missing", param.name)),
                Some(t) if t.shape != param.shape => {
                    faults.push(format!("{} has shape {:?}, expected {:?}", param.name, t.shape, param.shape));
                }
                Some(_) => {}
            }
        }
        let known: std::collections::HashSet<&str> = params.iter().map(|p| p.name.as_str()).collect();
        faults
            .extend(weights.keys().filter(|k| !known.contains(k.as_str())).map(|k| format!("{k} belongs to no node")));
        if faults.is_empty() {
            return Ok(Self { graph, weights });
        }
        let shown = faults.iter().take(5).cloned().collect::<Vec<_>>().join("; ");
        let rest = faults.len().saturating_sub(5);
        let more = if rest > 0 { format!("; and {rest} more") } else { String::new() };
        Err(Error::Graph(format!("{} does not fit its weights: {shown}{more}", graph.name)))
    }

    /// A segment as a model of its own, as [`Graph::cut`].
    ///
    /// # Errors
    /// As [`Graph::cut`].
    pub fn cut(&self, segment: &Segment) -> Result<Self> {
        let graph = self.graph.cut(segment)?;
        let weights = graph.params()?.into_iter().filter_map(|param| {
            let tensor = self.weights.get(&param.name)?.clone();
            Some((param.name, tensor))
        });
        let weights = weights.collect();
        Self::new(graph, weights)
    }

    /// Refuses weights that are not finite: what folding a batch-norm with a tiny variance can leave.
    ///
    /// # Errors
    /// Names the first such tensor.
    pub fn check_finite(&self) -> Result<()> {
        match self.weights.iter().find(|(_, tensor)| tensor.data.iter().any(|v| !v.is_finite())) {
            Some((name, _)) => Err(Error::NotFinite(format!("{name} of {} is not finite", self.graph.name))),
            None => Ok(()),
        }
    }

    /// The tensor of a parameter that [`Model::new`] has checked to be there.
    pub fn weight(&self, name: &str) -> &Tensor {
        &self.weights[name]
    }
}
