//! A layer on a device: operands of noise, rotated, and the steps that are timed.

use super::launches::{Launches, rotation};
use super::layers::TimedLayer;
use super::noise::Noise;
use crate::Result;
use crate::device::Device;
use crate::engine::SequenceRun;
use crate::ops::step::{Extent, Place, Store};

/// Times layers on one device.
pub struct LayerBench {
    device: Device,
    noise: Noise,
}

impl LayerBench {
    /// A bench on a device.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self { device: device.clone(), noise: Noise::new(device)? })
    }

    /// A layer ready to be timed.
    ///
    /// # Errors
    /// When the device is out of memory or a launch fails.
    pub fn launches(&self, layer: &TimedLayer) -> Result<Launches<'static>> {
        let bytes = usize::try_from(layer.bytes(self.device.precision().bytes() as u64)).unwrap_or(usize::MAX);
        let sets = rotation(&self.device, bytes);
        let mut operands = (0..sets).map(|_| self.operands(layer)).collect::<Result<Vec<SequenceRun>>>()?;
        Launches::new(&self.device, sets, move |set| {
            operands[set].run();
            Ok(())
        })
    }

    /// The kernel configurations that a layer's steps are launched with, such as `pointwise_forward=128x128-vector`; the host
    /// has none.
    ///
    /// # Errors
    /// When the device is out of memory or a launch fails.
    pub fn configurations(&self, layer: &TimedLayer) -> Result<Option<String>> {
        let Device::Gpu(gpu, _) = &self.device else { return Ok(None) };
        let mut operands = self.operands(layer)?;
        let names = gpu.watch_configurations(|| {
            operands.run();
            self.device.check()
        })?;
        Ok((!names.is_empty()).then(|| names.join(", ")))
    }

    /// One set of operands: noise with the moments of activations, signed noise for weights, and ones for what is per
    /// channel, which makes a statistic of mean 1 and deviation 1.
    fn operands(&self, layer: &TimedLayer) -> Result<SequenceRun> {
        let mut run = SequenceRun::new(&self.device, &layer.steps, layer.problem.n)?;
        for (id, value) in layer.steps.values.iter() {
            let Some(buffer) = run.buffer_mut(id) else { continue };
            match (value.place, value.extent, value.store) {
                (_, Extent::PerImage(_), _) => self.noise.fill_activations(buffer),
                (Place::Weight(_), ..) => self.noise.fill_signed(buffer),
                (_, _, Store::Activation | Store::Float | Store::Sum) => buffer.write(&vec![1.0; buffer.len()])?,
            }
        }
        Ok(run)
    }
}
