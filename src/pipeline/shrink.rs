//! `shrink`: all stages in order. Every stage's result is a file; the checkpoint says which stages are done, so a run
//! that was killed at any instant goes on with the same bits.

use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::folder::{Entry, RunFolder, RunSpec, Space};
use super::keeping::KeepModel;
use super::run::{Datasets, Finetuning, Run, check_batches, check_mergeable, check_search, configured_graph};
use super::selection::{choose_blocks, latency_share, selections_to_compare};
use super::summary::{Facts, Networks, summarise};
use crate::config::{Config, FinetuneStart};
use crate::data::Loader;
use crate::dtype::Dtype;
use crate::io::onnx::write_onnx;
use crate::io::{read_model, write_model};
use crate::measure::Change;
use crate::model::Model;
use crate::report::{MaskTrial, MetricsLine, Page, RunResult, StageTime};
use crate::shrink::Selection;
use crate::shrink::merge::{MergeError, MergeOptions, Merged, merge_selection, verify, verify_random};
use crate::{Error, Result};

/// Model files that a run ends with: original, searched, shrunk and merged, and the merged one as ONNX. Merged networks
/// have more weights, which is why two more are counted.
const MODELS: u64 = 7;
/// The file that marks a run as finished.
pub(super) const LAST: &str = "result.json";
/// Images on which the merged network is checked against the unmerged one, of noise and of the test set each.
const VERIFY_IMAGES: usize = 32;

/// Progress of the whole job, which the checkpoint holds besides the current stage.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Job {
    /// Stages whose results are files, with their seconds in the process that ended them.
    pub done: Vec<StageTime>,
    /// Networks finetuned with random masks.
    random: Vec<MaskTrial>,
}

impl Job {
    pub fn read(value: &Value) -> Result<Self> {
        if value.is_null() {
            return Ok(Self::default());
        }
        Self::deserialize(value)
            .map_err(|e| Error::Config(format!("the checkpoint is not of such a run ({e}); start again with --force")))
    }

    fn has(&self, stage: &str) -> bool {
        self.done.iter().any(|s| s.name == stage)
    }
}

/// How a run treats what leaves it in doubt, and whether it tells its progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stance {
    /// Fail where there would be a warning that the result may mean nothing.
    pub strict: bool,
    /// Tell nothing but errors.
    pub quiet: bool,
}

/// Opens model and data, refuses what cannot be done, enters the folder and runs the whole job there.
///
/// # Errors
/// Settings, data or a model that do not fit one another, a folder that may not be entered so, or as [`shrink`].
pub fn shrink_in(folder: &RunFolder, config: &Config, entry: Entry, stance: Stance) -> Result<RunResult> {
    let model = config.model.as_deref().map(read_model).transpose()?;
    let data = Datasets::open(config, model.as_ref().map(|(model, info)| (model, info)))?;
    let fresh = config.model.is_none().then_some(("train", &config.train));
    let stages = || fresh.into_iter().chain(config.search_stage()).chain([("finetune", &config.finetune.train)]);
    check_batches(stages().map(|(_, stage)| stage), &data)?;
    let graph = match &model {
        Some((model, _)) => model.graph.clone(),
        None => configured_graph(config, &data)?,
    };
    check_search(config, &graph)?;
    check_mergeable(config, &graph)?;
    data.doubts(stages(), &graph)?.settle(stance.strict)?;
    let models: Vec<&Path> = config.model.as_deref().into_iter().collect();
    let stages = [&config.train, &config.search.train, &config.finetune.train];
    let spec = RunSpec {
        command: "shrink",
        config,
        models: &models,
        data: &data,
        last: LAST,
        bytes: Space { models: MODELS, stages: &stages }.bytes(&graph)?,
    };
    let session = folder.enter(&spec, entry, stance.quiet)?;
    shrink(&mut Run::new(config, &data, session)?, folder)
}

/// Runs the whole job in a folder that was entered; ends with `result.json` and `report.html`.
///
/// # Errors
/// Whatever stops a stage; a merge that is not exact; [`Error::Interrupted`] after saving.
pub fn shrink(run: &mut Run<'_>, folder: &RunFolder) -> Result<RunResult> {
    let mut job = Job::read(&run.session.job)?;
    let original = original(run, folder, &mut job)?;
    let (plan, start) = searched(run, folder, &mut job, &original)?;
    let mask = plan.keep.clone();
    let compared = selections_to_compare(run, &original, folder, &plan)?;
    let unmerged = stage(run, folder, &mut job, "finetune", "shrunk.safetensors", |run, keep| {
        let finetuning = Finetuning { name: "finetune", seed: 0, start: &start, original: &original, selection: &plan };
        run.finetune(finetuning, Some(keep))
    })?;
    let random = finetune_random(run, &mut job, &start, &original, &compared)?;

    let clock = Instant::now();
    let (merged, error) = merge_and_verify(run, &unmerged, &plan)?;
    let map = merged.map_from(&original.graph, &unmerged.graph);
    let (merged, segments) = (merged.model, merged.segments.len());
    write_model(&folder.path("merged.safetensors"), &merged, &run.data.info())?;
    write_onnx(&folder.path("merged.onnx"), &merged, &run.data.info(), &Dtype::F32.into())?;
    finish(&mut job, run, "merge", clock);

    let clock = Instant::now();
    let evaluations = [&original, &unmerged, &merged].map(|model| run.evaluate(model));
    let [a, b, c] = evaluations;
    let networks = Networks { original: (&original, a?), unmerged: (&unmerged, b?), merged: (&merged, c?) };
    finish(&mut job, run, "evaluate", clock);

    let learned = if random.is_empty() {
        Vec::new()
    } else {
        vec![MaskTrial { seed: run.config.seed, kept: mask.bits(), top1: networks.unmerged.1.top1 }]
    };
    let clock = Instant::now();
    let latency_share = latency_share(run, &original, folder, &plan)?;
    let (matched, bypassed) = (plan.matched, plan.bypassed_blocks(&original.graph));
    let facts = Facts {
        mask,
        bypassed,
        map: &map,
        latency_share,
        matched,
        segments,
        error,
        learned,
        random,
        stages: Vec::new(),
    };
    let mut result = summarise(run, &networks, facts)?;
    finish(&mut job, run, "measure", clock);
    result.stages = job.done;
    write_report(run, folder, &result, Change { before: &original, after: &merged, map: &map })?;
    Ok(result)
}

/// Runs a stage that ends in a model file, or reads the file if the stage is done. `work` writes it by what it is given.
pub(super) fn stage<'a>(
    run: &mut Run<'a>,
    folder: &RunFolder,
    job: &mut Job,
    name: &str,
    file: &str,
    work: impl FnOnce(&mut Run<'a>, &mut KeepModel<'_>) -> Result<Model>,
) -> Result<Model> {
    let path = folder.path(file);
    if job.has(name) {
        return Ok(read_model(&path)?.0);
    }
    let (clock, info) = (Instant::now(), run.data.info());
    let model = work(run, &mut |model| write_model(&path, model, &info))?;
    finish(job, run, name, clock);
    Ok(model)
}

/// Notes that a stage is done; the next checkpoint says so.
pub(super) fn finish(job: &mut Job, run: &mut Run<'_>, name: &str, clock: Instant) {
    job.done.push(StageTime { name: name.to_owned(), seconds: clock.elapsed().as_secs_f64() });
    run.session.job = json!(job);
}

fn original(run: &mut Run<'_>, folder: &RunFolder, job: &mut Job) -> Result<Model> {
    match &run.config.model {
        Some(path) => stage(run, folder, job, "load", "original.safetensors", |_, keep| {
            let model = read_model(path)?.0;
            keep(&model)?;
            Ok(model)
        }),
        None => stage(run, folder, job, "train", "original.safetensors", |run, keep| run.train_original(keep)),
    }
}

/// The plan, and the weights that finetuning starts from.
fn searched(run: &mut Run<'_>, folder: &RunFolder, job: &mut Job, original: &Model) -> Result<(Selection, Model)> {
    let keeps_weights = run.config.finetune.start == FinetuneStart::Searched;
    let (plan_file, weights_file) = (folder.path("plan.json"), folder.path("searched.safetensors"));
    if job.has("search") {
        let start = if keeps_weights { read_model(&weights_file)?.0 } else { original.clone() };
        return Ok((Selection::read(&plan_file)?, start));
    }
    let (clock, info) = (Instant::now(), run.data.info());
    let (plan, weights) = choose_blocks(run, original, folder, &mut |plan, weights| {
        plan.write(&plan_file)?;
        weights.filter(|_| keeps_weights).map_or(Ok(()), |weights| write_model(&weights_file, weights, &info))
    })?;
    finish(job, run, "search", clock);
    Ok((plan, weights.filter(|_| keeps_weights).unwrap_or_else(|| original.clone())))
}

/// Finetunes networks with random selections, each with a seed of its own.
fn finetune_random(
    run: &mut Run<'_>,
    job: &mut Job,
    start: &Model,
    original: &Model,
    selections: &[(u64, Selection)],
) -> Result<Vec<MaskTrial>> {
    for (index, (seed, selection)) in selections.iter().enumerate() {
        let name = format!("random {}", index + 1);
        if job.has(&name) {
            continue;
        }
        let clock = Instant::now();
        let finetuning = Finetuning { name: &name, seed: index as u64, start, original, selection };
        let model = run.finetune(finetuning, None)?;
        let top1 = run.evaluate(&model)?.top1;
        job.random.push(MaskTrial { seed: *seed, kept: selection.keep.bits(), top1 });
        finish(job, run, &name, clock);
    }
    Ok(job.random.clone())
}

/// Merges, and checks the merged network on noise and on test images.
///
/// # Errors
/// A merged convolution that is not its segment to the rounding of its weights.
pub(super) fn merge_and_verify(
    run: &mut Run<'_>,
    unmerged: &Model,
    selection: &Selection,
) -> Result<(Merged, MergeError)> {
    run.session.check_interrupt()?;
    let padding = selection.padding.unwrap_or(run.config.merge.padding);
    let merged = merge_selection(unmerged, selection, &MergeOptions { padding })?;
    run.session.check_interrupt()?;
    let noise = verify_random(unmerged, &merged, VERIFY_IMAGES, run.config.seed)?;
    run.session.check_interrupt()?;
    let n = VERIFY_IMAGES.min(run.data.test.len());
    let batch = Loader::eval(run.data.test.clone(), n)?.epoch(0, 0).next();
    let batch = batch.ok_or_else(|| Error::Data("there are no test images to check the merge on".into()))??;
    let images = verify(unmerged, &merged, &batch.images, n)?;
    let worse = noise.worse(images);
    worse.check(&merged)?;
    run.session.reporter.line(&format!(
        "merge: {} segments, exact to the rounding of their weights; error {:.1e} of the logits' scale",
        merged.segments.len(),
        worse.max_rel_error
    ));
    Ok((merged, worse))
}

fn write_report(run: &Run<'_>, folder: &RunFolder, result: &RunResult, change: Change<'_>) -> Result<()> {
    let path = folder.path("metrics.jsonl");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let metrics = MetricsLine::read_all(&text);
    let page = Page {
        result,
        metrics: &metrics,
        before: &change.before.graph,
        after: &change.after.graph,
        map: change.map,
        config: &run.config.to_toml()?,
    };
    page.write(folder.dir())?;
    // The last file: it marks the run as finished.
    folder.write(LAST, &format!("{:#}\n", json!(result)))
}
