//! The oracle: one Python process, `oracles/onnx_server.py`, which checks and runs files.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;

use depthshrinker::io::ModelInfo;
use depthshrinker::io::onnx::{OnnxPrecision, write_onnx};
use depthshrinker::model::Model;
use libtest_mimic::Failed;
use serde_json::{Value, json};

/// A Python with `onnx` and `onnxruntime`, which `tests/run` sets up.
pub const VARIABLE: &str = "DEPTHSHRINKER_ONNX_PYTHON";
/// Images of the batches that one model is run on.
pub const BATCHES: [usize; 2] = [1, 2];

struct Oracle {
    _process: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

static ORACLE: Mutex<Option<Oracle>> = Mutex::new(None);

impl Oracle {
    fn start() -> Result<Self, Failed> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracles/onnx_server.py");
        let python = std::env::var_os(VARIABLE).ok_or(VARIABLE)?;
        let mut process = Command::new(python).arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (requests, answers) = (process.stdin.take(), process.stdout.take());
        let answers = BufReader::new(answers.ok_or("no stdout")?);
        Ok(Self { _process: process, requests: requests.ok_or("no stdin")?, answers })
    }

    fn ask(&mut self, request: &Value) -> Result<Value, Failed> {
        writeln!(self.requests, "{request}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let answer: Value = serde_json::from_str(&line)?;
        match answer["error"].as_str() {
            Some(error) => Err(error.into()),
            None => Ok(answer),
        }
    }
}

/// Who computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evaluator {
    /// ONNX Runtime, which widens f16 on a CPU and may leave out casts in between.
    Runtime,
    /// ONNX's reference evaluator, which rounds every value of f16 to f16.
    Reference,
}

/// What the oracle says of a file.
pub struct Evaluated {
    /// Logits of all batches, not-a-number where they are not finite.
    pub logits: Vec<f32>,
    /// The operators, in the order of the file.
    pub operators: Vec<String>,
    /// Initializers in f32 and in f16.
    pub initializers: [usize; 2],
    /// Numbers of initializers that are subnormal in their own type, f32 and f16.
    pub subnormals: [usize; 2],
}

/// Exports a model, has the file checked, and runs it on images `[n, c, h, w]`, as many as [`BATCHES`] has.
pub fn evaluate(model: &Model, precision: &OnnxPrecision, images: &[f32], by: Evaluator) -> Result<Evaluated, Failed> {
    let folder = tempfile::tempdir()?;
    let (path, input) = (folder.path().join("m.onnx"), folder.path().join("x.bin"));
    write_onnx(&path, model, &ModelInfo::default(), precision)?;
    std::fs::write(&input, bytemuck::cast_slice::<f32, u8>(images))?;
    let shape = model.graph.input_shape();
    let shapes = BATCHES.map(|n| [n, shape.c, shape.h, shape.w]);
    let mut oracle = ORACLE.lock().map_err(|_| "the oracle's lock is poisoned")?;
    if oracle.is_none() {
        *oracle = Some(Oracle::start()?);
    }
    let request = json!({ "model": path, "input": input, "shapes": shapes, "reference": by == Evaluator::Reference });
    let answer = oracle.as_mut().ok_or("started above")?.ask(&request)?;
    let batches: Vec<Vec<Option<f32>>> = serde_json::from_value(answer["logits"].clone())?;
    Ok(Evaluated {
        logits: batches.concat().into_iter().map(|logit| logit.unwrap_or(f32::NAN)).collect(),
        operators: serde_json::from_value(answer["operators"].clone())?,
        initializers: serde_json::from_value(answer["initializers"].clone())?,
        subnormals: serde_json::from_value(answer["subnormals"].clone())?,
    })
}
