//! Files that are made to harm, of every kind that is read: the program refuses each in one line, in a quarter of a gibibyte of
//! address space and in seconds. Those in PyTorch's forms are in `import`, Parquet shards in `parquet`.

mod limited;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::process::Command;
use std::sync::LazyLock;

use depthshrinker::io::tensors::{read_tensors, write_tensors};
use depthshrinker::io::{Checkpoint, DataInfo, ModelInfo, write_model};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use flate2::write::{GzEncoder, ZlibEncoder};
use flate2::{Compression, Crc};
use libtest_mimic::{Arguments, Trial};
use tempfile::TempDir;

use limited::refuses;

/// Beside a sound model `m.safetensors` for grey pictures of 28x28: one file, a command that reads it, and what is told.
struct Row {
    name: &'static str,
    file: &'static str,
    bytes: Box<dyn Fn() -> Vec<u8> + Send + Sync>,
    args: &'static [&'static str],
    words: &'static [&'static str],
}

fn row(
    name: &'static str,
    file: &'static str,
    bytes: impl Fn() -> Vec<u8> + Send + Sync + 'static,
    args: &'static [&'static str],
    words: &'static [&'static str],
) -> Row {
    Row { name, file, bytes: Box::new(bytes), args, words }
}

fn model() -> Model {
    Model::initialise(build("mobilenetv2-0.1", &NetworkOptions::new(Shape::new(28, 28, 1), 10)).unwrap(), 1).unwrap()
}

/// A folder with `m.safetensors`.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let classes = (0..10).map(|class| format!("class {class}")).collect();
    let (mean, std, shape) = (vec![0.5], vec![0.25], Shape::new(28, 28, 1));
    let data = DataInfo { name: "grey".into(), classes, shape, mean, std, resize: None };
    write_model(&folder.path().join("m.safetensors"), &model(), &ModelInfo { data: Some(data) }).unwrap();
    folder
}

// ---- safetensors ----

/// A safetensors file of this header, or what claims to be one, and so many zeros behind it.
fn container(header: &str, zeros: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; zeros]].concat()
}

fn tensor(name: &str, shape: &str, end: u64) -> String {
    format!("{{\"{name}\":{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[0,{end}]}}}}")
}

/// A model file whose metadata are changed.
fn with_metadata(change: impl Fn(&mut BTreeMap<String, String>)) -> Vec<u8> {
    let folder = folder();
    let path = folder.path().join("m.safetensors");
    let mut file = read_tensors(&path).unwrap();
    change(&mut file.metadata);
    write_tensors(&path, &file.tensors, &file.metadata).unwrap();
    fs::read(&path).unwrap()
}

/// A model file that describes another network than it holds.
fn of_graph(describe: impl Fn(String) -> String) -> Vec<u8> {
    with_metadata(|metadata| {
        let graph = metadata.get_mut("depthshrinker.graph").unwrap();
        let described = describe(graph.clone());
        assert!(described != *graph, "nothing is changed");
        *graph = described;
    })
}

/// A graph of so many nodes.
fn many_nodes(graph: &str, count: usize) -> String {
    let (head, rest) = graph.split_once("\"nodes\":[").unwrap();
    let (node, _) = rest.split_once("},{").unwrap();
    format!("{head}\"nodes\":[{}{rest}", format!("{node}}},").repeat(count))
}

const EVAL: &[&str] = &["eval", "x.safetensors"];
const INFER: &[&str] = &["infer", "m.safetensors", "--input", "x.safetensors", "--output", "y.safetensors"];
const X: &str = "x.safetensors";

fn models() -> Vec<Row> {
    let many = || {
        let of = |i: usize| format!("\"t{i}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}");
        container(&format!("{{{}}}", (0..50_000).map(of).collect::<Vec<_>>().join(",")), 0)
    };
    vec![
        row("header beyond the file", X, || container("{", 0)[..9].to_vec(), EVAL, &[X]),
        row("header of an exabyte", X, || [&(1u64 << 60).to_le_bytes()[..], b"{}"].concat(), EVAL, &[X]),
        row("deep header", X, || container(&"[".repeat(30 << 20), 0), EVAL, &[X]),
        row("header without end", X, || container(&"{\"a\":".repeat(6 << 20), 0), EVAL, &[X]),
        row("many tensors", X, many, EVAL, &[X]),
        row("huge tensor", X, || container(&tensor("a", "[1099511627776]", 1 << 42), 64), EVAL, &[X]),
        row("overflowing tensor", X, || container(&tensor("a", "[4294967296,4294967296,4]", 0), 0), EVAL, &[X]),
        row("deep graph", X, || of_graph(|_| "[".repeat(20 << 20)), EVAL, &[X, "depthshrinker.graph"]),
        row("wide layer", X, || of_graph(|g| g.replacen("\"c_out\":8", "\"c_out\":1048576", 1)), EVAL, &[X, "1048576"]),
        row("many nodes", X, || of_graph(|g| many_nodes(&g, 100_000)), EVAL, &[X, "limit of 10000"]),
        row("huge image", X, || of_graph(|g| g.replacen("\"h\":28", "\"h\":4000000000", 1)), EVAL, &[X, "4000000000"]),
        row("huge number", X, || of_graph(|g| g.replacen("\"h\":28", "\"h\":1e400", 1)), EVAL, &[X]),
        row(
            "images of an exabyte",
            X,
            || container(&tensor("input", "[1152921504606846976,1,28,28]", 0), 0),
            INFER,
            &[X],
        ),
        row("images of no pixels", X, || container(&tensor("input", "[1099511627776,1,0,28]", 0), 0), INFER, &[X]),
        row("images of other sides", X, || container(&tensor("input", "[1,1,8,8]", 256), 256), INFER, &[X]),
    ]
}

// ---- checkpoints ----

const RUN: &str = "r/checkpoint.safetensors";
const RESUME: &[&str] = &["train", "--resume", "--out", "r"];

/// The folder of a run that is done.
static TRAINED: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let net = ["train", "--net", "mobilenetv2-0.1", "--train-limit", "32", "--test-limit", "10", "--batch", "32"];
    let mut train = Command::new(env!("CARGO_BIN_EXE_depthshrinker"));
    train.current_dir(&folder).args(net).args(["--epochs", "1", "--out", "r", "-q"]);
    assert!(train.status().unwrap().success());
    folder
});

/// Its checkpoint, as if it had just begun, changed.
fn checkpoint(change: impl Fn(&mut Checkpoint)) -> Vec<u8> {
    let mut saved = Checkpoint::read(&TRAINED.path().join(RUN)).unwrap();
    (saved.position.finished, saved.position.epoch, saved.position.step) = (false, 0, 0);
    change(&mut saved);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    saved.write(&path).unwrap();
    fs::read(path).unwrap()
}

/// Its checkpoint with another text in place of one in its metadata.
fn state(from: &str, to: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let mut file = read_tensors(&TRAINED.path().join(RUN)).unwrap();
    let state = file.metadata.get_mut("depthshrinker.checkpoint").unwrap();
    assert!(state.contains(from), "{state}");
    *state = state.replacen(from, to, 1);
    write_tensors(&path, &file.tensors, &file.metadata).unwrap();
    fs::read(path).unwrap()
}

fn checkpoints() -> Vec<Row> {
    let deep = || state("\"position\":", &format!("\"hook\":{},\"position\":", "[".repeat(20 << 20)));
    vec![
        row("header of an exabyte", RUN, || [&(1u64 << 60).to_le_bytes()[..], b"{}"].concat(), RESUME, &[RUN]),
        row("deep header", RUN, || container(&"[".repeat(30 << 20), 0), RESUME, &[RUN]),
        row("huge tensor", RUN, || container(&tensor("a", "[1099511627776]", 1 << 42), 64), RESUME, &[RUN]),
        row("deep state", RUN, deep, RESUME, &[RUN]),
        row(
            "buffers by the exabyte",
            RUN,
            || state("\"optimizer_buffers\":1", "\"optimizer_buffers\":18446744073709551615"),
            RESUME,
            &[RUN, "optimizer state"],
        ),
        row("no state", RUN, || checkpoint(|saved| saved.optimizer.clear()), RESUME, &["expected 1 buffers"]),
        row(
            "a longer state",
            RUN,
            || checkpoint(|saved| saved.optimizer[0].push(0.0)),
            RESUME,
            &["expected 1 buffers"],
        ),
    ]
}

// ---- settings and tables ----

const SETTINGS: &[&str] = &["shrink", "--config", "c.toml"];
const PLAN: &[&str] = &["merge", "m.safetensors", "--plan", "plan.json", "-o", "y.safetensors"];
const TABLE: &[&str] = &["select", "--method", "fastest", "--table", "t.csv"];

/// A text of `start` and so many times `rest`.
fn long(start: &'static str, rest: &'static str, times: usize) -> impl Fn() -> Vec<u8> + Send + Sync {
    move || [start.as_bytes(), &rest.as_bytes().repeat(times)].concat()
}

fn texts() -> Vec<Row> {
    const MIB: usize = 1 << 20;
    vec![
        row("deep arrays", "c.toml", long("a = ", "[", MIB), SETTINGS, &["c.toml"]),
        row("deep tables", "c.toml", long("a = ", "{a=", MIB / 8), SETTINGS, &["c.toml"]),
        row("deep keys", "c.toml", long("a", ".a", MIB), SETTINGS, &["c.toml"]),
        row("deep headers", "c.toml", long("[a", ".a", MIB), SETTINGS, &["c.toml"]),
        row("many tables", "c.toml", long("", "[[a]]\n", MIB / 8), SETTINGS, &["c.toml"]),
        // What the parser makes of it does not fit.
        row("16 MiB of arrays", "c.toml", long("a = ", "[", 15 * MIB), SETTINGS, &["out of memory"]),
        row("17 MiB", "c.toml", long("", "#", 17 * MIB), SETTINGS, &["c.toml", "16 MiB"]),
        row("deep plan", "plan.json", long("", "[", 15 * MIB), PLAN, &["plan.json"]),
        row("long plan", "plan.json", long("{\"kept\": [0", ",0", 7 * MIB), PLAN, &["plan.json"]),
        row("long key of a plan", "plan.json", || [b"{\"", &[b'a'; MIB][..], b"\": 1}"].concat(), PLAN, &["plan.json"]),
        row("long key", "c.toml", || [&[b'a'; MIB][..], b" = 1"].concat(), SETTINGS, &["c.toml"]),
        row("positions of four billion", "t.csv", long("st,end,time\n", "0,4294967295,1\n", 1), TABLE, &["t.csv"]),
        row(
            "positions beyond words",
            "t.csv",
            long("st,end,time\n", "0,99999999999999999999,1\n", 1),
            TABLE,
            &["t.csv"],
        ),
        row("line without end", "t.csv", long("st,end,time\n", "1", 16 * MIB), TABLE, &["t.csv"]),
        row("quote without end", "t.csv", long("st,end,time\n\"", "\n", 16 * MIB), TABLE, &["t.csv"]),
        row("many columns", "t.csv", long("st", ",a", MIB / 4), TABLE, &["t.csv"]),
        row("many rows", "t.csv", long("st,end,time\n", "0,1,1\n", MIB / 4), TABLE, &["t.csv"]),
        row("64 MiB of rows", "t.csv", long("st,end,time\n", "0,1,1\n", 10 * MIB), TABLE, &["out of memory"]),
        row("65 MiB", "t.csv", long("", "\n", 65 * MIB), TABLE, &["t.csv"]),
    ]
}

// ---- data sets ----

fn idx(magic: u32, sizes: &[u32]) -> Vec<u8> {
    std::iter::once(&magic).chain(sizes).flat_map(|word| word.to_be_bytes()).collect()
}

/// The bytes, and so many zeros behind them, packed.
fn gzip(bytes: &[u8], zeros: usize) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    write_zeros(&mut encoder, zeros);
    encoder.finish().unwrap()
}

fn write_zeros(to: &mut impl Write, mut zeros: usize) {
    while zeros > 0 {
        let some = zeros.min(1 << 20);
        to.write_all(&vec![0; some]).unwrap();
        zeros -= some;
    }
}

const IMAGES: &str = "train-images-idx3-ubyte";
const LABELS: &str = "train-labels-idx1-ubyte";
const MNIST: &[&str] = &["eval", "m.safetensors", "--data", "mnist", "--data-dir", "."];
const CIFAR: &[&str] = &["eval", "m.safetensors", "--data", "cifar10", "--data-dir", "."];
const CIFAR100: &[&str] = &["eval", "m.safetensors", "--data", "cifar100", "--data-dir", "."];
const GIB: usize = 1 << 30;

/// One file of a set is hostile; what beside it is missing would be read later.
fn sets() -> Vec<Row> {
    vec![
        row("images by the exabyte", IMAGES, || idx(0x803, &[u32::MAX; 3]), MNIST, &[IMAGES]),
        row("images by the gibibyte", IMAGES, || idx(0x803, &[1 << 20, 32, 32]), MNIST, &[IMAGES]),
        row("packed bomb", IMAGES, || gzip(&idx(0x803, &[20, 28, 28]), GIB), MNIST, &[IMAGES, "bytes follow"]),
        row("packed gibibyte", IMAGES, || gzip(&idx(0x803, &[1 << 20, 32, 32]), GIB), MNIST, &[IMAGES]),
        row("packed claim", IMAGES, || gzip(&idx(0x803, &[u32::MAX, 1000, 1000]), 0), MNIST, &[IMAGES]),
        row("labels by the billion", LABELS, || idx(0x801, &[u32::MAX]), MNIST, &[LABELS]),
        row("labels in a bomb", LABELS, || gzip(&idx(0x801, &[20]), GIB), MNIST, &[LABELS]),
        row("record of another size", "data_batch_1.bin", || vec![0; (3073 << 10) + 1], CIFAR, &["data_batch_1.bin"]),
        row("record of no class", "data_batch_1.bin", || vec![77; 3073], CIFAR, &["data_batch_1.bin", "label 77"]),
        row("record cut short", "train.bin", || vec![0; 3000], CIFAR100, &["train.bin"]),
    ]
}

// ---- pictures ----

/// A PNG of these chunks, their checksums right.
fn png(chunks: &[(&[u8; 4], Vec<u8>)]) -> Vec<u8> {
    let mut bytes = b"\x89PNG\r\n\x1a\n".to_vec();
    for (kind, data) in chunks {
        let mut sum = Crc::new();
        sum.update(*kind);
        sum.update(data);
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(*kind);
        bytes.extend(data);
        bytes.extend(sum.sum().to_be_bytes());
    }
    bytes
}

/// The head of a PNG.
fn head(side: u32, bits: u8, colour: u8) -> (&'static [u8; 4], Vec<u8>) {
    (b"IHDR", [&side.to_be_bytes()[..], &side.to_be_bytes(), &[bits, colour, 0, 0, 0]].concat())
}

fn zlib(zeros: usize) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    write_zeros(&mut encoder, zeros);
    encoder.finish().unwrap()
}

/// The head of a JPEG that claims this side: a frame without a scan, which `scans` follow.
fn jpeg(frame: u8, side: u16, scans: usize) -> Vec<u8> {
    let mut bytes = fs::read("tests/fixtures/pictures/progressive.jpg").unwrap();
    let at = bytes.windows(2).position(|marker| marker == [0xff, 0xc2]).expect("a progressive frame");
    bytes[at + 1] = frame;
    bytes[at + 5..at + 9].copy_from_slice(&[side.to_be_bytes(), side.to_be_bytes()].concat());
    let first = bytes.windows(2).position(|marker| marker == [0xff, 0xda]).expect("a scan");
    let scan = bytes[first..bytes.len() - 2].to_vec();
    [&bytes[..first], &scan.repeat(scans)].concat()
}

const PNG: &[&str] = &["infer", "m.safetensors", "x.png"];
const JPEG: &[&str] = &["infer", "m.safetensors", "x.jpg"];

fn pictures() -> Vec<Row> {
    let end = || (b"IEND", Vec::new());
    vec![
        row("four billion pixels", "x.png", move || png(&[head(65_535, 16, 6), end()]), PNG, &["x.png"]),
        row(
            "a gibibyte of pixels",
            "x.png",
            move || png(&[head(16_384, 8, 6), (b"IDAT", zlib(64)), end()]),
            PNG,
            &["x.png"],
        ),
        row("no side", "x.png", move || png(&[head(0, 8, 0), end()]), PNG, &["x.png"]),
        row(
            "text in a bomb",
            "x.png",
            move || png(&[head(28, 8, 0), (b"zTXt", [b"a\0\0".to_vec(), zlib(GIB)].concat()), end()]),
            PNG,
            &["x.png"],
        ),
        row(
            "colours in a bomb",
            "x.png",
            move || png(&[head(28, 8, 0), (b"iCCP", [b"a\0\0".to_vec(), zlib(GIB)].concat()), end()]),
            PNG,
            &["x.png"],
        ),
        row(
            "a chunk beyond the file",
            "x.png",
            || [&png(&[head(28, 8, 0)])[..], b"\x7f\xff\xff\xffIDAT"].concat(),
            PNG,
            &["x.png"],
        ),
        row("four billion pixels", "x.jpg", || jpeg(0xc0, u16::MAX, 1), JPEG, &["x.jpg"]),
        row("four billion progressive pixels", "x.jpg", || jpeg(0xc2, u16::MAX, 1), JPEG, &["x.jpg"]),
        row("scans upon scans", "x.jpg", || jpeg(0xc2, 6000, 4000), JPEG, &[]),
    ]
}

fn check(row: &Row) -> Result<(), String> {
    let folder = folder();
    for (file, magic, sizes) in [(IMAGES, 0x803, &[20, 28, 28][..]), (LABELS, 0x801, &[20])] {
        let bytes = sizes.iter().product::<u32>() as usize;
        fs::write(folder.path().join(file), [idx(magic, sizes), vec![0; bytes]].concat()).unwrap();
    }
    if row.file == RUN {
        fs::create_dir(folder.path().join("r")).unwrap();
        fs::copy(TRAINED.path().join("r/config.toml"), folder.path().join("r/config.toml")).unwrap();
    }
    fs::write(folder.path().join(row.file), (row.bytes)()).unwrap();
    refuses(folder.path(), row.args, row.words)
}

fn main() {
    let arguments = Arguments::from_args();
    let groups = [models(), checkpoints(), texts(), sets(), pictures()];
    let trial = |row: Row| {
        let name = format!("{}/{}", row.file, row.name);
        // Elsewhere a shell cannot limit address space.
        Trial::test(name, move || check(&row).map_err(Into::into)).with_ignored_flag(!cfg!(target_os = "linux"))
    };
    libtest_mimic::run(&arguments, groups.into_iter().flatten().map(trial).collect()).exit();
}
