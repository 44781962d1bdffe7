//! Pictures become a network's input as torchvision makes them. `tests/fixtures/make_pictures.py` made the files and the
//! expected pixels.

use std::path::{Path, PathBuf};

use depthshrinker::data::{ImageShape, Interpolation, Normalisation, Preprocessing, Resize, imagenet_class_names};
use depthshrinker::io::DataInfo;
use depthshrinker::shape::Shape;
use safetensors::{Dtype, SafeTensors};

const SIDE: usize = 32;
const SHORTER: usize = 36;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Makes pixels as they are, scaled to 0..1.
fn plain(channels: usize, interpolation: Interpolation) -> Preprocessing {
    Preprocessing {
        shape: ImageShape { height: SIDE, width: SIDE, channels },
        resize: Resize { shorter_side: SHORTER, interpolation },
        normalisation: Normalisation { mean: vec![0.0; channels], std: vec![1.0; channels] },
    }
}

/// Largest and mean difference, in steps of 1/255.
fn differences(got: &[f32], expected: &[u8]) -> (f32, f32) {
    assert_eq!(got.len(), expected.len());
    let steps: Vec<f32> = got.iter().zip(expected).map(|(a, &b)| (a * 255.0 - f32::from(b)).abs()).collect();
    (steps.iter().copied().fold(0.0, f32::max), steps.iter().sum::<f32>() / steps.len() as f32)
}

/// PNG is exact, so what is left is rounding in the resize: one step in either pass. Decoders of JPEG differ by a few steps
/// a pixel, in how they round the inverse transform and interpolate colour.
#[test]
fn every_kind_of_picture_is_made_as_torchvision_makes_it() {
    let bytes = std::fs::read(fixtures().join("pictures.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let mut seen = 0;
    for (key, tensor) in expected.tensors() {
        let [file, mode, interpolation] = *key.split('/').collect::<Vec<_>>() else { continue };
        assert_eq!(tensor.dtype(), Dtype::U8);
        let interpolation = if interpolation == "bilinear" { Interpolation::Bilinear } else { Interpolation::Bicubic };
        let preprocessing = plain(if mode == "L" { 1 } else { 3 }, interpolation);
        let got = preprocessing.read(&fixtures().join("pictures").join(file)).unwrap();
        let (most, mean) = differences(&got, tensor.data());
        println!("{key}: {most:.2} at most, {mean:.3} on average");
        let bound = if file.ends_with(".png") { 1.01 } else { 4.01 };
        assert!(most <= bound && mean < 0.75, "{key}: {most} at most, {mean} on average");
        seen += 1;
    }
    assert_eq!(seen, 48);
}

#[test]
fn values_are_normalised_as_torchvision_does() {
    let bytes = std::fs::read(fixtures().join("pictures.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let expected = expected.tensor("rgb.png/normalised").unwrap();
    let expected: Vec<f32> =
        expected.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let preprocessing = Preprocessing { normalisation: Normalisation::imagenet(), ..plain(3, Interpolation::Bicubic) };
    let got = preprocessing.read(&fixtures().join("pictures/rgb.png")).unwrap();
    for (at, value) in got.iter().enumerate() {
        let (pixel, channel) = (at / 3, at % 3);
        let wanted = expected[channel * SIDE * SIDE + pixel];
        // One step of 1/255 over the smallest deviation.
        assert!((value - wanted).abs() <= 1.01 / 255.0 / 0.224, "{value} {wanted} at {at}");
    }
}

#[test]
fn a_network_that_is_not_square_gets_the_centre_too() {
    // 90 x 60 covers 20 x 40 (ratio 2) with a shorter side of 20 when it is 40 wide: rows 3 to 23 of 27 are left.
    let shape = ImageShape { height: 20, width: 40, channels: 3 };
    let resize = Resize { shorter_side: 20, interpolation: Interpolation::Bilinear };
    let preprocessing = Preprocessing { shape, resize, ..plain(3, Interpolation::Bilinear) };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.png");
    image::GrayImage::from_fn(90, 60, |_, y| image::Luma([(y * 4) as u8])).save(&path).unwrap();
    let got = preprocessing.read(&path).unwrap();
    let row = |y: usize| got[y * 120] * 255.0;
    // A row of the result is the mean of 90/40 rows of the picture; its centre lies at (y + 3 + 0.5)·(60/26.67).
    let centre = |y: usize| ((y as f32 + 3.5) * 60.0 / 26.0 - 0.5) * 4.0;
    for y in [0, 10, 19] {
        assert!((row(y) - centre(y)).abs() < 6.0, "row {y}: {} {}", row(y), centre(y));
        assert!(got[y * 120..][..120].iter().all(|v| *v == got[y * 120]), "row {y} varies");
    }
}

#[test]
fn preprocessings_that_fit_nothing_are_refused() {
    let path = fixtures().join("pictures/rgb.png");
    let refused = |preprocessing: Preprocessing, part: &str| {
        let message = preprocessing.read(&path).unwrap_err().to_string();
        assert!(message.contains(part) && !message.contains('\n'), "{message}");
    };
    let plain = || plain(3, Interpolation::Bilinear);
    let resize = |shorter_side| Resize { shorter_side, interpolation: Interpolation::Bilinear };
    refused(Preprocessing { resize: resize(31), ..plain() }, "shorter side of 31");
    refused(Preprocessing { resize: resize(1 << 40), ..plain() }, "32 to 16384");
    refused(Preprocessing { shape: ImageShape { channels: 4, ..plain().shape }, ..plain() }, "takes 4");
    refused(Preprocessing { shape: ImageShape { channels: 1, ..plain().shape }, ..plain() }, "3 means");
}

#[test]
fn what_is_published_about_a_network_describes_its_data() {
    let input = Shape::new(192, 192, 3);
    let info = DataInfo::pretrained("tf_efficientnet_lite1", input, 1000).unwrap();
    assert_eq!(info.classes, imagenet_class_names());
    assert_eq!(
        (info.classes.len(), info.classes[0].as_str(), info.classes[999].as_str()),
        (1000, "tench", "toilet tissue")
    );
    // 272 for 240, so 217 for 192.
    assert_eq!(info.preprocessing().resize, Resize { shorter_side: 217, interpolation: Interpolation::Bicubic });
    assert_eq!((info.mean.as_slice(), info.std.as_slice()), ([0.5; 3].as_slice(), [0.5; 3].as_slice()));
    let own = DataInfo::pretrained("mobilenetv2-1.0", Shape::new(224, 224, 3), 12).unwrap();
    assert!(own.classes.is_empty());
    assert_eq!(own.resize, Some(Resize::imagenet(224)));
    assert_eq!(DataInfo::pretrained("mobilenetv2-1.0", Shape::new(28, 28, 1), 10), None);
    assert_eq!(DataInfo::pretrained("lenet", input, 10), None);
}
