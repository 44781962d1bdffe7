//! Data sets, hostile files and batches.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use depthshrinker::data::{self, Augment, Batch, Data, DataSource, Dataset, ImageShape, Loader, Normalisation};
use flate2::{Compression, write::GzEncoder};
use image::{GrayImage, Luma, Rgb, RgbImage, Rgba, RgbaImage};

const SYSTEM: &str = "/usr/share/datasets/fashion-mnist";

// ---- sources ----

#[test]
fn the_embedded_cut_is_balanced() {
    let data = data::open(&DataSource::default()).unwrap();
    for (set, per_class) in [(&data.train, 1000), (&data.test, 200)] {
        assert_eq!(set.len(), 10 * per_class);
        assert_eq!(set.shape(), ImageShape { height: 28, width: 28, channels: 1 });
        assert_eq!(set.classes(), 10);
        assert_eq!(set.class_names()[9], "ankle boot");
        assert_eq!(per_class_counts(set), vec![per_class; 10]);
    }
    assert_eq!(data.train.normalisation(), data.test.normalisation());
}

#[test]
fn the_cut_is_the_first_of_every_class_of_the_full_set() {
    if !Path::new(SYSTEM).is_dir() {
        eprintln!("NOT RUN: {SYSTEM} is not here; `apt-get install dataset-fashion-mnist` to check the cut against it");
        return;
    }
    let source = DataSource { name: "fashion-mnist".into(), dir: Some(SYSTEM.into()), image_size: None };
    let full = data::open(&source).unwrap();
    assert_eq!((full.train.len(), full.test.len()), (60_000, 10_000));
    let cut = data::open(&DataSource::default()).unwrap();
    for (full, cut, n) in [(full.train, cut.train, 10_000), (full.test, cut.test, 2_000)] {
        let taken = full.take(n).unwrap();
        assert_eq!(taken.labels(), cut.labels());
        let images = |set: &Dataset| (0..set.len()).flat_map(|i| pixels(set, i)).collect::<Vec<u8>>();
        assert!(images(&taken) == images(&cut));
    }
}

#[test]
fn an_unknown_name_lists_the_known_ones() {
    let source = DataSource { name: "fashon-mnist".into(), ..DataSource::default() };
    refused(data::open(&source), &["fashon-mnist", "embedded", "cifar100", "no folder"]);
}

#[test]
fn settings_that_contradict_the_source_are_refused() {
    #[cfg(not(feature = "parquet"))]
    refused(
        data::open(&DataSource { name: "parquet:some".into(), ..DataSource::default() }),
        &["parquet:some", "--features parquet"],
    );
    let source = DataSource { image_size: Some(96), ..DataSource::default() };
    refused(data::open(&source), &["96", "28x28"]);
    let source = DataSource { dir: Some("elsewhere".into()), ..DataSource::default() };
    refused(data::open(&source), &["inside the binary"]);
}

#[test]
fn the_source_is_plain_configuration() {
    let source: DataSource = toml::from_str("name = \"cifar10\"\ndir = \"d\"").unwrap();
    assert_eq!(source, DataSource { name: "cifar10".into(), dir: Some("d".into()), image_size: None });
    assert!(toml::from_str::<DataSource>("nam = \"cifar10\"").is_err());
    assert!(toml::from_str::<Augment>("flop = true").is_err());
    assert_eq!(toml::from_str::<Augment>("").unwrap(), Augment::none());
    let augment = Augment { pad_crop: 4, flip: true, erase: 0.25, ..Augment::none() };
    assert_eq!(toml::from_str::<Augment>(&toml::to_string(&augment).unwrap()).unwrap(), augment);
}

// ---- IDX ----

/// A folder of four valid little IDX files: 20 and 10 images of 3x4.
fn idx_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("train-images-idx3-ubyte"), idx_images(20, 3, 4)).unwrap();
    fs::write(folder.path().join("train-labels-idx1-ubyte"), idx_labels(20)).unwrap();
    fs::write(folder.path().join("t10k-images-idx3-ubyte"), idx_images(10, 3, 4)).unwrap();
    fs::write(folder.path().join("t10k-labels-idx1-ubyte"), idx_labels(10)).unwrap();
    folder
}

fn idx_header(magic: u32, sizes: &[u32]) -> Vec<u8> {
    std::iter::once(&magic).chain(sizes).flat_map(|word| word.to_be_bytes()).collect()
}

fn idx_images(count: u32, height: u32, width: u32) -> Vec<u8> {
    let mut file = idx_header(0x803, &[count, height, width]);
    file.extend((0..count * height * width).map(|i| i as u8));
    file
}

fn idx_labels(count: u32) -> Vec<u8> {
    let mut file = idx_header(0x801, &[count]);
    file.extend((0..count).map(|i| (i % 10) as u8));
    file
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn open_in(name: &str, folder: &Path) -> depthshrinker::Result<Data> {
    data::open(&DataSource { name: name.into(), dir: Some(folder.to_owned()), image_size: None })
}

/// Opens the little folder with one training file replaced.
fn with_file(name: &str, content: &[u8]) -> depthshrinker::Result<Data> {
    let folder = idx_folder();
    fs::write(folder.path().join(name), content).unwrap();
    open_in("mnist", folder.path())
}

const IMAGES: &str = "train-images-idx3-ubyte";
const LABELS: &str = "train-labels-idx1-ubyte";

/// The error must be one line, hold all of `parts` and, being about a file, name it.
fn refused<T: std::fmt::Debug>(result: depthshrinker::Result<T>, parts: &[&str]) {
    let message = result.unwrap_err().to_string();
    assert!(!message.contains('\n'), "more than one line: {message}");
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

#[test]
fn idx_in_all_its_names_plain_and_gzip() {
    let folder = idx_folder();
    let data = open_in("mnist", folder.path()).unwrap();
    assert_eq!(data.train.shape(), ImageShape { height: 3, width: 4, channels: 1 });
    assert_eq!((data.train.len(), data.test.len(), data.train.name()), (20, 10, "mnist"));
    assert_eq!(pixels(&data.train, 1), (12..24).collect::<Vec<u8>>());

    // Another spelling, packed, in the set's own folder below the given one.
    let root = tempfile::tempdir().unwrap();
    let own = root.path().join("fashion-mnist");
    fs::create_dir(&own).unwrap();
    for entry in fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().replace("-idx", ".idx") + ".gz";
        fs::write(own.join(name), gzip(&fs::read(path).unwrap())).unwrap();
    }
    let packed = open_in("fashion-mnist", root.path()).unwrap();
    assert_eq!(pixels(&packed.train, 7), pixels(&data.train, 7));
    assert_eq!(packed.test.labels(), data.test.labels());
}

#[test]
fn missing_idx_files() {
    let empty = tempfile::tempdir().unwrap();
    let looked = empty.path().to_str().unwrap();
    refused(open_in("fashion-mnist", empty.path()), &[looked, "apt-get install dataset-fashion-mnist", "--data-dir"]);
    let folder = idx_folder();
    fs::remove_file(folder.path().join("t10k-labels-idx1-ubyte")).unwrap();
    refused(open_in("mnist", folder.path()), &["t10k-labels-idx1-ubyte", "add the missing file"]);
}

#[test]
fn hostile_idx_files() {
    let images = idx_images(20, 3, 4);
    let trailing = [images.as_slice(), b"x"].concat();
    let mut bad_label = idx_labels(20);
    bad_label[8 + 3] = 10;
    let mut swapped = images.clone();
    swapped[3] = 1;
    let cases: [(&str, Vec<u8>, &[&str]); 16] = [
        (IMAGES, Vec::new(), &["ends inside the header"]),
        (IMAGES, images[..7].to_vec(), &["ends inside the header"]),
        (IMAGES, images[..images.len() - 1].to_vec(), &["cut short", "240 bytes, 239 came"]),
        (IMAGES, trailing, &["bytes follow", "240"]),
        (IMAGES, swapped, &["0x00000801 (labels)", "0x00000803 (images)"]),
        (IMAGES, b"\x89PNG\r\n\x1a\n........".to_vec(), &["0x89504e47", "right file"]),
        (IMAGES, idx_header(0x803, &[0, 3, 4]), &["0 images"]),
        (IMAGES, idx_header(0x803, &[20, 0, 4]), &["20 images of 0x4"]),
        (IMAGES, idx_header(0x803, &[u32::MAX, u32::MAX, u32::MAX]), &["4294967295x4294967295"]),
        (IMAGES, idx_header(0x803, &[20, 16384, 16384]), &["5368709120 bytes", "cannot hold more than"]),
        (IMAGES, idx_images(21, 3, 4), &["21 images", "20 labels"]),
        (IMAGES, idx_images(20, 4, 4), &["3x4x1", "4x4x1", "same set"]),
        (LABELS, bad_label, &["label 10 of image 3", "0 to 9"]),
        (LABELS, idx_labels(19), &["20 images", "19 labels"]),
        (LABELS, idx_labels(20)[..25].to_vec(), &["20 labels are 20 bytes, 17 came"]),
        (LABELS, [idx_labels(20), vec![0; 4]].concat(), &["bytes follow"]),
    ];
    for (name, content, parts) in cases {
        refused(with_file(name, &content), &[parts, &["ubyte"]].concat());
    }
}

#[test]
fn hostile_gzip() {
    let packed = gzip(&idx_images(20, 3, 4));
    refused(with_file(IMAGES, &packed[..packed.len() / 2]), &["gzip", "cut short", IMAGES]);
    refused(with_file(IMAGES, &packed[..packed.len() - 2]), &["gzip", "cut short", IMAGES]);
    let mut damaged = packed.clone();
    let checksum = damaged.len() - 8;
    damaged[checksum] ^= 1;
    refused(with_file(IMAGES, &damaged), &["gzip", "damaged", IMAGES]);
    let garbage = [packed.as_slice(), b"garbage"].concat();
    refused(with_file(IMAGES, &garbage), &["gzip", IMAGES]);
    refused(with_file(IMAGES, &[0x1f, 0x8b, 8, 0, 0, 0]), &["gzip", IMAGES]);
    let short = gzip(&idx_images(20, 3, 4)[..200]);
    refused(with_file(IMAGES, &short), &["cut short", "240 bytes, 184 came"]);
    let long = gzip(&[idx_images(20, 3, 4), vec![0; 50]].concat());
    refused(with_file(IMAGES, &long), &["bytes follow", IMAGES]);
}

#[test]
fn neither_a_bomb_nor_a_huge_claim_is_unpacked() {
    // Much more than the 240 bytes that the header claims, and a damaged end: whoever unpacked it all would meet that.
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(&idx_header(0x803, &[20, 3, 4])).unwrap();
    encoder.write_all(&vec![0; 16 << 20]).unwrap();
    let mut bomb = encoder.finish().unwrap();
    bomb.truncate(bomb.len() - 20);
    refused(with_file(IMAGES, &bomb), &["bytes follow"]);
    let claim = gzip(&idx_header(0x803, &[u32::MAX, 1000, 1000]));
    let folder = idx_folder();
    fs::write(folder.path().join(IMAGES), claim).unwrap();
    fs::write(folder.path().join(LABELS), gzip(&idx_header(0x801, &[u32::MAX]))).unwrap();
    refused(open_in("mnist", folder.path()), &["4294967295000000 bytes", "cannot hold more than"]);
}

// ---- CIFAR ----

fn cifar_record(labels: &[u8], [r, g, b]: [u8; 3]) -> Vec<u8> {
    [labels.to_vec(), vec![r; 1024], vec![g; 1024], vec![b; 1024]].concat()
}

fn cifar10_folder(root: &Path) -> PathBuf {
    let folder = root.join("cifar-10-batches-bin");
    fs::create_dir(&folder).unwrap();
    for file in 1..=5u8 {
        let records = [cifar_record(&[file], [file, 20, 30]), cifar_record(&[9], [4, 5, 6])].concat();
        fs::write(folder.join(format!("data_batch_{file}.bin")), records).unwrap();
    }
    fs::write(folder.join("test_batch.bin"), cifar_record(&[7], [1, 2, 3])).unwrap();
    folder
}

#[test]
fn cifar10_planes_become_pixels() {
    let root = tempfile::tempdir().unwrap();
    let folder = cifar10_folder(root.path());
    for dir in [root.path(), &folder] {
        let data = open_in("cifar10", dir).unwrap();
        assert_eq!((data.train.len(), data.test.len()), (10, 1));
        assert_eq!(data.train.labels(), [1, 9, 2, 9, 3, 9, 4, 9, 5, 9]);
        assert_eq!(pixels(&data.train, 4)[..6], [3, 20, 30, 3, 20, 30]);
        assert_eq!(data.train.class_names()[1], "automobile");
    }
}

#[test]
fn hostile_cifar_files() {
    let root = tempfile::tempdir().unwrap();
    refused(open_in("cifar10", root.path()), &["cifar10 not found", "cifar-10-binary.tar.gz", "unpacked"]);
    let folder = cifar10_folder(root.path());
    let batch = folder.join("data_batch_3.bin");
    let whole = fs::read(&batch).unwrap();
    for content in [&whole[..whole.len() - 1], &whole[..0], &[&whole, b"x".as_slice()].concat()] {
        fs::write(&batch, content).unwrap();
        refused(open_in("cifar10", &folder), &["data_batch_3.bin", "3073-byte records"]);
    }
    fs::write(&batch, cifar_record(&[10], [0; 3])).unwrap();
    refused(open_in("cifar10", &folder), &["data_batch_3.bin", "label 10 of image 0"]);
    fs::remove_file(&batch).unwrap();
    refused(open_in("cifar10", &folder), &["data_batch_3.bin"]);
}

#[test]
fn cifar100_takes_the_fine_label() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("train.bin"), cifar_record(&[3, 77], [1, 2, 3])).unwrap();
    fs::write(folder.path().join("test.bin"), cifar_record(&[19, 99], [1, 2, 3])).unwrap();
    let names: String = (0..100).map(|class| format!("name-{class}\n")).collect();
    fs::write(folder.path().join("fine_label_names.txt"), names + "\n").unwrap();
    let data = open_in("cifar100", folder.path()).unwrap();
    assert_eq!((data.train.labels(), data.test.labels()), ([77].as_slice(), [99].as_slice()));
    assert_eq!(data.train.class_names()[77], "name-77");
}

// ---- folders of pictures ----

/// `train` and `val` with a red and a blue class, in assorted formats and shapes.
fn picture_folder() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for split in ["train", "val"] {
        for (class, colour) in [("blue", [0, 0, 255]), ("red", [255, 0, 0])] {
            let folder = root.path().join(split).join(class);
            fs::create_dir_all(&folder).unwrap();
            RgbImage::from_pixel(40, 30, Rgb(colour)).save(folder.join("a.png")).unwrap();
            RgbImage::from_pixel(30, 50, Rgb(colour)).save(folder.join("b.JPG")).unwrap();
            let [r, g, b] = colour;
            RgbaImage::from_pixel(64, 64, Rgba([r, g, b, 9])).save(folder.join("c.png")).unwrap();
            fs::write(folder.join("notes.txt"), "not a picture").unwrap();
        }
    }
    root
}

fn open_pictures(root: &Path, size: usize) -> depthshrinker::Result<Data> {
    data::open(&DataSource { name: root.to_str().unwrap().into(), dir: None, image_size: Some(size) })
}

#[test]
fn pictures_of_a_folder() {
    let root = picture_folder();
    let data = open_pictures(root.path(), 32).unwrap();
    assert_eq!(data.train.class_names(), ["blue", "red"]);
    assert_eq!(data.train.labels(), [0, 0, 0, 1, 1, 1]);
    assert_eq!(data.train.shape(), ImageShape { height: 32, width: 32, channels: 3 });
    assert_eq!(data.train.normalisation(), &Normalisation::imagenet());
    for index in 0..6 {
        let blue = index < 3;
        for pixel in pixels(&data.test, index).chunks_exact(3) {
            let near = |value: u8, wanted: u8| value.abs_diff(wanted) <= 2;
            assert!(near(pixel[0], if blue { 0 } else { 255 }) && near(pixel[2], if blue { 255 } else { 0 }));
        }
    }
    let loader =
        Loader::train(Arc::new(data.train), 4, Augment { pad_crop: 4, flip: true, erase: 0.5, ..Augment::none() }, 3)
            .unwrap();
    let batches: Vec<Batch> = loader.epoch(0, 0).map(Result::unwrap).collect();
    assert_eq!(batches.len(), 1);
    assert_eq!(batches[0].images.len(), 4 * 32 * 32 * 3);
    assert_eq!(batches, loader.epoch(0, 0).map(Result::unwrap).collect::<Vec<_>>());
}

/// (folders, classes in the order of their labels)
#[test]
fn class_folders_are_labelled_by_number_where_all_are_numbers() {
    for (folders, classes) in [
        ("0 1 2 9 10 11 100", "0 1 2 9 10 11 100"),
        ("010 9 0011", "9 010 0011"),
        ("0 1 10 2 x", "0 1 10 2 x"),
        ("1 10 2a", "1 10 2a"),
        ("n2 n10", "n10 n2"),
    ] {
        let root = tempfile::tempdir().unwrap();
        for (split, class) in
            ["train", "val"].iter().flat_map(|split| folders.split(' ').map(move |class| (split, class)))
        {
            let folder = root.path().join(split).join(class);
            fs::create_dir_all(&folder).unwrap();
            // The picture tells its class: the file system lists folders in any order.
            let value = classes.split(' ').position(|own| own == class).unwrap() as u8;
            GrayImage::from_pixel(8, 8, Luma([value])).save(folder.join("a.png")).unwrap();
        }
        let data = open_pictures(root.path(), 8).unwrap();
        assert_eq!(data.train.class_names().join(" "), classes);
        for set in [&data.train, &data.test] {
            let seen: Vec<u32> = (0..set.len()).map(|index| u32::from(pixels(set, index)[0])).collect();
            assert_eq!(seen, set.labels(), "{folders}");
        }
    }
}

#[test]
fn the_crop_is_the_centre_of_the_resized_picture() {
    // 256 x 512 at image size 224: no resizing, so the crop must be the pixels themselves.
    let root = picture_folder();
    let picture = GrayImage::from_fn(512, 256, |x, y| Luma([(x / 2) as u8 ^ y as u8]));
    picture.save(root.path().join("train/blue/0.png")).unwrap();
    let data = open_pictures(root.path(), 224).unwrap();
    let got = pixels(&data.train, 0);
    for (y, row) in got.chunks_exact(224 * 3).enumerate() {
        for (x, pixel) in row.chunks_exact(3).enumerate() {
            assert_eq!(pixel, [picture.get_pixel(x as u32 + 144, y as u32 + 16).0[0]; 3], "at {y}, {x}");
        }
    }
}

#[test]
fn a_panorama_is_cropped_without_resizing_all_of_it() {
    let root = picture_folder();
    RgbImage::from_pixel(30_000, 1, Rgb([7, 8, 9])).save(root.path().join("train/blue/0.png")).unwrap();
    let data = open_pictures(root.path(), 224).unwrap();
    assert!(pixels(&data.train, 0).chunks_exact(3).all(|pixel| pixel == [7, 8, 9]));
}

#[test]
fn hostile_folders() {
    let root = picture_folder();
    let path = |name: &str| root.path().join(name);
    refused(open_pictures(root.path(), 0), &["image size 0"]);
    refused(open_pictures(root.path(), 1 << 20), &["image size 1048576"]);
    fs::create_dir(path("val/green")).unwrap();
    refused(open_pictures(root.path(), 32), &["val", "3 classes", "`green`", "has 2"]);
    fs::create_dir(path("train/green")).unwrap();
    refused(open_pictures(root.path(), 32), &["green", "directly in the folder"]);
    fs::remove_dir(path("train/green")).unwrap();
    fs::remove_dir_all(path("val")).unwrap();
    refused(open_pictures(root.path(), 32), &["none of `val`, `validation`, `test`"]);
    fs::rename(path("train"), path("validation")).unwrap();
    refused(open_pictures(root.path(), 32), &["has no folder `train`"]);
    fs::create_dir(path("train")).unwrap();
    refused(open_pictures(root.path(), 32), &["has no class folders"]);
}

#[test]
fn pictures_that_cannot_be_read() {
    let root = picture_folder();
    let place = root.path().join("train/blue/a.png");
    let noise = RgbImage::from_fn(90, 90, |x, y| Rgb([(x * y) as u8, (x ^ y) as u8, (x * 7 + y * 13) as u8]));
    let encoded = |name: &str| {
        noise.save(root.path().join(name)).unwrap();
        fs::read(root.path().join(name)).unwrap()
    };
    let (jpeg, png) = (encoded("n.jpg"), encoded("n.png"));
    // A PNG header that claims far more pixels than follow, its checksum included.
    let mut huge = png.clone();
    huge[16..24].copy_from_slice(&[0, 0, 0x7f, 0xff, 0, 0, 0x7f, 0xff]);
    let mut damaged = png.clone();
    damaged[19] ^= 1;
    let cases: [(&[u8], &str); 7] = [
        (b"", "neither JPEG nor PNG"),
        (b"hello", "neither JPEG nor PNG"),
        (b"GIF89a..........", "neither JPEG nor PNG"),
        (&jpeg[..jpeg.len() / 2], "cut short"),
        (&png[..png.len() / 2], "cannot be decoded"),
        (&huge, "cannot be decoded"),
        (&damaged, "cannot be decoded"),
    ];
    for (content, part) in cases {
        fs::write(&place, content).unwrap();
        let data = open_pictures(root.path(), 32).unwrap();
        let mut out = vec![0; 32 * 32 * 3];
        refused(data.train.image(0, &mut out), &["a.png", part, "replace or remove it"]);
        // The same line comes through a loader, once, and ends the epoch.
        let mut batches = Loader::eval(Arc::new(data.train), 2).unwrap().epoch(0, 0);
        refused(batches.next().unwrap(), &["a.png", part]);
        assert!(batches.next().is_none());
    }
}

// ---- data sets ----

/// `n` images of 4x4x1, each filled with its index, of `classes` classes in turn.
fn numbered(n: usize, classes: usize) -> Dataset {
    let shape = ImageShape { height: 4, width: 4, channels: 1 };
    let images = (0..n).flat_map(|i| [i as u8; 16]).collect();
    Dataset::from_memory("numbered", shape, classes, images, (0..n).map(|i| (i % classes) as u32).collect()).unwrap()
}

fn pixels(set: &Dataset, index: usize) -> Vec<u8> {
    let mut out = vec![0; set.shape().size()];
    set.image(index, &mut out).unwrap();
    out
}

fn per_class_counts(set: &Dataset) -> Vec<usize> {
    let mut counts = vec![0; set.classes()];
    set.labels().iter().for_each(|label| counts[*label as usize] += 1);
    counts
}

#[test]
fn sets_from_memory_are_checked() {
    let shape = ImageShape { height: 2, width: 2, channels: 3 };
    let make = |shape, classes, bytes, labels| Dataset::from_memory("m", shape, classes, vec![7; bytes], labels);
    assert!(make(shape, 3, 24, vec![0, 2]).is_ok());
    refused(make(shape, 3, 23, vec![0, 2]), &["23 bytes", "2x2x3"]);
    refused(make(shape, 3, 24, vec![0, 3]), &["label 3 of image 1", "3 classes"]);
    refused(make(shape, 3, 0, vec![]), &["no images"]);
    refused(make(ImageShape { width: 0, ..shape }, 3, 0, vec![0]), &["no pixels"]);
    refused(make(ImageShape { width: usize::MAX, ..shape }, 3, 24, vec![0, 1]), &["24 bytes"]);
    let set = make(shape, 3, 24, vec![0, 2]).unwrap();
    refused(set.image(2, &mut [0; 12]), &["image 2 of 2"]);
    refused(set.image(0, &mut [0; 11]), &["12 bytes", "11"]);
    refused(set.subset(&[0, 5]), &["image 5 of 2"]);
    refused(set.clone().with_class_names(["one"]), &["1 names for 3 classes"]);
    let zero = Normalisation { mean: vec![0.0; 3], std: vec![0.0; 3] };
    refused(set.clone().with_normalisation(zero), &["above zero"]);
    refused(set.with_normalisation(Normalisation { mean: vec![], std: vec![] }), &["3 channels"]);
}

#[test]
fn normalisation_of_memory_is_that_of_its_pixels() {
    let shape = ImageShape { height: 1, width: 2, channels: 2 };
    let set = Dataset::from_memory("m", shape, 1, vec![0, 9, 255, 9], vec![0]).unwrap();
    assert_eq!(set.normalisation(), &Normalisation { mean: vec![0.5, 9.0 / 255.0], std: vec![0.5, 1.0] });
    let batch = Loader::eval(Arc::new(set), 1).unwrap().epoch(0, 0).next().unwrap().unwrap();
    assert_eq!(batch.images, [-1.0, 0.0, 1.0, 0.0]);
}

#[test]
fn a_limit_keeps_the_classes_balanced() {
    let shape = ImageShape { height: 1, width: 1, channels: 1 };
    // Class by class, as folders list them; class 1 is short.
    let labels: Vec<u32> = [[0; 6].as_slice(), &[1; 2], &[2; 6]].concat();
    let set = Dataset::from_memory("m", shape, 3, (0..14).collect(), labels).unwrap();
    let six = set.clone().take(6).unwrap();
    assert_eq!(per_class_counts(&six), [2, 2, 2]);
    assert_eq!((0..6).map(|i| pixels(&six, i)[0]).collect::<Vec<_>>(), [0, 1, 6, 7, 8, 9]);
    assert_eq!(per_class_counts(&set.clone().take(9).unwrap()), [4, 2, 3]);
    assert_eq!(set.clone().take(99).unwrap().len(), 14);
    refused(set.take(0), &["limit of 0"]);
}

// ---- loader ----

#[test]
fn evaluation_is_in_order_and_whole() {
    let loader = Loader::eval(Arc::new(numbered(10, 3)), 4).unwrap();
    assert_eq!((loader.steps_per_epoch(), loader.batch_size()), (3, 4));
    let batches: Vec<Batch> = loader.epoch(0, 0).map(Result::unwrap).collect();
    assert_eq!(batches.iter().map(|b| b.labels.len()).collect::<Vec<_>>(), [4, 4, 2]);
    assert_eq!(batches.iter().flat_map(|b| b.indices.clone()).collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
    assert_eq!(batches[2].labels, [2, 0]);
    assert_eq!(batches[2].images.len(), 2 * 16);
}

#[test]
fn every_epoch_is_another_order_of_the_same_images() {
    let loader = Loader::train(Arc::new(numbered(50, 5)), 7, Augment::none(), 1).unwrap();
    assert_eq!(loader.steps_per_epoch(), 7);
    let order = |loader: &Loader, epoch| loader.epoch(epoch, 0).flat_map(|b| b.unwrap().indices).collect::<Vec<_>>();
    let first = order(&loader, 0);
    assert_eq!(first.len(), 49);
    assert_eq!(first.iter().collect::<HashSet<_>>().len(), 49);
    assert_eq!(first, order(&loader, 0));
    assert_ne!(first, order(&loader, 1));
    let reseeded = Loader::train(Arc::new(numbered(50, 5)), 7, Augment::none(), 2).unwrap();
    assert_ne!(first, order(&reseeded, 0));
}

#[test]
fn a_resumed_epoch_goes_on_with_the_same_batches() {
    let data = data::open(&DataSource::default()).unwrap();
    let train = Arc::new(data.train.take(500).unwrap());
    let augment = Augment { pad_crop: 2, flip: true, erase: 0.5, ..Augment::none() };
    let loader = Loader::train(Arc::clone(&train), 32, augment.clone(), 11).unwrap();
    let whole: Vec<Batch> = loader.epoch(3, 0).map(Result::unwrap).collect();
    assert_eq!(whole.len(), 15);
    for first_step in [0, 1, 7, 14, 15, 99] {
        let again = Loader::train(Arc::clone(&train), 32, augment.clone(), 11).unwrap();
        let rest: Vec<Batch> = again.epoch(3, first_step).map(Result::unwrap).collect();
        assert!(rest == whole[first_step.min(15)..], "from step {first_step}");
    }
}

#[test]
fn what_an_image_gets_depends_on_nothing_but_seed_epoch_and_index() {
    let set = Arc::new(numbered(40, 4));
    let augment = Augment { pad_crop: 1, flip: true, erase: 1.0, ..Augment::none() };
    let image_of = |batch_size: usize, epoch: u64, index: usize| {
        let loader = Loader::train(Arc::clone(&set), batch_size, augment.clone(), 5).unwrap();
        loader.epoch(epoch, 0).map(Result::unwrap).find_map(|batch| {
            let at = batch.indices.iter().position(|i| *i == index)?;
            Some(batch.images[at * 16..][..16].to_vec())
        })
    };
    for index in 0..40 {
        assert_eq!(image_of(8, 2, index), image_of(20, 2, index));
    }
    assert!((0..40).any(|index| image_of(8, 2, index) != image_of(8, 3, index)));
}

#[test]
fn erasing_writes_the_mean() {
    let shape = ImageShape { height: 16, width: 16, channels: 1 };
    let set = Dataset::from_memory("white", shape, 1, vec![255; 64 * 256], vec![0; 64])
        .and_then(|set| set.with_normalisation(Normalisation { mean: vec![0.5], std: vec![0.5] }))
        .unwrap();
    let augment = Augment { erase: 1.0, ..Augment::none() };
    let batch = Loader::train(Arc::new(set), 64, augment, 0).unwrap().epoch(0, 0).next().unwrap().unwrap();
    assert!(batch.images.iter().all(|v| *v == 1.0 || *v == 0.0));
    let erased = batch.images.iter().filter(|v| **v == 0.0).count() as f32 / batch.images.len() as f32;
    assert!((0.1..0.25).contains(&erased), "{erased}");
}

#[test]
fn an_epoch_dropped_early_stops_at_once() {
    let set = Arc::new(data::open(&DataSource::default()).unwrap().train);
    let loader = Loader::train(Arc::clone(&set), 8, Augment::none(), 0).unwrap();
    let start = Instant::now();
    for taken in 0..20 {
        let mut batches = loader.epoch(taken, 0);
        for _ in 0..taken {
            batches.next().unwrap().unwrap();
        }
        if taken % 2 == 0 {
            // Long enough for the thread to fill its channel and wait.
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(batches);
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    drop(loader);
    assert_eq!(Arc::strong_count(&set), 1, "a loader's thread still holds the data");
}

#[test]
fn senseless_loaders_are_refused() {
    let set = Arc::new(numbered(10, 2));
    let train = |batch, augment| Loader::train(Arc::clone(&set), batch, augment, 0);
    refused(train(0, Augment::none()), &["batch of 0"]);
    refused(train(11, Augment::none()), &["batch 11", "10 training images"]);
    refused(train(2, Augment { pad_crop: 4, ..Augment::none() }), &["pad_crop 4", "4x4x1"]);
    refused(train(2, Augment { erase: 1.5, ..Augment::none() }), &["erase 1.5"]);
    refused(train(2, Augment { erase: f32::NAN, ..Augment::none() }), &["erase NaN"]);
    refused(Loader::eval(Arc::clone(&set), 0), &["batch of 0"]);
}
