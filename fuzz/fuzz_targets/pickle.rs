//! The pickle of PyTorch's zip form. Changed archives die at the first checksum, so here the input is the pickle alone, and
//! the archive around it is sound.
#![no_main]

use std::io::{Cursor, Write};
use std::path::Path;

use depthshrinker::io::torch::parse_torch;
use libfuzzer_sys::fuzz_target;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// The storages that a pickle finds, by key, and their bytes.
const STORAGES: [(&str, usize); 3] = [("0", 16), ("1", 96), ("2", 7)];

fuzz_target!(|pickle: &[u8]| {
    let bytes = archive(pickle);
    if let Ok(tensors) = parse_torch(Path::new("x.pth"), &bytes) {
        let numbers: usize = tensors.values().map(|t| t.data.len()).sum();
        assert!(numbers <= bytes.len());
        for (name, tensor) in &tensors {
            assert_eq!(tensor.shape.iter().product::<usize>(), tensor.data.len(), "{name}");
        }
    }
});

fn archive(pickle: &[u8]) -> Vec<u8> {
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let mut entry = |name: &str, bytes: &[u8]| {
        zip.start_file(name, stored).expect("a new entry");
        zip.write_all(bytes).expect("memory takes all");
    };
    entry("a/data.pkl", pickle);
    for (key, len) in STORAGES {
        entry(&format!("a/data/{key}"), &vec![0x3f; len]);
    }
    zip.finish().expect("memory takes all").into_inner()
}
