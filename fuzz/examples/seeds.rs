//! Writes a few sound files per target, from which the fuzzer starts:
//! `cargo run --release --manifest-path fuzz/Cargo.toml --example seeds`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use depthshrinker::config::Config;
use depthshrinker::graph::{BlockState, Graph};
use depthshrinker::io::{Checkpoint, ModelInfo, Position, Sums, write_model};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::shape::Shape;
use serde_json::Value;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

fn corpus(target: &str) -> Outcome<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// The first block of a MobileNetV2 with its stem and classifier: the smallest file that holds one of everything.
fn tiny(state: BlockState) -> Outcome<Model> {
    let options = NetworkOptions { head_channels: Some(8), ..NetworkOptions::new(Shape::new(8, 9, 1), 2) };
    let mut graph: Graph = build("mobilenetv2-0.1", &options)?;
    let (block, input, classifier) = (graph.blocks[0].clone(), graph.input_shape(), graph.nodes.pop());
    graph.nodes.truncate(block.nodes.end.index());
    graph.blocks.truncate(1);
    let mut classifier = classifier.ok_or("a graph has nodes")?;
    let mut pool = classifier.clone();
    (pool.name, pool.inputs, pool.op) = ("pool".into(), vec![graph.output()], depthshrinker::graph::Op::GlobalAvgPool);
    classifier.inputs = vec![graph.output().next()];
    graph.nodes.extend([pool, classifier]);
    assert_eq!(graph.input_shape(), input);
    let mut model = Model::initialise(graph, 1)?;
    if state == BlockState::Linear {
        let keep_none = [false];
        let surgery = depthshrinker::shrink::surgery::Linearise {
            final_activation: false,
            padding: depthshrinker::shrink::padding::PaddingMode::BorderBias,
        };
        model = depthshrinker::shrink::surgery::linearise(&model, &keep_none, &surgery)?;
    }
    Ok(model)
}

/// The pickle in one of PyTorch's archives.
fn pickle_of(archive: &[u8]) -> Outcome<Vec<u8>> {
    let mut zip = zip::ZipArchive::new(Cursor::new(archive))?;
    let mut pickle = Vec::new();
    zip.by_name("forms/data.pkl")?.read_to_end(&mut pickle)?;
    Ok(pickle)
}

/// Copies all files below `from` into one folder, by names that begin with `prefix`.
fn copy_files(from: &Path, to: &Path, prefix: &str) -> Outcome {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let name = format!("{prefix}-{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            copy_files(&entry.path(), to, &name)?;
        } else {
            fs::copy(entry.path(), to.join(name))?;
        }
    }
    Ok(())
}

fn main() -> Outcome {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let torch = corpus("torch")?;
    for name in ["forms.pth", "forms-old.pth"] {
        fs::copy(fixtures.join("import").join(name), torch.join(name))?;
    }
    let archive = fs::read(fixtures.join("import/forms.pth"))?;
    fs::write(corpus("pickle")?.join("forms"), pickle_of(&archive)?)?;
    // What lies beside weights: pickles without their first opcode and their last.
    let beside = fs::read_to_string(fixtures.join("import/beside.json"))?;
    let beside: BTreeMap<String, String> = serde_json::from_str(&beside)?;
    for (index, hex) in beside.values().enumerate() {
        let body = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16));
        let body = body.collect::<Result<Vec<u8>, _>>()?;
        fs::write(corpus("pickle")?.join(format!("beside-{index}")), [b"\x80\x02", &body[..], b"."].concat())?;
    }
    for (target, folder) in [("pictures", "pictures"), ("parquet", "shards"), ("parquet", "layouts"), ("parquet", "refused")] {
        copy_files(&fixtures.join(folder), &corpus(target)?, folder)?;
    }
    fs::copy(fixtures.join("import/logits.safetensors"), corpus("safetensors")?.join("logits"))?;

    for (name, state) in [("active", BlockState::Active), ("linear", BlockState::Linear)] {
        let model = tiny(state)?;
        write_model(&corpus("model")?.join(name), &model, &ModelInfo::default())?;
        write_model(&corpus("safetensors")?.join(name), &model, &ModelInfo::default())?;
        fs::write(corpus("model")?.join(format!("{name}.json")), serde_json::to_vec(&model.graph)?)?;
        let trained = model.graph.params()?.iter().filter(|p| p.role.is_trained()).map(|p| p.len()).sum();
        let checkpoint = Checkpoint {
            model,
            optimizer: vec![vec![0.5; trained]],
            optimizer_steps: 7,
            position: Position { stage: "train".into(), ..Position::default() },
            sums: Sums::default(),
            metrics_bytes: 10,
            hook: Value::Null,
            job: Value::Null,
            fingerprint: "abc".into(),
            data: Value::Null,
        };
        checkpoint.write(&corpus("checkpoint")?.join(name))?;
    }

    fs::write(corpus("config")?.join("default"), Config::default().to_toml()?)?;
    fs::write(corpus("masks")?.join("list"), "1,0,1,1")?;
    fs::write(
        corpus("masks")?.join("plan"),
        r#"{"kept":[1,0],"scores":[0.5,-1.0],"nested":[{"keep":1,"kept":[1,0]}]}"#,
    )?;

    let times = "id,st,end,time,stdev\n0,0,1,1.5,0.1\n1,0,2,2.5,0.1\n2,1,2,1.25,0.1\n3,2,2,0.5,0\n";
    let importances = "st,end,act_st,act_end,importance\n0,1,1,1,-0.5\n0,1,1,0,-1\n0,2,1,1,-0.5\n1,2,1,1,-0.5\n1,2,0,1,-0.5\n";
    fs::write(corpus("tables")?.join("both"), format!("{times}\n{importances}"))?;

    let images = [&[0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3][..], &[7; 12]].concat();
    let labels = [0, 0, 8, 1, 0, 0, 0, 2, 3, 9];
    fs::write(corpus("archives")?.join("idx"), [&(images.len() as u16).to_le_bytes()[..], &images, &labels].concat())?;
    fs::write(corpus("archives")?.join("cifar"), [4; 3073])?;
    Ok(())
}
