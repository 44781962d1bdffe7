//! Batch-norm statistics of a network whose function was changed without training: forward passes over training images,
//! as MetaPruning (Liu et al., ICCV 2019) does before it judges a network.

use std::collections::BTreeMap;

use super::evaluate::check_data;
use super::feed::{Feed, Source};
use super::interrupt::Interrupt;
use crate::data::Loader;
use crate::device::Device;
use crate::engine::{Engine, EngineOptions, Fusion};
use crate::graph::{BatchNorm, Graph, Op};
use crate::model::{Model, Weights};
use crate::ops::operation::ParamRole;
use crate::{Error, Result};

/// Sums over batches of one channel's mean, its square, and the variance.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    mean: f64,
    square: f64,
    variance: f64,
}

/// The model with the running statistics of `batches` batches, or of an epoch if that is less, in the place of its own: the
/// mean of the batches' means, and the mean of their variances with the variance of their means. No other weight changes;
/// a model without batch-norms comes back as it is.
///
/// # Errors
/// No batch at all, images that do not fit the network, a failing device, or [`Error::Interrupted`].
pub fn recalibrate(
    device: &Device,
    model: &Model,
    images: &Loader,
    batches: usize,
    interrupt: &Interrupt,
) -> Result<Model> {
    check_data(&model.graph, images)?;
    if !model.graph.nodes.iter().any(|node| matches!(node.op, Op::BatchNorm(_))) {
        return Ok(model.clone());
    }
    let replacing = Model::new(replacing_statistics(&model.graph)?, model.weights.clone())?;
    let options =
        EngineOptions { batch: images.batch_size(), fusion: Fusion::OnLoad, training: true, taps: Vec::new() };
    let mut engine = Engine::new(device, &replacing, &options)?;
    let source = Source::of([device], images, false);
    let mut feed = Feed::new(device, images, source, images.batch_size())?;
    let mut loaded = source.epoch(images, 0, 0);
    let (mut sums, mut count) = (BTreeMap::new(), 0);
    while count < batches {
        if interrupt.is_set() {
            return Err(Error::Interrupted("the recalibration was not finished".into()));
        }
        let Some(batch) = loaded.next_unless(interrupt) else { break };
        let batch = batch?;
        feed.set(&batch.batch().images, &mut engine)?;
        feed.write(&mut engine);
        engine.run()?;
        add(&mut sums, &model.graph, &engine.weights()?)?;
        count += 1;
    }
    if count == 0 {
        return Err(Error::Config("batch-norm statistics need a batch of images; give more images or batches".into()));
    }
    let mut weights = model.weights.clone();
    let n = count as f64;
    for (node, sums) in sums {
        let mut set = |role: &str, of: &dyn Fn(&Sums) -> f64| {
            if let Some(tensor) = weights.get_mut(&format!("{node}.{role}")) {
                tensor.data.iter_mut().zip(&sums).for_each(|(value, sums)| *value = of(sums) as f32);
            }
        };
        set("running_mean", &|sums| sums.mean / n);
        set("running_var", &|sums| sums.variance / n + (sums.square / n - (sums.mean / n) * (sums.mean / n)).max(0.0));
    }
    Model::new(model.graph.clone(), weights)
}

/// The graph whose batch-norms forget all batches before the last.
fn replacing_statistics(graph: &Graph) -> Result<Graph> {
    graph.rewrite(|_, node, out| {
        let new = out.copy(node);
        Ok(match node.op {
            Op::BatchNorm(norm) => out.set_op(new, Op::BatchNorm(BatchNorm { momentum: 1.0, ..norm })),
            _ => new,
        })
    })
}

/// Adds the statistics of one batch, by node and channel.
fn add(sums: &mut BTreeMap<String, Vec<Sums>>, graph: &Graph, weights: &Weights) -> Result<()> {
    for param in graph.params()? {
        let node = &graph.nodes[param.node].name;
        let of_mean = match param.role {
            ParamRole::RunningMean => true,
            ParamRole::RunningVar => false,
            _ => continue,
        };
        let values = &weights[&param.name].data;
        let sums = sums.entry(node.clone()).or_insert_with(|| vec![Sums::default(); values.len()]);
        for (sum, &value) in sums.iter_mut().zip(values) {
            let value = f64::from(value);
            match of_mean {
                true => (sum.mean, sum.square) = (sum.mean + value, sum.square + value * value),
                false => sum.variance += value,
            }
        }
    }
    Ok(())
}
