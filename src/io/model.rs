//! A model in one `.safetensors` file: weights as the ecosystem lays them out, the graph as JSON in the metadata.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::checkpoint::STATE_KEY;
use super::kind::{Purpose, refuse};
use super::layout;
use super::tensors::{TensorFile, parse_tensors, read_bounded, short, write_tensors};
use crate::data::{Dataset, IMAGENET_CLASSES, ImageShape, Normalisation, Preprocessing, Resize, imagenet_class_names};
use crate::graph::{Graph, ParamRole, ParamSpec};
use crate::model::{Model, Weights};
use crate::networks;
use crate::shape::Shape;
use crate::tensor::Tensor;
use crate::{Error, Result, terminal};

/// Version of the format, raised when an older reader could misread a newer file.
const FORMAT: &str = "1";
const FORMAT_KEY: &str = "depthshrinker.format";
pub(super) const GRAPH_KEY: &str = "depthshrinker.graph";
const DATA_KEY: &str = "depthshrinker.data";
/// What to do about weights that are no numbers to compute with.
const BEFORE: &str = "take weights from before they diverged";
/// Faults of one kind named in a message before the rest is only counted.
const MAX_FAULTS: usize = 3;
/// Dimensions of a wrong shape that are told.
const MAX_DIMS_SHOWN: usize = 8;
/// What to do about a file whose parts contradict each other.
pub(super) const MAKE_AGAIN: &str = "make or download it again";

/// What a model file says beside graph and weights.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ModelInfo {
    /// The data the model was trained on, where known.
    pub data: Option<DataInfo>,
}

/// What it takes to feed a model and to name its answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataInfo {
    /// Name of the data set, such as `fashion-mnist`.
    pub name: String,
    /// Class names by label; empty where they are not known.
    pub classes: Vec<String>,
    /// Image shape.
    pub shape: Shape,
    /// Mean per channel of pixels scaled to 0..1, subtracted first.
    pub mean: Vec<f32>,
    /// Standard deviation per channel of pixels scaled to 0..1, divided by next.
    pub std: Vec<f32>,
    /// How pictures of other sizes are made to fit; `None` where the images had the shape from the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resize: Option<Resize>,
}

impl From<&Dataset> for DataInfo {
    fn from(data: &Dataset) -> Self {
        let Normalisation { mean, std } = data.normalisation().clone();
        Self {
            name: data.name().to_owned(),
            classes: data.class_names().to_vec(),
            shape: data.shape().into(),
            mean,
            std,
            resize: data.resize(),
        }
    }
}

impl DataInfo {
    /// What is known of a published ImageNet network, by its name as in [`networks::preprocessing`], used for `input` and
    /// `classes`: names of the classes, if they are ImageNet's 1 000, or these behind a background class, and how images are
    /// made. `None` for a name that is not known and for inputs that are not RGB.
    pub fn pretrained(network: &str, input: Shape, classes: usize) -> Option<Self> {
        let known = networks::preprocessing_at(network, input.h.min(input.w));
        let known = known.filter(|known| known.shape.channels == input.c)?;
        let Preprocessing { resize, normalisation: Normalisation { mean, std }, .. } = known;
        let names = match classes.checked_sub(IMAGENET_CLASSES) {
            Some(0) => imagenet_class_names(),
            // As TensorFlow counts them.
            Some(1) => ["background".to_owned()].into_iter().chain(imagenet_class_names()).collect(),
            _ => Vec::new(),
        };
        Some(Self { name: "imagenet".into(), classes: names, shape: input, mean, std, resize: Some(resize) })
    }

    /// How a picture becomes the network's input. Where the file does not say, it just covers it.
    pub fn preprocessing(&self) -> Preprocessing {
        let shape = ImageShape { height: self.shape.h, width: self.shape.w, channels: self.shape.c };
        let normalisation = Normalisation { mean: self.mean.clone(), std: self.std.clone() };
        Preprocessing { shape, resize: self.resize.unwrap_or_else(|| Resize::cover(shape)), normalisation }
    }

    /// Refuses names of the data or of classes that hold control characters: they are for people.
    ///
    /// # Errors
    /// Names the first.
    pub fn check_names(&self) -> Result<()> {
        match self.classes.iter().chain([&self.name]).find(|name| name.chars().any(char::is_control)) {
            Some(name) => Err(Error::Data(format!(
                "the name `{}` holds a control character, which a model file must not; rename it",
                terminal::one_line(name)
            ))),
            None => Ok(()),
        }
    }

    /// Whether the description fits a graph.
    ///
    /// # Errors
    /// Names what does not fit.
    pub fn check(&self, graph: &Graph) -> Result<()> {
        let input = graph.input_shape();
        let fault = if self.shape != input {
            format!("images are {}, the network takes {input}", self.shape)
        } else if self.mean.len() != input.c || self.std.len() != input.c {
            format!("{} means and {} deviations for {} channels", self.mean.len(), self.std.len(), input.c)
        } else if self.mean.iter().any(|m| !m.is_finite()) || self.std.iter().any(|s| !(s.is_finite() && *s > 0.0)) {
            "means must be finite, deviations finite and above 0".into()
        } else if !self.classes.is_empty() && self.classes.len() != graph.classes() {
            format!("{} class names for {} classes", self.classes.len(), graph.classes())
        } else if let Err(e) = self.check_names() {
            e.to_string()
        } else if let Some(Err(e)) = self.resize.map(|resize| resize.check(self.preprocessing().shape)) {
            e.to_string()
        } else {
            return Ok(());
        };
        Err(Error::Data(format!("the model's description of its data does not fit: {fault}")))
    }
}

/// Reads a model file.
///
/// # Errors
/// One line that names the file and the fault: unreadable, damaged, without a graph, or a graph that does not fit the
/// weights. Nothing in the file is trusted before it is checked.
pub fn read_model(path: &Path) -> Result<(Model, ModelInfo)> {
    parse_model(path, &read_bounded(path)?)
}

/// As [`read_model`], from bytes; `path` is what messages name.
///
/// # Errors
/// As [`read_model`].
pub fn parse_model(path: &Path, bytes: &[u8]) -> Result<(Model, ModelInfo)> {
    refuse(path, bytes, Purpose::Model)?;
    model_of(path, parse_tensors(path, bytes)?)
}

fn model_of(path: &Path, mut file: TensorFile) -> Result<(Model, ModelInfo)> {
    if file.metadata.contains_key(STATE_KEY) {
        return Err(Error::file(
            path,
            "is the checkpoint of a run, not its result; give a model file of the run's folder, or finish the run with \
             --resume",
        ));
    }
    let graph = read_graph(path, &file.metadata)?;
    let weights = read_weights(path, &graph, &mut file.tensors, |spec| spec.name.clone(), MAKE_AGAIN)?;
    let data = match file.metadata.get(DATA_KEY) {
        None => None,
        Some(text) => {
            let data: DataInfo = serde_json::from_str(text)
                .map_err(|e| Error::file(path, format!("its {DATA_KEY} is damaged: {e}; make the file again")))?;
            data.check(&graph).map_err(|e| Error::file(path, format!("{e}; make the file again")))?;
            Some(data)
        }
    };
    let model = Model::new(graph, weights).map_err(|e| Error::file(path, e.to_string()))?;
    Ok((model, ModelInfo { data }))
}

/// Writes a model file atomically.
///
/// # Errors
/// A graph that does not fit its weights or its data, or as [`super::write_atomic`].
pub fn write_model(path: &Path, model: &Model, info: &ModelInfo) -> Result<()> {
    let mut metadata = graph_metadata(&model.graph)?;
    metadata.extend(data_metadata(&model.graph, info)?);
    write_tensors(path, &file_weights(&model.graph, &model.weights)?, &metadata)
}

/// The metadata entry that describes the data, where it is known.
pub(super) fn data_metadata(graph: &Graph, info: &ModelInfo) -> Result<Option<(String, String)>> {
    let Some(data) = &info.data else { return Ok(None) };
    data.check(graph)?;
    Ok(Some((DATA_KEY.into(), to_json(data)?)))
}

/// The metadata entries that say which network the tensors belong to.
pub(super) fn graph_metadata(graph: &Graph) -> Result<BTreeMap<String, String>> {
    Ok(BTreeMap::from([(FORMAT_KEY.into(), FORMAT.into()), (GRAPH_KEY.into(), to_json(graph)?)]))
}

/// The graph in a file's metadata, checked.
pub(super) fn read_graph(path: &Path, metadata: &BTreeMap<String, String>) -> Result<Graph> {
    let bad = |problem: String| Err(Error::file(path, problem));
    let Some(json) = metadata.get(GRAPH_KEY) else {
        return bad(
            "holds weights but no network; name the network with `depthshrinker import NET WEIGHTS -o MODEL`".into()
        );
    };
    match metadata.get(FORMAT_KEY).map(String::as_str) {
        Some(FORMAT) => {}
        other => {
            let found = other.unwrap_or("none").escape_debug().take(20).collect::<String>();
            return bad(format!(
                "has format version {found}, this program reads {FORMAT}; use the program that wrote it"
            ));
        }
    }
    let graph: Graph = match serde_json::from_str(json) {
        Ok(graph) => graph,
        Err(e) => return bad(format!("its {GRAPH_KEY} is damaged: {e}; make or download the file again")),
    };
    match graph.shapes() {
        Ok(_) => Ok(graph),
        Err(e) => bad(format!("{e}; make or download the file again")),
    }
}

/// Takes a graph's weights out of a file and into the engine's layout; `name` is what the file calls a parameter,
/// `remedy` what to do about one that does not fit.
pub(super) fn read_weights(
    path: &Path,
    graph: &Graph,
    tensors: &mut BTreeMap<String, Tensor>,
    name: impl Fn(&ParamSpec) -> String,
    remedy: &str,
) -> Result<Weights> {
    let mut weights = Weights::new();
    let (mut missing, mut unfit, mut unusable) = (Vec::new(), Vec::new(), Vec::new());
    for spec in graph.params()? {
        let name = name(&spec);
        let Some(tensor) = tensors.remove(&name) else {
            missing.push(format!("{} is missing", short(&name)));
            continue;
        };
        let name = short(&name);
        if let Some(fault) = wrong_shape(&spec, &name, &tensor) {
            unfit.push(fault);
        } else if let Some(fault) = unusable_numbers(&spec, &name, &tensor.data) {
            unusable.push(fault);
        } else {
            let data = layout::from_file(&spec, tensor.data);
            weights.insert(spec.name, Tensor { shape: spec.shape, data });
        }
    }
    let strays: Vec<String> = tensors.keys().map(|name| format!("{} belongs to no node", short(name))).collect();
    let is_fit = missing.is_empty() && unfit.is_empty() && strays.is_empty();
    if is_fit && unusable.is_empty() {
        return Ok(weights);
    }
    let remedy = if is_fit { BEFORE } else { remedy };
    let kinds =
        [(missing, "are missing"), (unfit, "do not fit"), (unusable, "are unusable"), (strays, "belong to no node")];
    let faults = kinds.iter().map(|(faults, what)| listed(faults, what)).filter(|text| !text.is_empty());
    let faults = faults.collect::<Vec<_>>().join("; ");
    let is_cut = kinds.iter().any(|(faults, _)| faults.len() > MAX_FAULTS);
    let all = if is_cut { " (-v lists all)" } else { "" };
    kinds.iter().flat_map(|(faults, _)| faults).for_each(|fault| tracing::debug!("{}: {fault}", path.display()));
    let problem = if is_fit { "its weights are unusable" } else { "its weights do not fit the network" };
    Err(Error::file(path, format!("{problem}: {faults}{all}; {remedy}")))
}

/// A few faults of one kind; how many more there are.
fn listed(faults: &[String], what: &str) -> String {
    let shown = faults[..faults.len().min(MAX_FAULTS)].join("; ");
    match faults.len().saturating_sub(MAX_FAULTS) {
        0 => shown,
        rest => format!("{shown}; and {rest} more {what}"),
    }
}

/// What is wrong with a tensor's shape, if anything.
fn wrong_shape(spec: &ParamSpec, name: &str, tensor: &Tensor) -> Option<String> {
    let expected = layout::file_shape(spec);
    if tensor.shape == expected {
        return None;
    }
    // A shape from a file has as many dimensions as the file likes.
    let shape = tensor.shape.iter().take(MAX_DIMS_SHOWN).map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let more = if tensor.shape.len() > MAX_DIMS_SHOWN { ", …" } else { "" };
    Some(format!("{name} has shape [{shape}{more}], expected {expected:?}"))
}

/// What is wrong with a parameter's numbers, if anything.
fn unusable_numbers(spec: &ParamSpec, name: &str, data: &[f32]) -> Option<String> {
    if data.iter().any(|x| !x.is_finite()) {
        return Some(format!("{name} holds numbers that are not finite"));
    }
    let below = spec.role == ParamRole::RunningVar && data.iter().any(|&x| x < 0.0);
    below.then(|| format!("{name} holds variances below 0"))
}

/// A graph's weights in the file's layout.
pub(super) fn file_weights(graph: &Graph, weights: &Weights) -> Result<Weights> {
    let params = graph.params()?;
    let tensor = |spec: ParamSpec| {
        let own = weights.get(&spec.name).filter(|t| t.shape == spec.shape && t.data.len() == spec.len());
        let Some(own) = own else {
            return Err(Error::Graph(format!("{} does not fit its weights: {}", graph.name, spec.name)));
        };
        let tensor = Tensor { shape: layout::file_shape(&spec), data: layout::to_file(&spec, &own.data) };
        Ok((spec.name, tensor))
    };
    params.into_iter().map(tensor).collect()
}

fn to_json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::Graph(format!("cannot be written as JSON: {e}")))
}
