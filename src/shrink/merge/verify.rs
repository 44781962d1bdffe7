//! Proof that a merged network computes what the unmerged one computes: the same logits, and behind every merged block the
//! same features.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::Serialize;

use crate::device::{Backend, Device};
use crate::engine::{Engine, EngineOptions, Fusion, Plan, Target};
use crate::graph::{BlockState, Graph, NodeId};
use crate::measure::without_batch_norm;
use crate::model::Model;
use crate::{Error, Result};

/// Largest relative error of logits, and of a block's features, in a merge that counts as exact in f32.
pub const TOLERANCE: f64 = 1e-4;
/// Images per pass at most: enough to keep every core busy, few enough for little memory.
const BATCH: usize = 16;
/// Memory for the activations of both networks. A graph from a file may claim any image, so passes are made smaller, and
/// a network of which one image does not fit is refused.
const MAX_BYTES: u64 = 2 << 30;

/// How far two networks lie apart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MergeError {
    /// Largest difference of a logit.
    pub max_abs_error: f64,
    /// The same, divided by the largest logit of the unmerged network in magnitude.
    pub max_rel_error: f64,
    /// The merged block whose features differ most, relative to their scale; `None` where no block was merged.
    pub worst_block: Option<BlockError>,
}

/// How far the features behind one block lie apart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct BlockError {
    /// Index of the block.
    pub block: usize,
    /// Largest difference of a feature.
    pub max_abs_error: f64,
    /// The same, divided by the largest feature of the unmerged block in magnitude.
    pub max_rel_error: f64,
}

impl MergeError {
    /// The larger errors of two verifications.
    pub fn worse(self, other: Self) -> Self {
        let worst_block = match (self.worst_block, other.worst_block) {
            (Some(a), Some(b)) => Some(if b.max_rel_error > a.max_rel_error { b } else { a }),
            (a, b) => a.or(b),
        };
        let logits = if other.max_rel_error > self.max_rel_error { other } else { self };
        Self { worst_block, ..logits }
    }

    /// Refuses what is not exact to f32: logits or features of a block that differ by more than [`TOLERANCE`] of their scale.
    ///
    /// # Errors
    /// Says where and by how much.
    pub fn check(&self, graph: &Graph) -> Result<()> {
        const ADVICE: &str = "the weights may be badly conditioned (tiny batch-norm variances), train longer";
        let inexact = |what: &str, error: f64| {
            Err(Error::Merge(format!(
                "merged and unmerged network differ by {error:.2e} of {what}'s scale, more than {TOLERANCE:.0e}; {ADVICE}"
            )))
        };
        match self.worst_block {
            Some(worst) if worst.max_rel_error > TOLERANCE => {
                inexact(&format!("the output of block {}", graph.blocks[worst.block].name), worst.max_rel_error)
            }
            _ if self.max_rel_error > TOLERANCE => inexact("the logits", self.max_rel_error),
            _ => Ok(()),
        }
    }
}

/// Largest difference and largest magnitude of the numbers seen so far.
#[derive(Debug, Clone, Copy, Default)]
struct Difference {
    abs: f64,
    scale: f64,
}

impl Difference {
    fn add(&mut self, expected: &[f32], got: &[f32], what: &str) -> Result<()> {
        for (&a, &b) in expected.iter().zip(got) {
            if !(a.is_finite() && b.is_finite()) {
                let bad = if a.is_finite() { b } else { a };
                return Err(Error::NotFinite(format!("verify: {what} is {bad}; the weights or images are unusable")));
            }
            self.abs = self.abs.max((f64::from(a) - f64::from(b)).abs());
            self.scale = self.scale.max(f64::from(a.abs()));
        }
        Ok(())
    }

    fn relative(self) -> f64 {
        if self.abs == 0.0 { 0.0 } else { self.abs / self.scale.max(f64::from(f32::MIN_POSITIVE)) }
    }
}

/// Runs images through both networks on the host, in inference, and compares what comes out.
#[derive(Debug)]
pub struct Verifier {
    unmerged: Engine,
    merged: Engine,
    batch: usize,
    /// Per merged block its index, its output in each network, and the difference of the features there.
    blocks: Vec<(usize, [NodeId; 2], Difference)>,
    logits: Difference,
}

impl Verifier {
    /// Prepares both networks.
    ///
    /// # Errors
    /// Networks of different inputs or classes, or such that one image takes more than 2 GiB.
    pub fn new(unmerged: &Model, merged: &Model) -> Result<Self> {
        let takes = |model: &Model| (model.graph.input_shape(), model.graph.classes());
        let (expected, got) = (takes(unmerged), takes(merged));
        if expected != got {
            let text = |(shape, classes)| format!("{shape} and {classes} classes");
            return Err(Error::shape("verify", text(expected), text(got)));
        }
        let image = activation_bytes(&unmerged.graph)? + activation_bytes(&merged.graph)?;
        let batch = BATCH.min((MAX_BYTES / image.max(1)) as usize);
        if batch == 0 {
            let (shape, limit) = (unmerged.graph.input_shape(), MAX_BYTES >> 20);
            return Err(Error::Merge(format!(
                "checking it takes {} MiB for one image of {shape}, more than the limit of {limit}; merge a model for \
                 smaller images",
                image >> 20
            )));
        }
        let pairs = unmerged.graph.blocks.iter().zip(&merged.graph.blocks).enumerate();
        let blocks: Vec<_> = pairs
            .filter(|(_, (a, b))| a.state != BlockState::Merged && b.state == BlockState::Merged)
            .map(|(index, (a, b))| (index, [a.output(), b.output()], Difference::default()))
            .collect();
        let engine = |model: &Model, side: usize| {
            let taps = blocks.iter().map(|(_, outputs, _)| outputs[side]).collect();
            Engine::new(&Device::Cpu, model, &EngineOptions { batch, fusion: Fusion::OnLoad, training: false, taps })
        };
        let (unmerged, merged) = (engine(unmerged, 0)?, engine(merged, 1)?);
        Ok(Self { unmerged, merged, batch, blocks, logits: Difference::default() })
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
        let shape = self.unmerged.graph().input_shape();
        let n = images.len() / shape.len();
        if n == 0 || images.len() != n * shape.len() {
            return Err(Error::shape("verify", format!("images of {shape}"), format!("{} numbers", images.len())));
        }
        let classes = self.unmerged.graph().classes();
        let (mut expected, mut got) = (vec![0.0; n * classes], vec![0.0; n * classes]);
        self.unmerged.forward(images)?.read(&mut expected)?;
        self.merged.forward(images)?.read(&mut got)?;
        self.logits.add(&expected, &got, "a logit")?;
        for (_, [before, after], difference) in &mut self.blocks {
            let (before, after) = (self.unmerged.tap(*before)?, self.merged.tap(*after)?);
            difference.add(before.host(), after.host(), "a block's output")?;
        }
        Ok(())
    }

    /// The largest differences.
    pub fn error(&self) -> MergeError {
        let blocks = self.blocks.iter().map(|&(block, _, d)| BlockError {
            block,
            max_abs_error: d.abs,
            max_rel_error: d.relative(),
        });
        MergeError {
            max_abs_error: self.logits.abs,
            max_rel_error: self.logits.relative(),
            worst_block: blocks.max_by(|a, b| a.max_rel_error.total_cmp(&b.max_rel_error)),
        }
    }
}

/// Runs `n` images `[n, h, w, c]` through both networks and compares their logits and what leaves their merged blocks.
///
/// # Errors
/// As [`Verifier`], and no images.
pub fn verify(unmerged: &Model, merged: &Model, images: &[f32], n: usize) -> Result<MergeError> {
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
pub fn verify_random(unmerged: &Model, merged: &Model, n: usize, seed: u64) -> Result<MergeError> {
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
    let folded = without_batch_norm(graph)?;
    let plan = Plan::new(&folded, &Target::inference(Backend::Host))?;
    let written = plan.steps.iter().flat_map(|step| &step.uses.writes);
    let numbers = written.map(|&value| plan.values.get(value).len(1) as u64).sum::<u64>();
    Ok((numbers + graph.input_shape().len() as u64) * size_of::<f32>() as u64)
}
