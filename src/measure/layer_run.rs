//! Steps on a device: operands of noise, rotated, and the launches that are timed.

use std::sync::{Arc, Mutex};

use super::launches::{Launches, rotation};
use super::layers::{LayerPass, TimedLayer};
use super::machine::Machine;
use super::noise::Noise;
use crate::Result;
use crate::device::Device;
use crate::device::configurations::Decision;
use crate::engine::{Sequence, SequenceRun};
use crate::ops::step::{Extent, Place, Store, ValueId};
use crate::ops::team;

/// How much larger than a core's own cache all sets of a micro-batch's weights together are: between two passes of a
/// network those of its other layers have been there.
const CORE_CACHES: usize = 2;
/// Most sets of them.
const MAX_WEIGHT_SETS: usize = 32;

/// Times layers on one device.
#[derive(Clone)]
pub struct LayerBench {
    device: Device,
    noise: Arc<Noise>,
}

impl LayerBench {
    /// A bench on a device.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self { device: device.clone(), noise: Arc::new(Noise::new(device)?) })
    }

    /// A layer ready to be timed.
    ///
    /// # Errors
    /// When the device is out of memory or a launch fails.
    pub fn launches(&self, layer: &TimedLayer) -> Result<Launches<'static>> {
        let packed = layer.pass == LayerPass::Forward;
        self.whole_batches(&layer.steps, layer.problem.n, layer.bytes(self.device.precision().bytes() as u64), packed)
    }

    /// Steps ready to be timed as inference runs them: `at_once` images go through them together. On the CPU those are
    /// micro-batches, one a thread, whose values stay in its cache; elsewhere it is the whole batch.
    ///
    /// # Errors
    /// When the device is out of memory or a launch fails.
    pub fn passes(&self, steps: &Sequence, batch: usize, at_once: usize) -> Result<Launches<'static>> {
        if self.device != Device::Cpu {
            let bytes = steps.cost().map_or(0, |cost| cost.bytes(batch, self.device.precision()));
            return self.whole_batches(steps, batch, bytes, true);
        }
        let (bench, steps, idle) = (self.clone(), steps.clone(), Mutex::default());
        let micro = MicroBatches { bench, steps, at_once, idle };
        let images = move |first: usize| at_once.min(batch - first * at_once);
        Launches::whole(&self.device, move || {
            let outcomes = team::map(batch.div_ceil(at_once), |first| micro.run(images(first)));
            outcomes.into_iter().collect()
        })
    }

    /// With `packed` weights are packed before, as in inference.
    fn whole_batches(&self, steps: &Sequence, n: usize, bytes: u64, packed: bool) -> Result<Launches<'static>> {
        let sets = rotation(&self.device, usize::try_from(bytes).unwrap_or(usize::MAX));
        let mut operands = (0..sets).map(|_| self.operands(steps, n)).collect::<Result<Vec<SequenceRun>>>()?;
        if packed {
            operands.iter_mut().try_for_each(SequenceRun::pack_weights)?;
        }
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
        let mut operands = self.operands(&layer.steps, layer.problem.n)?;
        let decisions = gpu.configurations().watch(|| {
            operands.run();
            self.device.check()
        })?;
        let mut names: Vec<String> = Vec::new();
        for name in decisions.iter().map(Decision::to_string) {
            // Of two problems with the same outcome one is told.
            if !names.contains(&name) {
                names.push(name);
            }
        }
        Ok((!names.is_empty()).then(|| names.join(", ")))
    }

    /// One set of operands: noise with the moments of activations, signed noise for weights, and ones for what is per
    /// channel, which makes a statistic of mean 1 and deviation 1.
    pub(super) fn operands(&self, steps: &Sequence, n: usize) -> Result<SequenceRun> {
        let mut run = SequenceRun::new(&self.device, steps, n)?;
        for (id, value) in steps.values.iter() {
            let Some(buffer) = run.buffer_mut(id) else { continue };
            match (value.place, value.extent, value.store) {
                (_, Extent::PerImage(_), _) => self.noise.fill_activations(buffer),
                (Place::Weight(_), ..) => self.noise.fill_signed(buffer),
                (_, _, Store::Activation | Store::Float | Store::Sum) => buffer.write(&vec![1.0; buffer.len()])?,
            }
        }
        Ok(run)
    }

    /// The weights that steps read, packed as inference packs them, so often that together they do not stay in a core's cache.
    fn weight_sets(&self, steps: &Sequence) -> Result<Vec<SequenceRun>> {
        let is_weight = |id: &ValueId| matches!(steps.values.get(*id).place, Place::Weight(_));
        let elements = steps.used().into_iter().filter(is_weight).map(|id| steps.values.get(id).len(1)).sum::<usize>();
        let bytes = (elements * size_of::<f32>()).max(1);
        let sets = (CORE_CACHES * Machine::here().core_cache_bytes()).div_ceil(bytes).clamp(1, MAX_WEIGHT_SETS);
        let set = |_| {
            // Of no image there are the weights alone.
            let mut run = self.operands(steps, 0)?;
            run.pack_weights()?;
            Ok(run)
        };
        (0..sets).map(set).collect()
    }
}

/// What one thread takes a micro-batch through.
struct Lane {
    run: SequenceRun,
    weights: Vec<SequenceRun>,
    next: usize,
}

/// Steps on the host, and operands for as many micro-batches as threads were in at a time.
struct MicroBatches {
    bench: LayerBench,
    steps: Sequence,
    at_once: usize,
    idle: Mutex<Vec<Lane>>,
}

impl MicroBatches {
    /// Takes `n` images through the steps.
    fn run(&self, n: usize) -> Result<()> {
        let idle = self.idle.lock().unwrap_or_else(|e| e.into_inner()).pop();
        let mut lane = match idle {
            Some(lane) => lane,
            None => {
                let (run, weights) =
                    (self.bench.operands(&self.steps, self.at_once)?, self.bench.weight_sets(&self.steps)?);
                Lane { run, weights, next: 0 }
            }
        };
        let Lane { run, weights, next } = &mut lane;
        *next = (*next + 1) % weights.len();
        run.swap_weights(&mut weights[*next]);
        run.run_first(n);
        self.idle.lock().unwrap_or_else(|e| e.into_inner()).push(lane);
        Ok(())
    }
}
