//! `inverted_residual.cu` and `inverted_residual_band.cu`.

use super::config::InvertedResidualConfig;
use super::{InvertedResidualOperands, InvertedResidualProblem};
use crate::device::driver::ConvGeometry;
use crate::device::gpu::{GpuView, GpuViewMut};
use crate::ops::activation::Act;
use crate::ops::config::KernelPass;
use crate::ops::cuda::conv::geometry;
use crate::ops::cuda::{Call, configured};
use crate::ops::step::Backend;

/// Threads of a block of tiles, and of bands.
const TILE_THREADS: usize = 128;
const BAND_THREADS: usize = 256;

/// y = the block's result, hidden values staying on chip.
pub(super) fn forward(
    p: &InvertedResidualProblem,
    x: GpuView<'_>,
    of: &InvertedResidualOperands<'_>,
    y: &GpuViewMut<'_>,
) {
    assert!(p.has_step(Backend::Cuda), "no kernel for a depthwise window of {:?}", p.window);
    let Some(config) = configured(p, KernelPass::Forward, x) else { return };
    // The window is the depthwise convolution's, the channels are the block's.
    let block =
        ConvGeometry { c_in: p.input.c as i32, c_out: p.output.c as i32, groups: 1, ..geometry(&p.depthwise()) };
    let (expand, hidden) = (p.expand().map_or(0, |expand| expand.weight_len()), p.hidden);
    let act = |conv: &super::FoldedConv<'_>| Some(Act::from(conv.clamp));
    let instance = match config {
        InvertedResidualConfig::Tile(tile) => tile.instance(p, x.dtype()),
        InvertedResidualConfig::Band(band) => band.instance(x.dtype()),
    };
    let call = Call::new(x.gpu(), instance)
        .reads("x", x, p.n * p.input.len())
        .reads_if("the expansion's weights", of.expand.map(|conv| conv.w.gpu()), expand)
        .reads_if("the expansion's bias", of.expand.map(|conv| conv.b.gpu()), hidden)
        .reads("the depthwise weights", of.depthwise.w.gpu(), p.depthwise().weight_len())
        .reads("the depthwise bias", of.depthwise.b.gpu(), hidden)
        .reads("the projection's weights", of.project.w.gpu(), p.project().weight_len())
        .reads("the projection's bias", of.project.b.gpu(), p.output.c)
        .reads_if("the residual", of.residual.map(|residual| residual.gpu()), p.n * p.output.len())
        .act(act(&of.expand.unwrap_or(of.depthwise)))
        .act(act(&of.depthwise))
        .act(act(&of.project))
        .writes("y", y, p.n * p.output.len())
        .value(block)
        .sizes([hidden]);
    match config {
        InvertedResidualConfig::Tile(tile) => call.launch_of(TILE_THREADS, tile.grid(p)),
        InvertedResidualConfig::Band(band) => {
            let Some(of) = band.rows(p) else { return };
            call.sizes([of.rows, of.images]).launch_with(BAND_THREADS, band.grid(p), band.shared(p));
        }
    }
}
