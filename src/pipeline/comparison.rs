//! `bench table`: networks side by side, as their authors timed them and as one deploys them.

use std::time::{Duration, Instant};

use super::benchmark::{Bench, fully_merged};
use crate::config::Config;
use crate::device::Device;
use crate::dtype::Dtype;
use crate::engine::Fusion;
use crate::graph::Graph;
use crate::io::read_model;
use crate::measure::{
    ComparisonRecord, ComparisonTiming, ComparisonWork, Findings, Form, LayerPass, LayerRecord, Limits, Measured,
    NetworkCase, Projection, Published, Series, Summary, TimedLayer, Used, WARM_UP, peak_memory, row_of_passes,
    sample_networks,
};
use crate::model::Model;
use crate::networks::{NetworkOptions, build};
use crate::shape::Shape;
use crate::shrink::{Selection, counted_operations, named_mask, simulated_merge};
use crate::train::Reporter;
use crate::{Error, Result};

/// Side of the images at which networks are counted and were published.
const PUBLISHED_IMAGE: usize = 224;
/// Images of a pass by which what was published is projected: those of DepthShrinker's README.
const PUBLISHED_BATCH: usize = 128;
/// Parts of the time that a row as published gets for one of a deployed row: it is one long series.
const AS_PUBLISHED_PARTS: u32 = 3;

/// A network to be compared.
#[derive(Debug, Clone, PartialEq)]
pub struct Contestant {
    /// What it is called in the table.
    pub name: String,
    /// A network by name, or a model file; `None` where there is none to build.
    pub network: Option<String>,
    /// A published mask by name, a list of 0 and 1, or a plan file.
    pub selection: Option<String>,
    /// Why there is no network.
    pub missing: Option<String>,
    /// What was published of it.
    pub published: Published,
}

impl std::str::FromStr for Contestant {
    type Err = Error;

    /// `NET` or `NET:SELECTION`.
    fn from_str(text: &str) -> Result<Self> {
        let (network, selection) = match text.split_once(':') {
            Some((network, selection)) => (network, Some(selection.to_owned())),
            None => (text, None),
        };
        if network.is_empty() || selection.as_deref() == Some("") {
            return Err(Error::Config(format!("{text:?}; expected NET or NET:SELECTION")));
        }
        Ok(Self {
            name: text.to_owned(),
            network: Some(network.to_owned()),
            selection,
            missing: None,
            published: Published::default(),
        })
    }
}

/// What is compared, and where.
#[derive(Debug, Clone)]
pub struct Comparison<'a> {
    /// The device in each precision that deployed rows are timed in; rows as published take that in f32.
    pub devices: &'a [(Device, Limits)],
    /// Side of the images in pixels.
    pub image: usize,
    /// Images of a pass as published.
    pub batch: usize,
    /// Images of a pass as deployed.
    pub deployed_batches: &'a [usize],
    /// Time for everything together.
    pub budget: Duration,
    /// Another device to project each row to.
    pub projection: Option<Projection>,
    /// How merges are done.
    pub config: &'a Config,
}

/// A network before and after a merge.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkPair {
    /// As it was.
    pub original: Model,
    /// With its selection merged.
    pub merged: Model,
}

impl NetworkPair {
    /// Times the forward pass of the distinct layers of both, `original` and `merged`.
    ///
    /// # Errors
    /// When no layer can be timed.
    pub fn forward_layers(&self, bench: &Bench<'_>, batch: usize) -> Result<Findings<LayerRecord>> {
        let graphs = [&self.original.graph, &self.merged.graph];
        let layers = TimedLayer::of_networks(&graphs, batch, &[LayerPass::Forward], bench.device.backend())?;
        bench.layers(&layers, &["original", "merged"], &|_| Ok(()))
    }
}

/// Called with all rows so far whenever there is a new one.
pub type KeepRows<'a> = &'a dyn Fn(&[ComparisonRecord]) -> Result<()>;

/// A row before it is timed.
struct Row<'a> {
    work: ComparisonWork,
    case: std::result::Result<NetworkCase, String>,
    device: &'a Device,
    limits: &'a Limits,
}

impl Comparison<'_> {
    /// Times every form of every network. What `before` has is not timed again. A network that cannot be built, merged or
    /// run has the reason in its rows and stops nothing.
    ///
    /// # Errors
    /// When the rows cannot be kept.
    pub fn run(
        &self,
        contestants: &[Contestant],
        before: &[ComparisonRecord],
        reporter: &mut Reporter,
        keep: KeepRows<'_>,
    ) -> Result<Vec<ComparisonRecord>> {
        let start = Instant::now();
        let mut records = Vec::new();
        reporter.begin("table", 0, contestants.len() as u64);
        for (index, contestant) in contestants.iter().enumerate() {
            for row in self.rows(contestant) {
                let known = before.iter().find(|known| known.work.is_same(&row.work));
                records.push(match known {
                    Some(known) => known.clone(),
                    None => self.timed(row, contestants.len()),
                });
                keep(&records)?;
            }
            let (done, all) = (index + 1, contestants.len());
            let seconds = start.elapsed().as_secs_f64();
            let left = seconds * (all - done) as f64 / done as f64;
            reporter.step(done as u64, &contestant.name);
            reporter.line_without_bar(&format!(
                "table: {} ({done} of {all}), {seconds:.0} s, about {left:.0} s left",
                contestant.name
            ));
        }
        reporter.end();
        Ok(records)
    }

    /// A network that was merged, as it was and merged.
    ///
    /// # Errors
    /// One that cannot be built or merged.
    pub fn pair(&self, contestant: &Contestant) -> Result<NetworkPair> {
        let original = Contestant { selection: None, ..contestant.clone() };
        let model = |contestant| -> Result<Model> {
            let case = Network::new(contestant, self.image, self.config)?.deployed.map_err(Error::Config)?;
            Ok(case.model)
        };
        Ok(NetworkPair { original: model(&original)?, merged: model(contestant)? })
    }

    /// The rows of a network, as published first.
    fn rows(&self, contestant: &Contestant) -> Vec<Row<'_>> {
        let network = match contestant.network {
            Some(_) => Network::new(contestant, self.image, self.config).map_err(|error| error.to_string()),
            None => Err(contestant.missing.clone().unwrap_or_else(|| "there is no such network".into())),
        };
        let mut rows = Vec::new();
        let is_f32 = |(device, _): &&(Device, Limits)| device.precision() == Dtype::F32;
        if let Some((device, limits)) = self.devices.iter().find(is_f32) {
            let case = network.as_ref().map_err(Clone::clone).and_then(|network| network.as_published.clone());
            rows.push(self.row(contestant, (Form::AsPublished, self.batch), case, (device, limits)));
        }
        for (device, limits) in self.devices {
            for &batch in self.deployed_batches {
                let case = network.as_ref().map_err(Clone::clone).and_then(|network| network.deployed.clone());
                rows.push(self.row(contestant, (Form::Deployed, batch), case, (device, limits)));
            }
        }
        if let Ok(network) = &network {
            for row in &mut rows {
                let graph = network.published.as_ref();
                row.work.counted_mflops = graph.and_then(|graph| Some(counted_operations(graph).ok()? as f64 / 1e6));
                let project =
                    |graph| self.projection?.images_per_s(graph, Fusion::PerNode, PUBLISHED_BATCH, Dtype::F32).ok();
                row.work.projected_as_published = graph.and_then(project);
            }
        }
        rows
    }

    fn row<'a>(
        &self,
        contestant: &Contestant,
        (form, batch): (Form, usize),
        case: std::result::Result<NetworkCase, String>,
        (device, limits): (&'a Device, &'a Limits),
    ) -> Row<'a> {
        let precision = device.precision();
        let built = case.as_ref().ok();
        let projected =
            |case: &NetworkCase| self.projection?.images_per_s(&case.model.graph, case.fusion, batch, precision).ok();
        let work = ComparisonWork {
            name: contestant.name.clone(),
            network: contestant.network.clone(),
            selection: contestant.selection.clone(),
            form,
            device: device.name(),
            precision: precision.to_string(),
            batch,
            image: self.image,
            macs: built.and_then(|case| Some(case.model.graph.cost().ok()?.macs())),
            counted_mflops: None,
            published: contestant.published,
            projected_images_per_s: built.and_then(projected),
            projected_as_published: None,
        };
        Row { work, case, device, limits }
    }

    fn timed(&self, row: Row<'_>, contestants: usize) -> ComparisonRecord {
        let Row { work, case, device, limits } = row;
        let own = match case {
            Err(reason) => Measured::Failed(reason),
            Ok(case) => match self.time(&work, &case, (device, limits), self.share(work.form, contestants)) {
                Ok(timing) => Measured::Timed(timing),
                Err(error) => Measured::Failed(error.to_string()),
            },
        };
        device.release_idle();
        ComparisonRecord { work, own }
    }

    fn time(
        &self,
        work: &ComparisonWork,
        case: &NetworkCase,
        (device, limits): (&Device, &Limits),
        budget: Duration,
    ) -> Result<ComparisonTiming> {
        let batch = work.batch;
        let series = match work.form {
            Form::AsPublished => row_of_passes(device, case, batch, budget)?,
            Form::Deployed => {
                let samples = sample_networks(device, std::slice::from_ref(case), batch, budget).remove(0)?;
                let summary = Summary::of(&samples).ok_or_else(|| Error::Device("no time was measured".into()))?;
                let Summary { median, iqr, count, .. } = summary;
                Series { seconds: median, iqr: Some(iqr), passes: count, warm_up: WARM_UP }
            }
        };
        device.release_idle();
        let used = Used::of(limits, &case.costs(device.backend())?, batch, series.seconds);
        Ok(ComparisonTiming::new(&series, batch, used, peak_memory(device, case, batch)?))
    }

    /// The time of one row.
    fn share(&self, form: Form, contestants: usize) -> Duration {
        let deployed = (self.devices.len() * self.deployed_batches.len()) as u32;
        let part = self.budget / ((AS_PUBLISHED_PARTS + deployed) * contestants.max(1) as u32);
        match form {
            Form::AsPublished => AS_PUBLISHED_PARTS * part,
            Form::Deployed => part,
        }
    }
}

/// The cases of one network.
struct Network {
    as_published: std::result::Result<NetworkCase, String>,
    deployed: std::result::Result<NetworkCase, String>,
    /// At the size that was published; `None` where that cannot be built.
    published: Option<Graph>,
}

impl Network {
    fn new(contestant: &Contestant, image: usize, config: &Config) -> Result<Self> {
        let Some(name) = &contestant.network else {
            return Err(Error::Config(contestant.missing.clone().unwrap_or_default()));
        };
        let selection = contestant.selection.as_deref().map(read_selection).transpose()?;
        let model = model(name, image, config.seed)?;
        let case = |name, model: Model, fusion| NetworkCase { name, model, fusion, training: false };
        let simulated = |graph: &Graph| match &selection {
            Some(selection) => simulated_merge(graph, selection.keep.kept()),
            None => Ok(graph.clone()),
        };
        let as_published = simulated(&model.graph)
            .and_then(|graph| Model::initialise(graph, config.seed))
            .map(|model| case("as-published", model, Fusion::PerNode))
            .map_err(|error| error.to_string());
        let merged = match &selection {
            Some(selection) => fully_merged(&model, Some(selection), config).and_then(|merged| {
                merged.ok_or_else(|| Error::Config("the selection merges nothing of this network".into()))
            }),
            None => Ok(model),
        };
        let deployed = merged.map(|model| case("deployed", model, Fusion::OnLoad)).map_err(|error| error.to_string());
        let published = named_graph(name, PUBLISHED_IMAGE).and_then(|graph| simulated(&graph)).ok();
        Ok(Self { as_published, deployed, published })
    }
}

/// A network by name, with fresh weights, or a model file, whose images are its own.
fn model(name: &str, image: usize, seed: u64) -> Result<Model> {
    let path = std::path::Path::new(name);
    match path.extension() {
        Some(extension) if extension == "safetensors" => Ok(read_model(path)?.0),
        _ => Model::initialise(named_graph(name, image)?, seed),
    }
}

fn named_graph(name: &str, image: usize) -> Result<Graph> {
    build(name, &NetworkOptions::new(Shape::new(image, image, 3), 1000))
}

/// A plan file, a published mask by name, or a list of 0 and 1.
fn read_selection(text: &str) -> Result<Selection> {
    let path = std::path::Path::new(text);
    if path.extension().is_some_and(|extension| extension == "json") {
        return Selection::read(path);
    }
    Ok(named_mask(text)?.into())
}
