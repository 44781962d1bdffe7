//! Foreign weights: networks that timm, torchvision, other projects and PyTorch wrote give PyTorch's logits, whatever lies
//! beside them in the file, and hostile files are refused in one line. `fixtures/make_import_fixtures.py`,
//! `fixtures/make_namings.py` and `fixtures/make_beside.py` made the files.

mod checkpoints;
#[path = "../formula/hash.rs"]
mod hash;
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
    let scaled = |u: f64| match name {
        "input" => u,
        _ if shape.len() > 1 => u * (6.0 / shape[1..].iter().product::<usize>() as f64).sqrt(),
        _ if name.ends_with("running_var") => 1.0 + 0.5 * u,
        _ if name.ends_with("weight") => 1.0 + 0.25 * u,
        _ => 0.25 * u,
    };
    let data = hash::hashed(name, shape.iter().product()).into_iter().map(|u| scaled(u) as f32).collect();
    Tensor { shape: shape.to_vec(), data }
}
