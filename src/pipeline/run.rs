//! The stages as functions over one run: its data, its device and its session.

use std::path::Path;
use std::sync::Arc;

use super::doubts::Doubts;
use super::keeping::{KeepModel, Keeping};
use crate::config::Config;
use crate::data::{self, ClassMatch, Contents, Dataset, IMAGENET_SIZE, Loader, Normalisation, Preprocessing};
use crate::device::Device;
use crate::engine::{Engine, EngineOptions, Fusion};
use crate::graph::Graph;
use crate::io::{DataInfo, ModelInfo};
use crate::model::Model;
use crate::networks;
use crate::shape::Shape;
use crate::shrink::providers::check_active_blocks;
use crate::shrink::surgery::{Linearise, check_linearise, drop_linear_activations, prepare_finetune};
use crate::shrink::{
    Budget, Finetune, LayerMethod, Mask, NestedMask, Rule, ScoreConfig, Search, SearchMethod, Selection, Widths,
    nested, relative_savings,
};
use crate::train::{
    Distillation, Evaluation, Hook, Interrupt, NoHook, Session, Stage, TrainConfig, evaluate_until, train,
};
use crate::{Error, Result};

/// Shares of kept blocks for which a search also reports the mask (DepthShrinker's list).
const NESTED_SHARES: [f64; 7] = [0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1];

/// Training and test images.
#[derive(Debug, Clone)]
pub struct Datasets {
    /// Training images.
    pub train: Arc<Dataset>,
    /// Test images.
    pub test: Arc<Dataset>,
    /// What the classes of the images and of the given model leave to doubt.
    doubts: Doubts,
}

impl Datasets {
    /// Opens the data. Images are made as the file of a model that is given says, or as the network that is named expects
    /// them; images that have a shape already are only normalised so, or else by the training images. Classes have the
    /// order and the names that the model knows them by ([`ClassMatch`]).
    ///
    /// # Errors
    /// Data that cannot be found or used, or that does not fit the model.
    pub fn open(config: &Config, model: Option<(&Model, &ModelInfo)>) -> Result<Self> {
        let data = data::open(&config.data.source())?;
        let (train, _) = fitted(data.train, config.data.train_limit, config, model)?;
        let (test, doubts) = fitted(data.test, config.data.test_limit, config, model)?;
        let doubts = doubts.and(Doubts::of_images(Some(&train), &test));
        let data = Self { train: Arc::new(train), test: Arc::new(test), doubts };
        // No model could be written with such names, which is better told before it is trained.
        data.info().data.iter().try_for_each(DataInfo::check_names)?;
        Ok(data)
    }

    /// Opens the test images alone, made for a model, and says what an evaluation on them leaves to doubt; training images
    /// need not be there.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_test(config: &Config, model: (&Model, &ModelInfo)) -> Result<(Arc<Dataset>, Doubts)> {
        let test = data::open_test(&config.data.source())?;
        let (test, doubts) = fitted(test, config.data.test_limit, config, Some(model))?;
        let doubts = doubts.and(Doubts::of_images(None, &test));
        Ok((Arc::new(test), doubts))
    }

    /// What a run of some stages, each with its name, leaves to doubt, given the network that they train.
    ///
    /// # Errors
    /// A malformed graph.
    pub fn doubts<'a>(
        &self,
        stages: impl IntoIterator<Item = (&'a str, &'a TrainConfig)>,
        graph: &Graph,
    ) -> Result<Doubts> {
        let mut doubts = self.doubts.clone();
        for (name, stage) in stages {
            doubts = doubts.and(Doubts::of_batch(name, stage, graph)?);
        }
        Ok(doubts)
    }

    /// Shape of the images.
    pub fn shape(&self) -> Shape {
        self.train.shape().into()
    }

    /// What the images are, to be compared when a run goes on.
    ///
    /// # Errors
    /// An image that cannot be read.
    pub fn contents(&self) -> Result<[Contents; 2]> {
        Ok([Contents::of(&self.train)?, Contents::of(&self.test)?])
    }

    /// What model files say about their data.
    pub fn info(&self) -> ModelInfo {
        ModelInfo { data: Some(DataInfo::from(&*self.train)) }
    }
}

/// The first images of a set, made as [`Datasets::open`] says, and what their classes leave to doubt.
fn fitted(
    mut set: Dataset,
    limit: Option<usize>,
    config: &Config,
    model: Option<(&Model, &ModelInfo)>,
) -> Result<(Dataset, Doubts)> {
    if let Some(n) = limit {
        set = set.take(n)?;
    }
    if set.resize().is_some() {
        set = set.with_preprocessing(&preprocessing(&config.network.name, config.data.image_size, model))?;
    }
    let Some((model, info)) = model else { return Ok((set, Doubts::default())) };
    model.graph.check_classifier()?;
    let (shape, graph) = (set.shape().into(), &model.graph);
    if (shape, set.classes()) != (graph.input_shape(), graph.classes()) {
        // Weights that another project trained on other classes are a start for these.
        let head = if shape == graph.input_shape() { ", or import weights with --classes" } else { "" };
        return Err(Error::Data(format!(
            "{} has {shape} images of {} classes, {} takes {} and {} classes; give other --data or another model{head}",
            set.name(),
            set.classes(),
            graph.name,
            graph.input_shape(),
            graph.classes()
        )));
    }
    let Some(own) = &info.data else { return Ok((set, Doubts::default())) };
    let set = set.with_normalisation(Normalisation { mean: own.mean.clone(), std: own.std.clone() })?;
    let matched = ClassMatch::new(set.class_names(), &own.classes);
    let doubts = Doubts::of_names(set.name(), set.class_names(), &own.classes, &matched);
    Ok((set.with_classes(matched)?, doubts))
}

/// How pictures of a folder are made: as the model's file says, as published for the network, or as is usual.
fn preprocessing(network: &str, image_size: Option<usize>, model: Option<(&Model, &ModelInfo)>) -> Preprocessing {
    let own = model.map(|(model, info)| {
        let input = model.graph.input_shape();
        let usual = || Preprocessing::imagenet(input.h.min(input.w));
        match &info.data {
            Some(data) if data.resize.is_some() => data.preprocessing(),
            Some(data) => Preprocessing { resize: usual().resize, ..data.preprocessing() },
            None => usual(),
        }
    });
    let published = || match image_size {
        Some(size) => networks::preprocessing_at(network, size),
        None => networks::preprocessing(network),
    };
    let known = own.or_else(published).unwrap_or_else(|| Preprocessing::imagenet(IMAGENET_SIZE));
    match image_size {
        Some(size) if [known.shape.height, known.shape.width] != [size; 2] => known.at(size),
        _ => known,
    }
}

/// What is finetuned.
#[derive(Debug, Clone, Copy)]
pub struct Finetuning<'a> {
    /// The stage's name.
    pub name: &'a str,
    /// Added to the seeds of the settings.
    pub seed: u64,
    /// The network to start from.
    pub start: &'a Model,
    /// The network that teaches.
    pub original: &'a Model,
    /// Which activations are freed.
    pub selection: &'a Selection,
}

/// What a search that trains scores is to find.
#[derive(Clone, Copy)]
pub struct Goal<'a> {
    /// What each block takes as it is and merged, in any unit.
    pub times: &'a [(f64, f64)],
    /// How many blocks are kept while it searches.
    pub budget: Budget,
    /// What its scores mean in the end.
    pub mask: &'a dyn Fn(&Search) -> Result<Mask>,
}

/// One run.
#[derive(Debug)]
pub struct Run<'a> {
    /// Its settings.
    pub config: &'a Config,
    /// Its images.
    pub data: &'a Datasets,
    /// Where it computes.
    pub device: Device,
    /// Where its records and checkpoints go.
    pub session: Session,
}

impl<'a> Run<'a> {
    /// A run.
    ///
    /// # Errors
    /// A device that is not there.
    pub fn new(config: &'a Config, data: &'a Datasets, session: Session) -> Result<Self> {
        Ok(Self { config, data, device: config.device()?, session })
    }

    /// Trains the configured network from fresh weights; `keep` gets it before anything else can fail.
    ///
    /// # Errors
    /// As [`train`], or of `keep`.
    pub fn train_original(&mut self, keep: &mut KeepModel<'_>) -> Result<Model> {
        let model = Model::initialise(configured_graph(self.config, self.data)?, self.config.seed)?;
        let mut hook = Keeping { hook: &mut NoHook, keep: &mut |_, model| keep(model) };
        self.stage("train", model, &self.config.train, &mut hook, None)
    }

    /// Learns which blocks keep their activations; also returns what ranks them and the weights that were trained along. `keep`
    /// gets selection and weights before anything else can fail.
    ///
    /// # Errors
    /// An impossible budget, or as [`train`], or of `keep`.
    pub fn search(
        &mut self,
        original: &Model,
        goal: Goal<'_>,
        keep: &mut dyn FnMut(&Selection, &Model) -> Result<()>,
    ) -> Result<(Selection, Vec<f32>, Model)> {
        let config = &self.config.search;
        let savings = relative_savings(goal.times);
        let rule = self.config.score_rule();
        let scores = match &rule {
            Rule::Ours(_) | Rule::Slopes(..) => without_losses(&config.scores, goal.budget, &savings)?,
            // Published is a choice among all blocks.
            Rule::Published(..) => config.scores.clone(),
        };
        let candidates = scores.candidates(savings.len())?;
        let mut search =
            Search::new(&original.graph, rule, candidates, goal.budget, savings, self.config.search_seed())?;
        let mut keep = |search: &Search, model: &Model| keep(&found(search, &goal)?, model);
        let mut hook = Keeping { hook: &mut search, keep: &mut keep };
        let searched = self.stage("search", original.clone(), &config.train, &mut hook, None)?;
        for record in search.records("search") {
            self.session.metrics.append(&record)?;
        }
        let found = found(&search, &goal)?;
        let mask = &found.keep;
        self.session.reporter.line(&format!(
            "search: {} of {} blocks keep their activations: {mask}",
            mask.count(),
            mask.blocks()
        ));
        Ok((found, search.ranked(), searched))
    }

    /// Finetunes a network without the activations that are freed; returns it without them, not merged yet. `keep`, if
    /// given, gets it before anything else can fail.
    ///
    /// # Errors
    /// A block that could not be merged afterwards, or as [`train`], or of `keep`.
    pub fn finetune(&mut self, finetuning: Finetuning<'_>, keep: Option<&mut KeepModel<'_>>) -> Result<Model> {
        let Finetuning { name, seed, start, original, selection } = finetuning;
        let config = &self.config.finetune;
        let (mask, blocks) = (&selection.keep, start.graph.blocks.len());
        mask.check(&start.graph)?;
        let surgery = self.config.linearise();
        let surgery = Linearise { padding: selection.padding.unwrap_or(surgery.padding), ..surgery };
        let prepared = prepare_finetune(start, selection, &surgery)?;
        let shapes = [prepared.graph.shapes()?, original.graph.shapes()?];
        let is_there = |b: &usize| {
            let bypassed = selection.bypass || selection.bypassed.contains(&start.graph.blocks[*b].name);
            !bypassed && selection.channels.is_none()
        };
        let freed = mask.removed().into_iter().filter(|&b| b < blocks).filter(is_there);
        let outputs = |b: usize| [&prepared, original].map(|model| model.graph.blocks[b].output());
        // A block that ends within a segment may give more pixels, where padding has moved to the front.
        let pairs = freed.map(outputs).filter(|&[own, theirs]| shapes[0][own] == shapes[1][theirs]);
        let pairs = pairs.map(|[own, theirs]| (own, theirs));
        let distillation = config.distill.is_on().then(|| Distillation {
            teacher: original.clone(),
            alpha: config.distill.alpha,
            temperature: config.distill.temperature,
            feature_weight: config.distill.feature_weight,
            feature_pairs: pairs.collect(),
        });
        let train = TrainConfig { seed: config.train.seed.wrapping_add(seed), ..config.train.clone() };
        let mut hook = Finetune::new(mask.over(start.graph.sites()), config.removal);
        let removed: Vec<bool> = mask.kept().iter().map(|kept| !kept).collect();
        let finetuned = match keep {
            None => self.stage(name, prepared, &train, &mut hook, distillation.as_ref())?,
            Some(keep) => {
                let mut keep = |_: &Finetune, model: &Model| keep(&drop_linear_activations(model, &removed)?);
                let mut hook = Keeping { hook: &mut hook, keep: &mut keep };
                self.stage(name, prepared, &train, &mut hook, distillation.as_ref())?
            }
        };
        drop_linear_activations(&finetuned, &removed)
    }

    /// Accuracy on the test images.
    ///
    /// # Errors
    /// Images that do not fit the network, logits that are not finite, or [`Error::Interrupted`].
    pub fn evaluate(&self, model: &Model) -> Result<Evaluation> {
        match evaluate_model(&self.device, model, &self.test_loader()?, &self.session.interrupt) {
            Err(Error::Interrupted(_)) => Err(self.session.interrupted()),
            other => other,
        }
    }

    fn test_loader(&self) -> Result<Loader> {
        Loader::eval(self.data.test.clone(), self.config.evaluate.batch(self.data.shape()))
    }

    fn stage(
        &mut self,
        name: &str,
        model: Model,
        config: &TrainConfig,
        hook: &mut dyn Hook,
        distillation: Option<&Distillation>,
    ) -> Result<Model> {
        let config = TrainConfig { seed: config.seed.wrapping_add(self.config.seed), ..config.clone() };
        let train_set = Loader::train(self.data.train.clone(), config.batch, config.augment.clone(), config.seed)?;
        let test_set = self.test_loader()?;
        let stage = Stage {
            name,
            devices: std::slice::from_ref(&self.device),
            model,
            train: &train_set,
            test: &test_set,
            config: &config,
            hook,
            distillation,
        };
        train(stage, &mut self.session)
    }
}

/// The configured network for the images and classes of the data.
///
/// # Errors
/// An unknown network or options that do not fit it.
pub fn configured_graph(config: &Config, data: &Datasets) -> Result<Graph> {
    config.network.graph(data.shape(), data.train.classes())
}

/// Refuses stages whose batches and augmentations do not fit the data, before a run's folder is touched.
///
/// # Errors
/// The setting that does not fit.
pub fn check_batches<'a>(stages: impl IntoIterator<Item = &'a TrainConfig>, data: &Datasets) -> Result<()> {
    for train in stages {
        Loader::train(data.train.clone(), train.batch, train.augment.clone(), train.seed)?;
    }
    Ok(())
}

/// Refuses a search that cannot be done in a network, before a run's folder is touched.
///
/// # Errors
/// An impossible budget, or a network with blocks that have no activations any more.
pub fn check_search(config: &Config, graph: &Graph) -> Result<()> {
    let blocks = graph.blocks.len();
    if config.search.match_latency.is_some() && !config.budget.is_time() {
        return Err(Error::Config(format!(
            "--match-latency needs a budget that is a time, not {}; give --latency-fraction or --budget-ms",
            config.budget
        )));
    }
    config.check_start()?;
    if let Some(path) = &config.search.plan {
        return planned(path, config.method(), graph).map(drop);
    }
    let method = config.method();
    if method.needs_time() && !config.budget.is_time() {
        return Err(Error::Config(format!(
            "{method} needs a budget that is a time, not {}; give --latency-fraction or --budget-ms",
            config.budget
        )));
    }
    if method.narrows() {
        return Widths::new(graph).map(drop);
    }
    if let Some(method) = method.layers() {
        return LayerMethod::check_network(method, graph);
    }
    let candidates = candidates(config, graph)?;
    // Whether a time can be kept is told by the table.
    let count = if config.budget.is_time() { Budget::Remove(1) } else { config.budget };
    if !method.trains() {
        check_active_blocks(graph)?;
        return count.kept(&candidates).map(drop);
    }
    Search::new(graph, config.score_rule(), candidates, count, vec![0.0; blocks], config.search_seed()).map(drop)
}

/// A selection that was made before.
///
/// # Errors
/// A file that cannot be read, a selection for another network, or of another method, for which the result would stand.
pub(super) fn planned(path: &Path, method: SearchMethod, graph: &Graph) -> Result<Selection> {
    let selection = Selection::read(path)?;
    selection.keep.check(graph)?;
    match selection.method {
        Some(chooser) if chooser != method => Err(Error::file(
            path,
            format!("was chosen by {chooser}, not by {method}; give search.method = \"{chooser}\""),
        )),
        _ => Ok(selection),
    }
}

/// One flag per block: whether the method of the settings may free it. One that bypasses blocks frees those alone whose input is
/// added to their output.
///
/// # Errors
/// An excluded index that is no block, or a malformed graph.
pub(super) fn candidates(config: &Config, graph: &Graph) -> Result<Vec<bool>> {
    let mut candidates = config.search.scores.candidates(graph.blocks.len())?;
    if config.method().bypasses() {
        let positions = graph.positions()?;
        for block in positions.blocks().iter().filter(|block| !block.has_residual) {
            candidates[block.block.index()] = false;
        }
    }
    Ok(candidates)
}

/// Refuses a network of which a block that may be freed could not be merged, before anything is trained.
///
/// # Errors
/// Names the block, and what to do: another padding, or to exclude it.
pub fn check_mergeable(config: &Config, graph: &Graph) -> Result<()> {
    let method = config.method();
    // Of single layers, what cannot be merged is none of the segments that are selected among.
    if method.bypasses() || method.narrows() || method.layers().is_some() {
        return Ok(());
    }
    let candidates = config.search.scores.candidates(graph.blocks.len())?;
    let kept: Vec<bool> = candidates.iter().map(|candidate| !candidate).collect();
    check_linearise(graph, &kept, &config.linearise())
}

/// Accuracy of a model on test images.
///
/// # Errors
/// Images that do not fit the network, logits that are not finite, a failing device, or [`Error::Interrupted`].
pub fn evaluate_model(device: &Device, model: &Model, test: &Loader, interrupt: &Interrupt) -> Result<Evaluation> {
    let options = EngineOptions { batch: test.batch_size(), fusion: Fusion::OnLoad, training: false, taps: Vec::new() };
    evaluate_until(&mut Engine::new(device, model, &options)?, test, interrupt)
}

/// What a search has found so far.
fn found(search: &Search, goal: &Goal<'_>) -> Result<Selection> {
    let nested = nested_masks(&search.ranked(), search.candidates())?;
    let mask = search.beyond_threshold((goal.mask)(search)?);
    Ok(Selection { scores: search.scores(), nested, ..mask.into() })
}

/// The masks of other sizes that a ranking gives.
pub(super) fn nested_masks(scores: &[f32], candidates: &[bool]) -> Result<Vec<NestedMask>> {
    let possible = NESTED_SHARES.iter().map(|&share| Budget::KeepFraction(share));
    let possible: Vec<Budget> = possible.filter(|b| b.kept(candidates).is_ok()).collect();
    let masks = nested(scores, candidates, &possible)?;
    Ok(masks.into_iter().map(|kept| NestedMask { keep: kept.count(), kept }).collect())
}

/// Leaves blocks out of the choice whose merge would cost time by the cost model, such as a depthwise-separable block
/// that becomes a dense 3×3, as far as the budget can do without them: freeing one would lose accuracy and speed.
pub(super) fn without_losses(scores: &ScoreConfig, budget: Budget, savings: &[f32]) -> Result<ScoreConfig> {
    let mut fewer = scores.clone();
    fewer.exclude.extend((0..savings.len()).filter(|block| savings[*block] < 0.0 && !scores.exclude.contains(block)));
    let candidates = fewer.candidates(savings.len())?;
    Ok(if budget.kept(&candidates).is_ok() { fewer } else { scores.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_whose_merge_costs_time_are_spared_where_the_budget_allows() {
        let (scores, savings) = (ScoreConfig::default(), [-0.5, 0.8, 0.1, -0.1]);
        assert_eq!(without_losses(&scores, Budget::Keep(2), &savings).unwrap().exclude, [0, 3]);
        assert!(without_losses(&scores, Budget::Keep(0), &savings).unwrap().exclude.is_empty());
        let own = ScoreConfig { exclude: vec![3], ..scores };
        assert_eq!(without_losses(&own, Budget::Keep(2), &savings).unwrap().exclude, [3, 0]);
    }
}
