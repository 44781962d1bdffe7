//! PyTorch's files, and finding a network's weights in them.
#![no_main]

use std::path::Path;

use depthshrinker::io::names::Foreign;
use depthshrinker::io::torch::parse_torch;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(tensors) = parse_torch(Path::new("x.pth"), bytes) {
        for (name, tensor) in &tensors {
            assert_eq!(tensor.shape.iter().product::<usize>(), tensor.data.len(), "{name}");
        }
        let numbers: usize = tensors.values().map(|t| t.data.len()).sum();
        assert!(numbers <= bytes.len());
        let graph = build("mobilenetv2-0.1", &NetworkOptions::new(Shape::new(32, 32, 3), 10)).expect("a known network");
        let foreign = Foreign::new(tensors);
        let _ = foreign.classes_and_channels(&graph);
        let _ = foreign.into_model(Path::new("x.pth"), graph);
    }
});
