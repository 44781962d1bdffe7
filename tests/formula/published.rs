//! Published networks that timm does not have, with the formula's weights and PyTorch's logits, from
//! `fixtures/make_published_values.py`.

use depthshrinker::graph::{Activation, BlockId, Graph, Node, Op};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use depthshrinker::shrink::merge::{MergeOptions, merge};
use depthshrinker::shrink::padding::PaddingMode;
use depthshrinker::shrink::published_mask;
use depthshrinker::shrink::surgery::{Linearise, linearise};
use serde_json::Value;

/// Classes of the networks whose logits are compared.
pub const CLASSES: usize = 10;
/// Images they are compared on.
pub const IMAGES: usize = 2;

/// The rows of the fixture: `networks` or `masks`.
pub fn rows(kind: &str) -> Vec<Value> {
    let fixture: Value = serde_json::from_str(include_str!("../fixtures/published_values.json")).unwrap();
    fixture[kind].as_array().unwrap().clone()
}

/// What is compared: a network, or what one with a mask merges into.
pub struct Case {
    pub what: String,
    pub side: usize,
    pub model: Model,
    /// `[IMAGES, CLASSES]`
    pub logits: Vec<f64>,
}

/// The cases of a row; a mask has two where the first block can end in an activation.
pub fn cases(row: &Value) -> Vec<Case> {
    let side = row["size"].as_u64().unwrap() as usize;
    let case = |what: &str, model: Model, logits: &str| Case {
        what: format!("{what} at {side}"),
        side,
        model,
        logits: row[logits].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect(),
    };
    let Some(mask) = row["mask"].as_str() else {
        let name = row["name"].as_str().unwrap();
        return vec![case(name, network(name, side), "logits")];
    };
    let mut cases = vec![case(mask, merged(mask, side, true), "logits")];
    if row.get("logits_first_linear").is_some() {
        cases.push(case(&format!("{mask}, first block linear"), merged(mask, side, false), "logits_first_linear"));
    }
    cases
}

fn network(name: &str, side: usize) -> Model {
    super::filled(build(name, &NetworkOptions::new(Shape::new(side, side, 3), CLASSES)).unwrap())
}

/// The network of a mask's width, freed, its padding in front, and merged; perhaps with ReLU6 behind the first block, too.
fn merged(mask: &str, side: usize, first_final: bool) -> Model {
    let width = mask.split('-').nth(1).unwrap();
    let model = network(&format!("mobilenetv2-{width}"), side);
    let (mask, padding) = (published_mask(mask).unwrap(), PaddingMode::Reorder);
    let linear = linearise(&model, &mask, &Linearise { final_activation: true, padding }).unwrap();
    let graph = if first_final && !mask.kept()[0] { with_first_final(&linear.graph) } else { linear.graph };
    let linear = Model::new(graph, linear.weights).unwrap();
    merge(&linear, &MergeOptions { padding }).unwrap().model
}

fn with_first_final(graph: &Graph) -> Graph {
    let end = graph.blocks[BlockId::new(0)].output();
    let rewritten = graph.rewrite(|id, node, out| {
        let output = out.copy(node);
        if id != end {
            return Ok(output);
        }
        let name = format!("{}.act", node.name);
        Ok(out.push(Node { name, inputs: vec![output], op: Op::Activation(Activation::RELU6) }))
    });
    rewritten.unwrap()
}
