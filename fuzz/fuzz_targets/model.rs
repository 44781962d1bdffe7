//! A model file, its graph as JSON in the metadata, and what is done with any model: costs, folding, merging, ONNX.
#![no_main]

use std::path::Path;

use depthshrinker::dtype::Dtype;
use depthshrinker::graph::Graph;
use depthshrinker::io::model::parse_model;
use depthshrinker::io::onnx::to_onnx;
use depthshrinker::shrink::merge::{MergeOptions, merge};
use depthshrinker::shrink::padding::PaddingMode;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // Graphs alone are reached through JSON, which a fuzzer finds more easily than a whole file.
    if let Ok(graph) = parse_graph(bytes) {
        let _ = graph.shapes().and_then(|_| graph.cost()).and_then(|_| graph.params());
    }
    let Ok((model, info)) = parse_model(Path::new("x.safetensors"), bytes) else { return };
    let _ = to_onnx(&model, &info, &Dtype::F32.into());
    let _ = to_onnx(&model, &info, &Dtype::F16.into());
    for padding in [PaddingMode::Reorder, PaddingMode::BorderBias] {
        let _ = merge(&model, &MergeOptions { padding });
    }
});

fn parse_graph(bytes: &[u8]) -> Result<Graph, serde_json::Error> {
    serde_json::from_slice(bytes)
}
