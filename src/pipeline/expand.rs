//! DepthShrinker+ as a job: expand → train with the teacher → remove the activations → fold back → evaluate (`docs/methods.md` 1.13).

use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use serde_json::json;

use super::folder::{Entry, RunFolder, RunSpec, Space};
use super::run::{Datasets, Finetuning, Run, check_batches};
use super::shrink::{Job, LAST, Stance, finish, merge_and_verify, stage};
use crate::config::Config;
use crate::io::{read_model, write_model};
use crate::model::Model;
use crate::report::{MergeResult, StageTime};
use crate::shrink::{ExpandedConv, Mask, Selection, contract, expand};
use crate::train::Evaluation;
use crate::{Error, Result};

/// Model files that the job ends with: expanded, without activations, folded back.
const MODELS: u64 = 3;

/// `result.json` of the job.
#[derive(Debug, Clone, Serialize)]
pub struct ExpandResult {
    /// The convolutions that were expanded.
    pub convs: Vec<ExpandedConv>,
    /// Accuracies on the test images, percent: of the network that was given, expanded and trained, and folded back.
    pub top1: ExpandAccuracies,
    /// How exact the fold was.
    pub merge: MergeResult,
    /// Time of each stage, in order.
    pub stages: Vec<StageTime>,
}

/// Top-1 accuracies of the three networks, percent.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct ExpandAccuracies {
    /// As it was given.
    pub original: f64,
    /// With trained inverted residuals.
    pub expanded: f64,
    /// Of the shape that it was given in.
    pub merged: f64,
}

/// Opens model, teacher and data, refuses what cannot be expanded, enters the folder and runs the job there. The given model teaches
/// where no other does.
///
/// # Errors
/// Settings, data or models that do not fit one another, a folder that may not be entered so, whatever stops a stage, or
/// [`Error::Interrupted`].
pub fn expand_in(folder: &RunFolder, config: &Config, entry: Entry, stance: Stance) -> Result<ExpandResult> {
    let missing = || Error::Config("expand needs a model to start from; give its file, or `model` in --config".into());
    let file = config.model.as_deref().ok_or_else(missing)?;
    let (original, info) = read_model(file)?;
    let teacher = config.finetune.teacher.as_deref().map(read_model).transpose()?.map(|(teacher, _)| teacher);
    let data = Datasets::open(config, Some((&original, &info)))?;
    check_batches([&config.finetune.train], &data)?;
    let expanded = expand(&original, &config.expand, config.seed)?;
    data.doubts([("expand", &config.finetune.train)], &expanded.model.graph)?.settle(stance.strict)?;
    let models: Vec<&Path> = [file].into_iter().chain(config.finetune.teacher.as_deref()).collect();
    let spec = RunSpec {
        command: "expand",
        config,
        models: &models,
        data: &data,
        last: LAST,
        bytes: Space { models: MODELS, stages: &[&config.finetune.train] }.bytes(&expanded.model.graph)?,
    };
    let run = &mut Run::new(config, &data, folder.enter(&spec, entry, stance.quiet)?)?;
    let mut job = Job::read(&run.session.job)?;
    let teacher = teacher.as_ref().unwrap_or(&original);
    let all: Selection = Mask::all(expanded.model.graph.blocks.len()).into();
    let mut trained = |name: &str, file: &str, job: &mut Job, start: &Model, selection: &Selection| {
        stage(run, folder, job, name, file, |run, keep| {
            run.finetune(Finetuning { name, seed: 0, start, original: teacher, selection }, Some(keep))
        })
    };
    let wide = trained("expand", "expanded.safetensors", &mut job, &expanded.model, &all)?;
    let linear = trained("finetune", "shrunk.safetensors", &mut job, &wide, &expanded.selection)?;
    let clock = Instant::now();
    let (merged, error) = merge_and_verify(run, &linear, &expanded.selection)?;
    let contracted = contract(&merged, &original.graph, &expanded.convs)?;
    write_model(&folder.path("merged.safetensors"), &contracted, &run.data.info())?;
    finish(&mut job, run, "merge", clock);
    let top1 = |evaluation: Evaluation| evaluation.top1;
    let top1 = ExpandAccuracies {
        original: run.evaluate(&original).map(top1)?,
        expanded: run.evaluate(&wide).map(top1)?,
        merged: run.evaluate(&contracted).map(top1)?,
    };
    let merge = MergeResult {
        segments: merged.segments.len(),
        max_abs_error: error.max_abs_error,
        max_rel_error: error.max_rel_error,
    };
    expanded.selection.write(&folder.path("plan.json"))?;
    let result = ExpandResult { convs: expanded.convs, top1, merge, stages: job.done };
    folder.write(LAST, &format!("{:#}\n", json!(result)))?;
    Ok(result)
}
