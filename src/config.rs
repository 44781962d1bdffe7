//! The configuration of a run: one TOML file with every setting, its defaults, and the checks that need no data.
//!
//! The defaults are the quick start: the embedded cut of Fashion-MNIST, a MobileNetV2 of width 0.5, minutes on two
//! cores. A file needs to name only what it changes; the complete configuration is written beside every run.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::data::{Augment, DataSource};
use crate::device::Device;
use crate::dtype::Dtype;
use crate::graph::{Graph, SegmentEnds};
use crate::measure::LatencySource;
use crate::networks::{self, NetworkOptions};
use crate::shape::Shape;
use crate::shrink::padding::PaddingMode;
use crate::shrink::surgery::Linearise;
use crate::shrink::{
    Budget, ChannelList, ChannelOrder, DistillConfig, EvolutionConfig, ExpandConfig, Layers, Mask, PublishedConfig,
    Removal, Rule, ScoreConfig, SearchMethod, SegmentConfig, Selection, SensitivityConfig, SlopeConfig, SlopeRule,
};
use crate::terminal::start;
use crate::train::TrainConfig;
use crate::{Error, Result, files};

/// Tables of which a file's version replaces the default whole: their keys exclude each other, or, for `network`, what is
/// not given is to be the named network's own.
const WHOLE: [&str; 4] = ["budget", "network", "removal", "optimizer"];
/// Images with a shorter side than this get a stem of stride 1: stride 32 altogether would leave nothing of them.
const SMALL_IMAGE: usize = 64;
/// Pixels of the images of one pass of an evaluation, if no batch is given: 64 images of ImageNet's size. The engine that
/// evaluates lies beside the one that trains, and of MobileNetV2-1.4 a hundred images more would be gigabytes.
const EVALUATION_PIXELS: usize = 64 * 224 * 224;
/// Images of one pass at most, if no batch is given: more of small ones are not faster.
const EVALUATION_BATCH: usize = 250;
/// Images of one pass at most.
const MAX_BATCH: usize = 1 << 16;
/// Characters of a faulty line that a message shows, and of what is said of it.
const MAX_SOURCE: usize = 120;
const MAX_PROBLEM: usize = 800;

/// Everything that decides what a run computes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Seed of weights, data order, augmentation and search.
    pub seed: u64,
    /// Threads; 0 takes all cores. Results do not depend on it.
    pub threads: usize,
    /// `auto`, `cpu`, `cuda[:N]` or `emulator`.
    pub device: String,
    /// `f32`.
    pub precision: Dtype,
    /// A trained model file to start from instead of training one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,
    /// Random selections of the same size or time to finetune beside the selected one.
    pub compare_random: usize,
    /// How many blocks keep their activations, or what the merged network may take.
    pub budget: Budget,
    /// What the times of blocks are priced by.
    pub latency: LatencySource,
    /// The network.
    pub network: NetworkConfig,
    /// The data.
    pub data: DataConfig,
    /// Training of the original network.
    pub train: TrainConfig,
    /// The mask search.
    pub search: SearchConfig,
    /// Finetuning without the freed activations.
    pub finetune: FinetuneConfig,
    /// The merge.
    pub merge: MergeConfig,
    /// Evaluation on the test images.
    pub evaluate: EvaluateConfig,
    /// The measurement at the end.
    pub measure: MeasureConfig,
    /// What `expand` expands; left out of the file of a run that expands nothing.
    #[serde(skip_serializing_if = "is_default")]
    pub expand: ExpandConfig,
    /// What `compare` compares; left out of the file of a run, which compares nothing.
    #[serde(skip_serializing_if = "CompareConfig::is_default")]
    pub compare: CompareConfig,
}

/// Methods × budgets × seeds, for `compare`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CompareConfig {
    /// How blocks are chosen.
    pub methods: Vec<SearchMethod>,
    /// What the merged networks may take, or how many blocks they keep.
    pub budgets: Vec<Budget>,
    /// Seeds of choice and finetuning; each method has each of them.
    pub seeds: Vec<u64>,
    /// Masks of the method `random`, the same ones for every seed of finetuning.
    pub random_masks: u64,
    /// Folder of a comparison whose jobs have the same names: what they chose is taken, with the latency tables that they chose by,
    /// so that the same choices can be finetuned otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selections: Option<PathBuf>,
    /// Steps of finetuning after which accuracy and loss are taken, beside those after its epochs; 0 is before the first.
    pub recovery_steps: Vec<u64>,
}

impl Default for CompareConfig {
    fn default() -> Self {
        Self {
            // Those of single layers train a copy for each of hundreds of segments.
            methods: SearchMethod::ALL.into_iter().filter(|method| method.layers().is_none()).collect(),
            budgets: vec![Budget::LatencyFraction(0.8)],
            seeds: vec![0, 1, 2],
            random_masks: 8,
            selections: None,
            recovery_steps: vec![0, 30, 100, 300, 1000],
        }
    }
}

impl CompareConfig {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Refuses lists that name nothing or one thing twice, and values out of range.
    ///
    /// # Errors
    /// Names the key and what to do.
    pub fn check(&self) -> Result<()> {
        let refuse = |problem: String| Err(Error::Config(format!("compare.{problem}")));
        let lists = [
            ("methods", self.methods.iter().map(|method| method.to_string()).collect::<Vec<_>>()),
            ("budgets", self.budgets.iter().map(Budget::to_string).collect()),
            ("seeds", self.seeds.iter().map(u64::to_string).collect()),
            ("recovery_steps", self.recovery_steps.iter().map(u64::to_string).collect()),
        ];
        for (key, values) in lists {
            if values.is_empty() && key != "recovery_steps" {
                return refuse(format!("{key} is empty; name one or more"));
            }
            let twice = values.iter().enumerate().find(|(index, value)| values[..*index].contains(value));
            if let Some((_, value)) = twice {
                return refuse(format!("{key} has {value} twice; name each once"));
            }
        }
        if let Some(seed) = self.seeds.iter().find(|seed| i64::try_from(**seed).is_err()) {
            return refuse(format!("seeds has {seed}; give numbers below 2^63"));
        }
        if self.methods.contains(&SearchMethod::Random) && !(1..=1 << 20).contains(&self.random_masks) {
            return refuse(format!("random_masks = {}; give 1 to {}", self.random_masks, 1 << 20));
        }
        self.budgets.iter().try_for_each(|budget| budget.check_time())
    }
}

/// Which network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// Name, such as `mobilenetv2-0.5`.
    pub name: String,
    /// Stride of the stem; if not given the network's own, 1 for images below 64 pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_stride: Option<usize>,
    /// Stride of each stage's first block; the network's own if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage_strides: Option<Vec<usize>>,
    /// Channels of the last convolution; the network's own if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_channels: Option<usize>,
}

/// Which data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// `embedded`, `fashion-mnist`, `mnist`, `cifar10`, `cifar100`, `imagenet`, a folder of pictures, `signals:` and a
    /// folder of CSV files, or `parquet:` and a folder of Parquet shards (with the feature `parquet`).
    pub name: String,
    /// Where the set is; known places are searched if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// Side that pictures of a folder are brought to, in pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,
    /// Training images at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_limit: Option<usize>,
    /// Test images at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub test_limit: Option<usize>,
}

/// The mask search.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SearchConfig {
    /// How blocks are chosen; by the budget if not given ([`Config::method`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<SearchMethod>,
    /// The plan.json of a choice by the same method, which is taken instead of choosing again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<PathBuf>,
    /// Seed of the choice alone: of random masks, of the images that networks are judged on, and of the masks that a search
    /// explores; that of the run if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Moves the budget, a time, until the merged network takes the asked share of the original's time by the clock, to within
    /// this share of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub match_latency: Option<f64>,
    /// By what channels stay, where a method takes some away: `bn-gamma` or `l1`.
    #[serde(skip_serializing_if = "is_default")]
    pub channel_order: ChannelOrder,
    /// How scores are learned, and which blocks are never freed.
    pub scores: ScoreConfig,
    /// How scores are learned as DepthShrinker published it.
    pub published: PublishedConfig,
    /// How slopes of activations are learned.
    pub slopes: SlopeConfig,
    /// How masks are searched that one set of weights was trained for, and lists of channels.
    pub evolution: EvolutionConfig,
    /// How networks are judged without training.
    pub sensitivity: SensitivityConfig,
    /// How importances of segments decide.
    pub segments: SegmentConfig,
    /// How the weights are trained along with the scores.
    pub train: TrainConfig,
}

/// Finetuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FinetuneConfig {
    /// Which blocks keep their activations, one 0 or 1 per block; for `finetune` alone, as `shrink` searches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<Mask>,
    /// Segments to merge that are more than blocks, by their first and last node; for `finetune` alone, from its plan.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub segments: Vec<SegmentEnds>,
    /// What happens to single layers; for `finetune` alone, from its plan.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
    /// Bypasses freed blocks, so that only their shortcuts are left; for `finetune` alone, from its plan.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub bypass: bool,
    /// Names of freed blocks that are bypassed where the others are merged; for `finetune` alone, from its plan.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bypassed: Vec<String>,
    /// How many channels stay, where some go; for `finetune` alone, from its plan.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channels: Option<ChannelList>,
    /// The model file that teaches; for `finetune` alone, where it is the model itself if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<PathBuf>,
    /// Where the weights start.
    pub start: FinetuneStart,
    /// Puts a ReLU6 behind every freed inverted-residual block.
    pub final_activation: bool,
    /// How the activations go.
    pub removal: Removal,
    /// What the original network teaches.
    pub distill: DistillConfig,
    /// How the weights are trained.
    pub train: TrainConfig,
}

/// The weights that finetuning starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinetuneStart {
    /// The original network's, as DepthShrinker does.
    Original,
    /// Those that the search ended with: a few epochs ahead, but shaped by all masks it tried.
    Searched,
}

/// The merge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MergeConfig {
    /// `reorder` (padding moves to the front before finetuning) or `border-bias` (a bias per position).
    pub padding: PaddingMode,
}

/// Evaluation on the test images, between epochs and at the end.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluateConfig {
    /// Images per pass, which cost memory and change logits by rounding alone; if not given 250, or fewer where they have
    /// more than 64 · 224² pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
}

/// The measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MeasureConfig {
    /// Images per pass.
    pub batch: usize,
    /// Seconds for all measurements together.
    pub seconds: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            seed: 0,
            threads: 0,
            device: "auto".into(),
            precision: Dtype::F32,
            model: None,
            compare_random: 0,
            budget: Budget::KeepFraction(0.5),
            latency: LatencySource::default(),
            network: quick_start::network(),
            data: DataConfig::default(),
            train: quick_start::train(),
            search: SearchConfig::default(),
            finetune: FinetuneConfig::default(),
            merge: MergeConfig::default(),
            evaluate: EvaluateConfig::default(),
            measure: MeasureConfig::default(),
            expand: ExpandConfig::default(),
            compare: CompareConfig::default(),
        }
    }
}

/// The schedules of the quick start, in one place: together under four minutes on two cores.
mod quick_start {
    use super::{Augment, NetworkConfig, TrainConfig};

    pub fn network() -> NetworkConfig {
        NetworkConfig { input_stride: Some(1), head_channels: Some(256), ..NetworkConfig::default() }
    }

    pub fn train() -> TrainConfig {
        TrainConfig { epochs: 6, batch: 64, lr: 0.1, augment: augment(), ..TrainConfig::default() }
    }

    pub fn search() -> TrainConfig {
        TrainConfig { epochs: 2, lr: 0.02, ..train() }
    }

    pub fn finetune() -> TrainConfig {
        TrainConfig { epochs: 4, lr: 0.05, ..train() }
    }

    fn augment() -> Augment {
        Augment { flip: true, ..Augment::none() }
    }
}

impl Default for NetworkConfig {
    /// MobileNetV2 of width 0.5 as published.
    fn default() -> Self {
        Self { name: "mobilenetv2-0.5".into(), input_stride: None, stage_strides: None, head_channels: None }
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        let DataSource { name, dir, image_size } = DataSource::default();
        Self { name, dir, image_size, train_limit: None, test_limit: None }
    }
}

impl Default for SearchConfig {
    fn default() -> Self {
        Self {
            method: None,
            plan: None,
            seed: None,
            match_latency: None,
            channel_order: ChannelOrder::default(),
            scores: ScoreConfig::default(),
            published: PublishedConfig::default(),
            slopes: SlopeConfig::default(),
            evolution: EvolutionConfig::default(),
            sensitivity: SensitivityConfig::default(),
            segments: SegmentConfig::default(),
            train: quick_start::search(),
        }
    }
}

impl FinetuneConfig {
    /// Takes over what a plan frees.
    pub fn select(&mut self, selection: Selection) {
        (self.kept, self.segments, self.bypass) = (Some(selection.keep), selection.segments, selection.bypass);
        (self.bypassed, self.channels) = (selection.bypassed, selection.channels);
        self.layers = selection.layers;
    }

    /// What `finetune` frees, by a mask.
    pub fn selection(&self, mask: &Mask) -> Selection {
        let (segments, bypassed) = (self.segments.clone(), self.bypassed.clone());
        let (channels, layers) = (self.channels.clone(), self.layers.clone());
        Selection { segments, bypass: self.bypass, bypassed, channels, layers, ..mask.clone().into() }
    }
}

impl Default for FinetuneConfig {
    fn default() -> Self {
        Self {
            kept: None,
            segments: Vec::new(),
            layers: None,
            bypass: false,
            bypassed: Vec::new(),
            channels: None,
            teacher: None,
            start: FinetuneStart::Original,
            final_activation: true,
            removal: Removal::AtOnce,
            distill: DistillConfig::default(),
            train: quick_start::finetune(),
        }
    }
}

impl Default for MergeConfig {
    fn default() -> Self {
        Self { padding: PaddingMode::BorderBias }
    }
}

impl Default for MeasureConfig {
    fn default() -> Self {
        Self { batch: 128, seconds: 12.0 }
    }
}

impl NetworkConfig {
    /// The graph for images of a shape and a number of classes.
    ///
    /// # Errors
    /// An unknown network or options that do not fit it.
    pub fn graph(&self, input: Shape, classes: usize) -> Result<Graph> {
        // Signals are images of one row.
        let side = if input.h == 1 { input.w } else { input.h.min(input.w) };
        let small = (side < SMALL_IMAGE).then_some(1);
        let options = NetworkOptions {
            input_stride: self.input_stride.or(small),
            stage_strides: self.stage_strides.clone(),
            head_channels: self.head_channels,
            ..NetworkOptions::new(input, classes)
        };
        networks::build(&self.name, &options)
    }
}

impl EvaluateConfig {
    /// Images per pass, for images of a shape.
    pub fn batch(&self, input: Shape) -> usize {
        self.batch.unwrap_or_else(|| (EVALUATION_PIXELS / input.pixels().max(1)).clamp(1, EVALUATION_BATCH))
    }
}

impl DataConfig {
    /// Where to look for the data.
    pub fn source(&self) -> DataSource {
        DataSource { name: self.name.clone(), dir: self.dir.clone(), image_size: self.image_size }
    }
}

impl Config {
    /// Reads a file over the defaults.
    ///
    /// # Errors
    /// A file that cannot be read, is no TOML, or has an unknown key or a value of the wrong kind (named with its line).
    pub fn read(path: &Path) -> Result<Self> {
        let text = files::read_text(path)?;
        Self::parse(&text).map_err(|e| match e {
            Error::Config(problem) => Error::Config(format!("{}: {problem}", path.display())),
            other => other,
        })
    }

    /// Reads TOML text over the defaults.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(text: &str) -> Result<Self> {
        let at = |e: &toml::de::Error| {
            let line = e.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            let source = line.and_then(|line| text.lines().nth(line - 1)).unwrap_or_default().trim();
            let place = line.map_or_else(String::new, |line| format!("line {line}, `{}`: ", start(source, MAX_SOURCE)));
            Error::Config(format!("{place}{}", start(&e.message().replace('\n', " "), MAX_PROBLEM)))
        };
        // The file alone is read first, so that faults are told with its own lines.
        toml::from_str::<Self>(text).map_err(|e| at(&e))?;
        let own: toml::Table = toml::from_str(text).map_err(|e| at(&e))?;
        let mut all = toml::Table::try_from(Self::default()).map_err(|e| Error::Config(e.to_string()))?;
        overlay(&mut all, own);
        all.try_into().map_err(|e: toml::de::Error| at(&e))
    }

    /// The complete configuration as TOML; [`parse`](Self::parse) of it gives the same configuration.
    ///
    /// # Errors
    /// A number that TOML cannot hold, such as a seed above 2⁶³ − 1.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::Config(format!("cannot be written as TOML: {e}")))
    }

    /// Refuses values out of range, before any work is done.
    ///
    /// # Errors
    /// Names the key, what was expected and what came.
    pub fn check(&self) -> Result<()> {
        Device::check_name(&self.device, self.precision)?;
        if i64::try_from(self.seed).is_err() {
            return Err(Error::Config(format!("seed = {}; give a number below 2^63", self.seed)));
        }
        if self.threads > 4096 {
            return Err(Error::Config(format!("threads = {}; give 0 (all cores) to 4096", self.threads)));
        }
        for (key, batch) in [("measure.batch", Some(self.measure.batch)), ("evaluate.batch", self.evaluate.batch)] {
            if let Some(batch) = batch.filter(|batch| !(1..=MAX_BATCH).contains(batch)) {
                return Err(Error::Config(format!("{key} = {batch}; give 1 to {MAX_BATCH}")));
            }
        }
        if !(self.measure.seconds >= 0.0 && self.measure.seconds <= 86_400.0) {
            return Err(Error::Config(format!("measure.seconds = {}; give 0 to 86400", self.measure.seconds)));
        }
        for (name, train) in
            [("train", &self.train), ("search.train", &self.search.train), ("finetune.train", &self.finetune.train)]
        {
            train.check().map_err(|e| within(name, e))?;
        }
        self.search.scores.check()?;
        self.search.published.check()?;
        self.search.slopes.check()?;
        self.search.evolution.check()?;
        if self.search.slopes.threshold.is_some() && self.search.match_latency.is_some() {
            let problem =
                "search.slopes.threshold frees blocks whatever the budget, and --match-latency is about the budget";
            return Err(Error::Config(format!("{problem}; leave one out")));
        }
        self.search.sensitivity.check()?;
        self.search.segments.check()?;
        self.budget.check_time()?;
        if let Some(tolerance) = self.search.match_latency.filter(|tolerance| !(1e-4..=0.5).contains(tolerance)) {
            return Err(Error::Config(format!("search.match_latency = {tolerance}; give 0.0001 to 0.5")));
        }
        self.compare.check()?;
        self.expand.check()?;
        self.finetune.removal.check()?;
        self.finetune.distill.check().map_err(|e| within("finetune.distill", e))
    }

    /// The device that is asked for.
    ///
    /// # Errors
    /// One that this machine does not have.
    pub fn device(&self) -> Result<Device> {
        Device::open(&self.device, self.precision)
    }

    /// How blocks are chosen: as named, else by the budget ([`SearchMethod::of_budget`]).
    pub fn method(&self) -> SearchMethod {
        self.search.method.unwrap_or(SearchMethod::of_budget(self.budget))
    }

    /// Refuses a finetuning that begins with the weights of a search which trains none.
    ///
    /// # Errors
    /// Names the method and what to do.
    pub fn check_start(&self) -> Result<()> {
        let method = self.method();
        if self.finetune.start == FinetuneStart::Original || (method.trains() && self.search.plan.is_none()) {
            return Ok(());
        }
        if self.search.plan.is_some() {
            let problem = "finetune.start = \"searched\" needs weights that a search trained, and a plan has none";
            return Err(Error::Config(format!("{problem}; leave search.plan out or start at the original")));
        }
        Err(Error::Config(format!(
            "finetune.start = \"searched\" needs weights that a search trained, and {method} trains none; give search.method = \
             \"learned\" or start at the original"
        )))
    }

    /// The search as a stage of training, where there is one and its method trains.
    pub fn search_stage(&self) -> Option<(&'static str, &TrainConfig)> {
        (self.search.plan.is_none() && self.method().takes_steps()).then_some(("search", &self.search.train))
    }

    /// The seed of the choice of blocks.
    pub fn search_seed(&self) -> u64 {
        self.search.seed.unwrap_or(self.seed)
    }

    /// How a search that trains scores learns them.
    pub fn score_rule(&self) -> Rule {
        let SearchConfig { scores, published, slopes, train, .. } = &self.search;
        let of_slopes = |rule| Rule::Slopes(rule, slopes.clone(), train.clone());
        match self.method() {
            SearchMethod::DepthShrinker => Rule::Published(published.clone(), train.clone()),
            SearchMethod::LayerCollapse => of_slopes(SlopeRule::Collapse),
            SearchMethod::LayerFolding => of_slopes(SlopeRule::Folding),
            // All of its masks are random.
            SearchMethod::Updp => Rule::Ours(ScoreConfig { explore: 1.0, ..scores.clone() }),
            _ => Rule::Ours(scores.clone()),
        }
    }

    /// Whether random selections are to take the time of the selected one, rather than to free as many blocks: where the budget is
    /// a time, and where blocks that are freed take none.
    pub fn of_equal_time(&self) -> bool {
        self.budget.is_time() || self.method().bypasses()
    }

    /// How freed blocks are prepared.
    pub fn linearise(&self) -> Linearise {
        Linearise { final_activation: self.finetune.final_activation, padding: self.merge.padding }
    }
}

/// Whether a setting that older versions do not know can be left out, so that their runs go on.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Says which part of the configuration an error is about.
fn within(part: &str, error: Error) -> Error {
    match error {
        Error::Config(problem) => Error::Config(format!("{part}: {problem}")),
        other => other,
    }
}

/// Puts `own` over `all`, table by table.
fn overlay(all: &mut toml::Table, own: toml::Table) {
    for (key, value) in own {
        match (all.get_mut(&key), value) {
            (Some(toml::Value::Table(all)), toml::Value::Table(own)) if !WHOLE.contains(&key.as_str()) => {
                overlay(all, own);
            }
            (_, value) => {
                all.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_echo_reads_back_as_itself() {
        let mut config = Config::default();
        assert_eq!(Config::parse(&config.to_toml().unwrap()).unwrap(), config);
        config.model = Some("a b.safetensors".into());
        config.finetune.kept = Some("1,0,1".parse().unwrap());
        config.finetune.teacher = Some("t.safetensors".into());
        config.evaluate.batch = Some(7);
        config.budget = Budget::Remove(3);
        config.data.train_limit = Some(5);
        config.finetune.removal = Removal::Linear { start: 0.1, end: 0.5 };
        config.search.scores.exclude = vec![0, 2];
        config.train.lr = 0.123_456_79;
        assert_eq!(Config::parse(&config.to_toml().unwrap()).unwrap(), config);
        config.network = NetworkConfig::default();
        assert_eq!(Config::parse(&config.to_toml().unwrap()).unwrap(), config);
    }

    #[test]
    fn a_file_changes_only_what_it_names() {
        let text = "budget = { keep = 4 }\n[finetune.train]\nlr = 0.25\n[data]\nname = \"mnist\"\n[network]\nhead_channels = 64\n";
        let config = Config::parse(text).unwrap();
        let mut expected = Config { budget: Budget::Keep(4), ..Config::default() };
        expected.network = NetworkConfig { head_channels: Some(64), ..NetworkConfig::default() };
        expected.finetune.train.lr = 0.25;
        expected.data.name = "mnist".into();
        assert_eq!(config, expected);
    }

    #[test]
    fn faults_name_the_line_and_the_key() {
        for (text, names) in [
            ("sed = 1", vec!["line 1", "sed", "unknown field"]),
            ("seed = 1\n[train]\nepocs = 3", vec!["line 3", "epocs"]),
            ("seed = 1\n[train]\nepochs = \"many\"", vec!["line 3", "epochs"]),
            ("budget = { kep = 3 }", vec!["kep"]),
            ("[search.scores]\nlr = 1", vec!["line 2", "lr"]),
            ("seed = ", vec!["line 1"]),
            ("[finetune]\nkept = [1, 2]", vec!["line 2", "0 or 1"]),
        ] {
            let error = Config::parse(text).unwrap_err().to_string();
            assert!(names.iter().all(|name| error.contains(name)), "{text:?}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn the_defaults_pass_their_checks_and_bad_values_do_not() {
        Config::default().check().unwrap();
        let bad: [fn(&mut Config); 9] = [
            |c| (c.device, c.precision) = ("cpu".into(), Dtype::F16),
            |c| c.device = "gpu".into(),
            |c| c.device = "cuda:one".into(),
            |c| c.search.scores.travel = -1.0,
            |c| c.measure.batch = 0,
            |c| c.measure.seconds = f64::NAN,
            |c| c.evaluate.batch = Some(0),
            |c| c.evaluate.batch = Some(1 << 20),
            |c| c.seed = u64::MAX,
        ];
        for change in bad {
            let mut config = Config::default();
            change(&mut config);
            assert!(config.check().is_err(), "{config:?}");
        }
    }

    #[test]
    fn large_images_are_evaluated_fewer_at_a_time() {
        let batch = |side| EvaluateConfig::default().batch(Shape::new(side, side, 3));
        assert_eq!([28, 32, 64, 224, 300, 4096].map(batch), [250, 250, 250, 64, 35, 1]);
        assert_eq!(EvaluateConfig { batch: Some(9) }.batch(Shape::new(224, 224, 3)), 9);
    }
}
