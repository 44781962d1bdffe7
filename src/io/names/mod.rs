//! Other projects' weights for the networks here, whose parameters have timm's names.
//!
//! `namings` is the table of what each project calls the layers. Which one a file follows is seen from its names, and so is
//! what it puts before them: the prefix of its first convolution. The classifier may lie elsewhere, as `head.fc` beside
//! `backbone.conv1`.

mod namings;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use namings::{Layer, NAMINGS, Naming};

use super::kind::{Purpose, refuse};
use super::model::{GRAPH_KEY, read_weights};
use super::tensors::{parse_tensors, read_bounded, short};
use super::torch::{TorchFile, parse_torch_file};
use crate::graph::{Graph, Op, ParamRole, ParamSpec};
use crate::model::Model;
use crate::networks::{Project, family};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// What to do about weights that do not fit.
const REMEDY: &str = "give the network these weights are of, or weights of this network";
/// Prefixes of a file's names that are tried; a network's own names hold a few that look like one.
const MAX_PREFIXES: usize = 16;
/// What to do about weights that have what the network has not.
const MORE: &str = "the file holds more than this network; save its weights alone, \
                    `torch.save(model.state_dict(), path)`, or give the network these weights are of";
/// What to do about weights of a network without its classifier.
const NO_CLASSIFIER: &str = "the file has no classifier; --classes N gives the network a fresh one";
/// What names of learned scores end with, by which the searches of DepthShrinker and EC choose activations. They are no
/// weights: the network is imported with all activations.
const SCORES: [&str; 3] = [".act_fun.slope_param", ".act_fun.slope", ".act"];
/// In the name of a learned activation, which is a weight.
const LEARNED_ACTIVATION: &str = "final_act.";

/// The weights of another project's file.
#[derive(Debug)]
pub struct Foreign {
    /// Tensors by the other project's names, in the layout of files.
    tensors: BTreeMap<String, Tensor>,
    /// Which dict of a checkpoint they are; empty where they are the whole file.
    part: String,
    /// Scores of activations that were left out.
    scores: usize,
    /// Whether the file is a model of this program.
    is_model: bool,
}

/// What a file's names are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// Whose they are: more than one project's where they agree.
    pub projects: Vec<Project>,
    /// What is put before them, such as `backbone.`; the classifier's may have none.
    pub prefix: String,
    /// Which dict of a checkpoint has them, such as `state_dict_ema`; empty where it is the whole file.
    pub part: String,
    /// Learned scores of activations that the file has beside the weights, and that are left out.
    pub scores: usize,
}

impl Names {
    /// The projects, as in "timm or torchvision".
    pub fn projects_in_words(&self) -> String {
        joined(&self.projects, " or ")
    }
}

/// A naming that fits a file, as far as it does.
struct Fit {
    projects: Vec<Project>,
    prefix: String,
    /// In network order, the classifier last, by the file's own names.
    layers: Vec<Layer>,
    /// How many of them the file has.
    found: usize,
}

/// A classifier to be trained, in place of the file's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FreshHead {
    /// Its classes.
    pub classes: usize,
    /// Seed of its weights.
    pub seed: u64,
}

impl Foreign {
    /// Reads a `.safetensors` file or one of PyTorch's; its content says which.
    ///
    /// # Errors
    /// A file that is neither, in one line.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = read_bounded(path)?;
        // The header of a safetensors file is a JSON object behind its length.
        if bytes.get(size_of::<u64>()) == Some(&b'{') {
            let file = parse_tensors(path, &bytes)?;
            let is_model = file.metadata.contains_key(GRAPH_KEY);
            return Ok(Self { is_model, ..Self::new(file.tensors) });
        }
        refuse(path, &bytes, Purpose::Weights)?;
        let TorchFile { tensors, part } = parse_torch_file(path, &bytes)?;
        Ok(Self { part, ..Self::new(tensors) })
    }

    /// The tensors of a file.
    pub fn new(mut tensors: BTreeMap<String, Tensor>) -> Self {
        tensors.retain(|name, _| !name.ends_with("num_batches_tracked"));
        let all = tensors.len();
        tensors.retain(|name, tensor| {
            let is_score = tensor.data.len() == 1 && SCORES.iter().any(|end| name.ends_with(end));
            !is_score || name.contains(LEARNED_ACTIVATION)
        });
        let scores = all - tensors.len();
        Self { tensors, part: String::new(), scores, is_model: false }
    }

    /// Whose names the file has, for a network of any number of classes and image channels.
    pub fn names(&self, graph: &Graph) -> Names {
        let Fit { projects, prefix, .. } = self.fit(graph);
        Names { projects, prefix, part: self.part.clone(), scores: self.scores }
    }

    /// The number of classes and of image channels, as the classifier's and the stem's weights have them; `None` where
    /// those are not found. `graph` is the network for any number of either.
    pub fn classes_and_channels(&self, graph: &Graph) -> (Option<usize>, Option<usize>) {
        let layers = self.fit(graph).layers;
        let size = |layer: Option<&Layer>, dim: usize| {
            let weight = self.tensors.get(&format!("{}.weight", layer?.theirs))?;
            weight.shape.get(dim).copied()
        };
        (size(layers.last(), 0), size(layers.first(), 1))
    }

    /// Takes a fresh classifier in place of the file's, which need not have one. `graph` has the classes of the head.
    ///
    /// # Errors
    /// As [`Model::initialise`].
    pub fn with_fresh_head(mut self, graph: &Graph, head: FreshHead) -> Result<Self> {
        let Some(Layer { own, theirs }) = self.fit(graph).layers.pop() else { return Ok(self) };
        let mut fresh = Model::initialise(graph.clone(), head.seed)?.weights;
        for part in ["weight", "bias"] {
            if let Some(tensor) = fresh.remove(&format!("{own}.{part}")) {
                self.tensors.insert(format!("{theirs}.{part}"), tensor);
            }
        }
        Ok(self)
    }

    /// The network with these weights, and whose names the file has.
    ///
    /// # Errors
    /// Tensors that are missing, superfluous, misshapen or not finite, by the file's own names; where names are the fault,
    /// also the known namings, and where the nearest first differs. `path` is the file.
    pub fn into_model(mut self, path: &Path, graph: Graph) -> Result<(Model, Names)> {
        let fit = self.fit(&graph);
        let by_own: BTreeMap<&str, &str> = fit.layers.iter().map(|l| (&*l.own, &*l.theirs)).collect();
        let name = |spec: &ParamSpec| {
            let own = graph.nodes[spec.node].name.as_str();
            let theirs = by_own.get(own).unwrap_or(&own);
            format!("{theirs}{}", &spec.name[own.len()..])
        };
        let params = graph.params()?;
        for spec in &params {
            if let Some(tensor) = self.tensors.get_mut(&name(spec)) {
                unflatten(tensor, spec, &graph);
            }
        }
        let remedy = if self.is_model {
            "it is a model of this program already and need not be imported".to_owned()
        } else {
            self.remedy(&graph, &fit, params.iter().map(name))
        };
        let weights = read_weights(path, &graph, &mut self.tensors, name, &remedy)?;
        let model = Model::new(graph, weights).map_err(|e| Error::file(path, e.to_string()))?;
        let Fit { projects, prefix, .. } = fit;
        Ok((model, Names { projects, prefix, part: self.part, scores: self.scores }))
    }

    /// What to do about weights that do not fit: where names are the fault, with the known ones and where the nearest
    /// first differs. `names` are the parameters' in network order.
    fn remedy(&self, graph: &Graph, fit: &Fit, names: impl Iterator<Item = String>) -> String {
        let (known, unknown): (Vec<String>, Vec<String>) = names.partition(|name| self.tensors.contains_key(name));
        let known: HashSet<String> = known.into_iter().collect();
        let strays = self.tensors.keys().filter(|name| !known.contains(*name));
        // What the file has in the place of the first that is missing begins like it.
        let first = unknown.first().map_or("", String::as_str);
        let stray = strays.max_by_key(|stray| common_start(stray, first));
        let Some(stray) = stray.filter(|_| !unknown.is_empty()) else {
            let classifier = fit.layers.last().map_or("", |layer| &layer.theirs);
            let no_classifier = !unknown.is_empty() && unknown.iter().all(|name| name.starts_with(classifier));
            return if stray.is_some() {
                MORE
            } else if no_classifier {
                NO_CLASSIFIER
            } else {
                REMEDY
            }
            .into();
        };
        let differ = format!(
            "the names nearest to the file's are those of {}, which first differ in {}: the file has {}",
            joined(&fit.projects, " and "),
            short(first),
            short(stray)
        );
        // Where most layers are found, it is plain whose names they are.
        if fit.found * 2 > fit.layers.len() {
            return format!("{differ}; {REMEDY}");
        }
        let family = family(&graph.name).ok();
        let namings = NAMINGS.iter().filter(|naming| naming.family.is_none() || naming.family == family);
        let known = joined(&namings.map(|naming| naming.project).collect::<Vec<_>>(), ", ");
        format!("{differ}; known are those of {known}; {REMEDY}")
    }

    /// The naming by which most layers are found in the file, and the prefix they have there.
    fn fit(&self, graph: &Graph) -> Fit {
        let family = family(&graph.name).ok();
        // A network of no known name has only the names it came with.
        let namings = NAMINGS.iter().filter(|naming| naming.family.is_none() || naming.family == family);
        let mut best: Option<Fit> = None;
        for fit in namings.flat_map(|naming| self.fits(naming, graph)) {
            match &mut best {
                Some(best) if fit.found > best.found => *best = fit,
                Some(best) if fit.layers == best.layers => best.projects.extend(fit.projects),
                Some(_) => {}
                None => best = Some(fit),
            }
        }
        let mut best = best.expect("timm's naming is for every network");
        self.find_classifier(graph, &mut best);
        best
    }

    /// One naming with each prefix that the file may have.
    fn fits(&self, naming: &Naming, graph: &Graph) -> Vec<Fit> {
        let layers = naming.layers(graph);
        let stem = layers.first().map_or_else(String::new, |stem| format!("{}.weight", stem.theirs));
        let prefixes = self.tensors.keys().filter_map(|name| name.strip_suffix(&stem));
        let mut prefixes: Vec<&str> = prefixes.filter(|prefix| prefix.is_empty() || prefix.ends_with('.')).collect();
        prefixes.sort_by_key(|prefix| prefix.len());
        prefixes.truncate(MAX_PREFIXES);
        if prefixes.is_empty() {
            prefixes.push("");
        }
        let fit = |prefix: &str| {
            let mut layers = layers.clone();
            let last = layers.len().saturating_sub(1);
            for (at, layer) in layers.iter_mut().enumerate() {
                let full = format!("{prefix}{}", layer.theirs);
                // A classifier may lie outside of what has the prefix.
                if at != last || self.has(&full) || !self.has(&layer.theirs) {
                    layer.theirs = full;
                }
            }
            let found = layers.iter().filter(|layer| self.has(&layer.theirs)).count();
            Fit { projects: vec![naming.project], prefix: prefix.to_owned(), layers, found }
        };
        prefixes.into_iter().map(fit).collect()
    }

    /// Whether the file has a layer of this name.
    fn has(&self, layer: &str) -> bool {
        self.tensors.contains_key(&format!("{layer}.weight"))
    }

    /// A classifier of another name is the one linear layer that is left, if it reads as many channels.
    fn find_classifier(&self, graph: &Graph, fit: &mut Fit) {
        let Some(Op::Linear(linear)) = graph.nodes.last().map(|node| node.op) else { return };
        let Some((classifier, body)) = fit.layers.split_last_mut() else { return };
        if self.has(&classifier.theirs) {
            return;
        }
        let body: HashSet<&str> = body.iter().map(|layer| layer.theirs.as_str()).collect();
        let mut left = self.tensors.iter().filter_map(|(name, tensor)| {
            let layer = name.strip_suffix(".weight").filter(|layer| !body.contains(layer))?;
            let &[classes, c_in] = tensor.shape.as_slice() else { return None };
            let bias = self.tensors.get(&format!("{layer}.bias"))?;
            (c_in == linear.c_in && bias.shape == [classes]).then_some(layer)
        });
        if let (Some(only), None) = (left.next(), left.next()) {
            classifier.theirs = only.to_owned();
        }
    }
}

/// How many bytes two names have in common at their starts.
fn common_start(a: &str, b: &str) -> usize {
    a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count()
}

fn joined(projects: &[Project], between: &str) -> String {
    projects.iter().map(ToString::to_string).collect::<Vec<_>>().join(between)
}

/// A convolution as wide as its image is elsewhere a linear layer on the flattened image: the same numbers in the same
/// order, `[c_out, c_in·h·w]`.
fn unflatten(tensor: &mut Tensor, spec: &ParamSpec, graph: &Graph) {
    if let (ParamRole::ConvWeight(_), Op::Conv(conv), &[rows, columns]) =
        (spec.role, graph.nodes[spec.node].op, tensor.shape.as_slice())
        && rows == conv.c_out
        && conv.groups == 1
        && columns == conv.c_in * conv.window.taps()
    {
        tensor.shape = vec![conv.c_out, conv.c_in, conv.window.k_h, conv.window.k_w];
    }
}
