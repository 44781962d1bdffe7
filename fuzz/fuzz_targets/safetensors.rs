//! The safetensors container.
#![no_main]

use std::path::Path;

use depthshrinker::io::tensors::parse_tensors;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(file) = parse_tensors(Path::new("x.safetensors"), bytes) {
        for (name, tensor) in &file.tensors {
            assert_eq!(tensor.shape.iter().product::<usize>(), tensor.data.len(), "{name}");
        }
    }
});
