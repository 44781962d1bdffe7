//! `eval`: accuracy of a model.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;

use super::settings::{DataArgs, sizes};
use super::{Common, print};
use crate::data::Loader;
use crate::io::read_model;
use crate::pipeline::{Datasets, Entry, evaluate_model};
use crate::terminal;
use crate::train::Interrupt;

/// Options of `eval`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The model
    model: PathBuf,
    #[command(flatten)]
    data: DataArgs,
}

/// Prints the accuracy on the test images.
///
/// # Errors
/// A model or data that cannot be used.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    // Nothing is kept, so there is nothing to save before the end.
    Interrupt::end_on_ctrl_c()?;
    let mut config = common.base_config(Entry::New, None)?;
    args.data.apply(&mut config, Entry::New);
    common.ready(&config)?;
    let (model, info) = read_model(&args.model)?;
    let (images, doubts) = Datasets::open_test(&config, (&model, &info))?;
    doubts.settle(common.strict)?;
    let batch = config.evaluate.batch(images.shape().into());
    let test = Loader::eval(images, batch)?;
    let evaluation = evaluate_model(&config.device()?, &model, &test, &Interrupt::new())?;
    let (params, macs) = sizes(&model)?;
    let text = if common.json {
        let value = json!({
            "top1": evaluation.top1, "loss": evaluation.loss, "images": evaluation.images, "params": params, "macs": macs,
        });
        format!("{value:#}\n")
    } else {
        let (top1, loss, images) = (evaluation.top1, evaluation.loss, evaluation.images);
        format!(
            "top-1 {top1:.2} %, loss {loss:.4} on {images} test images of {}\n",
            terminal::one_line(test.dataset().name())
        )
    };
    print("the accuracy", &text)
}
