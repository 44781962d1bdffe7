//! Values within a network on images, as inference gives them.

use super::evaluate::check_data;
use super::feed::{Feed, Source};
use super::interrupt::Interrupt;
use crate::data::Loader;
use crate::device::{Device, View};
use crate::engine::{Engine, EngineOptions, Fusion};
use crate::index::NodeId;
use crate::model::Model;
use crate::{Error, Result};

/// Runs all images of a loader forward, one step a node and with the running statistics, and calls `visit` with every asked
/// node and its values `[n, h, w, c]` after each batch.
///
/// # Errors
/// Images that do not fit the network, a failing device, an error of `visit`, or [`Error::Interrupted`].
pub fn observe(
    device: &Device,
    model: &Model,
    nodes: &[NodeId],
    images: &Loader,
    interrupt: &Interrupt,
    visit: &mut dyn FnMut(NodeId, &[f32]) -> Result<()>,
) -> Result<()> {
    check_data(&model.graph, images)?;
    let batch = images.batch_size();
    let options = EngineOptions { batch, fusion: Fusion::PerNode, training: false, taps: nodes.to_vec() };
    let mut engine = Engine::new(device, model, &options)?;
    let source = Source::of([device], images, false);
    let mut feed = Feed::new(device, images, source, batch)?;
    let mut batches = source.epoch(images, 0, 0);
    let mut copy = Vec::new();
    while let Some(batch) = batches.next_unless(interrupt) {
        let batch = batch?;
        if interrupt.is_set() {
            return Err(Error::Interrupted("the images were not all looked at".into()));
        }
        feed.set(&batch.batch().images, &mut engine)?;
        feed.write(&mut engine);
        engine.run()?;
        for &node in nodes {
            match engine.tap(node)? {
                View::Host(values) => visit(node, values)?,
                View::Gpu(values) => {
                    copy.resize(values.len(), 0.0);
                    values.read(&mut copy)?;
                    visit(node, &copy)?;
                }
                View::Packed(..) | View::HostSums(_) => {
                    return Err(Error::Graph(format!("node {node} has no activations to look at")));
                }
            }
        }
    }
    Ok(())
}
