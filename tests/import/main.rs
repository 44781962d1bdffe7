//! Foreign weights: networks that timm, torchvision, other projects and PyTorch wrote give PyTorch's logits, whatever lies
//! beside them in the file, and hostile files are refused in one line. `fixtures/make_import_fixtures.py`,
//! `fixtures/make_namings.py` and `fixtures/make_beside.py` made the files.

mod checkpoints;
mod hostile;
#[cfg(target_os = "linux")]
#[path = "../limited/mod.rs"]
mod limited;
mod namings;
mod pickles;
mod weights;

use std::path::{Path, PathBuf};

use depthshrinker::shape::Shape;
use depthshrinker::tensor::Tensor;

const INPUT: Shape = Shape::new(40, 40, 3);

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/import").join(name)
}

/// The image of the script that made the fixtures, two of them, NCHW.
fn images() -> Vec<f32> {
    let number = |i: u64| (((i * 2_654_435_761) % (1 << 32)) >> 8) as f64 / f64::from(1 << 23) - 1.0;
    (0..2 * INPUT.len() as u64).map(|i| number(i) as f32).collect()
}

/// Element i of the tensor of a name, as `make_network_values.py` has it: a hash in [-1, 1) in the range of its kind.
fn value(name: &str, shape: &[usize]) -> Tensor {
    let seed = name.bytes().fold(2_166_136_261u32, |seed, byte| (seed ^ u32::from(byte)).wrapping_mul(16_777_619));
    let element = |i: usize| {
        let mut h = (i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed);
        h ^= h >> 16;
        h = h.wrapping_mul(0x7feb_352d);
        h ^= h >> 15;
        h = h.wrapping_mul(0x846c_a68b);
        h ^= h >> 16;
        let u = f64::from(h) / 2f64.powi(31) - 1.0;
        let scaled = match name {
            "input" => u,
            _ if shape.len() > 1 => u * (6.0 / shape[1..].iter().product::<usize>() as f64).sqrt(),
            _ if name.ends_with("running_var") => 1.0 + 0.5 * u,
            _ if name.ends_with("weight") => 1.0 + 0.25 * u,
            _ => 0.25 * u,
        };
        scaled as f32
    };
    Tensor { shape: shape.to_vec(), data: (0..shape.iter().product()).map(element).collect() }
}
