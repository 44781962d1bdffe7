//! Accuracy and loss on test images.

use serde::{Deserialize, Serialize};

use super::feed::{Feed, Source};
use super::interrupt::Interrupt;
use crate::data::Loader;
use crate::dtype::Dtype;
use crate::engine::Engine;
use crate::graph::Graph;
use crate::ops::loss::{LossRecord, LossSum, cross_entropy};
use crate::{Error, Result};

/// What a network scores on test images.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// Images whose highest logit is the label's, in percent.
    pub top1: f64,
    /// Mean cross-entropy.
    pub loss: f64,
    /// Number of images.
    pub images: u64,
}

/// Runs all test images once through an inference engine planned for at least the loader's batch.
///
/// # Errors
/// Data that cannot be read or does not fit the network, logits that are not finite, or a failing device.
pub fn evaluate(engine: &mut Engine, test: &Loader) -> Result<Evaluation> {
    evaluate_until(engine, test, &Interrupt::new())
}

/// As [`evaluate`], but stops early when asked to.
///
/// # Errors
/// As [`evaluate`], and [`Error::Interrupted`].
pub fn evaluate_until(engine: &mut Engine, test: &Loader, interrupt: &Interrupt) -> Result<Evaluation> {
    check_data(engine.graph(), test)?;
    let classes = engine.graph().classes();
    let mut images = 0;
    let mut record = LossRecord::new(engine.device(), test.batch_size(), classes)?;
    let source = Source::of([engine.device()], test, false);
    let mut feed = Feed::new(engine.device(), test, source, test.batch_size())?;
    let mut batches = source.epoch(test, 0, 0);
    while let Some(batch) = batches.next_unless(interrupt) {
        let batch = batch?;
        let batch = batch.batch();
        if interrupt.is_set() {
            return Err(Error::Interrupted("the evaluation was not finished".into()));
        }
        let n = batch.labels.len();
        record.next(batch.labels)?;
        feed.set(&batch.images, engine)?;
        feed.write(engine);
        let logits = engine.run()?;
        cross_entropy(&mut record, logits.view(0..n * classes), 0.0, None)?;
        images += n as u64;
    }
    // Only now, so that a GPU works at a batch while the next one is made ready.
    let LossSum { loss, correct } = record.sum()?;
    if images == 0 {
        return Err(Error::Data("there are no test images to evaluate on".into()));
    }
    // An accuracy beside it would be that of the images whose logits are finite, if any.
    if !loss.is_finite() {
        let wider = if engine.device().precision() == Dtype::F32 { "" } else { ", or evaluate with --precision f32" };
        return Err(Error::NotFinite(format!(
            "{}: logits on {} are not finite, so it has no accuracy; train it again with a lower --lr{wider}",
            engine.graph().name,
            test.dataset().name()
        )));
    }
    Ok(Evaluation { top1: 100.0 * correct as f64 / images as f64, loss: loss / images as f64, images })
}

/// Refuses images or classes that are not the network's.
pub(super) fn check_data(graph: &Graph, loader: &Loader) -> Result<()> {
    let data = loader.dataset();
    let (own, theirs) = (graph.input_shape(), data.shape());
    if (own.h, own.w, own.c) == (theirs.height, theirs.width, theirs.channels) && data.classes() <= graph.classes() {
        return Ok(());
    }
    Err(Error::Data(format!(
        "{} takes {own} images of {} classes, {} has {theirs} images of {} classes; give a network and data that fit",
        graph.name,
        graph.classes(),
        data.name(),
        data.classes()
    )))
}
