//! A checkpoint.
#![no_main]

use std::path::Path;

use depthshrinker::io::Checkpoint;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = Checkpoint::parse(Path::new("x.safetensors"), bytes);
});
