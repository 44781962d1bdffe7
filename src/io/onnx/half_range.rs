//! What a network has beyond the range of f16: weights, and values on given images. In a file in f16 those would become
//! infinite.

use std::fmt;

use serde::Serialize;

use crate::device::Device;
use crate::engine::{Engine, EngineOptions, Fusion};
use crate::graph::{Bias, Graph, NodeId, Op};
use crate::model::Model;
use crate::{Error, Result};

/// The largest finite number of f16.
pub const LARGEST_F16: f32 = 65_504.0;
/// Images per pass at most.
const BATCH: usize = 16;
/// Memory for all values of the images of a pass. A graph from a file may claim any image, so passes are made smaller.
const MAX_BYTES: u64 = 2 << 30;

/// A value or a parameter that passes the range of f16.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Overflow {
    /// Name of the node, in the network with batch-norms folded.
    pub node: String,
    /// Its operation in words.
    pub operation: String,
    /// Name of the parameter; `None` for the node's value.
    pub param: Option<String>,
    /// The largest magnitude that was seen, infinite where f32 does not hold it either; JSON has no word for that, and
    /// says null.
    pub largest: f32,
}

impl fmt::Display for Overflow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, operation, param, largest } = self;
        match param {
            Some(param) => write!(f, "{param} of {node} ({operation}) has {largest:.3e}"),
            None => write!(f, "{node} ({operation}) reaches {largest:.3e}"),
        }
    }
}

/// The largest magnitude of every value of a network in f32, over the images it was given.
///
/// # Examples
/// ```
/// use depthshrinker::io::onnx::HalfRange;
/// use depthshrinker::model::Model;
/// use depthshrinker::networks::{NetworkOptions, build};
/// use depthshrinker::shape::Shape;
///
/// let graph = build("mobilenetv2-0.1", &NetworkOptions::new(Shape::new(32, 32, 3), 5))?;
/// let mut model = Model::initialise(graph, 7)?;
/// model.weights.get_mut("classifier.bias").unwrap().data[2] = -70_000.0;
///
/// let mut range = HalfRange::new(&model)?;
/// range.add(&[0.5; 32 * 32 * 3])?;
/// let found: Vec<String> = range.overflows().iter().map(ToString::to_string).collect();
/// assert_eq!(found[0], "classifier.bias of classifier (linear) has 7.000e4");
/// assert!(found[1].starts_with("classifier (linear) reaches 7"));
/// # Ok::<(), depthshrinker::Error>(())
/// ```
#[derive(Debug)]
pub struct HalfRange {
    folded: Model,
    engine: Engine,
    batch: usize,
    /// Per node of the folded network.
    largest: Vec<f32>,
}

impl HalfRange {
    /// Prepares a network, whose batch-norms are folded as an ONNX file has them.
    ///
    /// # Errors
    /// A network of which all values of one image take more than 2 GiB, or as [`Engine::new`].
    pub fn new(model: &Model) -> Result<Self> {
        let folded = model.folded()?;
        let bytes = value_bytes(&folded.graph)?;
        let batch = BATCH.min((MAX_BYTES / bytes.max(1)) as usize);
        if batch == 0 {
            let (shape, limit) = (folded.graph.input_shape(), MAX_BYTES >> 20);
            return Err(Error::Config(format!(
                "looking at every value of one image of {shape} takes {} MiB, more than the limit of {limit}; name the nodes \
                 that stay in f32 yourself (--keep-f32 NODE,NODE)",
                bytes >> 20
            )));
        }
        let nodes = folded.graph.nodes.len();
        let taps = NodeId::all(nodes).collect();
        let options = EngineOptions { batch, fusion: Fusion::PerNode, training: false, taps };
        let engine = Engine::new(&Device::Cpu, &folded, &options)?;
        Ok(Self { folded, engine, batch, largest: vec![0.0; nodes] })
    }

    /// Images that [`add`](Self::add) takes at once.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Looks at the values of up to [`batch`](Self::batch) images `[n, h, w, c]`.
    ///
    /// # Errors
    /// Images that do not fit.
    pub fn add(&mut self, images: &[f32]) -> Result<()> {
        self.engine.forward(images)?;
        for (id, node) in NodeId::enumerate(&self.folded.graph.nodes) {
            let value = self.engine.tap(id)?.host();
            let mut largest = magnitude(value.iter().copied());
            if let Op::Conv(conv) = node.op
                && conv.bias == Bias::Map
            {
                // The file has the convolution's sums as a value of their own.
                let map = &self.folded.weight(&format!("{}.bias_map", node.name)).data;
                largest = largest.max(magnitude(value.iter().zip(map.iter().cycle()).map(|(x, b)| x - b)));
            }
            self.largest[id] = self.largest[id].max(largest);
        }
        Ok(())
    }

    /// What passes the range of f16, in the order of the nodes: of each the parameters first, then the value.
    pub fn overflows(&self) -> Vec<Overflow> {
        let graph = &self.folded.graph;
        let params = graph.params().expect("the engine was planned from this graph");
        let mut found = Vec::new();
        for (id, node) in NodeId::enumerate(&graph.nodes) {
            let of_params = params.iter().filter(|param| param.node == id).map(|param| {
                let largest = magnitude(self.folded.weight(&param.name).data.iter().copied());
                (Some(param.name.clone()), largest)
            });
            let all = of_params.chain([(None, self.largest[id])]);
            let overflow = all.filter(|(_, largest)| *largest > LARGEST_F16).map(|(param, largest)| Overflow {
                node: node.name.clone(),
                operation: node.op.to_string(),
                param,
                largest,
            });
            found.extend(overflow);
        }
        found
    }
}

/// The largest magnitude; infinite where there is not-a-number.
fn magnitude(values: impl Iterator<Item = f32>) -> f32 {
    values.fold(0.0f32, |largest, v| if v.is_nan() { f32::INFINITY } else { largest.max(v.abs()) })
}

/// Bytes of all values of one image.
fn value_bytes(graph: &Graph) -> Result<u64> {
    let numbers = graph.shapes()?.iter().map(|shape| shape.len() as u64).sum::<u64>();
    Ok(numbers * size_of::<f32>() as u64)
}
