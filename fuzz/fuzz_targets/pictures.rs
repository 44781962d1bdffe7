//! JPEG and PNG files on their way to a network's input.
#![no_main]

use std::path::Path;

use depthshrinker::data::{ImageShape, Normalisation, Preprocessing};
use libfuzzer_sys::fuzz_target;

const SIDE: usize = 16;

fuzz_target!(|bytes: &[u8]| {
    let colour = Preprocessing::imagenet(SIDE);
    let grey = Preprocessing {
        shape: ImageShape { channels: 1, ..colour.shape },
        normalisation: Normalisation { mean: vec![0.5], std: vec![0.5] },
        ..colour.clone()
    };
    for preprocessing in [colour, grey] {
        if let Ok(input) = preprocessing.parse(Path::new("x.jpg"), bytes) {
            assert_eq!(input.len(), SIDE * SIDE * preprocessing.shape.channels);
            assert!(input.iter().all(|v| v.is_finite()));
        }
    }
});
