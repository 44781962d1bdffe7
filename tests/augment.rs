//! The augmentations of ImageNet training: every operation against Pillow's, and what a loader makes of them.
//! `tests/fixtures/make_pixel_ops.py` made the expected pixels.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use depthshrinker::Result;
use depthshrinker::config::{Config, NetworkConfig};
use depthshrinker::data::{
    self, Augment, Batch, DataSource, Dataset, EraseMode, ImageShape, Interpolation, Loader, PixelOp, RandAugment,
    ResizedCrop,
};
use depthshrinker::ops::optimizer::Optimizer;
use depthshrinker::shrink::{Budget, DistillConfig, Removal, ScoreConfig};
use image::{Rgb, RgbImage};
use safetensors::SafeTensors;

const FILL: [u8; 3] = [124, 116, 104];

fn op(name: &str, argument: &str) -> PixelOp {
    let number: f64 = argument.parse().unwrap();
    match name {
        "auto_contrast" => PixelOp::AutoContrast,
        "equalize" => PixelOp::Equalize,
        "invert" => PixelOp::Invert,
        "rotate" => PixelOp::Rotate(number),
        "posterize" => PixelOp::Posterize(number as u32),
        "solarize" => PixelOp::Solarize(number as u16),
        "solarize_add" => PixelOp::SolarizeAdd(number as u8),
        "color" => PixelOp::Color(number as f32),
        "contrast" => PixelOp::Contrast(number as f32),
        "brightness" => PixelOp::Brightness(number as f32),
        "sharpness" => PixelOp::Sharpness(number as f32),
        "shear_x" => PixelOp::ShearX(number),
        "shear_y" => PixelOp::ShearY(number),
        "translate_x_rel" => PixelOp::TranslateX(number),
        "translate_y_rel" => PixelOp::TranslateY(number),
        other => panic!("{other}"),
    }
}

/// Only what moves pixels is computed in another precision than Pillow's, and cut to bytes after: one step, seldom.
#[test]
fn every_operation_is_pillows() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pixel_ops.safetensors");
    let bytes = std::fs::read(file).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let mut seen = 0;
    for (key, tensor) in expected.tensors() {
        let [mode, name, argument, interpolation] = *key.split('/').collect::<Vec<_>>() else { continue };
        let input = expected.tensor(&format!("{mode}/input")).unwrap();
        let [height, width, channels] = *input.shape() else { panic!("{key}") };
        let shape = ImageShape { height, width, channels };
        let interpolation = if interpolation == "bicubic" { Interpolation::Bicubic } else { Interpolation::Bilinear };
        let mut pixels = input.data().to_vec();
        op(name, argument).apply(&mut pixels, shape, &FILL[..channels], interpolation);
        let wrong: Vec<u8> =
            pixels.iter().zip(tensor.data()).map(|(a, b)| a.abs_diff(*b)).filter(|step| *step > 0).collect();
        let moves = ["rotate", "shear", "translate"].iter().any(|move_| name.starts_with(move_));
        let allowed = if moves { pixels.len() / 100 } else { 0 };
        assert!(wrong.len() <= allowed && wrong.iter().all(|step| *step == 1), "{key}: {wrong:?}");
        seen += 1;
    }
    assert_eq!(seen, 124);
}

/// Pictures of 60x40 with a gradient, two classes, `per_class` in each folder.
fn picture_folder(per_class: u32) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (split, count) in [("train", per_class), ("val", 3)] {
        for class in 0..2u32 {
            let folder = root.path().join(split).join(["left", "right"][class as usize]);
            std::fs::create_dir_all(&folder).unwrap();
            for i in 0..count {
                let picture = RgbImage::from_fn(60 + i % 7, 40 + i % 5, |x, y| {
                    let x = if class == 0 { x } else { 66 - x };
                    Rgb([(x * 3) as u8, (y * 4) as u8, (i * 16) as u8])
                });
                picture.save(folder.join(format!("{i:03}.{}", ["jpg", "png"][(i % 2) as usize]))).unwrap();
            }
        }
    }
    root
}

fn everything() -> Augment {
    Augment {
        pad_crop: 1,
        flip: true,
        erase: 0.5,
        erase_mode: EraseMode::Pixel,
        color_jitter: 0.4,
        resized_crop: Some(ResizedCrop::default()),
        rand_augment: Some(RandAugment::default()),
    }
}

fn pictures(root: &Path, size: usize) -> Arc<Dataset> {
    let source = DataSource { name: root.to_str().unwrap().into(), dir: None, image_size: Some(size) };
    Arc::new(data::open(&source).unwrap().train)
}

fn epoch(loader: &Loader, epoch: u64, first_step: usize) -> Vec<Batch> {
    loader.epoch(epoch, first_step).collect::<Result<_>>().unwrap()
}

#[test]
fn a_resumed_epoch_of_pictures_goes_on_with_the_same_batches() {
    let root = picture_folder(20);
    let set = pictures(root.path(), 24);
    let whole = epoch(&Loader::train(Arc::clone(&set), 7, everything(), 3).unwrap(), 2, 0);
    assert_eq!(whole.len(), 5);
    for first_step in [0, 3, 5] {
        let again = Loader::train(Arc::clone(&set), 7, everything(), 3).unwrap();
        assert!(epoch(&again, 2, first_step) == whole[first_step..], "from step {first_step}");
    }
    let other = epoch(&Loader::train(set, 7, everything(), 4).unwrap(), 2, 0);
    assert!(other != whole);
}

#[test]
fn each_augmentation_changes_images_and_only_the_named_ones_do() {
    let root = picture_folder(4);
    let set = pictures(root.path(), 24);
    let images = |augment: &Augment| {
        let batch = epoch(&Loader::train(Arc::clone(&set), 8, augment.clone(), 1).unwrap(), 0, 0).remove(0);
        (batch.indices, batch.images)
    };
    let (order, plain) = images(&Augment::none());
    let all = everything();
    let alone: [(&str, Augment); 5] = [
        ("crop", Augment { resized_crop: all.resized_crop, ..Augment::none() }),
        ("policy", Augment { rand_augment: all.rand_augment, ..Augment::none() }),
        ("jitter", Augment { color_jitter: 0.4, ..Augment::none() }),
        ("flip", Augment { flip: true, ..Augment::none() }),
        ("erase", Augment { erase: 1.0, erase_mode: EraseMode::Pixel, ..Augment::none() }),
    ];
    for (name, augment) in alone {
        let (indices, changed) = images(&augment);
        assert_eq!(indices, order, "{name}");
        assert!(changed != plain && changed.iter().all(|v| v.is_finite()), "{name}");
    }
    // Evaluation has none of it.
    let eval = epoch(&Loader::eval(Arc::clone(&set), 8).unwrap(), 0, 0).remove(0);
    let size = set.shape().size();
    for (at, index) in order.iter().enumerate() {
        assert!(plain[at * size..][..size] == eval.images[index * size..][..size]);
    }
}

#[test]
fn images_in_memory_take_the_same_augmentations() {
    let shape = ImageShape { height: 12, width: 10, channels: 1 };
    let pixels = (0..40 * shape.size()).map(|i| (i * 7 % 256) as u8).collect();
    let set = Arc::new(Dataset::from_memory("m", shape, 2, pixels, (0..40).map(|i| i % 2).collect()).unwrap());
    let loader = Loader::train(set, 40, everything(), 1).unwrap();
    let batch = epoch(&loader, 0, 0).remove(0);
    assert!(batch == epoch(&loader, 0, 0).remove(0));
    assert!(batch.images.iter().all(|v| v.is_finite()));
}

#[test]
fn senseless_augmentations_are_refused() {
    let shape = ImageShape { height: 32, width: 32, channels: 3 };
    let refused = |augment: Augment, shape: ImageShape, part: &str| {
        let message = augment.check(shape).unwrap_err().to_string();
        assert!(message.contains(part) && !message.contains('\n'), "{part} is not in: {message}");
    };
    let crop = |scale, ratio| Augment { resized_crop: Some(ResizedCrop { scale, ratio }), ..Augment::none() };
    let policy = |magnitude, magnitude_std, layers| Augment {
        rand_augment: Some(RandAugment { magnitude, magnitude_std, layers }),
        ..Augment::none()
    };
    everything().check(shape).unwrap();
    refused(crop([0.0, 1.0], [0.5, 2.0]), shape, "resized_crop.scale");
    refused(crop([0.9, 0.1], [0.5, 2.0]), shape, "resized_crop.scale");
    refused(crop([0.1, 1.5], [0.5, 2.0]), shape, "resized_crop.scale");
    refused(crop([0.1, 1.0], [2.0, 0.5]), shape, "resized_crop.ratio");
    refused(crop([0.1, 1.0], [f32::NAN, 0.5]), shape, "resized_crop.ratio");
    refused(policy(11.0, 0.5, 2), shape, "rand_augment.magnitude");
    refused(policy(5.0, f32::INFINITY, 2), shape, "rand_augment.magnitude_std");
    refused(policy(5.0, 0.5, 0), shape, "rand_augment.layers");
    refused(Augment { color_jitter: 1.5, ..Augment::none() }, shape, "color_jitter 1.5");
    refused(everything(), ImageShape { channels: 2, ..shape }, "1 or 3 channels");
}

#[test]
fn the_settings_are_plain_configuration() {
    let text =
        "flip = true\nerase = 0.25\nerase_mode = \"pixel\"\nresized_crop = {}\nrand_augment = { magnitude = 7 }\n";
    let augment: Augment = toml::from_str(text).unwrap();
    assert_eq!(augment.resized_crop, Some(ResizedCrop { scale: [0.08, 1.0], ratio: [0.75, 4.0 / 3.0] }));
    assert_eq!(augment.rand_augment, Some(RandAugment { magnitude: 7.0, magnitude_std: 0.5, layers: 2 }));
    assert_eq!(toml::from_str::<Augment>(&toml::to_string(&everything()).unwrap()).unwrap(), everything());
    for wrong in ["erase_mode = \"noise\"", "rand_augment = { magnitudes = 7 }", "resized_crop = { size = 3 }"] {
        assert!(toml::from_str::<Augment>(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn the_recipes_for_imagenet_are_the_published_ones_and_differ_in_their_network_alone() {
    let recipe = |network: &str| {
        let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "recipes", &format!("{network}.toml")].iter().collect();
        let config = Config::read(&path).unwrap();
        config.check().unwrap();
        assert_eq!(config.network, NetworkConfig { name: network.into(), ..NetworkConfig::default() });
        config
    };
    let config = recipe("mobilenetv2-1.4");
    for network in ["mobilenetv2-1.0", "efficientnet-lite0"] {
        assert_eq!(Config { network: config.network.clone(), ..recipe(network) }, config, "{network}");
    }
    // The recipes write them out, so that a change of a default is seen here.
    assert_eq!(config.search.scores, ScoreConfig::default());
    assert_eq!(config.budget, Budget::KeepFraction(0.4));
    let distill = DistillConfig { alpha: 0.7, temperature: 1.0, feature_weight: 0.0 };
    assert_eq!((config.finetune.distill, config.finetune.removal), (distill, Removal::AtOnce));
    for train in [&config.train, &config.search.train, &config.finetune.train] {
        let augment = &train.augment;
        assert_eq!(augment.rand_augment, Some(RandAugment { magnitude: 5.0, magnitude_std: 0.5, layers: 2 }));
        assert_eq!(augment.resized_crop, Some(ResizedCrop::default()));
        assert_eq!((augment.erase, augment.erase_mode, augment.flip), (0.25, EraseMode::Pixel, true));
        // Decay, clip and smoothing of the reference.
        assert_eq!((train.weight_decay, train.clip_norm, train.label_smoothing), (1e-5, 5.0, 0.1));
        assert_eq!((train.epochs, train.warmup_epochs, train.min_lr), (180, 0.0, 5e-6));
        assert_eq!(train.optimizer, Optimizer::Sgd { momentum: 0.9, nesterov: true });
        // timm switches it off beside RandAugment.
        assert_eq!(augment.color_jitter, 0.0);
        assert!((train.lr - 0.1 * train.batch as f32 / 256.0).abs() < 1e-6);
    }
}
