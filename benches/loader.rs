//! Images per second that a loader makes: small ones from memory, and 224x224 ones from JPEG files of ImageNet's size.
//! `benches/peers/loader.py` does the JPEG files with torchvision.
//!
//! The files are made once, in `target/loader-pictures`, or taken from the folder that `LOADER_PICTURES` names;
//! `RAYON_NUM_THREADS` sets the threads.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use depthshrinker::data::{self, Augment, DataSource, Dataset, EraseMode, Loader, RandAugment, ResizedCrop};
use image::codecs::jpeg::JpegEncoder;
use image::{Rgb, RgbImage};

const WIDTH: u32 = 500;
const HEIGHT: u32 = 375;
const PICTURES: u32 = 256;
const BATCH: usize = 64;

/// A picture with detail at many scales, so that its file has the hundred kilobytes of one of ImageNet.
fn picture(seed: u32) -> RgbImage {
    let mut state = seed.wrapping_mul(2_654_435_769) | 1;
    RgbImage::from_fn(WIDTH, HEIGHT, |x, y| {
        let wave =
            |scale: f32, c: f32| ((x as f32 / scale + c + seed as f32).sin() * (y as f32 / scale - c).cos()) * 40.0;
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let noise = (state >> 24) as f32 / 255.0 * 30.0 - 15.0;
        Rgb([0.3, 1.1, 2.4].map(|c| (128.0 + wave(90.0, c) + wave(17.0, c) + wave(3.0, c) * 0.5 + noise) as u8))
    })
}

/// The folder of pictures, made if it is not there.
fn folder() -> PathBuf {
    if let Some(folder) = std::env::var_os("LOADER_PICTURES") {
        return folder.into();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/loader-pictures");
    for (split, count) in [("train", PICTURES), ("val", 2)] {
        for i in 0..count {
            let folder = root.join(split).join(["even", "odd"][(i % 2) as usize]);
            let file = folder.join(format!("{i:04}.jpg"));
            if !file.is_file() {
                std::fs::create_dir_all(&folder).expect("target can be written");
                let mut bytes = Vec::new();
                JpegEncoder::new_with_quality(&mut bytes, 90).encode_image(&picture(i)).expect("an RGB picture");
                std::fs::write(file, bytes).expect("target can be written");
            }
        }
    }
    root
}

fn rate(c: &mut Criterion, name: &str, set: &Arc<Dataset>, loaders: &[(&str, Loader)]) {
    let mut group = c.benchmark_group(name);
    group.measurement_time(Duration::from_secs(8)).sample_size(10);
    for (what, loader) in loaders {
        // Training leaves out the images that fill no batch.
        let images = (loader.steps_per_epoch() * loader.batch_size()).min(set.len());
        group.throughput(Throughput::Elements(images as u64));
        let mut epoch = 0;
        group.bench_function(*what, |b| {
            b.iter(|| {
                epoch += 1;
                loader.epoch(epoch, 0).map(|batch| batch.expect("files that can be read").labels.len()).sum::<usize>()
            });
        });
    }
    group.finish();
}

fn loader(c: &mut Criterion) {
    let small = Arc::new(data::open(&DataSource::default()).expect("the embedded data").train.take(9984).expect("few"));
    let train =
        |set: &Arc<Dataset>, batch, augment| Loader::train(Arc::clone(set), batch, augment, 0).expect("it fits");
    let shifts = Augment { pad_crop: 2, flip: true, erase: 0.25, ..Augment::none() };
    let loaders = [("plain", train(&small, 128, Augment::none())), ("shift-flip-erase", train(&small, 128, shifts))];
    rate(c, "memory_28x28", &small, &loaders);

    let name = folder().to_str().expect("a path in UTF-8").to_owned();
    let pictures = data::open(&DataSource { name, ..DataSource::default() }).expect("pictures").train;
    let pictures = Arc::new(pictures);
    let standard = Augment { resized_crop: Some(ResizedCrop::default()), flip: true, ..Augment::none() };
    let full = Augment {
        rand_augment: Some(RandAugment::default()),
        erase: 0.25,
        erase_mode: EraseMode::Pixel,
        ..standard.clone()
    };
    let loaders = [
        ("crop-flip", train(&pictures, BATCH, standard)),
        ("crop-flip-randaugment-erase", train(&pictures, BATCH, full)),
        ("eval", Loader::eval(Arc::clone(&pictures), BATCH).expect("a batch")),
    ];
    rate(c, "jpeg_500x375_to_224", &pictures, &loaders);
}

criterion_group!(benches, loader);
criterion_main!(benches);
