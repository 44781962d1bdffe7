//! Proof that a merged network computes what the unmerged one computes, and how far their logits lie apart
//! (`docs/methods.md` 2.3).
//!
//! The proof has two parts. Outside of the merged segments both networks have the same nodes with the same weights, bit for
//! bit. And each merged convolution gives what its segment gives, for one and the same input, both evaluated in f64: what is
//! left is that its weights were rounded to f32. Correctly rounded weights make an error of at most u·(Σ|w|·|x| + |b|), with
//! u = 2⁻²⁴ the unit of rounding and the sum over the terms of the number in question; the two f64 evaluations and the fold
//! add at most a few times 2⁻⁵³ per term of the chain, relative to its own terms. So the bound is
//!
//! 2·u·(Σ|w|·|x| + |b|) + 4·T·2⁻⁵³·A,
//!
//! with T the terms of the chain and A the chain of magnitudes, Σ|w₃|·(Σ|w₂|·(Σ|w₁|·|x|)). Weights and biases that would be
//! subnormal are written as 0; one below the smallest normal f32 may make an error of that number, 2⁻¹²⁶, times |x|. The
//! bound holds whatever the weights' conditioning, and a tap that is wrong by a thousandth breaks it. What both networks'
//! own f32 arithmetic adds, layer upon layer, is no error of the merge; it shows in the logits, which are told and not
//! judged.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::Serialize;

use super::truth::{Affine, Images, Sum, UNIT_F32};
use super::{Merged, MergedSegment};
use crate::device::{Backend, Device};
use crate::engine::{Engine, EngineOptions, Fusion, Plan, Target};
use crate::graph::{Graph, Node, NodeId, Op};
use crate::model::Model;
use crate::shape::Shape;
use crate::{Error, Result};

/// Images per pass at most: enough to keep every core busy, few enough for little memory.
const BATCH: usize = 16;
/// Memory for the activations of both networks. A graph from a file may claim any image, so passes are made smaller, and
/// a network of which one image does not fit is refused.
const MAX_BYTES: u64 = 2 << 30;
/// Multiply-accumulates in f64 that one segment may take for the images of a pass: fewer images are looked at beyond.
const WORK: u64 = 1 << 26;
/// The same for all rows of one image of noise; of a larger one, rows are chosen as for given images.
const WHOLE_WORK: u64 = 1 << 28;
/// Share of the rows inside that is looked at per pass; the next pass takes the next ones.
const BANDS: usize = 8;
/// Unit of rounding of f64, with the factor of three evaluations in f64.
const UNIT_F64: f64 = 4.0 / (1u64 << 53) as f64;

/// How far two networks lie apart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MergeError {
    /// Largest difference of a logit in f32.
    pub max_abs_error: f64,
    /// The same, divided by the largest logit of the unmerged network in magnitude.
    pub max_rel_error: f64,
    /// The merged segment that comes nearest to the bound, or is beyond it; `None` where nothing was merged.
    pub worst_segment: Option<SegmentError>,
}

/// How far one merged convolution lies from its segment, both in f64.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SegmentError {
    /// Index into [`Merged::segments`].
    pub segment: usize,
    /// Largest difference of a number.
    pub max_abs_error: f64,
    /// The same, divided by the segment's largest number in magnitude.
    pub max_rel_error: f64,
    /// Largest difference over what rounding the merged weights to f32 can make; above 1 the merge is wrong.
    pub of_bound: f64,
}

impl MergeError {
    /// The larger errors of two verifications.
    pub fn worse(self, other: Self) -> Self {
        let worst_segment = match (self.worst_segment, other.worst_segment) {
            (Some(a), Some(b)) => Some(if b.of_bound > a.of_bound { b } else { a }),
            (a, b) => a.or(b),
        };
        let logits = if other.max_rel_error > self.max_rel_error { other } else { self };
        Self { worst_segment, ..logits }
    }

    /// Refuses a merged convolution that differs from its segment by more than rounding can.
    ///
    /// # Errors
    /// Says which and by how much.
    pub fn check(&self, merged: &Merged) -> Result<()> {
        match self.worst_segment {
            Some(worst) if worst.of_bound > 1.0 || worst.of_bound.is_nan() => Err(Error::Merge(format!(
                "the convolution merged from {} is wrong: it differs by {:.2e} of its scale, {:.1e} times what rounding to f32 \
                 can make; this is a fault of the program, please report it",
                merged.segments[worst.segment].name, worst.max_rel_error, worst.of_bound
            ))),
            _ => Ok(()),
        }
    }
}

/// Largest difference and largest magnitude of the numbers seen so far, and the largest difference over its bound.
#[derive(Debug, Clone, Copy, Default)]
struct Difference {
    abs: f64,
    scale: f64,
    of_bound: f64,
}

impl Difference {
    fn add(&mut self, expected: f64, got: f64, bound: f64, what: &str) -> Result<()> {
        if !(expected.is_finite() && got.is_finite()) {
            let bad = if expected.is_finite() { got } else { expected };
            return Err(Error::NotFinite(format!("verify: {what} is {bad}; the weights or images are unusable")));
        }
        let difference = (expected - got).abs();
        self.abs = self.abs.max(difference);
        self.scale = self.scale.max(expected.abs());
        if difference > 0.0 {
            self.of_bound = self.of_bound.max(difference / bound);
        }
        Ok(())
    }

    fn relative(self) -> f64 {
        if self.abs == 0.0 { 0.0 } else { self.abs / self.scale.max(f64::from(f32::MIN_POSITIVE)) }
    }
}

/// A merged convolution beside its segment.
#[derive(Debug)]
struct Pair {
    /// What the unmerged network has.
    segment: MergedSegment,
    /// The value of the merged network that the convolution reads.
    input: NodeId,
    /// Output rows that the merged convolution computes in part from padding, above and below.
    border: [usize; 2],
    difference: Difference,
}

/// Runs images through both networks on the host, in inference, and compares what comes out; and every merged convolution
/// with its segment on what the segment reads.
#[derive(Debug)]
pub struct Verifier<'a> {
    networks: [&'a Model; 2],
    shapes: [Vec<Shape>; 2],
    engines: [Engine; 2],
    batch: usize,
    pairs: Vec<Pair>,
    logits: Difference,
    /// Passes so far.
    passes: usize,
}

impl<'a> Verifier<'a> {
    /// Prepares both networks and compares them outside of the merged segments.
    ///
    /// # Errors
    /// A merged network that is another one there, or such that one image takes more than 2 GiB.
    pub fn new(unmerged: &'a Model, merged: &'a Merged) -> Result<Self> {
        check_outside(unmerged, merged)?;
        let networks = [unmerged, &merged.model];
        let image = activation_bytes(&unmerged.graph)? + activation_bytes(&merged.model.graph)?;
        let batch = BATCH.min((MAX_BYTES / image.max(1)) as usize);
        if batch == 0 {
            let (shape, limit) = (unmerged.graph.input_shape(), MAX_BYTES >> 20);
            return Err(Error::Merge(format!(
                "checking it takes {} MiB for one image of {shape}, more than the limit of {limit}; merge a model for \
                 smaller images",
                image >> 20
            )));
        }
        let shapes = [unmerged.graph.shapes()?, merged.model.graph.shapes()?];
        let pairs = merged.segments.iter().map(|segment| pair(segment, &merged.model.graph, &shapes[1])).collect();
        let engine = |model: &Model, taps: Vec<NodeId>| {
            Engine::new(&Device::Cpu, model, &EngineOptions { batch, fusion: Fusion::OnLoad, training: false, taps })
        };
        let taps = merged.segments.iter().map(|s| s.segment.input).collect();
        let engines = [engine(unmerged, taps)?, engine(&merged.model, Vec::new())?];
        let mut verifier = Self { networks, shapes, engines, batch, pairs, logits: Difference::default(), passes: 0 };
        verifier.compare_on_noise()?;
        Ok(verifier)
    }

    /// Images that [`compare`](Self::compare) takes at once.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Compares on up to [`batch`](Self::batch) images `[n, h, w, c]`.
    ///
    /// # Errors
    /// Images that do not fit, or features or logits that are not finite.
    pub fn compare(&mut self, images: &[f32]) -> Result<()> {
        let shape = self.networks[0].graph.input_shape();
        let n = images.len() / shape.len();
        if n == 0 || images.len() != n * shape.len() {
            return Err(Error::shape("verify", format!("images of {shape}"), format!("{} numbers", images.len())));
        }
        let len = n * self.networks[0].graph.output_shape().len();
        let (mut expected, mut got) = (vec![0.0; len], vec![0.0; len]);
        let [unmerged, merged] = &mut self.engines;
        unmerged.forward(images)?.read(&mut expected)?;
        merged.forward(images)?.read(&mut got)?;
        for (expected, got) in expected.iter().zip(&got) {
            self.logits.add(f64::from(*expected), f64::from(*got), f64::INFINITY, "a logit")?;
        }
        for at in 0..self.pairs.len() {
            let input = self.pairs[at].segment.segment.input;
            let data = self.engines[0].tap(input)?.host().to_vec();
            let rows = self.chosen_rows(at);
            let images = self.images_for(at, &rows).min(n);
            self.compare_rows(at, Images { data: &data, n: images }, &rows)?;
        }
        self.passes += 1;
        Ok(())
    }

    /// Every segment on one image of noise of its own: it reaches the channels that are 0 behind an activation of the
    /// network.
    fn compare_on_noise(&mut self) -> Result<()> {
        for at in 0..self.pairs.len() {
            let segment = &self.pairs[at].segment;
            let [input, output] = [segment.segment.input, segment.output].map(|id| self.shapes[0][id]);
            let mut rng = ChaCha8Rng::seed_from_u64(at as u64);
            let data: Vec<f32> = StandardNormal.sample_iter(&mut rng).take(input.len()).collect();
            let all: Vec<usize> = (0..output.h).collect();
            let fits = self.macs(at, &all) <= WHOLE_WORK;
            let rows = if fits { all } else { self.chosen_rows(at) };
            self.compare_rows(at, Images { data: &data, n: 1 }, &rows)?;
        }
        Ok(())
    }

    /// The largest differences.
    pub fn error(&self) -> MergeError {
        let segments = self.pairs.iter().enumerate().map(|(segment, Pair { difference, .. })| SegmentError {
            segment,
            max_abs_error: difference.abs,
            max_rel_error: difference.relative(),
            of_bound: difference.of_bound,
        });
        MergeError {
            max_abs_error: self.logits.abs,
            max_rel_error: self.logits.relative(),
            worst_segment: segments.max_by(|a, b| a.of_bound.total_cmp(&b.of_bound)),
        }
    }

    /// A segment in the unmerged network, and its convolution in the merged one.
    fn maps(&self, at: usize) -> [Affine<'_>; 2] {
        let Pair { segment: MergedSegment { segment, output, conv, .. }, input, .. } = &self.pairs[at];
        let [unmerged, merged] = self.networks;
        let nodes = (segment.nodes.start..=*output).into();
        [
            Affine { model: unmerged, shapes: &self.shapes[0], input: segment.input, nodes },
            Affine { model: merged, shapes: &self.shapes[1], input: *input, nodes: (*conv..=*conv).into() },
        ]
    }

    /// Multiply-accumulates of comparing rows of one image: every map is evaluated twice.
    fn macs(&self, at: usize, rows: &[usize]) -> u64 {
        self.maps(at).iter().map(|map| 2 * map.macs(rows)).sum()
    }

    fn images_for(&self, at: usize, rows: &[usize]) -> usize {
        (WORK / self.macs(at, rows).max(1)).max(1) as usize
    }

    /// All rows near the border and a band of those inside.
    fn chosen_rows(&self, at: usize) -> Vec<usize> {
        let Pair { segment, border: [above, below], .. } = &self.pairs[at];
        let h = self.shapes[0][segment.output].h;
        let band = h.div_ceil(BANDS);
        let start = self.passes % BANDS * band;
        let is_chosen = |row: &usize| *row < *above || *row + below >= h || (start..start + band).contains(row);
        (0..h).filter(is_chosen).collect()
    }

    fn compare_rows(&mut self, at: usize, images: Images<'_>, rows: &[usize]) -> Result<()> {
        let [segment, conv] = self.maps(at);
        let expected = segment.rows(images, rows, Sum::Signed)?;
        let got = conv.rows(images, rows, Sum::Signed)?;
        let terms = conv.rows(images, rows, Sum::Magnitudes)?;
        let chain = segment.rows(images, rows, Sum::Magnitudes)?;
        let share = segment.terms() * UNIT_F64;
        let difference = &mut self.pairs[at].difference;
        for (((expected, got), terms), chain) in expected.iter().zip(&got).zip(&terms).zip(&chain) {
            difference.add(*expected, *got, UNIT_F32 * terms + share * chain, "a block's output")?;
        }
        Ok(())
    }
}

fn pair(segment: &MergedSegment, graph: &Graph, shapes: &[Shape]) -> Pair {
    let input = graph.nodes[segment.conv].inputs[0];
    let (mut border, h) = ([0, 0], shapes[segment.conv].h);
    if let Op::Conv(conv) = graph.nodes[segment.conv].op {
        let lines = |pad: usize| (pad.div_ceil(conv.window.stride_h) + 1).min(h);
        border = [lines(conv.window.pad.top), lines(conv.window.pad.bottom)];
    }
    Pair { segment: segment.clone(), input, border, difference: Difference::default() }
}

/// Refuses a merged network that differs from the unmerged one outside of the merged segments: in a node, in where it reads
/// from, or in a weight.
fn check_outside(unmerged: &Model, merged: &Merged) -> Result<()> {
    let (old, new) = (&unmerged.graph, &merged.model.graph);
    let differs = |name: &str| Err(Error::Merge(format!("the merged network is another one at {name}")));
    if old.output_shape() != new.output_shape() {
        let text = |graph: &Graph| format!("{}, {} and {}", graph.name, graph.input_shape(), graph.output_shape());
        return Err(Error::shape("verify", text(old), text(new)));
    }
    let (nodes, mapped) = (old.nodes.len(), merged.map.len());
    if mapped != nodes {
        let text = format!("the merged network is another one: it was made of {mapped} nodes, not of these {nodes}");
        return Err(Error::Merge(text));
    }
    if merged.map.last() != Some(&Some(new.output())) {
        return differs("its output");
    }
    let conv_of = |id: NodeId| merged.segments.iter().find(|s| s.output == id);
    for (id, node) in NodeId::enumerate(&old.nodes) {
        let Some(new_id) = merged.map[id] else {
            match merged.segments.iter().any(|s| (s.segment.nodes.start..s.output).contains(&id)) {
                true => continue,
                false => return differs(&node.name),
            }
        };
        let now: &Node = &new.nodes[new_id];
        let inputs = match conv_of(id) {
            Some(segment) if segment.conv == new_id => vec![segment.segment.input],
            Some(_) => return differs(&node.name),
            None if (&node.name, node.op) == (&now.name, now.op) => node.inputs.clone(),
            None => return differs(&node.name),
        };
        let expected: Option<Vec<NodeId>> = inputs.iter().map(|&input| merged.map[input]).collect();
        if expected.as_ref() != Some(&now.inputs) {
            return differs(&now.name);
        }
    }
    let is_merged = |node: NodeId| merged.segments.iter().any(|s| s.conv == node);
    let mut params = new.params()?.into_iter().filter(|param| !is_merged(param.node));
    match params.find(|p| unmerged.weights.get(&p.name) != merged.model.weights.get(&p.name)) {
        Some(param) => differs(&param.name),
        None => Ok(()),
    }
}

/// Runs `n` images `[n, h, w, c]` through both networks and compares their logits and their merged segments.
///
/// # Errors
/// As [`Verifier`], and no images.
pub fn verify(unmerged: &Model, merged: &Merged, images: &[f32], n: usize) -> Result<MergeError> {
    let shape = unmerged.graph.input_shape();
    if n == 0 || images.len() != n * shape.len() {
        return Err(Error::shape("verify", format!("{n} > 0 images of {shape}"), format!("{} numbers", images.len())));
    }
    let mut verifier = Verifier::new(unmerged, merged)?;
    let batch = verifier.batch();
    images.chunks(batch * shape.len()).try_for_each(|images| verifier.compare(images))?;
    Ok(verifier.error())
}

/// As [`verify`], on `n` images of standard normal noise, drawn a batch at a time; the same seed gives the same images on
/// every machine.
///
/// # Errors
/// As [`verify`].
pub fn verify_random(unmerged: &Model, merged: &Merged, n: usize, seed: u64) -> Result<MergeError> {
    let mut verifier = Verifier::new(unmerged, merged)?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (batch, image) = (verifier.batch(), unmerged.graph.input_shape().len());
    for first in (0..n).step_by(batch) {
        let numbers = batch.min(n - first) * image;
        let images: Vec<f32> = StandardNormal.sample_iter(&mut rng).take(numbers).collect();
        verifier.compare(&images)?;
    }
    Ok(verifier.error())
}

/// Bytes that one image takes in a network at most: its own, and the result of every step of the plan.
fn activation_bytes(graph: &Graph) -> Result<u64> {
    let (folded, _) = graph.without_batch_norm()?;
    let plan = Plan::new(&folded, &Target::inference(Backend::Host))?;
    let written = plan.steps.iter().flat_map(|step| &step.uses.writes);
    let numbers = written.map(|&value| plan.values.get(value).len(1) as u64).sum::<u64>();
    Ok((numbers + graph.input_shape().len() as u64) * size_of::<f32>() as u64)
}
