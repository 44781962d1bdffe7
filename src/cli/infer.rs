//! `infer`: a model on tensors or pictures.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};

use super::{Common, print};
use crate::device::Device;
use crate::io::{ModelInfo, check_writable, read_model};
use crate::model::Model;
use crate::pipeline::{Entry, Top, logits, picture_logits, read_images, top_classes, write_logits};
use crate::{Error, terminal};

/// Number of classes printed per image.
const TOP: usize = 5;

/// Options of `infer`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The model
    model: PathBuf,
    /// Pictures (JPEG, PNG); the five likeliest labels of each are printed
    images: Vec<PathBuf>,
    /// A safetensors file with `input`, NCHW, normalised as in training
    #[arg(long, value_name = "FILE", conflicts_with = "images")]
    input: Option<PathBuf>,
    /// The safetensors file to write, with `logits`
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs the model and writes logits or prints labels.
///
/// # Errors
/// Files that cannot be used or do not fit the model.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let config = common.base_config(Entry::New, None)?;
    common.ready(&config)?;
    if args.input.is_none() && args.images.is_empty() {
        return Err(Error::Config("infer needs something to look at; give --input FILE or pictures".into()).into());
    }
    args.output.as_deref().map(check_writable).transpose()?;
    let (model, info) = read_model(&args.model)?;
    model.graph.check_classifier()?;
    let device = config.device()?;
    let (names, logits) = match &args.input {
        Some(path) => of_tensor(path, &model, &device)?,
        None => of_pictures(&args.images, &model, &info, &device)?,
    };
    if let Some(bad) = logits.iter().find(|v| !v.is_finite()) {
        return Err(
            Error::NotFinite(format!("a logit is {bad}; the model's weights or the images are unusable")).into()
        );
    }
    let classes = model.graph.classes();
    if let Some(path) = &args.output {
        write_logits(path, &logits, classes)?;
    }
    let text = match (&args.output, common.json) {
        (Some(path), true) => format!("{:#}\n", json!({ "output": path, "images": names.len(), "classes": classes })),
        (Some(_), false) => String::new(),
        (None, as_json) => labels(&names, &logits, classes, &info, as_json),
    };
    print("what the model sees", &text)
}

/// Logits of the images of a tensor file, which are named by their place.
fn of_tensor(path: &Path, model: &Model, device: &Device) -> Result<(Vec<String>, Vec<f32>)> {
    let shape = model.graph.input_shape();
    let images = read_images(path, shape)?;
    let names = (0..images.len() / shape.len()).map(|i| format!("{}[{i}]", path.display())).collect();
    Ok((names, logits(device, model, &images)?))
}

/// Logits of pictures, made to fit as the model's file says.
fn of_pictures(paths: &[PathBuf], model: &Model, info: &ModelInfo, device: &Device) -> Result<(Vec<String>, Vec<f32>)> {
    let data = info.data.as_ref().ok_or_else(|| {
        Error::Config("the model's file does not say how images are normalised; give normalised --input".into())
    })?;
    let names = paths.iter().map(|p| p.display().to_string()).collect();
    Ok((names, picture_logits(device, model, paths, &data.preprocessing())?))
}

fn labels(names: &[String], logits: &[f32], classes: usize, info: &ModelInfo, as_json: bool) -> String {
    let known: &[String] = info.data.as_ref().map_or(&[], |data| &data.classes);
    let label = |class: usize| known.get(class).cloned().unwrap_or_else(|| class.to_string());
    let tops: Vec<Vec<Top>> = logits.chunks(classes).map(|row| top_classes(row, TOP)).collect();
    if as_json {
        let top = |t: &Top| json!({ "class": t.class, "label": label(t.class), "probability": t.probability });
        let image = |(name, tops): (&String, &Vec<Top>)| -> Value {
            json!({ "image": name, "top": tops.iter().map(top).collect::<Vec<_>>() })
        };
        return format!("{:#}\n", Value::from(names.iter().zip(&tops).map(image).collect::<Vec<_>>()));
    }
    let mut text = String::new();
    for (name, tops) in names.iter().zip(&tops) {
        text.push_str(&format!("{}\n", terminal::one_line(name)));
        for top in tops {
            text.push_str(&format!("  {:5.1} %  {}\n", 100.0 * top.probability, label(top.class)));
        }
    }
    text
}
